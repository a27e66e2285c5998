"""A model's headers, options and a machine -> the memory plan. No weights are read, no torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from exl.adapters.manifest import AdapterManifest, read_adapter
from exl.batch import PAGE_SIZE
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.config_reader import read_json
from exl.checkpoint.quant.base import QuantConfig
from exl.checkpoint.quant_config import find_quant_config, read_quant_config
from exl.checkpoint.remote import RemoteFolder
from exl.errors import ConfigError, MemoryBudgetError, UnsupportedModelError
from exl.families.config import ModelConfig
from exl.formats.settle_quant import settle_quant
from exl.layout.attention import MAX_NEW_TOKENS
from exl.layout.cpu_steps import DEFAULT_ARITHMETIC
from exl.layout.kv import DeviceKVLayout, KVLayout
from exl.layout.pages import HEAD_DIM_STEP, MAX_HEAD_DIM, is_head_dim
from exl.layout.specs import Target
from exl.layout.steps import ExpertLimits, StepLimits
from exl.layout.window import mixed_layers, window_pages
from exl.memory.host import pinned_limit, system_ram
from exl.models.manifest import ModelManifest, read_manifest
from exl.models.packing_order import packing_order
from exl.models.support import most_context, unsupported
from exl.planning.cpu import plan_cpu
from exl.planning.devices import HOST, plan_devices
from exl.planning.draft import BesideDraft, draft_context, draft_options
from exl.planning.notes import plan_notes
from exl.planning.options import AS_IT_IS, EngineOptions, Reading, default_context
from exl.planning.plan import MemoryPlan, PlanInput
from exl.planning.speed import Speeds
from exl.planning.traffic import token_bytes
from exl.units import format_apart, format_bytes, parse_budget

_MAX_LOGITS_BYTES = 32 << 20  # at which a chunk's logits stop; decode rows may need more
_OF_ALL_RAM = 2  # a cache of "auto" size without ram=: the plan takes one part in so many
_MAX_DRAFT_ROWS = 64  # decode rows of a step with drafts, if there are no more sequences


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint's headers, parsed and checked."""

    folder: Path
    checkpoint: Checkpoint
    config: ModelConfig
    manifest: ModelManifest
    tokenizer_bytes: int  # size of tokenizer.json
    adapters: tuple[AdapterManifest, ...] = ()  # by their numbers

    @property
    def quant(self) -> QuantConfig | None:
        return self.manifest.quant

    @cached_property
    def layer_file_bytes(self) -> int:
        """Bytes in the checkpoint's files of what is packed together: the largest layer without its experts, or the
        largest expert."""
        return packing_order(self.checkpoint, self.manifest).largest


@contextmanager
def open_model(folder: Path | RemoteFolder, reading: Reading = AS_IT_IS) -> Iterator[ModelFiles]:
    """``folder`` may also be a ``.safetensors`` file with its config.json beside it.

    Raises ``ExlError``.
    """
    is_remote = isinstance(folder, RemoteFolder)
    with folder.open_checkpoint() if is_remote else Checkpoint.open(folder) as checkpoint:
        where = checkpoint.folder / "config.json"
        if is_remote:
            config_json = folder.read_json("config.json")
            if config_json is None:
                raise ConfigError(f"{where}: not in the repository")
            quant = find_quant_config(folder.read_json, config_json)
            tokenizer_bytes = folder.sizes.get("tokenizer.json") or 0
        else:
            config_json = read_json(where)
            quant = read_quant_config(checkpoint.folder, config_json)
            tokenizer = checkpoint.folder / "tokenizer.json"
            tokenizer_bytes = tokenizer.stat().st_size if tokenizer.is_file() else 0
        yield model_files(checkpoint, config_json, quant, tokenizer_bytes, reading)


