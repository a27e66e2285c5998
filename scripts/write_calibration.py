"""Lets a dense story model write its own calibration text, one story per line: tests/data/calibration/<model>.txt.

    python scripts/write_calibration.py stories260K stories2M

Sampled by transformers at temperature 1, seeded. The text is kept in the repository, because another version of torch
may draw other numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

from exl.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "tests" / "data"
NUM_STORIES, MAX_TOKENS, SEED = 320, 512, 1


def write_stories(name: str) -> list[str]:
    """Stories that the model ended itself, with white space collapsed so that each is one line."""
    folder = DATA / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_folder(folder)
    config = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_TOKENS - 1,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.bos_id,  # the next story's BOS ends a story
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    stories: list[str] = []
    while len(stories) < NUM_STORIES:
        rows = model.generate(torch.full((64, 1), tokenizer.bos_id), generation_config=config)
        for row in rows[:, 1:].tolist():
            if tokenizer.bos_id in row:
                text = tokenizer.decode(row[: row.index(tokenizer.bos_id)])
                if "\ufffd" not in text:
                    stories.append(" ".join(text.split()))
    return stories[:NUM_STORIES]


def main() -> None:
    for name in sys.argv[1:]:
        path = DATA / "calibration" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(write_stories(name)) + "\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
