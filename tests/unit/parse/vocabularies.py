"""Small tokenizers that have the same tags in different ways, and answers as their token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from exl.parse import formats
from exl.parse.choose import AnswerFormat
from exl.parse.formats import REASONING_FORMATS, TOOL_FORMATS
from exl.parse.harmony import TAGS as HARMONY_TAGS
from exl.text.tokenizer import Tokenizer

STORIES = Path(__file__).parents[2] / "data" / "stories260K"
REASONING_OF = {"seed": "seed", "command": "command", "gemma4": "gemma4", "mistral": "mistral"}  # else "think"
KINDS = ("special", "added", "pieces", "bytes")


@dataclass(frozen=True)
class Spelled:
    """A tag as a text has it that speaks about it: in pieces, never as a token."""

    text: str


Piece = str | Spelled


def byte_level(merges_from: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Byte-level BPE: each byte is a token; with texts, some pieces of these, too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges_from)
    backend.decoder = decoders.ByteLevel()
    if merges_from:
        trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(merges_from, trainer)
    return backend


_MERGED = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>' * 3,
    "</think>\n\n<think>\nok</think>" * 3,
    "<function=f>\n<parameter=a>\n</parameter>\n</function>" * 3,
    "[TOOL_CALLS]f[ARGS]{}" * 2,
)


@cache
def tokenizer(kind: str, tags: tuple[str, ...] = ()) -> Tokenizer:
    """``special``, ``added``: the tags are tokens, special or not, and other text is bytes. ``pieces``: they are text,
    and tokens go across their borders. ``bytes``: all is bytes."""
    backend = byte_level(_MERGED if kind == "pieces" else ())
    backend.add_special_tokens([AddedToken("<|eos|>", special=True, normalized=False)])
    if kind == "special":
        backend.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in tags])
    elif kind == "added":
        backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return Tokenizer(backend, names={"eos_token": "<|eos|>"}, source=kind)


def tags_of(form: AnswerFormat) -> tuple[str, ...]:
    if form.tools == "harmony":
        return HARMONY_TAGS
    return formats.tags_of(TOOL_FORMATS.get(form.tools), REASONING_FORMATS.get(form.reasoning))


def vocabulary_of(form: AnswerFormat, kind: str) -> Tokenizer:
    """``tokenizer`` with the tags of a format, save ``>`` and ``">``, which no vocabulary has as added tokens."""
    return tokenizer(kind, tuple(tag for tag in tags_of(form) if len(tag) > 2))


@cache
def stories() -> Tokenizer:
    """SentencePiece with byte fallback, 512 pieces: what the bundled model has."""
    return Tokenizer.from_folder(STORIES)


def ids_of(vocabulary: Tokenizer, answer: Sequence[Piece] | str) -> list[int]:
    ids: list[int] = []
    for piece in (answer,) if isinstance(answer, str) else answer:
        if isinstance(piece, str):
            ids += vocabulary.encode(piece, bos=False, special=True)
        else:
            ids += [token_id for char in piece.text for token_id in vocabulary.encode(char, bos=False, special=True)]
    return ids
