"""Decode steps of many sequences on the CPU: each row has the bits that it has alone."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from exl.batch import PAGE_SIZE
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine import build
from exl.engine.build import Engine, load_engine
from exl.layout import cpu_steps
from exl.ops.base import ALL_ROWS
from exl.ops.cpu_target import torch_target, why_not_compiled
from exl.planning.options import EngineOptions
from tests.model.batches import batch_of, run
from tests.model.cpu_targets import needs_kernels
from tests.model.hf_models import CASES as DENSE_CASES
from tests.model.hf_models import Case, save
from tests.model.hf_models import build as build_dense
from tests.model.test_quantized import make

CONTEXT = 320
COUNTS = (16, 33, 64)


def lengths_of(count: int) -> list[int]:
    """Of so many sequences, before the step: none, a token, whole pages, a split and some, all but one token."""
    rng = np.random.default_rng(count)
    return [0, 1, 63, 64, 255, 256, 257, CONTEXT - 1, *rng.integers(0, CONTEXT, count - 8).tolist()]


class Cached:
    """Sequences with the first tokens of texts in the cache, on pages that are no neighbours."""

    def __init__(self, engine: Engine, count: int) -> None:
        self._runner, self.lengths = engine.generator.runner, lengths_of(count)
        self._vocab_size = engine.config.vocab_size
        per = CONTEXT // PAGE_SIZE
        self._pages = np.random.default_rng(1).permutation(count * per).reshape(count, per).tolist()
        for b, length in enumerate(self.lengths):
            for start in range(0, length, 64):  # whatever the largest chunk is
                run(self._runner, batch_of([(self.ids(b, start, min(length, start + 64)), start, self._pages[b])]))

    def ids(self, b: int, first: int, last: int) -> list[int]:
        return [3 + (7 * b + 5 * i) % (self._vocab_size - 3) for i in range(first, last)]

    def gather(self) -> None:
        """Copies each one's pages to neighbours, behind all others."""
        num_pages = sum(map(len, self._pages))
        moved = np.arange(num_pages, 2 * num_pages).reshape(len(self._pages), -1).tolist()
        for old, new in zip(self._pages, moved, strict=True):
            self._runner.kv.copy_pages(old, new)
        self._pages = moved

    def step(self, chosen: list[int]) -> torch.Tensor:
        """Logits of each one's next token."""
        new = [(self.ids(b, self.lengths[b], self.lengths[b] + 1), self.lengths[b], self._pages[b]) for b in chosen]
        return run(self._runner, batch_of(new, decode=True))


@contextmanager
def opened(folder: Path, count: int, threads: int, **options):
    patch = pytest.MonkeyPatch()
    patch.setattr(build, "thread_limit", lambda asked: threads)
    cpu = options.pop("cpu", None)
    options = {"context": CONTEXT, "device": "cpu", "max_sequences": count, "cache_tokens": count * CONTEXT} | options
    engine = load_engine(folder, EngineOptions(**options), cpu=cpu)
    patch.undo()
    try:
        yield engine
    finally:
        engine.close()


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.numpy().tobytes() == expected.numpy().tobytes()


def check(engine: Engine, count: int) -> None:
    cached = Cached(engine, count)
    alone = torch.cat([cached.step([b]) for b in range(count)])
    assert torch.isfinite(alone).all()
    order = list(range(count))
    for chosen in (order, order[::-1], order[: count - 3], order[5:7], order):
        for _ in range(3):  # plainly, as it is recorded, and again
            assert same(cached.step(chosen), alone[chosen])


@needs_kernels
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("kv_cache", "threads"), [("f32", 1), ("f16", 2), ("q8", 3), ("k8v4", 4)])
def test_each_row_has_the_bits_that_it_has_alone(count, kv_cache, threads):
    with opened(BUNDLED_MODEL, count, threads, kv_cache=kv_cache) as engine:
        check(engine, count)
        assert engine.decode_steps == "recorded, one call each"


@needs_kernels
@pytest.mark.filterwarnings("ignore:a context of:exl.errors.ExlWarning")
@pytest.mark.parametrize("arena_bytes", [0, 1 << 30])
@pytest.mark.parametrize(
    ("bits", "group_size", "made"), [(4, 32, {"order": "shared"}), (3, 32, {"order": "own"}), (8, -1, {})]
)
def test_in_an_arena_or_over_shared_buffers(tmp_path, monkeypatch, bits, group_size, made, arena_bytes):
    monkeypatch.setattr(cpu_steps, "_ARENA_BYTES", arena_bytes)
    make(tmp_path, bits, group_size, **made)
    with opened(tmp_path, 20, 2, kv_cache="q8", arithmetic="int8") as engine:
        ops = engine.generator.runner.decoder.ops
        assert (ops._arena_rows, ops.captures) == (20 if arena_bytes else 1, 20)
        check(engine, 20)


@needs_kernels
def test_what_scratch_has_no_room_for_is_computed_in_groups(monkeypatch):
    """Of sequences, in the order in which they come; down to one at a time."""
    from exl.ops import compiled_batch

    with opened(BUNDLED_MODEL, 16, 2) as engine:
        cached = Cached(engine, 16)
        expected = cached.step(list(range(16)))
        for most in (2, 5, 11):
            monkeypatch.setattr(compiled_batch, "scratch_partials", lambda limits, most=most: most)
            staged = compiled_batch.StagedBatch(
                batch_of([([5], length, [0] * 5) for length in cached.lengths], decode=True), [5] * 16, None
            )
            groups = compiled_batch.BatchTables(staged).splits(None)
            assert max(group.num_partials for group in groups) <= most < sum(group.num_partials for group in groups)
            assert np.concatenate([group.rows.array[:, 0] for group in groups]).tolist() == list(range(16))
            engine.generator.runner.graphs._replays.clear()
            engine.generator.runner.graphs._seen.clear()
            assert same(cached.step(list(range(16))), expected)


