"""Single tensors of a checkpoint, checked and converted: what all formats need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import TensorInfo
from exl.errors import CheckpointError, UnsupportedModelError
from exl.layout.specs import NormSpec

FLOAT_DTYPES = ("f32", "f16", "bf16")


def require_tensor(checkpoint: Checkpoint, name: str, dtypes: Sequence[str], num_dims: int) -> TensorInfo:
    """The tensor's header. ``CheckpointError`` where it is missing, or has another type or number of dimensions."""
    info = checkpoint.info(name)
    if info.dtype not in dtypes:
        raise CheckpointError(f"{info.file}: {name}: found dtype {info.dtype}, expected {' or '.join(dtypes)}")
    if len(info.shape) != num_dims:
        raise CheckpointError(
            f"{info.file}: {name}: found shape {list(info.shape)}, expected {num_dims} dimension{'s' * (num_dims > 1)}"
        )
    return info


def require_float(checkpoint: Checkpoint, name: str, num_dims: int) -> TensorInfo:
    """As :func:`require_tensor` for f32, f16 and bf16; any other type is one that exl does not have."""
    info = checkpoint.info(name)
    if info.dtype not in FLOAT_DTYPES:
        raise UnsupportedModelError(
            f"{info.file}: {name}: found dtype {info.dtype}, exl has dense weights in {', '.join(FLOAT_DTYPES)}"
        )
    return require_tensor(checkpoint, name, FLOAT_DTYPES, num_dims)


def expect_shape(info: TensorInfo, shape: tuple[int, ...], reason: str) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.file}: {info.name}: found shape {list(info.shape)}, expected {list(shape)} for {reason}"
        )


def read_float(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """f32, f16 or bf16 -> f32, exactly."""
    return to_float(checkpoint.read(name), checkpoint.info(name).dtype)


def to_float(values: NDArray, dtype: str) -> NDArray[np.float32]:
    """What ``Checkpoint`` reads of a tensor of ``dtype`` f32, f16 or bf16 -> f32, exactly."""
    if dtype == "bf16":  # the upper half of an f32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def read_norm(checkpoint: Checkpoint, name: str, spec: NormSpec) -> NDArray[np.float32]:
    """A norm [width] as a blob holds it: ``(w + offset) * scale``, rounded to f32 once, or the exact w.

    ``name`` is the tensor's: ``"model.norm.weight"``. Raises ``CheckpointError`` if it is missing or misshapen.
    """
    expect_shape(require_float(checkpoint, name, 1), (spec.width,), f"the norm {spec.name}")
    weight = read_float(checkpoint, name)
    if (spec.offset, spec.scale) == (0.0, 1.0):
        return weight
    return ((weight.astype(np.float64) + spec.offset) * spec.scale).astype(np.float32)


def read_bias(checkpoint: Checkpoint, name: str, N: int) -> NDArray[np.float16] | NDArray[np.float32] | None:
    """``name`` [N], the bias of a quantized matrix; None: there is none. f16 as the file has it; other types become
    f32, which holds them exactly."""
    if name not in checkpoint.tensors:
        return None
    info = require_float(checkpoint, name, 1)
    expect_shape(info, (N,), f"{N} outputs")
    return checkpoint.read(name) if info.dtype == "f16" else read_float(checkpoint, name)
