"""Quantizes a dense model folder, or one of FP8, to a GPTQ folder, layer by layer; resumes an interrupted run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from exl.batch import I32
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.config_reader import read_json
from exl.checkpoint.generation_config import GenerationDefaults
from exl.checkpoint.writer import write_safetensors
from exl.errors import CheckpointError, ConfigError, ExlError
from exl.families.config import ModelConfig
from exl.models.manifest import read_manifest
from exl.ops.base import LayerWeights
from exl.quantize.calibration import read_calibration
from exl.quantize.compute import Compute, open_compute
from exl.quantize.effort import Effort, write_work
from exl.quantize.experts import ExpertRows, Mixture, RoutedStream, expert_rows
from exl.quantize.layer_pass import LayerPass
from exl.quantize.listen import Listener, Write, scratch_width
from exl.quantize.options import QuantizeOptions
from exl.quantize.output import entry_bytes, output_entries, write_checkpoint
from exl.quantize.overrides import Assignment
from exl.quantize.plan import Entry, QuantizePlan, make_plan, module_names
from exl.quantize.sensitivity import Probe, Texts, check_target, choose_bits, measure_pass
from exl.quantize.solve import Solver
from exl.quantize.source import expect_no_fp8, source_quant
from exl.quantize.work import (
    WorkFolder,
    as_bytes,
    keep_scratch,
    write_atomically,
    write_scratch,
    write_text,
)
from exl.text.tokenizer import Tokenizer
from exl.threads import Threads, thread_limit, using
from exl.units import format_apart

Progress = Callable[[int, int, str], None]  # work done and in all (``effort.py``), what is being done

_DEFAULT_SEQ_LEN = 2048
ALGORITHM = 4  # version: raised by each change after which the same request would write other bytes


@dataclass(frozen=True)
class QuantizeResult:
    folder: Path
    num_bytes: int  # of weights
    num_calibration_tokens: int
    num_resumed_layers: int  # layers that an earlier run had finished
    average_bits: float  # of the codes, over all quantized weights
    experts: tuple[ExpertRows, ...] = ()  # of each mixture whose experts GPTQ has rounded


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    options: QuantizeOptions,
    progress: Progress | None = None,
    threads: int | None = None,
) -> QuantizeResult:
    """Quantizes the linears of the dense (or FP8) model in ``src`` into the new folder ``dst``.

    Embedding, norms and head stay as they are. If groups do not divide the intermediate size, it is padded with
    zeros, which changes no result. To resume an interrupted run, make the same call again: finished layers are in
    ``dst/.partial``, and a resumed run writes the same bytes as an uninterrupted one.

    ``threads``: at most so many compute, by default all that the process may use; a run that is resumed with another
    number, or where exl's own kernels run and did not before, may differ in its last bits.

    Peak memory: two layers in f32 without their experts, of which one is in memory at a time, three f64 matrices of the
    size of the widest linear's Hessian, about five copies of the largest linear in f32, and the activations of 2048
    tokens. The hidden states of the calibration text are kept on disk. Choosing widths (``target_bits``) needs another
    copy of the largest linear, a few copies of the activations of 1024 tokens and their logits, and on disk their
    hidden states once for each linear.

    ``progress`` is first called before any work, with what an interrupted run has done. Raises ``ExlError``.
    """
    src, dst = Path(src), Path(dst)
    limit = thread_limit(threads)
    try:
        with ExitStack() as stack:
            stack.enter_context(using(limit))
            checkpoint = stack.enter_context(Checkpoint.open(src))
            compute = stack.enter_context(open_compute(Threads(limit)))
            return _Run(checkpoint, dst, options, progress, compute).run()
    except OSError as error:
        raise CheckpointError(f"{error.filename or dst}: {error.strerror or error}") from error


def _write_work(entry: Entry) -> int:
    return write_work(entry_bytes(entry))


class _Run:
    def __init__(
        self,
        checkpoint: Checkpoint,
        dst: Path,
        options: QuantizeOptions,
        progress: Progress | None,
        compute: Compute,
    ) -> None:
        self.checkpoint, self.dst, self.options, self.compute = checkpoint, dst, options, compute
        folder = checkpoint.folder
        self.config_json = read_json(folder / "config.json")
        self.config = ModelConfig.from_dict(self.config_json, str(folder / "config.json"))
        self.manifest = read_manifest(checkpoint, self.config, source_quant(checkpoint, self.config_json))
        self.asked = Assignment.make(
            module_names(self.manifest, self.config), options.settings, options.parsed_overrides
        )
        self.plan: QuantizePlan = make_plan(self.manifest, self.config, self.asked, options.bit_choices or ())
        if options.target_bits is not None:
            check_target(self.plan, options)
        self.sequences = self._read_sequences() if options.method == "gptq" else []
        self.streams = () if not self.sequences else ("hidden", "dense") if options.match_dense else ("hidden",)
        self.layers = LayerPass(checkpoint, self.config, self.manifest, self.sequences, compute)
        self.solver = Solver(checkpoint, options, compute)
        self._progress, self._done = progress, 0
        self._measuring = 0  # work of choosing widths
        self._follow(self.plan)
        expect_no_fp8(entry for entry, layer_idx in self._tensors if layer_idx is None)

    def _follow(self, plan: QuantizePlan) -> None:
        """Takes a plan, and knows then what each step of it will be."""
        self.plan, self._tensors = plan, output_entries(self.checkpoint, plan)
        num_layers, compiled = self.config.num_layers, self.compute.compiled
        self.efforts = [
            Effort(
                *(self.config.layers[i], self.options, plan.layers[i], compiled),
                is_last=i + 1 == num_layers,
                experts=plan.experts[i],
            )
            for i in range(num_layers)
        ]
        layers = [effort.whole(self.layers.chunks) for effort in self.efforts]
        self._done_before = [0, *accumulate(layers)]  # the work before each layer, and after the last
        self._total = self._measuring + self._done_before[-1] + sum(map(_write_work, self._entries()))

    def run(self) -> QuantizeResult:
        work = WorkFolder.open(self.dst, self._request(), self.streams)
        num_layers = self.config.num_layers
        probe = None if self.options.target_bits is None else self._probe(work)
        chosen = self._chosen_before(work)
        if probe is not None:
            self._measuring = probe.total_work()
            self._follow(self.plan if chosen is None else self._plan_with(chosen))
        finished = work.num_finished(num_layers)
        self._check_space(work, 0 if probe is None else probe.scratch_bytes())
        before = self._done_before[finished] + (0 if chosen is None else self._measuring)
        self._step("resuming" if before else "starting", before)
        if probe is not None and chosen is None:
            self._follow(self._plan_with(self._choose(work, probe)))
        if self.sequences and finished < num_layers and not work.has_hidden(finished):
            self._write_hidden(work, 0, {stream: self.layers.embed() for stream in self.streams})
        for layer_idx in range(finished, num_layers):
            for older in range(layer_idx):
                work.drop_hidden(older)
            self._quantize_layer(work, layer_idx)
        write = lambda entry: self._step("writing", _write_work(entry))  # noqa: E731
        experts = self._expert_rows(work)
        num_bytes = write_checkpoint(self.dst, work, self.checkpoint, self.plan, self.options, self.config_json, write)
        work.remove()
        num_tokens = sum(map(len, self.sequences))
        return QuantizeResult(self.dst, num_bytes, num_tokens, finished, self.plan.average_bits, experts)

    # Widths

    def _probe(self, work: WorkFolder) -> Probe:
        texts = Texts.of(self.sequences)
        learn = LayerPass(self.checkpoint, self.config, self.manifest, texts.learn, self.compute)
        measure = measure_pass(learn, texts.measure)
        told = lambda layer_idx, what, done: self._step(f"measuring {self._at(layer_idx, what)}", done)  # noqa: E731
        return Probe(learn, measure, self.plan, self.options, self.solver, work.path / "probe", told)

    def _chosen_before(self, work: WorkFolder) -> dict[str, int] | None:
        """The bits of modules that a run has chosen before it was interrupted."""
        return dict(read_json(work.bits_path)) if work.bits_path.is_file() else None

    def _choose(self, work: WorkFolder, probe: Probe) -> dict[str, int]:
        chosen = choose_bits(self.plan, probe.run(), self.options.target_bits)
        write_text(work.bits_path, json.dumps(chosen, indent=1))
        return chosen

    def _plan_with(self, chosen: dict[str, int]) -> QuantizePlan:
        return make_plan(self.manifest, self.config, self.asked.with_bits(chosen))

    def _entries(self) -> Iterator[Entry]:
        return (entry for entry, _ in self._tensors)

    def _step(self, what: str, work: int) -> None:
        """Reports that ``work`` more is done."""
        self._done += work
        if self._progress is not None:
            self._progress(self._done, self._total, what)

    # Request

    def _read_sequences(self) -> list[I32]:
        options, folder = self.options, self.checkpoint.folder
        seq_len = options.seq_len or min(_DEFAULT_SEQ_LEN, self.config.max_position)
        if seq_len > self.config.max_position:
            raise ConfigError(f"seq_len: found {seq_len}, the model has {self.config.max_position} positions")
        bos_id = GenerationDefaults.from_folder(folder).bos_id
        tokenizer = Tokenizer.from_folder(folder, bos_id=self.config.bos_id if bos_id is None else bos_id)
        sequences = read_calibration(
            options.calibration or "", tokenizer, options.num_samples, seq_len, options.documents
        )
        largest = max(int(sequence.max()) for sequence in sequences)
        if largest >= self.config.vocab_size:
            raise ConfigError(
                f"{folder}: tokenizer.json gives token id {largest}, expected {self.config.vocab_size - 1} at most"
            )
        return sequences

    def _request(self) -> dict[str, Any]:
        """Everything that the result depends on, in JSON's types, so that it compares equal after a round trip."""
        options = asdict(self.options)
        del options["calibration"]
        options["overrides"] = list(self.options.overrides)
        options["bit_choices"] = None if self.options.bit_choices is None else list(self.options.bit_choices)
        source = hashlib.sha256()
        for name, info in self.checkpoint.tensors.items():
            source.update(f"{name} {info.file} {info.dtype} {info.shape} {info.start}\n".encode())
        for name in sorted(self.checkpoint.files):
            status = (self.checkpoint.folder / name).stat()
            source.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        source.update(json.dumps(self.config_json, sort_keys=True).encode())
        text = hashlib.sha256(b"".join(np.concatenate([[len(s)], s]).astype("<i4").tobytes() for s in self.sequences))
        return {
            "algorithm": ALGORITHM,
            **options,
            "source": source.hexdigest(),
            "calibration tokens": text.hexdigest(),
        }

    def _check_space(self, work: WorkFolder, probe_bytes: int) -> None:
        """Raises ``ExlError`` now if the disk will be full later: a run may take hours."""
        C, follow = self.config.hidden_size, "dense" in self.streams
        scratch = max(scratch_width(layer, C, follow) for layer in self.config.layers)
        width = 2 * len(self.streams) * C + scratch
        hidden = 4 * width * sum(map(len, self.sequences))
        weights = 2 * sum(map(entry_bytes, self._entries()))
        there = sum(path.stat().st_size for path in work.path.rglob("*") if path.is_file())
        needed, free = max(probe_bytes, hidden) + weights - there, shutil.disk_usage(self.dst).free
        if free < needed:
            has, needs = format_apart(free, needed)
            raise ExlError(f"{self.dst}: {has} free on this disk, quantizing needs {needs}")

    # Layers

    def _at(self, layer_idx: int, what: str) -> str:
        return f"layer {layer_idx + 1} of {self.config.num_layers}: {what}"

    def _quantize_layer(self, work: WorkFolder, layer_idx: int) -> None:
        effort = self.efforts[layer_idx]
        weights = self.layers.read_layer(layer_idx)
        dense = self.layers.read_layer(layer_idx) if "dense" in self.streams else None
        self._step(self._at(layer_idx, "read"), effort.read())
        told = lambda name, chunk: self._step(self._at(layer_idx, name), effort.chunk(name, chunk))  # noqa: E731
        listener = Listener(self.layers, work, layer_idx, weights, dense, effort.heard, told)
        is_last = layer_idx + 1 == self.config.num_layers
        if self.plan.experts[layer_idx] is not None:
            self._quantize_mixture(work, layer_idx, weights, None if is_last else dense, listener)
            return
        with ExitStack() as stack:
            write_dense = None
            if dense is not None and not is_last:
                # Renamed when the stack closes, after the layer's file: hidden states must follow a finished layer.
                write_dense = stack.enter_context(write_atomically(work.hidden_path("dense", layer_idx + 1)))
            tensors = self._solve_heard(layer_idx, weights, listener, write_dense)
            entries = self.plan.layer_entries(layer_idx)
            write_safetensors(work.layer_path(layer_idx), entries, (tensors[name] for name, _, _ in entries))
        if self.sequences and not is_last:
            self._write_hidden(work, layer_idx + 1, {"hidden": listener.outputs()})

    def _solve_heard(
        self, layer_idx: int, weights: LayerWeights, listener: Listener, write_dense: Write | None
    ) -> dict[str, np.ndarray]:
        """The tensors of the linears between which the decoder can stop. Takes the dense stream to its end."""
        effort, plan = self.efforts[layer_idx], self.plan.layers[layer_idx]
        tensors: dict[str, np.ndarray] = {}
        for name in effort.heard:
            heard = listener.hear(name, write_dense) if self.sequences else None
            (linear,) = weights[name]
            tensors |= self.solver.solve(plan[name], linear, heard)
            self._step(self._at(layer_idx, name), effort.solve(name))
        if write_dense is not None:
            listener.end_dense(write_dense)
        return tensors

    def _quantize_mixture(
        self, work: WorkFolder, layer_idx: int, weights: LayerWeights, dense: LayerWeights | None, listener: Listener
    ) -> None:
        """``dense``: None if nothing reads the dense layer's outputs."""
        is_last, effort = layer_idx + 1 == self.config.num_layers, self.efforts[layer_idx]
        num_rows = sum(map(len, self.sequences))
        paths = {kind: work.scratch_path(f"{kind}-routed") for kind in ("hidden", "dense")}
        with ExitStack() as files:
            write_dense = None if dense is None else files.enter_context(write_scratch(paths["dense"]))
            tensors = self._solve_heard(layer_idx, weights, listener, write_dense)
        streams: dict[str, RoutedStream] = {}
        with ExitStack() as stack:
            if self.sequences:
                with write_scratch(paths["hidden"]) as write:
                    for h in listener.outputs():
                        write(as_bytes(h))
                for kind, found in {"hidden": weights, **({} if dense is None else {"dense": dense})}.items():
                    stream = RoutedStream(self.layers, layer_idx, found, paths[kind])
                    streams[kind] = stack.enter_context(stream)
                    self._step(self._at(layer_idx, "router"), effort.route(num_rows))
                counts = streams["hidden"].counts.tolist()
                write_text(work.routed_path(layer_idx), json.dumps({"rows": counts}))
            plan, routed, dense_routed = self.plan.experts[layer_idx], streams.get("hidden"), streams.get("dense")
            mixture = Mixture(self.layers, self.solver, layer_idx, plan, routed, dense_routed, adds=not is_last)
            if self.config.layers[layer_idx].mlp.shared is not None:
                tensors |= mixture.solve_shared(self.plan.layers[layer_idx], weights, dense)
                self._step(self._at(layer_idx, "shared expert"), effort.shared(num_rows))
            entries = self.plan.layer_entries(layer_idx)
            write_safetensors(work.layer_path(layer_idx), entries, self._with_experts(layer_idx, tensors, mixture))
        if not is_last:
            for kind in streams:
                keep_scratch(paths[kind], work.hidden_path(kind, layer_idx + 1))

    def _with_experts(self, layer_idx: int, tensors: dict[str, np.ndarray], mixture: Mixture) -> Iterator[np.ndarray]:
        """The layer's tensors in their order; those of an expert are made when the file comes to them. Experts that
        stay dense have none, and are run all the same when the file asks whether anything is left."""
        plan, effort, num_rows = self.plan.experts[layer_idx], self.efforts[layer_idx], sum(map(len, self.sequences))
        own = {
            name
            for linear in self.plan.layers[layer_idx].values()
            for module in linear.modules
            for name, _, _ in module.entries()
        }
        yield from (tensors[name] for name, _, _ in self.plan.layer_entries(layer_idx) if name in own)
        for expert in range(plan.count):
            found = mixture.solve(expert)
            modules = [module for linear in plan.linears(expert).values() for module in linear.modules]
            self._step(self._at(layer_idx, f"expert {expert + 1} of {plan.count}"), effort.expert(num_rows))
            yield from (found[name] for module in modules for name, _, _ in module.entries())

    def _expert_rows(self, work: WorkFolder) -> tuple[ExpertRows, ...]:
        """Of all layers, those of an interrupted run too."""
        if not self.sequences:
            return ()
        return tuple(
            expert_rows(layer_idx, read_json(work.routed_path(layer_idx))["rows"], plan)
            for layer_idx, plan in enumerate(self.plan.experts)
            if plan is not None and plan.quantized
        )

    # Hidden states

    def _write_hidden(self, work: WorkFolder, layer_idx: int, streams: dict[str, Any]) -> None:
        for stream, chunks in streams.items():
            with write_atomically(work.hidden_path(stream, layer_idx)) as write:
                for h in chunks:
                    write(as_bytes(h))
