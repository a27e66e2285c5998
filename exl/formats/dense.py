"""Dense ``<name>.weight`` [N, K] and ``<name>.bias`` [N] -> ``DenseMatrix``, in the file's own type."""

from __future__ import annotations

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import TensorInfo
from exl.errors import CheckpointError
from exl.formats.matrix import DenseMatrix
from exl.formats.tensors import expect_shape, require_float
from exl.layout.specs import MatrixSpec


def dense_spec(checkpoint: Checkpoint, name: str) -> MatrixSpec:
    """From headers alone.

    Raises ``CheckpointError`` that names the tensor, what was found and what was expected, ``UnsupportedModelError``
    for a type other than f32, f16 and bf16.
    """
    weight, bias = _tensors(checkpoint, name)
    N, K = weight.shape
    return MatrixSpec(
        name=name,
        K=K,
        N=N,
        bits=32 if weight.dtype == "f32" else 16,
        dtype=weight.dtype,
        has_bias=bias is not None,
    )


def load_dense(checkpoint: Checkpoint, name: str) -> DenseMatrix:
    """The bias in memory, the weight read row by row from the file. Raises as :func:`dense_spec`."""
    weight, bias = _tensors(checkpoint, name)
    N, K = weight.shape
    return DenseMatrix(
        dtype=weight.dtype,
        K=K,
        N=N,
        bias=None if bias is None else checkpoint.read(bias.name),
        bias_dtype=None if bias is None else bias.dtype,
        read_rows=lambda start, stop: checkpoint.read_rows(weight.name, start, stop),
        read_into=lambda out: checkpoint.read_into(weight.name, out),
    )


def _tensors(checkpoint: Checkpoint, name: str) -> tuple[TensorInfo, TensorInfo | None]:
    weight = require_float(checkpoint, f"{name}.weight", 2)
    if 0 in weight.shape:
        raise CheckpointError(
            f"{weight.file}: {weight.name}: found shape {list(weight.shape)}, expected [N, K] above 0"
        )
    if f"{name}.bias" not in checkpoint.tensors:
        return weight, None
    bias = require_float(checkpoint, f"{name}.bias", 1)
    expect_shape(bias, weight.shape[:1], f"{weight.shape[0]} outputs")
    return weight, bias
