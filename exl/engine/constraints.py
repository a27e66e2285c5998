"""What a request's text must be: JSON of a schema, a regular expression, a grammar, one of some texts.

llguidance turns each of them into the set of tokens that may come next. What it understands is described in
docs/syntax.md and docs/json_schema.md of guidance-ai/llguidance. It gets exl's own bytes of each token, so both mean
the same text. This is the only file that imports it, and only for the first request with a constraint.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exl.errors import ConfigError, ConstraintError, warn_user
from exl.json_schema import EXPECTED, JSON_SPACE, schema_of
from exl.text.tokenizer import Tokenizer

Kind = Literal["json_schema", "regex", "grammar", "choices"]

_MAX_CHARS = 512 * 1024
_MAX_CHOICES = 10_000
_MAX_KEPT = 32  # compiled grammars, and openings
# Chains of references are followed by recursion, at up to 8 KB each: on a usual stack of 8 MB, a chain of 3,000 of them
# ends the process. On this stack a text of _MAX_CHARS cannot. Only what is touched of it is memory.
_COMPILER_STACK_BYTES = 512 << 20
_MAX_WORDS_CHARS = 400
_STACK_LOCK = threading.Lock()  # the size of new threads' stacks is the process's
_SPECIAL_MARKER = b"\xff"  # llguidance marks special tokens by this byte, which no UTF-8 text holds


@dataclass(frozen=True)
class Constraint:
    """What the generated text must be; with ``after``, from the first occurrence of that on."""

    kind: Kind
    text: str  # of choices: a JSON list
    # A text, or token ids: before it has been generated, everything may be. () begins at once.
    after: str | tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        json_schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        choices: Sequence[str] | None = None,
        after: str | Sequence[int] | None = None,
    ) -> Constraint | None:
        """The constraint that a request's options ask for; None if they ask for none.

        ``json_schema``: a dictionary, JSON text, a pydantic model (any class with ``model_json_schema``), or True or
        "object" for any JSON object. ``grammar``: in Lark's syntax, or in llama.cpp's GBNF. Raises ``ConfigError`` for
        more than one of them, and for values of another type.
        """
        options = {"json_schema": json_schema, "regex": regex, "grammar": grammar, "choices": choices}
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) > 1:
            raise ConfigError(f"found {' and '.join(given)}, expected at most one of {', '.join(options)}")
        if not given:
            if after is not None:
                raise ConfigError(f"after: found {after!r} and no constraint, expected one of {', '.join(options)}")
            return None
        (kind, value), *_ = given.items()
        text = _TEXT_OF[kind](value) if kind in _TEXT_OF else value
        if not isinstance(text, str):
            raise ConfigError(f"{kind}: found {value!r} ({type(value).__name__}), expected a text")
        if len(text) > _MAX_CHARS:
            raise ConfigError(f"{kind}: found {len(text)} characters, expected at most {_MAX_CHARS}")
        return cls(kind, text, () if after is None else _checked_after(after))  # type: ignore[arg-type]


def _schema_text(value: Any) -> str:
    schema = schema_of(value)
    try:
        return json.dumps(schema, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"json_schema: {error}; {EXPECTED}") from error


def _choices_text(choices: Any) -> str:
    expected = f"expected a list of 1 to {_MAX_CHOICES} texts, none of them empty"
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise ConfigError(f"choices: found {choices!r} ({type(choices).__name__}), {expected}")
    if not 1 <= len(choices) <= _MAX_CHOICES:
        raise ConfigError(f"choices: found {len(choices)}, {expected}")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ConfigError(f"choices: found {choice!r}, {expected}")
    return json.dumps(list(dict.fromkeys(choices)))


_TEXT_OF: dict[str, Callable[[Any], str]] = {"json_schema": _schema_text, "choices": _choices_text}


def _checked_after(after: Any) -> str | tuple[int, ...]:
    expected = "expected a text or a list of token ids, not empty"
    if not isinstance(after, str | Sequence) or isinstance(after, bytes) or not after:
        raise ConfigError(f"after: found {after!r} ({type(after).__name__}), {expected}")
    if isinstance(after, str):
        return after
    for token_id in after:
        if isinstance(token_id, bool) or not hasattr(token_id, "__index__") or token_id < 0:
            raise ConfigError(f"after: found {token_id!r}, {expected}")
    return tuple(int(token_id) for token_id in after)


class Grammars:
    """What constraints are compiled to, for one model. Thread-safe: each submitting thread compiles what it needs.

    Making it takes about a second for a vocabulary of 150,000 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """``vocab_size``: rows of the model's head; those that the tokenizer has no token for are never allowed.
        ``eos_ids``: tokens that end the text, all of them allowed where it may end. Raises ``ConfigError`` if
        llguidance is not installed.
        """
        self._llguidance = _llguidance()
        self._tokenizer = tokenizer
        self.tokens: Any = None  # llguidance's view of the vocabulary
        self.vocab_size = vocab_size
        known = range(min(vocab_size, tokenizer.vocab_size))
        self.token_bytes = [b"" if tokenizer.id_to_token(i) is None else tokenizer.token_bytes(i) for i in known]
        self.token_bytes += [b""] * (vocab_size - len(known))
        self.eos_ids = eos = frozenset(token_id for token_id in eos_ids if token_id < vocab_size)
        # Without any EOS a text ends where nothing more may follow; llguidance gets an EOS behind all tokens.
        encode = weakref.WeakMethod(self._encode)  # the collector does not see that llguidance's objects hold it
        view = _Vocabulary(
            tokens=[*self.token_bytes, *([] if eos else [b""])],
            special=(tokenizer.special_ids & set(known)) | eos,
            eos=eos or frozenset({vocab_size}),
            encode=lambda text: encode()(text),
        )
        try:
            wrapper = self._llguidance.TokenizerWrapper(view)
            self.tokens = self._llguidance.LLTokenizer(wrapper, eos_token=sorted(view.eos))
        except ValueError as error:
            raise ConfigError(f"constraints: llguidance cannot use this tokenizer: {_words(error)}") from error
        self.everything = _words_of(range(vocab_size), vocab_size)
        self.num_inner_words = -(-len(view.tokens) // 32)  # one more than exl's own, if the EOS behind all needs it
        self.ends = _words_of(view.eos, len(view.tokens))
        # What llguidance says is for the user: without the parser's state and the text so far.
        self._limits = self._llguidance.LLParserLimits(verbose_errors=False)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()  # by use, the latest last
        self._openings: OrderedDict[str | tuple[int, ...], _Opening] = OrderedDict()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of a text.

        Raises ``ConfigError`` with llguidance's words for what it cannot compile, what it finds too complex, and what
        allows no text at all, as far as the first token shows it.
        """
        for token_id in constraint.after if isinstance(constraint.after, tuple) else ():
            if token_id >= self.vocab_size:
                raise ConfigError(f"after: found token id {token_id}, expected one below {self.vocab_size}")
        key = constraint.kind, constraint.text
        with self._lock:
            compiled = self._compiled.get(key)
        if compiled is None:
            compiled = _with_a_large_stack(lambda: self._compile(constraint))
        with self._lock:
            _keep(self._compiled, key, compiled)
            opening = None
            if constraint.after:
                opening = self._openings.get(constraint.after) or _Opening(constraint.after, self.token_bytes)
                _keep(self._openings, constraint.after, opening)
            return Matcher(self, compiled, compiled.deep_copy(), opening)

    def _compile(self, constraint: Constraint) -> Any:
        kind = constraint.kind
        try:
            source = self._source(constraint)
        except Exception as error:  # the converter from GBNF raises whatever it meets
            raise ConfigError(f"{kind}: {_words(error)}") from error
        matcher = self._llguidance.LLMatcher(self.tokens, source, log_level=0, limits=self._limits)
        first: NDArray[np.uint32] = np.zeros(self.num_inner_words, np.uint32)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
        if matcher.is_error():
            raise ConfigError(f"{kind}: {_words(matcher.get_error())}")
        if not (first & ~self.ends).any():
            raise ConfigError(f"{kind}: found a constraint that allows only the empty text, expected some text")
        for text in matcher.get_grammar_warnings():
            warn_user(f"{kind}: {_words(text)}")
        return matcher

    def _source(self, constraint: Constraint) -> str:
        """The grammar as llguidance takes it."""
        made, text = self._llguidance.LLMatcher, constraint.text
        if constraint.kind == "json_schema":
            # Options in the schema itself, under "x-guidance", come after these.
            return str(made.grammar_from_json_schema(text, defaults={"whitespace_pattern": JSON_SPACE}))
        if constraint.kind == "regex":
            return str(made.grammar_from_regex(text))
        if constraint.kind == "choices":
            # As a terminal they are one regular expression; as a rule's alternatives, 2,000 would be too many.
            return str(made.grammar_from_lark("start: TEXT\nTEXT: " + " | ".join(map(json.dumps, json.loads(text)))))
        from llguidance.gbnf_to_lark import any_to_lark

        return str(made.grammar_from_lark(any_to_lark(text)))

    def _encode(self, text: bytes) -> list[int]:
        """Token ids of text in the middle of a text, whose bytes are exactly these.

        SentencePiece tokenizers put a space before a text; behind a line end there is none that matters.
        """
        if self.tokens is None:
            return []
        for before in ("", "\n"):
            ids = self._tokenizer.encode(before + text.decode(), bos=False)
            pieces = [self.token_bytes[token_id] if token_id < self.vocab_size else b"" for token_id in ids]
            for start in range(len(ids)):
                if b"".join(pieces[start:]) == text:
                    return ids[start:]
        return list(self.tokens.greedy_tokenize(text.decode()))


class Matcher:
    """One sequence's place in its constraint. Not thread-safe: it belongs to whoever drives the sequence."""

    def __init__(self, grammars: Grammars, compiled: Any, inner: Any, opening: _Opening | None) -> None:
        self._grammars = grammars
        self._compiled = compiled  # at the beginning of a text; never changed
        self._inner = inner
        self._opening = opening
        self._before: list[int] = []  # for each token before the constraint: how much of the opening ends there
        self._ids: list[int] = []  # the tokens under the constraint

    def copy(self) -> Matcher:
        """Another sequence's, at the same place."""
        copied = Matcher(self._grammars, self._compiled, self._inner.deep_copy(), self._opening)
        copied._before, copied._ids = self._before.copy(), self._ids.copy()
        return copied

    @property
    def has_begun(self) -> bool:
        """False while the text that ``after`` names has not been generated."""
        return self._opening is None or self._opening.is_complete(self._matched)

    @property
    def is_finished(self) -> bool:
        """Whether the text is whole and nothing may follow but its end."""
        return self.has_begun and self._inner.is_stopped() and not self._inner.is_error()

    @property
    def _matched(self) -> int:
        return self._before[-1] if self._before else 0

    def mask(self, out: NDArray[np.uint32]) -> bool:
        """Sets the bits of the tokens that may come next, of [ceil(vocab_size / 32)] words: token i is bit i % 32 of
        word i // 32. False: all may, and ``out`` is untouched. Raises ``ConstraintError`` where llguidance gives up.
        """
        if not self.has_begun:
            allowed = self._opening.allowed(self._matched) if self._opening is not None else None
            if allowed is None:
                return False
            out[:] = allowed
            return True
        own = self._grammars
        if own.num_inner_words == len(out) and out.flags.c_contiguous:
            self._inner.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        else:
            inner: NDArray[np.uint32] = np.zeros(own.num_inner_words, np.uint32)
            self._inner.unsafe_compute_mask_ptr(inner.ctypes.data, inner.nbytes)
            out[:] = inner[: len(out)]
        out &= own.everything  # not the EOS behind all tokens
        self._check()
        return True

    def consume(self, token_id: int) -> None:
        """Goes on by a token. Raises ``ConstraintError`` for one that the constraint forbids; then the request ends."""
        if self._opening is not None and not self.has_begun:
            self._before.append(self._opening.advance(self._matched, token_id))
            return
        self._ids.append(token_id)
        self._inner.consume_token(token_id)
        self._check()

    def rollback(self, num_tokens: int) -> None:
        """Takes the last tokens back: the state is that before they were consumed."""
        if not 0 <= num_tokens <= len(self._before) + len(self._ids):
            raise ValueError(f"rollback: found {num_tokens} tokens, expected at most those that were consumed")
        kept = max(len(self._ids) - num_tokens, 0)
        back = len(self._ids) - kept
        del self._ids[kept:], self._before[len(self._before) - (num_tokens - back) :]
        if not self._inner.rollback(back):  # never after an error
            self._inner = self._compiled.deep_copy()
            self._inner.consume_tokens(self._ids)
            self._check()

    def forced(self) -> tuple[int, ...]:
        """Tokens of which each is the only one allowed at its place. May lack some."""
        if not self.has_begun or self._inner.is_stopped():
            return ()
        found = tuple(self._inner.compute_ff_tokens())
        self._check()
        return found

    def masks_ahead(self, drafts: Sequence[int], out: NDArray[np.uint32]) -> int:
        """The masks before each draft and after the last, [len(drafts) + 1, words]; a row of ones where all may come.

        Returns how many drafts are allowed, n; the rows after the first n + 1 are left as they are. The matcher stays
        where it is. Raises ``ConstraintError`` only for what is wrong without any draft.
        """
        count = 0
        try:
            for row in range(len(drafts) + 1):
                if not self.mask(out[row]):
                    out[row] = self._grammars.everything
                if row == len(drafts) or not _holds(out[row], drafts[row]):
                    break
                count += 1
                self.consume(drafts[row])
        except ConstraintError:
            if count == 0:
                raise
            self.rollback(count)
            return count - 1  # what comes after this draft is not known: it is not to be tried
        self.rollback(count)
        return count

    def _check(self) -> None:
        if self._inner.is_error():
            words = self._inner.get_error()
            if KeyboardInterrupt.__name__ in words:  # it fell into ``Grammars._encode``
                raise KeyboardInterrupt
            raise ConstraintError(f"the constraint ends this text: {_words(words)}")


class _Opening:
    """Finds where a constraint begins: behind the first occurrence of a text or of some token ids.

    A token that completes the text and goes on with anything but white space is forbidden, so that the constraint
    begins at a token's border. How much of the opening the last tokens hold is one number, as in the algorithm of
    Knuth, Morris and Pratt. Special tokens count as they are written.
    """

    def __init__(self, after: str | tuple[int, ...], token_bytes: Sequence[bytes]) -> None:
        self._pattern: Any = after.encode() if isinstance(after, str) else after
        self._token_bytes = token_bytes
        # Tokens that can go beyond the text: they hold its last byte and others after it.
        self._crossing: list[int] = []
        if isinstance(after, str):
            last = self._pattern[-1:]
            self._crossing = [i for i, token in enumerate(token_bytes) if last in token[:-1]]
        self._allowed: dict[int, NDArray[np.uint32] | None] = {}

    def is_complete(self, matched: int) -> bool:
        return matched == len(self._pattern)

    def advance(self, matched: int, token_id: int) -> int:
        """How much of the opening the text ends with after one more token; all of it, if that token completes it."""
        if self._goes_beyond(matched, token_id):
            found = f"found a token that goes on: {self._token_bytes[token_id]!r}"
            raise ConstraintError(f"after: {found}, expected one that ends where the constraint begins")
        joined = self._joined(matched, token_id)
        if isinstance(self._pattern, bytes) and self._pattern in joined:
            return len(self._pattern)
        lengths = range(min(len(joined), len(self._pattern)), 0, -1)
        return next((n for n in lengths if joined[len(joined) - n :] == self._pattern[:n]), 0)

    def allowed(self, matched: int) -> NDArray[np.uint32] | None:
        """The tokens that may come next, as words of bits; None: all."""
        if matched not in self._allowed:
            beyond = {token_id for token_id in self._crossing if self._goes_beyond(matched, token_id)}
            size = len(self._token_bytes)
            self._allowed[matched] = _words_of(set(range(size)) - beyond, size) if beyond else None
        return self._allowed[matched]

    def _joined(self, matched: int, token_id: int) -> Any:
        piece = self._token_bytes[token_id] if isinstance(self._pattern, bytes) else (token_id,)
        return self._pattern[:matched] + piece

    def _goes_beyond(self, matched: int, token_id: int) -> bool:
        if not isinstance(self._pattern, bytes):
            return False
        _, found, beyond = self._joined(matched, token_id).partition(self._pattern)
        return bool(found and beyond.strip())


@dataclass
class _Vocabulary:
    """Exl's tokens as llguidance asks for them."""

    tokens: list[bytes]
    special: frozenset[int]  # they have no text
    eos: frozenset[int]
    encode: Callable[[bytes], list[int]]
    bos_token_id: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.eos_token_id = min(self.eos)
        self.special_token_ids = sorted(self.special | self.eos)
        for token_id, token in enumerate(self.tokens):
            if token.startswith(_SPECIAL_MARKER) and token_id not in self.special:
                self.tokens[token_id] = b""

    def __call__(self, text: bytes) -> list[int]:
        return self.encode(text)


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        if error.name != "llguidance":
            raise
        raise ConfigError(
            "constraints (json_schema, regex, grammar, choices): found no package llguidance, expected it installed: "
            "pip install 'llguidance>=1.9,<2'"
        ) from error
    return llguidance


def _with_a_large_stack(compiled: Callable[[], Any]) -> Any:
    """What a function gives or raises, in a thread with _COMPILER_STACK_BYTES of stack."""
    with ThreadPoolExecutor(1) as pool:
        with _STACK_LOCK:
            before = threading.stack_size(_COMPILER_STACK_BYTES)
            try:
                found = pool.submit(compiled)
            finally:
                threading.stack_size(before)
        return found.result()


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > _MAX_KEPT:
        kept.popitem(last=False)


def _words_of(token_ids: Iterable[int], size: int) -> NDArray[np.uint32]:
    """A set of token ids below ``size`` as bits."""
    bits: NDArray[np.uint8] = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[np.fromiter(token_ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _holds(words: NDArray[np.uint32], token_id: int) -> bool:
    return 0 <= token_id < 32 * len(words) and bool(words[token_id // 32] >> np.uint32(token_id % 32) & 1)


def _words(error: object) -> str:
    """What llguidance says, in one line of bounded length."""
    text = " ".join(str(error).split("<backtrace>")[0].replace("<non-verbose/>", "").split())
    if text == "NoExtensionBias":
        text = "no token may come here (NoExtensionBias)"
    return text if len(text) <= _MAX_WORDS_CHARS else f"{text[:_MAX_WORDS_CHARS]}..."