def model_files(
    checkpoint: Checkpoint,
    config_json: Mapping[str, object],
    quant: QuantConfig | None,
    tokenizer_bytes: int = 0,
    reading: Reading = AS_IT_IS,
) -> ModelFiles:
    """Checks the headers against the configuration. Raises ``ExlError``."""
    config = ModelConfig.from_dict(config_json, str(checkpoint.folder / "config.json"), reading.rope)
    manifest = read_manifest(checkpoint, config, settle_quant(checkpoint, quant))
    if reading.head != "file":
        manifest = manifest.with_head_bits(int(reading.head))
    if reading.dense != "file":
        manifest = manifest.with_dense_bits(int(reading.dense))
    adapters = tuple(read_adapter(name, path, manifest) for name, path in reading.lora.items())
    return ModelFiles(checkpoint.folder, checkpoint, config, manifest, tokenizer_bytes, adapters)


def plan_model(
    files: ModelFiles,
    options: EngineOptions,
    target: Target,
    speeds: Speeds | None = None,
    depth: int | None = None,
) -> tuple[MemoryPlan, PlanInput]:
    """The plan that fits, or ``MemoryBudgetError`` with the table and the nearest settings that would fit. ``depth``:
    tokens in the cache for which it says what a token reads; None: none, and as many as there is room for."""
    if options.draft is None:
        return _plan_alone(files, options, target, speeds, depth)
    with open_model(options.draft) as draft_files:
        context = draft_context(options, files.config, draft_files.config)
        try:
            draft, _ = plan_model(draft_files, draft_options(options, context), target)
        except MemoryBudgetError as error:
            raise MemoryBudgetError(f"draft: {error}") from None
    beside = BesideDraft.of(draft, draft_files.folder, options, target)
    plan, model = _plan_alone(files, beside.left, target, speeds, depth)
    return beside.both(plan), model


def _plan_alone(
    files: ModelFiles, options: EngineOptions, target: Target, speeds: Speeds | None, depth: int | None
) -> tuple[MemoryPlan, PlanInput]:
    if options.context == "auto":
        options = dataclasses.replace(options, context=_largest_context(files, options, target))
    if options.cache_tokens == "auto":
        options = dataclasses.replace(options, cache_tokens=_largest_cache(files, options, target))
    plan, model = _attempt(files, options, target)
    if not plan.fits:
        raise MemoryBudgetError(_explain(files, options, target, plan))
    depths = (0, plan.context) if depth is None else (_checked_depth(depth, plan.context),)
    plan = dataclasses.replace(
        plan,
        notes=plan_notes(model, plan, _rounded(files, options, target)),
        tokens=tuple(token_bytes(model, plan, depth) for depth in depths),
        speeds=speeds or Speeds(),
    )
    return plan, model


def _rounded(files: ModelFiles, options: EngineOptions, target: Target) -> dict[str, tuple[MemoryPlan, PlanInput]]:
    """The same with ``head=8``, and with ``dense=8``: those that change something, and that this device can."""
    given, found = files.manifest, {}
    changed = {"head": given.with_head_bits(8)}
    if files.quant is not None:  # a model that is dense altogether is better quantized
        changed["dense"] = given.with_dense_bits(8)
    for name, manifest in changed.items():
        if manifest != given:
            with suppress(UnsupportedModelError):
                found[name] = _attempt(dataclasses.replace(files, manifest=manifest), options, target)
    return found


def _checked_depth(depth: int, context: int) -> int:
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= context:
        raise ConfigError(f"depth: found {depth!r}, expected a number of tokens from 0 to the context, {context}")
    return depth


