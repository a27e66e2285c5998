"""The formats that exl knows, by name, and by what in a model's files they are known.

Each was read from the chat templates of the models named (as llama.cpp and Hugging Face have them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exl.parse.braced_calls import Braced
from exl.parse.reasoning import Thinking
from exl.parse.syntaxes import Listed, Marked, Named, Syntax

NONE = "none"  # nothing is split off: all is text
HARMONY = "harmony"  # one format for reasoning and calls

_XML = {"call_open": "<function=", "name_close": ">", "key_open": "<parameter=", "key_close": ">"} | {
    "value_close": "</parameter>",
    "call_close": "</function>",
}
_INVOKE = {"name_close": '">', "key_close": '">'}
_DSML = "\uff5cDSML\uff5c"
_FENCES = ("```json", "```tool_call")
_MISTRAL_LIST = Listed(opens=("[TOOL_CALLS]",))

TOOL_FORMATS: Mapping[str, Syntax] = {
    # <tool_call>{"name": "f", "arguments": {}}</tool_call>: Hermes 2 and 3, Qwen 2.5 and 3, many others
    "hermes": Listed(("<tool_call>",), ("</tool_call>",)),
    # <tool_call><function=f><parameter=a>1</parameter></function></tool_call>: Qwen3 Coder, Qwen 3.5, Nemotron 3
    "qwen3_coder": Marked(("<tool_call>", "</tool_call>"), trims_lines=True, **_XML),
    "seed": Marked(("<seed:tool_call>", "</seed:tool_call>"), trims_lines=True, **_XML),  # Seed-OSS
    # <minimax:tool_call><invoke name="f"><parameter name="a">1</parameter></invoke></minimax:tool_call>: MiniMax M2
    "minimax": Marked(
        ("<minimax:tool_call>", "</minimax:tool_call>"),
        call_open='<invoke name="',
        key_open='<parameter name="',
        value_close="</parameter>",
        call_close="</invoke>",
        **_INVOKE,
    ),
    # the same with other tags, and string="true" or "false" with each parameter: DeepSeek V3.2
    "deepseek_v32": Marked(
        (f"<{_DSML}function_calls>", f"</{_DSML}function_calls>"),
        call_open=f'<{_DSML}invoke name="',
        key_open=f'<{_DSML}parameter name="',
        value_close=f"</{_DSML}parameter>",
        call_close=f"</{_DSML}invoke>",
        string_attribute=True,
        **_INVOKE,
    ),
    # <tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>: GLM 4.5, 4.6 and 4.7
    "glm": Marked(
        ("<tool_call>", "</tool_call>"),
        call_open="",
        name_close="",
        key_open="<arg_key>",
        key_close="</arg_key>",
        value_open="<arg_value>",
        value_close="</arg_value>",
        call_close="</tool_call>",
    ),
    # <|python_tag|>{"name": "f", "parameters": {}}, or without the tag: Llama 3.1, 3.2 and 3.3
    "llama3_json": Listed(("<|python_tag|>",), python=True, bare="{", separators=";,"),
    # [f(a=1), g(b="x")]: Llama 3.2 and 4
    "llama_pythonic": Listed(("<|python_start|>", "<|python_tag|>"), ("<|python_end|>",), python=True, bare="["),
    # [TOOL_CALLS]f[ARGS]{}, with [CALL_ID] between them or not; before 2025 [TOOL_CALLS] [{"name": ...}]
    "mistral": Named("[TOOL_CALLS]", "[ARGS]", id_tag="[CALL_ID]", listed=_MISTRAL_LIST),
    # <｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>: V3.1; V3 and R1 have a type and a fence besides
    "deepseek": Named(
        "<\uff5ctool\u2581call\u2581begin\uff5c>",
        "<\uff5ctool\u2581sep\uff5c>",
        ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"),
        "<\uff5ctool\u2581call\u2581end\uff5c>",
        fenced=True,
    ),
    # <|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>: Kimi K2
    "kimi": Named(
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        "<|tool_call_end|>",
        name_in_id=True,
    ),
    # ```tool_code\nf(a=1)\n```, or JSON in a fence: Gemma 2 and 3, as its prompts ask for it
    "gemma": Listed(("```tool_code", "```tool_call", "```json"), ("```",), python=True, bare="[{", unsure=("```json",)),
    # <start_function_call>call:f{a:<escape>x<escape>}<end_function_call>
    "functiongemma": Braced("<start_function_call>", "<end_function_call>", "<escape>"),
    # <|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>
    "gemma4": Braced("<|tool_call>", "<tool_call|>", '<|"|>'),
    # <|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {}}]<|END_ACTION|>: Command R7B and A
    "command": Listed(("<|START_ACTION|>",), ("<|END_ACTION|>",)),
    # <|tool_call|>[{"name": "f", "arguments": {}}]: Granite 3 ends it with the answer, Phi 4 mini with a tag
    "granite": Listed(("<|tool_call|>",), ("<|/tool_call|>",)),
    # <|tool_call_start|>[f(a=1)]<|tool_call_end|>, or JSON in the list: LFM2
    "lfm2": Listed(("<|tool_call_start|>",), ("<|tool_call_end|>",), python=True),
    "olmo3": Listed(("<function_calls>",), ("</function_calls>",), json=False, python=True),
    "nemotron": Listed(("<TOOLCALL>",), ("</TOOLCALL>",)),  # Llama Nemotron
    "tool_calls": Listed(("<tool_calls>",), ("</tool_calls>",)),  # Apriel, Jamba: a list of JSON objects
    # {"name": "f", "arguments": {}}, bare or in a list or in a fence: what models write that were shown JSON alone
    "json": Listed(
        ("```json", "```tool_call"), ("```",), bare="{[", separators=";,", unsure=("```json", "```tool_call")
    ),
}

REASONING_FORMATS: Mapping[str, Thinking] = {
    "think": Thinking("<think>", "</think>"),  # DeepSeek R1, QwQ, Qwen3, GLM, Kimi K2, Nemotron and most others
    "thinking": Thinking("<thinking>", "</thinking>"),
    "thought": Thinking("<thought>", "</thought>"),  # EXAONE Deep
    "reasoning": Thinking("<reasoning>", "</reasoning>"),
    "mistral": Thinking("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    "command": Thinking("<|START_THINKING|>", "<|END_THINKING|>"),
    "seed": Thinking("<seed:think>", "</seed:think>"),
    "gemma4": Thinking("<|channel>", "<channel|>", label="thought\n"),
    "kimi_vl": Thinking("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    "apertus": Thinking("<|inner_prefix|>", "<|inner_suffix|>"),
}


def tags_of(*shapes: Syntax | Thinking | None) -> tuple[str, ...]:
    """All tags of these; None has none."""
    return tuple(tag for shape in shapes if shape is not None for tag in shape.tags)


@dataclass(frozen=True)
class Rule:
    """A format is chosen if the template writes all of these texts, or the vocabulary has all as added tokens."""

    name: str
    texts: tuple[str, ...]


# In this order: the first that applies.
TOOL_RULES = (
    Rule(HARMONY, ("<|channel|>", "<|message|>")),
    Rule("gemma4", ("<|tool_call>",)),
    Rule("functiongemma", ("<start_function_call>",)),
    Rule("deepseek_v32", (_DSML,)),
    Rule("deepseek", ("<\uff5ctool\u2581call\u2581begin\uff5c>",)),
    Rule("kimi", ("<|tool_call_begin|>",)),
    Rule("minimax", ("<minimax:tool_call>",)),
    Rule("seed", ("<seed:tool_call>",)),
    Rule("glm", ("<tool_call>", "<arg_key>")),
    Rule("qwen3_coder", ("<tool_call>", "<function=")),
    Rule("command", ("<|START_ACTION|>",)),
    Rule("lfm2", ("<|tool_call_start|>",)),
    Rule("mistral", ("[TOOL_CALLS]",)),
    Rule("granite", ("<|tool_call|>",)),
    Rule("nemotron", ("<TOOLCALL>",)),
    Rule("tool_calls", ("<tool_calls>",)),
    Rule("hermes", ("<tool_call>",)),
    Rule("olmo3", ("<function_calls>",)),
    Rule("llama_pythonic", ("<|python_start|>",)),
    Rule("llama_pythonic", ("func_name1(",)),
    Rule("llama3_json", ("<|python_tag|>",)),
    Rule("llama3_json", ("Environment: ipython",)),
    Rule("gemma", ("tool_code",)),
    Rule("gemma", ("<start_of_turn>",)),
)
REASONING_RULES = (
    Rule(HARMONY, ("<|channel|>", "<|message|>")),
    *(Rule(name, (thinking.open,)) for name, thinking in REASONING_FORMATS.items()),
    Rule("think", ("</think>",)),
)
