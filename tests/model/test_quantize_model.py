"""Whole models quantized: read back, padded, interrupted and refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import exl
from exl.cpu_kernels.processor import usable_isas
from exl.errors import CheckpointError, ConfigError, ExlError, ExlWarning
from exl.quantize import run
from exl.quantize.compute import Compute, open_compute
from exl.quantize.options import QuantizeOptions
from exl.quantize.rounding import TorchRounding
from exl.quantize.run import quantize
from exl.quantize.work import WORK_NAME
from exl.threads import Threads
from tests.model.cpu_targets import EXACT
from tests.reference.plain_packer import bit_places

DATA = Path(__file__).parents[1] / "data"
CALIBRATION = DATA / "calibration" / "stories260K.txt"
QUICK = {"calibration": CALIBRATION, "num_samples": 4, "seq_len": 64, "group_size": 32}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """stories260K cut to its first two layers: it needs padding, and a run takes one second."""
    folder = tmp_path_factory.mktemp("tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(DATA / "stories260K", dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "stories260K" / name, folder)
    return folder


def unpack_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes [K, N] from words [K * bits / 32, N], one bit at a time."""
    places = bit_places(bits)
    num_words = 3 if bits == 3 else 1
    blocks = words.view(np.uint32).reshape(-1, num_words, words.shape[1])
    codes = [
        sum((blocks[:, word] >> np.uint32(bit) & 1).astype(np.int64) << b for b, (word, bit) in enumerate(where))
        for where in places
    ]
    return np.stack(codes, axis=1).reshape(-1, words.shape[1])


def dequantized(
    folder: Path, bits_of: Callable[[str], int] | None = None, only: str | None = None
) -> dict[str, np.ndarray]:
    """Weights [N, K] in f64 of every quantized module, read from the files by the format's description."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    weights = {}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        if only not in (None, name):
            continue
        bits = config["bits"] if bits_of is None else bits_of(name)
        codes = unpack_stream(tensors[f"{name}.qweight"], bits)
        zeros = unpack_stream(np.ascontiguousarray(tensors[f"{name}.qzeros"].T), bits).T
        if config["checkpoint_format"] == "gptq":
            zeros = (zeros + 1) % 2**bits
        g_idx = tensors[f"{name}.g_idx"]
        scales = tensors[f"{name}.scales"].astype(np.float64)
        weights[name] = (scales[g_idx] * (codes - zeros[g_idx])).T
    return weights


def twin(source: Path, weights: dict[str, np.ndarray], *, padded: bool) -> transformers.PreTrainedModel:
    """transformers' model in f64 with these weights, in the padded size or cut back to the source's size."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    for name, weight in weights.items():
        module = model.get_submodule(name)
        N, K = (None, None) if padded else module.weight.shape
        module.weight.data = torch.from_numpy(np.ascontiguousarray(weight[:N, :K]))
    return model


def ids_of_text() -> list[int]:
    line = (DATA / "tinystories-valid-30k.txt").read_text(encoding="utf-8").splitlines()[3]
    return exl.text.tokenizer.Tokenizer.from_folder(DATA / "stories260K").encode(line)[:200]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn"},
        {"act_order": False, "match_dense": False},
        {"static_groups": False},
        {"checkpoint_format": "gptq_v2", "sym": True, "group_size": -1},
        {"group_size": 48},
    ],
    ids=["rtn", "plain", "act-order", "v2-sym-one-group", "shorter-last-group"],
)
def test_read_back(tiny, tmp_path, bits, options):
    """exl's logits against transformers' on independently dequantized weights, cut back to the unpadded model."""
    quantize(tiny, tmp_path / "out", QuantizeOptions(**{**QUICK, "bits": bits, **options}))
    weights = dequantized(tmp_path / "out")
    assert {name.rpartition(".")[2] for name in weights} == set(LINEARS)
    ids = ids_of_text()
    with exl.load(tmp_path / "out", kv_cache="f32", **EXACT) as llm:
        found = llm.logits(ids)
        assert llm.config.intermediate_size == 192
    with torch.no_grad():
        expected = twin(tiny, weights, padded=False)(torch.tensor([ids])).logits[0]
    assert float((found - expected).abs().max()) <= 2e-4
    g_idx = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.g_idx"]
    shuffled = options.get("static_groups") is False
    assert bool((np.diff(g_idx) < 0).any()) == shuffled
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["desc_act"] == shuffled