def _attempt(files: ModelFiles, options: EngineOptions, target: Target) -> tuple[MemoryPlan, PlanInput]:
    config = files.config
    if (lacking := unsupported(config, target)) is not None:
        raise UnsupportedModelError(
            f"{files.folder}: found {lacking}, which a {config.family} model has and exl's kernels for a GPU have not: "
            "expected device='cpu'"
        )
    if files.adapters and target.kind == "cuda":
        names = ", ".join(repr(adapter.name) for adapter in files.adapters)
        raise ConfigError(f"lora: found {names}, but adapters are computed on a CPU alone: expected device='cpu'")
    layouts = files.manifest.layouts(target)
    context = options.context or default_context(config)
    if context > (most := most_context(config, target)):
        raise ConfigError(
            f"context: found {context}, expected {most} or less: beyond it queries of a {config.family} model grow, "
            "for which a GPU has no kernel; the CPU has"
        )
    cache_tokens = _cache_tokens(config, options, context)
    layout = DeviceKVLayout if target.kind == "cuda" or target.compiled else KVLayout
    limits = step_limits(config, context, options, cache_tokens, drafts=options.draft is not None)
    model = PlanInput(
        config=config,
        embed=layouts.embed,
        layers=layouts.layers,
        head=layouts.head,
        experts=layouts.experts,
        target=target,
        kv_layout=layout(options.kv_cache, config.num_layers, config.num_kv_heads, config.head_dim),
        limits=dataclasses.replace(
            limits,
            lora_rank=max((term.rank for adapter in files.adapters for term in adapter.terms), default=0),
            lora_width=max((term.width for adapter in files.adapters for term in adapter.terms), default=0),
        ),
        adapters=tuple(adapter.layout(target) for adapter in files.adapters),
        tokenizer_bytes=files.tokenizer_bytes,
        layer_file_bytes=files.layer_file_bytes,
        arithmetic=_arithmetic(options, target),
        one_group=not options.window_cache,
    )
    if target.kind == "cuda":
        model = dataclasses.replace(model, num_kept_pages=_kept_pages(options, model))
        _check_pages(files, options)
        _check_embed(files, options, model)
        plan = plan_devices(
            model,
            options.vram_bytes,
            options.budget,
            max_resident=options.resident_layers,
            max_pinned=pinned_limit(),
            embed=options.embed,
        )
    else:
        if options.embed != "auto":
            raise ConfigError(
                f"embed: found {options.embed!r}, which is for a GPU; a CPU has the embedding in RAM: expected 'auto'"
            )
        if options.kv_ram is not None:
            raise ConfigError(
                f"kv_ram: found {options.kv_ram!r}, which is for a GPU; a CPU's cache is in RAM already: expected "
                "cache_tokens= for a larger one"
            )
        plan = plan_cpu(model, options.budget, max_resident=options.resident_layers)
    return dataclasses.replace(plan, null_page=model.window is not None), model


def _arithmetic(options: EngineOptions, target: Target) -> str | None:
    """Of the kernels that quantized layers run through, if there is a choice."""
    if target.compiled:
        return options.arithmetic or DEFAULT_ARITHMETIC
    if options.arithmetic is not None:
        where = (
            "on a GPU there is one arithmetic"
            if target.kind == "cuda"
            else ("they cannot run on this machine (`exl info` says why), and torch's have one arithmetic")
        )
        raise ConfigError(f"arithmetic: found {options.arithmetic!r}, which is for exl's own kernels on a CPU; {where}")
    return None


def _check_pages(files: ModelFiles, options: EngineOptions) -> None:
    """Raises ``ConfigError`` for a cache type or a head size that attention on a GPU does not have."""
    if options.kv_cache == "f32":
        raise ConfigError("kv_cache: found 'f32', which only the CPU has; expected f16, q8, k8v4 or q4")
    if not is_head_dim(files.config.head_dim):
        raise ConfigError(
            f"{files.folder}: found a head size of {files.config.head_dim}, a GPU takes multiples of {HEAD_DIM_STEP} "
            f"up to {MAX_HEAD_DIM}; the CPU takes this one"
        )


def _check_embed(files: ModelFiles, options: EngineOptions, model: PlanInput) -> None:
    """Raises ``ConfigError`` if an embedding that is also the head is to leave the GPU."""
    if options.embed == "disk" and not model.head.linears:
        raise ConfigError(
            f"embed: found 'disk', but the embedding of {files.folder} is also its head, which a GPU reads for every "
            "token: expected 'auto' or 'device', or head=8 or 4, which gives the head its own copy"
        )


def _fits(files: ModelFiles, options: EngineOptions, target: Target, *, resident: bool) -> bool:
    plan, _ = _attempt(files, options, target)
    return plan.fits and (plan.placement.num_streamed == 0 or not resident)


