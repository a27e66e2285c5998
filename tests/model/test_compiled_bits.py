"""A text on the CPU is the same however it is computed: token by token or in chunks, alone or in company, recorded or
not, by any number of threads, and by every instruction set that this processor has."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from exl.checkpoint.hub import BUNDLED_MODEL
from exl.cpu_kernels.library import Library
from exl.cpu_kernels.processor import usable_isas
from exl.engine import build
from exl.engine.build import Engine, load_engine
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from tests.model.batches import batch_of, run
from tests.model.hf_models import CASES as DENSE_CASES
from tests.model.hf_models import build as build_dense
from tests.model.hf_models import save
from tests.model.test_quantized import CASES, make

if not usable_isas():
    pytest.skip("this processor has no instruction set that the kernels are written for", allow_module_level=True)

IDS = torch.randint(3, 96, (90,), generator=torch.Generator().manual_seed(11)).tolist()
CACHES = ("f32", "f16", "q8", "k8v4", "q4")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A random quantized model's folder, made once for each case."""
    made: dict[str, Path] = {}

    def folder(bits: int, group_size: int, options: dict) -> Path:
        key = f"{bits} {group_size} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("model")
            make(made[key], bits, group_size, **options)
        return made[key]

    return folder


@contextmanager
def opened(folder: Path, *, threads: int = 1, isa: str | None = None, **options):
    """An engine that computes with so many threads, also with more than there are processors."""
    patch = pytest.MonkeyPatch()
    patch.setattr(build, "thread_limit", lambda asked: threads)
    if isa is not None:
        patch.setattr("exl.cpu_kernels.library.shared_library", lambda: Library(isa))
    options = {"context": 128, "device": "cpu", "max_sequences": 4, "cache_tokens": 512} | options
    engine = load_engine(folder, EngineOptions(**options))
    patch.undo()
    try:
        yield engine
    finally:
        engine.close()


def every_row(engine: Engine, ids=IDS) -> torch.Tensor:
    """Logits of each position of a prompt."""
    return torch.cat([chunk.clone() for chunk in engine.generator.logits(ids)])


def one_by_one(engine: Engine, ids=IDS, first: int = 1) -> torch.Tensor:
    """The same from decode steps, after ``first`` tokens at once."""
    generator = engine.generator
    sequence = generator.begin(len(ids))
    try:
        rows = [generator.extend(sequence, ids[:first]).clone()]
        rows += [generator.extend(sequence, [token_id]).clone() for token_id in ids[first:]]
        return torch.cat(rows)
    finally:
        generator.end(sequence)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.numpy().tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize(("bits", "group_size", "options"), CASES, ids=str)
def test_steps_have_the_bits_of_prompts_for_every_format(folder_of, bits, group_size, options):
    with opened(folder_of(bits, group_size, options), prefill_chunk=33) as engine:
        expected = every_row(engine)
        assert torch.isfinite(expected).all()
        assert same(one_by_one(engine), expected)
        assert same(one_by_one(engine, first=40), expected[39:])
        assert engine.decode_steps == "recorded, one call each"


@pytest.mark.parametrize("arithmetic", ["int16", "int8", "f32"])
@pytest.mark.parametrize("kv_cache", CACHES)
def test_every_cache_and_arithmetic_any_chunk_and_any_threads(folder_of, kv_cache, arithmetic):
    folder = folder_of(4, 32, {"order": "shared"})
    common = {"kv_cache": kv_cache, "arithmetic": arithmetic}
    with opened(folder, **common) as engine:
        expected = every_row(engine)
        assert same(one_by_one(engine), expected)
    for threads, chunk in ((2, 1), (3, 7), (4, 64)):
        with opened(folder, threads=threads, prefill_chunk=chunk, prefill_window=max(chunk, 64), **common) as engine:
            assert same(every_row(engine), expected), f"{threads} threads, chunks of {chunk}"
            assert same(one_by_one(engine, first=5), expected[4:])


@pytest.mark.parametrize("isa", usable_isas()[1:])
@pytest.mark.parametrize(("bits", "group_size", "options"), CASES, ids=str)
@pytest.mark.sample(4)
def test_every_instruction_set_has_the_bits_of_the_best(folder_of, bits, group_size, options, isa):
    folder = folder_of(bits, group_size, options)
    with opened(folder, kv_cache="q8") as engine:
        expected = every_row(engine)
    with opened(folder, kv_cache="q8", isa=isa) as engine:
        assert engine.generator.runner.decoder.ops.library.isa == isa
        assert same(every_row(engine), expected)
        assert same(one_by_one(engine, first=3), expected[2:])


