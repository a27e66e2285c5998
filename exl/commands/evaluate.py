from __future__ import annotations

import contextlib
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exl.commands.common import WorkBar, load_with_progress, say
from exl.commands.options import Debug, LoadOptions, Lora, ModelName, shared_options
from exl.errors import ConfigError

if TYPE_CHECKING:
    from exl.evaluate import Evaluation, Recording
    from exl.llm import LLM

Text = Annotated[Path, typer.Option(help='UTF-8 text to predict, or chats: {"messages": [...]} in lines of JSON.')]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="A reference: KL divergence and agreement with it. A model, or a file of --record."
    ),
]
AgainstOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Loads the reference with another option than the model: kv-cache=f32. May be given more than once.",
    ),
]
Record = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the model's predictions to a file for --against. Goes on where it was."),
]
Documents = Annotated[
    str,
    typer.Option(
        help="lines: each line is a document; whole: the file is cut into windows; chats: each line is a chat, "
        "rendered by the model's template; chunks: windows as llama-perplexity cuts them, the second half predicted; "
        "auto: chats in a .jsonl file, else lines."
    ),
]


@shared_options
def evaluate(
    which: ModelName,
    text: Text,
    against: Against = None,
    against_option: AgainstOption = None,
    record: Record = None,
    documents: Documents = "auto",
    window: Annotated[int, typer.Option(help="At most this many tokens per document.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", help="With chunks: a window begins every N tokens, and its last N are predicted."),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first N documents.")] = None,
    *,
    lora: Lora = None,  # of the model, not of the reference
    loading: LoadOptions,  # its revision applies to the model, not to the reference
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    debug: Debug = False,
) -> None:
    """Measure how well a model predicts a text: loss in nats per token, perplexity; distance from a reference.

    exl eval path/to/model --text text.txt

    exl eval path/to/quantized --text text.txt --against path/to/original

    exl eval path/to/model --text text.txt --kv-cache q4 --against path/to/model --against-option kv-cache=f32
    """
    from exl.evaluate import evaluate as run
    from exl.evaluate import read_passages, record_predictions

    if record is not None and against is not None:
        raise ConfigError("--record: found it with --against, expected one of the two")
    if against_option and against is None:
        raise ConfigError("--against-option: found it without --against")
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(load_with_progress(which.name, loading, window, lora))
        passages = read_passages(text, llm.tokenizer, documents, window, stride=stride, limit=limit)
        if record is not None:
            with WorkBar("recording") as bar:
                record_predictions(llm, passages, record, lambda done, total: bar.update(done, total, "recording"))
            say(f"{record}: predictions of {sum(p.num_predicted for p in passages)} tokens")
            return
        reference = None
        if against is not None:
            reference = stack.enter_context(_reference(against, loading, against_option or [], window))
        with WorkBar("evaluating") as bar:
            found = run(llm, passages, reference, lambda done, total: bar.update(done, total, "evaluating"))
    if as_json:
        print(json.dumps({name: None if math.isnan(value) else value for name, value in facts(found).items()}))
    else:
        print(report(found))


def _reference(against: str, loading: LoadOptions, options: list[str], window: int) -> LLM | Recording:
    from exl.evaluate import Recording

    if Recording.is_one(against):
        if options:
            raise ConfigError(f"--against-option: found {options[0]!r} with {against}, which is a file of predictions")
        return Recording(against)
    loading, lora = with_options(replace(loading, revision=None), options)
    return load_with_progress(against, loading, window, lora)


def with_options(loading: LoadOptions, options: list[str]) -> tuple[LoadOptions, str | None]:
    """``options``: ``NAME=VALUE``, named as on the command line. Returns what they change, and an adapter. Raises
    ``ConfigError``."""
    names = {field.name.replace("_", "-"): field.name for field in fields(LoadOptions)} | {"lora": "lora"}
    given: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in names or not value:
            raise ConfigError(
                f"--against-option: found {option!r}, expected NAME=VALUE with one of {', '.join(sorted(names))}"
            )
        given[names[name]] = _value(name, value)
    lora = given.pop("lora", None)
    return replace(loading, **given), lora


def _value(name: str, text: str) -> str | int | bool:
    if name == "window-cache":
        if text not in ("true", "false"):
            raise ConfigError(f"--against-option: {name}: found {text!r}, expected true or false")
        return text == "true"
    try:
        return int(text) if name in ("threads", "max-sequences") else text
    except ValueError:
        raise ConfigError(f"--against-option: {name}: found {text!r}, expected an integer") from None


def facts(found: Evaluation) -> dict[str, float]:
    """The figures by the names that ``--json`` prints."""
    named: dict[str, float] = {
        "loss": found.loss,
        "loss_error": found.loss_error,
        "perplexity": found.perplexity,
        "perplexity_error": found.perplexity_error,
        "tokens": found.num_tokens,
        "documents": found.num_documents,
    }
    if found.against is None:
        return named
    renamed = {"kl_99th": "kl_99th_percentile", "kl_99_9th": "kl_99_9th_percentile"}
    return named | {renamed.get(name, name): value for name, value in vars(found.against).items()}


def report(found: Evaluation) -> str:
    """The same in lines; each figure with its standard error."""
    lines = [
        f"loss {found.loss:.4f} ± {found.loss_error:.4f} nats, "
        f"perplexity {found.perplexity:.3f} ± {found.perplexity_error:.3f}",
        f"over {found.num_tokens} tokens of {found.num_documents} documents",
    ]
    if (other := found.against) is None:
        return "\n".join(lines)
    return "\n".join(
        [
            *lines,
            f"reference: loss {other.reference_loss:.4f} nats; "
            f"difference {other.loss_difference:+.5f} ± {other.loss_difference_error:.5f}",
            f"KL divergence {other.kl_mean:.3g} ± {other.kl_error:.2g} nats: median {other.kl_median:.3g}, "
            f"99th percentile {other.kl_99th:.3g}, 99.9th {other.kl_99_9th:.3g}, maximum {other.kl_max:.3g}",
            f"the same top-1 token at {100 * other.top1_agreement:.2f} ± {100 * other.top1_error:.2f} % of positions",
            f"probability of the text's tokens: {100 * other.delta_p_mean:+.3f} ± {100 * other.delta_p_error:.3f} % "
            f"on average, {100 * other.delta_p_rms:.3f} % root mean square",
        ]
    )
