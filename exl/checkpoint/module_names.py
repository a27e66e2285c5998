"""How the modules of a language model inside a model for images and text are called. A file's tensors may have another
name than its quantization configuration: transformers renames modules when it loads, and tensors back when it saves."""

from __future__ import annotations

from exl.checkpoint.module_pattern import ModuleMatcher, ModulePattern

# What stands for "model." and before the head: since transformers 4.52, before, and in Qwen2-VL's files.
TEXT_PARTS = (("model.language_model.", ""), ("language_model.model.", "language_model."), ("model.", ""))
_PART = "language_model"  # in the names that others do not have
_HEAD = "lm_head"


def other_spellings(name: str) -> tuple[str, ...]:
    """``other_spellings("model.layers.0.mlp")`` has "model.language_model.layers.0.mlp" and
    "language_model.model.layers.0.mlp": what the module would be called as a text part. None are without
    "language_model", so that for a language model by itself nothing fits them."""
    if name in (_HEAD, f"{_PART}.{_HEAD}"):
        found = [before + _HEAD for _, before in TEXT_PARTS]
    else:
        prefix = next((prefix for prefix, _ in TEXT_PARTS if name.startswith(prefix)), None)
        if prefix is None:
            return ()
        found = [other + name.removeprefix(prefix) for other, _ in TEXT_PARTS]
    return tuple(dict.fromkeys(other for other in found if other != name and _PART in other))


class ModuleNames:
    """A module's name in the file, and what a configuration may call it. What says nothing of text parts means the
    name in the file alone: "everything but model.layers". ``max_steps``: of patterns, for each spelling."""

    def __init__(self, name: str, max_steps: int) -> None:
        self.name, self._max_steps = name, max_steps
        self._spellings = (name, *other_spellings(name))
        self._matchers: dict[str, ModuleMatcher] = {}

    def is_called(self, name: str) -> bool:
        return name in self._meant_by(name)

    def has(self, part: str) -> bool:
        """Whether the name contains ``part``, anywhere."""
        return any(part in name for name in self._meant_by(part))

    def is_in(self, part: str) -> bool:
        """Whether ``part`` is some whole components of the name: "model.layers" of "model.layers.0.mlp.up_proj"."""
        return any(f".{part.rstrip('.')}." in f".{name}." for name in self._meant_by(part))

    def matches(self, pattern: ModulePattern) -> bool:
        """As ``ModuleMatcher.matches``."""
        return any(self._matcher(name).matches(pattern) for name in self._meant_by(pattern.text))

    def found(self, pattern: ModulePattern) -> bool:
        """As ``ModuleMatcher.found``."""
        return any(self._matcher(name).found(pattern) for name in self._meant_by(pattern.text))

    def _meant_by(self, text: str) -> tuple[str, ...]:
        return self._spellings if _PART in text else self._spellings[:1]

    def _matcher(self, name: str) -> ModuleMatcher:
        """Made when a pattern asks for it: a model with experts has many thousands of modules."""
        if name not in self._matchers:
            self._matchers[name] = ModuleMatcher(name, self._max_steps)
        return self._matchers[name]
