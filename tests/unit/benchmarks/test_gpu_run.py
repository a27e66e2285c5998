"""``python -m benchmarks.gpu_run``: all stages on the host shim. Stages and items that hang, crash or lose the CUDA
context are reported, and the others still run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.gpu_run import precompile, stage
from benchmarks.gpu_run.__main__ import END_SECONDS, SECONDS, make_stages
from benchmarks.gpu_run.driver import Job, drive
from benchmarks.gpu_run.runner import RESULTS, Run, Stage, run_stages
from benchmarks.gpu_run.worker import Place, append, read_records
from benchmarks.guard import one_line
from tests.compile.nvrtc import nvrtc

ROOT = Path(__file__).parents[3]


# ---- the whole command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("gpu-run") / "out"
    command = [sys.executable, "-m", "benchmarks.gpu_run", "--dry-run", "--out", str(out), "--seconds", "500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads((out / "summary.json").read_text())


def test_a_dry_run_goes_through_all_stages(dry):
    out, told = dry
    stages = {told["name"]: told for told in told["stages"]}
    assert list(stages) == list(SECONDS)
    log = (out / "log.txt").read_text()
    assert {name: told["status"] for name, told in stages.items()} == dict.fromkeys(stages, "done"), log[-4000:]
    assert [told["failures"] for told in stages.values()] == [[]] * len(stages)
    assert stages["smoke"]["counts"] == {"passed": 12}
    assert stages["kernels"]["counts"] == {"passed": 3}
    assert stages["models"]["counts"] == {"passed": 2}
    assert stages["numbers"]["counts"] == {"passed": 14}
    assert stages["reruns"]["notes"] == ["nothing had failed"]
    assert "python" in told["facts"]


def test_results_are_few_small_files(dry):
    """At most 8 files of at most 16 MiB, in flat folders, so that they are easy to carry back from a machine."""
    out, _ = dry
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.jsonl", "summary.json", "summary.md"]
    assert all(path.is_file() and path.stat().st_size < 16 << 20 for path in out.iterdir())
    page = (out / "summary.md").read_text()
    assert "| numbers | done |" in page
    assert "| tiny | f16 | 0 | 1 |" in page


def test_the_parent_imports_neither_torch_nor_exl():
    """Neither do the processes that drive stages: a library that hangs at import costs only one stage."""
    names = ("__main__", "runner", "driver", "stage", "summary", "worker", "facts", "precompile")
    code = "; ".join(f"import benchmarks.gpu_run.{name}" for name in names)
    code += "; import sys; print({'torch', 'exl', 'numpy', 'cupy'} & {name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stages", "smoke,nonsense"), "found 'smoke,nonsense'"),
        (("--seconds", "20"), "--seconds: found 20, expected 70"),
    ],
)
def test_bad_options_are_named(tmp_path, options, words):
    command = [sys.executable, "-m", "benchmarks.gpu_run", "--out", str(tmp_path / "out"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr


def test_every_stage_has_its_share(tmp_path):
    stages = make_stages(list(SECONDS), tmp_path, 480, kernel_cache=tmp_path)
    assert sum(stage.seconds for stage in stages) == pytest.approx(480 - END_SECONDS)
    assert {stage.name: stage.seconds for stage in stages}["numbers"] > 140
    assert all(str(tmp_path) in stage.command for stage in stages)
    assert not any("--dry-run" in stage.command for stage in stages)


# ---- stages that fail -----------------------------------------------------------------------------------------------

# A worker whose items are named after what they do. A module replaces ``torch``; its context can be lost.
WORKER = """
import os, signal, sys, time, types
from benchmarks.gpu_run.worker import Place, Worker

lost = []
def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
sys.modules["torch"] = types.SimpleNamespace(
    cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize))

def fail():
    raise ValueError("one launch was refused")
def lose():
    lost.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
ITEMS = {
    "good": lambda: "fine",
    "fails": fail,
    "loses the context": lose,
    "loses it silently": lambda: lost.append(1) or "",
    "crashes": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "aborts": os.abort,
    "hangs": lambda: time.sleep(60),
    "last": lambda: "fine",
}
worker = Worker(Place.parse(sys.argv[1]))
for name in sys.argv[2:]:
    if worker.claim(name):
        worker.run(name, ITEMS[name])
