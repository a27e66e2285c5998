"""What happens to rows between linears, as stages: embedding, norms, gated products, logits."""

from __future__ import annotations

from numpy.typing import NDArray

from exl.cpu_kernels.embed import Embed
from exl.cpu_kernels.gated_mlp import ACTIVATIONS, GatedProduct
from exl.cpu_kernels.norm import NormAdd, RmsNorm
from exl.cpu_kernels.softcap import ScaleLogits
from exl.errors import UnsupportedModelError
from exl.ops.base import Branch, EmbedSpec, GatedMlp, Linear, LogitsSpec, Norm
from exl.ops.compiled_tape import Rows, Tape

_COLUMNS = 1024  # of one row, in one chunk


def embed(tape: Tape, table: Linear, ids: NDArray, out: Rows, spec: EmbedSpec) -> None:
    kernel = Embed(table.layout.spec.dtype)
    tape.add(kernel, out.num_rows, table.fields["weight"], ids, out.address, out.stride, out.width, spec.scale)


def norm(tape: Tape, x: Rows, norm: Norm, out: Rows, chosen: NDArray | None = None) -> None:
    """out = norm(x), of all rows or of those whose numbers ``chosen`` i32 [R] has."""
    kernel = RmsNorm(chosen=chosen is not None)
    rows = (x.address, x.stride, chosen, norm.weight, out.address, out.stride)
    tape.add(kernel, out.num_rows, *rows, out.width, norm.eps)


def add_normed(tape: Tape, y: Rows, branch: Branch, h: Rows, out: Rows) -> None:
    """out = h + scale * post_norm(y); ``out`` may be h where stages run once."""
    norm = branch.post_norm
    rows = (y.address, y.stride, norm.weight, h.address, h.stride, out.address, out.stride)
    tape.add(NormAdd(), out.num_rows, *rows, out.width, norm.eps, branch.scale)


def gated(tape: Tape, both: Rows, spec: GatedMlp, out: Rows) -> None:
    """out = activation(gate) * up, of rows ``[gate | up]``. Raises ``UnsupportedModelError``."""
    if spec.activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation of the gated MLP: found {spec.activation!r}, the CPU's kernels have {', '.join(ACTIVATIONS)}"
        )
    chunks = -(-out.width // _COLUMNS)
    rows = (both.address, both.stride, out.width, out.address, out.stride)
    tape.add(GatedProduct(spec.activation), out.num_rows * chunks, *rows, _COLUMNS, chunks)


def logits(tape: Tape, x: Rows, spec: LogitsSpec, out: Rows) -> None:
    """out = x as ``spec`` says; ``out`` may be x where stages run once."""
    chunks = -(-out.width // _COLUMNS)
    rows = (x.address, x.stride, out.address, out.stride, out.width)
    values = (spec.scale, 1.0 if spec.softcap is None else spec.softcap)
    tape.add(ScaleLogits(spec.softcap is not None), out.num_rows * chunks, *rows, _COLUMNS, chunks, *map(float, values))
