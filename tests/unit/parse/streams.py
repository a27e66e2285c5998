"""Answers in all formats, as models write them, and what they consist of, written by hand.

Sources of the formats: the chat templates of the models that ``exl/parse/formats.py`` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from exl.parse.parts import Part, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from tests.unit.parse.vocabularies import KINDS, Piece, Spelled

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "hourly": {"type": "boolean"},
                    "where": {"type": "object"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "note": {"type": ["string", "null"]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},  # no parameters at all
    {
        "type": "function",
        "function": {
            "name": "ref",
            "parameters": {
                "properties": {
                    "a": {"$ref": "#/$defs/text"},
                    "b": {"$ref": "#/$defs/number"},
                    "c": {"anyOf": [{"$ref": "#/$defs/text"}, {"type": "null"}]},
                    "d": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                },
                "$defs": {"text": {"type": "string"}, "number": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "name": "flat.search", "parameters": {"properties": {"q": {"enum": ["a", "1"]}}}},
]


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str
    call_id: str | None = None
    whole: bool = True


Expected = Text | Reasoning | Call


@dataclass(frozen=True)
class Stream:
    name: str
    tools: str
    answer: str | tuple[Piece, ...]
    parts: tuple[Expected, ...]
    reasoning: str = "none"
    whole: bool = True
    prompt: str = ""
    stop: tuple[str, ...] = ()
    kinds: Sequence[str] = KINDS  # vocabularies in which this is so
    with_tools: bool = True


def parts_of(expected: Sequence[Expected]) -> list[Part]:
    parts: list[Part] = []
    index = 0
    for part in expected:
        if not isinstance(part, Call):
            parts.append(part)
            continue
        parts.append(ToolCallBegin(index, part.name, part.call_id))
        if part.arguments:
            parts.append(ToolCallArguments(index, part.arguments))
        if part.whole:
            parts.append(ToolCallEnd(index))
        index += 1
    return parts


def joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if last is not None and _kind(last) is not None and _kind(last) == _kind(part):
            out[-1] = replace(last, text=last.text + part.text)
        else:
            out.append(part)
    return out


def _kind(part: Part) -> object:
    """Parts of the same kind are joined; None for those that are not."""
    if isinstance(part, ToolCallArguments):
        return part.index
    return type(part) if isinstance(part, Text | Reasoning) else None


TOKENS = ("special", "added")
PIECES = ("pieces", "bytes")
WRITTEN = ("added", "pieces", "bytes")  # vocabularies whose text has the tags

_ROME = '{"city": "Rome"}'


def _hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _xml(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


_DS = {
    "calls": "<\uff5ctool\u2581calls\u2581begin\uff5c>",
    "call": "<\uff5ctool\u2581call\u2581begin\uff5c>",
    "sep": "<\uff5ctool\u2581sep\uff5c>",
    "call_end": "<\uff5ctool\u2581call\u2581end\uff5c>",
    "calls_end": "<\uff5ctool\u2581calls\u2581end\uff5c>",
}
_DSML = "\uff5cDSML\uff5c"


def _deepseek(*calls: str) -> str:
    return _DS["calls"] + "".join(_DS["call"] + call + _DS["call_end"] for call in calls) + _DS["calls_end"]


PLAIN = [
    Stream("plain", "none", "Hello, world.", (Text("Hello, world."),)),
    Stream("nothing", "hermes", "", ()),
    Stream("white space stays", "hermes", "  \n a \n", (Text("  \n a \n"),)),
    Stream("only white space", "hermes", " \n", (Text(" \n"),)),
    Stream("unicode", "hermes", "Grüße, 東京! 🙂", (Text("Grüße, 東京! 🙂"),), reasoning="think"),
    Stream("what looks like a tag", "hermes", "a < b <tool <tool_cal <<", (Text("a < b <tool <tool_cal <<"),)),
    Stream("no tools in the request", "hermes", _hermes("now", "{}"), (Text(_hermes("now", "{}")),), with_tools=False,
           kinds=WRITTEN),
    Stream("no tools in the request, special tokens", "hermes", _hermes("now", "{}"),
           (Text('\n{"name": "now", "arguments": {}}\n'),), with_tools=False, kinds=("special",)),
]  # fmt: skip

THINKING = [
    Stream("think", "none", "<think>\nHm.\n</think>\n\nYes.", (Reasoning("Hm.\n"), Text("Yes.")), "think"),
    Stream("think behind white space", "none", "\n<think>a</think>b", (Reasoning("a"), Text("b")), "think"),
    Stream("empty think", "hermes", "<think>\n\n</think>\n\nYes.", (Text("Yes."),), "think"),
    Stream("no thinking", "none", "Yes.", (Text("Yes."),), "think"),
    Stream("thinking does not end", "none", "<think>a <b </think", (Reasoning("a <b </think"),), "think"),
    Stream("only thinking", "none", "<think>a</think>", (Reasoning("a"),), "think"),
    Stream("opened by the prompt", "none", "Hm.</think>\nYes.", (Reasoning("Hm."), Text("Yes.")), "think",
           prompt="user: a</think>\nassistant: <think>\n"),
    Stream("switched off by the prompt", "none", "Yes.", (Text("Yes."),), "think", prompt="<think>\n\n</think>\n\n"),
    Stream("a user's tag opens nothing", "none", "Yes.", (Text("Yes."),), "think",
           prompt="<think>Hi<|eos|>assistant: "),
    Stream("twice", "none", "<think>a</think>b<think>c</think>d",
           (Reasoning("a"), Text("b"), Reasoning("c"), Text("d")), "think", kinds=TOKENS),
    Stream("in prose, where it is text", "none", "Write <think>.", (Text("Write <think>."),), "think", kinds=PIECES),
    Stream("in prose, spelled", "none", ("Write ", Spelled("<think>"), "."), (Text("Write <think>."),), "think"),
    Stream("spelled inside", "none", ("<think>", Spelled("</think>"), "a</think>b"),
           (Reasoning("</think>a"), Text("b")), "think", kinds=TOKENS),
    Stream("a closing tag alone is text", "none", "a</think>b", (Text("a</think>b"),), "think", kinds=WRITTEN),
    Stream("a call inside is thought", "hermes", f"<think>{_hermes('now', '{}')}</think>a",
           (Reasoning(_hermes("now", "{}")), Text("a")), "think", kinds=WRITTEN),
    Stream("then a call", "hermes", f"<think>\na\n</think>\n\n{_hermes('now', '{}')}",
           (Reasoning("a\n"), Call("now", "{}")), "think"),
    Stream("between calls", "hermes", f"{_hermes('now', '{}')}\n<think>a</think>\n{_hermes('now', '{}')}",
           (Call("now", "{}"), Reasoning("a"), Call("now", "{}")), "think"),
    Stream("thinking without tools", "hermes", "<think>a</think>b", (Reasoning("a"), Text("b")), "think",
           with_tools=False),
    Stream("magistral", "mistral", "[THINK]a[/THINK]b", (Reasoning("a"), Text("b")), "mistral"),
    Stream("command", "command", "<|START_THINKING|>a<|END_THINKING|>b", (Reasoning("a"), Text("b")), "command"),
    Stream("seed", "seed", "<seed:think>a</seed:think>b", (Reasoning("a"), Text("b")), "seed"),
    Stream("gemma 4", "gemma4", "<|channel>thought\na\n<channel|>b", (Reasoning("a\n"), Text("b")), "gemma4"),
    Stream("gemma 4, switched off", "gemma4", "b", (Text("b"),), "gemma4", prompt="<|channel>thought\n<channel|>"),
    Stream("<reasoning>", "none", "<reasoning>a</reasoning>b", (Reasoning("a"), Text("b")), "reasoning"),
]  # fmt: skip

HERMES = [
    Stream("one call", "hermes", _hermes("get_weather", _ROME), (Call("get_weather", _ROME),)),
    Stream("text around", "hermes", f"I look.\n{_hermes('now', '{}')}\nDone.",
           (Text("I look.\n"), Call("now", "{}"), Text("Done."))),
    Stream("two calls", "hermes", f"{_hermes('get_weather', _ROME)}\n{_hermes('now', '{}')}",
           (Call("get_weather", _ROME), Call("now", "{}"))),
    Stream("a list", "hermes", '<tool_call>[{"name": "now"}, {"name": "now", "arguments": {}}]</tool_call>',
           (Call("now", "{}"), Call("now", "{}"))),
    Stream("nested, escaped, unicode", "hermes",
           _hermes("f", '{"a": [1, {"b": "\\"}\\\\ 東"}], "c": null, "d": -1.5e3, "e": "\\u00e9</tool_call"}'),
           (Call("f", '{"a": [1, {"b": "\\"}\\\\ 東"}], "c": null, "d": -1.5e3, "e": "\\u00e9</tool_call"}'),)),
    Stream("arguments first", "hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
           (Call("f", '{"a": 1}'),)),
    Stream("an id", "hermes", '<tool_call>{"id": "c1", "name": "f", "arguments": {}}</tool_call>',
           (Call("f", "{}", "c1"),)),
    Stream("in OpenAI's shape", "hermes",
           '<tool_call>{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "1"}</tool_call>a',
           (Call("f", '{"a": 1}'), Text("a"))),
    Stream("in OpenAI's shape, no arguments", "json", '{"type": "function", "function": {"name": "now"}}',
           (Call("now", "{}"),)),
    Stream("arguments in a string", "hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
           (Call("f", '{"a": 1}'),)),
    Stream("no arguments", "hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', (Call("f", "{}"),)),
    Stream("line ends in a string", "hermes", _hermes("f", '{"a": "x\ny\tz"}'),
           (Call("f", '{"a": "x\\ny\\tz"}'),)),
    Stream("a tag in a string", "hermes", _hermes("f", '{"a": "<tool_call></tool_call>"}'),
           (Call("f", '{"a": "<tool_call></tool_call>"}'),), kinds=WRITTEN),
    Stream("a bracket is missing", "hermes", '<tool_call>{"name": "f", "arguments": {}</tool_call>a',
           (Call("f", "{}"), Text("a"))),
    Stream("no closing tag", "hermes", '<tool_call>{"name": "f", "arguments": {}}', (Call("f", "{}"),)),
    Stream("in prose, where it is text", "hermes", "Write <tool_call>, then JSON. <tool_call>",
           (Text("Write <tool_call>, then JSON. <tool_call>"),), kinds=PIECES, whole=False),
    Stream("in prose, spelled", "hermes", ("Write ", Spelled(_hermes("now", "{}")), "."),
           (Text(f"Write {_hermes('now', '{}')}."),), kinds=TOKENS),
    Stream("half a call", "hermes", '<tool_call>{"name": "f", "arguments": {"a": "b',
           (Call("f", '{"a": "b', whole=False),), whole=False),
    Stream("half a name", "hermes", 'a<tool_call>{"name": "f', (Text('a<tool_call>{"name": "f'),), whole=False,
           kinds=WRITTEN),
    Stream("half a name, special tokens", "hermes", 'a<tool_call>{"name": "f', (Text('a{"name": "f'),), whole=False,
           kinds=("special",)),
    Stream("no JSON", "hermes", '<tool_call>{"name": "f", "arguments": {a: 1}}</tool_call>b',
           (Call("f", "{a: 1}}", whole=False), Text("b")), whole=False),
    Stream("no JSON, then a call", "hermes", f'<tool_call>{{"name": "f", "arguments": {{a}}}}\n{_hermes("now", "{}")}',
           (Call("f", "{a}}\n", whole=False), Call("now", "{}")), whole=False),
    Stream("no call, then a call", "hermes", f"<tool_call>oops{_hermes('now', '{}')}",
           (Text("<tool_call>oops"), Call("now", "{}")), kinds=WRITTEN),
    Stream("arguments that are no object", "hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
           (Text('<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),), kinds=WRITTEN),
    Stream("a stop string in a call", "hermes", f'ab{_hermes("f", _ROME)}', (Text("ab"), Call("f", '{"city": "', None,
           False)), whole=False, stop=("Rom",)),
    Stream("a stop string in thinking", "hermes", "<think>a. b</think>c", (Reasoning("a"),), "think", stop=(". b",)),
    Stream("a stop string in a tag", "hermes", f"ab{_hermes('now', '{}')}", (Text("ab<tool_"),), stop=("call>",),
           kinds=WRITTEN),
    Stream("a stop string across a special token", "hermes", "<think>ab</think>cd", (Reasoning("a"),), "think",
           stop=("bc",), kinds=("special",)),
    Stream("no stop string after all", "hermes", "<think>ab</think>cd", (Reasoning("ab"), Text("cd")), "think",
           stop=("b</think>d", "bd", "cde")),
]  # fmt: skip

XML = [
    Stream("qwen3 coder", "qwen3_coder", f"ok\n{_xml('get_weather', city='Rome', days='3')}",
           (Text("ok\n"), Call("get_weather", '{"city": "Rome", "days": 3}'))),
    Stream("types by schema", "qwen3_coder",
           _xml("get_weather", city="3", days="x", hourly="True", where='{"a": [1]}', tags='["a"]', note="null"),
           (Call("get_weather", '{"city": "3", "days": "x", "hourly": true, "where": {"a": [1]}, "tags": ["a"], '
                                '"note": null}'),)),
    Stream("no schema", "qwen3_coder", _xml("f", a="1", b="x", c="true"),
           (Call("f", '{"a": 1, "b": "x", "c": true}'),)),
    Stream("an enum of strings", "qwen3_coder", _xml("flat.search", q="1"), (Call("flat.search", '{"q": "1"}'),)),
    Stream("lines, quotes, tags in values", "qwen3_coder", _xml("get_weather", city='a\n\n"b"\\ <c></parameter\n'),
           (Call("get_weather", '{"city": "a\\n\\n\\"b\\"\\\\ <c></parameter\\n"}'),)),
    Stream("types behind references", "qwen3_coder", _xml("ref", a="1", b="1", c="null", d="1.5"),
           (Call("ref", '{"a": "1", "b": 1, "c": null, "d": "1.5"}'),)),
    Stream("no parameters", "qwen3_coder", f"{_xml('now')}\n{_xml('now')}", (Call("now", "{}"), Call("now", "{}"))),
    Stream("half a value", "qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nRo",
           (Call("get_weather", '{"city": "Ro', whole=False),), whole=False),
    Stream("no function", "qwen3_coder", "<tool_call>\n<fun", (Text("<tool_call>\n<fun"),), whole=False, kinds=PIECES),
    Stream("seed calls", "seed",
           "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Rome</parameter>\n</function>\n</seed:tool_call>",
           (Call("get_weather", _ROME),)),
    Stream("minimax", "minimax",
           '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n</invoke>\n'
           '<invoke name="now">\n</invoke>\n</minimax:tool_call>', (Call("get_weather", _ROME), Call("now", "{}"))),
    Stream("glm", "glm", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
           "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
           (Call("get_weather", '{"city": "Rome", "days": 3}'),)),
    Stream("glm, one line", "glm", "a<tool_call>now</tool_call>b<tool_call>get_weather<arg_key>note</arg_key>"
           "<arg_value>x</arg_value></tool_call>",
           (Text("a"), Call("now", "{}"), Text("b"), Call("get_weather", '{"note": "x"}'))),
    Stream("deepseek v3.2", "deepseek_v32",
           f'<{_DSML}function_calls>\n<{_DSML}invoke name="f">\n<{_DSML}parameter name="a" string="true">1'
           f'</{_DSML}parameter>\n<{_DSML}parameter name="b" string="false">[1]</{_DSML}parameter>\n</{_DSML}invoke>\n'
           f"</{_DSML}function_calls>", (Call("f", '{"a": "1", "b": [1]}'),)),
]  # fmt: skip

NAMED = [
    Stream("mistral, 2024", "mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]',
           (Call("f", '{"a": 1}'),)),
    Stream("mistral", "mistral", 'ok[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]now[ARGS]{}',
           (Text("ok"), Call("f", '{"a": 1}'), Call("now", "{}"))),
    Stream("mistral with ids", "mistral", "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}", (Call("f", "{}", "abcdefghi"),)),
    Stream("mistral without [ARGS]", "mistral", "[TOOL_CALLS]f{}", (Call("f", "{}"),)),
    Stream("mistral, half", "mistral", '[TOOL_CALLS]f[ARGS]{"a', (Call("f", '{"a', whole=False),), whole=False),
    Stream("mistral, no JSON", "mistral", "[TOOL_CALLS]f[ARGS]a=1[TOOL_CALLS]now[ARGS]{}",
           (Call("f", "a=1", whole=False), Call("now", "{}")), whole=False),
    Stream("deepseek v3.1", "deepseek", "ok" + _deepseek(f"f{_DS['sep']}{_ROME}", f"now{_DS['sep']}{{}}"),
           (Text("ok"), Call("f", _ROME), Call("now", "{}"))),
    Stream("deepseek v3 and r1", "deepseek",
           _deepseek(*(f"function{_DS['sep']}{name}\n```json\n{{}}\n```" for name in ("f", "now"))),
           (Call("f", "{}"), Call("now", "{}"))),
    Stream("deepseek, broken", "deepseek", _deepseek(f"f{_DS['sep']}{{]", f"now{_DS['sep']}{{}}") + "a",
           (Call("f", "{]", whole=False), Call("now", "{}"), Text("a")), whole=False),
    Stream("kimi", "kimi",
           "ok<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}"
           "<|tool_call_end|><|tool_calls_section_end|>", (Text("ok"), Call("f", "{}", "functions.f:0"))),
]  # fmt: skip

OTHERS = [
    Stream("llama 3", "llama3_json", '{"name": "get_weather", "parameters": {"city": "Rome"}}',
           (Call("get_weather", _ROME),)),
    Stream("llama 3, tag", "llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}',
           (Call("f", '{"a": 1}'),)),
    Stream("llama 3, two", "llama3_json",
           '{"name": "now", "parameters": {}}; {"type": "function", "name": "now", "parameters": {}}',
           (Call("now", "{}"), Call("now", "{}"))),
    Stream("llama 3, other JSON", "llama3_json", ' {"nam": 1}', (Text(' {"nam": 1}'),)),
    Stream("llama 3, no such tool", "llama3_json", '{"name": "Bob", "parameters": {}}',
           (Text('{"name": "Bob", "parameters": {}}'),)),
    Stream("llama 3, built in", "llama3_json", '<|python_tag|>brave_search.call(query="a b")',
           (Call("brave_search.call", '{"query": "a b"}'),)),
    Stream("llama 4", "llama_pythonic", '[get_weather(city="Rome", days=3), now()]',
           (Call("get_weather", '{"city": "Rome", "days": 3}'), Call("now", "{}"))),
    Stream("llama 4, tags", "llama_pythonic", "<|python_start|>[f(a=1)]<|python_end|>", (Call("f", '{"a": 1}'),)),
    Stream("python's values", "llama_pythonic",
           "[get_weather(city='it\\'s \"x\"\\n\\x41', tags=[\"a\", 'b',], where={'a': {'b': (1, 2.50, None)}}, "
           "hourly=True, days=-1_000, note='''a'b''')]",
           (Call("get_weather", '{"city": "it\'s \\"x\\"\\nA", "tags": ["a", "b"], "where": {"a": {"b": [1, 2.5, null]'
                                '}}, "hourly": true, "days": -1000, "note": "a\'b"}'),)),
    Stream("without names", "llama_pythonic", '[get_weather("Rome", 3)]',
           (Call("get_weather", '{"city": "Rome", "days": 3}'),)),
    Stream("a list of other things", "llama_pythonic", "[1] says [get_weather(", (Text("[1] says [get_weather("),)),
    Stream("a name's beginning", "llama_pythonic", "[get_wea]", (Text("[get_wea]"),)),
    Stream("code, half", "llama_pythonic", '[get_weather(city="Ro', (Call("get_weather", '{"city": "Ro', whole=False),),
           whole=False),
    Stream("code that is no literal", "llama_pythonic", "[get_weather(city=f(x), days=3)]",
           (Call("get_weather", '{"city": f(x), days=3)]', whole=False),), whole=False),
    Stream("gemma 3, code", "gemma", '```tool_code\nprint(get_weather(city="Rome"))\n```',
           (Call("get_weather", _ROME),)),
    Stream("gemma 3, JSON", "gemma", 'ok\n```json\n{"name": "now", "parameters": {}}\n```\n',
           (Text("ok\n"), Call("now", "{}"))),
    Stream("gemma 3, another fence", "gemma", '```json\n{"a": 1}\n```',
           (Text('```json\n{"a": 1}\n```'),), kinds=PIECES),
    Stream("functiongemma", "functiongemma",
           '<start_function_call>call:f{a:<escape>x, "y"<escape>,b:1}<end_function_call>',
           (Call("f", '{"a": "x, \\"y\\"", "b": 1}'),)),
    Stream("gemma 4 calls", "gemma4",
           'ok<|tool_call>call:f{a:<|"|>x\n<|"|>,b:{c:[1,true,<|"|>y<|"|>]},d:null}<tool_call|>'
           "<|tool_call>call:now{}<tool_call|>",
           (Text("ok"), Call("f", '{"a": "x\\n", "b": {"c": [1, true, "y"]}, "d": null}'), Call("now", "{}"))),
    Stream("gemma 4, bare words", "gemma4", "<|tool_call>call:f{a:None,b:True,c:-1.5,d:x y}<tool_call|>",
           (Call("f", '{"a": null, "b": true, "c": -1.5, "d": "x y"}'),)),
    Stream("gemma 4, half", "gemma4", '<|tool_call>call:f{a:<|"|>x',
           (Call("f", '{"a": "x', whole=False),), whole=False),
    Stream("command r", "command",
           '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", "parameters": {"a": 1}}\n]<|END_ACTION|>',
           (Call("f", '{"a": 1}', "0"),)),
    Stream("granite", "granite", '<|tool_call|>[{"name": "f", "arguments": {}}]', (Call("f", "{}"),)),
    Stream("phi 4", "granite", '<|tool_call|>[{"name": "f", "arguments": {}}]<|/tool_call|>', (Call("f", "{}"),)),
    Stream("lfm 2", "lfm2", '<|tool_call_start|>[f(a="b")]<|tool_call_end|>a', (Call("f", '{"a": "b"}'), Text("a"))),
    Stream("lfm 2, JSON", "lfm2", '<|tool_call_start|>[{"name": "f", "arguments": {}}]<|tool_call_end|>',
           (Call("f", "{}"),)),
    Stream("olmo 3", "olmo3", '<function_calls>f(a="b")\nnow()</function_calls>',
           (Call("f", '{"a": "b"}'), Call("now", "{}"))),
    Stream("nemotron", "nemotron", '<TOOLCALL>[{"name": "f", "arguments": {}}]</TOOLCALL>', (Call("f", "{}"),)),
    Stream("apriel", "tool_calls", '\n<tool_calls>[{"name": "f", "arguments": {}, "id": "0"}]</tool_calls>',
           (Call("f", "{}"),)),
    Stream("JSON, bare", "json", '{"name": "now", "arguments": {}}\n{"name": "now", "arguments": {}}',
           (Call("now", "{}"), Call("now", "{}"))),
    Stream("JSON, a list", "json", '[{"name": "now", "arguments": {}}]', (Call("now", "{}"),)),
    Stream("JSON, fenced", "json", 'ok\n```json\n{"name": "now", "arguments": {}}\n```', (Text("ok\n"),
           Call("now", "{}"))),
    Stream("JSON that is an answer", "json", '{"name": "Bob"}', (Text('{"name": "Bob"}'),)),
]  # fmt: skip

_CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
HARMONY = [
    Stream("final", "harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
           "Yes.<|return|>", (Reasoning("Hm."), Text("Yes.")), "harmony", prompt="<|start|>assistant"),
    Stream("a harmony call", "harmony", f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{_CALL}",
           (Reasoning("Hm."), Call("f", '{"a": 1}')), "harmony", prompt="<|start|>assistant"),
    Stream("the recipient first", "harmony",
           "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}", (Call("f", "{}"),), "harmony"),
    Stream("preamble, two calls", "harmony",
           f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{_CALL}<|start|>assistant{_CALL}",
           (Text("I look."), Call("f", '{"a": 1}'), Call("f", '{"a": 1}')), "harmony", prompt="<|start|>assistant"),
    Stream("half a harmony call", "harmony", _CALL[:-10], (Call("f", '{"a": ', whole=False),), "harmony", whole=False),
    Stream("a harmony call that is none", "harmony", _CALL.replace("{", "x{"), (Call("f", 'x{"a": 1}', whole=False),),
           "harmony", whole=False),
    Stream("a broken harmony call, then one", "harmony", f"{_CALL.replace('{', 'x{')}<|start|>assistant{_CALL}",
           (Call("f", 'x{"a": 1}', whole=False), Call("f", '{"a": 1}')), "harmony", whole=False),
    Stream("without tools", "harmony", _CALL, (Text('{"a": 1}'),), "harmony", with_tools=False),
    Stream("the prompt has begun the answer", "harmony", "es.", (Text("es."),), "harmony",
           prompt="<|start|>assistant<|channel|>final<|message|>Y"),
    Stream("no harmony", "harmony", "Yes.", (Text("Yes."),), "harmony", prompt="<|start|>assistant"),
    Stream("reasoning as text", "harmony", "<|channel|>analysis<|message|>a<|end|>", (Text("a"),), "none"),
]  # fmt: skip

STREAMS = [*PLAIN, *THINKING, *HERMES, *XML, *NAMED, *OTHERS, *HARMONY]
