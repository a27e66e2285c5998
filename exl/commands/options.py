"""Options that commands share, each defined once: how a model is loaded, how tokens are sampled.

A command takes a group of options as one parameter; ``shared_options`` turns its fields into command-line options.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional, Union, get_args, get_origin, get_type_hints

import typer

from exl.errors import ConfigError
from exl.sampling_params import BIASES, FLAG, IDS, INTEGER, NUMBER, OPTIONS, TEXTS

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", metavar="MODEL", help="The model, in the place of the argument.")
]
Revision = Annotated[str | None, typer.Option(metavar="NAME", help="A repository's branch, tag or commit.")]
Token = Annotated[str | None, typer.Option(help="For a private or gated repository; by default the one saved by hf.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given more than once.")]
Ram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="How much RAM exl may use: 6GB, 512MiB. Layers that do not fit are streamed."),
]
Context = Annotated[
    str | None, typer.Option(metavar="N", help="Tokens for prompt and answer together, or auto: as many as fit.")
]
MaxSequences = Annotated[int, typer.Option(metavar="N", help="How many sequences run at once; others wait.")]
CacheTokens = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Tokens of all sequences in the cache, or auto: what the budgets leave. Default: one context."
    ),
]
KVRam = Annotated[
    str | None, typer.Option(metavar="SIZE", help="With a GPU, how much pinned RAM keeps what leaves the cache.")
]
KVCacheType = Annotated[str, typer.Option(metavar="TYPE", help="Type of the KV cache: f32, f16, q8, k8v4 or q4.")]
Embed = Annotated[
    str,
    typer.Option(
        metavar="PLACE",
        help="With a GPU, where the embedding is: auto (pinned RAM, if it is not also the head), device or disk.",
    ),
]
Head = Annotated[str, typer.Option(metavar="BITS", help="Round a dense head to 8 or 4 bits; file keeps it.")]
Dense = Annotated[
    str, typer.Option(metavar="BITS", help="Round what else is dense in the layers to 8 or 4 bits; file keeps it.")
]
WindowCache = Annotated[
    bool,
    typer.Option(
        "--window-cache/--no-window-cache",
        help="Whether layers with a sliding window, where others have none, keep only what it reaches.",
    ),
]
PrefillChunk = Annotated[int, typer.Option(metavar="N", help="Rows computed at once.")]
PrefillWindow = Annotated[
    int, typer.Option(metavar="N", help="Rows that go through one layer before the next layer starts.")
]


@dataclass(frozen=True)
class ModelName:
    """Which model: as an argument, or as an option."""

    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder or Hugging Face repository; default: the model in exl."),
    ] = None
    model_option: ModelOption = None

    @property
    def name(self) -> str | None:
        """None: the model that ships with exl. Raises ``ConfigError`` if both were given."""
        if self.model is not None and self.model_option is not None:
            raise ConfigError(
                f"model: found {self.model!r} as an argument and {self.model_option!r} after --model, expected one"
            )
        return self.model_option if self.model is None else self.model


Threads = Annotated[
    int | None, typer.Option(help="At most so many threads compute on the CPU. Default: all that exl may use.")
]

Arithmetic = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="On a CPU, how quantized layers multiply: int16 (the default), int8 or f32."),
]

Rope = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=X,NAME=X",
        help="Another RoPE than config.json says: rope_type=yarn,factor=4,original_max_position_embeddings=32768; "
        "or the JSON object of such a file.",
    ),
]


Lora = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="A LoRA adapter as peft saves it: a folder or a Hugging Face repository."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="NAME=FOLDER", help="A LoRA adapter, which is called so; may be given more than once."
    ),
]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    device: Annotated[str, typer.Option(metavar="NAME", help="auto (a GPU if there is one), cpu or cuda.")] = "auto"
    vram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="How much VRAM exl may use: 8GB. Layers that do not fit are streamed from RAM. "
            "Default: all that is free.",
        ),
    ] = None
    ram: Ram = None
    context: Context = None
    kv_cache: KVCacheType = "f16"
    max_sequences: MaxSequences = 16
    cache_tokens: CacheTokens = None
    kv_ram: KVRam = None
    embed: Embed = "auto"
    threads: Threads = None
    arithmetic: Arithmetic = None
    rope: Rope = None
    head: Head = "file"
    dense: Dense = "file"
    window_cache: WindowCache = True
    revision: Revision = None
    token: Token = None

    def engine(self, context: int | None = None) -> dict[str, object]:
        """Keywords of ``EngineOptions``. ``context``: the command's own default if the user gave none. Raises
        ``ConfigError``."""
        return {
            "device": self.device,
            "vram": parse_vram(self.vram),
            "ram": self.ram,
            "context": context if self.context is None else parse_tokens("context", self.context),
            "kv_cache": self.kv_cache,
            "max_sequences": self.max_sequences,
            "cache_tokens": parse_tokens("cache_tokens", self.cache_tokens),
            "kv_ram": self.kv_ram,
            "embed": self.embed,
            "threads": self.threads,
            "arithmetic": self.arithmetic,
            "rope": parse_rope(self.rope),
            "head": parse_rounding("head", self.head),
            "dense": parse_rounding("dense", self.dense),
            "window_cache": self.window_cache,
        }

    @property
    def source(self) -> dict[str, str | None]:
        """Keywords of ``find_model``: a repository's revision and the access token."""
        return {"revision": self.revision, "token": self.token}


