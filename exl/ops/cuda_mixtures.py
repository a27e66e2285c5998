"""Mixtures of experts on a GPU: there are no kernels for them yet. ``exl/models/support.py`` says so before a byte is
spent; who calls the operations all the same is told."""

from __future__ import annotations

import torch

from exl.errors import UnsupportedModelError
from exl.ops.base import ExpertSet, GatedMlp, Linear, Norm, RouteSpec, Segments

_NO_MIXTURES = "mixtures of experts: found one, a GPU's kernels have none: expected device='cpu'"


class WithoutMixtures:
    """The operations of ``exl.ops.base.Ops`` for mixtures, each of which raises ``UnsupportedModelError``."""

    def route(
        self,
        h: torch.Tensor,
        norm: Norm,
        router: Linear,
        bias: torch.Tensor | None,
        spec: RouteSpec,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        raise UnsupportedModelError(_NO_MIXTURES)

    def experts_add(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: ExpertSet,
        spec: GatedMlp,
        h: torch.Tensor,
    ) -> None:
        raise UnsupportedModelError(_NO_MIXTURES)

    def shared_add(
        self, x: torch.Tensor, gate_up: Segments, down: Segments, gate: Linear | None, spec: GatedMlp, h: torch.Tensor
    ) -> None:
        raise UnsupportedModelError(_NO_MIXTURES)
