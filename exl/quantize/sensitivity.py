"""How much the rounding of each linear changes what a model says, at each width: measured, for ``target_bits``.

A linear's error at ``bits`` is an estimate of the divergence from the dense model, in nats per token, that rounding it
alone causes:

    error(bits) = KL(dense || rounded at r) * |X (W - Q_bits)|^2 / |X (W - Q_r)|^2

The first factor is measured on the logits, with GPTQ's weights Q_r of one width r in this linear and the dense ones in
all others. The second takes it to other widths: a small change of a linear's outputs moves the distribution by its
square. X are the linear's inputs in the dense model. GPTQ learns from one part of the calibration text; KL and X are of
another, because rounding fits the text that it learns from.

All linears' streams go through the model together, layer by layer, so that each layer is read once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from exl.batch import I32
from exl.ops.base import LayerWeights, Linear
from exl.quantize.allocate import Unit, allocate
from exl.quantize.effort import Effort
from exl.quantize.layer_pass import LayerPass
from exl.quantize.listen import Heard, Listener, scratch_width
from exl.quantize.options import QuantizeOptions
from exl.quantize.plan import LinearPlan, ModulePlan, QuantizePlan, fitting_widths
from exl.quantize.solve import Prepared, Solver
from exl.quantize.steps import HIDDEN, layer_steps
from exl.quantize.work import WorkFolder, as_bytes, read_rows, write_scratch

_LEARN_TOKENS, _MEASURE_TOKENS, _MEASURE_LENGTH = 16_384, 1024, 256
_LOGIT_ROWS = 64
_DENSE = "dense"  # the stream beside those in which a linear is rounded

Key = tuple[int, str]  # the layer, and its linear's name
Errors = dict[Key, dict[int, float]]  # by width


@dataclass(frozen=True)
class Texts:
    """Parts of the calibration text that share no token."""

    learn: list[I32]  # at most 16,384 tokens, for Hessians
    measure: list[I32]  # about 1,024, at most a quarter of all

    @classmethod
    def of(cls, sequences: Sequence[I32]) -> Texts:
        """``measure`` are the beginnings of the last sequences; of few and long ones, further parts too."""
        wanted = min(_MEASURE_TOKENS, sum(map(len, sequences)) // 4)
        rest, measure = list(sequences), []
        while wanted:
            for i in range(len(rest) - 1, -1, -1):
                part, rest[i] = np.split(rest[i], [min(_MEASURE_LENGTH, len(rest[i]), wanted)])
                measure += [part] if len(part) else []
                wanted -= len(part)
        learn: list[I32] = []
        for sequence in rest:
            take = min(len(sequence), _LEARN_TOKENS - sum(map(len, learn)))
            learn += [sequence[:take]] if take > 0 else []
        return cls(learn, measure)


def free_modules(plan: QuantizePlan) -> list[dict[str, LinearPlan]]:
    """The plan with only the modules whose bits are not said."""
    free = plan.assignment.without_bits()
    return [
        {
            name: LinearPlan(linear.K, linear.N, tuple(module for module in linear.modules if module.name in free))
            for name, linear in layer.items()
        }
        for layer in plan.layers
    ]


class Probe:
    """Measures a whole model. ``told`` is called with the layer's index, what was done, and its work."""

    def __init__(
        self,
        learn: LayerPass,
        measure: LayerPass,
        plan: QuantizePlan,
        options: QuantizeOptions,
        solver: Solver,
        folder: Path,
        told: Callable[[int, str, int], None],
    ) -> None:
        """``learn`` and ``measure``: over the parts of :class:`Texts`, ``measure`` as made by :func:`measure_pass`.
        ``folder``: for streams, a new one."""
        self._learn, self._measure, self._solver, self._told = learn, measure, solver, told
        self._config, self._options = learn.config, options
        self._layers, self._work = free_modules(plan), WorkFolder(folder, (HIDDEN,))
        (self._chunk,) = measure.chunks
        # What the dense stream costs; nothing is followed.
        plain = replace(options, match_dense=False)
        self._efforts = [
            Effort(spec, plain, layer, learn.compute.compiled)
            for spec, layer in zip(self._config.layers, self._layers, strict=True)
        ]
        self._keys: list[Key] = []

    def run(self) -> Errors:
        shutil.rmtree(self._work.path, ignore_errors=True)
        self._work.path.mkdir()
        self._write_hidden(0, self._learn.embed())
        (h,) = self._measure.embed()
        self._write(_DENSE, h)
        shares: Errors = {}
        for layer_idx in range(self._config.num_layers):
            shares |= self._layer(layer_idx)
        divergence = self._divergence()
        shutil.rmtree(self._work.path)
        return {key: {bits: divergence[key] * share for bits, share in found.items()} for key, found in shares.items()}

    # Work

    def total_work(self) -> int:
        before, total = 0, 0
        for layer_idx, effort in enumerate(self._efforts):
            total += effort.read() + sum(effort.chunk(name, c) for name in effort.heard for c in self._learn.chunks)
            if layer_idx + 1 < len(self._efforts):
                total += sum(effort.chunk("outputs", chunk) for chunk in self._learn.chunks)
            total += sum(self._unit_work(layer_idx, name) for name in effort.heard)
            total += self._pass_work(layer_idx, before + 1)
            before += len(effort.heard)
        return total + self._head_work(before)

    def scratch_bytes(self) -> int:
        """On disk at most."""
        C = self._config.hidden_size
        learning = 2 * C + max(scratch_width(layer, C, follow_dense=False) for layer in self._config.layers)
        num_streams = 1 + sum(len(effort.heard) for effort in self._efforts)
        num_rows = sum(chunk.num_rows for chunk in self._learn.chunks)
        return 4 * (learning * num_rows + C * num_streams * self._chunk.num_rows)

    def _unit_work(self, layer_idx: int, name: str) -> int:
        effort = self._efforts[layer_idx]
        return effort.solve(name) * len(self._options.bit_choices) + self._pass_work(layer_idx, 1)

    def _pass_work(self, layer_idx: int, num_streams: int) -> int:
        return self._efforts[layer_idx].through(self._chunk) * num_streams

    def _head_work(self, num_units: int) -> int:
        return self._efforts[0].head(self._chunk.num_rows, self._config) * (num_units + 1)

    # Layers

    def _layer(self, layer_idx: int) -> Errors:
        """The second factor of its linears' errors."""
        weights, effort = self._learn.read_layer(layer_idx), self._efforts[layer_idx]
        self._told(layer_idx, "read", effort.read())
        told = lambda name, chunk: self._told(layer_idx, name, effort.chunk(name, chunk))  # noqa: E731
        listener = Listener(self._learn, self._work, layer_idx, weights, None, effort.heard, told)
        shares: Errors = {}
        state, start = {HIDDEN: self._read(_DENSE)}, None
        for step in layer_steps(self._config.layers[layer_idx]):
            state, start = self._through(layer_idx, weights, state, start, step.name), step.name
            if step.name in effort.heard:
                heard = listener.hear(step.name)
                shares[layer_idx, step.name] = self._unit(layer_idx, step.name, weights, state, heard)
                self._told(layer_idx, step.name, self._unit_work(layer_idx, step.name))
        if layer_idx + 1 < self._config.num_layers:
            self._write_hidden(layer_idx + 1, listener.outputs())
        self._work.drop_hidden(layer_idx)
        for key in self._keys:
            name = _stream(key)
            self._write(name, self._through(layer_idx, weights, {HIDDEN: self._read(name)}, None, None)[HIDDEN])
        self._write(_DENSE, self._through(layer_idx, weights, state, start, None)[HIDDEN])
        self._told(layer_idx, "streams", self._pass_work(layer_idx, len(self._keys) + 1))
        for name in effort.heard:
            self._rename(layer_idx, name)
        return shares

    def _unit(
        self, layer_idx: int, name: str, weights: LayerWeights, state: dict[str, torch.Tensor], heard: Heard
    ) -> dict[int, float]:
        """Rounds a linear at all widths, and lets the text through the layer with that of the reference."""
        plan, (linear,) = self._layers[layer_idx][name], weights[name]
        prepared, x = self._solver.prepare(plan, heard), state["x"]
        dense = linear.fields["weight"].clone()
        errors: dict[int, float] = {}
        widths = fitting_widths(plan.modules, self._options.bit_choices)
        below = [bits for bits in widths if bits <= self._options.target_bits]
        reference = max(below, default=min(widths))
        for bits in widths:
            for modules in plan.solves():
                self._round(plan, [_with_bits(module, bits) for module in modules], linear, dense, prepared)
            errors[bits] = float((x @ (linear.fields["weight"] - dense).T).double().square().sum())
            if bits == reference:
                rounded = self._through(layer_idx, weights, state, name, None)[HIDDEN]
                self._write(f"new-{name}", rounded)
            linear.fields["weight"].copy_(dense)
        unit = errors[reference]
        return {bits: error / unit if unit else 0.0 for bits, error in errors.items()}

    def _round(
        self, plan: LinearPlan, modules: list[ModulePlan], linear: Linear, dense: torch.Tensor, prepared: Prepared
    ) -> None:
        result = self._solver.round(plan, modules, dense, prepared)
        linear.fields["weight"][plan.columns(modules)] = result.dequantize()[: plan.K].T

    def _through(
        self, layer_idx: int, weights: LayerWeights, state: dict[str, torch.Tensor], start: str | None, stop: str | None
    ) -> dict[str, torch.Tensor]:
        """The text's state at ``stop``; ``state`` is not changed."""
        copied = {part: rows.clone() for part, rows in state.items()}
        found = self._measure.run(layer_idx, weights, self._chunk, copied, start=start, stop=stop)
        return {part: rows.clone() for part, rows in found.items()}

    # Streams

    def _divergence(self) -> dict[Key, float]:
        """Mean KL(dense || rounded) of each linear."""
        measure, head = self._measure, self._measure.read_head()
        dense = self._read(_DENSE)
        logs = torch.cat([_log_softmax(logits) for logits in measure.logits(head, self._chunk, dense)])
        last = self._config.num_layers - 1
        self._told(last, "logits", self._head_work(0))
        found = {}
        for key in self._keys:
            start, total = 0, 0.0
            for logits in measure.logits(head, self._chunk, self._read(_stream(key))):
                p = logs[start : start + len(logits)]
                total += float((p.exp() * (p - _log_softmax(logits))).sum(dtype=torch.float64))
                start += len(logits)
            found[key] = max(0.0, total / self._chunk.num_rows)
            self._told(last, "logits", self._efforts[0].head(self._chunk.num_rows, self._config))
        return found

    def _rename(self, layer_idx: int, name: str) -> None:
        key = (layer_idx, name)
        self._path(f"new-{name}").replace(self._path(_stream(key)))
        self._keys.append(key)

    def _path(self, stream: str) -> Path:
        return self._work.path / f"stream-{stream}.f32"

    def _read(self, stream: str) -> torch.Tensor:
        return read_rows(self._path(stream), 0, self._chunk.num_rows, self._config.hidden_size)

    def _write(self, stream: str, h: torch.Tensor) -> None:
        with write_scratch(self._path(stream)) as write:
            write(as_bytes(h))

    def _write_hidden(self, layer_idx: int, chunks: Iterable[torch.Tensor]) -> None:
        with write_scratch(self._work.hidden_path(HIDDEN, layer_idx)) as write:
            for h in chunks:
                write(as_bytes(h))


