"""Forks of processes that use exl, each a scenario of its own: ``python -m tests.model.fork_child SCENARIO [torch]``.

Prints one JSON object, which ``test_forks.py`` reads. Two threads compute, whatever the machine has: with one, OpenMP
has no threads that a fork could lose. A child that hangs is killed by its alarm.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import exl
from exl.engine import build
from exl.ops.cpu_target import torch_target

torch.set_num_threads(2)

ROOT = Path(__file__).parents[2]
DENSE = ROOT / "tests" / "data" / "stories260K"
PROMPT = "Once upon a time, there was a little girl who had a red ball and a dog that liked to run"
CHILD_SECONDS = 60


def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a forked child, or the text of its error; "killed by signal n" if it hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(CHILD_SECONDS)
        os.write(writer, json.dumps(outcome(work)).encode())
        os.close(writer)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return f"killed by signal {status}" if os.WIFSIGNALED(status) else json.loads(text)


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except exl.ExlError as error:
        return f"ExlError: {error}"
    except Exception as error:
        return f"unexpected {error!r}"


@contextlib.contextmanager
def a_folder() -> Iterator[str]:
    """A temporary folder; children that leave the block by an exit do not remove it."""
    owner, folder = os.getpid(), tempfile.mkdtemp()
    try:
        yield folder
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder)


def text(llm: exl.LLM) -> list[int]:
    return list(llm.generate(PROMPT, max_tokens=8, temperature=1.0, seed=3).token_ids)


def worker(llm: exl.LLM, queue: Any) -> None:
    signal.alarm(CHILD_SECONDS)
    queue.put(outcome(lambda: text(llm)))


def busy() -> None:
    """Something parallel by torch itself: OpenMP has threads now."""
    a = torch.ones(512, 512)
    (a @ a).sum()


# --- scenarios ---------------------------------------------------------------------------------------------------


def loaded_in_parent() -> dict:
    llm = exl.load(context=64)
    child = in_child(lambda: text(llm))
    return {"child": child, "parent": text(llm)}


def generated_in_parent() -> dict:
    llm = exl.load(context=64)
    before = text(llm)
    children = [in_child(lambda: text(llm)) for _ in range(2)]
    return {"child": children[0], "second": children[1], "before": before, "parent": text(llm)}


def dense_model() -> dict:
    llm = exl.load(DENSE, context=64)
    before = text(llm)
    return {"child": in_child(lambda: text(llm)), "before": before, "parent": text(llm)}


def multiprocessing_fork() -> dict:
    """As a web server does that loads before it forks: workers and parent generate at the same time."""
    llm = exl.load(context=64)
    before = text(llm)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(llm, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    parent = text(llm)
    children = [queue.get(timeout=CHILD_SECONDS) for _ in processes]
    for process in processes:
        process.join(CHILD_SECONDS)
    return {"child": children[0], "second": children[1], "before": before, "parent": parent}


def child_of_child() -> dict:
    llm = exl.load(context=64)
    before = text(llm)
    both = in_child(lambda: [text(llm), in_child(lambda: text(llm))])
    return {"child": both[0], "second": both[1], "before": before, "parent": text(llm)}


def loaded_in_child() -> dict:
    busy()

    def load() -> list[int]:
        with exl.load(context=64) as llm:
            return text(llm)

    return {"child": in_child(load), "parent": load()}


def threads_in_child() -> dict:
    """A worker's own threads take turns."""
    llm = exl.load(context=64)
    before = text(llm)

    def ask() -> list:
        found: list = []
        threads = [threading.Thread(target=lambda: found.append(text(llm))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    child = in_child(ask)
    return {"child": child[0], "second": child[1], "before": before, "parent": text(llm)}


def unfinished_stream() -> dict:
    """The parent's stream goes on; the child can use neither it nor the model."""
    llm = exl.load(context=64)
    before = llm.generate(PROMPT, max_tokens=12, seed=3).text
    stream = llm.stream(PROMPT, max_tokens=12, seed=3)
    pieces = [next(stream)]

    def use() -> list:
        results = [outcome(lambda: next(stream)), outcome(lambda: text(llm)), outcome(lambda: len(llm.logits([1, 2])))]
        stream.close()
        llm.close()
        return results

    child = in_child(use)
    pieces += list(stream)
    return {"errors": child, "before": before, "parent": "".join(pieces), "again": text(llm) == text(llm)}


def unfinished_logits() -> dict:
    llm = exl.load(context=256, prefill_chunk=16)
    chunks = llm.iter_logits(list(range(3, 103)))
    first = next(chunks).clone()
    child = in_child(lambda: [outcome(lambda: len(next(chunks))), outcome(lambda: text(llm))])
    total = len(first) + sum(map(len, chunks))
    return {"errors": child, "before": 100, "parent": total}


def request_in_thread() -> dict:
    """Forked from another thread than the one that computes."""
    llm = exl.load(context=512)
    expected = llm.generate(PROMPT, max_tokens=200, seed=3).token_ids
    stream = llm.stream(PROMPT, max_tokens=200, seed=3)
    some, forked = threading.Event(), threading.Event()

    def take() -> None:
        for _ in stream:
            some.set()
            forked.wait(0.05)  # so that the stream has not ended before the fork

    thread = threading.Thread(target=take)
    thread.start()
    assert some.wait(CHILD_SECONDS)
    child = in_child(lambda: [outcome(lambda: text(llm))])
    forked.set()
    thread.join(CHILD_SECONDS)
    return {"errors": child, "before": list(expected), "parent": list(stream.completion.token_ids)}


def idle_threads() -> dict:
    """Forked from another thread than the one that has computed; computed in a third."""
    llm = exl.load(context=64)
    before = text(llm)
    found: dict = {}

    def fork() -> None:
        busy()
        found["child"] = in_child(lambda: text(llm))

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    return {"child": found["child"], "before": before, "parent": text(llm)}


def submitted(llm: exl.LLM) -> list[int]:
    handle = llm.submit(PROMPT, max_tokens=8, temperature=1.0, seed=3)
    return list(handle.result(CHILD_SECONDS).token_ids)


def idle_engine_thread() -> dict:
    """Forked again and again just when a request has ended, while the engine's thread is still there; the child's
    engine starts its own. A handle that had ended tells the child what it told its parent."""
    llm = exl.load(context=64)
    before = text(llm)
    handle = llm.submit(PROMPT, max_tokens=8, temperature=1.0, seed=3)
    found = {"before": list(handle.result(CHILD_SECONDS).token_ids)}

    def use() -> list:
        return [text(llm), submitted(llm), text(llm), list(handle.result(0).token_ids)]

    for i in range(8):
        for j, value in enumerate(in_child(use)):
            found[f"child {i} {j}"] = value
        found[f"parent {i}"] = submitted(llm)
    return {"parent": before, **found}


def submitted_request() -> dict:
    """Forked while the engine's thread computes: the child can use nothing, the parent notices nothing."""
    llm = exl.load(context=512)
    options = {"max_tokens": 200, "temperature": 1.0, "seed": 3}
    expected = list(llm.generate(PROMPT, **options).token_ids)
    handle, waiting = llm.submit(PROMPT, **options), llm.submit(PROMPT, **options)
    next(handle)

    def use() -> list:
        asks = [lambda: text(llm), lambda: submitted(llm), lambda: next(handle), lambda: handle.result(1)]
        asks += [lambda: waiting.result(1), lambda: asyncio.run(handle.anext_event()), lambda: next(llm.stream("A", 1))]
        results = [outcome(ask) for ask in asks]
        handle.cancel()  # none of these hangs or raises
        llm.close()
        return results

    errors = in_child(use)
    parent = [list(one.result(CHILD_SECONDS).token_ids) for one in (handle, waiting)]
    return {"errors": errors, "before": [expected, expected], "parent": parent, "again": submitted(llm) == text(llm)}


def streamed() -> dict:
    """Layers from the disk: the thread that reads them does not exist in the child."""
    with a_folder() as folder:
        llm = exl.load(DENSE, context=64, resident_layers=1, packed_folder=folder)
        before = text(llm)

        def use() -> list[int]:
            found = text(llm)
            llm.close()
            return found

        children = [in_child(use) for _ in range(2)]
        result = {"child": children[0], "second": children[1], "before": before, "parent": text(llm)}
        llm.close()
        return result


def streamed_while_reading() -> dict:
    """Forked again and again while the parent's thread reads for a request."""
    with a_folder() as folder:
        llm = exl.load(DENSE, context=64, resident_layers=0, packed_folder=folder)
        before = text(llm)
        found: list = []
        thread = threading.Thread(target=lambda: [found.append(text(llm)) for _ in range(3)])
        thread.start()
        errors = []
        while thread.is_alive():
            errors.append(in_child(lambda: text(llm)))
        thread.join()
        child = in_child(lambda: text(llm))
        odd = [error for error in errors if error != before and "fork" not in error]
        return {
            "child": child,
            "before": before,
            "parent": found[-1],
            "odd": odd,
            "all": all(f == before for f in found),
        }


def closed_in_child() -> dict:
    """``close``, an exit with all its hooks, and a damaged folder of the child's own leave the parent's files alone."""
    with a_folder() as folder:
        llm = exl.load(DENSE, context=64, resident_layers=1, packed_folder=folder)
        before, files = text(llm), sorted(path.name for path in Path(folder).iterdir())
        child = os.fork()
        if child == 0:
            signal.alarm(CHILD_SECONDS)
            with llm:
                text(llm)
            sys.exit(0)  # atexit and finalizers run
        _, status = os.waitpid(child, 0)
        after = sorted(path.name for path in Path(folder).iterdir())
        result = {"child": before if status == 0 and files == after else [status, files, after], "parent": text(llm)}
        llm.close()
        return result | {"before": before}


def exits_without_closing() -> dict:
    """Forked while the parent's reader is reading, if it happens to: the child's exit waits for no lock of it."""
    with a_folder() as folder:
        llm = exl.load(DENSE, context=64, resident_layers=0, packed_folder=folder)
        before = text(llm)
        statuses = []
        stream = llm.stream(PROMPT, max_tokens=12)
        for _ in stream:
            child = os.fork()
            if child == 0:
                signal.alarm(CHILD_SECONDS)
                sys.exit(0)
            statuses.append(os.waitpid(child, 0)[1])
        return {"child": before if not any(statuses) else statuses, "before": before, "parent": text(llm)}


def quantized() -> dict:
    """A quantizer in the child, after one in the parent."""
    from exl.quantize.options import QuantizeOptions
    from exl.quantize.run import quantize

    with a_folder() as folder:
        calibration = Path(folder) / "text.txt"
        calibration.write_text((PROMPT + ".\n") * 8)
        options = QuantizeOptions(bits=4, group_size=32, calibration=calibration, num_samples=4, seq_len=64)

        def run(name: str) -> str:
            out = Path(folder) / name
            quantize(DENSE, out, options)
            return (out / "model.safetensors").read_bytes().hex()[-64:]

        first = run("parent")
        return {"child": in_child(lambda: run("child")), "parent": first}


def evaluated() -> dict:
    from exl.evaluate import evaluate

    llm = exl.load(DENSE, context=128)
    ids = llm.encode(PROMPT)
    before = evaluate(llm, [ids]).loss
    child = in_child(lambda: evaluate(llm, [ids]).loss)
    return {"child": child, "before": before, "parent": evaluate(llm, [ids]).loss}


def on_gpu() -> dict:
    """The tests' device stands for a GPU: a fork has none of it."""
    from exl.checkpoint.generation_config import GenerationDefaults
    from exl.engine.build import load_engine
    from exl.planning.options import EngineOptions
    from exl.text.tokenizer import Tokenizer
    from tests.host.backends import make_backend

    engine = load_engine(DENSE, EngineOptions(context=64, vram="2GB"), backend=make_backend("plain"))
    llm = exl.LLM._of(DENSE, engine, Tokenizer.from_folder(DENSE), GenerationDefaults.from_folder(DENSE))
    before = text(llm)

    def use() -> list:
        results = [outcome(lambda: text(llm)), outcome(lambda: len(llm.logits([1, 2])))]
        with llm:
            pass
        return results

    return {"errors": in_child(use), "before": before, "parent": text(llm)}


def gpu_in_parent() -> dict:
    """The parent has used a GPU by torch, and the child loads a model."""
    torch.cuda.is_initialized = lambda: True
    results = [lambda: exl.load(device="auto", context=64), lambda: exl.load(vram="2GB", context=64)]
    child = in_child(lambda: [outcome(load) for load in results])
    cpu = in_child(lambda: text(exl.load(device="cpu", context=64)))
    torch.cuda.is_initialized = lambda: False
    return {"errors": child, "before": cpu, "parent": text(exl.load(context=64))}


def threads_that_stay() -> dict:
    from exl import forks

    forks._pause = lambda path: False
    llm = exl.load(context=64)
    before = text(llm)
    child, threads = in_child(lambda: [text(llm), torch.get_num_threads()])
    return {
        "child": child,
        "before": before,
        "parent": text(llm),
        "threads": [threads, torch.get_num_threads()],
    }


def main() -> None:
    if sys.argv[2:] == ["torch"]:
        build.cpu_target = torch_target
    print(json.dumps(globals()[sys.argv[1]]()))


if __name__ == "__main__":
    main()
