"""Explains keywords of other libraries: a TypeError that says what exl calls them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

_OURS = {
    "ctx_size": "context",
    "do_sample": "temperature (0 is greedy)",
    "gpu_memory_utilization": 'vram (a size such as "6GB")',
    "logprobs": "top_logprobs",
    "load_in_4bit": "a GPTQ checkpoint (exl quantize makes one)",
    "load_in_8bit": "a GPTQ checkpoint (exl quantize makes one)",
    "max_length": "max_tokens",
    "max_model_len": "context",
    "max_new_tokens": "max_tokens",
    "max_seq_len": "context",
    "model_path": "model",
    "n_ctx": "context",
    "n_gpu_layers": "resident_layers",
    "n_predict": "max_tokens",
    "num_ctx": "context",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "temp": "temperature",
}

F = TypeVar("F", bound=Callable)


def explain_foreign_keywords(function: F) -> F:
    """A decorator: an unknown keyword raises ``TypeError`` that gives exl's own name for it, if there is one."""
    known = [p.name for p in inspect.signature(function).parameters.values() if p.name != "self"]

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        for name in kwargs:
            if name not in known:
                ours = _OURS.get(name)
                accepted = ours is not None and ours.split()[0] in (*known, "a")
                hint = f"exl calls it {ours}" if accepted else f"it takes {', '.join(known)}"
                raise TypeError(f"{function.__name__}() has no keyword {name!r}: {hint}")
        return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
