"""The plan against reality: every byte alive after loading is on an exact line of the plan, and none is added later."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exl
from exl.engine.build import Engine, load_engine
from exl.errors import CheckpointError, MemoryBudgetError
from exl.layout.kv import KV_BITS
from exl.layout.specs import Target
from exl.planning.from_headers import open_model, plan_model
from exl.planning.options import EngineOptions
from exl.planning.plan import Tier
from exl.sampling_params import SamplingParams
from tests.command_line import run_exl
from tests.live_bytes import live_bytes
from tests.model.hf_models import CASES, build, save
from tests.model.test_quantized import make

STORIES = Path(__file__).parents[1] / "data" / "stories2M"
CPU = Target("cpu", compiled=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    make(root / "int4", 4, 32)
    make(root / "int3", 3, 32, order="own")
    for name in ("qwen3-tied", "llama-biases"):
        save(build(next(case for case in CASES if case.name == name)), root / name)
    return [root / name for name in ("int4", "int3", "qwen3-tied", "llama-biases")]


OPTIONS = st.fixed_dictionaries(
    {
        "model": st.integers(0, 3),
        "context": st.integers(1, 200),
        "kv_cache": st.sampled_from(list(KV_BITS)),
        "max_sequences": st.sampled_from([1, 2, 3, 16, 64]),
        "contexts": st.integers(1, 3),
        "prefill_chunk": st.integers(1, 80),
        "extra_window": st.integers(0, 100),
    }
)


@pytest.fixture(scope="module")
def frozen():
    """Freezes existing objects, so that they are not searched each time: transformers alone has a million."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore:a context of:exl.errors.ExlWarning")  # beyond a small model's own
@settings(max_examples=25, deadline=None, derandomize=True)
@given(OPTIONS)
def test_exact_lines_are_what_is_alive(folders, frozen, asked):
    folder = folders[asked.pop("model")]
    window = asked["prefill_chunk"] + asked.pop("extra_window")
    cache_tokens = asked.pop("contexts") * asked["context"]
    options = EngineOptions(prefill_window=window, cache_tokens=cache_tokens, **asked)
    before = live_bytes()
    engine = load_engine(folder, options)
    assert live_bytes() - before == engine.plan.exact_bytes
    # After using the whole context, by prefill and by decode, nothing more is alive.
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=10**6)
    prompt = [5] * max(1, engine.generator.context - 8)
    engine.generator.eos_ids = frozenset()
    tokens = list(engine.generator.stream(prompt, params))
    assert len(tokens) == engine.generator.context - len(prompt)
    for chunk in engine.generator.logits([5] * engine.generator.context):
        assert torch.isfinite(chunk).all()
    del chunk
    assert live_bytes() - before == engine.plan.exact_bytes
    del engine
    assert live_bytes() == before


def plan(folder: Path, **options):
    with open_model(folder) as files:
        return plan_model(files, EngineOptions(**options), CPU)[0]


def test_layers_leave_from_the_last_one_down(folders):
    whole = plan(folders[0])
    assert whole.placement.num_streamed == 0
    assert whole.num_buffers == 0
    tight = plan(STORIES, ram=plan(STORIES, resident_layers=0).num_bytes)
    assert tight.fits
    assert [tier for tier, _ in tight.placement.layers] == [Tier.DISK] * 4
    one = plan(STORIES, ram=plan(STORIES, resident_layers=1).num_bytes)
    assert [tier for tier, _ in one.placement.layers] == [Tier.DEVICE, Tier.DISK, Tier.DISK, Tier.DISK]
    assert one.num_buffers == 2


def test_what_cannot_fit_is_refused_with_the_table_and_what_would():
    with pytest.raises(MemoryBudgetError) as caught:
        plan(STORIES, ram="1MB")
    message = str(caught.value)
    assert "KV cache" in message
    assert "budget is 1.00 MB" in message
    assert "Would fit: ram='" in message
    enough = message.split("ram='")[1].split("'")[0]
    assert plan(STORIES, ram=enough).fits


def test_hints_fit_indeed():
    budget = plan(STORIES, kv_cache="q4", prefill_chunk=64, prefill_window=64, resident_layers=0).num_bytes
    with pytest.raises(MemoryBudgetError, match="kv_cache='q4', prefill_chunk=64, prefill_window=64"):
        plan(STORIES, ram=budget)
    assert plan(STORIES, ram=budget, kv_cache="q4", prefill_chunk=64, prefill_window=64).fits


def test_auto_context_is_the_largest_that_fits():
    assert plan(STORIES, context="auto").context == 512  # no budget: the model's own context
    whole = plan(STORIES, context=512)
    found = plan(STORIES, context="auto", ram=whole.num_bytes - 1)
    assert found.context < 512
    assert found.placement.num_streamed == 0
    assert plan(STORIES, context=found.context + 64).num_bytes > whole.num_bytes - 1


@pytest.mark.parametrize("kind", ["q8", "k8v4", "q4"])
def test_smaller_caches_are_smaller_by_their_bits(kind):
    line = {p.purpose: p.num_bytes for p in plan(STORIES, kv_cache=kind).lines}["KV cache"]
    per_token = {"q8": 136, "k8v4": 104, "q4": 72}[kind]  # K and V of head size 64, with their scales
    assert line == 4 * 2 * 512 * per_token


def test_a_tokenizer_that_cannot_be_read_closes_what_was_loaded(tmp_path, monkeypatch):
    shutil.copytree(STORIES, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    closed = []
    close = Engine.close
    monkeypatch.setattr(Engine, "close", lambda engine: closed.append(close(engine)))
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        exl.load(tmp_path / "model")
    assert closed == [None]


def test_a_budget_that_is_too_small_is_refused_before_anything_is_allocated():
    before = live_bytes()
    with pytest.raises(MemoryBudgetError):
        exl.load(STORIES, ram="2MB")
    assert live_bytes() == before


def test_the_command_prints_the_plan_without_reading_weights(tmp_path):
    """The weights' bytes are removed: the file keeps its headers and its length, as a sparse file."""
    folder = tmp_path / "headers"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((STORIES / name).read_bytes())
    data = (STORIES / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    with open(folder / "model.safetensors", "wb") as file:
        file.write(data[:header])
        file.truncate(len(data))
    done = run_exl("plan", folder, "--ram", "1GB", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["num_bytes"] == plan(STORIES, ram="1GB").num_bytes
    assert told["fits"] is True
    table = run_exl("plan", folder, "--ram", "1GB").stdout
    assert "KV cache" in table
    assert "budget" in table
