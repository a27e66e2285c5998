"""Standard streams that are absent, narrow, full or left by their reader: an answer, or one clear line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from exl.cli import main
from exl.commands import generate as generate_module
from exl.commands.standard_streams import input_lines, read_argument, standard_streams
from exl.errors import ConfigError
from tests.command_line import run_exl

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
EXL = f"{sys.executable} -m exl.cli"
STORIES = Path(__file__).parents[2] / "data" / "stories260K"
# The locale decides, as in a bare container: no UTF-8 mode of Python's own.
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(command: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, timeout=120, env=ONE_THREAD | env
    )


class Completion:
    finish_reason, seed, num_tokens, num_prompt_tokens, prompt_seconds, decode_seconds = "length", 1, 1, 1, 0.1, 0.1
    tokens_per_second = 1.0

    def __init__(self, text: str) -> None:
        self.text = text


class Model:
    """A model whose answers are given; remembers prompts and whether each stream was closed."""

    def __init__(self, *pieces: str) -> None:
        self.pieces, self.prompts, self.closed = pieces, [], 0

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def stream(self, prompt, *args, **options):
        self.prompts.append(prompt)
        model = self

        class Stream:
            completion = Completion("".join(model.pieces))

            def __iter__(self):
                return iter(model.pieces)

            def close(self):
                model.closed += 1

        return Stream()


@pytest.fixture
def model(monkeypatch):
    def use(*pieces: str) -> Model:
        made = Model(*pieces)
        monkeypatch.setattr(generate_module, "load_with_progress", lambda *args, **options: made)
        return made

    return use


def run_with(out, *args: str, err=None, stdin=None) -> tuple[int, str]:
    """Exit code, and standard error's text unless another one is given."""
    heard = io.StringIO()
    with (
        patch.object(sys, "argv", ["exl", *args]),
        patch.object(sys, "stdin", stdin),
        redirect_stdout(out),
        redirect_stderr(heard if err is None else err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return ended.value.code, heard.getvalue()


class Failing(io.TextIOBase):
    """A stream that fails as a device does, when it is written to or only when it is flushed."""

    encoding = "utf-8"

    def __init__(self, error: OSError, *, on_flush: bool = False) -> None:
        self.error, self.on_flush = error, on_flush

    def write(self, text: str) -> int:
        if not self.on_flush:
            raise self.error
        return len(text)

    def flush(self) -> None:
        raise self.error


# ---- narrow


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437", "utf-8"])
def test_a_character_that_the_output_lacks_is_replaced_and_the_answer_goes_on(model, encoding):
    model("Look: ", "\U0001f600", " and ", "日本", ", é.")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    code, _ = run_with(out, "generate", "x")
    assert code == 0
    expected = "Look: \U0001f600 and 日本, é.\n".encode(encoding, "replace")
    assert out.buffer.getvalue() == expected


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_json_escapes_what_the_encoding_lacks(model, encoding):
    text = "\U0001f600 日本 é"
    model(text)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    assert run_with(out, "generate", "Ünï", "--json")[0] == 0
    found = json.loads(out.buffer.getvalue().decode(encoding))
    assert (found["text"], found["prompt"]) == (text, "Ünï")


def test_errors_are_shown_on_a_narrow_stream():
    err = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    code, _ = run_with(io.StringIO(), "info", "/nowhere/日本", err=err)
    err.flush()
    assert code == 1
    assert b"/nowhere/??" in err.buffer.getvalue()


def test_file_names_that_are_no_text_are_written_as_they_are():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(out), standard_streams():
        print(os.fsdecode(b"/models/\xff\xfe"))
    assert out.buffer.getvalue() == b"/models/\xff\xfe\n"


# ---- text that comes in


def test_an_argument_is_read_as_utf8_in_any_locale():
    done = shell(f"{EXL} generate Grüße --json --max-tokens 1", **C_LOCALE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "Grüße"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_standard_input_is_read_as_utf8_in_any_locale(model, encoding):
    made = model("x")
    stdin = io.TextIOWrapper(io.BytesIO("Grüße 😀\n".encode()), encoding=encoding)
    assert run_with(io.StringIO(), "generate", "-", stdin=stdin)[0] == 0
    assert made.prompts == ["Grüße 😀"]
    stdin = io.TextIOWrapper(io.BytesIO("Grüße 😀\n".encode()), encoding=encoding)
    with patch.object(sys, "stdin", stdin), standard_streams():
        assert list(input_lines("lines")) == ["Grüße 😀"]


def test_bytes_that_are_no_text_are_one_error(model):
    made = model("x")
    for args, stdin, words in (
        (["generate", "a\udcff"], b"", ["PROMPT", r"\xff", "UTF-8"]),
        (["generate", "a", "--stop", "\udce9t"], b"", ["--stop", r"\xe9t", "UTF-8"]),
        (["chat", "--system", "\udcff"], b"", ["--system", r"\xff", "UTF-8"]),
        (["generate", "-"], b"ab\xff", ["standard input", "0xff", "position 2", "UTF-8"]),
        (["chat"], b"\xff\n", ["standard input", "0xff", "UTF-8"]),
    ):
        done = run_exl(*args, stdin=stdin)
        assert (done.returncode, done.stdout) == (1, ""), args
        assert done.stderr.splitlines()[-1].startswith("exl: error: ")
        assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
    assert made.prompts == []


def test_text_of_an_8_bit_locale_is_kept():
    with patch.object(os, "fsencode", lambda text: text.encode("latin-1")):
        assert read_argument("Grüße", "PROMPT") == "Grüße"
        assert read_argument("Grüße".encode().decode("latin-1"), "PROMPT") == "Grüße"  # UTF-8 read as latin-1
    with patch.object(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape")):
        assert read_argument("Grüße".encode().decode("ascii", "surrogateescape"), "PROMPT") == "Grüße"
        with pytest.raises(ConfigError, match=r"PROMPT: found b'\\xfc'"):
            read_argument("\udcfc", "PROMPT")


@pytest.mark.parametrize(
    ("typed", "prompt"),
    [(b"\xef\xbb\xbfOne day\r\n", "One day"), (b"a\n\n", "a\n"), (b"a\r\nb", "a\nb"), (b"", "")],
)
def test_a_prompt_from_a_pipe(model, typed, prompt):
    made = model("x")
    run_exl("generate", "-", stdin=typed)
    assert made.prompts == [prompt]


# ---- absent


def test_no_standard_error(model):
    model("answer")
    for err in (None, closed()):
        out = io.StringIO()
        with patch.object(sys, "stderr", err), patch.object(sys, "argv", ["exl", "generate", "x"]):
            with redirect_stdout(out), pytest.raises(SystemExit) as ended:
                main()
            assert sys.stderr is err
        assert (ended.value.code, out.getvalue()) == (0, "answer\n")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("args", [("generate", "x"), ("plan",), ("info", "--json"), ("packed", "list"), ("--help",)])
def test_no_standard_output(model, args):
    made = model("answer")
    code, told = run_with(None, *args)
    if args[0] != "packed":  # which may have nothing to say
        assert (code, told.count("\n")) == (1, 1)
        assert told.startswith("exl: error: standard output: closed")
    assert made.closed == len(made.prompts)


@pytest.mark.parametrize("stdin", [None, closed()])
@pytest.mark.parametrize("args", [("generate", "-"), ("chat",)])
def test_no_standard_input(args, stdin):
    code, told = run_with(io.StringIO(), *args, stdin=stdin)
    assert code == 1
    assert told.splitlines()[-1].startswith("exl: error: standard input: closed, expected ")


def test_closed_descriptors():
    """What the shell closes is not given to the next file that is opened."""
    everything = shell(f"{EXL} generate Hello --max-tokens 3 --json 2>&- <&-")
    assert everything.returncode == 0
    assert json.loads(everything.stdout)["completion_tokens"] == 3
    nothing = shell(f"{EXL} plan >&- <&-")
    assert nothing.returncode == 1
    assert nothing.stderr.startswith(b"exl: error: standard output: closed")
    program = (
        "import os; from exl.commands.standard_streams import standard_streams as s\n"
        "with s(): print(sorted(os.path.realpath(f'/proc/self/fd/{n}') for n in (0, 2)))"
    )
    if Path("/proc/self/fd").exists():
        assert shell(f'{sys.executable} -c "{program}" <&- 2>&-').stdout.decode() == "['/dev/null', '/dev/null']\n"


# ---- full, or left by its reader


@pytest.mark.parametrize("on_flush", [False, True])
@pytest.mark.parametrize("args", [("generate", "x"), ("generate", "x", "--json"), ("plan",), ("info",), ("--help",)])
def test_a_full_disk_is_one_error(model, args, on_flush):
    made = model("answer")
    code, told = run_with(Failing(OSError(28, "No space left on device"), on_flush=on_flush), *args)
    assert (code, told) == (1, "exl: error: standard output: cannot be written: No space left on device\n")
    assert made.closed == len(made.prompts)


@pytest.mark.parametrize("on_flush", [False, True])
@pytest.mark.parametrize("args", [("generate", "x"), ("generate", "x", "--json"), ("plan",), ("info",), ("--help",)])
def test_a_reader_that_has_gone_is_no_error(model, args, on_flush):
    made = model("answer")
    assert run_with(Failing(BrokenPipeError(32, "Broken pipe"), on_flush=on_flush), *args) == (0, "")
    assert made.closed == len(made.prompts)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")])
def test_standard_error_that_cannot_be_written_is_not_missed(model, error):
    model("answer")
    out = io.StringIO()
    assert run_with(out, "generate", "x", err=Failing(error))[0] == 0
    assert out.getvalue() == "answer\n"
    assert run_with(io.StringIO(), "generate", "x", "--seed", "no", err=Failing(error))[0] == 1


@pytest.mark.parametrize("buffered", ["", "1"])
def test_pipes_and_full_disks_of_the_system(buffered):
    """With models that are really closed, and with what Python itself does when it ends."""
    env = {"PYTHONUNBUFFERED": buffered}
    chat = f"printf 'Hello\\nWhy?\\n' | {EXL} chat --temperature 0"
    generate = f"{EXL} generate -m {STORIES} --max-tokens 300 --temperature 0"
    for command, expected in ((f"{generate} | head -c 5", b"Once "), (f"{EXL} plan | true", b"")):
        done = shell(command, **env)
        assert done.returncode == 0, done
        assert done.stdout == expected
        assert not any(word in done.stderr for word in (b"Traceback", b"rror", b"unfinished", b"Broken")), done.stderr
    if Path("/dev/full").exists():
        for command in (generate if buffered else chat, f"{EXL} plan"):
            done = shell(f"{command} >/dev/full", **env)
            assert done.returncode == 1
            (line,) = [line for line in done.stderr.decode().splitlines() if "error" in line]
            assert line == "exl: error: standard output: cannot be written: No space left on device"


def test_a_chat_whose_reader_goes():
    done = shell(f"printf 'Hello\\nWhy?\\nWhat?\\n' | {EXL} chat --temperature 0 --max-tokens 100 | head -c 1")
    assert done.returncode == 0
    assert b"rror" not in done.stderr


def test_ctrl_c_ends_a_process_with_130():
    """While it answers the lines of a pipe, which are more than it can answer before the signal comes."""
    child = subprocess.Popen(
        [sys.executable, "-m", "exl.cli", "chat", "--max-tokens", "200"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ONE_THREAD,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background run ignores it
    )
    child.stdin.write(b"Tell me a story.\n" * 500)
    child.stdin.flush()
    assert child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in told
    assert b"error" not in told


def test_ctrl_c_is_quiet(model):
    made = model()

    class Interrupted:
        def __iter__(self):
            raise KeyboardInterrupt

        def close(self):
            made.closed += 1

    made.stream = lambda *args, **options: Interrupted()
    assert run_with(io.StringIO(), "generate", "x") == (130, "")
    assert made.closed == 1
