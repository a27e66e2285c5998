"""The state of one browser tab: its conversations and its other jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from exl.errors import ConfigError

from .conversation import EDITED, Conversation, Message, follow, reader
from .worker import Job, Worker

# A tab that is reloaded is back within this time, and finds its conversations and its answer in progress.
GRACE = 10.0  # seconds


class Follower:
    """The event that updates the page while an answer is generated."""

    def __init__(self) -> None:
        self.asked_to_end = threading.Event()
        self.has_ended = threading.Event()


class Session:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.job: Job | None = None  # a completion, or the loading of a model
        self.follower: Follower | None = None
        self.seen: Any = None  # the model and status that the page shows
        self.asked: Any = None  # the form's values when Plan or Load was pressed; None after a change
        self.conversation = Conversation()  # that the page shows
        self.conversations: dict[str, Conversation] = {}  # that this session has shown

    # ---- completions and loads

    def submit(self, run: Callable[[Job], None], *, alone: bool = False) -> Job:
        """Begins a job (``Worker.submit``). Raises ``ConfigError`` if the tab still has an unfinished one."""
        if self.job is not None and not self.job.is_done:
            raise ConfigError("this tab still waits for its model: stop it, or wait for its end")
        self.job = self.worker.submit(run, alone=alone)
        return self.job

    def complete(self, prompt: str, top_logprobs: int, options: dict[str, Any]) -> Job:
        """Begins a job that tells ``Answer`` with the tokens' probabilities. ``prompt`` may be empty."""

        def run(job: Job) -> None:
            llm = self.worker.loaded()
            asked = {**options, "top_logprobs": top_logprobs, "prompt_progress": reader(job)}
            with closing(llm.stream(prompt, **asked)) as stream:
                for answer in follow(job, llm, stream):
                    job.tell(answer)

        return self.submit(run)

    def stop(self) -> None:
        """Stops a completion."""
        if self.job is not None:
            self.job.stop()

    # ---- conversations

    @property
    def messages(self) -> list[Message]:
        return self.conversation.messages

    def open(self, saved: Mapping[str, Any] | None) -> Conversation:
        """Shows a conversation that the browser has kept, or a new one. If this session has it too, it is the newer."""
        opened = Conversation(saved)
        known = self.conversations.setdefault(opened.id, opened)
        if known is not opened and not known.busy and known.version == known.sent:
            known.replace(opened.messages, opened.cut)  # another tab may have gone on with it
            known.system = opened.system
        self.conversation = known
        return known

    def drop(self, key: str) -> None:
        """Forgets a conversation that was deleted."""
        dropped = self.conversations.pop(key, None)
        if dropped is not None and dropped.job is not None:
            dropped.job.stop()
        if self.conversation.id == key:
            self.open(None)

    def send(self, text: str, system: str | None, options: dict[str, Any]) -> Job:
        return self._answer([*self.messages, _message(text)], system, options)

    def retry(self, system: str | None, options: dict[str, Any]) -> Job:
        return self._answer(self.messages[: self._last_of_user("retry") + 1], system, options)

    def go_on(self, system: str | None, options: dict[str, Any]) -> Job:
        """Goes on with an answer that was cut off."""
        if not self.conversation.can_continue:
            raise ConfigError("continue: found no answer that was cut off")
        return self._answer(self.messages, system, options)

    def edit(self, i: int, text: str, system: str | None, options: dict[str, Any]) -> Job | None:
        """Changes message ``i``. One of the user is answered anew, and what came after it is cut off: returns the job.
        An answer only becomes what the model is shown from now on, also if it goes on with it: returns None."""
        if not 0 <= i < len(self.messages):
            raise ConfigError("edit: this message is no longer there")
        edited = {**self.messages[i], **_message(text, self.messages[i]["role"])}
        if edited["role"] == "user":
            return self._answer([*self.messages[:i], edited], system, options)
        is_last = i == len(self.messages) - 1
        cut = EDITED if is_last else self.conversation.cut
        self.conversation.replace([*self.messages[:i], edited, *self.messages[i + 1 :]], cut)
        return None

    def undo(self) -> str:
        """Removes the last user message and its answer. Returns that message's text."""
        self.conversation.check_idle("undo")
        last = self._last_of_user("undo")
        text = self.messages[last]["content"]
        self.conversation.replace(self.messages[:last])
        return text

    def stop_answer(self) -> None:
        if self.conversation.job is not None:
            self.conversation.job.stop()

    def stop_all(self) -> None:
        self.stop()
        for conversation in [self.conversation, *self.conversations.values()]:
            if conversation.job is not None:
                conversation.job.stop()

    @contextmanager
    def following(self) -> Iterator[Follower]:
        """Of a tab's events one at a time updates the page: waits until the one before has ended, so that nothing of
        it reaches the page later."""
        before, self.follower = self.follower, Follower()
        if before is not None:
            before.asked_to_end.set()
            before.has_ended.wait(1.0)  # longer only if its page is gone
        me = self.follower
        try:
            yield me
        finally:
            me.has_ended.set()

    def come_back(self) -> None:
        """The page was loaded again: what it was sent before may not have reached it."""
        self.seen = None
        for conversation in self.conversations.values():
            conversation.sent = None

    def changed_elsewhere(self) -> list[Conversation]:
        """Conversations that the page does not show, which have changed since this was asked last."""
        changed = [c for c in self.conversations.values() if c is not self.conversation and c.version != c.sent]
        for conversation in changed:
            conversation.sent = conversation.version
        return changed

    def _answer(self, turn: list[Message], system: str | None, options: dict[str, Any]) -> Job:
        self.conversations[self.conversation.id] = self.conversation
        return self.conversation.answer(self.worker, turn, (system or "").strip() or None, options)

    def _last_of_user(self, asked: str) -> int:
        found = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not found:
            raise ConfigError(f"{asked}: found no message of the user")
        return found[-1]


