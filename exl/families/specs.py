"""The vocabulary in which a family describes its layers. Decoder, manifest, plan and quantizer read it; they know no
family by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from exl.checkpoint.rope_config import RopeConfig
from exl.layout.specs import NormSpec, Rows


@dataclass(frozen=True)
class AttentionShape:
    """What a layer's attention computes."""

    num_heads: int  # H
    num_kv_heads: int  # Hkv
    head_dim: int  # D
    scale: float  # of the scores
    rope: RopeConfig
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None: all
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)
    norms: str | None = (
        None  # of q and k, before RoPE: "head", over a head's channels, or "row", over those of all heads
    )
    sinks: bool = False  # one more logit for each head in each softmax, which has no value

    @property
    def width(self) -> int:
        """Of queries, and of attention's output."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.width + 2 * self.kv_width


@dataclass(frozen=True)
class MlpShape:
    """A gated MLP: ``down(activation(gate(x)) * up(x))``."""

    width: int  # F
    activation: str = "silu"  # as ``exl.ops.base.GatedMlp`` has them


@dataclass(frozen=True)
class BranchShape:
    """How the output y of attention or MLP joins the residual stream: ``h += scale * norm(y)``."""

    norm: str | None = None  # the layer's norm of that name; None: none
    scale: float = 1.0


@dataclass(frozen=True)
class PartSpec:
    """A matrix of a layer, W [K, N], and where it is: the module's name, and which of its outputs."""

    module: str  # without the layer's prefix: "self_attn.q_proj"
    K: int
    N: int
    has_bias: bool = False  # whether the file must have one; one that it has is used in any case
    rows: Rows | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what it computes, and its tensors.

    Attention reads ``norms["attn_norm"]`` of the residual stream, the MLP ``mlp_norm``, each unless it is None, which
    is: the residual stream itself. ``linears``: "qkv", "o", "gate_up", "down", in the order in which a pass meets them,
    each of matrices side by side along N.
    """

    attention: AttentionShape
    mlp: MlpShape
    norms: tuple[NormSpec, ...]  # tensors' names without the layer's prefix
    linears: Mapping[str, tuple[PartSpec, ...]]
    attn_norm: str | None = "attn_norm"
    mlp_norm: str | None = "mlp_norm"
    attn_branch: BranchShape = BranchShape()
    mlp_branch: BranchShape = BranchShape()
    parallel: bool = False  # the MLP reads what attention has read, not what it has added to


@dataclass(frozen=True)
class ModelNames:
    """Names of tensors outside the layers; those in layer i begin with ``<layers>.<i>.``. Matrices without
    ``.weight``."""

    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head"
    layers: str = "model.layers"
    # Ends of names that are not loaded, because exl computes them.
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class NormShape:
    """Of all norms of a model. ``kind`` as ``exl.ops.base.Norm`` has it; ``offset`` is added to their weights."""

    eps: float
    kind: str = "rms"
    offset: float = 0.0


@dataclass(frozen=True)
class EmbedShape:
    """``scale * row``. ``in_file_type``: the scale is rounded to the type of the table first, as Gemma was trained."""

    scale: float = 1.0
    in_file_type: bool = False


@dataclass(frozen=True)
class LogitsShape:
    """``scale * x``, under a softcap ``softcap * tanh(scale * x / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class FamilySpec:
    """A family's answer: what its config means."""

    layers: tuple[LayerSpec, ...]
    norm: NormShape
    embed: EmbedShape = EmbedShape()
    logits: LogitsShape = LogitsShape()
    names: ModelNames = field(default_factory=ModelNames)
