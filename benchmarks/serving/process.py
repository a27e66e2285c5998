"""``exl serve`` in a process of its own, seen from outside: its address, memory, threads and open files."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.client import Address

_SECONDS = 120.0  # in which a model must be loaded


@dataclass(frozen=True)
class Resources:
    """Of a process."""

    rss_bytes: int
    num_threads: int
    num_files: int

    @classmethod
    def of(cls, pid: int) -> Resources:
        facts = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return cls(int(facts["VmRSS"].split()[0]) << 10, int(facts["Threads"]), files)


@dataclass(frozen=True)
class ServerProcess:
    process: subprocess.Popen[str]
    address: Address

    @property
    def resources(self) -> Resources:
        return Resources.of(self.process.pid)


@contextmanager
def server_process(model: Path, options: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """A server whose model is loaded. Ended by SIGTERM, and checked to have ended well."""
    command = [sys.executable, "-m", "exl.cli", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "listening on" in line), "")
        if not line:
            raise RuntimeError(f"{' '.join(command)}: ended with {process.wait()} before it listened")
        url = line.split()[-1]
        _wait_until_loaded(process, url)
        host, _, port = url.removeprefix("http://").rpartition(":")
        yield ServerProcess(process, Address(host, int(port)))
    finally:
        process.terminate()
        process.communicate(timeout=_SECONDS)
    if process.returncode != 0:
        raise RuntimeError(f"the server ended with {process.returncode}")


def _wait_until_loaded(process: subprocess.Popen[str], url: str) -> None:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} while it loaded")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=_SECONDS):
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{url}: not loaded after {_SECONDS:g} s")
