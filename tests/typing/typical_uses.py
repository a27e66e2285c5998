"""What users write, for mypy --strict: never run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import exl
from exl import Chat, Completion, PromptProgress, SamplingParams, TextIterator, TokenLogprob

plan: exl.MemoryPlan = exl.plan("path/to/model", vram="12GB", context=8192, kv_cache="q8")
print(plan, plan.num_bytes, plan.table(), plan.to_json())


def loading(done: int, total: int) -> None:
    print(done, total)


def reading(progress: PromptProgress) -> None:
    print(progress.tokens / progress.total, progress.layer, progress.num_layers)


with exl.load(Path("path/to/model"), "cpu", ram="1GB", head=8, arithmetic="f32", progress=loading) as llm:
    one: Completion = llm.generate("Once upon a time", 100)
    same: Completion = llm.generate([1, 2, 3], max_tokens=100, temperature=0.7, stop=None, seed=1)
    several: list[Completion] = llm.generate(["Once", "One day"], max_tokens=10, stop=["\n"])
    params = SamplingParams(temperature=0.8, top_p=0.95, min_p=0.05, max_tokens=50, stop="\n\n")
    text: str = llm.generate("Once", params, prompt_progress=reading).text
    likeliest: Completion = llm.generate("Once", 9, num_beams=3, n=2, length_penalty=0.5, early_stopping="never")
    score: float | None = likeliest.choices[0].beam_score
    guided: Completion = llm.generate("Once", 9, guidance_scale=1.5, negative_prompt=[1, 2])
    alternatives: tuple[TokenLogprob, ...] | None = llm.generate("Once", 5, top_logprobs=5).logprobs
    scores: tuple[TokenLogprob | None, ...] | None = llm.generate("Once", 0, prompt_logprobs=5).prompt_logprobs

    with llm.stream("Once", params, seed=2) as stream:
        for piece in stream:
            print(piece.upper(), end="")
        print(stream.completion.finish_reason)

    chat: Chat = llm.chat("You are brief.", overflow="drop-oldest")
    print(chat.send("Hello", 20, temperature=0.7).text, chat.retry(params).limit)
    pieces: TextIterator = chat.stream("And then?", top_k=40)
    print("".join(pieces), chat.undo(), chat.num_forgotten)
    chat.save("chat.json")
    chat = Chat.load(llm, "chat.json")
    messages = [{"role": "user", "content": "Hello"}]
    answer: Completion = llm.complete_chat(messages, max_tokens=20)
    chat = llm.chat(messages=messages)
    print(llm.logits(llm.encode("Once")).shape, llm.context)
    print(llm.embed(["Once", "One day"], "last", normalize=True).shape, llm.embed([[1, 2], [3]]).dtype)

    async def stories() -> str:
        async with llm.stream("Once", 10) as pieces:
            return "".join([piece async for piece in pieces])

    print(asyncio.run(stories()))

try:
    exl.load("nowhere", rope={"rope_type": "yarn", "factor": 4.0})
except exl.CheckpointError as error:
    print(error)
