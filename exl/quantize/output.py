"""Finished layers + dense tensors of the source -> a checkpoint for GPTQ loaders. One tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import DTYPE_BITS
from exl.checkpoint.writer import write_safetensors
from exl.quantize.options import QuantizeOptions
from exl.quantize.overrides import dynamic
from exl.quantize.plan import Entry, QuantizePlan
from exl.quantize.work import WorkFolder, write_text
from exl.replace_file import replace_file

# Files that belong to a model besides weights and config.json; copied if present.
_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)
_METADATA = {"format": "pt"}  # transformers refuses files without it


def entry_bytes(entry: Entry) -> int:
    _, dtype, shape = entry
    count = DTYPE_BITS[dtype.upper()] // 8
    for size in shape:
        count *= size
    return count


def output_entries(checkpoint: Checkpoint, plan: QuantizePlan) -> list[tuple[Entry, int | None]]:
    """Every tensor of the output, with the index of the layer whose file holds it; None: copied from the source.

    In the source's order; a quantized module's tensors take the place of its weight, those of all experts of a layer
    the place of what comes first of them, one expert after another, whatever form the source has them in. A head that
    is a copy of the embedding is left out.
    """
    experts = _of_experts(plan)
    modules = {module.name: (module, i) for module, i in plan.modules() if module.name not in experts}
    entries: list[tuple[Entry, int | None]] = []
    begun: set[int] = set()
    for name, info in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if module == plan.unused:
            continue
        layer_idx = experts.get(name, experts.get(module))
        if layer_idx is not None:
            if layer_idx not in begun:
                begun.add(layer_idx)
                found = plan.experts[layer_idx].modules()
                entries += [(entry, layer_idx) for module in found for entry in module.entries()]
            continue
        if module not in modules:
            entries.append(((name, info.dtype, info.shape), None))
        elif part == "weight":
            found, layer_idx = modules[module]
            entries += [(entry, layer_idx) for entry in found.entries()]
    return entries


def _of_experts(plan: QuantizePlan) -> dict[str, int]:
    """The layers of experts' modules, and of tensors of the source that have the matrices of several."""
    found: dict[str, int] = {}
    for layer_idx, experts in enumerate(plan.experts):
        if experts is not None and experts.quantized:
            found |= dict.fromkeys(experts.stacks, layer_idx)
            found |= {module.name: layer_idx for module in experts.modules()}
    return found


def write_checkpoint(
    dst: Path,
    work: WorkFolder,
    checkpoint: Checkpoint,
    plan: QuantizePlan,
    options: QuantizeOptions,
    config_json: dict[str, Any],
    progress: Callable[[Entry], None],
) -> int:
    """Writes the output and returns the bytes of its weights. ``progress`` is called for each tensor written.

    Files are moved to ``dst`` after all are written, ``config.json`` last: until then no loader takes the folder for a
    model. A run that is killed while writing leaves its incomplete files in the work folder.
    """
    out = work.path / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    entries = output_entries(checkpoint, plan)
    shards = _cut_shards(entries, options.max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        data = _read_tensors(shard, checkpoint, work, progress)
        write_safetensors(out / name, [entry for entry, _ in shard], data, _METADATA)
    total = sum(entry_bytes(entry) for entry, _ in entries)
    if len(shards) > 1:
        weight_map = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(out / "model.safetensors.index.json", json.dumps(index, indent=1))
    for name in _COMPANIONS:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, out / name)
    quant_json = quantization_config(options, plan)
    write_text(out / "quantize_config.json", json.dumps(quant_json, indent=1) + "\n")
    config_json = {**_with_shapes(config_json, plan), "quantization_config": quant_json}
    write_text(out / "config.json", json.dumps(config_json, indent=1) + "\n")
    for path in sorted(out.iterdir(), key=lambda path: path.name == "config.json"):
        replace_file(path, dst / path.name)
    return total


def _with_shapes(config_json: dict[str, Any], plan: QuantizePlan) -> dict[str, Any]:
    """What the output's tensors are, where the source's config says otherwise; of a model with a text part, there. What
    that says of the source's quantization is left out: the output's stands beside it."""
    values = dict(config_json)
    text = values.get("text_config")
    holder = values
    if text:  # checked when the config was read
        holder = values["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    if plan.intermediate_size is not None:
        holder["intermediate_size"] = plan.intermediate_size
    for place in (values, holder):
        if place.get("tie_word_embeddings") and not plan.tied:  # the source was wrong about its head
            place["tie_word_embeddings"] = False
    return values


def _cut_shards(entries: list[tuple[Entry, int | None]], max_bytes: int) -> list[list[tuple[Entry, int | None]]]:
    shards: list[list[tuple[Entry, int | None]]] = [[]]
    num_bytes = 0
    for item in entries:
        size = entry_bytes(item[0])
        if shards[-1] and num_bytes + size > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(item)
        num_bytes += size
    return shards


def _read_tensors(
    shard: list[tuple[Entry, int | None]], checkpoint: Checkpoint, work: WorkFolder, progress: Callable[[Entry], None]
) -> Iterator[Any]:
    for layer_idx, some in groupby(shard, key=lambda item: item[1]):
        with ExitStack() as stack:
            source = checkpoint
            if layer_idx is not None:  # opened once for all: with experts it has thousands of tensors
                source = stack.enter_context(Checkpoint.open(work.layer_path(layer_idx)))
            for entry, _ in some:
                yield source.read(entry[0])
                progress(entry)


def quantization_config(options: QuantizeOptions, plan: QuantizePlan) -> dict[str, Any]:
    """Keys as AutoGPTQ and GPTQModel write them. ``desc_act`` means that groups are shuffled, as loaders read it."""
    used_gptq = options.method == "gptq"
    act_order = used_gptq and options.act_order
    meta: dict[str, Any] = {"quantizer": ["exl"], "method": options.method}
    if used_gptq:
        meta |= {"act_order": act_order, "match_dense": options.match_dense}
    values: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": plan.assignment.base.bits,
        "group_size": options.group_size,
        "desc_act": act_order and not options.static_groups,
        "sym": options.sym,
        "lm_head": False,
        "checkpoint_format": options.checkpoint_format,
        "pack_dtype": "int32",
    }
    if plan.assignment.overrides:
        values["dynamic"] = dynamic(plan.assignment.overrides)
    if options.target_bits is not None:
        meta |= {"target_bits": options.target_bits, "average_bits": round(plan.average_bits, 4)}
    if used_gptq:
        values |= {
            "damp_percent": options.damp,
            "static_groups": act_order and options.static_groups,
            "true_sequential": True,
        }
    return {**values, "meta": meta}
