"""AWQ tensors -> ``QuantizedMatrix``. Layouts are those of AutoAWQ's ``modules/linear/{gemm,gemv,gemv_fast}.py``.

``gemm``: ``qweight`` i32 [K, N / 8], packed along N; nibble i of a word holds output ``ORDER[i]`` of eight. ``qzeros``
i32 [G, N / 8] alike, zeros as they are; ``scales`` [G, N].

``gemv``: ``qweight`` i32 [N, K / 8] and ``qzeros`` i32 [N, zw], along K and along the groups, in order; ``scales``
[N, 8 zw]. zw is as wide as its kernel wants: at least G / 8.

``gemv_fast``, ``llm-awq``: ``qweight`` i16 [N / 4, K], 4 outputs together; ``scales`` f16 [8 zw, N], and ``qzeros`` or
``scaled_zeros`` f16 [8 zw, N], which hold ``-scale * zero``, rounded. The meaning is the others': the zero is found
exactly, and its product not rounded.

All have ``bias`` [N], optional, and no ``g_idx``. Files with ``zero_point`` false may lack zeros: they are 8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import TensorInfo
from exl.checkpoint.quant.awq import AwqConfig
from exl.errors import CheckpointError
from exl.formats.codes import unpack_codes
from exl.formats.format import Format
from exl.formats.groups import QuantizedShape, num_groups, read_scales
from exl.formats.matrix import QuantizedMatrix
from exl.formats.tensors import FLOAT_DTYPES, expect_shape, read_bias, require_tensor
from exl.layout.specs import MatrixSpec

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE_OF = tuple(ORDER.index(output) for output in range(8))  # 0, 4, 1, 5, 2, 6, 3, 7
_SYMMETRIC_ZERO = 8
_MOST_PADDING = 64  # groups that a kernel may want beside those that there are
_FAST_BLOCK = 64  # inputs of 4 outputs that gemv_fast interleaves


def awq_spec(checkpoint: Checkpoint, name: str, quant: AwqConfig) -> MatrixSpec:
    """Shapes of one module, from headers. ``quant`` is the module's own.

    Raises ``CheckpointError`` that names the tensor, what was found and what was expected.
    """
    K, N = _READERS[quant.version][0](checkpoint, name, quant)
    shape = QuantizedShape(K, N, _group_size(K, quant))
    return shape.spec(checkpoint, name, quant.bits, symmetric=not quant.zero_point, scales=f"{name}.scales")


def load_awq(checkpoint: Checkpoint, name: str, quant: AwqConfig) -> QuantizedMatrix:
    """One module with its scales and zeros in memory. Codes are read at the first use and unpacked by block.

    Raises as :func:`awq_spec`, also for scales that are not finite, and for zeros that are none or not symmetric
    although the configuration says that they are.
    """
    read_shape, read_scales_zeros, make_codes = _READERS[quant.version]
    K, N = read_shape(checkpoint, name, quant)
    G = num_groups(K, quant.group_size)
    scales, zeros = read_scales_zeros(checkpoint, name, G, N)
    if zeros is None:
        zeros = np.full((G, N), _SYMMETRIC_ZERO, np.uint8)
    elif not quant.zero_point and (zeros != _SYMMETRIC_ZERO).any():
        raise CheckpointError(
            f"{checkpoint.path}: {name}: found zero {zeros[zeros != _SYMMETRIC_ZERO][0]}, expected {_SYMMETRIC_ZERO} "
            f"everywhere: {quant.source} says that there are no zero points"
        )
    codes = make_codes(checkpoint, f"{name}.qweight")

    def read_codes(start: int, stop: int) -> NDArray[np.uint8]:
        if not 0 <= start <= stop <= N:
            raise ValueError(f"columns {start}:{stop} of {name}, which has {N}")
        return codes.columns(start, stop)

    return QuantizedMatrix(
        bits=quant.bits,
        group_size=_group_size(K, quant),
        K=K,
        N=N,
        scales=scales,
        scale_dtype=checkpoint.info(f"{name}.scales").dtype,
        zeros=zeros,
        order=None,
        bias=read_bias(checkpoint, f"{name}.bias", N),
        read_codes=read_codes,
        read_words=codes.words,
    )


def _group_size(K: int, quant: AwqConfig) -> int:
    return K if quant.group_size == -1 else min(quant.group_size, K)


def _check_sizes(qweight: TensorInfo, K: int, N: int, expected: str) -> None:
    if not K or not N or K % 32:
        raise CheckpointError(
            f"{qweight.file}: {qweight.name}: found shape {list(qweight.shape)}, expected {expected} with K a multiple "
            "of 32"
        )


def _reason(K: int, quant: AwqConfig) -> str:
    return f"{K} inputs and group size {quant.group_size} in AWQ's {quant.version} layout ({quant.source})"


def _zeros_name(checkpoint: Checkpoint, name: str) -> str | None:
    """The tensor of the zeros; None: there is none."""
    return next((n for n in (f"{name}.qzeros", f"{name}.scaled_zeros") if n in checkpoint.tensors), None)


def _expect_zeros(
    checkpoint: Checkpoint, name: str, quant: AwqConfig, shape: tuple[int, ...], dtypes: tuple[str, ...], reason: str
) -> None:
    found = _zeros_name(checkpoint, name)
    if found is None and not quant.zero_point:
        return
    expect_shape(require_tensor(checkpoint, found or f"{name}.qzeros", dtypes, 2), shape, reason)


# --- gemm ----------------------------------------------------------------------------------------------------------


def _gemm_shape(checkpoint: Checkpoint, name: str, quant: AwqConfig) -> tuple[int, int]:
    qweight = require_tensor(checkpoint, f"{name}.qweight", ("i32",), 2)
    K, N = qweight.shape[0], qweight.shape[1] * 8
    _check_sizes(qweight, K, N, "[K, N / 8]")
    G, reason = num_groups(K, quant.group_size), _reason(K, quant)
    expect_shape(require_tensor(checkpoint, f"{name}.scales", FLOAT_DTYPES, 2), (G, N), reason)
    _expect_zeros(checkpoint, name, quant, (G, N // 8), ("i32",), reason)
    return K, N


def _gemm_scales_zeros(checkpoint: Checkpoint, name: str, G: int, N: int) -> tuple[NDArray, NDArray[np.uint8] | None]:
    zeros = None if _zeros_name(checkpoint, name) is None else checkpoint.read(f"{name}.qzeros")
    return read_scales(checkpoint, f"{name}.scales"), None if zeros is None else _unpack_gemm(zeros, 0, N)


def _unpack_gemm(words: NDArray[np.int32], start: int, stop: int) -> NDArray[np.uint8]:
    """Words [R, N / 8] -> their values of columns ``start:stop``, u8 [R, stop - start]."""
    first = start // 8
    some = np.ascontiguousarray(words[:, first : -(-stop // 8)], "<i4")
    nibbles = some.view(np.uint8).reshape(len(some), -1, 4)  # byte i of a word has nibbles 2 i and 2 i + 1
    values = np.empty((*nibbles.shape[:2], 8), np.uint8)
    for output, nibble in enumerate(_NIBBLE_OF):
        np.bitwise_and(nibbles[:, :, nibble // 2] >> (nibble % 2 * 4), 15, out=values[:, :, output])
    return np.ascontiguousarray(values.reshape(len(some), -1)[:, start - first * 8 : stop - first * 8])


class _GemmCodes:
    """Without ``words``: eights along K would have to be put together from single codes."""

    words: Callable[[], NDArray[np.uint32]] | None = None

    def __init__(self, checkpoint: Checkpoint, qweight: str) -> None:
        self._checkpoint, self._qweight = checkpoint, qweight
        self._packed: NDArray[np.int32] | None = None  # read once, kept as long as the matrix

    def columns(self, start: int, stop: int) -> NDArray[np.uint8]:
        if self._packed is None:
            self._packed = self._checkpoint.read(self._qweight)
        return _unpack_gemm(self._packed, start, stop)


# --- gemv ----------------------------------------------------------------------------------------------------------


def _gemv_shape(checkpoint: Checkpoint, name: str, quant: AwqConfig) -> tuple[int, int]:
    qweight = require_tensor(checkpoint, f"{name}.qweight", ("i32",), 2)
    N, K = qweight.shape[0], qweight.shape[1] * 8
    _check_sizes(qweight, K, N, "[N, K / 8]")
    scales = require_tensor(checkpoint, f"{name}.scales", FLOAT_DTYPES, 2)
    width, reason = _padded_groups(scales, scales.shape[1], K, quant), _reason(K, quant)
    expect_shape(scales, (N, width), reason)
    _expect_zeros(checkpoint, name, quant, (N, width // 8), ("i32",), reason)
    return K, N


def _padded_groups(scales: TensorInfo, found: int, K: int, quant: AwqConfig) -> int:
    """The groups that ``scales`` have room for: the kernels want them in eights, at least so many as there are."""
    G = num_groups(K, quant.group_size)
    if found < G or found % 8 or found > G + _MOST_PADDING:
        raise CheckpointError(
            f"{scales.file}: {scales.name}: found shape {list(scales.shape)}, expected room for {G} groups in eights: "
            f"{_reason(K, quant)}"
        )
    return found


def _gemv_scales_zeros(checkpoint: Checkpoint, name: str, G: int, N: int) -> tuple[NDArray, NDArray[np.uint8] | None]:
    scales = np.ascontiguousarray(read_scales(checkpoint, f"{name}.scales")[:, :G].T)
    if _zeros_name(checkpoint, name) is None:
        return scales, None
    return scales, np.ascontiguousarray(unpack_codes(checkpoint.read(f"{name}.qzeros").T, 4)[:G])


class _GemvCodes:
    """Words are GPTQ's, transposed."""

    def __init__(self, checkpoint: Checkpoint, qweight: str) -> None:
        self._checkpoint, self._qweight = checkpoint, qweight
        self._words: NDArray[np.uint32] | None = None

    def words(self) -> NDArray[np.uint32]:
        if self._words is None:
            self._words = np.ascontiguousarray(self._checkpoint.read(self._qweight).view(np.uint32).T)
        return self._words

    def columns(self, start: int, stop: int) -> NDArray[np.uint8]:
        return unpack_codes(self.words()[:, start:stop], 4)


