"""What a layout depends on: the hardware, and what the checkpoint says of each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Target:
    """The hardware that a layout is for: all that a layout may depend on besides shapes."""

    kind: str  # "cpu" | "cuda"
    int4pack: str | None = None  # CPU: nibble order of torch's int4pack: "split64", "split32", "pairs32"; None: absent
    compiled: bool = False  # CPU: weights lie as exl's own kernels take them, not as torch's do
    arch: int | None = None  # CUDA: compute capability, 86 for 8.6
    num_multiprocessors: int | None = None  # CUDA; None: a GPU that is not there, the largest of its architecture

    @property
    def int4pack_block(self) -> int:
        """Output rows that int4pack interleaves."""
        if self.int4pack is None:
            raise ValueError("this target has no int4pack layout")
        return int(self.int4pack[-2:])


@dataclass(frozen=True)
class Rows:
    """Some outputs of a checkpoint's module, as a matrix of their own: ``count`` of its ``total``, from ``first`` on,
    each ``step``-th.

    ``pairs``: (channels of a head, of which so many turn). In the file RoPE turns channels 2i and 2i + 1 of a head with
    each other; here, as everywhere in exl, channel i and i + half of those that turn. So those channels are
    rearranged, the even ones first: the same order in queries and keys, which changes no product of the two.
    """

    first: int
    count: int
    total: int
    pairs: tuple[int, int] | None = None
    step: int = 1

    def indices(self) -> NDArray[np.int64]:
        """The module's output that is output i of the matrix, i64 [count]."""
        rows = np.arange(self.first, self.first + self.count * self.step, self.step)
        if self.pairs is None:
            return rows
        head_dim, turning = self.pairs
        order = np.arange(head_dim)
        order[:turning] = np.concatenate((order[:turning:2], order[1:turning:2]))
        return rows.reshape(-1, head_dim)[:, order].reshape(-1)


@dataclass(frozen=True)
class Stack:
    """A file's tensor of three dimensions that has the matrices of all experts: [E, N, K], or [E, K, N] ``transposed``;
    and which of them is meant."""

    transposed: bool = False
    expert: int = 0


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
    rows: Rows | None = None  # the outputs of the module that these are; None: all, as they are
    dequantized: bool = False  # dense, but codes in the file: an embedding
    stack: Stack | None = None  # the module has one such matrix for each expert
    exact: bool = False  # never rounded: a router
    code_kind: str = "int"  # what codes stand for, as ``exl.formats.matrix.QuantizedMatrix`` says

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

    @property
    def code_kind(self) -> str:
        return self.parts[0].code_kind


def fuse(parts: Sequence[MatrixSpec], *, gated: bool = False) -> tuple[LinearSpec, ...]:
    """Neighbours that agree in K, bits, types, group and order share a launch; the others stand alone.

    Order along N is kept, so that outputs lie where an unfused run would put them. ``gated``: they are gate and up.
    """

    def key(part: MatrixSpec) -> tuple:
        return part.K, part.bits, part.dtype, part.group_size, part.scale_dtype, part.order_key, part.code_kind

    fused: list[list[MatrixSpec]] = []
    for part in parts:
        if fused and key(part) == key(fused[-1][-1]):
            fused[-1].append(part)
        else:
            fused.append([part])
    return tuple(LinearSpec(tuple(group), gated and len(fused) == 1) for group in fused)


@dataclass(frozen=True)
class NormSpec:
    """One norm of a blob, which holds ``(w + offset) * scale`` of the checkpoint's w.

    Gemma's norms multiply by 1 + w: ``offset`` is 1. ``scale`` takes a constant factor of what the norm feeds.
    """

    name: str
    width: int
    offset: float = 0.0
    scale: float = 1.0
    tensor: str = ""  # its name in the checkpoint; "": a layout without one


@dataclass(frozen=True)
class BlobSpec:
    """What one blob holds: norms, then fused groups of linears by name."""

    norms: tuple[NormSpec, ...]
    linears: tuple[tuple[str, tuple[LinearSpec, ...]], ...]


@dataclass(frozen=True)
class ExpertSpec:
    """The experts of a layer, equal in everything but their values: ``blob`` is that of the first one."""

    count: int
    blob: BlobSpec
    names: Mapping[str, str]  # of the first one's modules, with "{e}" for the number of the expert

    def part(self, part: MatrixSpec, expert: int) -> MatrixSpec:
        """A matrix of the first expert -> the same of another."""
        if part.stack is not None:
            return replace(part, stack=replace(part.stack, expert=expert))
        return replace(part, name=self.names[part.name].format(e=expert))
