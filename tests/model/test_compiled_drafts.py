"""Steps that verify drafts on the CPU's own kernels: each row has the bits that its token has alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exl.batch import is_step
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.build import load_engine
from exl.planning.options import EngineOptions
from tests.model.batches import batch_of, run
from tests.model.cpu_targets import needs_kernels

CACHED = (70, 1, 255, 64, 200)  # tokens of each sequence; then up to 8 new ones
COUNTS = ((8,), (2, 1), (3, 1, 4), (1, 8, 1, 1, 1), (4, 4, 4, 4, 4), (8, 8))


def ids_of(b: int) -> list[int]:
    return [3 + (7 * b + 5 * i) % 100 for i in range(CACHED[b] + 8)]


@needs_kernels
@pytest.mark.parametrize("kv_cache", ["f32", "q8"])
def test_each_row_has_the_bits_that_it_has_alone(kv_cache):
    """As it comes first, as it is recorded and as it is replayed; steps of one shape with different new tokens each."""
    options = {"context": 320, "max_sequences": 16, "cache_tokens": 5 * 320, "kv_cache": kv_cache, "device": "cpu"}
    engine = load_engine(BUNDLED_MODEL, EngineOptions(**options))
    try:
        runner, pages = engine.generator.runner, np.arange(25).reshape(5, 5).tolist()
        alone = []
        for b, length in enumerate(CACHED):
            for start in range(0, length, 64):
                stop = min(length, start + 64)
                run(runner, batch_of([(ids_of(b)[start:stop], start, pages[b])]))
            new = [([ids_of(b)[i]], i, pages[b]) for i in range(length, length + 8)]
            alone.append(torch.cat([run(runner, batch_of([part], decode=True)) for part in new]))
        for counts in COUNTS:
            for _ in range(3):
                for chosen in (range(len(counts)), range(4, 4 - len(counts), -1)):
                    parts = [
                        (ids_of(b)[CACHED[b] : CACHED[b] + n], CACHED[b], pages[b])
                        for b, n in zip(chosen, counts, strict=True)
                    ]
                    batch = batch_of(parts, decode=True)
                    batch = replace(batch, logit_rows=np.arange(batch.num_rows, dtype=np.int32))
                    assert is_step(batch)
                    wanted = torch.cat([alone[b][:n] for b, n in zip(chosen, counts, strict=True)])
                    assert torch.equal(run(runner, batch), wanted), (counts, chosen)
        assert engine.decode_steps == "recorded, one call each"
    finally:
        engine.close()
