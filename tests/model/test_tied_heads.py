"""``tie_word_embeddings: true`` and a head in the file all the same: used if it differs, dropped if it is a copy.

Logits are compared with transformers', which also keeps two tensors that differ, and ties two that are equal.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import exl
from exl.engine.build import load_engine
from exl.errors import CheckpointError, ExlWarning, UnsupportedModelError
from exl.formats.same_values import same_values
from exl.layout.specs import Target
from exl.ops.cpu_target import cpu_target
from exl.planning.from_headers import open_model, plan_model
from exl.planning.options import EngineOptions
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize
from tests.live_bytes import live_bytes
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import CASES, build, load_f32, prefill_logits, save
from tests.reference.plain_packer import dequantize, pack_layer

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
TOLERANCE = 2e-4  # as in test_against_transformers.py
IDS = some_ids(30, seed=5)
CPU = Target("cpu", compiled=True)
DIFFERS = r"config\.json: tie_word_embeddings: found true, but lm_head differs from model\.embed_tokens"


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save(build(next(case for case in CASES if case.name == "llama-tied")), tmp_path_factory.mktemp("tied"))


def with_tensors(tied: Path, folder: Path, change, **config) -> Path:
    """A copy of the tied model. ``change``: tensors of the file -> those to add; None removes one."""
    shutil.copytree(tied, folder)
    tensors = load_file(folder / "model.safetensors")
    changed = tensors | change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def other_head(tensors, seed: int = 3) -> torch.Tensor:
    embed = tensors[EMBED]
    return torch.randn(embed.shape, generator=torch.Generator().manual_seed(seed)).mul_(0.5).to(embed.dtype)


def one_value_differs(tensors) -> torch.Tensor:
    head = tensors[EMBED].clone()
    head[41, 17] += 1.0  # in none of the rows that are compared first
    return head


def logits(folder: Path, **options) -> torch.Tensor:
    engine = load_engine(folder, EngineOptions(kv_cache="f32", context=48, **options))
    found = all_logits(engine, IDS)
    engine.close()
    return found


def plan_of(folder: Path):
    with open_model(folder) as files:
        return plan_model(files, EngineOptions(context=48), CPU)[0]


@pytest.mark.parametrize("make_head", [other_head, one_value_differs])
def test_a_head_that_differs_is_used(tied, tmp_path, make_head):
    folder = with_tensors(tied, tmp_path / "own", lambda tensors: {HEAD: make_head(tensors)})
    expected = prefill_logits(load_f32(folder), IDS)
    with pytest.warns(ExlWarning, match=DIFFERS):
        found = logits(folder)
    assert (found - expected).abs().max() <= TOLERANCE
    assert (found - logits(tied)).abs().max() > 0.5, "the test's head changes nothing"
    with pytest.warns(ExlWarning, match=DIFFERS):
        own = plan_of(folder)
    head_bytes = load_file(folder / "model.safetensors")[HEAD].nbytes
    assert head_bytes <= own.exact_bytes - plan_of(tied).exact_bytes < head_bytes + 4096


def test_an_equal_head_is_dropped(tied, tmp_path):
    folder = with_tensors(tied, tmp_path / "equal", lambda tensors: {HEAD: tensors[EMBED].clone()})
    expected = prefill_logits(load_f32(folder), IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (logits(folder) - expected).abs().max() <= TOLERANCE
        assert plan_of(folder).table() == plan_of(tied).table().replace(str(tied), str(folder))


@pytest.mark.parametrize("differs", [True, False])
def test_what_is_in_memory_is_what_the_plan_counts(tied, tmp_path, differs):
    head = other_head if differs else lambda tensors: tensors[EMBED].clone()
    folder = with_tensors(tied, tmp_path / "model", lambda tensors: {HEAD: head(tensors)})
    before = live_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExlWarning)
        engine = load_engine(folder, EngineOptions(context=48))
    assert live_bytes() - before == engine.plan.exact_bytes
    assert (engine.weights.head is engine.weights.embed) is not differs
    engine.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_equal_head_in_a_wider_type_is_dropped(tied, tmp_path, dtype):
    """f32 holds every f16 and bf16: the same values in another type are the same head."""

    def widened(tensors):
        return {EMBED: tensors[EMBED].to(dtype), HEAD: tensors[EMBED].to(dtype).float()}

    folder = with_tensors(tied, tmp_path / "wider", widened)
    with open_model(folder) as files:
        assert not files.manifest.head.linears
    folder = with_tensors(tied, tmp_path / "rounded", lambda tensors: {HEAD: tensors[EMBED].to(dtype)})
    with pytest.warns(ExlWarning, match=DIFFERS), open_model(folder) as files:
        assert files.manifest.head.linears[0][1][0].parts[0].bits == 16
    with pytest.warns(ExlWarning, match=DIFFERS):
        assert (logits(folder) - prefill_logits(load_f32(folder), IDS)).abs().max() <= TOLERANCE


def test_a_quantized_head_is_used(tied, tmp_path):
    rng = np.random.default_rng(0)
    K, N = 64, 96
    codes, zeros = rng.integers(0, 16, (K, N), dtype=np.uint8), rng.integers(7, 10, (2, N))
    scales = rng.uniform(0.05, 0.2, (2, N)).astype(np.float16)
    g_idx = [k // 32 for k in range(K)]
    packed = pack_layer(codes, zeros, scales, 4, g_idx=g_idx)
    quant = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "lm_head": True}
    folder = with_tensors(
        tied,
        tmp_path / "quantized",
        lambda tensors: {f"lm_head.{end}": torch.from_numpy(array) for end, array in packed.items()},
        quantization_config=quant,
    )
    twin = load_f32(tied)
    weight = dequantize(codes, zeros, scales, g_idx).T
    twin.lm_head.weight = torch.nn.Parameter(torch.from_numpy(weight.astype(np.float32)))
    with pytest.warns(ExlWarning, match=DIFFERS):
        found = logits(folder, arithmetic="f32" if cpu_target().compiled else None)
    assert (found - prefill_logits(twin, IDS)).abs().max() <= TOLERANCE


def test_a_file_that_has_only_the_head_is_tied_to_it(tied, tmp_path):
    """transformers swaps the two; so do files of frameworks that keep the output's weight."""
    folder = with_tensors(tied, tmp_path / "swapped", lambda tensors: {HEAD: tensors[EMBED], EMBED: None})
    expected = prefill_logits(load_f32(folder), IDS)
    assert torch.equal(expected, prefill_logits(load_f32(tied), IDS))
    assert (logits(folder) - expected).abs().max() <= TOLERANCE
    assert plan_of(folder).num_bytes == plan_of(tied).num_bytes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: {HEAD: t[EMBED][:-1].clone()},
            CheckpointError,
            r"lm_head: found 64 inputs x 95 outputs",
        ),
        (lambda t: {HEAD: t[EMBED].double()}, UnsupportedModelError, r"lm_head\.weight: found dtype f64"),
        (lambda t: {"lm_head.bias": torch.ones(96)}, CheckpointError, r"lm_head: found neither weight nor qweight"),
        (lambda t: {"lm_head.other": torch.ones(9)}, CheckpointError, r"lm_head: found neither weight nor qweight"),
        (lambda t: {HEAD: t[EMBED].clone(), "lm_head.other": torch.ones(9)}, CheckpointError, r"have: lm_head\.other"),
        (lambda t: {EMBED: None}, CheckpointError, r"model\.embed_tokens"),
    ],
    ids=["shape", "type", "bias-alone", "unknown-alone", "unknown", "neither"],
)
def test_heads_that_cannot_be_read_are_named(tied, tmp_path, change, error, message):
    folder = with_tensors(tied, tmp_path / "bad", change)
    with pytest.raises(error, match=message), open_model(folder):
        pass


