"""The activations that the quantizer sees, and the order in which it rounds, against transformers' activations."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from exl.checkpoint.checkpoint import Checkpoint
from exl.families.config import ModelConfig
from exl.models.manifest import read_manifest
from exl.ops.base import LayerWeights, Segments
from exl.ops.torch_ops import TorchOps
from exl.quantize import run
from exl.quantize.calibration import read_calibration
from exl.quantize.compute import open_compute
from exl.quantize.gptq import gptq
from exl.quantize.grid import Grid
from exl.quantize.layer_pass import LayerPass
from exl.quantize.listen import Listener
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize
from exl.quantize.work import WorkFolder, as_bytes, write_atomically
from exl.text.tokenizer import Tokenizer
from exl.threads import Threads
from tests.model.cpu_targets import COMPUTES
from tests.model.test_quantize_model import CALIBRATION, DATA, dequantized

SOURCE = DATA / "stories260K"
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@pytest.fixture(scope="module", params=COMPUTES)
def compute(request):
    with request.param(Threads(2)) as compute:
        assert compute.compiled == (request.param is open_compute)
        yield compute


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


def as_normed(stream: torch.Tensor, *rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows divided by the root mean square of the dense model's residual stream at theirs."""
    return [x / stream.square().mean(1, keepdim=True).sqrt() for x in rows]


def granite_model(residual_multiplier: float, folder: Path) -> transformers.PreTrainedModel:
    """In f64, and saved in f32: the same weights in a decoder whose blocks are scaled before they join the residual
    stream."""
    llama = dense_model(torch.float64)
    values = llama.config.to_dict()
    shared = {key: values[key] for key in transformers.GraniteConfig().to_dict().keys() & values.keys()}
    shared |= {"model_type": "granite", "residual_multiplier": residual_multiplier}
    head_dim = llama.config.hidden_size // llama.config.num_attention_heads
    config = transformers.GraniteConfig(**shared, attention_multiplier=head_dim**-0.5)
    model = transformers.GraniteForCausalLM(config).double().eval()
    model.load_state_dict(llama.state_dict())
    copy.deepcopy(model).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SOURCE / name, folder)
    return model


class Recorder:
    """What transformers feeds the linears of layer 1, and what becomes of it; rows in order, f64."""

    def __init__(self, model: transformers.PreTrainedModel, sequences) -> None:
        rows: dict[str, list[torch.Tensor]] = defaultdict(list)

        def keep_input(key: str, _, x, *y) -> None:
            rows[key].append(x[0][0])

        def keep_output(key: str, _, x, y) -> None:
            rows[key].append(y[0])

        layer, hooks = model.model.layers[1], []
        for name, modules in PARTS.items():
            found = [layer.get_submodule(module) for module in modules]
            hooks.append(found[0].register_forward_hook(partial(keep_input, name)))
            hooks += [
                part.register_forward_hook(partial(keep_output, key)) for key, part in zip(modules, found, strict=True)
            ]
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(partial(keep_input, "middle")))
        hooks.append(layer.register_forward_hook(partial(keep_output, "end")))
        with torch.no_grad():
            for sequence in sequences:
                model(torch.from_numpy(sequence).long()[None])
        for hook in hooks:
            hook.remove()
        self._rows = rows

    def inputs(self, name: str) -> torch.Tensor:
        return torch.cat(self._rows[name])

    def outputs(self, name: str) -> torch.Tensor:
        """Of "o" and "down": the residual stream behind them."""
        if name in ("o", "down"):
            return torch.cat(self._rows["middle" if name == "o" else "end"])
        return torch.cat([torch.cat(self._rows[module]) for module in PARTS[name]], dim=1)


def spoil(model: transformers.PreTrainedModel, layer_idx: int, name: str, weights: LayerWeights) -> None:
    """Changes a linear in transformers and in exl, as rounding would."""
    (linear,) = weights[name]
    stored, start = linear.fields["weight"], 0
    noise = torch.from_numpy(np.random.default_rng(layer_idx).normal(size=stored.shape)).float()
    stored += 0.2 * stored.std() * noise
    for module in PARTS[name]:
        target = model.model.layers[layer_idx].get_submodule(module).weight
        target.data = stored[start : start + len(target)].double()
        start += len(target)


