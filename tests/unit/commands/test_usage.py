"""What was typed is judged: models as arguments, numbers, unknown words, help."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import pexpect
import pytest
import typer

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.cli import app
from exl.commands.options import parameter_hints
from tests.command_line import run_exl

STORIES = str(Path(__file__).parents[2] / "data" / "stories260K")
COMMANDS = ["generate", "chat", "info", "plan", "quantize", "eval", "bench", "serve", "packed"]


def error_of(*args: str) -> str:
    done = run_exl(*args)
    assert (done.returncode, done.stdout) == (1, ""), args
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("exl: error: ").rstrip("\n")


def test_hints_as_python_3_10_gives_them():
    """It wraps an annotation in ``Optional`` if the parameter's default is None."""
    argument = Annotated[str | None, typer.Argument(metavar="MODEL")]

    def command(model=None, count=1, plain=None) -> None: ...

    command.__annotations__ = {"model": Optional[argument], "count": Annotated[int, "n"], "plain": str | None}  # noqa: UP045
    assert parameter_hints(command) == {"model": argument, "count": Annotated[int, "n"], "plain": str | None}


# ---- models


def test_a_model_is_an_argument_or_an_option(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog.\n")
    for command, more in (
        ("plan", []),
        ("info", ["--json"]),
        ("eval", ["--text", str(text), "--json"]),
        ("chat", ["--max-tokens", "4"]),
        ("bench", ["--pp", "0", "--tg", "0", "--output", "csv"]),
    ):
        shown = [run_exl(command, *model, *more) for model in ([STORIES], ["--model", STORIES], ["-m", STORIES], [])]
        assert [done.returncode for done in shown] == [0] * 4, shown
        assert shown[0].stdout == shown[1].stdout == shown[2].stdout
        if command in ("plan", "info", "eval"):
            assert shown[0].stdout != shown[3].stdout  # the bundled model is another one
        found = error_of(command, "one/model", "--model", "other/model", *more)
        assert found == "model: found 'one/model' as an argument and 'other/model' after --model, expected one"


def test_generate_takes_a_prompt_or_a_model_and_a_prompt():
    options = ["--max-tokens", "12", "--temperature", "0"]
    expected = ", there was a little girl named Lily. She\n"
    for args in ([STORIES, "Once upon a time"], ["Once upon a time", "-m", STORIES]):
        assert run_exl("generate", *args, *options).stdout == expected
    assert "expected one" in error_of("generate", STORIES, "Once", "--model", STORIES)
    assert "MODEL PROMPT" in error_of("generate", STORIES)
    assert run_exl("generate", ".", "--max-tokens", "1").returncode == 0  # a folder, but no model
    told = error_of("generate", "Once", "upon", "a", "time")
    assert told == (
        "exl generate: found more arguments than it takes: a time; put quotes around a text of several words"
    )


# ---- numbers


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["generate", "--max-tokens", "1e3"], "--max-tokens: found '1e3', expected a whole number, such as 1000"),
        (["generate", "--max-tokens", "1_000"], "--max-tokens: found '1_000', expected a whole number, such as 1000"),
        (["chat", "--max-tokens", "many"], "--max-tokens: found 'many', expected a whole number, such as 1000"),
        (["chat", "--temperature", "0,8"], "--temperature: found '0,8', expected a number, such as 0.8"),
        (["generate", "--top-k", "1.5"], "--top-k: found '1.5', expected a whole number, such as 1000"),
        (["generate", "--typical-p", "all"], "--typical-p: found 'all', expected a number, such as 0.8"),
        (["generate", "--banned-tokens", "5;6"], "--banned-tokens: found '5;6', expected token ids, such as 5,17"),
        (
            ["chat", "--logit-bias", "5:2"],
            "--logit-bias: found '5:2', expected token ids and biases, such as 5=-2,17=0.5",
        ),
        (["bench", "--pp", ""], "--pp: found '', expected a whole number, such as 1000"),
        (["plan", "--max-sequences", "two"], "--max-sequences: found 'two', expected a whole number, such as 1000"),
        (["quantize", "a", "b", "--damp", "x"], "--damp: found 'x', expected a number, such as 0.8"),
        (["eval", "--text", "x", "--window", "5k"], "--window: found '5k', expected a whole number, such as 1000"),
        (["generate", "--seed", "x" * 99], f"--seed: found '{'x' * 60}...', expected a whole number, such as 1000"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_is_no_number_is_shown_as_it_was_typed(args, told):
    assert error_of(*args) == told


@pytest.mark.parametrize(
    ("option", "typed"),
    [("--seed", "-1"), ("--seed", "18446744073709551616"), ("--temperature", "nan"), ("--max-tokens", "-5")],
)
def test_a_number_out_of_range_is_shown(option, typed):
    told = error_of("generate", option, typed)
    assert f"found {typed}" in told
    assert told.startswith(option.strip("-").replace("-", "_"))


def test_a_seed_of_19_digits_is_kept():
    seed = "1234567890123456789"
    assert f"seed {seed})" in run_exl("generate", "--max-tokens", "1", "--seed", seed).stderr


# ---- unknown words


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["generate", "--max-token", "5"], "--max-token: no such option of exl generate: did you mean --max-tokens"),
        (
            ["generate", "--temprature", "5"],
            "--temprature: no such option of exl generate: did you mean --temperature",
        ),
        (["chat", "--sys", "x"], "--sys: no such option of exl chat: did you mean --system?"),
        (["plan", "--xyzzy"], "--xyzzy: no such option of exl plan; exl plan --help shows them"),
        (["--model", "x"], "--model: no such option of exl; options follow the command: exl generate --model ..."),
        (["generat"], "generat: no such command: did you mean generate?"),
        (["xyzzy"], "xyzzy: no such command; exl --help shows them"),
        (["packed", "lst"], "lst: no such command: did you mean list?"),
        (["packed", "list", "--foldr"], "--foldr: no such option of exl packed list: did you mean --folder?"),
        (["quantize"], "Missing argument 'SRC'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_words_say_what_was_meant(args, told):
    assert error_of(*args).startswith(told)


# ---- help


def test_version():
    done = run_exl("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"exl {exl.__version__}\n", "")


@pytest.mark.parametrize("args", [(), ("packed",)])
def test_without_a_command_the_help_is_the_answer(args):
    bare, asked = run_exl(*args), run_exl(*args, "--help")
    assert (bare.returncode, bare.stderr) == (asked.returncode, asked.stderr) == (0, "")
    assert bare.stdout == asked.stdout
    assert "Commands:" in bare.stdout


@pytest.mark.parametrize("columns", [80, 60])
def test_help_fits_the_terminal(columns, monkeypatch):
    """No line is longer than the terminal, none is cut, and every option is explained."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in [[], *([name] for name in COMMANDS), ["packed", "clear"]]:
        shown = run_exl(*command, "--help").stdout
        examples = re.search(r"^  Examples:\n((?:    .*\n)+)", shown, re.MULTILINE)
        for line in shown.splitlines():
            assert len(line) <= (79 if examples and line in examples[1] else columns), line  # examples are to be copied
            assert not line.endswith("...") or line.startswith("Usage:"), line
        assert shown.startswith("Usage: exl " + " ".join(command))
        _, _, options = shown.partition("\nOptions:\n")
        entries = re.split(r"^  (?=-)", options.partition("\n\n")[0], flags=re.MULTILINE)[1:]
        assert len(entries) >= 1 + (command not in ([], ["packed"]))
        for entry in entries:
            assert re.search(r"(  |\n)\s*\w", entry), entry


def test_help_in_a_terminal():
    child = pexpect.spawn(
        sys.executable,
        ["-m", "exl.cli", "generate", "-h"],
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"},
        encoding="utf-8",
        timeout=60,
        dimensions=(60, 60),
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Usage: exl generate [OPTIONS] [MODEL] [PROMPT]\r\n" in child.before
    assert max(map(len, child.before.splitlines())) <= 76  # the examples'
    assert "\x1b" not in child.before


def test_examples_in_the_help_are_right(tmp_path, monkeypatch):
    """Each is typed as the help has it, with real models in the placeholders' places."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name in ("model", "quantized"):
        (tmp_path / "path" / "to" / name).symlink_to(BUNDLED_MODEL)
    for name in ("original", "dense"):
        (tmp_path / "path" / "to" / name).symlink_to(STORIES)
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog.\n" * 40)
    monkeypatch.chdir(tmp_path)
    examples = []
    for command in COMMANDS[:-1]:
        block = re.search(r"^  Examples:\n((?:    .*\n)+)", run_exl(command, "--help").stdout, re.MULTILINE)
        assert block is not None, command
        examples += re.sub(r" \\\n +", " ", block[1]).splitlines()
    assert len(examples) >= 12
    for example in (line.strip() for line in examples):
        # A repository; minutes; a server, and a chat with one: all have tests of their own.
        if any(word in example for word in ("owner/name", "bench", "exl serve", "--url")):
            continue
        spoken, _, command = example.rpartition(" | ")
        words = shlex.split(command)
        assert words[0] == "exl"
        if words[1] == "quantize":  # the example's own settings are for larger models
            words = [*words, "--num-samples", "2", "--seq-len", "32", "--group-size", "32"]
        done = run_exl(*words[1:], stdin="\n".join(shlex.split(spoken)[1:]) + "\n")
        assert done.returncode == 0, (example, done.stderr)
        assert done.stdout or words[1] in ("quantize", "chat"), example


def test_every_command_is_in_the_help():
    listed = [command.name for command in app.registered_commands] + [group.name for group in app.registered_groups]
    assert sorted(listed) == sorted(COMMANDS)
