"""Checks a checkpoint against its config before weights are read: every tensor is known and has the expected shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import TensorInfo
from exl.checkpoint.quant.base import QuantConfig
from exl.errors import CheckpointError, UnsupportedModelError, warn_user
from exl.families.config import ModelConfig
from exl.families.specs import LayerSpec, ModelNames, MoeShape, PartSpec
from exl.formats.dequantize import exact_spec
from exl.formats.load import matrix_spec, table_spec, tensors_of
from exl.formats.rounding import rounding_group
from exl.formats.same_values import same_values
from exl.formats.stacked import has_stacked, stacked_spec, stacked_tensors
from exl.layout.layers import ExpertLayout, LayerLayout, layer_layout
from exl.layout.specs import BlobSpec, ExpertSpec, LinearSpec, MatrixSpec, NormSpec, Target, fuse
from exl.models.other_names import find_names, other_names

_GATED = ("gate_up", "shared_gate_up")


@dataclass(frozen=True)
class ModelManifest:
    """What is to be loaded: one blob for the embedding, one per layer, one for the final norm and the head, and one for
    each expert of each layer that is a mixture."""

    names: ModelNames
    embed: BlobSpec
    layers: tuple[BlobSpec, ...]
    head: BlobSpec  # without a linear if the embedding is also the head
    experts: tuple[ExpertSpec | None, ...]  # by layer
    quant: QuantConfig | None  # how tensors are read that are not dense

    @property
    def tied(self) -> bool:
        """Whether the embedding is also the head: what config.json says, unless the file has a head that differs."""
        return not self.head.linears

    def with_head_bits(self, bits: int) -> ModelManifest:
        """The manifest with a dense head that is rounded to ``bits`` on loading.

        If the embedding is also the head, the head gets its own copy of the weights. A head that is quantized in the
        file stays as it is.
        """
        linears = dict(self.head.linears) or {"head": dict(self.embed.linears)["embed"]}
        (part,) = linears["head"][0].parts
        if part.quantized:
            return self
        part = _rounded_part(part, bits)
        return replace(self, head=BlobSpec(self.head.norms, (("head", (LinearSpec((part,)),)),)))

    def with_dense_bits(self, bits: int) -> ModelManifest:
        """The manifest with the dense matrices of its layers rounded to ``bits`` on loading; those that the file has
        quantized stay as they are."""
        layers = (
            replace(layer, linears=tuple((name, _rounded(name, some, bits)) for name, some in layer.linears))
            for layer in self.layers
        )
        experts = (found if found is None else _rounded_experts(found, bits) for found in self.experts)
        return replace(self, layers=tuple(layers), experts=tuple(experts))

    def layouts(self, target: Target) -> ModelLayout:
        return ModelLayout(
            layer_layout(self.embed, target),
            tuple(layer_layout(layer, target) for layer in self.layers),
            layer_layout(self.head, target),
            tuple(
                None if found is None else ExpertLayout(found.count, layer_layout(found.blob, target))
                for found in self.experts
            ),
        )


def _rounded_experts(experts: ExpertSpec, bits: int) -> ExpertSpec:
    linears = tuple((name, _rounded(name, some, bits)) for name, some in experts.blob.linears)
    return replace(experts, blob=replace(experts.blob, linears=linears))


def _rounded_part(part: MatrixSpec, bits: int) -> MatrixSpec:
    return replace(part, bits=bits, dtype="u8", group_size=rounding_group(part.K))


def _rounded(name: str, linears: tuple[LinearSpec, ...], bits: int) -> tuple[LinearSpec, ...]:
    parts = [
        part if part.quantized or part.exact else _rounded_part(part, bits)
        for linear in linears
        for part in linear.parts
    ]
    return fuse(parts, gated=name in _GATED)


@dataclass(frozen=True)
class ModelLayout:
    """Blobs in their order: the embedding, layers, the head, then experts, layer by layer."""

    embed: LayerLayout
    layers: tuple[LayerLayout, ...]
    head: LayerLayout
    experts: tuple[ExpertLayout | None, ...]  # by layer

    @property
    def blobs(self) -> tuple[LayerLayout, ...]:
        experts = (found.blob for found in self.experts if found is not None for _ in range(found.count))
        return (self.embed, *self.layers, self.head, *experts)

    @property
    def num_bytes(self) -> int:
        return sum(blob.num_bytes for blob in self.blobs)


def read_manifest(checkpoint: Checkpoint, config: ModelConfig, quant: QuantConfig | None) -> ModelManifest:
    """Reads headers, ``g_idx`` and, if config.json says that the embedding is also the head but the file has a dense
    head all the same, both of them (:func:`exl.formats.same_values.same_values`).

    Raises ``CheckpointError`` for a missing, unexpected or misshapen tensor; warns (``ExlWarning``) of such a head if
    it differs from the embedding, and is therefore used, and if a remote one is only assumed to be equal.
    """
    return _ManifestReader(checkpoint, config, quant).read()


class _ManifestReader:
    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, quant: QuantConfig | None) -> None:
        self.checkpoint, self.config, self.quant = checkpoint, config, quant
        self.names = find_names(checkpoint, config)
        self.seen: set[str] = set()
        self.modules: dict[str, dict[str, TensorInfo]] = {}  # tensors by the ends of their names
        for name, info in checkpoint.tensors.items():
            module, _, end = name.rpartition(".")
            self.modules.setdefault(module, {})[end] = info

    def read(self) -> ModelManifest:
        config, names = self.config, self.names
        if not any(self._has_module(name) for name in (names.embed, names.layers)):
            raise other_names(self.checkpoint, names)
        embed, head = self._embed_and_head()
        layers = tuple(self._layer(f"{names.layers}.{i}.", layer) for i, layer in enumerate(config.layers))
        experts = tuple(self._experts(f"{names.layers}.{i}.", layer) for i, layer in enumerate(config.layers))
        final_norm = NormSpec("final_norm", config.hidden_size, config.norm.offset, tensor=names.final_norm)
        norms = (self._norm("", final_norm),)
        head_linears = () if head is None else (("head", (LinearSpec((head,)),)),)
        self._refuse_unexpected()
        embed_spec = BlobSpec((), (("embed", (LinearSpec((embed,)),)),))
        return ModelManifest(names, embed_spec, layers, BlobSpec(norms, head_linears), experts, self.quant)

    def _embed_and_head(self) -> tuple[MatrixSpec, MatrixSpec | None]:
        """None: the embedding is also the head."""
        names, shape = self.names, (self.config.hidden_size, self.config.vocab_size)
        has_embed, has_head = (self._has_module(name) for name in (names.embed, names.head))
        if self.config.tie_embeddings and has_head and not has_embed:  # one tensor under the other's name
            return self._embed(names.head), None
        embed = self._embed(names.embed)
        if not self.config.tie_embeddings:
            if not has_head:
                raise CheckpointError(
                    f"{self.checkpoint.path}: {names.head}.weight is missing, and tie_word_embeddings is not true in "
                    "config.json, which would make the embedding the head, too"
                )
            return embed, self._matrix(names.head, *shape)
        if not has_head:
            return embed, None
        head = self._matrix(names.head, *shape)
        return embed, None if self._is_embedding(head, embed) else head

    def _has_module(self, name: str) -> bool:
        return any(tensor.startswith(name + ".") for tensor in self.checkpoint.tensors)

    def _embed(self, name: str) -> MatrixSpec:
        return self._matrix(name, self.config.hidden_size, self.config.vocab_size, read=table_spec)

    def _is_embedding(self, head: MatrixSpec, embed: MatrixSpec) -> bool:
        """Whether a head that config.json says there is none of is a copy of the embedding."""
        path, names = self.checkpoint.path, (f"{embed.name}.weight", f"{head.name}.weight")
        coded = head.quantized or embed.dequantized
        if coded or head.has_bias or not same_values(self.checkpoint, *names):
            warn_user(
                f"{path}: config.json: tie_word_embeddings: found true, but {head.name} differs from {embed.name}; "
                "using both"
            )
            return False
        if self.checkpoint.is_remote:
            warn_user(
                f"{path}: planned as if {head.name} were a copy of {embed.name}, as config.json's "
                "tie_word_embeddings says: the rows that were compared are equal"
            )
        return True

    def _layer(self, prefix: str, layer: LayerSpec) -> BlobSpec:
        linears = tuple(
            (name, fuse([self._part(prefix, part) for part in parts], gated=name in _GATED))
            for name, parts in layer.linears.items()
        )
        return BlobSpec(tuple(self._norm(prefix, norm) for norm in layer.norms), linears)

    def _part(self, prefix: str, part: PartSpec) -> MatrixSpec:
        rows, name = part.rows, prefix + part.module
        spec = self._matrix(name, part.K, part.N if rows is None else rows.total, bias=part.has_bias)
        if part.exact:
            spec = exact_spec(spec)
        return spec if rows is None else replace(spec, N=part.N, rows=rows)

    def _experts(self, prefix: str, layer: LayerSpec) -> ExpertSpec | None:
        """Of the first one, after a look at the headers of all."""
        if not isinstance(layer.mlp, MoeShape):
            return None
        count, names = layer.mlp.count, {}
        parts = next((some for some in layer.experts if self._has_experts(prefix, some)), layer.experts[0])

        def first(part: PartSpec) -> MatrixSpec:
            if part.stack is not None:
                return self._stacked(prefix, part, count)
            spec = self._part(prefix, replace(part, module=part.module.format(e=0)))
            names[spec.name] = prefix + part.module
            self._expect_alike(names[spec.name], count)
            return spec

        linears = ((name, fuse([first(part) for part in some], gated=name in _GATED)) for name, some in parts.items())
        return ExpertSpec(count, BlobSpec((), tuple(linears)), names)

    def _has_experts(self, prefix: str, parts: Mapping[str, tuple[PartSpec, ...]]) -> bool:
        (first, *_), name = parts["down"], prefix + parts["down"][0].module.format(e=0)
        return name in self.modules if first.stack is None else has_stacked(self.checkpoint, name)

    def _stacked(self, prefix: str, part: PartSpec, count: int) -> MatrixSpec:
        name, rows = prefix + part.module, part.rows
        spec = stacked_spec(self.checkpoint, name, part.stack, count)
        self._expect_sizes(spec, part.K, part.N if rows is None else rows.total, part.has_bias, f"{name}_bias")
        self.seen |= stacked_tensors(self.checkpoint, name)
        return spec if rows is None else replace(spec, N=part.N, rows=rows)

    def _expect_alike(self, template: str, count: int) -> None:
        """Raises ``UnsupportedModelError`` unless the modules of all experts have tensors of one shape and type, and
        one configuration."""
        name = template.format(e=0)
        first, quant = self.modules[name], self.quant
        config = None if quant is None else quant.for_module(name)
        for expert in range(1, count):
            other = template.format(e=expert)
            found = self.modules.get(other, {})
            for end in sorted({*first, *found}):
                here, there = _shown_tensor(found.get(end)), _shown_tensor(first.get(end))
                if here != there:
                    raise UnsupportedModelError(
                        f"{self.checkpoint.path}: {other}.{end}: found {here}, expected {there}, as in {name}: "
                        "experts of a layer are of one kind"
                    )
            if quant is not None and quant.for_module(other) != config:
                raise UnsupportedModelError(
                    f"{self.checkpoint.path}: {other}: found another configuration than that of {name}: experts of a "
                    "layer are of one kind"
                )
            self.seen |= {f"{other}.{end}" for end in found}

    def _matrix(self, name: str, K: int, N: int, *, bias: bool = False, read=matrix_spec) -> MatrixSpec:
        spec = read(self.checkpoint, name, self.quant)
        self._expect_sizes(spec, K, N, bias, f"{name}.bias")
        self.seen |= tensors_of(self.checkpoint, name)
        return spec

    def _expect_sizes(self, spec: MatrixSpec, K: int, N: int, has_bias: bool, bias: str) -> None:
        if (spec.K, spec.N) != (K, N):
            raise CheckpointError(
                f"{self.checkpoint.path}: {spec.name}: found {spec.K} inputs x {spec.N} outputs, "
                f"config.json expects {K} x {N}"
            )
        if has_bias and not spec.has_bias:
            raise CheckpointError(f"{self.checkpoint.path}: {bias} is missing, config.json expects it")

    def _norm(self, prefix: str, norm: NormSpec) -> NormSpec:
        """With its whole name."""
        spec = replace(norm, tensor=prefix + norm.tensor)
        info = self.checkpoint.tensors.get(spec.tensor)
        if info is None:
            raise CheckpointError(f"{self.checkpoint.path}: {spec.tensor} is missing")
        if tuple(info.shape) != (spec.width,):
            raise CheckpointError(
                f"{self.checkpoint.path}: {spec.tensor}: found shape {list(info.shape)}, expected [{spec.width}]"
            )
        self.seen.add(spec.tensor)
        return spec

    def _refuse_unexpected(self) -> None:
        names = self.names
        others = [name for name in self.checkpoint.tensors if name not in self.seen]
        extra = [name for name in others if not name.endswith(names.ignored) and not name.startswith(names.unread)]
        if self.config.is_text_part:
            mine = (names.layers.removesuffix("layers"), names.head + ".")
            extra = [name for name in extra if name.startswith(mine)]
        if extra:
            shown = ", ".join(sorted(extra)[:4]) + (", ..." if len(extra) > 4 else "")
            raise CheckpointError(
                f"{self.checkpoint.path}: {len(extra)} tensors that a {self.config.family} model of "
                f"{self.config.num_layers} layers does not have: {shown}"
            )


def _shown_tensor(info: TensorInfo | None) -> str:
    return "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
