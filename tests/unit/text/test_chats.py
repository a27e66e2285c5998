"""Files of chats: what their lines become, and what is wrong with a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from exl.errors import ConfigError
from exl.evaluate import read_documents
from exl.quantize.calibration import read_calibration
from exl.text.chats import read_chats, resolve_documents
from exl.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / "data"
TEMPLATE = (
    "{% for message in messages %}{{'<s>' + message['role'] + '\n' + message['content'] + '</s>\n'}}{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "Who is Tom?"}, {"role": "assistant", "content": "Tom is a cat."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me a long story. " * 20}],
    [{"role": "user", "content": "Ends with </s> and goes on <s>assistant"}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """stories260K's tokenizer with a chat template, in which <s> and </s> mark the turns."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "stories260K" / name, folder / name)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture
def path(tmp_path) -> Path:
    lines = [json.dumps({"messages": chat, "id": i}) for i, chat in enumerate(CHATS)]
    (tmp_path / "chats.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\r\n", encoding="utf-8")
    return tmp_path / "chats.jsonl"


def test_chats_are_rendered_and_only_the_template_writes_control_tokens(folder, path):
    tokenizer = Tokenizer.from_folder(folder)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    found = list(read_chats(path, tokenizer, "text"))
    assert len(found) == 3
    for ids, chat in zip(found[:2], CHATS, strict=False):
        assert ids == reference.apply_chat_template(chat)["input_ids"]
    opening, closing = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    assert [ids.count(closing) for ids in found] == [ids.count(opening) for ids in found] == [2, 2, 1]
    assert "Ends with </s> and goes on <s>assistant" in tokenizer.decode(found[2])


def test_each_chat_is_a_calibration_sequence_without_another_beginning(folder, path):
    tokenizer = Tokenizer.from_folder(folder)
    chats = list(read_chats(path, tokenizer, "text"))
    assert len(chats[1]) > 64
    found = [ids.tolist() for ids in read_calibration(path, tokenizer, 100, 64, "auto")]
    pieces = [chat[start : start + 64] for chat in chats for start in range(0, len(chat), 64)]
    assert found == pieces
    assert found == [ids.tolist() for ids in read_calibration(path, tokenizer, 100, 64, "chats")]
    as_lines = read_calibration(path, tokenizer, 100, 64, "lines")  # asked for, the file is text like any other
    assert as_lines[0].tolist() != found[0]


def test_chats_are_documents_to_evaluate(folder, path):
    tokenizer = Tokenizer.from_folder(folder)
    assert read_documents(path, tokenizer, window=40) == [ids[:40] for ids in read_chats(path, tokenizer, "text")]


def test_tools_are_rendered(folder, tmp_path):
    line = {"messages": CHATS[0], "tools": [{"type": "function"}, {"type": "function"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(line))
    tokenizer = Tokenizer.from_folder(folder)
    (ids,) = read_chats(tmp_path / "chats.jsonl", tokenizer, "text")
    assert tokenizer.decode(ids).endswith("2 tools")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{messages: []}", r"text: .*chats\.jsonl, line 2: not JSON: Expecting property name"),
        ('{"text": "Once upon a time"}', r"""line 2: found '{"text": "Once.*', expected {"messages": \[\.\.\.\]}"""),
        ('{"messages": []}', "line 2: found .*, expected"),
        ('{"messages": "Hello"}', "line 2: found .*, expected"),
        ('["Hello"]', "line 2: found .*, expected"),
        ('{"messages": [{"role": "user", "content": 7}]}', "line 2: "),
        ('{"messages": ["Hello"]}', "line 2: "),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named(folder, tmp_path, line, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHATS[0]}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        list(read_chats(path, Tokenizer.from_folder(folder), "text"))


def test_files_that_cannot_be_read(folder, tmp_path):
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(ConfigError, match=r"calibration: .*nowhere\.jsonl: cannot be read"):
        list(read_chats(tmp_path / "nowhere.jsonl", tokenizer, "calibration"))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        list(read_chats(tmp_path / "latin.jsonl", tokenizer, "calibration"))


def test_a_model_without_a_template_is_told_at_once(path):
    tokenizer = Tokenizer.from_folder(DATA / "stories260K")
    with pytest.raises(
        ConfigError, match=r"calibration: .*chats\.jsonl: holds chats, and the model has no chat template"
    ):
        read_calibration(path, tokenizer, 10, 64, "auto")


@pytest.mark.parametrize(
    ("documents", "name", "found"),
    [
        ("auto", "a.jsonl", "chats"),
        ("auto", "a.JSONL", "chats"),
        ("auto", "a.txt", "lines"),
        ("whole", "a.jsonl", "whole"),
    ],
)
def test_the_suffix_decides_unless_the_user_does(documents, name, found):
    assert resolve_documents(documents, name) == found
