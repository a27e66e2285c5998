"""Which adapters a model is to be loaded with: what ``lora=`` may be, as names and folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from exl.checkpoint.header import shown
from exl.checkpoint.hub import find_adapter
from exl.checkpoint.hub_errors import Token
from exl.errors import ConfigError

MAX_ADAPTERS = 100  # of one model
Adapters = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


@dataclass(frozen=True)
class AdapterChoice:
    """``folders``: by the names that requests use. ``default``: the one that a request gets which names none."""

    folders: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    default: str | None = None


def find_adapters(asked: Adapters | None, *, token: Token = None, quiet: bool = False) -> AdapterChoice:
    """One folder, or the id of a repository: its adapter applies to all requests unless they say otherwise. A list, or
    a mapping of names: requests choose one by its name, and get the model itself if they name none.

    Where there are no names, an adapter is called as its folder, or the repository. Raises ``ConfigError`` for names
    that are none and for two adapters of one name, ``CheckpointError`` if there is no such folder or repository.
    """
    if asked is None:
        return AdapterChoice()
    if isinstance(asked, str | Path):
        name = _name_of(asked)
        return AdapterChoice(_found({name: asked}, token, quiet), name)
    if isinstance(asked, Mapping):
        return AdapterChoice(_found(asked, token, quiet))
    if not isinstance(asked, Sequence) or isinstance(asked, bytes):
        raise ConfigError(
            f"lora: found {shown(asked)}, expected the folder of an adapter, a list of folders, or a mapping of names "
            "to folders"
        )
    named: dict[str, str | Path] = {}
    for folder in asked:
        name = _name_of(folder)
        if name in named:
            raise ConfigError(f"lora: found two adapters called {name!r}, expected a mapping that names them apart")
        named[name] = folder
    return AdapterChoice(_found(named, token, quiet))


def _name_of(folder: object) -> str:
    if not isinstance(folder, str | Path) or not str(folder):
        raise ConfigError(f"lora: found {shown(folder)}, expected the folder of an adapter")
    path = Path(folder).expanduser()
    return path.resolve().name if path.exists() else str(folder)


def _found(asked: Mapping[str, str | Path], token: Token, quiet: bool) -> Mapping[str, Path]:
    if len(asked) > MAX_ADAPTERS:
        raise ConfigError(f"lora: found {len(asked)} adapters, expected at most {MAX_ADAPTERS}")
    for name, folder in asked.items():
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ConfigError(f"lora: found an adapter called {shown(name)}, expected a name of printable characters")
        _name_of(folder)
    return MappingProxyType({name: find_adapter(folder, token=token, quiet=quiet) for name, folder in asked.items()})
