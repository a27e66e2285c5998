"""How much work each step of a run is, so that progress tells the time that is left.

A step's work is an estimate of its time on a processor of round figures: matrix products by their arithmetic, passes
over elements by their number, and what Python adds per call. A faster processor is faster at all of them, so the
shares of the steps hold roughly on any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from exl.batch import ForwardBatch
from exl.families.config import ModelConfig
from exl.families.specs import LayerSpec
from exl.quantize.options import QuantizeOptions
from exl.quantize.plan import ExpertsPlan, LinearPlan, ModulePlan
from exl.quantize.steps import ATTN, Step, layer_steps, plan_hearings

# In microseconds, as measured on one core at layers of SmolLM2-135M.
_FLOP = 1e-5  # 100 GFLOP/s in f32
_FLOP_COMPILED = 6e-6  # by exl's own kernels
_FLOP_F64 = 5.5e-5  # factorizations run at a lower rate, too
_ELEMENT = 1e-3  # one pass over one f32 of activations, which come from memory
_WEIGHT = 1.75e-4  # one pass over one weight: groups and rows stay in the processor's caches
_INPUT = 80.0  # the calls that round one input of a linear
_COMPILED = 0.012  # to fit a weight's grid and to round it, by compiled kernels
_READ = 7e-3  # one weight, from the file to f32
_BYTE = 1e-3  # written to disk
_TENSOR = 500.0  # opened, read and written
_FIT_PASSES = 420  # of the grid's search over the weights: 41 spans and 3 refits of about 9 passes each
_UPDATE_PASSES = 140  # errors passed on to the rest of their block of 128 inputs
_ROUND_PASSES = 100  # round to nearest, and packing


class Effort:
    """Of one layer: work in microseconds, as whole numbers."""

    def __init__(
        self,
        layer: LayerSpec,
        options: QuantizeOptions,
        plan: Mapping[str, LinearPlan],
        compiled: bool,
        is_last: bool = False,
        experts: ExpertsPlan | None = None,
    ) -> None:
        """``compiled``: kernels multiply the rows and round the weights, not torch. ``is_last``: nothing reads the
        layer's outputs, so they are not computed."""
        self._layer, self._options, self._plan = layer, options, plan
        self._compiled, self._is_last = compiled, is_last
        self._experts = experts
        self._steps = layer_steps(layer)
        self.heard = heard_linears(self._steps, plan)
        hearings = plan_hearings(self._steps, self.heard, self._follows_dense)
        self._hearings = {hearing.step.name: hearing for hearing in hearings}
        last = hearings[-1] if hearings else None
        self._rest = {
            "outputs": range(0 if last is None else last.quantized.stop, len(self._steps)),
            "dense outputs": range(0 if last is None else last.dense.stop, len(self._steps)),
        }

    def chunk(self, name: str, chunk: ForwardBatch) -> int:
        """A chunk through the spans of the layer that end at the linear ``name``, or at its "outputs" or "dense
        outputs", and its rows' part of the Hessian."""
        if name in self._rest:
            return round(self._run(self._rest[name], chunk))
        T, hearing, plan = chunk.num_rows, self._hearings[name], self._plan[name]
        K, N = plan.K, plan.N
        flop = self._row_flop
        runs = self._run(hearing.quantized, chunk) + self._run(hearing.dense, chunk)
        hessian = flop * T * K * (K + 256) + _ELEMENT * K * K  # blocks of its lower triangle
        if not self._follows_dense:
            return round(runs + hessian)
        if not hearing.step.joins_plainly:  # what the inputs lack
            return round(runs + hessian + flop * 2 * T * K * K)
        return round(runs + hessian + flop * 2 * T * K * N + _ELEMENT * 2 * T * N)

    def through(self, chunk: ForwardBatch) -> int:
        """A chunk through the layer, heard by nobody."""
        return round(self._run(range(len(self._steps)), chunk))

    def head(self, num_rows: int, config: ModelConfig) -> int:
        """The logits of so many rows, and what is computed of them."""
        return round(num_rows * config.vocab_size * (self._row_flop * 2 * config.hidden_size + _ELEMENT * 12))

    def read(self) -> int:
        """The layer's weights, once for each stream."""
        num_weights = sum(linear.K * linear.N for linear in self._plan.values())
        return round(_READ * num_weights * (2 if self._follows_dense else 1))

    def solve(self, name: str) -> int:
        """One linear's rounding and packing."""
        return sum(self._solve(modules) for modules in self._plan[name].solves())

    def _solve(self, modules: Sequence[ModulePlan]) -> int:
        K, N = modules[0].K, sum(module.N for module in modules)
        if self._options.method == "rtn":
            return round(_WEIGHT * _ROUND_PASSES * K * N)
        factor = _FLOP_F64 * (4 / 3) * K**3
        products = _FLOP * K * K * N * (5 if self._follows_dense else 1)
        rounding = _COMPILED * K * N
        if not self._compiled:
            rounding = _INPUT * K + _WEIGHT * (_FIT_PASSES + _UPDATE_PASSES) * K * N
        return round(factor + products + rounding + _WEIGHT * _ROUND_PASSES * K * N)

    def whole(self, chunks: Sequence[ForwardBatch]) -> int:
        """All steps of the layer."""
        ends = [] if self._is_last else ["outputs", "dense outputs"] if self._follows_dense else ["outputs"]
        if self._experts is not None and self._is_last:
            ends = ["outputs"]  # of attention, which experts learn from
        work = sum(self.chunk(name, chunk) for name in [*self.heard, *ends] for chunk in chunks)
        mixture = self._mixture(sum(chunk.num_rows for chunk in chunks))
        return self.read() + work + sum(map(self.solve, self.heard)) + mixture

    # Mixtures of experts

    def route(self, num_rows: int) -> int:
        """All rows of a stream through the router."""
        router = self._plan["router"]
        return round(num_rows * (self._row_flop * 2 * router.K * router.N + _ELEMENT * 6 * router.K))

    def expert(self, num_rows: int) -> int:
        """An expert that gets its share of all rows."""
        linears = self._experts.first
        read = _READ * sum(linear.K * linear.N for linear in linears.values())
        share = num_rows * self._layer.mlp.per_token / self._experts.count
        return round(read) + self._mlp(linears["gate_up"], linears["down"], share)

    def shared(self, num_rows: int) -> int:
        """The expert that takes all rows."""
        return self._mlp(self._plan["shared_gate_up"], self._plan["shared_down"], num_rows)

    def _mlp(self, gate_up: LinearPlan, down: LinearPlan, rows: float) -> int:
        """Both Hessians, which hear nothing of the dense stream; rounding; rows through it in each stream."""
        flop, streams = self._row_flop, self._num_streams
        linears = [linear for linear in (gate_up, down) if linear.modules]
        solving = sum(self._solve(modules) for linear in linears for modules in linear.solves())
        if not streams:
            return solving
        hearing = sum(flop * rows * x.K * (x.K + 256) + _ELEMENT * x.K * x.K for x in linears)
        inner, outer = (2 * x.K * x.N * rows * flop + _ELEMENT * 4 * rows * (x.K + x.N) for x in (gate_up, down))
        return solving + round(hearing + inner * (1 + streams) + outer * streams)

    def _mixture(self, num_rows: int) -> int:
        if self._experts is None:
            return 0
        shared = 0 if self._layer.mlp.shared is None else self.shared(num_rows)
        return self._num_streams * self.route(num_rows) + shared + self._experts.count * self.expert(num_rows)

    @property
    def _num_streams(self) -> int:
        """That go through the experts: of the last layer nobody needs the dense outputs."""
        if self._options.method == "rtn":
            return 0
        return 2 if self._follows_dense and not self._is_last else 1

    @property
    def _row_flop(self) -> float:
        """Of products with rows of the calibration text."""
        return _FLOP_COMPILED if self._compiled else _FLOP

    @property
    def _follows_dense(self) -> bool:
        return self._options.method == "gptq" and self._options.match_dense

    def _run(self, steps: range, chunk: ForwardBatch) -> float:
        return sum(self._step(self._steps[i], chunk) for i in steps)

    def _step(self, step: Step, chunk: ForwardBatch) -> float:
        plan, T = self._plan[step.name], chunk.num_rows
        work = self._row_flop * 2 * T * plan.K * plan.N + _ELEMENT * 4 * T * (plan.K + plan.N)
        return work + self._attend(chunk) if step.writes == ATTN else work

    def _attend(self, chunk: ForwardBatch) -> float:
        pairs = sum(int(length) ** 2 for length in chunk.context_len)  # each token with every other of its sequence
        shape = self._layer.attention
        return self._row_flop * 4 * pairs * shape.width + _ELEMENT * 3 * pairs * shape.num_heads


def heard_linears(steps: Sequence[Step], plan: Mapping[str, LinearPlan]) -> tuple[str, ...]:
    """Those of a layer with modules that are quantized, in the order in which they are."""
    return tuple(step.name for step in steps if plan[step.name].modules)


def write_work(num_bytes: int) -> int:
    """Of a tensor of the output."""
    return round(_TENSOR + _BYTE * num_bytes)
