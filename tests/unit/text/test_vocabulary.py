"""Two tokenizers with one vocabulary, and some that differ in one place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from exl.errors import ConfigError
from exl.text.tokenizer import Tokenizer
from exl.text.vocabulary import check_same_vocabulary

DATA = Path(__file__).parents[2] / "data"


def changed(tmp_path: Path, change) -> Tokenizer:
    """Without the other files, which would name the special tokens once more."""
    described = json.loads((DATA / "stories260K" / "tokenizer.json").read_text(encoding="utf-8"))
    change(described)
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    return Tokenizer.from_folder(tmp_path)


@pytest.fixture(scope="module")
def target() -> Tokenizer:
    return Tokenizer.from_folder(DATA / "stories2M")


def test_one_vocabulary(target):
    check_same_vocabulary(target, Tokenizer.from_folder(DATA / "stories260K"))


def test_spelling_may_differ(target, tmp_path):
    """Other merges and another template: the ids mean the same bytes."""
    check_same_vocabulary(target, changed(tmp_path, lambda described: described["model"].update(merges=[])))


def swap(described) -> None:
    vocab = described["model"]["vocab"]
    names = {token_id: token for token, token_id in vocab.items()}
    vocab[names[300]], vocab[names[400]] = 400, 300


def one_more(described) -> None:
    described["model"]["vocab"]["abcabc"] = 512


def plain_bos(described) -> None:
    for token in described["added_tokens"]:
        if token["id"] == 1:
            token["special"] = False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap, "token id 300 is the token b'"),
        (one_more, "token id 512 is the token b'abcabc' there, and no token in the model"),
        (plain_bos, "token id 1 is the token b'<s>' there, and the special token b'<s>' in the model"),
    ],
)
def test_the_first_differing_id_is_named(target, tmp_path, change, said):
    other = changed(tmp_path, change)
    with pytest.raises(ConfigError, match="draft model: found another vocabulary.*" + re.escape(said)):
        check_same_vocabulary(target, other)


def test_tokens_that_only_the_model_has_are_found_too(target, tmp_path):
    other = changed(tmp_path, one_more)
    with pytest.raises(ConfigError, match=r"token id 512 is no token there, and the token b'abcabc' in the model"):
        check_same_vocabulary(other, target)
