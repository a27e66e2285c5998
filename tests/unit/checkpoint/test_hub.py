"""Repositories of a hub on 127.0.0.1: planned from headers alone, loaded by a download, and every failure."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, snapshot_download
from safetensors.numpy import load_file, save_file

import exl
from benchmarks.synthetic import write_headers
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.errors import ExlWarning
from exl.planning.shapes import SHAPES
from tests.unit.checkpoint.hub_server import COMMIT, ORG, Hub


def environment(hub: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run_exl(*args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exl.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, stdin=subprocess.DEVNULL)


def header_bytes(path: Path) -> int:
    """Header bytes of a safetensors file: the 8 bytes of the length, and the JSON."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def small_bytes(folder: Path) -> int:
    """Total size of the files that a plan may read as a whole."""
    names = ("config.json", "quantize_config.json", "model.safetensors.index.json")
    return sum((folder / name).stat().st_size for name in names if (folder / name).exists())


def as_text(plan: exl.MemoryPlan) -> str:
    return json.dumps(plan.to_json())


def test_a_7b_in_shards_is_planned_from_its_headers(hub, tmp_path):
    folder = tmp_path / "7b"
    write_headers(folder, SHAPES["llama-2-7b"], num_shards=3)
    (folder / "tokenizer.json").write_bytes(b" " * 1_800_000)
    hub.repos[f"{ORG}/7b"] = folder
    plan = exl.plan(f"{ORG}/7b", vram="8GB", kv_cache="q8")
    assert as_text(plan) == as_text(exl.plan(folder, vram="8GB", kv_cache="q8"))
    assert plan.num_bytes > 5e9
    shards = sorted(folder.glob("*.safetensors"))
    assert {path.name: hub.sent[path.name] for path in shards} == {path.name: header_bytes(path) for path in shards}
    assert sum(hub.sent.values()) - hub.sent["api"] == small_bytes(folder) + sum(map(header_bytes, shards))
    assert "tokenizer.json" not in hub.sent
    assert not (tmp_path / "cache").exists()


def test_of_the_data_the_order_of_inputs_alone_is_read(hub):
    plan = exl.plan(f"{ORG}/stories")
    assert as_text(plan) == as_text(exl.plan())
    file = BUNDLED_MODEL / "model.safetensors"
    tensors = load_file(file)
    orders = sum(array.nbytes for name, array in tensors.items() if name.endswith(".g_idx"))
    assert hub.sent["model.safetensors"] == header_bytes(file) + orders
    asked = sum(last + 1 - first for first, last in hub.ranges["model.safetensors"])
    assert asked == header_bytes(file) + orders
    assert len(hub.ranges["model.safetensors"]) == 2 + sum(name.endswith(".g_idx") for name in tensors)


