"""A demo in the browser: chat, completion with token probabilities, and the memory plan.

python examples/gradio_demo.py
python examples/gradio_demo.py path/to/model another/model --kv-cache q8 --ram 8GB
python examples/gradio_demo.py --url http://127.0.0.1:8000

Needs Gradio: pip install ".[demo]". Everything is local: the page loads no remote fonts, scripts or analytics.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_parts import render
from gradio_parts.chat_tab import FREE, ChatTab, Update
from gradio_parts.completion_tab import CompletionTab
from gradio_parts.model_tab import ModelTab, known_models
from gradio_parts.session import Sessions
from gradio_parts.settings import MAIN_SLIDERS, MORE_SLIDERS, SLIDERS, LoadSettings, load_settings
from gradio_parts.worker import Worker, context_of, one_line, talks

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.commands.chat import connect, loaded_elsewhere
from exl.remote_chat import RemoteModel
from exl.sampling_params import OPTIONS
from exl.user_cache import chat_model_folder

PARTS = Path(__file__).parent / "gradio_parts"
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"]
MONO_FONTS = ["ui-monospace", "SF Mono", "Consolas", "DejaVu Sans Mono", "monospace"]
MAX_TOKENS = SLIDERS["max_tokens"].value
# Whatever Markdown a model writes, the page shows no picture from elsewhere.
POLICY = (
    """<meta http-equiv="Content-Security-Policy" content="img-src 'self' data: blob:; media-src 'self' data: blob:">"""
)


class Page:
    """The components of the page, and the events that concern more than one tab."""

    def __init__(self, worker: Worker, models: list[str], first: LoadSettings | None) -> None:
        """``first``: how the model was loaded; None: a server has it, and there is only the chat: probabilities of
        tokens and plans of memory are those of a model that is loaded here."""
        self.worker, self.sessions = worker, Sessions(worker)
        self.completion: CompletionTab | None = None
        self.model: ModelTab | None = None
        with gr.Blocks(title="exl", analytics_enabled=False, fill_width=True) as self.blocks:
            with gr.Row(elem_id="header"):
                gr.HTML(render.brand())
                self.status = gr.HTML(elem_id="status")
                gr.HTML(render.theme_toggle())
            with gr.Row(elem_id="layout"):
                with gr.Column(scale=9, min_width=320, elem_id="main"), gr.Tabs() as self.tabs:
                    with gr.Tab("Chat", elem_id="chat-tab", id="chat"):
                        self.chat = ChatTab(self.sessions)
                    if first is not None:
                        with gr.Tab("Completion", id="completion"):
                            self.completion = CompletionTab(self.sessions)
                with gr.Column(scale=4, min_width=320, elem_id="side"), gr.Tabs():
                    with gr.Tab("Sampling"):
                        self.build_sampling()
                    if first is not None:
                        with gr.Tab("Model & memory"):
                            self.model = ModelTab(worker, self.sessions, known_models(models, talking_model()), first)
            self.connect()

    def build_sampling(self) -> None:
        self.system = gr.Textbox(
            elem_id="system", label="System prompt", lines=2, max_lines=6, placeholder="What the model should know"
        )
        starts = {"temperature": 0.3} if talks(self.worker.llm) else {}
        sliders = {name: slider(name, starts.get(name)) for name in MAIN_SLIDERS}
        self.seed = gr.Textbox(
            elem_id="seed", label="Seed", info=OPTIONS["seed"].help, placeholder="another each time", max_lines=1
        )
        with gr.Accordion("More", open=False, elem_id="more-sampling"):
            sliders |= {name: slider(name) for name in MORE_SLIDERS}
        self.max_tokens = sliders["max_tokens"]
        self.sampling = [*sliders.values(), self.seed]

    def connect(self) -> None:
        self.chat.connect(self.system, self.sampling)
        state, planned, typed = [self.status, self.max_tokens], [], []
        if self.completion is not None and self.model is not None:
            self.completion.connect(self.sampling)
            self.model.connect(self.status)
            state += [self.model.in_memory, self.completion.beginnings]
            planned, typed = [self.model.planned], self.model.typed
        opening = [*self.chat.outputs, *state, *planned, self.tabs]
        self.blocks.load(
            self.on_open, [self.chat.book, self.max_tokens, *typed], opening,
            js="(kept, ...typed) => [window.exl.restore(), ...typed]", **FREE,
        )  # fmt: skip
        gr.Timer(1.5).tick(self.on_tick, self.max_tokens, [*state, self.chat.chatbot, self.chat.shelf], **FREE)
        self.blocks.unload(self.on_close)

    def on_open(self, request: gr.Request, restored: str, max_tokens: int, *typed: Any) -> Iterator[Update]:
        """The page was loaded, perhaps again: in the middle of an answer, it goes on."""
        kept = json.loads(restored)
        session, is_back = self.sessions.enter(request.session_hash, str(kept["tab"]))
        try:
            if not is_back:
                session.open(kept["open"])
            failed = ""
        except Exception as error:
            failed = one_line(error)
        with session.following() as me:
            yield self.opened(request, failed, max_tokens)
            if self.model is not None:
                yield from self.model.on_change(request, *typed)
            if session.conversation.busy:
                yield from self.chat.follow(session, session.conversation, me)

    def opened(self, request: gr.Request, failed: str, max_tokens: int | None) -> Update:
        """The whole page. A model without a chat template opens on the completion, which is what it was trained for."""
        session, llm = self.sessions.of(request.session_hash), self.worker.llm
        base = llm is not None and not talks(llm) and not session.messages
        shown, model = self.chat.shown(session), self.of_model(request, max_tokens)
        chatbot = gr.Chatbot(shown[self.chat.chatbot], **self.chat.for_model(llm))
        return {
            **model, **shown, self.chat.chatbot: chatbot, self.system: session.conversation.system or "",
            self.chat.notice: render.notice(failed), self.tabs: gr.Tabs(selected="completion" if base else "chat"),
        }  # fmt: skip

    def of_model(self, request: gr.Request, max_tokens: int | None) -> Update:
        """What depends on the loaded model, which another tab may have changed; empty if it is shown already."""
        session, llm, shown = self.sessions.of(request.session_hash), self.worker.llm, self.shown_status()
        seen, session.seen = session.seen, (llm, shown)
        if seen == session.seen:
            return {}
        if seen is not None and seen[0] is llm:
            return {self.status: shown}
        context = context_of(llm)
        update: Update = {
            self.status: shown,
            self.chat.chatbot: gr.Chatbot(**self.chat.for_model(llm)),
            self.max_tokens: gr.Slider(maximum=context, value=min(max_tokens or MAX_TOKENS, context)),
        }
        if self.model is not None:
            update[self.model.in_memory] = self.model.shown_memory()
        if self.completion is not None:
            update[self.completion.beginnings] = self.completion.for_model(llm)
        return update

    def shown_status(self) -> str:
        remote = self.worker.llm
        if isinstance(remote, RemoteModel):
            return render.server_status(remote)
        return "" if self.model is None else self.model.shown_status()

    def on_tick(self, request: gr.Request, max_tokens: int | None) -> Update:
        changed = self.of_model(request, max_tokens) | self.chat.on_tick(self.sessions.of(request.session_hash))
        return changed or {self.status: gr.skip()}

    def on_close(self, request: gr.Request) -> None:
        self.sessions.leave(request.session_hash)


def slider(name: str, value: float | None = None) -> gr.Slider:
    """For one of ``exl``'s sampling options, with its help."""
    asked = SLIDERS[name]
    start = asked.start(name) if value is None else value
    elem_id = name.replace("_", "-")
    return gr.Slider(
        asked.low, asked.high, start, step=asked.step, label=asked.label, info=OPTIONS[name].help, elem_id=elem_id
    )


