"""A loaded model: text in, text out, in whole characters."""

from __future__ import annotations

import html
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exl import forks
from exl.checkpoint.config import GenerationDefaults
from exl.checkpoint.header import shown
from exl.checkpoint.hub import find_model
from exl.checkpoint.hub_errors import Token
from exl.engine.build import Engine, load_engine
from exl.engine.generator import Generator
from exl.errors import ConfigError, ExlError
from exl.keywords import explain_foreign_keywords
from exl.memory.device import release_cached
from exl.planning.from_headers import EngineOptions
from exl.progress import Progress, shown_progress
from exl.sampling import SamplingParams
from exl.text.logprobs import TokenLogprob, check_top_logprobs
from exl.text.text_stream import TextStream
from exl.text.tokenizer import Tokenizer
from exl.units import format_bytes

if TYPE_CHECKING:
    from exl.chat import Chat

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt."""

    text: str
    token_ids: tuple[int, ...]  # without the end-of-sequence id; with the tokens of a stop string
    finish_reason: str  # "stop": end of sequence or a stop string; "length": max_tokens or the context is used up
    num_prompt_tokens: int
    num_reused_tokens: int  # prompt tokens taken from the cache instead of computed
    seed: int  # the seed that was used: the same request with it gives the same text on the same machine
    prompt_seconds: float  # until the first token
    decode_seconds: float  # from the first token to the last
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per entry of token_ids; None unless top_logprobs was given

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 if there is no second token."""
        return (self.num_tokens - 1) / self.decode_seconds if self.num_tokens > 1 and self.decode_seconds else 0.0

    def __repr__(self) -> str:
        return (
            f"Completion({self.text!r}, {self.num_prompt_tokens}+{self.num_tokens} tokens, "
            f"{self.finish_reason}, {self.tokens_per_second:.1f} tokens/s)"
        )

    def _repr_html_(self) -> str:
        return (
            f'<div style="white-space: pre-wrap">{html.escape(self.text)}</div>'
            f'<div style="opacity: 0.6; font-size: 85%">{self.num_prompt_tokens} + {self.num_tokens} tokens, '
            f"{html.escape(self.finish_reason)}, first after {self.prompt_seconds * 1e3:.0f} ms, "
            f"then {self.tokens_per_second:.1f} tokens/s</div>"
        )


class TextIterator:
    """Pieces of text as they become final; ``completion`` once it is exhausted. ``close()`` stops early."""

    def __init__(self, pieces: Iterator[str | Completion], logprobs: Sequence[TokenLogprob] | None = None) -> None:
        self._pieces, self._logprobs = pieces, logprobs
        self._completion: Completion | None = None

    def __iter__(self) -> TextIterator:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Completion):
            self._completion = piece
            raise StopIteration
        return piece

    @property
    def completion(self) -> Completion:
        """Available after the last piece; before that, raises ``ExlError``."""
        if self._completion is None:
            raise ExlError("this stream has not ended: take its pieces first, then ask for its completion")
        return self._completion

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """One per token so far, also if its text is not final yet; None unless ``top_logprobs`` was given."""
        return None if self._logprobs is None else tuple(self._logprobs)

    def close(self) -> None:
        self._pieces.close()


