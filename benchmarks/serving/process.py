"""``exl serve`` in a process of its own, seen from outside: its address, memory, threads and open files."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.serving.client import Address
from exl.memory.host import proc_bytes
from tests.server.processes import Process


@dataclass(frozen=True)
class Resources:
    """Of a process."""

    rss_bytes: int
    num_threads: int
    num_files: int

    @classmethod
    def of(cls, pid: int) -> Resources:
        rss = proc_bytes(f"{pid}/status", "VmRSS")
        if rss is None:
            raise RuntimeError(f"/proc/{pid}/status tells no VmRSS: expected a running process, and Linux")
        return cls(rss, len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd")))


@dataclass(frozen=True)
class ServerProcess:
    pid: int
    address: Address

    @property
    def resources(self) -> Resources:
        return Resources.of(self.pid)


@contextmanager
def server_process(model: Path, options: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """A server on the CPU whose model is loaded; its log is read. Ended by SIGTERM, and checked to have ended well."""
    with Process(str(model), *options) as server:
        parts = urlsplit(server.wait_until_loaded())
        assert parts.hostname is not None
        assert parts.port is not None
        yield ServerProcess(server.process.pid, Address(parts.hostname, parts.port))
        server.signal(signal.SIGTERM)
        code = server.ended()
    if code != 0:
        raise RuntimeError(f"the server ended with {code}: {server.lines[-1:]}")
