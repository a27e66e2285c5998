"""Loops are found in machine code, and counted."""

from __future__ import annotations

import pytest

from exl.kernels.spec import KernelSpec, flattened, nvrtc_options
from tests.host.backends import TEST_KERNELS

from .nvrtc import nvrtc
from .sass import between, disassemble, hottest_loop, loops, nvdisasm_path

LISTING = """\
\t.section\t.text.f,"ax",@progbits
\t.sectionflags\t@"SHF_BARRIERS=1"
.text.f:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/              @!P2 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
.L_x_4:
\t.section\t.text.g,"ax",@progbits
.text.g:
        /*0000*/                   EXIT ;
"""


def test_innermost_loop_of_a_listing():
    (inner,) = loops(LISTING, "f")
    assert [i.address for i in inner.instructions] == [0x20, 0x30, 0x40, 0x50]
    assert len(inner) == 4
    assert inner.count("HMMA") == 2
    assert inner.instructions[1].predicate == "@!P0"
    assert inner.histogram() == {"HMMA": 2, "BRA": 2}
    assert hottest_loop(LISTING, "f") == inner
    assert between(LISTING, "f", 0x10, 0x40).count("HMMA", "IADD3") == 2
    assert loops(LISTING, "g") == []
    with pytest.raises(ValueError, match="no kernel h"):
        loops(LISTING, "h")
    with pytest.raises(ValueError, match="no loop of f holds LDSM"):
        hottest_loop(LISTING, "f", "LDSM")


@pytest.mark.parametrize(("arch", "per_pass"), [(75, 4), (80, 2), (86, 2), (90, 2), (120, 2)])
def test_hottest_loop_of_a_kernel(arch, per_pass):
    compiler = nvrtc()
    if compiler is None or nvdisasm_path() is None:
        pytest.skip("needs the wheels nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvdisasm")
    spec = KernelSpec("resources.cu", "mma_loop", {}, arch)
    cubin, _ = compiler.compile(flattened(spec, TEST_KERNELS), spec.source, nvrtc_options(spec))
    listing = disassemble(cubin)
    loop = hottest_loop(listing, "mma_loop")
    assert loop.count("HMMA") == per_pass  # an mma of sm_75 has half the depth
    assert loop.count("LDG") == 1
    assert len(loops(listing, "mma_loop")) == 2
    with pytest.raises(RuntimeError, match="invalid ELF"):
        disassemble(cubin[:-1])
