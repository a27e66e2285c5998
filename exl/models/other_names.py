"""Which names a checkpoint's tensors have: those of the family, in a model for images too under a prefix. Explains a
checkpoint in which no tensor has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import shown
from exl.checkpoint.module_names import TEXT_PARTS
from exl.errors import CheckpointError
from exl.families.config import ModelConfig
from exl.families.specs import ModelNames

# What puts a prefix before all names, and what to do about it.
_PREFIXES: Mapping[str, str] = {
    "base_model.model.": "peft's, of a model with an adapter: save what its merge_and_unload() returns",
    "language_model.": "that of the language model inside a model for images and text: save that part alone",
    "model.language_model.": "that of the language model inside a model for images and text: save that part alone",
    "_orig_mod.": "torch.compile's: save the model that was compiled, compiled._orig_mod",
    "module.": "that of DataParallel: save the model inside, parallel.module",
}


# What the same layers may be called in the files of a model and of its adapters, which transformers may have loaded as
# a model for images or as its text part, and renamed.
LAYER_PREFIXES = tuple(f"{prefix}layers." for prefix, _ in TEXT_PARTS)


def find_names(checkpoint: Checkpoint, config: ModelConfig) -> ModelNames:
    """The names of the family's tensors in this checkpoint."""
    if not config.is_text_part:
        return config.names
    for prefix, before_head in TEXT_PARTS:
        embed, layers, final_norm = (
            prefix + name.removeprefix("model.")
            for name in (config.names.embed, config.names.layers, config.names.final_norm)
        )
        if f"{embed}.weight" in checkpoint.tensors or any(name.startswith(f"{layers}.") for name in checkpoint.tensors):
            head = before_head + config.names.head
            return replace(config.names, embed=embed, layers=layers, final_norm=final_norm, head=head)
    return config.names


def other_names(checkpoint: Checkpoint, names: ModelNames) -> CheckpointError:
    """Of a checkpoint without embedding and layers under their names: names a tensor that it has, and its prefix."""
    path, wanted, num_tensors = checkpoint.path, f"{names.embed}.weight", len(checkpoint.tensors)
    expected = f"expected names such as {wanted}"
    if not num_tensors:
        return CheckpointError(f"{path}: found no tensors, {expected}")
    if adapter := next((name for name in checkpoint.tensors if ".lora_A." in name), None):
        return CheckpointError(
            f"{path}: found {shown(adapter)} among {num_tensors} tensors, {expected}: a LoRA adapter (peft) holds "
            "changes to another model: load that one, and give the adapter's folder as lora="
        )
    beginning, _, last = names.embed.rpartition(".")
    for found in checkpoint.tensors:
        before, is_embed, _ = f".{found}".partition(f".{last}.")
        if is_embed:
            break
    else:
        found = shown(min(checkpoint.tensors))
        return CheckpointError(f"{path}: found {found} among {num_tensors} tensors, {expected}")
    before = f"{before}."[1:]  # "language_model.model."
    beginning += "."
    if not before:
        return CheckpointError(
            f"{path}: found {shown(found)}, {expected}: the names are without the prefix {shown(beginning)}, "
            "as AutoModel saves them; save with AutoModelForCausalLM"
        )
    prefix = before.removesuffix(beginning)
    why = next((f": {text}" for known, text in _PREFIXES.items() if prefix.startswith(known)), "")
    return CheckpointError(f"{path}: found {shown(found)}, {expected}: the names have the prefix {shown(prefix)}{why}")
