"""Dense FP8 weights with scales -> ``DenseMatrix`` in f32.

``weight`` float8_e4m3fn [N, K]; ``weight_scale`` or ``weight_scale_inv``, which both multiply (the second has its name
from the factor's use in training): of one matrix ([], [1]), of each output ([N], [N, 1]), or of each block of so many
outputs and inputs ([ceil(N / rows), ceil(K / columns)]; the last of each may be smaller).

The values are f32, because a product of 4 and 8 to 24 bits fits nothing smaller: exact with scales of 8 or 11 bits
(bf16, f16), rounded once with f32 scales. bf16, in which such models were trained, would change most weights. Four
bytes for each weight are the price; ``exl quantize`` or an int4 folder of the same model takes less.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import TensorInfo
from exl.checkpoint.quant.fp8 import Fp8Config
from exl.errors import CheckpointError
from exl.formats.format import Format
from exl.formats.groups import read_scales
from exl.formats.matrix import DenseMatrix
from exl.formats.tensors import FLOAT_DTYPES, expect_shape, read_bias, require_tensor
from exl.layout.specs import MatrixSpec

_DTYPE = "f8_e4m3"
_SCALES = ("weight_scale", "weight_scale_inv")
_NAN = 0x7F  # without its sign; there are no infinities


def fp8_spec(checkpoint: Checkpoint, name: str, quant: Fp8Config) -> MatrixSpec:
    """From headers alone. Raises ``CheckpointError`` that names the tensor, what was found and what was expected."""
    weight, _, _ = _tensors(checkpoint, name, quant)
    N, K = weight.shape
    return MatrixSpec(name=name, K=K, N=N, bits=32, dtype="f32", has_bias=f"{name}.bias" in checkpoint.tensors)


def load_fp8(checkpoint: Checkpoint, name: str, quant: Fp8Config) -> DenseMatrix:
    """Scales and bias in memory, weights read row by row. Raises as :func:`fp8_spec`, also for scales and, when rows
    are read, weights that are not finite."""
    weight, scales_info, (rows, columns) = _tensors(checkpoint, name, quant)
    N, K = weight.shape
    scales = read_scales(checkpoint, scales_info.name).astype(np.float32).reshape(-(-N // rows), -(-K // columns))
    table, column = _table(), np.arange(K) // columns

    def read_rows(start: int, stop: int) -> NDArray[np.float32]:
        if not 0 <= start <= stop <= N:
            raise ValueError(f"rows {start}:{stop} of {name}, which has {N}")
        raw = checkpoint.read_bytes(weight.name, start * K, (stop - start) * K).reshape(-1, K)
        if ((raw & _NAN) == _NAN).any():
            raise CheckpointError(f"{weight.file}: {weight.name}: found nan in rows {start} to {stop - 1}")
        some = scales[np.arange(start, stop) // rows]
        return table[raw] * (some if columns >= K else some[:, column])

    bias = read_bias(checkpoint, f"{name}.bias", N)
    bias_dtype = None if bias is None else "f16" if bias.dtype == np.float16 else "f32"
    return DenseMatrix(dtype="f32", K=K, N=N, bias=bias, bias_dtype=bias_dtype, read_rows=read_rows)


def _tensors(checkpoint: Checkpoint, name: str, quant: Fp8Config) -> tuple[TensorInfo, TensorInfo, tuple[int, int]]:
    """The weight, its scales, and how many outputs and inputs share one."""
    weight = require_tensor(checkpoint, f"{name}.weight", (_DTYPE,), 2)
    if 0 in weight.shape:
        raise CheckpointError(
            f"{weight.file}: {weight.name}: found shape {list(weight.shape)}, expected [N, K] above 0"
        )
    present = [f"{name}.{part}" for part in _SCALES if f"{name}.{part}" in checkpoint.tensors]
    if len(present) != 1:
        found = " and ".join(present) or "no scales"
        raise CheckpointError(f"{weight.file}: {weight.name}: found {found}, expected one of {' and '.join(_SCALES)}")
    scales = checkpoint.info(present[0])
    if scales.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{scales.file}: {scales.name}: found dtype {scales.dtype}, expected {' or '.join(FLOAT_DTYPES)}"
        )
    N, K = weight.shape
    if quant.block is not None:
        rows, columns = quant.block
        expect_shape(scales, (-(-N // rows), -(-K // columns)), f"blocks of {rows} x {columns} ({quant.source})")
        return weight, scales, quant.block
    if scales.shape in ((), (1,), (1, 1)):
        return weight, scales, (N, K)
    if scales.shape in ((N,), (N, 1)):
        return weight, scales, (1, K)
    raise CheckpointError(
        f"{scales.file}: {scales.name}: found shape {list(scales.shape)}, expected one scale or [{N}, 1]: "
        f"{quant.source} says nothing of blocks"
    )


def _table() -> NDArray[np.float32]:
    """The value of each byte: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; subnormal at exponent 0."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    return np.where(byte >> 7, -value, value).astype(np.float32)


FORMAT = Format("weight", ("weight", *_SCALES, "bias", "input_scale"), fp8_spec, load_fp8, (_DTYPE,))
