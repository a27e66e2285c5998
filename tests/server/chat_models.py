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


def loader(folder: Path, template: str) -> Callable[[Any], LLM]:
    """Copies the bundled model with this template; what is returned is ``RunningServer``'s ``load``."""
    shutil.copytree(BUNDLED_MODEL, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))

    def load(progress: Any) -> LLM:
        return exl.load(folder, device="cpu", max_sequences=8, cache_tokens=8192, max_queue=64, progress=progress)

    return load
