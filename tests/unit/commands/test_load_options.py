"""How a model is loaded is asked for in the same words by every command that loads one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exl.commands.evaluate import with_options
from exl.commands.options import LoadOptions
from exl.errors import ConfigError
from tests.command_line import run_exl

DATA = Path(__file__).parents[2] / "data"
STORIES = DATA / "stories260K"
CPU = ("--device", "cpu", "--context", "128")


@pytest.mark.parametrize("name", ["head", "dense"])
def test_rounding_is_one_of_three(name):
    assert [LoadOptions(**{name: text}).engine()[name] for text in ("file", "8", "4")] == ["file", 8, 4]
    for text in ("5", "\u00b2", "", "file8"):
        with pytest.raises(ConfigError, match=f"{name}: found '{text}', expected file, 8 or 4"):
            LoadOptions(**{name: text}).engine()


def test_eval_measures_what_is_rounded(tmp_path):
    """Four bits for the layers of a dense model: further from it than eight, and at no distance from itself."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog who liked to run in the park.\n" * 3)
    args = ("eval", STORIES, "--text", text, "--device", "cpu", "--window", "128", "--against", STORIES, "--json")
    found = {
        label: json.loads(run_exl(*args, *more).stdout)["kl_mean"]
        for label, more in {
            "8": ("--dense", "8", "--against-option", "dense=file"),
            "4": ("--dense", "4", "--against-option", "dense=file"),
            "4, both": ("--dense", "4"),
            "4, head": ("--head", "4", "--against-option", "head=file"),
        }.items()
    }
    assert found["4, both"] == pytest.approx(0, abs=1e-9)
    assert 0 < 10 * found["8"] < found["4"]
    assert found["4, head"] > found["8"]


def test_options_of_the_reference():
    loading = LoadOptions(dense="4", threads=1)
    found, lora = with_options(loading, ["window-cache=false", "lora=a", "threads=2"])
    assert (found.window_cache, found.threads, found.dense, lora) == (False, 2, "4", "a")
    with pytest.raises(ConfigError, match="--against-option: window-cache: found 'no', expected true or false"):
        with_options(loading, ["window-cache=no"])


def test_a_chat_elsewhere_has_no_say_in_it():
    refused = run_exl("chat", "--url", "http://127.0.0.1:9", "--dense", "8")
    assert "--dense: found it with --url" in refused.stderr
    wrong = run_exl("generate", STORIES, "x", *CPU, "--dense", "3")
    assert wrong.stderr == "exl: error: dense: found '3', expected file, 8 or 4\n"
