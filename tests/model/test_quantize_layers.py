"""The activations that the quantizer sees, and the order in which it rounds, against transformers' activations."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import transformers

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.config import ModelConfig
from exl.errors import UnsupportedModelError
from exl.models import decoder
from exl.models.manifest import read_manifest
from exl.ops.base import Branch, Norm
from exl.quantize.calibration import read_calibration
from exl.quantize.gptq import gptq
from exl.quantize.grid import Grid
from exl.quantize.layer_pass import LayerPass
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize
from exl.text.tokenizer import Tokenizer
from tests.model.test_quantize_model import CALIBRATION, DATA, dequantized

SOURCE = DATA / "stories260K"
FIRST_OF = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}


def calibration(num_samples: int) -> list[np.ndarray]:
    return read_calibration(CALIBRATION, Tokenizer.from_folder(SOURCE), num_samples, 64, "lines")


def dense_model(dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(SOURCE, dtype=dtype).eval()


def inputs_and_outputs(model, module: str, sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of a module in transformers, and the outputs of it or of the residual stream; rows in order."""
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.get_submodule(module).register_forward_hook(lambda _, x, y: rows.append((x[0][0], y[0])))
    with torch.no_grad():
        for sequence in sequences:
            model(torch.from_numpy(sequence).long()[None])
    hook.remove()
    return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


def granite_model(residual_multiplier: float) -> transformers.PreTrainedModel:
    """The same weights in a decoder whose blocks are scaled before they join the residual stream."""
    llama = dense_model(torch.float64)
    values = llama.config.to_dict()
    shared = {key: values[key] for key in transformers.GraniteConfig().to_dict().keys() & values.keys()}
    shared |= {"model_type": "granite", "residual_multiplier": residual_multiplier}
    head_dim = llama.config.hidden_size // llama.config.num_attention_heads
    config = transformers.GraniteConfig(**shared, attention_multiplier=head_dim**-0.5)
    model = transformers.GraniteForCausalLM(config).double().eval()
    model.load_state_dict(llama.state_dict())
    return model


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", FIRST_OF)
def test_it_hears_what_transformers_feeds(name, scale, monkeypatch):
    if scale != 1.0:
        monkeypatch.setattr(decoder, "Branch", partial(Branch, scale=scale))
    model = dense_model(torch.float64) if scale == 1.0 else granite_model(scale)
    sequences = calibration(40)  # ragged, and more than one chunk
    with Checkpoint.open(SOURCE) as checkpoint:
        config = ModelConfig.from_folder(SOURCE)
        layers = LayerPass(checkpoint, config, read_manifest(checkpoint, config, None), sequences)
        assert len(layers.chunks) > 1
        heard, outputs = [], []
        for chunk, h in zip(layers.chunks, layers.embed(), strict=True):
            layers.run(0, layers.read_layer(0), chunk, h)
            found = layers.listen(1, layers.read_layer(1), name, chunk, h, output=True)
            heard.append(found.x.clone())
            outputs.append(found.output.clone())
            assert found.scale == (scale if name in ("o", "down") else 1.0)
    x, y = inputs_and_outputs(model, f"model.layers.1.{FIRST_OF[name]}", sequences)
    # f32 against f64, through one and a half layers, values of about 1
    assert float((torch.cat(heard) - x).abs().max()) < 1e-4 * float(x.abs().max())
    output = torch.cat(outputs)
    if name == "down":  # the layer's output, which includes the residual
        _, y = inputs_and_outputs(model, "model.layers.1", sequences)
    elif name == "o":
        _, residual = inputs_and_outputs(model, "model.layers.0", sequences)
        y = scale * y + residual
    assert float((output[:, : y.shape[1]] - y).abs().max()) < 1e-4 * float(y.abs().max())


