"""Mixtures of experts quantized: what experts learn from against transformers' activations, and the file it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import exl
from exl.checkpoint.checkpoint import Checkpoint
from exl.errors import ConfigError, UnsupportedModelError
from exl.families.config import ModelConfig
from exl.models.manifest import read_manifest
from exl.ops.base import Linear
from exl.quantize.compute import Compute, open_compute
from exl.quantize.experts import ExpertRows, Mixture, RoutedStream, needed_rows
from exl.quantize.layer_pass import LayerPass
from exl.quantize.listen import Heard
from exl.quantize.options import QuantizeOptions
from exl.quantize.overrides import Assignment, Settings
from exl.quantize.plan import LinearPlan, make_plan, module_names
from exl.quantize.run import quantize
from exl.quantize.work import as_bytes
from exl.threads import Threads
from tests.model.cpu_targets import EXACT, needs_kernels
from tests.model.hf_models import MIXTURES, Case, build, load_f32, prefill_logits, save
from tests.model.test_mixtures import save_dense
from tests.model.test_quantize_families import CALIBRATION, TOKENIZER
from tests.model.test_quantize_model import dequantized

TINY = {"vocab_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 64}
# Widths are whole words of codes.
SIZES = {
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 160},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "mlp_only_layers": []},
    "glm4_moe": {},
}
FAMILIES = {
    name: replace(case, options={**case.options, **TINY, **SIZES[name]})
    for name in SIZES
    for case in MIXTURES
    if case.name == name
}
EXPERT_NAMES = {"mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2")}
UNUSED = 4  # an expert that no token takes


def expert_names(family: str) -> tuple[str, str, str, str]:
    return EXPERT_NAMES.get(family, ("mlp.experts", "gate_proj", "up_proj", "down_proj"))


def source_of(case: Case, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """A random model, saved with a tokenizer. Biases are whole f16, as GPTQ files store them."""
    model = build(case, projection_scale=2.0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = parameter.data.half().float()
    save(model, folder)
    if edit is not None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    """GLM's correction of the choice: an expert that is never chosen."""
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[UNUSED] = -100.0


def options(**changes) -> QuantizeOptions:
    given = {"bits": 4, "group_size": 32, "calibration": CALIBRATION, "num_samples": 6, "seq_len": 48}
    return QuantizeOptions(**(given | changes))


def with_weights(source: Path, folder: Path, weights: dict[str, np.ndarray]) -> Path:
    """The source with other weights, for transformers."""
    tensors = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        tensors[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weight)).float()
    return save_dense(tensors, json.loads((source / "config.json").read_text()), folder)


# What is heard


@dataclass
class Recorder:
    """In the place of ``Solver``: keeps what experts learn from, and changes weights as rounding would."""

    heard: dict[str, torch.Tensor | None] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def solve(self, plan: LinearPlan, linear: Linear, heard: Heard | None) -> dict:
        stored, seed = linear.fields["weight"], len(self.heard)
        noise = np.random.default_rng(seed).normal(size=stored.shape)
        stored += 0.2 * stored.std() * torch.from_numpy(noise).float()
        assert heard is None or heard.drift is None
        for module in plan.modules:
            self.heard[module.name] = None if heard is None else heard.hessian.clone()
            self.weights[module.name] = stored[module.columns].numpy().copy()
        return {}


class Activations:
    """Of transformers' model: what feeds the mixture of a layer, and what leaves the layer; rows in order."""

    def __init__(self, folder: Path, layer_idx: int, sequences: list[np.ndarray]) -> None:
        model = load_f32(folder)
        layer = model.model.layers[layer_idx]
        rows: dict[str, list[torch.Tensor]] = {"x": [], "out": []}

        def keep(name: str, which: str, _, x, y) -> None:
            found = x[0] if which == "in" else y[0] if isinstance(y, tuple) else y
            rows[name].append(found.reshape(-1, found.shape[-1]))

        layer.mlp.register_forward_hook(partial(keep, "x", "in"))
        layer.register_forward_hook(partial(keep, "out", "out"))
        with torch.no_grad():
            for sequence in sequences:
                model(torch.from_numpy(sequence).long()[None], use_cache=False)
        self.x, self.out = torch.cat(rows["x"]).double(), torch.cat(rows["out"]).double()

    def chosen(self, family: str, tensors: dict[str, torch.Tensor], prefix: str, options: dict) -> torch.Tensor:
        """Whether a row takes an expert, bool [rows, E], by the families' definitions."""
        module = "block_sparse_moe" if family == "mixtral" else "mlp"
        logits = self.x @ tensors[f"{prefix}{module}.gate.weight"].double().T
        if family == "glm4_moe":
            scores = torch.sigmoid(logits) + tensors[f"{prefix}mlp.gate.e_score_correction_bias"].double()
            groups = scores.view(len(scores), options["n_group"], -1)
            best = groups.topk(2).values.sum(-1).topk(options["topk_group"]).indices
            kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
            logits = torch.where(kept[:, :, None], groups, -torch.inf).view_as(scores)
        chosen = logits.topk(options["num_experts_per_tok"]).indices
        return torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, chosen, True)


