"""What ``exl info MODEL`` shows: what a model is, from its headers and small files. No weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exl.checkpoint.generation_config import GenerationDefaults
from exl.checkpoint.hub import find_headers, find_small_files
from exl.checkpoint.remote import RemoteFolder
from exl.errors import ExlError
from exl.layout.specs import BlobSpec, MatrixSpec
from exl.models.manifest import ModelManifest
from exl.planning.from_headers import ModelFiles, open_model
from exl.text.tokenizer import Tokenizer
from exl.units import format_bytes

if TYPE_CHECKING:
    from exl.text.chat_template import ChatTemplate

_MESSAGE = "Hello"
_LONGEST = 300  # characters of a template that are shown


@dataclass(frozen=True)
class ModelFacts:
    """``shown``: for people, by name. ``numbers``: for programs."""

    shown: dict[str, str]
    numbers: dict[str, int | list[int]]


def describe_model_files(model: str | None, revision: str | None = None, token: str | None = None) -> ModelFacts:
    """``model`` as for ``exl.load``; of a repository that is not in the cache, only headers and small files are
    fetched. Raises ``ExlError``."""
    found = find_headers(model, revision=revision, token=token)
    small = find_small_files(found) if isinstance(found, RemoteFolder) else found
    small = small if small.is_dir() else small.parent
    with open_model(found) as files:
        facts = {"model": str(found.repo_id if isinstance(found, RemoteFolder) else found)} | _shape_facts(files)
    defaults = GenerationDefaults.from_folder(small)
    tokenizer = Tokenizer.from_folder(small, eos_ids=(*defaults.eos_ids, *files.config.eos_ids))
    return ModelFacts(facts | _text_facts(tokenizer, defaults), _numbers(files) | {"stop_ids": list(tokenizer.eos_ids)})


def _numbers(files: ModelFiles) -> dict[str, int | list[int]]:
    layers = [part for layer in files.manifest.layers for part in _parts(layer)]
    return {
        "bits": sorted({part.bits for part in layers}),
        "group_sizes": sorted({part.group_size for part in layers if part.quantized}),
        "num_layers": files.config.num_layers,
        "num_parameters": _count(files.manifest),
        "num_bytes": _num_bytes(files),
        "max_context": files.config.max_position,
        "vocab_size": files.config.vocab_size,
    }


def _num_bytes(files: ModelFiles) -> int:
    return sum(info.num_bytes for info in files.checkpoint.tensors.values())


def _shape_facts(files: ModelFiles) -> dict[str, str]:
    config, manifest = files.config, files.manifest
    layers = [part for layer in manifest.layers for part in _parts(layer)]
    (embed,) = _parts(manifest.embed)
    attention = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values"
    if windows := [window for window in config.windows if window is not None]:
        attention += f", sliding window of {max(windows)} in {len(windows)} layers"
    facts = {
        "family": config.family + (", of a model that takes images, which are not read" if config.is_text_part else ""),
        "weights": _describe_weights(layers),
        "layers": f"{config.num_layers}, {config.hidden_size} channels, MLP {config.intermediate_size}",
        "attention": attention,
        "vocabulary": f"{config.vocab_size} tokens, embedding {embed.dtype}, head {_describe_head(manifest)}",
        "parameters": _rounded(_count(manifest)),
        "size": f"{format_bytes(_num_bytes(files))} in the files",
        "context": f"{config.max_position} tokens",
        "RoPE": "; ".join(map(str, config.ropes)),
    }
    if files.quant is not None and layers:
        facts["format"] = f"{files.quant.method}, {files.quant.layout}, from {files.quant.source}"
    return facts


def _parts(blob: BlobSpec) -> list[MatrixSpec]:
    return [part for _, linears in blob.linears for linear in linears for part in linear.parts]


def _describe_weights(parts: Iterable[MatrixSpec]) -> str:
    """``"4-bit, groups of 128, act-order"``; several kinds with their shares, the largest first."""
    sizes: Counter[str] = Counter()
    for part in parts:
        if part.quantized:
            group = "one group" if part.group_size >= part.K else f"groups of {part.group_size}"
            kind = f"{part.bits}-bit, {group}, {'symmetric' if part.symmetric else 'asymmetric'}"
            kind += ", act-order" if part.order_key is not None else ""
        else:
            kind = f"dense {part.dtype}"
        sizes[kind] += part.K * part.N
    if len(sizes) == 1:
        return next(iter(sizes))
    total = sum(sizes.values())
    return "; ".join(f"{100 * size / total:.0f} % {kind}" for kind, size in sizes.most_common())


def _describe_head(manifest: ModelManifest) -> str:
    parts = _parts(manifest.head)
    return _describe_weights(parts) if parts else "the same"


def _count(manifest: ModelManifest) -> int:
    """Parameters: each once, whatever its bits."""
    blobs = (manifest.embed, *manifest.layers, manifest.head)
    number = sum(part.K * part.N + part.N * part.has_bias for blob in blobs for part in _parts(blob))
    return number + sum(norm.width for blob in blobs for norm in blob.norms)


def _rounded(number: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


def _text_facts(tokenizer: Tokenizer, defaults: GenerationDefaults) -> dict[str, str]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = [f"{name} {getattr(defaults, name)}" for name in names if getattr(defaults, name) is not None]
    stops = [f"{tokenizer.id_to_token(token_id) or 'no token'} ({token_id})" for token_id in tokenizer.eos_ids]
    return {
        "sampling": ", ".join(sampling) or "greedy, unless asked otherwise",
        "stop tokens": ", ".join(stops) or "none: answers end at a limit",
        "chat template": _describe_template(tokenizer.chat_template),
    }


def _describe_template(template: ChatTemplate | None) -> str:
    """How a first message is put to the model."""
    if template is None:
        return "none: the model is shown a transcript to continue"
    try:
        text = repr(template.render([{"role": "user", "content": _MESSAGE}]))
    except ExlError as error:
        return f"one that refuses a lone message: {str(error).splitlines()[0]}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
