"""The memory plan of a machine without a GPU: resident layers, stream buffers, the cache, and what torch takes."""

from __future__ import annotations

from exl.batch import PAGE_SIZE
from exl.layout.cpu_steps import angle_bytes
from exl.layout.fields import BLOB_ALIGN, DTYPE_BYTES, align_up
from exl.layout.steps import PACK_COLUMNS, SCORES, StepLimits, scratch_bytes, step_bytes
from exl.layout.window import WindowGroup
from exl.planning.plan import MemoryPlan, Placement, PlanInput, PlanLine, Tier

ADAPTER_LINE = "adapters"
_NAMED = 4  # adapters that a line names, at most
KERNEL_LINE = "kernels"  # taken with the first model, and kept after the last: models of a process share it


def plan_cpu(
    model: PlanInput, budget: int | None = None, *, num_buffers: int = 2, max_resident: int | None = None
) -> MemoryPlan:
    """Keeps as many layers resident as the budget allows, from the first on; the others are streamed through
    ``num_buffers`` buffers. ``max_resident``: keep at most this many. The plan may not fit: check ``fits``."""
    num_layers = len(model.layers)
    most = num_layers if max_resident is None else min(max_resident, num_layers)
    for resident in range(most, 0, -1):
        plan = _with_resident(model, budget, resident, num_buffers)
        if plan.fits:
            return plan
    return _with_resident(model, budget, 0, num_buffers)


def _with_resident(model: PlanInput, budget: int | None, num_resident: int, num_buffers: int) -> MemoryPlan:
    device, limits = model.target.kind, model.limits
    layer_bytes, expert_bytes = [layer.num_bytes for layer in model.layers], model.expert_bytes
    num_streamed = len(layer_bytes) - num_resident
    num_buffers = min(num_buffers, num_streamed)
    buffer_bytes = max(
        (sum(pair) for pair in list(zip(layer_bytes, expert_bytes, strict=True))[num_resident:]), default=0
    )
    windows = model.window_group(num_streamed > 0)
    whole, beside = model.cache_slabs(range(len(layer_bytes)), windows)
    in_layers = "" if windows is None else f", {len(layer_bytes) - len(windows.layers)} layers"
    resident_bytes = sum(layer_bytes[:num_resident])
    steps = step_bytes(limits)
    activations = sum(num_bytes for name, num_bytes in steps.items() if name not in ("residual", "logits"))
    lines = [
        PlanLine("embedding", device, model.embed.num_bytes, True),
        PlanLine("resident layers", device, resident_bytes, True, f"{num_resident} of {len(layer_bytes)}"),
        *_expert_lines(model, num_resident),
        PlanLine(
            "stream buffers", device, num_buffers * buffer_bytes, True,
            f"{num_buffers} for {num_streamed} layers" if num_buffers else "",
        ),
        PlanLine("head and final norm", device, model.head.num_bytes, True),
        PlanLine(
            "KV cache", device, whole, True, f"{model.kv_layout.kind}, {limits.cache_tokens} tokens{in_layers}"
        ),
        *window_lines(model, windows, device, beside),
        PlanLine("residual stream", device, steps["residual"], True, f"window of {limits.window_rows} rows"),
        PlanLine("activations", device, activations, True, f"{limits.max_rows} rows"),
        PlanLine("logits", device, steps["logits"], True, f"{limits.max_logit_rows} rows"),
    ]  # fmt: skip
    if model.adapters:
        num_bytes = sum(adapter.num_bytes for adapter in model.adapters)
        lines.insert(4, PlanLine(ADAPTER_LINE, device, num_bytes, True, _named(model)))
    lines += _compiled_lines(model) if model.target.compiled else _torch_lines(model)
    if model.tokenizer_bytes:
        lines.append(PlanLine("tokenizer", device, _TOKENIZER_FACTOR * model.tokenizer_bytes, False))
    # While loading, memory holds the file's bytes of some layers and unpacked codes of one, but the buffers of a step
    # are not touched yet: only what exceeds their size adds to the peak.
    idle = sum(line.num_bytes for line in lines if line.purpose not in _LOADED_FIRST)
    loading = loading_bytes(model)
    if loading > idle:
        lines.append(PlanLine("loading", device, loading - idle, False, "the file's bytes of layers ahead"))
    placement = Placement(
        tuple((Tier.DEVICE if i < num_resident else Tier.DISK, device) for i in range(len(layer_bytes)))
    )
    budgets = {} if budget is None else {device: budget}
    return MemoryPlan(
        tuple(lines), placement, limits.max_context, model.num_pages, num_buffers, budgets, windows=windows
    )


