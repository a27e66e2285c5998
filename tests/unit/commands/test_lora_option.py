"""``--lora``: of one answer, of a chat, of a plan and of a server."""

from __future__ import annotations

from pathlib import Path

import pytest

import exl
from exl.commands.options import parse_loras
from exl.errors import ConfigError
from tests.command_line import run_exl

DATA = Path(__file__).parents[2] / "data"
STORIES, TRAINED = DATA / "stories260K", DATA / "adapter"


def test_names_and_folders():
    assert parse_loras(None) is None
    assert parse_loras(["poems=a/b", "c/d"]) == {"poems": "a/b", "d": "c/d"}
    for bad in (["a=x", "a=y"], ["=x"], ["a="]):
        with pytest.raises(ConfigError, match=r"--lora: found '.*', expected NAME=FOLDER, each with a name of its own"):
            parse_loras(bad)


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


def test_a_folder_that_is_none():
    done = run_exl("generate", STORIES, "x", "--lora", STORIES)
    assert done.returncode
    assert "adapter_config.json: cannot be read" in done.stderr
