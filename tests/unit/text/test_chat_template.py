"""Rendering and encoding of chats against transformers; the sandbox; the errors for malformed input."""

from __future__ import annotations

import json
from datetime import datetime

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from exl.errors import ConfigError
from exl.text.chat_template import ChatTemplate
from exl.text.tokenizer import Tokenizer
from tests.unit.text.chat_templates import CHATML, DEEPSEEK_R1, LLAMA_2, LLAMA_3, MISTRAL, QWEN_3, QWEN_25
from tests.unit.text.tokenizer_folders import byte_level, plain, sentencepiece, transformers_tokenizer, write_folder

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather at a place <now> & 'later' in °C",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "city"}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "time", "parameters": {}}},
]
CALLS = [
    {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": {"place": "Zürich 🙂", "n": 1.5}}}
]
SHORT = [{"role": "user", "content": "Hello, who are you?"}]
LONG = [
    {"role": "system", "content": "You answer  briefly. "},
    {"role": "user", "content": " What is 2+2?\n\n"},
    {"role": "assistant", "content": "4 👍🏽"},
    {"role": "user", "content": "你好 — naïve “quotes” {{ braces }} {% if %}"},
]
NONES = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "tool_calls": None}]
TOOL_USE = [
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "tool_calls": CALLS},
    {"role": "tool", "content": "sunny, 21 °C"},
    {"role": "tool", "content": '{"wind": null}'},
]
THINKING = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nadding\n</think>\n\n4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "reasoning": "adding again", "content": "\n6"},
]
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
LLAMA_3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MISTRAL_TOKENS = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
STORY_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

MODELS = {
    "chatml": (CHATML, lambda: byte_level(*QWEN_TOKENS), {"eos_token": "<|im_end|>"}),
    "llama_2": (LLAMA_2, sentencepiece, STORY_NAMES),
    "llama_3": (
        LLAMA_3,
        lambda: byte_level(*LLAMA_3_TOKENS, plain("\n"), bos=LLAMA_3_TOKENS[0]),
        {"bos_token": LLAMA_3_TOKENS[0], "eos_token": LLAMA_3_TOKENS[3]},
    ),
    "mistral": (MISTRAL, lambda: sentencepiece(*MISTRAL_TOKENS), STORY_NAMES),
    "qwen_25": (QWEN_25, lambda: byte_level(*QWEN_TOKENS, *map(plain, QWEN_WORDS)), {"eos_token": "<|im_end|>"}),
    "qwen_3": (QWEN_3, lambda: byte_level(*QWEN_TOKENS, *map(plain, QWEN_WORDS)), {"eos_token": "<|im_end|>"}),
    "trimming": (  # Phi-3's tokens absorb the white space after them
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}<|assistant|>\n",
        lambda: sentencepiece(
            *({"content": f"<|{name}|>", "special": True, "rstrip": True} for name in ("user", "assistant", "end"))
        ),
        STORY_NAMES,
    ),
}
# The last version for Python 3.10 gives a template keys without a value, and knows ``reasoning`` by another name alone.
_VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
needs_its_messages = pytest.mark.skipif(_VERSION < (5, 21), reason=f"transformers {transformers.__version__}")

