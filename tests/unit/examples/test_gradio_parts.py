"""The parts of the Gradio demo, without Gradio: the queue, the forms, and HTML that escapes a model's text."""

from __future__ import annotations

import html
import json
import re
import shutil
import threading
from pathlib import Path

import pytest

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.errors import ConfigError
from tests.unit.token_records import record

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def parts():
    """The modules of examples/gradio_parts, as the demo imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        from gradio_parts import conversation, markdown, render, session, settings, worker

        modules = (conversation, markdown, render, session, settings, worker)
        yield {module.__name__.split(".")[-1]: module for module in modules}


@pytest.fixture
def worker(parts):
    worker = parts["worker"].Worker()
    yield worker
    worker.close()


def finish(job) -> list:
    return list(job.watch(every=0))


def settings_of(parts, model=BUNDLED_MODEL, kv_cache="f16"):
    return parts["settings"].load_settings(str(model), "auto", kv_cache, "", "", "", "stored")


def test_jobs_run_side_by_side(worker):
    together = threading.Barrier(3, timeout=10)
    jobs = [worker.submit(lambda job: job.tell(together.wait())) for _ in range(3)]
    assert sorted(finish(job)[-1] for job in jobs) == [0, 1, 2]
    assert all(job.failure is None for job in jobs)


def test_what_changes_the_model_has_it_alone(worker):
    """It waits for those before it, and those after it wait for it."""
    ran, gate = [], threading.Event()
    first = worker.submit(lambda job: (gate.wait(10), ran.append(1)))
    change = worker.submit(lambda job: ran.append(2), alone=True)
    others = [worker.submit(lambda job, i=i: ran.append(i)) for i in (3, 4)]
    last = worker.submit(lambda job: ran.append(5), alone=True)
    assert [worker.ahead(job) for job in (first, change, *others, last)] == [0, 1, 2, 2, 4]
    assert next(last.watch()).ahead == 4
    others[1].stop()
    assert others[1].is_done
    assert [worker.ahead(job) for job in (others[0], last)] == [2, 3]
    assert worker.num_waiting == 3
    gate.set()
    for job in (first, change, *others, last):
        finish(job)
    assert ran == [1, 2, 3, 5]
    assert worker.num_jobs == 0


def test_tabs_get_their_answers_at_once(parts, worker, monkeypatch):
    """One tab's answer begins and ends while another one's is in progress; a model change waits for both."""
    finish(worker.submit(lambda job: worker.load(settings_of(parts), job), alone=True))
    sessions, begun, gate = [parts["session"].Session(worker) for _ in range(2)], threading.Event(), threading.Event()
    plain = parts["worker"].Job.tell

    def tell(job, state):
        plain(job, state)
        if job is sessions[0].conversation.job and getattr(state, "text", ""):
            begun.set()
            gate.wait(10)

    monkeypatch.setattr(parts["worker"].Job, "tell", tell)
    slow = sessions[0].send("Hello.", "", {"max_tokens": 40, "temperature": 0})
    assert begun.wait(10)
    change = worker.submit(lambda job: worker.load(settings_of(parts, kv_cache="q8"), job), alone=True)
    assert worker.ahead(change) == 1
    change.stop()
    quick = sessions[1].complete("Once", 1, {"max_tokens": 8, "temperature": 0})
    assert finish(quick)[-1].done.num_tokens == 8
    assert not slow.is_done
    gate.set()
    shown = finish(slow)[-1].done
    alone = worker.llm.chat().send("Hello.", max_tokens=40, temperature=0)
    assert shown.token_ids == alone.token_ids


def test_a_request_that_waits_for_its_first_token_can_be_stopped(parts, worker, monkeypatch):
    """Its thread sleeps in the engine meanwhile."""
    finish(worker.submit(lambda job: worker.load(settings_of(parts), job), alone=True))
    seat, gate, at_work = worker.llm._engine.generator.seat, threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: seat.apart(lambda: (at_work.set(), gate.wait(10))))
    other.start()
    assert at_work.wait(10)
    session = parts["session"].Session(worker)
    job = session.complete("Once", 1, {"max_tokens": 8})
    while job._on_stop is None:
        threading.Event().wait(0.001)
    job.stop()
    finish(job)
    assert job.failure is None
    gate.set()
    other.join()


def test_who_watches_sees_the_newest_state_and_the_end(worker):
    job = worker.submit(lambda job: [job.tell(i) for i in range(1000)])
    seen = finish(job)
    assert seen[-1] == 999
    assert seen == sorted(seen)


def test_a_failure_is_one_line(worker, capfd):
    def fails(job):
        raise exl.MemoryBudgetError("too large.\nand a table")

    def breaks(job):
        return [][1]

    job = worker.submit(fails)
    finish(job)
    assert job.failure == "too large."
    job = worker.submit(breaks)
    finish(job)
    assert job.failure == "unexpected IndexError: list index out of range (the terminal has the details)"
    assert "Traceback" in capfd.readouterr().err
    assert finish(worker.submit(lambda job: job.tell("on it goes"))) == ["on it goes"]


def test_a_model_that_cannot_be_loaded_leaves_the_one_before(parts, worker, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(BUNDLED_MODEL, damaged)
    (damaged / "tokenizer.json").write_text("{")
    job = worker.submit(lambda job: worker.load(settings_of(parts, damaged), job), alone=True)
    finish(job)
    assert worker.llm is None
    assert "tokenizer.json" in job.failure
    with pytest.raises(exl.ExlError, match="no model is loaded: choose one"):
        worker.loaded()
    finish(worker.submit(lambda job: worker.load(settings_of(parts), job), alone=True))
    first = worker.llm
    job = worker.submit(lambda job: worker.load(settings_of(parts, damaged), job), alone=True)
    finish(job)
    assert job.failure.endswith(". stories is loaded again, as it was.")
    assert "closed" in repr(first)
    assert worker.settings == settings_of(parts)
    assert worker.loaded().generate("One", 2).num_tokens == 2


def test_if_the_one_before_is_gone_too_it_says_that_none_is_loaded(parts, worker, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, model)
    finish(worker.submit(lambda job: worker.load(settings_of(parts, model), job), alone=True))
    shutil.rmtree(model)
    job = worker.submit(lambda job: worker.load(settings_of(parts, tmp_path / "nothing"), job), alone=True)
    finish(job)
    assert "No model is loaded now" in job.failure
    assert worker.llm is None


def test_a_conversation_goes_on_with_another_model(parts, worker):
    finish(worker.submit(lambda job: worker.load(settings_of(parts), job), alone=True))
    session = parts["session"].Session(worker)
    finish(session.send("Hello.", "", {"max_tokens": 4}))
    before = session.messages
    finish(worker.submit(lambda job: worker.load(settings_of(parts, kv_cache="q8"), job), alone=True))
    states = finish(session.send("Why?", "Be kind.", {"max_tokens": 4}))
    assert states[-1].done.num_tokens == 4
    assert states[-1].context == 512
    assert session.messages[:2] == before
    assert session.undo() == "Why?"
    assert session.messages == before


def test_one_request_at_a_time_for_a_conversation_and_for_a_completion(parts, worker):
    gate = threading.Event()
    session = parts["session"].Session(worker)
    first = worker.submit(lambda job: gate.wait(10), alone=True)
    jobs = [session.send("Hello.", "", {}), session.complete("Once", 1, {})]
    options = ("", {})
    for call in (
        lambda: session.send("Hello.", *options),
        lambda: session.retry(*options),
        lambda: session.edit(0, "Bye.", *options),
        lambda: session.undo(),
        lambda: session.complete("Once", 1, {}),
    ):
        with pytest.raises(ConfigError, match="still"):
            call()
    session.open(None)
    jobs.append(session.send("Another conversation.", *options))  # waits for its turn
    session.stop_all()
    gate.set()
    for job in (first, *jobs):
        finish(job)


def test_a_stopped_or_failed_answer_without_a_piece_changes_nothing(parts, worker):
    session = parts["session"].Session(worker)
    job = session.send("Hello.", "", {})  # no model is loaded
    finish(job)
    assert "no model is loaded" in job.failure
    assert session.messages == []
    finish(worker.submit(lambda job: worker.load(settings_of(parts), job), alone=True))
    finish(session.send("Hello.", "", {"max_tokens": 4}))
    before, gate = session.messages, threading.Event()
    worker.submit(lambda job: gate.wait(10), alone=True)
    for ask in (
        lambda: session.send("Why?", "", {}),
        lambda: session.retry("", {}),
        lambda: session.edit(0, "Bye.", "", {}),
        lambda: session.go_on("", {}),
    ):
        job = ask()
        assert session.conversation.busy
        session.stop_answer()
        finish(job)
        assert session.messages == before
        assert session.conversation.cut == "max_tokens"
    gate.set()


def test_a_prompt_that_is_read_tells_how_far_it_is_and_can_be_stopped(parts, worker, monkeypatch):
    finish(worker.submit(lambda job: worker.load(settings_of(parts), job), alone=True))
    session, told = parts["session"].Session(worker), []
    plain = parts["worker"].Job.tell
    monkeypatch.setattr(parts["worker"].Job, "tell", lambda job, state: (told.append(state), plain(job, state)))
    finish(session.send("Hello.", "", {"max_tokens": 2}))
    read = [state for state in told if isinstance(state, parts["conversation"].Reading)]
    assert read[-1].tokens == read[-1].total == told[-1].done.num_prompt_tokens
    assert len(read) == worker.llm.config.num_layers
    monkeypatch.setattr(parts["worker"].Job, "tell", lambda job, state: (job.stop(), plain(job, state)))
    before = session.messages
    job = session.send("Why?", "", {"max_tokens": 2})
    finish(job)
    assert job.failure is None
    assert session.messages == before
    monkeypatch.undo()
    assert finish(session.send("Why?", "", {"max_tokens": 2}))[-1].done.num_tokens == 2


def test_edits_continuations_and_records(parts, worker):
    finish(worker.submit(lambda job: worker.load(settings_of(parts), job), alone=True))
    session = parts["session"].Session(worker)
    options = {"max_tokens": 4, "temperature": 0}
    for text in ("One.", "Two."):
        finish(session.send(text, "Be kind.", options))
    first = session.messages[1]["content"]
    finish(session.go_on("Be kind.", options))
    record = json.loads(json.dumps(session.conversation.record()))
    assert record["cut"] == "max_tokens"
    chat = exl.Chat.from_json(worker.llm, record["chat"])
    assert (chat.system, chat.messages) == ("Be kind.", session.messages)
    assert session.edit(1, "Changed.", "Be kind.", options) is None
    assert [m["content"] for m in session.messages[:3]] == ["One.", "Changed.", "Two."]
    with pytest.raises(ConfigError, match="no longer there"):
        session.edit(9, "x", "", options)
    finish(session.edit(0, "One.", "Be kind.", options))
    assert [m["content"] for m in session.messages] == ["One.", first]
    with pytest.raises(ConfigError, match="found nothing"):
        session.edit(0, " ", "", options)
    finish(session.send("Three.", "", options))
    session.conversation.cut = None  # its answer has ended
    with pytest.raises(ConfigError, match="no answer that was cut off"):
        session.go_on("", options)


def test_an_imported_conversation_keeps_the_name_of_its_model_until_another_answers(parts, worker):
    finish(worker.submit(lambda job: worker.load(settings_of(parts), job), alone=True))
    session = parts["session"].Session(worker)
    messages = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    chat = {"format": "exl chat", "version": 1, "model": "Other", "system": None, "messages": messages}
    session.open({"chat": chat})
    assert session.conversation.record()["chat"] == chat
    session.open({"chat": {name: value for name, value in chat.items() if name != "model"}})
    saved = session.conversation.record()["chat"]
    assert saved["messages"] == messages
    assert exl.Chat.from_json(worker.llm, saved).written_with is None
    finish(session.send("Three.", "", {"max_tokens": 2}))
    assert session.conversation.record()["chat"]["model"] == worker.llm.folder.name


def test_a_conversation_of_the_browser_that_is_none(parts, worker):
    session = parts["session"].Session(worker)
    for wrong in ({"id": "a", "chat": {"format": "x"}}, {"id": "a", "chat": 7}):
        with pytest.raises(ConfigError, match="conversation: not a saved chat"):
            session.open(wrong)
    assert session.messages == []


def test_a_tab_that_comes_back_goes_on_and_one_that_does_not_is_stopped(parts, worker, monkeypatch):
    monkeypatch.setattr(parts["session"], "GRACE", 0.2)
    sessions, gate = parts["session"].Sessions(worker), threading.Event()
    blocking = worker.submit(lambda job: gate.wait(10), alone=True)
    session, is_back = sessions.enter("key 1", "tab")
    assert not is_back
    job = session.send("Hello.", "", {})
    sessions.leave("key 1")
    assert sessions.enter("key 2", "tab") == (session, True)
    assert sessions.enter("key 3", "tab") == (session, True)  # before the server noticed that it had gone
    sessions.leave("key 2")
    assert sessions.of("key 3") is session
    assert sessions.enter("key 4", "another tab")[0] is not session
    threading.Event().wait(0.4)
    assert not job.stopped
    sessions.leave("key 3")
    finish(job)  # taken out of the queue
    assert job.stopped
    assert sessions.enter("key 5", "tab") == (sessions.of("key 5"), False)
    gate.set()
    finish(blocking)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b>c</b> & d &amp; 1 < 2", "a <|b>c<|/b> & d &|amp; 1 < 2"),
        ("`<b>` <!-- x -->", "`<b>` <|!-- x -->"),
        ("```html\n<b> $x$\n```\n<i>", "```html\n<b> $x$\n```\n<|i>"),
        ("~~~\n<b>", "~~~\n<b>"),
        ("$x^2$ and $y$.", r"\(x^2\) and \(y\)."),
        ("$5 and $6, US$7 or 8$", "$5 and $6, US$7 or 8$"),
        ("$$x$$ and $$a$$", "$$x$$ and $$a$$"),
        (r"\(a<b\) \[c<d\] $e<f$", r"\(a<b\) \[c<d\] \(e<f\)"),
    ],
)
def test_html_stays_text_and_formulas_are_found(parts, text, shown):
    markdown = parts["markdown"]
    assert markdown.shown_answer(text).replace("\u2060", "|") == shown
    assert markdown.typed(markdown.shown_message(text)) == text
    assert "$x$" not in text or "$x$" in markdown.shown_message(text)


def test_several_watch_one_job(worker):
    gate = threading.Event()
    job = worker.submit(lambda job: (job.tell("first"), gate.wait(10), job.tell("last")))
    one, other = job.watch(every=0), job.watch(every=0)
    assert next(one) == next(other) == "first"
    gate.set()
    assert list(one) == list(other) == ["last"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("", "auto", "f16", "", "", "", "stored"), "model: found nothing"),
        (("m", "auto", "f16", "banana", "", "", "stored"), "ram: found 'banana'"),
        (("m", "auto", "f16", "", "8GB, x", "", "stored"), "vram: found 'x'"),
        (("m", "cpu", "f16", "", "8GB", "", "stored"), "vram: found '8GB' with device='cpu'"),
        (("m", "auto", "f16", "", "", "many", "stored"), "context: found 'many', expected a number of tokens"),
        (("m", "auto", "f16", "", "", "-1", "stored"), "context: found -1"),
    ],
)
def test_what_is_typed_wrong_is_named(parts, typed, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        parts["settings"].load_settings(*typed)


def test_what_is_typed_right(parts):
    found = parts["settings"].load_settings(" owner/name ", "auto", "q8", "6GB", "8GB, 24GB", "auto", "4 bits")
    assert (found.model, found.name, found.is_local) == ("owner/name", "owner/name", False)
    expected = {"device": "auto", "kv_cache": "q8", "ram": "6GB", "vram": ["8GB", "24GB"], "context": "auto", "head": 4}
    assert found.options == expected


def test_the_form_of_sampling_options_is_of_the_table(parts):
    settings = parts["settings"]
    typed = {name: slider.start(name) for name, slider in settings.SLIDERS.items()} | {"top_k": 40.0, "min_tokens": 3.0}
    options = settings.sampling_options(*typed.values(), " 7 ")
    assert options == typed | {"seed": 7}
    assert type(options["top_k"]) is type(options["min_tokens"]) is int
    assert exl.SamplingParams(**options).top_k == 40
    for name, slider in settings.SLIDERS.items():  # the ends can be asked for, and a value is off where it should be
        for value in (slider.low, slider.high, slider.start(name)):
            exl.SamplingParams(**{name: int(value) if float(value).is_integer() else value})
    nothing = settings.sampling_options(*(None for _ in typed), None)
    assert {name for name, value in nothing.items() if value is not None} == {"max_tokens"}
    with pytest.raises(ConfigError, match="seed: found 'x'"):
        settings.sampling_options(*typed.values(), "x")


def test_a_gpu_that_is_not_there_is_planned_for_and_not_loaded_on(parts, monkeypatch):
    def no_gpu(options):
        raise ConfigError("found no GPU")

    monkeypatch.setattr(parts["settings"], "choose_device", no_gpu)
    found = parts["settings"].load_settings(str(BUNDLED_MODEL), "auto", "q8", "", "2GB", "", "stored")
    assert found.plan() == exl.plan(vram="2GB", kv_cache="q8")
    with pytest.raises(ConfigError, match="no GPU"):
        found.check_device()
    found = parts["settings"].load_settings(str(BUNDLED_MODEL), "cuda", "q8", "", "", "", "stored")
    with pytest.raises(ConfigError, match="no GPU"):
        found.plan()


def test_a_plan_counts_what_the_loaded_model_gives_back(parts, monkeypatch):
    from dataclasses import replace
    from types import SimpleNamespace

    from exl.planning.devices import started_bytes

    free = 700 * 10**6
    gpu = SimpleNamespace(arch=89)
    monkeypatch.setattr(
        parts["settings"], "choose_device", lambda options: (replace(options, vram=options.vram or free), gpu)
    )
    loaded = exl.plan(vram="2GB", arch=89)
    given_back = loaded.device_bytes("cuda:0") - started_bytes(89)
    found = parts["settings"].load_settings(str(BUNDLED_MODEL), "auto", "q8", "", "", "", "stored")
    assert found.plan(loaded).budgets["cuda:0"] == free + given_back
    assert found.plan().budgets["cuda:0"] == free


HOSTILE = "</span><script>alert('1')</script>\" onmouseover=\"x"


def test_what_a_model_writes_stays_text(parts):
    found = parts["render"].tokens(HOSTILE, [record(HOSTILE, 0.5, alternatives=[record(HOSTILE, 0.25, 2)])])
    assert "<script" not in found
    assert 'onmouseover="' not in found
    assert html.unescape(re.sub("<[^>]*>", "", found)) == HOSTILE + HOSTILE
    data = json.loads(html.unescape(re.search(r'data-top="([^"]*)"', found)[1]))
    assert [row[0] for row in data] == [HOSTILE.replace(" ", "␣")] * 2
    for shown in (parts["render"].notice(HOSTILE), parts["render"].progress(HOSTILE, 1, 2)):
        assert "<script" not in shown


def test_tokens_are_coloured_and_the_chosen_one_is_marked(parts):
    likely, other = record(" a", 0.9, 1), record("b", 0.06, 2)
    found = parts["render"].tokens("", [record(" a", 0.9, 1, [likely, other]), record("c", 0.01, 3, [likely, other])])
    assert re.findall(r'class="exl-token (p\d)"', found) == ["p4", "p0"]
    first, second = (json.loads(html.unescape(data)) for data in re.findall(r'data-top="([^"]*)"', found))
    assert [(row[0], row[2]) for row in first] == [("␣a", True), ("b", False)]
    assert [(row[0], row[2]) for row in second] == [("␣a", False), ("b", False), ("c", True)]
