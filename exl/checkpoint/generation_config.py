"""The values of a model folder's ``generation_config.json``."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl.checkpoint.config_reader import ConfigReader, read_json
from exl.errors import ConfigError

logger = logging.getLogger(__name__)

_DRAWS = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # what do_sample turns on


@dataclass(frozen=True)
class GenerationDefaults:
    """The values of ``generation_config.json``. None: absent; exl's own default applies.

    A value that exl cannot honour is ignored as if it were absent, with one warning: the file only says what happens
    if a request says nothing, so it must not keep a model from loading.
    """

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> GenerationDefaults:
        """All values are None if the folder has no such file. Raises ``ConfigError`` if it is not a JSON object."""
        path = Path(folder) / "generation_config.json"
        if not path.exists():
            return cls()
        read = ConfigReader(read_json(path), str(path))
        bos_ids, eos_ids = (_valid(read.token_ids, key) or () for key in ("bos_token_id", "eos_token_id"))
        # Without do_sample, decoding is greedy, whatever temperature the file gives; with it, the default temperature
        # is 1 (as in transformers).
        chosen = {"repetition_penalty": _valid(read.sampling, "repetition_penalty")}
        if _valid(read.flag, "do_sample", False):
            chosen |= {name: _valid(read.sampling, name) for name in _DRAWS}
            chosen["temperature"] = 1.0 if chosen["temperature"] is None else chosen["temperature"]
        return cls(bos_id=next(iter(bos_ids), None), eos_ids=eos_ids, **chosen)


def _valid(read: Callable[..., Any], key: str, *default: Any) -> Any:
    """A value of generation_config.json, or None with a warning that names file, key and value."""
    try:
        return read(key, *default)
    except ConfigError as error:
        _warn_once(f"{error}; it is ignored")
        return None


@functools.cache
def _warn_once(text: str) -> None:
    """Once per process: a file is read for several purposes."""
    logger.warning("%s", text)
