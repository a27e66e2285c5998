"""A conversation, as the page shows it and as the browser keeps it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import exl
from exl.errors import ConfigError
from exl.remote_chat import RemoteChat, RemoteCompletion, RemoteModel, RemoteStream
from exl.saved_chat import SavedChat

from .worker import Job, Model, Worker, name_of

Message = dict[str, Any]
# Why an answer may go on, beside the values of ``Completion.limit``. A file does not say whether its last answer ended.
STOPPED, EDITED, UNKNOWN = "stopped", "edited", "unknown"


@dataclass(frozen=True)
class Reading:
    """The state of a job whose prompt is being computed."""

    tokens: int
    total: int


@dataclass(frozen=True)
class Answer:
    """The state of a job that answers, or has answered."""

    text: str
    done: exl.Completion | RemoteCompletion | None = None  # None: not finished, or stopped early
    logprobs: tuple[exl.TokenLogprob, ...] = ()
    num_tokens: int = 0  # so far; when done: of prompt and answer
    seconds: float = 0.0  # since the first token
    context: int = 0  # when done; 0: a server has not told it
    num_forgotten: int = 0  # of a chat's oldest messages: no longer shown to the model


class Conversation:
    """A list of messages, and the job that answers the last of them. Only the job changes it while it runs."""

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        """``saved``: from the browser, what ``record`` gave. Raises ``ConfigError`` if it is something else."""
        saved = {} if saved is None else saved
        self.id: str = str(saved.get("id") or secrets.token_hex(8))
        self.system: str | None = None
        self.cut: str | None = saved.get("cut")  # why the last answer may go on; None: it has ended
        self.job: Job | None = None
        self.told_forgotten = False
        self.sent: Any = None  # the version that the browser has
        self._messages: list[Message] = []
        self._turn: list[Message] = []  # the messages as they will be if the job ends as it is now
        self._chat: exl.Chat | RemoteChat | None = None
        self._llm: Model | None = None  # the chat's model
        self._model: str | None = None  # the name of the model that answered last
        if "chat" in saved:
            chat = SavedChat.from_json(saved["chat"], "conversation")
            self.system, self._messages, self._model = chat.system, chat.messages, chat.model

    @property
    def busy(self) -> bool:
        return self.job is not None and not self.job.is_done

    @property
    def messages(self) -> list[Message]:
        """With the answer in progress, as far as it has come."""
        return self._turn if self.busy else self._messages

    @property
    def can_continue(self) -> bool:
        return not self.busy and self.cut is not None and bool(self._messages) and is_answer(self._messages[-1])

    @property
    def version(self) -> Any:
        """Equal only if ``record`` is."""
        return self.busy, self.cut, len(self.messages), self.messages and self.messages[-1]

    def record(self) -> dict[str, Any]:
        """For the browser. ``chat`` is what ``Chat.save`` writes, so that the browser can save it as a file."""
        chat = SavedChat(self.system, self.messages, self._model)
        return {"id": self.id, "cut": STOPPED if self.busy else self.cut, "chat": chat.to_json()}

    def check_idle(self, asked: str) -> None:
        if self.busy:
            raise ConfigError(f"{asked}: an answer is still being written: stop it, or wait for its end")

    def answer(self, worker: Worker, turn: list[Message], system: str | None, options: Mapping[str, Any]) -> Job:
        """Begins a job that answers ``turn``, or goes on with the answer at its end. Its state is an ``Answer``; if it
        fails before there is a piece of the answer, the messages stay as they are."""
        self.check_idle("message")
        self._turn = turn
        self.job = worker.submit(lambda job: self._run(job, worker.loaded(), turn, system, options))
        return self.job

    def replace(self, messages: list[Message], cut: str | None = None) -> None:
        self.check_idle("edit")
        self._messages, self.cut = messages, cut

    def _run(self, job: Job, llm: Model, turn: list[Message], system: str | None, options: Mapping[str, Any]) -> None:
        goes_on = is_answer(turn[-1])
        chat = self._chat_with(llm, system, turn if goes_on else turn[:-1])
        options = {**options, **watched(job, llm)}
        stream = chat.stream_continue(**options) if goes_on else chat.stream(turn[-1]["content"], **options)
        before, begun = (turn[:-1], turn[-1]["content"]) if goes_on else (turn, "")
        last = None
        try:
            with closing(stream):
                for last in follow(job, llm, stream):
                    said = (begun + last.text).strip()
                    self._turn = [*before, {"role": "assistant", "content": said}] if said else turn
                    job.tell(replace(last, num_forgotten=chat.num_forgotten))
        finally:  # also if a server is gone in the middle of its answer
            if last is not None:
                self.system = system
                self._messages, self.cut = chat.messages, STOPPED if last.done is None else last.done.limit

    def _chat_with(self, llm: Model, system: str | None, messages: list[Message]) -> exl.Chat | RemoteChat:
        """The chat that has run these messages, if there is one, so that they are not computed again."""
        chat = self._chat
        if chat is None or self._llm is not llm or chat.messages != messages:
            self._chat, self._llm = llm.chat(system, messages=messages, overflow="drop-oldest"), llm
            self._model = name_of(llm)
        elif chat.system != system:
            chat.system = system
        return self._chat


def is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def reader(job: Job) -> Callable[[exl.PromptProgress], None]:
    """Tells how far the prompt has been read; raises ``Stopped`` in the middle of it, if the job has been stopped."""

    def read(progress: exl.PromptProgress) -> None:
        job.check()
        job.tell(Reading(progress.tokens, progress.total))

    return read


def watched(job: Job, llm: Model) -> dict[str, Any]:
    """Options of a request whose job can be stopped, and tells how far the prompt has been read."""
    if isinstance(llm, RemoteModel):
        return {"on_wait": lambda text: job.check()}
    return {"prompt_progress": reader(job)}


def follow(job: Job, llm: Model, stream: exl.TextIterator | RemoteStream) -> Iterator[Answer]:
    """The answer so far after each piece, until it ends or the job is stopped: also while it waits for its first piece,
    perhaps behind many others."""
    text, first = "", None
    job.when_stopped(stream.close)
    for piece in stream:
        job.when_stopped(None)
        now = time.perf_counter()
        first = now if first is None else first
        text += piece
        yield Answer(text, None, stream.logprobs or (), stream.num_tokens, now - first)
        if job.stopped:
            return
    if job.stopped:
        return
    done = stream.completion
    yield Answer(
        done.text, done, done.logprobs or (), done.num_prompt_tokens + done.num_tokens, context=llm.context or 0
    )
