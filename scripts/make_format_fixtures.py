"""Writes tests/data/formats: tiny models as the libraries of their formats pack them, with the logits that follow from
the libraries' own dequantization. The test that reads them needs none of these libraries.

    python -m venv own && own/bin/pip install torch transformers compressed-tensors auto-round autoawq
    own/bin/python scripts/make_format_fixtures.py tests/data/formats
    PYTHONPATH=folder-of-compressed-tensors-0.16 own/bin/python scripts/make_format_fixtures.py tests/data/formats old

``old`` writes what compressed-tensors before 0.17.0 packs otherwise. AutoRound writes whole folders by itself; of the
other libraries the packers are called for each linear, with weights that lie on their grids.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

GROUP, IDS = 32, [1, 5, 9, 14, 3, 3, 8, 12, 2, 7, 11, 15]
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]  # tensors by the ends of their names; W [N, K] of any type


def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    made = transformers.LlamaForCausalLM(config).eval()
    for name, value in made.named_parameters():  # not ``made.bfloat16()``, which would round RoPE's frequencies, too
        value.data = (value.data * (1 if "norm" in name else 5)).bfloat16()
    return made


def linears(made: transformers.PreTrainedModel) -> dict[str, torch.nn.Linear]:
    return {
        name: module for name, module in made.named_modules() if isinstance(module, torch.nn.Linear) and "proj" in name
    }


def finish(folder: Path, dequantized: Mapping[str, torch.Tensor]) -> None:
    """Logits in f32 of the model whose linears have these weights, and the first rows of one of them."""
    made = model().float()
    for name, module in linears(made).items():
        module.weight.data = dequantized[name].float()
    with torch.no_grad():
        logits = made(torch.tensor([IDS]), use_cache=False).logits[0].contiguous()
    name = "model.layers.0.mlp.down_proj"
    expected = {"ids": torch.tensor(IDS), "logits": logits, f"{name}.weight": dequantized[name][:16].contiguous()}
    save_file(expected, folder / "expected.safetensors")


def write(folder: Path, quant: Mapping[str, Any], pack: Callable[[torch.Tensor], Packed]) -> None:
    """A folder whose linears ``pack`` has packed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = model()
    tensors = {
        name: value for name, value in made.state_dict().items() if "proj" not in name and name != "lm_head.weight"
    }
    dequantized = {}
    for name, module in linears(made).items():
        parts, dequantized[name] = pack(module.weight.data.float())
        tensors |= {f"{name}.{end}": part.contiguous() for end, part in parts.items() if part is not None}
    save_file(tensors, folder / "model.safetensors")
    values = made.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": dict(quant)}
    (folder / "config.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    finish(folder, dequantized)


# --- compressed-tensors --------------------------------------------------------------------------------------------


def compressed(root: Path, old: bool) -> None:
    import compressed_tensors
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def case(name: str, stated: str, weights: dict[str, Any], scale_type: torch.dtype) -> None:
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        library = BaseCompressor.get_value_from_registry(stated)

        def pack(weight: torch.Tensor) -> Packed:
            N, K = weight.shape
            strategy, args = weights["strategy"], scheme.weights
            if strategy == "block":
                rows, columns = weights["block_structure"]
                groups = weight.reshape(N // rows, rows, K // columns, columns).transpose(1, 2).flatten(2)
            else:
                groups = weight.reshape(1, -1) if strategy == "tensor" else weight
                groups = groups.reshape(N, K // GROUP, GROUP) if strategy == "group" else groups
            low, high = groups.amin(-1), groups.amax(-1)
            if strategy == "channel":
                low, high = low[:, None], high[:, None]
            scale, zero = calculate_qparams(low, high, args)
            parts = {"weight": weight, "weight_scale": scale.to(scale_type), "weight_zero_point": zero}
            stored = library.compress(parts, scheme)
            wide = {key: part.float() if key == "weight_scale" else part for key, part in stored.items()}
            return stored, library.decompress(wide, scheme)["weight"]

        quant = {
            "quant_method": "compressed-tensors",
            "format": stated,
            "version": compressed_tensors.__version__,
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        }
        write(root / name, quant, pack)

    group = {"type": "int", "strategy": "group", "group_size": GROUP}
    if old:
        case("compressed-tensors-0.16-w3", "pack-quantized", group | {"num_bits": 3, "symmetric": False}, torch.float16)
        return
    case("compressed-tensors-w4-sym", "pack-quantized", group | {"num_bits": 4, "symmetric": True}, torch.bfloat16)
    case("compressed-tensors-w4", "pack-quantized", group | {"num_bits": 4, "symmetric": False}, torch.bfloat16)
    case("compressed-tensors-w3", "pack-quantized", group | {"num_bits": 3, "symmetric": False}, torch.float16)
    channel = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    case("compressed-tensors-int8", "int-quantized", channel, torch.bfloat16)
    case("compressed-tensors-fp8", "float-quantized", channel | {"type": "float"}, torch.bfloat16)
    block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32], "symmetric": True}
    case("compressed-tensors-fp8-block", "float-quantized", block, torch.bfloat16)


# --- AutoAWQ -------------------------------------------------------------------------------------------------------


def awq(root: Path) -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.modules.linear.gemv_fast import WQLinear_GEMVFast

    def case(version: str, kind: Any) -> None:
        def pack(weight: torch.Tensor) -> Packed:
            N, K = weight.shape
            groups = weight.reshape(N, K // GROUP, GROUP)
            low, high = groups.amin(-1), groups.amax(-1)
            scales = ((high - low).clamp(min=1e-5) / 15).half().float()  # [N, G]
            zeros = (-(low / scales).round()).clamp(0, 15)
            codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
            on_grid = ((codes - zeros[..., None]) * scales[..., None]).reshape(N, K)
            linear = torch.nn.Linear(K, N, bias=False)
            linear.weight.data = on_grid
            shape = (lambda t: t.T.contiguous()) if version == "gemm" else (lambda t: t)
            packed = kind.from_linear(linear, 4, GROUP, scales=shape(scales), zeros=shape(zeros))
            return dict(packed.state_dict()), on_grid

        quant = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": version}
        write(root / f"autoawq-{version}", quant, pack)

    case("gemm", WQLinear_GEMM)
    case("gemv", WQLinear_GEMV)
    case("gemv_fast", WQLinear_GEMVFast)


# --- AutoRound -----------------------------------------------------------------------------------------------------


def auto_round(root: Path) -> None:
    from auto_round import AutoRound
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    class NoTokenizer:
        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            pass

    def dequantize(tensors: Mapping[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
        parts = {end: tensors[f"{name}.{end}"] for end in ("qweight", "qzeros", "scales")}
        if parts["qweight"].shape[0] == 64:  # AWQ's: [K, N / 8]
            return dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"].float(), bits, GROUP).T
        N = parts["qweight"].shape[1]
        library = qlinear_torch_zp if "zp" in folder.name else qlinear_torch
        linear = library.QuantLinear(bits, GROUP, 64, N, bias=False)
        for end, part in parts.items():
            setattr(linear, end, part.float() if end == "scales" else part)
        linear.post_init()
        return linear(torch.eye(64)).T

    for label, bits, sym, stated in (
        ("autoround-zp-sym", 4, True, "auto_round"),
        ("autoround-awq", 4, False, "auto_round:auto_awq"),
        ("autoround-v2", 2, False, "auto_round"),
        ("autoround-zp-gptq", 4, False, "auto_gptq"),
        ("autoround-awq-exported", 4, False, "auto_awq"),
    ):
        with tempfile.TemporaryDirectory() as out:
            made = AutoRound(
                model(), tokenizer=NoTokenizer(), bits=bits, group_size=GROUP, sym=sym, iters=0, disable_opt_rtn=True,
                device_map="cpu",
            )  # fmt: skip
            made.quantize_and_save(out, format=stated)
            (source,) = Path(out).rglob("config.json")
            folder = root / label
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / "config.json")
            tensors: dict[str, torch.Tensor] = {}
            for shard in source.parent.glob("*.safetensors"):
                tensors |= load_file(shard)
            save_file(tensors, folder / "model.safetensors")
        finish(folder, {name: dequantize(tensors, name, bits).detach() for name in linears(model())})


if __name__ == "__main__":
    target, only_old = Path(sys.argv[1]), "old" in sys.argv[2:]
    compressed(target, only_old)
    if not only_old:
        awq(target)
        auto_round(target)
