"""``exl`` as a person calls it, in this process: a process of its own imports torch for seconds first.

What only a process can show (an exit status, a pipe that closes, what imports print) has tests that start one.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from exl.cli import main


def without_compiling(told: str) -> str:
    """``told`` without the line that says that kernels were compiled: whether it is there depends on the processor's
    speed and on what ran before."""
    return re.sub(r"^compiled kernels for this processor in \d+\.\d s\r?\n", "", told, flags=re.MULTILINE)


def run_exl(*args: object, stdin: str | bytes = b"") -> subprocess.CompletedProcess[str]:
    """Exit status and what was written, as ``subprocess.run`` tells it, ``without_compiling``."""
    command = ["exl", *map(str, args)]
    read = io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin), encoding="utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    code: object = None
    with (
        patch.object(sys, "argv", command),
        patch.object(sys, "stdin", read),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    for stream in (out, err):
        stream.flush()
    told = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(command, code, told[0], without_compiling(told[1]))
