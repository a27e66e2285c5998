"""Model folders with tokenizers for tests: the bundled SentencePiece-style one, and a byte-level BPE trained here."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

STORIES = Path(__file__).parents[2] / "data" / "stories260K"
CORPUS = (
    "Once upon a time there was a little girl who lived near the woods, and she had a red balloon. " * 3
    + "The quick brown fox jumps over the lazy dog; 0123456789 (and) [so] {on}... it's, we're, I'll. "
    + "def main(args):\n    return [x ** 2 for x in range(10)]\n\n\tprint('hello world')\n"
    + "你好、世界。你好吗。我很好。 こんにちは世界。 안녕하세요 세계. Привет, мир! Größe, naïve café. नमस्ते दुनिया "
    + "👍🏽 🎉🎉 👨\u200d👩\u200d👧 e\u0301 a\u0308 — “quoted” … ✓ "
)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer.to_str()


def byte_level(*added: str | dict[str, Any], bos: str | None = None) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE. ``bos``: a token that its post-processor puts before every text."""
    described = with_added(json.loads(_trained()), *added)
    if bos is not None:
        tokenizer = Tokenizer.from_str(json.dumps(described))
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
                ),
            ]
        )
        described = json.loads(tokenizer.to_str())
    return described


def sentencepiece(*added: str | dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of the bundled SentencePiece-style BPE with byte fallback."""
    return with_added(json.loads((STORIES / "tokenizer.json").read_text()), *added)


def with_added(tokenizer_json: dict[str, Any], *added: str | dict[str, Any]) -> dict[str, Any]:
    """Adds tokens: a string is a special token, an object is a token with its flags."""
    described = copy.deepcopy(tokenizer_json)
    next_id = 1 + max([*described["model"]["vocab"].values(), *(token["id"] for token in described["added_tokens"])])
    for i, token in enumerate(added):
        token = {"content": token, "special": True} if isinstance(token, str) else token
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        described["added_tokens"].append(flags | token | {"id": next_id + i})
    return described


def plain(content: str, **flags: bool) -> dict[str, Any]:
    """An added token that is not special."""
    return {"content": content, "special": False, **flags}


def write_folder(folder: Path, tokenizer_json: dict[str, Any] | None, **settings: Any) -> Path:
    """Writes a model folder; ``settings`` go into tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_json is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def transformers_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of the folder, with every setting passed as an argument."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings.pop("tokenizer_class", None)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False, **settings
    )
