"""Packed records against a packer that builds them from codes, one record at a time, by the layout's words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.gptq import GptqConfig
from exl.cpu_kernels.library import Library
from exl.errors import CheckpointError, KernelError
from exl.formats.gptq import stored_sizes
from exl.formats.load import load_matrix, load_part, matrix_spec
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.layout.columns import COLUMNS
from exl.layout.layers import LinearLayout, column_layout, linear_layout
from exl.layout.specs import LinearSpec, MatrixSpec, Target, fuse
from exl.ops.compiled_pack import pack_linear
from exl.planning.from_headers import open_model

TARGET = Target("cpu", compiled=True)
DATA = Path(__file__).parents[1] / "data"


# --- the independent packer --------------------------------------------------------------------------------------


def stream_words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Codes u8 [K, n] -> GPTQ's words [K * bits / 32, n]: code k of a column is bits k * bits and up of its stream."""
    stream = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")  # [K, n, bits]
    stream = stream.transpose(1, 0, 2).reshape(codes.shape[1], -1)
    return np.ascontiguousarray(np.packbits(stream, axis=1, bitorder="little").view("<u4").T)


def record_words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Codes u8 [rows, 64] of one record -> its words."""
    if bits != 3:
        return stream_words(codes, bits)
    words = []
    for block in codes.reshape(-1, 32, COLUMNS):
        high = np.zeros(COLUMNS, np.uint32)
        for a in range(2):
            for b in range(4):
                for j in range(4):
                    high |= (block[16 * a + 4 * b + j] >> 2).astype(np.uint32) << np.uint32(8 * b + 4 * a + j)
        words += [stream_words(block[:16] & 3, 2)[0], stream_words(block[16:] & 3, 2)[0], high]
    return np.stack(words)


def plain_records(parts: list[QuantizedMatrix], layout: LinearLayout) -> NDArray[np.uint8]:
    """All records of a linear, from the matrices' codes, scales and zeros."""
    columns = column_layout(layout.spec)
    codes = np.concatenate([part.codes(0, part.N) for part in parts], axis=1)
    scales, zeros = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("scales", "zeros"))
    wide = -columns.N % COLUMNS
    codes, scales, zeros = (np.pad(values, ((0, 0), (0, wide))) for values in (codes, scales, zeros))
    found = []
    for block in range(columns.num_blocks):
        here = slice(block * COLUMNS, (block + 1) * COLUMNS)
        for group in range(columns.num_groups):
            of_group = codes[group * columns.group_size : (group + 1) * columns.group_size, here]
            of_group = np.pad(of_group, ((0, -len(of_group) % columns.rows), (0, 0)))
            for record in of_group.reshape(-1, columns.rows, COLUMNS):
                scale = np.ascontiguousarray(scales[group, here])
                if columns.scale_dtype == "bf16":
                    scale = (scale.view(np.uint32) >> 16).astype(np.uint16)
                found += [record_words(record, columns.bits).tobytes(), scale.tobytes()]
                if not columns.symmetric:
                    found.append(zeros[group, here].tobytes())
    return np.frombuffer(b"".join(found), np.uint8)


# --- random matrices ---------------------------------------------------------------------------------------------