@pytest.mark.parametrize(("group_size", "padded"), [(32, 192), (64, 192), (-1, 192)])
def test_padding_changes_nothing(tiny, tmp_path, group_size, padded):
    quantize(tiny, tmp_path / "out", QuantizeOptions(**{**QUICK, "group_size": group_size}))
    weights = dequantized(tmp_path / "out")
    for name, weight in weights.items():
        if name.endswith(("gate_proj", "up_proj")):
            assert weight.shape == (padded, 64)
            assert not weight[172:].any()
        if name.endswith("down_proj"):
            assert weight.shape == (64, padded)
            assert not weight[:, 172:].any()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == padded
    ids = torch.tensor([ids_of_text()])
    with torch.no_grad():
        whole = twin(tiny, weights, padded=True)(ids).logits
        cut = twin(tiny, weights, padded=False)(ids).logits
    # Adding exact zeros changes no sum; only the blocks of the f64 products differ.
    assert float((whole - cut).abs().max()) <= 1e-12 * float(cut.abs().max())


def test_zeros_that_other_loaders_can_read(tiny, tmp_path):
    """v1 stores zero - 1: a zero of 0, which would wrap to the largest code, is never written for any weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for name in ("q_proj", "o_proj"):
        getattr(model.model.layers[0].self_attn, name).weight.data.abs_()  # positive groups want a zero of 0
    source = tmp_path / "source"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, source)
    least = {}
    for checkpoint_format in ("gptq", "gptq_v2"):
        out = tmp_path / checkpoint_format
        quantize(source, out, QuantizeOptions(method="rtn", group_size=32, checkpoint_format=checkpoint_format))
        qzeros = load_file(out / "model.safetensors")["model.layers.0.self_attn.q_proj.qzeros"]
        stored = unpack_stream(np.ascontiguousarray(qzeros.T), 4)
        least[checkpoint_format] = (int(stored.min()), int(stored.max()))
    assert least == {"gptq": (0, 0), "gptq_v2": (0, 0)}  # true zeros 1 and 0


def test_dense_tensors_and_companions_are_copied(tiny, tmp_path):
    quantize(tiny, tmp_path / "out", QuantizeOptions(method="rtn", group_size=32))
    before = load_file(tiny / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    dense = [name for name in before if not any(linear in name for linear in LINEARS)]
    assert {name for name in after if not any(linear in name for linear in LINEARS)} == set(dense)
    for name in dense:
        assert after[name].dtype == before[name].dtype
        assert np.array_equal(after[name], before[name])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny / name).read_bytes()
    assert not (tmp_path / "out" / WORK_NAME).exists()


def test_biases(tmp_path):
    """Qwen2: biases of q, k and v are stored as f16 and affect the activations of the Hessian."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).float().eval()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).bias.data = (
                torch.randn_like(getattr(layer.self_attn, name).bias).half().float()
            )
    source = tmp_path / "source"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "stories260K" / name, source)
    quantize(source, tmp_path / "out", QuantizeOptions(**QUICK))
    ids = ids_of_text()[:100]
    with exl.load(tmp_path / "out", kv_cache="f32", **EXACT) as llm:
        found = llm.logits(ids)
    with torch.no_grad():
        expected = twin(source, dequantized(tmp_path / "out"), padded=False)(torch.tensor([ids])).logits[0]
    assert float((found - expected).abs().max()) <= 2e-4


def test_shards(tiny, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quantize(tiny, whole, QuantizeOptions(method="rtn", group_size=32))
    quantize(tiny, cut, QuantizeOptions(method="rtn", group_size=32, max_shard_bytes=50_000))
    names = sorted(path.name for path in cut.glob("*.safetensors"))
    assert len(names) >= 3
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    merged = {}
    for name in names:
        shard = load_file(cut / name)
        assert all(index["weight_map"][key] == name for key in shard)
        merged |= shard
    expected = load_file(whole / "model.safetensors")
    assert merged.keys() == expected.keys() == index["weight_map"].keys()
    assert all(np.array_equal(merged[key], expected[key]) for key in expected)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def torch_rounds(threads: Threads) -> Iterator[Compute]:
    with open_compute(threads) as compute:
        yield replace(compute, rounding=TorchRounding(threads))


@pytest.mark.parametrize(
    "options",
    [{}, {"static_groups": False}, {"act_order": False, "group_size": -1}, {"group_size": 48, "static_groups": False}],
)
def test_kernels_write_the_files_that_torch_writes(tiny, tmp_path, monkeypatch, options):
    if not usable_isas():
        pytest.skip("this processor has no instruction set that the kernels are written for")
    options = QuantizeOptions(**{**QUICK, **options})
    quantize(tiny, tmp_path / "compiled", options)
    with monkeypatch.context() as patch:
        patch.setattr(run, "open_compute", torch_rounds)
        quantize(tiny, tmp_path / "torch", options)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("compiled", "torch"))
    assert found == expected


