"""The dense stories260K checkpoint generates, greedily, exactly the story that its authors published."""

from __future__ import annotations

from pathlib import Path

import pytest

import exl

STORIES = Path(__file__).parents[1] / "data" / "stories260K"

# llama2.c, doc/stories260K.md: temperature 0, 256 tokens, prompt = BOS alone.
PUBLISHED = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, \
red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, "Don't worry, \
Lily. We can help you."""


@pytest.mark.parametrize("kv_cache", ["f32", "f16"])
def test_the_published_story_character_for_character(kv_cache):
    with exl.load(STORIES, kv_cache=kv_cache) as llm:
        done = llm.generate("", max_tokens=256, temperature=0)
    assert done.text == PUBLISHED
    assert done.num_tokens == 256
