"""Conversations: turns that the model has already seen are not computed again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from exl.errors import ConfigError
from exl.llm import LLM, Completion, TextIterator
from exl.replace_file import replace_file
from exl.user_text import read_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

FORMAT, VERSION = "exl chat", 1
_TRANSCRIPT_STOP = "\nUser:"
_NOTICE = (
    "this model has no chat template: it was not trained to talk, and is shown a transcript of User and Assistant to "
    "continue"
)


class SamplingOptions(TypedDict, total=False):
    """Keywords of ``LLM.stream``, which checks them."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    top_logprobs: int | None


class Chat:
    """A conversation with a model, made by ``llm.chat()``. Not thread-safe.

    The token ids that were run are kept, and each turn appends to them. So the cache holds all of them except the last
    sampled token, unless other requests have evicted them. If the template renders earlier turns differently (for
    example, it drops their reasoning), the whole conversation is rendered, and computed from the first token that
    differs.
    """

    def __init__(
        self,
        llm: LLM,
        system: str | None = None,
        *,
        tools: Sequence[Mapping] | None = None,
        variables: Mapping | None = None,
    ) -> None:
        """``tools`` and ``variables`` are passed to the chat template. Raises ``ConfigError`` if there are tools but
        the model has no chat template."""
        self._llm, self._system = llm, _checked_system(system)
        self._tools, self._variables = tools, variables
        self._messages: list[dict[str, Any]] = []
        self._run_ids: list[int] = []  # as run, up to the end of the last answer; empty: render all messages
        self._plain_ids: list[int] = []  # the template's rendering of the last answer's prompt
        if self.is_transcript and tools:
            raise ConfigError(f"tools: {llm.folder.name} has no chat template to show them with")

    @property
    def is_transcript(self) -> bool:
        """Whether the model has no chat template, so that it continues a transcript."""
        return self._llm.tokenizer.chat_template is None

    @property
    def notice(self) -> str | None:
        """What a user should know before they talk to this model; None: nothing."""
        return f"{self._llm.folder.name}: {_NOTICE}" if self.is_transcript else None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Copies, without the system prompt: ``{"role": "user", "content": "Hello"}``."""
        return [dict(message) for message in self._messages]

    @property
    def system(self) -> str | None:
        """The system prompt. A new one applies from the next turn on, for which all turns are computed again."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = _checked_system(text)
        self._run_ids = []

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the conversation so far."""
        return len(self._run_ids or (self._render(self._messages, to_answer=False) if self._messages else ()))

    def send(self, text: str | None, max_tokens: int = 512, **options: Unpack[SamplingOptions]) -> Completion:
        """Answers a message; None: answers the messages that ``add`` appended. Keywords as for ``LLM.generate``.

        Raises ``ConfigError`` for an empty message or a full context; the conversation then stays unchanged.
        """
        return _exhaust(self.stream(text, max_tokens, **options))

    def stream(self, text: str | None, max_tokens: int = 512, **options: Unpack[SamplingOptions]) -> TextIterator:
        """Like ``send``, but yields pieces. If it is closed early, the text so far is kept as the answer."""
        messages = self._messages
        if text is not None:
            messages = [*messages, {"role": "user", "content": _checked(text)}]
        if not messages:
            raise ConfigError("message: found none, expected a text to answer")
        return self._answer(messages, max_tokens, options)

    def _answer(self, messages: list[dict[str, Any]], max_tokens: int, options: SamplingOptions) -> TextIterator:
        ids, plain = self._prompt(messages)
        context = self._llm.context
        if len(ids) >= context:
            raise ConfigError(
                f"context: the conversation takes {len(ids)} tokens and the context holds {context}: undo a turn, "
                "start a new chat, or load the model with a larger context"
            )
        stop = options.pop("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if self.is_transcript:
            stop = (*stop, _TRANSCRIPT_STOP)
        answer = self._llm.stream(ids, max_tokens, reuse_prefix=True, stop=stop, **options)
        return TextIterator(self._keep(answer, messages, ids, plain), answer._logprobs)

    def undo(self) -> str:
        """Removes the last user message and all messages after it. Returns that message's text."""
        last = self._last_of_user("undo")
        text = self._messages[last]["content"]
        del self._messages[last:]
        self._run_ids = []
        return text

    def retry(self, max_tokens: int = 512, **options: Unpack[SamplingOptions]) -> Completion:
        """Answers the last user message again, with a new random seed unless one is given."""
        return _exhaust(self.stream_retry(max_tokens, **options))

    def stream_retry(self, max_tokens: int = 512, **options: Unpack[SamplingOptions]) -> TextIterator:
        """Like ``retry``, but yields pieces. If it is closed before the first piece, the old answer is kept."""
        return self._answer(self._messages[: self._last_of_user("retry") + 1], max_tokens, options)

    def add(self, role: str, content: str, *, name: str | None = None, tool_call_id: str | None = None) -> None:
        """Appends a message without answering it: a tool's result, or turns of an earlier conversation."""
        extra = {key: value for key, value in (("name", name), ("tool_call_id", tool_call_id)) if value is not None}
        self._messages.append({"role": _checked(role), "content": _checked(content), **extra})
        self._run_ids = []

    def reset(self) -> None:
        """Removes all messages; keeps the system prompt."""
        self._messages, self._run_ids = [], []

    # ---- files

    def save(self, path: str | Path) -> None:
        """Writes the conversation as JSON, atomically. Raises ``ConfigError`` if the file cannot be written."""
        path = Path(path).expanduser()
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": self._llm.folder.name,
            "system": self._system,
            "messages": self._messages,
        }
        part = path.parent / f".{path.name}.{os.getpid()}.part"
        try:
            part.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            replace_file(part, path)
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte; a message with lone surrogates
            with contextlib.suppress(OSError, ValueError):
                part.unlink()
            raise ConfigError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None

    @classmethod
    def load(
        cls,
        llm: LLM,
        path: str | Path,
        *,
        tools: Sequence[Mapping] | None = None,
        variables: Mapping | None = None,
    ) -> Chat:
        """Loads a conversation that ``save`` wrote, for any model. Raises ``ConfigError`` for any other file."""
        system, messages = _read(Path(path).expanduser())
        chat = cls(llm, system, tools=tools, variables=variables)
        chat._messages = messages
        return chat

    def __repr__(self) -> str:
        mode = ", transcript" if self.is_transcript else ""
        return f"Chat({self._llm.folder.name}{mode}, {len(self._messages)} messages, {self.num_tokens} tokens)"

    # ---- prompts

    def _last_of_user(self, asked: str) -> int:
        for i in reversed(range(len(self._messages))):
            if self._messages[i]["role"] == "user":
                return i
        raise ConfigError(f"{asked}: found no message of the user")

    def _keep(
        self, answer: TextIterator, messages: list[dict[str, Any]], ids: list[int], plain: list[int]
    ) -> Iterator[str | Completion]:
        pieces: list[str] = []
        done = None
        try:
            for piece in answer:
                pieces.append(piece)
                yield piece
            done = answer.completion
        finally:
            answer.close()
            if pieces or done is not None:
                self._messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]
                # The tokens of a stop string belong to no turn: render again; the cache still has the tokens before.
                whole = done is not None and self._llm.tokenizer.decode(done.token_ids).strip() == done.text.strip()
                self._run_ids = [*ids, *done.token_ids] if whole else []
                self._plain_ids = plain
        yield done

    def _prompt(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """The ids to run, and the ids that the template renders from the messages' text."""
        plain = self._render(messages, to_answer=True)
        return self._extended(messages, plain) or plain, plain

    def _extended(self, messages: list[dict[str, Any]], plain: list[int]) -> list[int] | None:
        """The ids that were run + the template's end of that answer + the new turn. None if the template's rendering of
        the whole conversation does not begin with its rendering of the earlier part, or decodes to another text."""
        if not self._run_ids or messages[:-1] != self._messages:
            return None
        done = self._render(self._messages, to_answer=False)
        silent = self._render([*self._messages[:-1], {"role": "assistant", "content": ""}], to_answer=False)
        if plain[: len(done)] != done or silent[: len(self._plain_ids)] != self._plain_ids:
            return None
        ids = [*self._run_ids, *silent[len(self._plain_ids) :], *plain[len(done) :]]
        decode = self._llm.tokenizer.decode
        same = decode(ids, skip_special_tokens=False).split() == decode(plain, skip_special_tokens=False).split()
        return ids if same else None

    def _render(self, messages: Sequence[Mapping], *, to_answer: bool) -> list[int]:
        if self.is_transcript:
            return self._llm.encode(_transcript(self._system, messages, to_answer))
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return self._llm.chat_prompt(
            [*system, *messages], add_generation_prompt=to_answer, tools=self._tools, variables=self._variables
        )


def _transcript(system: str | None, messages: Sequence[Mapping], to_answer: bool) -> str:
    lines = [] if system is None else [system]
    lines += [f"{message['role'].capitalize()}: {message['content']}".rstrip() for message in messages]
    return "\n".join([*lines, "Assistant:"] if to_answer else lines)


def _exhaust(stream: TextIterator) -> Completion:
    for _ in stream:
        pass
    return stream.completion


def _checked(text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"message: found {text!r}, expected a text that is not empty")
    return text


def _checked_system(text: str | None) -> str | None:
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"system: found {text!r}, expected a text or None")
    return text


def _read(path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    def wrong(found: object, expected: str) -> ConfigError:
        return ConfigError(f"{path}: not a saved chat: found {str(found)[:60]!r}, expected {expected}")

    try:
        data = json.loads(read_text(path, str(path)))
    except (ValueError, RecursionError) as error:
        raise wrong(error, "JSON") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise wrong(data.get("format") if isinstance(data, dict) else data, f'"format": "{FORMAT}"')
    if data.get("version") != VERSION:
        raise wrong(data.get("version"), f"version {VERSION}")
    system, messages = data.get("system"), data.get("messages")
    if system is not None and not isinstance(system, str):
        raise wrong(system, "a system prompt that is text or null")
    if not isinstance(messages, list):
        raise wrong(messages, "a list of messages")
    for message in messages:
        texts = isinstance(message, dict) and all(isinstance(value, str) for value in message.values())
        if not texts or not {"role", "content"} <= message.keys():
            raise wrong(message, "messages with a role and a content")
    return system, messages