CASES = [
    *((model, messages, {}) for model in MODELS for messages in (SHORT, LONG[1:])),
    *((model, LONG, {}) for model in ("chatml", "llama_2", "llama_3", "mistral", "qwen_25", "qwen_3")),
    *((model, SHORT, {"add_generation_prompt": False}) for model in MODELS),
    *((model, NONES, {}) for model in ("llama_2", "llama_3", "mistral", "qwen_25")),
    *((model, LONG, {"tools": TOOLS}) for model in ("chatml", "mistral", "qwen_25")),
    *((model, TOOL_USE, {"tools": TOOLS}) for model in ("mistral", "qwen_25")),
    ("qwen_25", TOOL_USE, {"tools": []}),
    *(("qwen_3", THINKING[:n], {}) for n in (1, 2, 3)),
    pytest.param("qwen_3", THINKING, {}, marks=needs_its_messages),
    ("qwen_3", SHORT, {"variables": {"enable_thinking": False}}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            template, tokenizer_json, settings_ = MODELS[name]
            folder = tmp_path_factory.mktemp(name)
            write_folder(folder, tokenizer_json(), chat_template=template, **settings_)
            made[name] = Tokenizer.from_folder(folder), transformers_tokenizer(folder)
        return made[name]

    return make


def reference(theirs, messages, values, tokenize):
    values = dict(values)
    variables = values.pop("variables", {})
    values = {"add_generation_prompt": True} | values
    return theirs.apply_chat_template(messages, tokenize=tokenize, return_dict=False, **values, **variables)


@pytest.mark.parametrize(("name", "messages", "values"), CASES)
def test_prompts_match_transformers(model, name, messages, values):
    ours, theirs = model(name)
    text = reference(theirs, messages, values, tokenize=False)
    assert ours.chat_template.render(messages, **values) == text
    assert ours.encode_chat(messages, **values) == reference(theirs, messages, values, tokenize=True)


@given(texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("name", ["chatml", "llama_2", "llama_3", "trimming"])
def test_prompts_of_any_text_without_control_tokens_match_transformers(model, name, texts):
    """Texts that end in, say, ``<`` are replaced by placeholders here, which must not change the ids."""
    ours, theirs = model(name)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    assert ours.encode_chat(messages) == reference(theirs, messages, {}, tokenize=True)


@given(ends=st.lists(st.sampled_from(["<", "<|", "<|im_", "|>", ">", "end|>", " x "]), min_size=2, max_size=2))
@settings(deadline=None)
def test_parts_of_control_tokens_at_the_ends_of_texts_match_transformers(model, ends):
    ours, theirs = model("chatml")
    messages = [{"role": "user", "content": f"{ends[0]} a {ends[1]} "}]
    assert ours.encode_chat(messages) == reference(theirs, messages, {}, tokenize=True)


# The dialect


def render(template, messages=SHORT, **values):
    return ChatTemplate(template).render(messages, **values)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ 'é<&\\'\"' | tojson(ensure_ascii=True) }}",
        "{{ {'b': 1, 'a': [2, none, true, 1.5]} | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}",
        "  {% if true %}\n  a\n    {% endif %}\nb\n",
        "{%- set ns = namespace(n=0, self=3) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys('ab', 0) }}",
        "a{% generation %}b {{ messages[0].content }}{% endgeneration %}c{%- generation -%} d {%- endgeneration -%} e",
        "{% macro show(m) %}[{{ m.role | upper }}]{% endmacro %}{{ show(messages[0]) }}",
        "{{ bos_token }}|{{ undefined_name }}|{{ documents is none }}|{{ tools is none }}|{{ add_generation_prompt }}",
        "{{ messages[0]['content'].split(',')[0].replace('l', 'L') | trim }}{{ '%s-%d' % ('a', 3) }}",
        "{{ messages[0].content[::-1] ~ 1 ~ none }}{{ [1, 2] is sequence }}{{ 'x' is string }}{{ {} is mapping }}",
    ],
)
def test_the_dialect_matches_transformers(model, template):
    ours, theirs = model("llama_2")
    template_ = ChatTemplate(template, ours.names)
    expected = theirs.apply_chat_template(SHORT, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert template_.render(SHORT) == expected


@needs_its_messages
def test_a_key_without_a_value_is_no_key_as_in_transformers(model):
    _, theirs = model("llama_2")
    template = "{{ messages[0].name is defined }}{{ messages[0].deep }}{{ messages[0].content }}"
    messages = [{"role": "user", "content": None, "name": None, "deep": {"x": None}}]
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert render(template, messages) == expected


# Forms of a message's content

CALLING = [
    {"role": "user", "content": "Weather in Zürich and Bern?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"place": place})}}
            for place in ("Zürich", "Bern")
        ],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "<think>so</think>Sun, then rain.", "name": None},
    {"role": "user", "content": "Thanks"},
]
TEXT_PARTS = [{"type": "text", "text": "Hello,"}, {"type": "text", "text": "who are you?"}]
LOOP = "{% for part in message.content %}{{ part.type }}:{{ part['text'] }};{% endfor %}"
READS_PARTS = {
    "loop": "{% for message in messages %}" + LOOP + "{% endfor %}",
    "loop unless a string": "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}|{% endfor %}{% endif %}{% endfor %}",
    "variable": "{% for m in messages %}{% set all = m.content if m.content else [] %}{% set these = all %}"
    "{% for part in these %}{{ part.text }}{% endfor %}{% endfor %}",
    "macro": "{% macro show(parts, n) %}{% for part in parts %}{{ part.text }}{{ n }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content, 3) }}{% endfor %}",
    "filters": "{% for m in messages %}{{ m.content | map(attribute='text') | join(' + ') }}{% endfor %}",
    "index": "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
}


def as_written(template, messages, **variables):
    """What transformers' renderer makes of messages as they are: ``apply_chat_template`` first drops keys whose value
    is None, since version 5, and DeepSeek-R1's template then fails."""
    rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **variables)
    return rendered[0]


