"""A tokenizer whose tokens are letters, so that a test can count."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from exl.text.tokenizer import Tokenizer

BOS = 0


def letters(bos: bool = False) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["<s>", *"abcdefghijklmnopqrstuvwxyz", "\n"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, prefix_ids=[BOS] if bos else [], bos_id=BOS)