class Sessions:
    """The sessions of all browser tabs. The server has a new key for a tab each time that it is loaded; the tab's own
    name stays."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._sessions: dict[str, Session] = {}  # by the server's key
        self._left: dict[str, Session] = {}  # by the tab's name: it has gone, and may come back
        self._names: dict[str, str] = {}  # the server's key -> the tab's name
        self._lock = threading.Lock()

    def of(self, key: str) -> Session:
        with self._lock:
            return self._sessions.setdefault(key, Session(self._worker))

    def enter(self, key: str, name: str) -> tuple[Session, bool]:
        """A tab has loaded the page. ``name`` is the tab's alone: if it had a session, it goes on with that, and the
        second result is True."""
        with self._lock:
            known = self._left.pop(name, None)
            before = next((old for old, other in self._names.items() if other == name and old != key), None)
            if before is not None:  # the server has not noticed yet that it has gone
                del self._names[before]
                known = self._sessions.pop(before, known)
            self._names[key] = name
            session = self._sessions[key] = known or self._sessions.get(key) or Session(self._worker)
        if known is not None:
            known.come_back()
        return session, known is not None

    def leave(self, key: str) -> None:
        """A tab has gone. Unless it is back soon, its jobs are stopped, because nobody reads what they write."""
        with self._lock:
            session, name = self._sessions.pop(key, None), self._names.pop(key, None)
            if session is None:
                return
            if name is not None:
                self._left[name] = session
        timer = threading.Timer(0 if name is None else GRACE, self._forget, (name, session))
        timer.daemon = True
        timer.start()

    def _forget(self, name: str | None, session: Session) -> None:
        with self._lock:
            gone = name is None or self._left.get(name) is session
            if gone and name is not None:
                del self._left[name]
        if gone:
            session.stop_all()


def _message(text: str, role: str = "user") -> Message:
    if not text.strip():
        raise ConfigError("message: found nothing, expected a text to answer")
    return {"role": role, "content": text}
