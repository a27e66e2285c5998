"""Where every byte of a weight lies, known from shapes alone: no device, no torch, no data.

A layer is one contiguous blob. The memory plan counts it, the packer fills it, the packed file holds it and the
stream copies it: all by the same ``LayerLayout``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from exl.batch import PAGE_SIZE
from exl.errors import KernelError, UnsupportedModelError
from exl.layout.tiles import ROWS, TileLayout

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"u8": 1, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4})
FIELD_ALIGN = 64  # a cache line, and what vector loads and int4pack want
BLOB_ALIGN = 4096  # a memory page and a disk sector: O_DIRECT needs both
INT4PACK_GROUPS = (32, 64, 128, 256)  # what torch's kernel takes
_DENSE_MIN_ARCH = 75  # GPUs from here on have a kernel for dense layers
DENSE_STEP = 8  # inputs of a dense weight on a GPU, 16 bytes, are read together: K is padded to a multiple


def align_up(num_bytes: int, alignment: int) -> int:
    """``align_up(65, 64) == 128``."""
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class Target:
    """The hardware that a layout is for: all that a layout may depend on besides shapes."""

    kind: str  # "cpu" | "cuda"
    int4pack: str | None = None  # CPU: nibble order of torch's int4pack: "split64", "split32", "pairs32"; None: absent
    arch: int | None = None  # CUDA: compute capability, 86 for 8.6
    num_multiprocessors: int | None = None  # CUDA; None: a GPU that is not there, the largest of its architecture

    @property
    def int4pack_block(self) -> int:
        """Output rows that int4pack interleaves."""
        if self.int4pack is None:
            raise ValueError("this target has no int4pack layout")
        return int(self.int4pack[-2:])


@dataclass(frozen=True)
class MatrixSpec:
    """One matrix of the checkpoint, W [K, N]: what its header (and for act-order its g_idx) says."""

    name: str  # module name in the checkpoint: "model.layers.0.self_attn.q_proj"
    K: int
    N: int
    bits: int  # 2, 3, 4, 8: quantized; 16, 32: dense
    dtype: str  # dense: "f32", "f16" or "bf16"; quantized: "u8"
    group_size: int = 0  # 0: dense; K: one group
    has_bias: bool = False
    order_key: str | None = None  # digest of the act-order permutation; None: groups are contiguous already
    symmetric: bool = False  # quantized: every zero point is 2**(bits - 1), says the configuration
    scale_dtype: str = "f16"  # quantized: the file's type of scales, which layouts keep

    @property
    def quantized(self) -> bool:
        return self.group_size > 0

    @property
    def num_groups(self) -> int:
        """The last one may be shorter."""
        return -(-self.K // self.group_size) if self.quantized else 0


@dataclass(frozen=True)
class LinearSpec:
    """One packed launch: one or more matrices side by side along N, equal in everything else."""

    parts: tuple[MatrixSpec, ...]
    gated: bool = False  # gate and up of a gated MLP: a GPU's tiles interleave them

    @property
    def K(self) -> int:
        return self.parts[0].K

    @property
    def N(self) -> int:
        return sum(part.N for part in self.parts)

    @property
    def bits(self) -> int:
        return self.parts[0].bits

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def group_size(self) -> int:
        return self.parts[0].group_size

    @property
    def quantized(self) -> bool:
        return self.parts[0].quantized

    @property
    def num_groups(self) -> int:
        return self.parts[0].num_groups

    @property
    def has_bias(self) -> bool:
        return any(part.has_bias for part in self.parts)

    @property
    def order_key(self) -> str | None:
        return self.parts[0].order_key

    @property
    def scale_dtype(self) -> str:
        return self.parts[0].scale_dtype

    @property
    def symmetric(self) -> bool:
        return all(part.symmetric for part in self.parts)


def fuse(parts: Sequence[MatrixSpec], *, gated: bool = False) -> tuple[LinearSpec, ...]:
    """Neighbours that agree in K, bits, types, group and order share a launch; the others stand alone.

    Order along N is kept, so that outputs lie where an unfused run would put them. ``gated``: they are gate and up.
    """

    def key(part: MatrixSpec) -> tuple:
        return part.K, part.bits, part.dtype, part.group_size, part.scale_dtype, part.order_key

    fused: list[list[MatrixSpec]] = []
    for part in parts:
        if fused and key(part) == key(fused[-1][-1]):
            fused[-1].append(part)
        else:
            fused.append([part])
    return tuple(LinearSpec(tuple(group), gated and len(fused) == 1) for group in fused)


@dataclass(frozen=True)
class Field:
    """A named array inside a blob."""

    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]

    def shifted(self, by: int) -> Field:
        return Field(self.offset + by, self.num_bytes, self.dtype, self.shape)


class _FieldPacker:
    """Lays arrays one after another, each aligned."""

    def __init__(self) -> None:
        self.fields: dict[str, Field] = {}
        self.num_bytes = 0

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        num_bytes = DTYPE_BYTES[dtype]
        for size in shape:
            num_bytes *= size
        offset = align_up(self.num_bytes, FIELD_ALIGN)
        self.fields[name] = Field(offset, num_bytes, dtype, shape)
        self.num_bytes = offset + num_bytes


@dataclass(frozen=True)
class LinearLayout:
    """Fields of one packed linear. ``kind`` names the packing:

    - ``dense``: weight [N, K] in the file's type
    - ``int4pack``: codes u8 [N * K / 2] in torch's CPU order, scales [G, N], zeros u8 [G, N] for exact f32 panels, and
      scales_zeros bf16 [G, N, 2] for torch's decode kernel
    - ``planes``: codes u8 [N, K * bits / 8] in bit planes (see ``docs/formats.md``), scales [N, G], zeros u8 [N, G]

    Scales have the file's type. Besides, where the spec has them: bias f32 [N], order i32 [K]. On a GPU:

    - ``dense``: weight [N, K padded to eights with zeros], bf16 where the GPU's tensor cores take it, f16 otherwise
    - ``tiles``: codes i32, qparams u8 (scales and zeros) as ``exl/layout/tiles.py`` says

    Besides: bias f32 [16 * tiles] in the order of the tiles' rows, positions i32 [K]: where input k is expected.
    """

    spec: LinearSpec
    kind: str
    fields: Mapping[str, Field]
    num_bytes: int  # multiple of FIELD_ALIGN


def linear_layout(spec: LinearSpec, target: Target) -> LinearLayout:
    """Pure function of shapes and hardware. Raises ``UnsupportedModelError`` for a shape that no kernel takes."""
    pack = _FieldPacker()
    kind = _add_cuda_fields(pack, spec, target) if target.kind == "cuda" else _add_cpu_fields(pack, spec, target)
    return LinearLayout(spec, kind, MappingProxyType(pack.fields), align_up(pack.num_bytes, FIELD_ALIGN))


def _add_cpu_fields(pack: _FieldPacker, spec: LinearSpec, target: Target) -> str:
    K, N, G = spec.K, spec.N, spec.num_groups
    if not spec.quantized:
        kind = "dense"
        pack.add("weight", spec.dtype, (N, K))
    elif target.int4pack and _fits_int4pack(spec):
        kind = "int4pack"
        pack.add("codes", "u8", (N * K // 2,))
        pack.add("scales", spec.scale_dtype, (G, N))
        pack.add("zeros", "u8", (G, N))
        pack.add("scales_zeros", "bf16", (G, N, 2))
    else:
        kind = "planes"
        pack.add("codes", "u8", (N, K * spec.bits // 8))
        pack.add("scales", spec.scale_dtype, (N, G))
        pack.add("zeros", "u8", (N, G))
    if spec.has_bias:
        pack.add("bias", "f32", (N,))
    if spec.order_key is not None:
        pack.add("order", "i32", (K,))
    return kind


def _fits_int4pack(spec: LinearSpec) -> bool:
    """Whether torch's kernel takes it: 4 bits, whole groups, blocks of 16 outputs."""
    whole = spec.N % 16 == 0 and spec.K % spec.group_size == 0
    return spec.bits == 4 and whole and spec.group_size in INT4PACK_GROUPS


