from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from exl.commands.options import (
    Arithmetic,
    CacheTokens,
    Context,
    Debug,
    Dense,
    Embed,
    Head,
    KVCacheType,
    KVRam,
    Loras,
    MaxSequences,
    ModelName,
    PrefillChunk,
    PrefillWindow,
    Ram,
    Revision,
    Rope,
    Token,
    WindowCache,
    parse_loras,
    parse_rope,
    parse_rounding,
    parse_tokens,
    parse_vram,
    shared_options,
)


@dataclass(frozen=True)
class ShapeOptions:
    """A model that is not there."""

    shape: Annotated[
        str | None, typer.Option(help="Instead of a model, the shape of a well-known one: llama-2-70b, qwen3-8b.")
    ] = None
    bits: Annotated[int | None, typer.Option(help="With --shape: 2, 3, 4 or 8; 16 is dense. Default: 4.")] = None
    group_size: Annotated[int | None, typer.Option(help="With --shape: inputs that share a scale. Default: 128.")] = (
        None
    )


@dataclass(frozen=True)
class MachineOptions:
    """A machine that may be another one."""

    gpu: Annotated[
        str | None, typer.Option(help='A card by name, which need not be here: "RTX 3060 12GB"; several: with commas.')
    ] = None
    vram: Annotated[
        str | None,
        typer.Option(help="VRAM of a GPU, which need not be in this machine: 24GB; of several: 10GB,24GB."),
    ] = None
    arch: Annotated[
        str | None, typer.Option(help="With --vram: compute capability as 8.6, 86 or sm_86. Default: 8.6.")
    ] = None
    vram_speed: Annotated[
        str | None, typer.Option(help="Bandwidth of the VRAM in bytes a second: 360GB; of several GPUs: with commas.")
    ] = None
    pcie: Annotated[str | None, typer.Option(help='Speed of the link to the GPU: 12GB, or as "3.0 x8".')] = None
    disk: Annotated[str | None, typer.Option(help="Speed at which the disk is read: 3.5GB.")] = None
    ram_speed: Annotated[str | None, typer.Option(help="Bandwidth of the RAM: 40GB.")] = None

    def keywords(self) -> dict[str, object]:
        """Of ``exl.plan``."""
        several = {"vram": self.vram, "vram_speed": self.vram_speed, "pcie": self.pcie}
        given = {name: parse_vram(text) for name, text in several.items()}
        return {**given, "gpu": self.gpu, "arch": self.arch, "disk": self.disk, "ram_speed": self.ram_speed}


@shared_options
def plan(
    which: ModelName,
    *,
    of_shape: ShapeOptions,
    machine: MachineOptions,
    ram: Ram = None,
    context: Context = None,
    kv_cache: KVCacheType = "f16",
    embed: Embed = "auto",
    arithmetic: Arithmetic = None,
    rope: Rope = None,
    lora: Loras = None,
    head: Head = "file",
    dense: Dense = "file",
    depth: Annotated[
        int | None, typer.Option(help="Tokens in the cache for which speed is told. Default: none, and all.")
    ] = None,
    max_sequences: MaxSequences = 16,
    cache_tokens: CacheTokens = None,
    window_cache: WindowCache = True,
    kv_ram: KVRam = None,
    prefill_chunk: PrefillChunk = 512,
    prefill_window: PrefillWindow = 4096,
    revision: Revision = None,
    token: Token = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Show whether a model fits and where every byte of it would go, from its headers alone.

    A Hugging Face repository is not downloaded for that.

    exl plan path/to/model --ram 8GB --context auto

    exl plan owner/name --gpu "RTX 3060 12GB" --context 8192

    exl plan --shape llama-2-70b --vram 24GB --ram 32GB --kv-cache q8
    """
    from exl.planning.ask import plan as make_plan

    found = make_plan(
        which.name,
        **vars(of_shape),
        **machine.keywords(),
        ram=ram,
        context=parse_tokens("context", context),
        kv_cache=kv_cache,
        embed=embed,
        arithmetic=arithmetic,
        rope=parse_rope(rope),
        head=parse_rounding("head", head),
        dense=parse_rounding("dense", dense),
        lora=parse_loras(lora),
        depth=depth,
        max_sequences=max_sequences,
        cache_tokens=parse_tokens("cache_tokens", cache_tokens),
        window_cache=window_cache,
        kv_ram=kv_ram,
        prefill_chunk=prefill_chunk,
        prefill_window=prefill_window,
        revision=revision,
        token=token,
    )
    print(json.dumps(found.to_json()) if as_json else found.table())
