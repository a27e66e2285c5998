"""The boundary between the decoder and the hardware: the operations that a model uses, and the weights they take.

T rows (new tokens of all sequences), R logit rows, C hidden, A = H * D, W = (H + 2 * Hkv) * D, F intermediate,
V vocabulary. ``h`` is the residual stream, f32 [T, C], updated in place. Every ``out`` is a view of a preallocated
buffer at a fixed address. Rows ``[0, num_decode_rows)`` of the selected batch run on row-invariant kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import ForwardBatch, SampleRows, SamplingBatch
from exl.cache.kv import KVCache
from exl.checkpoint.rope_config import RopeConfig
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.kernels.launch import Backend
from exl.layout.fields import Field
from exl.layout.kv import DeviceKVLayout, KVLayout
from exl.layout.layers import ExpertLayout, LayerLayout, LinearLayout
from exl.layout.specs import Target
from exl.threads import Threads

ALL_ROWS = 1 << 30  # more than any batch has

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
}


@dataclass(frozen=True)
class Norm:
    """A norm of rows: ``x / sqrt(mean(x^2) + eps) * weight``, or as ``kind`` says."""

    weight: torch.Tensor  # [C] f32, with what a family adds or multiplies already in it (``exl.layout.specs.NormSpec``)
    eps: float
    kind: str = "rms"  # or "layer": (x - mean(x)) / sqrt(variance(x) + eps) * weight


@dataclass(frozen=True)
class Linear:
    """One packed linear: its layout, and its fields as views into a blob."""

    layout: LinearLayout
    fields: Mapping[str, torch.Tensor]

    @property
    def N(self) -> int:
        return self.layout.spec.N


Segments = tuple[Linear, ...]  # side by side along N; only one if the parts could be fused


@dataclass(frozen=True)
class Lora:
    """What an adapter adds to some outputs of a linear: ``out[:, start : start + N] += scale * (x A^T) B^T``, in f32.
    Dense linears: A of K inputs and r outputs, B of r inputs and N outputs."""

    A: Linear
    B: Linear
    start: int
    scale: float


Loras = tuple[tuple[Lora, ...], ...]  # for one linear (all its segments), by the number of the adapter; (): none at all


@dataclass(frozen=True)
class AttentionSpec:
    """The parameters of attention: everything it needs besides the rows."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None  # a token sees itself and the window - 1 tokens before it; None: all
    softcap: float | None
    rope: RopeConfig
    q_norm: Norm | None  # over each head's channels, before RoPE
    k_norm: Norm | None
    norm_rows: bool = False  # q_norm and k_norm go over the channels of all heads of a row together: [H * D], [Hkv * D]
    sinks: torch.Tensor | None = None  # [H] f32: one more logit in each softmax of a head, without a value


@dataclass(frozen=True)
class EmbedSpec:
    """How rows of the embedding become the residual stream: ``scale * row``."""

    scale: float = 1.0


@dataclass(frozen=True)
class GatedMlp:
    """What a gated MLP computes between its linears: ``activation(gate) * up``.

    ``activation``: "silu", x / (1 + exp(-x)), or "gelu_tanh", 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    Or "swiglu_oai", of g = min(gate, limit) and u = up within +-limit: g / (1 + exp(-1.702 g)) * (u + 1).
    """

    activation: str = "silu"
    limit: float | None = None


@dataclass(frozen=True)
class RouteSpec:
    """How a router chooses experts: as ``exl.families.specs.RouteShape`` says. ``per_token``: k."""

    per_token: int
    score: str = "softmax"
    normalize: bool = True
    eps: float = 0.0
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True)
class Branch:
    """How the output y of a block joins the residual stream: ``h += scale * post_norm(y)``."""

    scale: float = 1.0
    post_norm: Norm | None = None


PLAIN_BRANCH = Branch()  # h += y


@dataclass(frozen=True)
class LogitsSpec:
    """What becomes of the head's products x: ``scale * x``, under a softcap ``softcap * tanh(scale * x / softcap)``."""

    softcap: float | None = None
    scale: float = 1.0


