"""Explains a checkpoint in which no tensor has the name that its family gives it: by a prefix, mostly."""

from __future__ import annotations

from collections.abc import Mapping

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import shown
from exl.errors import CheckpointError
from exl.models.registry import NameTable

# What puts a prefix before all names, and what to do about it.
_PREFIXES: Mapping[str, str] = {
    "base_model.model.": "peft's, of a model with an adapter: save what its merge_and_unload() returns",
    "language_model.": "that of the language model inside a model for images and text: save that part alone",
    "model.language_model.": "that of the language model inside a model for images and text: save that part alone",
    "_orig_mod.": "torch.compile's: save the model that was compiled, compiled._orig_mod",
    "module.": "that of DataParallel: save the model inside, parallel.module",
}


def other_names(checkpoint: Checkpoint, names: NameTable) -> CheckpointError:
    """Of a checkpoint without embedding and layers under their names: names a tensor that it has, and its prefix."""
    path, wanted, num_tensors = checkpoint.path, f"{names.embed}.weight", len(checkpoint.tensors)
    expected = f"expected names such as {wanted}"
    if not num_tensors:
        return CheckpointError(f"{path}: found no tensors, {expected}")
    if adapter := next((name for name in checkpoint.tensors if ".lora_A." in name), None):
        return CheckpointError(
            f"{path}: found {shown(adapter)} among {num_tensors} tensors, {expected}: a LoRA adapter (peft) holds "
            "changes to another model: save what the merge_and_unload() of both together returns"
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
