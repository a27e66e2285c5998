"""The memory that the plan counts for the CPU's own kernels is enough for every model and every batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exl.batch import PAGE_SIZE, padded_step
from exl.cache.kv import KVCache
from exl.cpu_kernels.processor import usable_isas
from exl.families.config import ModelConfig
from exl.families.specs import BranchShape, LayerSpec, MoeShape, SharedShape
from exl.layout.cpu_steps import ARITHMETIC, FEW_ROWS, compiled_sizes
from exl.layout.kv import KV_BITS, DeviceKVLayout
from exl.layout.layers import ExpertLayout, layer_layout
from exl.layout.specs import BlobSpec, MatrixSpec, NormSpec, fuse
from exl.models.decoder import Decoder, RoutedRows, StepBuffers
from exl.ops import compiled_steps
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


def random_layer(rng: np.random.Generator, layer: LayerSpec, layer_idx: int) -> LayerSpec:
    """A layer with some of what families add: a RoPE of its own, norms behind blocks, experts instead of an MLP."""
    if rng.integers(2):
        rope = replace(layer.attention.rope, theta=1e4 * (1 + layer_idx))
        layer = replace(layer, attention=replace(layer.attention, rope=rope))
    if rng.integers(2):
        layer = replace(layer, attn_branch=BranchShape("attn_norm"), mlp_branch=BranchShape("mlp_norm"))
    if rng.integers(2):
        count, width, shared = int(rng.choice([1, 4, 33])), int(rng.choice([1, 47, 200])), None
        if rng.integers(2):
            shared = SharedShape(int(rng.choice([3, 90])), gated=bool(rng.integers(2)))
        moe = MoeShape(count, min(count, int(rng.choice([1, 3, 8]))), width, shared=shared)
        layer = replace(layer, mlp=moe, mlp_branch=BranchShape())
    return layer


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
    config = replace(config, layers=tuple(random_layer(rng, layer, i) for i, layer in enumerate(config.layers)))
    width, kv = heads * group * head_dim, heads * head_dim

    def mlp(width: int, prefix: str = "") -> dict[str, list[tuple[int, int]]]:
        return {f"{prefix}gate_up": [(hidden, width)] * 2, f"{prefix}down": [(width, hidden)]}

    def blob(norms: tuple[NormSpec, ...], shapes: dict[str, list[tuple[int, int]]]) -> BlobSpec:
        linears = []
        for name, some in shapes.items():
            parts = [random_matrix(rng, name, K, N) for K, N in some]
            if rng.integers(2):
                parts = [MatrixSpec(**(vars(parts[0]) | {"N": N})) for _, N in some]
            if name in ("router", "shared_gate"):
                parts = [MatrixSpec(name, K, N, 32, "f32") for K, N in some]
            linears.append((name, fuse(parts)))
        return BlobSpec(norms, tuple(linears))

    def layer(spec: LayerSpec) -> tuple[BlobSpec, BlobSpec | None]:
        """And one of its experts."""
        norms, found = (NormSpec("attn_norm", hidden), NormSpec("mlp_norm", hidden)), spec.mlp
        shapes = {"qkv": [(hidden, width), (hidden, kv), (hidden, kv)], "o": [(width, hidden)]}
        if not isinstance(found, MoeShape):
            return blob(norms, shapes | mlp(inter)), None
        shapes["router"] = [(hidden, found.count)]
        if found.shared is not None:
            shapes |= mlp(found.shared.width, "shared_")
            if found.shared.gated:
                shapes["shared_gate"] = [(hidden, 1)]
        return blob(norms, shapes), blob((), mlp(found.width))

    specs = [layer(spec) for spec in config.layers]
    layers = tuple(layer_layout(spec, COMPILED) for spec, _ in specs)
    experts = tuple(
        None if one is None else ExpertLayout(spec.mlp.count, layer_layout(one, COMPILED))
        for spec, (_, one) in zip(config.layers, specs, strict=True)
    )
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
    sizes = compiled_sizes(layers, limits, arithmetic, head, experts)
    layout = DeviceKVLayout(kind, 3, heads, head_dim)
    ops = CompiledOps(Pool(shared_library(), pick(1, 2, 7)), COMPILED, layout, limits, sizes, arithmetic)

    def memory(blob, more=None):
        return torch.empty(blob.num_bytes + (0 if more is None else more.num_bytes), dtype=torch.uint8)

    return SimpleNamespace(
        decoder=Decoder(config, ops),
        ops=ops,
        limits=limits,
        sizes=sizes,
        kv=KVCache(layout, 1, torch.device("cpu")),
        layers=[LayerWeights.view(x, memory(x, more), more) for x, more in zip(layers, experts, strict=True)],
        head=view_segments(head, memory(head), "head")[0],
        embed=view_segments(embed, memory(embed), "embed")[0],
        norm=torch.ones(hidden),
    )


def step(model: SimpleNamespace) -> None:
    """All operations of the selected batch."""
    decoder, limits, num_rows = model.decoder, model.limits, model.ops._now.shape[0]
    h = torch.empty(num_rows, limits.hidden_size)
    widths = (limits.qkv_width, limits.attn_width, limits.intermediate_size)
    routed, found = None, limits.experts
    if found is not None:
        ids = torch.empty(num_rows, found.per_token, dtype=torch.int32)
        routed = RoutedRows(torch.empty(num_rows, limits.hidden_size), ids, torch.empty(num_rows, found.per_token))
    buffers = StepBuffers(*(torch.empty(num_rows, width) for width in widths), routed)
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


@pytest.mark.parametrize("seed", [*range(59), 126])  # 126: an arena that is full to the last row
@pytest.mark.sample(3)
def test_no_batch_needs_more_than_the_plan_counts(seed, monkeypatch):
    model = random_model(seed)
    ops, limits = model.ops, model.limits
    monkeypatch.setattr(ops, "launch", lambda: None)  # no stage is run, and no kernel compiled
    monkeypatch.setattr(compiled_steps, "Program", lambda *args, **options: None)
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
