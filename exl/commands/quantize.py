from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import WorkBar, say
from exl.commands.options import Debug, Revision, Threads, Token


def quantize(
    src: Annotated[str, typer.Argument(help="Folder of a dense model, or one of FP8; or its Hugging Face repository.")],
    dst: Annotated[Path, typer.Argument(help="Folder to create. An interrupted run is resumed.")],
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8; by default 4.")] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            help="Instead of --bits: their average, such as 3.5. Linears whose rounding does more harm get more."
        ),
    ] = None,
    bit_choices: Annotated[
        str | None, typer.Option(help="Bits that --target-bits chooses from; by default 2,3,4,8.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1: all of them.")] = 128,
    act_order: Annotated[
        bool, typer.Option("--act-order/--no-act-order", help="Round the inputs that matter most first.")
    ] = True,
    static_groups: Annotated[
        bool, typer.Option("--static-groups/--no-static-groups", help="With act-order: groups are consecutive inputs.")
    ] = True,
    sym: Annotated[
        bool,
        typer.Option("--sym/--asym", help="One fixed zero in the middle, or one zero per group and output."),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text like what the model will read, or a .jsonl file of chats."),
    ] = None,
    documents: Annotated[
        str,
        typer.Option(
            help="lines: each line starts a sequence; packed: lines fill sequences; whole: the file is one document; "
            "chats: each line is a chat, rendered by the model's template; auto: chats in a .jsonl file, else lines."
        ),
    ] = "auto",
    num_samples: Annotated[int, typer.Option(help="About this many full sequences of text are used.")] = 128,
    seq_len: Annotated[int | None, typer.Option(help="At most this many tokens per sequence.")] = None,
    damp: Annotated[float, typer.Option(help="Added to the Hessian's diagonal, relative to its mean.")] = 0.01,
    method: Annotated[str, typer.Option(help="gptq, or rtn: round to nearest, without calibration text.")] = "gptq",
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SETTINGS",
            help="Settings of modules whose names the regular expression matches: bits:8,group_size:32,sym:true, or "
            "dense. May be repeated; the first that matches decides.",
        ),
    ] = None,
    checkpoint_format: Annotated[str, typer.Option("--format", help="gptq, or gptq_v2.")] = "gptq",
    threads: Threads = None,
    revision: Revision = None,
    token: Token = None,
    debug: Debug = False,
) -> None:
    """Make a GPTQ model from a dense one, a layer at a time.

    exl quantize path/to/dense path/to/output --bits 4 --group-size 128 --calibration text.txt

    exl quantize owner/name path/to/output --calibration chats.jsonl
    """
    from exl.checkpoint.hub import find_model
    from exl.quantize.options import QuantizeOptions
    from exl.quantize.run import quantize as run

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
        overrides=override or (),
        target_bits=target_bits,
        bit_choices=None if bit_choices is None else _whole_numbers(bit_choices),
    )
    with WorkBar("quantizing") as bar:
        done = run(find_model(src, revision=revision, token=token), dst, options, bar.update, threads)
    resumed = f", {done.num_resumed_layers} layers were already done" if done.num_resumed_layers else ""
    average = "" if target_bits is None else f", {done.average_bits:.3f} bits on average"
    weights, tokens = f"{done.num_bytes} bytes of weights{average}", f"{done.num_calibration_tokens} tokens of text"
    say(f"{done.folder}: {weights}, {tokens}{resumed}")
    for rows in done.experts:
        if rows.few:
            say(str(rows))
    if (command := run_command(done.folder)) is not None:
        say(f"run it: {command}")


def _whole_numbers(text: str) -> list[int]:
    from exl.errors import ConfigError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"bit_choices: found {text!r}, expected whole numbers such as 2,3,4") from None


def run_command(folder: Path) -> str | None:
    """The command that runs a model: a chat if it has a chat template; None if it has no tokenizer."""
    from exl.errors import ExlError
    from exl.text.tokenizer import Tokenizer

    try:
        template = Tokenizer.from_folder(folder).chat_template
    except ExlError:
        return None
    command = ["exl", "generate", "Once upon a time", "-m"] if template is None else ["exl", "chat", "-m"]
    return shlex.join([*command, str(folder)])
