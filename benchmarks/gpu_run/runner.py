"""Runs stages one after another, each in its own processes and within its time limit, with a summary after each.
Imports neither torch nor exl, so that the summary is written whatever they do to a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_run.driver import exit_text
from benchmarks.gpu_run.summary import write_summary

POLL_SECONDS = 0.1
REFRESH_SECONDS = 10.0  # between updates of the summary while a stage runs
MOST_LOG_BYTES = 1_500_000  # per stage; the middle of a longer log is cut out
RESULTS, LOG = "results.jsonl", "log.txt"


@dataclass(frozen=True)
class Stage:
    """``command``: ``{seconds}`` in an argument stands for the stage's time limit."""

    name: str
    command: Sequence[str]
    seconds: float  # reserved for it; unused time goes to later stages


@dataclass
class Run:
    """The content of a summary."""

    out: Path
    seconds: float  # budget
    title: str = "gpu_run"
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)
    stages: list[dict] = field(default_factory=list)  # name, status, seconds, limit

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)


def run_stages(run: Run, stages: Sequence[Stage], root: Path) -> None:
    """Runs all ``stages`` in the folder ``root``; no failure of a stage raises here."""
    run.out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, LOG):
        (run.out / name).unlink(missing_ok=True)
    run.stages = [{"name": stage.name, "status": "not begun", "seconds": 0.0, "limit": 0.0} for stage in stages]
    stopped = False
    for i, stage in enumerate(stages):
        told = run.stages[i]
        limit = run.left - sum(later.seconds for later in stages[i + 1 :])
        if stopped or limit < 1:
            told["status"] = "not run: stopped" if stopped else "not run: no time was left"
            continue
        told["limit"] = round(limit, 1)
        try:
            _run_stage(run, stage, told, limit, root)
        except KeyboardInterrupt:
            told["status"], stopped = "stopped", True
        except OSError as error:
            told["status"] = f"could not be started: {error}"
        write_summary(run)
    write_summary(run)


def _run_stage(run: Run, stage: Stage, told: dict, limit: float, root: Path) -> None:
    command = [part.replace("{seconds}", f"{limit:.1f}") for part in stage.command]
    log, began = run.out / LOG, time.monotonic()
    told["status"] = "running"
    write_summary(run)
    with open(log, "ab") as file:
        start = file.tell()
        file.write(f"\n===== {stage.name}: {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    refreshed = began
    try:
        while process.poll() is None:
            now = time.monotonic()
            told["seconds"] = round(now - began, 1)
            if now - began > limit:
                told["status"] = f"timed out after {limit:.0f} s"
                return
            if now - refreshed > REFRESH_SECONDS:
                refreshed = now
                write_summary(run)
            time.sleep(POLL_SECONDS)
        code = process.returncode
        told["status"] = "done" if code == 0 else f"crashed: {exit_text(code)}" if code < 0 else exit_text(code)
    finally:
        _end_group(process)
        told["seconds"] = round(time.monotonic() - began, 1)
        if told["status"] != "done":
            told["log"] = _tail(log, start)
        _cut(log, start)


def _end_group(process: subprocess.Popen) -> None:
    """Kills the stage and every process that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a hang in the GPU's driver may survive SIGKILL
        process.wait(timeout=5)


def _tail(log: Path, start: int, most: int = 1200) -> str:
    with open(log, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - most))
        return file.read().decode(errors="replace")


def _cut(log: Path, start: int) -> None:
    with open(log, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end - start <= MOST_LOG_BYTES:
            return
        file.seek(end - MOST_LOG_BYTES // 2)
        rest = file.read()
        file.seek(start + MOST_LOG_BYTES // 2)
        file.write(f"\n... {end - start - MOST_LOG_BYTES} bytes are left out ...\n".encode() + rest)
        file.truncate()