"""
ALL = ["good", "fails", "loses the context", "loses it silently", "crashes", "aborts", "hangs", "last"]
OUTCOMES = {
    "good": "passed",
    "fails": "failed",
    "loses the context": "failed",
    "loses it silently": "failed",
    "crashes": "crashed",
    "aborts": "crashed",
    "hangs": "timed out",
    "last": "passed",
}


def drive_items(results: Path, items: list[str], *, seconds: float = 60, workers: int = 1) -> list[dict]:
    job = Job("s", results, lambda place: [sys.executable, "-c", WORKER, str(place), *items], workers, 1.5)
    drive(job, time.monotonic() + seconds)
    return read_records(results)[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_item_ends_once_whatever_the_others_do(tmp_path, monkeypatch, workers):
    monkeypatch.chdir(ROOT)
    records = drive_items(tmp_path / "r.jsonl", ALL, workers=workers)
    ends = [record for record in records if record["event"] == "end"]
    assert {record["item"]: record["outcome"] for record in ends} == OUTCOMES
    assert Counter(record["item"] for record in ends) == Counter(ALL)
    texts = {record["item"]: record["text"] for record in ends}
    assert texts["fails"] == "ValueError: one launch was refused"
    assert texts["crashes"] == "the process ended: SIGSEGV"
    assert texts["aborts"] == "the process ended: SIGABRT"
    assert [r["item"] for r in ends if "sticky" in r] == [r["item"] for r in ends if r["item"].startswith("loses")]
    if workers == 1:  # a fresh process after each loss, and no others
        pids = {record["item"]: record["worker"] for record in records if record["event"] == "begin"}
        fresh = [pids[b] != pids[a] for a, b in pairwise(ALL)]
        assert fresh == [False, False, True, True, True, True, True]


def test_workers_that_cannot_start_are_given_up(tmp_path):
    job = Job("s", tmp_path / "r.jsonl", lambda place: [sys.executable, "-c", "raise SystemExit(7)"], 2, 1.0)
    began = time.monotonic()
    drive(job, began + 30)
    assert time.monotonic() - began < 15
    notes = [record["text"] for record in read_records(tmp_path / "r.jsonl")[0]]
    assert any("workers do not start (exit code 7)" in note for note in notes)


def test_a_stage_without_time_says_what_it_had_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    results = tmp_path / "r.jsonl"
    job = Job("s", results, lambda place: [sys.executable, "-c", WORKER, str(place), "good", "hangs", "last"], 1, 50.0)
    drive(job, time.monotonic() + 3)
    records = read_records(results)[0]
    assert {r["item"]: r["outcome"] for r in records if r["event"] == "end"} == {"good": "passed", "hangs": "cut off"}
    assert "before all items had been run" in records[-1]["text"]


STICKY_STAGE = """
import sys, time
from pathlib import Path
from benchmarks.gpu_run.driver import Job, drive
worker, results = sys.argv[1:]
command = lambda place: [sys.executable, "-c", worker, str(place), "loses the context", "good"]
job = Job("sticky", Path(results), command, 1, 5)
drive(job, time.monotonic() + 20)
"""


def test_stages_that_hang_crash_or_lose_the_context(tmp_path):
    """The summary reports each of them, and later stages run."""
    out, child = tmp_path / "out", tmp_path / "child"
    hang = "import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(90)']); "
    hang += f"open({str(child)!r}, 'w').write(str(c.pid)); print('it hangs here', flush=True); time.sleep(90)"

    def python(code: str, *more: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code, *more)

    stages = [
        Stage("hang", python(hang), 2),
        Stage("crash", python("import os; print('about to abort', flush=True); os.abort()"), 2),
        Stage("exit", python("raise SystemExit(3)"), 2),
        Stage("absent", ("/no/such/program",), 1),
        Stage("sticky", python(STICKY_STAGE, WORKER, str(out / RESULTS)), 15),
        Stage("last", python("print('ran')"), 2),
    ]
    run = Run(out, 24)
    run_stages(run, stages, ROOT)
    told = {told["name"]: told for told in json.loads((out / "summary.json").read_text())["stages"]}
    assert told["hang"]["status"] == "timed out after 2 s"
    assert "it hangs here" in told["hang"]["log"]
    assert told["crash"]["status"] == "crashed: SIGABRT"
    assert "about to abort" in told["crash"]["log"]
    assert told["exit"]["status"] == "exit code 3"
    assert told["absent"]["status"].startswith("could not be started")
    assert told["sticky"]["status"] == told["last"]["status"] == "done"
    assert told["sticky"]["counts"] == {"failed": 1, "passed": 1}
    assert "illegal memory access" in told["sticky"]["failures"][0]["sticky"]
    page = (out / "summary.md").read_text()
    for words in ("timed out after 2 s", "crashed: SIGABRT", "its context was lost", "| last | done |"):
        assert words in page
    assert_ended(int(child.read_text()))


def assert_ended(pid: int) -> None:
    """Every process that a stage had started has ended with it."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still there")


def test_a_stage_that_hangs_leaves_the_later_ones_their_time(tmp_path):
    sleep = (sys.executable, "-c", "import time; time.sleep(60)")
    quick = (sys.executable, "-c", "pass")
    run = Run(tmp_path / "out", 8)
    run_stages(run, [Stage("hang", sleep, 1), Stage("quick", quick, 3), Stage("last", quick, 3)], ROOT)
    limits = {told["name"]: told["limit"] for told in run.stages}
    assert limits["hang"] == pytest.approx(2, abs=0.2)
    assert limits["quick"] == pytest.approx(3, abs=0.5)
    assert limits["last"] > 4  # includes the time that "quick" did not use
    assert [told["status"] for told in run.stages] == ["timed out after 2 s", "done", "done"]


