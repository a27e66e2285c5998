"""What the cache knows, in files: prompts that another run of the same model need not compute again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from exl.adapters.manifest import open_weights
from exl.cache.file import Key, load_prefixes, save_prefixes
from exl.cache.kv import KVCache
from exl.cache.page_pool import PagePool
from exl.checkpoint.checkpoint import Checkpoint
from exl.engine.build import Engine
from exl.errors import ConfigError
from exl.layout.layers import LayerLayout, LinearLayout
from exl.weights.packed_store import LAYOUT_VERSION, model_digest


def save_cache(engine: Engine, folder: Path, path: str | Path) -> int:
    """Writes all prefixes that the cache holds. Returns their number of tokens. See ``LLM.save_cache``."""
    return _between_steps(engine, folder, path, save_prefixes)


def load_cache(engine: Engine, folder: Path, path: str | Path) -> int:
    """Enters a file's prefixes into the cache. Returns their number of tokens. See ``LLM.load_cache``."""
    return _between_steps(engine, folder, path, load_prefixes)


def _between_steps(
    engine: Engine, folder: Path, path: str | Path, work: Callable[[str | Path, PagePool, KVCache, Key], int]
) -> int:
    generator = engine.generator
    if generator.pool.windows is not None:
        raise ConfigError(
            "the cache of this model cannot be in a file: its layers with a sliding window have pages of their own. "
            "Load it with window_cache=False, so that all layers keep all tokens"
        )
    key = cache_key(engine, folder)

    def apart() -> int:
        generator.runner.decoder.ops.fence()  # no kernel, and no late thread, writes to a page any more
        engine.synchronize()
        return work(path, generator.pool, generator.runner.kv, key)

    return generator.seat.apart(apart)


def _adapters_digest(engine: Engine) -> str:
    """Of all adapters in the order of their numbers, by which the cache tells their texts apart."""
    digest = hashlib.sha256()
    for layout in engine.model.adapters:
        with open_weights(layout.manifest.folder) as tensors:
            digest.update(model_digest(tensors).encode())
        digest.update(repr(layout.manifest.layers).encode())
    return digest.hexdigest()


def prediction_key(engine: Engine, folder: Path) -> Key:
    """What decides the bits of predictions: of pages, and the head behind them, which may be rounded on loading."""
    tables = [linear.spec for blob in (engine.model.embed, engine.model.head) for linear in _linears(blob)]
    return {**cache_key(engine, folder), "tables": hashlib.sha256(repr(tables).encode()).hexdigest()}


def _linears(blob: LayerLayout) -> list[LinearLayout]:
    return [linear for some in blob.linears.values() for linear in some]


def cache_key(engine: Engine, folder: Path) -> Key:
    """All that decides what a page's bytes mean, and which bits a run that reuses nothing would make of them."""
    model, target = engine.model, engine.model.target
    if target.kind == "cuda":
        kernels = f"cuda sm_{target.arch} {target.num_multiprocessors}"
    else:
        kernels = "exl" if target.compiled else f"torch {torch.__version__}"
    with Checkpoint.open(folder) as checkpoint:
        tensors = model_digest(checkpoint)
    adapters = {"adapters": _adapters_digest(engine)} if engine.adapters.names else {}
    experts = [found.blob for found in model.experts if found is not None]
    specs = [linear.spec for blob in (*model.layers, *experts) for linear in _linears(blob)]
    return {
        **adapters,
        "tensors": tensors,
        "layers": hashlib.sha256(repr(specs).encode()).hexdigest(),  # rounded on loading, too
        "config": hashlib.sha256(repr(engine.config).encode()).hexdigest(),
        "quantization": hashlib.sha256(repr(engine.quant).encode()).hexdigest(),
        "kv_cache": model.kv_layout.kind,
        "layout": repr(model.kv_layout),
        "kernels": kernels,
        "layout version": LAYOUT_VERSION,
        "arithmetic": str(model.arithmetic),
        "prefill_chunk": model.limits.chunk_rows,
    }
