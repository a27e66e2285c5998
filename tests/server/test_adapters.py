"""Adapters as models: clients list them, choose one by its name, and get what the adapter answers without a server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import exl
from exl.errors import ConfigError
from exl.server.assemble import models_of
from exl.server.options import ServerOptions
from tests.server.running import SECONDS, RunningServer

DATA = Path(__file__).parents[1] / "data"
STORIES, TRAINED = DATA / "stories260K", DATA / "adapter"
ENGINE = {"device": "cpu", "context": 256, "max_sequences": 4}
PROMPT = "Once upon a time"


def _models(**options):
    arguments = {**ENGINE, "lora": {"poems": str(TRAINED)}, **options}
    return models_of(str(STORIES), ServerOptions(), arguments)


@pytest.fixture(scope="module")
def client():
    with RunningServer(models=_models()) as server, httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def alone():
    """What the model answers without a server, by the name that clients use."""
    with exl.load(STORIES, lora={"poems": TRAINED}, **ENGINE) as llm:
        texts = {name: llm.generate(PROMPT, 12, lora=lora).text for name, lora in NAMES.items()}
        vectors = {name: llm.embed(PROMPT, lora=lora)[0].tolist() for name, lora in NAMES.items()}
    assert texts["poems"] != texts["stories260K"]
    return texts, vectors


NAMES = {"stories260K": False, "poems": "poems"}


def _complete(client: httpx.Client, model: str) -> dict:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    return client.post("/v1/completions", json=body).raise_for_status().json()


def test_adapters_are_listed_behind_their_model(client):
    base, adapter = client.get("/v1/models").json()["data"]
    assert (base["id"], adapter["id"], adapter["parent"]) == ("stories260K", "poems", "stories260K")
    assert "parent" not in base
    assert adapter["max_model_len"] == 256
    assert client.get("/v1/models/poems").json() == adapter


def test_a_client_chooses_by_model(client, alone):
    found = {name: _complete(client, name) for name in NAMES}
    assert {name: one["choices"][0]["text"] for name, one in found.items()} == alone[0]
    assert {name: one["model"] for name, one in found.items()} == {name: name for name in NAMES}
    assert len({one["system_fingerprint"] for one in found.values()}) == 2
    assert client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}).json()["model"] == "stories260K"
    other = client.post("/v1/completions", json={"model": "prose", "prompt": PROMPT})
    assert other.status_code == 404
    assert "this server has 'stories260K', 'poems'" in other.json()["error"]["message"]


def test_clients_of_both_at_once(client, alone):
    names = [*NAMES] * 3
    with ThreadPoolExecutor(6) as executor:
        found = list(executor.map(lambda name: _complete(client, name)["choices"][0]["text"], names))
    assert found == [alone[0][name] for name in names]


def test_chats_and_embeddings(client, alone):
    def chat(model):
        body = {"messages": [{"role": "user", "content": "Tell me of a dog."}], "max_tokens": 12, "temperature": 0}
        return client.post("/v1/chat/completions", json={"model": model, **body}).raise_for_status().json()

    assert chat("poems")["choices"][0]["message"] != chat("stories260K")["choices"][0]["message"]
    for name in NAMES:
        body = {"model": name, "input": PROMPT}
        (found,) = client.post("/v1/embeddings", json=body).raise_for_status().json()["data"]
        cosine = sum(a * b for a, b in zip(found["embedding"], alone[1][name], strict=True))
        length = sum(b * b for b in alone[1][name]) ** 0.5 * sum(a * a for a in found["embedding"]) ** 0.5
        assert cosine / length == pytest.approx(1.0, abs=1e-6)


def test_text_generation_inferences_clients_choose_by_adapter_id(client, alone):
    def ask(**parameters):
        return client.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 12, **parameters}})

    for name, adapter in NAMES.items():
        chosen = {"adapter_id": adapter} if adapter else {}
        assert ask(**chosen).raise_for_status().json()["generated_text"] == alone[0][name]
    for name in ("stories260K", "prose"):  # the first is a model, and no adapter
        refused = ask(adapter_id=name)
        assert refused.status_code == 400
        assert refused.json()["error"] == f"adapter_id: found {name!r}, this server has 'poems'"


def test_names_that_are_taken():
    with pytest.raises(ConfigError, match="lora: found an adapter called 'stories260K', which is a name of the model"):
        _models(lora={"stories260K": str(TRAINED)})


def test_in_front_of_a_directory_of_models(tmp_path, alone):
    """With several models under one budget: the adapter is the first one's, and is counted in its plan."""
    options = ServerOptions(models_dir=tmp_path)
    models = models_of(str(STORIES), options, {**ENGINE, "lora": {"poems": str(TRAINED)}, "ram": "1GB"})
    with RunningServer(models=models) as server, httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        assert _complete(client, "poems")["choices"][0]["text"] == alone[0]["poems"]
        assert [line.purpose for line in server.llm.plan.lines].count("adapters") == 1
    with pytest.raises(ConfigError, match=r"lora: found .* beside a directory of models, expected MODEL, too"):
        models_of(None, options, {**ENGINE, "lora": {"poems": str(TRAINED)}})
