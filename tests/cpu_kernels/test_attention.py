"""Attention over pages against float64, and that a row's bits depend on nothing but the row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exl.cpu_kernels import attention_items
from exl.cpu_kernels.append_kv import AppendKV
from exl.cpu_kernels.attention import DecodeAttention, PrefillAttention, partial_bytes
from exl.cpu_kernels.attention_items import decode_items, most_splits, prefill_items
from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.merge import MergeAttention
from exl.cpu_kernels.quantize import ActivationForm, QuantizeRows
from exl.layout.kv import KV_BITS
from tests.cpu_kernels.guards import guarded_array
from tests.cpu_kernels.kv_pages import Cache, exact_attention, random_cache

KINDS = tuple(KV_BITS)
NOTHING = np.float32(np.nan)


def starts(rows: list[int]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)


def random_queries(rows: list[int], num_heads: int, head_dim: int, seed: int = 1) -> NDArray[np.float32]:
    shape = (sum(rows), num_heads, head_dim)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(2)


def decode(
    library: Library, cache: Cache, q: NDArray[np.float32], rows: list[int], window: int | None = None,
    softcap: float | None = None, form: ActivationForm | None = None, records: NDArray[np.uint8] | None = None,
    sinks: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """[T, H, D], by ``DecodeAttention`` and ``MergeAttention``."""
    T, H, D = q.shape
    tables = decode_items(starts(rows), cache.context_len, window)
    items, entries, q = guarded_array(tables.items), guarded_array(tables.rows), guarded_array(q)
    pages, table = guarded_array(cache.pages), guarded_array(cache.table)
    partials = guarded_array(np.full(tables.num_partials * H * partial_bytes(D) // 4, NOTHING))
    out = guarded_array(np.full(q.shape, NOTHING))
    args = slots(
        q, pages, table, table.shape[1], items, partials, H, cache.num_kv_heads, D**-0.5, window or 0, softcap or 0.0
    )
    spec = DecodeAttention(cache.kind, D, softcap is not None)
    library.call(spec, args, len(items) * cache.num_kv_heads)
    args = slots(partials, entries, out, H, cache.num_kv_heads, records, T, sinks)
    library.call(MergeAttention(cache.kind, D, form, sinks is not None), args, T * cache.num_kv_heads)
    return out


def prefill(
    library: Library, cache: Cache, q: NDArray[np.float32], rows: list[int], window: int | None = None,
    softcap: float | None = None, sinks: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """[T, H, D], by ``PrefillAttention``."""
    _, H, D = q.shape
    items = guarded_array(prefill_items(starts(rows), cache.context_len, H // cache.num_kv_heads, D))
    q, pages, table = guarded_array(q), guarded_array(cache.pages), guarded_array(cache.table)
    out = guarded_array(np.full(q.shape, NOTHING))
    sizes = table.shape[1], items, out, H, cache.num_kv_heads
    args = slots(q, pages, table, *sizes, D**-0.5, window or 0, softcap or 0.0, sinks)
    spec = PrefillAttention(cache.kind, D, softcap is not None, sinks is not None)
    library.call(spec, args, len(items) * cache.num_kv_heads)
    return out


def same_bits(a: NDArray, b: NDArray) -> bool:
    return a.tobytes() == b.tobytes()


def relative_error(found: NDArray, exact: NDArray) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())


# Head sizes with their query heads and heads of K and V: alone, by fours, fives, more than a block.
SHAPES = [(4, 2, 1), (8, 3, 3), (32, 12, 3), (36, 5, 1), (64, 8, 2), (80, 2, 2), (96, 7, 1), (128, 40, 1), (256, 6, 2)]
CASES = [(kind, *shape) for kind in KINDS for shape in (SHAPES if kind == "q4" else SHAPES[KINDS.index(kind) :: 3])]


@pytest.mark.parametrize(("kind", "head_dim", "num_heads", "num_kv_heads"), CASES)
@pytest.mark.sample(2)
def test_all_head_sizes(library: Library, kind: str, head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    context, rows = [64, 301], [1, 9]
    cache = random_cache(kind, head_dim, num_kv_heads, context)
    q = random_queries(rows, num_heads, head_dim)
    exact = exact_attention(cache, q, starts(rows), head_dim**-0.5)
    found = decode(library, cache, q, rows)
    assert relative_error(found, exact) < 3e-6
    assert same_bits(found, prefill(library, cache, q, rows))


@pytest.mark.parametrize("kind", ["f16", "k8v4"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 65, 300])
def test_lengths_windows_and_soft_caps(library: Library, kind: str, softcap: float | None, window: int | None) -> None:
    context = [1, 2, 63, 64, 65, 255, 256, 260, 700, 513]
    rows = [1, 2, 1, 3, 1, 1, 1, 8, 8, 2]
    cache = random_cache(kind, 16, 2, context)
    q = random_queries(rows, 26, 16)  # 13 heads and 8 rows are several blocks
    exact = exact_attention(cache, q, starts(rows), 0.25, window, softcap)
    found = decode(library, cache, q, rows, window, softcap)
    assert relative_error(found, exact) < 3e-6
    assert same_bits(found, prefill(library, cache, q, rows, window, softcap))


@pytest.mark.parametrize("kind", ["f16", "q4"])
@pytest.mark.parametrize("window", [None, 70])
def test_sinks(library: Library, kind: str, window: int | None) -> None:
    """Scores far below, among and far above those of tokens; over one split and over several."""
    context, rows = [1, 64, 600], [1, 9, 8]
    cache, q = random_cache(kind, 16, 2, context), random_queries(rows, 6, 16)
    ends = guarded_array(np.array([-200, -3, 0, 2, 9, 300], np.float32))
    exact = exact_attention(cache, q, starts(rows), 0.25, window, None, ends)
    found = decode(library, cache, q, rows, window, sinks=ends)
    assert relative_error(found, exact) < 3e-6
    assert same_bits(found, prefill(library, cache, q, rows, window, sinks=ends))
    assert same_bits(found[:, 0], decode(library, cache, q, rows, window)[:, 0])  # e^-200 of the rest
    assert not same_bits(found[:, 1:], decode(library, cache, q, rows, window)[:, 1:])


@pytest.mark.parametrize("window", [None, 100])
def test_bits_of_a_row_depend_on_nothing_else(libraries: list[Library], window: int | None) -> None:
    """Prompts in one piece, in pieces, row by row, and beside others; on every instruction set."""
    context = [600, 130]
    for kind in ("f16", "q4"):
        cache = random_cache(kind, 32, 2, context)
        q = random_queries(context, 6, 32)
        whole = [prefill(library, cache, q, context, window, 20.0) for library in libraries]
        assert all(same_bits(whole[0], other) for other in whole[1:])
        for library in libraries:
            for first, last in ((0, 1), (0, 77), (77, 255), (255, 257), (257, 600), (599, 600)):
                part = Cache(
                    kind, 32, cache.pages, cache.table[:1], np.array([last], np.int32), cache.keys, cache.values
                )
                for run in (prefill, decode) if last - first < 200 else (prefill,):
                    found = run(library, part, q[first:last], [last - first], window, 20.0)
                    assert same_bits(found, whole[0][first:last])


def test_attention_to_all_of_a_prompt_is_exact(library: Library) -> None:
    context = [330]
    cache = random_cache("f32", 64, 1, context)
    q = random_queries(context, 2, 64)
    exact = exact_attention(cache, q, starts(context), 0.125)
    assert relative_error(prefill(library, cache, q, context), exact) < 3e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["key", "value"])
def test_nan_shows_in_rows_that_see_it_and_in_no_other(library: Library, kind: str, what: str) -> None:
    """Also where it lies beyond the context, from a text before."""
    rows, context, window = [8, 8, 6], [300, 70, 64], 4
    cache = random_cache(kind, 16, 1, context)
    marked = {0: 294, 1: 66, 2: 61}
    for sequence, token in [*marked.items(), (0, 300), (1, 71), (0, 290)]:
        page, place = cache.place(sequence, token)
        arrays = cache.arrays
        target = (arrays.k_scales, arrays.k) if what == "key" else (arrays.v_scales, arrays.v)
        target = target[0] if target[0].size else target[1]
        target[(page, 0, slice(None), place) if what == "key" else (page, 0, place)] = np.nan
    q = random_queries(rows, 5, 16)
    sees = []
    for sequence, count in enumerate(rows):
        positions = context[sequence] - count + np.arange(count)
        behind = positions[:, None] - np.array([marked[sequence]] + ([290] if sequence == 0 else []))
        sees.append(((behind >= 0) & (behind < window)).any(1))
    for run in (decode, prefill):
        found = run(library, cache, q, rows, window)
        assert (np.isnan(found).all((1, 2)) == np.concatenate(sees)).all()
        assert (np.isnan(found).any((1, 2)) == np.concatenate(sees)).all()


def test_nan_in_a_query_stays_in_its_head(library: Library) -> None:
    rows = [3, 8]
    cache = random_cache("q8", 64, 1, [300, 40])
    q = random_queries(rows, 4, 64)
    q[1, 2, 5] = np.nan
    for run in (decode, prefill):
        found = np.isnan(run(library, cache, q, rows))
        assert found[1, 2].all()
        assert found.sum() == 64


def test_rows_of_no_sequence_become_zeros(library: Library) -> None:
    out = np.full((3, 2, 8), NOTHING)
    table = decode_items(np.array([1, 1], np.int32), np.array([0], np.int32), None, num_rows=3).rows
    library.call(MergeAttention("q8", 8), slots(np.zeros(1), table, out, 2, 1), len(table))
    assert (out[1:] == 0).all()
    assert np.isnan(out[0]).all()


@pytest.mark.parametrize(("head_dim", "num_heads", "inputs"), [(64, 4, 128), (80, 2, 32), (128, 3, 64)])
def test_merge_writes_activations_as_quantizing_does(
    library: Library, head_dim: int, num_heads: int, inputs: int
) -> None:
    """Two heads of K and V, each with ``num_heads`` query heads."""
    rows, form = [1, 2], ActivationForm(inputs, 2, "eights")
    cache = random_cache("q8", head_dim, 2, [64, 257])
    q = random_queries(rows, 2 * num_heads, head_dim)
    num_records = 2 * num_heads * head_dim // inputs
    records, expected = (np.zeros((num_records, 3, form.num_bytes), np.uint8) for _ in range(2))
    out = decode(library, cache, q, rows, form=form, records=records)
    assert same_bits(out, decode(library, cache, q, rows))
    width = 2 * num_heads * head_dim
    library.call(QuantizeRows(form, False), slots(out, expected, width, num_records, 3, None, num_records, width), 3)
    assert same_bits(records, expected)


@pytest.mark.parametrize("window", [None, 1, 300])
def test_items_of_many_sequences_are_made_as_those_of_few(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        counts = rng.integers(0, 9, rng.integers(1, 6))
        starts = (3 + np.concatenate([[0], np.cumsum(counts)])).astype(np.int32)
        lengths = (counts + rng.integers(0, 3000, len(counts))).astype(np.int32)
        found = []
        for limit in (0, 1 << 30):
            monkeypatch.setattr(attention_items, "_FEW_PIECES", limit)
            found.append(decode_items(starts, lengths, window, 5, int(starts[-1]) + 2))
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_decode_items_cover_what_is_seen() -> None:
    tables = decode_items(np.array([3, 4, 4, 6], np.int32), np.array([700, 90, 513], np.int32), 300, first_sequence=5)
    assert tables.items[:, :6].tolist() == [[5, 3, 1, 699, 1, 0], [5, 3, 1, 699, 2, 1], *(
        [7, 4, 2, 511, split, 2 + 2 * split] for split in range(3)
    )]  # fmt: skip
    # The first row of the last sequence sees tokens 212 to 511, splits 0 and 1; the second one 213 to 512.
    assert tables.rows.tolist() == [[3, 0, 1, 2], [4, 2, 2, 2], [5, 3, 2, 3]]
    assert tables.num_partials == 8


@pytest.mark.parametrize("window", [None, 1, 2, 256, 257, 258, 300])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_no_position_has_more_items_than_are_foreseen(window: int | None, count: int) -> None:
    found = max(
        len(decode_items(np.array([0, count], np.int32), np.array([length], np.int32), window).items)
        for length in range(count, 1100)
    )
    assert found == most_splits(1099, window, count)


@pytest.mark.parametrize(("kind", "most"), [("f32", 3e-6), ("f16", 1e-3), ("q8", 0.02), ("k8v4", 0.2), ("q4", 0.3)])
def test_tokens_that_were_appended_are_attended_to(library: Library, kind: str, most: float) -> None:
    """Rows of q, k and v against attention to them as they were; codes of 4 bits are off by some percent."""
    T, H, num_kv, D = 300, 4, 2, 96
    heads = np.random.default_rng(4).standard_normal((T, H + 2 * num_kv, D)).astype(np.float32)
    cache = random_cache(kind, D, num_kv, [T])
    places = np.array([page * 64 + token for page, token in (cache.place(0, i) for i in range(T))], np.int32)
    q = np.zeros((T, H, D), np.float32)
    args = slots(heads, heads[0].size, q, cache.pages, places, None, None, H, num_kv, None, 0.0, None, 0.0)
    library.call(AppendKV(kind, D, half=0), args, T * num_kv)
    was = heads.astype(np.float64)
    plain = Cache(
        "f32", D, cache.pages, cache.table, cache.context_len, [was[:, H : H + num_kv]], [was[:, H + num_kv :]]
    )
    exact = exact_attention(plain, heads[:, :H], starts([T]), D**-0.5)
    assert relative_error(prefill(library, cache, q, [T]), exact) < most
    assert relative_error(decode(library, cache, q[-4:], [4]), exact[-4:]) < most


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_shapes(libraries: list[Library], data: st.DataObject) -> None:
    library = data.draw(st.sampled_from(libraries))
    kind, head_dim = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([2, 8, 18, 48, 64, 100, 160]))
    num_kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 11))
    rows = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    context = [count + data.draw(st.integers(0, 600)) for count in rows]
    window, softcap = data.draw(st.none() | st.integers(1, 400)), data.draw(st.none() | st.just(5.0))
    cache = random_cache(kind, head_dim, num_kv_heads, context, seed=sum(context))
    q = random_queries(rows, group * num_kv_heads, head_dim)
    exact = exact_attention(cache, q, starts(rows), head_dim**-0.5, window, softcap)
    found = decode(library, cache, q, rows, window, softcap)
    assert relative_error(found, exact) < 5e-6
    assert same_bits(found, prefill(library, cache, q, rows, window, softcap))
