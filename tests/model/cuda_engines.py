"""Loads whole models for the CUDA kernels, and runs those of any device, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from exl.engine.build import Engine, load_engine
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams

DENSE = Path(__file__).parents[1] / "data" / "stories260K"
STORIES = Path(__file__).parents[1] / "data" / "stories2M"
PROMPT = [1, 403, 407, 261, 378, 100, 50, 60, 70, 80, 90, 101]
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


def load(folder: Path, backend, **options) -> Engine:
    return load_engine(folder, EngineOptions(**{"context": 128, "vram": "2GB"} | options), backend=backend)


def all_logits(engine: Engine, ids) -> torch.Tensor:
    return torch.cat([chunk.to("cpu", copy=True) for chunk in engine.generator.logits(ids)])


def step_logits(engine: Engine, ids) -> torch.Tensor:
    """Logits token by token: every token is a row of a decode step, also those of the prompt."""
    sequence = engine.generator.begin(len(ids))
    rows = [engine.generator.extend(sequence, [token]).to("cpu", copy=True) for token in ids]
    engine.generator.end(sequence)
    return torch.cat(rows)


def tokens(engine: Engine, params: SamplingParams = GREEDY) -> list[int]:
    prompt = [token_id % engine.config.vocab_size for token_id in PROMPT]
    engine.generator.eos_ids = frozenset()
    return [token.token_id for token in engine.generator.stream(prompt, params)]


def some_ids(count: int, seed: int = 9) -> list[int]:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def bound(expected: torch.Tensor, num_layers: int) -> float:
    """Largest difference from an f32 model. Activations are rounded to f16: per layer seven times (normalised input,
    qkv, q and k or v in their pages, the attention's output, normalised input again, the MLP's output) and once before
    the head, each by at most 2^-12 of the largest value. The errors have both signs and spread over many channels;
    these models show at most twice their plain sum."""
    return 2 * (7 * num_layers + 1) * 2.0**-12 * float(expected.abs().max())
