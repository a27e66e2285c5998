"""A plan -> the bytes that a token reads from each memory and over each link (``speed.py`` says what follows)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from exl.batch import PAGE_SIZE
from exl.layout.layers import LayerLayout
from exl.planning.plan import MemoryPlan, PlanInput, Tier
from exl.planning.speed import CPU, TokenBytes


def token_bytes(model: PlanInput, plan: MemoryPlan, depth: int) -> TokenBytes:
    """``depth``: tokens in the cache. Activations and logits are left out: they stay in the processor's caches."""
    layers = plan.placement.layers
    memory = {device: 0 for _, device in layers}
    ahead = dict(memory)
    for i, (tier, device) in enumerate(layers):
        num_bytes = layer_bytes(model, i) + cache_bytes(model, i, depth)
        memory[device] += num_bytes
        ahead[device] += num_bytes if tier is Tier.DEVICE else 0
    first, last = layers[0][1], layers[-1][1]
    row, embed = embedding_row_bytes(model), plan.placement.embed
    for device, num_bytes in ((first, row if embed is Tier.DEVICE else 0), (last, head_bytes(model))):
        memory[device] += num_bytes
        ahead[device] += num_bytes
    copied, late, read, read_late = _moved(model, plan)
    copied += 0 if embed is Tier.DEVICE else row
    read += row if embed is Tier.DISK else 0
    return TokenBytes(depth, memory, ahead, copied, late, read, read_late)


def _moved(model: PlanInput, plan: MemoryPlan) -> tuple[int, int, int, int]:
    """Bytes copied over PCIe, those of them that no buffer can hold ahead of time; the same of the disk."""
    streamed = [i for i, (tier, _) in enumerate(plan.placement.layers) if tier is not Tier.DEVICE]
    num_buffers, copied = plan.num_buffers, []
    if streamed and plan.placement.layers[-1][1] != CPU:
        # The i-th streamed layer is always in buffer i mod S: a layer that is alone in its buffer stays there.
        users = Counter(i % num_buffers for i in range(len(streamed)))
        copied = streamed = [layer for i, layer in enumerate(streamed) if users[i % num_buffers] > 1]
    on_disk = [i for i in streamed if plan.placement.layers[i][0] is Tier.DISK]
    if len(on_disk) <= num_buffers:  # they stay where they were read to
        on_disk = []
    buffers_behind = 2 * num_buffers if copied else num_buffers  # those on the GPU, too
    sizes = [sum(pair) for pair in zip((x.num_bytes for x in model.layers), model.expert_bytes, strict=True)]
    return (*_ahead(sizes, copied, num_buffers), *_ahead(sizes, on_disk, buffers_behind))


def _ahead(sizes: Sequence[int], layers: Sequence[int], num_buffers: int) -> tuple[int, int]:
    """The sum, and the least that is left after as many of them as there are buffers."""
    found = sorted((sizes[i] for i in layers), reverse=True)
    return sum(found), sum(found[num_buffers:])


def model_bytes_a_token(model: PlanInput, depth: int) -> int:
    """Bytes that arithmetic reads for one token, wherever the weights are: layers, head, one row, keys and values."""
    layers = sum(layer_bytes(model, i) for i in range(len(model.layers)))
    cache = sum(cache_bytes(model, i, depth) for i in range(len(model.layers)))
    return layers + cache + head_bytes(model) + embedding_row_bytes(model)


def layer_bytes(model: PlanInput, layer_idx: int) -> int:
    """Of a mixture's experts, those that one token takes."""
    experts, own = model.experts[layer_idx], read_bytes(model.layers[layer_idx])
    if experts is None:
        return own
    return own + model.config.layers[layer_idx].mlp.per_token * read_bytes(experts.blob)


def head_bytes(model: PlanInput) -> int:
    """With the final norm; a tied head is the whole embedding."""
    return read_bytes(model.head) + (0 if model.head.linears else read_bytes(model.embed))


def embedding_row_bytes(model: PlanInput) -> int:
    (table,) = model.embed.linears["embed"]
    return table.fields["weight"].num_bytes // table.spec.N


def cache_bytes(model: PlanInput, layer_idx: int, depth: int) -> int:
    """Of the keys and values that a layer reads: a sliding window has no more tokens than its size."""
    window = model.config.windows[layer_idx]
    seen = depth if window is None else min(depth, window)
    return model.kv_layout.layer_bytes(1) * seen // PAGE_SIZE


def read_bytes(layout: LayerLayout) -> int:
    """What decoding reads of a blob. int4pack: codes and the bf16 pairs of scale and zero; prompts alone read the exact
    scales and zeros."""
    total = sum(field.num_bytes for name, field in layout.fields.items() if "." not in name)
    for segments in layout.linears.values():
        for linear in segments:
            unread = ("scales", "zeros") if linear.kind == "int4pack" else ()
            total += sum(field.num_bytes for name, field in linear.fields.items() if name not in unread)
    return total
