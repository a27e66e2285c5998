"""Prefill attention against float64 on the pages' own values, and against decode attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from test_attention_decode import HEAD_DIMS, WITHOUT_TENSOR_CORES, Case, also_on_a_gpu, assert_close

from exl.errors import KernelError
from exl.kernels.append_kv import append_kv
from exl.kernels.attention_io import AttentionParams, QkvRows
from exl.kernels.attention_prefill import PrefillTables, attention_prefill, check_pages
from exl.kernels.launch import Backend
from exl.layout.pages import KINDS
from tests.host.backends import CUPY


def run(case: Case, backend: Backend, **options) -> tuple[np.ndarray, np.ndarray]:
    """Appends the case's new tokens, then attends, as a model does. Returns the output and the resulting pages."""

    def device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(backend.device)

    lengths = np.array(case.lengths, np.int32)
    check_pages(case.query_start, lengths, case.table, len(case.pages))
    T, pages = len(case.rows), device(case.pages)
    q = torch.full((T, case.H, case.D), float("nan"), dtype=torch.float16, device=backend.device)
    one, zero = torch.ones(T, case.D // 2, device=backend.device), torch.zeros(T, case.D // 2, device=backend.device)
    append_kv(backend, case.layout, QkvRows(device(case.rows), one, zero), device(case.slots), pages, q)
    out = torch.full((T, case.H * case.D), float("nan"), dtype=torch.float16, device=backend.device)
    tables = PrefillTables(device(case.query_start), device(lengths), device(case.table), max(case.new))
    attention_prefill(
        backend, case.layout, q, tables, pages, out, case.params(backend), **options,
    )  # fmt: skip
    return out.cpu().numpy(), pages.cpu().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "new"), [(1, 1), (63, 63), (64, 64), (65, 65), (130, 40), (300, 9)])
def test_chunks(backend: Backend, kind: str, length: int, new: int) -> None:
    """A whole prompt, and a chunk of a prompt whose beginning is in the cache."""
    case = Case(kind, 64, 4, 2, (length,), (new,), seed=length)
    out, pages = run(case, backend)
    assert_close(out, case.expected(pages))


EIGHTS = [("q8", 8), ("q4", 24), ("f16", 40), ("q8", 72), ("k8v4", 120)]  # V ends with half a tile


@pytest.mark.sample(3)
@pytest.mark.parametrize(("mode", "kind", "D"), also_on_a_gpu(*HEAD_DIMS, *EIGHTS))
def test_head_sizes(mode: str, kind: str, D: int) -> None:
    case = Case(kind, D, 2, 1, (100, 70), (20, 33), seed=D)
    out, pages = run(case, backend_or_skip(mode))
    assert_close(out, case.expected(pages))


@pytest.mark.parametrize(("mode", "group"), also_on_a_gpu(*((group,) for group in (1, 2, 4, 7, 8, 12))))
def test_groups_and_unequal_sequences(mode: str, group: int) -> None:
    case = Case("q8", 64, 2 * group, 2, (130, 0, 8, 64), (30, 0, 8, 1), seed=group)
    out, pages = run(case, backend_or_skip(mode))
    assert_close(out, case.expected(pages))


