from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import load_with_progress
from exl.commands.options import Debug, LoadOptions, ModelName, shared_options


@shared_options
def evaluate(
    which: ModelName,
    text: Annotated[Path, typer.Option(help='UTF-8 text to predict, or chats: {"messages": [...]} in lines of JSON.')],
    against: Annotated[str | None, typer.Option(help="A reference model: KL divergence and agreement with it.")] = None,
    documents: Annotated[
        str,
        typer.Option(
            help="lines: each line is a document; whole: the file is cut into windows; chats: each line is a chat, "
            "rendered by the model's template; auto: chats in a .jsonl file, else lines."
        ),
    ] = "auto",
    window: Annotated[int, typer.Option(help="At most this many tokens per document.")] = 512,
    *,
    loading: LoadOptions,  # its revision applies to the model, not to the reference
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    debug: Debug = False,
) -> None:
    """Measure how well a model predicts a text: loss in nats per token, perplexity.

    exl eval path/to/model --text text.txt

    exl eval path/to/quantized --text text.txt --against path/to/original
    """
    from exl.evaluate import evaluate as run
    from exl.evaluate import read_documents

    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(load_with_progress(which.name, loading, window))
        ids = read_documents(text, llm.tokenizer, documents, window)
        reference = None
        if against is not None:
            reference = stack.enter_context(load_with_progress(against, replace(loading, revision=None), window))
        found = run(llm, ids, reference)
    facts: dict[str, float | int] = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "tokens": found.num_tokens,
        "documents": found.num_documents,
    }
    if found.against is not None:
        facts |= {
            "reference_loss": found.against.reference_loss,
            "kl_mean": found.against.kl_mean,
            "kl_99th_percentile": found.against.kl_99th,
            "top1_agreement": found.against.top1_agreement,
        }
    if as_json:
        print(json.dumps(facts))
        return
    print(f"loss {found.loss:.4f} nats, perplexity {found.perplexity:.3f}")
    print(f"over {found.num_tokens} tokens of {found.num_documents} documents")
    if found.against is not None:
        other = found.against
        print(f"reference: loss {other.reference_loss:.4f} nats")
        print(f"KL divergence {other.kl_mean:.4f} nats, 99th percentile {other.kl_99th:.4f}")
        print(f"the same top-1 token at {100 * other.top1_agreement:.2f} % of positions")
