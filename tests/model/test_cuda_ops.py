"""What families ask of a GPU's operations, one by one on the host shim, against float64: activations, branches, norms,
logits. Each feature, taken out, would be seen: every test compares with the plain operation, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.errors import KernelError, UnsupportedModelError
from exl.ops.base import Branch, GatedMlp, LogitsSpec, Norm
from tests.host.backends import make_backend
from tests.host.recording import RecordingBackend
from tests.model.batches import batch_of
from tests.model.cuda_ops import HIDDEN, INNER, QKV_WIDTH, VOCAB, WIDTH, Bench, Matrix, Packed, f64
from tests.reference.linear_twin import ACTIVATIONS, layer_norm, rms_norm

EPS = 1e-5
EXACT = {"rms": rms_norm, "layer": layer_norm}
HALF = 2.0**-11  # f16's rounding
MODES = [("plain", 61), ("plain", 75), ("race", 86), ("asan", 86), ("plain", 90)]  # without tensor cores; dependent
ORDERS = (None, "own")


@pytest.fixture(params=MODES, ids=lambda mode: f"{mode[0]}-{mode[1]}")
def backend(request):
    return make_backend(*request.param)


def decode_batch(count: int):
    return batch_of([([7 * i % VOCAB], 0, [i]) for i in range(count)], decode=True)


def read(x: torch.Tensor, norm: Norm | None) -> np.ndarray:
    """What a linear reads."""
    return f64(x) if norm is None else EXACT[norm.kind](f64(x), f64(norm.weight), norm.eps)


def slack(x: np.ndarray, weight: np.ndarray, own: float = HALF) -> np.ndarray:
    """Largest error of x W whose inputs are rounded to f16 and whose sums are rounded by ``own``."""
    return 1.05 * HALF * (np.abs(x) @ np.abs(weight)) + own * np.abs(x @ weight) + 2.0**-24


def assert_within(found: torch.Tensor, expected: np.ndarray, limit: np.ndarray, plain: np.ndarray) -> None:
    """Within ``limit`` of the float64 result; the operation without its feature would be far outside of it."""
    assert found.shape == expected.shape
    difference = np.abs(f64(found) - expected)
    assert (difference <= limit).all(), (difference / limit).max()
    assert (np.abs(plain - expected) > 20 * limit).mean() > 0.5


# ---- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [None, "layer"])
def test_projections_read_through_any_norm(backend, kind, order):
    """Through LayerNorm, and without a norm; q, k and v in one launch and, of other widths, in three."""
    bench = Bench(backend)
    norm = None if kind is None else Norm(bench.uniform(HIDDEN), EPS, kind)
    h = bench.residual(decode_batch(10))
    plain = read(h, Norm(torch.ones(HIDDEN) if norm is None else norm.weight.cpu(), EPS))
    for bits in ((4, 4, 4), (4, 8, 4)):
        parts = [(name, QKV_WIDTH // 3, Matrix(b, order)) for name, b in zip("qkv", bits, strict=True)]
        packed = bench.pack(HIDDEN, *parts)
        out = bench.ops.buffer("qkv")[:10]
        bench.ops.project(h, norm, packed.segments, out)
        x = read(h, norm)
        assert_within(out, x @ packed.weight, slack(x, packed.weight), plain @ packed.weight)
        for i in (0, 9):  # a row's bits do not depend on the others
            alone = torch.zeros_like(out[:1])
            bench.ops.stage([decode_batch(1)])
            bench.ops.project(h[i : i + 1], norm, packed.segments, alone)
            assert torch.equal(alone[0], out[i])
            bench.ops.stage([decode_batch(10)])


@pytest.mark.parametrize("kind", [None, "rms", "layer"])
def test_the_largest_values_of_the_residual_are_read_as_f16s_largest(kind):
    bench = Bench(make_backend("plain", 86))
    h = bench.residual(decode_batch(2))
    h[0, 3] = 1e6
    norm = None if kind is None else Norm(1e5 * torch.ones(HIDDEN), EPS, kind)
    packed, out = bench.pack(HIDDEN, ("o", HIDDEN, Matrix())), torch.zeros(2, HIDDEN)
    if kind == "rms":
        bench.ops.add_projection(torch.zeros(2, WIDTH).half(), bench.pack(WIDTH, ("o", HIDDEN, Matrix())).segments, h)
    bench.ops.project(h, norm, packed.segments, out)
    x = np.clip(read(h, norm), -65504, 65504)
    assert (np.abs(f64(out) - x @ packed.weight) <= slack(x, packed.weight) + 64).all()


def test_panels_read_through_any_norm():
    """More rows than decode, on a GPU without tensor cores, where panels begin at 32 rows."""
    bench = Bench(make_backend("plain", 61), rows=40, post_norms=True)
    batch = batch_of([([7 * i % VOCAB for i in range(40)], 0, [0])])
    h = bench.residual(batch)
    packed, back = bench.pack(HIDDEN, ("q", QKV_WIDTH, Matrix())), bench.pack(INNER, ("d", HIDDEN, Matrix()))
    pair = bench.pack(HIDDEN, ("gate", INNER, Matrix()), ("up", INNER, Matrix()), gated=True)
    out, mlp = bench.ops.buffer("qkv")[:40], bench.ops.buffer("mlp")[:40]
    for norm in (None, Norm(bench.uniform(HIDDEN), EPS, "layer")):
        bench.ops.project(h, norm, packed.segments, out)
        x = read(h, norm)
        assert (np.abs(f64(out) - x @ packed.weight) <= 2 * slack(x, packed.weight)).all()  # weights are rounded, too
    bench.ops.gated_mlp(h, norm, pair.segments, GatedMlp("gelu_tanh"), mlp, back.segments)
    both = read(h, norm) @ pair.weight
    expected = ACTIVATIONS["gelu_tanh"](both[:, :INNER]) * both[:, INNER:]
    np.testing.assert_allclose(f64(mlp), expected, rtol=0.02, atol=0.004 * np.abs(expected).max())
    before, post = f64(h), Norm(bench.uniform(HIDDEN), EPS)
    bench.ops.add_projection(mlp, back.segments, h, Branch(0.5, post))
    y = EXACT["rms"](f64(mlp) @ back.weight, f64(post.weight), EPS)
    np.testing.assert_allclose(f64(h), before + 0.5 * y, atol=0.002 * np.abs(y).max())


# ---- the MLP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_gated_mlp(backend, activation, order):
    """gate and up in one launch, and in two; their outputs in the order that ``down`` wants."""
    bench = Bench(backend)
    norm, h = Norm(bench.uniform(HIDDEN), EPS), bench.residual(decode_batch(10))
    down = bench.pack(INNER, ("down", HIDDEN, Matrix(4, order)))
    place = down.segments[0].fields.get("channel_map")
    for bits in ((4, 4), (4, 8)):
        parts = [(name, INNER, Matrix(b)) for name, b in zip(("gate", "up"), bits, strict=True)]
        packed = bench.pack(HIDDEN, *parts, gated=True, consumer=down)
        assert len(packed.segments) == len(set(bits))
        out = bench.ops.buffer("mlp")[:10]
        bench.ops.gated_mlp(h, norm, packed.segments, GatedMlp(activation), out, down.segments)
        found = out if place is None else out[:, place.long()]
        x = read(h, norm)
        gate, up = np.split(x @ packed.weight, 2, axis=1)
        off = slack(x, packed.weight, HALF if len(set(bits)) > 1 else 0.0)
        expected = ACTIVATIONS[activation](gate) * up
        limit = 1.13 * off[:, :INNER] * (np.abs(up) + off[:, INNER:]) + off[:, INNER:] * np.abs(gate)
        limit += (HALF + 2.0**-18) * np.abs(expected)
        difference = np.abs(f64(found) - expected)
        assert (difference <= limit).all(), (difference / limit).max()
        (other,) = set(ACTIVATIONS) - {activation}
        assert np.abs(ACTIVATIONS[other](gate) * up - expected).max() > 20 * limit.max()


def test_an_activation_that_there_is_not_is_named():
    bench = Bench(make_backend("plain", 86))
    packed = bench.pack(HIDDEN, ("gate", INNER, Matrix()), ("up", INNER, Matrix()), gated=True)
    h, norm = bench.residual(decode_batch(2)), Norm(bench.uniform(HIDDEN), EPS)
    with pytest.raises(UnsupportedModelError, match="found 'relu', expected silu or gelu_tanh"):
        bench.ops.gated_mlp(h, norm, packed.segments, GatedMlp("relu"), bench.ops.buffer("mlp")[:2])


# ---- branches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_normalised_branch_joins_the_residual(backend, bits, kind):
    """Its sums of squares are those that the next norm on the way reads."""
    if bits == 16 and backend.arch < 75:
        pytest.skip("dense layers need tensor cores")
    bench = Bench(backend, post_norms=True)
    h, x = bench.residual(decode_batch(10)), bench.normal(10, WIDTH).half()
    before, post = f64(h), Norm(bench.uniform(HIDDEN), EPS, kind)
    packed, after = bench.pack(WIDTH, ("o", HIDDEN, Matrix(bits))), bench.pack(HIDDEN, ("q", QKV_WIDTH, Matrix()))
    bench.ops.add_projection(x, packed.segments, h, Branch(0.3, post))
    y = f64(x) @ packed.weight
    normed = 0.3 * EXACT[kind](y, f64(post.weight), EPS)
    # x and W are exact: f32 sums of y, then the norm.
    assert_within(h, before + normed, 2.0**-18 * (1 + np.abs(before) + np.abs(normed)), before + 0.3 * y)
    norm, out = Norm(bench.uniform(HIDDEN), EPS), bench.ops.buffer("qkv")[:10]
    bench.ops.project(h, norm, after.segments, out)
    read_again = read(h, norm)
    assert (np.abs(f64(out) - read_again @ after.weight) <= slack(read_again, after.weight)).all()


def test_a_norm_of_a_branch_needs_a_buffer_that_was_planned():
    bench = Bench(make_backend("plain", 86))
    assert "branch" not in bench.arena.fields
    packed, h = bench.pack(WIDTH, ("o", HIDDEN, Matrix())), bench.residual(decode_batch(2))
    branch = Branch(1.0, Norm(bench.uniform(HIDDEN), EPS))
    with pytest.raises(KernelError, match="the buffers of a step are made for none"):
        bench.ops.add_projection(torch.zeros(2, WIDTH).half(), packed.segments, h, branch)
    planned = Bench(make_backend("plain", 86), post_norms=True).arena
    assert planned.num_bytes - bench.arena.num_bytes == planned.fields["branch"].num_bytes == 12 * HIDDEN * 4


# ---- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("spec", [LogitsSpec(), LogitsSpec(3.0, 0.5), LogitsSpec(None, 0.25)], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_logits(backend, kind, spec, bits):
    bench = Bench(backend)
    norm, h = Norm(bench.uniform(HIDDEN), EPS, kind), bench.residual(decode_batch(10))
    head = bench.pack(HIDDEN, ("head", VOCAB, Matrix(bits)))
    out = torch.full((12, VOCAB), float("nan"), device=backend.device)
    found = bench.ops.logits(h, norm, head.segments[0], spec, out)
    x = read(h, norm)
    exact = spec.scale * (x @ head.weight)
    limit = spec.scale * slack(x, head.weight, 0.0) + 2.0**-20 * (spec.softcap or 0)
    if spec.softcap is not None:
        exact = spec.softcap * np.tanh(exact / spec.softcap)
    assert found.data_ptr() == out.data_ptr()
    assert out[10:].isnan().all()
    other = read(h, Norm(norm.weight, EPS, "rms" if kind == "layer" else "layer"))
    assert_within(found, exact, limit, other @ head.weight)


# ---- how much is launched -------------------------------------------------------------------------------------------


def test_a_launch_more_only_where_a_feature_needs_it():
    recorder = RecordingBackend(make_backend("plain", 90))
    bench = Bench(recorder, post_norms=True)
    h, qkv, mlp = bench.residual(decode_batch(2)), bench.ops.buffer("qkv")[:2], bench.ops.buffer("mlp")[:2]
    x, logits = torch.zeros(2, WIDTH).half(), torch.zeros(2, VOCAB)
    w, head = bench.uniform(HIDDEN), bench.pack(HIDDEN, ("head", VOCAB, Matrix(16)))
    q, o = bench.pack(HIDDEN, ("q", QKV_WIDTH, Matrix())), bench.pack(WIDTH, ("o", HIDDEN, Matrix()))
    ordered = bench.pack(HIDDEN, ("q", QKV_WIDTH, Matrix(4, "own")))
    pair = bench.pack(HIDDEN, ("gate", INNER, Matrix()), ("up", INNER, Matrix()), gated=True)
    rms, layer, ops = Norm(w, EPS), Norm(w, EPS, "layer"), bench.ops

    def project(norm: Norm | None, packed: Packed) -> list[str]:
        return launched(lambda: ops.project(h, norm, packed.segments, qkv))

    def launched(work) -> list[str]:
        recorder.launches.clear()
        work()
        assert all(one.dependent for one in recorder.launches)
        return [one.entry for one in recorder.launches]

    assert project(rms, q) == ["linear_q"]
    assert project(rms, ordered) == ["rms_norm", "linear_q"]
    for norm in (None, layer):
        assert project(norm, q) == project(norm, ordered) == ["row_norm", "linear_q"]
    for activation in ACTIVATIONS:
        assert launched(lambda a=activation: ops.gated_mlp(h, rms, pair.segments, GatedMlp(a), mlp)) == ["linear_q"]
    assert launched(lambda: ops.add_projection(x, o.segments, h, Branch(0.5))) == ["linear_q"]
    assert launched(lambda: ops.add_projection(x, o.segments, h, Branch(1.0, rms))) == ["linear_q", "norm_add"]
    for spec, more in (
        (LogitsSpec(), []),
        (LogitsSpec(30.0), ["scale_logits"]),
        (LogitsSpec(None, 2.0), ["scale_logits"]),
    ):
        assert launched(lambda s=spec: ops.logits(h, rms, head.segments[0], s, logits)) == ["linear_dense", *more]
