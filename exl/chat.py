"""Conversations: turns that the model has already seen are not computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl.completion import Completion, TextIterator
from exl.conversation import LEAST_ROOM, MAX_ANSWER, Conversation
from exl.errors import ConfigError
from exl.keywords import explain_foreign_keywords, explain_options
from exl.llm import LLM
from exl.request_options import ChosenAdapter, Request, RequestOptions
from exl.sampling_params import SamplingParams
from exl.saved_chat import SavedChat
from exl.text.chat_template import plain_messages
from exl.text.content_forms import ContentForms

if TYPE_CHECKING:
    from typing_extensions import Unpack

TRANSCRIPT_STOP = "\nUser:"
_NOTICE = (
    "this model has no chat template: it was not trained to talk, and is shown a transcript of User and Assistant to "
    "continue"
)


class Chat(Conversation):
    """A conversation with a model, made by ``llm.chat()``. Not thread-safe.

    The token ids that were run are kept, and each turn appends to them. So the cache holds all of them except the last
    sampled token, unless other requests have evicted them. If the template renders earlier turns differently (for
    example, it drops their reasoning), the whole conversation is rendered, and computed from the first token that
    differs.
    """

    def __init__(
        self,
        llm: LLM,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        overflow: str = "error",
        lora: ChosenAdapter = None,
    ) -> None:
        """``messages``: earlier turns; the first may be the system prompt. ``tools`` and ``variables`` are passed to
        the chat template. ``overflow``: what happens when the context is full. "error": ``ConfigError``. "drop-oldest":
        the model is not shown the oldest turns any more (``num_forgotten``), until half of the context is free.
        ``lora``: the adapter that answers where a turn's own ``lora=`` does not say.

        Raises ``ConfigError`` for messages that are none, and if there are tools but the model has no chat template.
        """
        super().__init__(llm.folder.name, system, messages, overflow)
        llm._adapter(lora)  # refuses one that there is not
        self._llm, self._lora = llm, lora
        self._tools, self._variables = tools, variables
        self._run_ids: list[int] = []  # as run, up to the end of the last answer; empty: render all messages
        self._plain_ids: list[int] = []  # the template's rendering of the last answer's prompt
        self._raw_answer = ""  # the last answer with the white space around it
        if self.is_transcript and tools:
            raise ConfigError(f"tools: {llm.folder.name} has no chat template to show them with")

    def _changed(self) -> None:
        self._run_ids = []

    @property
    def is_transcript(self) -> bool:
        """Whether the model has no chat template, so that it continues a transcript."""
        return self._llm.tokenizer.chat_template is None

    @property
    def notice(self) -> str | None:
        """What a user should know before they talk to this model; None: nothing."""
        return f"{self._llm.folder.name}: {_NOTICE}" if self.is_transcript else None

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the conversation so far, as the model is shown it."""
        shown = self._messages[self._forgotten :]
        return len(self._run_ids or (self._render(shown, to_answer=False) if shown else ()))

    @explain_options(RequestOptions)
    def send(
        self, text: str | None, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]
    ) -> Completion:
        """Answers a message; None: answers the messages that are there. Options as for ``LLM.generate``.

        ``max_tokens`` is by default 512 or half of what is left of the context, whichever is less. Raises
        ``ConfigError`` for an empty message or a full context; the conversation then stays unchanged.
        """
        return _exhaust(self.stream(text, params, **options))

    @explain_options(RequestOptions)
    def stream(
        self, text: str | None, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]
    ) -> TextIterator:
        """Like ``send``, but yields pieces. If it is closed early, the text so far is kept as the answer."""
        return self._answer(self._asked(text), params, options)

    def _answer(
        self, messages: list[dict[str, Any]], params: SamplingParams | int | None, options: RequestOptions
    ) -> TextIterator:
        wanted = params.max_tokens if isinstance(params, SamplingParams) else params or options.get("max_tokens")
        forgotten, ids, plain = self._fitting(messages, wanted)
        keep = _Kept(messages, ids, plain, forgotten)
        return self._stream(keep, params, options)

    def _stream(self, keep: _Kept, params: SamplingParams | int | None, options: RequestOptions) -> TextIterator:
        left = self._llm.context - len(keep.ids)
        options = {"reuse_prefix": True, **options}
        if options.get("lora") is None and self._lora is not None:
            options["lora"] = self._lora
        request = Request.of(params, options, self._llm.defaults, max_tokens=max(1, min(MAX_ANSWER, left // 2)))
        if self.is_transcript:
            stop = (*(request.params.stop or ()), TRANSCRIPT_STOP)
            request = replace(request, params=replace(request.params, stop=stop))
        return self._llm._stream(keep.ids, request, lambda text, done: self._keep(keep, text, done))

    @explain_options(RequestOptions)
    def retry(self, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]) -> Completion:
        """Answers the last user message again, with a new random seed unless one is given."""
        return _exhaust(self.stream_retry(params, **options))

    @explain_options(RequestOptions)
    def stream_retry(
        self, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]
    ) -> TextIterator:
        """Like ``retry``, but yields pieces. If it is closed before the first piece, the old answer is kept."""
        return self._answer(self._asked_again(), params, options)

    @explain_options(RequestOptions)
    def continue_answer(
        self, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]
    ) -> Completion:
        """Goes on with the last answer where it ended, for one that was cut off. The completion has the new part."""
        return _exhaust(self.stream_continue(params, **options))

    @explain_options(RequestOptions)
    def stream_continue(
        self, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]
    ) -> TextIterator:
        """Like ``continue_answer``, but yields pieces."""
        before, answer = self._begun()
        raw = self._raw_answer if self._raw_answer.strip() == answer else answer
        shown = before[self._forgotten :]
        if self._run_ids:
            ids, plain = self._run_ids, self._plain_ids
        elif self.is_transcript:
            plain = self._render(shown, to_answer=True)
            ids = self._llm.encode(f"{transcript(self._with_system(shown), True)} {answer}")
        else:
            plain = self._render(shown, to_answer=True)
            ids = [*plain, *self._llm.tokenizer.encode(answer, bos=False)]
        self._check_room(ids)
        return self._stream(_Kept(before, ids, plain, self._forgotten, raw), params, options)

    # ---- files

    @classmethod
    @explain_foreign_keywords
    def load(
        cls,
        llm: LLM,
        path: str | Path,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        overflow: str = "error",
        lora: ChosenAdapter = None,
    ) -> Chat:
        """Loads a conversation that ``save`` wrote, for any model. Raises ``ConfigError`` for any other file."""
        saved = SavedChat.load(path)
        return cls._of(saved, llm, tools=tools, variables=variables, overflow=overflow, lora=lora)

    @classmethod
    @explain_foreign_keywords
    def from_json(
        cls,
        llm: LLM,
        data: Any,
        *,
        source: str = "chat",
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        overflow: str = "error",
        lora: ChosenAdapter = None,
    ) -> Chat:
        """The conversation of ``to_json``. Raises ``ConfigError``, which names ``source``, for anything else."""
        saved = SavedChat.from_json(data, source)
        return cls._of(saved, llm, tools=tools, variables=variables, overflow=overflow, lora=lora)

    @classmethod
    def _of(cls, saved: SavedChat, llm: LLM, **options: Any) -> Chat:
        chat = cls(llm, saved.system, **options)
        chat._take(saved)
        return chat

    def __repr__(self) -> str:
        mode = ", transcript" if self.is_transcript else ""
        return f"Chat({self._llm.folder.name}{mode}, {len(self._messages)} messages, {self.num_tokens} tokens)"

    # ---- prompts

    def _keep(self, keep: _Kept, text: str, done: Completion | None) -> None:
        """Takes an answer into the conversation: what was handed out of it, and its tokens if it is complete."""
        if not text and done is None:
            return
        self._raw_answer = keep.begun + text
        said = {"role": "assistant", "content": self._raw_answer.strip()}
        self._messages, self._forgotten = [*keep.messages, said], keep.forgotten
        # The tokens of a stop string belong to no turn: render again; the cache still has the tokens before.
        whole = done is not None and self._llm.tokenizer.decode(done.token_ids).strip() == done.text.strip()
        self._run_ids = [*keep.ids, *done.token_ids] if whole else []
        self._plain_ids = keep.plain

    def _fitting(self, messages: list[dict[str, Any]], wanted: object) -> tuple[int, list[int], list[int]]:
        """How many of the oldest messages to leave out so that the others leave room for an answer; the ids to run; and
        the ids that the template renders from the messages' text. ``wanted``: tokens of the answer; None: the default.
        """
        forgotten = min(self._forgotten, len(messages) - 1)
        ids, plain = self._prompt(messages, forgotten)
        context = self._llm.context
        room = context // LEAST_ROOM
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            room = min(room, max(wanted, 1))
        if self._overflow == "drop-oldest" and context - len(ids) < room:
            for begin in [i for i, m in enumerate(messages) if m["role"] == "user" and i > forgotten]:
                forgotten = begin
                ids, plain = self._prompt(messages, forgotten)
                if len(ids) <= context // 2:
                    break
        self._check_room(ids)
        return forgotten, ids, plain

    def _check_room(self, ids: Sequence[int]) -> None:
        context = self._llm.context
        if len(ids) >= context:
            raise ConfigError(
                f"context: the conversation takes {len(ids)} tokens and the context holds {context}: undo a turn, "
                "start a new chat, or load the model with a larger context"
            )

    def _prompt(self, messages: list[dict[str, Any]], forgotten: int) -> tuple[list[int], list[int]]:
        """The ids to run, and the ids that the template renders from the messages' text."""
        plain = self._render(messages[forgotten:], to_answer=True)
        run = self._extended(messages, plain) if forgotten == self._forgotten else None
        return run or plain, plain

    def _extended(self, messages: list[dict[str, Any]], plain: list[int]) -> list[int] | None:
        """The ids that were run + the template's end of that answer + the new turn. None if the template's rendering of
        the whole conversation does not begin with its rendering of the earlier part, or decodes to another text."""
        if not self._run_ids or messages[:-1] != self._messages:
            return None
        shown = self._messages[self._forgotten :]
        done = self._render(shown, to_answer=False)
        silent = self._render([*shown[:-1], {"role": "assistant", "content": ""}], to_answer=False)
        if plain[: len(done)] != done or silent[: len(self._plain_ids)] != self._plain_ids:
            return None
        ids = [*self._run_ids, *silent[len(self._plain_ids) :], *plain[len(done) :]]
        decode = self._llm.tokenizer.decode
        same = decode(ids, skip_special_tokens=False).split() == decode(plain, skip_special_tokens=False).split()
        return ids if same else None

    def _render(self, messages: Sequence[Mapping], *, to_answer: bool) -> list[int]:
        if self.is_transcript:
            return self._llm.encode(transcript(self._with_system(messages), to_answer))
        return self._llm.chat_prompt(
            self._with_system(messages),
            add_generation_prompt=to_answer,
            tools=self._tools,
            variables=self._variables,
        )


@dataclass(frozen=True)
class _Kept:
    """What a conversation becomes if an answer is kept."""

    messages: list[dict[str, Any]]  # before the answer
    ids: list[int]  # the prompt as it is run
    plain: list[int]  # the prompt as the template renders it from the messages' text
    forgotten: int
    begun: str = ""  # the part of the answer that is in the prompt


def transcript(messages: Sequence[Mapping[str, Any]], to_answer: bool) -> str:
    """Messages as a text, for a model without a chat template; the system prompt stands for itself. Raises
    ``ConfigError``."""
    forms = ContentForms(none=False, parts=False)
    texts = [forms.fit(message, f"messages[{i}]") for i, message in enumerate(plain_messages(messages))]
    lines = [
        message.get("content", "")
        if message["role"] == "system"
        else f"{message['role'].capitalize()}: {message.get('content', '')}".rstrip()
        for message in texts
    ]
    return "\n".join([*lines, "Assistant:"] if to_answer else lines)


def _exhaust(stream: TextIterator) -> Completion:
    for _ in stream:
        pass
    return stream.completion
