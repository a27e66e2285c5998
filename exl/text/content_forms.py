"""In which forms a chat template takes a message's content: read from the template itself.

Messages in the form of OpenAI's API hold texts, lists of parts (``{"type": "text", "text": ...}``), or None where an
assistant only calls tools. A template is written for some of them. Given another, it fails, or shows the model Python's
notation of a list, or leaves the message out. So a message is brought into a form that its template takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

from exl.errors import ConfigError

_OF_LISTS = ("selectattr", "rejectattr", "select", "reject", "map", "join")
_OF_PARTS = ("type", "text")


@dataclass(frozen=True)
class ContentForms:
    """Texts are taken by every template."""

    none: bool  # the template compares a content with none: DeepSeek-R1's does, to find the messages that call tools
    parts: bool  # it goes through a content's parts

    @classmethod
    def of(cls, template: nodes.Template) -> ContentForms:
        is_content = _Content(template)
        none = any(is_content(test.node) for test in template.find_all(nodes.Test) if test.name == "none")
        none |= any(is_content(compared.expr) and _with_none(compared) for compared in template.find_all(nodes.Compare))
        loops = [loop.iter for loop in template.find_all(nodes.For)]
        loops += [filtered.node for filtered in template.find_all(nodes.Filter) if filtered.name in _OF_LISTS]
        loops += [  # content[0].text
            key.node.node
            for key in template.find_all((nodes.Getattr, nodes.Getitem))
            if _key(key) in _OF_PARTS and isinstance(key.node, nodes.Getitem)
        ]
        return cls(none, any(map(is_content, loops)))

    def fit(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A copy of a message in a form that the template takes. ``where`` is the message's name in errors.

        Content that is None, or that an assistant who calls tools leaves out, is None for a template that asks for
        that, else no key. For a template that goes through no parts they become one text, a line each; ``ConfigError``
        if one of them is no text.
        """
        content = message.get("content")
        if content is None:
            silent = "content" in message or (message["role"] == "assistant" and "tool_calls" in message)
            rest = {key: value for key, value in message.items() if key != "content"}
            return rest | {"content": None} if self.none and silent else rest
        if isinstance(content, str) or self.parts:
            return dict(message)
        return dict(message) | {"content": "\n".join(_text(part, where) for part in content)}


def _text(part: Mapping[str, Any], where: str) -> str:
    if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        found = part.get("type", "text") if isinstance(part.get("type", "text"), str) else "of no type"
        raise ConfigError(f"{where}: content: found a part {found[:40]!r}, this model's chat template takes texts only")
    return part["text"]


class _Content:
    """Whether an expression is a message's content: ``message.content``, or a variable or macro's argument that was
    set from it."""

    def __init__(self, template: nodes.Template) -> None:
        self._names = {"content"}
        macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
        before = 0
        while len(self._names) > before:  # a variable may be set from one that is set further down
            before = len(self._names)
            for assigned in template.find_all(nodes.Assign):
                if isinstance(assigned.target, nodes.Name) and self(assigned.node):
                    self._names.add(assigned.target.name)
            for call in template.find_all(nodes.Call):
                macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
                given = [] if macro is None else zip(macro.args, call.args, strict=False)
                self._names.update(name.name for name, value in given if self(value))

    def __call__(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._names
        if isinstance(node, nodes.Filter) and node.node is not None:
            return self(node.node)
        if isinstance(node, nodes.CondExpr):
            return self(node.expr1) or (node.expr2 is not None and self(node.expr2))
        return _key(node) == "content"


def _key(node: nodes.Node) -> object:
    """``name`` of ``x.name`` and of ``x["name"]``."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) else None


def _with_none(compared: nodes.Compare) -> bool:
    return any(isinstance(operand.expr, nodes.Const) and operand.expr.value is None for operand in compared.ops)