def random_matrix(
    rng: np.random.Generator, spec: MatrixSpec, order: NDArray[np.int32] | None, *, words: bool
) -> QuantizedMatrix:
    """Codes of sorted rows; with ``words``, in the file's order, too. f16 cannot hold its bf16 and f32 scales."""
    codes = rng.integers(0, 2**spec.bits, (spec.K, spec.N), dtype=np.uint8)
    G, middle = spec.num_groups, 1 << (spec.bits - 1)
    scales = (rng.random((G, spec.N)) * 0.05 + 0.001).astype(np.float32) * np.float32(2.0**-20)
    scales = {"f16": scales.astype(np.float16), "f32": scales}.get(
        spec.scale_dtype, (scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    )
    in_file = codes
    if order is not None:
        in_file = np.empty_like(codes)
        in_file[order] = codes
    return QuantizedMatrix(
        bits=spec.bits,
        group_size=spec.group_size,
        K=spec.K,
        N=spec.N,
        scales=scales,
        zeros=np.full((G, spec.N), middle, np.uint8) if spec.symmetric else rng.integers(0, 17, (G, spec.N), np.uint8),
        order=order,
        bias=rng.standard_normal(spec.N).astype(np.float16) if spec.has_bias else None,
        read_codes=lambda start, stop: codes[:, start:stop],
        read_words=(lambda: stream_words(in_file, spec.bits)) if words else None,
        scale_dtype=spec.scale_dtype,
    )


def pack(parts: list, layout: LinearLayout, library: Library) -> dict[str, NDArray]:
    """The fields, packed into memory that was not zero before."""
    out = np.full(layout.num_bytes, 0xA5, np.uint8)
    pack_linear(parts, layout, out, library)
    types = {"u8": np.uint8, "i32": np.int32, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}
    return {
        name: out[field.offset : field.offset + field.num_bytes].view(types[field.dtype]).reshape(field.shape)
        for name, field in layout.fields.items()
    }


def make(
    seed: int, Ns: tuple[int, ...], order: bool, words: bool, **shape
) -> tuple[list[QuantizedMatrix], LinearLayout]:
    rng = np.random.default_rng(seed)
    specs = [
        MatrixSpec(f"m{i}", N=N, dtype="u8", order_key="key" if order else None, **shape) for i, N in enumerate(Ns)
    ]
    permutation = rng.permutation(shape["K"]).astype(np.int32) if order else None
    parts = [random_matrix(rng, spec, permutation, words=words) for spec in specs]
    return parts, linear_layout(LinearSpec(tuple(specs)), TARGET)


# --- tests -------------------------------------------------------------------------------------------------------

# Whole groups; groups longer than a record; one group; a shorter last group; groups that fill no whole records
K_AND_GROUP = [(256, 64), (512, 256), (192, 192), (224, 128), (160, 40)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("words", [True, False])
def test_all_widths_orders_and_groups(bits, order, words, library):
    for seed, (K, group_size) in enumerate(K_AND_GROUP):
        # Blocks that belong to one matrix, to two, to three, and one that is not full
        parts, layout = make(
            seed, (128, 40, 8, 96, 24), order, words, bits=bits, K=K, group_size=group_size, symmetric=seed == 0
        )
        found = pack(parts, layout, library)
        np.testing.assert_array_equal(found["records"], plain_records(parts, layout))
        source = column_layout(layout.spec).source_rows()
        assert ("source" in found) == (order or bool((source < 0).any()))
        if order:
            source = np.where(source < 0, -1, parts[0].order[source])
        if "source" in found:
            np.testing.assert_array_equal(found["source"], source)


@pytest.mark.parametrize("scale_dtype", ["f16", "bf16", "f32"])
def test_types_of_scales_and_biases(scale_dtype, library):
    parts, layout = make(1, (72, 64), False, True, bits=4, K=128, group_size=32, has_bias=True, scale_dtype=scale_dtype)
    parts[1] = dataclasses.replace(parts[1], bias=None)  # has one in the layout, because its neighbour has
    found = pack(parts, layout, library)
    np.testing.assert_array_equal(found["records"], plain_records(parts, layout))
    np.testing.assert_array_equal(found["bias"], np.concatenate([parts[0].bias, np.zeros(64)]).astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_files_of_autogptq(bits, library):
    """Its own packer's words, act-order among them."""
    with Checkpoint.open(DATA / "autogptq" / "packed.safetensors") as checkpoint:
        names = {name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")}
        for name in sorted(names):
            num_bits, K, G = stored_sizes(checkpoint, name)
            if num_bits == bits:
                quant = GptqConfig(bits=bits, group_size=-(-K // G), sym=False)
                layout = linear_layout(LinearSpec((matrix_spec(checkpoint, name, quant),)), TARGET)
                matrix = load_matrix(checkpoint, name, quant)
                np.testing.assert_array_equal(
                    pack([matrix], layout, library)["records"], plain_records([matrix], layout)
                )


def test_dense_layers_of_a_real_file(library):
    """The bundled model's, fused as a manifest lists them."""
    with open_model(DATA / "stories2M") as files:
        for (linear,) in files.manifest.layouts(TARGET).layers[1].linears.values():
            parts = [load_part(files.checkpoint, part, files.quant) for part in linear.spec.parts]
            rows = np.concatenate([files.checkpoint.read(f"{part.name}.weight") for part in linear.spec.parts])
            np.testing.assert_array_equal(pack(parts, linear, library)["weight"], rows)


def test_dense_rows_lie_as_in_the_file(library):
    rng = np.random.default_rng(4)
    values = [rng.integers(0, 2**16, (N, 48), dtype=np.uint16) for N in (300, 20)]  # bf16
    specs = [MatrixSpec(f"m{i}", 48, len(rows), 16, "bf16") for i, rows in enumerate(values)]

    def read_into(out):
        out[:] = values[1].view(np.uint8).ravel()

    parts = [
        DenseMatrix("bf16", 48, 300, None, None, lambda start, stop: values[0][start:stop]),
        DenseMatrix("bf16", 48, 20, None, None, lambda start, stop: values[1][start:stop], read_into),
    ]
    (spec,) = fuse(specs)
    found = pack(parts, linear_layout(spec, TARGET), library)
    np.testing.assert_array_equal(found["weight"], np.concatenate(values))


def test_zeros_that_the_configuration_rules_out_are_refused(library):
    parts, layout = make(5, (64, 64), False, True, bits=4, K=64, group_size=32, symmetric=True)
    parts[1].zeros[1, 3] = 7
    with pytest.raises(CheckpointError, match=r"m1\.qzeros: found zero point 7, expected 8 everywhere"):
        pack(parts, layout, library)


def test_memory_of_another_size_is_refused(library):
    parts, layout = make(6, (64,), False, True, bits=4, K=64, group_size=32)
    with pytest.raises(KernelError, match="blob: expected u8"):
        pack_linear(parts, layout, np.zeros(64, np.uint8), library)
