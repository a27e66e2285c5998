"""What is between the linears of MLPs and experts, and how experts are chosen, through torch: element by element and
row by row, so that a row's bits depend on no other row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from exl.errors import UnsupportedModelError
from exl.ops.base import GatedMlp, RouteSpec

_CLAMPED = "swiglu_oai"


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e^-x), by plain arithmetic: ``silu`` says why."""
    return torch.neg(x).exp_().add_(1.0).reciprocal_()


def silu(x: torch.Tensor) -> torch.Tensor:
    """``F.silu`` has other bits where a thread's share of the elements ends: its last few are computed by other code
    than whole vectors. exp and plain arithmetic are not, so that a row's bits depend on no other row."""
    denominator = torch.neg(x).exp_().add_(1.0)
    return torch.div(x, denominator, out=denominator)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """In place of ``F.gelu``, for the same reason."""
    y = torch.mul(x, x).mul_(0.044715).add_(1.0).mul_(x).mul_(math.sqrt(2 / math.pi))
    return y.tanh_().add_(1.0).mul_(x).mul_(0.5)


_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": silu, "gelu_tanh": gelu_tanh}


def gated_product(gate: torch.Tensor, up: torch.Tensor, spec: GatedMlp, out: torch.Tensor) -> None:
    """out = what ``spec`` says. Gate and up may be overwritten, so that at most one more of their size is taken. Raises
    ``UnsupportedModelError`` for an activation that there is no code for."""
    if spec.activation == _CLAMPED:
        if spec.limit is not None:
            gate.clamp_(max=spec.limit)
            up.clamp_(-spec.limit, spec.limit)
        factor = torch.mul(gate, -1.702).exp_().add_(1.0).reciprocal_()
        torch.mul(factor.mul_(gate), up.add_(1.0), out=out)
        return
    activation = _ACTIVATIONS.get(spec.activation)
    if activation is None:
        known = " or ".join((*_ACTIVATIONS, _CLAMPED))
        raise UnsupportedModelError(f"activation of the gated MLP: found {spec.activation!r}, expected {known}")
    torch.mul(activation(gate), up, out=out)


def choose_experts(
    logits: torch.Tensor, bias: torch.Tensor | None, spec: RouteSpec, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Logits f32 [T, E] -> ``ids`` i32 [T, k], rising, and ``weights`` f32 [T, k]. Raises ``UnsupportedModelError`` for
    scores that there is no code for."""
    if spec.score == "softmax":
        scores = torch.softmax(logits, dim=-1)
    elif spec.score == "sigmoid":
        scores = sigmoid(logits)
    elif spec.score == "chosen":
        scores = logits
    else:
        raise UnsupportedModelError(f"router: found {spec.score!r}, expected softmax, sigmoid or chosen")
    choice = scores if bias is None else scores + bias
    if spec.groups > 1:
        choice = _in_best_groups(choice, spec)
    chosen = _largest(choice, spec.per_token)
    ids.copy_(chosen)
    found = scores.gather(1, chosen)
    if spec.score == "chosen":
        found = torch.softmax(found, dim=-1)
    elif spec.normalize:
        found = found / (found.sum(dim=-1, keepdim=True) + spec.eps)
    weights.copy_(found).mul_(spec.scaling)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The numbers of the largest of each row, rising; of equal ones the first."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count].sort(dim=-1).values


def _in_best_groups(choice: torch.Tensor, spec: RouteSpec) -> torch.Tensor:
    groups = choice.view(len(choice), spec.groups, -1)
    best = _largest(groups.topk(2, dim=-1).values.sum(dim=-1), spec.top_groups)
    kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
    return groups.masked_fill(~kept[:, :, None], -torch.inf).view_as(choice)