@needs_kernels
@pytest.mark.filterwarnings("ignore:a context of:exl.errors.ExlWarning")
def test_sequences_that_share_pages_may_have_more_splits_than_the_cache_holds(monkeypatch):
    """What an arena has no room for is recorded over the shared buffers, and what these have none for is not."""
    context, pages = 1216, list(range(18))
    with opened(BUNDLED_MODEL, 16, 2, context=context, cache_tokens=2 * context) as engine:
        runner, ids, ways = engine.generator.runner, [5 + i % 90 for i in range(1100)], []
        steps = runner.decoder.ops._steps
        for way in ("run", "run_alone"):
            monkeypatch.setattr(steps, way, Counted(way, getattr(steps, way), ways))
        for start in range(0, 1100, 100):
            run(runner, batch_of([(ids[start : start + 100], start, pages)]))
        new = [([7 + b], 1100, [*pages[:17], 18 + b]) for b in range(9)]
        for own in new:  # of the page that each one has for itself
            runner.kv.copy_pages([17], [own[2][17]])
        alone = torch.cat([run(runner, batch_of([step], decode=True)) for step in new])
        for chosen, expected in (([0], "run"), ([0, 1, 2, 3], "run_alone"), (list(range(9)), None), ([8], "run")):
            for repeated in range(4):
                ways.clear()
                together = run(runner, batch_of([new[b] for b in chosen], decode=True))
                assert same(together, alone[chosen])
                assert repeated < 1 or ways == ([expected] if expected else [])


@needs_kernels
def test_logits_may_lie_behind_others():
    """Of a prompt that is done, behind those of decode rows; also where the step before was recorded."""
    with opened(BUNDLED_MODEL, 16, 2) as engine:
        cached = Cached(engine, 16)
        check_offset(engine, cached)
        assert engine.decode_steps == "recorded, one call each"


class Counted:
    def __init__(self, name: str, call, calls: list[str]) -> None:
        self._name, self._call, self._calls = name, call, calls

    def __call__(self, *args) -> None:
        self._calls.append(self._name)
        self._call(*args)


# Rows of heads that begin anywhere, an MLP of which threads share rows in the middle.
ODD = Case(
    "odd", "llama",
    {"hidden_size": 36, "intermediate_size": 1500, "head_dim": 18, "num_attention_heads": 3, "num_key_value_heads": 1},
)  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made: dict[str, Path] = {"bundled": BUNDLED_MODEL}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model")
            if name == "int4":
                make(made[name], 4, 32, order="shared")
            else:
                cases = {case.name: case for case in (*DENSE_CASES, ODD)}
                save(build_dense(cases[name]), made[name])
        return made[name]

    return folder


@pytest.mark.filterwarnings("ignore:a context of:exl.errors.ExlWarning")
@pytest.mark.parametrize("name", ["bundled", "int4", "qwen3-tied", "mistral", "odd"])
@pytest.mark.parametrize(("kv_cache", "threads"), [("f32", 1), ("f32", 4), ("f16", 2), ("q8", 3)])
def test_through_torch_too_on_whatever_pages(folder_of, name, kv_cache, threads):
    """Pages that are neighbours are read where they are, others from a copy: the bits are the same."""
    options = {"kv_cache": kv_cache, "cache_tokens": 32 * CONTEXT, "cpu": torch_target()}
    with opened(folder_of(name), 16, threads, **options) as engine:
        scattered = Cached(engine, 16)
        everyone = list(range(16))
        alone = torch.cat([scattered.step([b]) for b in everyone])
        assert torch.isfinite(alone).all()
        for chosen in (everyone, everyone[::-1], everyone[3:10]):
            assert same(scattered.step(chosen), alone[chosen])
        if name != ODD.name:  # where a prompt's bits depend on the number of threads, which is as many as are quickest
            check_offset(engine, scattered)
        scattered.gather()
        assert same(scattered.step(everyone), alone)


def check_offset(engine: Engine, cached: Cached) -> None:
    runner = engine.generator.runner
    ops, chosen = runner.decoder.ops, list(range(8, 16))
    prompt = batch_of([(cached.ids(9, 0, 40), 0, cached._pages[0])])
    alone = run(runner, prompt)
    for _ in range(4):
        expected = cached.step(chosen)
        (h,) = runner._run_layers([prompt], None)
        with runner._like(h.shape[0]):
            found = runner.decoder.head(runner._final_norm, runner._head, h, runner._logits[8:])
        assert found.data_ptr() == runner._logits[8].data_ptr()
        assert same(found, alone)
        assert same(runner._logits[:8], expected)
        ops.stage(())


def test_a_row_of_a_batch_is_invariant_as_the_operations_say():
    with opened(BUNDLED_MODEL, 2, 1, cpu=torch_target()) as engine:
        assert engine.generator.runner.decoder.ops.invariant_rows == 1
    if why_not_compiled() is None:
        with opened(BUNDLED_MODEL, 2, 1) as engine:
            assert engine.generator.runner.decoder.ops.invariant_rows == ALL_ROWS
