"""Where every byte of a weight lies, known from shapes alone: no device, no torch, no data.

A layer is one contiguous blob. The memory plan counts it, the packer fills it, the packed file holds it and the
stream copies it: all by the same ``LayerLayout``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from exl.errors import KernelError, UnsupportedModelError
from exl.layout.columns import ColumnLayout
from exl.layout.fields import BLOB_ALIGN, FIELD_ALIGN, Field, FieldPacker, align_up
from exl.layout.specs import BlobSpec, LinearSpec, NormSpec, Target
from exl.layout.tiles import ROWS, TileLayout

INT4PACK_GROUPS = (32, 64, 128, 256)  # what torch's kernel takes
_DENSE_MIN_ARCH = 75  # GPUs from here on have a kernel for dense layers
DENSE_STEP = 8  # inputs of a dense weight on a GPU, 16 bytes, are read together: K is padded to a multiple


@dataclass(frozen=True)
class LinearLayout:
    """Fields of one packed linear. ``kind`` names the packing:

    - ``dense``: weight [N, K] in the file's type
    - ``int4pack``: codes u8 [N * K / 2] in torch's CPU order, scales [G, N], zeros u8 [G, N] for exact f32 panels, and
      scales_zeros bf16 [G, N, 2] for torch's decode kernel
    - ``planes``: codes u8 [N, K * bits / 8] in bit planes (see ``docs/formats.md``), scales [N, G], zeros u8 [N, G]

    Scales have the file's type. Besides, where the spec has them: bias f32 [N], order i32 [K]. For exl's own kernels:

    - ``dense``: weight [N, K] in the file's type
    - ``columns``: records u8 as ``exl/layout/columns.py`` says

    Besides: bias f32 [N]; under act-order, and where groups do not fill whole records, source i32 [padded K]: the input
    that each input of the records multiplies, -1 for none. On a GPU:

    - ``dense``: weight [N, K padded to eights with zeros], bf16 where the GPU's tensor cores take it, f16 otherwise
    - ``tiles``: codes i32, qparams u8 (scales and zeros) as ``exl/layout/tiles.py`` says

    Besides: bias f32 [16 * tiles] in the order of the tiles' rows, channel_map i32 [K]: where input k is expected.
    """

    spec: LinearSpec
    kind: str
    fields: Mapping[str, Field]
    num_bytes: int  # multiple of FIELD_ALIGN


def linear_layout(spec: LinearSpec, target: Target) -> LinearLayout:
    """Pure function of shapes and hardware. Raises ``UnsupportedModelError`` for a shape that no kernel takes."""
    pack = FieldPacker()
    kind = _add_cuda_fields(pack, spec, target) if target.kind == "cuda" else _add_cpu_fields(pack, spec, target)
    return LinearLayout(spec, kind, MappingProxyType(pack.fields), align_up(pack.num_bytes, FIELD_ALIGN))


def _add_cpu_fields(pack: FieldPacker, spec: LinearSpec, target: Target) -> str:
    K, N, G = spec.K, spec.N, spec.num_groups
    if not spec.quantized:
        kind = "dense"
        pack.add("weight", spec.dtype, (N, K))
    elif target.compiled:
        columns = column_layout(spec)
        pack.add("records", "u8", (columns.num_bytes,))
        if spec.order_key is not None or columns.padded:
            pack.add("source", "i32", (columns.padded_K,))
        kind = "columns"
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
    if spec.order_key is not None and not target.compiled:
        pack.add("order", "i32", (K,))
    return kind


def column_layout(spec: LinearSpec) -> ColumnLayout:
    """How the CPU's own kernels hold a quantized linear."""
    sizes = spec.bits, spec.K, spec.N, spec.group_size
    return ColumnLayout(*sizes, spec.symmetric, spec.scale_dtype, spec.code_kind)


def _fits_int4pack(spec: LinearSpec) -> bool:
    """Whether torch's kernel takes it: 4 bits, whole groups, blocks of 16 outputs."""
    whole = spec.N % 16 == 0 and spec.K % spec.group_size == 0 and spec.code_kind == "int"
    return spec.bits == 4 and whole and spec.group_size in INT4PACK_GROUPS


def _add_cuda_fields(pack: FieldPacker, spec: LinearSpec, target: Target) -> str:
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
        pack.add("channel_map", "i32", (spec.K,))
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
class LayerLayout:
    """One blob: resident bytes = stream buffer bytes = bytes in the packed file.

    Norm ``attn_norm`` is the field of that name, f32, its values as ``NormSpec`` says. Segment i of ``qkv`` is
    ``linears["qkv"][i]``; its fields are ``qkv.<i>.codes`` and so on.
    """

    fields: Mapping[str, Field]
    norms: tuple[NormSpec, ...]
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


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of a layer: ``count`` blobs of one layout, which has no norms, and linears "gate_up" and "down"."""

    count: int
    blob: LayerLayout

    @property
    def num_bytes(self) -> int:
        return self.count * self.blob.num_bytes


def layer_layout(spec: BlobSpec, target: Target) -> LayerLayout:
    """Norms first, then the linears in the order in which a pass meets them."""
    pack = FieldPacker()
    for norm in spec.norms:
        pack.add(norm.name, "f32", (norm.width,))
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
    return LayerLayout(
        MappingProxyType(pack.fields), spec.norms, MappingProxyType(linears), align_up(pack.num_bytes, BLOB_ALIGN)
    )


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
