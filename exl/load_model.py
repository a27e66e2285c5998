"""``exl.load``: a model's folder or name -> an ``LLM``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exl.adapters.choice import Adapters, find_adapters
from exl.checkpoint.generation_config import GenerationDefaults
from exl.checkpoint.hub import find_model
from exl.checkpoint.hub_errors import Token
from exl.engine.build import load_engine
from exl.keywords import explain_foreign_keywords
from exl.llm import LLM
from exl.planning.options import EngineOptions
from exl.progress import Progress, shown_progress
from exl.text.tokenizer import Tokenizer
from exl.text.vocabulary import check_same_vocabulary


@explain_foreign_keywords
def load(
    model: str | Path | None = None,
    device: str = "auto",
    *,
    vram: int | str | Sequence[int | str] | None = None,
    ram: int | str | None = None,
    context: int | str | None = None,
    kv_cache: str = "f16",
    max_sequences: int = 16,
    max_queue: int | None = None,
    cache_tokens: int | str | None = None,
    window_cache: bool = True,
    kv_ram: int | str | None = None,
    prefill_chunk: int = 512,
    prefill_window: int = 4096,
    resident_layers: int | None = None,
    head: str | int = "file",
    dense: str | int = "file",
    embed: str = "auto",
    packed_folder: str | Path | None = None,
    threads: int | None = None,
    arithmetic: str | None = None,
    draft: str | Path | None = None,
    rope: Mapping[str, Any] | None = None,
    lora: Adapters | None = None,
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
    ``max_sequences``: how many run at once; others wait, but no more than ``max_queue`` (by default any number): beyond
    that a request is refused with ``QueueFullError``. ``cache_tokens``: of all of them in the cache, by default one
    context (less where all layers have a sliding window); "auto" is what the budgets leave. ``window_cache``: where
    some layers have a sliding window, these keep only what it reaches. ``kv_ram``: with a GPU, how
    much pinned RAM keeps what leaves the cache. ``prefill_chunk``: rows computed at once.
    ``prefill_window``: rows that go through one layer before the next layer starts. ``resident_layers``: keep at most
    this many layers in memory. ``head``: 8 or 4 rounds a dense head to this many bits, ``dense`` what else
    a file has dense in its layers: attention, in many published files. ``embed``: with a GPU, "auto"
    leaves the embedding in pinned RAM if it is not also the head; "device" puts it into VRAM, "disk" leaves it on the
    disk. More on all of these: ``docs/memory.md``. ``threads``: at most so many of the CPU's threads compute, by
    default all that the process may use. ``arithmetic``: on a CPU, how quantized layers multiply: "int16", with 16-bit
    activations, the default; "int8", faster in prompts and less exact; "f32". More on both: ``docs/cpu.md``.
    ``draft``: a smaller model with the same vocabulary, whose guesses this one checks, several tokens a step, where
    that is faster; the text is the same with and without. ``rope``: another RoPE than ``config.json`` says, as the dict
    that such files hold: ``{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}``, or
    ``{"rope_theta": 1e6}``; with a factor, the model's own context is so many times as long.

    ``lora``: LoRA adapters as peft saves them, which stay beside the weights (``docs/adapters.md``). One folder or
    repository: an adapter for all requests. A list of these, or a mapping of names: requests choose by ``lora="name"``,
    and others get the model itself.

    ``revision`` and ``token`` are for repositories: a branch, tag or commit; and the access token that a private or
    gated repository needs, by default the one that ``hf auth login`` has saved. ``progress``: True shows a bar, False
    shows none; by default there is one in notebooks and terminals, if loading takes more than half a second. A function
    is called as ``progress(done, total)``, in bytes.

    Raises ``ExlError``: ``CheckpointError`` for damaged files, ``ConfigError`` for invalid options,
    ``MemoryBudgetError`` if the model does not fit, ``UnsupportedModelError`` for models that exl does not have.
    """
    if draft is not None:
        draft = find_model(draft, token=token, quiet=progress is False)
    adapters = find_adapters(lora, token=token, quiet=progress is False)
    options = EngineOptions.from_arguments({**locals(), "lora": adapters.folders})
    folder = find_model(model, revision=revision, token=token, quiet=progress is False)
    with shown_progress(progress, "loading") as tell:
        engine = load_engine(folder, options, tell)
    folder = folder if folder.is_dir() else folder.parent
    try:
        defaults = GenerationDefaults.from_folder(folder)
        bos_id = engine.config.bos_id if defaults.bos_id is None else defaults.bos_id
        tokenizer = Tokenizer.from_folder(folder, bos_id=bos_id, eos_ids=tuple(engine.generator.eos_ids))
        if draft is not None:
            check_same_vocabulary(tokenizer, Tokenizer.from_folder(draft if draft.is_dir() else draft.parent))
        llm = LLM._of(folder, engine, tokenizer, defaults)
        llm.default_adapter = adapters.default
        return llm
    except BaseException:
        engine.close()
        raise