def _add_cuda_fields(pack: _FieldPacker, spec: LinearSpec, target: Target) -> str:
    num_tiles = num_row_tiles(spec)
    if not spec.quantized:
        kind = "dense"
        dtype = "bf16" if spec.dtype == "bf16" and target.arch >= 80 else "f16"
        pack.add("weight", dtype, (spec.N, align_up(spec.K, DENSE_STEP)))
    else:
        kind = "tiles"
        tiles = tile_layout(spec)
        pack.add("codes", "i32", tiles.codes_shape)
        pack.add("qparams", "u8", tiles.qparams_shape)
    if spec.has_bias:
        pack.add("bias", "f32", (num_tiles * ROWS,))
    if spec.order_key is not None:
        pack.add("positions", "i32", (spec.K,))
    return kind


def num_row_tiles(spec: LinearSpec) -> int:
    """Tiles of 16 rows; gate and up have 8 each of them."""
    return -(-spec.N // 2 // (ROWS // 2)) if spec.gated else -(-spec.N // ROWS)


def tile_layout(spec: LinearSpec) -> TileLayout:
    """How a GPU holds a quantized linear. Raises ``UnsupportedModelError`` for a shape that no kernel takes."""
    num_rows = num_row_tiles(spec) * ROWS if spec.gated else spec.N
    try:
        return TileLayout(spec.bits, spec.K, num_rows, spec.group_size, spec.symmetric, spec.scale_dtype)
    except KernelError as error:
        raise UnsupportedModelError(f"{spec.parts[0].name}: {error}") from None


@dataclass(frozen=True)
class BlobSpec:
    """What one blob holds: norms by name and width, then fused groups of linears by name."""

    norms: tuple[tuple[str, int], ...]
    linears: tuple[tuple[str, tuple[LinearSpec, ...]], ...]


@dataclass(frozen=True)
class LayerLayout:
    """One blob: resident bytes = stream buffer bytes = bytes in the packed file.

    Norm ``attn_norm`` is the field of that name, f32. Segment i of ``qkv`` is ``linears["qkv"][i]``; its fields
    are ``qkv.<i>.codes`` and so on.
    """

    fields: Mapping[str, Field]
    linears: Mapping[str, tuple[LinearLayout, ...]]
    num_bytes: int  # multiple of BLOB_ALIGN

    def linear_fields(self, name: str, segment_idx: int) -> dict[str, Field]:
        """Fields of one linear by their own names, at their place in the blob."""
        prefix = f"{name}.{segment_idx}."
        return {key[len(prefix) :]: field for key, field in self.fields.items() if key.startswith(prefix)}

    def linear_range(self, name: str, segment_idx: int) -> tuple[int, int]:
        """Byte range of one linear in the blob: where ``Ops.pack`` writes."""
        layout = self.linears[name][segment_idx]
        first = min(self.linear_fields(name, segment_idx).values(), key=lambda field: field.offset)
        return first.offset, first.offset + layout.num_bytes


def layer_layout(spec: BlobSpec, target: Target) -> LayerLayout:
    """Norms first, then the linears in the order in which a pass meets them."""
    pack = _FieldPacker()
    for name, width in spec.norms:
        pack.add(name, "f32", (width,))
    linears: dict[str, tuple[LinearLayout, ...]] = {}
    if target.kind == "cuda":
        _check_cuda(dict(spec.linears), target)
    for name, segments in spec.linears:
        layouts = tuple(linear_layout(segment, target) for segment in segments)
        for i, layout in enumerate(layouts):
            base = align_up(pack.num_bytes, FIELD_ALIGN)
            for key, field in layout.fields.items():
                pack.fields[f"{name}.{i}.{key}"] = field.shifted(base)
            pack.num_bytes = base + layout.num_bytes
        linears[name] = layouts
    return LayerLayout(MappingProxyType(pack.fields), MappingProxyType(linears), align_up(pack.num_bytes, BLOB_ALIGN))


def packs_in_order(layout: LayerLayout) -> bool:
    """Whether gate and up, one launch on a GPU, compute their channels in the order that ``down``'s act-order wants."""
    gate_up, down = layout.linears.get("gate_up", ()), layout.linears.get("down", ())
    return [linear.kind for linear in gate_up] == ["tiles"] and any(linear.spec.order_key for linear in down)


def _check_cuda(linears: Mapping[str, tuple[LinearSpec, ...]], target: Target) -> None:
    """A GPU's gate and up store in the order that ``down`` wants; dense ones, fused, have no way to. Dense layers need
    tensor cores: without them cuBLAS multiplies the head alone."""
    for segments in (linears.get(name, ()) for name in ("qkv", "o", "gate_up", "down")):
        for spec in segments:
            if target.arch < _DENSE_MIN_ARCH and not spec.quantized:
                raise UnsupportedModelError(
                    f"{spec.parts[0].name}: found dense weights, compute capability {target.arch / 10} takes quantized "
                    f"layers only; dense ones need {_DENSE_MIN_ARCH / 10} or higher"
                )
    gate_up, down = linears.get("gate_up", ()), linears.get("down", ())
    if len(gate_up) == 1 and not gate_up[0].quantized and any(spec.order_key for spec in down):
        raise UnsupportedModelError(
            f"{down[0].parts[0].name}: found act-order behind a dense {gate_up[0].parts[0].name}, "
            "expected both quantized"
        )


# Bits of a K and of a V element, by the name of the cache type.
KV_BITS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"f32": (32, 32), "f16": (16, 16), "q8": (8, 8), "k8v4": (8, 4), "q4": (4, 4)}
)
KV_GROUP = 32  # channels that share a scale


