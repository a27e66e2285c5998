"""``pytest --sample``: every test keeps a case in each build, and over the commits every case has its turn."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import SimpleNamespace

from tests.conftest import ASAN_ONE_IN, drawn

ROOT = Path(__file__).parents[2]


@dataclass(eq=False)
class Case:
    """What a sample looks at in a collected test."""

    test: str
    params: dict
    marks: dict = field(default_factory=dict)  # name -> arguments
    file: str = "test_kernels.py"

    @property
    def nodeid(self) -> str:
        return f"{self.file}::{self.test}[{'-'.join(map(str, self.params.values()))}]"

    @property
    def path(self) -> Path:
        return Path(self.file)

    @property
    def callspec(self) -> SimpleNamespace:
        return SimpleNamespace(params=self.params)

    def get_closest_marker(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(args=self.marks[name]) if name in self.marks else None


def cases(test: str, count: int = 7, builds=("race", "asan"), **options) -> list[Case]:
    return [Case(test, {"mode": mode, "size": size}, **options) for mode, size in product(builds, range(count))]


def count(found: set[Case], test: str, mode: str) -> int:
    return sum(case.test == test and case.params["mode"] == mode for case in found)


def test_every_test_keeps_a_case_in_every_build():
    marked, plain = cases("marked", marks={"sample": (3,)}), cases("plain")
    single = cases("single", 1, marks={"sample": (9,)})
    found = drawn([*marked, *plain, *single], "a commit")
    assert ASAN_ONE_IN == 4
    assert {
        name: (count(found, name, "race"), count(found, name, "asan")) for name in ("marked", "plain", "single")
    } == {
        "marked": (3, 2),
        "plain": (7, 2),
        "single": (1, 1),
    }
    assert found == drawn([*single, *plain, *marked], "a commit")  # whatever the order: workers must agree


def test_nothing_is_left_out_of_what_shows_that_the_shim_finds_faults():
    shown = cases("fault", file="test_shim_faults.py")
    assert drawn(shown, "a commit") == set(shown)


def test_a_gpu_runs_all():
    on_gpu = cases("kernel", builds=("cupy",), marks={"sample": (3,), "gpu": ()})
    assert drawn(on_gpu, "a commit") == set(on_gpu)


def test_every_case_has_its_turn():
    items = cases("kernel", 20, builds=("race",), marks={"sample": (5,)})
    samples = [drawn(items, f"commit {i}") for i in range(60)]
    assert all(len(sample) == 4 for sample in samples)
    assert set().union(*samples) == set(items)


def test_from_the_command_line():
    command = [sys.executable, "-m", "pytest", "--collect-only", "--sample", "abc", "-k", "test_head_sizes"]
    done = subprocess.run(
        [*command, "tests/kernels/test_attention_decode.py"], capture_output=True, text=True, cwd=ROOT
    )
    assert len(re.findall(r"::test_head_sizes\[race", done.stdout)) == 10, done.stdout + done.stderr  # of 30