def _cache_tokens(config: ModelConfig, options: EngineOptions, context: int) -> int:
    """Of the whole cache, which has room for all that one sequence needs at once: so the oldest always gets to its end.
    Raises ``ConfigError`` for fewer."""
    if options.cache_tokens in (None, "auto"):
        return _needed_at_once(config, context, options.prefill_window)
    least = _needed_at_once(config, context, options.prefill_chunk)
    if options.cache_tokens < least:
        what = "the context" if least == context else "for a window, a prefill_chunk and two pages"
        raise ConfigError(
            f"cache_tokens: found {options.cache_tokens}, expected {what}, {least}, or more; a sequence could not get "
            "to its end"
        )
    return options.cache_tokens


def _needed_at_once(config: ModelConfig, context: int, num_rows: int) -> int:
    """Tokens in the cache of one sequence, whose prompts are computed ``num_rows`` rows at a time: where all layers
    have a window, only what it reaches."""
    if config.window is None:
        return context
    return min(context, window_pages(config.window, min(num_rows, context)) * PAGE_SIZE)


def _kept_pages(options: EngineOptions, model: PlanInput) -> int:
    """Whole pages, of all layers, that ``kv_ram`` has room for. Raises ``ConfigError`` if that is none."""
    if options.kv_ram is None:
        return 0
    page = model.kv_layout.slab_bytes(1)
    found = parse_budget(options.kv_ram, "kv_ram") // page
    if found == 0:
        raise ConfigError(
            f"kv_ram: found {options.kv_ram!r}, expected {format_bytes(page)} or more: a page of {PAGE_SIZE} tokens, "
            "of all layers"
        )
    return found


