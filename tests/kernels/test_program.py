"""Programs: a wrapper's launches, recorded once and started with other addresses; what makes two programs different."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from exl.errors import KernelError
from exl.kernels.args import f32, i32, i64, ptr, u64
from exl.kernels.gated_product import gated_product
from exl.kernels.launch import launch
from exl.kernels.params import Bindings, Params, Varying
from exl.kernels.program import Program, Programs, Recorder, place
from exl.kernels.spec import KernelSpec
from tests.host.backends import TEST_KERNELS, make_backend


@pytest.fixture
def small():
    return make_backend("race", 90, TEST_KERNELS)


# ---- arguments in memory ---------------------------------------------------------------------------------------------


def test_packed_arguments_read_back():
    x = torch.zeros(3, 5, dtype=torch.float16)
    args = [ptr(x), i32(-7), ptr(None), f32(0.1), u64(2**63 + 1), i64(-(2**40))]
    found = Params(args).read()
    assert [(arg.dtype, getattr(arg, "num_bytes", None)) for arg in found] == [
        ("f16", 30), ("i32", None), ("null", 0), ("f32", None), ("u64", None), ("i64", None)
    ]  # fmt: skip
    assert found[0].address == x.data_ptr()
    assert [arg.value for arg in found if hasattr(arg, "value")] == [-7, float(np.float32(0.1)), 2**63 + 1, -(2**40)]
    assert found[0].owner is None  # a program keeps no buffer alive
    assert Params([]).read() == ()


def test_pointers_into_a_bound_tensor_follow_it():
    """Pointers to its start, to a row in its middle, and to a part viewed as another type; unbound pointers stay."""
    old, new, other = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4)
    varying = Varying(Bindings([None, old]))
    params = Params([ptr(old), ptr(old[2]), ptr(other), ptr(old.view(torch.int32)[3]), ptr(None)], varying)
    for tensor in (old, new, old):
        varying.set(Bindings([None, tensor]))
        start = tensor.data_ptr()
        assert [arg.address for arg in params.read()] == [start, start + 64, other.data_ptr(), start + 96, 0]


# ---- what makes two sets of tensors exchangeable ---------------------------------------------------------------------

MEMORY = torch.zeros(4096, dtype=torch.uint8)
HALVES = MEMORY[: 2 * 64].view(torch.float16).view(8, 8)


@pytest.mark.parametrize(
    "other",
    [
        HALVES.view(4, 16),
        HALVES[:7],
        HALVES.t(),
        MEMORY[: 2 * 128].view(torch.float16).view(8, 16)[:, :8],
        HALVES.view(torch.bfloat16),
        HALVES.view(torch.int16),
        MEMORY[2 : 2 + 2 * 64].view(torch.float16).view(8, 8),  # with another alignment
        None,
    ],
)
def test_tensors_that_differ_in_more_than_their_address(other):
    """Most of them have the same address as the first one."""
    assert Bindings([HALVES]).structure != Bindings([other]).structure
    assert other is None or place(HALVES) != place(other)


def test_tensors_that_differ_in_their_address_alone():
    moved = MEMORY[1024 : 1024 + 128].view(torch.float16).view(8, 8)
    assert Bindings([HALVES]).structure == Bindings([moved]).structure
    assert Bindings([HALVES], "x").structure != Bindings([moved], "y").structure
    assert Bindings([HALVES, None]).structure != Bindings([None, HALVES]).structure


def test_tensors_that_overlap_are_exchanged_for_nothing():
    """An address inside both is ambiguous: q and k may share a norm in one layer and not in the next."""
    a, b = MEMORY[:256], MEMORY[256:512]
    same, apart, inside = Bindings([a, a]), Bindings([a, b]), Bindings([MEMORY[:512], b])
    assert len({same.structure, apart.structure, inside.structure, Bindings([b, b]).structure}) == 4
    assert apart.structure == Bindings([b, a]).structure


# ---- programs --------------------------------------------------------------------------------------------------------


def scale(backend, x: torch.Tensor, y: torch.Tensor, factor: float) -> None:
    function = backend.load(KernelSpec("gpu.cu", "scale_halves", {}, backend.arch))
    launch(function, (-(-x.numel() // 128),), (128,), [ptr(x), ptr(y), i32(x.numel()), f32(factor)])


def test_a_program_runs_with_the_tensors_of_its_turn(small):
    programs, y = Programs(small), torch.zeros(100)
    inputs = [torch.randn(100).half() for _ in range(3)]
    bound = [programs.bind([x]) for x in inputs]
    for x, bindings in [*zip(inputs, bound, strict=True)] * 2:
        programs.run(("scale", place(y)), bindings, lambda backend, x=x: scale(backend, x, y, 2.0))
        assert torch.equal(y, x.float() * 2)
    assert programs.num_recorded == 1


def test_memory_that_is_used_again_is_no_stale_launch(small):
    """The same addresses with another shape, type and number of tensors: each has its own program."""
    programs, out = Programs(small), torch.zeros(256)
    memory = torch.arange(256, dtype=torch.float32).half()
    tensors = [memory, memory[:64], memory[64:128]]
    for _ in range(2):
        for x in tensors:
            for factor in (2.0, 3.0):
                for y in (out[: len(x)], out[128 : 128 + len(x)] if len(x) <= 128 else out):
                    out.fill_(-1)
                    key = "scale", place(x), place(y), factor
                    programs.run(key, programs.bind([]), lambda backend, x=x, y=y, f=factor: scale(backend, x, y, f))
                    expected = torch.full((256,), -1.0)
                    at = (y.data_ptr() - out.data_ptr()) // 4
                    expected[at : at + len(x)] = x.float() * factor
                    assert torch.equal(out, expected)
    x = memory.view(torch.bfloat16)  # the kernel takes f16
    with pytest.raises(KernelError, match="argument 0 is bf16"):
        programs.run(
            ("scale", place(x), place(out), 2.0), programs.bind([]), lambda backend: scale(backend, x, out, 2.0)
        )


def test_a_tensor_at_the_address_of_one_that_is_gone(small):
    """Keys hold everything that arguments depend on, so a program fits any tensor with the same key."""
    programs, memory, y = Programs(small), np.zeros(256, np.float16), torch.zeros(256)
    for i, size in enumerate([64, 64, 200, 64, 200, 200]):
        x = torch.from_numpy(memory[:size])
        x.fill_(float(i + 1))
        gone = weakref.ref(x)
        y.zero_()
        programs.run((place(x), place(y)), programs.bind([]), lambda backend, x=x: scale(backend, x, y, 1.0))
        assert torch.equal(y, torch.tensor([float(i + 1)] * size + [0.0] * (256 - size)))
        del x
        assert gone() is None  # no program keeps it alive
    assert programs.num_recorded == 2


def test_wrong_arguments_are_refused_before_anything_runs(small):
    programs, y = Programs(small), torch.zeros(64)
    x = torch.ones(64).half()

    def record(backend) -> None:
        scale(backend, x, y, 5.0)
        launch(backend.load(KernelSpec("gpu.cu", "scale_halves", {}, 90)), (0,), (128,), [ptr(x)])

    for _ in range(2):  # it leaves nothing behind
        with pytest.raises(KernelError, match="expected one to three positive sizes"):
            programs.run("key", programs.bind([]), record)
        assert not y.any()
        assert len(programs) == 0


def test_wrappers_check_the_first_tensors_of_each_structure():
    backend = make_backend("race")
    programs, y = Programs(backend), torch.zeros(1, 64)
    gates = [torch.randn(1, 64), torch.randn(1, 64).half(), torch.randn(1, 128)[:, ::2]]
    for gate, message in zip(gates, (None, "up is torch.float32: expected torch.float16", "strides"), strict=True):
        up = torch.randn(1, 64)
        for _ in range(2):
            bindings = programs.bind([gate, up])
            run = lambda backend, gate=gate, up=up: gated_product(backend, gate, up, y)  # noqa: E731
            if message is None:
                programs.run(place(y), bindings, run)
                torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up, rtol=0, atol=1e-6)
            else:
                with pytest.raises(KernelError, match=message):
                    programs.run(place(y), bindings, run)


def test_the_least_recently_used_program_goes(small):
    programs, y = Programs(small, max_programs=3), torch.zeros(64)
    x, nothing = torch.ones(64).half(), programs.bind([])

    def run(factor: float) -> None:
        programs.run(factor, nothing, lambda backend: scale(backend, x, y, factor))
        assert float(y[0]) == factor

    for factor in (1.0, 2.0, 3.0, 1.0, 4.0):  # 2.0 is evicted
        run(factor)
    assert (len(programs), programs.num_recorded) == (3, 4)
    for factor in (1.0, 3.0, 4.0):
        run(factor)
    assert programs.num_recorded == 4
    run(2.0)
    assert (len(programs), programs.num_recorded) == (3, 5)


def test_structures_that_are_forgotten_lend_their_number_to_nobody(small, monkeypatch):
    monkeypatch.setattr("exl.kernels.program.MAX_STRUCTURES", 2)
    programs = Programs(small)
    bound = [programs.bind([torch.zeros(n)]) for n in (1, 2, 3, 4, 1)]
    assert len({bindings.number for bindings in bound}) == 5


def test_calls_keep_their_place_among_launches(small):
    x, y, z = torch.ones(64).half(), torch.zeros(64), torch.zeros(64)
    bindings = Bindings([x])
    program = Program(small, bindings)
    recorder = Recorder(program)
    scale(recorder, x, y, 2.0)
    recorder.call(lambda source, target: target.copy_(source), y, z)
    scale(recorder, x, y, 3.0)
    assert not y.any()
    program.run(bindings)
    assert (float(y[0]), float(z[0])) == (3.0, 2.0)
    with pytest.raises(KernelError, match="given tensor 0 of those that vary"):
        recorder.call(torch.relu_, x[3:])
    with pytest.raises(KernelError, match="no graph can be captured"):
        recorder.capture(lambda: None)