def test_outputs_of_a_normalised_block_are_refused(monkeypatch):
    monkeypatch.setattr(decoder, "Branch", partial(Branch, post_norm=Norm(torch.ones(64), 1e-5)))
    with Checkpoint.open(SOURCE) as checkpoint:
        config = ModelConfig.from_folder(SOURCE)
        layers = LayerPass(checkpoint, config, read_manifest(checkpoint, config, None), calibration(1))
        (chunk,), (h,) = layers.chunks, layers.embed()
        weights = layers.read_layer(0)
        assert layers.listen(0, weights, "o", chunk, h.clone(), output=False).output is None
        with pytest.raises(UnsupportedModelError, match=r"o_proj: found a norm of what it adds, expected none"):
            layers.listen(0, weights, "o", chunk, h, output=True)


def round_earlier(model, module: str, written: dict[str, np.ndarray]) -> None:
    """Gives the linears that are rounded before ``module`` their rounded weights."""
    stage = {name: i for i, name in enumerate(FIRST_OF)}
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up"}
    groups |= {"up_proj": "gate_up", "down_proj": "down"}

    def turn(name: str) -> tuple[int, int]:
        return int(name.split(".")[2]), stage[groups[name.rpartition(".")[2]]]

    for name, weight in written.items():
        if turn(name) < turn(module):
            target = model.get_submodule(name).weight
            target.data = torch.from_numpy(np.ascontiguousarray(weight[: target.shape[0], : target.shape[1]])).double()


def agreement(x: torch.Tensor, module: str, written: np.ndarray, lack: torch.Tensor | None = None) -> float:
    """The share of written weights that GPTQ finds from the rows x, and from what their outputs lack."""
    weight = dense_model(torch.float64).get_submodule(module).weight.data.T
    padding = written.shape[1] - len(weight)
    hessian = torch.nn.functional.pad(2 / len(x) * x.T @ x, (0, padding, 0, padding))
    drift = None if lack is None else torch.nn.functional.pad(2 / len(x) * x.T @ lack, (0, 0, 0, padding))
    weight = torch.nn.functional.pad(weight, (0, 0, 0, padding)).contiguous()
    expected = gptq(weight, hessian, Grid(3, False, 1), 32, act_order=False, drift=drift).dequantize().double()
    return float((expected.T.numpy() == written).mean())


def quantized_weights(folder, match_dense: bool) -> dict[str, np.ndarray]:
    options = QuantizeOptions(
        bits=3,
        group_size=32,
        calibration=CALIBRATION,
        num_samples=12,
        seq_len=64,
        act_order=False,
        match_dense=match_dense,
    )
    quantize(SOURCE, folder, options)
    return dequantized(folder)


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"])
def test_every_linear_sees_quantized_ones_before_it(tmp_path, module):
    """The written codes come from the Hessian of transformers' activations with all earlier linears quantized as
    written, and this one and later ones dense; not from the dense model's Hessian."""
    written = quantized_weights(tmp_path / "out", match_dense=False)
    model = dense_model(torch.float64)
    x, _ = inputs_and_outputs(model, module, calibration(12))
    as_dense = agreement(x, module, written[module])
    round_earlier(model, module, written)
    x, _ = inputs_and_outputs(model, module, calibration(12))
    # In f32 a few codes round to the other side of a half, and their errors change others.
    assert agreement(x, module, written[module]) > 0.97
    assert as_dense < 0.9


def test_a_scaled_branch_makes_up_for_what_the_residual_lacks(tmp_path, monkeypatch):
    """A linear whose result is multiplied by 0.3 has to add 1 / 0.3 of what the layer's output lacks."""
    monkeypatch.setattr(decoder, "Branch", partial(Branch, scale=0.3))
    written = quantized_weights(tmp_path / "out", match_dense=True)
    model, layer, module = granite_model(0.3), "model.layers.1", "model.layers.1.mlp.down_proj"
    _, dense = inputs_and_outputs(model, layer, calibration(12))
    round_earlier(model, module, written)
    _, output = inputs_and_outputs(model, layer, calibration(12))
    x, _ = inputs_and_outputs(model, module, calibration(12))
    assert agreement(x, module, written[module], (dense - output) / 0.3) > 0.97
    assert agreement(x, module, written[module], dense - output) < 0.9
