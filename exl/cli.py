"""The ``exl`` command. Generated text goes to standard output, everything else to standard error.

torch is imported by the commands that need it, not by the command line itself: ``exl --help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import exl
from exl.commands.bench import bench
from exl.commands.chat import chat
from exl.commands.common import say
from exl.commands.evaluate import evaluate
from exl.commands.generate import generate
from exl.commands.info import info
from exl.commands.packed import packed_app
from exl.commands.plan import plan
from exl.commands.quantize import quantize
from exl.commands.serve import serve
from exl.commands.standard_streams import ReaderGone, standard_streams
from exl.commands.usage import explain_usage, help_text, judge_numbers
from exl.errors import ExlError, one_line_warnings

INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended

app = typer.Typer(
    name="exl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # The boxes of the other modes leave half of 80 columns to the text.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in (
    ("generate", generate),
    ("chat", chat),
    ("serve", serve),
    ("info", info),
    ("plan", plan),
    ("quantize", quantize),
    ("eval", evaluate),
    ("bench", bench),
):
    short, text = help_text(command)
    app.command(name, help=text, short_help=short)(judge_numbers(command))
app.add_typer(packed_app, name="packed")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"exl {exl.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show exl's version and exit.")
    ] = False,
) -> None:
    """Run GPTQ-quantized language models on the GPUs people own, in the least memory."""


def main() -> None:
    """Entry point. Errors that a user can cause are one line and exit code 1; ``--debug`` shows where."""
    try:
        with standard_streams():
            code = _run()
    except ExlError as error:  # standard output could not be flushed
        code = _fail(error)
    except ReaderGone:
        code = 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    raise SystemExit(code)


def _run() -> int:
    try:
        with one_line_warnings(say):
            code = app(standalone_mode=False, prog_name="exl")
    except (KeyboardInterrupt, ReaderGone):
        raise
    except ExlError as error:
        return _fail(error)
    except Exception as error:
        # typer's classes have moved between its releases, their names have not.
        name = type(error).__name__
        if name == "NoArgsIsHelpError":  # bare `exl`: the help is the answer
            if str(error).strip():
                print(error)
            return 0
        if name == "Abort":  # how some releases report Ctrl-C
            return INTERRUPTED
        if name == "Exit":
            return getattr(error, "exit_code", 1)
        return _fail(error, explain_usage(error) if hasattr(error, "format_message") else None)
    return code if isinstance(code, int) else 0


def _fail(error: Exception, message: str | None = None) -> int:
    if "--debug" in sys.argv[1:]:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    text = str(error) if message is None else message
    if not isinstance(error, ExlError) and message is None:
        text = f"{type(error).__name__}: {text}"
    lines = text.strip().splitlines() or [type(error).__name__]  # further lines are tables and logs
    say("exl: error: " + " ".join(lines[0].split()))
    return 1


if __name__ == "__main__":
    main()