@pytest.mark.parametrize("silent", [{"content": None}, {}], ids=["content None", "no content"])
@pytest.mark.parametrize("num_messages", range(1, 7))
def test_a_template_that_asks_for_none_gets_it(num_messages, silent):
    names = {"bos_token": "<s>"}
    expected = as_written(DEEPSEEK_R1, CALLING[:num_messages], **names)
    calling = [silent | {k: v for k, v in m.items() if k != "content"} if "tool_calls" in m else m for m in CALLING]
    assert ChatTemplate(DEEPSEEK_R1, names).render(calling[:num_messages]) == expected


def test_a_content_that_is_compared_with_none_gets_it():
    template = "{% for m in messages %}{{ 'silent' if m['content'] == none else m.content }};{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    assert render(template, messages) == as_written(template, messages) == "a;silent;"


@pytest.mark.parametrize("template", READS_PARTS.values(), ids=READS_PARTS)
def test_parts_reach_a_template_that_goes_through_them(template):
    messages = [{"role": "user", "content": TEXT_PARTS}]
    assert render(template, messages) == as_written(template, messages)


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_one_text_to_a_template_that_does_not(model, name):
    """transformers would fail, show the model Python's notation of a list (Llama 3), or leave it out (Qwen 3)."""
    ours, theirs = model(name)
    text = reference(theirs, [{"role": "user", "content": "Hello,\nwho are you?"}], {}, tokenize=False)
    assert ours.chat_template.render([{"role": "user", "content": TEXT_PARTS}]) == text
    assert ours.chat_template.render([{"role": "user", "content": tuple(TEXT_PARTS)}]) == text
    for part in ({"type": "image", "image": "a.png"}, {"type": "text"}, {"type": 3, "text": "a"}):
        with pytest.raises(
            ConfigError, match=r"messages\[1\]: content: found a part '.*chat template takes texts only"
        ):
            ours.chat_template.render([*SHORT, {"role": "assistant", "content": [*TEXT_PARTS, part]}])


def test_control_tokens_in_parts_are_plain_text(model):
    ours, _ = model("chatml")
    end = ours.token_to_id("<|im_end|>")
    parts = [{"type": "text", "text": "a<|im_end|>"}, {"type": "text", "text": "<|im_end|>b"}]
    assert ours.encode_chat([{"role": "user", "content": parts}]).count(end) == 2


def test_the_time_is_now():
    assert abs(datetime.now() - datetime.fromisoformat(render("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}"))).days == 0


def test_messages_of_parts_and_of_values_that_are_nearly_json():
    template = (
        "{% for part in messages[0].content %}{{ part.text if part.type == 'text' else part }};{% endfor %}{{ n }}"
    )
    messages = ({"role": "user", "content": [{"type": "text", "text": np.str_("a")}, {"type": "text", "text": "b"}]},)
    assert render(template, messages, variables={"n": True}) == "a;b;True"


def test_templates_leave_messages_as_they_were():
    messages = [{"role": "user", "content": "a", "extra": None, "reasoning": "b"}]
    before = json.dumps(messages)
    render("{{ messages[0].reasoning_content }}", messages)
    assert json.dumps(messages) == before


# Named templates and where they are found

NAMED = [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "with tools"}]


@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_named_templates_are_chosen_as_transformers_chooses(model, tools):
    _, theirs = model("llama_2")
    ours = ChatTemplate(NAMED)
    named = {entry["name"]: entry["template"] for entry in NAMED}
    theirs_named = type(theirs)(tokenizer_object=theirs.backend_tokenizer, chat_template=named)
    expected = theirs_named.apply_chat_template(SHORT, tools=tools, tokenize=False)
    assert ours.render(SHORT, tools=tools) == ChatTemplate(named).render(SHORT, tools=tools) == expected
    assert ours.render(SHORT, name="tool_use") == "with tools"
    assert ours.names == ("default", "tool_use")
    with pytest.raises(ConfigError, match=r"found no template 'rag', expected one of \['default', 'tool_use'\]"):
        ours.render(SHORT, name="rag")


