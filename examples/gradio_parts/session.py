"""The state of one browser tab: its conversation and its job in the queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import exl
from exl.errors import ConfigError

from .worker import Job, Worker

Message = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """An answer, complete or as far as it has been generated."""

    text: str
    done: exl.Completion | None = None  # None: not finished, or stopped early
    logprobs: tuple[exl.TokenLogprob, ...] = ()
    num_tokens: int = 0  # of prompt and answer, when done
    context: int = 0


class Session:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.job: Job | None = None
        self.seen: Any = None  # the model and status that the page shows
        self.asked: Any = None  # the form's values when Plan or Load was pressed; None after a change
        self._chat: exl.Chat | None = None
        self._llm: exl.LLM | None = None  # the chat's model

    @property
    def messages(self) -> list[Message]:
        return [] if self._chat is None else self._chat.messages

    def submit(self, run: Callable[[Job], None]) -> Job:
        """Queues a job. Raises ``ConfigError`` if the tab still has an unfinished one."""
        if self.busy:
            raise ConfigError("this tab still waits for an answer: stop it, or wait for its end")
        self.job = self.worker.submit(run)
        return self.job

    @property
    def busy(self) -> bool:
        return self.job is not None and not self.job.is_done

    def stop(self) -> None:
        if self.job is not None:
            self.job.stop()

    def send(self, text: str, system: str | None, options: dict[str, Any]) -> Job:
        if not text.strip():
            raise ConfigError("message: found nothing, expected a text to answer")
        return self.submit(lambda job: self._answer(job, system, lambda chat: chat.stream(text, **options)))

    def retry(self, system: str | None, options: dict[str, Any]) -> Job:
        if not self.messages:
            raise ConfigError("retry: there is no message to answer again")
        return self.submit(lambda job: self._answer(job, system, lambda chat: chat.stream_retry(**options)))

    def complete(self, prompt: str, top_logprobs: int, options: dict[str, Any]) -> Job:
        """Queues a job that tells ``Answer`` with the tokens' probabilities. ``prompt`` may be empty."""

        def run(job: Job) -> None:
            llm = self.worker.loaded()
            with closing(llm.stream(prompt, top_logprobs=top_logprobs, **options)) as stream:
                _follow(job, llm, stream)

        return self.submit(run)

    def undo(self) -> str:
        """Removes the last user message and its answer. Returns that message's text."""
        if self.busy:
            raise ConfigError("undo: an answer is still being written: stop it first")
        if self._chat is None:
            raise ConfigError("undo: there is no message to take back")
        return self._chat.undo()

    def clear(self) -> None:
        self.stop()
        self._chat = None

    def _answer(self, job: Job, system: str | None, begin: Callable[[exl.Chat], exl.TextIterator]) -> None:
        llm = self.worker.loaded()
        with closing(begin(self._chat_with(llm, (system or "").strip() or None))) as stream:
            _follow(job, llm, stream)

    def _chat_with(self, llm: exl.LLM, system: str | None) -> exl.Chat:
        """The conversation; if the model has changed, a new one with the same messages."""
        if self._chat is None or self._llm is not llm:
            chat = llm.chat(system)
            messages = self.messages
            for message, answer in zip(messages[::2], messages[1::2], strict=True):
                if answer["content"]:  # leave out turns without an answer
                    chat.add(message["role"], message["content"])
                    chat.add(answer["role"], answer["content"])
            self._chat, self._llm = chat, llm
        if self._chat.system != system:
            self._chat.system = system
        return self._chat


class Sessions:
    """The sessions of all browser tabs, by the server's key for each tab."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, key: str) -> Session:
        with self._lock:
            return self._sessions.setdefault(key, Session(self._worker))

    def drop(self, key: str) -> None:
        """Forgets a closed tab and stops its job, whose result nobody reads."""
        with self._lock:
            session = self._sessions.pop(key, None)
        if session is not None:
            session.stop()


def _follow(job: Job, llm: exl.LLM, stream: exl.TextIterator) -> None:
    """Tells the answer so far after each piece, until it ends or the job is stopped."""
    text = ""
    job.tell(Answer(text))
    for piece in stream:
        text += piece
        job.tell(Answer(text, logprobs=stream.logprobs or ()))
        if job.stopped:
            return
    done = stream.completion
    num_tokens = done.num_prompt_tokens + done.num_tokens
    job.tell(Answer(done.text, done, done.logprobs or (), num_tokens, llm.context))
