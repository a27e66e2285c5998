"""The mixture of experts of a layer: each expert quantized by the rows that the router sends to it.

The router is dense and never rounded. It sees the quantized stream, as it will in the file that is written: ``x`` of
all calibration tokens, from which it chooses the rows of each expert. An expert's "gate_up" learns from its rows of x,
its "down" from what its quantized gate_up makes of them, and the shared expert from all rows. What quantized experts
add, by the router's choice, is what the next layer is fed.

There is no drift (``gptq.Hessian``) behind the router, also where the layers follow the dense model: in the dense
stream the router may choose other experts for a token, so an expert's rows are not the same ones in both streams, and
there are no dense outputs for a row that the dense model sends elsewhere. The dense stream still takes the dense
experts, one after another beside the quantized ones, because attention of the next layer follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from exl.ops.base import GatedMlp, LayerWeights, Linear, Segments
from exl.ops.torch_experts import gated_product, sigmoid
from exl.quantize.gptq import Hessian
from exl.quantize.layer_pass import LayerPass
from exl.quantize.listen import Heard
from exl.quantize.plan import ExpertsPlan, LinearPlan
from exl.quantize.solve import Solver
from exl.quantize.work import RowFile, as_bytes, read_rows, write_scratch

PIECE_ROWS = 2048  # of an expert, at a time: what bounds the activations that are alive at once
_LEAST_ROWS = 64

Inputs = Callable[[torch.Tensor], torch.Tensor]


def needed_rows(K: int) -> int:
    """So many rows make a Hessian of K inputs by themselves. With fewer of them than an eighth of the inputs, nearly
    all directions would be ones that no row has."""
    return max(_LEAST_ROWS, K // 8)


@dataclass(frozen=True)
class ExpertRows:
    """How many rows of the calibration text each expert of a layer has seen."""

    layer_idx: int
    rows: tuple[int, ...]  # by expert
    needed: int  # below which a Hessian is made of all tokens', too

    @property
    def few(self) -> int:
        """Experts that saw fewer than ``needed``, those without any included."""
        return sum(rows < self.needed for rows in self.rows)

    @property
    def none(self) -> int:
        """Experts that saw none, and were rounded to nearest."""
        return self.rows.count(0)

    def __str__(self) -> str:
        """Layers are counted from 1, as where progress is told."""
        without = f", {self.none} of them none" if self.none else ""
        return (
            f"{self.few} of {len(self.rows)} experts of layer {self.layer_idx + 1} saw fewer than {self.needed} rows"
            f"{without}"
        )


def expert_rows(layer_idx: int, rows: Sequence[int], plan: ExpertsPlan) -> ExpertRows:
    needed = max(needed_rows(linear.K) for linear in plan.first.values())
    return ExpertRows(layer_idx, tuple(rows), needed)


@dataclass(frozen=True)
class GatedLinears:
    """The two linears of an expert, in f32."""

    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, linears: Mapping[str, Segments], prefix: str = "") -> GatedLinears:
        (gate_up,), (down,) = linears[f"{prefix}gate_up"], linears[f"{prefix}down"]
        return cls(gate_up, down)


class RoutedStream:
    """The calibration text behind the attention of a layer, by the experts that the router chooses for its rows.

    ``hidden``: the file of the residual stream, f32 [rows, C], to which :meth:`add` adds what experts give. A context
    manager; the router's inputs lie beside that file meanwhile.
    """

    def __init__(self, layers: LayerPass, layer_idx: int, weights: LayerWeights, hidden: Path) -> None:
        self.compute, self._config = layers.compute, layers.config
        self._moe = self._config.layers[layer_idx].mlp
        self._spec = GatedMlp(self._moe.activation, self._moe.limit)
        path = hidden.with_name(f"x-{hidden.name}")
        ids, factors, shared = [], [], []
        first = 0
        with write_scratch(path) as write:
            for chunk in layers.chunks:
                h = read_rows(hidden, first, first + chunk.num_rows, self._config.hidden_size)
                found = layers.route(layer_idx, weights, chunk, h)
                write(as_bytes(found.x))
                ids.append(found.ids.numpy().copy())
                factors.append(found.weights.numpy().copy())
                shared.append(self._shared_factors(weights, found.x))
                first += chunk.num_rows
        self.num_rows = first
        self._sort(np.concatenate(ids), np.concatenate(factors))
        self._shared = np.concatenate(shared)
        self._files = ExitStack()
        self._x = self._files.enter_context(RowFile(path, self._config.hidden_size))
        self._h = self._files.enter_context(RowFile(hidden, self._config.hidden_size))
        self._path = path

    def _sort(self, ids: NDArray[np.int32], factors: NDArray[np.float32]) -> None:
        """Pairs of a row and one of its experts, by the expert, then by the row."""
        order = np.argsort(ids.reshape(-1), kind="stable")
        self._rows, self._factors = order // ids.shape[1], factors.reshape(-1)[order]
        self.counts = np.bincount(ids.reshape(-1), minlength=self._moe.count)  # rows of each expert
        self._ends = [0, *np.cumsum(self.counts).tolist()]

    def _shared_factors(self, weights: LayerWeights, x: torch.Tensor) -> NDArray[np.float32]:
        if self._moe.shared is None or not self._moe.shared.gated:
            return np.ones(len(x), np.float32)
        (gate,) = weights["shared_gate"]
        return sigmoid(x @ gate.fields["weight"][0]).numpy()

    def __enter__(self) -> RoutedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._path.unlink(missing_ok=True)

    def rows(self, expert: int | None) -> NDArray[np.int64]:
        """Of an expert, ascending; None: of the shared one, all."""
        if expert is None:
            return np.arange(self.num_rows)
        return self._rows[self._ends[expert] : self._ends[expert + 1]]

    def _factors_of(self, expert: int | None) -> NDArray[np.float32]:
        return self._shared if expert is None else self._factors[self._ends[expert] : self._ends[expert + 1]]

    def inner(self, x: torch.Tensor, gate_up: Linear) -> torch.Tensor:
        """x [n, C] -> what "down" is fed, f32 [n, F]."""
        both = self._multiply(x, gate_up)
        width = both.shape[1] // 2
        out = torch.empty(len(x), width)
        gated_product(both[:, :width], both[:, width:], self._spec, out)
        return out

    def _multiply(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        out = self.compute.products.multiply(x, linear.fields["weight"], torch.empty(len(x), linear.N))
        return out.add_(linear.fields["bias"]) if "bias" in linear.fields else out

    def hessian(self, rows: NDArray[np.int64], K: int, inputs: Inputs) -> torch.Tensor:
        """f64 [K, K], of ``inputs`` of these rows' x."""
        found = Hessian(K, 0, self.compute.products)
        for piece in _pieces(rows):
            with self.compute.mixed("hear an expert", len(piece)):
                found.add(inputs(self._x.read(piece)))
        return found.finish()

    def add(self, expert: int | None, linears: GatedLinears) -> None:
        """h += factor * expert(x) for the expert's rows."""
        rows, factors = self.rows(expert), torch.from_numpy(self._factors_of(expert))
        start = 0
        for piece in _pieces(rows):
            with self.compute.mixed("add an expert", len(piece)):
                y = self._multiply(self.inner(self._x.read(piece), linears.gate_up), linears.down)
                h = self._h.read(piece)
                h += y.mul_(factors[start : start + len(piece), None])
            self._h.write(piece, h)
            start += len(piece)