@dataclass(frozen=True)
class KVLayout:
    """The cache's slab on the CPU: [layer][K|V][page][token][kv_head][D], so that adjacent pages are one view.

    Quantized types hold codes u8 [page, token, kv_head, D * bits / 8] and scales f16 [page, token, kv_head, G], one for
    every 32 channels (the last may have fewer). What codes and scales mean: ``docs/memory.md``.
    """

    kind: str  # a key of KV_BITS
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def quantized(self) -> bool:
        return KV_BITS[self.kind][0] < 16

    @property
    def rotation(self) -> int:
        """Channels that one Hadamard rotation mixes: the largest power of two that divides the head size."""
        return self.head_dim & -self.head_dim if self.quantized else 1

    def fields(self, num_pages: int) -> dict[str, Field]:
        """One layer's arrays by name: k, v, and for quantized types k_scales, v_scales."""
        pack = _FieldPacker()
        tokens = (num_pages, PAGE_SIZE, self.num_kv_heads)
        for name, bits in zip(("k", "v"), KV_BITS[self.kind], strict=True):
            if self.quantized:
                pack.add(name, "u8", (*tokens, self.head_dim * bits // 8))
                pack.add(f"{name}_scales", "f16", (*tokens, -(-self.head_dim // KV_GROUP)))
            else:
                pack.add(name, f"f{bits}", (*tokens, self.head_dim))
        return pack.fields

    def layer_bytes(self, num_pages: int) -> int:
        last = max(self.fields(num_pages).values(), key=lambda field: field.offset)
        return align_up(last.offset + last.num_bytes, FIELD_ALIGN)

    def slab_bytes(self, num_pages: int) -> int:
        return self.num_layers * self.layer_bytes(num_pages)


@dataclass(frozen=True)
class DeviceKVLayout:
    """The cache's slab on a GPU: [layer][page][kv_head][K codes | K scales | V codes | V scales], 64 tokens a page.

    The order inside of a page is the attention kernels': ``exl/layout/pages.py``.
    """

    kind: str  # a key of KV_BITS, f32 left out
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def head_page_bytes(self) -> int:
        """4 bits, 128 channels: 2 * (64 * 64 + 64 * 4 * 2) = 9216."""
        bits = KV_BITS[self.kind]
        scales = 2 * -(-self.head_dim // KV_GROUP) if bits[0] < 16 else 0
        return sum(PAGE_SIZE * (self.head_dim * b // 8 + scales) for b in bits)

    def layer_bytes(self, num_pages: int) -> int:
        return num_pages * self.num_kv_heads * self.head_page_bytes

    def slab_bytes(self, num_pages: int) -> int:
        return self.num_layers * self.layer_bytes(num_pages)


@dataclass(frozen=True)
class StepLimits:
    """The largest step that the buffers are made for, and the widths of the model that runs in them."""

    max_rows: int  # rows of one chunk
    window_rows: int  # rows that go through a layer before the next layer's turn
    max_logit_rows: int
    max_context: int
    hidden_size: int
    qkv_width: int  # (H + 2 * Hkv) * D
    attn_width: int  # H * D
    intermediate_size: int
    vocab_size: int
    head_dim: int
    max_sequences: int = 1  # of one batch

    @property
    def num_heads(self) -> int:
        return self.attn_width // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return (self.qkv_width - self.attn_width) // (2 * self.head_dim)

    @property
    def max_pages(self) -> int:
        """Of one sequence."""
        return -(-self.max_context // PAGE_SIZE)

    @property
    def window_sequences(self) -> int:
        """Sequences of all batches of a window, each counted as often as it is in one."""
        return self.max_sequences + -(-self.window_rows // min(self.max_rows, self.max_logit_rows))


def step_bytes(limits: StepLimits) -> dict[str, int]:
    """Bytes of the buffers that the runner owns, by purpose; activations and residual are f32."""
    return {
        "residual": limits.window_rows * limits.hidden_size * 4,
        "qkv": limits.max_rows * limits.qkv_width * 4,
        "attn": limits.max_rows * limits.attn_width * 4,
        "mlp": limits.max_rows * limits.intermediate_size * 4,
        "logits": limits.max_logit_rows * limits.vocab_size * 4,
    }


# A panel of 4 MB and its codes stay in the second-level caches between being written and being multiplied.
PANEL_ELEMENTS = 1 << 20
PACK_COLUMNS = 256  # output rows unpacked at a time while loading: a multiple of every block of every layout


def scratch_bytes(limits: StepLimits, target: Target) -> dict[str, int]:
    """Bytes of the buffers that the operations own, by purpose. Raises ``ValueError`` for a target that has none."""
    if target.kind != "cpu":
        raise ValueError(f"no scratch for target {target.kind!r}")
    max_k = max(limits.hidden_size, limits.attn_width, limits.intermediate_size)
    panel = max(PANEL_ELEMENTS, 64 * max_k)  # at least one block of int4pack
    return {
        "panel": panel * 4,
        "panel codes": panel,
        "sorted input": limits.max_rows * max_k * 4,
        "normed input": limits.max_rows * limits.hidden_size * 4,
        "fused output": limits.max_rows * max(2 * limits.intermediate_size, limits.hidden_size) * 4,
        "samples": limits.max_logit_rows * 8,
    }
