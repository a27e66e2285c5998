"""The ``exl`` command. Generated text goes to standard output, everything else to standard error.

torch is imported by the commands that need it, not by the command line itself: ``exl --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exl.errors import ConfigError, ExlError

if TYPE_CHECKING:
    from exl.llm import LLM

app = typer.Typer(
    name="exl",
    help="Runs GPTQ-quantized language models in the least memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Ram = Annotated[str | None, typer.Option(help="What exl may use: 6GB, 512MiB. Layers that do not fit are streamed.")]
Context = Annotated[str | None, typer.Option(help="Tokens for prompt and answer together, or auto: as many as fit.")]
KVCacheType = Annotated[str, typer.Option(help="Type of the cache: f32, f16, q8, k8v4 or q4.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder or Hugging Face repository; default: the one in exl.")
]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")] = "",
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the model's own, else greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the most likely tokens that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens p times as likely as the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: tokens seen are less likely.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given more than once.")] = None,
    ram: Ram = None,
    context: Context = None,
    kv_cache: KVCacheType = "f16",
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    debug: Debug = False,
) -> None:
    """Continue a text.

    exl generate "Once upon a time" --max-tokens 100

    echo "Once upon a time" | exl generate - --temperature 0.8 --seed 1 --json
    """
    text = _read_stdin() if prompt == "-" else prompt
    with _load(model, device=device, ram=ram, context=_context(context), kv_cache=kv_cache) as llm:
        stream = llm.stream(
            text,
            max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
        )
        for piece in stream:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        done = stream.completion
    if as_json:
        print(json.dumps(_completion_json(text, done), ensure_ascii=False))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    _say(
        f"{done.num_prompt_tokens} + {done.num_tokens} tokens, first after {done.prompt_seconds * 1e3:.0f} ms, "
        f"then {done.tokens_per_second:.1f} tokens/s ({done.finish_reason}, seed {done.seed})"
    )


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="Folder or repository; default: the one in exl.")] = None,
    ram: Ram = None,
    context: Context = None,
    kv_cache: KVCacheType = "f16",
    max_sequences: Annotated[int, typer.Option(help="Sequences that have a context of their own.")] = 1,
    prefill_chunk: Annotated[int, typer.Option(help="Rows computed at once.")] = 512,
    prefill_window: Annotated[int, typer.Option(help="Rows that go through a layer before the next.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Show where every byte of a model would go, from its headers alone.

    exl plan path/to/model --ram 8GB --context auto
    """
    from exl.hub import find_model
    from exl.layout import Target
    from exl.planning import EngineOptions, open_model, plan_model

    options = EngineOptions(
        ram=ram,
        context=_context(context),
        kv_cache=kv_cache,
        max_sequences=max_sequences,
        prefill_chunk=prefill_chunk,
        prefill_window=prefill_window,
    )
    with open_model(find_model(model)) as files:
        # Every x86 and ARM build of torch has int4pack; in which order it keeps the nibbles changes no size.
        found, _ = plan_model(files, options, Target("cpu", int4pack="split64"))
    print(json.dumps(found.to_json()) if as_json else found.table())


