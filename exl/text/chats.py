"""Files of chats: JSON Lines, a chat per line, as datasets and fine-tuning tools write them.

{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How are you?"}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from exl.checkpoint.header import shown
from exl.errors import ConfigError
from exl.text.tokenizer import Tokenizer
from exl.user_text import read_lines

DOCUMENTS = ("auto", "lines", "packed", "whole", "chats")


def resolve_documents(documents: str, path: str | Path) -> str:
    """What a text file holds if the user did not say it ("auto"): chats in a ``.jsonl`` file, else "lines"."""
    if documents != "auto":
        return documents
    return "chats" if Path(path).suffix.lower() == ".jsonl" else "lines"


def read_chats(path: str | Path, tokenizer: Tokenizer, source: str) -> Iterator[list[int]]:
    """Token ids of each chat, as the model's chat template renders it, without a prompt for a further answer.

    The template's control tokens become control tokens, and nothing in a message does. Read line by line; empty lines
    are skipped. A chat may have ``tools`` beside its ``messages``; other keys are ignored. ``source`` is the name of
    the option, for errors. Raises ``ConfigError`` that names the line.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(f"{source}: {path}: holds chats, and the model has no chat template to render them with")
    for number, line in enumerate(read_lines(path, f"{source}: {path}"), 1):
        if line.strip():
            yield _encode(line, tokenizer, f"{source}: {path}, line {number}")


def _encode(line: str, tokenizer: Tokenizer, where: str) -> list[int]:
    try:
        chat = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(chat, dict) or not isinstance(chat.get("messages"), list) or not chat["messages"]:
        raise ConfigError(f'{where}: found {shown(line.strip())}, expected {{"messages": [...]}}')
    try:
        return tokenizer.encode_chat(chat["messages"], add_generation_prompt=False, tools=chat.get("tools"))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
