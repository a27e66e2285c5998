"""A demo in the browser: chat, completion with token probabilities, and the memory plan.

python examples/gradio_demo.py
python examples/gradio_demo.py path/to/model another/model --kv-cache q8 --ram 8GB

Needs Gradio: pip install ".[demo]". Everything is local: the page loads no remote fonts, scripts or analytics.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_parts import render
from gradio_parts.session import Answer, Session, Sessions
from gradio_parts.settings import LoadSettings, load_settings, sampling_options
from gradio_parts.worker import Job, Loading, Waiting, Worker, one_line

import exl
from exl.checkpoint.hub import BUNDLED_MODEL

PARTS = Path(__file__).parent / "gradio_parts"
KV_CACHES = ["f32", "f16", "q8", "k8v4", "q4"]
TOP_LOGPROBS = 5
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"]
MONO_FONTS = ["ui-monospace", "SF Mono", "Consolas", "DejaVu Sans Mono", "monospace"]

Update = dict[gr.blocks.Block, Any]


class Page:
    """The components of the page, and their event handlers."""

    def __init__(self, worker: Worker, models: list[str], first: LoadSettings) -> None:
        self.worker, self.sessions, self.models, self.first = worker, Sessions(worker), models, first
        with gr.Blocks(title="exl", analytics_enabled=False, fill_width=True) as self.blocks:
            with gr.Row(elem_id="header"):
                gr.HTML(render.brand())
                self.status = gr.HTML(elem_id="status")
                gr.HTML(render.theme_toggle())
            with gr.Row(elem_id="layout"):
                with gr.Column(scale=7, min_width=320, elem_id="main"), gr.Tabs():
                    with gr.Tab("Chat", elem_id="chat-tab"):
                        self.build_chat()
                    with gr.Tab("Completion"):
                        self.build_completion()
                with gr.Column(scale=4, min_width=320, elem_id="side"), gr.Tabs():
                    with gr.Tab("Sampling"):
                        self.build_sampling()
                    with gr.Tab("Model & memory"):
                        self.build_model()
            self.connect()

    # ---- components

    def build_chat(self) -> None:
        self.chatbot = gr.Chatbot(
            elem_id="chatbot", show_label=False, buttons=["copy"], layout="bubble", allow_tags=False, height=None,
            reasoning_tags=[("<think>", "</think>")], feedback_options=None, placeholder="Say something to begin.",
        )  # fmt: skip
        self.chat_notice = gr.HTML(elem_id="chat-notice", elem_classes="exl-optional")
        self.message = gr.Textbox(
            elem_id="message", show_label=False, placeholder="A message: Enter sends, Shift+Enter breaks the line",
            lines=1, max_lines=6, submit_btn=True, autofocus=True,
        )  # fmt: skip
        with gr.Row(elem_classes="exl-actions"):
            self.chat_stats = gr.HTML(elem_id="chat-stats")
            self.retry = gr.Button("Retry", size="sm", min_width=72, elem_id="retry")
            self.undo = gr.Button("Undo", size="sm", min_width=72, elem_id="undo")
            self.clear = gr.Button("Clear", size="sm", min_width=72, elem_id="clear")

    def build_completion(self) -> None:
        self.prompt = gr.Textbox(
            "Once upon a time", elem_id="prompt", label="Prompt", lines=3, max_lines=10,
            placeholder="The beginning of a text",
        )  # fmt: skip
        with gr.Row(elem_classes="exl-actions"):
            self.completion_stats = gr.HTML(elem_id="completion-stats")
            self.stop_completion = gr.Button("Stop", variant="stop", size="sm", min_width=110, visible=False)
            self.complete = gr.Button("Complete", variant="primary", size="sm", min_width=110, elem_id="complete")
        self.completion_notice = gr.HTML(elem_id="completion-notice", elem_classes="exl-optional")
        self.tokens = gr.HTML(elem_id="tokens")
        gr.HTML(render.legend())

    def build_sampling(self) -> None:
        self.system = gr.Textbox(
            elem_id="system", label="System prompt", lines=2, max_lines=6, placeholder="What the model should know"
        )
        self.max_tokens = gr.Slider(1, 4096, 256, step=1, label="Max tokens", elem_id="max-tokens")
        self.temperature = gr.Slider(
            0, 2, 0.8, step=0.05, label="Temperature (0: the likeliest)", elem_id="temperature"
        )
        self.top_k = gr.Slider(0, 200, 0, step=1, label="Top-k (0: off)", elem_id="top-k")
        self.top_p = gr.Slider(0.01, 1, 0.95, step=0.01, label="Top-p (1: off)", elem_id="top-p")
        self.min_p = gr.Slider(0, 1, 0, step=0.01, label="Min-p (0: off)", elem_id="min-p")
        self.penalty = gr.Slider(0.5, 2, 1, step=0.05, label="Repetition penalty (1: off)", elem_id="penalty")
        self.seed = gr.Textbox(elem_id="seed", label="Seed", placeholder="another each time")
        self.sampling = [
            self.temperature, self.top_k, self.top_p, self.min_p, self.penalty, self.max_tokens, self.seed,
        ]  # fmt: skip

    def build_model(self) -> None:
        options = self.first.options
        bundled = ("stories (ships with exl)", str(BUNDLED_MODEL))
        others = [(LoadSettings(model, {}).name, model) for model in self.models]
        self.model = gr.Dropdown(
            [bundled, *others], value=self.first.model, allow_custom_value=True, elem_id="model", label="Model",
            info="or type a folder, or a Hugging Face repository: owner/name",
        )  # fmt: skip
        with gr.Row():
            self.device = gr.Dropdown(["auto", "cpu", "cuda"], value="auto", label="Device", min_width=90)
            self.kv_cache = gr.Dropdown(
                KV_CACHES, value=options["kv_cache"], label="Cache type", min_width=90, elem_id="kv-cache"
            )
            self.head = gr.Dropdown(["stored", "8 bits", "4 bits"], value="stored", label="Head", min_width=90)
        with gr.Row():
            self.ram = gr.Textbox(options["ram"], label="RAM", placeholder="all", min_width=90, elem_id="ram")
            self.vram = gr.Textbox(label="VRAM", placeholder="e.g. 8GB", min_width=90, elem_id="vram")
            self.context = gr.Textbox(label="Context", placeholder="or auto", min_width=90, elem_id="context")
        with gr.Row():
            self.show_plan = gr.Button("Plan", size="md", min_width=120, elem_id="plan-button")
            self.load = gr.Button("Load", variant="primary", size="md", min_width=120, elem_id="load-button")
        self.load_notice = gr.HTML(elem_id="load-notice", elem_classes="exl-optional")
        self.planned = gr.HTML(elem_id="planned", elem_classes="exl-optional")
        self.in_memory = gr.HTML(elem_id="in-memory")
        self.load_options = [
            self.model, self.device, self.kv_cache, self.ram, self.vram, self.context, self.head,
        ]  # fmt: skip

    # ---- events

    def connect(self) -> None:
        # Requests wait in the worker's queue, which shows their position, and not in Gradio's.
        free = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        chat = [self.chatbot, self.message, self.chat_stats, self.chat_notice, self.retry, self.undo, self.clear]
        asked = [self.system, *self.sampling]
        self.message.submit(self.on_send, [self.message, *asked], chat, **free)
        self.message.stop(self.on_stop, None, None, **free)
        self.retry.click(self.on_retry, asked, chat, **free)
        self.undo.click(self.on_undo, None, chat, **free)
        self.clear.click(self.on_clear, None, chat, **free)

        completion = [self.tokens, self.completion_stats, self.completion_notice, self.complete, self.stop_completion]
        self.complete.click(self.on_complete, [self.prompt, *self.sampling], completion, **free)
        self.stop_completion.click(self.on_stop, None, None, **free)

        loading = [self.planned, self.in_memory, self.load_notice, self.status, self.load]
        self.load.click(self.on_load, self.load_options, loading, **free)
        self.show_plan.click(self.on_plan, self.load_options, [self.planned, self.load_notice], **free)
        for field in (self.model, self.device, self.kv_cache, self.head):
            field.change(self.on_change, self.load_options, self.planned, **free)
        for field in (self.ram, self.vram, self.context):
            changed = [field.submit, field.blur]
            gr.on(changed, self.on_change, self.load_options, self.planned, trigger_mode="always_last", **free)

        state = [self.status, self.in_memory, self.chatbot]
        self.blocks.load(self.on_open, self.load_options, [*state, self.planned], **free)
        gr.Timer(1.5).tick(self.on_tick, None, state, **free)
        self.blocks.unload(self.on_close)

    def session(self, request: gr.Request) -> Session:
        return self.sessions.of(request.session_hash)

    def on_send(self, request: gr.Request, text: str, system: str, *sampling: Any) -> Iterator[Update]:
        session = self.session(request)
        try:
            job = session.send(text, system, sampling_options(*sampling))
        except Exception as error:
            yield {self.chat_notice: render.notice(one_line(error))}
            return
        turn = [*session.messages, {"role": "user", "content": text}]
        yield {
            **self.chat_busy(True),
            self.message: gr.Textbox("", submit_btn=False, stop_btn=True),
            self.chatbot: turn,
        }
        yield from self.follow_chat(session, job, turn, text)

    def on_retry(self, request: gr.Request, system: str, *sampling: Any) -> Iterator[Update]:
        session = self.session(request)
        try:
            job = session.retry(system, sampling_options(*sampling))
        except Exception as error:
            yield {self.chat_notice: render.notice(one_line(error))}
            return
        turn = session.messages[:-1]
        yield {**self.chat_busy(True), self.chatbot: turn}
        yield from self.follow_chat(session, job, turn, None)

    def follow_chat(self, session: Session, job: Job, turn: list[dict], text: str | None) -> Iterator[Update]:
        """Updates the page while an answer is generated, and after it. If there is no answer, ``text`` goes back into
        the input field."""
        last = Answer("")
        for state in job.watch():
            if isinstance(state, Waiting):
                yield {self.chat_stats: render.waiting(state.ahead)}
            elif state.done is None:
                last = state
                answer = {"role": "assistant", "content": state.text or "…"}
                yield {self.chatbot: [*turn, answer], self.chat_stats: render.notice("Answering", "wait")}
            else:
                last = state
        failed = job.failure or ""
        shown = {
            **self.chat_busy(False),
            self.chatbot: session.messages,
            self.chat_stats: "" if failed else render.stats(last.done, last.num_tokens, last.context),
            self.chat_notice: render.notice(failed),
        }
        if text is not None and not last.text and last.done is None:
            shown[self.message] = gr.Textbox(text, submit_btn=True, stop_btn=False)
        yield shown

    def chat_busy(self, busy: bool) -> Update:
        buttons = {button: gr.Button(interactive=not busy) for button in (self.retry, self.undo, self.clear)}
        composer = gr.Textbox(submit_btn=not busy, stop_btn=busy)
        return {**buttons, self.message: composer, self.chat_notice: ""}

    def on_undo(self, request: gr.Request) -> Update:
        session = self.session(request)
        try:
            text = session.undo()
        except Exception as error:
            return {self.chat_notice: render.notice(one_line(error))}
        return {self.chatbot: session.messages, self.message: text, self.chat_stats: "", self.chat_notice: ""}

    def on_clear(self, request: gr.Request) -> Update:
        self.session(request).clear()
        return {self.chatbot: [], self.chat_stats: "", self.chat_notice: ""}

    def on_stop(self, request: gr.Request) -> None:
        self.session(request).stop()

    def on_complete(self, request: gr.Request, prompt: str, *sampling: Any) -> Iterator[Update]:
        session = self.session(request)
        try:
            job = session.complete(prompt, TOP_LOGPROBS, sampling_options(*sampling))
        except Exception as error:
            yield {self.completion_notice: render.notice(one_line(error))}
            return
        yield {
            self.completion_notice: "", self.tokens: render.tokens(prompt, ()),
            self.complete: gr.Button(visible=False), self.stop_completion: gr.Button(visible=True),
        }  # fmt: skip
        last = Answer("")
        for state in job.watch(every=0.15):
            if isinstance(state, Waiting):
                yield {self.completion_stats: render.waiting(state.ahead)}
            else:
                last = state
                yield {
                    self.tokens: render.tokens(prompt, last.logprobs),
                    self.completion_stats: render.notice("Writing", "wait"),
                }
        yield {
            self.completion_stats: "" if job.failure else render.stats(last.done, last.num_tokens, last.context),
            self.completion_notice: render.notice(job.failure or ""),
            self.complete: gr.Button(visible=True), self.stop_completion: gr.Button(visible=False),
        }  # fmt: skip

    # ---- the model

    def on_change(self, request: gr.Request, *typed: Any) -> Update:
        """Updates the plan when the form changes, unless Plan or Load was pressed for these values: they show more."""
        session = self.session(request)
        if session.asked == typed:
            return {self.planned: gr.skip()}
        session.asked = None
        try:
            settings = load_settings(*typed)
            if settings == self.worker.settings:
                shown = ""
            elif settings.is_local:
                shown = render.plan("Plan", settings.plan(self.loaded_plan))
            else:
                shown = render.plan("Plan", None, "Press Plan: the headers are read where they are.")
        except Exception as error:
            shown = render.notice(one_line(error))
        return {self.planned: gr.skip() if session.asked == typed else shown}

    def on_plan(self, request: gr.Request, *typed: Any) -> Update:
        self.session(request).asked = typed
        try:
            return {
                self.planned: render.plan("Plan", load_settings(*typed).plan(self.loaded_plan)),
                self.load_notice: "",
            }
        except Exception as error:
            return {self.planned: render.notice(one_line(error)), self.load_notice: ""}

    def on_load(self, request: gr.Request, *typed: Any) -> Iterator[Update]:
        """Makes the plan first: if that fails, the loaded model stays."""
        session = self.session(request)
        session.asked = typed
        yield {self.load: gr.Button(interactive=False), self.load_notice: render.notice("Planning", "wait")}
        try:
            settings = load_settings(*typed)
            found = settings.plan(self.loaded_plan)
            settings.check_device()
            job = session.submit(lambda job: self.worker.load(settings, job))
        except Exception as error:
            shown = render.notice(one_line(error))
            yield {self.load: gr.Button(interactive=True), self.planned: shown, self.load_notice: ""}
            return
        yield {self.planned: render.plan("Plan", found), self.load_notice: ""}
        for state in job.watch():
            if isinstance(state, Waiting):
                yield {self.load_notice: render.waiting(state.ahead)}
            elif isinstance(state, Loading):
                yield {self.load_notice: render.progress(state.settings.name, state.done, state.total)}
        session.seen = None
        told = render.notice(job.failure) if job.failure else render.notice(f"{settings.name} is loaded", "note")
        yield {
            self.load: gr.Button(interactive=True), self.load_notice: told, self.status: self.shown_status(),
            self.in_memory: self.shown_memory(),
        }  # fmt: skip

    def shown_status(self) -> str:
        return render.status(self.worker.llm, self.worker.settings, self.worker.num_jobs)

    def shown_memory(self) -> str:
        return render.plan("In memory now", self.loaded_plan, "nothing")

    @property
    def loaded_plan(self) -> exl.MemoryPlan | None:
        llm = self.worker.llm
        return None if llm is None else llm.plan

    def on_open(self, request: gr.Request, *typed: Any) -> Update:
        self.session(request).seen = None
        return {**self.on_tick(request), **self.on_change(request, *typed)}

    def on_tick(self, request: gr.Request) -> Update:
        """Updates the status: another tab may have loaded another model."""
        session, llm, shown = self.session(request), self.worker.llm, self.shown_status()
        if session.seen == (llm, shown):
            return {self.status: gr.skip()}
        session.seen = llm, shown
        hint = "Say something to begin." if llm is None else llm.chat().notice or "Say something to begin."
        return {self.status: shown, self.in_memory: self.shown_memory(), self.chatbot: gr.Chatbot(placeholder=hint)}

    def on_close(self, request: gr.Request) -> None:
        self.sessions.drop(request.session_hash)


def launch(page: Page, host: str, port: int | None, **options: Any) -> tuple[Any, str, str]:
    """Starts Gradio's server, without remote resources, sharing or analytics."""
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", spacing_size="sm", radius_size="md", font=FONTS, font_mono=MONO_FONTS
    ).set(
        body_text_color_subdued="#56647b",
        body_text_color_subdued_dark="#a3b3ca",
        input_placeholder_color="#66758c",
        input_placeholder_color_dark="#93a4bc",
    )
    return page.blocks.queue(default_concurrency_limit=None).launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        theme=theme,
        css=(PARTS / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(PARTS / 'page.js').read_text(encoding='utf-8')}</script>",
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", help="folders or Hugging Face repositories to choose from; the first loads"
    )
    parser.add_argument("--kv-cache", default="f16", help="f32, f16, q8, k8v4 or q4 (default: f16)")
    parser.add_argument(
        "--ram", default="", help="how much RAM exl may use, such as 6GB; layers that do not fit are streamed"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    args = parser.parse_args()

    model = args.models[0] if args.models else str(BUNDLED_MODEL)
    first = load_settings(model, "auto", args.kv_cache, args.ram, "", "", "stored")
    worker = Worker()
    job = worker.submit(lambda job: worker.load(first, job))
    for _ in job.watch():
        pass
    if job.failure:
        raise exl.ExlError(job.failure)
    try:
        launch(Page(worker, args.models, first), args.host, args.port)
    finally:
        worker.close()


if __name__ == "__main__":
    try:
        main()
    except (exl.ExlError, OSError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