class ExpertSet:
    """The experts of a layer, and where each of them lies."""

    def __init__(self, layout: ExpertLayout, memory: torch.Tensor) -> None:
        """``memory``: u8 [layout.num_bytes], their blobs one after another."""
        self.layout = layout
        self._blobs = memory.view(layout.count, layout.blob.num_bytes)
        # i64 [E]: the address of each blob.
        self.table = memory.data_ptr() + layout.blob.num_bytes * np.arange(layout.count, dtype=np.int64)
        self._views: dict[int, Mapping[str, Segments]] = {}

    def __getitem__(self, expert: int) -> Mapping[str, Segments]:
        """Its linears by name, "gate_up" and "down"."""
        if expert not in self._views:
            blob, layout = self._blobs[expert], self.layout.blob
            self._views[expert] = {name: view_segments(layout, blob, name) for name in layout.linears}
        return self._views[expert]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights as views into its blob, by the names that its ``LayerSpec`` has."""

    norms: Mapping[str, torch.Tensor]  # f32
    linears: Mapping[str, Segments]
    experts: ExpertSet | None = None

    @classmethod
    def view(cls, layout: LayerLayout, blob: torch.Tensor, experts: ExpertLayout | None = None) -> LayerWeights:
        """``blob``: u8 [layout.num_bytes], or more; the layer's experts come behind it."""
        behind = blob[layout.num_bytes :]
        return cls(
            {norm.name: view_field(blob, layout.fields[norm.name]) for norm in layout.norms},
            {name: view_segments(layout, blob, name) for name in layout.linears},
            None if experts is None else ExpertSet(experts, behind[: experts.num_bytes]),
        )

    def __getitem__(self, name: str) -> Segments:
        return self.linears[name]


def view_field(blob: torch.Tensor, field: Field) -> torch.Tensor:
    """A view of one field of a u8 blob, in the field's dtype and shape; no copy."""
    data = blob[field.offset : field.offset + field.num_bytes]
    return data.view(TORCH_DTYPES[field.dtype]).view(field.shape)


def view_segments(layout: LayerLayout, blob: torch.Tensor, name: str) -> Segments:
    return tuple(
        Linear(linear, {key: view_field(blob, field) for key, field in layout.linear_fields(name, i).items()})
        for i, linear in enumerate(layout.linears[name])
    )


