"""The inputs of a layer's linears on the calibration text, each as computed by the quantized linears before it.

A linear is quantized when its inputs are known, and the next one's inputs are known only then. Instead of running the
layer from its beginning for each of them, the state where the layer stopped is kept on disk, and the next span of the
layer begins there (``steps.py``). So every linear is run once, as if the whole layer had been run once.

The dense stream, which the quantized layers are to follow, goes through the layer beside it in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exl.batch import ForwardBatch
from exl.families.specs import LayerSpec, MoeShape
from exl.ops.base import LayerWeights, Linear
from exl.quantize.gptq import Hessian
from exl.quantize.layer_pass import LayerPass
from exl.quantize.steps import ATTN, HIDDEN, MLP, Step, layer_steps, needed, plan_hearings
from exl.quantize.work import WorkFolder, as_bytes, read_rows, write_scratch

Write = Callable[[Any], object]
RunChunk = Callable[[ForwardBatch, int], dict[str, torch.Tensor]]


def scratch_width(layer: LayerSpec, hidden_size: int, follow_dense: bool) -> int:
    """How many f32 per token are on disk at most while a layer is quantized, besides the hidden states before it and
    after it. What a mixture's router reads, hidden_size for each stream, is less than attention needs before."""
    attn, mlp = layer.attention.width, 0 if isinstance(layer.mlp, MoeShape) else layer.mlp.width
    width = hidden_size + (attn + mlp if layer.parallel else max(attn, mlp))
    if not follow_dense:
        return width
    # Where both branches join plainly, the dense stream stops only between attention and MLP.
    halves = not layer.parallel and all(step.joins_plainly for step in layer_steps(layer) if step.branch is not None)
    return width + (hidden_size if halves else width)


@dataclass(frozen=True)
class Heard:
    """What GPTQ needs to know of a linear's inputs; see ``gptq.Hessian``."""

    hessian: torch.Tensor  # f64 [K, K]
    drift: torch.Tensor | None  # f32 [K, N]; None: there are no dense outputs to follow


class _Stream:
    """The rows of the calibration text on their way through one layer: where they are, and their state on disk."""

    def __init__(
        self,
        layers: LayerPass,
        work: WorkFolder,
        layer_idx: int,
        kind: str,
        weights: LayerWeights,
        steps: tuple[Step, ...],
    ) -> None:
        """``kind``: of the hidden states, "hidden" or "dense"."""
        self._layers, self._work, self._layer_idx, self._kind = layers, work, layer_idx, kind
        self._weights, self._steps = weights, steps
        self._files: dict[str, Path] = {HIDDEN: work.hidden_path(kind, layer_idx)}
        self._at = 0  # the first step that has not run

    @property
    def has_ended(self) -> bool:
        return self._at == len(self._steps)

    @contextmanager
    def going(self, to: int, write_end: Write | None = None) -> Iterator[RunChunk]:
        """Up to the step ``to``; len(steps) is the end, where ``write_end`` takes the hidden states. Inside, the
        function that it gives has to be called for every chunk, in order, with its first row's number. It returns the
        state there, and "x", as :meth:`LayerPass.run` does."""
        passed, rest = self._steps[self._at : to], self._steps[to:]
        stop = rest[0].name if rest else None
        reads = needed(passed) | ({rest[0].reads} if rest else set()) | {HIDDEN}
        loaded = {part: path for part, path in self._files.items() if part in reads}
        changed = {step.writes for step in passed} & needed(rest)
        new = {part: self._work.scratch_path(f"{self._kind}-{part}-{to}") for part in changed}
        start = passed[0].name if passed else stop
        with ExitStack() as files:
            writes = {part: files.enter_context(write_scratch(path)) for part, path in new.items()}
            if not rest and write_end is not None:
                writes[HIDDEN] = write_end

            def run(chunk: ForwardBatch, first: int) -> dict[str, torch.Tensor]:
                stop_row = first + chunk.num_rows
                state = {part: read_rows(path, first, stop_row, self._width(part)) for part, path in loaded.items()}
                found = self._layers.run(self._layer_idx, self._weights, chunk, state, start=start, stop=stop)
                for part, write in writes.items():
                    write(as_bytes(found[part]))
                return found

            yield run
        self._at = to
        self._keep({part: path for part, path in (self._files | new).items() if part in needed(rest)})

    def _keep(self, files: dict[str, Path]) -> None:
        for part, path in self._files.items():
            if files.get(part) != path and path != self._work.hidden_path(self._kind, self._layer_idx):
                path.unlink()
        self._files = files

    def _width(self, part: str) -> int:
        config = self._layers.config
        layer = config.layers[self._layer_idx]
        # The MLP's is never asked for in a mixture, which has no step that writes it.
        return {HIDDEN: config.hidden_size, ATTN: layer.attention.width, MLP: layer.mlp.width}[part]


