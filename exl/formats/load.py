"""A module's tensors, whatever format they have -> ``QuantizedMatrix`` or ``DenseMatrix``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.awq import AwqConfig
from exl.checkpoint.quant.base import QuantConfig
from exl.checkpoint.quant.compressed_tensors import IntConfig, PackedConfig
from exl.checkpoint.quant.foreign import READ, TAKE_INSTEAD, TENSORS
from exl.checkpoint.quant.fp8 import Fp8Config
from exl.checkpoint.quant.gptq import GptqConfig
from exl.errors import CheckpointError, UnsupportedModelError
from exl.formats import awq, compressed, fp8, gptq
from exl.formats.dense import dense_spec, load_dense
from exl.formats.dequantize import dequantize
from exl.formats.format import Format
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.formats.rounding import round_to_nearest
from exl.formats.select import select_rows
from exl.formats.stacked import load_stacked
from exl.layout.specs import LinearSpec, MatrixSpec

# By the class of a module's own parameters.
_FORMATS: Mapping[type[QuantConfig], Format] = {
    GptqConfig: gptq.FORMAT,
    AwqConfig: awq.FORMAT,
    PackedConfig: compressed.PACKED,
    IntConfig: compressed.BYTES,
    Fp8Config: fp8.FORMAT,
}
_DENSE_PARTS = ("weight", "bias")


def matrix_spec(checkpoint: Checkpoint, name: str, quant: QuantConfig | None) -> MatrixSpec:
    """Shapes of the module ``name``, quantized or dense as its tensors say, without reading its weights.

    Where tensors and configuration disagree about *whether* a module is quantized (``lm_head``, exclusions in
    ``dynamic``), the tensors decide. Raises ``CheckpointError`` that names the tensor, ``UnsupportedModelError`` for
    other formats and types.
    """
    own = module_quant(checkpoint, name, quant)
    return dense_spec(checkpoint, name) if own is None else _FORMATS[type(own)].spec(checkpoint, name, own)


def load_matrix(checkpoint: Checkpoint, name: str, quant: QuantConfig | None) -> QuantizedMatrix | DenseMatrix:
    """The module itself; its codes or rows are read when they are asked for. Raises as :func:`matrix_spec`."""
    own = module_quant(checkpoint, name, quant)
    return load_dense(checkpoint, name) if own is None else _FORMATS[type(own)].load(checkpoint, name, own)


def table_spec(checkpoint: Checkpoint, name: str, quant: QuantConfig | None) -> MatrixSpec:
    """An embedding as a table [N tokens, K channels]; codes in the file become f32. Raises as :func:`matrix_spec`."""
    spec = matrix_spec(checkpoint, name, quant)
    if not spec.quantized:
        return spec
    K, N = (spec.N, spec.K) if _packs_along_tokens(checkpoint, name, quant) else (spec.K, spec.N)
    return MatrixSpec(name=name, K=K, N=N, bits=32, dtype="f32", dequantized=True)


def _load_table(checkpoint: Checkpoint, name: str, quant: QuantConfig | None) -> DenseMatrix:
    """What :func:`table_spec` describes; rows are read when they are asked for."""
    if _packs_along_tokens(checkpoint, name, quant):
        return gptq.load_gptq_table(checkpoint, name, module_quant(checkpoint, name, quant))
    return dequantize(load_matrix(checkpoint, name, quant))


def _packs_along_tokens(checkpoint: Checkpoint, name: str, quant: QuantConfig | None) -> bool:
    """GPTQModel takes a token for an input, all others take it for an output, as a head does."""
    return isinstance(module_quant(checkpoint, name, quant), GptqConfig)


def load_part(checkpoint: Checkpoint, spec: MatrixSpec, quant: QuantConfig | None) -> QuantizedMatrix | DenseMatrix:
    """What a manifest asks for: a module as the file has it, some of its outputs, or the codes that ``spec`` names."""
    if spec.stack is not None:
        matrix = load_stacked(checkpoint, spec.name, spec.stack)
    else:
        matrix = (_load_table if spec.dequantized else load_matrix)(checkpoint, spec.name, quant)
    if spec.rows is not None:
        matrix = select_rows(matrix, spec.rows)
    if spec.exact and isinstance(matrix, QuantizedMatrix):
        return dequantize(matrix)
    if spec.quantized and isinstance(matrix, DenseMatrix):
        return round_to_nearest(matrix, spec.bits, spec.group_size)
    return matrix


def expect_orders(parts: Sequence[QuantizedMatrix | DenseMatrix], spec: LinearSpec, name: str) -> None:
    """Raises ``UnsupportedModelError`` if matrices that share a launch disagree about act-order with each other, or
    with ``spec``, which is that of another expert, as to whether there is one."""
    orders = [part.order if isinstance(part, QuantizedMatrix) else None for part in parts]
    has_order = spec.order_key is not None
    if any((order is not None) != has_order for order in orders) or not all(
        np.array_equal(order, orders[0]) for order in orders[1:] if has_order
    ):
        raise UnsupportedModelError(
            f"{name}: found {'no' if has_order else 'an'} act-order or one of its own, expected "
            f"{'one' if has_order else 'none'}, as in {spec.parts[0].name}: experts of a layer are of one kind"
        )


def tensors_of(checkpoint: Checkpoint, name: str) -> frozenset[str]:
    """Names of the tensors that the module ``name`` consists of: of those that its format may have, all that are
    there."""
    parts = {part for format in _marked(checkpoint, name) for part in format.parts} or _DENSE_PARTS
    return frozenset(f"{name}.{part}" for part in parts if f"{name}.{part}" in checkpoint.tensors)


def module_quant(checkpoint: Checkpoint, name: str, quant: QuantConfig | None) -> QuantConfig | None:
    """The module's own parameters where its tensors are quantized, None where they are dense: with the tensors
    themselves all that their meaning depends on."""
    for part, kind in TENSORS.items():
        if f"{name}.{part}" in checkpoint.tensors:
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name}.{part}: found a tensor of {kind}, exl reads {READ}: {TAKE_INSTEAD}"
            )
    marks = sorted({format.mark for format in _marked(checkpoint, name)})
    is_dense = "weight" not in marks and f"{name}.weight" in checkpoint.tensors
    if len(marks) + is_dense > 1:
        found = " and ".join([*marks, *["weight"] * is_dense])
        raise CheckpointError(f"{checkpoint.path}: {name}: found both {found}, expected one of them")
    if is_dense:
        return None
    if not marks:
        raise CheckpointError(
            f"{checkpoint.path}: {name}: found neither weight nor {' nor '.join(_other_marks())}, expected one of them"
        )
    if quant is None:
        raise CheckpointError(
            f"{checkpoint.path}: {name}.{marks[0]}: found quantized weights, but no quantize_config.json and no "
            "quantization_config in config.json"
        )
    own = quant.for_quantized(name)
    if not _FORMATS[type(own)].is_marked(checkpoint, name):
        raise CheckpointError(
            f"{checkpoint.path}: {name}: found {marks[0]}, expected {_FORMATS[type(own)].mark}: "
            f"{own.source} describes a checkpoint of {quant.method}"
        )
    return own


def _marked(checkpoint: Checkpoint, name: str) -> list[Format]:
    """Formats whose tensors the module has."""
    return [format for format in _FORMATS.values() if format.is_marked(checkpoint, name)]


def _other_marks() -> list[str]:
    return sorted({format.mark for format in _FORMATS.values()} - {"weight"})
