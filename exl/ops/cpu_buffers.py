"""What both kinds of operations on the CPU have alike."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from exl.layout.steps import StepLimits, routed_widths
from exl.memory.host import host_tensor

ROUTED_DTYPES = {"expert ids": torch.int32}


def step_buffer(limits: StepLimits, name: str) -> torch.Tensor:
    """A buffer of a step, zeroed: see ``exl.ops.base.Ops.buffer``."""
    widths = routed_widths(limits)
    if name in widths:
        return host_tensor([limits.max_rows, widths[name]], ROUTED_DTYPES.get(name, torch.float32), "activations")
    rows, width = {
        "residual": (limits.window_rows, limits.hidden_size),
        "qkv": (limits.max_rows, limits.qkv_width),
        "attn": (limits.max_rows, limits.attn_width),
        "mlp": (limits.max_rows, limits.intermediate_size),
        "logits": (limits.max_logit_rows, limits.vocab_size),
    }[name]
    return host_tensor([rows, width], torch.float32, "activations")


def refuse_output_order(output_order: NDArray[np.int32] | None) -> None:
    if output_order is not None:
        raise ValueError("output_order is not supported on the CPU: it sorts inputs when it multiplies")