def choose_bits(plan: QuantizePlan, errors: Errors, target: float) -> dict[str, int]:
    """The bits of all quantized modules, by name, so that they are ``target`` on average, or less if no step fits.

    Modules that share a linear get the same, so that they stay one launch; those whose bits an override says keep them,
    and count.
    """
    free = plan.assignment.without_bits()
    units, fixed = [], {}
    for layer_idx, layer in enumerate(plan.layers):
        for name, linear in layer.items():
            mine = [module for module in linear.modules if module.name in free]
            if mine:
                num_weights = sum(module.K * module.N for module in mine)
                units.append(Unit((layer_idx, name), num_weights, errors[layer_idx, name]))
    for module, _ in plan.modules():
        if module.name not in free:
            fixed[module.name] = module.bits
            units.append(Unit(module.name, module.K * module.N, {module.bits: 0.0}))
    widths = allocate(units, target)
    chosen = {
        module.name: widths[layer_idx, name]
        for layer_idx, layer in enumerate(plan.layers)
        for name, linear in layer.items()
        for module in linear.modules
        if module.name in free
    }
    return {**chosen, **fixed}


def check_target(plan: QuantizePlan, options: QuantizeOptions) -> None:
    """Raises the ``ConfigError`` of :func:`choose_bits`, which does not depend on errors."""
    errors: Errors = {
        (layer_idx, name): dict.fromkeys(fitting_widths(linear.modules, options.bit_choices), 0.0)
        for layer_idx, layer in enumerate(free_modules(plan))
        for name, linear in layer.items()
    }
    choose_bits(plan, errors, options.target_bits)


def measure_pass(learn: LayerPass, sequences: Sequence[I32]) -> LayerPass:
    """For the text on which errors are measured."""
    return LayerPass(learn.checkpoint, learn.config, learn.manifest, sequences, learn.compute, _LOGIT_ROWS)


def _stream(key: Key) -> str:
    return f"{key[0]}-{key[1]}"


def _with_bits(module: ModulePlan, bits: int) -> ModulePlan:
    return replace(module, settings=replace(module.settings, bits=bits))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, dim=-1)
