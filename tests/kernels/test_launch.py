"""From a spec to a launch: the cache of compiled code, typed arguments, the checks before a launch."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch

from exl.errors import KernelError
from exl.kernels.args import Pointer, Scalar, f32, i32, i64, ptr, u32, u64
from exl.kernels.compiler import CompileFailed, compile_cached, default_cache_folder, read_entry
from exl.kernels.launch import Param, launch, matches
from exl.kernels.spec import KernelSpec, flattened
from tests.host.backends import TEST_KERNELS, make_backend

SPEC = KernelSpec("faults.cu", "out_of_bounds", {"EXL_FAULT": 0}, 86)


class FakeCompiler:
    """Returns code that names its input; counts its calls."""

    def __init__(self, known: tuple[int, ...] = (75, 86, 90), error: str | None = None) -> None:
        self.known = known
        self.error = error
        self.calls: list[tuple[str, ...]] = []

    def version(self) -> str:
        return "fake 1.0"

    def archs(self) -> tuple[int, ...]:
        return self.known

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        self.calls.append(options)
        if self.error is not None:
            raise CompileFailed(self.error)
        return f"{name} {' '.join(options)} {len(text)}".encode(), ""


# ---- the cache -------------------------------------------------------------------------------------------------------


def cached(compiler: FakeCompiler, folder, spec: KernelSpec = SPEC) -> bytes:
    return compile_cached(spec, compiler, folder, TEST_KERNELS)


def test_compiles_once(tmp_path):
    compiler = FakeCompiler()
    code = cached(compiler, tmp_path)
    assert code.startswith(b"faults.cu ")
    assert cached(compiler, tmp_path) == code
    assert len(compiler.calls) == 1
    other = KernelSpec(SPEC.source, SPEC.entry, {"EXL_FAULT": 1}, 86)
    assert cached(compiler, tmp_path, other) != code
    assert len(compiler.calls) == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".bin"]  # no temporary file is left


@pytest.mark.parametrize("damage", [b"", b"exlcode1", None, "flip", "cut"])
def test_damaged_files_are_compiled_again(tmp_path, damage):
    compiler = FakeCompiler()
    code = cached(compiler, tmp_path)
    (path,) = tmp_path.glob("*.bin")
    data = path.read_bytes()
    if damage is None:
        path.unlink()
    elif damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(data[:-5])
    else:
        path.write_bytes(damage)
    assert read_entry(path) is None
    assert cached(compiler, tmp_path) == code
    assert len(compiler.calls) == 2
    assert path.read_bytes() == data


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    compiler = FakeCompiler()
    assert cached(compiler, blocked / "cache") == cached(compiler, blocked / "cache")
    assert len(compiler.calls) == 2


def _race(arguments) -> bytes:
    folder, barrier_file = arguments
    while not barrier_file.exists():
        pass
    return b"".join(
        cached(FakeCompiler(), folder, KernelSpec(SPEC.source, SPEC.entry, {"EXL_N": n}, 86)) for n in range(40)
    )


def test_processes_may_start_at_once(tmp_path):
    folder, start = tmp_path / "cache", tmp_path / "start"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.map_async(_race, [(folder, start)] * 3, chunksize=1)
        start.touch()
        found = results.get(60)
    assert len(set(found)) == 1
    entries = list(folder.iterdir())
    assert len(entries) == 40
    assert all(read_entry(path) is not None for path in entries)


def test_failure_carries_the_log_and_the_place_of_the_source(tmp_path):
    log = "\n".join(f"faults.cu({i}): error: no" for i in range(60))
    with pytest.raises(KernelError) as caught:
        cached(FakeCompiler(error=log), tmp_path)
    text = str(caught.value)
    assert str(SPEC) in text
    assert "faults.cu(0): error: no" in text
    assert "20 more lines" in text
    (source,) = tmp_path.glob("*.cu")
    assert str(source) in text
    assert source.read_text() == flattened(SPEC, TEST_KERNELS)
    assert source.with_suffix(".log").read_text() == log
    assert not list(tmp_path.glob("*.bin"))


def test_architectures_that_the_compiler_does_not_know(tmp_path):
    compiler = FakeCompiler()
    cached(compiler, tmp_path, KernelSpec(SPEC.source, SPEC.entry, {}, 103))
    assert "--gpu-architecture=compute_90" in compiler.calls[0]  # PTX: the driver translates it
    with pytest.raises(KernelError, match=r"fake 1.0 cannot compile for compute capability 6.1"):
        cached(compiler, tmp_path, KernelSpec(SPEC.source, SPEC.entry, {}, 61))


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "exl" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder().parts[-3:] == (".cache", "exl", "kernels")


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_pointers_know_their_extent():
    x = torch.zeros(10, 8, dtype=torch.float16)
    assert ptr(x) == Pointer(x.data_ptr(), 160, "f16", "cpu", x)
    view = x[2:4, 1:3]  # strided: the range from its first element to its last
    assert (ptr(view).address, ptr(view).num_bytes) == (x.data_ptr() + 34, (8 + 2) * 2)
    assert ptr(x[:0]).num_bytes == 0
    assert ptr(None) == Pointer(0, 0, "null", "any")
    a = np.zeros((4, 6), np.uint32)[1:, ::2]
    assert (ptr(a).address, ptr(a).num_bytes, ptr(a).dtype) == (a.ctypes.data, (2 * 6 + 4 + 1) * 4, "u32")
    assert ptr(torch.zeros(2, dtype=torch.bfloat16)).dtype == "bf16"


def test_scalars_are_packed_by_their_stated_type():
    assert i32(-2).pack() == (-2).to_bytes(4, "little", signed=True)
    assert u32(2**32 - 1).pack() == b"\xff" * 4
    assert i64(-1).pack() == b"\xff" * 8
    assert u64(2**63).pack() == (2**63).to_bytes(8, "little")
    assert f32(0.1).pack() == np.float32(0.1).tobytes()
    assert i32(np.int64(7)) == Scalar(7, "i32")


@pytest.mark.parametrize(
    "make",
    [
        lambda: i32(2**31),
        lambda: u32(-1),
        lambda: i32(1.0),
        lambda: i32(True),
        lambda: f32("x"),
        lambda: ptr([1, 2]),
        lambda: ptr(torch.zeros(2, dtype=torch.complex64)),
        lambda: ptr(np.zeros(3, np.complex64)),
        lambda: ptr(np.zeros(3, np.float32)[::-1]),
        lambda: ptr(np.zeros(3, ">f4")),
    ],
)
def test_arguments_that_no_kernel_takes(make):
    with pytest.raises(KernelError):
        make()


@pytest.mark.parametrize(
    ("param", "arg", "fits"),
    [
        (Param("p", 8, "f16", 2), ptr(torch.zeros(1, dtype=torch.float16)), True),
        (Param("p", 8, "f16", 2), ptr(torch.zeros(1, dtype=torch.bfloat16)), False),
        (Param("p", 8, "f16", 2), ptr(torch.zeros(1, dtype=torch.uint8)), True),  # packed bytes
        (Param("p", 8, "u32", 4), ptr(torch.zeros(1, dtype=torch.int32)), True),
        (Param("p", 8, "u32", 4), ptr(torch.zeros(1)), False),
        (Param("p", 8, "i32", 4), ptr(torch.zeros(1, dtype=torch.int64)), False),
        (Param("p", 8, "void"), ptr(torch.zeros(1)), True),
        (Param("p", 8, "f32", 4), ptr(None), True),
        (Param("p", 8, "f32", 4), u64(0), False),
        (Param("i", 4), i32(1), True),
        (Param("i", 4), i64(1), False),
        (Param("i", 4), u32(1), False),
        (Param("f", 4), f32(1), True),
        (Param("f", 4), i32(1), False),
        (Param("u", 8), u64(1), True),
        (Param("i", 4), ptr(None), False),
    ],
)
def test_arguments_against_parameters(param, arg, fits):
    assert matches(param, arg) is fits


# ---- launching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def function():
    return make_backend("race", 86, TEST_KERNELS).load(SPEC)


@pytest.fixture
def args():
    return [ptr(torch.zeros(64)), ptr(torch.zeros(64))]


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((0,), (64,), 256, "expected one to three positive sizes"),
        ((1, 1, 1, 1), (64,), 256, "expected one to three positive sizes"),
        ((1.0,), (64,), 256, "expected one to three positive sizes"),
        ((1, 65536), (64,), 256, "grid .* is larger"),
        ((1,), (1, 1, 65), 256, "block .* is larger"),
        ((1,), (64, 17), 256, "1088 threads a block"),
        ((1,), (65,), 256, "larger than the 64 declared"),
        ((1,), (64,), -1, "bytes of shared memory"),
        ((1,), (64,), 99 * 1024 + 1, "bytes of shared memory a block, sm_86 has 101376"),
    ],
)
def test_geometry_is_checked_before_a_launch(function, args, grid, block, shared, message):
    with pytest.raises(KernelError, match=message):
        launch(function, grid, block, args, shared)


def test_arguments_are_checked_before_a_launch(function, args):
    with pytest.raises(KernelError, match="takes 2 arguments, 1 given"):
        launch(function, (1,), (64,), args[:1], 256)
    with pytest.raises(KernelError, match=r"argument 1 is f16, the kernel's parameter is f32\*"):
        launch(function, (1,), (64,), [args[0], ptr(torch.zeros(64, dtype=torch.float16))], 256)
    with pytest.raises(KernelError, match="argument 0 is a bare int: say ptr"):
        launch(function, (1,), (64,), [args[0].address, args[1]], 256)
    with pytest.raises(KernelError, match="argument 0 is on cuda:0, the kernel runs on cpu"):
        launch(function, (1,), (64,), [Pointer(64, 256, "f32", "cuda:0"), args[1]], 256)


def test_a_backend_loads_a_kernel_once():
    backend = make_backend("race", 86, TEST_KERNELS)
    same = KernelSpec("faults.cu", "out_of_bounds", (("EXL_FAULT", 0),), 86)
    assert backend.load(SPEC) is backend.load(same)
