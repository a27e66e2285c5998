"""Tools and reasoning through OpenAI's routes, by its own client and by LangChain's."""

from __future__ import annotations

import json

import httpx
import pytest

from exl.server.served import Conversation
from tests.server.chat_models import TOOLS_ONLY, WITH_REASONING, loader
from tests.server.running import RunningServer

openai = pytest.importorskip("openai")
ChatCompletion = openai.types.chat.ChatCompletion

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
TIME = {
    "name": "get_time",
    "parameters": {
        "type": "object",
        "properties": {"zone": {"enum": ["UTC", "CET"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}
UNKNOWN_REF = {"type": "object", "properties": {"zone": {"$ref": "#/nowhere"}}, "required": ["zone"]}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, TIME)]
MESSAGES = [{"role": "user", "content": "How is the weather?"}]
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'


@pytest.fixture(scope="module")
def calling(tmp_path_factory):
    """A server of a model whose template shows tools."""
    with RunningServer(load=loader(tmp_path_factory.mktemp("tools") / "m", TOOLS_ONLY)) as server:
        yield server


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """A server of a model whose template shows tools and reasoning."""
    with RunningServer(load=loader(tmp_path_factory.mktemp("thinks") / "m", WITH_REASONING)) as server:
        yield server


def asking(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def ask(messages=MESSAGES, said=None, **options):
        """``said``: what the model is made to say."""
        extra = options.pop("extra_body", {}) | ({} if said is None else {"choices": [said]})
        return client.chat.completions.create(model="stories", messages=messages, extra_body=extra, **options)

    ask.client = client
    return ask


@pytest.fixture(scope="module")
def ask(calling):
    return asking(calling)


def follows(call):
    """Checks a call against its function's schema."""
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_time":
        assert set(arguments) == {"zone"}
        assert arguments["zone"] in ("UTC", "CET")
    else:
        assert call.function.name == "get_weather"
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Oslo", "Rome")
        assert 1 <= arguments["days"] <= 9
    return True


def joined(chunks):
    """Content, reasoning, calls and finish reason of a stream of one choice, put together as clients do."""
    content, reasoning, calls, reasons = "", "", [], []
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for delta in choice.delta.tool_calls or ():
            if delta.index == len(calls):
                assert delta.id.startswith("call_")
                assert delta.type == "function"
                assert delta.function.arguments == ""
                calls.append([delta.function.name, ""])
            else:
                assert delta.id is None
                assert delta.function.name is None
                calls[delta.index][1] += delta.function.arguments
        reasons += [choice.finish_reason] if choice.finish_reason else []
    return content, reasoning, calls, reasons


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_follows_its_schema(ask, seed):
    options = {"tools": TOOLS, "tool_choice": "required", "temperature": 1.5, "seed": seed, "max_tokens": 150}
    answer = ask(**options, parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert follows(call)
    content, _, calls, reasons = joined(ask(**options, parallel_tool_calls=False, stream=True))
    assert (content, reasons) == ("", ["tool_calls"])
    assert calls == [[call.function.name, call.function.arguments]]


@pytest.mark.parametrize("name", ["get_weather", "get_time"])
def test_a_named_function_is_called(ask, name):
    choice = {"type": "function", "function": {"name": name}}
    answer = ask(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=150).choices[0]
    assert [call.function.name for call in answer.message.tool_calls] == [name]
    assert follows(answer.message.tool_calls[0])
    allowed = {"mode": "required", "tools": [choice]}
    answer = ask(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}, max_tokens=150)
    assert {call.function.name for call in answer.choices[0].message.tool_calls} == {name}


def test_calls_that_the_model_makes_by_itself(ask):
    said = f"I will see.\n{CALL}\n{CALL.replace('UTC', 'CET')}"
    answer = ask(said=said, tools=TOOLS).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content.strip() == "I will see."
    first, second = answer.message.tool_calls
    assert [json.loads(call.function.arguments) for call in (first, second)] == [{"zone": "UTC"}, {"zone": "CET"}]
    assert first.id != second.id
    content, _, calls, reasons = joined(ask(said=said, tools=TOOLS, stream=True))
    assert (content, reasons) == (answer.message.content, ["tool_calls"])
    assert calls == [[call.function.name, call.function.arguments] for call in (first, second)]


def test_without_tools_a_call_is_text(ask):
    assert ask(said=CALL).choices[0].message.content == CALL
    assert ask(said=CALL, tools=TOOLS, tool_choice="none").choices[0].message.content == CALL
    assert ask(said="Hello.", tools=TOOLS).choices[0].finish_reason == "stop"


def test_half_a_call_is_told_as_cut_off(calling, ask):
    """By max_tokens, and by the model, which ends in the middle."""
    begun = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UT'
    num_tokens = len(calling.llm.tokenizer.encode(begun, bos=False))
    for options in ({"said": begun}, {"said": CALL, "max_tokens": num_tokens}):
        answer = ask(tools=TOOLS, **options).choices[0]
        assert answer.finish_reason == "length"
        (call,) = answer.message.tool_calls
        assert call.function.name == "get_time"
        assert call.function.arguments.startswith('{"zone"')
        with pytest.raises(json.JSONDecodeError):
            json.loads(call.function.arguments)
        _, _, calls, reasons = joined(ask(tools=TOOLS, stream=True, **options))
        assert (calls, reasons) == ([["get_time", call.function.arguments]], ["length"])


def test_strict_functions_are_constrained(calling, ask):
    """What the model may say is then what a grammar allows, so another one cannot be asked for."""
    strict = [{"type": "function", "function": TIME | {"strict": True}}]
    served = calling.server.models.states[0].served
    assert served.prepare(Conversation(MESSAGES, TOOLS)).constraint == {}
    assert "%json" in served.prepare(Conversation(MESSAGES, strict)).constraint["grammar"]
    assert "%json" in served.prepare(Conversation(MESSAGES, TOOLS, parallel_tool_calls=False)).constraint["grammar"]
    with pytest.raises(openai.BadRequestError, match="choices: found it with"):
        ask(said=CALL, tools=strict)
    assert ask(tools=strict, max_tokens=5).choices[0].message.content


def test_a_result_goes_back_to_the_model(calling, ask):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is noon."},
    ]
    prompt = f"[user]\nHow is the weather?\n[assistant]\n{CALL}\n[tool]\nIt is noon.\n[assistant]\n"
    answer = ask(messages, max_tokens=10)
    assert answer.usage.prompt_tokens == len(calling.llm.tokenizer.encode(prompt, bos=False))
    ids = calling.llm.tokenizer.encode(prompt, bos=False)
    assert answer.choices[0].message.content == calling.llm.generate(ids, 10).text


def test_a_schema_and_tools_go_together(ask):
    """The answer is either calls or the text."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": TIME["parameters"], "strict": True}}
    for seed in range(3):
        options = {"temperature": 1.5, "seed": seed, "max_tokens": 150, "parallel_tool_calls": False}
        message = ask(tools=TOOLS, response_format=form, **options).choices[0].message
        if message.tool_calls:
            assert {call.function.name for call in message.tool_calls} <= {"get_time", "get_weather"}
        else:
            assert json.loads(message.content)["zone"] in ("UTC", "CET")


def test_reasoning_is_apart_and_counted(thinking):
    ask = asking(thinking)
    said = "<think>\nThey want to know.\n</think>\n\nIt is warm."
    answer = ask(said=said)
    message = answer.choices[0].message
    assert (message.reasoning_content.strip(), message.content) == ("They want to know.", "It is warm.")
    tokens = thinking.llm.tokenizer.encode("<think>\nThey want to know.\n", bos=False)
    found = answer.usage.completion_tokens_details.reasoning_tokens
    assert found == pytest.approx(len(tokens), abs=2)  # a token across the border belongs to one side
    content, reasoning, _, reasons = joined(ask(said=said, stream=True))
    assert (content, reasoning, reasons) == (message.content, message.reasoning_content, ["stop"])
    opened = ask(said="Hm.\n</think>\n\nYes.", extra_body={"chat_template_kwargs": {"thinks": True}}).choices[0].message
    assert (opened.reasoning_content.strip(), opened.content) == ("Hm.", "Yes.")
    called = ask(said=f"<think>Hm.</think>{CALL}", tools=TOOLS).choices[0]
    assert (called.finish_reason, called.message.reasoning_content) == ("tool_calls", "Hm.")
    assert follows(called.message.tool_calls[0])


def test_a_schema_holds_behind_the_reasoning(thinking):
    """The model may think first, and here it is biased not to."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": TIME["parameters"]}}
    ask = asking(thinking)
    brace = thinking.llm.tokenizer.encode("{", bos=False)[-1]
    message = ask(response_format=form, max_tokens=300, logit_bias={str(brace): 100}).choices[0].message
    assert json.loads(message.content)["zone"] in ("UTC", "CET")
    opened = {"chat_template_kwargs": {"thinks": True}}
    thought = ask(response_format=form, max_tokens=40, extra_body=opened).choices[0].message
    assert thought.reasoning_content.strip()[0] != "{"
    assert not thought.content


