"""How much work each step of a run is, so that progress tells the time that is left.

A step's work is an estimate of its time on a processor of round figures: matrix products by their arithmetic, passes
over elements by their number, and what Python adds per call. A faster processor is faster at all of them, so the
shares of the steps hold roughly on any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exl.batch import ForwardBatch
from exl.families.config import ModelConfig
from exl.quantize.options import QuantizeOptions
from exl.quantize.plan import ModulePlan

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


@dataclass(frozen=True)
class Effort:
    """Work in microseconds, as whole numbers. ``layer``: the modules of one layer as in ``QuantizePlan.layers``; all
    layers have the same shapes."""

    config: ModelConfig
    options: QuantizeOptions
    layer: Mapping[str, Sequence[ModulePlan]]
    compiled: bool  # kernels multiply the rows and round the weights, not torch

    def chunk(self, name: str, chunk: ForwardBatch) -> int:
        """A chunk through the span of the layer that ends at the linear ``name``, or at its "outputs", and its rows'
        part of the Hessian."""
        T = chunk.num_rows
        run = {
            "qkv": 0.0,
            "o": self._multiply("qkv", T) + self._attend(chunk),
            "gate_up": self._multiply("o", T),
            "down": self._multiply("gate_up", T),
            "outputs": self._multiply("down", T),
        }
        if name == "outputs":
            return round(run[name])
        K, N = self._shape(name)
        flop = self._row_flop
        hessian = flop * T * K * (K + 256) + _ELEMENT * K * K  # blocks of its lower triangle
        if not self._follows_dense:
            return round(run[name] + hessian)
        if name in ("qkv", "gate_up"):  # what the inputs lack
            return round(run[name] + hessian + flop * 2 * T * K * K)
        # The outputs that are wanted, by way of the dense stream through half of the layer.
        return round(2 * run[name] + self._multiply(name, T) + hessian + flop * 2 * T * K * N + _ELEMENT * 2 * T * N)

    def read(self) -> int:
        """A layer's weights, once for each stream."""
        return round(_READ * sum(map(self._num_weights, self.layer)) * (2 if self._follows_dense else 1))

    def solve(self, name: str) -> int:
        """One linear's rounding and packing."""
        K, N = self._shape(name)
        if self.options.method == "rtn":
            return round(_WEIGHT * _ROUND_PASSES * K * N)
        factor = _FLOP_F64 * (4 / 3) * K**3
        products = _FLOP * K * K * N * (5 if self._follows_dense else 1)
        rounding = _COMPILED * K * N
        if not self.compiled:
            rounding = _INPUT * K + _WEIGHT * (_FIT_PASSES + _UPDATE_PASSES) * K * N
        return round(factor + products + rounding + _WEIGHT * _ROUND_PASSES * K * N)

    def write(self, num_bytes: int) -> int:
        """A tensor of the output."""
        return round(_TENSOR + _BYTE * num_bytes)

    def whole_layer(self, chunks: Sequence[ForwardBatch], is_last: bool) -> int:
        """All steps of one layer. Nothing reads the last layer's outputs, so they are not computed."""
        spans = [*self.layer, *([] if is_last else ["outputs"])]
        work = sum(self.chunk(name, chunk) for name in spans for chunk in chunks)
        return self.read() + work + sum(map(self.solve, self.layer))

    @property
    def _row_flop(self) -> float:
        """Of products with rows of the calibration text."""
        return _FLOP_COMPILED if self.compiled else _FLOP

    @property
    def _follows_dense(self) -> bool:
        return self.options.method == "gptq" and self.options.match_dense

    def _num_weights(self, name: str) -> int:
        K, N = self._shape(name)
        return K * N

    def _shape(self, name: str) -> tuple[int, int]:
        modules = self.layer[name]
        return modules[0].K, sum(module.N for module in modules)

    def _multiply(self, name: str, num_rows: int) -> float:
        K, N = self._shape(name)
        return self._row_flop * 2 * num_rows * K * N + _ELEMENT * 4 * num_rows * (K + N)

    def _attend(self, chunk: ForwardBatch) -> float:
        pairs = sum(int(length) ** 2 for length in chunk.context_len)  # each token with every other of its sequence
        return self._row_flop * 4 * pairs * self.config.attn_width + _ELEMENT * 3 * pairs * self.config.num_heads
