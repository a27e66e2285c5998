"""scripts/kernels_demo.py, which ``make kernels-demo`` runs: a shorter run, and cases in which it must fail."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from scripts import kernels_demo


def test_a_short_story_is_the_same_through_kernels_and_torch(capsys):
    """The demo's prompt is longer than decode kernels take, so both attention kernels run."""
    assert kernels_demo.main(["--tokens", "6"]) == 0
    out = capsys.readouterr().out
    for source in ("linear_q.cu", "linear_q_wide.cu", "attention_decode.cu", "attention_prefill.cu", "sample.cu"):
        assert f"cuda/{source}: " in out
    assert f"\n{kernels_demo.PROMPT} named Lily" in out
    assert "6 tokens in " in out
    assert "the same, word for word" in out


def test_another_story_is_an_error_that_shows_it(capsys, monkeypatch):
    through_torch = kernels_demo.through_torch

    def other(prompt, num_tokens):
        done = through_torch(prompt, num_tokens)
        return replace(done, text=" SAD ENDING", token_ids=(*done.token_ids[:3], 7))

    monkeypatch.setattr(kernels_demo, "through_torch", other)
    assert kernels_demo.main(["--tokens", "4"]) == 1
    out = capsys.readouterr().out
    assert "THEY DIFFER after 3 tokens" in out
    assert "SAD ENDING" in out
    assert "word for word" not in out


def test_a_machine_without_a_compiler(capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert kernels_demo.main([]) == 2
    assert "g++ is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["0", "-3", "many", "500"])
def test_lengths_that_make_no_story_are_refused(capsys, tokens):
    with pytest.raises(SystemExit) as stopped:
        kernels_demo.main(["--tokens", tokens])
    assert stopped.value.code == 2
    assert "--tokens" in capsys.readouterr().err
