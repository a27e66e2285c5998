"""The Python API: sensible results and one clear error each, on a real model."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import threading
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import exl
from exl.request_options import CONSTRAINTS, RequestOptions
from exl.sampling_params import NUMBER, OPTIONS

STORIES = Path(__file__).parents[1] / "data" / "stories260K"


@pytest.fixture(scope="module")
def llm():
    with exl.load(STORIES) as model:
        yield model


def copy_model(tmp_path: Path, **changes) -> Path:
    """The model with another config.json; a value of None takes the key out."""
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_stream_adds_up_to_generate(llm):
    asked = {"temperature": 0.9, "top_k": 40, "seed": 3, "max_tokens": 50}
    stream = llm.stream("One day", **asked)
    text = "".join(stream)
    assert text == llm.generate("One day", **asked).text == stream.completion.text


def test_completion_before_the_end_is_an_error(llm):
    stream = llm.stream("One day", 5)
    with pytest.raises(exl.ExlError, match="has not ended"):
        _ = stream.completion
    stream.close()


def test_a_list_of_prompts_gives_a_list(llm):
    prompts = ["One day", "The dog"]
    assert [done.text for done in llm.generate(prompts, 10)] == [llm.generate(p, 10).text for p in prompts]


def test_token_ids_are_taken_as_they_are(llm):
    assert llm.generate(llm.encode("One day"), 10).text == llm.generate("One day", 10).text
    assert llm.generate(llm.encode("One day"), 10).num_prompt_tokens == len(llm.encode("One day"))


def test_bos_once_and_only_from_us(llm):
    ids = llm.encode("Once")
    assert ids[0] == 1
    assert ids.count(1) == 1
    forged = llm.encode("<s>Once</s>")
    assert forged.count(1) == 1
    assert forged.count(2) == 0
    assert llm.tokenizer.decode(forged) == "<s>Once</s>"


def test_seeds(llm):
    asked = {"temperature": 1.0, "max_tokens": 30}
    first, second = llm.generate("One", **asked), llm.generate("One", **asked)
    assert first.seed != second.seed
    assert first.text != second.text
    assert llm.generate("One", seed=first.seed, **asked).text == first.text


def test_repetition_penalty_reaches_the_sampler(llm):
    plain = llm.generate("", max_tokens=60, temperature=0).token_ids
    penalized = llm.generate("", max_tokens=60, temperature=0, repetition_penalty=1.8).token_ids
    assert len(set(penalized)) > len(set(plain))


def test_end_of_sequence_ids_come_from_generation_config(llm):
    """Its list says BOS ends a story too; config.json alone says 2."""
    assert llm.defaults.eos_ids == (1, 2)
    done = llm.generate("The end.", max_tokens=500, temperature=1.0, seed=2)
    assert done.finish_reason == "stop"
    assert not {1, 2} & set(done.token_ids)


def test_sampling_defaults_come_from_generation_config(tmp_path):
    folder = copy_model(tmp_path)
    defaults = {"do_sample": True, "temperature": 0.7, "top_k": 5, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    with exl.load(folder) as llm:
        asked = {"max_tokens": 20, "seed": 5}
        by_default = llm.generate("One", **asked).text
        assert by_default == llm.generate("One", temperature=0.7, top_k=5, **asked).text
        assert by_default != llm.generate("One", temperature=0, **asked).text


def test_logits_follow_the_chunks(llm):
    ids = llm.encode("Once upon a time there was a dog")
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), llm.config.vocab_size)
    assert logits.dtype == torch.float32
    with exl.load(STORIES, prefill_chunk=3, prefill_window=6) as small:
        assert (small.logits(ids) - logits).abs().max() < 1e-2  # the f16 cache is read in other runs


def test_the_context_is_a_border(llm):
    with exl.load(STORIES, context=32) as small:
        ids = small.encode("One day") * 20
        with pytest.raises(exl.ConfigError, match=r"prompt: found \d+ tokens, the context holds 32"):
            small.generate(ids)
        with pytest.raises(exl.ConfigError, match="the context holds 32"):
            small.logits(ids)
        done = small.generate(ids[:30], max_tokens=100)
        assert (done.num_tokens, done.finish_reason) == (2, "length")
        full = small.generate(ids[:32], max_tokens=100)
        assert (full.num_tokens, full.text, full.finish_reason) == (0, "", "length")
        assert small.generate(ids[:30], max_tokens=100).token_ids == done.token_ids  # the pages came back


def test_max_tokens_zero(llm):
    done = llm.generate("One day", max_tokens=0)
    assert (done.text, done.token_ids, done.finish_reason) == ("", (), "length")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"top_p": 2.0}, "top_p"),
        ({"seed": "x"}, "seed"),
    ],
    ids=str,
)
def test_bad_values(llm, asked, message):
    with pytest.raises(exl.ConfigError, match=message):
        llm.generate("One day", **asked)


@pytest.mark.parametrize("ids", [[], [512], [-1], [1, 2.5], ["a", 1]], ids=str)
def test_bad_token_ids(llm, ids):
    with pytest.raises(exl.ConfigError, match="prompt"):
        llm.logits(ids)


def test_other_libraries_keywords(llm):
    with pytest.raises(TypeError, match=r"generate\(\) has no keyword 'max_new_tokens': exl calls it max_tokens"):
        llm.generate("One day", max_new_tokens=5)
    with pytest.raises(TypeError, match=r"stream.*max_tokens"):
        llm.stream("One day", n_predict=5)
    with pytest.raises(TypeError, match=r"load\(\) has no keyword 'n_ctx': exl calls it context"):
        exl.load(STORIES, n_ctx=5)
    with pytest.raises(TypeError, match=r"'gpu_memory_utilization': exl calls it vram \(a size such as \"6GB\"\)"):
        exl.load(STORIES, gpu_memory_utilization=0.9)
    with pytest.raises(TypeError, match="it takes model, device"):
        exl.load(STORIES, speed="high")
    for name, words in {
        "num_return_sequences": "exl calls it n",
        "eos_token_id": "exl calls it stop_token_ids; the model's own come from its files",
        "repeat_penalty": "exl calls it repetition_penalty",
        "dry_sequence_breakers": "exl calls it dry_breakers",
        "typ_p": "exl calls it typical_p",
        "mirostat": "exl calls it mirostat_tau; above 0",
        "min_new_tokens": "exl calls it min_tokens",
        "stream": "LLM.stream, LLM.stream_chat",
        "beam_width": "exl calls it num_beams",
        "cfg_scale": "exl calls it guidance_scale",
        "messages": r"LLM.complete_chat\(messages\)",
        "sampling_params": "exl calls it params",
    }.items():
        with pytest.raises(TypeError, match=rf"generate\(\) has no keyword '{name}': {words}"):
            llm.generate("One day", **{name: 1})
    for name, words in {
        "device_map": "exl calls it device",
        "tensor_parallel_size": "exl computes on one GPU",
        "trust_remote_code": "exl never runs code",
    }.items():
        with pytest.raises(TypeError, match=rf"load\(\) has no keyword '{name}': {words}"):
            exl.load(STORIES, **{name: 1})
    for call in (llm.chat().send, llm.chat().stream, llm.complete_chat, llm.stream_chat):
        with pytest.raises(TypeError, match="has no keyword 'max_new_tokens': exl calls it max_tokens"):
            call("One day", max_new_tokens=5)
    for call in (llm.chat().retry, llm.chat().continue_answer):
        with pytest.raises(TypeError, match="has no keyword 'temp': exl calls it temperature"):
            call(temp=0)


def test_signatures_show_the_options():
    for function in (exl.LLM.generate, exl.LLM.stream_chat, exl.Chat.send):
        shown = inspect.signature(function).parameters
        assert {"temperature", "stop", "prompt_progress", "params"} <= shown.keys()
        assert shown["temperature"].annotation == "float | None"


def test_the_constructor_says_how_a_model_is_loaded():
    with pytest.raises(TypeError, match=r"exl.load\('path/to/model', device='cpu'\) loads one"):
        exl.LLM("path/to/model", device="cpu")


def test_only_public_names_are_listed():
    assert dir(exl) == sorted([*exl.__all__, "__version__"])


def test_the_table_of_options_is_whole():
    """What a new sampler must be entered in: SamplingParams, and the keywords that type checkers know."""
    options = get_type_hints(RequestOptions)
    params = get_type_hints(exl.SamplingParams)
    assert [*OPTIONS, "stop"] == list(params)
    asked_for_otherwise = {"stop", "reuse_prefix", "top_logprobs", "prompt_progress", "n", "best_of", *CONSTRAINTS}
    asked_for_otherwise |= {"speculate", "draft_tokens", "deadline", "max_unread", "guidance_scale", "negative_prompt"}
    asked_for_otherwise |= {"prompt_logprobs", "lora"}
    asked_for_otherwise |= {"num_beams", "length_penalty", "early_stopping"}
    asked_for_otherwise |= {"overflow", "shift_keep"}
    assert list(OPTIONS) == [name for name in options if name not in asked_for_otherwise]
    defaults = exl.SamplingParams()
    for name, option in OPTIONS.items():
        assert options[name] == (option.kind.type | None), name
        assert options[name] == params[name] | None or name == "logit_bias", name  # which also takes pairs
        assert getattr(defaults, name) == option.default, name
        assert option.off is None or option.off == option.default, name  # nothing is done unless asked for
        assert option.help.endswith("."), name


def test_every_name_of_an_option_in_other_libraries_is_explained(llm):
    for name, option in OPTIONS.items():
        for alias, words in option.aliases.items():
            assert alias not in OPTIONS
            with pytest.raises(TypeError, match=f"has no keyword '{alias}': exl calls it {re.escape(words or name)}"):
                llm.generate("One day", **{alias: 1})


def test_every_option_reaches_the_text(llm):
    """Values at which each would be told apart, if it did anything; and bad ones are refused before anything runs."""
    values = {
        "logit_bias": {5: 1.5}, "banned_tokens": [7, 5], "stop_token_ids": (3,), "dry_breakers": ["a"], "seed": 4,
        "temperature_last": True, "penalize_prompt": False, "ignore_eos": True, "min_tokens": 2, "max_tokens": 3,
        "banned_strings": ["zq"],
    }  # fmt: skip
    values = {name: values.get(name, 0.5 if option.kind is NUMBER else 2) for name, option in OPTIONS.items()}
    values |= {"repetition_penalty": 1.5, "dry_base": 2.0}
    assert llm.generate("One day", **values).num_tokens == 3
    assert llm.generate("One day", exl.SamplingParams(**values)).num_tokens == 3
    for name in OPTIONS:
        with pytest.raises(exl.ConfigError, match=rf"^{name}: found"):
            llm.generate("One day", **{name: object()})
    for name in ("banned_tokens", "stop_token_ids", "logit_bias"):
        with pytest.raises(exl.ConfigError, match=rf"^{name}: found token id 99999, expected 0 to"):
            llm.generate("One day", **{name: {99999: 1.0} if name == "logit_bias" else [99999]})


def test_sampling_params_stand_for_options(llm):
    asked = {"temperature": 0.9, "top_k": 40, "seed": 3, "max_tokens": 20, "stop": ("zzz",)}
    params = exl.SamplingParams(**asked)
    expected = llm.generate("One day", **asked).text
    assert llm.generate("One day", params).text == expected
    assert "".join(llm.stream("One day", params)) == expected
    assert llm.generate("One day", params=params).text == expected
    assert llm.generate(["One day"], params)[0].text == expected
    assert llm.generate("One day", params, max_tokens=5).num_tokens == 5  # an option counts more
    assert llm.generate("One day", exl.SamplingParams(max_tokens=3)).seed is not None
    with pytest.raises(TypeError, match="max_tokens: given twice"):
        llm.generate("One day", 5, max_tokens=6)
    with pytest.raises(exl.ConfigError, match="max_tokens: found 'five'"):
        llm.generate("One day", "five")


def test_params_are_used_as_they_are_not_mixed_with_the_models_defaults(tmp_path):
    folder = copy_model(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 1, "eos_token_id": 2}))
    with exl.load(folder) as llm:
        params = exl.SamplingParams(max_tokens=20, seed=5)  # its top_k is 0: off
        assert (
            llm.generate("One", params).text == llm.generate("One", max_tokens=20, seed=5, top_k=0, temperature=1).text
        )
        assert llm.generate("One", params).text != llm.generate("One", max_tokens=20, seed=5, temperature=1).text


def test_stop_takes_nothing_a_text_or_texts(llm):
    free = llm.generate("One day", 40)
    assert llm.generate("One day", 40, stop=None).text == free.text
    word = free.text.split()[4]
    for stop in (word, [word], (word,)):
        assert llm.generate("One day", 40, stop=stop).text == free.text[: free.text.index(word)]
    for stop in (5, b"x", [5], {"a": 1}):
        with pytest.raises(exl.ConfigError, match="stop: found"):
            llm.generate("One day", 40, stop=stop)


def test_which_limit_cut_a_text_off(llm):
    assert llm.generate("One day", 5).limit == "max_tokens"
    assert llm.generate("One day", stop="a").limit is None
    with exl.load(STORIES, context=16) as small:
        done = small.generate("One day", 100)
        assert (done.finish_reason, done.limit) == ("length", "context")


def test_prompt_progress(llm):
    told = []
    with exl.load(STORIES, prefill_chunk=8, prefill_window=16) as small:
        ids = small.encode("One day") * 10
        small.generate(ids, 3, prompt_progress=told.append)
        assert [p.total for p in told] == [len(ids)] * len(told)
        assert [p.tokens for p in told] == sorted(p.tokens for p in told)
        assert (told[-1].tokens, told[-1].layer) == (len(ids), told[-1].num_layers)
        windows = -(-len(ids) // 8)  # all layers are in memory: a chunk a step
        assert len(told) == windows * small.config.num_layers
        told.clear()
        done = small.generate([*ids, *ids], 1, reuse_prefix=True, prompt_progress=told.append)
        assert told[-1].total == 2 * len(ids) - done.num_reused_tokens < 2 * len(ids)

        def broken(progress) -> None:
            raise RuntimeError("the caller's own")

        with pytest.raises(RuntimeError, match="the caller's own"):
            small.generate(ids, 3, prompt_progress=broken)
        assert small.generate(ids, 3).num_tokens == 3
    for value in (True, "x"):
        with pytest.raises(exl.ConfigError, match="prompt_progress: found"):
            llm.generate("One", 3, prompt_progress=value)
    with pytest.raises(exl.ConfigError, match="reuse_prefix: found 'no'"):
        llm.generate("One", 3, reuse_prefix="no")


def test_an_unfinished_stream_of_the_same_thread_keeps_nobody_waiting(llm):
    expected = llm.generate("One day", 50).text
    stream = llm.stream("One day", 50)
    first = next(stream)
    assert llm.generate("One day", 5).num_tokens == 5
    assert first + "".join(stream) == expected


def test_threads_share_a_batch(llm):
    prompts = ["One day", "The dog", "Lily", "Once"]
    expected = [llm.generate(p, 30).text for p in prompts]
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        answers[i] = "".join(llm.stream(prompts[i], 30))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [answers[i] for i in range(len(prompts))] == expected


def test_a_closed_model_says_so():
    llm = exl.load(STORIES)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate("One"), lambda: llm.logits([1]), lambda: llm.context):
        with pytest.raises(exl.ExlError, match="closed"):
            call()


def test_progress_ends_at_the_total():
    told = []
    exl.load(STORIES, progress=lambda done, total: told.append((done, total))).close()
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "mamba"}, exl.UnsupportedModelError, "model_type: found 'mamba', exl has .*llama"),
        ({"model_type": None}, exl.UnsupportedModelError, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, exl.UnsupportedModelError, "ForCausalLM"),
        ({"hidden_act": "gelu"}, exl.UnsupportedModelError, "hidden_act"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, exl.UnsupportedModelError, "rope_type: found 'su'"),
        ({"num_hidden_layers": 6}, exl.CheckpointError, "model.layers.5"),
        ({"num_hidden_layers": 4}, exl.CheckpointError, "model.layers.4"),
        ({"intermediate_size": 176}, exl.CheckpointError, r"gate_proj.*172.*176"),
        ({"num_key_value_heads": 3}, exl.ConfigError, "num_key_value_heads"),
        ({"tie_word_embeddings": False}, exl.CheckpointError, "lm_head"),
        ({"attention_bias": True}, exl.CheckpointError, "q_proj.bias is missing"),
        ({"hidden_size": "64"}, exl.ConfigError, "hidden_size: found '64'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 5, "group_size": 32}}, exl.ExlError, "bits"),
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, exl.UnsupportedModelError, "hqq"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_models_that_exl_refuses(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        exl.load(copy_model(tmp_path, **changes))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    folder = copy_model(tmp_path)
    (folder / name).unlink()
    with pytest.raises(exl.ExlError, match=name.replace("model.", "")):
        exl.load(folder)


def test_the_chat_prompt_needs_a_template(llm):
    with pytest.raises(exl.ConfigError, match="chat template"):
        llm.chat_prompt([{"role": "user", "content": "hello"}])


def test_the_chat_prompt_follows_the_template(tmp_path):
    folder = copy_model(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with exl.load(folder) as llm:
        ids = llm.chat_prompt([{"role": "user", "content": "Hello </s> dog"}])
        assert (ids[0], ids.count(1), ids[-1], ids.count(2)) == (1, 1, 2, 1)


def test_what_a_notebook_shows():
    with exl.load() as llm:
        assert repr(llm).startswith("LLM(stories, llama, 4-bit, cpu, ")
        shown = llm.generate("Once <b>upon", 3)._repr_html_()
    assert repr(llm) == "LLM(stories, llama, 4-bit, closed)"
    assert "3 tokens, length" in shown
    done = exl.Completion("<i>&", (1,), "stop", 2, 0, 0, 0.1, 0.0)
    assert "&lt;i&gt;&amp;" in done._repr_html_()