@app.command()
def quantize(
    src: Annotated[Path, typer.Argument(help="Folder of a dense model.")],
    dst: Annotated[Path, typer.Argument(help="Folder to make. An interrupted run is taken up again.")],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1: all of them.")] = 128,
    act_order: Annotated[
        bool, typer.Option("--act-order/--no-act-order", help="Round the inputs that matter most first.")
    ] = True,
    static_groups: Annotated[
        bool, typer.Option("--static-groups/--no-static-groups", help="With act-order: neighbours share a group.")
    ] = True,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="One zero, in the middle; or one for each group.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text like what the model will read.")] = None,
    documents: Annotated[str, typer.Option(help="Of the text: lines, packed or whole.")] = "lines",
    num_samples: Annotated[int, typer.Option(help="Sequences taken from the text, at most.")] = 128,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence, at most.")] = None,
    damp: Annotated[float, typer.Option(help="Added to the Hessian's diagonal, relative to its mean.")] = 0.01,
    method: Annotated[str, typer.Option(help="gptq, or rtn: round to nearest, without a text.")] = "gptq",
    checkpoint_format: Annotated[str, typer.Option("--format", help="gptq, or gptq_v2.")] = "gptq",
    debug: Debug = False,
) -> None:
    """Make a GPTQ model from a dense one, a layer at a time.

    exl quantize path/to/dense path/to/output --bits 4 --group-size 128 --calibration text.txt
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from exl.quantize import QuantizeOptions
    from exl.quantize import quantize as run

    options = QuantizeOptions(
        bits=bits,
        group_size=group_size,
        act_order=act_order,
        static_groups=static_groups,
        sym=sym,
        calibration=calibration,
        documents=documents,
        num_samples=num_samples,
        seq_len=seq_len,
        damp=damp,
        method=method,
        checkpoint_format=checkpoint_format,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("quantizing", total=None)
        done = run(
            src, dst, options, lambda at, total, what: bar.update(task, completed=at, total=total, description=what)
        )
    resumed = f", {done.num_resumed_layers} layers were already done" if done.num_resumed_layers else ""
    _say(f"{done.folder}: {done.num_bytes} bytes of weights, {done.num_calibration_tokens} tokens of text{resumed}")


packed_app = typer.Typer(help="Packed copies of models that were streamed from disk.", no_args_is_help=True)
app.add_typer(packed_app, name="packed")
PackedFolder = Annotated[Path | None, typer.Option("--folder", help="Default: the user's cache folder.")]


@packed_app.command("list")
def packed_list(folder: PackedFolder = None, debug: Debug = False) -> None:
    """Show packed copies: bytes, model, file; last used first."""
    from exl.packed_store import list_packed

    for found in list_packed(folder):
        print(f"{found.num_bytes:>15,}  {found.source or 'damaged, or of another version'}  {found.path}")


@packed_app.command("clear")
def packed_clear(
    model: Annotated[Path | None, typer.Argument(help="Only this model's.")] = None,
    folder: PackedFolder = None,
    debug: Debug = False,
) -> None:
    """Remove packed copies. They are made again when they are needed."""
    from exl.packed_store import clear_packed

    removed = clear_packed(folder, model)
    _say(f"removed {len(removed)} packed files, {sum(found.num_bytes for found in removed):,} bytes")


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Versions, the GPU, where compiled kernels are kept, and what is missing.

    exl info
    """
    from exl.system_info import describe_system

    facts = describe_system()
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _load(model: str | None, **options: object) -> LLM:
    """Loads with a progress bar on standard error, where that is a terminal."""
    from exl.llm import load

    if not sys.stderr.isatty():
        return load(model, **options)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        return load(model, progress=lambda done, total: bar.update(task, completed=done, total=total), **options)


def _completion_json(prompt: str, done) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.num_prompt_tokens,
        "completion_tokens": done.num_tokens,
        "seed": done.seed,
        "prompt_seconds": done.prompt_seconds,
        "decode_seconds": done.decode_seconds,
        "tokens_per_second": done.tokens_per_second,
    }


def _context(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"context: found {text!r}, expected a number of tokens or auto") from None


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: not UTF-8: {error}") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    """Entry point. Errors that a user can cause are one line and exit code 1; ``--debug`` shows where."""
    try:
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


def _fail(error: Exception, message: str | None = None) -> int:
    if "--debug" in sys.argv[1:]:
        import traceback

        traceback.print_exception(error)
    text = str(error) if message is None else message
    if not isinstance(error, ExlError) and message is None:
        text = f"{type(error).__name__}: {text}"
    lines = text.strip().splitlines() or [type(error).__name__]  # further lines are tables and logs
    _say("exl: error: " + " ".join(lines[0].split()))
    return 1


if __name__ == "__main__":
    main()
