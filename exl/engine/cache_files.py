"""What the cache knows, in files: prompts that another run of the same model need not compute again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from exl.cache.file import Key, load_prefixes, save_prefixes
from exl.checkpoint.checkpoint import Checkpoint
from exl.engine.build import Engine
from exl.weights.packed_store import LAYOUT_VERSION, model_digest


def save_cache(engine: Engine, folder: Path, path: str | Path) -> int:
    """Writes all prefixes that the cache holds. Returns their number of tokens. See ``LLM.save_cache``."""
    generator, key = engine.generator, cache_key(engine, folder)

    def save() -> int:
        _settle(engine)
        return save_prefixes(path, generator.pool, generator.runner.kv, key)

    return generator.seat.apart(save)


def load_cache(engine: Engine, folder: Path, path: str | Path) -> int:
    """Enters a file's prefixes into the cache. Returns their number of tokens. See ``LLM.load_cache``."""
    generator, key = engine.generator, cache_key(engine, folder)

    def load() -> int:
        _settle(engine)
        return load_prefixes(path, generator.pool, generator.runner.kv, key)

    return generator.seat.apart(load)


def cache_key(engine: Engine, folder: Path) -> Key:
    """All that decides what a page's bytes mean, and which bits a run that reuses nothing would make of them."""
    model, target = engine.model, engine.model.target
    if target.kind == "cuda":
        kernels = f"cuda sm_{target.arch} {target.num_multiprocessors}"
    else:
        kernels = "exl" if target.compiled else f"torch {torch.__version__}"
    with Checkpoint.open(folder) as checkpoint:
        tensors = model_digest(checkpoint)
    return {
        "tensors": tensors,
        "config": hashlib.sha256(repr(engine.config).encode()).hexdigest(),
        "quantization": hashlib.sha256(repr(engine.quant).encode()).hexdigest(),
        "kv_cache": model.kv_layout.kind,
        "layout": repr(model.kv_layout),
        "kernels": kernels,
        "layout version": LAYOUT_VERSION,
        "arithmetic": str(model.arithmetic),
        "prefill_chunk": model.limits.chunk_rows,
    }


def _settle(engine: Engine) -> None:
    """No kernel, and no late thread, writes to a page any more."""
    engine.generator.runner.decoder.ops.fence()
    engine.synchronize()
