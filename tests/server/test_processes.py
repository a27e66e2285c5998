"""The life of the server: how it begins, ends, is killed, and begins again. What only a process can show has one of its
own, which imports torch for seconds; for the rest, a signal's handler is called.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time

import httpx
import pytest

import exl
from exl.commands.serve_options import ListenOptions
from exl.server.run import run_http
from tests.command_line import run_exl
from tests.server.processes import Process, free_port
from tests.server.raw import wait_for_idle
from tests.server.running import SECONDS, RunningServer, wait_until

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me of a dog."}]
SHORT = {"messages": MESSAGES, "max_tokens": 3}
LONG = {"messages": MESSAGES, "max_tokens": 480, "n": 32, "stream": True}  # about a second


def load_large(progress):
    return exl.load(device="cpu", max_sequences=64, cache_tokens=65536, progress=progress)


class Stream(threading.Thread):
    """Reads a stream in a thread of its own."""

    def __init__(self, url: str, body: dict) -> None:
        super().__init__()
        self._url, self._body = url, body
        self.began = threading.Event()
        self.lines: list[str] = []
        self.error: Exception | None = None
        self.start()
        assert self.began.wait(60)

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url + CHAT, json=self._body, timeout=60) as reply:
                for line in reply.iter_lines():
                    self.lines.append(line)
                    self.began.set()
        except httpx.TransportError as error:
            self.error = error
        self.began.set()

    def events(self) -> list[dict]:
        self.join(60)
        assert not self.is_alive()
        return [json.loads(line[6:]) for line in self.lines if line.startswith("data: {")]


def endings(events: list[dict]) -> list[str]:
    reasons = (choice["finish_reason"] for event in events for choice in event.get("choices", ()))
    return [reason for reason in reasons if reason]


def test_a_signal_lets_answers_end_and_refuses_others():
    with RunningServer(load=load_large) as server, httpx.Client(base_url=server.url) as kept:
        kept.get("/health")
        stream = Stream(server.url, LONG)
        server.signal(signal.SIGTERM)
        refused = wait_until(lambda: (reply := httpx.post(server.url + CHAT, json=SHORT)).status_code == 503 and reply)
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        assert kept.get("/health").json() == {"status": "draining"}
        assert endings(stream.events()) == ["length"] * 32
        assert stream.lines[-2] == "data: [DONE]"
        server.wait_until_ended(5)


def test_answers_that_do_not_end_in_time_are_told():
    with RunningServer(load=load_large, drain_seconds=0.05) as server:
        stream = Stream(server.url, {**LONG, "n": 64})
        whole = threading.Thread(target=lambda: whole_replies.append(httpx.post(server.url + CHAT, json=one)))
        whole_replies, one = [], {**LONG, "n": 1, "stream": False}
        whole.start()
        wait_until(lambda: server.server.num_open == 2)
        server.signal(signal.SIGTERM)
        assert stream.events()[-1]["error"]["code"] == "cut_off"
        whole.join(60)
        assert whole_replies[0].status_code == 503
        server.wait_until_ended(5)


def test_a_second_signal_does_not_wait():
    with RunningServer(load=load_large) as server:
        stream = Stream(server.url, {**LONG, "n": 64})
        server.signal(signal.SIGINT)
        server.signal(signal.SIGINT)
        server.wait_until_ended(2)
        stream.join(60)
        assert stream.error is not None or len(endings(stream.events())) < 64


def test_a_signal_while_it_loads_ends_it():
    def load(progress):
        for done in range(10_000):
            progress(done, 10_000)
            time.sleep(0.01)
        raise AssertionError("it loaded to its end")

    server = RunningServer(load=load)
    server.start()
    reply = wait_until(lambda: server.ask("/health"))
    assert reply.status_code == 503
    found = wait_until(lambda: (found := server.ask("/health").json())["progress"] and found)
    assert found["status"] == "loading model"
    early = httpx.post(server.url + CHAT, json=SHORT)
    assert early.status_code == 503
    assert early.json()["error"]["code"] == "model_loading"
    assert "retry-after" in early.headers
    server.signal(signal.SIGTERM)
    server.wait_until_ended(5)
    assert server.error is None
    server.__exit__()


def test_a_signal_before_it_listens_ends_it():
    server = RunningServer()

    async def main():
        def began(http):
            http.handle_exit(signal.SIGTERM, None)

        await asyncio.wait_for(run_http(server.server, server.listening, server.lines.append, began), SECONDS)

    asyncio.run(main())
    assert server.server.draining
    server.listening.close()
    server.server.close()


def test_a_client_that_leaves_while_others_stay_frees_its_pages(running):
    stays = Stream(running.url, {**LONG, "n": 2})
    for _ in range(3):
        with httpx.stream("POST", running.url + CHAT, json={**LONG, "n": 4}) as reply:
            lines = reply.iter_lines()
            next(lines)
    assert len(endings(stays.events())) == 2
    wait_for_idle(running)
    stats = running.llm.stats()
    assert stats.pages_free == stats.pages_total


posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@posix
def test_killed_it_begins_again_from_the_same_packed_file_and_port(tmp_path):
    """Once in the middle of loading, when the packed file may be half written, and once in the middle of answers."""
    port = free_port()
    streamed = ("--resident-layers", "0", "--packed-folder", str(tmp_path))
    body = {**SHORT, "max_tokens": 30, "temperature": 0}
    with Process(*streamed, port=port) as server:
        assert server.wait_for(lambda: httpx.get(f"{server.url}/health")).status_code in (200, 503)
        server.process.kill()
        assert server.ended() == -signal.SIGKILL
    with Process(*streamed, port=port) as server:
        url = server.wait_until_loaded()
        before = httpx.post(url + CHAT, json=body).json()["choices"]
        streams = [Stream(url, {**LONG, "n": 8}) for _ in range(4)]
        server.process.kill()
        server.ended()
        for stream in streams:
            stream.join(60)
            assert stream.error is not None
    with Process(*streamed, port=port) as server:
        url = server.wait_until_loaded()
        assert httpx.post(url + CHAT, json=body).json()["choices"] == before


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_standard_error_changes_no_answer():
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with Process(port=free_port(), stderr=full) as server:
            url = server.wait_until_loaded()
            assert httpx.post(url + CHAT, json=SHORT).status_code == 200
            server.wait_for(lambda: dropped(url) >= 1)
            server.signal(signal.SIGINT)
            assert server.ended(30) == 0
    finally:
        os.close(full)


def dropped(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("exl_log_lines_dropped_total "))


@posix
def test_a_process_ends_its_answers_and_then_itself_and_tells_all_in_json():
    with Process("--max-sequences", "64", "--log-format", "json") as server:
        url = json.loads(server.wait_for(lambda: server.lines and server.lines[0]))["message"].split()[-1]
        server.wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        stream = Stream(url, LONG)
        server.signal(signal.SIGTERM)
        assert endings(stream.events()) == ["length"] * 32
        assert server.ended(30) == 0
    found = list(map(json.loads, server.lines))
    assert found[0]["message"].startswith("listening on http://127.0.0.1:")
    assert any(line["message"].startswith("stories: ") for line in found)
    assert [(line["route"], line["status"]) for line in found if line["message"] == "request"] == [(CHAT, 200)]
    told = [line for line in found if not line["message"].startswith("compiled kernels for this processor")]
    assert {line["level"] for line in told} == {"info"}  # that line comes where compiling takes long


def test_a_port_in_use_is_one_line(running):
    port = running.url.rsplit(":", 1)[1]
    told = run_exl("serve", "--port", port)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == (f"exl: error: --host, --port: cannot listen on 127.0.0.1:{port}: Address already in use\n")


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    told = run_exl("serve", tmp_path, "--port", 0, "--device", "cpu")
    assert told.returncode == 1
    listening, error = told.stderr.splitlines()
    assert listening.startswith("exl: listening on http://127.0.0.1:")
    assert error.startswith("exl: error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"), "tls_cert: /nowhere.pem: No such file"),
        (("--api-key-file", "/nowhere.txt"), "--api-key-file: /nowhere.txt: cannot be read: No such file"),
        (("--log-file", "/nowhere/log"), "log_file: /nowhere/log: No such file"),
        (("--max-body", "many"), "max_body: "),
        (("--cors-origin", "nonsense"), "cors_origins: found 'nonsense'"),
        (("--host", "nowhere.invalid"), "--host, --port: cannot listen on nowhere.invalid"),
    ],
)
def test_a_wrong_option_is_one_line(options, message):
    told = run_exl("serve", "--port", 0, *options)
    assert (told.returncode, told.stdout) == (1, "")
    (line,) = told.stderr.splitlines()
    assert line.startswith(f"exl: error: {message}")


def test_keys_come_from_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("first\n\n  second  \n")
    assert ListenOptions(api_key=["given"], api_key_file=path).keys == ("given", "first", "second")
    path.write_bytes(b"\xef\xbb\xbffirst\r\n")  # as Windows' editors write it
    assert ListenOptions(api_key_file=path).keys == ("first",)
    path.write_text("\n")
    with pytest.raises(exl.ConfigError, match="found no key, expected one in each line"):
        _ = ListenOptions(api_key_file=path).keys
