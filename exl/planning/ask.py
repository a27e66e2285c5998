"""``exl.plan``: what was asked -> the model's headers, the machine, and the plan of one on the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from exl.adapters.choice import Adapters, find_adapters
from exl.checkpoint.hub import find_headers
from exl.checkpoint.hub_errors import Token
from exl.checkpoint.quant_config import find_quant_config
from exl.errors import ConfigError
from exl.keywords import explain_foreign_keywords
from exl.planning.from_headers import ModelFiles, model_files, open_model, plan_model
from exl.planning.machine import Links, describe_machine
from exl.planning.options import EngineOptions, Reading
from exl.planning.plan import MemoryPlan
from exl.planning.shapes import DENSE_BITS, check_quantization, find_shape, shape_checkpoint

_DEFAULT_BITS, _DEFAULT_GROUP_SIZE = 4, 128


@explain_foreign_keywords
def plan(
    model: str | Path | None = None,
    *,
    shape: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    gpu: str | Sequence[str] | None = None,
    vram: int | str | Sequence[int | str] | None = None,
    arch: int | float | str | None = None,
    ram: int | str | None = None,
    context: int | str | None = None,
    kv_cache: str = "f16",
    max_sequences: int = 16,
    cache_tokens: int | str | None = None,
    window_cache: bool = True,
    kv_ram: int | str | None = None,
    prefill_chunk: int = 512,
    prefill_window: int = 4096,
    resident_layers: int | None = None,
    head: str | int = "file",
    dense: str | int = "file",
    embed: str = "auto",
    arithmetic: str | None = None,
    draft: str | Path | None = None,
    rope: Mapping[str, Any] | None = None,
    lora: Adapters | None = None,
    depth: int | None = None,
    vram_speed: int | str | Sequence[int | str] | None = None,
    pcie: int | str | Sequence[int | str] | None = None,
    disk: int | str | None = None,
    ram_speed: int | str | None = None,
    revision: str | None = None,
    token: Token = None,
) -> MemoryPlan:
    """Where every byte of a model would go, from its headers alone: no weights are read, nothing is allocated.

    A Hugging Face repository that is not in the cache is not downloaded: its configuration, headers and ``g_idx`` are
    fetched by range requests. ``shape``: instead of a model, a well-known one that is not there, such as
    ``"llama-2-70b"``, at ``bits`` (2, 3, 4, 8, or 16: dense; default 4) in groups of ``group_size`` (128; -1: one).

    Options as in ``exl.load``; adapters (``lora``) of a repository are downloaded. ``vram``: of GPUs of compute
    capability ``arch`` (86, 8.6 or "sm_86"), which need not be in this machine. ``gpu``: cards by name, such as
    ``"RTX 3060 12GB"`` or ``"RTX 3090, RTX 3060 12GB"``; their memory, architecture and speeds are known. Without both
    the plan is for the CPU.

    The plan says what a token reads, from an empty cache to a full one or with ``depth`` tokens in it. With
    ``vram_speed``, ``pcie`` (also ``"3.0 x4"``), ``disk`` and ``ram_speed``, in bytes per second (``"360GB"``), it has
    the bound of the speed that follows. Raises as ``exl.load`` does.
    """
    if draft is not None:
        draft = find_headers(draft, revision=None, token=token)
    if lora is not None and shape is not None:
        raise ConfigError(f"lora: found {lora!r} with shape=, expected a model that is there")
    lora = find_adapters(lora, token=token).folders
    options = EngineOptions.from_arguments(locals())
    machine = describe_machine(gpu, vram, arch, Links(vram_speed, pcie, disk, ram_speed))
    if gpu is not None:
        options = replace(options, vram=machine.vram)
    if shape is not None:
        opened = _open_shape(model, shape, bits, group_size, options.reading)
    else:
        _refuse(bits=bits, group_size=group_size)
        opened = open_model(find_headers(model, revision=revision, token=token), options.reading)
    with opened as files:
        made, _ = plan_model(files, options, machine.target, machine.speeds, depth)
    return replace(made, notes=machine.notes + made.notes)


@contextmanager
def _open_shape(
    model: str | Path | None,
    name: str,
    bits: int | None,
    group_size: int | None,
    reading: Reading,
) -> Iterator[ModelFiles]:
    if model is not None:
        raise ConfigError(f"shape: found {name!r} beside model={str(model)!r}, expected one of them")
    bits = _DEFAULT_BITS if bits is None else bits
    if bits == DENSE_BITS and group_size is not None:
        raise ConfigError(f"group_size: found {group_size!r} with bits=16, which has no groups")
    group_size = _DEFAULT_GROUP_SIZE if group_size is None else group_size
    found = find_shape(name)
    check_quantization(bits, group_size)
    label = name if bits == DENSE_BITS else f"{name}, {bits} bits"
    config = found.config(bits, group_size)
    quant = find_quant_config(lambda name: None, config)
    yield model_files(shape_checkpoint(found, label, bits, group_size), config, quant, reading=reading)


def _refuse(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name}: found {value!r} without shape=: a checkpoint says this itself")
