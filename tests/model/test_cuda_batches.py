"""Many sequences on the host shim as a GPU: whatever else is in a batch, a window or a bucket, a row has the bits that
it has alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from exl.batch import ForwardBatch, is_step
from exl.layout.attention import num_items
from exl.ops.base import ALL_ROWS
from exl.ops.cuda_batch import BatchShape
from tests.host.backends import make_backend
from tests.host.recording import RecordingBackend
from tests.model.batches import batch_of, run, run_window
from tests.model.cuda_engines import load, some_ids

CONTEXT, PAGES = 128, 2  # of a sequence
MANY = {"max_sequences": 16, "cache_tokens": 16 * CONTEXT, "context": CONTEXT}


@dataclass(frozen=True)
class Text:
    """A sequence of known tokens, on pages of its own; ``num_cached`` of them are in the cache."""

    ids: list[int]
    num_cached: int
    pages: list[int]

    def next(self, count: int) -> tuple[list[int], int, list[int]]:
        """The next tokens, for ``batch_of``."""
        return self.ids[self.num_cached : self.num_cached + count], self.num_cached, self.pages


def some_texts(lengths: list[int], more: int = 8) -> list[Text]:
    return [
        Text(some_ids(length + more, seed), length, list(range(PAGES * seed, PAGES * seed + PAGES)))
        for seed, length in enumerate(lengths)
    ]


def cache(runner, texts: list[Text]) -> None:
    for text in texts:
        run(runner, batch_of([(text.ids[: text.num_cached], 0, text.pages)]))


def step_of(parts: list[tuple[list[int], int, list[int]]]) -> ForwardBatch:
    """All rows want their logits."""
    batch = batch_of(parts, decode=True)
    return replace(batch, logit_rows=np.arange(batch.num_rows, dtype=np.int32))


def token_by_token(runner, text: Text, count: int) -> torch.Tensor:
    rows = []
    for i in range(count):
        at = replace(text, num_cached=text.num_cached + i)
        rows.append(run(runner, batch_of([at.next(1)], decode=True)))
    return torch.cat(rows)


def eager(engine):
    """A runner that launches what it is given, without buckets."""
    engine.generator.runner.graphs = None
    return engine.generator.runner


# ---- buckets --------------------------------------------------------------------------------------------------------

LENGTHS = [1, 63, 64, 65, 100, 5, 31, 119, 17, 90, 2, 118, 50, 64, 7, 33]
# New tokens of each sequence: in buckets of 8 and 16 rows, with 2, 4 and 8 new tokens, full and with padding.
RAGGED = [(2,), (8,), (1, 3), (4, 4), (1, 1, 2), (2,) * 8, (8, 8), (5, 1, 1, 2, 1), (1, 8, 1, 1, 1), (3, 3, 3, 3, 3)]


@pytest.fixture(scope="module")
def filled(folder, backend):
    """An engine, sequences that it has cached, and the logits of their next 8 tokens, one by one and alone."""
    engine = load(folder, backend, **MANY)
    runner, texts = eager(engine), some_texts(LENGTHS)
    cache(runner, texts)
    return runner, texts, [token_by_token(runner, text, 8) for text in texts]


@pytest.fixture(scope="module")
def captured(folder, backend, filled):
    """Another engine over the same cache, whose steps are replayed."""
    recorder = RecordingBackend(backend)
    engine = load(folder, recorder, **MANY)
    cache(engine.generator.runner, filled[1])
    return recorder, engine.generator.runner


def test_a_row_has_the_same_bits_in_every_bucket(filled, captured):
    """Of plain steps: 1 to 16 rows in buckets of 1, 2, 4, 8 and 16; each eager, captured and replayed. Sequences come
    from the front and from the back, so that each is at several places."""
    _, texts, alone = filled
    recorder, runner = captured
    before = len(recorder.graphs)
    for count in (1, 2, 3, 4, 5, 8, 9, 16):
        for order in (range(count), range(15, 15 - count, -1), range(count)):
            found = run(runner, step_of([texts[i].next(1) for i in order]))
            assert torch.equal(found, torch.cat([alone[i][:1] for i in order])), count
    assert len(recorder.graphs) - before == 5


def test_drafts_have_the_same_bits_in_every_bucket(filled, captured):
    """Ragged steps: each row is what its token gives when it comes alone, after those before it."""
    _, texts, alone = filled
    recorder, runner = captured
    before = len(recorder.graphs)
    shapes = set()
    for counts in RAGGED:
        assert is_step(step_of([texts[i].next(count) for i, count in enumerate(counts)]))
        for first in (0, 16 - len(counts), 3):
            chosen = [(first + i) % 16 for i in range(len(counts))]
            found = run(runner, step_of([texts[i].next(count) for i, count in zip(chosen, counts, strict=True)]))
            wanted = torch.cat([alone[i][:count] for i, count in zip(chosen, counts, strict=True)])
            assert torch.equal(found, wanted), (counts, first)
        shapes.add((bucket(len(counts)), max(8, bucket(sum(counts))), bucket(max(counts))))
    assert len(recorder.graphs) - before == len(shapes) < len(RAGGED)


def test_64_rows(folder, backend):
    """Of 64 sequences, and of 8 with drafts: rows of some as alone, in buckets that are full and that are not."""
    engine = load(folder, RecordingBackend(backend), context=64, max_sequences=64, cache_tokens=64 * 64)
    runner, graphs = engine.generator.runner, engine.generator.runner.graphs
    texts = [Text(some_ids(9 + i % 15, i), 1 + i % 15, [i]) for i in range(64)]
    for i in range(0, 64, 4):
        run(runner, batch_of([(text.ids[: text.num_cached], 0, text.pages) for text in texts[i : i + 4]]))
    eager(engine)
    alone = {i: run(runner, batch_of([texts[i].next(1)], decode=True))[0] for i in range(0, 64, 9)}
    drafted = {i: token_by_token(runner, texts[i], 8) for i in (0, 3, 7)}
    runner.graphs = graphs
    for used in (64, 57):
        for _ in range(3):
            found = run(runner, step_of([text.next(1) for text in texts[:used]]))
            assert all(torch.equal(found[i], row) for i, row in alone.items() if i < used)
    for counts in ([8] * 8, [8, 1, 7, 8, 2, 8, 8, 5]):
        start = np.cumsum([0, *counts])
        for _ in range(3):
            found = run(runner, step_of([text.next(n) for text, n in zip(texts, counts, strict=False)]))
            assert all(torch.equal(found[start[i] : start[i + 1]], drafted[i][: counts[i]]) for i in drafted)
    assert len(graphs._replays) == 2


def bucket(count: int) -> int:
    return 1 << (count - 1).bit_length()


def test_batches_of_other_kinds_are_not_captured(filled):
    _, texts, _ = filled
    whole = step_of([texts[0].next(3), texts[1].next(1)])
    assert is_step(whole)
    assert not is_step(replace(whole, logit_rows=np.array([2, 3], np.int32)))
    assert not is_step(replace(whole, num_decode_rows=3))
    assert not is_step(step_of([(some_ids(9), 0, [0])]))
    assert not is_step(replace(whole, query_start=np.array([0, 4, 4], np.int32)))  # a sequence without a row


# ---- what a batch's other rows can do -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "q4"])
def test_a_row_of_nan_leaves_all_others_as_they_are(folder, backend, kind):
    """One sequence's pages hold NaN, as after an overflow: decode rows, drafts and chunks of the others, which stand
    before and behind it, have the bits that they have without it. Its first page is the one that fills page tables up
    behind the others' own pages."""
    engine = load(folder, backend, kv_cache=kind, **MANY)
    runner, texts, broken = eager(engine), some_texts([70, 20, 90, 63, 3]), 2
    texts = [replace(text, pages=[2 * i + 2, 2 * i + 3][: text.num_cached // 64 + 1]) for i, text in enumerate(texts)]
    texts[broken] = replace(texts[broken], pages=[0, 1])
    cache(runner, texts)
    parts = [text.next(count) for text, count in zip(texts, (1, 4, 2, 1, 8), strict=True)]
    rest = [part for i, part in enumerate(parts) if i != broken]
    start = np.cumsum([0, *(len(part[0]) for part in parts)])
    others = [row for row in range(start[-1]) if not start[broken] <= row < start[broken + 1]]
    steps, chunks = run(runner, step_of(rest)), run(runner, replace(step_of(rest), num_decode_rows=0))
    for layer_idx in range(runner.decoder.config.num_layers):
        runner.kv.layer(layer_idx)[texts[broken].pages] = 0xFF  # NaN as f16, codes and scales alike
    for wanted, decode_rows in ((steps, start[-1]), (chunks, 0)):
        found = run(runner, replace(step_of(parts), num_decode_rows=int(decode_rows)))
        assert found[start[broken] : start[broken + 1]].isnan().all()
        assert wanted.isfinite().all()
        assert torch.equal(found[others], wanted)


def test_sequences_that_share_pages_are_attended_in_several_launches(folder):
    """A prompt's pages are held by many sequences, whose items together are more than the cache could hold apart."""
    recorder = RecordingBackend(make_backend("plain", 90))
    options = {"max_sequences": 12, "context": 1024}
    ids, count = some_ids(640 + 12), 12
    found = {}
    for cache_tokens in (1024, 12 * 1024):
        runner = eager(load(folder, recorder, cache_tokens=cache_tokens, **options))
        pages = list(range(10))
        for start in range(0, 640, 128):
            run(runner, batch_of([(ids[start : start + 128], start, pages)]))
        # Each writes its new token to the page behind the prompt's, which they share: one after another, alone.
        parts = [([ids[640 + i]], 639, pages) for i in range(count)]
        shape = BatchShape.of(step_of(parts), runner.limits, runner.decoder.ops._staging.most_items)
        recorder.launches.clear()
        found[cache_tokens] = run(runner, replace(step_of(parts), slots=np.full(count, -1, np.int32)))
        launches = [launch for launch in recorder.launches if launch.entry == "attention_decode"]
        assert len(launches) == runner.decoder.config.num_layers * -(-count // shape.per_launch)
        assert shape.per_launch == (count if cache_tokens > 1024 else 3)
        assert shape.per_launch * num_items(640) <= runner.decoder.ops._staging.most_items
    few, many = found.values()
    assert torch.equal(few, many)
    assert len({row.numpy().tobytes() for row in many}) == count


# ---- prompts --------------------------------------------------------------------------------------------------------


def chunks_of(text: Text, borders: list[int]) -> list[ForwardBatch]:
    return [
        batch_of([(text.ids[start:stop], start, text.pages)])
        for start, stop in zip(borders, [*borders[1:], text.num_cached], strict=True)
    ]


@pytest.mark.parametrize(("kind", "arch", "most"), [("f16", 86, 100), ("q4", 86, 100), ("f16", 61, 31)])
def test_below_the_crossover_a_prompts_bits_do_not_depend_on_its_chunks(folder, kind, arch, most):
    """Nor on the other prompts of a chunk: logits after the prompt, and all bytes of its pages. Chunks have up to
    ``most`` rows: without tensor cores products of 32 rows are cuBLAS's."""
    engine = load(folder, make_backend("plain", arch), kv_cache=kind, **MANY)
    runner, (text, other) = engine.generator.runner, some_texts([100, 40])
    assert runner.decoder.ops.invariant_rows == (ALL_ROWS if arch == 86 else 32)
    found = []
    for borders in (range(0, 100, most), [0, 1, 32, 63, 94], range(0, 100, 9)):
        for chunk in chunks_of(text, list(borders)):
            assert chunk.num_rows <= most
            logits = run(runner, chunk)
        found.append((logits, pages_of(runner, text)))
    both = batch_of([(other.ids[:15], 0, other.pages), (text.ids[90:100], 90, text.pages)])
    found.append((run(runner, both)[1:], pages_of(runner, text)))
    for logits, pages in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert torch.equal(pages, found[0][1])


def pages_of(runner, text: Text) -> torch.Tensor:
    layers = range(runner.decoder.config.num_layers)
    return torch.stack([runner.kv.layer(i)[text.pages].to("cpu", copy=True) for i in layers])


# ---- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"resident_layers": 0}, {"embed": "disk"}], ids=str)
def test_a_window_of_steps_and_chunks_gives_what_each_gives_alone(four_bit, backend, tmp_path, options):
    """Decode rows, drafts among them, then chunks: of one prompt after another, of one prompt in two chunks, of two in
    one. Layer by layer, also with layers that are streamed and rows of the embedding from the disk."""
    engine = load(
        four_bit, backend, packed_folder=tmp_path, prefill_chunk=64, prefill_window=CONTEXT, **MANY, **options
    )
    try:
        runner, texts = eager(engine), some_texts([30, 64, 9])
        cache(runner, texts)
        new = some_texts([0] * 3 + [100, 20, 11], more=100)[3:]
        batches = [
            step_of([texts[0].next(1), texts[1].next(3), texts[2].next(1)]),
            *chunks_of(new[0], [0, 64]),
            batch_of([(text.ids[: text.num_cached], 0, text.pages) for text in new[1:]]),
        ]
        alone = [run(runner, batch) for batch in batches]
        for text in new:
            for layer_idx in range(runner.decoder.config.num_layers):
                runner.kv.layer(layer_idx)[text.pages] = 0
        together = run_window(runner, batches)
        assert [len(logits) for logits in together] == [5, 1, 1, 2]
        for found, wanted in zip(together, alone, strict=True):
            assert torch.equal(found, wanted)
    finally:
        engine.close()


@pytest.mark.parametrize("offset", [1, 3, 7])
def test_logits_are_written_where_they_are_wanted(folder, backend, offset):
    """Behind those of a step, so that one draw serves both: the same rows, and no other row is touched."""
    engine = load(folder, backend, **MANY)
    runner = engine.generator.runner
    (text,) = some_texts([20])
    wanted = run(runner, batch_of([(text.ids[:20], 0, text.pages)]))
    ops, decoder, h = runner.decoder.ops, runner.decoder, runner._residual[:20]
    for _ in range(2):  # recorded, then started again
        ops.stage([batch_of([(text.ids[:20], 0, text.pages)])])
        decoder.embed(runner._embed, h)
        runner._through_layers([h])
        runner._logits.fill_(7)
        found = decoder.head(runner._final_norm, runner._head, h, runner._logits[offset:])
        assert torch.equal(found.cpu(), wanted)
        assert torch.equal(runner._logits[offset : offset + 1].cpu(), wanted)
        assert (runner._logits[:offset] == 7).all()
        assert (runner._logits[offset + 1 :] == 7).all()
        ops.stage(())
