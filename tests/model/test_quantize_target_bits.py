"""``target_bits``: what is measured against transformers, and what the choice is worth."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.numpy import load_file

import exl
from exl.errors import ConfigError
from exl.quantize import run as run_module
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize
from exl.quantize.sensitivity import Texts, choose_bits
from exl.quantize.solve import Solver
from exl.quantize.work import WORK_NAME
from exl.text.tokenizer import Tokenizer
from tests.model.cpu_targets import EXACT
from tests.model.test_quantize_model import DATA, dequantized, files_of, ids_of_text, twin

SMALL = {"calibration": DATA / "calibration" / "stories260K.txt", "num_samples": 6, "seq_len": 64, "group_size": 32}
LARGER = {"calibration": DATA / "calibration" / "stories2M.txt", "num_samples": 8, "seq_len": 256, "group_size": 64}
LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def bits_of(folder: Path) -> dict[str, int]:
    """Of each module, by its name, from its tensors."""
    found = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
            found[name] = tensors[f"{name}.qweight"].shape[0] * 32 // len(tensors[f"{name}.g_idx"])
    return found


@torch.no_grad()
def divergence(dense, changed, sequences: list[np.ndarray]) -> float:
    """Mean KL of two of transformers' models."""
    total, count = 0.0, 0
    for sequence in sequences:
        ids = torch.from_numpy(sequence).long()[None]
        p, q = (F.log_softmax(model(ids).logits[0].double(), dim=-1) for model in (dense, changed))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(sequence)
    return total / count


def test_errors_are_what_transformers_finds(tmp_path, monkeypatch):
    """With the very weights that were rounded: the divergence at the width of the reference, and elsewhere that times
    the ratio of the squared errors of the linear's outputs."""
    rounded, errors, texts = {}, {}, []
    solve = Solver.round

    def spy(self, plan, modules, weight, prepared):
        result = solve(self, plan, modules, weight, prepared)
        if not errors:  # of the measurement, which comes first
            rounded[modules[0].name, modules[0].bits] = result.dequantize()[: plan.K].T
        return result

    def keep(plan, found, target):
        errors.update(found)
        return choose_bits(plan, found, target)

    split = Texts.of
    monkeypatch.setattr(Solver, "round", spy)
    monkeypatch.setattr(run_module, "choose_bits", keep)
    monkeypatch.setattr(Texts, "of", lambda sequences: texts.append(split(sequences)) or texts[-1])
    options = QuantizeOptions(**SMALL, target_bits=3.3, bit_choices=(3, 4), damp=0.02)
    quantize(DATA / "stories260K", tmp_path / "out", options)
    measured = texts[0].measure
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(  # noqa: E731
        DATA / "stories260K", dtype=torch.float64
    ).eval()
    dense = load()
    assert set(errors) == {(i, name) for i in range(dense.config.num_hidden_layers) for name in LINEARS}
    for layer_idx, name in ((0, "qkv"), (0, "down"), (2, "gate_up"), (4, "o")):
        names = [f"model.layers.{layer_idx}.{tail}" for tail in LINEARS[name]]
        inputs = []
        hook = dense.get_submodule(names[0]).register_forward_hook(lambda _, x, y, rows=inputs: rows.append(x[0][0]))
        changed = load()
        start = 0
        for module in names:
            target = changed.get_submodule(module)
            target.weight.data = rounded[names[0], 3][start : start + len(target.weight)].double()
            start += len(target.weight)
        expected = divergence(dense, changed, measured)
        hook.remove()
        # f32 against f64: 1e-7 of logarithms of probabilities, of which a divergence of 1e-3 is a difference.
        assert errors[layer_idx, name][3] == pytest.approx(expected, rel=0.01), name
        weight = torch.cat([dense.get_submodule(module).weight.data for module in names])
        x = torch.cat(inputs)
        squares = {bits: float((x @ (rounded[names[0], bits] - weight).T).square().sum()) for bits in (3, 4)}
        assert errors[layer_idx, name][4] == pytest.approx(expected * squares[4] / squares[3], rel=0.01)


