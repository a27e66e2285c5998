"""``--lora``: of one answer, of a chat, of a plan, of a measurement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import exl
from exl.bench import run_bench
from exl.commands.options import parse_loras
from exl.errors import ConfigError
from exl.evaluate import evaluate, read_passages
from exl.planning.options import EngineOptions
from tests.command_line import run_exl

DATA = Path(__file__).parents[2] / "data"
STORIES, TRAINED = DATA / "stories260K", DATA / "adapter"


def test_names_and_folders():
    assert parse_loras(None) is None
    assert parse_loras(["poems=a/b", "c/d"]) == {"poems": "a/b", "d": "c/d"}
    for bad in (["a=x", "a=y"], ["=x"], ["a="]):
        with pytest.raises(ConfigError, match=r"--lora: found '.*', expected NAME=FOLDER, each with a name of its own"):
            parse_loras(bad)


ALIGNMENT = 256  # of a field in a blob

ANSWER = ("--max-tokens", "12", "--temperature", "0", "--device", "cpu", "--context", "128")


@pytest.fixture(scope="module")
def expected():
    with exl.load(STORIES, "cpu", context=128) as llm:
        plain = llm.generate("Once upon a time", 12).text
    with exl.load(STORIES, "cpu", context=128, lora=TRAINED) as llm:
        adapted = llm.generate("Once upon a time", 12).text
    assert plain != adapted
    return adapted


def test_generate(expected):
    done = run_exl("generate", STORIES, "Once upon a time", "--lora", TRAINED, *ANSWER)
    assert done.stdout == f"Once upon a time{expected}\n" or done.stdout == f"{expected}\n"


def test_chat():
    done = [
        run_exl("chat", STORIES, *more, *ANSWER, stdin="Tell me of a dog.\n").stdout
        for more in ((), ("--lora", TRAINED))
    ]
    assert all(done)
    assert done[0] != done[1]
    refused = run_exl("chat", "--url", "http://127.0.0.1:9", "--lora", TRAINED)
    assert "--lora: found it with --url" in refused.stderr


def test_plan():
    done = run_exl("plan", STORIES, "--lora", f"poems={TRAINED}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("adapters")]
    assert line.split()[-1] == "poems"


def test_eval(tmp_path):
    """The adapter is the model's alone, unless the reference has it, too."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog who liked to run in the park.\n" * 3)
    with exl.load(STORIES, "cpu", context=128, kv_cache="f32", lora=TRAINED) as llm:
        expected = evaluate(llm, read_passages(text, llm.tokenizer, "auto", 128)).loss
    args = (STORIES, "--text", text, "--window", "128", "--device", "cpu", "--kv-cache", "f32", "--json")
    both = ("--lora", TRAINED, "--against", STORIES)
    plain, adapted, same = (
        json.loads(run_exl("eval", *args, *more).stdout)
        for more in ((), both, (*both, "--against-option", f"lora={TRAINED}"))
    )
    assert adapted["loss"] == pytest.approx(expected, rel=1e-6)
    assert adapted["reference_loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert abs(adapted["loss"] - plain["loss"]) > 1e-3
    assert adapted["kl_mean"] > 1e-3
    assert same["kl_mean"] == pytest.approx(0, abs=1e-9)


def test_bench():
    """Rows say which adapter was measured."""
    args = (STORIES, "--pp", "8", "--tg", "8", "--repeats", "1", "--device", "cpu", "--output", "json")
    done = run_exl("bench", *args, "--lora", TRAINED)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert [row["model"] for row in rows] == [f"{STORIES.name} + {TRAINED.name}"] * 2
    at_once = run_exl("bench", *args, "--lora", TRAINED, "--concurrency", "2")
    (row,) = json.loads(at_once.stdout)["results"]
    assert row["model"] == f"{STORIES.name} + {TRAINED.name}"


def test_bytes_of_an_adapter_are_read_with_the_weights():
    options = EngineOptions(device="cpu", context=64)
    with_it = replace(options, lora={"trained": TRAINED})
    plain, adapted = (run_bench(STORIES, some, 0, 8, repeats=1).results[0].bytes_a_token for some in (options, with_it))
    sizes = [tensor.nbytes for tensor in load_file(TRAINED / "adapter_model.safetensors").values()]
    assert sum(sizes) <= adapted - plain < sum(sizes) + ALIGNMENT * len(sizes)


def test_a_folder_that_is_none():
    done = run_exl("generate", STORIES, "x", "--lora", STORIES)
    assert done.returncode
    assert "adapter_config.json: cannot be read" in done.stderr
