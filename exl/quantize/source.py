"""What is quantized: a dense model, whose linears may be FP8. Those are read as dense, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.base import QuantConfig
from exl.checkpoint.quant.compressed_tensors import CompressedTensorsConfig
from exl.checkpoint.quant.fp8 import Fp8Config
from exl.checkpoint.quant_config import read_quant_config
from exl.errors import ConfigError
from exl.formats.settle_quant import settle_quant
from exl.quantize.plan import Entry


def source_quant(checkpoint: Checkpoint, config_json: Mapping[str, Any]) -> QuantConfig | None:
    """How the source's FP8 linears are read; None: there are none. Raises ``ConfigError`` for codes of fewer bits, of
    which another rounding would be worse than one of the original model."""
    found = read_quant_config(checkpoint.folder, config_json)
    if found is None:
        return None
    configs = [group.config for group in found.groups] if isinstance(found, CompressedTensorsConfig) else [found]
    if not all(isinstance(config, Fp8Config) for config in configs):
        raise ConfigError(
            f"{checkpoint.folder}: already quantized ({found.method}), expected a dense model, or one of FP8"
        )
    return settle_quant(checkpoint, found)


def expect_no_fp8(entries: Iterable[Entry]) -> None:
    """``entries``: tensors that are copied. Raises ``ConfigError`` that names one in FP8, whose scales no file of GPTQ
    has."""
    for name, dtype, _ in entries:
        if dtype.startswith("f8"):
            raise ConfigError(
                f"{name}: found {dtype}, which stays as it is, expected a linear that is rounded or a dense type: GPTQ "
                "files have no FP8"
            )
