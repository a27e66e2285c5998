"""Groups of inputs and their scales: what quantized formats share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.errors import CheckpointError
from exl.formats.tensors import expect_shape, read_float, require_tensor
from exl.layout.specs import MatrixSpec


def num_groups(K: int, group_size: int) -> int:
    """``group_size`` -1: one. The last group may be shorter."""
    return 1 if group_size == -1 else -(-K // group_size)


def order_key(order: NDArray[np.int32] | None) -> str | None:
    """The digest of an order that ``MatrixSpec`` has."""
    return None if order is None else hashlib.sha256(order.astype("<i4").tobytes()).hexdigest()


@dataclass(frozen=True)
class QuantizedShape:
    """What the headers of a quantized module say, and the order of its inputs."""

    K: int
    N: int
    group_size: int  # K: one group
    order: NDArray[np.int32] | None = None

    @property
    def num_groups(self) -> int:
        return num_groups(self.K, self.group_size)

    def spec(self, checkpoint: Checkpoint, name: str, bits: int, *, symmetric: bool, scales: str) -> MatrixSpec:
        """Of the module ``name``, whose scales are the tensor ``scales``."""
        return MatrixSpec(
            name=name,
            K=self.K,
            N=self.N,
            bits=bits,
            dtype="u8",
            group_size=self.group_size,
            has_bias=f"{name}.bias" in checkpoint.tensors,
            order_key=order_key(self.order),
            symmetric=symmetric,
            scale_dtype=checkpoint.info(scales).dtype,
        )


def read_order(checkpoint: Checkpoint, name: str, K: int, group_size: int, source: str) -> NDArray[np.int32] | None:
    """The permutation that sorts the inputs by group, from ``name`` i32 [K], the group of each input; None where they
    are sorted already, or where the tensor is missing.

    The tensor decides, whatever a configuration says. All zero, or in files of compressed-tensors all -1, means that
    nobody filled it in.
    """
    if name not in checkpoint.tensors:
        return None
    info = require_tensor(checkpoint, name, ("i32",), 1)
    expect_shape(info, (K,), f"{K} inputs")
    g_idx = checkpoint.read(info.name)
    count = num_groups(K, group_size)
    unset = not g_idx.any() or (g_idx == -1).all()
    if unset or np.array_equal(g_idx, np.arange(K) // group_size):
        return None
    wrong = np.flatnonzero((g_idx < 0) | (g_idx >= count))
    if len(wrong):
        raise CheckpointError(
            f"{info.file}: {info.name}: found group {g_idx[wrong[0]]} for input {wrong[0]}, expected 0 to {count - 1}"
        )
    sizes = np.bincount(g_idx, minlength=count)
    expected = np.full(count, group_size)
    expected[-1] = K - (count - 1) * group_size
    uneven = np.flatnonzero(sizes != expected)
    if len(uneven):
        rest = "each" if K % group_size == 0 else f"each and {expected[-1]} in the last"
        raise CheckpointError(
            f"{info.file}: {info.name}: found {sizes[uneven[0]]} inputs in group {uneven[0]}, expected {group_size} "
            f"in {rest}: the file is damaged, or {source} has another file's group_size"
        )
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def read_scales(checkpoint: Checkpoint, name: str) -> NDArray[np.float16] | NDArray[np.float32]:
    """Scales of any shape: f16 as the file has them; other types become f32, which holds them exactly.

    Raises ``CheckpointError`` for scales that are not finite.
    """
    info = checkpoint.info(name)
    scales = checkpoint.read(name) if info.dtype == "f16" else read_float(checkpoint, name)
    if scales.dtype == np.float16:  # by their exponents, because NumPy converts f16 one by one
        finite = (scales.view(np.uint16) & np.uint16(0x7C00)) != 0x7C00
    else:
        finite = np.isfinite(scales)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise CheckpointError(
            f"{info.file}: {name}: found {scales[place]} at {list(place)} "
            f"({np.count_nonzero(~finite)} such in all), expected finite scales"
        )
    return scales
