"""Every family quantized: what the quantizer hears against transformers' activations, and the file it writes.

A file's outputs must lie in the source's order: fused modules as one, rotary channels as neighbours where the family
has them so. That shows only if a model is loaded that knows the family's own order, so the written weights go into
transformers' model.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import exl
from exl.checkpoint.checkpoint import Checkpoint
from exl.families.config import ModelConfig
from exl.models.manifest import read_manifest
from exl.ops.base import Linear
from exl.quantize.compute import Compute
from exl.quantize.layer_pass import LayerPass
from exl.quantize.listen import Listener
from exl.quantize.options import QuantizeOptions
from exl.quantize.overrides import Assignment, Settings
from exl.quantize.plan import LinearPlan, make_plan, module_names
from exl.quantize.run import quantize
from exl.quantize.steps import layer_steps
from exl.quantize.work import WorkFolder, as_bytes, write_atomically
from exl.threads import Threads
from tests.model.cpu_targets import EXACT
from tests.model.hf_models import CASES, MIXTURES, Case, build, prefill_logits, save
from tests.model.test_quantize_model import DATA, dequantized

TOKENIZER = DATA / "stories260K"
CALIBRATION = DATA / "calibration" / "stories260K.txt"
# One of each way in which a layer can differ from Llama's.
NAMES = (
    *("llama-biases", "qwen3", "gemma2", "gemma3", "phi3", "glm", "glm4", "granite", "cohere2", "cohere2-biases"),
    *("ministral3", "olmo2", "exaone4", "smollm3-window"),
)
FAMILIES = [
    replace(case, options={**case.options, "vocab_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 64})
    for case in CASES
    if case.name in NAMES
]
# Two layers, so that lists with an entry for each layer are one too long.
for case in FAMILIES:
    for key in ("layer_types", "no_rope_layers"):
        if key in case.options:
            case.options[key] = case.options[key][:2]
FIRST = {
    "qkv": ("self_attn.q_proj", "self_attn.qkv_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.gate_up_proj"),
    "down": ("mlp.down_proj",),
}
POST_NORMED = ("exaone4", "gemma2", "gemma3", "glm4", "olmo2")


def test_every_family_is_here():
    """But those that are Llama with windows or with biases."""
    dense = {case.family for case in CASES} - {case.family for case in MIXTURES}
    assert dense - {case.family for case in FAMILIES} == {"mistral", "qwen2"}


def make(case: Case) -> transformers.PreTrainedModel:
    """Biases are whole f16, as GPTQ files store them."""
    model = build(case, projection_scale=2.0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = parameter.data.half().float()
    return model


def source_of(case: Case, folder: Path) -> transformers.PreTrainedModel:
    """The model, saved with a tokenizer."""
    model = make(case)
    save(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return model


class Recorder:
    """What transformers feeds the linears of layer 1, what they answer, and the residual stream; rows in order."""

    def __init__(self, model: transformers.PreTrainedModel, sequences: list[np.ndarray]) -> None:
        self.scale = getattr(model.config, "residual_multiplier", 1.0)
        self.centred = "LayerNorm" in type(model.model.norm).__name__
        self._rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        layer = model.model.layers[1]
        hooks = [layer.register_forward_hook(partial(self._keep, "layer"))]
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                hooks.append(module.register_forward_hook(partial(self._keep, name)))
        with torch.no_grad():
            for sequence in sequences:
                model(torch.from_numpy(sequence).long()[None], use_cache=False)
        for hook in hooks:
            hook.remove()

    def _keep(self, name: str, _, x, y) -> None:
        y = y[0] if isinstance(y, tuple) else y
        self._rows[f"{name} in"].append(x[0].reshape(-1, x[0].shape[-1]))
        self._rows[f"{name} out"].append(y.reshape(-1, y.shape[-1]))

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.cat(self._rows[key])

    def inputs(self, name: str) -> torch.Tensor:
        return self[f"{next(module for module in FIRST[name] if f'{module} in' in self._rows)} in"]

    def outputs(self, name: str, plan: LinearPlan) -> torch.Tensor:
        """In exl's order of columns."""
        found = torch.empty(len(self.inputs(name)), plan.N, dtype=torch.float64)
        for module in plan.modules:
            tail = module.name.split(".", 3)[3]
            found[:, torch.from_numpy(module.columns)] = self[f"{tail} out"]
        return found

    def stream(self, name: str) -> torch.Tensor:
        """The residual stream behind "o" or "down"."""
        if name == "down":
            return self["layer out"]
        return self["layer in"] + self.scale * self["self_attn.o_proj out"]

    def spread(self, name: str) -> torch.Tensor:
        """What the norm behind "o" or "down" divides each row by, but for its epsilon."""
        stream = self.stream(name)
        if self.centred:
            stream = stream - stream.mean(1, keepdim=True)
        return stream.square().mean(1, keepdim=True).sqrt()


