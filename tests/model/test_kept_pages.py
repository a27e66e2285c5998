"""Pages that a model has written: to RAM and back, to a file and back. What is generated on them has the same bits."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from exl.cache.file import load_prefixes, save_prefixes
from exl.cache.page_pool import PagePool
from exl.cache.tier import ram_tier
from exl.engine.build import Engine
from exl.sampling_params import SamplingParams
from tests.host.backends import make_backend
from tests.model.cuda_engines import DENSE, load, some_ids

PROMPT = some_ids(140)
PARAMS = SamplingParams(temperature=1.0, seed=5, max_tokens=12)


def answer(engine: Engine, prompt: list[int]) -> tuple[list[int], int]:
    """Token ids, and how many of the prompt's were not computed."""
    engine.generator.eos_ids = frozenset()
    made = list(engine.generator.stream(prompt, PARAMS, reuse_prefix=True))
    return [token.token_id for token in made], made[0].num_reused


def pages(engine: Engine, num_tokens: int) -> list[torch.Tensor]:
    """The bytes of the pages that hold a prompt's beginning."""
    found, kv = engine.generator.pool.find(PROMPT[:num_tokens]).pages, engine.generator.runner.kv
    out = [torch.zeros(kv.page_bytes, dtype=torch.uint8) for _ in found]
    for page, data in zip(found, out, strict=True):
        kv.read_page(page, data)
    return out


@pytest.fixture(params=["shim", "cpu"])
def engine(request):
    backend = make_backend("plain") if request.param == "shim" else None
    options = {} if backend else {"vram": None, "device": "cpu"}
    engine = load(DENSE, backend, context=192, kv_cache="q8", **options)
    yield engine
    engine.close()


def test_pages_that_went_to_ram_and_back_are_the_same(engine):
    kv = engine.generator.runner.kv
    with ExitStack() as stack:
        fence = engine.generator.runner.decoder.ops.fence
        pool = PagePool(kv.num_pages, tier=ram_tier(kv, 4 * kv.page_bytes, fence, stack))
        engine.generator.pool = engine.generator.scheduler.pages.pool = pool
        answer(engine, PROMPT)
        again, num_reused = answer(engine, PROMPT)  # from the pages that are still there
        assert num_reused == len(PROMPT) - 1
        before = pages(engine, 128)
        for seed in (1, 2):
            answer(engine, some_ids(170, seed))
        kv.zero_pages(range(kv.num_pages))  # nothing of it is left on the device
        assert pages(engine, 128) == []
        assert engine.generator.pool.find(PROMPT).num_tokens == 128
        answered, num_reused = answer(engine, PROMPT)
        assert num_reused == 128
        assert all(map(torch.equal, pages(engine, 128), before))
        assert len(before) == 2
        assert answered == again
        assert engine.generator.pool.stats.pages_restored == 2
        engine.generator.pool.check([])


def test_pages_from_a_file_are_the_same(engine, tmp_path):
    kv = engine.generator.runner.kv
    answer(engine, PROMPT)
    again, _ = answer(engine, PROMPT)
    engine.generator.runner.decoder.ops.fence()
    before = pages(engine, 128)
    num_tokens = save_prefixes(tmp_path / "saved", engine.generator.pool, kv, {})
    assert num_tokens >= len(PROMPT)
    engine.generator.pool.clear()
    kv.zero_pages(range(kv.num_pages))
    assert answer(engine, PROMPT[:1])[1] == 0
    engine.generator.pool.clear()
    assert load_prefixes(tmp_path / "saved", engine.generator.pool, kv, {}) == num_tokens
    assert all(map(torch.equal, pages(engine, 128), before))
    assert len(before) == 2
    answered, num_reused = answer(engine, PROMPT)
    assert (answered, num_reused) == (again, len(PROMPT) - 1)
