"""Which tokens end an answer: every file of a model folder may name one, and each that any file names counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import exl
from tests.command_line import run_exl

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
END = 1  # what the model writes when a story is over
CONFIG = "config.json"
GENERATION = "generation_config.json"
SETTINGS = "tokenizer_config.json"
NAMES = "special_tokens_map.json"
TURNS = "{% for m in messages %}{{ '<0x02>' + m.role + '\n' + m.content + '<|stop|>\n' }}{% endfor %}"


def write_model(tmp_path: Path, name: str, files: dict[str, dict[str, Any] | None]) -> Path:
    """The stories model, whose last token of a story is called ``name`` and is named by no file but ``files``: each
    gets other keys (None: without the key), or is left out if it is None."""
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace('"<s>"', json.dumps(name)), encoding="utf-8")
    bare = {
        CONFIG: {"eos_token_id": None, "bos_token_id": None},
        GENERATION: None,
        SETTINGS: {"eos_token": None, "bos_token": None},
    }
    for file, changes in (bare | files).items():
        path = folder / file
        if changes is None:
            path.unlink()
            continue
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        values = {key: value for key, value in (values | changes).items() if value is not None or file == CONFIG}
        path.write_text(json.dumps(values), encoding="utf-8")
    return folder


def told(folder: Path) -> tuple[str, bool]:
    """How a story ends, and whether the token that ends it is among those that the tokenizer shows."""
    with exl.load(folder, kv_cache="f32") as llm:
        for seed in range(1, 20):  # the first story is over after 53 tokens; torch may round differently
            done = llm.generate("Once", max_tokens=80, temperature=1.0, seed=seed)
            if done.finish_reason == "stop" or END in done.token_ids:
                return done.finish_reason, END in llm.tokenizer.eos_ids
    raise AssertionError("no story of 80 tokens")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("<|stop|>", {CONFIG: {"eos_token_id": END, "bos_token_id": None}, GENERATION: {"eos_token_id": 2}}),
        ("<|stop|>", {CONFIG: {"eos_token_id": [2, END], "bos_token_id": None}}),
        ("<|stop|>", {GENERATION: {"eos_token_id": END}}),
        ("<|stop|>", {SETTINGS: {"eos_token": "<|stop|>", "bos_token": None}}),
        ("<|stop|>", {SETTINGS: {"eos_token": {"content": "<|stop|>"}}, GENERATION: {"eos_token_id": 2}}),
        ("<|stop|>", {NAMES: {"eos_token": "<|stop|>"}, CONFIG: {"eos_token_id": 2, "bos_token_id": None}}),
        ("<|stop|>", {NAMES: {"eos_token": "</s>"}, SETTINGS: {"eos_token": "<|stop|>", "bos_token": None}}),
        ("<|stop|>", {SETTINGS: {"eos_token": "</s>", "bos_token": None, "chat_template": TURNS}}),
        ("<|im_end|>", {CONFIG: {"eos_token_id": 2, "bos_token_id": None}, GENERATION: {"eos_token_id": 2}}),
        ("<|eot_id|>", {}),
    ],
    ids=[
        "config, not generation_config",
        "list in config",
        "generation_config alone",
        "tokenizer_config",
        "tokenizer_config with flags",
        "special_tokens_map",
        "tokenizer_config, not special_tokens_map",
        "chat template alone",
        "name in tokenizer.json, configs with another",
        "name in tokenizer.json alone",
    ],
)  # fmt: skip
def test_each_file_that_names_the_end_is_enough(tmp_path, name, files):
    assert told(write_model(tmp_path, name, files)) == ("stop", True)


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: {"eos_token_id": 2, "bos_token_id": None}},
        {SETTINGS: {"eos_token": "</s>", "bos_token": None, "chat_template": TURNS.replace("<|stop|>", "")}},
        # A turn that ends with nothing: what comes next is the BOS of the turn after it.
        {SETTINGS: {"eos_token": None, "bos_token": "<|stop|>", "chat_template": TURNS.replace("<0x02>", "<|stop|>")}},
    ],
    ids=["nowhere", "template without an end", "BOS"],
)
def test_what_no_file_calls_an_end_is_none(tmp_path, files):
    assert told(write_model(tmp_path, "<|stop|>", files)) == ("length", False)


def test_chat_and_command_line_stop_there_too(tmp_path):
    folder = write_model(tmp_path, "<|stop|>", {SETTINGS: {"eos_token": "</s>", "chat_template": TURNS}})
    with exl.load(folder) as llm:
        answers = (llm.chat().send("Once", max_tokens=400, temperature=1.0, seed=seed) for seed in range(1, 9))
        answer = next(answer for answer in answers if answer.finish_reason == "stop")
    assert "<|stop|>" not in answer.text
    asked = ("Once", "--max-tokens", "400", "--temperature", "1", "--kv-cache", "f32", "--json", "--model", folder)
    assert "stop" in {
        json.loads(run_exl("generate", *asked, "--seed", seed).stdout)["finish_reason"] for seed in (1, 2)
    }
