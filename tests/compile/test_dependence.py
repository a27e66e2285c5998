"""Before the wait of a dependent launch a kernel only reads, and only the model's constants. It never reads anything
else through the read-only path. Checked in the PTX and the machine code of both NVRTCs."""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from exl.kernels.spec import KernelSpec, flattened, kernel_folder
from exl.kernels.variants import variants
from tests.host.backends import TEST_KERNELS

from .dependence import CONSTANTS, find_faults, parameters, waits
from .nvrtc import WHEELS, nvrtc
from .ptx_flow import read_ptx
from .resources import NUM_PROCESSES
from .sass import nvdisasm_path
from .sass_flow import read_sass

ARCHS, COMPILERS = (90, 120), (12, 13)  # these give different kinds of machine code
PLANTED = {
    "all_right": None,
    "restricted": "reads x as constant",
    "read_as_constant": "reads x as constant",
    "either_as_constant": "reads x as constant",
    "kept_address": "reads (x|an unknown address) before the wait",
    "read_early": "reads x before the wait",
    "copied_early": "reads x before the wait",
    "wait_on_one_way": "reads x before the wait",
    "written_early": "writes y before the wait",
    "ended_early": "ends without a wait",
}


@pytest.fixture(scope="module", autouse=True)
def tools():
    missing = [WHEELS[version] for version in COMPILERS if nvrtc(version) is None]
    if nvdisasm_path() is None:
        missing.append("nvidia-cuda-nvdisasm")
    if missing:
        pytest.skip(f"needs the wheels {', '.join(missing)}")


def specs(arch: int) -> list[KernelSpec]:
    return [variant.spec for variant in variants(arch) if waits(variant.spec)]


def found(jobs: list[tuple[KernelSpec, int]]) -> list[str]:
    with ProcessPoolExecutor(NUM_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(_find, *zip(*jobs, strict=True), chunksize=2))
    return [
        f"{spec}, NVRTC {version}: {fault}"
        for (spec, version), faults in zip(jobs, results, strict=True)
        for fault in faults
    ]


def _find(spec: KernelSpec, version: int) -> list[str]:
    return find_faults(spec, nvrtc(version))


def test_one_variant_of_every_kernel():
    """sm_90 by one compiler, sm_120 by the other; tests marked ``matrix`` cover the rest."""
    jobs = []
    for arch, version in zip(ARCHS, COMPILERS, strict=True):
        first = {spec.entry: spec for spec in reversed(specs(arch))}
        assert {"linear_q", "linear_q_wide", "attention_decode", "sample_top", "sample_draw", "embed"} <= set(first)
        jobs += [(spec, version) for spec in first.values()]
    faults = found(jobs)
    assert faults == []


@pytest.mark.matrix
@pytest.mark.parametrize("version", COMPILERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_variant(arch, version):
    faults = found([(spec, version) for spec in specs(arch)])
    assert faults == []


@pytest.mark.parametrize(
    ("arch", "version"),
    [
        (90, 12),
        (120, 13),
        pytest.param(90, 13, marks=pytest.mark.matrix),
        pytest.param(120, 12, marks=pytest.mark.matrix),
    ],
)
@pytest.mark.parametrize("entry", PLANTED)
def test_planted_faults_are_found_at_both_levels(entry, arch, version):
    faults = find_faults(KernelSpec("dependent.cu", entry, {}, arch), nvrtc(version), TEST_KERNELS)
    expected = PLANTED[entry]
    if expected is None:
        assert faults == []
        return
    for level in ("PTX", "SASS"):
        assert any(re.match(f"{level}: {expected}", fault) for fault in faults), faults
    unexpected = [fault for fault in faults if not re.search(expected, fault)]
    if entry not in ("wait_on_one_way",):  # this one also writes, and may end without a wait
        assert unexpected == []


def test_constants_are_parameters_of_kernels():
    """Each name in CONSTANTS must be a kernel's parameter: a stale one would let a new buffer of that name pass."""
    named = set()
    for path in sorted(Path(kernel_folder()).glob("*.cu")):
        text = path.read_text()
        for entry in re.findall(r"EXL_KERNEL\((\w+),", text):
            named |= {parameter.name for parameter in parameters(text, entry) if parameter.is_pointer}
    assert named >= CONSTANTS


def test_parameters_of_a_kernel():
    text = flattened(KernelSpec("dependent.cu", "all_right", {}, 90), TEST_KERNELS)
    found = [(p.name, p.offset, p.is_pointer) for p in parameters(text, "all_right")]
    assert found == [
        *(("w", 0, True), ("x", 8, True), ("ids", 16, True), ("y", 24, True)),
        *(("stride", 32, False), ("n", 40, False)),
    ]


def test_what_is_not_known_is_refused():
    head = '\t.section\t.text.f,"ax",@progbits\n.text.f:\n'
    for line, complaint in (
        ("UBLKCP [UR4], [UR6], UR8", "an access to memory that is not known"),
        ("BRX R4 -0x10", "a branch without known targets"),
        ("BSYNC B0", "a barrier that no instruction has set"),
        ("JMX R2", "a way that is not followed"),
    ):
        with pytest.raises(ValueError, match=complaint):
            read_sass(f"{head}        /*0000*/                   {line} ;\n", "f", {})
    ptx = ".visible .entry f(\n)\n{\n\tcp.reduce.async.bulk.global [%rd1], [%r1], 4;\n\tret;\n}\n"
    with pytest.raises(ValueError, match="an access to memory that is not known"):
        read_ptx(ptx, "f", {})


def test_ways_are_joined_in_machine_code():
    """A branch around the wait, an address that depends on a branch, a predicated copy of an address."""
    lines = [
        "LDC.64 R2, c[0x0][0x210]",
        "ULDC.64 UR4, c[0x0][0x218]",
        "@P0 IMAD.U32 R2, RZ, RZ, UR4",
        "LDG.E R4, desc[UR6][R2.64]",
        "@P1 ACQBULK",
        "LDG.E.CONSTANT R4, desc[UR6][R4.64]",
        "ACQBULK",
        "LDG.E R6, desc[UR6][R2.64+0x10]",
        "EXIT",
    ]
    body = "".join(f"        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(lines))
    found = read_sass('\t.section\t.text.f,"ax",@progbits\n.text.f:\n' + body, "f", {0x210: "w", 0x218: "x"})
    assert [(kind, sorted(origins), early) for _, kind, origins, early in found] == [
        ("read", ["w", "x"], True),
        ("read-only read", [], True),  # an address loaded from memory: unknown
        ("read", ["w", "x"], False),
        ("exit", [], False),
    ]