@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense_models_of_every_family(tmp_path, case):
    folder = save(build_dense(case), tmp_path)
    with opened(folder, kv_cache="f16", context=48, prefill_chunk=13) as engine:
        ids = IDS[:40]
        expected = every_row(engine, ids)
        if "dynamic" not in case.name:  # the frequencies of "dynamic" depend on the length of the whole prompt
            assert same(one_by_one(engine, ids), expected)
    for isa in usable_isas()[1:]:
        with opened(folder, kv_cache="f16", context=48, threads=2, isa=isa) as engine:
            assert same(every_row(engine, ids), expected)


def test_sequences_in_one_batch_have_the_bits_that_they_have_alone(folder_of):
    folder = folder_of(3, 32, {"order": "shared"})
    lengths, pages = (5, 40, 64, 77), ([0], [1], [2], [3, 4])
    with opened(folder, threads=2, context=256) as engine:
        runner = engine.generator.runner
        alone = []
        for n, own in zip(lengths, pages, strict=True):
            run(runner, batch_of([(IDS[: n - 1], 0, own)]))
            alone.append([run(runner, batch_of([(IDS[n - 1 : n], n - 1, own)], decode=True)) for _ in range(3)][-1])
        steps = [(IDS[n - 1 : n], n - 1, own) for n, own in zip(lengths, pages, strict=True)]
        for chosen in ([0, 1, 2, 3], [3, 1], [2, 0, 1]):
            for _ in range(4):  # plainly, captured, and replayed in both sets of buffers
                together = run(runner, batch_of([steps[i] for i in chosen], decode=True))
                assert same(together, torch.cat([alone[i] for i in chosen]))
        prompts = [(IDS[:n], 0, own) for n, own in zip(lengths, pages, strict=True)]
        assert same(run(runner, batch_of(prompts)), torch.cat(alone))


def test_a_prompt_found_in_the_cache_goes_on_with_the_same_bits(folder_of):
    folder = folder_of(4, 32, {"order": "shared"})
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3)

    def answer(engine: Engine, ids, **options) -> list[int]:
        return [token.token_id for token in engine.generator.stream(ids, params, **options)]

    with opened(folder) as engine:
        expected = answer(engine, IDS)
    with opened(folder, prefill_chunk=7, prefill_window=7) as engine:
        answer(engine, IDS[:70])
        assert answer(engine, IDS, reuse_prefix=True) == expected


def test_a_step_that_is_taken_back_is_computed_anew(folder_of):
    """Its slot is written again while a thread of the first step may still be in it."""
    folder = folder_of(4, 32, {"order": "shared"})
    with opened(folder, threads=4) as engine:
        expected = every_row(engine)
        runner, pages = engine.generator.runner, [[0, 1]]
        run(runner, batch_of([(IDS[:30], 0, pages[0])]))
        for wrong in range(40):
            run(runner, batch_of([([3 + wrong], 30, pages[0])], decode=True))
            assert same(run(runner, batch_of([(IDS[30:31], 30, pages[0])], decode=True)), expected[30:31])


CHILD = """
import sys, torch
from pathlib import Path
from tests.model.test_compiled_bits import digest_of
print(digest_of(Path(sys.argv[1])))
"""


def digest_of(folder: Path) -> str:
    """Of everything that a model says: logits, sampled tokens and text."""
    found = hashlib.sha256()
    with opened(folder, kv_cache="q8", context=200) as engine:
        ids = [3 + i * 7 % 490 for i in range(60)]
        found.update(every_row(engine, ids).numpy().tobytes())
        for seed in range(3):
            params = SamplingParams(max_tokens=60, temperature=1.3, top_k=50, top_p=0.9, min_p=0.02, seed=seed)
            found.update(repr([token.token_id for token in engine.generator.stream(ids[:9], params)]).encode())
    return found.hexdigest()


def test_torchs_and_numpys_own_choices_change_nothing():
    """Both choose their code by the processor. Here they are made to take what an older one has."""
    old = {"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX2 FMA3"}
    for environment in ({}, old):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(BUNDLED_MODEL)],
            capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], env=os.environ | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == digest_of(BUNDLED_MODEL)
