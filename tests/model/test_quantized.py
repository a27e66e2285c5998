"""GPTQ checkpoints through the whole model, against transformers on weights dequantized one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from exl.engine.build import load_engine
from exl.layout.specs import Target
from exl.ops.cpu_target import COMPILED, torch_target
from exl.ops.torch_linear import probe_int4pack
from exl.planning.options import EngineOptions
from tests.model.cpu_targets import needs_kernels, with_both
from tests.model.cuda_engines import all_logits, some_ids, step_logits
from tests.model.hf_models import decode_logits, prefill_logits
from tests.reference.plain_packer import dequantize, pack_layer

TOLERANCE = 2e-4
LAYERS = 2
LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 96),
    "mlp.up_proj": (64, 96),
    "mlp.down_proj": (96, 64),
}
SHARED_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def _config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )


def make(
    folder: Path,
    bits: int,
    group_size: int,
    *,
    checkpoint_format: str = "gptq",
    sym: bool = False,
    order: str = "none",
    std: float = 0.1,
    dynamic: dict | None = None,
    scales_as: torch.dtype = torch.float16,
) -> transformers.PreTrainedModel:
    """Writes a random quantized model; returns transformers' twin. ``order``: "none", "shared" by the linears that
    read the same input, as GPTQ makes it, or "own" per linear, so that none can be fused."""
    rng = np.random.default_rng(bits * 100 + abs(group_size))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(_config()).float().eval()
    state = {}
    tensors = {}
    for name, value in model.state_dict().items():
        noise = rng.uniform(0.5, 1.5, value.shape) if "norm" in name else rng.normal(0, 0.5, value.shape)
        state[name] = torch.from_numpy(noise.astype(np.float32))
        if "_proj" not in name:
            tensors[name] = torch.from_numpy(noise.astype(np.float32))
    for layer in range(LAYERS):
        shared = rng.permutation(64)
        for module, (K, N) in LINEARS.items():
            name = f"model.layers.{layer}.{module}"
            this_bits = bits if dynamic is None or module != "mlp.down_proj" else 8
            group = K if group_size == -1 else group_size
            codes = rng.integers(0, 2**this_bits, (K, N), dtype=np.uint8)
            middle = 2 ** (this_bits - 1)
            G = -(-K // group)
            zeros = np.full((G, N), middle) if sym else rng.integers(middle - 1, middle + 2, (G, N))
            scales = torch.from_numpy(rng.uniform(0.5, 1.5, zeros.shape) * std * 12**0.5 / 2**this_bits).to(scales_as)
            g_idx = np.arange(K) // group
            if order != "none":
                rows = shared if order == "shared" and module in SHARED_INPUT else rng.permutation(K)
                g_idx[rows] = np.arange(K) // group
            packed = pack_layer(codes, zeros, scales.double().numpy(), this_bits, checkpoint_format, g_idx.tolist())
            tensors |= {f"{name}.{ending}": torch.from_numpy(tensor) for ending, tensor in packed.items()}
            tensors[f"{name}.scales"] = scales
            weight = dequantize(codes, zeros, scales.double().numpy(), g_idx.tolist())
            state[f"{name}.weight"] = torch.from_numpy(weight.T.astype(np.float32))
    model.load_state_dict(state)
    quant = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": order != "none"}
    quant |= {"checkpoint_format": checkpoint_format} | ({"dynamic": dynamic} if dynamic else {})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": quant}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return model


def _engine(folder: Path, cpu: Target, arithmetic: str | None = None):
    """``arithmetic`` of exl's own kernels; torch has one, which is f32 but for 4-bit decode rows."""
    options = {"arithmetic": arithmetic} if cpu.compiled else {}
    return load_engine(folder, EngineOptions(kv_cache="f32", context=128, **options), cpu=cpu)


CASES = [
    *[(bits, group, {}) for bits in (2, 3, 4, 8) for group in (32, -1)],
    *[(bits, 32, {"checkpoint_format": "gptq_v2", "sym": True}) for bits in (2, 3, 4, 8)],
    *[(bits, 32, {"order": "shared"}) for bits in (3, 4, 8)],
    (4, 32, {"order": "own", "sym": True}),
    (4, 16, {}),
    (4, 32, {"dynamic": {"+:.*down_proj": {"bits": 8}}}),
    *[(4, 64, {"scales_as": scales_as, "order": "shared"}) for scales_as in (torch.bfloat16, torch.float32)],
    (3, 64, {}),  # down_proj has 96 inputs: a shorter last group
]


