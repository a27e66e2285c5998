"""What happens to rows between linears, as stages: embedding, norms, gated products, logits."""

from __future__ import annotations

from numpy.typing import NDArray

from exl.cpu_kernels.embed import Embed
from exl.cpu_kernels.gated_mlp import ACTIVATIONS, CLAMPED, GatedProduct
from exl.cpu_kernels.norm import NormAdd, RmsNorm
from exl.cpu_kernels.softcap import ScaleLogits
from exl.errors import UnsupportedModelError
from exl.ops.base import Branch, EmbedSpec, GatedMlp, Linear, LogitsSpec, Norm
from exl.ops.compiled_tape import RecordForm, Records, Rows, Tape

_COLUMNS = 1024  # of one row, in one chunk


def embed(tape: Tape, table: Linear, ids: NDArray, out: Rows, spec: EmbedSpec) -> None:
    kernel = Embed(table.layout.spec.dtype)
    tape.add(kernel, out.num_rows, table.fields["weight"], ids, out.address, out.stride, out.width, spec.scale)


def norm(tape: Tape, x: Rows, norm: Norm, out: Rows, chosen: NDArray | None = None) -> None:
    """out = norm(x), of all rows or of those whose numbers ``chosen`` i32 [R] has."""
    kernel = RmsNorm(chosen=chosen is not None, centred=norm.kind == "layer")
    rows = (x.address, x.stride, chosen, norm.weight, out.address, out.stride)
    tape.add(kernel, out.num_rows, *rows, out.width, norm.eps)


def norm_to_records(tape: Tape, x: Rows, norm: Norm, form: RecordForm, out: Records) -> None:
    kernel = RmsNorm(form.form, keeps=False, gathered=form.source is not None, centred=norm.kind == "layer")
    rows = (x.address, x.stride, None, norm.weight, None, 0, x.width, norm.eps)
    tape.add(kernel, x.num_rows, *rows, out.address, out.num_rows, form.num_records, form.source)


def add_normed(tape: Tape, y: Rows, branch: Branch, h: Rows, out: Rows) -> None:
    """out = h + scale * post_norm(y); ``out`` may be h where stages run once."""
    norm = branch.post_norm
    rows = (y.address, y.stride, norm.weight, h.address, h.stride, out.address, out.stride)
    tape.add(NormAdd(norm.kind == "layer"), out.num_rows, *rows, out.width, norm.eps, branch.scale)


def check_activation(spec: GatedMlp) -> None:
    """Raises ``UnsupportedModelError`` for one that there is no kernel for."""
    known = (*ACTIVATIONS, CLAMPED)
    if spec.activation not in known:
        raise UnsupportedModelError(
            f"activation of the gated MLP: found {spec.activation!r}, the CPU's kernels have {', '.join(known)}"
        )


def gated(tape: Tape, both: Rows, spec: GatedMlp, out: Rows) -> None:
    """out = activation(gate) * up, of rows ``[gate | up]``."""
    chunks = -(-out.width // _COLUMNS)
    rows = (both.address, both.stride, out.width, out.address, out.stride)
    tape.add(GatedProduct(spec.activation, limit=spec.limit), out.num_rows * chunks, *rows, _COLUMNS, chunks)


def gated_to_records(tape: Tape, both: Rows, spec: GatedMlp, form: RecordForm, out: Records) -> None:
    kernel = GatedProduct(spec.activation, form.form, form.source is not None, spec.limit)
    records = max(1, _COLUMNS // form.form.rows)
    chunks = -(-form.num_records // records)
    rows = (both.address, both.stride, both.width // 2, out.address, 0, records, chunks)
    tape.add(kernel, out.num_rows * chunks, *rows, out.num_rows, form.num_records, form.source)


def logits(tape: Tape, x: Rows, spec: LogitsSpec, out: Rows) -> None:
    """out = x as ``spec`` says; ``out`` may be x where stages run once."""
    chunks = -(-out.width // _COLUMNS)
    rows = (x.address, x.stride, out.address, out.stride, out.width)
    values = (spec.scale, 1.0 if spec.softcap is None else spec.softcap)
    tape.add(ScaleLogits(spec.softcap is not None), out.num_rows * chunks, *rows, _COLUMNS, chunks, *map(float, values))
