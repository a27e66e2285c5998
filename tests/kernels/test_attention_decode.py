"""Decode attention against float64 on the pages' own values; a row's bits in any batch; unwritten bytes never count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.attention_twin import attention, bytes_of_tokens

from exl.errors import KernelError
from exl.kernels.attention_decode import (
    DecodeScratch,
    DecodeTables,
    attention_decode,
    check_tables,
    first_parts,
    num_items,
    scratch_shapes,
)
from exl.kernels.attention_io import NO_NORMS, AttentionParams, HeadNorms, QkvRows
from exl.kernels.launch import Backend
from exl.layout.attention import items_of
from exl.layout.pages import KINDS, PageLayout, hadamard, pack_pages, unpack_pages
from tests.host.backends import CUPY, make_backend


@dataclass
class Case:
    """Sequences of given lengths and numbers of new tokens; their pages are shuffled among other pages of NaN."""

    kind: str
    D: int
    H: int
    Hkv: int
    lengths: tuple[int, ...]
    new: tuple[int, ...]
    seed: int = 0
    window: int | None = None
    softcap: float | None = None
    with_sinks: bool = False

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.layout = PageLayout(self.kind, self.D)
        self.scale = self.D**-0.5
        # Far below the scores of tokens, among them, far above.
        scores = np.array([-200, -2, 0, 3, 12, 300], np.float32)
        self.sinks = np.resize(scores, self.H) if self.with_sinks else None
        counts = [-(-length // 64) for length in self.lengths]
        order = rng.permutation(sum(counts) + 2)
        self.table = np.full((len(self.lengths), max(max(counts), 1)), 10**6, np.int32)
        self.pages = np.full((len(order), self.Hkv, self.layout.num_bytes), 0xFF, np.uint8)  # f16: NaN
        rows, slots, at = [], [], 0
        for b, (length, new) in enumerate(zip(self.lengths, self.new, strict=True)):
            k, v = (rng.standard_normal((length, self.Hkv, self.D)).astype(np.float32) for _ in range(2))
            q = rng.standard_normal((new, self.H, self.D)).astype(np.float32) * 2
            pages = order[at : at + counts[b]]
            at += counts[b]
            self.table[b, : counts[b]] = pages
            self._fill(pages, k[: length - new], v[: length - new])
            rows.append(
                np.concatenate(
                    [x.reshape(new, x.shape[1] * self.D) for x in (q, k[length - new :], v[length - new :])], 1
                )
            )
            places = np.arange(length - new, length)
            slots.append(self.table[b, places // 64] * 64 + places % 64)
        self.rows = np.concatenate(rows).astype(np.float16)
        self.slots = np.concatenate(slots).astype(np.int32)
        self.query_start = np.concatenate([[0], np.cumsum(self.new)]).astype(np.int32)

    def _fill(self, pages: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Writes the bytes of the earlier tokens; all other bytes stay 0xFF."""
        if len(k):
            for i, packed in enumerate(pack_pages(self.layout, k, v)):
                mine = bytes_of_tokens(self.layout, len(k) - i * 64)
                self.pages[pages[i]][:, mine] = packed[:, mine]

    def run(
        self,
        backend: Backend,
        sequences: tuple[int, ...] | None = None,
        norms: HeadNorms = NO_NORMS,
        channel_map: torch.Tensor | None = None,
        per_launch: int = 1000,
    ) -> tuple[np.ndarray, np.ndarray]:
        """-> out of the chosen sequences' rows, and the pages afterwards. Scratch is as small as it may be."""
        chosen = range(len(self.lengths)) if sequences is None else sequences
        take = np.concatenate([np.arange(self.query_start[b], self.query_start[b + 1]) for b in chosen])
        new = [self.new[b] for b in chosen]
        start = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        lengths = np.array([self.lengths[b] for b in chosen], np.int32)
        table, slots = self.table[list(chosen)], self.slots[take]
        check_tables(start, lengths, table, slots, len(self.pages))

        def device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(backend.device)

        T, max_context, max_new = len(take), max(max(self.lengths), 1), max(max(self.new), 1)
        launches = [slice(i, i + per_launch) for i in range(0, len(lengths), per_launch)]
        most = max(int(items_of(lengths[launch]).sum()) for launch in launches)
        shapes = scratch_shapes(min(len(lengths), per_launch), most, self.H, self.Hkv, self.D, max_new)
        scratch = DecodeScratch(
            torch.full((shapes["partial"][1],), float("nan"), device=backend.device),
            torch.zeros(shapes["arrived"][1], dtype=torch.int32, device=backend.device),
        )
        out = torch.full((T, self.H * self.D), float("nan"), dtype=torch.float16, device=backend.device)
        pages = device(self.pages)
        one, zero = (
            torch.ones(T, self.D // 2, device=backend.device),
            torch.zeros(T, self.D // 2, device=backend.device),
        )
        rows = QkvRows(device(self.rows[take]), one, zero, norms)
        parts, slots = first_parts(lengths, per_launch), device(slots)
        for launch in launches:
            first, length, pages_of = (device(x[launch]) for x in (parts, lengths, table))
            tables = DecodeTables(
                device(start[launch.start : launch.stop + 1]),
                length,
                pages_of,
                slots,
                first,
                most,
                max_context,
                max_new,
            )
            attention_decode(
                backend, self.layout, rows, tables, pages, out, scratch,
                self.params(backend), channel_map=channel_map,
            )  # fmt: skip
        assert not scratch.arrived.any()
        return out.cpu().numpy(), pages.cpu().numpy()

    def params(self, backend: Backend) -> AttentionParams:
        sinks = None if self.sinks is None else torch.from_numpy(self.sinks).to(backend.device)
        return AttentionParams(self.scale, self.window, self.softcap, sinks)

    def expected(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Attention in float64 over the pages' content after the launch, and the largest error of the kernel.

        Probabilities are rounded to f16, and again after multiplication by V's scales: 2 * 2^-11 of each term. Below
        f16's normal numbers the error is 2^-25 of their factor 2^8, times a code. The error of f32 scores is 1/100 of
        that. Undoing V's rotation adds the errors of a run's channels and divides by the root of their number.
        """
        size, rows, limits = self.layout.hadamard_size, [], []
        for b, (length, new) in enumerate(zip(self.lengths, self.new, strict=True)):
            if not new:
                continue
            k, v = unpack_pages(self.layout, pages[self.table[b, : -(-length // 64)]])
            q = self.rows[self.query_start[b] : self.query_start[b + 1], : self.H * self.D].astype(np.float32)
            q = hadamard(q.reshape(new, self.H, self.D), size).astype(np.float16)
            places = np.arange(length - new, length)
            exact, magnitude = (
                attention(q, k[:length], x[:length], places, self.scale, self.window, self.softcap, self.sinks)
                for x in (v, np.abs(v))
            )
            error = 2.02 * 2.0**-11 * magnitude + length * 127 * 2.0**-33
            error = error.reshape(new, self.H, -1, size).sum(-1, keepdims=True) / np.sqrt(size)
            exact = undo(exact, size)
            rows.append(exact.reshape(new, -1))
            limits.append((np.repeat(error, size, -1).reshape(exact.shape) + 2.0**-11 * np.abs(exact)).reshape(new, -1))
        return np.concatenate(rows), np.concatenate(limits)


def undo(x: np.ndarray, size: int) -> np.ndarray:
    i = np.arange(size)
    matrix = (-1.0) ** np.array([[bin(a & b).count("1") for b in i] for a in i]) / np.sqrt(size)
    return (x.reshape(*x.shape[:-1], -1, size) @ matrix).reshape(x.shape)


def assert_close(found: np.ndarray, expected: tuple[np.ndarray, np.ndarray]) -> None:
    exact, limit = expected
    assert not np.isnan(found).any()
    assert (np.abs(found - exact) <= limit).all(), (np.abs(found - exact) / limit).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 257, 1000])
def test_lengths(backend: Backend, kind: str, length: int) -> None:
    case = Case(kind, 64, 4, 2, (length,), (1,), seed=length)
    out, pages = case.run(backend)
    assert_close(out, case.expected(pages))


HEAD_DIMS = [(kind, D) for D in (16, 48, 80, 96, 128, 256) for kind in KINDS]
EIGHTS = [("f16", 8), ("q4", 8), ("q8", 24), ("k8v4", 40), ("f16", 72), ("q4", 120)]  # V ends with half a tile


def also_on_a_gpu(*cases: tuple) -> list:
    """Runs each case under the race detector and on a GPU; ``mode`` becomes the first parameter."""
    return [("race", *case) for case in cases] + [pytest.param("cupy", *case, marks=pytest.mark.gpu) for case in cases]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("mode", "kind", "D"), also_on_a_gpu(*HEAD_DIMS, *EIGHTS))
def test_head_sizes(mode: str, kind: str, D: int) -> None:
    case = Case(kind, D, 2, 1, (150, 70), (1, 2), seed=D)
    out, pages = case.run(backend_or_skip(mode))
    assert_close(out, case.expected(pages))


@pytest.mark.parametrize(("mode", "group"), also_on_a_gpu(*((group,) for group in (1, 2, 4, 7, 8, 12))))
def test_groups_and_unequal_sequences(mode: str, group: int) -> None:
    """An empty sequence among them, and rows of 0 to 8 new tokens."""
    case = Case("q8", 64, 2 * group, 2, (130, 0, 8, 64, 300), (3, 0, 8, 1, 2), seed=group)
    out, pages = case.run(backend_or_skip(mode))
    assert_close(out, case.expected(pages))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "Hkv"), [(32, 32), (32, 8), (64, 8)])
@pytest.mark.parametrize("window", [None, 1000])
def test_heads_of_real_models(kind: str, H: int, Hkv: int, window: int | None) -> None:
    """Llama 2 7B and Llama 3 8B and 70B: head size 128, groups of 1, 4 and 8; unequal and empty sequences."""
    backend = backend_or_skip("cupy")
    case = Case(kind, 128, H, Hkv, (1500, 0, 64, 257, 1), (1, 0, 8, 2, 1), seed=H + Hkv, window=window)
    out, pages = case.run(backend)
    assert_close(out, case.expected(pages))
    for b in (0, 2, 3, 4):  # the same bits as alone
        alone, _ = case.run(backend, (b,))
        np.testing.assert_array_equal(alone, out[case.query_start[b] : case.query_start[b + 1]])


# Without tensor cores: each cache type, 1 to 8 columns, half tiles of V, and head size 256, which uses sm_61's 48 KB.
WITHOUT_TENSOR_CORES = [
    ("race", 61, "q4", 64, 2),
    ("race", 70, "f16", 24, 8),
    ("race", 61, "k8v4", 256, 4),
    ("asan", 61, "q8", 40, 8),
    ("asan", 70, "f16", 128, 2),
]


@pytest.mark.parametrize(("mode", "arch", "kind", "D", "H"), WITHOUT_TENSOR_CORES)
def test_without_tensor_cores(mode: str, arch: int, kind: str, D: int, H: int) -> None:
    """Unequal sequences, an empty one, more than one item, with and without a window."""
    for window in (None, 70):
        case = Case(kind, D, H, 2, (300, 0, 70, 65), (1, 0, 8, 3), seed=D, window=window)
        out, pages = case.run(backend_or_skip(mode, arch))
        assert_close(out, case.expected(pages))


@pytest.mark.parametrize(("mode", "window"), also_on_a_gpu(*((size,) for size in (1, 2, 63, 64, 65, 200, 5000))))
def test_windows(mode: str, window: int) -> None:
    case = Case("k8v4", 64, 4, 2, (600, 64, 5), (2, 1, 3), seed=window, window=window)
    out, pages = case.run(backend_or_skip(mode))
    assert_close(out, case.expected(pages))


@pytest.mark.parametrize("mode", ["race", CUPY])
def test_a_soft_cap(mode: str) -> None:
    case = Case("f16", 64, 4, 2, (200,), (2,), softcap=3.0)
    out, pages = case.run(backend_or_skip(mode))
    assert_close(out, case.expected(pages))
    capped, case.softcap = out, None
    assert np.abs(case.run(backend_or_skip(mode))[0] - capped).max() > 0.01


@pytest.mark.parametrize(
    ("mode", "arch"), [("race", 86), ("asan", 86), ("race", 61), pytest.param("cupy", 0, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(("kind", "window"), [("f16", None), ("q4", None), ("q8", 70)])
def test_sinks(mode: str, arch: int, kind: str, window: int | None) -> None:
    """Contexts of one item and of several; seven heads of a group are one column tile, times five tokens several."""
    backend = make_backend(mode, arch)
    case = Case(kind, 64, 14, 2, (5, 300, 64), (5, 1, 2), seed=5, window=window, with_sinks=True)
    out, pages = case.run(backend)
    assert_close(out, case.expected(pages))
    exact, limit = case.expected(pages)
    case.sinks = None
    plain = np.abs(case.expected(pages)[0] - exact) / limit
    assert (plain.reshape(len(out), 14, 64).max((0, 2))[[1, 2, 3, 4, 5]] > 20).all()  # in every head but the first


@pytest.mark.parametrize("mode", ["plain", CUPY])
@pytest.mark.parametrize("kind", ["f16", "q4"])
def test_beyond_4096_tokens(mode: str, kind: str) -> None:
    case = Case(kind, 16, 1, 1, (4096, 4097, 5200), (1, 1, 2))
    out, pages = case.run(backend_or_skip(mode))
    assert_close(out, case.expected(pages))
    assert [num_items(n) for n in (0, 1, 256, 257, 4096, 4097, 5120, 5121)] == [0, 1, 1, 2, 16, 17, 17, 18]


@pytest.mark.parametrize(("mode", "kind"), also_on_a_gpu(*((kind,) for kind in KINDS)))
def test_new_tokens_are_appended_as_the_cpu_would(mode: str, kind: str) -> None:
    case = Case(kind, 64, 4, 2, (66, 3), (4, 3), seed=3)
    _, pages = case.run(backend_or_skip(mode))
    for b, (length, new) in enumerate(zip(case.lengths, case.new, strict=True)):
        k, v = unpack_pages(case.layout, pages[case.table[b, : -(-length // 64)]])
        rows = (
            case.rows[case.query_start[b] : case.query_start[b + 1], 4 * 64 :].astype(np.float32).reshape(new, 2, 2, 64)
        )
        wanted = unpack_pages(case.layout, pack_pages(case.layout, rows[:, 0], rows[:, 1]))
        np.testing.assert_array_equal(k[length - new : length], wanted[0][:new])
        np.testing.assert_array_equal(v[length - new : length], wanted[1][:new])


ARCH_KINDS = [
    *(("plain", arch, kind, 6) for kind in KINDS for arch in (75, 90)),
    ("plain", 61, "f16", 4),
    ("plain", 61, "q4", 2),
    *(pytest.param("cupy", 0, kind, 6, marks=pytest.mark.gpu) for kind in KINDS),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("mode", "arch", "kind", "H"), ARCH_KINDS)
def test_a_rows_bits_depend_on_nothing_else(mode: str, arch: int, kind: str, H: int) -> None:
    """Alone, in a batch, and as the first or last of up to 8 new tokens."""
    backend = backend_or_skip(mode, arch)
    case = Case(kind, 64, H, 2, (255, 700, 20, 1), (8, 1, 5, 1), seed=7, window=None)
    out, pages = case.run(backend)
    for b in range(4):
        alone, _ = case.run(backend, (b,))
        np.testing.assert_array_equal(alone, out[case.query_start[b] : case.query_start[b + 1]])
    # Token by token: the others of the eight are already in the cache, or not yet.
    for i in (0, 3, 7):
        single = Case(kind, 64, H, 2, (248 + i,), (1,))
        single.table, single.pages = case.table[:1], pages
        single.rows, single.slots = case.rows[i : i + 1], case.slots[i : i + 1]
        found, _ = single.run(backend)
        np.testing.assert_array_equal(found[0], out[i])


@pytest.mark.parametrize("mode", ["race", CUPY])
def test_norm_rope_and_the_consumers_order(mode: str) -> None:
    """The prologue is that of append_kv and tested there; this tests that q, K and the output pass through it."""
    backend, rng = backend_or_skip(mode), np.random.default_rng(1)
    case = Case("f16", 64, 4, 2, (5,), (5,))
    order = rng.permutation(4 * 64).astype(np.int32)
    weight, channel_map = torch.full((64,), 0.5, device=backend.device), torch.from_numpy(order).to(backend.device)
    norms = HeadNorms(weight, weight, 1e-6)
    out, _ = case.run(backend, norms=norms)
    shuffled, _ = case.run(backend, norms=norms, channel_map=channel_map)
    np.testing.assert_array_equal(shuffled[:, order], out)
    rows = case.rows.astype(np.float64).reshape(5, -1, 64)
    normed = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * 0.5
    k = normed[:, 4:6].astype(np.float16)
    expected = attention(normed[:, :4].astype(np.float16), k, case.rows.reshape(5, -1, 64)[:, 6:], np.arange(5), 0.125)
    magnitude = np.abs(case.rows.astype(np.float64)).max()
    assert_close(out, (expected.reshape(5, -1), np.full((5, 256), 4 * 2.0**-11 * magnitude)))


@pytest.mark.parametrize(("mode", "arch"), [("asan", 86), ("asan", 61), *also_on_a_gpu((86,))])
def test_sequences_in_turns_share_the_scratch(mode: str, arch: int) -> None:
    """Two at a time, with scratch for the two longest: the same bits as all at once."""
    backend = backend_or_skip(mode, arch)
    case = Case("q8", 64, 8, 2, (300, 20, 0, 800, 513, 257, 1), (1, 8, 0, 3, 1, 2, 1))
    out, pages = case.run(backend)
    for per_launch in (1, 2, 5):
        some, same = case.run(backend, per_launch=per_launch)
        np.testing.assert_array_equal(some, out)
        np.testing.assert_array_equal(same, pages)


def test_scratch_for_fewer_items_than_the_sequences_have_is_refused() -> None:
    case = Case("f16", 64, 4, 2, (300, 600), (1, 1))
    shapes = scratch_shapes(2, 2 + 3, 4, 2, 64)
    assert shapes == {"partial": ("f32", 5 * 2 * 8 * 66), "arrived": ("i32", 4)}
    table = torch.zeros(2, dtype=torch.int32)
    tables = DecodeTables(
        torch.arange(3, dtype=torch.int32), table, torch.from_numpy(case.table), table, table, 6, max_context=600
    )
    rows = QkvRows(torch.from_numpy(case.rows), torch.zeros(2, 32), torch.zeros(2, 32))
    scratch = DecodeScratch(torch.zeros(shapes["partial"][1]), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(KernelError, match=r"scratch\.partial has 5280 elements: expected 6336 or more"):
        attention_decode(
            make_backend("plain", 86), case.layout, rows, tables, torch.from_numpy(case.pages),
            torch.zeros(2, 256, dtype=torch.float16), scratch, AttentionParams(0.125),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_table": [[0, 9]]}, "sequence 0 has page 9: expected 0 to 3"),
        ({"page_table": [[-1, 1]]}, "sequence 0 has page -1"),
        ({"context_len": [129]}, "context of 129: expected 1 to 128"),
        ({"query_start": [0, 9], "slots": [0] * 9}, "9 new tokens: expected 0 to 8"),
        ({"slots": [5]}, r"slot 5 of token 69 of sequence 0: expected 69 or -1"),
    ],
)
def test_tables_are_checked_on_the_host(change: dict, words: str) -> None:
    good = {"query_start": [0, 1], "context_len": [70], "page_table": [[0, 1]], "slots": [69]}
    check_tables(*(np.array(value, np.int32) for value in good.values()), 4)
    with pytest.raises(KernelError, match=words):
        check_tables(*(np.array(value, np.int32) for value in {**good, **change}.values()), 4)


def test_bad_arguments_are_refused_before_a_launch() -> None:
    class NeverLaunches:
        device, arch = torch.device("cpu"), 86

        def load(self, spec: object) -> None:
            raise AssertionError("a kernel was asked for")

    case = Case("q4", 64, 4, 2, (5,), (1,))
    for options, words in (
        ({"norms": HeadNorms(torch.ones(32), None, 0.0)}, "q_norm has shape"),
        ({"channel_map": torch.arange(256)}, "channel_map is torch.int64"),
    ):
        with pytest.raises(KernelError, match=words):
            case.run(NeverLaunches(), **options)
    for name, value, words in (
        ("D", 80, "expected"),
        ("window", -1, "window -1"),
    ):
        broken = Case("q4", 64, 4, 2, (5,), (1,))
        setattr(broken, name, value)
        with pytest.raises(KernelError, match=words):
            broken.run(NeverLaunches())