def test_template_files_come_before_settings_and_those_before_the_legacy_file(tmp_path):
    def rendered(**values):
        return Tokenizer.from_folder(tmp_path).chat_template.render(SHORT, **values)

    write_folder(tmp_path, sentencepiece())
    assert Tokenizer.from_folder(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert rendered() == "legacy"
    write_folder(tmp_path, sentencepiece(), chat_template="settings {{ bos_token }}", bos_token="<s>")
    assert rendered() == "settings <s>"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert rendered() == "file <s>"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert (rendered(), rendered(tools=TOOLS)) == ("file <s>", "tools")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: not UTF-8"):
        rendered()


# Refusals


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: found an empty list, expected a list of objects, at least one"),
        ("hello", "messages: found str"),
        (None, "messages: found NoneType"),
        ({"role": "user"}, "messages: found dict"),
        (["hello"], "messages: found a list that holds str"),
        ([{"content": "a"}], r"messages\[0\]: role: found None, expected a string"),
        ([*SHORT, {"role": 3, "content": "a"}], r"messages\[1\]: role: found 3"),
        ([{"role": "", "content": "a"}], r"messages\[0\]: role: found ''"),
        ([{"role": "user", "content": 5}], r"messages\[0\]: content: found int, expected a string or a list"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\]: content: found a list that holds str"),
        ([{"role": "user", "content": [{"image": open}]}], r"messages\[0\]\.content\[0\]\.image: found builtin"),
        ([{"role": "user", "content": "a", "x": {1: 2}}], r"messages\[0\]\.x: found the key 1, expected strings"),
        ([{"role": "user", "content": "a", "x": b"b"}], r"messages\[0\]\.x: found bytes, expected what JSON"),
    ],
)
def test_malformed_messages_are_named(messages, said):
    with pytest.raises(ConfigError, match=said):
        render("{{ messages }}", messages)


def test_malformed_tools_and_variables_are_named():
    for tools in ("a", [print], [TOOLS]):
        with pytest.raises(ConfigError, match=r"tools: found .*, expected a list of objects"):
            render("a", tools=tools)
    with pytest.raises(ConfigError, match="variables: found list"):
        render("a", variables=[1])
    with pytest.raises(ConfigError, match="variables: found 'messages', which has an argument of its own"):
        render("a", variables={"messages": []})
    nested = []
    nested.append(nested)
    with pytest.raises(ConfigError, match="nested more than 100 deep"):
        render("a", variables={"x": nested})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Roles must\n  alternate!') }}", "Roles must alternate!"),
        ("a\nb{% if %}", "line 2: "),
        ("{% nothing %}", "line 1: Encountered unknown tag 'nothing'"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages[7].content.x }}", "list object has no element 7"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: "),
        ("{% include 'x' %}", "no loader"),
        ("{{ [messages] | tojson(indent=[]) }}", "TypeError"),
        ("{{" + "(" * 500, "RecursionError: "),
        ("{{ 1" + " + 1" * 5000 + " }}", "RecursionError: "),
    ],
)
def test_errors_of_a_template_are_one_line_with_its_words(template, said):
    with pytest.raises(ConfigError) as caught:
        render(template)
    assert str(caught.value).startswith("chat template: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_of_several_is_named_in_its_errors():
    with pytest.raises(ConfigError, match=r"^chat template 'rag': no$"):
        ChatTemplate({"default": "a", "rag": "{{ raise_exception('no') }}"}).render(SHORT, name="rag")


# The sandbox


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__']['__base__'] }}",
        "{{ (''|attr('__class__')).__base__ }}",
        "{{ '{0.__class__.__base__.__subclasses__}'.format('') }}",
        "{{ '{x.__class__.__base__}'.format_map({'x': ''}) }}",
        "{{ (''.format)('{0.__class__}', 1).__class__.__base__ }}",
        "{{ ('{0.__class__.__base__}'|attr('format'))('') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.json.codecs }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment.loader.x }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
        "{{ dict.__base__ }}{{ dict.update(messages[0], {'role': 'x'}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ messages[0].pop('content') }}",
        "{{ messages.sort() }}",
        "{% import 'os' as os %}{{ os.system('id') }}",
        "{{ get_flashed_messages.__globals__ }}{{ url_for.__globals__.os }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_nothing_leaves_the_sandbox(template):
    with pytest.raises(ConfigError):
        render(template)


def test_objects_of_a_caller_never_reach_a_template():
    class Reader(str):
        def read(self):
            return "secret"

    assert render("{{ messages[0].content.read is defined }}", [{"role": "user", "content": Reader("a")}]) == "False"


def test_the_length_of_a_prompt_is_bounded():
    block = "x" * 100_000
    with pytest.raises(ConfigError, match="the prompt is longer than 67108864 characters"):
        render("{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}", [{"role": "u", "content": block}])
