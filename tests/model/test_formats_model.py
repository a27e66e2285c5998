"""A model in each format that exl reads, to logits: those of transformers with weights dequantized one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from exl.engine.build import load_engine
from exl.errors import CheckpointError
from exl.formats.load import load_matrix
from exl.formats.matrix import DenseMatrix
from exl.kernels.tile_pack import pack_matrix
from exl.layout.specs import Target
from exl.planning.from_headers import open_model
from exl.planning.options import EngineOptions
from tests.model.cpu_targets import with_both
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import prefill_logits
from tests.reference.plain_formats import (
    borrowed_zeros,
    dequantize_fp8,
    pack_awq_fast,
    pack_awq_gemm,
    pack_awq_gemv,
    pack_compressed,
    pack_gptq_p,
)
from tests.reference.plain_packer import dequantize, pack_layer

TOLERANCE = 2e-4
HIDDEN, INTER, VOCAB, LAYERS = 64, 128, 96, 2
LINEARS = {
    "self_attn.q_proj": (HIDDEN, 64),
    "self_attn.k_proj": (HIDDEN, 32),
    "self_attn.v_proj": (HIDDEN, 32),
    "self_attn.o_proj": (64, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTER),
    "mlp.up_proj": (HIDDEN, INTER),
    "mlp.down_proj": (INTER, HIDDEN),
}
Layer = tuple[dict[str, Any], np.ndarray]  # a module's tensors by the ends of their names, W f64 [K, N]


class Codes:
    """Random codes, zeros and scales of one module, of 32 inputs a group."""

    def __init__(self, rng: np.random.Generator, K: int, N: int, bits: int = 4, *, sym: bool = False) -> None:
        middle = 2 ** (bits - 1)
        self.bits, self.K = bits, K
        self.codes = rng.integers(0, 2**bits, (K, N), dtype=np.uint8)
        self.zeros = np.full((K // 32, N), middle) if sym else rng.integers(middle - 1, middle + 2, (K // 32, N))
        self.zeros[0, 0] = middle if sym else 0
        self.scales = (rng.uniform(0.5, 1.5, self.zeros.shape) * 0.35 / 2**bits).astype(np.float16)
        self.g_idx = np.arange(K) // 32

    def layer(self, tensors: dict[str, Any]) -> Layer:
        return tensors, dequantize(self.codes, self.zeros, self.scales, self.g_idx)


def gptq(rng, K, N, bits=4) -> Layer:
    """As GPTQModel writes v1."""
    c = Codes(rng, K, N, bits)
    return c.layer(pack_layer(c.codes, c.zeros, c.scales, bits) | {"qzeros": borrowed_zeros(c.zeros, bits)})


def planes(rng, K, N) -> Layer:
    c = Codes(rng, K, N, 3)
    return c.layer(pack_gptq_p(c.codes, c.zeros, c.scales, 3))


def gemm(rng, K, N) -> Layer:
    c = Codes(rng, K, N)
    return c.layer(pack_awq_gemm(c.codes, c.zeros, c.scales))


def gemv(rng, K, N) -> Layer:
    c = Codes(rng, K, N)
    return c.layer(pack_awq_gemv(c.codes, c.zeros, c.scales, 4))


def gemv_fast(rng, K, N) -> Layer:
    c = Codes(rng, K, N)
    return c.layer(pack_awq_fast(c.codes, c.zeros, c.scales, 4))


def v2(rng, K, N) -> Layer:
    c = Codes(rng, K, N)
    return c.layer(pack_layer(c.codes, c.zeros, c.scales, 4, "gptq_v2"))


def packed(rng, K, N, sym=True, bits=4, order=False, dense=True) -> Layer:
    c = Codes(rng, K, N, bits, sym=sym)
    if order:
        c.g_idx = rng.permutation(c.g_idx)
    scales = torch.from_numpy(c.scales).bfloat16()
    c.scales = scales.double().numpy()
    g_idx = c.g_idx if order else None
    tensors = pack_compressed(c.codes, None if sym else c.zeros, c.scales, bits, dense=dense, g_idx=g_idx)
    return c.layer(tensors | {"weight_scale": scales.T.contiguous()})


def int8(rng, K, N) -> Layer:
    weight = rng.integers(-128, 128, (N, K), dtype=np.int8)
    scales = rng.uniform(0.5, 1.5, (N, 1)).astype(np.float16) * np.float16(0.35 / 256)
    return {"weight": weight, "weight_scale": scales}, (weight * scales.astype(np.float64)).T


def fp8(rng, K, N, rows=16, columns=32, ending="weight_scale_inv") -> Layer:
    raw = torch.from_numpy(rng.normal(0, 1, (N, K)).astype(np.float32)).to(torch.float8_e4m3fn)
    rows, columns = min(rows, N), min(columns, K)
    scales = torch.from_numpy(rng.uniform(0.05, 0.15, (-(-N // rows), -(-K // columns))).astype(np.float32)).bfloat16()
    weight = dequantize_fp8(raw.view(torch.uint8).numpy(), scales.double().numpy(), rows, columns)
    return {"weight": raw, ending: scales}, weight.T


def _compressed(weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    own = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True} | weights} | group
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": own}, "ignore": ["lm_head"]}


_GROUPS = {"strategy": "group", "group_size": 32}
_SIZES = {"bits": 4, "group_size": 32}
_MODEL = {"meta": {"quantizer": ["gptqmodel:5.0.0"]}}
_AWQ = {"quant_method": "awq", "zero_point": True} | _SIZES
_ROUND = {"quant_method": "auto-round", "sym": False, "data_type": "int"} | _SIZES
CASES: dict[str, tuple[dict[str, Any], Callable[..., Layer]]] = {
    "gptq": ({"quant_method": "gptq", "sym": False} | _SIZES | _MODEL, gptq),
    "gptq_p": ({"quant_method": "gptq", "sym": False, "bits": 3, "group_size": 32, "format": "gptq_p"}, planes),
    "awq gemm": (_AWQ | {"version": "gemm"}, gemm),
    "awq gemv": (_AWQ | {"version": "gemv"}, gemv),
    "awq gemv_fast": (_AWQ | {"version": "gemv_fast"}, gemv_fast),
    "auto-round gptq": (_ROUND | {"packing_format": "auto_round:auto_gptq"}, gptq),
    "auto-round": (_ROUND | {"packing_format": "auto_round"}, v2),
    "auto-round awq": (_ROUND | {"packing_format": "auto_round:auto_awq"}, gemm),
    "packed": (_compressed(_GROUPS) | {"format": "pack-quantized"}, packed),
    "packed asymmetric": (_compressed(_GROUPS | {"symmetric": False}), lambda *a: packed(*a, sym=False)),
    "packed by group": (_compressed(_GROUPS | {"actorder": "group"}), lambda *a: packed(*a, order=True)),
    "packed 3 bits": (_compressed(_GROUPS | {"num_bits": 3}), lambda *a: packed(*a, bits=3)),
    "packed 3 bits, padded": (_compressed(_GROUPS | {"num_bits": 3}), lambda *a: packed(*a, bits=3, dense=False)),
    "int8": (_compressed({"num_bits": 8, "strategy": "channel"}) | {"format": "int-quantized"}, int8),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, fp8),
    "fp8 channels": (
        _compressed({"num_bits": 8, "type": "float", "strategy": "channel"}) | {"format": "float-quantized"},
        lambda *a: fp8(*a, rows=1, columns=1 << 20, ending="weight_scale"),
    ),
}


def make(
    folder: Path, quant: dict[str, Any], layer: Callable[..., Layer], more: Mapping[str, Layer] = MappingProxyType({})
) -> transformers.PreTrainedModel:
    """Writes a random model whose linears are ``layer``'s; returns transformers' twin. ``more``: other modules."""
    rng = np.random.default_rng(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    tensors, state = {}, {}
    for name, value in model.state_dict().items():
        noise = rng.uniform(0.5, 1.5, value.shape) if "norm" in name else rng.normal(0, 0.5, value.shape)
        tensors[name] = state[name] = torch.from_numpy(noise.astype(np.float32))
    modules = {f"model.layers.{i}.{name}": layer(rng, *shape) for i in range(LAYERS) for name, shape in LINEARS.items()}
    for name, (parts, weight) in (modules | dict(more)).items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{end}": _tensor(part) for end, part in parts.items()}
        weight = weight if name == "model.embed_tokens" else weight.T
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    model.load_state_dict(state)
    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": quant}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return model


def _tensor(part: Any) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(part))


def _engine(folder: Path, cpu: Target, **options: Any):
    if cpu.compiled:
        options["arithmetic"] = "f32"
    return load_engine(folder, EngineOptions(kv_cache="f32", context=128, **options), cpu=cpu)


@with_both
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_model(case, cpu, tmp_path):
    model = make(tmp_path, *CASES[case])
    ids = some_ids(70)
    expected = prefill_logits(model, ids)
    assert expected.std() > 0.5
    assert (all_logits(_engine(tmp_path, cpu), ids) - expected).abs().max() <= TOLERANCE


@with_both
@pytest.mark.parametrize("head", ["file", "8"])
def test_a_quantized_embedding_and_a_head_with_bits_of_its_own(head, cpu, tmp_path):
    """Tokens are inputs of the embedding's matrix: groups of 32 tokens. ``head`` 8 leaves a quantized head alone."""
    rng = np.random.default_rng(8)
    quant = CASES["gptq"][0] | {"lm_head": True, "dynamic": {"lm_head": {"bits": 8}, "model.embed.*": {"bits": 2}}}
    more = {"model.embed_tokens": gptq(rng, VOCAB, HIDDEN, 2), "lm_head": gptq(rng, HIDDEN, VOCAB, 8)}
    model = make(tmp_path, quant, gptq, more)
    ids = some_ids(70)
    engine = _engine(tmp_path, cpu, head="file" if head == "file" else 8)
    assert (all_logits(engine, ids) - prefill_logits(model, ids)).abs().max() <= TOLERANCE


def test_a_tensor_that_belongs_to_another_format_is_unexpected(tmp_path):
    quant, layer = CASES["gptq"]

    def with_extra(rng, K, N) -> Layer:
        tensors, weight = layer(rng, K, N)
        return tensors | {"weight_shape": np.array([N, K])}, weight

    make(tmp_path, quant, with_extra)
    with pytest.raises(CheckpointError, match=r"14 tensors that a llama model .* does not have: .*weight_shape"):
        load_engine(tmp_path, EngineOptions(context=128))


@pytest.mark.parametrize("case", CASES)
def test_a_gpus_tiles_hold_the_same_codes(case, tmp_path):
    """The packer takes words where a format has them as GPTQ does, else codes: tiles are the same."""
    make(tmp_path, *CASES[case])
    with open_model(tmp_path) as files:
        for name in LINEARS:
            matrix = load_matrix(files.checkpoint, f"model.layers.0.{name}", files.quant)
            if isinstance(matrix, DenseMatrix):
                continue
            tiles, plain = (pack_matrix([m]) for m in (matrix, replace(matrix, read_words=None)))
            np.testing.assert_array_equal(tiles.codes, plain.codes)
            np.testing.assert_array_equal(tiles.qparams, plain.qparams)