def test_what_was_thought_goes_back_to_the_template(thinking):
    messages = [*MESSAGES, {"role": "assistant", "content": "Warm.", "reasoning_content": "Hm."}, *MESSAGES]
    prompt = (
        "[user]\nHow is the weather?\n[assistant]\n<think>Hm.</think>Warm.\n[user]\nHow is the weather?\n[assistant]\n"
    )
    expected = len(thinking.llm.tokenizer.encode(prompt, bos=False))
    ask = asking(thinking)
    assert ask(messages, max_tokens=1).usage.prompt_tokens == expected
    items = [
        *MESSAGES,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": "Warm."},
        *MESSAGES,
    ]
    answer = ask.client.responses.create(model="stories", input=items, max_output_tokens=1)
    assert answer.usage.input_tokens == expected


def test_the_answer_is_of_the_clients_own_type(calling):
    body = {"model": "stories", "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "max_tokens": 150}
    found = httpx.post(f"{calling.url}/v1/chat/completions", json=body | {"parallel_tool_calls": False})
    assert ChatCompletion.model_validate_json(found.content, strict=True).choices[0].message.tool_calls


def test_responses_call_tools(ask):
    tools = [{"type": "function", **function, "strict": False} for function in (WEATHER, TIME)]
    asked = {"model": "stories", "input": MESSAGES, "tools": tools, "tool_choice": "required"}
    asked |= {"max_output_tokens": 150, "parallel_tool_calls": False}
    answer = ask.client.responses.create(**asked)
    (call,) = answer.output
    assert (call.type, call.status, answer.status) == ("function_call", "completed", "completed")
    with ask.client.responses.stream(**asked) as stream:
        events = list(stream)
        streamed = stream.get_final_response().output[0]
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert deltas[-1].snapshot == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    done = ask.client.responses.create(model="stories", input=[*MESSAGES, *answer.output, output], max_output_tokens=5)
    assert done.output_text
    with pytest.raises(openai.BadRequestError, match="tool_choice: found"):
        ask.client.responses.create(**asked | {"tool_choice": {"type": "function", "name": "nobody"}})


def test_responses_tell_reasoning_first(thinking):
    client = asking(thinking).client
    said = {"choices": ["<think>Hm.</think>Yes."]}
    answer = client.responses.create(model="stories", input=MESSAGES, extra_body=said)
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert (answer.output[0].content[0].text, answer.output_text) == ("Hm.", "Yes.")
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    with client.responses.stream(model="stories", input=MESSAGES, extra_body=said) as stream:
        types = [event.type for event in stream]
    assert types.index("response.reasoning_text.done") < types.index("response.output_text.delta")
    half = client.responses.create(
        model="stories",
        input=MESSAGES,
        tools=[{"type": "function", **TIME, "strict": False}],
        extra_body={"choices": ['<tool_call>\n{"name": "get_time", "arguments": {"zo']},
    )
    assert (half.status, half.output[-1].status) == ("incomplete", "incomplete")


def test_langchains_round_trip(calling):
    chains = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage

    model = chains.ChatOpenAI(base_url=f"{calling.url}/v1", api_key="none", model="stories", max_tokens=150)
    bound = model.bind_tools(TOOLS, tool_choice="get_time", parallel_tool_calls=False)
    asked = HumanMessage("What time is it?")
    answer = bound.invoke([asked])
    (call,) = answer.tool_calls
    assert call["name"] == "get_time"
    assert call["args"]["zone"] in ("UTC", "CET")
    streamed = None
    for chunk in bound.stream([asked]):
        streamed = chunk if streamed is None else streamed + chunk
    assert [(one["name"], one["args"]) for one in streamed.tool_calls] == [(call["name"], call["args"])]
    done = model.invoke([asked, answer, ToolMessage("It is noon.", tool_call_id=call["id"])])
    assert done.content


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]", "not 'custom'"),
        ({"extra_body": {"chat_template_kwargs": {"tools": []}}}, "chat_template_kwargs", "found 'tools'"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools", "found the function 'get_weather' twice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'get_time'"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "expected 'auto'"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": 1}}, "tool_choice", "a mode"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", "at least 1 character"),
        (
            {"tools": [{"type": "function", "function": TIME | {"parameters": {"type": "nonsense"}}}],
             "tool_choice": "required"},
            "tools[0]",
            "expected the schema of an object",
        ),
        (
            {"tools": [{"type": "function", "function": TIME | {"parameters": UNKNOWN_REF}}],
             "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tools",
            "/nowhere",
        ),
    ],
)  # fmt: skip
def test_refused(ask, options, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**options)
    assert words in caught.value.body["message"]
    assert caught.value.param == param


def test_broken_calls_in_messages_are_named(ask):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].tool_calls\[0\].function.arguments"):
        ask([{"role": "assistant", "tool_calls": [call]}, *MESSAGES])
    with pytest.raises(openai.BadRequestError, match="found tool_calls in a message of role 'user'"):
        ask([{"role": "user", "content": "x", "tool_calls": [call]}])


def test_a_real_model(smollm2):
    """SmolLM2-135M-Instruct, which was never taught to call: its own template, a forced call, and a plain answer."""
    import exl

    def load(progress):
        return exl.load(smollm2, device="cpu", context=512, max_sequences=2, max_queue=4, progress=progress)

    with RunningServer(load=load) as server:
        ask = asking(server)
        answer = ask([{"role": "user", "content": "What is the capital of France?"}], max_tokens=30).choices[0]
        assert "Paris" in answer.message.content
        choice = {"type": "function", "function": {"name": "get_weather"}}
        messages = [{"role": "user", "content": "Call get_weather for Rome, for 3 days."}]
        called = ask(messages, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=60).choices[0]
        assert follows(called.message.tool_calls[0])
