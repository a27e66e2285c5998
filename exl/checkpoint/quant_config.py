"""A checkpoint's quantization parameters, from the files that have them: which files, and of which method each is.

Files are those that AutoGPTQ and GPTQModel look for; ``exl/checkpoint/quant/`` has a module for each method.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exl.checkpoint.config_reader import read_json
from exl.checkpoint.header import shown
from exl.checkpoint.quant import auto_round, awq, compressed_tensors, fp8, gptq
from exl.checkpoint.quant.base import QuantConfig, QuantMethod
from exl.checkpoint.quant.foreign import TAKE_INSTEAD, refuse_method
from exl.checkpoint.quant.values import read_text
from exl.errors import ConfigError, UnsupportedModelError

_FILES = ("quantize_config.json", "quant_config.json")  # AutoGPTQ's order; then config.json's quantization_config
_IN_CONFIG = "config.json: quantization_config"
_IN_TEXT_CONFIG = "config.json: text_config: quantization_config"  # of a model for images and text, in some folders
_METHODS: Mapping[str, QuantMethod] = {
    "gptq": gptq,
    "awq": awq,
    "auto-round": auto_round,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
}

# There is nothing to say about gpt-oss' own: tensors show what they are. In files of other families the same word
# stands for layouts of other programs.
_SHOWN_BY_TENSORS = ("mxfp4", "gpt_oss")


def read_quant_config(folder: str | os.PathLike[str], config_json: Mapping[str, Any]) -> QuantConfig | None:
    """None: the checkpoint is not quantized. ``config_json``: the content of the folder's ``config.json``.

    Where several files describe the quantization, a value that one of them leaves out is taken from the others. If they
    disagree, ``others`` has what the other files say: ``exl.formats.settle_quant`` finds out which is true.
    Raises ``ConfigError``, which names file and key, for invalid values; ``UnsupportedModelError``, which names the
    method or format, for a quantization that exl does not have.
    """

    def read(name: str) -> Mapping[str, Any] | None:
        path = Path(folder) / name
        return read_json(path) if os.path.lexists(path) else None  # a broken link is an error

    return find_quant_config(read, config_json)


def find_quant_config(
    read: Callable[[str], Mapping[str, Any] | None], config_json: Mapping[str, Any]
) -> QuantConfig | None:
    """Like :func:`read_quant_config`; ``read`` returns a file's JSON object by name, None if there is no such file."""
    found = [(name, values) for name in _FILES if (values := read(name)) is not None]
    text_config = config_json.get("text_config")
    places = ((_IN_CONFIG, config_json), (_IN_TEXT_CONFIG, text_config if isinstance(text_config, Mapping) else {}))
    for source, values in places:
        in_config = values.get("quantization_config")
        if in_config is None:
            continue
        if not isinstance(in_config, Mapping):
            raise ConfigError(f"{source}: found {shown(in_config)}, expected an object")
        if (in_config.get("quant_method"), config_json.get("model_type")) != _SHOWN_BY_TENSORS:
            found.append((source, in_config))
    if not found:
        return None
    method, stated = _read_files(found)
    defaults = {key: value for _, values in reversed(stated) for key, value in values.items()}
    first, *others = (_METHODS[method].make(source, defaults | values) for source, values in stated)
    return replace(first, others=tuple(other for other in others if not first.agrees(other)))


def _read_files(found: list[tuple[str, Mapping[str, Any]]]) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The method, and what each file says. One that exl does not read is an error, also beside others that it does."""
    stated: list[tuple[str, str, dict[str, Any]]] = []
    problems: list[ConfigError | UnsupportedModelError] = []
    for source, values in found:
        try:
            method = _method_of(values, source)
            stated.append((method, source, _METHODS[method].read_fields(values, source)))
        except (ConfigError, UnsupportedModelError) as error:
            problems.append(error)
    if problems and stated:
        raise type(problems[0])(
            f"{problems[0]}; {stated[0][1]} beside it describes a checkpoint of {stated[0][0]}: correct the file that "
            "is wrong, or delete it"
        )
    if problems:
        raise problems[0]
    if len({method for method, _, _ in stated}) > 1:
        said = " and ".join(f"{method} in {source}" for method, source, _ in stated)
        raise ConfigError(f"found {said}: correct the file that is wrong, or delete it")
    return stated[0][0], [(source, fields) for _, source, fields in stated]


def parse_quant_config(values: Mapping[str, Any], source: str) -> QuantConfig:
    """One file's. Raises the errors of :func:`read_quant_config`."""
    method = _METHODS[_method_of(values, source)]
    return method.make(source, method.read_fields(values, source))


def _method_of(values: Mapping[str, Any], source: str) -> str:
    """By its name; files of programs that write none by the keys that they have."""
    named = {key: read_text(values, key, source) for key in ("quant_method", "method")}
    for key, method in named.items():
        if method is not None and method.replace("_", "-") not in _METHODS:
            raise refuse_method(method, f"{source}: {key}")
    found = {method.replace("_", "-") for method in named.values() if method is not None}
    if len(found) > 1:
        raise ConfigError(f"{source}: found {shown(named)}, expected names of one thing to agree")
    if found:
        return found.pop()
    if any(values.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        raise UnsupportedModelError(f"{source}: found a bitsandbytes configuration (load_in_...); {TAKE_INSTEAD}")
    if "config_groups" in values:
        return "compressed-tensors"
    if read_text(values, "version", source) is not None and "zero_point" in values:  # AutoAWQ's files name no method
        return "awq"
    return "gptq"