def hessian(x: torch.Tensor) -> torch.Tensor:
    return 2 / max(1, len(x)) * (x.T @ x)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)], ids=["torch", "kernels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_learn_from_the_rows_that_the_router_sends(family, kernels, tmp_path):
    """Hessians and the layer's outputs against transformers' activations: experts with many rows, with few, with none;
    "down" behind a gate_up that is rounded already."""
    case, layer_idx = FAMILIES[family], 1
    source = source_of(case, tmp_path / "source", without_one if family == "glm4_moe" else None)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 512, length, dtype=np.int32) for length in (40, 13, 29, 33, 37)]
    recorder, hidden, dense_hidden = Recorder(), tmp_path / "hidden", tmp_path / "dense"
    first = with_first_experts_off(source, tmp_path / "first")
    with Checkpoint.open(first) as checkpoint, open_compute(Threads(1)) as compiled:
        config = ModelConfig.from_folder(first)
        manifest = read_manifest(checkpoint, config, None)
        asked = Assignment.make(module_names(manifest, config), Settings(4, 32, False), ())
        plan = make_plan(manifest, config, asked)
        compute = compiled if kernels else Compute.with_torch(Threads(1))
        assert compute.compiled == kernels
        layers = LayerPass(checkpoint, config, manifest, sequences, compute)
        weights, dense = layers.read_layer(layer_idx), layers.read_layer(layer_idx)
        before = layers.read_layer(0)
        for path in (hidden, dense_hidden):
            with open(path, "wb") as file:
                for chunk, h in zip(layers.chunks, layers.embed(), strict=True):
                    layers.run(0, before, chunk, {"hidden": h})
                    layers.run(layer_idx, weights, chunk, {"hidden": h})
                    file.write(as_bytes(h))
        experts = plan.experts[layer_idx]
        with (
            RoutedStream(layers, layer_idx, weights, hidden) as stream,
            RoutedStream(layers, layer_idx, dense, dense_hidden) as beside,
        ):
            mixture = Mixture(layers, recorder, layer_idx, experts, stream, beside, adds=True)
            if config.layers[layer_idx].mlp.shared is not None:
                mixture.solve_shared(plan.layers[layer_idx], weights, dense)
            for expert in range(experts.count):
                mixture.solve(expert)
            counts = stream.counts
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["dense", "hidden"]

    found = Activations(first, layer_idx, sequences)
    x, prefix = found.x, f"model.layers.{layer_idx}."
    chosen = found.chosen(family, load_file(first / "model.safetensors"), prefix, case.options)
    assert counts.tolist() == chosen.sum(0).tolist()
    parent, gate, up, down = expert_names(family)
    kinds = set()
    for expert in range(experts.count):
        name = f"{prefix}{parent}.{expert}."
        rows = x[chosen[:, expert]]
        both = [torch.from_numpy(recorder.weights[name + part]).double() for part in (gate, up)]
        inner = lambda x: torch.nn.functional.silu(x @ both[0].T) * (x @ both[1].T)  # noqa: B023, E731
        for part, own, every in ((gate, rows, x), (up, rows, x), (down, inner(rows), inner(x))):
            mine, needed = recorder.heard[name + part], max(64, own.shape[1] // 8)
            kinds.add("none" if not len(rows) else "few" if len(rows) < needed else "many")
            if not len(rows):
                assert mine is None
                continue
            share = min(1.0, len(rows) / needed)
            expected = share * hessian(own) + (1 - share) * hessian(every)
            assert float((mine - expected).abs().max()) < 1e-4 * float(expected.abs().max()), (name, part)
    assert {"few"} <= kinds
    assert ("none" in kinds) == (family == "glm4_moe")
    shared = {"qwen2_moe": "mlp.shared_expert.", "glm4_moe": "mlp.shared_experts."}.get(family)
    assert (shared is not None) == any("shared" in name for name in recorder.heard)
    if shared is not None:
        mine = recorder.heard[f"{prefix}{shared}up_proj"]
        assert float((mine - hessian(x)).abs().max()) < 1e-4 * float(hessian(x).abs().max())
    rounded = Activations(with_weights(first, tmp_path / "rounded", recorder.weights), layer_idx, sequences)
    assert float((rounded.out - found.out).abs().max()) > 0.01 * float(found.out.abs().max())
    for path, true in ((hidden, rounded.out), (dense_hidden, found.out)):
        mine = torch.from_numpy(np.fromfile(path, np.float32)).view(true.shape)
        assert float((mine - true).abs().max()) < 1e-4 * float(true.abs().max())


def with_first_experts_off(source: Path, folder: Path) -> Path:
    """Layer 0's MLP, if it is a mixture, adds nothing: the layer is its attention then."""

    def is_off(name: str) -> bool:
        return name.startswith("model.layers.0.") and name.endswith(("down_proj.weight", "w2.weight"))

    tensors = load_file(source / "model.safetensors")
    tensors = {name: torch.zeros_like(tensor) if is_off(name) else tensor for name, tensor in tensors.items()}
    return save_dense(tensors, json.loads((source / "config.json").read_text()), folder)


def test_rows_that_make_a_hessian():
    assert [needed_rows(K) for K in (32, 512, 520, 2048)] == [64, 64, 65, 256]


# What is written


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, bits, tmp_path):
    """The written file in exl equals its weights in transformers' model; at 8 bits both are close to the source, as
    ``test_quantize_families.py`` has it, or closer: groups are smaller, and a mixture's errors are averaged."""
    source = source_of(FAMILIES[family], tmp_path / "source")
    steps = []
    done = quantize(source, tmp_path / "out", options(bits=bits), lambda *step: steps.append(step), threads=1)
    assert steps[-1][0] == steps[-1][1]
    assert all(before[0] <= after[0] for before, after in pairwise(steps))
    weights = dequantized(tmp_path / "out")
    tensors = load_file(source / "model.safetensors")
    projections = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight")
    assert {f"{name}.weight" for name in weights} == {name for name in tensors if name.endswith(projections)}
    ids = np.random.default_rng(1).integers(3, 512, 60).tolist()
    expected = prefill_logits(load_f32(with_weights(source, tmp_path / "twin", weights)), ids)
    with exl.load(tmp_path / "out", kv_cache="f32", **EXACT) as llm:
        found = llm.logits(ids)
    assert float((found - expected).abs().max()) <= 2e-4
    dense = prefill_logits(load_f32(source), ids)
    error = float((found - dense).square().mean().sqrt() / dense.square().mean().sqrt())
    assert error <= 2 * 0.015 if bits == 8 else error > 0.001
    mixtures = [0, 1] if family != "glm4_moe" else [1]
    assert [rows.layer_idx for rows in done.experts] == mixtures
    per_token = FAMILIES[family].options["num_experts_per_tok"]
    assert {sum(rows.rows) for rows in done.experts} == {per_token * done.num_calibration_tokens}


