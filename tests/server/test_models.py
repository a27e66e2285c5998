"""Several models in one server, over HTTP: each answers as it does alone, under one budget."""

from __future__ import annotations

import asyncio
import concurrent.futures
import shutil
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

import exl
from exl.errors import ConfigError
from exl.server.assemble import models_of
from exl.server.loading import OnlyLoader
from exl.server.models import Models
from exl.server.options import ServerOptions
from tests.live_bytes import live_bytes
from tests.server.running import SECONDS, RunningServer, wait_until

DATA = Path(__file__).parents[1] / "data"
ENGINE = {"device": "cpu", "context": 256, "max_sequences": 4, "prefill_chunk": 64, "prefill_window": 64}
BODY = {"messages": [{"role": "user", "content": "Tell me of a dog."}], "max_tokens": 12, "seed": 5, "temperature": 0.7}
PROMPT = "User: Tell me of a dog.\nAssistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``small``, ``owner/large``, and two that cannot be loaded."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(DATA / "stories260K", folder / "small")
    shutil.copytree(DATA / "stories2M", folder / "owner" / "large")
    shutil.copytree(DATA / "stories260K", folder / "damaged")
    with open(folder / "damaged" / "model.safetensors", "r+b") as file:
        file.truncate(2000)
    shutil.copytree(DATA / "stories260K", folder / "no json")
    (folder / "no json" / "config.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """What each model answers without a server, by name."""
    texts = {}
    for name in ("small", "owner/large"):
        with exl.load(folder / name, **ENGINE) as llm:
            texts[name] = llm.generate(PROMPT, 12, seed=5, temperature=0.7).text
    return texts


def room_for_one(folder):
    """Bytes in which either model fits, and not both."""
    return max(exl.plan(folder / name, **plan_options()).num_bytes for name in ("small", "owner/large")) + 10**6


def plan_options():
    return {name: value for name, value in ENGINE.items() if name != "device"}


def serving(folder, model=None, *, ram, **options):
    made = ServerOptions(port=0, models_dir=folder, **options)
    arguments = {**ENGINE, "ram": ram, "cache_tokens": "auto", "token": None, "revision": None}
    return RunningServer(models=models_of(model, made, arguments), models_dir=folder, **options)


@pytest.fixture(scope="module")
def crowded(folder):
    with serving(folder, ram=room_for_one(folder)) as server:
        yield server


@pytest.fixture
def client(crowded):
    with httpx.Client(base_url=crowded.url, timeout=SECONDS) as client:
        yield client


def ask(client, model, **more):
    return client.post("/v1/chat/completions", json=BODY | {"model": model} | more)


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def listed(client):
    return {model["id"]: model for model in client.get("/v1/models").json()["data"]}


def test_models_in_turn_answer_as_alone_and_tell_of_the_wait(client, alone):
    for name in ("small", "owner/large", "small"):
        answer = ask(client, name)
        assert text_of(answer) == alone[name]
        assert answer.headers["X-Exl-Model-Loaded"] == "1"
        assert 0 < float(answer.headers["X-Exl-Model-Wait"]) < SECONDS
        again = ask(client, name)
        assert text_of(again) == alone[name]
        assert "X-Exl-Model-Loaded" not in again.headers
        assert "X-Exl-Model-Wait" not in again.headers
        assert [model["id"] for model in listed(client).values() if model["status"]["value"] == "loaded"] == [name]


def test_the_list_says_what_is_loaded_and_how_large_it_is(client, crowded):
    assert ask(client, "small").status_code == 200
    found = listed(client)
    assert set(found) == {"damaged", "no json", "owner/large", "small"}
    small, large = found["small"], found["owner/large"]
    assert small["status"] == {"value": "loaded", "progress": 1.0}
    assert (small["max_model_len"], small["object"], small["owned_by"]) == (256, "model", "exl")
    plan = crowded.server.models.find("small").served.llm.plan
    assert small["memory"] == {"exact": plan.exact_bytes, "at_most": plan.num_bytes}
    assert large["status"] == {"value": "unloaded", "progress": 0.0}
    assert "memory" not in large
    assert client.get("/v1/models/owner/large").json() == large
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert client.get("/v1/models/none").status_code == 404


def test_streams_of_two_models_at_once_are_not_mixed(client, alone):
    """Either model has to go for the other, whose stream is on its way."""

    def stream(name):
        text = ""
        with client.stream("POST", "/v1/chat/completions", json=BODY | {"model": name, "stream": True}) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = httpx.Response(200, content=line[6:]).json()["choices"]
                    text += choice["delta"].get("content") or ""
        return text

    names = ["small", "owner/large"] * 8
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stream, names)) == [alone[name] for name in names]


@pytest.mark.parametrize(("name", "told"), [("damaged", "model.safetensors"), ("no json", "config.json")])
def test_a_damaged_folder_is_its_own_trouble(client, alone, name, told):
    answer = ask(client, name)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "model_load_failed"
    assert f"{name!r} cannot be loaded" in error["message"]
    assert told in error["message"]
    assert "Retry-After" in answer.headers
    status = listed(client)[name]["status"]
    assert (status["value"], status["failed"]) == ("unloaded", True)
    assert told in status["error"]
    assert client.get("/health").status_code == 200
    assert text_of(ask(client, "small")) == alone["small"]


def test_a_load_that_fails_at_its_end_leaves_nothing_in_memory(client, folder):
    """The engine is whole when the tokenizer is found to be damaged; what tells of it must not hold it."""
    for name in ("small", "owner/large"):
        assert client.post("/models/unload", json={"model": name}).status_code == 200
    shutil.copytree(folder / "small", folder / "late")
    (folder / "late" / "tokenizer.json").write_text("{")
    try:
        before = live_bytes()
        answer = ask(client, "late")
        assert (answer.status_code, "tokenizer" in answer.json()["error"]["message"]) == (500, True)
        assert live_bytes() == before
    finally:
        shutil.rmtree(folder / "late")


def test_a_request_without_a_name_is_told_the_names(client):
    for model in (None, ""):
        answer = ask(client, model)
        assert answer.status_code == 400
        assert "expected one of 'damaged', 'no json', 'owner/large', 'small'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["../small", "small/../small", "owner", "/etc/passwd", "\0", "%2e%2e", "x" * 5000])
def test_names_of_nothing(client, name):
    answer = ask(client, name)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    for route in ("load", "unload"):
        assert client.post(f"/models/{route}", json={"model": name}).status_code == 404


def test_loading_and_unloading_by_hand(client):
    def status():
        return listed(client)["owner/large"]["status"]["value"]

    answer = client.post("/models/load", json={"model": "owner/large"})
    assert (answer.status_code, answer.json(), status()) == (200, {"success": True}, "loaded")
    assert client.post("/models/load", json={"model": "owner/large"}).json() == {"success": True}
    assert client.post("/models/unload", json={"model": "owner/large"}).json() == {"success": True}
    assert status() == "unloaded"
    assert client.post("/models/unload", json={"model": "owner/large"}).status_code == 200
    assert client.post("/models/unload", json={"model": 5}).status_code == 400
    assert client.post("/models/load", json={}).status_code == 400


def test_a_model_that_answers_is_not_unloaded_by_hand(client, crowded):
    holding, end = threading.Event(), threading.Event()

    async def hold():
        async with crowded.server.models.use("small"):
            holding.set()
            while not end.is_set():
                await asyncio.sleep(0.01)

    held = asyncio.run_coroutine_threadsafe(hold(), crowded.server.models._residency._loop)
    assert holding.wait(SECONDS)
    refused = client.post("/models/unload", json={"model": "small"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
    assert ask(client, "small").status_code == 200
    end.set()
    held.result(SECONDS)
    assert client.post("/models/unload", json={"model": "small"}).status_code == 200


def test_new_folders_appear_and_removed_ones_vanish(client, crowded, folder, alone):
    assert ask(client, "new").status_code == 404
    shutil.copytree(folder / "small", folder / "new")
    try:
        assert text_of(ask(client, "new")) == alone["small"]
    finally:
        shutil.rmtree(folder / "new")
    held = crowded.server.models._residency.held
    assert [state.name for state in held] == ["new"]
    assert "new" not in listed(client)
    assert ask(client, "new").status_code == 404
    wait_until(lambda: not held)  # it is unloaded, though nobody wants its memory


def test_a_model_whose_engine_has_stopped_is_loaded_again(client, crowded, alone):
    assert text_of(ask(client, "small")) == alone["small"]
    llm = crowded.server.models.find("small").served.llm
    assert llm.failure is None
    llm._engine.generator.seat._break(RuntimeError("a step failed"))
    assert str(llm.failure) == "a step failed"
    answer = ask(client, "small")
    assert text_of(answer) == alone["small"]
    assert answer.headers["X-Exl-Model-Loaded"] == "1"
    assert llm._engine is None


def test_what_does_not_fit_alone_is_refused_with_the_plan(folder, alone):
    small = exl.plan(folder / "small", **plan_options()).num_bytes
    with serving(folder, ram=small + 10**5) as server, httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        assert text_of(ask(client, "small")) == alone["small"]
        answer = ask(client, "owner/large")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
        assert "Would fit" in answer.json()["error"]["message"]
        assert listed(client)["small"]["status"]["value"] == "loaded"  # it did not go in vain


def test_models_that_fit_stay_beside_each_other(folder, alone):
    """Each cache may have any size; so that there is room for both, none takes more than half."""
    ram = 2 * room_for_one(folder)
    with serving(folder, ram=ram) as server, httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        loads = Counter()
        for name in ("small", "owner/large", "small"):
            answer = ask(client, name)
            assert text_of(answer) == alone[name]
            loads[name] += "X-Exl-Model-Loaded" in answer.headers
        assert [loads[name] for name in ("small", "owner/large")] == [1, 1]
        models = server.server.models
        plans = [models.find(name).served.llm.plan for name in ("small", "owner/large")]
        kernels = sum(line.num_bytes for line in plans[0].lines if line.purpose == "kernels")
        assert sum(plan.num_bytes for plan in plans) - kernels <= ram


def test_a_server_that_ends_while_it_loads_says_so(folder):
    """SIGTERM's way: what runs and waits is told, the load stops, health is 503 with Retry-After."""
    began, go_on = threading.Event(), threading.Event()

    class Slow(OnlyLoader):
        def load(self, room, tell):
            began.set()
            while not go_on.wait(0.01):
                tell(1, 4)
            return super().load(room, tell)

    loader = Slow(lambda tell: exl.load(folder / "small", **ENGINE, progress=False))
    server = RunningServer(models=Models("small", loader))
    server.start()
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        assert began.wait(SECONDS)
        told = client.get("/health")
        while told.json()["progress"] == 0.0:
            told = client.get("/health")
        assert (told.status_code, told.json()["status"], told.json()["progress"]) == (503, "loading model", 0.25)
        refused = ask(client, "small")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "25% of it" in refused.json()["error"]["message"]
        server.server.draining = True
        assert server.server.models.drain(5)
        assert (client.get("/health").status_code, client.get("/health").headers["Retry-After"]) == (503, "2")
        assert ask(client, "small").json()["error"]["code"] == "draining"
    server.__exit__()


def test_the_first_model_is_loaded_at_the_start_and_is_the_default(folder, alone):
    model = str(folder / "small")
    with (
        serving(folder, model, ram=10**9, idle_unload=0.3, served_names=("mine", "gpt-4")) as server,
        httpx.Client(base_url=server.url, timeout=SECONDS) as client,
    ):
        assert next(iter(listed(client))) == "mine"
        assert listed(client)["mine"]["aliases"] == ["gpt-4", "small"]
        for name in (None, "mine", "gpt-4", "small"):
            assert text_of(ask(client, name)) == alone["small"]
        # Without requests it goes, the server stays healthy, and the next request has it again.
        wait_until(lambda: listed(client)["mine"]["status"]["value"] == "unloaded")
        assert client.get("/health").status_code == 200
        answer = ask(client, None)
        assert text_of(answer) == alone["small"]
        assert answer.headers["X-Exl-Model-Loaded"] == "1"
        assert any("mine: all" in line for line in server.lines)


def test_options_of_one_model_need_it(folder):
    made = ServerOptions(models_dir=folder)
    for name, value in (("draft", "some"), ("rope", {"rope_theta": 1e6}), ("revision", "main")):
        with pytest.raises(ConfigError, match=rf"{name}: found .* expected MODEL"):
            models_of(None, made, {**ENGINE, name: value})
    with pytest.raises(ConfigError, match="served_model_name: "):
        models_of(None, ServerOptions(models_dir=folder, served_names=("a",)), ENGINE)
    with pytest.raises(ConfigError, match=r"models_dir: .*nowhere"):
        models_of(None, ServerOptions(models_dir=folder / "nowhere"), ENGINE)
