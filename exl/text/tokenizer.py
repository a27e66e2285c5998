"""Text to token ids and back, on top of the ``tokenizers`` library, like transformers' fast tokenizers.

Besides the ordinary tokens there are three kinds:

- *Special* tokens: those that any file calls special: tokenizer.json (``"special": true``), ``added_tokens_decoder``
  in tokenizer_config.json, and every token that tokenizer_config.json or special_tokens_map.json has a name for
  (``eos_token``, ``additional_special_tokens``, ...). Decoding leaves them out.
- *Control* tokens: the special tokens, and the added tokens that the chat template itself writes, except white space:
  many fine-tuned models mark their turns with tokens that nobody flagged as special. In text that people write,
  control tokens are encoded as plain text.
- Other *added* tokens, such as runs of spaces: treated like any ordinary token.
"""

from __future__ import annotations

import re
import secrets
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from exl.errors import ConfigError
from exl.text.chat_template import ChatTemplate
from exl.text.control_tokens import ControlTokens, RenderedPrompt
from exl.text.end_tokens import customary_end_ids, turn_end_ids
from exl.text.token_bytes import DecodingRules, TextDecoder
from exl.text.tokenizer_files import TokenizerFiles, flagged

# An added token put before a text, so that the text is encoded as the middle of a text, without the space that
# SentencePiece models put at the start. It is random, so that no text can be written to hold it.
_GUARD = f"\U0010fffd{secrets.token_hex(16)}"
_SURROGATES = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A model's tokenizer and its chat template. Thread-safe."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        names: Mapping[str, str] | None = None,
        prefix_ids: Sequence[int] = (),
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
        source: str = "tokenizer",
    ) -> None:
        """Most callers want ``from_folder``. ``backend`` is not copied; the caller must not change it afterwards.

        ``names``: named special tokens, ``{"bos_token": "<s>", ...}``. ``prefix_ids``: tokens put before every text.
        ``eos_ids``: the first of those that end an answer; see the property. ``source`` is the name that error
        messages use.
        """
        self._backend = backend
        self.names = dict(names or {})
        self.chat_template = chat_template
        self._prefix_ids = tuple(prefix_ids)
        self._source = source
        self._lock = threading.Lock()
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self._rules = DecodingRules.of(backend.decoder, source)
        self.bos_id = bos_id
        self._given_eos_ids = tuple(eos_ids)
        self._token_of = lru_cache(maxsize=1 << 16)(backend.id_to_token)
        self._ids_with = lru_cache(maxsize=16)(self._find_ids_with)
        self._plain_copy: tokenizers.Tokenizer | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, *, bos_id: int | None = None, eos_ids: Sequence[int] = ()) -> Tokenizer:
        """Reads tokenizer.json and the tokenizer files beside it, if present, from a Hugging Face model folder.

        ``bos_id``: used if the tokenizer's own files name no BOS. ``eos_ids``: joined with those of the tokenizer's
        files. Both come from the model's configuration. Raises ``CheckpointError`` for a missing or damaged
        tokenizer.json, ``ConfigError`` for errors in the other files, ``UnsupportedModelError`` for a decoder that exl
        does not know.
        """
        files = TokenizerFiles.read(Path(folder))
        named_bos = files.names.get("bos_token")
        if named_bos is not None and files.backend.token_to_id(named_bos) is not None:
            bos_id = files.backend.token_to_id(named_bos)
        if bos_id is not None and files.backend.id_to_token(bos_id) is None:
            raise ConfigError(f"{folder}: BOS: found token id {bos_id}, which is no token of tokenizer.json")
        return cls(
            files.backend,
            names=files.names,
            prefix_ids=files.prefix_ids(bos_id),
            bos_id=bos_id,
            eos_ids=[*eos_ids, *files.eos_ids],
            chat_template=files.chat_template,
            source=files.source,
        )

    @cached_property
    def vocab_size(self) -> int:
        """The largest token id + 1. A model's matrices may have more rows, which no token uses."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer. Files disagree, and quantized copies often lack some, so each that any file
        names counts: ``eos_token_id`` of config.json and generation_config.json, ``eos_token`` of tokenizer_config.json
        and special_tokens_map.json, the special tokens of tokenizer.json with a customary name such as ``<|im_end|>``,
        and the token that the chat template writes after an answer (``end_tokens.py``)."""
        named = self._backend.token_to_id(self.names.get("eos_token", ""))
        found = [*self._given_eos_ids, *(() if named is None else (named,)), *customary_end_ids(self._added)]
        if self.chat_template is not None:
            bos = self.names.get("bos_token") if self.bos_id is None else self._backend.id_to_token(self.bos_id)
            found += turn_end_ids(self.chat_template, self._added, bos)
        return tuple(dict.fromkeys(found))

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that ``decode`` leaves out."""
        return self._special_ids

    @cached_property
    def added_ids(self) -> Mapping[str, int]:
        """The added tokens as they are written, special or not: the only ones that text cannot be spelled as."""
        return {token.content: token_id for token_id, token in self._added.items()}

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None if no token has this id."""
        return self._token_of(_checked_id(token_id))

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds inside a text; for a special token, the token as it is written.

        Raises ``ConfigError`` if no token has this id.
        """
        token = self.id_to_token(token_id)
        if token is None:
            raise ConfigError(f"{self._source}: found token id {token_id}, expected one below {self.vocab_size}")
        return self._rules.token_bytes(token)

    def ids_with(self, texts: Sequence[str]) -> frozenset[int]:
        """The tokens that contain one of these texts. Looks at each token, once for the same texts."""
        return self._ids_with(tuple(text.encode("utf-8", "surrogatepass") for text in texts))

    def _find_ids_with(self, texts: tuple[bytes, ...]) -> frozenset[int]:
        known = (i for i in range(self.vocab_size) if self._backend.id_to_token(i) is not None)
        return frozenset(i for i in known if any(text in self.token_bytes(i) for text in texts))

    # Text to ids

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text that a person wrote: anything in it that looks like a control token is plain text.

        ``bos`` prepends, once, the tokens that the model expects before a text: usually BOS, or nothing. They are what
        tokenizer.json's post-processor prepends, unless ``add_bos_token`` in tokenizer_config.json decides. (From
        version 5 on, transformers' ``from_pretrained`` ignores that key if there is a tokenizer.json; a tokenizer
        made with the key as an argument obeys it.) Nothing is appended, because the model continues the text.
        ``special`` encodes control tokens in the text as control tokens, as transformers does by default.
        """
        if not isinstance(text, str):
            raise ConfigError(f"encode: found {type(text).__name__}, expected a string")
        text = _SURROGATES.sub("\ufffd", text)
        ids = self._encode_whole(text) if special else self._encode_plain(text, at_start=True)
        return [*self._prefix_ids, *ids] if bos else ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> list[int]:
        """Token ids of the prompt that the chat template renders. For the arguments see ``ChatTemplate.render``.

        Only the template writes control tokens (exceptions: ``ChatTemplate.render_protected``). If the messages hold
        none, the ids are those of transformers' ``apply_chat_template``. Raises ``ConfigError`` for malformed messages,
        and if the model has no chat template.
        """
        if self.chat_template is None:
            raise ConfigError(f"{self._source}: the model has no chat template: give it a prompt instead of messages")
        return self.encode_template(
            self.chat_template.render_protected(
                messages,
                self._control,
                self._special,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                variables=variables,
                name=template,
            )
        )

    def encode_template(self, prompt: RenderedPrompt) -> list[int]:
        """Token ids of a rendered prompt, in which placeholders stand for plain text. Nothing is prepended.

        If no plain text touches something that looks like a control token, the prompt is encoded as a whole. Otherwise
        the stretch around such text, up to the template's control tokens on both sides, is encoded separately, as
        plain text.
        """
        text, plain = prompt.resolve()
        text = _SURROGATES.sub("\ufffd", text)  # the library accepts no lone surrogates
        tokens = [span for gap in _gaps(plain, len(text)) for span in self._control.find(text, *gap)]
        stretches = list(_gaps(tokens, len(text)))
        forged = [False] * len(stretches)
        for start, stop in plain:
            if self._control.touched_by(text, start, stop):
                forged[bisect_right(stretches, (start, len(text))) - 1] = True
        if not any(forged):
            ids = self._encode_whole(text)
            if self._count_control(ids) <= len(tokens):
                return ids
            forged = [True] * len(stretches)  # the tokenizer's normalizer turned some text into a control token
        ids, done = [], 0
        for (start, stop), is_forged in zip(stretches, forged, strict=True):
            if is_forged:
                # text[done:start] begins with a control token or at the start of the text, and ends with a token.
                ids += self._encode_whole(text[done:start])
                ids += self._encode_plain(self._stripped(text, start, stop), at_start=start == 0)
                done = stop
        return ids + self._encode_whole(text[done:])

    def _stripped(self, text: str, start: int, stop: int) -> str:
        """A stretch without the white space that the tokens around it absorb (``lstrip``, ``rstrip``)."""
        stretch = text[start:stop]
        for token in self._control_added:
            if token.rstrip and text.endswith(token.content, 0, start):
                stretch = stretch.lstrip()
            if token.lstrip and text.startswith(token.content, stop):
                stretch = stretch.rstrip()
        return stretch

    def _encode_whole(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids if text else []

    def _encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        """Encodes text as plain text: nothing in it becomes a control token."""
        if not text:
            return []
        if at_start and not self._may_hold_control(text):
            return self._encode_whole(text)
        if at_start:
            ids = self._plain_backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self._plain_backend.encode(_GUARD + text, add_special_tokens=False).ids[1:]
        if not self._count_control(ids):
            return ids
        return [part for token_id in ids for part in self._cut_in_two(token_id)]

    def _cut_in_two(self, token_id: int) -> list[int]:
        """Splits a control token's text in two and encodes the parts; other ids stay.

        Unigram models have control tokens among their pieces and match them in text whatever the settings are.
        """
        if token_id not in self._control_ids:
            return [token_id]
        token, model = self._backend.id_to_token(token_id), self._backend.model
        parts = [part.id for text in (token[:1], token[1:]) if text for part in model.tokenize(text)]
        return [part for part in parts if part not in self._control_ids]

    def _may_hold_control(self, text: str) -> bool:
        """Also true if any control token is matched after normalization: a normalizer may turn other text into one."""
        return self._control.found_in(text) or any(token.normalized for token in self._control_added)

    def _count_control(self, ids: Sequence[int]) -> int:
        return sum(token_id in self._control_ids for token_id in ids)

    @cached_property
    def _special(self) -> ControlTokens:
        return ControlTokens(self._added[token_id].content for token_id in self._special_ids)

    @cached_property
    def _control_added(self) -> list[AddedToken]:
        try:
            written = "" if self.chat_template is None else self.chat_template.literal_text
        except ConfigError:  # a broken template writes nothing; rendering it raises
            written = ""
        return [
            token
            for token in self._added.values()
            if token.special or (token.content in written and not token.content.isspace())
        ]

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(token.content for token in self._control_added)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Without the unknown token, because any text may encode to it."""
        ids = {self._backend.token_to_id(token) for token in self._control.tokens}
        return frozenset(ids - {self._backend.token_to_id(self.names.get("unk_token", ""))})

    @property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A copy of the backend that encodes control tokens as plain text. Made once, when a text first needs it."""
        with self._lock:
            if self._plain_copy is None:
                copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
                copy.add_special_tokens([flagged(token) for token in self._control_added])
                copy.add_tokens([AddedToken(_GUARD, normalized=False)])
                copy.encode_special_tokens = True
                self._plain_copy = copy
            return self._plain_copy

    # Ids to text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids that no token has add nothing; broken UTF-8 becomes U+FFFD (``DecodingRules``)."""
        decoder = self.text_decoder(skip_special_tokens=skip_special_tokens)
        return "".join([*(decoder.push(_checked_id(token_id)) for token_id in ids), decoder.finish()])

    def text_decoder(self, *, skip_special_tokens: bool = True) -> TextDecoder:
        """A decoder that takes one token at a time."""
        if not skip_special_tokens:
            return TextDecoder(self._rules, self._token_of)
        hidden, token_of = self._special_ids, self._token_of
        return TextDecoder(self._rules, lambda token_id: None if token_id in hidden else token_of(token_id))


def _gaps(spans: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """The ranges before, between and after ascending spans: ``len(spans) + 1`` of them, possibly empty."""
    done = 0
    for start, stop in spans:
        yield done, start
        done = stop
    yield done, length


def _checked_id(token_id: int) -> int:
    if isinstance(token_id, bool) or not hasattr(token_id, "__index__") or not 0 <= token_id < 2**32:
        raise ConfigError(f"token ids: found {token_id!r}, expected integers that are not negative")
    return int(token_id)
