"""exl runs GPTQ-quantized language models on the GPUs people own.

    import exl

    llm = exl.load("path/to/model")
    print(llm.generate("Once upon a time", max_tokens=100).text)

Public names are imported when first used, so that ``import exl`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import exl.forks  # noqa: F401  registers its hooks: forked children can use what their parent loaded
from exl.errors import (
    CheckpointError,
    ConfigError,
    ExlError,
    KernelError,
    MemoryBudgetError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from exl.chat import Chat
    from exl.llm import LLM, Completion, TextIterator, load
    from exl.planning.from_headers import plan
    from exl.planning.plan import MemoryPlan
    from exl.sampling import SamplingParams
    from exl.text.logprobs import TokenLogprob

__version__ = "0.1.0"

_HOMES = {
    "Chat": "exl.chat",
    "LLM": "exl.llm",
    "Completion": "exl.llm",
    "MemoryPlan": "exl.planning.plan",
    "SamplingParams": "exl.sampling",
    "TextIterator": "exl.llm",
    "TokenLogprob": "exl.text.logprobs",
    "load": "exl.llm",
    "plan": "exl.planning.from_headers",
}

__all__ = [
    "LLM",
    "Chat",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "ExlError",
    "KernelError",
    "MemoryBudgetError",
    "MemoryPlan",
    "SamplingParams",
    "TextIterator",
    "TokenLogprob",
    "UnsupportedModelError",
    "load",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'exl' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