@dataclass(frozen=True)
class RareLoadOptions:
    """The other options of ``exl.load``, which only long-running programs need."""

    prefill_chunk: PrefillChunk = 512
    prefill_window: PrefillWindow = 4096
    resident_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Keep at most this many layers in memory; others are streamed.")
    ] = None
    packed_folder: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where streamed layers are kept. Default: the user's cache.")
    ] = None
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A smaller model with the same vocabulary, which drafts.")
    ] = None

    def engine(self) -> dict[str, object]:
        """Keywords of ``exl.load``."""
        return dict(vars(self))


_TYPED = {NUMBER: (float, None), INTEGER: (int, None), FLAG: (bool, None), TEXTS: (list[str], "TEXT")}
_WRITTEN = {IDS: "ID,ID", BIASES: "ID=X,ID=X"}


def _draw_options() -> type:
    def asked(self: Any) -> dict[str, Any]:
        """The options that the user gave, by name."""
        given = {name: value for name, value in vars(self).items() if value is not None and value != []}
        return {
            name: OPTIONS[name].parsed("--" + name.replace("_", "-"), value)
            if OPTIONS[name].kind in _WRITTEN
            else value
            for name, value in given.items()
        }

    options = []
    for name, option in OPTIONS.items():
        if name != "max_tokens":  # for which each command has a default of its own
            kind, metavar = _TYPED.get(option.kind, (str, _WRITTEN.get(option.kind)))
            info = typer.Option(help=option.help, metavar=metavar)
            options.append((name, Annotated[Optional[kind], info], None))  # noqa: UP045
    return dataclasses.make_dataclass("DrawOptions", options, frozen=True, namespace={"asked": asked})


# How tokens are sampled; None: the model's generation_config decides.
DrawOptions = _draw_options()


def parameter_hints(command: Callable[..., Any]) -> dict[str, Any]:
    """The parameters' annotations. Up to Python 3.10, ``get_type_hints`` wraps one whose default is None in a further
    ``Optional``, under which typer would not see what ``Annotated`` says."""
    hints = get_type_hints(command, include_extras=True)
    for name, hint in hints.items():
        if get_origin(hint) is Union:
            hints[name] = next((part for part in get_args(hint) if get_origin(part) is Annotated), hint)
    return hints


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` in a form that typer accepts: each parameter that is a group becomes its fields, in order. A group
    given as a parameter's default gives its fields their defaults."""
    hints = parameter_hints(command)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not dataclasses.is_dataclass(hint):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))
            continue
        groups[parameter.name] = hint
        fields = get_type_hints(hint, include_extras=True)
        given = None if parameter.default is parameter.empty else parameter.default
        for f in dataclasses.fields(hint):
            default = f.default if given is None else getattr(given, f.name)
            parameters.append(
                inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=default, annotation=fields[f.name])
            )

    def run(**values: Any) -> None:
        made = {
            name: group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group) if f.name in values})
            for name, group in groups.items()
        }
        command(**values, **made)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def parse_vram(text: str | None) -> list[str] | None:
    """``parse_vram("10GB,24GB") == ["10GB", "24GB"]``."""
    return None if text is None else text.split(",")


def parse_tokens(name: str, text: str | None) -> int | str | None:
    """``parse_tokens("context", "4096") == 4096``. Raises ``ConfigError`` that names the option."""
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}: found {text!r}, expected a number of tokens or auto") from None


def parse_rounding(name: str, text: str) -> str | int:
    """``parse_rounding("head", "8") == 8``. Raises ``ConfigError``."""
    if text not in ("file", "8", "4"):
        raise ConfigError(f"{name}: found {text!r}, expected file, 8 or 4")
    return text if text == "file" else int(text)


def parse_loras(texts: list[str] | None) -> dict[str, str] | None:
    """``parse_loras(["poems=path/to/adapter"]) == {"poems": "path/to/adapter"}``; an adapter without a name is called
    as its folder. Raises ``ConfigError`` for two of one name."""
    if not texts:
        return None
    found: dict[str, str] = {}
    for text in texts:
        name, sign, folder = text.partition("=")
        if not sign:
            name, folder = Path(text).name, text
        if not name or not folder or name in found:
            raise ConfigError(f"--lora: found {text!r}, expected NAME=FOLDER, each with a name of its own")
        found[name] = folder
    return found


def parse_rope(text: str | None) -> dict[str, Any] | None:
    """``parse_rope("rope_type=linear,factor=2") == {"rope_type": "linear", "factor": 2}``; JSON is taken, too. Raises
    ``ConfigError``; the values are checked later."""
    if text is None:
        return None
    pairs = [part.split("=", 1) for part in text.split(",")]
    if all(len(pair) == 2 for pair in pairs) and not text.lstrip().startswith("{"):
        return {name.strip(): _json_or_text(value.strip()) for name, value in pairs}
    value = _json_or_text(text)
    if not isinstance(value, dict):
        raise ConfigError(f"--rope: found {text!r}, expected NAME=X,NAME=X or a JSON object")
    return value


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