def _pieces(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (rows[start : start + PIECE_ROWS] for start in range(0, len(rows), PIECE_ROWS))


class Mixture:
    """Quantizes the experts of a layer. Peak memory: one expert in f32, the Hessian of all tokens where an expert needs
    it, and what ``Solver`` takes; besides these of each row k numbers of experts and as many weights."""

    def __init__(
        self,
        layers: LayerPass,
        solver: Solver,
        layer_idx: int,
        plan: ExpertsPlan,
        stream: RoutedStream | None,
        dense: RoutedStream | None,
        adds: bool,
    ) -> None:
        """``stream``: None rounds to nearest. ``dense``: the dense stream, which takes the dense experts. ``adds``:
        whether the next layer needs what the quantized ones give."""
        self._layers, self._solver, self._layer_idx, self._plan = layers, solver, layer_idx, plan
        self._stream, self._dense, self._adds = stream, dense, adds
        self._every: torch.Tensor | None = None

    def solve_shared(
        self, plan: Mapping[str, LinearPlan], weights: LayerWeights, dense: LayerWeights | None
    ) -> dict[str, NDArray]:
        """The tensors of the shared expert's modules, by name; replaces its weights in ``weights``."""
        prefix = "shared_"
        own = {name: plan[prefix + name] for name in ("gate_up", "down")}
        if self._dense is not None and dense is not None:
            self._dense.add(None, GatedLinears.of(dense.linears, prefix))
        return self._solve(None, own, GatedLinears.of(weights.linears, prefix))

    def solve(self, expert: int) -> dict[str, NDArray]:
        """The tensors of an expert's modules, by name."""
        linears = GatedLinears.of(self._layers.read_expert(self._layer_idx, expert))
        if self._dense is not None:
            self._dense.add(expert, linears)
        return self._solve(expert, self._plan.linears(expert), linears)

    def _solve(self, expert: int | None, plan: Mapping[str, LinearPlan], linears: GatedLinears) -> dict[str, NDArray]:
        tensors: dict[str, NDArray] = {}
        if plan["gate_up"].modules:
            heard = self._hear(expert, linears.gate_up)
            tensors |= self._solver.solve(plan["gate_up"], linears.gate_up, heard)
        if plan["down"].modules:
            stream = self._stream
            heard = self._hear(expert, linears.down, lambda x: stream.inner(x, linears.gate_up))
            tensors |= self._solver.solve(plan["down"], linears.down, heard)
        if self._stream is not None and self._adds:
            self._stream.add(expert, linears)
        return tensors

    def _hear(self, expert: int | None, linear: Linear, inputs: Inputs | None = None) -> Heard | None:
        """``inputs``: None: x itself.

        With n rows of ``needed_rows``, fewer than those, H = n / needed * H_own + (1 - n / needed) * H_all, H_all of
        all tokens. Both are means over rows: this is the Hessian of the expert's rows and as many average tokens as
        it lacks, so it goes over to its own without a step, and has the directions in which tokens lie at all.
        """
        stream, K = self._stream, linear.layout.spec.K
        if stream is None:
            return None
        rows, needed = stream.rows(expert), needed_rows(K)
        if not len(rows):
            return None
        own = stream.hessian(rows, K, inputs or _same)
        if len(rows) >= needed or expert is None:
            return Heard(own, None)
        share = len(rows) / needed
        every = self._every_token() if inputs is None else stream.hessian(stream.rows(None), K, inputs)
        return Heard(own.mul_(share).add_(every, alpha=1 - share), None)

    def _every_token(self) -> torch.Tensor:
        """The Hessian of x of all tokens: the same for all experts."""
        if self._every is None:
            stream = self._stream
            self._every = stream.hessian(stream.rows(None), self._layers.config.hidden_size, _same)
        return self._every


def _same(x: torch.Tensor) -> torch.Tensor:
    return x
