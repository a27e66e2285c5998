"""A loaded model: text in, text out, in whole characters."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from exl.checkpoint.generation_config import GenerationDefaults
from exl.checkpoint.header import shown
from exl.completion import Completion, TextIterator, completion_of
from exl.embedding import embed, submit_embed
from exl.engine.build import Engine
from exl.engine.cache_files import load_cache, prediction_key, save_cache
from exl.engine.constraints import Constraint, Grammars, Matcher
from exl.engine.generator import Generator as TokenGenerator
from exl.engine.handle import Handle
from exl.engine.request import TokenRequest
from exl.engine.stats import EngineStats
from exl.engine.ticket import Answer
from exl.errors import ConfigError, ExlError
from exl.keywords import explain_foreign_keywords, explain_options
from exl.memory.device import release_cached
from exl.request_options import ChosenAdapter, Request, RequestOptions, check_lora
from exl.sampling_params import SamplingParams
from exl.scoring import Score, submit_score
from exl.streams import Stream
from exl.text.logprobs import TokenLogprob, check_top_logprobs
from exl.text.sink import TextSink
from exl.text.tokenizer import Tokenizer
from exl.units import format_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from exl.chat import Chat
    from exl.checkpoint.quant.base import QuantConfig
    from exl.families.config import ModelConfig
    from exl.planning.plan import MemoryPlan

Prompt = str | Sequence[int]


class LLM:
    """A loaded model, made by ``exl.load``; a context manager. Thread-safe: all threads' requests run in one batch."""

    folder: Path
    tokenizer: Tokenizer
    defaults: GenerationDefaults  # of generation_config.json
    config: ModelConfig
    quant: QuantConfig | None
    plan: MemoryPlan
    _engine: Engine | None
    _streams: weakref.WeakSet[Stream[Any]]
    default_adapter: str | None  # of requests that do not say lora=; None: none
    _grammars: Grammars | None  # made for the first request with a constraint

    def __init__(self, *args: object, **kwargs: object) -> None:
        shown_args = ", ".join([*map(shown, args), *(f"{name}={shown(value)}" for name, value in kwargs.items())])
        raise TypeError(f"LLM() makes no model: exl.load({shown_args}) loads one and returns an LLM")

    @classmethod
    def _of(cls, folder: Path, engine: Engine, tokenizer: Tokenizer, defaults: GenerationDefaults) -> LLM:
        llm = cls.__new__(cls)
        llm.folder, llm.tokenizer, llm.defaults = folder, tokenizer, defaults
        llm.config, llm.quant, llm.plan = engine.config, engine.quant, engine.plan
        engine.generator.eos_ids = frozenset(tokenizer.eos_ids)
        llm._engine, llm._streams = engine, weakref.WeakSet()
        llm._grammars, llm.default_adapter = None, None
        return llm

    @property
    def context(self) -> int:
        """The maximum number of tokens of prompt and answer together."""
        return self._open_generator().context

    @property
    def max_sequences(self) -> int:
        """How many sequences run at once; others wait."""
        return self._open_generator().runner.max_sequences

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that the model was loaded with, for a request's ``lora=``."""
        return self._open_generator().adapters

    @property
    def decode_steps(self) -> str | None:
        """How decode steps run: "replayed as graphs" from the third on, on a CPU "recorded, one call each", or
        "launched one by one" and why. None where torch computes."""
        return self._open_generator().runner.decode_steps

    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        params: SamplingParams | int | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Completion]: ...

    @explain_options(RequestOptions)
    def generate(
        self,
        prompt: Prompt | Sequence[str],
        params: SamplingParams | int | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion | list[Completion]:
        """Continues a prompt: a text, or token ids, which are used as they are. A list of texts returns a list.

        Text gets the model's BOS; special tokens in it are plain text. ``params``: a number of tokens (by default 256),
        or a ``SamplingParams``. ``options``: see ``exl.request_options.RequestOptions``; a sampling option that is left
        out is taken from ``params``, else from the model's generation_config; if that has none, decoding is greedy.
        The part of the prompt that the cache still holds from earlier requests is not computed again where its bits
        are the same (``reuse_prefix``). A list is computed in one batch, and each of its texts gets the answer that it
        would get alone. ``top_logprobs=5`` fills ``Completion.logprobs``: each token's
        log-probability and those of the 5 likeliest tokens at its position, before penalty, temperature and filters;
        0 gives only the tokens' own. ``prompt_logprobs`` does the same for the prompt's tokens, also with
        ``max_tokens=0``. Raises ``ConfigError`` for an invalid value and for a prompt longer than the context.
        """
        request = Request.of(params, options, self.defaults)
        if isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(item, str) for item in prompt):
            return self._complete(list(prompt), request)
        return self._complete([prompt], request)[0]

    @explain_options(RequestOptions)
    def stream(
        self, prompt: Prompt, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]
    ) -> TextIterator:
        """Like ``generate``, but yields pieces: whole characters, and never text that a stop string cuts off.

        With ``top_logprobs``, the iterator's ``logprobs`` has one entry per token so far.
        """
        return self._stream(self.encode(prompt), Request.of(params, options, self.defaults))

    @explain_options(RequestOptions)
    def astream(
        self, prompt: Prompt, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]
    ) -> TextIterator:
        """``stream``, for ``async for``: the engine's thread computes, the event loop stays free."""
        return self.stream(prompt, params, **options)

    @explain_options(RequestOptions)
    def submit(
        self, prompt: Prompt, params: SamplingParams | int | None = None, **options: Unpack[RequestOptions]
    ) -> Handle[Completion]:
        """Begins a request and returns at once; it runs in one batch with all others, in a thread of the engine's.

        The handle's ``result()`` waits for the completion; iterating gives pieces, ``async for`` too; ``events()``
        gives token ids beside the text; ``cancel()`` ends it. Options as for ``generate``.
        """
        return self._submit(self.encode(prompt), Request.of(params, options, self.defaults), inline=False)

    def encode(self, prompt: Prompt) -> list[int]:
        """Text -> token ids, with the model's BOS once; ids are returned as they are. Raises ``ConfigError``."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            ids = None if isinstance(prompt, bytes) else [index(item) for item in prompt]  # NumPy's integers too
        except TypeError:
            ids = None
        if ids is None:
            raise ConfigError(f"prompt: found {shown(prompt)}, expected a text, a list of texts, or token ids")
        for token_id in ids:
            if not 0 <= token_id < self.config.vocab_size:
                raise ConfigError(
                    f"prompt: found token id {token_id}, expected an integer from 0 to {self.config.vocab_size - 1}"
                )
        return ids

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Messages -> token ids by the model's chat template; special tokens inside messages are plain text."""
        return self.tokenizer.encode_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )

    @explain_foreign_keywords
    def chat(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        overflow: str = "error",
        lora: ChosenAdapter = None,
    ) -> Chat:
        """Starts a conversation, or goes on with one, whose earlier turns are not computed again.

        ``messages``: earlier turns, ``{"role": "user", "content": "Hello"}``; the first may be the system prompt.
        ``send(None)`` answers the last one. ``overflow``: what happens when the context is full: "error", or
        "drop-oldest". ``lora``: the adapter that answers, unless a turn says otherwise. More: ``exl.chat.Chat``.
        """
        from exl.chat import Chat  # imported late: a Chat is built on this module

        return Chat(self, system, messages=messages, tools=tools, variables=variables, overflow=overflow, lora=lora)

    @explain_options(RequestOptions)
    def complete_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | int | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """Answers the last of ``messages`` once, without keeping the conversation; options as for ``generate``."""
        stream = self.stream_chat(messages, params, tools=tools, variables=variables, **options)
        for _ in stream:
            pass
        return stream.completion

    @explain_options(RequestOptions)
    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | int | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[RequestOptions],
    ) -> TextIterator:
        """Like ``complete_chat``, but yields pieces."""
        options.setdefault("reuse_prefix", "exact")  # a Chat's own default is True
        return self.chat(messages=messages, tools=tools, variables=variables).stream(None, params, **options)

    def logits(self, ids: Sequence[int], *, lora: ChosenAdapter = None) -> torch.Tensor:
        """Logits after every token of ``ids``: f32 [T, V], computed in chunks. ``lora``: as in a request."""
        out = torch.empty(len(ids), self.config.vocab_size)
        start = 0
        for chunk in self.iter_logits(ids, lora=lora):
            out[start : start + len(chunk)] = chunk
            start += len(chunk)
        return out

    def iter_logits(self, ids: Sequence[int], *, lora: ChosenAdapter = None) -> Stream[torch.Tensor]:
        """Like ``logits``, but yields chunks, for long texts: f32 [n, V] on the CPU, valid until the next chunk. Of one
        step they may wait for their reader: for ``prefill_chunk`` tokens, ``prefill_window`` with streamed layers."""
        ids, adapter = self.encode(ids), self._adapter(lora)
        request = TokenRequest(ids, SamplingParams(max_tokens=0), reuse_prefix=False, wants_all=True, lora=adapter)

        def start(inline: bool) -> Handle[Any]:
            return self._open_generator().submit(request, inline=inline)

        return self._track(Stream(start, lambda event: event.logits))

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        pooling: str = "mean",
        *,
        normalize: bool = False,
        lora: ChosenAdapter = None,
    ) -> torch.Tensor:
        """A vector for each text, f32 [texts, hidden size] on the CPU; of one text [1, hidden size].

        ``texts``: a text or token ids, or a list of these; a text gets the model's BOS. The vector is the state of the
        last layer after the final norm: ``pooling="mean"`` takes the mean over all tokens, "last" the last one's.
        ``normalize``: each vector's length becomes 1. ``lora``: as in a request. All texts are computed in one batch
        with all other requests, and each vector has the bits that it has alone. Raises ``ConfigError`` for an empty
        list, an empty text, and one that is longer than the context.
        """
        return embed(self._open_generator(), self.encode, texts, pooling, normalize, self._adapter(lora))

    def submit_embed(
        self,
        text: Prompt,
        pooling: str = "mean",
        *,
        normalize: bool = False,
        lora: ChosenAdapter = None,
    ) -> Handle[torch.Tensor]:
        """Begins to compute the vector of one text and returns at once: the handle's ``result()``, or ``await``, gives
        it, f32 [hidden size], the same as ``embed``; ``cancel()`` ends it. Raises as ``embed`` does, and
        ``QueueFullError``."""
        return submit_embed(self._open_generator(), self.encode, text, pooling, normalize, self._adapter(lora))

    def score(self, pairs: Sequence[tuple[Prompt, Sequence[int]]], *, lora: ChosenAdapter = None) -> list[Score]:
        """How likely each continuation is after its context: ``(context, continuation)``. A context is a text, which
        gets the model's BOS, or token ids; a continuation is token ids. All are computed in one batch, and each has the
        bits that it has alone; what the cache holds of a context is not computed again. ``lora``: as in a request.
        Raises ``ConfigError`` for either without a token, and for more tokens, the last one not counted, than the
        context holds."""
        generator, adapter = self._open_generator(), self._adapter(lora)
        with contextlib.ExitStack() as stack:
            handles = [
                stack.enter_context(submit_score(generator, context, continuation, adapter, inline=True))
                for context, continuation in [(self.encode(a), self.encode(b)) for a, b in pairs]
            ]
            return [handle.result() for handle in handles]

    def submit_score(
        self, context: Prompt, continuation: Sequence[int], *, lora: ChosenAdapter = None
    ) -> Handle[Score]:
        """Begins to compute one score and returns at once: the handle's ``result()``, or ``await``, gives it, the same
        as ``score``; ``cancel()`` ends it. Raises as ``score`` does, and ``QueueFullError``."""
        generator, adapter = self._open_generator(), self._adapter(lora)
        return submit_score(generator, self.encode(context), self.encode(continuation), adapter, inline=False)

    def save_cache(self, path: str | Path) -> int:
        """Writes the texts that the cache knows, and their keys and values, to a file for another run of this model.
        Returns their number of tokens. Waits for the step that runs now. Raises ``ConfigError`` if the file cannot be
        written; the file has its name only when it is whole."""
        self._open_generator()
        return save_cache(self._engine, self.folder, path)

    def load_cache(self, path: str | Path) -> int:
        """Takes what ``save_cache`` wrote into the cache, as far as there are pages that no request uses: prompts that
        begin like a text in it are computed from where it ends, with the same bits. Returns the number of tokens that
        can be found now. Raises ``ConfigError`` if the file cannot be read, or is of another model, cache type, chunk
        or kind of kernels; ``CheckpointError`` if it is damaged. Then nothing has changed."""
        self._open_generator()
        return load_cache(self._engine, self.folder, path)

    def identity(self) -> dict[str, Any]:
        """Whatever decides the bits of this model's predictions, as plain JSON: a digest of its tensors, its
        configuration, how it was rounded on loading, the cache's type, the arithmetic, the kind of kernels, and the
        adapter of requests that say none, by its number."""
        generator = self._open_generator()
        adapter = None if self.default_adapter is None else generator.adapters.index(self.default_adapter)
        return {**prediction_key(self._engine, self.folder), "adapter": adapter}

    def stats(self) -> EngineStats:
        """What the engine is doing and has done, in numbers. From any thread; waits for nobody."""
        return self._open_generator().stats()

    @property
    def failure(self) -> BaseException | None:
        """What has stopped the engine, so that every request fails until the model is loaded again; None: it works, or
        the model is closed. From any thread; waits for nobody."""
        engine = self._engine
        return None if engine is None else engine.generator.seat.failure

    def drain(self, seconds: float) -> bool:
        """Before closing: no more requests are taken (``ExlError``), and those that there are get so many seconds to
        end; then they are cancelled. Returns whether none had to be. Unread streams do not end by themselves."""
        return self._open_generator().seat.drain(seconds)

    def close(self) -> None:
        """Frees the memory. Requests to the model after that raise ``ExlError``.

        Unfinished streams end: one that another thread is computing after its token, the others at once.
        """
        engine = self._engine
        if engine is None:
            return
        reason = f"{self.folder.name}: the model was closed"
        engine.generator.seat.close(reason)
        self._engine = None
        for stream in list(self._streams):
            stream.end(reason)
        device = engine.device
        engine.close()
        del engine
        if device.type == "cuda":
            gc.collect()  # the engine's parts know each other, and VRAM goes with its last tensor
        release_cached(device)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        bits = f"{self.quant.bits}-bit" if self.quant else "dense"
        state = f"{self._engine.device}, {format_bytes(self.plan.num_bytes)}" if self._engine else "closed"
        graphs = self._engine.generator.runner.graphs if self._engine else None
        if graphs is not None and graphs.reason is not None:
            state += f", decode steps {graphs.describe()}"
        return f"LLM({self.folder.name}, {self.config.family}, {bits}, {state})"

    def _open_generator(self) -> TokenGenerator:
        if self._engine is None:
            raise ExlError(f"{self.folder.name}: the model is closed")
        self._engine.generator.guard.check()
        return self._engine.generator

    def _submit(self, prompt_ids: list[int], request: Request, *, inline: bool) -> Handle[Completion]:
        generator = self._open_generator()
        self._check_logprobs(request)
        params, tokenizer = request.params, self.tokenizer
        ranks = request.best_of is not None and request.best_of > request.n
        asked = TokenRequest(
            prompt_ids,
            params,
            reuse_prefix=request.reuse_prefix,
            top_logprobs=0 if ranks and request.top_logprobs is None else request.top_logprobs,
            prompt_logprobs=request.prompt_logprobs,
            prompt_progress=request.prompt_progress,
            num_choices=request.best_of or request.n,
            num_beams=request.num_beams,
            length_penalty=float(request.length_penalty),
            early_stopping=request.early_stopping,
            guidance_scale=float(request.guidance_scale),
            negative_ids=self._negative_ids(request),
            speculate=self._drafter(request),
            draft_tokens=request.draft_tokens,
            dry_breakers=tokenizer.ids_with(params.dry_breakers) if params.dry_multiplier else frozenset(),
            make_sink=lambda: TextSink(tokenizer, prompt_ids, params.stop, params.banned_strings),
            make_matcher=self._matchers(request.constraint),
            deadline=request.deadline,
            max_unread=request.max_unread,
            shift_keep=request.shift_keep,
            lora=self._adapter(request.lora),
        )

        def finish(answers: list[Answer]) -> Completion:
            return completion_of(self.tokenizer, asked, request, answers)

        return generator.submit(asked, finish, inline=inline)

    def _adapter(self, lora: ChosenAdapter) -> str | None:
        """The adapter of a request that says ``lora``. Raises ``ConfigError`` for one that there is not."""
        if lora is None:
            return self.default_adapter
        check_lora("lora", lora)
        name = lora or None
        self._open_generator().adapter_number(name)
        return name

    def _check_logprobs(self, request: Request) -> None:
        for name in ("top_logprobs", "prompt_logprobs"):
            check_top_logprobs(getattr(request, name), self.config.vocab_size, name)

    def _drafter(self, request: Request) -> str | None:
        """The name of what makes the drafts of a request."""
        names, asked = self._open_generator().scheduler.drafts.names, request.speculate
        if request.guidance_scale != 1.0 or request.num_beams > 1:
            names = ()
        if asked and asked not in names:
            raise ConfigError(f"speculate: found {asked!r}, but the model was loaded without draft=")
        may_default = asked is None and request.overflow == "stop"
        name = asked or ("draft" if may_default and "draft" in names else None)
        if name is None and request.draft_tokens is not None:
            raise ConfigError(f"draft_tokens: found {request.draft_tokens} without speculate=, expected both")
        return name

    def _negative_ids(self, request: Request) -> list[int] | None:
        try:
            return None if request.negative_prompt is None else self.encode(request.negative_prompt)
        except ConfigError as error:
            raise ConfigError(f"negative_{error}") from None

    def _matchers(self, options: Mapping[str, Any]) -> Callable[[], Matcher] | None:
        """Makes a matcher for each choice of a request; the grammar is compiled now, in the calling thread."""
        constraint = Constraint.of(**options)
        if constraint is None:
            return None
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.config.vocab_size, self.tokenizer.eos_ids)
        return self._grammars.matcher(constraint).copy

    def _stream(
        self,
        prompt_ids: list[int],
        request: Request,
        keep: Callable[[str, Completion | None], None] | None = None,
    ) -> TextIterator:
        """``keep``: see ``TextIterator``."""
        self._check_logprobs(request)

        def start(inline: bool) -> Handle[Completion]:
            return self._submit(prompt_ids, request, inline=inline)

        logprob_of = None if request.top_logprobs is None else partial(TokenLogprob.of, tokenizer=self.tokenizer)
        return self._track(TextIterator(start, logprob_of, keep))

    def _track(self, stream: Any) -> Any:
        """Closing the model ends the stream."""
        self._streams.add(stream)
        return stream

    def _complete(self, prompts: Sequence[Prompt], request: Request) -> list[Completion]:
        """All in one batch; whatever goes wrong with one ends all."""
        with contextlib.ExitStack() as stack:
            handles = [
                stack.enter_context(self._submit(ids, request, inline=True)) for ids in list(map(self.encode, prompts))
            ]
            return [handle.result() for handle in handles]
