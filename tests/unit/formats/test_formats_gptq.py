"""GPTQ files -> codes, zeros, scales and order: against AutoGPTQ's own files and a bit-by-bit packer."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.gptq import GptqConfig
from exl.errors import CheckpointError, ExlWarning, UnsupportedModelError
from exl.formats.gptq import gptq_spec, load_gptq
from tests.reference.plain_packer import dequantize, pack_layer

AUTOGPTQ = Path(__file__).parents[2] / "data" / "autogptq" / "packed.safetensors"
NAME = "model.layers.0.mlp.up_proj"
BITS = (2, 3, 4, 8)


def seeded(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def random_layer(rng, K, N, group_size, bits, *, zeros=None):
    """Random codes [K, N] and scales [G, N]; zeros as given, or random and including the extremes. The last group may
    be shorter."""
    G = -(-K // group_size)
    codes = rng.integers(0, 2**bits, (K, N), dtype=np.uint8)
    if zeros is None:
        zeros = rng.integers(0, 2**bits, (G, N), dtype=np.uint8)
        zeros[0, :4] = [0, 1, 2**bits - 1, 2 ** (bits - 1)]
    scales = rng.uniform(1e-3, 1e-2, (G, N)).astype(np.float16)
    return codes, np.broadcast_to(np.asarray(zeros, np.uint8), (G, N)), scales


def open_layer(folder, tensors, name=NAME):
    save_file({f"{name}.{ending}": tensor for ending, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint.open(folder)


def weights_of(matrix) -> np.ndarray:
    """f64 [K, N] in the file's row order, from the fields of a ``QuantizedMatrix`` as its docstring defines them."""
    group = np.arange(matrix.K) // matrix.group_size
    codes = matrix.codes(0, matrix.N).astype(np.float64)
    rows = matrix.scales.astype(np.float64)[group] * (codes - matrix.zeros[group])
    if matrix.order is None:
        return rows
    weights = np.empty_like(rows)
    weights[matrix.order] = rows
    return weights


@pytest.fixture
def layer_file(tmp_path):
    """A function that writes one layer of 64 x 32 at 4 bits, group 32, with changes, and opens it."""
    opened = []

    def write(changes=None, *, zeros=None, checkpoint_format="gptq", g_idx=None, drop=(), seed=0):
        codes, true_zeros, scales = random_layer(seeded(seed), 64, 32, 32, 4, zeros=zeros)
        tensors = pack_layer(codes, true_zeros, scales, 4, checkpoint_format, g_idx) | (changes or {})
        checkpoint = open_layer(tmp_path, {key: value for key, value in tensors.items() if key not in drop})
        opened.append(checkpoint)
        return checkpoint

    yield write
    for checkpoint in opened:
        checkpoint.close()


QUANT = GptqConfig(bits=4, group_size=32, sym=False)


# --- external truth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "group_size"), [("sequential", 32), ("act_order", 16), ("one_group", -1)])
@pytest.mark.parametrize("bits", BITS)
def test_reads_what_autogptq_wrote_as_autogptq_does(bits, label, group_size):
    name = f"int{bits}.{label}"
    quant = GptqConfig(bits=bits, group_size=group_size, sym=False, desc_act=label == "act_order")
    with Checkpoint.open(AUTOGPTQ) as checkpoint:
        matrix = load_gptq(checkpoint, name, quant)
        spec = gptq_spec(checkpoint, name, quant)
        # AutoGPTQ multiplies in f16: one rounding of the exact product.
        np.testing.assert_array_equal(weights_of(matrix).astype(np.float16), checkpoint.read(f"{name}.dequantized"))
        assert (matrix.order is not None) == (label == "act_order") == (spec.order_key is not None)
        assert (matrix.bias is not None) == (label == "sequential") == spec.has_bias
        if matrix.bias is not None:
            np.testing.assert_array_equal(matrix.bias, checkpoint.read(f"{name}.bias"))
    assert (spec.K, spec.N, spec.bits, spec.group_size) == (64, 32, bits, 64 if group_size == -1 else group_size)


