"""Experts in mxfp4, as gpt-oss has them -> ``QuantizedMatrix``. Source: OCP Microscaling Formats 1.0.

``<name>_blocks`` u8 [E, N, K / 32, 16]: 32 inputs of an output, two codes of 4 bits (e2m1) a byte, the lower one first;
``<name>_scales`` u8 [E, N, K / 32]: s stands for 2^(s - 127), 255 for NaN; ``<name>_bias`` [E, N], optional.

Codes stand for integers, twice what e2m1 says, so scales are 2^(s - 128): f32 and bf16 hold all of them, 0 among the
denormal ones. Nothing is rounded. (6 times the two largest scales is beyond f32, as the weights themselves are.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.errors import CheckpointError
from exl.formats.matrix import QuantizedMatrix
from exl.formats.tensors import expect_shape, require_float, require_tensor, to_float
from exl.layout.specs import MatrixSpec, Stack

GROUP = 32  # inputs that share a scale
_BLOCK_BYTES = GROUP // 2
_NAN = 255
_ZERO = 8  # of codes whose zero means nothing


def is_mxfp4(checkpoint: Checkpoint, name: str) -> bool:
    return f"{name}_blocks" in checkpoint.tensors


def mxfp4_spec(checkpoint: Checkpoint, name: str, stack: Stack, count: int) -> MatrixSpec:
    """From headers alone. Raises ``CheckpointError`` that names the tensor, what was found and what was expected."""
    blocks = require_tensor(checkpoint, f"{name}_blocks", ("u8",), 4)
    N, groups = blocks.shape[1:3]
    expect_shape(blocks, (count, N, groups, _BLOCK_BYTES), f"{count} experts in blocks of {GROUP} inputs")
    scales = require_tensor(checkpoint, f"{name}_scales", ("u8",), 3)
    expect_shape(scales, (count, N, groups), f"{count} experts of {N} outputs and {groups} blocks")
    has_bias = f"{name}_bias" in checkpoint.tensors
    if has_bias:
        expect_shape(require_float(checkpoint, f"{name}_bias", 2), (count, N), f"{count} experts of {N} outputs")
    return MatrixSpec(
        name=name,
        K=groups * GROUP,
        N=N,
        bits=4,
        dtype="u8",
        group_size=GROUP,
        has_bias=has_bias,
        symmetric=True,
        scale_dtype="bf16",
        stack=stack,
        code_kind="fp4",
    )


def load_mxfp4(checkpoint: Checkpoint, name: str, stack: Stack) -> QuantizedMatrix:
    """One expert's, with its scales in memory. Raises ``CheckpointError`` for a scale that is NaN."""
    expert, found = stack.expert, []
    info = checkpoint.info(f"{name}_scales")
    exponents = checkpoint.read_rows(info.name, expert, expert + 1)[0]  # [N, G]
    if (exponents == _NAN).any():
        output, group = np.argwhere(exponents == _NAN)[0]
        raise CheckpointError(
            f"{info.file}: {info.name}: found NaN (255) for expert {expert}, output {output}, block {group}, "
            "expected finite scales"
        )
    scales = np.ldexp(np.float32(1), exponents.T.astype(np.int32) - 128)
    N, groups = exponents.shape

    def read_codes(start: int, stop: int) -> NDArray[np.uint8]:
        if not found:
            found.append(checkpoint.read_rows(f"{name}_blocks", expert, expert + 1)[0])
        pairs = found[0][start:stop].reshape(stop - start, -1)
        codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(stop - start, groups * GROUP)
        return np.ascontiguousarray(codes.T)

    bias = None
    if f"{name}_bias" in checkpoint.tensors:
        bias = to_float(
            checkpoint.read_rows(f"{name}_bias", expert, expert + 1)[0], checkpoint.info(f"{name}_bias").dtype
        )
    return QuantizedMatrix(
        bits=4,
        group_size=GROUP,
        K=groups * GROUP,
        N=N,
        scales=scales.astype(np.float32),
        zeros=np.full((groups, N), _ZERO, np.uint8),
        order=None,
        bias=bias,
        read_codes=read_codes,
        scale_dtype="bf16",
        code_kind="fp4",
    )
