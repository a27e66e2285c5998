"""The CPU's operations against their formulas in float64: what families multiply, normalise and cap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.batch import ForwardBatch
from exl.errors import UnsupportedModelError
from exl.layout.kv import KVLayout
from exl.layout.layers import linear_layout
from exl.layout.specs import LinearSpec, MatrixSpec, Target
from exl.layout.steps import StepLimits
from exl.ops.base import Branch, EmbedSpec, GatedMlp, Linear, LogitsSpec, Norm
from exl.ops.torch_ops import TorchOps
from exl.threads import Threads, using
from tests.model.batches import batch_of

T, C, INNER, V = 9, 40, 75, 52  # widths that torch's vectors do not divide
EPS = 1e-5
TOLERANCE = 4e-6  # f32 sums over up to 75 channels against f64, results of up to about 10
TARGET = Target("cpu")


@pytest.fixture
def rng():
    return np.random.default_rng(15)


@pytest.fixture
def ops():
    limits = StepLimits(
        max_rows=T,
        window_rows=T,
        max_logit_rows=T,
        max_context=64,
        hidden_size=C,
        qkv_width=3 * C,
        attn_width=C,
        intermediate_size=INNER,
        vocab_size=V,
        head_dim=C,
    )
    made = TorchOps(TARGET, KVLayout("f32", 1, 1, C), limits)
    made.stage([step(T)])
    return made


def step(num_rows: int) -> ForwardBatch:
    """Decode rows, one of each sequence; all want logits."""
    return batch_of([([7 * i % V], 0, [i]) for i in range(num_rows)], decode=True)


def random_linear(rng, K: int, N: int) -> tuple[Linear, np.ndarray]:
    """A dense linear, and W [K, N] as f64."""
    weight = (rng.standard_normal((N, K)) / K**0.5).astype(np.float32)
    layout = linear_layout(LinearSpec((MatrixSpec("m", K, N, 32, "f32"),)), TARGET)
    linear = Linear(layout, {"weight": torch.from_numpy(weight)})
    return linear, weight.T.astype(np.float64)


def random_norm(rng, width: int, kind: str = "rms") -> Norm:
    return Norm(torch.from_numpy((1 + 0.3 * rng.standard_normal(width)).astype(np.float32)), EPS, kind)


def random_rows(rng, num_rows: int, width: int) -> torch.Tensor:
    return torch.from_numpy((2 * rng.standard_normal((num_rows, width))).astype(np.float32))


def exact_norm(x: np.ndarray, norm: Norm | None) -> np.ndarray:
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * norm.weight.double().numpy()


def difference(found: torch.Tensor, exact: np.ndarray) -> float:
    return float(np.abs(found.double().numpy() - exact).max())


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "rms", "layer"])
def test_what_projections_read(ops, rng, kind):
    h, out = random_rows(rng, T, C) + 1.5, torch.empty(T, 3 * C)
    norm = None if kind is None else random_norm(rng, C, kind)
    linear, W = random_linear(rng, C, 3 * C)
    ops.project(h, norm, (linear,), out)
    assert difference(out, exact_norm(h.double().numpy(), norm) @ W) < TOLERANCE
    both, V = random_linear(rng, C, 2 * INNER)
    ops.gated_mlp(h, norm, (both,), GatedMlp(), mlp := torch.empty(T, INNER))
    gate, up = np.split(exact_norm(h.double().numpy(), norm) @ V, 2, axis=1)
    assert difference(mlp, silu(gate) * up) < 4 * TOLERANCE
    for i in range(T):  # a row's bits do not depend on the others
        alone = torch.empty(1, 3 * C)
        ops.stage([step(1)])
        ops.project(h[i : i + 1], norm, (linear,), alone)
        assert torch.equal(alone[0], out[i])


# --- the MLP ---------------------------------------------------------------------------------------------------------


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Hendrycks and Gimpel, Gaussian Error Linear Units (2016), the approximation by tanh."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("activation", [silu, gelu_tanh], ids=lambda f: f.__name__)
def test_the_gated_mlps_activations(ops, rng, activation):
    h, norm, out = random_rows(rng, T, C), random_norm(rng, C), torch.empty(T, INNER)
    linear, W = random_linear(rng, C, 2 * INNER)
    ops.gated_mlp(h, norm, (linear,), GatedMlp(activation.__name__), out)
    both = exact_norm(h.double().numpy(), norm) @ W
    assert difference(out, activation(both[:, :INNER]) * both[:, INNER:]) < TOLERANCE
    for i in range(T):  # a row's bits do not depend on the others
        alone = torch.empty(1, INNER)
        ops.stage([step(1)])
        ops.gated_mlp(h[i : i + 1], norm, (linear,), GatedMlp(activation.__name__), alone)
        assert torch.equal(alone[0], out[i])


MANY = (2, 3, 7, 8, 13, 16, 21, 33, 47, 64)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1500, 5632, 1000])
def test_a_decode_row_has_the_same_bits_in_any_number_of_rows(rng, width, threads):
    """Through everything besides attention, at widths that threads share in the middle of a row, and with rows that do
    not begin at multiples of 64 bytes."""
    vocab, channels = 1003, 37
    limits = StepLimits(64, 64, 64, 64, channels, 3 * channels, channels, width, vocab, channels, max_sequences=64)
    ops = TorchOps(TARGET, KVLayout("f32", 1, 1, channels), limits, Threads(threads))
    rows, norm, centred = random_rows(rng, 64, channels), *(random_norm(rng, channels, x) for x in ("rms", "layer"))
    both, down = (random_linear(rng, *size)[0] for size in ((channels, 2 * width), (width, channels)))
    head, qkv = (random_linear(rng, channels, N)[0] for N in (vocab, 3 * channels))

    def outputs(h: torch.Tensor) -> list[torch.Tensor]:
        T = len(h)
        ops.stage([batch_of([([7], 0, [i]) for i in range(T)], decode=True)])
        found = [torch.empty(T, 3 * channels)]
        ops.project(h, norm, (qkv,), found[0])
        for activation in ("silu", "gelu_tanh"):
            product = torch.empty(T, width)
            ops.gated_mlp(h, norm, (both,), GatedMlp(activation), product)
            found.append(product)
            for branch in (Branch(), Branch(0.22, norm), Branch(0.22, centred)):
                residual = h.clone()
                ops.add_projection(product, (down,), residual, branch)
                found.append(residual)
        for spec in (LogitsSpec(), LogitsSpec(30.0, 0.7)):
            found.append(ops.logits(h, norm, head, spec, torch.empty(T, vocab)))
        return found

    with using(threads):
        alone = [torch.cat(parts) for parts in zip(*(outputs(rows[i : i + 1]) for i in range(64)), strict=True)]
        for T in MANY:
            for which, (found, expected) in enumerate(zip(outputs(rows[:T]), alone, strict=True)):
                assert found.equal(expected[:T]), f"{T} rows, output {which}"


def test_an_activation_that_there_is_not_is_named(ops, rng):
    h, norm, out = random_rows(rng, T, C), random_norm(rng, C), torch.empty(T, INNER)
    linear, _ = random_linear(rng, C, 2 * INNER)
    with pytest.raises(UnsupportedModelError, match="found 'relu', expected silu or gelu_tanh"):
        ops.gated_mlp(h, norm, (linear,), GatedMlp("relu"), out)


# --- branches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "rms", "layer"])
@pytest.mark.parametrize("scale", [1.0, 0.22])
def test_a_branch_joins_the_residual(ops, rng, scale, kind):
    x, h = random_rows(rng, T, INNER), random_rows(rng, T, C)
    linear, W = random_linear(rng, INNER, C)
    norm = None if kind is None else random_norm(rng, C, kind)
    y, before = x.double().numpy() @ W, h.clone()
    ops.add_projection(x, (linear,), h, Branch(scale, norm))
    assert difference(h, before.double().numpy() + scale * exact_norm(y, norm)) < TOLERANCE
    for i in range(T):
        alone = before[i : i + 1].clone()
        ops.stage([step(1)])
        ops.add_projection(x[i : i + 1], (linear,), alone, Branch(scale, norm))
        assert torch.equal(alone[0], h[i])


# --- the ends of the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, C**0.5])
def test_rows_of_the_embedding_are_scaled(ops, rng, scale):
    linear, W = random_linear(rng, C, V)
    h = torch.full((T, C), torch.nan)
    ops.embed(linear, h, EmbedSpec(scale))
    assert difference(h, scale * W.T[step(T).token_ids]) <= 2.0**-24 * scale * np.abs(W).max()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_logits_are_scaled_and_then_capped(ops, rng, softcap, scale, kind):
    h, norm, out = random_rows(rng, T, C), random_norm(rng, C, kind), torch.full((T, V), torch.nan)
    linear, W = random_linear(rng, C, V)
    logits = ops.logits(h, norm, linear, LogitsSpec(softcap, scale), out)
    exact = scale * (exact_norm(h.double().numpy(), norm) @ W)
    if softcap is not None:
        exact = softcap * np.tanh(exact / softcap)
    assert difference(logits, exact) < TOLERANCE
