"""What a person can give that makes no sense, wherever they can give it: one line that says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import exl
from exl.ops.cpu_target import cpu_target


@pytest.fixture(scope="module")
def llm():
    with exl.load() as llm:
        yield llm


def assert_refused(function, error, message, *args, **options) -> None:
    with pytest.raises(error, match=message) as caught:
        function(*args, **options)
    first = str(caught.value).splitlines()[0]
    assert len(first) < 400
    assert error is exl.MemoryBudgetError or first == str(caught.value)  # which has a table below


@pytest.mark.parametrize("function", [exl.load, exl.plan], ids=["load", "plan"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, r"^model: found '', expected a folder or a Hugging Face repository id$"),
        ({"model": 5}, r"^model: found 5, expected"),
        ({"model": "no such model"}, r"^no such model: no such folder here, and not a Hugging Face repository id"),
        ({"model": Path("a/b")}, r"^a/b: no such folder here, and not a Hugging Face repository id"),
        ({"model": "x" * 5000}, r"^'xxx.*xxx': File name too long$"),
        ({"model": "a\0b"}, r"no such folder here|null"),
        ({"model": "a/b", "revision": 5}, r"^revision: found 5, expected a branch, a tag or a commit$"),
        ({"model": "a/b", "revision": ""}, r"^revision: found '', expected"),
        ({"model": "a/b", "token": 5}, r"^token: found a int, expected a text"),
        ({"model": "a/b", "token": "secret\nsecret"}, r"^token: found characters that a token cannot contain"),
        ({"model": "a/b", "token": "secrät"}, r"^token: found characters that a token cannot contain"),
        ({"ram": "banana"}, r"^ram: found 'banana', expected a size such as '6GB'"),
        ({"ram": "9" * 400 + "GB"}, r"^ram: found '9{50}"),
        ({"ram": -1}, r"^ram: found -1, expected a size"),
        ({"vram": "banana"}, r"^vram: found 'banana', expected a size"),
        ({"vram": 5.5}, r"^vram: found 5\.5, expected a size"),
        ({"vram": ["8GB", None]}, r"^vram: found None, expected a size"),
        ({"context": "banana"}, r"^context: found 'banana', expected a whole number"),
        ({"kv_cache": ["f16"]}, r"^kv_cache: found \['f16'\], expected one of f32"),
        ({"head": "banana"}, r"^head: found 'banana', expected 'file', 8 or 4$"),
        ({"max_sequences": 0}, r"^max_sequences: found 0, expected a whole number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_options(function, options, message):
    with pytest.raises(exl.ExlError, match=message) as caught:
        function(**options)
    assert "\n" not in str(caught.value)
    assert "secr" not in str(caught.value)


BAD_ARCHS = ["banana", "", 3, -1, True, 8, 0.5, 5.2, "5.2", "8.65", 8.65, "sm_", "sm_50", "a86", 1000, float("nan"), ()]


@pytest.mark.parametrize("arch", BAD_ARCHS)
def test_architectures(arch):
    message = rf"^arch: found {re.escape(repr(arch))}, expected a compute capability of 6\.0 or higher, such as 8\.6"
    assert_refused(exl.plan, exl.ConfigError, message, arch=arch, vram="8GB")


def test_a_budget_that_is_too_small_names_the_memory_and_its_budget():
    needs, fit = "with every layer streamed, the budget is", r"MB too little\. Would fit:"
    most = r"1\d\d" if cpu_target().compiled else r"\d\d"  # own kernels have a bound of 128 MiB
    message = rf"needs {most}\.\d+ MB {needs} 1\.00 KB: {most}\.\d+ {fit} ram='"
    assert_refused(exl.plan, exl.MemoryBudgetError, message, ram=1000)
    message = rf"needs \d+\.\d+ MB of cuda:0 {needs} 100\.00 MB: \d+\.\d+ {fit} vram='"
    assert_refused(exl.plan, exl.MemoryBudgetError, message, vram="100MB")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, r"^prompt: found None, expected a text, a list of texts, or token ids$"),
        (5, r"^prompt: found 5, expected"),
        (b"bytes", r"^prompt: found b'bytes', expected"),
        ([1.5], r"^prompt: found \[1\.5\], expected"),
        (["a text", 5], r"^prompt: found \['a text', 5\], expected"),
        ([], r"^prompt: found no tokens, expected at least one$"),
        ([1, -1], r"^prompt: found token id -1, expected an integer from 0 to 511$"),
        ([512], r"^prompt: found token id 512, expected"),
        ([1] * 600, r"^prompt: found 600 tokens, the context holds 512$"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_prompts(llm, prompt, message):
    assert_refused(llm.generate, exl.ConfigError, message, prompt, max_tokens=1)


def test_integers_of_other_libraries_are_token_ids(llm):
    expected = llm.generate([1, 403], max_tokens=4, temperature=0).token_ids
    assert llm.generate(np.array([1, 403]), max_tokens=4, temperature=0).token_ids == expected


@pytest.mark.parametrize("stop", [5, [5], {"a"}])
def test_stop_strings(llm, stop):
    assert_refused(llm.generate, exl.ConfigError, r"^stop: found ", "a", stop=stop)


@pytest.mark.parametrize("text", ["", "  \n", 5])
def test_messages(llm, text):
    chat = llm.chat()
    assert_refused(chat.send, exl.ConfigError, r"^message: found .*, expected a text that is not empty$", text)
    assert chat.messages == []


def test_system_prompts(llm):
    assert_refused(llm.chat, exl.ConfigError, r"^system: found 5, expected a text or None$", 5)
    chat = llm.chat("You are brief.")
    with pytest.raises(exl.ConfigError, match=r"^system: found 5"):
        chat.system = 5
    assert chat.system == "You are brief."


@pytest.mark.parametrize("path", ["/", "/no such folder/chat.json", "a\0b"])
def test_places_to_save_a_chat(llm, path):
    assert_refused(llm.chat().save, exl.ConfigError, r": cannot be written: ", path)


def test_a_message_that_is_no_unicode_is_not_saved_in_part(llm, tmp_path):
    chat = llm.chat()
    chat.add("user", "\ud800")
    assert_refused(chat.save, exl.ConfigError, r": cannot be written: ", tmp_path / "chat.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no such model"], r"no such model: no such folder here, and not a Hugging Face repository id \(owner/name\)"),
        (["--ram", "banana"], r"ram: found 'banana', expected a size such as '6GB', .*"),
        (["--vram", "8GB,banana"], r"vram: found 'banana', expected a size .*"),
        (["--vram", "8GB", "--arch", "3"], r"arch: found '3', expected a compute capability of 6\.0 or higher, .*"),
        (["--vram", "100MB"], r".*: needs .* the budget is 100\.00 MB: .* too little\. Would fit: vram='.*"),
        (["--gpu", "RTX 3060"], r"gpu: found 'RTX 3060', which is RTX 3060 8GB or RTX 3060 12GB: say which"),
        (["--shape", "llama-2-8b"], r"shape: found 'llama-2-8b'; did you mean .*llama-2-7b.*\?"),
        (["--arch", "89"], r"arch: found '89' in a plan for the CPU; expected vram= or gpu= with it"),
        (["--context", "banana"], r"context: found 'banana', expected a number of tokens or auto"),
    ],
    ids=" ".join,
)
def test_one_line_from_the_command_line(args, message):
    done = subprocess.run(
        [sys.executable, "-m", "exl.cli", "plan", *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"exl: error: {message}\n", done.stderr), done.stderr
