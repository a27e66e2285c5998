"""The tokens that end an answer, as templates of many families and the vocabulary tell them."""

from __future__ import annotations

import pytest

from exl.text.tokenizer import Tokenizer
from tests.unit.text.chat_templates import CHATML, DEEPSEEK_R1, LLAMA_2, LLAMA_3, MISTRAL, QWEN_3, QWEN_25
from tests.unit.text.tokenizer_folders import byte_level, plain, sentencepiece, write_folder

ROLES = ["<|user|>", "<|assistant|>", "<|system|>"]
DEEPSEEK_TOKENS = [f"<\uff5c{name}\uff5c>" for name in ("begin▁of▁sentence", "User", "Assistant")]
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<turn_over>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
    "ASSISTANT: {{ m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)  # fmt: skip
ANSWER_TAG = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<answer>{{ m.content }}</answer>"
    "{% else %}{{ m.content }}{% endif %}<|over|>\n{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type != 'text' %}{{ raise_exception('text only') }}{% endif %}{{ part.text }}{% endfor %}<|over|>\n"
    "{% endfor %}"
)
ALWAYS_ASKS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}<|assistant|>"
ASSISTANT_MAY_NOT_BE_LAST = (
    CHATML + "{% if messages[-1].role == 'assistant' %}{{ raise_exception('user last') }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "tokenizer_json", "names", "end"),
    [
        (CHATML.replace("<|im_end|>", "<|over|>"), byte_level("<|im_start|>", "<|over|>"), {}, "<|over|>"),
        (CHATML.replace("<|im_end|>", "<|over|>"), byte_level("<|im_start|>", plain("<|over|>")), {}, "<|over|>"),
        (QWEN_25.replace("<|im_end|>", "<|over|>"), byte_level("<|im_start|>", "<|over|>"), {}, "<|over|>"),
        (QWEN_3.replace("<|im_end|>", "<|over|>"), byte_level("<|im_start|>", "<|over|>"), {}, "<|over|>"),
        (
            LLAMA_3.replace("<|eot_id|>", "<|over|>"),
            byte_level("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|over|>"),
            {"bos_token": "<|begin_of_text|>"},
            "<|over|>",
        ),
        (LLAMA_2, sentencepiece(), {"bos_token": "<s>", "eos_token": "</s>"}, None),
        (MISTRAL, sentencepiece("[INST]", "[/INST]"), {"bos_token": "<s>", "eos_token": "</s>"}, None),
        (ZEPHYR, sentencepiece(*ROLES, "<|over|>"), {"bos_token": "<s>", "eos_token": "<|over|>"}, "<|over|>"),
        (GEMMA, sentencepiece("<start_of_turn>", "<turn_over>"), {"bos_token": "<s>"}, "<turn_over>"),
        (VICUNA, sentencepiece("<|over|>"), {"bos_token": "<s>", "eos_token": "<|over|>"}, "<|over|>"),
        (ANSWER_TAG, byte_level("<|im_start|>", "<|over|>", plain("</answer>")), {}, "<|over|>"),
        (PARTS, byte_level("<|im_start|>", "<|over|>"), {}, "<|over|>"),
        (
            DEEPSEEK_R1,
            byte_level(*DEEPSEEK_TOKENS, plain("<\uff5cend▁of▁sentence\uff5c>")),
            {"bos_token": DEEPSEEK_TOKENS[0]},
            "<\uff5cend▁of▁sentence\uff5c>",
        ),
        # Nothing that ends a turn is a token here, or what follows an answer begins the next turn.
        (CHATML.replace("<|im_end|>", ""), byte_level("<|im_start|>", "<|over|>"), {}, None),
        (CHATML.replace("<|im_end|>", "###"), byte_level("<|im_start|>", plain("\n")), {}, None),
        (ALWAYS_ASKS, byte_level("<|user|>", "<|assistant|>"), {}, None),
        ("{% for m in messages %}<s>{{ m.content }}{% endfor %}<s>", sentencepiece(), {"bos_token": "<s>"}, None),
        ("{% for m in messages %}{{ m.content + bos_token }}{% endfor %}", sentencepiece(), {"bos_token": "<s>"}, None),
        ("{% for m in messages %}{{ m.content }} end <|over|>{% endfor %}", byte_level("<|over|>"), {}, None),
        (ASSISTANT_MAY_NOT_BE_LAST.replace("<|im_end|>", "<|over|>"), byte_level("<|im_start|>", "<|over|>"), {}, None),
        (CHATML + "{% if %}", byte_level("<|im_start|>", "<|over|>"), {}, None),
        ("{{ nothing.at.all }}", byte_level("<|over|>"), {}, None),
    ],
    ids=[
        *("chatml", "chatml, not special", "qwen 2.5", "qwen 3", "llama 3", "llama 2", "mistral", "zephyr", "gemma"),
        *("vicuna", "tag before the end", "parts only", "deepseek r1", "no end", "end in plain text", "always asks"),
        *("bos between turns", "bos after turns", "text before it", "refuses an answer", "broken", "raises"),
    ],
)  # fmt: skip
def test_the_token_after_an_answer(tmp_path, template, tokenizer_json, names, end):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json, chat_template=template, **names))
    known = {"</s>"} if tokenizer.token_to_id("</s>") is not None else set()
    assert set(map(tokenizer.id_to_token, tokenizer.eos_ids)) == ({end} if end else set()) | known


def test_every_template_of_several_counts(tmp_path):
    one, two = (CHATML.replace("<|im_end|>", end) for end in ("<|one|>", "<|two|>"))
    settings = {"chat_template": [{"name": "default", "template": one}, {"name": "tool_use", "template": two}]}
    tokenizer = Tokenizer.from_folder(
        write_folder(tmp_path, byte_level("<|im_start|>", "<|one|>", "<|two|>"), **settings)
    )
    assert list(map(tokenizer.id_to_token, tokenizer.eos_ids)) == ["<|one|>", "<|two|>"]


def test_customary_names_count_if_they_are_special(tmp_path):
    """A Llama 3 whose files name only the end of a text."""
    tokenizer_json = byte_level("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|odd|>", plain("<|im_end|>"))
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json, eos_token="<|end_of_text|>"), eos_ids=[7])
    assert tokenizer.eos_ids[:2] == (7, tokenizer.token_to_id("<|end_of_text|>"))
    assert list(map(tokenizer.id_to_token, tokenizer.eos_ids[1:])) == ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]


def test_a_name_that_the_vocabulary_lacks_is_no_token(tmp_path):
    tokenizer_json = byte_level("<|odd|>")
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_json, eos_token="<|nowhere|>"))
    assert tokenizer.eos_ids == ()


def test_a_message_of_harmony_is_no_whole_answer(tmp_path):
    tokens = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
    folder = write_folder(tmp_path, byte_level(*tokens))
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder, eos_ids=[tokenizer.token_to_id("<|return|>")])
    assert tokenizer.eos_ids == (tokenizer.token_to_id("<|return|>"),)