def spoil(model: transformers.PreTrainedModel, layer_idx: int, plan: LinearPlan, linear: Linear) -> None:
    """Changes a linear in transformers and in exl, as rounding would."""
    stored = linear.fields["weight"]
    noise = torch.from_numpy(np.random.default_rng(layer_idx).normal(size=stored.shape)).float()
    stored += 0.2 * stored.std() * noise
    for module in plan.modules:
        model.get_submodule(module.name).weight.data = stored[module.columns].double()


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_it_hears_what_transformers_feeds(case, tmp_path):
    """As ``test_quantize_layers.py`` has it for Llama's layer: inputs, and what the outputs lack to be those of the
    dense model, or, where they join the residual stream plainly, what that lacks."""
    source_of(case, tmp_path / "source")
    rounded, dense = make(case).double(), make(case).double()
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 512, length, dtype=np.int32) for length in (40, 13, 29, 33, 37)]
    with Checkpoint.open(tmp_path / "source") as checkpoint:
        config = ModelConfig.from_folder(tmp_path / "source")
        manifest = read_manifest(checkpoint, config, None)
        plan = make_plan(manifest, config, Assignment.make(module_names(manifest, config), Settings(4, 32, False), ()))
        layers = LayerPass(checkpoint, config, manifest, sequences, Compute.with_torch(Threads(1)))
        work = WorkFolder.open(tmp_path / "work", {}, ("hidden", "dense"))
        first, weights = layers.read_layer(0), layers.read_layer(1)
        for stream in ("dense", "hidden"):
            with write_atomically(work.hidden_path(stream, 1)) as write:
                for chunk, h in zip(layers.chunks, layers.embed(), strict=True):
                    layers.run(0, first, chunk, {"hidden": h})
                    write(as_bytes(h))
            if stream == "dense":  # the rounded layers' comes next
                for name, (linear,) in first.linears.items():
                    spoil(rounded, 0, plan.layers[0][name], linear)
        names = [step.name for step in layer_steps(config.layers[1])]
        written = bytearray()
        listener = Listener(layers, work, 1, weights, layers.read_layer(1), names, lambda name, chunk: None)
        expected = Recorder(dense, sequences)
        for name in names:
            heard = listener.hear(name, written.extend)
            found = Recorder(rounded, sequences)
            x, this = found.inputs(name), plan.layers[1][name]
            if name in ("qkv", "gate_up") or case.family.removesuffix("_text") in POST_NORMED:
                lack = expected.outputs(name, this) - found.outputs(name, this)
            else:
                lack = (expected.stream(name) - found.stream(name)) / found.scale
                weight = 1 / expected.spread(name)
                x, lack = x * weight, lack * weight
            for mine, true in ((heard.hessian, x.T @ x), (heard.drift, x.T @ lack)):
                true = 2 / len(x) * true
                assert mine.shape == true.shape
                assert float((mine - true).abs().max()) < 1e-4 * float(true.abs().max()), name
            (linear,) = weights[name]
            spoil(rounded, 1, this, linear)
        listener.end_dense(written.extend)
        outputs = torch.cat(list(listener.outputs()))
    for mine, true in (
        (outputs, Recorder(rounded, sequences)["layer out"]),
        (torch.frombuffer(written, dtype=torch.float32).view(outputs.shape), expected["layer out"]),
    ):
        assert float((mine - true).abs().max()) < 1e-4 * float(true.abs().max())


def unpadded(name: str, weight: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A written weight cut back to the source's size; gate and up in one module are padded each."""
    N, K = shape
    if name.endswith("gate_up_proj"):
        return weight.reshape(2, -1, K)[:, : N // 2].reshape(N, K)
    return weight[:N, :K]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_round_trip(case, bits, tmp_path):
    """The written file in exl equals its weights in transformers' model; at 8 bits both are close to the source.

    8 bits: of 64 normal weights the span is 4.8 standard deviations, a step 4.8 / 255 = 0.019 of one, and its rounding
    error 0.019 / sqrt(12) = 0.0054 of the weight, so of a linear's outputs. 8 linears one after another, each as large
    as what it is added to: sqrt(8) * 0.0054 = 0.015 of the logits. GPTQ's errors are smaller, but peaked attention and
    norms of q and k pass on more than they receive: twice that.
    """
    model = source_of(case, tmp_path / "source")
    options = QuantizeOptions(bits=bits, group_size=64, calibration=CALIBRATION, num_samples=6, seq_len=48)
    quantize(tmp_path / "source", tmp_path / "out", options, threads=1)
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 512, 60).tolist()
    dense = prefill_logits(model, ids)
    weights = dequantized(tmp_path / "out")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert set(weights) == {name for name in linears if name != "lm_head"}
    for name, weight in weights.items():
        module = model.get_submodule(name)
        cut = unpadded(name, weight, tuple(module.weight.shape))
        module.weight.data = torch.from_numpy(np.ascontiguousarray(cut)).float()
    with exl.load(tmp_path / "out", kv_cache="f32", **EXACT) as llm:
        assert llm.config.intermediate_size == 192  # 160, padded
        found = llm.logits(ids)
    assert float((found - prefill_logits(model, ids)).abs().max()) <= 2e-4
    error = float((found - dense).square().mean().sqrt() / dense.square().mean().sqrt())
    assert error <= 2 * 0.015 if bits == 8 else error > 0.001


def test_a_width_that_does_not_fit_is_not_chosen(tmp_path):
    """Zeros of 16 outputs fill no whole words at 3 bits, which are the reference of the others."""
    case = next(case for case in CASES if case.name == "llama-one-kv-head")
    source_of(replace(case, options={**case.options, "vocab_size": 512}), tmp_path / "source")
    options = QuantizeOptions(
        target_bits=3.4, bit_choices=(3, 4), group_size=32, calibration=CALIBRATION, num_samples=6, seq_len=48
    )
    quantize(tmp_path / "source", tmp_path / "out", options)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    words = {name.partition("layers.")[2]: x.shape[0] for name, x in tensors.items() if name.endswith("qweight")}
    assert {words[f"{i}.self_attn.{name}_proj.qweight"] for i in range(3) for name in "qkv"} == {64 // 32 * 4}
    assert any(found == 64 // 32 * 3 for found in words.values())
