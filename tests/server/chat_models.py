"""The bundled model with chat templates of models that call tools and reason. It knows nothing of either: what it
says there is forced by grammars, or by ``choices`` with one text, and so goes the whole way that real calls go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.llm import LLM

# As in Qwen 2.5's, shortened: the stories model has a context of 512 tokens.
TOOLS_ONLY = (
    "{% if tools %}[tools]{% for tool in tools %}{{ tool.function.name }} {% endfor %}<tool_call>\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# As in Qwen 3's: reasoning, too, which ``thinks`` has opened already.
WITH_REASONING = TOOLS_ONLY.replace(
    "]\n{{ m.content", "]\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content"
).replace("[assistant]\n{% endif", "[assistant]\n{% if thinks %}<think>\n{% endif %}{% endif")

# ChatML whole, with tools and reasoning as Hermes' and Qwen 3's have them. With tools it takes more than 512 tokens.
CHATML = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools> <tool_call>{"name": N, "arguments": A}</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def loader(folder: Path, template: str, context: int = 512) -> Callable[[Any], LLM]:
    """Copies the bundled model with this template; what is returned is ``RunningServer``'s ``load``. ``context``: more
    tokens than 512 are more than it was trained with."""
    shutil.copytree(BUNDLED_MODEL, folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": context}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))

    def load(progress: Any) -> LLM:
        return exl.load(folder, device="cpu", max_sequences=8, cache_tokens=8192, max_queue=64, progress=progress)

    return load
