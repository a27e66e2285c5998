"""compressed-tensors' integers -> ``QuantizedMatrix``. Layouts are those of its ``compressors/{pack_quantized,
naive_quantized}``.

``pack-quantized``: ``weight_packed`` i32 [N, words], each row one stream of bits along K, lowest first; before 0.17.0,
at 3 bits, ten codes in each word and its last bits unused: the number of words shows which. ``weight_zero_point`` i32
[words, G] alike along N, if asymmetric. ``weight_shape`` [2]: N and K. ``weight_g_idx`` i32 [K] where inputs are
ordered by group.

``int-quantized``: ``weight`` i8 [N, K] and, if asymmetric, ``weight_zero_point`` i8 of the scales' shape.

Both: ``weight_scale`` [N, G], [N, 1] or [1], ``bias`` [N]. ``W[n, k] = scale * (q - zero)`` with signed q and zero;
packed values, and exl's, are 2**(bits - 1) more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.compressed_tensors import IntConfig, PackedConfig
from exl.errors import CheckpointError
from exl.formats.codes import unpack_codes
from exl.formats.format import Format
from exl.formats.groups import QuantizedShape, num_groups, read_order, read_scales
from exl.formats.matrix import QuantizedMatrix
from exl.formats.tensors import FLOAT_DTYPES, expect_shape, read_bias, require_tensor
from exl.layout.specs import MatrixSpec

K_MULTIPLE = 32  # what layouts take


@dataclass(frozen=True)
class _Shape(QuantizedShape):
    """``padded``: words hold whole codes, with bits unused."""

    padded: bool = False


def int_spec(checkpoint: Checkpoint, name: str, quant: IntConfig) -> MatrixSpec:
    """Shapes of one module. ``quant`` is the module's own. Raises ``CheckpointError`` that names the tensor, what was
    found and what was expected."""
    shape = _read_shape(checkpoint, name, quant)
    return shape.spec(checkpoint, name, quant.bits, symmetric=quant.symmetric, scales=f"{name}.weight_scale")


def load_int(checkpoint: Checkpoint, name: str, quant: IntConfig) -> QuantizedMatrix:
    """One module with its scales and zeros in memory. Codes are read by block. Raises as :func:`int_spec`, also for
    scales that are not finite, and for codes and zeros beyond their bits."""
    shape = _read_shape(checkpoint, name, quant)
    is_packed = isinstance(quant, PackedConfig)
    read_rows = (_packed_rows if is_packed else _byte_rows)(checkpoint, name, quant, shape)

    def read_codes(start: int, stop: int) -> NDArray[np.uint8]:
        if not 0 <= start <= stop <= shape.N:
            raise ValueError(f"columns {start}:{stop} of {name}, which has {shape.N}")
        codes = read_rows(start, stop)
        return codes if shape.order is None else codes[shape.order]

    def read_words() -> NDArray[np.uint32]:
        return np.ascontiguousarray(checkpoint.read(f"{name}.weight_packed").view(np.uint32).T)

    scales = read_scales(checkpoint, f"{name}.weight_scale").reshape(-1, shape.num_groups).T
    return QuantizedMatrix(
        bits=quant.bits,
        group_size=shape.group_size,
        K=shape.K,
        N=shape.N,
        scales=np.ascontiguousarray(np.broadcast_to(scales, (shape.num_groups, shape.N))),
        scale_dtype=checkpoint.info(f"{name}.weight_scale").dtype,
        zeros=_read_zeros(checkpoint, name, quant, shape),
        order=shape.order,
        bias=read_bias(checkpoint, f"{name}.bias", shape.N),
        read_codes=read_codes,
        read_words=read_words if is_packed and not shape.padded else None,
    )


# --- shapes --------------------------------------------------------------------------------------------------------


def _read_shape(checkpoint: Checkpoint, name: str, quant: IntConfig) -> _Shape:
    padded = False
    if isinstance(quant, PackedConfig):
        N, K, padded = _packed_sizes(checkpoint, name, quant)
        tensor = f"{name}.weight_packed"
    else:
        tensor = f"{name}.weight"
        N, K = require_tensor(checkpoint, tensor, ("i8",), 2).shape
    if not K or not N or K % K_MULTIPLE:
        raise CheckpointError(
            f"{checkpoint.info(tensor).file}: {tensor}: found {K} inputs and {N} outputs, expected a multiple of "
            f"{K_MULTIPLE} inputs"
        )
    one_group = quant.group_size == -1 or quant.group_size >= K
    group_size = K if one_group else quant.group_size
    scales = checkpoint.info(f"{name}.weight_scale")
    allowed = [(N, num_groups(K, group_size)), *([(N,), (1,), (), (1, 1)] if one_group else [])]
    if scales.dtype not in FLOAT_DTYPES or scales.shape not in allowed:
        raise CheckpointError(
            f"{scales.file}: {scales.name}: found {scales.dtype} {list(scales.shape)}, expected "
            f"{' or '.join(FLOAT_DTYPES)} {list(allowed[0])} for {K} inputs and group size {quant.group_size} "
            f"({quant.source})"
        )
    order = read_order(checkpoint, f"{name}.weight_g_idx", K, group_size, quant.source)
    return _Shape(K, N, group_size, order, padded)


def _packed_sizes(checkpoint: Checkpoint, name: str, quant: PackedConfig) -> tuple[int, int, bool]:
    """N, K, and whether words are padded. Of a remote file ``weight_shape``, a request for each module, is read only
    where the number of words does not say K."""
    packed = require_tensor(checkpoint, f"{name}.weight_packed", ("i32",), 2)
    N, num_words = packed.shape
    if quant.bits != 3 and checkpoint.is_remote:
        return N, num_words * 32 // quant.bits, False
    info = require_tensor(checkpoint, f"{name}.weight_shape", ("i64", "i32"), 1)
    expect_shape(info, (2,), "outputs and inputs")
    stated_N, K = (int(size) for size in checkpoint.read(info.name))
    per_word = 32 // quant.bits
    dense, padded = -(-K * quant.bits // 32), -(-K // per_word)
    if stated_N != N or num_words not in (dense, padded):
        raise CheckpointError(
            f"{packed.file}: {packed.name}: found shape {list(packed.shape)}, expected [{stated_N}, {dense}]"
            f"{f' or, padded, [{stated_N}, {padded}]' * (dense != padded)} for {K} inputs of weight_shape and "
            f"{quant.bits} bits ({quant.source})"
        )
    return N, K, num_words != dense


# --- codes and zeros -----------------------------------------------------------------------------------------------


def _packed_rows(
    checkpoint: Checkpoint, name: str, quant: IntConfig, shape: _Shape
) -> Callable[..., NDArray[np.uint8]]:
    def read(start: int, stop: int) -> NDArray[np.uint8]:
        words = checkpoint.read_rows(f"{name}.weight_packed", start, stop)
        return _unpack(words.T, quant.bits, shape.K, shape.padded)

    return read


def _unpack(words: NDArray[np.int32], bits: int, count: int, padded: bool) -> NDArray[np.uint8]:
    """Words [R, n] -> the first ``count`` values along axis 0, u8 [count, n]."""
    if not padded:
        missing = -len(words) % bits if bits == 3 else 0  # a stream may end inside of three words
        words = np.concatenate([words, np.zeros((missing, words.shape[1]), words.dtype)]) if missing else words
        return unpack_codes(words, bits)[:count]
    per_word, raw = 32 // bits, np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((len(raw), per_word, raw.shape[1]), np.uint8)
    for j in range(per_word):
        codes[:, j] = raw >> np.uint32(bits * j) & np.uint32((1 << bits) - 1)
    return codes.reshape(len(raw) * per_word, raw.shape[1])[:count]


def _byte_rows(checkpoint: Checkpoint, name: str, quant: IntConfig, shape: _Shape) -> Callable[..., NDArray[np.uint8]]:
    def read(start: int, stop: int) -> NDArray[np.uint8]:
        return _unsigned(
            checkpoint, f"{name}.weight", checkpoint.read_rows(f"{name}.weight", start, stop).T, quant.bits
        )

    return read


def _unsigned(checkpoint: Checkpoint, tensor: str, values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Signed values of ``bits`` -> unsigned ones. Raises ``CheckpointError`` for a value that has more bits."""
    middle = 1 << (bits - 1)
    if bits < 8 and values.size and (values.min() < -middle or values.max() >= middle):
        worst = max(int(values.max()), int(values.min()), key=abs)
        raise CheckpointError(
            f"{checkpoint.info(tensor).file}: {tensor}: found {worst}, expected {-middle} to {middle - 1}: {bits} bits"
        )
    return np.ascontiguousarray(values).view(np.uint8) + np.uint8(middle)  # modulo 256: -128 becomes 0


