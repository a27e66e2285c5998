"""LoRA adapters written by hand in peft's format, and what a model is with one merged into its weights: from peft's
documentation, apart from exl's code."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass
class Adapter:
    """``tensors``: by module, (A [r, K], B [N, r]), in f32; ``scales``: by module."""

    config: dict[str, Any]
    tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scales: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        named = {}
        for module, (a, b) in self.tensors.items():
            named[f"base_model.model.{module}.lora_A.weight"] = a.to(dtype).contiguous()
            named[f"base_model.model.{module}.lora_B.weight"] = b.to(dtype).contiguous()
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    def merged(self, model: torch.nn.Module) -> torch.nn.Module:
        """A copy of the model whose weights are W + scale * B A, summed in f64 and rounded once."""
        model = copy.deepcopy(model)
        with torch.no_grad():
            for name, (a, b) in self.tensors.items():
                weight = model.get_submodule(name).weight
                weight.copy_(weight.double() + self.scales[name] * (b.double() @ a.double()))
        return model


def make(
    model: torch.nn.Module,
    targets: list[str],
    *,
    r: int = 4,
    alpha: float = 8.0,
    seed: int = 1,
    size: float = 0.3,
    ranks: dict[str, int] | None = None,
    alphas: dict[str, float] | None = None,
    rslora: bool = False,
    layers: list[int] | None = None,
) -> Adapter:
    """Random A and B for all linears of the model whose names end with one of ``targets``. ``size``: of what it adds,
    of the weight's own standard deviation."""
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "target_modules": targets},
        **{"bias": "none", "base_model_name_or_path": "some/base", "use_rslora": rslora, "lora_dropout": 0.1},
        **{"rank_pattern": ranks or {}, "alpha_pattern": alphas or {}, "layers_to_transform": layers},
    }
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(config, {})
    for name, module in model.named_modules():
        if not any(name.endswith(f".{target}") for target in targets) or not hasattr(module, "weight"):
            continue
        if layers is not None and int(re.search(r"layers\.(\d+)\.", name)[1]) not in layers:
            continue
        N, K = module.weight.shape
        rank = next((value for key, value in (ranks or {}).items() if re.fullmatch(rf"(.*\.)?({key})", name)), r)
        scale = next((value for key, value in (alphas or {}).items() if re.fullmatch(rf"(.*\.)?({key})", name)), alpha)
        scale = scale / math.sqrt(rank) if rslora else scale / rank
        wanted = size * float(module.weight.detach().std())
        factor = math.sqrt(wanted / (scale * math.sqrt(rank)))
        a, b = (torch.randn(shape, generator=generator) * factor for shape in ((rank, K), (N, rank)))
        adapter.tensors[name], adapter.scales[name] = (a, b), scale
    return adapter
