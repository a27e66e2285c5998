"""The same text as different editors and shells save it is the same text, wherever exl reads one."""

from __future__ import annotations

import codecs
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import exl
from exl.chat import Chat
from exl.checkpoint.generation_config import GenerationDefaults
from exl.errors import CheckpointError, ConfigError, ExlError
from exl.evaluate import read_documents
from exl.families.config import ModelConfig
from exl.quantize.calibration import read_calibration
from exl.text.tokenizer import Tokenizer
from tests.command_line import run_exl

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
TEXT = "Once upon a time there was a dog.\nHe was happy and big.\n\nThe end of the day, he said.\n" * 8
SAVED = {
    "a byte order mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "Windows line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "both": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "old Mac line ends": lambda text: text.replace("\n", "\r").encode(),
}
TEMPLATE = """{% for m in messages %}
{{ m.role }}:

{{ m.content }}</s>
{% endfor %}
{% if add_generation_prompt %}
assistant:
{% endif %}
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(STORIES)


@pytest.fixture(params=SAVED)
def save(request, tmp_path):
    """Writes one text plainly and as the parameter says; returns both paths."""

    def write(text: str) -> tuple[Path, Path]:
        plain, other = tmp_path / "plain.txt", tmp_path / "other.txt"
        plain.write_bytes(text.encode())
        other.write_bytes(SAVED[request.param](text))
        return plain, other

    return write


@pytest.mark.parametrize("documents", ["lines", "whole"])
def test_text_to_evaluate(save, tokenizer, documents):
    plain, other = (read_documents(path, tokenizer, documents) for path in save(TEXT))
    assert other == plain


@pytest.mark.parametrize("documents", ["lines", "packed", "whole"])
def test_calibration(save, tokenizer, documents):
    plain, other = (read_calibration(path, tokenizer, 4, 16, documents) for path in save(TEXT))
    assert len(plain) >= 4
    assert all(map(np.array_equal, plain, other))
    assert len(other) == len(plain)


def test_both_kinds_of_text_have_the_same_lines(tmp_path, tokenizer):
    """A form feed or a Unicode line separator ends no line, as in Python's text files."""
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time\x0cthere was\u2028a dog, big and happy.\n", encoding="utf-8")
    (evaluated,) = read_documents(path, tokenizer)
    (calibrated,) = read_calibration(path, tokenizer, 1, len(evaluated), "lines")
    assert evaluated == calibrated.tolist()


@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_prompt_on_standard_input(save, ending):
    def told(stdin: bytes) -> dict:
        done = run_exl("generate", "-", "--model", STORIES, "--max-tokens", "4", "--json", stdin=stdin)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    plain, other = (told(path.read_bytes()) for path in save("One day,\nTom and Lily" + ending))
    assert plain["prompt"] == other["prompt"] == "One day,\nTom and Lily"
    assert other["text"] == plain["text"]


def test_messages_on_standard_input(save):
    def told(stdin: bytes) -> str:
        done = run_exl("chat", "--model", STORIES, "--max-tokens", "4", stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    plain, other = (told(path.read_bytes()) for path in save("/set temperature 0\nOne day\nTwo days\n"))
    assert other == plain
    assert plain.count("\n") >= 2


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_of_a_model(save, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    _, other = save((folder / name).read_text(encoding="utf-8"))
    shutil.copy(other, folder / name)
    assert ModelConfig.from_folder(folder) == ModelConfig.from_folder(STORIES)
    assert GenerationDefaults.from_folder(folder) == GenerationDefaults.from_folder(STORIES)
    ours, theirs = Tokenizer.from_folder(folder), Tokenizer.from_folder(STORIES)
    assert (ours.encode(TEXT), ours.eos_ids) == (theirs.encode(TEXT), theirs.eos_ids)


@pytest.mark.parametrize("place", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_chat_templates(save, tmp_path, place):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Tom"}]
    prompts = []
    for path in save(TEMPLATE):
        folder = tmp_path / path.stem
        shutil.copytree(STORIES, folder)
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / place)
        prompts.append(Tokenizer.from_folder(folder).chat_template.render(messages))
    assert prompts[0] == prompts[1] == "user:\n\nHello</s>\nassistant:\n\nTom</s>\nassistant:\n"


def test_saved_chats(save, tmp_path):
    with exl.load(STORIES) as llm:
        chat = llm.chat("You are brief.")
        chat.add("user", "Hello,\r\nyou")
        chat.save(tmp_path / "chat.json")
        _, other = save((tmp_path / "chat.json").read_text(encoding="utf-8"))
        loaded = Chat.load(llm, other)
        assert (loaded.system, loaded.messages) == (chat.system, chat.messages)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be-bom", "utf-32"])
def test_another_encoding_is_one_clear_error(tmp_path, tokenizer, encoding):
    """Each names what it found and what to do."""
    name = encoding[:6].upper()

    def encoded(text: str) -> bytes:
        return codecs.BOM_UTF16_BE + text.encode("utf-16-be") if "be" in encoding else text.encode(encoding)

    path = tmp_path / "text.txt"
    path.write_bytes(encoded(TEXT))
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    (folder / "chat_template.jinja").write_bytes(encoded(TEMPLATE))
    (folder / "config.json").write_bytes(encoded("{}"))
    with exl.load(STORIES) as llm:
        for read in (
            lambda: read_documents(path, tokenizer),
            lambda: read_calibration(path, tokenizer, 4, 16, "lines"),
            lambda: read_calibration(path, tokenizer, 4, 16, "whole"),
            lambda: Tokenizer.from_folder(folder),
            lambda: ModelConfig.from_folder(folder),
            lambda: Chat.load(llm, path),
        ):
            with pytest.raises(ConfigError, match=rf"byte order mark of {name}; save the text as UTF-8"):
                read()
    for command in ("generate", "chat"):
        args = ["-"] if command == "generate" else []
        done = run_exl(command, *args, "--model", STORIES, stdin=encoded(TEXT))
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("exl: error: standard input: not UTF-8: found the byte order")
    (folder / "tokenizer.json").write_bytes(encoded("{}"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(folder)


def test_files_that_are_no_files(tmp_path, tokenizer):
    for path in (tmp_path, tmp_path / "nowhere", "a\0b"):
        for read in (read_documents, lambda path, t: read_calibration(path, t, 4, 16, "lines")):
            with pytest.raises(ExlError, match="cannot be read"):
                read(path, tokenizer)