@with_both
@pytest.mark.parametrize(("bits", "group_size", "options"), CASES, ids=str)
def test_f32_path_equals_transformers(bits, group_size, options, cpu, tmp_path):
    model = make(tmp_path, bits, group_size, **options)
    engine = _engine(tmp_path, cpu, "f32")
    ids = some_ids(70)
    assert (all_logits(engine, ids) - prefill_logits(model, ids)).abs().max() <= TOLERANCE


@with_both
@pytest.mark.parametrize(("bits", "options"), [(2, {}), (3, {"order": "shared"}), (8, {})], ids=str)
def test_decode_rows_of_other_widths_are_f32_too(bits, options, cpu, tmp_path):
    model = make(tmp_path, bits, 32, **options)
    ids = some_ids(40)
    expected = torch.cat([decode_logits(model, ids, 1)])
    assert (step_logits(_engine(tmp_path, cpu, "f32"), ids) - expected).abs().max() <= TOLERANCE


@needs_kernels
@pytest.mark.parametrize(("arithmetic", "levels"), [("int16", 32512), ("int8", 127)])
@pytest.mark.parametrize(("bits", "group_size", "options"), CASES, ids=str)
def test_quantized_activations_stay_within_their_roundings(bits, group_size, options, arithmetic, levels, tmp_path):
    """An activation is rounded by at most half a step, which is max|x| / levels of a run of 32 to 128 inputs: rms
    max|x| / (sqrt(12) levels), and max|x| is about 2.5 rms of x there, so 0.72 / levels of x. Integer sums add nothing,
    and the inputs' errors are independent, so a linear's outputs are off by that share of their rms. 4 L = 8 linears
    that add to the residual stream, each as large as the stream: sqrt(8) * 0.72 = 2 of 1 / levels. 2-bit codes lie half
    a step off centre: outputs have a large part in common, scores grow with it, and up to 2.5 were measured. A largest
    of 4,000 errors is 4 times the rms where errors are normal; tokens whose attention is split between others have
    larger ones, 13 times the rms was measured."""
    model = make(tmp_path, bits, group_size, std=0.05, **options)
    ids = some_ids(40)
    expected = prefill_logits(model, ids)
    error = (all_logits(_engine(tmp_path, COMPILED, arithmetic), ids) - expected) / expected.square().mean().sqrt()
    most = (4 if bits == 2 else 2) / levels
    assert 0.1 / levels < error.square().mean().sqrt() <= most
    assert error.abs().max() <= 13 * most


@with_both
def test_orders_fuse_only_where_they_agree(cpu, tmp_path):
    make(tmp_path / "shared", 4, 32, order="shared")
    make(tmp_path / "own", 4, 32, order="own")
    shared, own = (_engine(tmp_path / name, cpu).generator.runner.weights.acquire(0) for name in ("shared", "own"))
    assert [len(shared["qkv"]), len(shared["gate_up"])] == [1, 1]
    assert [len(own["qkv"]), len(own["gate_up"])] == [3, 2]


@pytest.mark.skipif(probe_int4pack() is None, reason="this torch has no int4pack kernel")
@pytest.mark.parametrize("options", [{"sym": True}, {}, {"order": "shared"}], ids=str)
def test_bf16_decode_stays_within_its_roundings(options, tmp_path):
    """A linear rounds its input, its scales, its offsets (8 - z) s and its output to bf16. Each relative error is
    uniform in +-2^-9 .. +-2^-8, so its rms is at most 2^-8 / sqrt(3) = 0.0023; four independent ones give 0.0045 of an
    output's rms. The offsets' error is no larger: |8 - z| <= 1 steps here, against codes of 4.6 steps rms. The
    4 L = 8 linears add independent errors to the residual stream: sqrt(8) * 0.0045 = 0.013 of its rms if each branch
    were as large as the stream; weights of std 0.05 keep branches smaller, and the norms keep that ratio. So the
    logits' rms error is at most 0.013 of their rms; four times that bounds the largest of 4,000.
    """
    model = make(tmp_path, 4, 32, std=0.05, **options)
    engine = _engine(tmp_path, torch_target())
    layer = engine.generator.runner.weights.acquire(0)
    assert all(
        part.layout.kind == "int4pack" for part in (*layer["qkv"], *layer["o"], *layer["gate_up"], *layer["down"])
    )
    ids = some_ids(40)
    expected = decode_logits(model, ids, 1)
    error = step_logits(engine, ids) - expected
    rms = expected.square().mean().sqrt()
    assert 1e-4 < error.square().mean().sqrt() / rms <= 0.013
    assert error.abs().max() / rms <= 4 * 0.013
