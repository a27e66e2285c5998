"""Instructions that the inner loop of the 4-bit kernels issues per 512-byte tile, from the machine code.

The limits at 1, 8 and 64 tokens come from a hand-written sketch of the same loop. All instructions in the loop count,
also predicated ones; activations are staged outside of it, in chunks. ``docs/kernels.md`` has the table.
"""

from __future__ import annotations

import pytest

from exl.kernels.linear import linear_spec
from exl.kernels.spec import flattened, nvrtc_options
from exl.layout.linear_config import choose_config
from exl.layout.tiles import BLOCK, TileLayout
from tests.compile.nvrtc import nvrtc
from tests.compile.sass import Loop, disassemble, hottest_loop, nvdisasm_path

ARCHS = (86, 89, 90)
MULTIPROCESSORS = {86: 82, 89: 128, 90: 132}  # RTX 3090, RTX 4090, H100 SXM
LAYOUT = TileLayout(4, 4096, 4096, 128, False)


def inner_loop(num_tokens: int, arch: int, layout: TileLayout = LAYOUT) -> tuple[Loop, int]:
    """The loop of the variant that the GPU would run, and the number of 16 x 64 tiles per pass of it."""
    compiler = nvrtc()
    if compiler is None or nvdisasm_path() is None:
        pytest.skip("NVRTC or nvdisasm is not installed")
    config = choose_config(layout, num_tokens, arch, MULTIPROCESSORS[arch])
    spec = linear_spec(config, layout, arch)
    code, _ = compiler.compile(flattened(spec), spec.source, nvrtc_options(spec))
    loop = hottest_loop(disassemble(code), spec.entry)
    num_tiles = config.ring_stages * config.row_tiles * layout.stage_inputs // BLOCK
    assert loop.count("HMMA") == num_tiles * 4 * config.token_tiles  # it is the whole main loop and nothing else
    return loop, num_tiles


@pytest.mark.sample(3)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("num_tokens", "most"), [(1, 60), (8, 60), (16, 68), (64, 106)])
def test_instructions_a_tile(num_tokens: int, most: int, arch: int) -> None:
    loop, num_tiles = inner_loop(num_tokens, arch)
    assert len(loop) / num_tiles <= most, dict(loop.histogram())


@pytest.mark.sample(5)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("K", "N"), [(4096, 12288), (4096, 22016), (11008, 4096), (8192, 57344), (28672, 8192)])
def test_instructions_a_tile_of_64_tokens_in_models_shapes(K: int, N: int, arch: int) -> None:
    """qkv, gate and up, down of a 7B and a 70B."""
    loop, num_tiles = inner_loop(64, arch, TileLayout(4, K, N, 128, True))
    assert len(loop) / num_tiles <= 106, dict(loop.histogram())


@pytest.mark.parametrize("arch", ARCHS)
def test_no_barrier_and_no_local_memory_in_the_loop(arch: int) -> None:
    for num_tokens in (1, 16, 64):
        loop, num_tiles = inner_loop(num_tokens, arch)
        assert loop.count("BAR", "LDL", "STL", "I2F", "MUFU", "CALL.ABS") == 0
        assert loop.count("LDG.E") == 0  # no load that the same stage must wait for
        # One 16-byte copy per lane and tile; one more per stage for scales and zero points, for any number of row tiles
        config = choose_config(LAYOUT, num_tokens, arch, MULTIPROCESSORS[arch])
        assert loop.count("LDGSTS") == num_tiles + config.ring_stages
