"""How far a long prompt has come: shown after half a second, gone when the answer begins, only in a terminal."""

from __future__ import annotations

import io
import sys

import pytest

import exl
from exl.commands import prompt_status
from exl.commands.prompt_status import PromptStatus
from exl.request_options import PromptProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(prompt_status.time, "monotonic", lambda: now[0])
    return now


def use_terminal(monkeypatch) -> Terminal:
    """Not a fixture: between a fixture and its test, pytest puts its own streams back."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_long_prompt(clock, monkeypatch):
    terminal = use_terminal(monkeypatch)
    with PromptStatus() as status:
        status.update(PromptProgress(100, 4096, 1, 32))
        clock[0] += 0.4
        status.update(PromptProgress(900, 4096, 6, 32))
        assert terminal.getvalue() == ""
        clock[0] += 0.2
        status.update(PromptProgress(1536, 4096, 7, 32))
        line = "reading the prompt: 1,536 of 4,096 tokens (layer 7 of 32)"
        assert terminal.getvalue() == "\r" + line
        clock[0] += 0.05
        status.update(PromptProgress(1600, 4096, 8, 32))
        assert terminal.getvalue() == "\r" + line  # not drawn for every layer
        status.clear()
        assert terminal.getvalue() == f"\r{line}\r{' ' * len(line)}\r"
        status.clear()
    assert terminal.getvalue() == f"\r{line}\r{' ' * len(line)}\r"


def test_a_shorter_line_leaves_nothing_of_the_longer_one(clock, monkeypatch):
    terminal = use_terminal(monkeypatch)
    with PromptStatus() as status:
        clock[0] += 1
        status.update(PromptProgress(4000, 14096, 10, 32))
        clock[0] += 1
        status.update(PromptProgress(5000, 14096, 9, 32))
    first, second, erased, rest = terminal.getvalue().split("\r")[1:]
    assert len(second) == len(first)
    assert (erased, rest) == (" " * len(second.rstrip()), "")


def test_not_outside_a_terminal(clock, monkeypatch):
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with PromptStatus() as status:
            clock[0] += 1
            status.update(PromptProgress(1, 2, 1, 2))
        assert stream is None or stream.getvalue() == ""


def test_with_a_model(monkeypatch):
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(prompt_status, "_DELAY", 0.0)
    monkeypatch.setattr(prompt_status, "_PAUSE", 0.0)
    with exl.load(progress=False, prefill_chunk=32, prefill_window=64) as llm, PromptStatus() as status:
        for _ in llm.stream("Once upon a time. " * 20, max_tokens=2, prompt_progress=status.update):
            status.clear()
    lines = [line.rstrip() for line in terminal.getvalue().split("\r") if line.strip()]
    assert len(lines) >= 5
    assert all(line.startswith("reading the prompt: ") and line.endswith(" of 5)") for line in lines)
    assert terminal.getvalue().endswith("\r")
