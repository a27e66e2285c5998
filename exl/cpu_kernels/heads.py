"""One head's channels as vectors: what appending and attention both do with them."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from exl.cpu_kernels.ir import F32, LANES, Kernel, vec


def num_vectors(head_dim: int) -> int:
    """Vectors that hold a head; the last one may have fewer channels."""
    return -(-head_dim // LANES)


def load_exact(k: Kernel, element: ir.Type, count: int, pointer: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
    """``count`` (1 to 16) elements, and no byte beyond them; the other lanes of the 16 are zero."""
    value = k.load(vec(element, count), pointer, offset)
    if count == LANES:
        return value
    return k.shuffle(value, ir.Constant(value.type, None), [min(i, count) for i in range(LANES)])


def store_exact(k: Kernel, value: ir.Value, count: int, pointer: ir.Value, offset: ir.Value | int = 0) -> None:
    """The first ``count`` (1 to 16) lanes of the 16, and no byte beyond them."""
    k.store(value if count == LANES else k.shuffle(value, value, list(range(count))), pointer, offset)


def runs(size: int) -> list[tuple[int, int]]:
    """(first element, number of elements) of each vector of ``size`` elements."""
    return [(first, min(LANES, size - first)) for first in range(0, size, LANES)]


def load_head(k: Kernel, head_dim: int, pointer: ir.Value) -> list[ir.Value]:
    """f32 [head_dim] as vectors; lanes beyond it are zero."""
    return [load_exact(k, F32, count, pointer, 4 * first) for first, count in runs(head_dim)]


def store_head(k: Kernel, vectors: Sequence[ir.Value], head_dim: int, pointer: ir.Value) -> None:
    """The inverse of ``load_head``."""
    for vector, (first, count) in zip(vectors, runs(head_dim), strict=True):
        store_exact(k, vector, count, pointer, 4 * first)


def hadamard(k: Kernel, vectors: Sequence[ir.Value], head_dim: int) -> list[ir.Value]:
    """Every run of R channels, the largest power of two that divides ``head_dim``, times the orthonormal
    Walsh-Hadamard matrix: sums and differences in the order of ``exl.ops.torch_kv.hadamard``, so the same bits."""
    size, vectors = head_dim & -head_dim, list(vectors)
    half = 1
    while half < min(size, LANES):
        signs = k.constant([-1.0 if lane & half else 1.0 for lane in range(LANES)])
        picks = [lane ^ half for lane in range(LANES)]
        vectors = [k.fma(v, signs, k.shuffle(v, v, picks)) for v in vectors]
        half *= 2
    while half < size:
        step = half // LANES
        for low in (i for i in range(len(vectors)) if not i & step):
            a, b = vectors[low], vectors[low + step]
            vectors[low], vectors[low + step] = k.b.fadd(a, b), k.b.fsub(a, b)
        half *= 2
    if size > 1:
        factor = k.splat(size**-0.5)
        vectors = [k.b.fmul(v, factor) for v in vectors]
    return vectors