def window_lines(model: PlanInput, windows: WindowGroup | None, device: str, num_bytes: int) -> list[PlanLine]:
    """Of the cache of layers that have a window, where others have none."""
    if windows is None or not num_bytes:
        return []
    num_layers = num_bytes // model.kv_layout.layer_bytes(windows.num_pages)
    tokens = (windows.num_pages - 1) * PAGE_SIZE
    note = f"{model.kv_layout.kind}, {tokens} tokens, {num_layers} layers that see {windows.window}"
    return [PlanLine("KV cache, windows", device, num_bytes, True, note)]


def _expert_lines(model: PlanInput, num_resident: int) -> list[PlanLine]:
    """Of resident layers that are mixtures; those of others are in the stream's buffers."""
    if not any(model.expert_bytes):
        return []
    counts = [0 if experts is None else experts.count for experts in model.experts]
    note = f"{sum(counts[:num_resident])} of {sum(counts)}"
    return [PlanLine("resident experts", model.target.kind, sum(model.expert_bytes[:num_resident]), True, note)]


def _named(model: PlanInput) -> str:
    names = ", ".join(adapter.manifest.name for adapter in model.adapters[:_NAMED])
    return names + (f" and {len(model.adapters) - _NAMED} more" if len(model.adapters) > _NAMED else "")


def _torch_lines(model: PlanInput) -> list[PlanLine]:
    device, scratch = model.target.kind, scratch_bytes(model.limits, model.target)
    return [
        PlanLine("scratch of operations", device, sum(scratch.values()), True),
        PlanLine("temporaries", device, torch_temporaries(model), False, "torch's own, while an operation runs"),
    ]


def _compiled_lines(model: PlanInput) -> list[PlanLine]:
    device, limits = model.target.kind, model.limits
    sizes = model.compiled_sizes
    angles = limits.num_ropes * angle_bytes(limits, limits.window_rows)
    temporaries = _SAMPLING_BYTES * limits.vocab_size + angles
    return [
        PlanLine(
            "scratch of operations", device, sum(sizes.scratch.values()), True, f"activations in {model.arithmetic}"
        ),
        PlanLine(
            "recorded steps", device, 2 * sizes.arena, True,
            f"a place for each value of {sizes.arena_rows} row{'s' if sizes.arena_rows > 1 else ''}, twice",
        ),
        PlanLine(KERNEL_LINE, device, _KERNEL_BYTES, False, "compiled for this processor; llvmlite"),
        PlanLine("temporaries", device, temporaries, False, "RoPE's angles, and what a token is drawn from"),
    ]  # fmt: skip


# Over the interpreter with torch: 59 to 63 MB with kernels from the cache, 101 to 120 MB where they are compiled first,
# by the model's formats. 50 and 80 MB of that are pages of LLVM's own code.
_KERNEL_BYTES = 128 << 20
_SAMPLING_BYTES = 64  # per token of the vocabulary: its logit in f64, shifted, sorted, and its weight
_LOADED_FIRST = (
    *("embedding", "resident layers", "resident experts", "stream buffers", "head and final norm", ADAPTER_LINE),
)
_TOKENIZER_FACTOR = 8
_TABLE_PIECE_BYTES = 4 << 20
_READ_AHEAD_BYTES = 16 << 20
_SMALL_ITEMS = 8
_SHORT_PROMPT = 32  # which is computed as decode rows where all layers are int4pack
_ALIGNED_ELEMENTS = 16
_READ_EDGES = 256 << 10  # pages are read whole, of which neighbours have the rest
_UNPACKED_BYTES = 8  # per code, while it is unpacked, sorted, fused and packed
_ROUTED_BYTES = (
    36  # of a row and an expert: logits, scores, those to choose by, of the best groups; sorted, with numbers
)
_PLACE_BYTES = 64  # of a row and one of its experts: numbers i64, masks, weights
_LIBRARY_BYTES = 12 << 20  # memory that MKL keeps for f32 products of any size; 4 to 13 MB were measured


