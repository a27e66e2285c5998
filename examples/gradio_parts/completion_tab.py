"""The completion of a text, token by token, each with its probability and its alternatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

import exl

from . import render
from .chat_tab import FREE, Update
from .conversation import Answer, Reading
from .session import Sessions
from .settings import sampling_options
from .worker import Waiting, one_line, talks

TOP_LOGPROBS = 5
BEGINNINGS = {
    "chat": ["The capital of France is", "Here is a recipe for pancakes:", "def is_prime(n):"],
    "stories": ["Once upon a time", "One day, a little cat", "Lily and Tom went to the park"],
}


class CompletionTab:
    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.prompt = gr.Textbox(
            BEGINNINGS["stories"][0], elem_id="prompt", label="Prompt", lines=3, max_lines=10,
            placeholder="The beginning of a text: Ctrl+Enter completes it",
        )  # fmt: skip
        with gr.Row(elem_classes="exl-actions"):
            self.beginnings = gr.Dataset(
                components=[self.prompt], samples=[[text] for text in BEGINNINGS["stories"]], show_label=False,
                elem_id="beginnings", layout="gallery",
            )  # fmt: skip
            self.stop = gr.Button(
                "Stop", variant="stop", size="sm", min_width=110, visible=False, elem_id="stop-completion"
            )
            self.complete = gr.Button("Complete", variant="primary", size="sm", min_width=110, elem_id="complete")
        self.stats = gr.HTML(elem_id="completion-stats", elem_classes="exl-optional")
        self.notice = gr.HTML(elem_id="completion-notice", elem_classes="exl-optional")
        self.tokens = gr.HTML(elem_id="tokens")
        gr.HTML(render.legend())

    def connect(self, sampling: list[gr.blocks.Block]) -> None:
        shown = [self.tokens, self.stats, self.notice, self.complete, self.stop]
        self.complete.click(self.on_complete, [self.prompt, *sampling], shown, **FREE)
        self.stop.click(self.on_stop, None, None, **FREE)
        self.beginnings.click(lambda chosen: chosen[0], self.beginnings, self.prompt, **FREE)

    def on_stop(self, request: gr.Request) -> None:
        self.sessions.of(request.session_hash).stop()

    def on_complete(self, request: gr.Request, prompt: str, *sampling: Any) -> Iterator[Update]:
        session = self.sessions.of(request.session_hash)
        try:
            job = session.complete(prompt, TOP_LOGPROBS, sampling_options(*sampling))
        except Exception as error:
            yield {self.notice: render.notice(one_line(error))}
            return
        yield {
            self.tokens: render.tokens(prompt, ()), self.notice: "", self.stats: "",
            self.complete: gr.Button(visible=False), self.stop: gr.Button(visible=True),
        }  # fmt: skip
        last = Answer("")
        for state in job.watch():
            if isinstance(state, Waiting | Reading):
                yield {self.stats: render.before_answer(state)}
            else:
                last = state
                yield {self.tokens: render.tokens(prompt, last.logprobs), self.stats: render.answering(last)}
        yield {
            self.stats: "" if job.failure else render.stats(last.done, last.num_tokens, last.context, with_seed=True),
            self.notice: render.notice(job.failure or ""),
            self.complete: gr.Button(visible=True), self.stop: gr.Button(visible=False),
        }  # fmt: skip

    @staticmethod
    def for_model(llm: exl.LLM | None) -> gr.Dataset:
        """Beginnings that fit the model."""
        return gr.Dataset(samples=[[text] for text in BEGINNINGS["chat" if talks(llm) else "stories"]])
