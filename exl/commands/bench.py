from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from typing import Annotated

import typer

from exl.commands.common import say
from exl.commands.options import Debug, LoadOptions, Lora, ModelName, shared_options
from exl.errors import ConfigError


@shared_options
def bench(
    which: ModelName,
    pp: Annotated[int, typer.Option("--pp", help="Tokens in the prompt; 0: no prompt test.")] = 512,
    tg: Annotated[int, typer.Option("--tg", help="Tokens to generate; 0: no generation test.")] = 128,
    depth: Annotated[int, typer.Option(help="Tokens that are already in the cache.")] = 0,
    repeats: Annotated[int, typer.Option(help="Measurements of each, after one warm-up.")] = 5,
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Instead: so many requests at once, each with a prompt of --pp tokens and --tg tokens to generate."
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="With --concurrency: a smaller model that drafts, folder or repository."),
    ] = None,
    speculate: Annotated[
        str | None, typer.Option(help="With --concurrency: prompt (what followed before) or draft (that model).")
    ] = None,
    output: Annotated[str, typer.Option(help="table, csv or json.")] = "table",
    *,
    lora: Lora = None,
    loading: LoadOptions,
    debug: Debug = False,
) -> None:
    """Measure the speed of prompts and of generation, or of many requests at once.

    exl bench path/to/model

    exl bench path/to/model --pp 0 --tg 64 --depth 1024 --output json

    exl bench path/to/model --concurrency 16 --pp 128 --tg 64
    """
    if output not in ("table", "csv", "json"):
        raise ConfigError(f"output: found {output!r}, expected table, csv or json")
    from exl.adapters.choice import find_adapters
    from exl.bench import markdown, model_name, rows_of, run_bench
    from exl.checkpoint.hub import find_model
    from exl.planning.options import EngineOptions
    from exl.units import format_bytes

    folder, options = find_model(which.name, **loading.source), EngineOptions(**loading.engine())
    options = replace(options, lora=find_adapters(lora, token=loading.token).folders)
    if draft is not None:
        options = replace(options, draft=find_model(draft, token=loading.token))
    shown = model_name(which.name, folder)
    report = run_bench(
        folder, options, pp, tg, depth, repeats, name=shown, concurrency=concurrency, speculate=speculate
    )
    rows = rows_of(report)
    advice = [note.text for note in report.plan.notes if note.kind == "advice"]
    if output == "json":
        facts = {"roof_bytes_per_second": report.roof, "peak_bytes": report.peak_bytes}
        facts |= {"decode_steps": report.decode_steps, "advice": advice}
        print(json.dumps({"results": rows, "planned_bytes": report.plan.num_bytes, **facts}))
    elif output == "csv":
        writer = csv.DictWriter(sys.stdout, rows[0] if rows else ["test"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(markdown(rows))
        peak = "unknown on this system" if report.peak_bytes is None else format_bytes(report.peak_bytes)
        say(f"memory: {peak} of {format_bytes(report.plan.num_bytes)} planned")
        say(f"roof: {report.roof / 1e9:.1f} GB/s, a read-only pass over memory{_shares(rows)}")
        if report.decode_steps is not None:
            say(f"decode steps: {report.decode_steps}")
        for text in advice:
            say(text)


def _shares(rows: list[dict[str, object]]) -> str:
    """What of the roof each test reaches, where that is known."""
    found = [f"{row['test']} reaches {100 * row['share_of_roof']:.1f} %" for row in rows if row["share_of_roof"]]
    return f"; {', '.join(found)}" if found else ""
