"""transformers' own reading of SmolLM2's GGUF file, and its model as the reference for logits."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import exl


def gguf_weights(source: Path) -> dict[str, torch.Tensor]:
    """The tensors of the file, dequantized, by the names that they have in transformers' model."""
    config = transformers.AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return load_gguf_checkpoint(source, return_tensors=True, model_to_load=model)["tensors"]


def gguf_tokenizer(source: Path) -> transformers.PreTrainedTokenizerBase:
    """The file's tokenizer, with each digit by itself: transformers takes no notice of the pre-tokenizer that the file
    names, so that it must be told about the digits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


def logits_error(folder: Path, ids: list[int]) -> float:
    """The largest difference between exl's logits and those of transformers, both in f32, as a share of the largest
    logit."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad(), exl.load(folder, context=256, kv_cache="f32") as llm:
        expected, found = model(torch.tensor([ids])).logits[0], llm.logits(ids)
    return float((found - expected).abs().max() / expected.abs().max())
