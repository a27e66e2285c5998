"""Where a layer's weights are when its turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from exl.ops.base import LayerWeights


class WeightSource(Protocol):
    """A pass announces its order of layers, then takes and returns them one by one."""

    def begin(self, order: Sequence[int]) -> None: ...

    def acquire(self, layer_idx: int) -> LayerWeights: ...

    def release(self, layer_idx: int) -> None: ...


class ResidentWeights:
    """All layers in memory for good."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        self._layers = tuple(layers)

    def begin(self, order: Sequence[int]) -> None:
        pass

    def acquire(self, layer_idx: int) -> LayerWeights:
        return self._layers[layer_idx]

    def release(self, layer_idx: int) -> None:
        pass
