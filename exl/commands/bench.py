from __future__ import annotations

import csv
import json
import sys
from typing import Annotated

import typer

from exl.commands.common import say
from exl.commands.options import Debug, LoadOptions, ModelName, shared_options
from exl.errors import ConfigError


@shared_options
def bench(
    which: ModelName,
    pp: Annotated[int, typer.Option("--pp", help="Tokens in the prompt; 0: no prompt test.")] = 512,
    tg: Annotated[int, typer.Option("--tg", help="Tokens to generate; 0: no generation test.")] = 128,
    depth: Annotated[int, typer.Option(help="Tokens that are already in the cache.")] = 0,
    repeats: Annotated[int, typer.Option(help="Measurements of each, after one warm-up.")] = 5,
    output: Annotated[str, typer.Option(help="table, csv or json.")] = "table",
    *,
    loading: LoadOptions,
    debug: Debug = False,
) -> None:
    """Measure the speed of prompts and of generation.

    exl bench path/to/model

    exl bench path/to/model --pp 0 --tg 64 --depth 1024 --output json
    """
    if output not in ("table", "csv", "json"):
        raise ConfigError(f"output: found {output!r}, expected table, csv or json")
    from exl.bench import markdown, rows_of, run_bench
    from exl.checkpoint.hub import find_model
    from exl.planning.from_headers import EngineOptions
    from exl.units import format_bytes

    report = run_bench(
        find_model(which.name, **loading.source), EngineOptions(**loading.engine()), pp, tg, depth, repeats
    )
    rows = rows_of(report)
    if output == "json":
        facts = {"roof_bytes_per_second": report.roof, "peak_bytes": report.peak_bytes}
        facts["decode_steps"] = report.decode_steps
        print(json.dumps({"results": rows, "planned_bytes": report.plan.num_bytes, **facts}))
    elif output == "csv":
        writer = csv.DictWriter(sys.stdout, rows[0] if rows else ["test"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(markdown(rows))
        peak = "unknown on this system" if report.peak_bytes is None else format_bytes(report.peak_bytes)
        say(f"memory: {peak} of {format_bytes(report.plan.num_bytes)} planned")
        say(f"roof: {report.roof / 1e9:.1f} GB/s, a read-only pass over memory")
        if report.decode_steps is not None:
            say(f"decode steps: {report.decode_steps}")
