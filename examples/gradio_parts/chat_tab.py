"""The chat: its conversations, which the browser keeps, the messages of one of them, and the field for the next."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from exl.errors import ConfigError
from exl.saved_chat import SavedChat, parse_saved

from . import render
from .conversation import UNKNOWN, Answer, Conversation, Reading
from .markdown import LATEX_DELIMITERS, shown_answer, shown_message, typed
from .session import Follower, Session, Sessions
from .settings import sampling_options
from .worker import Job, Model, Waiting, one_line

Update = dict[gr.blocks.Block, Any]
HINT = "Say something to begin."
STARTERS = {
    "chat": [
        "Why is the sky blue?",
        "Write a short poem about the sea.",
        "Give me three ideas for a rainy afternoon.",
        "Explain what a prime number is, with an example.",
    ],
    "stories": [
        "Tell me a story about a dog.",
        "Tim was sad because his ball was gone.",
        "Lily found a shiny stone in the park.",
        "One day, a cat and a bird met.",
    ],
}
SCRIPT = (Path(__file__).parent / "conversations.js").read_text(encoding="utf-8")
# The model answers all at once: events never wait in Gradio's queue.
FREE = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}


class ChatTab:
    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        with gr.Row(elem_id="chat-row"):
            with gr.Column(scale=0, min_width=210, elem_id="book-column"):
                self.book = gr.HTML(
                    elem_id="book", html_template="<nav></nav>", js_on_load=SCRIPT, apply_default_css=False
                )
                self.shelf = gr.HTML(elem_id="shelf", html_template="<nav></nav>", js_on_load=SCRIPT)
            with gr.Column(scale=1, min_width=280, elem_id="chat-column"):
                self.chatbot = gr.Chatbot(
                    elem_id="chatbot", show_label=False, buttons=["copy"], layout="bubble", allow_tags=False,
                    height=None, reasoning_tags=[("<think>", "</think>")], feedback_options=None, placeholder=HINT,
                    editable="all", latex_delimiters=LATEX_DELIMITERS, group_consecutive_messages=False,
                )  # fmt: skip
                self.notice = gr.HTML(elem_id="chat-notice", elem_classes="exl-optional")
                self.stats = gr.HTML(elem_id="chat-stats", elem_classes="exl-optional")
                self.message = gr.Textbox(
                    elem_id="message", show_label=False, label="Message", lines=1, max_lines=6, submit_btn=True,
                    placeholder="A message (Shift+Enter: a new line)", autofocus=True,
                )  # fmt: skip
                with gr.Row(elem_classes="exl-actions"):
                    self.go_on = gr.Button("Continue", size="sm", min_width=72, elem_id="continue", interactive=False)
                    self.retry = gr.Button("Retry", size="sm", min_width=72, elem_id="retry", interactive=False)
                    self.undo = gr.Button("Undo", size="sm", min_width=72, elem_id="undo", interactive=False)
                    self.seed = gr.HTML(elem_id="chat-seed")  # beside the buttons: with the stats it is too long

    def connect(self, system: gr.Textbox, sampling: list[gr.blocks.Block]) -> None:
        self.system = system
        asked = [system, *sampling]
        shown = [
            self.chatbot, self.message, self.stats, self.notice, self.book, self.go_on, self.retry, self.undo,
            self.seed, system,
        ]  # fmt: skip
        self.message.submit(self.on_send, [self.message, *asked], shown, **FREE)
        self.message.stop(self.on_stop, None, None, **FREE)
        self.chatbot.example_select(self.on_starter, asked, shown, **FREE)
        self.chatbot.edit(self.on_edit, asked, shown, **FREE)
        self.retry.click(self.on_retry, asked, shown, **FREE)
        self.go_on.click(self.on_continue, asked, shown, **FREE)
        self.undo.click(self.on_undo, None, shown, **FREE)
        self.book.select(self.on_book, None, shown, **FREE)
        self.outputs = shown

    # ---- events

    def on_send(self, request: gr.Request, text: str, system: str, *sampling: Any) -> Iterator[Update]:
        yield from self.begin(request, lambda session, options: session.send(text, system, options), sampling, text)

    def on_starter(self, request: gr.Request, chosen: gr.SelectData, system: str, *sampling: Any) -> Iterator[Update]:
        text = chosen.value["text"]
        yield from self.begin(request, lambda session, options: session.send(text, system, options), sampling, text)

    def on_retry(self, request: gr.Request, system: str, *sampling: Any) -> Iterator[Update]:
        yield from self.begin(request, lambda session, options: session.retry(system, options), sampling)

    def on_continue(self, request: gr.Request, system: str, *sampling: Any) -> Iterator[Update]:
        yield from self.begin(request, lambda session, options: session.go_on(system, options), sampling)

    def on_edit(self, request: gr.Request, edit: gr.EditData, system: str, *sampling: Any) -> Iterator[Update]:
        place = edit.index[0] if isinstance(edit.index, list | tuple) else edit.index
        text = typed(edit.value)
        yield from self.begin(request, lambda session, options: session.edit(place, text, system, options), sampling)

    def on_stop(self, request: gr.Request) -> None:
        self.session(request).stop_answer()

    def on_undo(self, request: gr.Request) -> Update:
        session = self.session(request)
        try:
            text = session.undo()
        except Exception as error:
            return {self.notice: render.notice(one_line(error))}
        return {**self.shown(session), self.message: text}

    def on_book(self, request: gr.Request, event: gr.EventData) -> Iterator[Update]:
        """Something was chosen in the list. ``drop``: the id of a deleted conversation; ``open``: the record of one to
        show, or None for a new one; ``file`` and ``text``: the name and the content of a file to import."""
        session, asked = self.session(request), event._data
        try:
            if "drop" in asked:
                session.drop(asked["drop"])
            if "file" in asked:
                session.open({"chat": read_file(asked["file"], asked["text"]), "cut": UNKNOWN})
            elif "open" in asked:
                session.open(asked["open"])
        except Exception as error:
            yield {self.notice: render.notice(one_line(error))}
            return
        yield from self.show(session)

    def session(self, request: gr.Request) -> Session:
        return self.sessions.of(request.session_hash)

    # ---- what the page shows

    def begin(
        self, request: gr.Request, ask: Callable[[Session, dict], Job | None], sampling: tuple, text: str | None = None
    ) -> Iterator[Update]:
        session = self.session(request)
        try:
            job = ask(session, sampling_options(*sampling))
        except Exception as error:
            yield {self.notice: render.notice(one_line(error)), self.chatbot: shown_messages(session.messages)}
            return
        with session.following() as me:
            shown, conversation = self.shown(session), session.conversation
            if text is not None:
                busy = conversation.busy
                shown[self.message] = gr.Textbox("", submit_btn=not busy, stop_btn=busy)
            yield shown
            if job is not None:
                yield from self.follow(session, conversation, me, text)

    def show(self, session: Session) -> Iterator[Update]:
        """A conversation that was opened, with its answer in progress."""
        with session.following() as me:
            conversation = session.conversation
            # A new conversation begins with the system prompt that is there.
            yield self.shown(session) | ({self.system: conversation.system or ""} if conversation.messages else {})
            if conversation.busy:
                yield from self.follow(session, conversation, me)

    def shown(self, session: Session) -> Update:
        """The whole of the session's conversation."""
        conversation = session.conversation
        busy, nothing = conversation.busy, not any(m["role"] == "user" for m in conversation.messages)
        return {
            self.chatbot: shown_messages(conversation.messages, busy),
            self.message: gr.Textbox(submit_btn=not busy, stop_btn=busy),
            self.stats: "",
            self.seed: "",
            self.notice: "",
            self.book: self.kept(conversation),
            self.go_on: gr.Button(interactive=conversation.can_continue),
            self.retry: gr.Button(interactive=not busy and not nothing),
            self.undo: gr.Button(interactive=not busy and not nothing),
        }

    def follow(
        self, session: Session, conversation: Conversation, me: Follower, text: str | None = None
    ) -> Iterator[Update]:
        """Updates the page while an answer is generated, and after it, unless the page shows another conversation by
        then. If there is no answer, ``text`` goes back into the field."""
        job, last = conversation.job, Answer("")
        for state in job.watch(until=me.asked_to_end):
            if isinstance(state, Waiting | Reading):
                yield {self.stats: render.before_answer(state)}
            else:
                last = state
                yield {
                    self.chatbot: shown_messages(conversation.messages, busy=True),
                    self.stats: render.answering(state),
                    self.book: self.kept(conversation),
                }
        if not me.asked_to_end.is_set():
            yield self.ended(session, job, last, text)
            conversation.sent = conversation.version

    def ended(self, session: Session, job: Job, last: Answer, text: str | None) -> Update:
        conversation, failed = session.conversation, job.failure or ""
        told = render.notice(failed)
        if not failed and last.num_forgotten and not conversation.told_forgotten:
            conversation.told_forgotten = True
            told = render.notice(FORGOTTEN.format(last.num_forgotten), "note")
        shown = {
            **self.shown(session),
            self.stats: "" if failed else render.stats(last.done, last.num_tokens, last.context),
            self.seed: "" if failed else render.seed(last.done),
            self.notice: told,
        }
        if text is not None and not last.text and last.done is None:
            shown[self.message] = gr.Textbox(text, submit_btn=True, stop_btn=False)
        return shown

    def kept(self, *conversations: Conversation) -> str:
        """What the browser is to keep; the first one is shown."""
        return json.dumps({"show": conversations[0].id, "keep": [c.record() for c in conversations]})

    def on_tick(self, session: Session) -> Update:
        """Conversations that have gone on although the page shows another."""
        changed = session.changed_elsewhere()
        return {self.shelf: self.kept(session.conversation, *changed)} if changed else {}

    @staticmethod
    def for_model(llm: Model | None) -> dict[str, Any]:
        """Properties of the chatbot: a hint and starters that fit the model."""
        notice = None if llm is None else llm.chat().notice
        starters = STARTERS["chat" if notice is None else "stories"]
        return {"placeholder": notice or HINT, "examples": [{"text": text} for text in starters]}


FORGOTTEN = (
    "The conversation no longer fits the context: the model is not shown the oldest {} messages any more. They are "
    "still kept here."
)


def shown_messages(messages: list[dict[str, Any]], busy: bool = False) -> list[dict[str, Any]]:
    """One message for each, so that an edit's index is the same here and there."""
    shown = []
    for message in messages:
        text = text_of(message["content"])
        if message["role"] == "user":
            shown.append({"role": "user", "content": shown_message(text)})
        else:
            shown.append({"role": "assistant", "content": shown_answer(text) or "(no text)"})
    if busy and messages and messages[-1]["role"] == "user":
        shown.append({"role": "assistant", "content": "…"})
    return shown


def text_of(content: Any) -> str:
    """The text of a message's content, which may be a list of parts, or None for a call of tools."""
    if isinstance(content, list):
        return "\n".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content or ""


def read_file(name: str, text: str | None) -> Any:
    """The saved chat in a file; ``text``: None if the file is too large. Raises ``ConfigError`` for anything else."""
    if text is None:
        raise ConfigError(f"{name}: not a saved chat: found more than 20 MB")
    data = parse_saved(text, name)
    SavedChat.from_json(data, name)
    return data
