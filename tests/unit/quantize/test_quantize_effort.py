"""The time left while a model is quantized: against a machine whose every operation takes a known time."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from exl.commands.common import WorkBar
from exl.quantize import run as run_module
from exl.quantize.compute import Compute
from exl.quantize.options import QuantizeOptions
from exl.quantize.products import TorchProducts
from exl.quantize.rounding import TorchRounding
from exl.quantize.run import quantize
from exl.quantize.span_ops import TorchSpan
from exl.threads import Threads

DATA = Path(__file__).parents[2] / "data"
SOURCE = DATA / "stories2M"
GPTQ = {"group_size": 64, "calibration": DATA / "calibration" / "stories2M.txt", "num_samples": 8, "seq_len": 256}
OPTIONS = QuantizeOptions(**GPTQ)


class FakeMachine(TorchDispatchMode):
    """Counts what torch is asked for: 3 us per operation and 0.5 us per view, 0.15 ns per element that is written, or
    0.8 ns if the result is too large for a cache, 10 ps per operation of a product, 50 ps in a factorization."""

    seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet, name = func._overloadpacket, str(func._overloadpacket)
        self.seconds += 0.5e-6 if func.is_view else 3e-6
        if "scaled_dot_product" in name:
            (_, heads, queries, _), keys = args[0].shape, args[1].shape[-2]
            self.seconds += 2e-9 * heads * queries * keys  # the softmax
        if packet in flop_registry:
            self.seconds += 10e-12 * flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif "cholesky" in name or "triangular" in name:
            self.seconds += 50e-12 * args[0].shape[-1] ** 3 * (1 if "triangular" in name else 1 / 3)
        elif not func.is_view:
            outputs = out if isinstance(out, tuple | list) else (out,)
            numels = [o.numel() for o in outputs if isinstance(o, torch.Tensor)]
            self.seconds += sum(numel * (0.15e-9 if numel < 1 << 17 else 0.8e-9) for numel in numels)
        return out


class FakeRounding(TorchRounding):
    """As kernels do it: 10 ns per weight whose grid is fitted, 4 ns per weight that is rounded."""

    def __init__(self, threads: Threads, machine: FakeMachine) -> None:
        super().__init__(threads)
        self.machine = machine

    def fit(self, grid, weight, group_size):
        began = self.machine.seconds
        found = super().fit(grid, weight, group_size)
        self.machine.seconds = began + 10e-9 * weight.numel()
        return found

    def round(self, grid, block):
        began = self.machine.seconds
        errors = super().round(grid, block)
        self.machine.seconds = began + 4e-9 * block.weight.numel()
        return errors


class FakeProducts(TorchProducts):
    """As kernels do it: 6 ps per operation of a product."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine

    def multiply(self, a, b, out):
        began = self.machine.seconds
        super().multiply(a, b, out)
        self.machine.seconds = began + 6e-12 * 2 * a.numel() * len(b)
        return out


class FakeSpan(TorchSpan):
    """As kernels do it: 6 ps per operation of a linear."""

    machine: FakeMachine

    def _multiply(self, x, w, out, num_decode_rows):
        began = self.machine.seconds
        super()._multiply(x, w, out, num_decode_rows)
        self.machine.seconds = began + 6e-12 * 2 * x.numel() * sum(linear.N for linear in w)


@dataclass(frozen=True)
class FakeKernels(Compute):
    machine: FakeMachine | None = None
    compiled = True

    @classmethod
    def on(cls, machine: FakeMachine) -> FakeKernels:
        threads = Threads(1)
        return cls(FakeRounding(threads, machine), FakeProducts(machine), threads, machine=machine)

    def span_ops(self, limits, num_kv_heads):
        ops = FakeSpan(limits, num_kv_heads, self.threads)
        ops.machine = self.machine
        return ops


def on_torch(machine: FakeMachine) -> Compute:
    return Compute.with_torch(Threads(1))


