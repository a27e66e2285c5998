"""The command line as a user sees it: output on the right stream, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exl.commands.options import parse_rope
from tests.command_line import run_exl as exl
from tests.command_line import without_compiling

DATA = Path(__file__).parents[2] / "data"
STORIES = DATA / "stories260K"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # on a busy machine a second thread waits at every barrier


def in_a_process(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exl.cli", *args]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env=ONE_THREAD
    )
    done.stderr = without_compiling(done.stderr)
    return done


def generate(*args: str, stdin: str | bytes = b"", run=exl) -> subprocess.CompletedProcess[str]:
    more = {"stdin": stdin} if stdin else {}
    return run("generate", *args, "--model", str(STORIES), **more)


def assert_one_line_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("exl: error: ")
    for word in words:
        assert word in done.stderr


def test_text_on_standard_output_and_nothing_else():
    done = generate("Once upon a time", "--max-tokens", "12", "--temperature", "0", run=in_a_process)
    assert done.returncode == 0
    assert done.stdout == ", there was a little girl named Lily. She\n"
    assert "12 tokens" in done.stderr
    assert "tokens/s" in done.stderr


def test_the_bundled_model_is_the_default():
    done = exl("generate", "--max-tokens", "8", "--temperature", "0")
    assert done.returncode == 0
    assert done.stdout.startswith("Once upon a time")


def test_json_is_one_object():
    done = generate("-", "--json", "--max-tokens", "20", "--temperature", "0.8", "--seed", "7", stdin="One day,\n")
    answer = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert answer["prompt"] == "One day,"
    assert answer["completion_tokens"] == 20
    assert answer["prompt_tokens"] == len_prompt()
    assert answer["seed"] == 7
    assert answer["finish_reason"] == "length"
    assert answer["decode_seconds"] > 0
    again = json.loads(
        generate("One day,", "--json", "--max-tokens", "20", "--temperature", "0.8", "--seed", "7").stdout
    )
    assert again["text"] == answer["text"]


def len_prompt() -> int:
    import tokenizers

    return len(tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json")).encode("One day,").ids)


def test_stop_strings_cut_the_text():
    done = generate("Once upon a time", "--temperature", "0", "--stop", "girl", "--stop", "never said")
    assert done.stdout == ", there was a little \n"


def test_no_tokens_asked_for():
    done = generate("Once upon a time", "--max-tokens", "0")
    assert (done.returncode, done.stdout) == (0, "\n")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--top-p", "0"], ["top_p"]),
        (["--top-k", "-3"], ["top_k"]),
        (["--min-p", "1.5"], ["min_p"]),
        (["--max-tokens", "-1"], ["max_tokens"]),
        (["--stop", ""], ["stop"]),
        (["--context", "4"], ["prompt", "14 tokens", "holds 4"]),
        (["--context", "0"], ["context"]),
        (["--kv-cache", "q9"], ["kv_cache", "q9", "f16"]),
        (["--device", "cuda"], ["device", "cuda"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--max-tokens", "many"], ["max-tokens"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options(args, words):
    assert_one_line_error(generate("A rather long prompt", *args), *words)


def test_a_process_ends_with_the_same_line_and_status():
    told, alone = generate("--top-p", "0"), generate("--top-p", "0", run=in_a_process)
    assert_one_line_error(alone, "top_p")
    assert (alone.returncode, alone.stderr) == (told.returncode, told.stderr)


def test_bad_models(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line_error(exl("generate", "--model", str(tmp_path / "empty")), "empty")
    assert_one_line_error(exl("generate", "--model", str(tmp_path / "absent")), "absent")
    binary = tmp_path / "binary"
    binary.mkdir()
    (binary / "pytorch_model.bin").write_bytes(b"x")
    assert_one_line_error(exl("generate", "--model", str(binary)), ".bin", "safetensors")


def test_input_that_is_not_utf8():
    assert_one_line_error(generate("-", stdin=b"\xff\xfe"), "standard input", "UTF-8")


def test_a_traceback_only_when_asked_for():
    done = generate("--temperature", "-1", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("exl: error: ")


def test_info_tells_what_is_here():
    facts = json.loads(exl("info", "--json").stdout)
    assert {"exl", "torch", "gpu", "cpu", "kernel cache", "missing"} <= facts.keys()
    table = exl("info").stdout
    assert all(name in table for name in facts)


def test_quantize_makes_a_model_that_generates(tmp_path):
    done = exl("quantize", str(STORIES), str(tmp_path / "out"), "--bits", "8", "--group-size", "32", "--method", "rtn")
    assert done.returncode == 0, done.stderr
    assert "bytes of weights" in done.stderr
    told = exl("generate", "--model", str(tmp_path / "out"), "--max-tokens", "12", "--temperature", "0")
    assert told.stdout == "Once upon a time, there was a little girl\n"
    again = exl("quantize", str(STORIES), str(tmp_path / "out"), "--method", "rtn", "--group-size", "32")
    assert_one_line_error(again, "out")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--bits", "5"], ["bits", "5"]),
        (["--group-size", "0"], ["group_size"]),
        ([], ["calibration"]),
        (["--calibration", "absent.txt", "--group-size", "32"], ["absent.txt"]),
        (["--method", "rtn", "--override", "nothing=bits:8"], ["nothing"]),
    ],
    ids=str,
)
def test_quantize_refuses_in_one_line(args, words, tmp_path):
    assert_one_line_error(exl("quantize", str(STORIES), str(tmp_path / "out"), *args), *words)
    assert not (tmp_path / "out").exists()


def test_packed_copies_are_listed_and_cleared(tmp_path):
    from exl.ops.cpu_target import cpu_target
    from exl.planning.from_headers import open_model, plan_model
    from exl.planning.options import EngineOptions

    with open_model(DATA / "stories2M") as files:
        least, _ = plan_model(files, EngineOptions(resident_layers=1), cpu_target())
    import exl as library

    with library.load(DATA / "stories2M", ram=least.num_bytes, packed_folder=tmp_path) as llm:
        assert llm.plan.placement.num_streamed == 3
    listed = exl("packed", "list", "--folder", str(tmp_path)).stdout
    assert listed.count("\n") == 1
    assert "stories2M" in listed
    assert "removed 1 packed files" in exl("packed", "clear", "--folder", str(tmp_path)).stderr
    assert exl("packed", "list", "--folder", str(tmp_path)).stdout == ""


def test_help_names_the_commands():
    done = in_a_process("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("generate", "plan", "quantize", "packed", "info"))


def test_rope_is_read_as_pairs_or_as_json():
    yarn = {"rope_type": "yarn", "factor": 2.5, "truncate": False}
    assert parse_rope("rope_type=yarn, factor=2.5,truncate=false") == parse_rope(json.dumps(yarn)) == yarn
    done = exl("plan", str(STORIES), "--rope", "rope_type=linear,factor=2")
    assert "RoPE: linear, factor 2, theta 10000; 1024 positions" in done.stdout
    for text in ("2", "{", "[]", "linear"):
        assert_one_line_error(exl("plan", str(STORIES), "--rope", text), f"--rope: found {text!r}, expected NAME=X")
    assert_one_line_error(generate("a", "--rope", "rope_type=linear"), "rope: factor: found nothing")