def test_texts_share_no_token():
    rng = np.random.default_rng(0)
    for lengths in ([2048], [300] * 40, [64, 2000, 10, 9], [8, 8]):
        sequences = [rng.integers(0, 1 << 30, length, dtype=np.int32) for length in lengths]
        texts = Texts.of(sequences)
        learn, measure = (np.concatenate(part) for part in (texts.learn, texts.measure))
        assert not set(learn.tolist()) & set(measure.tolist())
        assert len(measure) == min(1024, sum(lengths) // 4)
        assert len(learn) == min(16384, sum(lengths) - len(measure))


def test_the_choice_is_worth_its_bits(tmp_path):
    """2.5 bits: less divergence than half of what 2 and 3 bits have, and than three bits in half of the layers."""
    text = (DATA / "tinystories-valid-30k.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = Tokenizer.from_folder(DATA / "stories2M")
    sequences = [np.array(tokenizer.encode(line)[:200], np.int32) for line in text if len(line) > 40][:10]

    def logs_of(folder: Path) -> torch.Tensor:
        with exl.load(folder, kv_cache="f32", **EXACT) as llm:
            return torch.cat([F.log_softmax(llm.logits(ids.tolist()).double(), dim=-1) for ids in sequences])

    dense = logs_of(DATA / "stories2M")

    def divergence_of(name: str, **options) -> float:
        quantize(DATA / "stories2M", tmp_path / name, QuantizeOptions(**LARGER, **options))
        return float((dense.exp() * (dense - logs_of(tmp_path / name))).sum(-1).mean())

    found = divergence_of("chosen", target_bits=2.5)
    bits = bits_of(tmp_path / "chosen")
    assert len({*bits.values()}) > 1
    for i in range(4):
        for modules in LINEARS.values():  # one launch
            assert len({bits[f"model.layers.{i}.{module}"] for module in modules}) == 1
    assert found < (divergence_of("2", bits=2) + divergence_of("3", bits=3)) / 2
    assert found < divergence_of("half", bits=2, overrides=[r"model\.layers\.[01]\.=bits:3"])


def test_the_file_of_a_target(tmp_path):
    """The average is met but for the smallest step, with modules whose bits are said; the file is read back."""
    overrides = [r".*\.0\.self_attn\.o_proj=bits:8", r".*\.1\.mlp\.down_proj=group_size:64"]
    result = quantize(
        DATA / "stories260K", tmp_path / "out", QuantizeOptions(**SMALL, target_bits=3.4, overrides=overrides)
    )
    bits = bits_of(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(DATA / "stories260K", dtype=torch.float64)
    sizes = {name: model.get_submodule(name).weight.numel() for name in bits}
    average = sum(sizes[name] * bits[name] for name in bits) / sum(sizes.values())
    assert result.average_bits == pytest.approx(average)
    assert 3.4 - 64 * 64 / sum(sizes.values()) < average <= 3.4  # one bit more in an o_proj
    assert bits["model.layers.0.self_attn.o_proj"] == 8
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    counts = {width: sum(found == width for found in bits.values()) for width in {*bits.values()}}
    assert counts[config["bits"]] == max(counts.values())
    assert config["meta"]["target_bits"] == 3.4
    weights = dequantized(tmp_path / "out", bits.get)
    ids = ids_of_text()
    with torch.no_grad():
        expected = twin(DATA / "stories260K", weights, padded=False)(torch.tensor([ids])).logits[0]
    with exl.load(tmp_path / "out", kv_cache="f32", **EXACT) as llm:
        assert float((llm.logits(ids) - expected).abs().max()) <= 2e-4


def test_an_interrupted_choice_is_gone_on_with(tmp_path):
    """Before it is made it is made again, behind it it stands; work adds up in both."""

    class Stop(Exception):
        pass

    options = QuantizeOptions(**SMALL, target_bits=3.5)
    steps: list[tuple[int, int, str]] = []
    quantize(DATA / "stories260K", tmp_path / "whole", options, lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1]
    assert all(old[0] <= new[0] for old, new in pairwise(steps))
    measuring = [i for i, step in enumerate(steps) if step[2].startswith("measuring")]
    for stop in (measuring[5], measuring[-1] + 4):
        seen: list[tuple[int, int, str]] = []

        def tell(*step, seen=seen, stop=stop):
            seen.append(step)
            if len(seen) > stop:
                raise Stop

        with pytest.raises(Stop):
            quantize(DATA / "stories260K", tmp_path / "cut", options, tell)
        assert (tmp_path / "cut" / WORK_NAME / "bits.json").is_file() == (stop > measuring[-1])
    rest: list[tuple[int, int, str]] = []
    quantize(DATA / "stories260K", tmp_path / "cut", options, lambda *step: rest.append(step))
    assert not any("measuring" in what for _, _, what in rest)
    assert rest[0][0] > 0
    assert rest[-1][0] == rest[-1][1]
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"target_bits: found 2, expected at least 2\.29"):
        quantize(
            DATA / "stories260K",
            tmp_path / "other",
            QuantizeOptions(**SMALL, target_bits=2, overrides=[r".*\.0\.mlp\.down=bits:8"]),
        )
