"""Conversations with a model that a server has loaded: what ``exl.Chat`` does, over HTTP, without torch."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl.conversation import LEAST_ROOM, MAX_ANSWER, Conversation, Message
from exl.errors import ConfigError, ExlError
from exl.http_client import EventReader, HttpClient, ServerError
from exl.sampling_params import OPTIONS
from exl.saved_chat import SavedChat

_TICK = 0.1  # seconds between two looks whether the user has had enough
_LOADING_PAUSE = 0.5  # seconds between two questions whether the model is loaded
_OPTIONS = (*OPTIONS, "stop")
_OPEN, _CLOSE = "<think>\n", "\n</think>\n\n"  # how a stream shows thoughts, as a model's own text does
# Called again and again while there is nothing to show, with what is waited for; what it raises ends the request.
Wait = Callable[[str], None]


class RemoteModel:
    """A model of a server that speaks OpenAI's protocol, made by ``connect``."""

    def __init__(self, client: HttpClient, name: str, context: int | None) -> None:
        self.client, self.name = client, name
        self.context = context  # tokens; None: the server does not say

    @classmethod
    def connect(
        cls, url: str, key: str | None = None, name: str | None = None, wait: Wait | None = None
    ) -> RemoteModel:
        """``name``: one of the server's models; None: its first. Waits for one that is being loaded. Raises
        ``ConfigError`` for an address or a name that is none, ``ServerError`` if the server is not there."""
        client = HttpClient(url, key)
        while True:
            found = _find(client, name)
            status = found.get("status")
            status = status if isinstance(status, dict) else {}
            if status.get("value") != "loading":
                break
            if wait is not None:
                wait(f"the server is loading {found['id']}: {float(status.get('progress') or 0):.0%}")
            time.sleep(_LOADING_PAUSE)
        context = found.get("max_model_len")
        return cls(client, str(found["id"]), context if isinstance(context, int) else None)

    @property
    def url(self) -> str:
        return self.client.url

    def chat(
        self, system: str | None = None, *, messages: Sequence[Mapping[str, Any]] = (), overflow: str = "error"
    ) -> RemoteChat:
        """A new conversation; arguments as for ``LLM.chat``."""
        return RemoteChat(self, system, messages=messages, overflow=overflow)

    def load_chat(self, path: str | Path, *, overflow: str = "error") -> RemoteChat:
        """A conversation that ``save`` wrote, here or with a model that was loaded here. Raises ``ConfigError``."""
        saved = SavedChat.load(path)
        chat = self.chat(saved.system, overflow=overflow)
        chat._take(saved)
        return chat


def _find(client: HttpClient, name: str | None) -> dict[str, Any]:
    """What the server tells of a model."""
    told = client.get("/v1/models")
    models = told.get("data") if isinstance(told, dict) else None
    found = [one for one in models or () if isinstance(one, dict) and isinstance(one.get("id"), str)]
    if not found:
        raise ServerError(f"{client.url}: found no models, expected a server of OpenAI's protocol")
    if name is None:
        return found[0]
    for one in found:
        if one["id"] == name:
            return one
    known = ", ".join(repr(one["id"]) for one in found)
    raise ConfigError(f"--model: found {name!r}, the server at {client.url} has {known}")


