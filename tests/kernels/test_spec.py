"""Kernel specs before compilation: flattening, digests, options and limits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from exl.errors import KernelError
from exl.kernels.spec import KernelSpec, digest, flatten, flattened, kernel_folder, nvrtc_options
from exl.layout.arch import ARCH_LIMITS, arch_limits


@pytest.fixture
def folder(tmp_path):
    include = tmp_path / "include" / "exl"
    include.mkdir(parents=True)
    return tmp_path


def write(folder, name, text):
    path = folder / ("include/exl" if name.endswith(".cuh") else ".") / name
    path.write_text(text)


def flat(folder, name="a.cu"):
    return flatten(name, folder, folder / "include")


def test_headers_are_joined_once_with_their_own_lines(folder):
    write(folder, "one.cuh", "#pragma once\n#include <exl/two.cuh>\nint one;\n")
    write(folder, "two.cuh", "#pragma once\nint two;\n")
    write(
        folder, "a.cu", "// a\n#include <exl/one.cuh>\n#include <exl/two.cuh>  // again\n#include <other.h>\nint a;\n"
    )
    assert flat(folder).splitlines() == [
        '#line 1 "a.cu"',
        "// a",
        '#line 1 "exl/one.cuh"',
        "",
        '#line 1 "exl/two.cuh"',
        "",
        "int two;",
        '#line 3 "exl/one.cuh"',
        "int one;",
        '#line 3 "a.cu"',
        '#line 4 "a.cu"',
        "#include <other.h>",
        "int a;",
    ]


def test_a_compiler_reports_the_line_that_was_written(folder):
    write(folder, "one.cuh", "#pragma once\n\nint one = bad_in_header;\n")
    write(folder, "a.cu", "#include <exl/one.cuh>\n\n\nint a = bad_in_source;\n")
    done = subprocess.run(
        ["g++", "-x", "c++", "-c", "-o", "/dev/null", "-"], input=flat(folder), capture_output=True, text=True
    )
    assert "exl/one.cuh:3:" in done.stderr
    assert "a.cu:4:" in done.stderr


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, r"exl/one.cuh, included from a.cu, cannot be read"),
        ("#include <exl/one.cuh>\n", r"cycle of includes: a.cu -> exl/one.cuh -> exl/one.cuh"),
        ("#if X\n#include <exl/two.cuh>\n#endif\n", r"exl/one.cuh:2: exl/two.cuh is included inside of #if"),
    ],
)
def test_bad_includes(folder, header, message):
    write(folder, "a.cu", "#include <exl/one.cuh>\n")
    if header is not None:
        write(folder, "one.cuh", header)
    with pytest.raises(KernelError, match=message):
        flat(folder)


def test_a_longer_cycle(folder):
    write(folder, "one.cuh", "#include <exl/two.cuh>\n")
    write(folder, "two.cuh", "#include <exl/one.cuh>\n")
    write(folder, "a.cu", "#include <exl/one.cuh>\n")
    with pytest.raises(KernelError, match=r"a.cu -> exl/one.cuh -> exl/two.cuh -> exl/one.cuh"):
        flat(folder)


def test_missing_source():
    with pytest.raises(KernelError, match=r"no_such.cu, cannot be read"):
        flatten("no_such.cu")


def test_changed_files_are_read_again(folder):
    write(folder, "a.cu", "#include <exl/half.cuh>\nint a;\n")
    spec = KernelSpec("a.cu", "f", {}, 86)
    first = flattened(spec, folder)
    assert first is flattened(spec, folder)
    write(folder, "a.cu", "#include <exl/half.cuh>\nint changed;\n")
    assert "int changed;" in flattened(spec, folder)


def test_the_kernel_folder_is_found_and_whole():
    assert (kernel_folder() / "include" / "exl" / "platform.cuh").is_file()
    assert not list(kernel_folder().rglob("__init__.py")), "it would shadow NVIDIA's package `cuda`"


def test_equal_specs_are_equal():
    a = KernelSpec("a.cu", "f", {"EXL_B": 1, "EXL_A": True}, 86)
    b = KernelSpec("a.cu", "f", (("EXL_A", 1), ("EXL_B", 1)), 86)
    assert a == b
    assert hash(a) == hash(b)
    assert a.defines() == ("-DEXL_A=1", "-DEXL_B=1")
    assert str(a) == "f[EXL_A=1 EXL_B=1] sm_86"


@pytest.mark.parametrize(
    ("entry", "macros", "message"),
    [
        ("f(", {}, "not a C identifier"),
        ("f", {"BITS": 4}, "expected a name like EXL_BITS"),
        ("f", {"EXL_A": 1.5}, "expected an integer or a word"),
        ("f", {"EXL_A": "1 -DEXL_B"}, "expected an integer or a word"),
        ("f", (("EXL_A", 1), ("EXL_A", 2)), "names a macro twice"),
    ],
)
def test_bad_specs(entry, macros, message):
    with pytest.raises(KernelError, match=message):
        KernelSpec("a.cu", entry, macros, 86)


def test_every_byte_that_matters_changes_the_digest():
    spec = KernelSpec("a.cu", "f", {"EXL_A": 1}, 86)
    parts = ("text", nvrtc_options(spec), "nvrtc 12.9")
    others = [
        ("text ", parts[1], parts[2]),
        ("text", parts[1], "nvrtc 13.0"),
        ("text", nvrtc_options(dataclasses.replace(spec, arch=80)), parts[2]),
        ("text", nvrtc_options(dataclasses.replace(spec, macros={"EXL_A": 2})), parts[2]),
        ("text", nvrtc_options(spec, real=False), parts[2]),
        ("text", (*parts[1][:-1], "-DEXL_", "A=1"), parts[2]),  # the same bytes, split into other options
    ]
    digests = {digest(*parts), *(digest(*other) for other in others)}
    assert len(digests) == 1 + len(others)
    assert digest(*parts) == digest(*parts)
    assert len(digest(*parts)) == 64


def test_options():
    options = nvrtc_options(KernelSpec("a.cu", "f", {"EXL_A": 1}, 90))
    assert "--gpu-architecture=sm_90" in options
    assert "--fmad=false" in options
    assert not any("fast" in option or "ftz" in option for option in options)
    assert "--gpu-architecture=compute_90" in nvrtc_options(KernelSpec("a.cu", "f", {}, 90), real=False)


def test_limits_of_architectures():
    """Shared memory per block in KiB, from the CUDA C++ Programming Guide's table."""
    known = {61: 48, 70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
    assert {arch: ARCH_LIMITS[arch].max_shared_bytes // 1024 for arch in known} == known
    assert arch_limits(122).max_shared_bytes == 99 * 1024  # unknown architecture: the smallest of its generation
    assert arch_limits(88).max_shared_bytes == 99 * 1024
    assert arch_limits(200).max_shared_bytes == 99 * 1024
    with pytest.raises(KernelError, match=r"compute capability 5.2 is not supported"):
        arch_limits(52)


def test_specs_need_neither_torch_nor_cupy():
    code = "import exl.kernels.compiler, sys; print('torch' in sys.modules, 'cupy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
