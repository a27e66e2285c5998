"""Lets the chat model answer the user's messages in files of chats, and writes its answers into the files.

    python -m scripts.write_chats tests/data/calibration/SmolLM2-135M-Instruct.jsonl tests/data/chats-valid.jsonl

Each line is a chat, {"messages": [...]}. The messages of user and system were written for exl; the assistant's are
replaced by what the dense model says, sampled by transformers at temperature 0.7, seeded. The files are kept in the
repository, because another version of torch may draw other numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from scripts.fetch_smollm2 import fetch

MAX_TOKENS, BATCH, TEMPERATURE, SEED = 160, 32, 0.7, 1
Messages = list[dict[str, str]]


def answer(model: Any, tokenizer: Any, chats: list[Messages]) -> list[str]:
    """The model's answer to each chat, whose last message is the user's. Answers that are too long are cut."""
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = model.generate(**inputs, generation_config=config)
    return tokenizer.batch_decode(rows[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_all(model: Any, tokenizer: Any, chats: list[Messages]) -> list[Messages]:
    """Each chat with answers after every message of the user."""
    asked = [[message for message in chat if message["role"] != "assistant"] for chat in chats]
    done: list[Messages] = [[] for _ in chats]
    while waiting := [i for i, messages in enumerate(asked) if messages]:
        for i in waiting:
            while asked[i]:
                message = asked[i].pop(0)
                done[i].append(message)
                if message["role"] == "user":
                    break
        for start in range(0, len(waiting), BATCH):
            batch = waiting[start : start + BATCH]
            for i, text in zip(batch, answer(model, tokenizer, [done[i] for i in batch]), strict=True):
                done[i].append({"role": "assistant", "content": text})
            print(f"{start + len(batch)} of {len(waiting)} answers", file=sys.stderr)
    return done


def main() -> None:
    folder = fetch()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    for name in sys.argv[1:]:
        torch.manual_seed(SEED)
        path = Path(name)
        chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in answer_all(model, tokenizer, chats)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
