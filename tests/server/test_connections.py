"""Clients that are slow, silent, endless or rude: each connection ends in its time, and others never notice."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

from exl.server import connections
from tests.server.raw import ask, connect, head, is_closed, post, read_reply, wait_for_idle
from tests.server.running import RunningServer

TIMES = {"header_timeout": 0.6, "body_timeout": 0.6, "write_timeout": 0.8, "keep_alive": 0.6}
CHAT = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "Tell me of a dog."}], "max_tokens": 3}


@pytest.fixture(scope="module", params=["httptools", "h11"])
def strict(request):
    """A server with short times, on each of the parsers that uvicorn has."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "h11":
            patch.setattr(connections, "HttpToolsProtocol", None)
        else:
            pytest.importorskip("httptools")
        with RunningServer(max_body=100_000, max_connections=12, **TIMES) as server:
            yield server


@pytest.fixture(autouse=True)
def _lives(strict):
    yield
    assert httpx.post(strict.url + CHAT, json=ASKED).status_code == 200
    wait_for_idle(strict)


def took(began: float) -> float:
    return time.monotonic() - began


def test_headers_that_never_end_are_told_and_closed(strict):
    began = time.monotonic()
    with connect(strict.url) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: t")
        for _ in range(4):  # a byte now and then buys no time
            time.sleep(0.1)
            if took(began) < 0.5:  # else the test has been slow, and this would be a byte behind the answer
                slow.sendall(b"t")
        reply = read_reply(slow)
        assert reply.status == 408
        assert "headers" in reply.error["message"]
        assert is_closed(slow)
    assert 0.5 < took(began) < 5


def test_a_connection_that_sends_nothing_is_closed(strict):
    began = time.monotonic()
    with connect(strict.url) as silent:
        assert is_closed(silent)
    assert 0.5 < took(began) < 5


def test_an_idle_connection_is_closed_after_its_answer(strict):
    with connect(strict.url) as kept:
        for _ in range(2):  # it is kept open for a second request
            began = time.monotonic()
            kept.sendall(head("GET", "/health"))
            assert read_reply(kept).status == 200
        assert is_closed(kept)
        assert 0.4 < took(began) < 5


def test_a_second_requests_headers_have_their_time_too(strict):
    with connect(strict.url) as kept:
        kept.sendall(head("GET", "/health"))
        assert read_reply(kept).status == 200
        kept.sendall(b"GET /health HT")  # ends the idle time
        assert read_reply(kept).status == 408
        assert is_closed(kept)


@pytest.mark.parametrize("size", [70_000, 3_000_000])
def test_large_headers_are_refused(strict, size):
    data = head("GET", "/health", "X-Large: " + "x" * size)
    assert ask(strict.url, data).status == 431


def test_many_headers_are_refused(strict):
    data = head("GET", "/health", *(f"X-{i}: y" for i in range(50_000)))
    assert ask(strict.url, data).status == 431


def test_endless_trailers_are_no_way_round_it(strict):
    start = head("POST", CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n"
    with connect(strict.url) as endless:
        endless.sendall(start)
        trailers = b"".join(b"X-%d: y\r\n" % i for i in range(1_000_000))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            endless.sendall(trailers)


def test_a_long_path_is_refused(strict):
    assert ask(strict.url, head("GET", "/" + "a" * 100_000)).status == 431


def test_a_body_that_stops_is_told(strict):
    began = time.monotonic()
    with connect(strict.url) as slow:
        slow.sendall(head("POST", CHAT, "Content-Type: application/json", "Content-Length: 50") + b'{"mess')
        reply = read_reply(slow)
    assert reply.status == 408
    assert reply.error["code"] == "body_timeout"
    assert 0.5 < took(began) < 5


def test_a_body_that_trickles_is_told(strict):
    began = time.monotonic()
    with connect(strict.url) as slow:
        slow.sendall(head("POST", CHAT, "Content-Type: application/json", "Content-Length: 5000"))
        slow.setblocking(False)
        reply = None
        while reply is None and took(began) < 5:
            try:
                slow.send(b" ")
            except OSError:
                break
            time.sleep(0.1)
            try:
                reply = slow.recv(65536)
            except BlockingIOError:
                continue
    assert reply.startswith(b"HTTP/1.1 408 ")


def test_a_declared_body_that_is_too_long_is_refused_unread(strict):
    with connect(strict.url) as large:
        large.sendall(head("POST", CHAT, "Content-Type: application/json", "Content-Length: 100000000000"))
        reply = read_reply(large)
        assert reply.status == 413
        assert reply.error["code"] == "body_too_long"
        assert reply.headers["connection"] == "close"
        assert is_closed(large)


def test_a_client_that_asks_before_it_sends_a_long_body_is_not_told_to_go_on(strict):
    top = head("POST", CHAT, "Content-Type: application/json", "Content-Length: 200000", "Expect: 100-continue")
    assert ask(strict.url, top).status == 413


def test_100_megabytes_are_refused_and_their_sender_hears_it(strict):
    body = b" " * 100_000_000
    assert httpx.post(strict.url + CHAT, content=body, headers={"content-type": "application/json"}).status_code == 413


def test_the_rest_of_a_refused_body_is_read_for_a_while(strict):
    """Or the system would tell its sender of a reset, before or instead of the answer."""
    with connect(strict.url) as client:
        client.sendall(post(CHAT, b" " * 20_000_000))
        assert read_reply(client).status == 413
        assert client.recv(1) == b""


def test_a_chunked_body_that_is_too_long_is_refused(strict):
    def pieces():
        for _ in range(100):
            yield b" " * 10_000

    reply = httpx.post(strict.url + CHAT, content=pieces(), headers={"content-type": "application/json"})
    assert reply.status_code == 413


def test_a_chunked_body_is_taken(strict):
    data = json.dumps(ASKED).encode()
    pieces = (data[i : i + 7] for i in range(0, len(data), 7))
    reply = httpx.post(strict.url + CHAT, content=pieces, headers={"content-type": "application/json"})
    assert reply.status_code == 200


def test_an_unread_body_ends_the_connection_behind_a_404(strict):
    with connect(strict.url) as client:
        client.sendall(post("/nowhere", b"x" * 1000))
        reply = read_reply(client)
        assert reply.status == 404
        assert reply.headers["connection"] == "close"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"GET\r\n\r\n",
        b"\x00\x00\x00\x00\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: t\r\nContent-Length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: t\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        # Two lengths that disagree: how requests are smuggled past proxies.
        b"POST /health HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    ],
)
def test_what_is_no_http_is_told_or_closed(strict, data):
    with connect(strict.url) as client:
        client.sendall(data)
        reply = read_reply(client)
        if reply is not None:
            assert 400 <= reply.status < 500
            assert reply.error["type"] == "invalid_request_error"
            assert is_closed(client)