# --- every layout against the plain packer -------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True], ids=["sequential", "act-order"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("K", "group_size"),
    [(64, 32), (128, 64), (128, -1), (192, 96), (96, 32), (64, 8), (160, 128), (96, 64), (352, 160), (64, 48)],
)
@pytest.mark.parametrize("bits", BITS)
def test_codes_zeros_scales_and_order_are_exact(tmp_path, bits, K, group_size, checkpoint_format, act_order):
    rng = seeded(bits, K, group_size + 1, act_order)
    size, N = K if group_size == -1 else group_size, 32
    sym = bool(rng.integers(2))
    codes, zeros, scales = random_layer(rng, K, N, size, bits, zeros=2 ** (bits - 1) if sym else None)
    g_idx = [k // size for k in range(K)]
    if act_order:
        rng.shuffle(g_idx)
    tensors = pack_layer(codes, zeros, scales, bits, checkpoint_format, g_idx)
    quant = GptqConfig(bits=bits, group_size=group_size, sym=sym, checkpoint_format=checkpoint_format)
    with open_layer(tmp_path, tensors) as checkpoint:
        matrix, spec = load_gptq(checkpoint, NAME, quant), gptq_spec(checkpoint, NAME, quant)
        order = sorted(range(K), key=lambda k: g_idx[k])
        sorted_codes = np.array([codes[k] for k in order])
        for start, stop in ((0, N), (0, 1), (5, 12), (31, 32), (7, 7)):
            block = matrix.codes(start, stop)
            assert block.dtype == np.uint8
            np.testing.assert_array_equal(block, sorted_codes[:, start:stop])
        np.testing.assert_array_equal(matrix.zeros, zeros)
        np.testing.assert_array_equal(matrix.scales, scales)
        np.testing.assert_array_equal(weights_of(matrix), dequantize(codes, zeros, scales, g_idx))
    assert (matrix.zeros.dtype, matrix.scales.dtype) == (np.uint8, np.float16)
    if act_order and size < K:
        assert matrix.order.dtype == np.int32
        assert matrix.order.tolist() == order
    else:
        assert matrix.order is None
    assert (spec.K, spec.N, spec.bits, spec.group_size, spec.dtype) == (K, N, bits, size, "u8")
    assert (spec.order_key is None) == (matrix.order is None)


@pytest.mark.parametrize(("bits", "N"), [(2, 16), (4, 8), (4, 40), (8, 4), (3, 64), (4, 1)])
def test_narrow_outputs(tmp_path, bits, N):
    codes, zeros, scales = random_layer(seeded(bits, N), 32, N, 32, bits, zeros=1)
    if N * bits % 32:
        tensors = pack_layer(codes, zeros[:, :0], scales, bits)
        tensors["qzeros"] = np.zeros((1, 1), np.int32)
    else:
        tensors = pack_layer(codes, zeros, scales, bits)
    quant = GptqConfig(bits=bits, group_size=-1, sym=False)
    with open_layer(tmp_path, tensors) as checkpoint:
        if N * bits % 32:
            with pytest.raises(CheckpointError, match=r"up_proj: 1 outputs, whose 4-bit zeros do not fill whole words"):
                load_gptq(checkpoint, NAME, quant)
        else:
            np.testing.assert_array_equal(load_gptq(checkpoint, NAME, quant).codes(0, N), codes)


# --- the traps of the format, one test each ------------------------------------------------------------------------


def test_trap_group_size_minus_one_is_one_group(tmp_path):
    codes, zeros, scales = random_layer(seeded(1), 96, 32, 96, 4)
    with open_layer(tmp_path, pack_layer(codes, zeros, scales, 4)) as checkpoint:
        matrix = load_gptq(checkpoint, NAME, GptqConfig(bits=4, group_size=-1, sym=False))
    assert (matrix.group_size, matrix.num_groups, matrix.scales.shape) == (96, 1, (1, 32))


def test_trap_group_size_above_the_inputs_is_one_group(tmp_path):
    codes, zeros, scales = random_layer(seeded(1), 64, 32, 64, 4)
    with open_layer(tmp_path, pack_layer(codes, zeros, scales, 4)) as checkpoint:
        assert load_gptq(checkpoint, NAME, GptqConfig(bits=4, group_size=128, sym=False)).group_size == 64


@pytest.mark.parametrize("bits", BITS)
def test_trap_v1_largest_stored_zero_means_zero(tmp_path, bits):
    """Adding 1 without the mask would give 2^bits, and in a packed word the carry would change the next zero."""
    codes, zeros, scales = random_layer(seeded(bits), 32, 32, 32, bits, zeros=0)
    tensors = pack_layer(codes, zeros, scales, bits)
    np.testing.assert_array_equal(tensors["qzeros"], -1)  # every bit set: 2^bits - 1 everywhere
    with open_layer(tmp_path, tensors) as checkpoint:
        matrix = load_gptq(checkpoint, NAME, GptqConfig(bits=bits, group_size=32, sym=False))
    np.testing.assert_array_equal(matrix.zeros, 0)


def test_trap_zeros_never_borrow_from_their_neighbours(layer_file):
    zeros = np.tile(np.array([0, 15, 8, 0, 0, 1, 15, 15], np.uint8), (2, 4))
    for checkpoint_format in ("gptq", "gptq_v2"):
        checkpoint = layer_file(zeros=zeros, checkpoint_format=checkpoint_format)
        quant = GptqConfig(bits=4, group_size=32, sym=False, checkpoint_format=checkpoint_format)
        np.testing.assert_array_equal(load_gptq(checkpoint, NAME, quant).zeros, zeros)


@pytest.mark.parametrize("bits", BITS)
def test_trap_symmetric_v2_zeros_in_a_file_that_says_v1(tmp_path, bits):
    middle = 2 ** (bits - 1)
    codes, zeros, scales = random_layer(seeded(bits), 64, 32, 32, bits, zeros=middle)
    with open_layer(tmp_path, pack_layer(codes, zeros, scales, bits, "gptq_v2")) as checkpoint:
        quant = GptqConfig(bits=bits, group_size=32, sym=True, checkpoint_format="gptq", source="quantize_config.json")
        with pytest.warns(
            ExlWarning, match=rf"^quantize_config.json: .*found gptq, .*stored as {middle}, which is gptq_v2"
        ):
            matrix = load_gptq(checkpoint, NAME, quant)
        np.testing.assert_array_equal(matrix.zeros, middle)


def test_trap_symmetric_v1_zeros_in_a_file_that_says_v2(layer_file):
    checkpoint = layer_file(zeros=8, checkpoint_format="gptq")
    with pytest.warns(ExlWarning, match="stored as 7, which is gptq;"):
        matrix = load_gptq(checkpoint, NAME, GptqConfig(bits=4, group_size=32, checkpoint_format="gptq_v2"))
    np.testing.assert_array_equal(matrix.zeros, 8)


def test_trap_asymmetric_zeros_are_taken_as_the_file_says(layer_file):
    """An asymmetric file may store 8 everywhere: only ``sym`` says what the zeros must be."""
    checkpoint = layer_file(zeros=9, checkpoint_format="gptq")
    np.testing.assert_array_equal(load_gptq(checkpoint, NAME, QUANT).zeros, 9)


def test_trap_mixed_zeros_in_a_symmetric_file_are_taken_as_the_file_says(layer_file):
    """If one zero cannot be symmetric, ``sym`` is wrong, and then a stored 7 proves nothing."""
    zeros = np.full((2, 32), 7, np.uint8)
    zeros[1, 3] = 9
    checkpoint = layer_file(zeros=zeros, checkpoint_format="gptq_v2")
    quant = GptqConfig(bits=4, group_size=32, sym=True, checkpoint_format="gptq_v2")
    np.testing.assert_array_equal(load_gptq(checkpoint, NAME, quant).zeros, zeros)


@pytest.mark.parametrize("desc_act", [False, True])
def test_trap_g_idx_decides_and_not_desc_act(layer_file, desc_act):
    shuffled = [0, 1] * 32
    quant = GptqConfig(bits=4, group_size=32, sym=False, desc_act=desc_act)
    assert load_gptq(layer_file(g_idx=shuffled), NAME, quant).order.tolist() == [*range(0, 64, 2), *range(1, 64, 2)]
    assert load_gptq(layer_file(g_idx=[0] * 32 + [1] * 32), NAME, quant).order is None
    assert load_gptq(layer_file(), NAME, quant).order is None


def test_trap_all_zero_g_idx_means_none(layer_file):
    assert load_gptq(layer_file(g_idx=[0] * 64), NAME, QUANT).order is None
    assert gptq_spec(layer_file(g_idx=[0] * 64), NAME, QUANT).order_key is None


def test_trap_groups_in_another_sequence_are_sorted(layer_file):
    """Groups are contiguous, but group 1 comes first: scales are indexed by the group's number, not by its position."""
    order = load_gptq(layer_file(g_idx=[1] * 32 + [0] * 32), NAME, QUANT).order
    assert order.tolist() == [*range(32, 64), *range(32)]


def test_trap_uneven_groups_are_refused_by_name(layer_file):
    checkpoint = layer_file(g_idx=[0, 1] * 30 + [0] * 4)
    for read in (gptq_spec, load_gptq):
        with pytest.raises(
            CheckpointError,
            match=r"up_proj\.g_idx: found 34 inputs in group 0, expected 32 in each: .* damaged",
        ):
            read(checkpoint, NAME, QUANT)


@pytest.mark.parametrize("group", [-1, 2, 2**31 - 1, -(2**31)])
def test_trap_g_idx_out_of_range_is_refused(layer_file, group):
    g_idx = [0, 1] * 32
    g_idx[5] = group
    with pytest.raises(CheckpointError, match=rf"g_idx: found group {group} for input 5, expected 0 to 1"):
        load_gptq(layer_file(g_idx=g_idx), NAME, QUANT)


def test_trap_equal_orders_have_equal_keys_and_others_do_not(layer_file):
    def key(g_idx):
        return gptq_spec(layer_file(g_idx=g_idx), NAME, QUANT).order_key

    assert key([0, 1] * 32) == key([0, 1] * 32)
    assert key([0, 1] * 32) != key([1, 0] * 32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_trap_bits_of_config_and_file_differ(tmp_path, bits):
    """In other loaders, 8-bit files read as 4-bit end in a shape error: here the message names the bits."""
    for group_size in (32, -1):
        codes, zeros, scales = random_layer(seeded(bits), 64, 32, 64 if group_size == -1 else 32, bits, zeros=1)
        with open_layer(tmp_path, pack_layer(codes, zeros, scales, bits)) as checkpoint:
            for other in {2, 3, 4, 8} - {bits}:
                quant = GptqConfig(bits=other, group_size=group_size, sym=False, source="quantize_config.json")
                with pytest.raises(CheckpointError, match=rf"found shape \[.*, expected \[.*{other}( bits|, N)"):
                    gptq_spec(checkpoint, NAME, quant)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_trap_scales_that_are_not_finite(layer_file, value):
    scales = np.full((2, 32), 0.01, np.float16)
    scales[1, 7] = value
    with pytest.raises(CheckpointError, match=r"scales: found -?(nan|inf) at \[1, 7\] \(1 such in all\)"):
        load_gptq(layer_file({"scales": scales}), NAME, QUANT)


@pytest.mark.parametrize("values", [(0.0078125, 0.5), (0.01, 1e6), (1e-9, 1.0000001)])
def test_trap_scales_in_f32_stay_in_f32(layer_file, values):
    """The header decides, not the values, because a plan reads only headers."""
    scales = np.array(values, np.float32)[:, None] * np.linspace(1, 2, 32, dtype=np.float32)
    checkpoint = layer_file({"scales": scales})
    matrix = load_gptq(checkpoint, NAME, QUANT)
    assert (matrix.scales.dtype, matrix.scale_dtype) == (np.float32, "f32")
    np.testing.assert_array_equal(matrix.scales, scales)
    assert gptq_spec(checkpoint, NAME, QUANT).scale_dtype == "f32"
    assert gptq_spec(layer_file(), NAME, QUANT).scale_dtype == "f16"


def test_trap_act_order_may_leave_the_last_group_shorter_and_no_other(tmp_path):
    """160 inputs in groups of 64: 64, 64 and 32 of them, whatever their order."""
    rng = seeded(6)
    codes, zeros, scales = random_layer(rng, 160, 32, 64, 4)
    quant = GptqConfig(bits=4, group_size=64, sym=False, desc_act=True)
    g_idx = rng.permutation(np.arange(160) // 64)
    with open_layer(tmp_path, pack_layer(codes, zeros, scales, 4, g_idx=g_idx)) as checkpoint:
        matrix = load_gptq(checkpoint, NAME, quant)
        assert (matrix.num_groups, gptq_spec(checkpoint, NAME, quant).num_groups) == (3, 3)
        np.testing.assert_array_equal(weights_of(matrix), dequantize(codes, zeros, scales, g_idx))
    short_first = rng.permutation((np.arange(160) + 32) // 64)
    with (
        open_layer(tmp_path, pack_layer(codes, zeros, scales, 4, g_idx=short_first)) as checkpoint,
        pytest.raises(CheckpointError, match="found 32 inputs in group 0, expected 64 in each and 32 in the last: the"),
    ):
        gptq_spec(checkpoint, NAME, quant)


# --- bias, memory, misuse ------------------------------------------------------------------------------------------


def test_bias_keeps_its_value_in_every_type(tmp_path):
    codes, zeros, scales = random_layer(seeded(3), 64, 32, 32, 4)
    bias = np.linspace(-300, 300, 32).astype(np.float32)
    for stored in (bias, bias.astype(np.float16)):
        with open_layer(tmp_path, pack_layer(codes, zeros, scales, 4) | {"bias": stored}) as checkpoint:
            read = load_gptq(checkpoint, NAME, QUANT).bias
            assert read.dtype == stored.dtype
            np.testing.assert_array_equal(read, stored)


def test_codes_are_unpacked_by_block(tmp_path):
    """Besides the packed tensors, only the requested block is ever in memory."""
    K, N = 1024, 2048
    rng = seeded(4)
    tensors = {
        "qweight": rng.integers(-(2**31), 2**31, (K // 8, N), dtype=np.int64).astype(np.int32),
        "qzeros": np.full((K // 128, N // 8), 0x77777777, np.int32),
        "scales": np.full((K // 128, N), 0.01, np.float16),
    }
    with open_layer(tmp_path, tensors) as checkpoint:
        tracemalloc.start()
        matrix = load_gptq(checkpoint, NAME, GptqConfig(bits=4, group_size=128))
        before_codes = tracemalloc.get_traced_memory()[1]
        for start in range(0, N, 64):
            assert matrix.codes(start, start + 64).shape == (K, 64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    packed = tensors["qweight"].nbytes
    assert before_codes < packed / 4, "the weights are not read before they are needed"
    assert peak < packed * 1.25, "unpacked codes exist for one block only"


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 33), (5, 4)])
def test_columns_out_of_range(layer_file, start, stop):
    with pytest.raises(ValueError, match=rf"columns {start}:{stop} of {NAME}, which has 32"):
        load_gptq(layer_file(), NAME, QUANT).codes(start, stop)


# --- damaged layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["qweight", "qzeros", "scales"])
def test_missing_tensors_are_named(layer_file, ending):
    with pytest.raises(CheckpointError, match=rf"no tensor '{NAME}\.{ending}'"):
        load_gptq(layer_file(drop=[ending]), NAME, QUANT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": np.zeros((8, 32), np.int64)}, r"qweight: found dtype i64, expected i32"),
        ({"qweight": np.zeros((8, 32, 1), np.int32)}, r"qweight: found shape \[8, 32, 1\], expected 2 dimensions"),
        ({"qweight": np.zeros((9, 32), np.int32)}, r"qweight: found shape \[9, 32\], expected \[K / 32 \* 4, N\]"),
        ({"qweight": np.zeros((0, 32), np.int32)}, r"qweight: found shape \[0, 32\]"),
        ({"qweight": np.zeros((8, 0), np.int32)}, r"qweight: found shape \[8, 0\]"),
        (
            {"qweight": np.zeros((16, 32), np.int32)},
            r"scales: found shape \[2, 32\], expected \[4, 32\] for 128 inputs",
        ),
        ({"qzeros": np.zeros((2, 4), np.float32)}, r"qzeros: found dtype f32, expected i32"),
        ({"qzeros": np.zeros((2, 8), np.int32)}, r"qzeros: found shape \[2, 8\], expected \[2, 4\]"),
        ({"qzeros": np.zeros((4, 4), np.int32)}, r"qzeros: found shape \[4, 4\], expected \[2, 4\]"),
        ({"scales": np.zeros((2, 32), np.int32)}, r"scales: found dtype i32, expected f32 or f16 or bf16"),
        ({"scales": np.zeros((64,), np.float16)}, r"scales: found shape \[64\], expected 2 dimensions"),
        ({"scales": np.zeros((32, 2), np.float16)}, r"scales: found shape \[32, 2\], expected \[2, 32\]"),
        ({"g_idx": np.zeros(63, np.int32)}, r"g_idx: found shape \[63\], expected \[64\]"),
        ({"g_idx": np.zeros(64, np.int64)}, r"g_idx: found dtype i64, expected i32"),
        ({"bias": np.zeros(31, np.float16)}, r"bias: found shape \[31\], expected \[32\]"),
    ],
)
def test_damaged_layers_say_what_was_found_and_expected(layer_file, changes, message):
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {NAME}\.{message}"):
        load_gptq(layer_file(changes), NAME, QUANT)


def test_a_shorter_last_group_has_scales_and_zeros_of_its_own(layer_file):
    """64 inputs in groups of 48 are two groups; a file with only one (rounded down) is damaged."""
    quant = GptqConfig(bits=4, group_size=48, sym=False)
    assert gptq_spec(layer_file(), NAME, quant).num_groups == 2
    for name in ("scales", "qzeros"):
        short = {"scales": np.ones((1, 32), np.float16), "qzeros": np.zeros((1, 4), np.int32)}[name]
        with pytest.raises(CheckpointError, match=rf"{name}: found shape \[1, \d+\], expected \[2, \d+\]"):
            gptq_spec(layer_file({name: short}), NAME, quant)


def test_bias_of_integers_is_refused(layer_file):
    with pytest.raises(UnsupportedModelError, match=r"bias: found dtype i32"):
        load_gptq(layer_file({"bias": np.zeros(32, np.int32)}), NAME, QUANT)
