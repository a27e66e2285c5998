"""Matrices of all experts in one tensor -> that of one expert.

``<name>`` [E, N, K] or, transposed, [E, K, N], in f32, f16 or bf16, or what ``mxfp4.py`` reads; ``<name>_bias`` [E, N],
optional.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.formats.mxfp4 import is_mxfp4, load_mxfp4, mxfp4_spec
from exl.formats.tensors import expect_shape, require_float
from exl.layout.specs import MatrixSpec, Stack


def has_stacked(checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint.tensors or is_mxfp4(checkpoint, name)


def stacked_tensors(checkpoint: Checkpoint, name: str) -> set[str]:
    """The names of the tensors that it is made of."""
    ends = ("_blocks", "_scales", "_bias") if is_mxfp4(checkpoint, name) else ("", "_bias")
    return {name + end for end in ends if name + end in checkpoint.tensors}


def stacked_spec(checkpoint: Checkpoint, name: str, stack: Stack, count: int) -> MatrixSpec:
    """From headers alone. Raises ``CheckpointError`` that names the tensor, what was found and what was expected,
    ``UnsupportedModelError`` for a type other than f32, f16 and bf16."""
    if is_mxfp4(checkpoint, name):
        return mxfp4_spec(checkpoint, name, stack, count)
    weight = require_float(checkpoint, name, 3)
    expect_shape(weight, (count, *weight.shape[1:]), f"{count} experts")
    K, N = weight.shape[1:] if stack.transposed else weight.shape[:0:-1]
    has_bias = f"{name}_bias" in checkpoint.tensors
    if has_bias:
        expect_shape(require_float(checkpoint, f"{name}_bias", 2), (count, N), f"{count} experts of {N} outputs")
    return MatrixSpec(name, K, N, 32 if weight.dtype == "f32" else 16, weight.dtype, has_bias=has_bias, stack=stack)


def load_stacked(checkpoint: Checkpoint, name: str, stack: Stack) -> DenseMatrix | QuantizedMatrix:
    """An expert's matrix is read as a whole at the first use, and kept as long as what is returned."""
    if is_mxfp4(checkpoint, name):
        return load_mxfp4(checkpoint, name, stack)
    weight, found = checkpoint.info(name), []
    K, N = weight.shape[1:] if stack.transposed else weight.shape[:0:-1]

    def rows() -> NDArray:
        if not found:
            matrix = checkpoint.read_rows(name, stack.expert, stack.expert + 1)[0]
            found.append(np.ascontiguousarray(matrix.T) if stack.transposed else matrix)
        return found[0]

    bias = bias_dtype = None
    if f"{name}_bias" in checkpoint.tensors:
        bias = checkpoint.read_rows(f"{name}_bias", stack.expert, stack.expert + 1)[0]
        bias_dtype = checkpoint.info(f"{name}_bias").dtype
    return DenseMatrix(weight.dtype, K, N, bias, bias_dtype, lambda start, stop: rows()[start:stop])
