"""A process that runs items of a stage, one after another. Each item's begin and outcome are written to disk at once.

Several workers share a folder of claims: an item belongs to the worker that creates its file first. A worker whose CUDA
context is destroyed exits with the code ``LEFT``; the driver then starts a fresh worker for the items that no worker
has begun. Imports neither torch nor exl.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.guard import device_error, one_line

LEFT = 86  # exit code of a worker whose context is lost
TEXT = 1500  # at most; the last characters of an item's text
STDERR = os.dup(2)  # kept before anything redirects it: receives a hung worker's stack


@dataclass(frozen=True)
class Place:
    """Files of a stage and this worker's number; the driver passes it to a worker as one argument."""

    stage: str
    results: Path  # JSON lines of all stages
    claims: Path
    item_seconds: float
    slot: int = 0  # this worker's number, below ``num_workers``
    num_workers: int = 1

    def __str__(self) -> str:
        return json.dumps({**vars(self), "results": str(self.results), "claims": str(self.claims)})

    @classmethod
    def parse(cls, text: str) -> Place:
        fields = json.loads(text)
        return cls(**{**fields, "results": Path(fields["results"]), "claims": Path(fields["claims"])})


def append(path: Path, **fields: object) -> None:
    """Appends one JSON line by a single write, so that lines of several processes do not mix."""
    data = (json.dumps(fields) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def read_records(path: Path, offset: int = 0) -> tuple[list[dict], int]:
    """Records from ``offset`` on, and the next offset; an incomplete last line is left for the next call."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    records = []
    for line in whole.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records, offset + len(whole)


def claim_name(item: str) -> str:
    return hashlib.sha256(item.encode()).hexdigest()[:32]


class Worker:
    def __init__(self, place: Place) -> None:
        self.place = place
        self._began = 0.0
        faulthandler.enable(STDERR)

    def claim(self, item: str) -> bool:
        """Claims the item; False if another worker has it."""
        try:
            os.symlink(str(os.getpid()), self.place.claims / claim_name(item))  # atomic, with its content
        except FileExistsError:
            return False
        return True

    def begin(self, item: str) -> None:
        """Records the begin of an item. After ``item_seconds`` the process ends itself, wherever it hangs."""
        self._began = time.monotonic()
        self._note(item, event="begin")
        faulthandler.dump_traceback_later(self.place.item_seconds, exit=True, file=STDERR)

    def end(self, item: str, outcome: str, text: str = "", **more: object) -> None:
        """Records an outcome: passed, failed or skipped."""
        faulthandler.cancel_dump_traceback_later()
        seconds = round(time.monotonic() - self._began, 3)
        self._note(item, event="end", outcome=outcome, seconds=seconds, text=text[-TEXT:], **more)

    def note(self, text: str) -> None:
        self._note(None, event="note", text=text[-TEXT:])

    def _note(self, item: str | None, **fields: object) -> None:
        append(self.place.results, stage=self.place.stage, item=item, worker=os.getpid(), **fields)

    def leave(self) -> NoReturn:
        """Exits without cleaning up, which would only raise the same error again."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LEFT)

    def run(self, item: str, run: Callable[[], str], **more: object) -> None:
        """Runs one claimed item; ``run`` returns its text. Exits the process if the CUDA context is lost."""
        self.begin(item)
        outcome, text = "passed", ""
        try:
            text = run()
        except Exception as error:
            traceback.print_exc()
            outcome, text = "failed", one_line(error)
        broken = device_error()
        if broken is None:
            self.end(item, outcome, text, **more)
            return
        self.end(item, "failed", text if outcome == "failed" else broken, sticky=broken, **more)
        self.leave()
