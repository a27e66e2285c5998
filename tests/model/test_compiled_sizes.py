"""The memory that the plan counts for the CPU's own kernels is enough for every model and every batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exl.batch import PAGE_SIZE, padded_step
from exl.cache.kv import KVCache
from exl.cpu_kernels.processor import usable_isas
from exl.families.config import ModelConfig
from exl.layout.cpu_steps import ARITHMETIC, FEW_ROWS, compiled_sizes
from exl.layout.kv import KV_BITS, DeviceKVLayout
from exl.layout.layers import layer_layout
from exl.layout.specs import BlobSpec, MatrixSpec, NormSpec, fuse
from exl.models.decoder import Decoder, StepBuffers
from exl.ops.base import LayerWeights, view_segments
from exl.ops.cpu_target import COMPILED
from exl.planning.from_headers import step_limits
from exl.planning.options import EngineOptions
from tests.model.batches import batch_of

if not usable_isas():
    pytest.skip("this processor has no instruction set that the kernels are written for", allow_module_level=True)

from exl.cpu_kernels.library import shared_library
from exl.cpu_kernels.pool import Pool
from exl.ops.compiled_ops import CompiledOps


def random_matrix(rng: np.random.Generator, name: str, K: int, N: int) -> MatrixSpec:
    bits = int(rng.choice([2, 3, 4, 8, 16, 32]))
    if bits >= 16:
        dtype = "f32" if bits == 32 else str(rng.choice(["f16", "bf16"]))
        return MatrixSpec(name, K, N, bits, dtype, has_bias=bool(rng.integers(2)))
    return MatrixSpec(
        name, K, N, bits, "u8",
        group_size=int(rng.choice([16, 32, 40, 128, K])),
        has_bias=bool(rng.integers(2)),
        order_key=str(rng.choice(["", "a", "b"])) or None,
        symmetric=bool(rng.integers(2)),
    )  # fmt: skip


def random_model(seed: int) -> SimpleNamespace:
    """Layouts and limits of a model of no sense, and operations with just the memory that they are said to need."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[rng.integers(len(values))]

    heads, group, head_dim = pick(1, 2, 5), pick(1, 3, 8), pick(2, 20, 64, 80, 256)
    hidden, inter, vocab = pick(1, 33, 100, 256), pick(1, 47, 200, 640), pick(3, 97, 1000)
    config = ModelConfig.from_dict(
        {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inter, "vocab_size": vocab,
            "num_hidden_layers": 3, "num_attention_heads": heads * group, "num_key_value_heads": heads,
            "head_dim": head_dim, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
        "config.json",
    )  # fmt: skip
    width, kv = heads * group * head_dim, heads * head_dim
    shapes = {
        "qkv": [(hidden, width), (hidden, kv), (hidden, kv)],
        "o": [(width, hidden)],
        "gate_up": [(hidden, inter)] * 2,
        "down": [(inter, hidden)],
    }

    def layer() -> BlobSpec:
        linears = []
        for name, some in shapes.items():
            parts = [random_matrix(rng, name, K, N) for K, N in some]
            if rng.integers(2):
                parts = [MatrixSpec(**(vars(parts[0]) | {"N": N})) for _, N in some]
            linears.append((name, fuse(parts)))
        return BlobSpec((NormSpec("attn_norm", hidden), NormSpec("mlp_norm", hidden)), tuple(linears))

    layers = tuple(layer_layout(layer(), COMPILED) for _ in range(3))
    head_spec = BlobSpec((), (("head", fuse([random_matrix(rng, "head", hidden, vocab)])),))
    head = layer_layout(head_spec, COMPILED)
    table = MatrixSpec("embed", hidden, vocab, 16, "f16")
    embed = layer_layout(BlobSpec((), (("embed", fuse([table])),)), COMPILED)
    options = EngineOptions(
        max_sequences=pick(1, 2, 3, 8, 16, 64), prefill_chunk=pick(1, 7, 100, 512), prefill_window=512
    )
    context, arithmetic, kind = pick(1, 63, 300, 1025), pick(*ARITHMETIC), pick(*KV_BITS)
    limits = step_limits(config, context, options, context * pick(1, 2, options.max_sequences))
    if rng.integers(2):
        limits = type(limits)(**(vars(limits) | {"max_logit_rows": pick(1, 600)}))
    sizes = compiled_sizes(layers, limits, arithmetic, head)
    layout = DeviceKVLayout(kind, 3, heads, head_dim)
    ops = CompiledOps(Pool(shared_library(), pick(1, 2, 7)), COMPILED, layout, limits, sizes, arithmetic)

    def memory(blob):
        return torch.empty(blob.num_bytes, dtype=torch.uint8)

    return SimpleNamespace(
        decoder=Decoder(config, ops),
        ops=ops,
        limits=limits,
        sizes=sizes,
        kv=KVCache(layout, 1, torch.device("cpu")),
        layers=[LayerWeights.view(blob, memory(blob)) for blob in layers],
        head=view_segments(head, memory(head), "head")[0],
        embed=view_segments(embed, memory(embed), "embed")[0],
        norm=torch.ones(hidden),
    )


def step(model: SimpleNamespace) -> None:
    """All operations of the selected batch."""
    decoder, limits, num_rows = model.decoder, model.limits, model.ops._now.shape[0]
    h = torch.empty(num_rows, limits.hidden_size)
    widths = (limits.qkv_width, limits.attn_width, limits.intermediate_size)
    buffers = StepBuffers(*(torch.empty(num_rows, width) for width in widths))
    decoder.embed(model.embed, h)
    for layer_idx, layer in enumerate(model.layers):
        decoder.layer(layer_idx, layer, buffers, h, model.kv)
    decoder.head(model.norm, model.head, h, torch.empty(limits.max_logit_rows, limits.vocab_size))


def at_the_end(model: SimpleNamespace, lengths: list[int], *, shared: bool = False):
    """New tokens of sequences that together fill the cache, or that all fill their contexts, with pages in common."""
    limits = model.limits
    context = limits.max_context if shared else min(limits.max_context, limits.cache_tokens // len(lengths))
    pages = list(range(-(-context // PAGE_SIZE)))  # no stage is run: which ones they are does not matter
    return [([0] * min(n, context), context - min(n, context), pages) for n in lengths if context]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.sample(3)
def test_no_batch_needs_more_than_the_plan_counts(seed, monkeypatch):
    model = random_model(seed)
    ops, limits = model.ops, model.limits
    monkeypatch.setattr(ops, "launch", lambda: None)  # no stage is run
    rows = min(model.sizes.arena_rows, limits.max_logit_rows)
    for count in {1, rows // 2, rows} - {0}:
        steps = at_the_end(model, [1] * count)
        if not steps:
            continue
        ops.stage((padded_step(batch_of(steps, decode=True), rows),))
        for arena in ops._arenas:
            recorded = ops._record(lambda: step(model), arena)
            assert recorded.takes(ops._now)
        used = recorded._memory._used
        assert used > 0.5 * model.sizes.arena or rows < model.sizes.arena_rows
    most = min(ops.captures, limits.max_logit_rows)
    for shared in (False, True):
        steps = at_the_end(model, [1] * most, shared=shared)
        ops.stage((padded_step(batch_of(steps, decode=True), most),) if steps else ())
        if steps:
            assert ops._record(lambda: step(model)).takes(ops._now) or shared
            step(model)
    most_rows = min(limits.max_rows, limits.max_context)
    some = max(1, min(FEW_ROWS, limits.max_context, limits.max_rows // limits.max_sequences))
    for lengths in ([most_rows], [min(most_rows, FEW_ROWS)], [some] * limits.max_sequences):
        batch = batch_of(at_the_end(model, lengths, shared=True))
        rows = np.arange(min(batch.num_rows, limits.max_logit_rows), dtype=np.int32)
        ops.stage((type(batch)(**(vars(batch) | {"logit_rows": rows})),))
        step(model)
    ops.stage(())
