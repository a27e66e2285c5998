"""The inputs of a layer's linears on the calibration text, each as computed by the quantized linears before it.

A layer is two halves, attention and MLP, and each is ``h += second(f(first(norm(h))))``. A linear is quantized when its
inputs are known, and the next one's inputs are known only then. Instead of running the layer from its beginning for
each of them, what a linear was fed is kept on disk, and the next span of the layer begins there. So every linear is
run once, as if the whole layer had been run once.

The dense stream, which the quantized layers are to follow, is run by halves; only its hidden states are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from exl.batch import ForwardBatch
from exl.errors import UnsupportedModelError
from exl.families.config import ModelConfig
from exl.ops.base import LayerWeights
from exl.quantize.gptq import Hessian
from exl.quantize.layer_pass import LayerPass, Passed
from exl.quantize.work import WorkFolder, as_bytes, read_rows, write_scratch

Write = Callable[[Any], object]

_SECOND = {"o": "gate_up", "down": None}  # linears that add to the hidden states -> the linear after them in the layer
# What is kept until the layer goes on from there: the inputs of "o" and "down", and the hidden states between the
# halves, of the quantized stream and of the dense one.
_INPUTS, _MIDDLE, _DENSE = "inputs", "hidden-middle", "dense-middle"
_KEPT = {"qkv": (), "o": (_INPUTS, _DENSE), "gate_up": (_MIDDLE,), "down": (_INPUTS,)}


def scratch_width(config: ModelConfig, num_streams: int) -> int:
    """How many f32 per token are on disk while a layer is quantized, besides the hidden states before and after it."""
    return num_streams * config.hidden_size + max(config.attn_width, config.intermediate_size)


@dataclass(frozen=True)
class Heard:
    """What GPTQ needs to know of a linear's inputs; see ``gptq.Hessian``."""

    hessian: torch.Tensor  # f64 [K, K]
    drift: torch.Tensor | None  # f32 [K, N]; None: there are no dense outputs to follow


@dataclass(frozen=True)
class _Target:
    """The dense stream's inputs of a linear; for "o" and "down", its hidden states behind the linear."""

    rows: torch.Tensor
    scale: float = 1.0  # by how much the hidden states change when the linear's output changes by 1


