from __future__ import annotations

import json
from typing import Annotated

import typer

from exl.commands.options import (
    Context,
    Debug,
    KVCacheType,
    ModelName,
    Ram,
    Revision,
    Token,
    parse_context,
    parse_vram,
    shared_options,
)


@shared_options
def plan(
    which: ModelName,
    vram: Annotated[
        str | None,
        typer.Option(help="VRAM of a GPU, which need not be in this machine: 24GB; of several: 10GB,24GB."),
    ] = None,
    arch: Annotated[int, typer.Option(help="With --vram: compute capability, 86 for 8.6.")] = 86,
    ram: Ram = None,
    context: Context = None,
    kv_cache: KVCacheType = "f16",
    max_sequences: Annotated[int, typer.Option(help="The cache has room for this many contexts.")] = 1,
    prefill_chunk: Annotated[int, typer.Option(help="Rows computed at once.")] = 512,
    prefill_window: Annotated[
        int, typer.Option(help="Rows that go through one layer before the next layer starts.")
    ] = 4096,
    revision: Revision = None,
    token: Token = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Show where every byte of a model would go, from its headers alone.

    A Hugging Face repository is not downloaded for that.

    exl plan path/to/model --ram 8GB --context auto

    exl plan owner/name --vram 12GB --context 8192

    exl plan path/to/model --vram 24GB --kv-cache q8
    """
    from exl.planning.from_headers import plan as make_plan

    found = make_plan(
        which.name,
        vram=parse_vram(vram),
        arch=arch,
        ram=ram,
        context=parse_context(context),
        kv_cache=kv_cache,
        max_sequences=max_sequences,
        prefill_chunk=prefill_chunk,
        prefill_window=prefill_window,
        revision=revision,
        token=token,
    )
    print(json.dumps(found.to_json()) if as_json else found.table())
