"""What is told of a prompt's tokens, against transformers and against what the same model draws from: logits of whole
texts."""

from __future__ import annotations

import pytest
import torch

from exl.engine.build import Engine
from exl.engine.request import TokenRequest
from exl.planning import from_headers
from exl.sampling_params import SamplingParams
from tests.host.backends import make_backend
from tests.model.cpu_targets import needs_kernels
from tests.model.cuda_engines import STORIES, all_logits, load, some_ids

CHUNK = 32
IDS = some_ids(90)


@pytest.fixture(scope="module", params=[pytest.param("kernels", marks=needs_kernels), "shim"])
def engine(request) -> Engine:
    """Slices of seven rows."""
    patch = pytest.MonkeyPatch()
    patch.setattr(from_headers, "_MAX_LOGITS_BYTES", 7 * 4 * 512)
    backend = make_backend("plain") if request.param == "shim" else None
    options = {} if backend else {"vram": None, "device": "cpu"}
    engine = load(STORIES, backend, prefill_chunk=CHUNK, max_sequences=4, cache_tokens=512, **options)
    patch.undo()
    assert engine.generator.runner.max_logit_rows == 7
    yield engine
    engine.close()


def last_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    """As generation has them before its first token."""
    sequence = engine.generator.begin(len(ids))
    found = engine.generator.extend(sequence, ids).to("cpu", copy=True)
    engine.generator.end(sequence)
    return found[0]


def test_logits_of_a_text_are_those_that_a_prompt_gives(engine):
    """At the end of a prompt; and at every token for which a prompt that ends there has the same chunks, bit by bit."""
    found = all_logits(engine, IDS)
    for count in (1, 2, 8, 9, 31, 32, 33, 64, 70, 90):
        expected = last_logits(engine, IDS[:count])
        assert torch.equal(all_logits(engine, IDS[:count])[-1], expected), count
        if count % CHUNK == 0:
            assert torch.equal(found[count - 1], expected), count


def test_logits_of_a_text_in_company(engine):
    expected = all_logits(engine, IDS)
    engine.generator.eos_ids = frozenset()
    asked = TokenRequest(IDS[:40], SamplingParams(temperature=1.0, seed=3, max_tokens=40))
    alone = engine.generator.submit(asked, inline=True)
    alone.result(60)
    with engine.generator.submit(asked) as other:
        assert torch.equal(all_logits(engine, IDS), expected)
        other.result(60)
    assert other.answers[0].token_ids == alone.answers[0].token_ids
