"""The shim stops each planted fault, names it and its place, and passes the same kernel without it."""

from __future__ import annotations

import pytest
import torch

from exl.errors import KernelError
from exl.kernels.args import i32, ptr
from exl.kernels.launch import launch
from exl.kernels.spec import KernelSpec
from tests.host.backends import TEST_KERNELS, make_backend

SHARED = 256  # bytes of 64 floats


def run(
    mode: str, entry: str, fault: int, args, block: int = 64, shared: int = SHARED, arch: int = 86, dependent=False
):
    spec = KernelSpec("faults.cu", entry, {"EXL_FAULT": fault}, arch)
    function = make_backend(mode, arch, TEST_KERNELS).load(spec)
    launch(function, (1,), (block,), args, shared, dependent=dependent)


def message(mode: str, entry: str, fault: int, args, **options) -> str:
    with pytest.raises(KernelError) as caught:
        run(mode, entry, fault, args, **options)
    return str(caught.value)


def buffers(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(64), torch.zeros(count)


def line_of(entry: str, text: str) -> int:
    """Line of the first occurrence of ``text`` in the body of ``entry``."""
    lines = (TEST_KERNELS / "faults.cu").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f"EXL_KERNEL({entry}," in line)
    return next(i for i in range(start, len(lines)) if text in lines[i]) + 1


INDEX = torch.arange(64)
OBJECTS = 64 * (24 + 16 + 4 + 2)
# entry, block, shared bytes, expected y of the fault-free twin
TWINS = [
    ("removed_barrier", 64, SHARED, lambda x: x[INDEX ^ 32]),
    ("missing_barrier", 64, SHARED, lambda x: x[INDEX ^ 32]),
    ("missing_syncwarp", 64, SHARED, lambda x: x[INDEX ^ 1]),
    ("partial_syncwarp", 64, SHARED, lambda x: x[INDEX ^ 2]),
    ("wait_count", 16, 2 * SHARED, lambda x: x),
    ("changing_source", 16, SHARED, lambda x: x),
    ("out_of_bounds", 64, SHARED, lambda x: x),
    ("vector_tail", 64, 0, lambda x: x),
    ("divergent_barrier", 64, 0, lambda x: x),
    ("never_written", 64, SHARED, lambda x: x),
    ("collective_sites", 64, 0, lambda x: x[INDEX ^ 1]),
    ("const_write", 64, 0, lambda x: x),
    ("exchanged_objects", 64, OBJECTS, lambda x: x[INDEX ^ 32]),
    ("wild_pointer", 64, 0, lambda x: x),
]


@pytest.mark.parametrize("mode", ["race", "asan", "plain"])
@pytest.mark.parametrize(("entry", "block", "shared", "expected"), TWINS, ids=[twin[0] for twin in TWINS])
def test_fault_free_twin_passes(mode, entry, block, shared, expected):
    x, y = buffers()
    for _ in range(3):  # three seeds
        run(mode, entry, 0, [ptr(x), ptr(y)], block=block, shared=shared)
        assert torch.equal(y, expected(x))


def test_removed_barrier_is_reported_though_the_values_are_right():
    x, y = buffers()
    text = message("race", "removed_barrier", 1, [ptr(x), ptr(y)])
    assert "race on shared memory: " in text
    assert "no __syncthreads between" in text
    assert f"faults.cu:{line_of('removed_barrier', 'y[i] =')}" in text  # the read is named, whichever access came first
    x, y = buffers()
    run("plain", "removed_barrier", 1, [ptr(x), ptr(y)])
    assert torch.equal(y, x[INDEX ^ 32])  # the values are right, so they cannot show the race


def test_missing_barrier():
    x, y = buffers()
    text = message("race", "missing_barrier", 1, [ptr(x), ptr(y)])
    assert "race on shared memory" in text or "never written" in text  # as the order falls


@pytest.mark.parametrize("fault", [1, 2, 3, 4])
def test_accesses_to_objects_of_every_kind_are_seen(fault):
    x, y = buffers()
    text = message("race", "exchanged_objects", fault, [ptr(x), ptr(y)], shared=OBJECTS)
    assert "race on shared memory" in text or "never written" in text
    assert "faults.cu:" in text


@pytest.mark.parametrize("fault", [1, 2, 3])
def test_missing_syncwarp(fault):
    x, y = buffers()
    text = message("race", "missing_syncwarp", fault, [ptr(x), ptr(y)])
    if fault == 2:  # the shuffle makes the values right in the shim, although the memory model does not
        assert "race on shared memory: read after write" in text
        assert "no __syncwarp or __syncthreads between" in text
    else:
        assert "race on shared memory" in text or "never written" in text


def test_syncwarp_orders_the_lanes_of_its_mask_only():
    x, y = buffers()
    text = message("race", "partial_syncwarp", 1, [ptr(x), ptr(y)])
    assert "race on shared memory" in text or "never written" in text