@pytest.mark.parametrize(
    ("mode", "arch"), [("race", 86), ("asan", 86), ("race", 61), pytest.param("cupy", 0, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(("kind", "window"), [("f16", None), ("q4", None), ("q8", 40)])
def test_sinks(mode: str, arch: int, kind: str, window: int | None) -> None:
    case = Case(kind, 64, 14, 2, (130, 64), (30, 3), seed=6, window=window, with_sinks=True)
    out, pages = run(case, backend_or_skip(mode, arch))
    exact, limit = case.expected(pages)
    assert_close(out, (exact, limit))
    case.sinks = None
    plain = np.abs(case.expected(pages)[0] - exact) / limit
    assert (
        plain.reshape(len(out), 14, 64).max((0, 2))[[4, 5, 10, 11]] > 20
    ).all()  # where it is among the largest scores


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "Hkv"), [(32, 32), (32, 8), (64, 8)])
@pytest.mark.parametrize("window", [None, 200])
def test_heads_of_real_models(kind: str, H: int, Hkv: int, window: int | None) -> None:
    """Llama 2 7B and Llama 3 8B and 70B: head size 128, groups of 1, 4 and 8; unequal and empty sequences."""
    backend = backend_or_skip("cupy")
    case = Case(kind, 128, H, Hkv, (400, 0, 64, 130), (400, 0, 64, 30), seed=H + Hkv, window=window)
    out, pages = run(case, backend)
    assert_close(out, case.expected(pages))


@pytest.mark.parametrize(("mode", "arch", "kind", "D", "H"), WITHOUT_TENSOR_CORES)
def test_without_tensor_cores(mode: str, arch: int, kind: str, D: int, H: int) -> None:
    for window, softcap in ((None, 3.0), (20, None)):
        case = Case(kind, D, H, 2, (130, 0, 8, 64), (30, 0, 8, 1), seed=D, window=window, softcap=softcap)
        out, pages = run(case, backend_or_skip(mode, arch))
        assert_close(out, case.expected(pages))


@pytest.mark.parametrize(("mode", "window"), also_on_a_gpu(*((size,) for size in (1, 2, 63, 64, 65, 5000))))
def test_windows(mode: str, window: int) -> None:
    case = Case("k8v4", 64, 4, 2, (200, 64), (50, 64), seed=window, window=window)
    out, pages = run(case, backend_or_skip(mode))
    assert_close(out, case.expected(pages))


@pytest.mark.parametrize("mode", ["race", CUPY])
def test_a_soft_cap_and_the_consumers_order(mode: str) -> None:
    backend = backend_or_skip(mode)
    case = Case("f16", 64, 4, 2, (70,), (20,), softcap=3.0)
    out, pages = run(case, backend)
    assert_close(out, case.expected(pages))
    order = np.random.default_rng(0).permutation(256).astype(np.int32)
    shuffled, _ = run(case, backend, channel_map=torch.from_numpy(order).to(backend.device))
    np.testing.assert_array_equal(shuffled[:, order], out)


@pytest.mark.parametrize(("mode", "kind"), also_on_a_gpu(*((kind,) for kind in KINDS)))
def test_the_same_as_decode_attention(mode: str, kind: str) -> None:
    """Both kernels agree, up to the rounding of each."""
    case = Case(kind, 64, 4, 2, (300, 40), (8, 5), seed=1)
    backend = backend_or_skip(mode, 75)
    prefill, pages = run(case, backend)
    decode, decode_pages = case.run(backend)
    np.testing.assert_array_equal(pages, decode_pages)
    exact, limit = case.expected(pages)
    assert_close(prefill, (exact, limit))
    assert_close(decode, (exact, limit))
    assert (np.abs(prefill - decode) <= 2 * limit).all()


@pytest.mark.parametrize(
    ("mode", "arch"), [("plain", 61), ("plain", 86), pytest.param("cupy", 0, marks=pytest.mark.gpu)]
)
def test_a_rows_bits_do_not_depend_on_the_other_rows(mode: str, arch: int) -> None:
    """Run alone, the second sequence has other columns in its warps' fragments, but the same bits."""
    backend = backend_or_skip(mode, arch)
    both = Case("q4", 64, 6, 2, (90, 77), (90, 30), seed=2)
    out, _ = run(both, backend)
    alone = Case("q4", 64, 6, 2, (77,), (30,))
    alone.table, alone.pages = both.table[1:], both.pages
    alone.rows, alone.slots = both.rows[90:], both.slots[90:]
    np.testing.assert_array_equal(run(alone, backend)[0], out[90:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_table": [[0, 9]]}, "sequence 0 has page 9: expected 0 to 3"),
        ({"context_len": [129]}, "context of 129"),
        ({"query_start": [0, 71]}, "71 new tokens in a context of 70"),
    ],
)
def test_tables_are_checked_on_the_host(change: dict, words: str) -> None:
    good = {"query_start": [0, 70], "context_len": [70], "page_table": [[0, 1]]}
    check_pages(*(np.array(value, np.int32) for value in good.values()), 4)
    with pytest.raises(KernelError, match=words):
        check_pages(*(np.array(value, np.int32) for value in {**good, **change}.values()), 4)


def test_bad_arguments_are_refused_before_a_launch() -> None:
    class NeverLaunches:
        device, arch = torch.device("cpu"), 86

        def load(self, spec: object) -> None:
            raise AssertionError("a kernel was asked for")

    case = Case("q4", 64, 4, 2, (5,), (1,))
    on_device = [torch.from_numpy(x) for x in (case.query_start, np.array([5], np.int32), case.table)]
    good = {"q": torch.zeros(1, 4, 64).half(), "pages": torch.from_numpy(case.pages), "out": torch.zeros(1, 256).half()}
    for change, options, words in (
        ({"q": torch.zeros(1, 4, 64)}, {}, "q is torch.float32"),
        ({"q": torch.zeros(1, 4, 80).half()}, {}, "q has shape"),
        ({"out": torch.zeros(1, 128).half()}, {}, "out has shape"),
        ({"pages": torch.zeros(1, 3, 100, dtype=torch.uint8)}, {}, "whole groups"),
        ({}, {"window": 0}, "window 0"),
        ({}, {"max_new": 2}, "2 new tokens"),
        ({}, {"channel_map": torch.arange(256)}, "channel_map is torch.int64"),
    ):
        args, options = {**good, **change}, dict(options)
        tables = PrefillTables(*on_device, max_new=options.pop("max_new", 1))
        params = AttentionParams(1.0, options.pop("window", None))
        with pytest.raises(KernelError, match=words):
            attention_prefill(
                NeverLaunches(), case.layout, args["q"], tables, args["pages"], args["out"], params, **options
            )
