"""The largest step that buffers are made for, and the sizes of the CPU's buffers."""

from __future__ import annotations

from dataclasses import dataclass

from exl.batch import PAGE_SIZE
from exl.layout.specs import Target


@dataclass(frozen=True)
class ExpertLimits:
    """Of a model with mixtures of experts: the largest of its layers'."""

    count: int  # E
    per_token: int  # k
    width: int  # F of an expert
    shared_width: int = 0  # of the expert that every token takes


@dataclass(frozen=True)
class StepLimits:
    """The largest step that the buffers are made for, and the widths of the model that runs in them."""

    max_rows: int  # rows of one batch: of a chunk, or decode rows
    window_rows: int  # rows that go through a layer before the next layer's turn
    max_logit_rows: int
    max_context: int  # of one sequence
    hidden_size: int
    qkv_width: int  # (H + 2 * Hkv) * D
    attn_width: int  # H * D
    intermediate_size: int
    vocab_size: int
    head_dim: int
    max_sequences: int = 1  # of one batch
    decode_rows: int = 0  # of one batch, more than max_sequences where drafts are verified; 0: max_sequences
    chunk_rows: int = 0  # of a prompt; 0: max_rows
    cache_tokens: int = 0  # of all sequences; 0: a whole context for each of max_sequences
    page_tables: int = 1  # 2: layers that have a window may have pages of their own
    lora_rank: int = 0  # the largest of all adapters' terms, see ``exl.adapters.manifest``; 0: there are none
    lora_width: int = 0  # and outputs
    num_ropes: int = 1  # that layers have, each with angles of its own
    post_norms: bool = False  # some block's output is normalised before it joins the residual stream
    experts: ExpertLimits | None = None

    def __post_init__(self) -> None:
        defaults = {
            "decode_rows": self.max_sequences,
            "chunk_rows": self.max_rows,
            "cache_tokens": self.max_sequences * self.max_context,
        }
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)

    @property
    def num_heads(self) -> int:
        return self.attn_width // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return (self.qkv_width - self.attn_width) // (2 * self.head_dim)

    @property
    def max_pages(self) -> int:
        """Of one sequence."""
        return -(-self.max_context // PAGE_SIZE)

    @property
    def window_sequences(self) -> int:
        """Sequences of all batches of a window, each counted as often as it is in one."""
        return self.max_sequences + -(-self.window_rows // self.chunk_rows)


def step_bytes(limits: StepLimits) -> dict[str, int]:
    """Bytes of the buffers that the runner owns, by purpose; activations and residual are f32."""
    return {
        "residual": limits.window_rows * limits.hidden_size * 4,
        "qkv": limits.max_rows * limits.qkv_width * 4,
        "attn": limits.max_rows * limits.attn_width * 4,
        "mlp": limits.max_rows * limits.intermediate_size * 4,
        "logits": limits.max_logit_rows * limits.vocab_size * 4,
        **{name: limits.max_rows * width * 4 for name, width in routed_widths(limits).items()},
    }


def routed_widths(limits: StepLimits) -> dict[str, int]:
    """Of the rows that a router leaves for the experts, by the names of their buffers, elements of 4 bytes."""
    found = limits.experts
    if found is None:
        return {}
    return {"routed": limits.hidden_size, "expert ids": found.per_token, "expert weights": found.per_token}


# A panel of 4 MB and its codes stay in the second-level caches between being written and being multiplied.
PANEL_ELEMENTS = 1 << 20
# Scores of a block of rows, where torch's fused kernel does not compute them (soft caps, sinks); or of one row, if that
# has more: at 128 rows, 64 heads and 128k tokens they would be 4 GB.
SCORES = 1 << 22
PACK_COLUMNS = 256  # output rows unpacked at a time while loading: a multiple of every block of every layout


def scratch_bytes(limits: StepLimits, target: Target) -> dict[str, int]:
    """Bytes of the buffers that the operations own, by purpose. Raises ``ValueError`` for a target that has none."""
    if target.kind != "cpu":
        raise ValueError(f"no scratch for target {target.kind!r}")
    max_k = max(limits.hidden_size, limits.attn_width, limits.intermediate_size)
    panel = max(PANEL_ELEMENTS, 64 * max_k)  # at least one block of int4pack
    experts = {}
    if limits.experts is not None:  # an expert's rows: gathered, between its linears, and what it gives
        widths = 2 * limits.hidden_size + max(limits.experts.width, limits.experts.shared_width)
        experts = {"expert rows": limits.max_rows * widths * 4}
    return experts | {
        "panel": panel * 4,
        "panel codes": panel,
        "sorted input": limits.max_rows * max_k * 4,
        "normed input": limits.max_rows * limits.hidden_size * 4,
        "fused output": limits.max_rows * max(2 * limits.intermediate_size, limits.hidden_size) * 4,
        "adapters' inner rows": limits.max_rows * limits.lora_rank * 4,
        "adapters' output": limits.max_rows * limits.lora_width * 4,
        "samples": limits.max_logit_rows * 8,
    }