def header(folder: Path) -> list[str]:
    """Names of tensors, in the order of their bytes."""
    data = (folder / "model.safetensors").read_bytes()
    names = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    names.pop("__metadata__", None)
    return sorted(names, key=lambda name: names[name]["data_offsets"])


def stack(tensors: dict[str, torch.Tensor]) -> None:
    """The experts of each layer in two tensors, as transformers has them in memory."""
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        count = sum(name.startswith(prefix) and name.endswith("down_proj.weight") for name in tensors)
        gate, up, down = (
            [tensors.pop(f"{prefix}{e}.{name}_proj.weight") for e in range(count)] for name in ("gate", "up", "down")
        )
        tensors[prefix + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        tensors[prefix + "down_proj"] = torch.stack(down)


def test_names_and_bytes_are_those_of_single_experts_whatever_the_source_has(tmp_path):
    """And of a run that was interrupted in the second layer."""
    case = FAMILIES["qwen3_moe"]
    source, stacked = source_of(case, tmp_path / "source"), source_of(case, tmp_path / "stacked", stack)
    done = quantize(source, tmp_path / "out", options(), threads=1)
    other = quantize(stacked, tmp_path / "other", options(), threads=1)

    def interrupt(done: int, total: int, what: str) -> None:
        if what == "layer 2 of 2: expert 3 of 6":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "again", options(), interrupt, threads=1)
    again = quantize(source, tmp_path / "again", options(), threads=1)
    assert again.num_resumed_layers == 1
    assert done.experts == other.experts == again.experts
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "other" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "again" / "model.safetensors").read_bytes()
    names = header(tmp_path / "out")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        assert [name for name in names if name.startswith(prefix)] == [
            f"{prefix}{expert}.{module}_proj.{part}"
            for expert in range(6)
            for module in ("gate", "up", "down")
            for part in ("qweight", "qzeros", "scales", "g_idx")
        ]
    tensors, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    for name in ("mlp.gate.weight", "post_attention_layernorm.weight"):
        assert torch.equal(tensors[f"model.layers.0.{name}"], before[f"model.layers.0.{name}"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((source / "config.json").read_text())


def test_an_expert_without_rows_is_rounded_to_nearest_and_counted(tmp_path):
    source = source_of(FAMILIES["glm4_moe"], tmp_path / "source", without_one)
    (rows,) = quantize(source, tmp_path / "out", options(num_samples=5), threads=1).experts
    assert quantize(source, tmp_path / "rtn", options(method="rtn"), threads=1).experts == ()
    assert rows == ExpertRows(1, rows.rows, 64)
    assert rows.none == 1
    assert rows.rows[UNUSED] == 0
    assert str(rows) == f"{rows.few} of 12 experts of layer 2 saw fewer than 64 rows, 1 of them none"
    assert 1 < rows.few == sum(count < 64 for count in rows.rows) < 12
    mine, nearest = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "rtn"))
    for expert in (UNUSED, UNUSED + 1):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.qweight"
        assert torch.equal(mine[name], nearest[name]) == (expert == UNUSED)