# --- gemv_fast, llm-awq --------------------------------------------------------------------------------------------


def _fast_shape(checkpoint: Checkpoint, name: str, quant: AwqConfig) -> tuple[int, int]:
    qweight = require_tensor(checkpoint, f"{name}.qweight", ("i16",), 2)
    N, K = qweight.shape[0] * 4, qweight.shape[1]
    _check_sizes(qweight, K, N, "[N / 4, K]")
    if K % _FAST_BLOCK:
        raise CheckpointError(
            f"{qweight.file}: {qweight.name}: found {K} inputs, expected a multiple of {_FAST_BLOCK} in AWQ's "
            f"{quant.version} layout"
        )
    scales = require_tensor(checkpoint, f"{name}.scales", ("f16",), 2)
    width, reason = _padded_groups(scales, scales.shape[0], K, quant), _reason(K, quant)
    expect_shape(scales, (width, N), reason)
    _expect_zeros(checkpoint, name, quant, (width, N), ("f16",), reason)
    return K, N


def _fast_scales_zeros(checkpoint: Checkpoint, name: str, G: int, N: int) -> tuple[NDArray, NDArray[np.uint8] | None]:
    scales, zeros = np.ascontiguousarray(read_scales(checkpoint, f"{name}.scales")[:G]), _zeros_name(checkpoint, name)
    if zeros is None:
        return scales, None
    wide, scaled = scales.astype(np.float32), read_scales(checkpoint, zeros)[:G]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(wide == 0, 0, np.rint(-scaled.astype(np.float32) / wide))
    # f16 of the exact product of 11 and 4 bits is what the file has to hold, if it holds a zero at all.
    wrong = (found < 0) | (found > 15) | ((-wide * found).astype(np.float16) != scaled)
    if wrong.any():
        group, column = np.argwhere(wrong)[0]
        raise CheckpointError(
            f"{checkpoint.info(zeros).file}: {zeros}: found {scaled[group, column]} for group {group}, output {column}"
            f", expected -{scales[group, column]} times a zero of 0 to 15, rounded to f16"
        )
    return scales, found.astype(np.uint8)


