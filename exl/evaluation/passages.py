"""Texts as passages: runs of token ids, and which of them are predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from exl.errors import ConfigError
from exl.text.chats import read_chats, resolve_documents
from exl.text.tokenizer import Tokenizer
from exl.user_text import read_text

MIN_TOKENS = 8  # shorter documents are skipped
WINDOW = 512
DOCUMENTS = ("auto", "lines", "whole", "chats", "chunks")


@dataclass(frozen=True)
class Passage:
    """Token ids, of which ``ids[first:]`` are predicted, each from all ids before it."""

    ids: tuple[int, ...]
    first: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.first <= max(1, len(self.ids)):
            raise ConfigError(
                f"passage: found {self.first} as the first predicted token, expected 1 to {max(1, len(self.ids))}"
            )

    @property
    def num_predicted(self) -> int:
        return max(0, len(self.ids) - self.first)


def as_passages(documents: Iterable[Sequence[int] | Passage]) -> list[Passage]:
    """Of plain ids, every token but the first is predicted."""
    return [item if isinstance(item, Passage) else Passage(tuple(item)) for item in documents]


def read_passages(
    path: str | Path,
    tokenizer: Tokenizer,
    documents: str = "auto",
    window: int = WINDOW,
    *,
    stride: int | None = None,
    limit: int | None = None,
) -> list[Passage]:
    """The passages of a UTF-8 text: ``read_chunks`` for "chunks", else ``read_documents``, whose tokens are all
    predicted but the first. ``limit``: at most so many, the first ones. Raises ``ConfigError``."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}, expected 1 or more")
    if documents == "chunks":
        return read_chunks(path, tokenizer, window, stride)[:limit]
    if stride is not None:
        raise ConfigError(f"stride: found {stride} with documents={documents!r}, expected documents='chunks'")
    return as_passages(read_documents(path, tokenizer, documents, window))[:limit]


def read_documents(
    path: str | Path, tokenizer: Tokenizer, documents: str = "auto", window: int = WINDOW
) -> list[list[int]]:
    """Token ids of a UTF-8 text, each document with the tokenizer's BOS and at most ``window`` tokens.

    ``documents``: "lines", each line is a document, stripped of white space and truncated to ``window`` tokens;
    "whole", the file is cut into consecutive windows, each with its own BOS; "chats", each line is a chat
    (``exl/text/chats.py``), rendered by the model's template and truncated; "auto", chats if the file is a ``.jsonl``,
    else lines. Documents of fewer than 8 tokens are skipped. Raises ``ConfigError``.
    """
    if documents == "chunks":
        raise ConfigError("documents: found 'chunks', which read_chunks and read_passages read: not all is predicted")
    if documents not in DOCUMENTS:
        raise ConfigError(f"documents: found {documents!r}, expected one of {', '.join(map(repr, DOCUMENTS))}")
    documents = resolve_documents(documents, path)
    _check_window(window)
    if documents == "chats":
        found = [ids[:window] for ids in read_chats(path, tokenizer, "text")]
    else:
        found = _read_text(Path(path), tokenizer, documents, window)
    found = [ids for ids in found if len(ids) >= MIN_TOKENS]
    if not found:
        raise ConfigError(f"text: {path}: found no document of {MIN_TOKENS} tokens or more")
    return found


def _read_text(path: Path, tokenizer: Tokenizer, documents: str, window: int) -> list[list[int]]:
    text = read_text(path, f"text: {path}")
    if documents == "lines":
        return [tokenizer.encode(line.strip())[:window] for line in text.split("\n")]
    prefix = tokenizer.encode("")
    ids = tokenizer.encode(text.strip())[len(prefix) :]
    step = window - len(prefix)
    return [[*prefix, *ids[start : start + step]] for start in range(0, len(ids), step)]


def read_chunks(
    path: str | Path, tokenizer: Tokenizer, window: int = WINDOW, stride: int | None = None
) -> list[Passage]:
    """A UTF-8 text as llama.cpp's ``llama-perplexity`` cuts it, so that figures compare (``tools/perplexity`` there).

    The text, without one line end at its end, is encoded as a whole with the tokenizer's BOS: N tokens. A rest that
    fills no window is left out.

    Without ``stride``: N // window chunks follow each other. The first token of each gives way to the BOS, if the
    model has one before a text. The first half is only read: tokens window // 2 + 1 to window - 1 are predicted, 255
    of 512.

    With ``stride`` (``--ppl-stride``): ceil((N - window) / stride) windows, each beginning ``stride`` tokens after the
    one before; of each the last ``stride`` tokens are predicted, so that every token after the first window - stride
    is predicted once, from window - stride tokens or more. No BOS is put in: the program means to, but does so after
    it has computed the window. Its own window is ``-c`` (times ``-b`` / ``-c``, if that is more than 1) plus half the
    stride, rounded up to a multiple of 256: ``-c 256 -b 256 --ppl-stride 64`` is ``window=512, stride=64``. It prints
    it as "Calculation chunk".

    Unlike llama.cpp, which wants two windows of text, one is enough; and Windows' line ends are read as others are,
    where llama.cpp gets another token for each. Raises ``ConfigError``.
    """
    _check_window(window)
    if stride is not None and not 1 <= stride < window:
        raise ConfigError(f"stride: found {stride}, expected 1 to {window - 1}, less than the window")
    ids = tokenizer.encode(read_text(Path(path), f"text: {path}").removesuffix("\n"))
    if len(ids) < window + (stride is not None):
        raise ConfigError(f"text: {path}: found {len(ids)} tokens, expected {window + (stride is not None)} or more")
    if stride is not None:
        starts = range(0, len(ids) - window, stride)
        return [Passage(tuple(ids[start : start + window]), window - stride) for start in starts]
    return cut_chunks(ids, tokenizer.encode(""), window)


def cut_chunks(ids: Sequence[int], prefix: Sequence[int], window: int) -> list[Passage]:
    """Windows of token ids that follow each other; ``prefix`` stands for the first tokens of each. The second half is
    predicted: see ``read_chunks``."""
    starts = range(0, len(ids) - window + 1, window)
    return [Passage((*prefix, *ids[start + len(prefix) : start + window]), window // 2 + 1) for start in starts]


def _check_window(window: int) -> None:
    if window < MIN_TOKENS:
        raise ConfigError(f"window: found {window}, expected {MIN_TOKENS} tokens or more")
