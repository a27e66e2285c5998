"""The choice of a model and of its memory: the plan for what is typed, and the plan of what is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

import exl
from exl.checkpoint.hub import BUNDLED_MODEL

from . import render
from .chat_tab import FREE, Update
from .session import Sessions
from .settings import LoadSettings, load_settings
from .worker import Loading, Waiting, Worker, one_line

KV_CACHES = ["f32", "f16", "q8", "k8v4", "q4"]


class ModelTab:
    def __init__(self, worker: Worker, sessions: Sessions, models: list[tuple[str, str]], first: LoadSettings) -> None:
        self.worker, self.sessions = worker, sessions
        options = first.options
        self.model = gr.Dropdown(
            models, value=first.model, allow_custom_value=True, elem_id="model", label="Model",
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
        self.notice = gr.HTML(elem_id="load-notice", elem_classes="exl-optional")
        self.planned = gr.HTML(elem_id="planned", elem_classes="exl-optional")
        self.in_memory = gr.HTML(elem_id="in-memory")
        self.typed = [self.model, self.device, self.kv_cache, self.ram, self.vram, self.context, self.head]

    def connect(self, status: gr.HTML) -> None:
        self.status = status
        loading = [self.planned, self.in_memory, self.notice, status, self.load]
        self.load.click(self.on_load, self.typed, loading, **FREE)
        self.show_plan.click(self.on_plan, self.typed, [self.planned, self.notice], **FREE)
        for field in (self.model, self.device, self.kv_cache, self.head):
            field.change(self.on_change, self.typed, self.planned, **FREE)
        for field in (self.ram, self.vram, self.context):
            changed = [field.submit, field.blur]
            gr.on(changed, self.on_change, self.typed, self.planned, trigger_mode="always_last", **FREE)

    def on_change(self, request: gr.Request, *typed: Any) -> Iterator[Update]:
        """Updates the plan when the form changes, unless Plan or Load was pressed for these values: they show more."""
        session = self.sessions.of(request.session_hash)
        yield {self.planned: gr.skip()}  # to Gradio, an event that yields nothing empties what it might have changed
        if session.asked == typed:
            return
        session.asked = None
        try:
            settings = load_settings(*typed)
            if settings == self.worker.settings:
                shown = ""
            else:
                if not settings.is_local:
                    yield {self.planned: render.notice(f"Looking for {settings.name}", "wait")}
                shown = render.plan("Plan", settings.plan(self.loaded_plan))
        except Exception as error:
            shown = render.notice(one_line(error))
        if session.asked != typed:
            yield {self.planned: shown}

    def on_plan(self, request: gr.Request, *typed: Any) -> Update:
        self.sessions.of(request.session_hash).asked = typed
        try:
            found = load_settings(*typed).plan(self.loaded_plan)
            return {self.planned: render.plan("Plan", found), self.notice: ""}
        except Exception as error:
            return {self.planned: render.notice(one_line(error)), self.notice: ""}

    def on_load(self, request: gr.Request, *typed: Any) -> Iterator[Update]:
        """Makes the plan first: if that fails, the loaded model stays."""
        session = self.sessions.of(request.session_hash)
        session.asked = typed
        yield {self.load: gr.Button(interactive=False), self.notice: render.notice("Planning", "wait")}
        try:
            settings = load_settings(*typed)
            found = settings.plan(self.loaded_plan)
            settings.check_device()
            job = session.submit(lambda job: self.worker.load(settings, job), alone=True)
        except Exception as error:
            shown = render.notice(one_line(error))
            yield {self.load: gr.Button(interactive=True), self.planned: shown, self.notice: ""}
            return
        yield {self.planned: render.plan("Plan", found), self.notice: ""}
        for state in job.watch():
            if isinstance(state, Waiting):
                yield {self.notice: render.waiting(state.ahead)}
            elif isinstance(state, Loading):
                yield {self.notice: render.progress(state.settings.name, state.done, state.total)}
        session.seen = None
        told = render.notice(job.failure) if job.failure else render.notice(f"{settings.name} is loaded", "note")
        yield {
            self.load: gr.Button(interactive=True), self.notice: told, self.status: self.shown_status(),
            self.in_memory: self.shown_memory(),
        }  # fmt: skip

    def shown_status(self) -> str:
        return render.status(
            self.worker.llm, self.worker.settings, self.worker.num_waiting, loading=self.worker.num_jobs > 0
        )

    def shown_memory(self) -> str:
        return render.plan("In memory now", self.loaded_plan, "nothing")

    @property
    def loaded_plan(self) -> exl.MemoryPlan | None:
        llm = self.worker.llm
        return None if llm is None else llm.plan


def known_models(others: list[str], talking: str | None) -> list[tuple[str, str]]:
    """(name, folder or repository) of the models to choose from."""
    own = [] if talking is None else [("SmolLM2 135M Instruct (talks)", talking)]
    stories = ("stories (ships with exl)", str(BUNDLED_MODEL))
    return [*own, stories, *((LoadSettings(model, {}).name, model) for model in others)]
