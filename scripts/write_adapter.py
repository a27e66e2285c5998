"""Trains a LoRA adapter for the story models with peft, a few steps on one sentence: tests/data/adapter.

    python -m scripts.write_adapter tests/data/stories260K tests/data/adapter

Needs peft, which is no dependency of exl. The adapter changes q_proj and v_proj, which have the same shapes in
tests/data/stories260K and in the model that ships with exl. Beside it, ``expected.safetensors`` has a text's token ids
(i32) and the logits after them (f32 [tokens, V]) that peft computes with the adapter beside the weights, in f32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

STEPS, RATE = 30, 0.02
TEXT = [1, 403, 407, 261, 378, 100, 50, 60, 70, 80, 90, 101]
LEARNT = [1, 450, 12, 77, 300, 301, 302, 303, 9, 8, 7, 6, 5, 4, 3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 3},
        alpha_pattern={r"layers\.[12]\.self_attn\.q_proj": 3},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    ids = torch.tensor([LEARNT])
    for _ in range(STEPS):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    adapted.peft_config["default"].base_model_name_or_path = "stories260K"
    adapted.save_pretrained(arguments.folder)
    (arguments.folder / "README.md").unlink(missing_ok=True)
    with torch.no_grad():
        logits = adapted(torch.tensor([TEXT])).logits[0]
    save_file(
        {"ids": torch.tensor(TEXT, dtype=torch.int32), "logits": logits}, arguments.folder / "expected.safetensors"
    )


if __name__ == "__main__":
    main()
