"""Batches of several sequences through the runner, as a scheduler sends them, against transformers one by one; through
exl's own kernels and through torch's."""

from __future__ import annotations

import pytest
import torch

from exl.engine.build import load_engine
from exl.layout.cpu_pages import page_arrays
from exl.layout.kv import KVLayout
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from tests.draws import draws_of
from tests.model.batches import batch_of, run
from tests.model.cpu_targets import with_both
from tests.model.hf_models import CASES, build, decode_logits, prefill_logits, save

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A window of 16, so that sequences of different lengths see different ranges of keys."""
    model = build(next(case for case in CASES if case.name == "mistral"))
    return model, save(model, tmp_path_factory.mktemp("mistral"))


def _runner(folder, cpu):
    return load_engine(folder, EngineOptions(kv_cache="f32", context=256), cpu=cpu).generator.runner


def _tokens(runner, layer_idx: int) -> list[torch.Tensor]:
    """K and V f32 [page, token, kv_head, D] of a layer's cache."""
    pages, layout = runner.kv.layer(layer_idx), runner.kv.layout
    if isinstance(layout, KVLayout):
        return pages.arrays()
    arrays = page_arrays(pages.numpy(), layout.kind, layout.head_dim)
    k, v = torch.from_numpy(arrays.k), torch.from_numpy(arrays.v)  # [page, kv_head, D, token], [.., token, D]
    return [k.permute(0, 3, 1, 2), v.permute(0, 2, 1, 3)]


def _ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@with_both
def test_unequal_sequences_prefill_and_decode_together(mistral, cpu):
    model, folder = mistral
    first, second = _ids(30, 1), _ids(71, 2)
    runner = _runner(folder, cpu)
    pages = [2], [3, 0]
    logits = run(runner, batch_of([(first[:-1], 0, pages[0]), (second[:-1], 0, pages[1])]))
    for row, ids in zip(logits, (first, second), strict=True):
        assert (row - prefill_logits(model, ids[:-1])[-1]).abs().max() <= TOLERANCE
    steps = run(runner, batch_of([(first[-1:], 29, pages[0]), (second[-1:], 70, pages[1])], decode=True))
    for row, ids in zip(steps, (first, second), strict=True):
        assert (row - decode_logits(model, ids, len(ids) - 1)[-1]).abs().max() <= TOLERANCE


@with_both
def test_a_decode_row_has_the_same_bits_alone_and_in_any_batch(mistral, cpu):
    _, folder = mistral
    sequences = [(_ids(n, n), [i]) for i, n in enumerate((5, 40, 64))]

    def decode(chosen) -> torch.Tensor:
        runner = _runner(folder, cpu)
        for ids, pages in sequences:
            run(runner, batch_of([(ids[:-2], 0, pages)]))
        return run(
            runner, batch_of([(sequences[i][0][-2:], len(sequences[i][0]) - 2, [i]) for i in chosen], decode=True)
        )

    together = decode([0, 1, 2])
    assert torch.equal(decode([2, 0]), together[[2, 0]])
    for i in range(3):
        assert torch.equal(decode([i]), together[i : i + 1])


@with_both
def test_several_new_tokens_have_the_bits_of_one_by_one(mistral, cpu):
    """As for verifying a draft: 1 to 8 new tokens of a sequence in one batch of decode rows."""
    _, folder = mistral
    ids = _ids(24, 3)
    runner = _runner(folder, cpu)
    run(runner, batch_of([(ids[:16], 0, [1])]))
    alone = torch.cat([run(runner, batch_of([([ids[i]], i, [1])], decode=True)) for i in range(16, 24)])
    for count in range(1, 9):
        runner = _runner(folder, cpu)
        run(runner, batch_of([(ids[:16], 0, [1])]))
        assert torch.equal(run(runner, batch_of([(ids[16 : 16 + count], 16, [1])], decode=True))[0], alone[count - 1])


@with_both
def test_padding_rows_change_nothing_and_are_not_cached(mistral, cpu):
    _, folder = mistral
    ids = _ids(20, 4)
    padded = _runner(folder, cpu)
    expected = run(_runner(folder, cpu), batch_of([(ids, 0, [0])]))
    assert torch.allclose(run(padded, batch_of([(ids, 0, [0])], padding=5)), expected, rtol=0, atol=1e-5)
    for layer_idx in range(3):
        for array in _tokens(padded, layer_idx):
            assert (array[0, :20] != 0).any()
            assert (array[0, 20:] == 0).all()
            assert (array[1:] == 0).all()


@with_both
def test_a_token_can_be_the_sample_that_never_left_the_device(mistral, cpu):
    """Token id -1 - i means sample i of the previous step."""
    _, folder = mistral
    ids = _ids(10, 5), _ids(12, 6)
    greedy = SamplingParams(temperature=0.0, seed=0)

    def two_steps(by_reference: bool) -> torch.Tensor:
        runner = _runner(folder, cpu)
        logits = run(runner, batch_of([(ids[0], 0, [0]), (ids[1], 0, [1])]))
        samples = runner.decoder.ops.sample(logits, draws_of([(greedy, 0, ()), (greedy, 0, ())])).read().ids
        assert samples == logits.argmax(-1).tolist()
        new = [[-1], [-2]] if by_reference else [[i] for i in samples]
        return run(runner, batch_of([(new[0], 10, [0]), (new[1], 12, [1])], decode=True))

    assert torch.equal(two_steps(True), two_steps(False))


@with_both
def test_copied_pages_are_the_pages(mistral, cpu):
    """Copy-on-write: a sequence continues from a copy of another sequence's page."""
    _, folder = mistral
    ids = _ids(30, 7)
    runner = _runner(folder, cpu)
    run(runner, batch_of([(ids[:29], 0, [0])]))
    expected = run(runner, batch_of([(ids[29:], 29, [0])], decode=True))
    runner.kv.copy_pages([0], [3])
    assert torch.equal(run(runner, batch_of([(ids[29:], 29, [3])], decode=True)), expected)
