"""The vocabulary in which a family describes its layers. Decoder, manifest, plan and quantizer read it; they know no
family by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from exl.checkpoint.rope_config import RopeConfig
from exl.layout.specs import NormSpec, Rows, Stack


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
    limit: float | None = None  # of "swiglu_oai"

    @property
    def widest(self) -> int:
        """Of the channels between its linears, those that lie in a buffer of the step."""
        return self.width


@dataclass(frozen=True)
class RouteShape:
    """How a router's logits choose experts, and with which weights.

    Scores are "softmax" (over all experts) or "sigmoid" of the logits, or the logits themselves ("chosen": weights are
    the softmax over those that are chosen). The ``per_token`` experts of the largest score + ``router_bias`` (a norm of
    the layer of that name, if there is one) are chosen; equal ones by their number, the lower first. Of several
    ``groups`` of neighbours, only those of the ``top_groups`` best, by the sum of a group's two best. Weights are the
    scores without the bias, ``normalize``: divided by their sum + ``eps``; then times ``scaling``.
    """

    score: str = "softmax"
    normalize: bool = True
    eps: float = 0.0
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True)
class SharedShape:
    """The expert that every token takes. ``gated``: times sigmoid(x g), g a vector of the layer."""

    width: int
    gated: bool = False


@dataclass(frozen=True)
class MoeShape:
    """A mixture of experts: gated MLPs, of which a router chooses some for each token."""

    count: int  # E
    per_token: int  # k
    width: int  # F of one
    activation: str = "silu"
    limit: float | None = None  # of "swiglu_oai"
    route: RouteShape = RouteShape()
    shared: SharedShape | None = None

    @property
    def widest(self) -> int:
        return self.width if self.shared is None else max(self.width, self.shared.width)


@dataclass(frozen=True)
class BranchShape:
    """How the output y of attention or MLP joins the residual stream: ``h += scale * norm(y)``."""

    norm: str | None = None  # the layer's norm of that name; None: none
    scale: float = 1.0


@dataclass(frozen=True)
class PartSpec:
    """A matrix of a layer, W [K, N], and where it is: the module's name, and which of its outputs."""

    module: str  # without the layer's prefix: "self_attn.q_proj"; of an expert with "{e}" for its number
    K: int
    N: int
    has_bias: bool = False  # whether the file must have one; one that it has is used in any case
    rows: Rows | None = None
    stack: Stack | None = None  # of an expert: the file has those of all in one tensor, this is the first one's
    exact: bool = False  # a router: stays what it is in the file, and is dequantized where that has it quantized


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what it computes, and its tensors.

    Attention reads ``norms["attn_norm"]`` of the residual stream, the MLP ``mlp_norm``, each unless it is None, which
    is: the residual stream itself. ``linears``: "qkv", "o", "gate_up", "down", in the order in which a pass meets them,
    each of matrices side by side along N. With a mixture of experts, in place of the last two: "router" [C, E], and
    where there is a shared expert "shared_gate_up", "shared_down" and, if it is gated, "shared_gate" [C, 1].
    ``experts``: "gate_up" and "down" of one of them, under the names that files of this family have; the first whose
    tensors are there. Such a layer's ``mlp_branch`` is the plain one.
    """

    attention: AttentionShape
    mlp: MlpShape | MoeShape
    norms: tuple[NormSpec, ...]  # tensors' names without the layer's prefix
    linears: Mapping[str, tuple[PartSpec, ...]]
    attn_norm: str | None = "attn_norm"
    mlp_norm: str | None = "mlp_norm"
    attn_branch: BranchShape = BranchShape()
    mlp_branch: BranchShape = BranchShape()
    parallel: bool = False  # the MLP reads what attention has read, not what it has added to
    experts: tuple[Mapping[str, tuple[PartSpec, ...]], ...] = ()


@dataclass(frozen=True)
class ModelNames:
    """Names of tensors outside the layers; those in layer i begin with ``<layers>.<i>.``. Matrices without
    ``.weight``."""

    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head"
    layers: str = "model.layers"
    # Ends of names that are not loaded, because exl computes them or, scales of an 8-bit KV cache, has no use for them.
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", ".k_scale", ".v_scale")
    unread: tuple[str, ...] = ()  # beginnings of names of what is not run: layers that predict further tokens, say


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