def test_pipelined_requests_are_answered_in_order(strict):
    with connect(strict.url) as client:
        client.sendall(post(CHAT, json.dumps(ASKED).encode()) + head("GET", "/nowhere") + head("GET", "/health"))
        assert [read_reply_of_many(client) for _ in range(3)] == [200, 404, 200]


def read_reply_of_many(client) -> int:
    """Reads no byte of the next answer."""
    top = b""
    while not top.endswith(b"\r\n\r\n"):
        top += client.recv(1)
    length = int(top.lower().split(b"content-length:")[1].split()[0])
    while length:
        length -= len(client.recv(length))
    return int(top.split()[1])


def test_rubbish_behind_a_request_does_not_get_into_its_answer(strict):
    stream = {**ASKED, "stream": True, "max_tokens": 40}
    with connect(strict.url) as client:
        client.sendall(post(CHAT, json.dumps(stream).encode()))
        data = client.recv(65536)
        client.sendall(b"\x00\x01rubbish\r\n\r\n")
        while piece := receive(client):
            data += piece
    answer, ended, more = data.partition(b"\r\n0\r\n\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    assert more == b"" or (ended and more.startswith(b"HTTP/1.1 400 "))


def receive(client) -> bytes:
    try:
        return client.recv(65536)
    except ConnectionResetError:
        return b""


def test_half_closed_and_reset_connections_free_their_requests(strict):
    asked = json.dumps({**ASKED, "stream": True, "max_tokens": 400}).encode()
    half = connect(strict.url)
    half.sendall(post(CHAT, asked))
    half.shutdown(1)
    cut = connect(strict.url)
    cut.sendall(post(CHAT, asked)[:-10])
    cut.close()
    gone = connect(strict.url)
    gone.sendall(post(CHAT, asked))
    gone.recv(100)
    gone.close()
    wait_for_idle(strict)
    half.close()


def test_a_client_that_reads_nothing_is_given_up(strict):
    """Its answer fills the buffers of both ends, the system's and the server's; then the engine waits for it."""
    before = num_cancelled(strict)
    usual = strict.listening.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    strict.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    began = time.monotonic()
    stuck = [connect(strict.url, receive_buffer=4096) for _ in range(2)]
    try:
        for client in stuck:
            asked = {"messages": ASKED["messages"], "max_tokens": 480, "n": 4, "stream": True}
            client.sendall(post(CHAT, json.dumps(asked).encode()))
            assert client.recv(9) == b"HTTP/1.1 "
        wait_for_idle(strict)
        assert 0.5 < took(began) < 20
        assert num_cancelled(strict) > before
    finally:
        strict.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, usual)
        for client in stuck:
            client.close()


def num_cancelled(running) -> float:
    text = httpx.get(f"{running.url}/metrics").text
    return sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("exl_answers_total{") and "cancelled" in line
    )


def test_more_connections_than_allowed_are_told(strict):
    held = [connect(strict.url) for _ in range(12)]
    try:
        for client in held:
            client.sendall(head("GET", "/health"))
            assert read_reply(client).status == 200
        with connect(strict.url) as more:
            reply = read_reply(more)
            assert reply.status == 503
            assert reply.headers["retry-after"] == "2"
    finally:
        for client in held:
            client.close()
