"""One linear: its weights and what was heard of its inputs -> packed tensors of its modules, and rounded weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.errors import CheckpointError, ExlError
from exl.formats.tensors import read_float
from exl.ops.base import Linear
from exl.quantize.compute import Compute
from exl.quantize.gptq import Factor, QuantizedWeight, factorize, round_to_nearest, solve
from exl.quantize.grid import Grid
from exl.quantize.listen import Heard
from exl.quantize.options import QuantizeOptions
from exl.quantize.pack import gptq_tensors
from exl.quantize.plan import LinearPlan, ModulePlan


@dataclass(frozen=True)
class Prepared:
    """What was heard of a linear, ready for any of its modules at any width."""

    factor: Factor
    drift: torch.Tensor | None  # f32 [out_K, N of the linear]


@dataclass(frozen=True)
class Solver:
    checkpoint: Checkpoint
    options: QuantizeOptions
    compute: Compute

    def solve(self, plan: LinearPlan, linear: Linear, heard: Heard | None) -> dict[str, NDArray]:
        """The tensors of the linear's modules, by name. Replaces the dense weights in ``linear`` by the rounded ones.
        ``heard``: None rounds to nearest. Overwrites the Hessian."""
        weight = linear.fields["weight"]  # [N, K]
        prepared = None if heard is None else self.prepare(plan, heard)
        tensors: dict[str, NDArray] = {}
        for modules in plan.solves():
            columns = plan.columns(modules)
            result = self.round(plan, modules, weight, prepared)
            weight[columns] = result.dequantize()[: plan.K].T
            for module in modules:
                bias = self._read_bias(module)
                places = module.places(columns)
                tensors |= gptq_tensors(module, result, places, bias, self.options.checkpoint_format)
        return tensors

    def prepare(self, plan: LinearPlan, heard: Heard) -> Prepared:
        """Overwrites the Hessian."""
        H, drift, options = heard.hessian, heard.drift, self.options
        num_padding = plan.modules[0].out_K - plan.K
        if num_padding:  # inputs that are always 0
            H = F.pad(H, (0, num_padding, 0, num_padding))
            drift = None if drift is None else F.pad(drift, (0, 0, 0, num_padding))
        try:
            factor = factorize(H, act_order=options.act_order, damp=options.damp, dtype=torch.float32)
        except ExlError as error:
            raise ExlError(f"{plan.modules[0].name}: {error}") from None
        return Prepared(factor, drift)

    def round(
        self, plan: LinearPlan, modules: Sequence[ModulePlan], weight: torch.Tensor, prepared: Prepared | None
    ) -> QuantizedWeight:
        """Modules of equal settings, at once: their columns of ``weight`` [N, K], of the whole linear."""
        module, columns, options = modules[0], plan.columns(modules), self.options
        chosen = weight if len(columns) == plan.N else weight[columns]
        if not bool(torch.isfinite(chosen).all()):
            raise CheckpointError(f"{module.name}: found weights that are not finite")
        padded = torch.zeros(module.out_K, len(columns))
        padded[: plan.K] = chosen.T
        settings = module.settings
        grid = Grid(settings.bits, settings.sym, min_zero=1 if options.checkpoint_format == "gptq" else 0)
        if prepared is None:
            return round_to_nearest(padded, grid, module.group_size)
        drift = prepared.drift
        if drift is not None and len(columns) < plan.N:
            drift = drift[:, columns]
        return solve(
            padded,
            prepared.factor,
            grid,
            module.group_size,
            static_groups=options.static_groups,
            drift=drift,
            rounding=self.compute.rounding,
        )

    def _read_bias(self, module: ModulePlan) -> NDArray[np.float16] | None:
        if not module.has_bias:
            return None
        bias = read_float(self.checkpoint, f"{module.name}.bias")
        with np.errstate(over="ignore"):
            rounded = bias.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise CheckpointError(
                f"{module.name}.bias: found values up to {float(np.abs(bias).max())!r}, f16 ends at 65504"
            )
        return rounded
