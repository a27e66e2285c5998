"""exl runs GPTQ-quantized language models from Python on the GPUs people own, in the least memory.

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
    ExlWarning,
    KernelError,
    MemoryBudgetError,
    QueueFullError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from exl.chat import Chat
    from exl.completion import Completion, TextIterator
    from exl.engine.stats import EngineStats
    from exl.llm import LLM
    from exl.load_model import load
    from exl.planning.ask import plan
    from exl.planning.plan import MemoryPlan
    from exl.request_options import PromptProgress
    from exl.sampling_params import SamplingParams
    from exl.text.logprobs import TokenLogprob

__version__ = "0.1.0"

_HOMES = {
    "Chat": "exl.chat",
    "LLM": "exl.llm",
    "Completion": "exl.completion",
    "EngineStats": "exl.engine.stats",
    "MemoryPlan": "exl.planning.plan",
    "PromptProgress": "exl.request_options",
    "SamplingParams": "exl.sampling_params",
    "TextIterator": "exl.completion",
    "TokenLogprob": "exl.text.logprobs",
    "load": "exl.load_model",
    "plan": "exl.planning.ask",
}

__all__ = [
    "LLM",
    "Chat",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "EngineStats",
    "ExlError",
    "ExlWarning",
    "KernelError",
    "MemoryBudgetError",
    "MemoryPlan",
    "PromptProgress",
    "QueueFullError",
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
    return sorted([*__all__, "__version__"])
