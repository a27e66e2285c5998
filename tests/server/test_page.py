"""The page as it is sent: whole, small, kept by browsers, and able to run nothing but its own script."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re

import httpx
import pytest

from exl.server.page import build_page
from tests.server.running import RunningServer

MAX_SENT = 60_000  # bytes, compressed


def test_it_is_one_document_that_asks_for_nothing_else(running):
    answer = httpx.get(f"{running.url}/", headers={"Accept-Encoding": "identity"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text.startswith("<!doctype html>")
    assert "/*STYLE*/" not in answer.text
    assert "/*SCRIPT*/" not in answer.text
    assert (
        re.findall(r"""<(?:script|img|iframe|source)[^>]*\bsrc|<link[^>]*href="(?!data:)|@import|url\(""", answer.text)
        == []
    )
    assert "innerHTML" not in answer.text


def test_the_policy_names_its_one_script_and_its_one_style(running):
    answer = httpx.get(f"{running.url}/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert policy[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_other_routes_have_no_policy(running):
    assert "content-security-policy" not in httpx.get(f"{running.url}/v1/models").headers


def test_a_browser_that_has_it_is_not_sent_it_again(running):
    tag = httpx.get(f"{running.url}/").headers["etag"]
    again = httpx.get(f"{running.url}/", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(f"{running.url}/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [("gzip, deflate", "gzip"), ("br;q=1, GZIP;q=0.5", "gzip"), ("gzip;q=0", None), ("", None), ("x-gzip-not", None)],
)
def test_it_is_compressed_for_those_who_take_that(running, accepted, expected):
    with httpx.stream("GET", f"{running.url}/", headers={"Accept-Encoding": accepted}) as answer:
        sent = b"".join(answer.iter_raw())
        assert answer.headers.get("content-encoding") == expected
    page = build_page()
    assert (gzip.decompress(sent) if expected else sent) == page.body
    assert len(page.compressed) < MAX_SENT


def test_head_sends_no_body(running):
    answer = httpx.head(f"{running.url}/")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["etag"]


def test_it_is_there_while_the_model_loads():
    def never(progress):
        raise AssertionError("not reached")

    server = RunningServer(never)
    try:
        from starlette.testclient import TestClient

        from exl.server.app import create_app

        assert TestClient(create_app(server.server)).get("/").status_code == 200
    finally:
        server.listening.close()
        server.server.close()