class _Turn:
    """Allows one request at a time. Another thread waits; the same thread would deadlock, so it gets an error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        forks.register(self)

    def before_fork(self) -> None:
        pass

    def after_fork(self, in_child: bool) -> None:
        """The thread that had the turn may not exist in the child."""
        if in_child:
            self._lock, self._owner = threading.Lock(), None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise ExlError("another stream of this model is unfinished in this thread: exhaust it or close() it first")
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *exc_info: object) -> None:
        if self._owner == threading.get_ident():  # not in a fork that was made meanwhile
            self._owner = None
            self._lock.release()


class LLM:
    """A loaded model, made by ``exl.load``; a context manager. Thread-safe: requests run one after another."""

    def __init__(self, folder: Path, engine: Engine, tokenizer: Tokenizer, defaults: GenerationDefaults) -> None:
        self.folder, self.tokenizer, self.defaults = folder, tokenizer, defaults
        self.config, self.quant, self.plan = engine.config, engine.quant, engine.plan
        self._engine: Engine | None = engine
        self._turn = _Turn()

    @property
    def context(self) -> int:
        """The maximum number of tokens of prompt and answer together."""
        return self._open_generator().context

    @property
    def decode_steps(self) -> str | None:
        """How decode steps run on a GPU: "replayed as graphs" from the third on, or "launched one by one" and why. None
        on a CPU."""
        return self._open_generator().runner.decode_steps

    @explain_foreign_keywords
    def generate(
        self,
        prompt: Prompt | Sequence[str],
        max_tokens: int = 256,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        reuse_prefix: bool = False,
        top_logprobs: int | None = None,
    ) -> Completion | list[Completion]:
        """Continues a prompt: a text, or token ids, which are used as they are. A list of texts returns a list.

        Text gets the model's BOS; special tokens in it are plain text. A sampling parameter that is None is taken from
        the model's generation_config; if that has none, decoding is greedy and filters and penalty are off.
        ``reuse_prefix`` reuses the part of the prompt that the cache still holds from earlier requests: faster, but
        results are equal only up to rounding, not bit for bit. ``top_logprobs=5`` fills ``Completion.logprobs``: each
        token's log-probability and those of the 5 likeliest tokens at its position, before penalty, temperature and
        filters; 0 gives only the tokens' own. Raises ``ConfigError`` for an invalid value and for a prompt longer than
        the context.
        """
        params = self._params(
            max_tokens, temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty, seed=seed, stop=stop
        )
        if isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(item, str) for item in prompt):
            return [self._complete(item, params, reuse_prefix, top_logprobs) for item in prompt]
        return self._complete(prompt, params, reuse_prefix, top_logprobs)

    @explain_foreign_keywords
    def stream(
        self,
        prompt: Prompt,
        max_tokens: int = 256,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        reuse_prefix: bool = False,
        top_logprobs: int | None = None,
    ) -> TextIterator:
        """Like ``generate``, but yields pieces: whole characters, and never text that a stop string cuts off.

        With ``top_logprobs``, the iterator's ``logprobs`` has one entry per token so far.
        """
        params = self._params(
            max_tokens, temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty, seed=seed, stop=stop
        )
        return self._begin(prompt, params, reuse_prefix, top_logprobs)

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
        messages: Sequence[Mapping],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping] | None = None,
        variables: Mapping | None = None,
    ) -> list[int]:
        """Messages -> token ids by the model's chat template; special tokens inside messages are plain text."""
        return self.tokenizer.encode_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )

    def chat(
        self,
        system: str | None = None,
        *,
        tools: Sequence[Mapping] | None = None,
        variables: Mapping | None = None,
    ) -> Chat:
        """Starts a conversation whose earlier turns are not computed again; see ``exl.chat.Chat``."""
        from exl.chat import Chat  # imported late: a Chat is built on this module

        return Chat(self, system, tools=tools, variables=variables)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after every token of ``ids``: f32 [T, V], computed in chunks."""
        out = torch.empty(len(ids), self.config.vocab_size)
        start = 0
        for chunk in self.iter_logits(ids):
            out[start : start + len(chunk)] = chunk
            start += len(chunk)
        return out

    def iter_logits(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Like ``logits``, but yields chunks, for long texts: f32 [n, V] on the CPU, valid until the next chunk."""
        generator = self._open_generator()
        with self._turn:
            for chunk in generator.logits(ids):
                yield chunk.cpu()

    def close(self) -> None:
        """Frees the memory. Requests to the model after that raise ``ExlError``."""
        if self._engine is not None:
            with self._turn:
                engine, self._engine = self._engine, None
                if engine is not None:
                    device = engine.device
                    engine.close()
                    del engine
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

    def _open_generator(self) -> Generator:
        if self._engine is None:
            raise ExlError(f"{self.folder.name}: the model is closed")
        self._engine.generator.guard.check()
        return self._engine.generator

    def _params(
        self,
        max_tokens: int,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        *,
        repetition_penalty: float | None,
        seed: int | None,
        stop: str | Sequence[str],
    ) -> SamplingParams:
        asked = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        chosen = {}
        for name, value in asked.items():
            value = getattr(self.defaults, name) if value is None else value
            if value is not None:
                chosen[name] = value
        seed = secrets.randbits(63) if seed is None else seed
        if not isinstance(stop, Sequence):
            raise ConfigError(f"stop: found {stop!r}, expected a text or a list of texts")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        return SamplingParams(max_tokens=max_tokens, seed=seed, stop=stop, **{"temperature": 0.0, **chosen})

    def _begin(
        self, prompt: Prompt, params: SamplingParams, reuse_prefix: bool, top_logprobs: int | None
    ) -> TextIterator:
        check_top_logprobs(top_logprobs, self.config.vocab_size)
        logprobs: list[TokenLogprob] | None = None if top_logprobs is None else []
        return TextIterator(
            self._pieces_of(self.encode(prompt), params, reuse_prefix, top_logprobs, logprobs), logprobs
        )

    def _complete(
        self, prompt: Prompt, params: SamplingParams, reuse_prefix: bool, top_logprobs: int | None
    ) -> Completion:
        pieces = self._begin(prompt, params, reuse_prefix, top_logprobs)
        for _ in pieces:
            pass
        return pieces.completion

    def _pieces_of(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        reuse_prefix: bool,
        top_logprobs: int | None,
        logprobs: list[TokenLogprob] | None,
    ) -> Iterator[str | Completion]:
        """Yields pieces, then the ``Completion``. Appends to ``logprobs`` token by token."""
        generator = self._open_generator()
        with self._turn:
            text = TextStream(self.tokenizer, prompt_ids, params.stop)
            pieces: list[str] = []
            token_ids: list[int] = []
            reason = "length"
            began = first = last = time.perf_counter()
            num_reused = 0
            tokens = generator.stream(prompt_ids, params, reuse_prefix=reuse_prefix, top_logprobs=top_logprobs)
            try:
                for token in tokens:
                    last = time.perf_counter()
                    num_reused = token.num_reused
                    first = first if token_ids else last
                    if token.finish_reason == "stop":
                        reason = "stop"
                        break
                    token_ids.append(token.token_id)
                    if logprobs is not None:
                        logprobs.append(TokenLogprob.of(token.ranked, self.tokenizer))
                    piece = text.push(token.token_id)
                    if piece:
                        pieces.append(piece)
                        yield piece
                    if text.stopped is not None:
                        reason = "stop"
                        break
            finally:
                tokens.close()
            piece = text.finish()
            if piece:
                pieces.append(piece)
                yield piece
        yield Completion(
            text="".join(pieces),
            token_ids=tuple(token_ids),
            finish_reason=reason,
            num_prompt_tokens=len(prompt_ids),
            num_reused_tokens=num_reused,
            seed=params.seed,
            prompt_seconds=first - began,
            decode_seconds=last - first,
            logprobs=None if logprobs is None else tuple(logprobs),
        )