def test_an_untied_model_without_a_head_says_what_config_json_says(tied, tmp_path):
    folder = with_tensors(tied, tmp_path / "untied", lambda tensors: {}, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing.*tie_word_embeddings is not true"):
        plan_of(folder)


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_rounded_on_loading_is_that_of_the_file(tied, tmp_path, differs):
    head = other_head if differs else lambda tensors: tensors[EMBED].clone()
    folder = with_tensors(tied, tmp_path / "model", lambda tensors: {HEAD: head(tensors)})
    expected = prefill_logits(load_f32(folder), IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExlWarning)
        found = logits(folder, head=8)
    assert (found - expected).abs().max() <= 0.1 < expected.std()


# --- exl quantize ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["other", "equal", "none", "swapped"])
def test_what_quantize_writes_says_the_same_of_the_head(tied, tmp_path, kind):
    change = {
        "other": lambda tensors: {HEAD: other_head(tensors)},
        "equal": lambda tensors: {HEAD: tensors[EMBED].clone()},
        "none": lambda tensors: {},
        "swapped": lambda tensors: {HEAD: tensors[EMBED], EMBED: None},
    }[kind]
    folder = with_tensors(tied, tmp_path / "source", change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize(folder, tmp_path / "out", QuantizeOptions(method="rtn", bits=8, group_size=32))
    assert [str(w.message).count("differs") for w in caught if w.category is ExlWarning] == [1] * (kind == "other")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (kind != "other")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert (HEAD in names) == (kind in ("other", "swapped"))
    expected = prefill_logits(load_f32(folder), IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logits(tmp_path / "out")
    assert (found - expected).std() <= 0.02 * expected.std()  # 8-bit layers
    assert (found - logits(tied)).std() > 0.5 * expected.std() or kind != "other"


# --- how two tensors are compared ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1, 499, 998, 999])
def test_one_value_anywhere_is_found(tmp_path, row):
    embed = torch.randn(1000, 8, generator=torch.Generator().manual_seed(row)).bfloat16()
    head = embed.clone()
    head[row, row % 8] += 1
    save_file({"a": embed, "b": head, "c": embed.clone(), "d": embed.float()}, tmp_path / "model.safetensors")
    with exl.checkpoint.checkpoint.Checkpoint.open(tmp_path) as checkpoint:
        for other, equal in {"b": False, "c": True, "d": True}.items():
            assert same_values(checkpoint, "a", other) is equal
            assert same_values(checkpoint, other, "a", block_bytes=100) is equal
