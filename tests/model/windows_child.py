"""A process without the parts of POSIX that Windows lacks: imports all of exl, loads the bundled model in three ways,
and prints its tokens. Run by ``test_windows_model.py``: ``python -m tests.model.windows_child FOLDER``."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path


def import_the_others() -> None:
    """Imports other packages first: they have their own code for Windows and choose by the platform at import."""
    import concurrent.futures.thread  # noqa: F401
    import multiprocessing.connection  # noqa: F401
    import tempfile  # noqa: F401

    import fastapi  # noqa: F401
    import huggingface_hub.constants  # noqa: F401
    import jinja2.sandbox  # noqa: F401
    import prometheus_client  # noqa: F401
    import prompt_toolkit.shortcuts  # noqa: F401
    import rich.progress  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch._dynamo  # noqa: F401
    import typer.main  # noqa: F401
    import uvicorn.protocols.http.h11_impl
    import uvicorn.protocols.http.httptools_impl  # noqa: F401


def become_windows() -> None:
    import ctypes
    import mmap
    import os
    import signal

    import pytest

    from tests.host.fake_windows import FakeKernel32, guard_open_files

    guard_open_files(pytest.MonkeyPatch())
    kernel32 = FakeKernel32()
    ctypes.WinDLL = lambda *_, **__: kernel32
    for name in ("fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "readline"):
        sys.modules[name] = None
    missing = [
        "fork",
        "forkpty",
        "register_at_fork",
        "pread",
        "preadv",
        "pwrite",
        "pwritev",
        "posix_fadvise",
        "posix_fallocate",
        "sysconf",
        "uname",
        "getuid",
        "geteuid",
        "getgid",
        "getloadavg",
        "sched_getaffinity",
        "sched_setaffinity",
        "fchmod",
        "fchown",
        "mkfifo",
        "killpg",
        "setsid",
        "nice",
        "sync",
        "readv",
        "writev",
        "sendfile",
        "fdatasync",
        "O_DIRECT",
        "O_CLOEXEC",
        "O_SYNC",
        "O_NONBLOCK",
        "O_DIRECTORY",
        "O_NOATIME",
        "POSIX_FADV_DONTNEED",
        "RTLD_NOLOAD",
        "RTLD_NOW",
    ]
    for name in missing:
        if hasattr(os, name):
            delattr(os, name)
    for name in [name for name in vars(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))]:
        delattr(mmap, name)
    for name in ("SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "alarm", "setitimer", "pthread_sigmask"):
        if hasattr(signal, name):
            delattr(signal, name)
    plain = Path.read_text

    def read_text(path: Path, *args: object, **options: object) -> str:
        assert not str(path).startswith("/proc"), f"{path} is Linux's"
        return plain(path, *args, **options)

    Path.read_text = read_text
    sys.platform = "win32"


def run(folder: Path) -> dict[str, object]:
    import exl

    names = [module.name for module in pkgutil.walk_packages(exl.__path__, "exl.")]
    for name in names:
        importlib.import_module(name)
    found: dict[str, object] = {"modules": len(names)}
    for name, options in {
        "resident": {},
        "streamed": {"resident_layers": 1, "packed_folder": folder},
        "packed": {"resident_layers": 1, "packed_folder": folder},
    }.items():
        with exl.load(device="cpu", context=256, **options) as llm:
            found[name] = llm.generate("Once upon a time", max_tokens=24, temperature=0).token_ids
    found["files"] = sorted(path.name for path in folder.iterdir())
    from exl.commands.system_info import describe_system

    found["missing"] = describe_system()["missing"]
    return found


if __name__ == "__main__":
    import_the_others()
    become_windows()
    print(json.dumps(run(Path(sys.argv[1]))))
