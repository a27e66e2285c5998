"""Stages one after another, each in processes of its own and within its time; a summary after each. Imports neither
torch nor exl: whatever they do to a process, the summary is written."""

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
REFRESH_SECONDS = 10.0  # of the summary while a stage runs
MOST_LOG_BYTES = 1_500_000  # of a stage: the middle of a longer one is cut out
RESULTS, LOG = "results.jsonl", "log.txt"


@dataclass(frozen=True)
class Stage:
    """``command``: ``{seconds}`` in an argument stands for the stage's time limit."""

    name: str
    command: Sequence[str]
    seconds: float  # that are kept for it; what it does not use goes to the stages behind it


@dataclass
class Run:
    """What a summary tells."""

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
    """All of ``stages`` from the folder ``root``; never raises for what a stage does."""
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
    """The stage and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver may outlive even that
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
