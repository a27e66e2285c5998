"""The log: one line for each request, nothing of what clients keep for themselves, and no answer that waits for it."""

from __future__ import annotations

import json
import logging
import os
import time

import httpx
import pytest

from exl.errors import ConfigError
from exl.server.log_writer import _MAX_WAITING, LogWriter
from exl.server.logs import ServerLog, facts_of
from exl.server.options import ServerOptions
from exl.server.watch import Journey
from tests.server.raw import wait_for_idle
from tests.server.running import SECONDS, RunningServer, wait_until

CHAT = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "Tell me of a secret dog."}], "max_tokens": 7}


@pytest.fixture
def logged(tmp_path):
    """Makes a server with a log in a file, and what reads its lines."""
    made = []

    def make(**options):
        path = tmp_path / "exl.log"
        server = RunningServer(log_file=path, **options)
        log = ServerLog(server.options)
        server.server.watches.append(log)
        server.__enter__()
        made.append((server, log))

        def lines(wanted: int) -> list[str]:
            def found() -> list[str]:
                return [line for line in path.read_text().splitlines() if "/health" not in line]

            wait_until(lambda: len(found()) >= wanted)
            return found()

        return server, lines

    yield make
    for server, log in made:
        server.__exit__()
        log.close()


def test_a_line_says_what_a_request_was(logged):
    server, lines = logged(log_format="json", api_keys=("top-secret-key",))
    headers = {"x-api-key": "top-secret-key", "x-request-id": "mine-7"}
    began = time.perf_counter()
    reply = httpx.post(server.url + CHAT, json=ASKED, headers=headers)
    lines(1)
    took = time.perf_counter() - began
    httpx.post(server.url + CHAT + "?key=top-secret-key", json=ASKED, headers={"x-api-key": "top-secret-ke"})
    httpx.post(server.url + CHAT, json={**ASKED, "n": 0}, headers=headers)
    text = lines(3)
    done, refused, wrong = map(json.loads, text)
    usage = reply.json()["usage"]
    assert done["id"] == "mine-7" == reply.headers["x-request-id"]
    assert (done["level"], done["message"], done["status"], done["route"]) == ("info", "request", 200, CHAT)
    assert done["client"].startswith("127.0.0.1:")
    assert (done["model"], done["finish"]) == ("stories", "length")
    assert (done["prompt_tokens"], done["generated_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert 0 <= done["queue_ms"] <= done["ttft_ms"] <= done["total_ms"] <= took * 1e3 + 0.1  # it is rounded
    assert abs(time.time() - time.mktime(time.strptime(done["time"][:19], "%Y-%m-%dT%H:%M:%S")) + time.timezone) < 60
    assert refused["status"] == 401
    assert "model" not in refused
    assert wrong["status"] == 400
    assert wrong["error"].startswith("n: ")
    for kept in ("secret dog", "top-secret"):
        assert kept not in "".join(text)


def test_prompts_are_there_if_they_are_asked_for(logged):
    server, lines = logged(log_format="json", log_prompts=True)
    httpx.post(server.url + CHAT, json=ASKED)
    assert "Tell me of a secret dog." in json.loads(lines(1)[0])["prompt"]


def test_text_lines_cannot_be_forged(logged):
    server, lines = logged()
    httpx.get(server.url + "/%0a2030-01-01T00:00:00.000Z%20INFO%20request%20status=200%1b[31m")
    httpx.get(server.url + "/health")
    (line,) = lines(1)
    assert line.endswith('Not Found"') or "Not Found" in line
    assert "\x1b" not in line
    assert " status=404 " in line


def test_a_client_that_left_has_a_line(logged):
    server, lines = logged(log_format="json")
    with httpx.stream("POST", server.url + CHAT, json={**ASKED, "stream": True, "max_tokens": 480, "n": 8}) as reply:
        next(reply.iter_lines())
    wait_for_idle(server)
    assert "cancelled" in json.loads(lines(1)[0])["finish"]
    impatient = httpx.Timeout(SECONDS, read=0.05)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + CHAT, json={**ASKED, "max_tokens": 480, "n": 8}, timeout=impatient)
    left = json.loads(lines(2)[1])
    assert left["status"] == 499
    assert left["error"] == "the client has left"


def test_what_nobody_expected_has_its_traceback_and_its_client_does_not(logged, monkeypatch):
    server, lines = logged(log_format="json")

    def fail(*args, **more):
        raise RuntimeError("an inner matter")

    monkeypatch.setattr(type(server.llm), "submit", fail)
    log = next(watch for watch in server.server.watches if isinstance(watch, ServerLog))
    with log.loggers():
        reply = httpx.post(server.url + CHAT, json=ASKED)
        assert reply.status_code == 500
        assert reply.json()["error"]["message"] == "internal error"
        found = list(map(json.loads, lines(2)))
    assert {"error"} == {one["level"] for one in found}
    (trace,) = (one["traceback"] for one in found if "traceback" in one)
    assert "RuntimeError: an inner matter" in trace
    monkeypatch.undo()
    assert httpx.post(server.url + CHAT, json=ASKED).status_code == 200


def test_a_traceback_in_text_is_indented(tmp_path):
    log = ServerLog(ServerOptions(log_file=tmp_path / "log"))
    with log.loggers():
        try:
            raise ValueError("one\ntwo")
        except ValueError:
            logging.getLogger("exl.server").exception("it failed\nbadly")
    log.close()
    first, *more = (tmp_path / "log").read_text().splitlines()
    assert "it failed\\nbadly" in first
    assert more
    assert all(line.startswith("    ") for line in more)


def test_loggers_are_as_before_afterwards(tmp_path):
    logger = logging.getLogger("uvicorn.error")
    before = logger.level, logger.propagate, list(logger.handlers)
    log = ServerLog(ServerOptions(log_file=tmp_path / "log"))
    with log.loggers():
        assert not logger.propagate
    log.close()
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


# ---- the writer


def test_a_full_disk_loses_lines_and_nothing_else():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    writer = LogWriter("/dev/full")
    began = time.monotonic()
    for i in range(1000):
        writer.write(f"line {i}")
    assert time.monotonic() - began < 0.5
    writer.close()
    assert writer.num_dropped == 1000


def test_a_disk_that_was_full_is_written_again_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("exl.server.log_writer._RETRY_SECONDS", 0.01)
    full, path = [True], tmp_path / "log"
    write = os.write

    def sometimes(descriptor, data):
        if full[0]:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr("exl.server.log_writer.os.write", sometimes)
    writer = LogWriter(path)
    writer.write("lost")
    wait_until(lambda: writer.num_dropped)
    full[0] = False
    writer.write("kept")
    writer.close()
    assert path.read_text() == "exl: 1 lines of the log are missing here\nkept\n"


def test_a_pipe_that_nobody_reads_holds_nobody_up(tmp_path):
    reader, stuck = os.pipe()
    writer = LogWriter(tmp_path / "log")
    before, writer._descriptor, writer._path = writer._descriptor, stuck, None
    os.close(before)
    line = "x" * 10_000
    began = time.monotonic()
    for _ in range(_MAX_WAITING // 10_000 + 200):
        writer.write(line)
    assert time.monotonic() - began < 2
    assert writer.num_dropped > 100
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 4
    os.close(reader)


def test_a_file_that_was_moved_away_is_made_anew(tmp_path):
    path = tmp_path / "log"
    writer = LogWriter(path)
    writer.write("first")
    wait_until(path.read_text)
    path.rename(tmp_path / "log.1")
    writer.write("second")
    writer.close()
    assert (tmp_path / "log.1").read_text() == "first\n"
    assert path.read_text() == "second\n"


def test_a_file_that_cannot_be_opened_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"log_file: .*no.log: No such file or directory"):
        LogWriter(tmp_path / "nowhere" / "no.log")


def test_lines_of_lone_surrogates_are_written(tmp_path):
    writer = LogWriter(tmp_path / "log")
    writer.write("\udc80")
    writer.close()
    assert (tmp_path / "log").read_bytes() == b"\\udc80\n"


def test_facts_leave_out_what_does_not_apply():
    journey = Journey("id", "unknown", "GET", "/nowhere")
    journey.status = 404
    assert facts_of(journey).keys() == {"id", "client", "method", "route", "status", "total_ms"}