class TableRows(Protocol):
    """A table on the disk of which single rows are read."""

    row_bytes: int

    def read(self, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        """Rows, one after another, into ``out``, u8 [len(rows) * row_bytes]. Raises ``CheckpointError``."""


class Samples(Protocol):
    """Sampled tokens, on their way to the host."""

    def read(self) -> SampleRows:
        """Waits for them. A row of logits with NaN, +inf or every token forbidden has a negative code for an id."""


class Ops(Protocol):
    """The operations of a backend. ``select(i)`` chooses the staged batch that all following operations work on.

    What a family adds to an operation is a field of its spec: ``EmbedSpec``, ``AttentionSpec``, ``GatedMlp``,
    ``Branch`` or ``LogitsSpec``. What adapters add is ``loras``, for the rows that ``ForwardBatch.lora_idx`` says: it
    joins the linear's own product before anything else is done with that. A row has the same bits whatever adapters
    other rows have, and without one those that it has in a model that was loaded without any. An operation raises
    ``UnsupportedModelError`` for what the backend has no kernel for; it ignores no field.
    """

    device: torch.device
    act_dtype: torch.dtype
    target: Target
    backend: Backend | None  # compiles and launches kernels; None: the backend has no kernels of its own
    threads: Threads | None  # how many of torch's compute; None: torch does not
    dependent: bool  # launches may start before their predecessors have ended; may be switched off at any time
    captures: int  # rows of the largest step that ``capture`` takes; 0: it does nothing
    invariant_rows: int  # a batch of fewer rows is row-invariant as a whole, not only its decode rows
    decode_alike: bool  # a prompt's row has the bits that it has as a decode row
    runs_ahead: bool  # step n + 1 may be launched before the host reads the samples of step n
    kv_layout: KVLayout | DeviceKVLayout

    def buffer(self, name: str) -> torch.Tensor:
        """A step's buffer, zeroed, whose address never changes: ``residual`` f32 [window rows, C]; ``qkv``, ``attn``,
        ``mlp`` [rows of a chunk, W, A or F]; ``logits`` f32 [logit rows, V]. Of a model with mixtures of experts also
        ``routed`` f32 [rows of a chunk, C], ``expert ids`` i32 and ``expert weights`` f32 [rows of a chunk, k].

        On a GPU whose model has its embedding on the disk, also ``embedding rows`` [rows of a window, C]."""

    # load
    def pack(
        self,
        parts: Sequence[QuantizedMatrix | DenseMatrix],
        layout: LinearLayout,
        out: torch.Tensor,
        output_order: NDArray[np.int32] | None = None,
    ) -> None:
        """Writes matrices that lie side by side along N into ``out``, u8 [layout.num_bytes], in host memory.

        ``output_order`` i32 [F]: for gate and up, the order in which ``down`` wants its inputs (``packs_in_order``).
        """

    def close(self) -> None:
        """Gives back what the operations own besides memory; nothing may be run afterwards. May be called again."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None] | None:
        """``step`` calls operations on the selected batch. Returns what runs the same for any staged batch of the same
        ``step_key``, at little cost; None: this device cannot."""

    # step
    def stage(self, batches: Sequence[ForwardBatch], rows: TableRows | None = None) -> None:
        """The only host-to-device copies of a pass; outside any graph. Selects the first batch. () releases all.

        ``rows``: an embedding on the disk. The rows of the batches' tokens are read and copied, too, to the buffer that
        ``embed`` takes for its table; so the host must know all tokens, and the backend does not run ahead."""

    def select(self, batch_idx: int) -> None: ...

    def choose_logits(self, rows: NDArray[np.int32]) -> None:
        """The selected batch's ``logit_rows`` are these from now on, until others are staged. Copies nothing to the
        device."""

    def fence(self) -> None:
        """Later operations start only after all earlier ones have ended, including copies on other streams for which
        the stream waits."""

    def launch(self) -> None:
        """All operations so far are begun, at the latest: a backend may gather them until a result is asked for."""

    @property
    def step_key(self) -> Hashable:
        """A key of the selected batch: batches with equal keys launch the same kernels with the same arguments."""

    def embed(self, table: Linear, h: torch.Tensor, spec: EmbedSpec) -> None:
        """Token ids of the selected batch -> h [T, C] f32: their rows of the table as ``spec`` says."""

    def project(self, h: torch.Tensor, norm: Norm | None, w: Segments, out: torch.Tensor, loras: Loras = ()) -> None:
        """out [T, N] = norm(h) W + b; without a norm, of h itself."""

    def attend(
        self,
        qkv: torch.Tensor,
        spec: AttentionSpec,
        layer_idx: int,
        kv: KVCache,
        out: torch.Tensor,
        consumer: Segments = (),
    ) -> None:
        """qkv [T, W] -> out [T, A]: q/k norm, RoPE, append at slots, causal attention over pages. Overwrites qkv.

        ``consumer``: the linear that reads ``out``. A backend may store ``out`` in the order of its act-order.
        """

    def gated_mlp(
        self,
        h: torch.Tensor,
        norm: Norm | None,
        w: Segments,
        spec: GatedMlp,
        out: torch.Tensor,
        consumer: Segments = (),
        loras: Loras = (),
    ) -> None:
        """out [T, F] = activation(x W_gate) * (x W_up), x = norm(h), or h; ``consumer`` as for ``attend``."""

    def add_projection(
        self, x: torch.Tensor, w: Segments, h: torch.Tensor, branch: Branch = PLAIN_BRANCH, loras: Loras = ()
    ) -> None:
        """h [T, C] += scale * post_norm(x W + b). ``x``: the ``out`` of ``attend`` or ``gated_mlp`` with
        ``consumer=w``."""

    def route(
        self,
        h: torch.Tensor,
        norm: Norm,
        router: Linear,
        bias: torch.Tensor | None,
        spec: RouteSpec,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """x [T, C] = norm(h), and from its products with the router, in f32, ids i32 [T, k], rising, and their weights
        f32 [T, k]. ``bias`` f32 [E]: of the choice alone. Padding rows may get no experts: ids of -1."""

    def experts_add(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: ExpertSet,
        spec: GatedMlp,
        h: torch.Tensor,
    ) -> None:
        """h [T, C] += the sum of weight * expert(x) over a row's experts, one after another as ``ids`` has them; what
        ``route`` has written."""

    def shared_add(
        self, x: torch.Tensor, gate_up: Segments, down: Segments, gate: Linear | None, spec: GatedMlp, h: torch.Tensor
    ) -> None:
        """h [T, C] += sigmoid(x g) * MLP(x), x as ``route`` has written it; without a gate: + MLP(x)."""

    def logits(self, h: torch.Tensor, norm: Norm, head: Linear, spec: LogitsSpec, out: torch.Tensor) -> torch.Tensor:
        """Rows ``logit_rows`` of h -> logits f32 [R, V], norm(h) W as ``spec`` says, written to out[:R], which is
        returned. A row's bits do not depend on which others are asked for."""

    def sample(self, logits: torch.Tensor, params: SamplingBatch) -> Samples:
        """Logits [R, V] -> R tokens, kept on the device until the next call: the next batch may refer to sample i as
        token -1-i. Does not wait for the result."""
