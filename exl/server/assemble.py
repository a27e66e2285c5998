"""From the arguments of ``exl serve`` to its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from exl.errors import ConfigError
from exl.load_model import load
from exl.server.budget import Sizes
from exl.server.loading import Budgets, SharingLoader
from exl.server.models import Directory, Models
from exl.server.options import ServerOptions
from exl.server.residency import MAX_WAIT, Residency
from exl.server.served import ServedModel

_OF_ONE_MODEL = ("draft", "rope", "revision", "lora")  # arguments of ``exl.load`` that would not suit another model


def models_of(model: str | None, options: ServerOptions, arguments: Mapping[str, Any]) -> Models:
    """``model``: the first one, or None: the one that ships with exl, unless there is a directory of models.
    ``arguments``: of ``exl.load``. Raises ``ConfigError`` for what makes no sense together."""
    names = options.served_names or (model_name(model),)
    if options.models_dir is None:  # then the machine is this model's alone
        residency = _residency(options)
        return Models(
            *(names[0], lambda tell: load(model, **arguments, progress=tell), names[1:]),
            residency=residency,
            adapters=_adapters(arguments),
        )
    own = {key: arguments[key] for key in _OF_ONE_MODEL if arguments.get(key) is not None}
    if model is None:
        _refuse_without_model(own | ({"served_model_name": options.served_names} if options.served_names else {}))
    common = {key: value for key, value in arguments.items() if key not in _OF_ONE_MODEL}
    budgets = Budgets(common)
    residency = _residency(options, budgets)

    def make_loader(folder: Path) -> SharingLoader:
        return SharingLoader(folder, common, budgets)

    if model is None:
        return Models(None, None, directory=Directory(options.models_dir, make_loader), residency=residency)
    folder = Path(model).expanduser()
    directory = Directory(options.models_dir, make_loader, folder.resolve() if folder.exists() else None)
    first = SharingLoader(model, common | own, budgets)
    return Models(names[0], first, names[1:], directory=directory, residency=residency, adapters=_adapters(arguments))


def _adapters(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the first model's adapters, which clients ask for as models."""
    return tuple(arguments.get("lora") or ())


def _residency(options: ServerOptions, budgets: Callable[[], Sizes] = dict) -> Residency:
    make_served = partial(ServedModel, tool_format=options.tool_format, reasoning_format=options.reasoning_format)
    max_wait = MAX_WAIT if options.timeout is None else options.timeout
    return Residency(
        budgets, make_served, max_wait=max_wait, max_waiting=options.max_queue, idle_unload=options.idle_unload
    )


def _refuse_without_model(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        raise ConfigError(f"{key}: found {value!r} beside a directory of models, expected MODEL, too, which it is of")


def model_name(model: str | None) -> str:
    """How clients call a model that has no other name: its folder's, or the repository's."""
    if model is None:
        return "stories"
    path = Path(model)
    return path.resolve().name if path.exists() else model
