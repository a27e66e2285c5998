"""exl as a model of EleutherAI's lm-evaluation-harness (``pip install lm_eval``), which runs its tasks with it:

    python -m exl.lm_eval --model exl --model_args pretrained=FOLDER,kv_cache=q8 --tasks arc_easy

The command is the harness's own, with the model "exl" registered. From Python: importing this module registers it, and
``lm_eval.simple_evaluate(model="exl", model_args={"pretrained": FOLDER}, tasks=[...])`` finds it.

What the harness's own model for transformers (``HFLM``) does with a request is done here too: the same tokens, the same
cuts where a text is longer than the context, so that figures compare. What differs: requests run in one batch of exl's,
as many at once as ``max_sequences``, ordered by their tokens, so that a context or a beginning that many share is
computed once; and an answer ends at each of the model's end tokens, whatever file names them.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from exl.engine.handle import Handle
from exl.errors import ConfigError
from exl.llm import LLM
from exl.load_model import load
from exl.request_options import RequestOptions
from exl.sampling_params import SamplingParams

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256  # as in the harness's other models
_log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Job:
    """A request for an answer."""

    text: str
    gen_kwargs: dict[str, Any]
    ids: list[int]
    seed: int


@register_model("exl")
class ExlLM(TemplateLM):
    """A model of exl's behind the harness's requests."""

    def __init__(
        self,
        pretrained: str | LLM | None = None,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        think_end_token: str | None = None,
        seed: int = 1234,
        **load_options: Any,
    ) -> None:
        """``pretrained``: what ``exl.load`` takes, or a model that is loaded. ``load_options``: its keywords.

        ``batch_size`` and ``max_batch_size`` above 1: so many sequences run at once; 1, which the harness gives if its
        user gave none, and "auto" mean exl's own ``max_sequences``. ``device``: as in ``exl.load``; "cuda:0", which the
        harness gives if its user gave none, means "auto". ``max_length``: the context, by default that of
        ``exl.load``. ``add_bos_token``: whether texts get a BOS, by default as the tokenizer's files say.
        ``prefix_token_id``: what stands before a text that has no context, by default BOS, else EOS.
        ``enable_thinking`` and ``chat_template_args``: variables of the chat template. ``think_end_token``: what an
        answer has up to this text, its reasoning, is left out. ``seed``: of draws, where a task samples; the repeats
        of a request get draws of their own.

        Raises ``ConfigError`` for options that contradict each other; else as ``exl.load``.
        """
        super().__init__()
        named = {
            "max_sequences": _sequences(batch_size, max_batch_size),
            "context": max_length,
            "device": None if device == "cuda:0" else device,
        }
        options = _joined(load_options, {name: value for name, value in named.items() if value is not None})
        if isinstance(pretrained, LLM):
            for name in options:
                raise ConfigError(f"{name}: found it with a model that is loaded already")
            self.llm = pretrained
        else:
            self.llm = load(pretrained, **options)
        tokenizer = self.llm.tokenizer
        if add_bos_token and tokenizer.bos_id is None:
            raise ConfigError("add_bos_token: found True, but the model has no BOS token")
        self._add_bos_token = add_bos_token
        self._bos_text = None if tokenizer.bos_id is None else tokenizer.id_to_token(tokenizer.bos_id)
        self._prefix_token_id = prefix_token_id
        self.max_gen_toks = max_gen_toks
        self._variables = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._variables["enable_thinking"] = enable_thinking
        self._think_end_token = think_end_token
        self._seed = seed

    def close(self) -> None:
        self.llm.close()

    # ---- the harness's questions about the model

    @property
    def max_length(self) -> int:
        return self.llm.context

    @property
    def eot_token_id(self) -> int:
        tokenizer = self.llm.tokenizer
        named = tokenizer.token_to_id(tokenizer.names.get("eos_token", ""))
        if named is None and not tokenizer.eos_ids:
            raise ConfigError("prefix_token_id: the model has neither BOS nor EOS: give the token to put before a text")
        return tokenizer.eos_ids[0] if named is None else named

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return self.eot_token_id if self.llm.tokenizer.bos_id is None else self.llm.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.folder.resolve()).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results: what decides the bits of the predictions."""
        return {"exl_model": self.llm.folder.name, **{f"exl_{name}": v for name, v in self.llm.identity().items()}}

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text; ``chat_template``: True, or the name of one of several."""
        if chat_template is False or chat_template is None:
            return None
        template = self._template()
        return template.text(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt's text. Without ``add_generation_prompt`` it ends with the last message's text, for the model to
        go on with. A template that takes no system message gets the others alone, with a warning."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except ConfigError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if not others or len(others) == len(chat_history):
                raise
            _log.warning("chat template: %s: rendered without the system message", error)
            return self._render(others, add_generation_prompt)

    def _template(self) -> Any:
        if self.llm.tokenizer.chat_template is None:
            raise ConfigError(f"apply_chat_template: {self.llm.folder.name} has no chat template")
        return self.llm.tokenizer.chat_template

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text = self._template().render(messages, add_generation_prompt=add_generation_prompt, variables=self._variables)
        if add_generation_prompt:
            return text
        begun = messages[-1]["content"]
        at = text.rfind(begun if begun in text else begun.strip())
        if at < 0:
            raise ConfigError("apply_chat_template: the template does not write the last message as it is")
        return text[: at + len(begun if begun in text else begun.strip())]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; control tokens in the text are control tokens, because templates are rendered as text. BOS comes
        in front as the options say, but not before a text that begins with it."""
        if kwargs:
            raise ConfigError(f"tok_encode: found {next(iter(kwargs))}, which exl does not have")
        tokenizer = self.llm.tokenizer
        if add_special_tokens is None:
            begins = self._bos_text is not None and string.startswith(self._bos_text)
            add_special_tokens = not begins and self._add_bos_token is not False
        ids = tokenizer.encode(string, bos=add_special_tokens, special=True)
        if add_special_tokens and self._add_bos_token and ids[:1] != [tokenizer.bos_id]:
            return [tokenizer.bos_id, *ids]
        return ids

    # ---- requests

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each ``(cache key, context ids, continuation ids)``. Of more tokens than the context holds, the last one
        not counted, those at the left are left out."""
        if kwargs:
            raise ConfigError(f"loglikelihood: found {next(iter(kwargs))}, which exl does not have")

        def begin(request: tuple[Any, list[int], list[int]]) -> Handle[Any]:
            context, continuation = self._fitting(request[1], request[2])
            return self.llm.submit_score(context, continuation)

        def told(request: tuple[Any, list[int], list[int]], score: Any) -> tuple[float, bool]:
            found = (score.total, score.is_greedy)
            if request[0] is not None:  # a window of a rolling request has no key
                self.cache_hook.add_partial("loglikelihood", request[0], found)
            return found

        def order(request: tuple[Any, list[int], list[int]]) -> list[int]:
            return [*request[1], *request[2]]

        return self._run(requests, order, begin, told, "loglikelihood", disable_tqdm)

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"loglikelihood: found a continuation of {len(continuation)} tokens, the context holds "
                f"{self.max_length}: load the model with a larger max_length"
            )
        surplus = len(context) + len(continuation) - (self.max_length + 1)
        if surplus > 0:
            _log.warning("loglikelihood: the first %d tokens of a context do not fit and are left out", surplus)
        return context[max(0, surplus) :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text. Longer ones are cut into windows of the context, as the harness cuts
        them: every token is predicted once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            some = [(None, *make_disjoint_window(pair)) for pair in cut]
            windows += some
            counts.append(len(some))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        found = []
        for request, count in zip(requests, counts, strict=True):
            found.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its ``until``, an end token or ``max_gen_toks``. A context
        that leaves no room for these loses its beginning."""
        times: Counter[str] = Counter()  # that a text was asked so far: a task's ``repeats`` are requests of their own
        jobs = []
        for text, gen_kwargs in (request.args for request in requests):
            jobs.append(_Job(text, gen_kwargs, self.tok_encode(text), _seed(self._seed, text, times[text])))
            times[text] += 1

        def begin(job: _Job) -> Handle[Any]:
            ids, params, options = self._asked(job)
            return self.llm.submit(ids, params, **options)

        def told(job: _Job, done: Any) -> str:
            # Decoded on their own, as the harness does: some tokenizers then leave out a space at the start.
            text = self.llm.tokenizer.decode(list(done.token_ids))
            text = postprocess_generated_text(text, _until(job.gen_kwargs), self._think_end_token)
            self.cache_hook.add_partial("generate_until", (job.text, job.gen_kwargs), text)
            return text

        return self._run(jobs, lambda job: job.ids, begin, told, "generate_until", disable_tqdm)

    def _asked(self, job: _Job) -> tuple[list[int], SamplingParams, RequestOptions]:
        """The prompt that fits, and the harness's keywords as exl's. Those that exl does not have are errors."""
        ids = job.ids
        asked = dict(normalize_gen_kwargs(job.gen_kwargs, self.max_gen_toks))
        most, samples = int(asked.pop("max_gen_toks")), asked.pop("do_sample", False)
        asked.pop("until", None)
        if not 0 < most < self.max_length:
            raise ConfigError(f"max_gen_toks: found {most}, expected 1 to {self.max_length - 1}, less than the context")
        if not samples:
            asked["temperature"] = 0.0
        room = self.max_length - most
        if len(ids) > room:
            _log.warning("generate_until: the first %d tokens of a context do not fit", len(ids) - room)
        # Reasoning may hold what ends an answer: then the text is cut when it is whole.
        stop = None if self._think_end_token else _until(job.gen_kwargs) or None
        options: Any = {"seed": job.seed, "stop": stop, **asked}
        return ids[-room:], SamplingParams(max_tokens=most), options

    def _run(
        self,
        items: Sequence[Item],
        order: Callable[[Item], list[int]],
        begin: Callable[[Item], Handle[Any]],
        told: Callable[[Item, Any], Result],
        what: str,
        disable_tqdm: bool,
    ) -> list[Result]:
        """The result of each item, in the items' order. Some more requests than run at once are under way, beginning
        with those whose tokens come first in order, so that those with one beginning are near each other."""
        places = sorted(range(len(items)), key=lambda i: order(items[i]))
        found: list[Any] = [None] * len(items)
        with tqdm(total=len(items), disable=disable_tqdm, desc=f"exl: {what}") as bar:
            for i, done in _in_order(places, lambda i: begin(items[i]), 4 * self.llm.max_sequences):
                found[i] = told(items[i], done)
                bar.update()
        return found


