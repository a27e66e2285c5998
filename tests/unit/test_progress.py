"""What is shown while a model is loaded: in a terminal, in a notebook, in neither."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import types

import pytest

import exl
from exl import progress
from exl.checkpoint.hub import BUNDLED_MODEL
from tests.command_line import without_compiling


class Display:
    """IPython.display: what a notebook would show, by output."""

    def __init__(self):
        self.outputs: list[str] = []

    def HTML(self, data):  # IPython's name
        return data

    def display(self, data, display_id=False):
        assert display_id is True
        self.outputs.append(data)
        i = len(self.outputs) - 1

        class Handle:
            def update(handle, data):
                self.outputs[i] = data

        return Handle()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def notebook(monkeypatch):
    shown = Display()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    display = types.ModuleType("IPython.display")
    display.HTML, display.display = shown.HTML, shown.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_a_notebook_shows_bytes_rate_and_what_is_left(notebook, clock):
    with progress.shown_progress(None, "loading") as tell:
        tell(1_000_000_000, 4_000_000_000)
        assert notebook.outputs == []
        clock[0] += 1
        tell(2_000_000_000, 4_000_000_000)
        (picture,) = notebook.outputs
        assert 'value="2000000000" max="4000000000"' in picture
        assert "2.00 GB of 4.00 GB, 2.00 GB/s, 1 s left" in picture
        clock[0] += 0.01
        tell(2_100_000_000, 4_000_000_000)
        assert notebook.outputs == [picture]  # not drawn for every layer
        clock[0] += 0.99
        tell(4_000_000_000, 4_000_000_000)
    assert notebook.outputs == ["<div>loading: 4.00 GB in 2.0 s, 2.00 GB/s</div>"]


def test_what_is_done_in_a_moment_shows_nothing(notebook, clock, capfd):
    for wanted in (None, True):
        with progress.shown_progress(wanted, "loading") as tell:
            clock[0] += 0.4
            tell(1, 1)
    assert notebook.outputs == []
    assert capfd.readouterr() == ("", "")


def test_a_load_in_a_notebook(notebook, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    exl.load().close()
    (line,) = notebook.outputs
    assert re.fullmatch(r"<div>loading: [\d.]+ [KM]B in [\d.]+ s, [\d.]+ [KMG]?B/s</div>", line)
    exl.load(progress=False).close()
    assert len(notebook.outputs) == 1


def test_a_function_is_called_in_bytes(notebook):
    calls = []
    exl.load(progress=lambda done, total: calls.append((done, total))).close()
    done, total = zip(*calls, strict=True)
    assert len(set(total)) == 1
    assert list(done) == sorted(done)
    assert calls[-1][0] == calls[-1][1] > 0
    assert notebook.outputs == []


@pytest.mark.parametrize("wanted", ["banana", 1, {}])
def test_anything_else_is_refused(wanted):
    with pytest.raises(exl.ConfigError, match=rf"progress: found {re.escape(repr(wanted))}, expected True, False or a"):
        exl.load(progress=wanted)


LOAD = f"""
import sys
from exl import progress
import exl
progress._DELAY = 0.0
for wanted in %s:
    exl.load({str(BUNDLED_MODEL)!r}, progress=wanted).close()
    print("done", wanted, file=sys.stderr, flush=True)
"""


def run(wanted: str, **options: object) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
    return subprocess.Popen([sys.executable, "-c", LOAD % wanted], env=env, **options)


def test_a_terminal_shows_a_bar_with_bytes_and_rate():
    ours, theirs = pty.openpty()
    child = run("[None]", stdout=subprocess.PIPE, stderr=theirs, stdin=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # how Linux says that the other side has closed
        pass
    finally:
        os.close(ours)
    assert child.communicate(timeout=60)[0] == b""
    assert child.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"loading .*[\d.]+/[\d.]+ kB .*\d", text), text


def test_where_nobody_watches_a_bar_is_shown_when_asked_for():
    child = run("[None, False, True]", stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    out, told = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, b"")
    shown = r"done None\ndone False\nloading .*[\d.]+/[\d.]+ kB .*\ndone True\n"
    assert re.fullmatch(shown, without_compiling(told.decode())), told


class Broken(io.StringIO):
    """A standard error that fails from the second write on, as when a terminal is closed."""

    def __init__(self):
        super().__init__()
        self.writes = 0

    def isatty(self):
        return True

    def write(self, text):
        self.writes += 1
        if self.writes > 1:
            raise OSError(5, "Input/output error")
        return super().write(text)


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("wanted", [None, True, False])
@pytest.mark.parametrize("stream", [lambda: None, closed, Broken], ids=["none", "closed", "broken"])
def test_a_load_does_not_need_standard_error(wanted, stream, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", stream())
    with exl.load(progress=wanted) as llm:
        assert llm.generate("Once", max_tokens=1).num_tokens == 1