@explain_foreign_keywords
def load(
    model: str | Path | None = None,
    device: str = "auto",
    *,
    vram: int | str | Sequence[int | str] | None = None,
    ram: int | str | None = None,
    context: int | str | None = None,
    kv_cache: str = "f16",
    max_sequences: int = 1,
    prefill_chunk: int = 512,
    prefill_window: int = 4096,
    resident_layers: int | None = None,
    head: str | int = "file",
    packed_folder: str | Path | None = None,
    threads: int | None = None,
    revision: str | None = None,
    token: Token = None,
    progress: bool | Progress | None = None,
) -> LLM:
    """Loads a model: a local folder, a Hugging Face repository id, or None for the one that ships with exl.

    ``device``: "auto" is a GPU if there is one that exl can use, else the CPU; or "cuda", "cpu". ``vram``: how much of
    the GPU's memory exl may use, as "6GB", "6GiB" or bytes; by default all that is free. ``ram``: how much exl may use
    beyond the interpreter with torch imported. Layers that do not fit in VRAM are streamed from pinned RAM; those that
    do not fit in RAM, from a packed copy on disk (in ``packed_folder``). ``context``: the maximum number of tokens of
    prompt and answer together; the cache for them is allocated on loading. "auto" is as many as fit; the default is
    the model's own maximum, but at most 8192. ``kv_cache``: "f32" (CPU), "f16", "q8", "k8v4" or "q4".
    ``max_sequences``: the number of contexts that the cache has room for. ``prefill_chunk``: rows computed at once.
    ``prefill_window``: rows that go through one layer before the next layer starts. ``resident_layers``: keep at most
    this many layers in memory. ``head``: 8 or 4 rounds a dense head to this many bits. More on all of these:
    ``docs/memory.md``. ``threads``: at most so many of the CPU's threads compute, by default all that the process may
    use; fewer do while other processes use the processors, which changes no result (``docs/cpu.md``).

    ``revision`` and ``token`` are for repositories: a branch, tag or commit; and the access token that a private or
    gated repository needs, by default the one that ``hf auth login`` has saved. ``progress``: True shows a bar, False
    shows none; by default there is one in notebooks and terminals, if loading takes more than half a second. A function
    is called as ``progress(done, total)``, in bytes.

    Raises ``ExlError``: ``CheckpointError`` for damaged files, ``ConfigError`` for invalid options,
    ``MemoryBudgetError`` if the model does not fit, ``UnsupportedModelError`` for models that exl does not have.
    """
    options = EngineOptions.from_arguments(locals())
    folder = find_model(model, revision=revision, token=token, quiet=progress is False)
    with shown_progress(progress, "loading") as tell:
        engine = load_engine(folder, options, tell)
    folder = folder if folder.is_dir() else folder.parent
    defaults = GenerationDefaults.from_folder(folder)
    bos_id = engine.config.bos_id if defaults.bos_id is None else defaults.bos_id
    tokenizer = Tokenizer.from_folder(folder, bos_id=bos_id, eos_ids=tuple(engine.generator.eos_ids))
    return LLM(folder, engine, tokenizer, defaults)