@pytest.mark.parametrize("fault", [1, 2, 3])
def test_missing_wait_and_wrong_wait_count(fault):
    x, y = buffers()
    text = message("race", "wait_count", fault, [ptr(x), ptr(y)], block=16, shared=2 * SHARED)
    assert "read of shared memory" in text
    assert "no cp_async_wait_group for it" in text
    issue = line_of("wait_count", "cp_async_16(buffer + 16")
    assert f"faults.cu:{issue}" in text
    for mode in ("asan", "plain"):  # in these builds the bytes are NaN until the copy completes
        x, y = buffers()
        run(mode, "wait_count", fault, [ptr(x), ptr(y)], block=16, shared=2 * SHARED)
        assert y.isnan().all()


def test_copies_are_for_others_only_after_a_barrier():
    x, y = buffers()
    text = message("race", "wait_count", 4, [ptr(x), ptr(y)], block=16, shared=2 * SHARED)
    assert "race on shared memory" in text or "no cp_async_wait_group" in text or "never written" in text


@pytest.mark.parametrize("mode", ["race", "asan"])
@pytest.mark.parametrize("valid", [0, 1, 6, 7, 63, 64])
def test_copies_fill_with_zeros(mode, valid):
    x, _ = buffers()
    x = x[:valid].clone() if valid else x[:1].clone()  # the buffer ends at the last source byte
    y = torch.full((144,), 7.0)
    run(mode, "zero_fill", 0, [ptr(x), ptr(y), i32(valid)], block=16, shared=4 * 144)
    expected = torch.zeros(64)
    expected[:valid] = x[:valid]
    assert torch.equal(y, torch.cat([expected, expected, expected[:16]]))


@pytest.mark.parametrize("mode", ["race", "asan"])
def test_source_changed_under_a_copy(mode):
    x, y = buffers()
    assert "changed before the wait" in message(mode, "changing_source", 1, [ptr(x), ptr(y)], block=16)


OUT_OF_BOUNDS = [
    (1, "shared memory out of bounds: write of 4 bytes at byte 256, the launch has 256 bytes", "buffer[i + ("),
    (2, "shared memory out of bounds: read of 4 bytes at byte -4, the launch has 256 bytes", "buffer[i - ("),
    (3, "global memory out of bounds: read of 4 bytes at byte 256 of argument 0, which has 256 bytes", "v += x[i + ("),
    (4, "global memory out of bounds: read of 4 bytes at byte -4 of argument 0, which has 256 bytes", "x[i - 1]"),
    (5, "global memory out of bounds: write of 4 bytes at byte 256 of argument 1, which has 256 bytes", "y[i + ("),
]


@pytest.mark.parametrize("mode", ["race", "asan"])
@pytest.mark.parametrize(("fault", "expected", "line"), OUT_OF_BOUNDS, ids=[str(case[0]) for case in OUT_OF_BOUNDS])
def test_out_of_bounds(mode, fault, expected, line):
    x, y = buffers()
    text = message(mode, "out_of_bounds", fault, [ptr(x), ptr(y)])
    assert expected in text
    assert f"faults.cu:{line_of('out_of_bounds', line)}" in text
    thread = 0 if fault in (2, 4) else 63
    assert f"block (0, 0, 0), thread ({thread}, 0, 0) (warp {thread // 32}, lane {thread % 32})" in text


def test_far_out_of_bounds():
    """Beyond any redzone: the race build compares addresses with the buffers themselves."""
    x, y = buffers()
    text = message("race", "out_of_bounds", 6, [ptr(x), ptr(y)])
    assert "global memory out of bounds: write of 4 bytes" in text
    assert f"faults.cu:{line_of('out_of_bounds', 'y[100000]')}" in text


@pytest.mark.parametrize("mode", ["race", "asan"])
def test_views_are_guarded_at_their_own_ends(mode):
    """A view of a larger buffer: the bytes after it are allocated, but do not belong to this argument."""
    slab = torch.zeros(256)
    x, y = slab[64:128], slab[192:256]
    x[:] = torch.randn(64)
    run(mode, "out_of_bounds", 0, [ptr(x), ptr(y)])
    assert torch.equal(y, x)
    assert "argument 0, which has 256 bytes" in message(mode, "out_of_bounds", 3, [ptr(x), ptr(y)])


@pytest.mark.parametrize("mode", ["race", "asan"])
def test_end_of_a_vector_load(mode):
    x, y = torch.zeros(64), torch.zeros(64)
    assert "bytes at byte 256 of argument 0, which has 256" in message(
        mode, "vector_tail", 1, [ptr(x), ptr(y)], shared=0
    )


@pytest.mark.parametrize("mode", ["race", "asan", "plain"])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (1, "32 threads wait in __syncthreads at"),
        (2, "this thread is in __syncthreads at"),
        (3, "63 threads wait in __syncthreads at"),
        (4, "31 in a warp collective at"),
    ],
)
def test_divergent_barrier(mode, fault, expected):
    x, y = buffers()
    text = message(mode, "divergent_barrier", fault, [ptr(x), ptr(y)], shared=0)
    assert "divergent barrier" in text
    assert expected in text
    assert "faults.cu:" in text


