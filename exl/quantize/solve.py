"""One linear: its weights and what was heard of its inputs -> packed tensors of its modules, and rounded weights."""

from __future__ import annotations

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
from exl.quantize.gptq import QuantizedWeight, gptq, round_to_nearest
from exl.quantize.grid import Grid
from exl.quantize.listen import Heard
from exl.quantize.options import QuantizeOptions
from exl.quantize.pack import gptq_tensors
from exl.quantize.plan import LinearPlan, ModulePlan


@dataclass(frozen=True)
class Solver:
    checkpoint: Checkpoint
    options: QuantizeOptions
    compute: Compute

    def solve(self, plan: LinearPlan, linear: Linear, heard: Heard | None) -> dict[str, NDArray]:
        """The tensors of the linear's modules, by name. Replaces the dense weights in ``linear`` by the rounded ones.
        ``heard``: None rounds to nearest."""
        weight = linear.fields["weight"]  # [N, K]
        tensors: dict[str, NDArray] = {}
        solves = plan.solves()
        for i, modules in enumerate(solves):
            is_last = i + 1 == len(solves)
            columns = np.sort(np.concatenate([module.columns[module.columns >= 0] for module in modules]))
            whole = len(columns) == plan.N
            chosen = slice(None) if whole else torch.from_numpy(columns)
            mine = None if heard is None else self._heard(heard, chosen, keep=not is_last)
            result = self._quantize(modules[0], weight[chosen], mine)
            weight[chosen] = result.dequantize()[: plan.K].T
            for module in modules:
                # Columns of the linear -> columns of the result; padding stays -1.
                places = np.where(module.columns < 0, -1, np.searchsorted(columns, module.columns))
                tensors |= gptq_tensors(module, result, places, self._read_bias(module), self.options.checkpoint_format)
        return tensors

    def _heard(self, heard: Heard, chosen: slice | torch.Tensor, keep: bool) -> Heard:
        """For some columns. ``keep``: what is heard is needed again, and GPTQ overwrites the Hessian."""
        drift = heard.drift if heard.drift is None else heard.drift[:, chosen]
        return Heard(heard.hessian.clone() if keep else heard.hessian, drift)

    def _quantize(self, module: ModulePlan, weight: torch.Tensor, heard: Heard | None) -> QuantizedWeight:
        """``weight`` [N, K], with ``module``'s settings."""
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{module.name}: found weights that are not finite")
        padded = torch.zeros(module.out_K, len(weight))  # rows from K on are padding, for inputs that are always 0
        padded[: module.K] = weight.T
        try:
            return self.round(padded, module, heard)
        except ExlError as error:
            raise ExlError(f"{module.name}: {error}") from None

    def round(self, weight: torch.Tensor, module: ModulePlan, heard: Heard | None) -> QuantizedWeight:
        """``weight`` [out_K, N]."""
        settings, options = module.settings, self.options
        grid = Grid(settings.bits, settings.sym, min_zero=1 if options.checkpoint_format == "gptq" else 0)
        if heard is None:
            return round_to_nearest(weight, grid, module.group_size)
        H, drift, num_padding = heard.hessian, heard.drift, module.out_K - module.K
        if num_padding:
            H = F.pad(H, (0, num_padding, 0, num_padding))
            drift = None if drift is None else F.pad(drift, (0, 0, 0, num_padding))
        return gptq(
            weight,
            H,
            grid,
            module.group_size,
            act_order=options.act_order,
            static_groups=options.static_groups,
            damp=options.damp,
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
