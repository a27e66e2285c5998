"""The bundled model with a chat template: answers are stories, but prompts and tools are those of a chat model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exl
from exl.checkpoint.hub import find_model
from exl.llm import LLM

# ChatML with tools and reasoning as Hermes and Qwen 3 have them, in few words.
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


def write_chat_model(folder: Path, template: str = CHATML) -> Path:
    """A copy of the bundled model in ``folder``, with the template in its tokenizer_config.json. Its context is longer
    than the 512 tokens that it was trained with: tools take many."""
    shutil.copytree(find_model(None), folder, dirs_exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def load_chat_model(folder: Path) -> Callable[[Any], LLM]:
    """``load`` of a ``RunningServer``."""
    return lambda progress: exl.load(folder, device="cpu", max_sequences=8, cache_tokens=8192, progress=progress)