def _in_order(places: Iterable[int], begin: Callable[[int], Handle[Any]], most: int) -> Iterator[tuple[int, Any]]:
    """Each place with its result; at most ``most`` are under way. If one fails, the others are cancelled."""
    under_way: deque[tuple[int, Handle[Any]]] = deque()
    try:
        for i in places:
            under_way.append((i, begin(i)))
            if len(under_way) >= most:
                first, handle = under_way.popleft()
                yield first, handle.result()
        while under_way:
            first, handle = under_way.popleft()
            yield first, handle.result()
    finally:
        for _, handle in under_way:
            handle.cancel()


def _seed(seed: int, text: str, times: int) -> int:
    """Of a request's draws. Another for each text and for each time that it is asked, so that repeats differ; the same
    whatever else is asked, so that a task gives the same answers alone and among others."""
    digest = hashlib.sha256(f"{seed} {times} {text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "little")


def _until(gen_kwargs: Mapping[str, Any]) -> list[str]:
    """The texts that end an answer; an empty one ends none."""
    found = gen_kwargs.get("until") or []
    return [text for text in ([found] if isinstance(found, str) else found) if text]


def _sequences(batch_size: int | str | None, max_batch_size: int | None) -> int | None:
    """How many sequences the user wants at once; None: has not said."""
    if isinstance(batch_size, str) and batch_size.startswith("auto"):
        batch_size = None
    try:
        count = 1 if batch_size is None else int(batch_size)
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"batch_size: found {batch_size!r}, expected 'auto' or an integer above 0")
    return count if count > 1 else max_batch_size


def _joined(options: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Keywords of ``exl.load``. Raises ``ConfigError`` for one that is said twice."""
    other = {"context": "max_length", "max_sequences": "batch_size"}
    for name in named:
        if name in options:
            raise ConfigError(
                f"{name}: found {options[name]!r} with {other[name]}={named[name]!r}, expected one of them"
            )
    return {**options, **named}


def main() -> None:
    """The harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
