"""How far figures move when a reference's predictions are rounded for the disk, the way ``exl eval --record`` does it
and the ways that were not taken: f16, and 16 bits in even steps.

    python -m scripts.recording_error MODEL TEXT [--documents auto] [--limit 8] [--kv-cache q8]

The reference is the model with an f32 cache, the candidate the same model with ``--kv-cache``. Holds all predictions of
both in memory: 16 bytes per token and token of the vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

import exl
from exl.evaluate import divergence, predictions, read_passages
from exl.evaluation.recording import decode, encode

QUANTILES = (0.5, 0.99, 0.999)


def _in_f16(log_probs: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(log_probs.half().double(), 1)


def _evenly(log_probs: torch.Tensor) -> torch.Tensor:
    below = log_probs.amax(1, keepdim=True) - log_probs
    step = below.amax(1, keepdim=True) / 65535
    return torch.log_softmax(-(below / step).round() * step, 1)


def _recorded(log_probs: torch.Tensor) -> torch.Tensor:
    return decode(encode(log_probs, torch.zeros(len(log_probs), dtype=torch.int64)))


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "f16": _in_f16,
    "u16, even steps": _evenly,
    "as recorded": _recorded,
}


def figures(divergences: np.ndarray) -> np.ndarray:
    return np.array([divergences.mean(), *np.quantile(divergences, QUANTILES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--documents", default="auto")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--kv-cache", default="q8")
    args = parser.parse_args()
    found = []
    for kv_cache in ("f32", args.kv_cache):
        with exl.load(args.model, context=512, kv_cache=kv_cache, arithmetic="f32", progress=False) as llm:
            passages = read_passages(args.text, llm.tokenizer, args.documents, limit=args.limit)
            found.append(torch.cat([rows for passage in passages for rows in predictions(llm, passage)]))
    p, q = found
    exact = divergence(p, q)
    print(f"{len(exact)} tokens, KL divergence: mean, median, 99th and 99.9th percentile")
    print("exact           ", " ".join(f"{value:.3e}" for value in figures(exact)))
    for name, rounded in WAYS.items():
        other = divergence(rounded(p), q)
        shares = " ".join(f"{100 * (a / b - 1):+8.4f} %" for a, b in zip(figures(other), figures(exact), strict=True))
        print(f"{name:16} {shares}   at most {np.abs(other - exact).max():.1e}")


if __name__ == "__main__":
    main()