class Step(NamedTuple):
    """What a run told of its progress, and when."""

    now: float
    left: float | None  # seconds, as the bar said
    done: int
    total: int
    what: str


def steps_of(
    out: Path, options: QuantizeOptions, make: Callable[[FakeMachine], Compute] = on_torch
) -> tuple[list[Step], float]:
    """What a run told of its progress, and its end, by a clock that begins with it."""
    machine, steps = FakeMachine(), []
    bar = WorkBar("quantizing", clock=lambda: machine.seconds, console=Console(file=io.StringIO()))

    def note(done: int, total: int, what: str) -> None:
        bar.update(done, total, what)
        steps.append(Step(machine.seconds, bar.seconds_left, done, total, what))

    with machine, pytest.MonkeyPatch.context() as patch:
        # The machine would not see real kernels.
        patch.setattr(run_module, "open_compute", lambda threads: nullcontext(make(machine)))
        quantize(SOURCE, out, options, note)
    return steps, machine.seconds


RUNS = {
    "match_dense": (OPTIONS, on_torch),
    "plain": (replace(OPTIONS, match_dense=False), on_torch),
    "kernels": (OPTIONS, FakeKernels.on),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """What a run from the start told, and its end."""
    return steps_of(tmp_path_factory.mktemp("quantized") / "out", *RUNS[request.param])


# Not with kernels: the work of writing, which takes this machine no time, would be too large a share.
@pytest.mark.parametrize("run", ["match_dense", "plain"], indirect=True)
def test_the_time_left_does_not_jump(run):
    steps, end = run
    assert all(0 <= step.done <= step.total for step in steps)
    seen = [(step.now, step.left) for step in steps if step.left is not None]
    assert seen[-1][1] == 0  # the work adds up
    counted = [(end - now, left) for now, left in seen if 0.2 * end < now < 0.95 * end]
    assert len(counted) > 20
    for true, left in counted:
        assert 0.6 < left / true < 1.6
    for (now, left), (later, next_left) in pairwise(seen):
        if now > 0.1 * end:
            assert next_left - left < 0.1 * end, (now, later)  # it does not grow by much from one step to the next


@pytest.mark.parametrize("run", ["match_dense", "kernels"], indirect=True)
def test_steps_of_every_kind_have_their_share(run):
    steps, end = run
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for last, step in pairwise([Step(0.0, None, 0, 1, ""), *steps]):
        kind = step.what.rpartition(": ")[2]
        spent[kind][0] += (step.done - last.done) / step.total
        spent[kind][1] += step.now - last.now
    assert set(spent) == {"starting", "read", "qkv", "o", "gate_up", "down", "outputs", "writing"}
    for kind in ("qkv", "o", "gate_up", "down", "outputs"):
        said, took = spent[kind]
        assert 0.5 < said / (took / end) < 2, kind


def test_a_resumed_run_does_not_count_what_was_done_before(tmp_path):
    """Done in no time, it would promise an end in seconds, and the first real step would take the promise back."""

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("layer 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(SOURCE, tmp_path / "out", OPTIONS, stop)
    steps, end = steps_of(tmp_path / "out", OPTIONS)
    assert steps[0].left is None
    assert 0.4 < steps[0].done / steps[0].total < 0.6  # two of four layers
    for step in steps[5:-1]:
        if step.now < 0.9 * end:
            assert 0.5 < step.left / (end - step.now) < 2


def test_the_bar_shows_share_and_time():
    output = io.StringIO()
    now = 10.0
    with WorkBar("quantizing", clock=lambda: now, console=Console(file=output, force_terminal=True, width=100)) as bar:
        bar.update(500, 1000, "resuming")
        now = 70.0
        bar.update(510, 1000, "layer 3 of 5: qkv")
        assert bar.seconds_left == 60 * 490 / 10
    assert "layer 3 of 5: qkv" in output.getvalue()
    assert "51%" in output.getvalue()
    assert "49:00 left" in output.getvalue()
