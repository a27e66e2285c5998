"""``exl serve`` as a process of its own, for what only a process can show: signals, kills, exit codes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from tests.server.running import SECONDS

ROOT = Path(__file__).parents[2]


class Process:
    """A context manager. Its lines of standard error are collected, unless ``stderr`` says where they go."""

    def __init__(self, *arguments: str, port: int = 0, stderr: int | None = None) -> None:
        command = [sys.executable, "-m", "exl.cli", "serve", "--device", "cpu", "--port", str(port), *arguments]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE if stderr is None else stderr, text=True
        )
        self._port = port
        if stderr is None:
            self._reader = threading.Thread(target=self._read)
            self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def url(self) -> str:
        """As the process tells it."""
        if self._port:
            return f"http://127.0.0.1:{self._port}"
        return self.wait_for(lambda: next(line.split()[-1] for line in self.lines if "listening on" in line))

    def wait_for(self, found):
        """What ``found`` returns, as soon as it raises neither ``StopIteration`` nor httpx's errors and is true."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            try:
                if value := found():
                    return value
            except (StopIteration, httpx.TransportError):
                pass
            assert self.process.poll() is None, f"it has ended with {self.process.returncode}: {self.lines}"
            time.sleep(0.02)
        raise AssertionError(f"nothing happened in {SECONDS} s: {self.lines}")

    def wait_until_loaded(self) -> str:
        url = self.url
        self.wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        return url

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, seconds: float = SECONDS) -> int:
        """The exit code, which comes within so many seconds."""
        code = self.process.wait(seconds)
        if hasattr(self, "_reader"):
            self._reader.join(SECONDS)
        return code

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.ended()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
