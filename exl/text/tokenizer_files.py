"""The tokenizer files of a Hugging Face model folder: what they say, and which one decides if they differ."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from exl.checkpoint.config_reader import read_json
from exl.checkpoint.lfs import refuse_lfs_pointer
from exl.errors import CheckpointError, ConfigError
from exl.text.chat_template import ChatTemplate
from exl.user_text import read_text

_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_SETTINGS = "tokenizer_config.json"
_OLDER = "special_tokens_map.json"


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder's files say about its tokenizer."""

    backend: tokenizers.Tokenizer  # without truncation and padding; every special token is flagged
    names: Mapping[str, str]  # {"bos_token": "<s>", ...}; not all need be in the vocabulary
    eos_ids: tuple[int, ...]  # of every file that names an EOS
    add_bos: bool | None  # None: only the post-processor decides
    chat_template: ChatTemplate | None
    source: str

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Raises ``CheckpointError`` for a missing or damaged tokenizer.json, ``ConfigError`` for the other files."""
        backend = _read_backend(folder)
        path = folder / _SETTINGS
        own = settings = read_json(path) if path.is_file() else {}
        older = read_json(folder / _OLDER) if (folder / _OLDER).is_file() else {}
        if settings.get("added_tokens_decoder") is None:
            settings = settings | older  # without newer files, this one decides
        add_bos = settings.get("add_bos_token")
        if add_bos is not None and not isinstance(add_bos, bool):
            raise ConfigError(f"{path}: add_bos_token: found {add_bos!r}, expected true or false")
        _add_described(backend, settings, path)
        names = _flag_named(backend, settings, path)
        eos_ids = _eos_ids(backend, (own, path), (older, folder / _OLDER))
        template = _read_chat_template(folder, settings, names)
        return cls(backend, names, eos_ids, add_bos, template, str(folder / "tokenizer.json"))

    def prefix_ids(self, bos_id: int | None) -> tuple[int, ...]:
        """The tokens that are put before every text."""
        if self.add_bos is False:
            return ()
        encoded = self.backend.encode("a", add_special_tokens=True)
        num_special = 0
        while num_special < len(encoded.ids) and encoded.special_tokens_mask[num_special]:
            num_special += 1
        prefix_ids = tuple(encoded.ids[:num_special])
        if self.add_bos and bos_id is not None and bos_id not in prefix_ids:
            return (bos_id,)
        return prefix_ids


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / name).is_file()]
        if not others:
            raise CheckpointError(f"{path}: not found; a model folder needs it beside the weights")
        refuse_lfs_pointer(folder / others[0])
        raise CheckpointError(
            f"{path}: not found, only {others[0]}, which exl does not read; convert it once with transformers:"
            f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    refuse_lfs_pointer(path)
    try:
        raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        backend = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises no type of its own
        raise CheckpointError(f"{path}: not a tokenizer: {_why(raw, error)}") from None
    # Training may have left such settings in the file; they would cut off prompts.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _why(raw: bytes, error: Exception) -> str:
    """Why the library cannot read a tokenizer.json, in the library's words unless they are obscure."""
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        kind = json.loads(raw)["model"]["type"]
        if isinstance(kind, str) and kind not in _MODELS:
            return f"found a model of type {kind[:40]!r}, expected {', '.join(_MODELS)}"
    said = " ".join(str(error).split()).removeprefix("Cannot instantiate Tokenizer from buffer: ")
    return f"{said[:200]} (tokenizers {tokenizers.__version__})"


def _add_described(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], path: Path) -> None:
    """Adds the tokens of ``added_tokens_decoder``. If both files describe a token, these flags win."""
    described = settings.get("added_tokens_decoder") or {}
    if not isinstance(described, Mapping) or not all(str(key).isdecimal() for key in described):
        raise ConfigError(f"{path}: added_tokens_decoder: expected an object with token ids for keys")
    known = backend.get_added_tokens_decoder()
    for token_id, entry in sorted((int(key), entry) for key, entry in described.items()):
        where = f"{path}: added_tokens_decoder: {token_id}"
        token = _added_token(entry, where)
        if token_id in known and known[token_id].content == token.content and known[token_id].special:
            token = flagged(token)  # a token that either file calls special is special
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{where}: {token.content!r} has id {backend.token_to_id(token.content)} in tokenizer.json"
            )


def _flag_named(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Flags every named token as special. One that the vocabulary lacks is not added: the model has no row for it."""
    names = {}
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for name, entry in _named(settings, path):
        token = _added_token(entry, f"{path}: {name}")
        if name.endswith("_token"):
            names[name] = token.content
        if backend.token_to_id(token.content) is not None:
            backend.add_special_tokens([flagged(added.get(token.content, token))])
    return names


def _eos_ids(backend: tokenizers.Tokenizer, *files: tuple[Mapping[str, Any], Path]) -> tuple[int, ...]:
    """The EOS of each file that names one and that the vocabulary has. It becomes special, if it is not yet."""
    ids = []
    for values, path in files:
        entry = values.get("eos_token")
        if not isinstance(entry, str | Mapping) or not entry:
            continue
        token = _added_token(entry, f"{path}: eos_token")
        token_id = backend.token_to_id(token.content)
        if token_id is not None:
            known = backend.get_added_tokens_decoder().get(token_id, token)
            backend.add_special_tokens([flagged(known)])
            ids.append(token_id)
    return tuple(ids)


def _named(settings: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if name in _LISTS and isinstance(value, Mapping):
            yield from value.items()
        elif name in _LISTS and isinstance(value, list):
            yield from ((name, entry) for entry in value)
        elif name in _LISTS and value is not None:
            raise ConfigError(f"{path}: {name}: found {type(value).__name__}, expected a list of tokens")
        elif name.endswith("_token") and isinstance(value, str | Mapping):
            yield name, value


def _added_token(entry: Any, where: str) -> AddedToken:
    """From a token as the files describe it: its text, or an object with ``content`` and flags."""
    if isinstance(entry, str):
        entry = {"content": entry, "special": True}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str) or not entry["content"]:
        raise ConfigError(f"{where}: found {str(entry)[:80]}, expected a token or an object with its content")
    flags = {flag: entry[flag] for flag in _FLAGS if entry.get(flag) is not None}
    if bad := [flag for flag, value in flags.items() if not isinstance(value, bool)]:
        raise ConfigError(f"{where}: {bad[0]}: found {flags[bad[0]]!r}, expected true or false")
    return AddedToken(entry["content"], **flags)


def flagged(token: AddedToken) -> AddedToken:
    """The same token, flagged as special."""
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _read_chat_template(folder: Path, settings: Mapping[str, Any], names: Mapping[str, str]) -> ChatTemplate | None:
    """Read from the first of these that has one: chat_template.jinja and additional_chat_templates/,
    tokenizer_config.json, chat_template.json."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    templates = {name: read_text(path, str(path)) for name, path in files.items()}
    templates = {name: template for name, template in templates.items() if template.strip()}
    if templates:
        alone = list(templates) == ["default"]
        return ChatTemplate(templates, names, str(files["default"]) if alone else f"{folder}: chat template")
    if settings.get("chat_template"):
        return ChatTemplate(settings["chat_template"], names, f"{folder / _SETTINGS}: chat_template")
    path = folder / "chat_template.json"
    if path.is_file() and (template := read_json(path).get("chat_template")):
        return ChatTemplate(template, names, f"{path}: chat_template")
    return None
