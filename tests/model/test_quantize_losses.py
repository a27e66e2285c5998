"""Losses of round-to-nearest against independently measured figures, and of GPTQ against round-to-nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import exl
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize
from exl.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
SOURCE = DATA / "stories260K"
CALIBRATION = DATA / "calibration" / "stories260K.txt"
DENSE = 1.6438
PUBLISHED_RTN = 1.7370  # 4 bits, asymmetric groups of 32; its scales were f32, as the tests below show


def validation_ids() -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(SOURCE)
    text = (DATA / "tinystories-valid-30k.txt").read_text(encoding="utf-8")
    sequences = [tokenizer.encode(line.strip())[:512] for line in text.splitlines()]
    return [ids for ids in sequences if len(ids) >= 8]


def loss_of(logits_of) -> float:
    """``logits_of(ids)`` -> [T, V]."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in validation_ids():
            log_probs = F.log_softmax(logits_of(ids)[:-1].double(), dim=-1)
            total -= float(log_probs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
            count += len(ids) - 1
    assert count == 9136
    return total / count


def loss_of_folder(folder: Path) -> float:
    with exl.load(folder, kv_cache="f32") as llm:
        return loss_of(llm.logits)


def plainly_rounded_loss(scale_dtype: type) -> float:
    """Round-to-nearest at 4 bits in groups of 32 in NumPy, measured by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        weight = module.weight.data.numpy()
        for start in range(0, weight.shape[1], 32):
            group = weight[:, start : start + 32]
            low, high = np.minimum(group.min(1), 0)[:, None], np.maximum(group.max(1), 0)[:, None]
            scale = ((high - low) / 15).astype(scale_dtype).astype(np.float32)
            zero = np.clip(np.round(-low / scale), 0, 15)
            group[:] = (np.clip(np.round(group / scale) + zero, 0, 15) - zero) * scale
    return loss_of(lambda ids: model(torch.tensor([ids])).logits[0])


def test_published_rounding_had_f32_scales():
    assert abs(plainly_rounded_loss(np.float32) - PUBLISHED_RTN) < 1e-4


def test_our_rounding_is_the_plain_one_with_scales_as_files_hold_them(tmp_path):
    quantize(SOURCE, tmp_path / "out", QuantizeOptions(method="rtn", group_size=32))
    assert abs(loss_of_folder(tmp_path / "out") - plainly_rounded_loss(np.float16)) < 1e-4


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_gives_back_half_of_what_rounding_loses(tmp_path, act_order):
    """On average over four texts: from one to another the loss changes by 0.005. Each is a quarter of the calibration
    text; docs/formats.md has the figure with all of it."""
    stories = CALIBRATION.read_text(encoding="utf-8").splitlines(keepends=True)
    losses = []
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("".join(stories[i::4]), encoding="utf-8")
        options = QuantizeOptions(group_size=32, act_order=act_order, calibration=tmp_path / f"{i}.txt", seq_len=512)
        quantize(SOURCE, tmp_path / f"out{i}", options)
        losses.append(loss_of_folder(tmp_path / f"out{i}"))
    assert min(losses) > DENSE
    assert np.mean(losses) <= (DENSE + PUBLISHED_RTN) / 2, losses