def talking_model() -> str | None:
    """The folder of the model that was trained to talk, if `make chat-model` has made it on this machine."""
    folder = chat_model_folder()
    return None if folder is None else str(folder)


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
        head=f"{POLICY}<script>{(PARTS / 'page.js').read_text(encoding='utf-8')}</script>",
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", help="folders or Hugging Face repositories to choose from; the first loads"
    )
    parser.add_argument("--kv-cache", help="f32, f16, q8, k8v4 or q4 (default: f16)")
    parser.add_argument("--ram", help="how much RAM exl may use, such as 6GB; layers that do not fit are streamed")
    parser.add_argument("--url", help="talk with this server, http://127.0.0.1:8000, and load no model")
    parser.add_argument("--api-key-file", type=Path, help="with --url: a file whose first line is the server's API key")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    args = parser.parse_args()

    worker, first = from_server(args) if args.url is not None else from_here(args)
    try:
        launch(Page(worker, args.models, first), args.host, args.port)
    finally:
        worker.close()


def from_here(args: argparse.Namespace) -> tuple[Worker, LoadSettings]:
    """Loads the first model."""
    if args.api_key_file is not None:
        raise exl.ConfigError("--api-key-file: goes along with --url, which was not given")
    model = args.models[0] if args.models else talking_model() or str(BUNDLED_MODEL)
    first = load_settings(model, "auto", args.kv_cache or "f16", args.ram or "", "", "", "stored")
    worker = Worker()
    job = worker.submit(lambda job: worker.load(first, job), alone=True)
    for _ in job.watch():
        pass
    if job.failure:
        raise exl.ExlError(job.failure)
    return worker, first


def from_server(args: argparse.Namespace) -> tuple[Worker, None]:
    """Finds a server's model, the one that is named or its first."""
    for name, value in (("--kv-cache", args.kv_cache), ("--ram", args.ram)):
        if value is not None:
            raise loaded_elsewhere(name)
    if len(args.models) > 1:
        raise exl.ConfigError(f"models: found {len(args.models)} with --url, expected the name of one of the server's")
    return Worker(connect(args.url, args.api_key_file, args.models[0] if args.models else None)), None


if __name__ == "__main__":
    try:
        main()
    except (exl.ExlError, OSError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