def test_it_hears_what_transformers_feeds(compute, tmp_path):
    """Two streams, one through rounded linears, the other through dense ones, against two models in f64: inputs,
    what they lack to be the dense model's, and outputs. Other families: ``test_quantize_families.py``."""
    rounded, dense = dense_model(torch.float64), dense_model(torch.float64)
    sequences = calibration(40)  # ragged, and more than one chunk
    with Checkpoint.open(SOURCE) as checkpoint:
        config = ModelConfig.from_folder(SOURCE)
        layers = LayerPass(checkpoint, config, read_manifest(checkpoint, config, None), sequences, compute)
        assert len(layers.chunks) > 1
        work = WorkFolder.open(tmp_path / "work", {}, ("hidden", "dense"))
        first, weights = layers.read_layer(0), layers.read_layer(1)
        for stream in ("dense", "hidden"):
            with write_atomically(work.hidden_path(stream, 1)) as write:
                for chunk, h in zip(layers.chunks, layers.embed(), strict=True):
                    layers.run(0, first, chunk, {"hidden": h})
                    write(as_bytes(h))
            if stream == "dense":  # the rounded layers' comes next
                for name in PARTS:
                    spoil(rounded, 0, name, first)
        told, written = [], bytearray()
        listener = Listener(
            layers,
            work,
            1,
            weights,
            layers.read_layer(1),
            PARTS,
            lambda name, chunk: told.append((name, chunk.num_rows)),
        )
        expected = Recorder(dense, sequences)
        for name in PARTS:
            heard = listener.hear(name, written.extend if name == "down" else None)
            found = Recorder(rounded, sequences)
            x = found.inputs(name)
            lack = expected.outputs(name) - found.outputs(name)
            if name in ("o", "down"):
                x, lack = as_normed(expected.outputs(name), x, lack)
            # f32 against f64, through one and a half layers
            for mine, true in ((heard.hessian, x.T @ x), (heard.drift, x.T @ lack)):
                true = 2 / len(x) * true
                assert mine.shape == true.shape
                assert float((mine - true).abs().max()) < 1e-4 * float(true.abs().max())
            spoil(rounded, 1, name, weights)
        outputs = torch.cat(list(listener.outputs()))
    true = Recorder(rounded, sequences).outputs("down")
    assert float((outputs - true).abs().max()) < 1e-4 * float(true.abs().max())
    kept, true = torch.frombuffer(written, dtype=torch.float32), expected.outputs("down")
    assert float((kept.view(true.shape) - true).abs().max()) < 1e-4 * float(true.abs().max())
    num_rows = [chunk.num_rows for chunk in layers.chunks]
    assert told == [(name, rows) for name in (*PARTS, "outputs") for rows in num_rows]


def count_rows(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> dict[str, int]:
    """Counts the rows that each linear multiplies from now on, by its first module's name."""
    rows: dict[str, int] = defaultdict(int)

    def count(w: Segments, num_rows: int) -> None:
        rows[w[0].layout.spec.parts[0].name.rpartition(".")[2]] += num_rows

    if compiled:
        from exl.ops.compiled_linear import LinearStages

        add_stages = LinearStages.multiply

        def counted_stages(self, tape, x, w, *rest, **options):
            count(w, x.num_rows)
            add_stages(self, tape, x, w, *rest, **options)

        monkeypatch.setattr(LinearStages, "multiply", counted_stages)
        return rows
    multiply = TorchOps._multiply

    def counted(self, x, w, out, num_decode_rows):
        count(w, len(x))
        multiply(self, x, w, out, num_decode_rows)

    monkeypatch.setattr(TorchOps, "_multiply", counted)
    return rows


def test_every_linear_is_run_once(compute, tmp_path, monkeypatch):
    """In each stream, as if whole layers had been run."""
    rows = count_rows(monkeypatch, compute.compiled)
    monkeypatch.setattr(run, "open_compute", lambda threads: nullcontext(compute))
    options = QuantizeOptions(calibration=CALIBRATION, num_samples=12, seq_len=64, group_size=32)
    result = quantize(SOURCE, tmp_path / "out", options)
    num_tokens = result.num_calibration_tokens
    num_layers = ModelConfig.from_folder(SOURCE).num_layers
    expected = dict.fromkeys(("q_proj", "o_proj", "gate_proj", "down_proj"), 2 * num_layers * num_tokens)
    expected["down_proj"] -= num_tokens  # nobody needs the outputs of the last layer
    assert rows == expected


def round_earlier(model, module: str, written: dict[str, np.ndarray]) -> None:
    """Gives the linears that are rounded before ``module`` their rounded weights."""
    stage = {name: i for i, names in enumerate(PARTS.values()) for name in names}

    def turn(name: str) -> tuple[int, int]:
        _, _, layer_idx, module = name.split(".", 3)
        return int(layer_idx), stage[module]

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


def quantized_weights(folder: Path, match_dense: bool, source: Path = SOURCE) -> dict[str, np.ndarray]:
    options = QuantizeOptions(
        bits=3,
        group_size=32,
        calibration=CALIBRATION,
        num_samples=12,
        seq_len=64,
        act_order=False,
        match_dense=match_dense,
    )
    quantize(source, folder, options)
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


def test_a_scaled_branch_makes_up_for_what_the_residual_lacks(tmp_path):
    """A linear whose result is multiplied by 0.3 has to add 1 / 0.3 of what the layer's output lacks."""
    model, source = granite_model(0.3, tmp_path / "source"), tmp_path / "source"
    written = quantized_weights(tmp_path / "out", match_dense=True, source=source)
    layer, module = "model.layers.1", "model.layers.1.mlp.down_proj"
    _, dense = inputs_and_outputs(model, layer, calibration(12))
    round_earlier(model, module, written)
    _, output = inputs_and_outputs(model, layer, calibration(12))
    x, _ = inputs_and_outputs(model, module, calibration(12))
    normed, lack = as_normed(dense, x, dense - output)
    assert agreement(normed, module, written[module], lack / 0.3) > 0.97
    assert agreement(normed, module, written[module], lack) < 0.9
    assert agreement(x, module, written[module], (dense - output) / 0.3) < 0.9