def test_killed_runs_are_gone_on_with(tiny, tmp_path):
    """Killed in the first layer, in the second, or while writing, a run resumes to the result of an unkilled run."""
    options = {**QUICK, "calibration": str(CALIBRATION)}
    steps: list[tuple[int, str]] = []
    quantize(tiny, tmp_path / "whole", QuantizeOptions(**options), lambda done, total, what: steps.append((done, what)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    child = Path(__file__).with_name("quantize_child.py")
    into_second = next(done for done, what in steps if what.startswith("layer 2") and what.endswith("gate_up"))
    writing = next(done for done, what in steps if what == "writing") + 3
    for stop in (3, into_second, writing):
        command = [sys.executable, str(child), str(tiny), str(tmp_path / "cut"), str(stop), json.dumps(options)]
        died = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert not (tmp_path / "cut" / "config.json").exists()
    done = quantize(tiny, tmp_path / "cut", QuantizeOptions(**options))
    assert done.num_resumed_layers == 2
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_another_request_is_not_gone_on_with(tiny, tmp_path):
    class Stop(Exception):
        pass

    def stop_late(done: int, total: int, what: str) -> None:
        if what.startswith("layer 2"):
            raise Stop

    with pytest.raises(Stop):
        quantize(tiny, tmp_path / "out", QuantizeOptions(**QUICK), stop_late)
    before = files_of(tmp_path / "out")
    for change, word in (({"bits": 3}, "bits"), ({"num_samples": 5}, "num_samples"), ({"seq_len": 65}, "calibration")):
        with pytest.raises(ConfigError, match=rf"unfinished run that differs in .*{word}"):
            quantize(tiny, tmp_path / "out", QuantizeOptions(**{**QUICK, **change}))
    other = tmp_path / "other.txt"
    other.write_text("\n".join(reversed(CALIBRATION.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    with pytest.raises(ConfigError, match="differs in calibration tokens"):
        quantize(tiny, tmp_path / "out", QuantizeOptions(**{**QUICK, "calibration": other}))
    assert files_of(tmp_path / "out") == before
    assert quantize(tiny, tmp_path / "out", QuantizeOptions(**QUICK)).num_resumed_layers == 1


def test_nothing_is_overwritten(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out: exists and holds notes\.txt"):
        quantize(tiny, out, QuantizeOptions(**QUICK))
    assert files_of(out) == {"notes.txt": b"mine"}
    with pytest.raises(ConfigError, match="exists and is not a folder"):
        quantize(tiny, out / "notes.txt", QuantizeOptions(**QUICK))
    with pytest.raises(ConfigError, match=r"exists and holds config\.json"):
        quantize(tiny, tiny, QuantizeOptions(**QUICK))


def test_a_full_disk_is_told_beforehand(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ExlError, match=r"1\.00 KB free on this disk, quantizing needs \d+\.\d\d KB"):
        quantize(tiny, tmp_path / "out", QuantizeOptions(**QUICK))


def test_a_disk_that_fills_up_is_one_error(tiny, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exl.quantize.work.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        quantize(tiny, tmp_path / "out", QuantizeOptions(**QUICK))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1024}, "seq_len: found 1024, the model has 512 positions"),
        ({"calibration": "nowhere.txt"}, r"calibration: nowhere\.txt: cannot be read"),
        ({"documents": "whole", "calibration": DATA / "stories260K" / "model.safetensors"}, "not UTF-8"),
        ({"calibration": DATA / "stories260K" / "config.json", "seq_len": 512}, "expected at least those of one seq"),
    ],
)
def test_requests_that_cannot_be_met(tiny, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        quantize(tiny, tmp_path / "out", QuantizeOptions(**{**QUICK, **options}))
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_fit_are_told(tiny, tmp_path):
    with pytest.warns(ExlWarning, match=r"found 128, which does not divide the 64 inputs of .*q_proj: .* vLLM refuses"):
        quantize(tiny, tmp_path / "out", QuantizeOptions(method="rtn"))
    shapes = {key: x.shape for key, x in load_file(tmp_path / "out" / "model.safetensors").items() if "scales" in key}
    assert shapes["model.layers.0.self_attn.q_proj.scales"] == (1, 64)
    assert shapes["model.layers.0.mlp.down_proj.scales"] == (2, 64)


def test_quantized_sources_are_refused(tiny, tmp_path):
    quantize(tiny, tmp_path / "once", QuantizeOptions(method="rtn", group_size=32))
    with pytest.raises(ConfigError, match="already quantized"):
        quantize(tmp_path / "once", tmp_path / "twice", QuantizeOptions(**QUICK))


def test_weights_that_are_not_finite_are_named(tiny, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj: found weights that are not finite"):
        quantize(tmp_path / "source", tmp_path / "out", QuantizeOptions(method="rtn", group_size=32))
