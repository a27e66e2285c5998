"""exl quantize and exl eval with repositories, and what exl quantize says at its end."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from exl.commands.quantize import run_command
from tests.command_line import run_exl

DATA = Path(__file__).parents[2] / "data"
STORIES = DATA / "stories260K"
TEXT = DATA / "tinystories-valid-30k.txt"
RTN = ("--method", "rtn", "--group-size", "32")


def test_a_repository_is_quantized_and_measured(hub, tmp_path):
    hub.repos["somebody/dense"] = STORIES
    out = tmp_path / "out"
    done = run_exl("quantize", "somebody/dense", out, *RTN, "--revision", "main")
    assert done.returncode == 0, done.stderr
    assert (out / "config.json").is_file()
    short = tmp_path / "short.txt"
    short.write_text("\n".join(TEXT.read_text(encoding="utf-8").splitlines()[:3]), encoding="utf-8")
    found = [
        json.loads(run_exl("eval", out, "--text", short, "--against", dense, "--json").stdout)
        for dense in ("somebody/dense", STORIES)
    ]
    assert found[0] == found[1]
    assert found[0]["kl_mean"] > 0
    measured = run_exl("eval", "somebody/dense", "--revision", "main", "--text", short, "--json")
    assert json.loads(measured.stdout)["loss"] == found[0]["reference_loss"]


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_a_gated_repository_needs_the_token(hub, tmp_path, command):
    hub.repos["somebody/gated"], hub.tokens["somebody/gated"] = STORIES, "hf_secret"
    rest = (tmp_path / "out", *RTN) if command == "quantize" else ("--text", TEXT, "--window", "8")
    refused = run_exl(command, "somebody/gated", *rest)
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert run_exl(command, "somebody/gated", *rest, "--token", "hf_secret").returncode == 0


def test_an_empty_revision_is_refused(hub, tmp_path):
    hub.repos["somebody/dense"] = STORIES
    done = run_exl("quantize", "somebody/dense", tmp_path / "out", *RTN, "--revision", "")
    assert done.returncode == 1
    assert "revision" in done.stderr


def test_neither_folder_nor_repository(tmp_path):
    done = run_exl("quantize", tmp_path / "nowhere", tmp_path / "out", *RTN)
    assert done.returncode == 1
    assert "nowhere: no such folder here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_last_line_is_the_command_that_runs_the_model(tmp_path):
    out = tmp_path / "a model's folder"
    done = run_exl("quantize", STORIES, out, *RTN)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("run it: exl generate ")
    command = shlex.split(said.removeprefix("run it: "))
    ran = run_exl(*command[1:], "--max-tokens", "5", "--temperature", "0")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


def test_a_model_with_a_template_is_for_chats(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, tmp_path / name)
    assert run_command(tmp_path) == shlex.join(["exl", "generate", "Once upon a time", "-m", str(tmp_path)])
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert run_command(tmp_path) == shlex.join(["exl", "chat", "-m", str(tmp_path)])
    (tmp_path / "tokenizer.json").unlink()
    assert run_command(tmp_path) is None


def test_single_modules_and_an_average(tmp_path):
    calibration = ("--calibration", DATA / "calibration" / "stories260K.txt", "--num-samples", "4", "--seq-len", "64")
    calibration += ("--group-size", "32")
    options = ("--bit-choices", "3,4", "--override", ".*o_proj=bits:8", "--override", ".*[.]0[.]self_attn[.]q=dense")
    done = run_exl("quantize", STORIES, tmp_path / "out", *calibration, *options, "--target-bits", "3.2")
    assert done.returncode == 1
    assert "target_bits: found 3.2, expected at least 3.4" in done.stderr
    done = run_exl("quantize", STORIES, tmp_path / "out", *calibration, *options, "--target-bits", "3.8")
    assert done.returncode == 0, done.stderr
    assert re.search(r"bytes of weights, 3\.(7\d\d|800) bits on average", done.stderr)
    dynamic = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    assert {"bits": 8} in dynamic.values()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "4", "--target-bits", "3.5"), "bits: found 4, expected none beside target_bits"),
        (("--target-bits", "3.5", "--bit-choices", "3;4"), "bit_choices: found '3;4', expected whole numbers"),
        (("--override", "x"), "override: 'x': expected PATTERN=bits:8"),
    ],
)
def test_widths_that_cannot_be(tmp_path, options, message):
    done = run_exl("quantize", STORIES, tmp_path / "out", "--calibration", TEXT, *options)
    assert done.returncode == 1
    assert message in done.stderr