def test_act_order_is_planned_as_it_is_loaded(hub, tmp_path):
    folder = tmp_path / "ordered"
    shutil.copytree(BUNDLED_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, array in tensors.items():
        if name.endswith(".g_idx"):
            tensors[name] = rng.permutation(array)
    save_file(tensors, folder / "model.safetensors")
    hub.repos[f"{ORG}/ordered"] = folder
    plan = exl.plan(f"{ORG}/ordered")
    assert as_text(plan) == as_text(exl.plan(folder))
    assert plan.num_bytes > exl.plan().num_bytes


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_beside_a_tied_embedding_is_planned_by_a_few_of_its_rows(hub, tmp_path, differs):
    folder = tmp_path / "tied"
    shutil.copytree(BUNDLED_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embed * 2 if differs else embed.copy()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    hub.repos[f"{ORG}/tied"] = folder
    expected = r"lm_head differs from model\.embed_tokens" if differs else r"planned as if lm_head were a copy of"
    with pytest.warns(ExlWarning, match=rf"^somebody/tied: .*{expected}"):
        plan = exl.plan(f"{ORG}/tied")
    with pytest.warns(ExlWarning) if differs else contextlib.nullcontext():
        assert as_text(plan) == as_text(exl.plan(folder))
    with Checkpoint.open(folder) as checkpoint:
        infos = [checkpoint.info(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    rows = [(a, b) for a, b in hub.ranges["model.safetensors"] if any(i.start <= a < i.stop for i in infos)]
    assert len(rows) == (2 if differs else 8)
    assert {last - first + 1 for first, last in rows} == {embed[0].nbytes}


def test_what_is_in_the_cache_is_planned_from_there(hub):
    with exl.load(f"{ORG}/stories") as llm:
        text = llm.generate("Once upon a time", max_tokens=8, temperature=0).text
    with exl.load() as llm:
        assert text == llm.generate("Once upon a time", max_tokens=8, temperature=0).text
    hub.sent.clear()
    assert as_text(exl.plan(f"{ORG}/stories")) == as_text(exl.plan())
    assert hub.sent == {}


def test_part_of_a_model_in_the_cache_is_not_enough(hub):
    snapshot_download(f"{ORG}/stories", allow_patterns=["config.json"])
    assert as_text(exl.plan(f"{ORG}/stories")) == as_text(exl.plan())
    assert hub.sent["model.safetensors"] < (BUNDLED_MODEL / "model.safetensors").stat().st_size / 2


def test_offline_the_cache_is_all_there_is(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for function in (exl.plan, exl.load):
        with pytest.raises(exl.CheckpointError, match=r"^somebody/stories: no such folder here, and .*offline mode"):
            function(f"{ORG}/stories")
    assert hub.sent == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    exl.load(f"{ORG}/stories").close()
    hub.sent.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    exl.load(f"{ORG}/stories").close()
    exl.plan(f"{ORG}/stories")
    assert hub.sent == {}


@pytest.mark.parametrize("function", [exl.plan, exl.load], ids=["plan", "load"])
def test_a_revision_is_asked_for(hub, function):
    with pytest.raises(exl.CheckpointError, match=r"^somebody/stories: .*no revision 'v2'$"):
        function(f"{ORG}/stories", revision="v2")
    for revision in ("v1", COMMIT):
        found = function(f"{ORG}/stories", revision=revision)
        if function is exl.load:
            found.close()


@pytest.mark.parametrize("function", [exl.plan, exl.load], ids=["plan", "load"])
def test_a_gated_repository_wants_a_token(hub, function):
    hub.tokens[f"{ORG}/stories"] = "hf_right"
    with pytest.raises(exl.CheckpointError, match=r"^somebody/stories: .* gated: ask for access") as caught:
        function(f"{ORG}/stories")
    assert "\n" not in str(caught.value)
    with pytest.raises(exl.CheckpointError, match=r"^somebody/stories: .* gated"):
        function(f"{ORG}/stories", token="hf_wrong")
    found = function(f"{ORG}/stories", token="hf_right")
    if function is exl.load:
        found.close()
    assert "hf_right" not in str(caught.value)
    assert hub.authorizations == {None, "Bearer hf_wrong", "Bearer hf_right"}


@pytest.mark.parametrize("function", [exl.plan, exl.load], ids=["plan", "load"])
def test_an_unknown_repository(hub, function):
    with pytest.raises(exl.CheckpointError, match=r"^nobody/nothing: no such folder here, and .* no such repository"):
        function("nobody/nothing")


@pytest.mark.parametrize("function", [exl.plan, exl.load], ids=["plan", "load"])
def test_no_network(hub, monkeypatch, function):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: no server listens
    with pytest.raises(exl.CheckpointError, match=r"^somebody/stories: .* cannot be reached: ") as caught:
        function(f"{ORG}/stories")
    assert "\n" not in str(caught.value)


def test_a_repository_without_safetensors(hub, tmp_path):
    for name, message in {
        "pytorch_model.bin": r"^somebody/bin: found only \.bin weights, expected model\.safetensors",
        "README.md": r"^somebody/bin: found no weights among 1 file, expected model\.safetensors",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        hub.repos[f"{ORG}/bin"] = folder
        with pytest.raises(exl.CheckpointError, match=message):
            exl.plan(f"{ORG}/bin")


def test_a_repository_without_config(hub, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(BUNDLED_MODEL / "model.safetensors", tmp_path / "bare")
    hub.repos[f"{ORG}/bare"] = tmp_path / "bare"
    with pytest.raises(exl.ConfigError, match=r"somebody/bare/config\.json: not in the repository"):
        exl.plan(f"{ORG}/bare")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignores ranges", r"asked for bytes 0 to 7 .*answered with status 200 instead of these bytes alone"),
        ("wrong range", r"asked for bytes 0 to 7 .*found Content-Range 'bytes 1-7/"),
        ("no range", r"asked for bytes 0 to 7 .*found Content-Range ''"),
        ("wrong total", r"size changed between requests: found \d+ bytes, expected \d+"),
        ("gzip", r"found Content-Encoding 'gzip', expected plain bytes"),
        ("too much", r"the server sent more than 8 bytes of the header's length"),
        ("too little", r"the answer ended after 7 of 8 bytes of the header's length"),
        ("cut off", r"cannot be reached: peer closed connection"),
    ],
)
def test_answers_that_are_not_what_was_asked_for(hub, tmp_path, fault, message):
    folder = tmp_path / "large"
    write_headers(folder, SHAPES["tinyllama-1.1b"])
    hub.repos[f"{ORG}/large"] = folder
    hub.fault = fault
    with pytest.raises(exl.CheckpointError, match=rf"^somebody/large/model\.safetensors.*{message}") as caught:
        exl.plan(f"{ORG}/large")
    assert "\n" not in str(caught.value)
    # The bytes sent before the connection was closed fit the buffers of both sides; the file has 600 MB.
    assert hub.sent.get("model.safetensors", 0) < 32 << 20


def test_an_answer_that_says_later_is_asked_for_again(hub):
    hub.fault = "fails once"
    assert as_text(exl.plan(f"{ORG}/stories")) == as_text(exl.plan())


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ((1 << 40).to_bytes(8, "little"), r"the header says it has \d+ bytes, expected at most \d+"),
        (b"\x02\0\0\0\0\0\0\0[]", r"header: found '\[\]' at character 0, expected an object"),
        (b"\x02\0\0", r"3 bytes, expected at least the 8 of the header's length"),
    ],
)
def test_headers_from_the_network_are_checked_as_those_of_files(hub, tmp_path, start, message):
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(start)
    shutil.copy(BUNDLED_MODEL / "config.json", folder)
    hub.repos[f"{ORG}/hostile"] = folder
    with pytest.raises(exl.CheckpointError, match=message):
        exl.plan(f"{ORG}/hostile")


def test_small_files_have_a_limit(hub, tmp_path):
    folder = tmp_path / "swollen"
    shutil.copytree(BUNDLED_MODEL, folder)
    (folder / "quantize_config.json").write_bytes(b" " * (17 << 20))
    hub.repos[f"{ORG}/swollen"] = folder
    with pytest.raises(exl.CheckpointError, match=r"quantize_config\.json: the server sent more than 16777216 bytes"):
        exl.plan(f"{ORG}/swollen")


def test_orders_have_a_limit(hub, tmp_path):
    folder = tmp_path / "orders"
    folder.mkdir()
    header = json.dumps({"a.g_idx": {"dtype": "I32", "shape": [1 << 27], "data_offsets": [0, 1 << 29]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 29))
    hub.repos[f"{ORG}/orders"] = folder
    with pytest.raises(exl.CheckpointError, match=r"536870912 bytes of g_idx, expected at most"):
        exl.plan(f"{ORG}/orders")


def test_from_the_command_line(hub, tmp_path):
    env = environment(hub, tmp_path)
    done = run_exl("plan", f"{ORG}/stories", "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(as_text(exl.plan()))
    hub.tokens[f"{ORG}/stories"] = "hf_right"
    refused = run_exl("plan", f"{ORG}/stories", env=env)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"exl: error: {ORG}/stories: ")
    assert refused.stderr.count("\n") == 1
    allowed = run_exl("plan", f"{ORG}/stories", "--token", "hf_right", "--revision", "v1", env=env)
    assert allowed.returncode == 0, allowed.stderr


@pytest.mark.parametrize("command", [["plan", "nobody/nothing"], ["generate", "--model", "nobody/nothing"]])
def test_one_line_from_the_command_line(hub, tmp_path, command):
    done = run_exl(*command, env=environment(hub, tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("exl: error: nobody/nothing: no such folder here, and Hugging Face has no such rep")
