"""Explains keywords of other libraries: a TypeError that says what exl calls them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from exl.sampling_params import OPTIONS

_GPTQ = "the weights' width is the file's own: load a GPTQ checkpoint (exl quantize makes one)"
_ONE_GPU = "exl computes on one GPU; vram= limits what it takes of it"

# Another library's keyword -> exl's keyword, and what to know about it. A hint without a keyword always counts.
_HINTS: dict[str, tuple[str | None, str]] = {
    "adapter": ("lora", ""),
    "adapter_name": ("lora", ""),
    "batch_size": (None, "give a list of prompts"),
    "beam_width": ("num_beams", ""),
    "cache_dir": (None, "downloads are kept in huggingface_hub's cache"),
    "cache_max_tokens": ("cache_tokens", "cache_tokens, of all sequences"),
    "cache_mode": ("kv_cache", ""),
    "cache_size": ("cache_tokens", "cache_tokens, of all sequences"),
    "cache_type_k": ("kv_cache", ""),
    "cfg_scale": ("guidance_scale", ""),
    "ctx_size": ("context", ""),
    "device_map": ("device", 'device, "cuda" or "cpu"; what does not fit into vram= is streamed'),
    "dtype": (None, "weights keep the file's type; kv_cache= chooses the cache's"),
    "generation_config": ("params", "params, a SamplingParams"),
    "gpu_memory_utilization": ("vram", 'vram (a size such as "6GB")'),
    "gpu_split": ("vram", 'vram (a size such as "6GB")'),
    "history": (None, "chat(messages=...) takes earlier turns"),
    "input_ids": ("prompt", "prompt, which may be token ids"),
    "inputs": ("prompt", ""),
    "load_in_4bit": (None, _GPTQ),
    "load_in_8bit": (None, _GPTQ),
    "logprobs": ("top_logprobs", ""),
    "lora_path": ("lora", ""),
    "lora_request": ("lora", "lora, the name of an adapter"),
    "low_vram": ("vram", 'vram (a size such as "6GB")'),
    "max_batch_size": ("max_sequences", ""),
    "max_memory": ("vram", 'vram (a size such as "6GB"), and ram'),
    "max_model_len": ("context", ""),
    "max_num_tokens": ("cache_tokens", "cache_tokens, of all sequences"),
    "max_num_seqs": ("max_sequences", ""),
    "max_seq_len": ("context", ""),
    "max_sequence_length": ("context", ""),
    "messages": (None, "LLM.complete_chat(messages) answers messages; LLM.chat(messages=...) goes on with them"),
    "model_name": ("model", ""),
    "n_keep": ("shift_keep", "shift_keep, with overflow='shift'"),
    "model_path": ("model", ""),
    "n_batch": ("prefill_chunk", ""),
    "n_ctx": ("context", ""),
    "n_gpu_layers": ("resident_layers", ""),
    "n_parallel": ("max_sequences", ""),
    "n_seq_max": ("max_sequences", ""),
    "n_threads": ("threads", ""),
    "negative_prompt_ids": ("negative_prompt", "negative_prompt, which may be token ids"),
    "no_repeat_ngram_size": ("dry_multiplier", "dry_multiplier above 0, which makes repetitions less likely"),
    "num_ctx": ("context", ""),
    "num_return_sequences": ("n", ""),
    "num_threads": ("threads", ""),
    "path": ("model", ""),
    "pretrained_model_name_or_path": ("model", ""),
    "prompts": ("prompt", "prompt, which may be a list"),
    "quantization": (None, _GPTQ),
    "sampling_params": ("params", "params, a SamplingParams"),
    "seq_len": ("context", ""),
    "stop_sequences": ("stop", ""),
    "stop_strings": ("stop", ""),
    "stop_words": ("stop", ""),
    "stream": (None, "LLM.stream, LLM.stream_chat and Chat.stream give the text in pieces"),
    "swap_space": ("kv_ram", 'kv_ram (a size such as "4GB")'),
    "system_prompt": ("system", ""),
    "tensor_parallel_size": (None, _ONE_GPU),
    "tensor_split": (None, _ONE_GPU),
    "tokenizer": (None, "the tokenizer is read from the model's folder"),
    "torch_dtype": (None, "weights keep the file's type; kv_cache= chooses the cache's"),
    "trust_remote_code": (None, "exl never runs code of a repository"),
    "use_cache": ("reuse_prefix", "the cache is always used; reuse_prefix= keeps it between requests"),
}

_HINTS |= {alias: (name, text) for name, option in OPTIONS.items() for alias, text in option.aliases.items()}

F = TypeVar("F", bound=Callable[..., Any])


def explain_foreign_keywords(function: F) -> F:
    """A decorator: an unknown keyword raises ``TypeError`` that gives exl's own name for it, if there is one."""
    return _explaining(function, ())


def explain_options(options: type) -> Callable[[F], F]:
    """``explain_foreign_keywords`` for a function that takes the keys of the ``TypedDict`` ``options`` as keywords of
    its ``**options``: they are checked, and shown in the function's signature."""
    return functools.partial(_explaining, options=options.__annotations__.items())


def _explaining(function: Any, options: Iterable[tuple[str, Any]]) -> Any:
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, hint in options:
        hint = getattr(hint, "__forward_arg__", hint)
        shown.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    known = [p.name for p in shown if p.name not in ("self", "cls")]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{function.__name__}() has no keyword {name!r}: {_hint(name, known)}")
        return function(*args, **kwargs)

    wrapper.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return wrapper


def _hint(name: str, known: list[str]) -> str:
    ours, text = _HINTS.get(name, ("", ""))
    if ours is None:
        return text
    return f"exl calls it {text or ours}" if ours in known else f"it takes {', '.join(known)}"
