"""In which order a layer computes its linears, and what each reads and writes: from the layer's description.

Between two linears there is a state: the residual stream, and the inputs of "o" and "down" once they are computed. A
stream of calibration rows can stop before any linear, be kept on disk, and go on from there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from exl.families.specs import BranchShape, LayerSpec, MoeShape

HIDDEN, ATTN, MLP = "hidden", "attn", "mlp"  # parts of the state


@dataclass(frozen=True)
class Step:
    """A linear, and the operations behind it up to the next one."""

    name: str  # as in ``LayerSpec.linears``
    reads: str  # part of the state that its inputs are, or, behind a norm, are made of
    writes: str  # part of the state that the step changes
    branch: BranchShape | None = None  # how its outputs join the residual stream; None: they do not

    @property
    def joins_plainly(self) -> bool:
        """Whether what the residual stream lacks is, but for a factor, what the linear's outputs lack.

        Behind a norm of the outputs it is not: the norm takes their size away, and its weights may be close to 0, by
        which one would have to divide.
        """
        return self.branch is not None and self.branch.norm is None


@dataclass(frozen=True)
class Hearing:
    """What runs to learn the inputs of one linear, as ranges of the layer's steps: [start, stop)."""

    step: Step
    quantized: range  # through the quantized linears; ends before ``step``
    dense: range  # through the dense ones; empty if nobody follows them


def layer_steps(layer: LayerSpec) -> tuple[Step, ...]:
    """In the order of the decoder (``exl/models/decoder.py``). Of a layer with a mixture of experts those of attention:
    what is behind the router is fed by rows that it chooses (``experts.py``)."""
    qkv, o = Step("qkv", HIDDEN, ATTN), Step("o", ATTN, HIDDEN, layer.attn_branch)
    if isinstance(layer.mlp, MoeShape):
        return qkv, o
    gate_up, down = Step("gate_up", HIDDEN, MLP), Step("down", MLP, HIDDEN, layer.mlp_branch)
    return (qkv, gate_up, o, down) if layer.parallel else (qkv, o, gate_up, down)


def plan_hearings(steps: Sequence[Step], names: Collection[str], follow_dense: bool) -> tuple[Hearing, ...]:
    """One for each linear in ``names``, so that each linear is run once in each stream.

    To be compared with the dense stream, the linear's inputs are needed there, or, if it joins the residual stream
    plainly, the residual stream behind it.
    """
    hearings: list[Hearing] = []
    at = dense_at = 0
    for i, step in enumerate(steps):
        if step.name not in names:
            continue
        dense_to = i + step.joins_plainly if follow_dense else dense_at
        hearings.append(Hearing(step, range(at, i), range(dense_at, dense_to)))
        at, dense_at = i, dense_to
    return tuple(hearings)


def needed(steps: Sequence[Step]) -> set[str]:
    """Parts of the state that these steps, and what follows them in the layer, need from before them."""
    found = {HIDDEN} if steps else set()
    return found | {step.reads for step in steps}