def _largest_context(files: ModelFiles, options: EngineOptions, target: Target, *, resident: bool = True) -> int:
    """Whole pages, up to the model's maximum and to what the cache holds; with all layers in memory if ``resident``.
    If not even one page fits like that, the default, and layers are streamed."""
    default, low, high = default_context(files.config), 0, -(-files.config.max_position // PAGE_SIZE)
    high = min(high, most_context(files.config, target) // PAGE_SIZE)
    found = options.cache_tokens
    if isinstance(found, int) and found < _needed_at_once(files.config, high * PAGE_SIZE, options.prefill_chunk):
        default, high = min(default, options.cache_tokens), min(high, options.cache_tokens // PAGE_SIZE)
    while low < high:
        middle = (low + high + 1) // 2
        tried = dataclasses.replace(options, context=middle * PAGE_SIZE)
        low, high = (middle, high) if _fits(files, tried, target, resident=resident) else (low, middle - 1)
    return low * PAGE_SIZE or default


def _largest_cache(files: ModelFiles, options: EngineOptions, target: Target) -> int:
    """The tokens of ``cache_tokens="auto"``, in whole pages: as many as leave the layers where one context leaves them,
    from one context to as many as there are sequences. A CPU without a budget: the plan takes half of the machine's
    RAM."""
    plan, model = _attempt(files, options, target)
    if target.kind != "cuda" and options.ram is None:
        total, _ = system_ram()
        options = dataclasses.replace(options, ram=max(plan.num_bytes, (total or 0) // _OF_ALL_RAM))

    def leaves_layers(pages: int) -> bool:
        tried, _ = _attempt(files, dataclasses.replace(options, cache_tokens=pages * PAGE_SIZE), target)
        return tried.fits and tried.placement == plan.placement

    low = plan.num_pages - plan.null_page
    high = low * model.limits.max_sequences
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if leaves_layers(middle) else (low, middle - 1)
    return low * PAGE_SIZE


def _explain(files: ModelFiles, options: EngineOptions, target: Target, plan: MemoryPlan) -> str:
    """Says what does not fit, and the nearest settings that would."""
    least, _ = _attempt(files, dataclasses.replace(options, ram=None, resident_layers=0), target)
    hints = [_needed(least, "ram" if target.kind == "cpu" else "vram")]
    context = _largest_context(files, options, target, resident=False)
    changes: list[dict[str, object]] = [
        {"context": context},
        {"kv_cache": "q4"},
        {"prefill_chunk": 64, "prefill_window": 64},
    ]
    changes += [changes[1] | changes[2], {"context": min(context, 512)} | changes[1] | changes[2]]
    if options.cache_tokens is not None:
        changes.insert(0, {"cache_tokens": None})
    if options.max_sequences > 1:
        changes.append({"max_sequences": 1} | changes[-1])
    if options.embed == "device":
        changes.insert(0, {"embed": "auto"})
    for change in changes:
        if _fits(files, dataclasses.replace(options, **change), target, resident=False):
            hints.append(", ".join(f"{name}={value!r}" for name, value in change.items()))
    short = [device for device, budget in plan.budgets.items() if plan.device_bytes(device) > budget]
    pairs = [format_apart(plan.device_bytes(device), plan.budgets[device]) for device in short]
    needs = " and ".join(
        need + ("" if device == "cpu" else f" of {device}") for device, (need, _) in zip(short, pairs, strict=True)
    )
    given = " and ".join(budget for _, budget in pairs)
    missing = " and ".join(format_bytes(plan.device_bytes(device) - plan.budgets[device]) for device in short)
    return (
        f"{files.folder}: needs {needs} with every layer streamed, the budget is {given}: {missing} too little. "
        f"Would fit: {'; or '.join(dict.fromkeys(hints))}.\n{plan.table()}"
    )


def _needed(least: MemoryPlan, option: str) -> str:
    """The option with the size that the plan needs of each memory."""
    needed = [least.device_bytes(device) for device in least.devices if device != HOST]
    sizes = [f"'{-(-num_bytes // 10**6)}MB'" for num_bytes in needed]
    return f"{option}={sizes[0] if len(sizes) == 1 else '[' + ', '.join(sizes) + ']'} or more"


def step_limits(
    config: ModelConfig, context: int, options: EngineOptions, cache_tokens: int | None = None, *, drafts: bool = False
) -> StepLimits:
    """The largest step that the options allow for. ``cache_tokens``: of the whole cache; None: one context.
    ``drafts``: there is a draft model, for which rows that verify drafts are worth memory."""
    sequences, chunk = options.max_sequences, min(options.prefill_chunk, context)
    chunk_logits = _MAX_LOGITS_BYTES // (4 * config.vocab_size)
    # Prompt lookup gets rows for its drafts as far as a chunk's logits have room for them anyway.
    most = _MAX_DRAFT_ROWS if drafts else min(_MAX_DRAFT_ROWS, chunk_logits - 1)
    decode_rows = max(sequences, min(most, sequences * MAX_NEW_TOKENS))
    return StepLimits(
        max_rows=max(chunk, decode_rows),
        window_rows=max(chunk, min(options.prefill_window, context)) + decode_rows,
        # All decode rows, and the last row of a prompt behind them.
        max_logit_rows=max(decode_rows + 1, min(chunk, chunk_logits)),
        max_context=context,
        hidden_size=config.hidden_size,
        qkv_width=config.qkv_width,
        attn_width=config.attn_width,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        head_dim=config.head_dim,
        max_sequences=sequences,
        decode_rows=decode_rows,
        chunk_rows=chunk,
        cache_tokens=cache_tokens or context,
        page_tables=2 if options.window_cache and mixed_layers(config.windows, context) else 1,
        num_ropes=len(config.ropes),
        post_norms=any(layer.attn_branch.norm or layer.mlp_branch.norm for layer in config.layers),
        experts=expert_limits(config),
    )


def expert_limits(config: ModelConfig) -> ExpertLimits | None:
    found = config.mixtures
    if not found:
        return None
    return ExpertLimits(
        count=max(moe.count for moe in found),
        per_token=max(moe.per_token for moe in found),
        width=max(moe.width for moe in found),
        shared_width=max(0 if moe.shared is None else moe.shared.width for moe in found),
    )
