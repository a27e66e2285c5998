"""The values of the forms -> options of ``exl.load`` and ``LLM.stream``, or one clear error line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import exl
from exl.engine.build import choose_device
from exl.errors import ConfigError
from exl.planning.devices import STARTED_LINES
from exl.planning.options import EngineOptions
from exl.sampling_params import INTEGER, OPTIONS


@dataclass(frozen=True)
class Slider:
    """Of the sampling form: what it is called, and which values are handy. What they mean is in exl's own table."""

    label: str
    low: float
    high: float
    step: float
    value: float | None = None  # None: the one at which the option is off

    def start(self, name: str) -> float:
        return OPTIONS[name].off if self.value is None else self.value


# By option, in the order of the form.
MAIN_SLIDERS = {
    "max_tokens": Slider("Max tokens", 1, 4096, 1, 256),
    "temperature": Slider("Temperature", 0, 2, 0.05, 0.8),
    "top_k": Slider("Top-k", 0, 200, 1),
    "top_p": Slider("Top-p", 0.01, 1, 0.01, 0.95),
    "min_p": Slider("Min-p", 0, 1, 0.01),
    "repetition_penalty": Slider("Repetition penalty", 0.5, 2, 0.05),
}
MORE_SLIDERS = {
    "frequency_penalty": Slider("Frequency penalty", -2, 2, 0.1),
    "presence_penalty": Slider("Presence penalty", -2, 2, 0.1),
    "penalty_window": Slider("Window of the penalties", 0, 4096, 64, 0),
    "dry_multiplier": Slider("DRY", 0, 5, 0.1),
    "xtc_probability": Slider("XTC: probability", 0, 1, 0.05),
    "xtc_threshold": Slider("XTC: threshold", 0.01, 0.5, 0.01, 0.1),
    "typical_p": Slider("Typical", 0.01, 1, 0.01),
    "top_n_sigma": Slider("Top-n-sigma", 0, 5, 0.1),
    "dynamic_range": Slider("Dynamic temperature", 0, 2, 0.05),
    "mirostat_tau": Slider("Mirostat", 0, 10, 0.1),
    "min_tokens": Slider("Min tokens", 0, 1024, 1),
}
SLIDERS = MAIN_SLIDERS | MORE_SLIDERS


@dataclass(frozen=True)
class LoadSettings:
    """The model and how to load it. Checked as far as possible without the model's files."""

    model: str  # a folder or a Hugging Face repository id
    options: Mapping[str, Any]  # of exl.load

    @property
    def name(self) -> str:
        return Path(self.model).name if self.is_local else self.model

    @property
    def is_local(self) -> bool:
        return Path(self.model).expanduser().exists()

    def check_device(self) -> None:
        """Raises ``ConfigError`` if the settings need a GPU that this machine does not have."""
        choose_device(EngineOptions(**self.options))

    def plan(self, loaded: exl.MemoryPlan | None = None) -> exl.MemoryPlan:
        """Plans from the headers alone. On a GPU without a given budget, the budget is the free VRAM + the VRAM that
        ``loaded`` will free. With a budget, the GPU need not be in this machine. Raises ``ExlError``."""
        options = EngineOptions(**self.options)
        planned = {name: value for name, value in self.options.items() if name != "device"}
        try:
            options, backend = choose_device(options)
        except ConfigError:
            if options.vram is None:
                raise
            backend = None
        if backend is not None:
            planned |= {"vram": options.vram, "arch": backend.arch}
            if self.options["vram"] is None and loaded is not None:
                planned["vram"] = options.vram + _freed_bytes(loaded)
        return exl.plan(self.model, **planned)


def load_settings(
    model: str | None, device: str, kv_cache: str, ram: str, vram: str, context: str, head: str
) -> LoadSettings:
    """Raises ``ConfigError`` that names the field."""
    model = (model or "").strip()
    if not model:
        raise ConfigError("model: found nothing, expected a folder or a Hugging Face repository id")
    sizes = [size.strip() for size in (vram or "").split(",")]
    options = {
        "device": device,
        "kv_cache": kv_cache,
        "ram": (ram or "").strip() or None,
        "vram": None if sizes == [""] else sizes[0] if len(sizes) == 1 else sizes,
        "context": _context((context or "").strip()),
        "head": "file" if head == "stored" else int(head.split()[0]),
    }
    EngineOptions(**options)  # raises for invalid values
    return LoadSettings(model, options)


def sampling_options(*values: float | str | None) -> dict[str, Any]:
    """Keywords of ``LLM.stream`` from the form's values: those of SLIDERS, then the seed. None, from a slider whose
    number was deleted, leaves the value to the model."""
    *numbers, seed = values
    options: dict[str, Any] = {
        name: int(value) if value is not None and OPTIONS[name].kind is INTEGER else value
        for name, value in zip(SLIDERS, numbers, strict=True)
    }
    if options["max_tokens"] is None:
        options["max_tokens"] = OPTIONS["max_tokens"].default
    return options | {"seed": _seed((seed or "").strip())}


def _freed_bytes(loaded: exl.MemoryPlan) -> int:
    """The VRAM that closing a model frees: all except the CUDA context and cuBLAS's workspace."""
    lines = [line for line in loaded.lines if line.device.startswith("cuda") and line.purpose not in STARTED_LINES]
    return sum(line.num_bytes for line in lines)


def _context(text: str) -> int | str | None:
    if text in ("", "auto"):
        return text or None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"context: found {text!r}, expected a number of tokens, auto, or nothing for the model's own"
        ) from None


def _seed(text: str) -> int | None:
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"seed: found {text!r}, expected a whole number, or nothing for another each time") from None