def loading_bytes(model: PlanInput) -> int:
    """Temporary host memory while layers are packed."""
    ahead = read_ahead_bytes(model.layer_file_bytes + _READ_EDGES, max(model.embed.num_bytes, model.head.num_bytes))
    return ahead + PACK_COLUMNS * _max_k(model.limits) * _UNPACKED_BYTES


def read_ahead_bytes(layer_bytes: int, table_bytes: int) -> int:
    """The memory that a checkpoint is read ahead into: two layers, of at most ``layer_bytes`` in the files' pages. More
    of small ones, so that several reads are under way."""
    item = max(layer_bytes, min(table_bytes, _TABLE_PIECE_BYTES), 2 * BLOB_ALIGN)
    return align_up(max(2 * item, min(_SMALL_ITEMS * item, _READ_AHEAD_BYTES)), BLOB_ALIGN)


def _max_k(limits: StepLimits) -> int:
    return max(limits.hidden_size, limits.attn_width, limits.intermediate_size)


def torch_temporaries(model: PlanInput) -> int:
    """A bound of the temporaries that are alive at once on the CPU: the maximum over the operations of a step."""
    config, limits, kv = model.config, model.limits, model.kv_layout
    T, context, D = limits.max_rows, limits.max_context, config.head_dim
    block = min(128, T)
    group = config.num_heads // config.num_kv_heads
    element = 4 if kv.quantized else DTYPE_BYTES[kv.kind]
    # Temporary rows of a norm, f32.
    norm = T * limits.hidden_size * 4
    # A chunk's q, k and v, rotated and converted; cos and sin of a window's rows, which all its layers share.
    rotate = T * limits.qkv_width * 4 + limits.num_ropes * limits.window_rows * D * 4
    # For a block of rows: the mask (distances i64, hidden u8, mask), its copies for the query group, q, the result.
    mask = block * context * (8 + 1 + element) + block * group * context * element
    rows = 4 * block * limits.attn_width * element
    # K and V of the whole context: dequantized, or gathered if the pages are not contiguous.
    run = context * config.kv_width * (2 * element + (element if kv.quantized else 0))
    attend = rotate + mask + rows + run + _scores(model)
    gate = T * limits.intermediate_size * 4 + norm + _routing(limits)
    # Of decode rows: bf16 inputs and outputs, or f32 inputs whose rows are aligned.
    widest = max(2 * limits.intermediate_size + limits.hidden_size, 2 * (_max_k(limits) + _ALIGNED_ELEMENTS))
    decode = max(_SHORT_PROMPT, limits.decode_rows) * 2 * widest
    return align_up(_LIBRARY_BYTES + max(attend, gate, norm + decode), BLOB_ALIGN)


def _scores(model: PlanInput) -> int:
    """What attention takes besides where torch's fused kernel does not compute it: scores before and after a step, K
    and V in f32, and rows of q and of the result."""
    shapes, context = [layer.attention for layer in model.config.layers], model.limits.max_context
    if all(shape.softcap is None and not shape.sinks for shape in shapes):
        return 0
    heads, block = model.config.num_heads, min(128, model.limits.max_rows)
    scores = max(min(SCORES, block * heads * context), heads * context) + block * heads  # with a sink of each row
    return 4 * (2 * scores + 2 * context * model.config.kv_width + 2 * block * model.limits.attn_width)


def _routing(limits: StepLimits) -> int:
    """A router's logits, scores and their order; rows that an expert's are added to, and which they are."""
    found = limits.experts
    if found is None:
        return 0
    a_row = _ROUTED_BYTES * found.count + 4 * limits.hidden_size + _PLACE_BYTES * found.per_token
    return limits.max_rows * a_row