def test_a_run_that_is_ended_writes_its_summary(tmp_path):
    out = tmp_path / "out"
    code = f"""
import signal, sys
from pathlib import Path
from benchmarks.gpu_run.runner import Run, Stage, run_stages
signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
sleep = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
run_stages(Run(Path({str(out)!r}), 100), [Stage("a", sleep, 50), Stage("b", sleep, 50)], Path({str(ROOT)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    for _ in range(100):
        if (out / "log.txt").exists() and "begun\n" in (out / "log.txt").read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    told = json.loads((out / "summary.json").read_text())["stages"]
    assert [stage["status"] for stage in told] == ["stopped", "not run: stopped"]


# ---- pytest's part --------------------------------------------------------------------------------------------------

TESTS = """
import os, signal, sys, time, types
import pytest

@pytest.fixture(scope="module")
def shared():
    return []

def test_good(shared): pass
def test_fails(shared): assert os.environ.get("CUDA_LAUNCH_BLOCKING") == "2"
def test_skipped(): pytest.skip("not here")
def test_crashes(shared): os.kill(os.getpid(), signal.SIGSEGV)
def test_hangs(shared): time.sleep(60)
def test_loses_the_context(shared):
    def synchronize(): raise RuntimeError("CUDA error: misaligned address")
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
@pytest.mark.parametrize("i", range(5))
def test_last(shared, i): pass
"""


@pytest.fixture
def folder_of_tests(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "test_it.py").write_text(TESTS)
    (folder / "test_broken.py").write_text("import no_such_module\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.sample(2)
def test_tests_are_shared_by_workers_that_may_die(folder_of_tests, tmp_path, workers):
    options = stage.Options(tmp_path / "r.jsonl", 60, True, None)
    job = Job("t", options.results, lambda place: stage.pytest_command(place, options, (".",)), workers, 3.0)
    drive(job, time.monotonic() + 60)
    ends = [record for record in read_records(options.results)[0] if record["event"] == "end"]
    found = {record["item"].partition("::")[2] or record["item"]: record for record in ends}
    assert len(found) == len(ends) == 12
    assert {name: record["outcome"] for name, record in found.items()} == {
        "collecting test_broken.py": "failed",
        "test_good": "passed",
        "test_fails": "failed",
        "test_skipped": "skipped",
        "test_crashes": "crashed",
        "test_hangs": "timed out",
        "test_loses_the_context": "failed",
        **{f"test_last[{i}]": "passed" for i in range(5)},
    }
    assert "no_such_module" in found["collecting test_broken.py"]["text"]
    assert "misaligned address" in found["test_loses_the_context"]["sticky"]
    assert "not here" in found["test_skipped"]["text"]


def test_first_failures_run_again_with_blocking_launches(folder_of_tests, tmp_path):
    results = tmp_path / "r.jsonl"
    for item, outcome in (("test_it.py::test_fails", "failed"), ("test_it.py::test_good", "passed")):
        append(results, stage="kernels", item=item, event="end", outcome=outcome, text="")
    stage.reruns(stage.Options(results, 30, True, None))
    again = [record for record in read_records(results)[0] if record["stage"] == "reruns"]
    assert [(record["item"], record.get("outcome")) for record in again] == [
        ("test_it.py::test_fails", None),
        ("test_it.py::test_fails", "failed"),
    ]
    assert "assert '1' == '2'" in again[1]["text"]


# ---- compiling ahead, and words -------------------------------------------------------------------------------------


class NeverCompiles:
    """A compiler of a given version that must not compile: every entry must be in the cache."""

    def __init__(self, inner) -> None:
        self.version, self.archs = inner.version, inner.archs

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        raise AssertionError(f"{name} was not found in the cache")


def test_what_was_compiled_ahead_is_found(tmp_path):
    """Found with an NVRTC of the same version, under the digest that ``compile_cached`` looks up."""
    from exl.kernels.compiler import compile_cached

    if nvrtc() is None:
        pytest.skip("NVRTC is not installed (wheel nvidia-cuda-nvrtc-cu12)")
    specs = precompile.test_specs(90)
    text = precompile.precompile(specs, tmp_path, nvrtc, 1)
    assert f"0 of {len(specs)} were there, {len(specs)} compiled" in text
    for spec, sources in specs:
        assert compile_cached(spec, NeverCompiles(nvrtc()), tmp_path, sources).startswith(b"\x7fELF")
    assert f"{len(specs)} of {len(specs)} were there, 0 compiled" in precompile.precompile(specs, tmp_path, nvrtc, 1)
    found, total = precompile.cached_count(90, tmp_path, nvrtc())
    assert found == len(specs) < total


def test_all_variants_are_compiled_ahead():
    from exl.kernels.variants import variants

    specs = [spec for spec, sources in precompile.all_specs(90) if sources is None]
    assert {variant.spec for variant in variants(90)} <= set(specs)
    assert len(specs) == len(set(specs))


def test_an_errors_line_names_what_is_behind_it():
    error = ValueError("no graph")
    error.__context__ = RuntimeError("the capture was invalidated\nby a stream")
    assert one_line(error) == "ValueError: no graph <- RuntimeError: the capture was invalidated"


def test_places_travel_as_one_word(tmp_path):
    place = Place("s", tmp_path / "r", tmp_path / "c", 1.5, 2, 3)
    assert Place.parse(str(place)) == place