def test_read_before_any_write():
    x, y = buffers()
    text = message("race", "never_written", 1, [ptr(x), ptr(y)])
    assert "read of shared memory that was never written, at byte 68" in text
    assert "thread (17, 0, 0)" in text
    assert f"faults.cu:{line_of('never_written', 'v = buffer')}" in text


@pytest.mark.parametrize("mode", ["race", "asan", "plain"])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (1, "all lanes of the mask must come from the same call"),
        (2, "in vote at"),
        (3, "disagree on the mask"),
        (4, "is not in its own mask 0x0000ffff"),
        (5, "which have exited"),
        (6, "which is not in the mask 0x0000ffff"),
    ],
)
def test_collectives(mode, fault, expected):
    x, y = buffers()
    text = message(mode, "collective_sites", fault, [ptr(x), ptr(y)], shared=0)
    assert expected in text or (fault == 5 and "never completes" in text)  # as the order falls
    if fault == 1:
        assert f"faults.cu:{line_of('collective_sites', 'if (lane < 16) v =')}" in text
        assert f"faults.cu:{line_of('collective_sites', '+ 0.0f')}" in text


@pytest.mark.parametrize("mode", ["race", "asan"])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (1, "misaligned pointer"),
        (2, "signed addition overflows"),
        (3, "shift by"),
        (4, "out of bounds"),
        (5, "outside of the target type's range"),
        (6, "division by zero"),
    ],
)
def test_undefined_behaviour(mode, fault, expected):
    x, y = torch.ones(64), torch.zeros(64)
    text = message(mode, "undefined", fault, [ptr(x), ptr(y), i32(64)], shared=0)
    assert expected in text
    assert "faults.cu" in text


@pytest.mark.parametrize("mode", ["race", "asan"])
def test_undefined_behaviour_twin(mode):
    x, y = buffers()
    run(mode, "undefined", 0, [ptr(x), ptr(y), i32(64)], shared=0)
    assert torch.equal(y, x)


def test_write_to_a_const_argument():
    x, y = buffers()
    assert "argument 0, which the kernel declares const" in message(
        "race", "const_write", 1, [ptr(x), ptr(y)], shared=0
    )


def test_wild_pointer_is_an_error_in_this_process_and_kills_only_the_worker_in_asan():
    x, y = buffers()
    assert "global memory out of bounds" in message("race", "wild_pointer", 1, [ptr(x), ptr(y)], shared=0)
    text = message("asan", "wild_pointer", 1, [ptr(x), ptr(y)], shared=0)
    assert "the process died" in text
    assert "AddressSanitizer" in text
    run("asan", "wild_pointer", 0, [ptr(x), ptr(y)], shared=0)
    assert torch.equal(y, x)


@pytest.mark.parametrize(("mode", "fault"), [("race", 0), ("asan", 0), ("race", 1), ("race", 2)])
def test_dependent_launch_reads_only_weights_before_it_waits(mode, fault):
    """Two launches in a chain: the second may prefetch weights, not what the first one writes."""
    x, hidden = buffers()
    w, y = torch.randn(64), torch.zeros(64)
    run(mode, "early_read", 0, [ptr(x), ptr(w), ptr(hidden)], shared=0, arch=90)
    args = [ptr(hidden), ptr(w), ptr(y)]
    if fault == 0:
        run(mode, "early_read", 0, args, shared=0, arch=90, dependent=True)
        assert torch.equal(y, x * w * w)
    else:
        text = message(mode, "early_read", fault, args, shared=0, arch=90, dependent=True)
        assert "read of argument 0 before griddepcontrol.wait" in text
        # After a copy nothing earlier is still running: the same launch is right.
        run(mode, "early_read", 0, [ptr(x), ptr(w), ptr(hidden)], shared=0, arch=90)
        make_backend(mode, 90, TEST_KERNELS).call(lambda source, target: target.copy_(source), x, torch.empty(64))
        run(mode, "early_read", fault, args, shared=0, arch=90, dependent=True)
        assert torch.equal(y, x * w * w)


@pytest.mark.parametrize("mode", ["race", "asan"])
def test_atomics_do_not_race_with_each_other(mode):
    total, y = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(mode, "mixed_atomics", 0, [ptr(total), ptr(y)], shared=4)
    assert total.item() == 64
    assert (y == 64).all()


def test_atomics_race_with_plain_accesses():
    total, y = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    assert "race on shared memory" in message("race", "mixed_atomics", 1, [ptr(total), ptr(y)], shared=4)


@pytest.mark.parametrize(("arch", "limit"), [(61, 48), (75, 64), (86, 99), (80, 163), (90, 227)])
def test_shared_memory_limit_of_the_architecture(arch, limit):
    x, y = buffers()
    run("race", "removed_barrier", 0, [ptr(x), ptr(y)], shared=limit * 1024, arch=arch)
    text = message("race", "removed_barrier", 0, [ptr(x), ptr(y)], shared=limit * 1024 + 16, arch=arch)
    assert f"sm_{arch} has {limit * 1024}" in text


def test_block_larger_than_the_kernel_declares():
    x, y = buffers()
    assert "larger than the 64 declared" in message("race", "removed_barrier", 0, [ptr(x), ptr(y)], block=128)
