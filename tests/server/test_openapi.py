"""What the OpenAPI document says, asked of a running server by schemathesis: no answer is a 500, whatever is sent."""

from __future__ import annotations

import httpx
import pytest

pytest.importorskip("schemathesis")

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from tests.server.raw import wait_for_idle
from tests.server.running import RunningServer

# Each answer of the fixture's server is short, whatever is asked for, so that many can be asked.
_OPTIONS = {"max_tokens": 4, "timeout": 2.0}
_EXAMPLES = 6
_CHANGES_THE_SERVER = ("/models/load", "/models/unload")


@pytest.fixture(scope="module")
def bounded():
    with RunningServer(**_OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def document(bounded):
    reply = httpx.get(f"{bounded.url}/openapi.json")
    assert reply.status_code == 200
    return reply.json()


def test_the_document_describes_every_route_and_its_body(document):
    assert document["openapi"].startswith("3.")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
    post = document["paths"]["/v1/chat/completions"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    name = schema["$ref"].removeprefix("#/components/schemas/")
    fields = document["components"]["schemas"][name]["properties"]
    assert {"messages", "temperature", "stream", "max_tokens", "min_p", "grammar"} <= fields.keys()


def test_every_reference_of_the_document_leads_somewhere(document):
    def references(value):
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for item in value.values():
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    for reference in references(document):
        assert reference.startswith("#/"), reference
        found = document
        for part in reference[2:].split("/"):
            found = found[part.replace("~1", "/").replace("~0", "~")]


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_that_it_describes_is_a_500(bounded, document, mode):
    schema = schemathesis.openapi.from_dict(document)
    modes = {"positive": schemathesis.GenerationMode.POSITIVE, "negative": schemathesis.GenerationMode.NEGATIVE}
    limits = settings(
        max_examples=_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seen: dict[str, set[int]] = {}
    with httpx.Client(base_url=bounded.url, timeout=60) as client:

        def ask(case) -> None:
            # A stream's answer ends by itself: the server's own limit is four tokens.
            arguments = case.as_transport_kwargs(base_url=bounded.url)
            reply = send(client, arguments)
            label = f"{case.method} {case.path}"
            seen.setdefault(label, set()).add(reply.status_code)
            assert reply.status_code != 500, f"{label} {arguments}: {reply.text}"
            if reply.status_code >= 400 and reply.headers.get("content-type") == "application/json":
                assert "error" in reply.json(), reply.text

        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path in _CHANGES_THE_SERVER:
                continue
            strategy = operation.as_strategy(generation_mode=modes[mode])
            try:
                seed(3)(limits(given(case=strategy)(lambda case: ask(case))))()
            except Unsatisfiable:  # what takes no parameter cannot be asked for with a wrong one
                assert mode == "negative"
    assert seen
    wait_for_idle(bounded)
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    assert httpx.post(f"{bounded.url}/v1/chat/completions", json=asked).status_code == 200


def send(client, arguments) -> httpx.Response:
    """With httpx what schemathesis would send with requests."""
    known = ("method", "url", "headers", "params", "json", "data", "cookies")
    given_arguments = {name: arguments[name] for name in known if arguments.get(name) is not None}
    if "data" in given_arguments:
        given_arguments["content"] = given_arguments.pop("data")
    return client.request(**given_arguments)
