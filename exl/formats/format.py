"""What a format is to ``load.py``: the tensors of a module, and two functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.base import QuantConfig
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.layout.specs import MatrixSpec


@dataclass(frozen=True)
class Format:
    """``parts`` are the ends of the names of all tensors that a module may have, ``mark`` the end of the one that shows
    its format. ``mark_dtypes``: its types, where a dense module has a tensor of that name, too.

    ``spec`` and ``load`` take a checkpoint, a module's name and its own parameters. They read headers, and what of the
    tensors decides about shapes (``g_idx``); ``load`` reads scales and zeros, too, and codes or rows when they are
    asked for. Both raise ``CheckpointError`` that names the tensor, what was found and what was expected.
    """

    mark: str
    parts: tuple[str, ...]
    spec: Callable[[Checkpoint, str, QuantConfig], MatrixSpec]
    load: Callable[[Checkpoint, str, QuantConfig], QuantizedMatrix | DenseMatrix]
    mark_dtypes: tuple[str, ...] = ()

    def is_marked(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether the module ``name`` has this format's tensors."""
        info = checkpoint.tensors.get(f"{name}.{self.mark}")
        return info is not None and (not self.mark_dtypes or info.dtype in self.mark_dtypes)