class Listener:
    """The calibration text in one layer. ``hear`` is called for each linear in ``names`` in the order of the layer's
    steps, each time after the linear before has been replaced by the quantized one in ``weights``; then ``end_dense``
    and ``outputs``.

    ``dense``: the dense layer, if the quantized one is to follow it. ``told`` is called after each chunk, with what was
    done.
    """

    def __init__(
        self,
        layers: LayerPass,
        work: WorkFolder,
        layer_idx: int,
        weights: LayerWeights,
        dense: LayerWeights | None,
        names: Collection[str],
        told: Callable[[str, ForwardBatch], None],
    ) -> None:
        self._layers, self._weights, self._told = layers, weights, told
        self._steps = layer_steps(layers.config.layers[layer_idx])
        self._hearings = {x.step.name: x for x in plan_hearings(self._steps, names, dense is not None)}
        self._quantized = _Stream(layers, work, layer_idx, "hidden", weights, self._steps)
        self._dense = None if dense is None else _Stream(layers, work, layer_idx, "dense", dense, self._steps)

    def hear(self, name: str, write_dense: Write | None = None) -> Heard:
        """``write_dense`` takes the dense layer's outputs, chunk by chunk, if the dense stream comes to its end."""
        hearing = self._hearings[name]
        (linear,) = self._weights[name]
        follows_stream = hearing.step.joins_plainly
        K = linear.layout.spec.K
        width = 0 if self._dense is None else linear.N if follows_stream else K
        compute = self._layers.compute
        hessian = Hessian(K, width, compute.products)
        with ExitStack() as stack:
            run_dense = None
            if self._dense is not None:
                run_dense = stack.enter_context(self._dense.going(hearing.dense.stop, write_dense))
            run = stack.enter_context(self._quantized.going(hearing.quantized.stop))
            for chunk, first in self._chunks():
                with compute.mixed(f"hear {name}", chunk.num_rows):
                    wanted = None if run_dense is None else run_dense(chunk, first)
                    if wanted is not None and not follows_stream:
                        wanted["x"] = wanted["x"].clone()  # the next run overwrites it
                    found = run(chunk, first)
                    hessian.add(*self._rows(hearing.step, linear, wanted, found))
                self._told(name, chunk)
        H, product = hessian.finish(), hessian.finish_product()
        if product is None:
            return Heard(H, None)
        weight = linear.fields["weight"].T
        if not follows_stream:  # from what the inputs lack to what the outputs lack
            return Heard(H, product.float() @ weight)
        # x (d - x W)^T, summed; in f64, because the two parts are much larger than their difference.
        return Heard(H, product.sub_(H @ weight.double()).float())

    def _rows(
        self, step: Step, linear: Linear, wanted: Mapping[str, torch.Tensor] | None, found: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The linear's inputs and what they lack to be the dense stream's; where it joins the residual stream plainly,
        what the products x W lack for the residual stream to be the dense stream's. Overwrites both states.

        There a row is divided by what the norm behind will divide it by: what is lacking counts as the next linears see
        it. Without that, the few rows of massive activations (Sun et al. 2024, arXiv 2402.17762), a hundred times as
        large as others, decide alone what all later linears make up for.
        """
        if wanted is None:
            return found["x"], None
        if not step.joins_plainly:
            return found["x"], wanted["x"].sub_(found["x"])
        dense, norm = wanted[HIDDEN], self._layers.config.norm
        around_mean = norm.kind == "layer"
        squares = dense.var(1, correction=0, keepdim=True) if around_mean else dense.square().mean(1, keepdim=True)
        weight = squares.add_(norm.eps).rsqrt_()
        lack = dense.sub_(found[HIDDEN]).div_(step.branch.scale)
        if "bias" in linear.fields:
            lack = lack.sub_(linear.fields["bias"])
        return found["x"].mul_(weight), lack.mul_(weight)

    def end_dense(self, write: Write) -> None:
        """Takes the dense stream to the layer's end, if it is not there yet."""
        if self._dense is None or self._dense.has_ended:
            return
        with self._dense.going(len(self._steps), write) as run:
            for chunk, first in self._chunks():
                run(chunk, first)
                self._told("dense outputs", chunk)

    def outputs(self) -> Iterator[torch.Tensor]:
        """The quantized layer's outputs [T, C], chunk by chunk; those of attention if a mixture of experts follows."""
        with self._quantized.going(len(self._steps)) as run:
            for chunk, first in self._chunks():
                found = run(chunk, first)
                self._told("outputs", chunk)
                yield found[HIDDEN]

    def _chunks(self) -> Iterator[tuple[ForwardBatch, int]]:
        """Each with its first row's number."""
        first = 0
        for chunk in self._layers.chunks:
            yield chunk, first
            first += chunk.num_rows