class Listener:
    """The calibration text in one layer. ``hear`` is called for "qkv", "o", "gate_up" and "down" in this order, each
    time after the linear before has been replaced by the quantized one in ``weights``; then ``outputs``.

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
        told: Callable[[str, ForwardBatch], None],
    ) -> None:
        self._layers, self._work, self._layer_idx = layers, work, layer_idx
        self._weights, self._dense, self._told = weights, dense, told

    def hear(self, name: str, write_dense: Write | None = None) -> Heard:
        """``write_dense`` takes the dense layer's outputs, chunk by chunk; only if ``name`` is "down"."""
        (linear,) = self._weights[name]
        K = linear.layout.spec.K
        width = 0 if self._dense is None else linear.N if name in _SECOND else K
        compute = self._layers.compute
        hessian = Hessian(K, width, compute.products)
        with ExitStack() as files:
            kept = [kind for kind in _KEPT[name] if kind != _DENSE or self._dense is not None]
            writes = {kind: files.enter_context(write_scratch(self._work.scratch_path(kind))) for kind in kept}
            if write_dense is not None:
                writes[_DENSE] = write_dense
            for chunk, first in self._chunks():
                with compute.mixed(f"hear {name}", chunk.num_rows):
                    target = None if self._dense is None else self._follow(name, chunk, first, writes)
                    hessian.add(*self._hear_chunk(name, chunk, first, target, writes))
                self._told(name, chunk)
        H, product = hessian.finish(), hessian.finish_product()
        if product is None:
            return Heard(H, None)
        weight = linear.fields["weight"].T
        if name not in _SECOND:  # from what the inputs lack to what the outputs lack
            return Heard(H, product.float() @ weight)
        # x (d - x W)^T, summed; in f64, because the two parts are much larger than their difference.
        return Heard(H, product.sub_(H @ weight.double()).float())

    def outputs(self) -> Iterator[torch.Tensor]:
        """The quantized layer's outputs [T, C], chunk by chunk."""
        for chunk, first in self._chunks():
            h = self._hidden("hidden", "down", chunk, first)
            self._run(self._weights, chunk, h, start="down", x=self._inputs("down", chunk, first))
            self._told("outputs", chunk)
            yield h

    def _hear_chunk(
        self, name: str, chunk: ForwardBatch, first: int, target: _Target | None, writes: Mapping[str, Write]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The quantized stream's inputs of the linear and, with a ``target``, what they lack to be the dense stream's;
        for "o" and "down" the products x W with which the hidden states would be the dense stream's."""
        if name == "gate_up":  # from within the first half
            h, inputs = self._hidden("hidden", "o", chunk, first), self._inputs("o", chunk, first)
            x = self._run(self._weights, chunk, h, start="o", x=inputs, stop=name).x
        else:
            h = self._hidden("hidden", name, chunk, first)
            x = self._run(self._weights, chunk, h, start=_half(name), stop=name).x
        for kind, rows in ((_INPUTS, x), (_MIDDLE, h)):
            if kind in writes:
                writes[kind](as_bytes(rows))
        if target is None:
            return x, None
        if name not in _SECOND:
            return x, target.rows.sub_(x)
        wanted, fields = target.rows.sub_(h).div_(target.scale), self._weights[name][0].fields
        return x, wanted.sub_(fields["bias"]) if "bias" in fields else wanted

    def _follow(self, name: str, chunk: ForwardBatch, first: int, writes: Mapping[str, Write]) -> _Target:
        h = self._hidden("dense", name, chunk, first)
        passed = self._run(self._dense, chunk, h, start=_half(name), stop=_SECOND.get(name, name))
        if name not in _SECOND:
            return _Target(passed.x.clone())  # the next call overwrites it
        if _DENSE in writes:
            writes[_DENSE](as_bytes(h))
        return _Target(h, self._scale(name, passed))

    def _scale(self, name: str, passed: Passed) -> float:
        if passed.branch.post_norm is not None:
            module = self._weights[name][0].layout.spec.parts[0].name
            raise UnsupportedModelError(
                f"{module}: found a norm of what it adds, expected none where quantized layers are to follow the dense "
                "ones: no scale takes a difference of outputs back to the linear"
            )
        return passed.branch.scale

    def _run(self, weights: LayerWeights, chunk: ForwardBatch, h: torch.Tensor, **span: Any) -> Passed:
        return self._layers.run(self._layer_idx, weights, chunk, h, **span)

    def _chunks(self) -> Iterator[tuple[ForwardBatch, int]]:
        """Each with its first row's number."""
        first = 0
        for chunk in self._layers.chunks:
            yield chunk, first
            first += chunk.num_rows

    def _hidden(self, stream: str, name: str, chunk: ForwardBatch, first: int) -> torch.Tensor:
        """A chunk's hidden states at the beginning of the half of the layer with the linear ``name``, f32 [T, C]."""
        path = self._work.hidden_path(stream, self._layer_idx)
        if _half(name) is not None:
            path = self._work.scratch_path(_MIDDLE if stream == "hidden" else _DENSE)
        return read_rows(path, first, first + chunk.num_rows, self._layers.config.hidden_size)

    def _inputs(self, name: str, chunk: ForwardBatch, first: int) -> torch.Tensor:
        K = self._weights[name][0].layout.spec.K
        return read_rows(self._work.scratch_path(_INPUTS), first, first + chunk.num_rows, K)


def _half(name: str) -> str | None:
    """The linear that the half of the layer with the linear ``name`` begins with; None: the layer's first."""
    return "gate_up" if name in ("gate_up", "down") else None