def _read_zeros(checkpoint: Checkpoint, name: str, quant: IntConfig, shape: _Shape) -> NDArray[np.uint8]:
    """u8 [G, N]. Zeros of a symmetric matrix, which older files have, must be 0."""
    tensor, G, N = f"{name}.weight_zero_point", shape.num_groups, shape.N
    middle = np.uint8(1 << (quant.bits - 1))
    if quant.symmetric and tensor not in checkpoint.tensors:
        return np.full((G, N), middle)
    info = checkpoint.info(tensor)
    if info.dtype == "i8":
        scales = checkpoint.info(f"{name}.weight_scale")
        expect_shape(info, scales.shape, "the shape of its scales")
        found = _unsigned(checkpoint, tensor, checkpoint.read(tensor).reshape(-1, G).T, quant.bits)
        zeros = np.ascontiguousarray(np.broadcast_to(found, (G, N)))
    else:
        info = require_tensor(checkpoint, tensor, ("i32",), 2)
        dense, padded = -(-N * quant.bits // 32), -(-N // (32 // quant.bits))
        expect_shape(info, (padded if shape.padded else dense, G), f"{N} outputs in {G} groups of {quant.bits} bits")
        zeros = np.ascontiguousarray(_unpack(checkpoint.read(tensor), quant.bits, N, shape.padded).T)
    if quant.symmetric and (zeros != middle).any():
        raise CheckpointError(
            f"{info.file}: {tensor}: found {int(zeros[zeros != middle][0]) - int(middle)}, expected 0: {quant.source} "
            "says that weights are symmetric"
        )
    return zeros


_PARTS = ("weight_scale", "weight_zero_point", "weight_g_idx", "bias", "input_scale", "input_zero_point")
PACKED = Format("weight_packed", ("weight_packed", "weight_shape", *_PARTS), int_spec, load_int)
BYTES = Format("weight", ("weight", *_PARTS), int_spec, load_int, ("i8",))