def _fast_sequence() -> NDArray[np.int64]:
    """The input, of 32, that each of 32 values in the file's order belongs to: pairs of neighbours of four runs of
    eight, for each pair first the even inputs, then the odd ones."""
    by_pair = np.arange(32).reshape(4, 4, 2).transpose(1, 0, 2)  # pair, run, odd
    return by_pair.transpose(0, 2, 1).reshape(-1)


class _FastCodes:
    """Blocks of 64 inputs of 4 outputs: output after output, four values of the file's order in a word."""

    words: Callable[[], NDArray[np.uint32]] | None = None

    def __init__(self, checkpoint: Checkpoint, qweight: str) -> None:
        self._checkpoint, self._qweight = checkpoint, qweight
        self._packed: NDArray[np.uint8] | None = None  # bytes, [N / 4, K / 64, 4 outputs, 32]

    def columns(self, start: int, stop: int) -> NDArray[np.uint8]:
        if self._packed is None:
            words = self._checkpoint.read(self._qweight)
            self._packed = words.view(np.uint8).reshape(len(words), -1, 4, _FAST_BLOCK // 2)
        first, last = start // 4, -(-stop // 4)
        some = self._packed[first:last]
        fours, blocks = some.shape[:2]
        values = np.stack([some & 15, some >> 4], axis=-1).reshape(fours, blocks, 4, 2, 32)
        codes = np.empty_like(values)
        codes[..., _fast_sequence()] = values
        rows = codes.transpose(0, 2, 1, 3, 4).reshape(4 * fours, blocks * _FAST_BLOCK)  # [outputs, K]
        return np.ascontiguousarray(rows[start - 4 * first : stop - 4 * first].T)


# By version: shapes from headers; scales and zeros; codes.
_READERS = {
    "gemm": (_gemm_shape, _gemm_scales_zeros, _GemmCodes),
    "gemv": (_gemv_shape, _gemv_scales_zeros, _GemvCodes),
    "gemv_fast": (_fast_shape, _fast_scales_zeros, _FastCodes),
    "llm-awq": (_fast_shape, _fast_scales_zeros, _FastCodes),
}
FORMAT = Format("qweight", ("qweight", "qzeros", "scaled_zeros", "scales", "bias"), awq_spec, load_awq)
