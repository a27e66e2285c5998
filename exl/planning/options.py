"""How a model is loaded, checked. Quick to import."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from exl.checkpoint.remote import RemoteFolder
from exl.checkpoint.rope_config import check_rope
from exl.errors import ConfigError
from exl.families.config import ModelConfig
from exl.layout.cpu_steps import ARITHMETIC
from exl.layout.kv import KV_BITS
from exl.threads import check_threads
from exl.units import one_each, parse_budget

_MAX_DEFAULT_CONTEXT = 8192  # a cache for 128k tokens that nobody asked for would not fit anywhere
_MAX_TOKENS = 1 << 30
EMBED = ("auto", "device", "disk")


@dataclass(frozen=True)
class Reading:
    """What is made of a checkpoint while it is read: options of ``EngineOptions`` that change the model itself, or are
    read with it."""

    head: str | int = "file"
    dense: str | int = "file"
    rope: Mapping[str, object] | None = None
    lora: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))


AS_IT_IS = Reading()


@dataclass(frozen=True)
class EngineOptions:
    """Checked when made: ``ConfigError`` names the option, what was found and what was expected."""

    device: str = "auto"  # or "cpu" or "cuda"; "auto" is a GPU if there is one that exl can use, or if vram is given
    # Of each GPU, in the order in which layers are given to them; one size is one GPU. None: all but a margin.
    vram: int | str | Sequence[int | str] | None = None
    ram: int | str | None = None  # what exl may use beyond the interpreter with torch imported; None: all there is
    context: int | str | None = None  # tokens; "auto": as many as fit; None: the model's maximum, 8192 at most
    kv_cache: str = "f16"
    max_sequences: int = 16  # that run at once
    max_queue: int | None = None  # requests that may wait for that; None: any number
    # Of all sequences; "auto": what the budgets leave once the layers are where they are with one context; None: one,
    # or what one sequence needs of it at once where all layers have a window.
    cache_tokens: int | str | None = None
    # Layers that have a window give back what it does not reach, where others have none; False: all keep all tokens.
    window_cache: bool = True
    kv_ram: int | str | None = None  # pinned RAM for pages that leave a GPU's cache; None: they are computed again
    prefill_chunk: int = 512  # rows computed at once
    prefill_window: int = 4096  # rows that go through a layer before the next layer's turn
    resident_layers: int | None = None  # at most this many, whatever the budget
    head: str | int = "file"  # or 8 or 4: bits that a dense head is rounded to when it is loaded
    dense: str | int = "file"  # the same of what else is dense in the layers of a file
    embed: str = "auto"  # on a GPU: or "device", "disk": see docs/memory.md
    packed_folder: str | Path | None = None  # where streamed layers are kept; None: the user's cache folder
    threads: int | None = None  # of the CPU, at most; None: all that the process may use
    arithmetic: str | None = None  # of quantized layers on a CPU: "int16", "int8" or "f32"; None: "int16"
    draft: Path | RemoteFolder | None = None  # a smaller model's folder, which guesses what this one will say
    rope: Mapping[str, object] | None = None  # in the place of the rope_parameters of config.json; None: as they are
    lora: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))  # folders of adapters, by name

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, object]) -> EngineOptions:
        """``arguments``: a public function's ``locals()``, of which those with an option's name are taken."""
        return cls(
            **{field.name: arguments[field.name] for field in dataclasses.fields(cls) if field.name in arguments}
        )

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device: found {self.device!r}, expected 'auto', 'cpu' or 'cuda'")
        if self.device == "cpu" and self.vram is not None:
            raise ConfigError(f"vram: found {self.vram!r} with device='cpu', which has none: expected ram=")
        if self.vram is not None and not self.vram_bytes:
            raise ConfigError("vram: found an empty list, expected a size for each GPU")
        if not isinstance(self.kv_cache, str) or self.kv_cache not in KV_BITS:
            raise ConfigError(f"kv_cache: found {self.kv_cache!r}, expected one of {', '.join(KV_BITS)}")
        self._check_counts()
        for name, bits in (("head", self.head), ("dense", self.dense)):
            if isinstance(bits, bool) or bits not in ("file", 8, 4):
                raise ConfigError(f"{name}: found {bits!r}, expected 'file', 8 or 4")
        if not isinstance(self.window_cache, bool):
            raise ConfigError(f"window_cache: found {self.window_cache!r}, expected True or False")
        if self.embed not in EMBED:
            raise ConfigError(f"embed: found {self.embed!r}, expected one of {', '.join(EMBED)}")
        if self.arithmetic is not None and self.arithmetic not in ARITHMETIC:
            raise ConfigError(f"arithmetic: found {self.arithmetic!r}, expected one of {', '.join(ARITHMETIC)}")
        if self.prefill_window < self.prefill_chunk:
            raise ConfigError(
                f"prefill_window: found {self.prefill_window}, expected prefill_chunk, {self.prefill_chunk}, or more"
            )
        if self.ram is not None:
            parse_budget(self.ram, "ram")
        if self.kv_ram is not None:
            parse_budget(self.kv_ram, "kv_ram")
        check_threads(self.threads)
        if self.rope is not None:
            check_rope(self.rope)

    def _check_counts(self) -> None:
        least = {"max_sequences": 1, "prefill_chunk": 1, "prefill_window": 1, "resident_layers": 0, "max_queue": 0}
        for name, low in ({"context": 1, "cache_tokens": 1} | least).items():
            value, may_be_auto = getattr(self, name), name in ("context", "cache_tokens")
            if (value is None and (may_be_auto or name in ("resident_layers", "max_queue"))) or (
                may_be_auto and value == "auto"
            ):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < _MAX_TOKENS:
                raise ConfigError(
                    f"{name}: found {value!r}, expected a whole number from {low} to {_MAX_TOKENS - 1}"
                    + (" or 'auto'" if may_be_auto else "")
                )

    @property
    def reading(self) -> Reading:
        return Reading(self.head, self.dense, self.rope, self.lora)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was asked for."""
        return self.vram is not None or self.device == "cuda"

    @property
    def vram_bytes(self) -> tuple[int, ...]:
        """Of each GPU; empty if no size was given."""
        return () if self.vram is None else tuple(parse_budget(size, "vram") for size in one_each(self.vram))

    @property
    def budget(self) -> int | None:
        return None if self.ram is None else parse_budget(self.ram, "ram")


def default_context(config: ModelConfig) -> int:
    return min(config.max_position, _MAX_DEFAULT_CONTEXT)
