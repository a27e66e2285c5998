"""Checks a checkpoint against its config before weights are read: every tensor is known and has the expected shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant_config import QuantConfig
from exl.errors import CheckpointError, warn_user
from exl.families.config import ModelConfig
from exl.families.specs import LayerSpec, ModelNames, PartSpec
from exl.formats.load import matrix_spec
from exl.formats.rounding import rounding_group
from exl.formats.same_values import same_values
from exl.layout.layers import LayerLayout, layer_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, NormSpec, Target, fuse
from exl.models.other_names import find_names, other_names


@dataclass(frozen=True)
class ModelManifest:
    """What is to be loaded: one blob for the embedding, one per layer, one for the final norm and the head."""

    names: ModelNames
    embed: BlobSpec
    layers: tuple[BlobSpec, ...]
    head: BlobSpec  # without a linear if the embedding is also the head

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
        part = replace(part, bits=bits, dtype="u8", group_size=rounding_group(part.K))
        return replace(self, head=BlobSpec(self.head.norms, (("head", (LinearSpec((part,)),)),)))

    def with_dense_bits(self, bits: int) -> ModelManifest:
        """The manifest with the dense matrices of its layers rounded to ``bits`` on loading; those that the file has
        quantized stay as they are."""
        layers = (
            replace(layer, linears=tuple((name, _rounded(name, some, bits)) for name, some in layer.linears))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def layouts(self, target: Target) -> ModelLayout:
        return ModelLayout(
            layer_layout(self.embed, target),
            tuple(layer_layout(layer, target) for layer in self.layers),
            layer_layout(self.head, target),
        )


def _rounded(name: str, linears: tuple[LinearSpec, ...], bits: int) -> tuple[LinearSpec, ...]:
    parts = [
        part if part.quantized else replace(part, bits=bits, dtype="u8", group_size=rounding_group(part.K))
        for linear in linears
        for part in linear.parts
    ]
    return fuse(parts, gated=name == "gate_up")


@dataclass(frozen=True)
class ModelLayout:
    embed: LayerLayout
    layers: tuple[LayerLayout, ...]
    head: LayerLayout

    @property
    def num_bytes(self) -> int:
        return self.embed.num_bytes + sum(layer.num_bytes for layer in self.layers) + self.head.num_bytes


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

    def read(self) -> ModelManifest:
        config, names = self.config, self.names
        if not any(self._has_module(name) for name in (names.embed, names.layers)):
            raise other_names(self.checkpoint, names)
        embed, head = self._embed_and_head()
        layers = tuple(self._layer(f"{names.layers}.{i}.", layer) for i, layer in enumerate(config.layers))
        final_norm = NormSpec("final_norm", config.hidden_size, config.norm.offset, tensor=names.final_norm)
        norms = (self._norm("", final_norm),)
        head_linears = () if head is None else (("head", (LinearSpec((head,)),)),)
        self._refuse_unexpected()
        embed_spec = BlobSpec((), (("embed", (LinearSpec((embed,)),)),))
        return ModelManifest(names, embed_spec, layers, BlobSpec(norms, head_linears))

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
        embed = self._matrix(name, self.config.hidden_size, self.config.vocab_size)
        if embed.quantized:
            raise CheckpointError(f"{name}: found {embed.bits}-bit codes, expected a dense embedding")
        return embed

    def _is_embedding(self, head: MatrixSpec, embed: MatrixSpec) -> bool:
        """Whether a head that config.json says there is none of is a copy of the embedding."""
        path, names = self.checkpoint.path, (f"{embed.name}.weight", f"{head.name}.weight")
        if head.quantized or head.has_bias or not same_values(self.checkpoint, *names):
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
            (name, fuse([self._part(prefix, part) for part in parts], gated=name == "gate_up"))
            for name, parts in layer.linears.items()
        )
        return BlobSpec(tuple(self._norm(prefix, norm) for norm in layer.norms), linears)

    def _part(self, prefix: str, part: PartSpec) -> MatrixSpec:
        rows, name = part.rows, prefix + part.module
        spec = self._matrix(name, part.K, part.N if rows is None else rows.total, bias=part.has_bias)
        return spec if rows is None else replace(spec, N=part.N, rows=rows)

    def _matrix(self, name: str, K: int, N: int, *, bias: bool = False) -> MatrixSpec:
        spec = matrix_spec(self.checkpoint, name, self.quant)
        if (spec.K, spec.N) != (K, N):
            raise CheckpointError(
                f"{self.checkpoint.path}: {name}: found {spec.K} inputs x {spec.N} outputs, "
                f"config.json expects {K} x {N}"
            )
        if bias and not spec.has_bias:
            raise CheckpointError(f"{self.checkpoint.path}: {name}.bias is missing, config.json expects it")
        self.seen |= {f"{name}.{part}" for part in ("weight", "bias", "qweight", "qzeros", "scales", "g_idx")}
        return spec

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
        extra = [n for n in self.checkpoint.tensors if n not in self.seen and not n.endswith(names.ignored)]
        if self.config.is_text_part:
            mine = (names.layers.removesuffix("layers"), names.head + ".")
            extra = [name for name in extra if name.startswith(mine)]
        if extra:
            shown = ", ".join(sorted(extra)[:4]) + (", ..." if len(extra) > 4 else "")
            raise CheckpointError(
                f"{self.checkpoint.path}: {len(extra)} tensors that a {self.config.family} model of "
                f"{self.config.num_layers} layers does not have: {shown}"
            )