@dataclass(frozen=True)
class RemoteCompletion:
    """An answer that has ended; fields as those of ``exl.Completion``, as far as a server tells them."""

    text: str
    finish_reason: str
    limit: str | None  # "max_tokens" or "context", if they cut it off
    num_prompt_tokens: int
    num_reused_tokens: int
    num_tokens: int
    prompt_seconds: float  # from the request to the first piece, with the way there and back
    decode_seconds: float
    seed: None = None  # the server does not tell the one that it drew
    logprobs: None = None

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 if there is no second token."""
        return (self.num_tokens - 1) / self.decode_seconds if self.num_tokens > 1 and self.decode_seconds else 0.0


class RemoteChat(Conversation):
    """A conversation with a server's model, made by ``RemoteModel.chat``. Not thread-safe.

    The server computes again what has left its cache, and nothing else. Thoughts that it tells apart stand in an answer
    as the model would have written them, between ``<think>`` and ``</think>``, and are not sent back.
    """

    notice = None  # what a user should know before they talk

    def __init__(
        self,
        model: RemoteModel,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        overflow: str = "error",
    ) -> None:
        """Arguments as for ``exl.Chat``. With ``overflow="drop-oldest"``, about half of the text is no longer sent when
        the context is full."""
        super().__init__(model.name, system, messages, overflow)
        self._server = model
        self._num_tokens: int | None = None

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the conversation so far, as the server counted them at its last answer; None: not known."""
        return self._num_tokens

    def stream(self, text: str | None, *, on_wait: Wait | None = None, **options: Any) -> RemoteStream:
        """Pieces of the answer to a message; None: to the messages that are there. ``options``: those of sampling,
        ``max_tokens`` and ``stop``. What came of an answer that is closed, or breaks, is kept. Raises ``ExlError``."""
        return self._begin(self._asked(text), "", on_wait, options)

    def stream_retry(self, *, on_wait: Wait | None = None, **options: Any) -> RemoteStream:
        """Another answer to the last message of the user's; the old one is kept if no piece of it comes."""
        return self._begin(self._asked_again(), "", on_wait, options)

    def stream_continue(self, *, on_wait: Wait | None = None, **options: Any) -> RemoteStream:
        """Goes on with the last answer where it ended."""
        before, begun = self._begun()
        return self._begin(before, begun, on_wait, options)

    def _changed(self) -> None:
        self._num_tokens = None

    def _begin(
        self, messages: list[Message], begun: str, on_wait: Wait | None, options: dict[str, Any]
    ) -> RemoteStream:
        unknown = next((name for name in options if name not in _OPTIONS), None)
        if unknown is not None:
            raise ConfigError(f"{unknown}: a server's chat does not take it; it takes {', '.join(_OPTIONS)}")
        forgotten = min(self._forgotten, len(messages) - 1)
        context, used = self._server.context, self._num_tokens
        if self._overflow == "drop-oldest" and context and used and context - used < context // LEAST_ROOM:
            forgotten = _with_less(messages, forgotten) or forgotten
        return RemoteStream(self, messages, begun, forgotten, on_wait, options)

    def _body(self, stream: RemoteStream) -> dict[str, Any]:
        begun = [{"role": "assistant", "content": stream.begun}] if stream.begun else []
        shown = [*stream.messages[stream.forgotten :], *begun]
        context, used = self._server.context, self._num_tokens or 0
        room = MAX_ANSWER if context is None else max(1, min(MAX_ANSWER, (context - used) // 2))
        return {
            "model": self._server.name,
            "messages": [_without_thoughts(message) for message in self._with_system(shown)],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": room,
            **({"continue_final_message": True} if begun else {}),
            **{name: value for name, value in stream.options.items() if value is not None},
        }

    def _keep(self, stream: RemoteStream) -> None:
        """Takes an answer into the conversation, as far as it came."""
        if not stream.text and stream._completion is None:
            return
        said = {"role": "assistant", "content": (stream.begun + stream.text).strip()}
        self._messages, self._forgotten = [*stream.messages, said], stream.forgotten
        done = stream._completion
        self._num_tokens = None if done is None else done.num_prompt_tokens + done.num_tokens

    def __repr__(self) -> str:
        return f"RemoteChat({self._server.name} at {self._server.url}, {len(self._messages)} messages)"


class RemoteStream:
    """Pieces of an answer as they come; ``completion`` once it is exhausted. ``close`` ends the request, and so does
    the end of a ``with`` block."""

    logprobs = None

    def __init__(
        self,
        chat: RemoteChat,
        messages: list[Message],
        begun: str,
        forgotten: int,
        on_wait: Wait | None,
        options: Mapping[str, Any],
    ) -> None:
        self.messages, self.begun, self.forgotten = messages, begun, forgotten
        self.text = ""  # so far
        self.num_tokens = 0  # so far, about: pieces, until the server has counted them
        self.options = options
        self._chat, self._on_wait = chat, on_wait
        self._completion: RemoteCompletion | None = None
        self._closed = False
        self._reader = self._ask()
        self._pieces = self._read()

    def _ask(self) -> EventReader:
        self._asked = time.perf_counter()
        self._first = self._last = 0.0
        self._reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._timings: dict[str, Any] = {}
        self._is_thinking = False
        return self._chat._server.client.post_events("/v1/chat/completions", self._chat._body(self))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._closed:
            raise StopIteration
        try:
            return next(self._pieces)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RemoteStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._reader.close()
            self._chat._keep(self)

    @property
    def completion(self) -> RemoteCompletion:
        """Available after the last piece; before that, raises ``ExlError``."""
        if self._completion is None:
            raise ExlError("this stream has not ended: take its pieces first, then ask for its completion")
        return self._completion

    def _read(self) -> Iterator[str]:
        while True:
            try:
                data = self._next()
                chunk = None if data == "[DONE]" else _parsed(data)
            except (EOFError, ServerError) as error:
                if self._may_ask_again(error):
                    continue
                if self._closed:
                    return
                raise self._broken(error) from None
            if chunk is None:
                self._completion = self._told()
                return
            for piece in self._take(chunk):
                self.num_tokens += 1
                self.text += piece
                yield piece

    def _next(self) -> str:
        while not self._closed:
            try:
                return self._reader.next(_TICK)
            except queue.Empty:
                self._wait("waiting for the server")
        raise EOFError

    def _wait(self, text: str) -> None:
        if self._on_wait is not None:
            self._on_wait("" if self.text else text)

    def _may_ask_again(self, error: EOFError | ServerError) -> bool:
        """Waits for a model that loads, and leaves out the oldest messages of a conversation that is too long."""
        if self.text or not isinstance(error, ServerError):
            return False
        if error.code == "model_loading":
            until = time.monotonic() + max(_LOADING_PAUSE, error.wait)
            while not self._closed and time.monotonic() < until:
                self._wait(str(error))
                time.sleep(_TICK)
        elif error.code == "context_length_exceeded" and self._chat._overflow == "drop-oldest":
            less = _with_less(self.messages, self.forgotten)
            if less is None:
                return False
            self.forgotten = less
        else:
            return False
        if self._closed:
            return False
        self._reader = self._ask()
        if self._closed:  # by another thread, which may have seen the reader before
            self._reader.close()
        return True

    def _take(self, chunk: dict[str, Any]) -> Iterator[str]:
        """The text of a chunk, with the tags around thoughts."""
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        if isinstance(chunk.get("timings"), dict):
            self._timings = chunk["timings"]
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            self._reason = choice.get("finish_reason") or self._reason
            for thought, piece in ((True, delta.get("reasoning_content")), (False, delta.get("content"))):
                if piece:
                    self._last = time.perf_counter()
                    self._first = self._first or self._last
                    tag = ""
                    if thought != self._is_thinking:
                        tag, self._is_thinking = (_OPEN if thought else _CLOSE), thought
                    yield tag + piece

    def _told(self) -> RemoteCompletion:
        """What the server tells of the answer, which has ended."""
        usage, context = self._usage, self._chat._server.context
        num_prompt = _count(usage.get("prompt_tokens"))
        num_tokens = _count(usage.get("completion_tokens")) or self.num_tokens
        self.num_tokens = num_tokens
        details = usage.get("prompt_tokens_details")
        limit = None
        if self._reason == "length":
            limit = "context" if context is not None and num_prompt + num_tokens >= context else "max_tokens"
        return RemoteCompletion(
            text=self.text,
            finish_reason=self._reason or "stop",
            limit=limit,
            num_prompt_tokens=num_prompt,
            num_reused_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
            num_tokens=num_tokens,
            prompt_seconds=max(0.0, self._first - self._asked),
            # Pieces may come several at once: the server knows better how long they took.
            decode_seconds=_number(self._timings.get("predicted_ms")) / 1e3 or self._last - self._first,
        )

    def _broken(self, error: EOFError | ServerError) -> ServerError:
        why = str(error) or f"{self._chat._server.url}: the server ended the stream too early"
        if not self.text:
            return error if isinstance(error, ServerError) else ServerError(why)
        return ServerError(f"{why}; what came of the answer is kept, and it can be continued")


def _parsed(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        raise ServerError(f"the server sent {data[:60]!r}, expected JSON") from None
    if not isinstance(chunk, dict):
        raise ServerError(f"the server sent {data[:60]!r}, expected an object")
    error = chunk.get("error")
    if error:
        told = error if isinstance(error, dict) else {"message": error}
        raise ServerError(str(told.get("message")), code=str(told.get("code") or ""))
    return chunk


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _with_less(messages: Sequence[Message], forgotten: int) -> int | None:
    """How many of the oldest messages to leave out so that about half of the text is left; None: no more can go."""
    begins = [i for i, message in enumerate(messages) if message["role"] == "user" and i > forgotten]
    if not begins:
        return None
    sizes = [len(str(message.get("content") or "")) for message in messages]
    half = sum(sizes[forgotten:]) // 2
    return next((begin for begin in begins if sum(sizes[begin:]) <= half), begins[-1])


def _without_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the server is sent it: what a model thought is not part of what it said."""
    content = message.get("content")
    sent = {name: value for name, value in message.items() if name != "reasoning_content"}
    if message["role"] == "assistant" and isinstance(content, str) and content.startswith("<think>"):
        sent["content"] = content.partition("</think>")[2].lstrip() or content
    return sent
