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
from exl.families.config import ModelConfig
from exl.families.specs import MlpShape
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
    layers = [part for part, _ in _layer_parts(files.manifest)]
    return {
        "bits": sorted({part.bits for part in layers}),
        "group_sizes": sorted({part.group_size for part in layers if part.quantized}),
        "num_layers": files.config.num_layers,
        "num_experts": max((moe.count for moe in files.config.mixtures), default=0),
        "num_parameters": _count(files.manifest),
        "num_bytes": _num_bytes(files),
        "max_context": files.config.max_position,
        "vocab_size": files.config.vocab_size,
    }


def _num_bytes(files: ModelFiles) -> int:
    return sum(info.num_bytes for info in files.checkpoint.tensors.values())


def _shape_facts(files: ModelFiles) -> dict[str, str]:
    config, manifest = files.config, files.manifest
    layers = _layer_parts(manifest)
    (embed,) = _parts(manifest.embed)
    attention = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values"
    if windows := [window for window in config.windows if window is not None]:
        attention += f", sliding window of {max(windows)} in {len(windows)} layers"
    facts = {
        "family": config.family + (", of a model that takes images, which are not read" if config.is_text_part else ""),
        "weights": _describe_weights(layers),
        "layers": f"{config.num_layers}, {config.hidden_size} channels, {_describe_mlps(config)}",
        "attention": attention,
        "vocabulary": f"{config.vocab_size} tokens, embedding {embed.dtype}, head {_describe_head(manifest)}",
        "parameters": _rounded(_count(manifest)) + _describe_active(files),
        "size": f"{format_bytes(_num_bytes(files))} in the files",
        "context": f"{config.max_position} tokens",
        "RoPE": "; ".join(map(str, config.ropes)),
    }
    if files.quant is not None and layers:
        facts["format"] = f"{files.quant.method}, {files.quant.layout}, from {files.quant.source}"
    return facts


def _parts(blob: BlobSpec) -> list[MatrixSpec]:
    return [part for _, linears in blob.linears for linear in linears for part in linear.parts]


def _layer_parts(manifest: ModelManifest) -> list[tuple[MatrixSpec, int]]:
    """The matrices of all layers, and how many there are of each: of experts, the first ones stand for all."""
    found = [(part, 1) for layer in manifest.layers for part in _parts(layer)]
    return found + [(part, some.count) for some in manifest.experts if some is not None for part in _parts(some.blob)]


def _describe_mlps(config: ModelConfig) -> str:
    """``"MLP 11008"``, ``"48 of them with 8 of 128 experts of 768"``."""
    widths = sorted({layer.mlp.width for layer in config.layers if isinstance(layer.mlp, MlpShape)})
    texts = [f"MLP {' or '.join(map(str, widths))}"] if widths else []
    for moe, count in Counter(config.mixtures).items():
        shared = "" if moe.shared is None else f" and one of {moe.shared.width} for all"
        texts.append(f"{moe.per_token} of {moe.count} experts of {moe.width}{shared} in {count} layers")
    return ", ".join(texts)


def _describe_active(files: ModelFiles) -> str:
    """How many parameters one token meets, where that is not all."""
    if not files.config.mixtures:
        return ""
    idle = 0
    for layer, experts in zip(files.config.layers, files.manifest.experts, strict=True):
        if experts is not None:
            idle += (experts.count - layer.mlp.per_token) * sum(map(_num_values, _parts(experts.blob)))
    return f", {_rounded(_count(files.manifest) - idle)} for a token"


def _describe_weights(parts: Iterable[tuple[MatrixSpec, int]]) -> str:
    """``"4-bit, groups of 128, act-order"``; several kinds with their shares, the largest first."""
    sizes: Counter[str] = Counter()
    for part, count in parts:
        if part.code_kind == "fp4":
            kind = f"mxfp4, groups of {part.group_size}"
        elif part.quantized:
            group = "one group" if part.group_size >= part.K else f"groups of {part.group_size}"
            kind = f"{part.bits}-bit, {group}, {'symmetric' if part.symmetric else 'asymmetric'}"
            kind += ", act-order" if part.order_key is not None else ""
        else:
            kind = f"dense {part.dtype}"
        sizes[kind] += part.K * part.N * count
    if len(sizes) == 1:
        return next(iter(sizes))
    total = sum(sizes.values())
    return "; ".join(f"{100 * size / total:.0f} % {kind}" for kind, size in sizes.most_common())


def _describe_head(manifest: ModelManifest) -> str:
    parts = [(part, 1) for part in _parts(manifest.head)]
    return _describe_weights(parts) if parts else "the same"


def _count(manifest: ModelManifest) -> int:
    """Parameters: each once, whatever its bits."""
    blobs = (manifest.embed, *manifest.layers, manifest.head)
    others = (part for blob in (manifest.embed, manifest.head) for part in _parts(blob))
    number = sum(map(_num_values, others)) + sum(_num_values(part) * count for part, count in _layer_parts(manifest))
    return number + sum(norm.width for blob in blobs for norm in blob.norms)


def _num_values(part: MatrixSpec) -> int:
    return part.K * part.N + part.N * part.has_bias


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
