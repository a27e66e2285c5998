"""Which tokens end an answer, beside those that a model's files name as their EOS.

Many chat models end a turn with another token than the EOS of their files: a Llama 3 whose ``eos_token`` is
``<|end_of_text|>`` ends its answers with ``<|eot_id|>``. Two more places tell: the chat template, which writes that
token after every answer, and the vocabulary, in which the customary tokens have customary names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tokenizers import AddedToken

from exl.errors import ConfigError
from exl.text.chat_template import ChatTemplate
from exl.text.control_tokens import ControlTokens

# Tokens of these names mean nothing else in any family, so a special token of such a name ends the text. A part of the
# names that llama.cpp takes for the end of a generation (``llama_vocab::impl::load``).
_CUSTOMARY = frozenset(
    {
        *("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|EOT|>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, with full-width bars
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>"),
        *("<end_of_utterance>", "<|eot|>", "<|endofturn|>"),
    }
)
_HARMONY_MESSAGE, _HARMONY_MESSAGE_END = "<|message|>", "<|end|>"
# Words that no template writes.
_QUESTION, _ANSWER = "xquestionx", "xanswerx"


def customary_end_ids(added: Mapping[int, AddedToken]) -> tuple[int, ...]:
    """The special tokens among ``added`` whose name says that they end a text or a turn.

    In a vocabulary of gpt-oss' harmony format, ``<|end|>`` ends one message of an answer that goes on: its reasoning.
    """
    names = _CUSTOMARY
    if any(token.content == _HARMONY_MESSAGE for token in added.values()):
        names = names - {_HARMONY_MESSAGE_END}
    return tuple(token_id for token_id, token in added.items() if token.special and token.content in names)


def turn_end_ids(template: ChatTemplate, added: Mapping[int, AddedToken], bos: str | None) -> tuple[int, ...]:
    """The token that each of a model's chat templates writes directly after an answer, or nothing but white space
    between. Only added tokens count, never plain text, nor BOS or a token with which the template begins a turn.

    Renders a short conversation with each template. One that raises, or that writes no such token, adds nothing.
    """
    ids = {token.content: token_id for token_id, token in added.items() if not token.content.isspace()}
    special = {token.content for token in added.values() if token.special}
    ends = (_turn_end(template, name, ControlTokens(ids), special, bos) for name in template.names)
    return tuple(dict.fromkeys(ids[end] for end in ends if end is not None))


def _turn_end(
    template: ChatTemplate, name: str, tokens: ControlTokens, special: set[str], bos: str | None
) -> str | None:
    for as_parts in (False, True):  # some templates read only lists of parts
        try:
            asked = _rendered(template, name, as_parts, answered=False)
            prompted = _rendered(template, name, as_parts, answered=False, prompt=True)
            answered = _rendered(template, name, as_parts, answered=True)
        except ConfigError:
            continue
        before, found, after = answered.rpartition(_ANSWER)
        if not found:
            continue
        beginnings = {bos, *_leading(asked, tokens), *_last(asked.partition(_QUESTION)[0], tokens)}
        beginnings.update(_last(before, tokens))
        if prompted.startswith(asked):
            beginnings.update(_leading(prompted[len(asked) :], tokens))
        run = []  # a special token after one that is not, such as </answer><|im_end|>, is the end
        for token in _leading(after, tokens):
            if token in beginnings:
                break
            run.append(token)
        return next((token for token in run if token in special), run[0] if run else None)
    return None


def _rendered(template: ChatTemplate, name: str, as_parts: bool, *, answered: bool, prompt: bool = False) -> str:
    def message(role: str, text: str) -> dict[str, object]:
        return {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}

    messages = [message("user", _QUESTION), *([message("assistant", _ANSWER)] if answered else [])]
    return template.render(messages, add_generation_prompt=prompt, name=name)


def _last(text: str, tokens: ControlTokens) -> list[str]:
    """The token at the end of a text, if it ends with one, white space aside."""
    text = text.rstrip()
    return [text[start:stop] for start, stop in tokens.find(text)[-1:] if stop == len(text)]


def _leading(text: str, tokens: ControlTokens) -> Iterator[str]:
    """The tokens at the start of a text, up to the first that is not one, white space aside."""
    at = 0
    for start, stop in tokens.find(text):
        if text[at:start].strip():
            return
        yield text[start:stop]
        at = stop
