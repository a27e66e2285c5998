"""The model for lm-evaluation-harness: the harness's own tasks and numbers against its own model for transformers, on
the same weights; and what it makes of texts, templates and options."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.errors import ConfigError
from exl.lm_eval import ExlLM
from tests.model import lm_eval_child

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
STORIES = DATA / "stories260K"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and no_system %}"
    "{{ raise_exception('no system message') }}{% endif %}"
    "{{ m.role }}: {{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> Path:
    """A folder with what the harness has written."""
    folder = tmp_path_factory.mktemp("harness")
    offline = {"HF_HOME": str(folder), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, lm_eval_child.__file__, STORIES, BUNDLED_MODEL, folder],
        capture_output=True,
        text=True,
        cwd=DATA / "lm_eval",
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **offline},
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "|stories_choices|" in done.stdout
    return folder


def test_three_kinds_of_tasks_as_with_transformers(harness):
    """Choices, answers up to a stop string, and whole texts, some of them longer than the context of 96 tokens; by the
    same weights in f32. Sums over up to 800 tokens differ in f32 by some 1e-4."""
    found = json.loads((harness / "compared.json").read_text())
    own, other = found["exl"], found["transformers"]
    for task in lm_eval_child.TASKS:
        for name, value in other["results"][task].items():
            wanted = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert own["results"][task][name] == wanted, (task, name)
    for mine, theirs in zip(own["samples"]["stories_choices"], other["samples"]["stories_choices"], strict=True):
        for ((value, is_greedy),), ((right, wanted),) in zip(mine, theirs, strict=True):
            assert value == pytest.approx(right, abs=2e-3)
            assert is_greedy == wanted
    assert {resp[0][1] for sample in other["samples"]["stories_choices"] for resp in sample} == {True, False}
    assert own["samples"]["stories_endings"] == other["samples"]["stories_endings"]
    for mine, theirs in zip(own["samples"]["stories_texts"], other["samples"]["stories_texts"], strict=True):
        assert mine[0][0] == pytest.approx(theirs[0][0], abs=2e-2)
    assert {"acc,none", "acc_norm,none"} <= set(own["results"]["stories_choices"])
    assert own["results"]["stories_texts"]["word_perplexity,none"] > 1


def test_the_harness_own_command(harness):
    (path,) = harness.rglob("results_*.json")
    found = json.loads(path.read_text())
    assert set(found["results"]) == set(lm_eval_child.TASKS)
    assert found["results"]["stories_choices"]["acc,none"] == 1.0  # both of the first two are easy
    assert found["config"]["exl_kv_cache"] == "f16"
    assert re.fullmatch("[0-9a-f]{64}", found["config"]["exl_tensors"])


# ---- one request at a time


@pytest.fixture(scope="module")
def lm():
    with exl.load(STORIES, device="cpu", kv_cache="f32", context=128, progress=False) as llm:
        yield ExlLM(llm)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(STORIES)


def asked(*args: object) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in args]


def test_texts_become_the_tokens_of_transformers(lm, tokenizer):
    for text in ("Once upon a time", "", " a", "<s>Once</s> upon", "Once <s> upon"):
        begins = text.startswith("<s>")
        assert lm.tok_encode(text) == tokenizer.encode(text, add_special_tokens=not begins)
        for add in (True, False):
            assert lm.tok_encode(text, add_special_tokens=add) == tokenizer.encode(text, add_special_tokens=add)
    assert (lm.prefix_token_id, lm.eot_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    without = ExlLM(lm.llm, add_bos_token=False, prefix_token_id=9)
    assert without.tok_encode("Once") == tokenizer.encode("Once", add_special_tokens=False)
    assert without.prefix_token_id == 9
    assert ExlLM(lm.llm, add_bos_token=True).tok_encode("Once")[0] == tokenizer.bos_token_id
    with pytest.raises(ConfigError, match="tok_encode: found left_truncate_len"):
        lm.tok_encode("Once", left_truncate_len=3)


def test_answers_end_where_they_should(lm):
    begin = "Once upon a time there was a little girl named Lily. She"
    whole = lm.generate_until(asked((begin, {"max_gen_toks": 40})))[0]
    assert len(lm.llm.tokenizer.encode(whole, bos=False)) in range(36, 45)
    assert "." in whole
    cases = {
        whole.split(".")[0]: {"until": ["."], "max_gen_toks": 40},
        whole.split("\n")[0].split("a")[0]: {"until": "a", "max_gen_toks": 40},
        whole: {"until": ["", "nothing like it"], "max_new_tokens": 40, "temperature": 0.8, "do_sample": False},
    }
    found = lm.generate_until(asked(*((begin, kwargs) for kwargs in cases.values())))
    assert found == list(cases)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 40, "max_gen_toks": 20}
    draws = [one.generate_until(asked((begin, sampling)))[0] for one in (lm, lm, ExlLM(lm.llm, seed=5))]
    assert draws[0] == draws[1] != draws[2]
    repeats = lm.generate_until(asked(*[(begin, sampling)] * 3, ("One day", sampling)))
    assert len(set(repeats)) == 4
    assert repeats[0] == draws[0]  # whatever else is asked
    assert repeats == lm.generate_until(asked(*[(begin, sampling)] * 3, ("One day", sampling)))


def test_a_context_that_does_not_fit_loses_its_beginning(lm):
    """128 tokens hold 28 of the answer and the last 100 of the context."""
    text = (DATA / "tinystories-valid-30k.txt").read_text()[:900]
    ids = lm.tok_encode(text)
    assert len(ids) > 200
    (found,) = lm.generate_until(asked((text, {"max_gen_toks": 28})))
    expected = lm.llm.generate(ids[-100:], 28, temperature=0.0)
    assert found == lm.llm.tokenizer.decode(list(expected.token_ids))
    ((value, _),) = lm._loglikelihood_tokens([(None, ids[:200], ids[200:205])])
    ((right, _),) = lm._loglikelihood_tokens([(None, ids[205 - 129 : 200], ids[200:205])])
    assert value == right
    with pytest.raises(ConfigError, match="a continuation of 129 tokens, the context holds 128"):
        lm._loglikelihood_tokens([(None, ids[:3], ids[3:132])])
    with pytest.raises(ConfigError, match="max_gen_toks: found 128, expected 1 to 127"):
        lm.generate_until(asked((text, {"max_gen_toks": 128})))


def test_more_requests_than_are_under_way_come_back_in_order(lm):
    few = ExlLM(STORIES, batch_size=2, max_length=64, device="cpu", kv_cache="f32", progress=False)
    assert (few.llm.max_sequences, few.max_length) == (2, 64)
    pairs = [(("a", "b"), [1, 10 + i % 7, 20 + i], [30 + i, 5]) for i in range(40)]
    found = few._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert found == [few._loglikelihood_tokens([pair], disable_tqdm=True)[0] for pair in pairs]
    assert len(set(found)) == 40
    few.close()


def test_what_is_told_to_the_harness_cache(lm):
    told = []
    one = ExlLM(lm.llm)
    one.cache_hook = SimpleNamespace(add_partial=lambda *args: told.append(args))
    scores = one.loglikelihood(asked(("Once upon", " a time")))
    texts = one.loglikelihood_rolling(asked(("One day",)))
    made = one.generate_until(asked(("One day", {"max_gen_toks": 3})))
    assert told == [
        ("loglikelihood", ("Once upon", " a time"), scores[0]),
        ("loglikelihood_rolling", ("One day",), texts[0]),
        ("generate_until", ("One day", {"max_gen_toks": 3}), made[0]),
    ]


def test_reasoning_is_left_out_and_may_hold_a_stop_text(lm):
    begin = "Once upon a time there was a little girl named Lily. She"
    whole = lm.generate_until(asked((begin, {"max_gen_toks": 40})))[0]
    mark = whole[10:14]
    (found,) = ExlLM(lm.llm, think_end_token=mark).generate_until(asked((begin, {"max_gen_toks": 40, "until": ["."]})))
    assert found == whole.split(mark)[-1].lstrip().split(".")[0]


def test_chat_templates_are_those_of_transformers(tmp_path, tokenizer):
    folder = tmp_path / "chat"
    shutil.copytree(STORIES, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hello "}]
    begun = [*messages, {"role": "assistant", "content": "Well,"}]
    with exl.load(folder, device="cpu", progress=False) as llm:
        lm = ExlLM(llm)
        assert lm.apply_chat_template(messages) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert lm.apply_chat_template(begun, add_generation_prompt=False) == theirs.apply_chat_template(
            begun, tokenize=False, continue_final_message=True
        )
        assert lm.tok_encode(lm.apply_chat_template(messages)).count(theirs.bos_token_id) == 1
        assert lm.chat_template(True) == TEMPLATE
        assert lm.chat_template(False) is None
        assert lm.tokenizer_name == str(folder).replace("/", "__")
        strict = ExlLM(llm, chat_template_args={"no_system": True})
        assert strict.apply_chat_template(messages) == lm.apply_chat_template(messages[1:])
        with pytest.raises(ConfigError, match="no system message"):
            strict.apply_chat_template([messages[0]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": "many"}, "batch_size: found 'many', expected 'auto' or an integer above 0"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"batch_size": 4, "max_sequences": 2}, "max_sequences: found 2 with batch_size=4, expected one of them"),
        ({"max_length": 64, "context": 32}, "context: found 32 with max_length=64"),
        ({"device": "nowhere"}, "device"),
        ({"kv_cache": "q9"}, "kv_cache"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        ExlLM(STORIES, progress=False, **options)


def test_options_that_exl_does_not_have(lm):
    with pytest.raises(TypeError, match="dtype"):
        ExlLM(STORIES, dtype="float16")
    with pytest.raises(ConfigError, match="context: found it with a model that is loaded already"):
        ExlLM(lm.llm, max_length=64)
    with pytest.raises(TypeError, match="num_return_sequences"):
        lm.generate_until(asked(("One", {"num_return_sequences": 2, "max_gen_toks": 5})))
    with pytest.raises(ConfigError, match="has no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    for given in ({"batch_size": 1, "device": "cuda:0"}, {"batch_size": "auto:4"}):  # the harness's defaults
        assert ExlLM(lm.llm, **given).llm is lm.llm
