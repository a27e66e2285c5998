"""Quantizations that exl does not read: how they give themselves away, and what to take instead."""

from __future__ import annotations

from collections.abc import Mapping

from exl.checkpoint.header import shown
from exl.errors import UnsupportedModelError

READ = "GPTQ, AWQ, AutoRound, compressed-tensors and FP8"
TAKE_INSTEAD = f"take a folder of the same model in one of {READ}, or the original for `exl quantize`"

# By quant_method or method: its name.
METHODS: Mapping[str, str] = {
    "bitsandbytes": "bitsandbytes (nf4, fp4, int8)",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "hqq": "HQQ",
    "gguf": "GGUF",
    "aqlm": "AQLM",
    "quip": "QuIP#",
    "quip#": "QuIP#",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "torchao": "torchao",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "bitnet": "BitNet",
    "fbgemm_fp8": "FBGEMM FP8",
    "modelopt": "NVIDIA ModelOpt (FP8, NVFP4)",
    "modelopt_fp4": "NVIDIA ModelOpt (NVFP4)",
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4, which is read in gpt-oss alone",
    "fp_quant": "FP-Quant",
    "quark": "AMD Quark",
    "marlin": "Marlin",
    "qqq": "QQQ",
    "paroquant": "ParoQuant",
    "bitblas": "BitBLAS",
    "sinq": "SINQ",
}

# By the end of a tensor's name in a module, whatever the configuration says.
TENSORS: Mapping[str, str] = {
    "B": "Marlin",
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "W_q": "HQQ",
    "weight.absmax": "bitsandbytes",
    "SCB": "bitsandbytes 8-bit",
    "codebooks": "AQLM",
    "Qidxs": "QuIP#",
    "weight_global_scale": "NVFP4",
    **dict.fromkeys(("lora_A.weight", "lora_A.default.weight"), "a LoRA adapter (peft)"),
    **dict.fromkeys(("base_layer.weight", "base_layer.qweight"), "a model whose LoRA adapter is not merged (peft)"),
}


def refuse_method(method: str, where: str) -> UnsupportedModelError:
    """``where``: file and key."""
    name = METHODS.get(method)
    what = f", which is {name}" if name is not None and name.lower() != method else ""
    return UnsupportedModelError(f"{where}: found {shown(method)}{what}; exl reads {READ}: {TAKE_INSTEAD}")
