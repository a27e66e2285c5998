"""The loss table of docs/formats.md: quantizes the two story models in every way and measures each.

    python scripts/losses.py            # prints the table, about half an hour on two cores
    python scripts/losses.py FOLDER     # the loss of one model

Loss: each line of tests/data/tinystories-valid-30k.txt is stripped, encoded with BOS and cut to 512 tokens; lines of
fewer than 8 tokens are skipped. Every token after the first counts once. The loss is the mean of their negative
log-likelihoods, in nats. The model runs in f32.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import exl
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize

DATA = Path(__file__).parents[1] / "tests" / "data"
GROUPS = {"stories260K": (32, 64), "stories2M": (32, 64, 128)}  # 128 does not divide a hidden size of 64
METHODS: dict[str, dict[str, object]] = {
    "RTN": {"method": "rtn"},
    "GPTQ": {"act_order": False},
    "GPTQ, act-order": {"act_order": True, "static_groups": False},
    "GPTQ, act-order, static groups": {"act_order": True, "static_groups": True},
}


def validation_loss(folder: str | Path) -> tuple[float, int]:
    """Nats per token, and the number of tokens that were counted."""
    total, count = 0.0, 0
    with exl.load(folder, kv_cache="f32", arithmetic="f32") as llm:
        for line in (DATA / "tinystories-valid-30k.txt").read_text(encoding="utf-8").splitlines():
            ids = llm.encode(line.strip())[:512]
            if len(ids) < 8:
                continue
            log_probs = F.log_softmax(llm.logits(ids)[:-1].double(), dim=-1)
            total -= float(log_probs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
            count += len(ids) - 1
    return total / count, count


def quantized_loss(name: str, **options: object) -> float:
    with tempfile.TemporaryDirectory() as folder:
        calibration = DATA / "calibration" / f"{name}.txt"
        quantize(DATA / name, Path(folder) / "out", QuantizeOptions(calibration=calibration, **options))
        return validation_loss(Path(folder) / "out")[0]


def main() -> None:
    if len(sys.argv) > 1:
        print("{:.4f} nats over {} tokens".format(*validation_loss(sys.argv[1])))
        return
    print("| model | bits | group | " + " | ".join(METHODS) + " |")
    print("| --- " * (3 + len(METHODS)) + "|")
    for name, groups in GROUPS.items():
        print(f"| {name} | dense | | " + f"{validation_loss(DATA / name)[0]:.4f} |" + " |" * (len(METHODS) - 1))
        for bits in (8, 4, 3, 2):
            for group_size in groups:
                losses = [quantized_loss(name, bits=bits, group_size=group_size, **how) for how in METHODS.values()]
                row = " | ".join(f"{loss:.4f}" for loss in losses)
                print(f"| {name} | {bits} | {group_size} | {row} |", flush=True)


if __name__ == "__main__":
    main()
