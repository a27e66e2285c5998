"""The ``exl`` command. Generated text goes to standard output, everything else to standard error.

torch is imported by the commands that need it, not by the command line itself: ``exl --help`` answers at once.
"""

from __future__ import annotations

import sys

import typer

from exl.commands.bench import bench
from exl.commands.chat import chat
from exl.commands.common import say
from exl.commands.evaluate import evaluate
from exl.commands.generate import generate
from exl.commands.info import info
from exl.commands.packed import packed_app
from exl.commands.plan import plan
from exl.commands.quantize import quantize
from exl.errors import ExlError, one_line_warnings

app = typer.Typer(
    name="exl",
    help="Runs GPTQ-quantized language models in the least memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (generate, chat, plan, quantize, bench, info):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(packed_app, name="packed")


def main() -> None:
    """Entry point. Errors that a user can cause are one line and exit code 1; ``--debug`` shows where."""
    if sys.platform == "win32":
        _pipe_utf8()
    try:
        with one_line_warnings(say):
            code = app(standalone_mode=False)
    except ExlError as error:
        code = _fail(error)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader has gone (exl generate | head). Python would complain once more when it flushes at exit.
        sys.stdout = None  # type: ignore[assignment]
        code = 0
    except Exception as error:
        # Usage errors: the class has moved between typer's releases, its method has not.
        if not hasattr(error, "format_message"):
            if type(error).__name__ in ("Abort", "Exit"):
                raise SystemExit(getattr(error, "exit_code", 1)) from None
            code = _fail(error)
        else:
            code = _fail(error, error.format_message())
    raise SystemExit(code if isinstance(code, int) else 0)


def _pipe_utf8() -> None:
    """Windows' pipes and files have a code page by default, which lacks most of what a model writes."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="replace")


def _fail(error: Exception, message: str | None = None) -> int:
    if "--debug" in sys.argv[1:]:
        import traceback

        traceback.print_exception(error)
    text = str(error) if message is None else message
    if not isinstance(error, ExlError) and message is None:
        text = f"{type(error).__name__}: {text}"
    lines = text.strip().splitlines() or [type(error).__name__]  # further lines are tables and logs
    say("exl: error: " + " ".join(lines[0].split()))
    return 1


if __name__ == "__main__":
    main()
