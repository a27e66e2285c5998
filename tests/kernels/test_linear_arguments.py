"""Arguments that the linear wrappers refuse before anything is loaded or launched; the choice of a configuration."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference.linear_twin import random_matrix

from exl.errors import KernelError
from exl.kernels.linear import COMPILED, linear_spec, make_scratch, multiply, variants
from exl.kernels.linear_io import NormedInput, Output
from exl.kernels.tile_pack import pack_matrix
from exl.kernels.weights import TiledWeight
from exl.layout.arch import arch_limits
from exl.layout.linear_config import RING_STAGES, choose_config, shared_per_multiprocessor, slice_stages
from exl.layout.tiles import TileLayout

K, N = 256, 48


class NeverLaunches:
    device = torch.device("cpu")
    arch = 86
    num_multiprocessors = 4

    def load(self, spec):
        pytest.fail(f"{spec} was loaded in spite of its arguments")


BACKEND = NeverLaunches()


def weight(**changes) -> TiledWeight:
    packed = pack_matrix([random_matrix(np.random.default_rng(0), 4, K, N, 64, bias=True)])
    return dataclasses.replace(TiledWeight.from_packed(packed, BACKEND.device), **changes)


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def misaligned(*shape: int) -> torch.Tensor:
    return torch.zeros(int(np.prod(shape)) + 1, dtype=torch.float16)[1:].view(shape)


def off_by_8(tensor: torch.Tensor) -> torch.Tensor:
    memory = torch.zeros(tensor.numel() + 8, dtype=torch.uint8)
    return memory[8 if memory.data_ptr() % 16 == 0 else 0 :][: tensor.numel()].view(tensor.shape)


def norm(T: int, **changes) -> NormedInput:
    return dataclasses.replace(NormedInput(torch.zeros(T, K // 16), torch.zeros(K), 1e-5), **changes)


def store(x: object, y: object, **more) -> Callable[[], None]:
    changes = {name: more.pop(name) for name in ("codes", "qparams", "bias") if name in more}
    return lambda: multiply(BACKEND, weight(**changes), x, Output.store(y), **more)


def add(h: torch.Tensor, sumsq: torch.Tensor, **more) -> Callable[[], None]:
    return lambda: multiply(BACKEND, weight(), half(2, K), Output.residual(h, sumsq, **more))


X, Y, H = half(2, K), half(2, N), torch.zeros(2, K)
SCRATCH = make_scratch([weight().layout], BACKEND)
CASES: dict[str, tuple[Callable[[], None], str]] = {
    "f32 without a norm": (store(H, Y), "x is torch.float32"),
    "f16 with a norm": (store(X, Y, norm=norm(2)), "x is torch.float16"),
    "wrong K": (store(half(2, K + 64), Y), "x has shape (2, 320): expected (2, 256)"),
    "no tokens": (store(half(0, K), half(0, N)), "at least one token"),
    "one dimension": (store(half(K), Y), "x: expected [T, 256]"),
    "transposed x": (store(half(K, 2).T, Y), "x has strides (1, 2)"),
    "overlapping rows": (store(half(1, K).expand(2, K), Y), "x has strides (0, 1)"),
    "rows at odd places": (store(half(2, K + 4)[:, :K], Y), "x has strides (260, 1)"),
    "misaligned x": (store(misaligned(2, K), Y), "x starts at address"),
    "transposed y": (store(X, half(N, 2).T), "y has strides (1, 2)"),
    "wrong N": (store(X, half(2, 64)), "output has 64 columns: the matrix has 3 tiles of 16"),
    "gated width": (
        lambda: multiply(BACKEND, weight(), X, Output.gated(Y)),
        "output has 48 columns: the matrix has 3 tiles of 8",
    ),
    "rows of y": (store(X, half(3, N)), "y has shape (3, 48): expected (2, 48)"),
    "integer y": (store(X, Y.int()), "y is torch.int32"),
    "other device": (store(X.to("meta"), Y), "x is on meta: expected cpu"),
    "not a tensor": (store(X.numpy(), Y), "x: expected a tensor, found ndarray"),
    "f16 residual": (add(Y, torch.zeros(2, 3)), "h is torch.float16"),
    "short sumsq": (add(torch.zeros(2, N), torch.zeros(2, 2)), "sumsq has shape (2, 2): expected (2, 3)"),
    "no channel_map": (
        add(torch.zeros(2, N), torch.zeros(2, 3), permuted=torch.zeros(2, N)),
        "go together: one is missing",
    ),
    "norm's sumsq": (store(H, Y, norm=norm(3)), "sumsq has shape (3, 16)"),
    "norm's eps": (store(H, Y, norm=norm(2, eps=float("nan"))), "eps is nan"),
    "no scratch": (store(half(9, K), half(9, N)), "9 tokens: more than 8 need scratch"),
    "small scratch": (
        store(half(9, K), half(9, N), scratch=dataclasses.replace(SCRATCH, x=half(64))),
        "scratch.x has 64 elements: expected 2304",
    ),
    "codes of another type": (store(X, Y, codes=weight().codes.byte()), "codes is torch.uint8"),
    "codes of another shape": (store(X, Y, codes=weight().codes[:2]), "codes has shape"),
    "no zeros": (
        store(X, Y, qparams=weight().qparams[..., :64].contiguous()),
        "qparams has shape (3, 2, 64): expected",
    ),
    "f16 scales": (store(X, Y, qparams=weight().qparams.view(torch.float16)), "qparams is torch.float16"),
    "unaligned": (store(X, Y, qparams=off_by_8(weight().qparams)), "qparams starts at address"),
    "short bias": (store(X, Y, bias=torch.zeros(40)), "bias has shape (40,): expected (48,)"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_before_any_launch(name: str) -> None:
    call, message = CASES[name]
    with pytest.raises(KernelError, match=re.escape(message)):
        call()


# ---- configurations ------------------------------------------------------------------------------------------------

MODEL_SHAPES = [(2048, 2048), (2048, 5632), (5632, 2048), (4096, 4096), (4096, 22016), (11008, 4096), (4096, 6144)]
MODEL_SHAPES += [(8192, 57344), (28672, 8192), (896, 9728), (4864, 896), (4096, 128256)]


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_shape_fits_every_architecture(arch: int, bits: int) -> None:
    for K, N in MODEL_SHAPES:
        layout = TileLayout(bits, K, N, 128, False)
        for T in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64):
            for sms in (1, 20, 82, 132):
                config = choose_config(layout, T, arch, sms)
                assert config.shared_bytes(layout, T, arch) <= arch_limits(arch).max_shared_bytes
                assert config.wide == (T > 8)
                assert config.token_tiles * 8 >= T
                blocks, spread = config.row_blocks(layout), config.spread
                assert blocks * (8 if config.wide else 1) * config.row_tiles >= layout.num_tiles
                assert spread in (1, 2, 8)
                if not config.wide:
                    whole = config.x_stages == slice_stages(layout)
                    assert whole or (
                        config.x_stages < slice_stages(layout) and config.x_stages % config.ring_stages == 0
                    )


def test_a_decode_block_keeps_24_kilobytes_on_their_way() -> None:
    for (bits, row_tiles), stages in RING_STAGES.items():
        planes = TileLayout(bits, 4096, 4096, 128, False).planes
        assert (stages - 1) * 8 * row_tiles * planes * 512 >= 24 * 1024


@pytest.mark.parametrize("scale_dtype", ["f16", "f32"])
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_one_token_leaves_room_for_two_blocks_a_multiprocessor(arch: int, scale_dtype: str) -> None:
    """For any K: activations are staged in chunks, rather than leaving room for only one block."""
    for K, N in MODEL_SHAPES:
        for bits, tokens in ((2, 1), (3, 1), (4, 1), (4, 2)):
            layout = TileLayout(bits, K, N, 128, False, scale_dtype)
            config = choose_config(layout, tokens, arch, 82)
            shared = config.shared_bytes(layout, tokens, arch) + 1024  # the driver reserves 1024 bytes per block
            assert 2 * shared <= shared_per_multiprocessor(arch), (K, N, bits, tokens, config)
            on_their_way = 2 * (config.ring_stages - 1) * 8 * config.row_tiles * layout.planes * 512
            assert on_their_way >= 24 * 1024, (K, N, bits, tokens, config)


def test_small_matrices_are_spread_over_a_large_gpu() -> None:
    layout = TileLayout(4, 4096, 1024, 128, False)
    assert choose_config(layout, 16, 86, 4).spread == 1
    assert choose_config(layout, 16, 86, 82).spread == 8
    assert choose_config(layout, 8, 86, 4).row_tiles == 4
    assert choose_config(layout, 8, 86, 82).row_tiles == 1


@pytest.mark.parametrize(
    ("T", "arch", "message"), [(0, 86, "0 tokens"), (65, 86, "65 tokens"), (1, 70, "7.5 or higher")]
)
def test_no_configuration(T: int, arch: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        choose_config(TileLayout(4, 4096, 1024, 128, False), T, arch, 82)


def test_variants_cover_what_can_be_chosen() -> None:
    assert {variant.spec.entry for variant in variants(70)} == {"linear_q_simt", "round_activations"}
    specs = {variant.spec for variant in variants(86)}
    for compiled in COMPILED:
        for K, N in MODEL_SHAPES:
            layout = dataclasses.replace(compiled, K=K, num_rows=N)
            for T in (1, 3, 8, 9, 17, 64):
                configs = [choose_config(layout, T, 86, sms) for sms in (1, 28, 82, 128)]
                assert {linear_spec(config, layout, 86) for config in configs} <= specs