def test_overrides_of_experts(tmp_path):
    source = source_of(FAMILIES["qwen2_moe"], tmp_path / "source")
    overrides = [r".*\.0\.mlp\.experts=dense", r".*\.1\.mlp\.experts\.\d+\.down_proj=bits:8,group_size:-1"]
    done = quantize(source, tmp_path / "out", options(overrides=overrides, num_samples=2), threads=1)
    assert [rows.layer_idx for rows in done.experts] == [1]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    assert torch.equal(tensors[name], before[name])
    assert tensors["model.layers.1.mlp.experts.5.down_proj.qweight"].shape == (96 // 32 * 8, 64)
    assert tensors["model.layers.1.mlp.experts.5.down_proj.scales"].shape == (1, 64)
    assert tensors["model.layers.1.mlp.experts.5.up_proj.qweight"].shape == (64 // 32 * 4, 96)
    ids = np.random.default_rng(1).integers(3, 512, 20).tolist()
    bits = lambda name: 8 if "1.mlp.experts" in name and "down" in name else 4  # noqa: E731
    weights = dequantized(tmp_path / "out", bits)
    expected = prefill_logits(load_f32(with_weights(source, tmp_path / "twin", weights)), ids)
    with exl.load(tmp_path / "out", kv_cache="f32", **EXACT) as llm:
        assert float((llm.logits(ids) - expected).abs().max()) <= 2e-4


@pytest.mark.parametrize(
    ("form", "changes", "expected"),
    [
        (
            None,
            {"overrides": [r".*\.1\.mlp\.experts\.3\.up_proj=bits:8"]},
            r"layers.1.mlp.experts.3.up_proj: found bits:8,group_size:32,sym:false, expected bits:4,group_size:32,"
            "sym:false as for model.layers.1.mlp.experts.0.up_proj: experts of a layer are of one kind",
        ),
        (None, {"overrides": [r".*experts\.0\.=dense"]}, "experts.1.gate_proj: found bits:4.* expected dense"),
        (stack, {"overrides": [".*experts.*up_proj=dense"]}, "experts.0.up_proj left dense, expected all linears"),
        (None, {"overrides": [r".*mlp\.gate$=dense"]}, "matches the name of no linear"),
        (None, {"bits": None, "target_bits": 3.5}, "target_bits: found a model with mixtures of 6 experts"),
    ],
    ids=["other bits", "dense", "one tensor", "the router", "target_bits"],
)
def test_what_does_not_fit_is_refused_by_name(form, changes, expected, tmp_path):
    source = source_of(FAMILIES["qwen3_moe"], tmp_path / "source", form)
    with pytest.raises(ConfigError, match=expected):
        quantize(source, tmp_path / "out", options(**changes), threads=1)
    assert not (tmp_path / "out").exists()


def test_experts_without_names_of_their_own_are_refused(tmp_path):
    case = next(case for case in MIXTURES if case.name == "gpt_oss")
    save(build(case), tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="gpt_oss: found experts that its files have in one tensor"):
        quantize(tmp_path / "source", tmp_path / "out", QuantizeOptions(method="rtn", group_size=32))
    assert not (tmp_path / "out").exists()
