"""``exl info MODEL``: the facts are those of the files, and no weights are read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from exl.checkpoint.hub import BUNDLED_MODEL
from tests.command_line import run_exl
from tests.unit.checkpoint.hub_server import Hub

STORIES = Path(__file__).parents[2] / "data" / "stories260K"
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"


def info(*args: object) -> dict:
    done = run_exl("info", *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parameters(file: Path) -> int:
    with safe_open(file, "numpy") as tensors:
        return sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118


def test_a_dense_model():
    facts = info(STORIES)
    assert facts["family"] == "llama"
    assert facts["weights"] == "dense f32"
    (file,) = STORIES.glob("*.safetensors")
    assert facts["num_parameters"] == parameters(file)
    assert (facts["bits"], facts["group_sizes"], facts["num_layers"], facts["max_context"]) == ([32], [], 5, 512)
    assert facts["stop_ids"] == [1, 2]
    assert facts["stop tokens"] == "<s> (1), </s> (2)"
    assert facts["num_bytes"] == sum(tensor.nbytes for tensor in load_file(file).values())


def test_a_quantized_model():
    facts = info(BUNDLED_MODEL)
    quant = json.loads((BUNDLED_MODEL / "quantize_config.json").read_text())
    assert (facts["bits"], facts["group_sizes"]) == ([quant["bits"]], [quant["group_size"]])
    assert facts["weights"].startswith(f"{quant['bits']}-bit, groups of {quant['group_size']}, ")
    assert ("asymmetric" not in facts["weights"]) == quant["sym"]


@pytest.fixture
def talker(tmp_path):
    """A copy of a model, with a chat template and sampling of its own."""
    folder = tmp_path / "talker"
    shutil.copytree(STORIES, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "do_sample": True, "temperature": 0.7, "top_p": 0.8})
    )
    return folder


def test_template_sampling_and_stop_tokens(talker):
    facts = info(talker)
    assert facts["chat template"] == repr("<|user|>Hello</s><|assistant|>")
    assert facts["sampling"] == "temperature 0.7, top_p 0.8"
    assert facts["stop_ids"] == [2]
    assert info(STORIES)["sampling"].startswith("greedy")


def test_mixed_widths_have_their_shares(tmp_path):
    dense = tmp_path / "dense"
    shutil.copytree(STORIES, dense)
    (file,) = dense.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].astype("float16")
    save_file(tensors, file)
    weights = info(dense)["weights"]
    shares = [int(share) for share in re.findall(r"(\d+) %", weights)]
    assert sum(shares) == 100
    assert weights.startswith(f"{shares[0]} % dense f32; {shares[1]} % dense f16")
    layer = [tensor.size for name, tensor in tensors.items() if ".layers." in name and tensor.ndim == 2]
    assert shares[1] == round(100 * tensors["model.layers.0.mlp.down_proj.weight"].size / sum(layer))


def test_no_weights_are_read(talker, monkeypatch):
    from exl.checkpoint.checkpoint import Checkpoint

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    for name in ("read", "read_rows", "read_into", "read_bytes"):
        monkeypatch.setattr(Checkpoint, name, refuse)
    assert info(talker)["num_layers"] == 5


def test_a_table_in_a_pipe_has_a_line_for_each_fact(talker):
    facts = info(talker)
    lines = run_exl("info", talker).stdout.splitlines()
    assert len(lines) == len([name for name in facts if isinstance(facts[name], str)])
    assert {line.split("  ")[0] for line in lines} <= facts.keys()


def test_what_is_no_model_is_one_error(tmp_path):
    for model, word in ((tmp_path / "absent", "absent"), (tmp_path, "config.json")):
        done = run_exl("info", model)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert word in done.stderr or "safetensors" in done.stderr


def test_a_repository_is_described_without_its_weights(talker, tmp_path):
    expected = info(talker)
    (file,) = talker.glob("*.safetensors")
    with Hub({"some/talker": talker}) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "exl.cli", "info", "some/talker", "--json"],
            capture_output=True,
            text=True,
            timeout=120,
            env=env,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected | {"model": "some/talker"}
    assert hub.sent[file.name] < 100_000 < file.stat().st_size
    assert done.stderr == ""
