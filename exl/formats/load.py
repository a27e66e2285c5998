"""A module's tensors, whatever format they have -> ``QuantizedMatrix`` or ``DenseMatrix``."""

from __future__ import annotations

from collections.abc import Mapping

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant_config import QuantConfig
from exl.errors import CheckpointError, UnsupportedModelError
from exl.formats.dense import dense_spec, load_dense
from exl.formats.gptq import gptq_spec, load_gptq
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.formats.rounding import round_to_nearest
from exl.formats.select import select_rows
from exl.layout.specs import MatrixSpec

# Tensors by which the formats that exl does not read give themselves away, whatever the configuration says.
_FOREIGN_TENSORS: Mapping[str, str] = {
    "B": "Marlin",
    "weight_packed": "compressed-tensors",
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "W_q": "HQQ",
    "weight.absmax": "bitsandbytes",
    "weight_scale": "FP8 or another scaled format",
    "weight_scale_inv": "FP8",
    "SCB": "bitsandbytes 8-bit",
    **dict.fromkeys(("lora_A.weight", "lora_A.default.weight"), "a LoRA adapter (peft)"),
    **dict.fromkeys(("base_layer.weight", "base_layer.qweight"), "a model whose LoRA adapter is not merged (peft)"),
}


def matrix_spec(checkpoint: Checkpoint, name: str, quant: QuantConfig | None) -> MatrixSpec:
    """Shapes of the module ``name``, quantized or dense as its tensors say, without reading its weights.

    Where tensors and configuration disagree about *whether* a module is quantized (``lm_head``, exclusions in
    ``dynamic``), the tensors decide. Raises ``CheckpointError`` that names the tensor, ``UnsupportedModelError`` for
    other formats and types.
    """
    module_quant = _module_quant(checkpoint, name, quant)
    return dense_spec(checkpoint, name) if module_quant is None else gptq_spec(checkpoint, name, module_quant)


def load_matrix(checkpoint: Checkpoint, name: str, quant: QuantConfig | None) -> QuantizedMatrix | DenseMatrix:
    """The module itself; its codes or rows are read when they are asked for. Raises as :func:`matrix_spec`."""
    module_quant = _module_quant(checkpoint, name, quant)
    return load_dense(checkpoint, name) if module_quant is None else load_gptq(checkpoint, name, module_quant)


def load_part(checkpoint: Checkpoint, spec: MatrixSpec, quant: QuantConfig | None) -> QuantizedMatrix | DenseMatrix:
    """What a manifest asks for: a module as the file has it, some of its outputs, or the codes that ``spec`` names."""
    matrix = load_matrix(checkpoint, spec.name, quant)
    if spec.rows is not None:
        matrix = select_rows(matrix, spec.rows)
    if spec.quantized and isinstance(matrix, DenseMatrix):
        return round_to_nearest(matrix, spec.bits, spec.group_size)
    return matrix


def _module_quant(checkpoint: Checkpoint, name: str, quant: QuantConfig | None) -> QuantConfig | None:
    """The module's own configuration where its tensors are quantized, None where they are dense."""
    is_quantized, is_dense = (f"{name}.{part}" in checkpoint.tensors for part in ("qweight", "weight"))
    for part, kind in _FOREIGN_TENSORS.items():
        if f"{name}.{part}" in checkpoint.tensors:
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name}.{part}: found a tensor of {kind}, exl reads GPTQ and dense weights"
            )
    if is_quantized and is_dense:
        raise CheckpointError(f"{checkpoint.path}: {name}: found both qweight and weight, expected one of them")
    if not is_quantized and not is_dense:
        raise CheckpointError(f"{checkpoint.path}: {name}: found neither weight nor qweight, expected one of them")
    if is_dense:
        return None
    if quant is None:
        raise CheckpointError(
            f"{checkpoint.path}: {name}.qweight: found quantized weights, but no quantize_config.json and no "
            "quantization_config in config.json"
        )
    return quant.for_module(name) or quant
