"""NVRTC compiles every kernel for every architecture, without a GPU, and no kernel takes more than its budget."""

from __future__ import annotations

import hashlib

import pytest

from exl.errors import KernelError
from exl.kernels.compiler import CompileFailed, compile_cached
from exl.kernels.spec import KernelSpec, Variant, flattened, nvrtc_options
from exl.kernels.variants import ARCHS, variants
from exl.layout.arch import arch_limits
from tests.host.backends import TEST_KERNELS

from . import budget
from .nvrtc import Nvrtc, nvrtc
from .resources import Resources, measure, measure_all, name_of, parse


@pytest.fixture(scope="module")
def compiler() -> Nvrtc:
    found = nvrtc()
    if found is None:
        pytest.skip("NVRTC is not installed (wheel nvidia-cuda-nvrtc-cu12)")
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("arch", ARCHS)
def test_every_variant_compiles_within_its_budget(compiler, arch):
    assert_within_budget(list(variants(arch)), arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_budget_has_a_row_for_every_variant_and_no_other(arch):
    specs = [variant.spec for variant in variants(arch)]
    assert len(set(specs)) == len(specs), "a variant is listed twice"
    rows = {name for name, by_arch in budget.read().items() if str(arch) in by_arch}
    assert rows == {name_of(spec) for spec in specs}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_sample_of_every_kernel_compiles_within_its_budget(compiler, arch, request):
    """Every eighth variant, at least one per source, drawn by --sample: one minute instead of ten."""
    seed = request.config.getoption("--sample") or "none"

    def place(variant: Variant) -> bytes:
        return hashlib.sha256(f"{seed} {variant.spec}".encode()).digest()

    declared = sorted(variants(arch), key=place)
    of_source = {variant.spec.source: variant for variant in reversed(declared)}
    sample = {*declared[: -(-len(declared) // 8)], *of_source.values()}
    assert_within_budget([variant for variant in declared if variant in sample], arch)


def assert_within_budget(declared: list[Variant], arch: int) -> None:
    table: budget.Table = {}
    for variant, resources in zip(declared, measure_all([variant.spec for variant in declared]), strict=True):
        assert variant.spec.arch == arch
        table.setdefault(name_of(variant.spec), {})[str(arch)] = resources
        assert variant.may_spill or resources.spilled_bytes == 0, f"{variant.spec} spills {resources}"
        assert resources.static_shared_bytes == 0, f"{variant.spec} uses static shared memory"
        assert resources.registers <= arch_limits(arch).max_registers_per_thread
    allowed = {name: {a: row for a, row in rows.items() if a == str(arch)} for name, rows in budget.read().items()}
    allowed = {name: rows for name, rows in allowed.items() if name in table}
    assert budget.over(table, allowed) == []


def test_budget_reports_every_excess():
    row, more = Resources(40, 0, 0, 0), Resources(41, 8, 0, 0)
    assert budget.over({"k": {"86": row}}, {"k": {"86": row}}) == []
    assert budget.over({"k": {"86": row}}, {"k": {"86": more}}) == []
    assert budget.over({"k": {"86": more}}, {"k": {"86": row}}) == [
        "k sm_86: registers 41, budget 40",
        "k sm_86: stack_bytes 8, budget 0",
    ]
    assert budget.over({"k": {"86": row}}, {}) == ["k sm_86 is not in the budget file"]
    assert budget.over({}, {"k": {"86": row}}) == ["k sm_86 is no longer a variant"]


def test_resources_are_read_from_the_log(compiler):
    """Checked on kernels of known needs: one that must spill, one with static shared memory, one with neither."""
    specs = {entry: KernelSpec("resources.cu", entry, {}, 86) for entry in ("plain", "spilling", "with_static_shared")}
    found = {entry: measure(spec, compiler, TEST_KERNELS) for entry, spec in specs.items()}
    assert found["plain"].spilled_bytes == found["plain"].stack_bytes == found["plain"].static_shared_bytes == 0
    assert found["plain"].registers < 32
    assert found["spilling"].spilled_bytes > 0
    assert found["spilling"].registers <= 64
    assert found["with_static_shared"].static_shared_bytes == 1024
    with pytest.raises(ValueError, match="no resource usage of absent"):
        parse("ptxas info : Used 8 registers", "absent")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_wrapper_of_ptx_compiles(compiler, arch):
    spec = KernelSpec("instructions.cu", "every_instruction", {}, arch)
    code, _ = compiler.compile(flattened(spec, TEST_KERNELS), spec.source, nvrtc_options(spec))
    assert code.startswith(b"\x7fELF")


def test_an_error_names_the_file_and_line_that_a_person_wrote(compiler, tmp_path):
    (tmp_path / "broken.cu").write_text(
        "#include <exl/half.cuh>\nEXL_KERNEL(broken, 32, 1)(float* y) {\n  y[0] = undeclared_name;\n}\n"
    )
    spec = KernelSpec("broken.cu", "broken", {}, 86)
    with pytest.raises(KernelError) as caught:
        compile_cached(spec, compiler, tmp_path / "cache", tmp_path)
    text = str(caught.value)
    assert "broken.cu(3): error" in text
    assert "undeclared_name" in text
    source = next((tmp_path / "cache").glob("broken-*.cu"))
    assert str(source) in text
    assert "undeclared_name" in source.read_text()


def test_options_are_passed_on(compiler):
    spec = KernelSpec("instructions.cu", "every_instruction", {}, 86)
    with pytest.raises(CompileFailed, match="unrecognized option"):
        compiler.compile(flattened(spec, TEST_KERNELS), spec.source, (*nvrtc_options(spec), "--no-such-option"))
