"""Mixtures of experts: quantized ones against transformers; the same bits wherever experts lie, in any company."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exl.commands.model_facts import describe_model_files
from exl.engine.build import Engine, load_engine
from exl.engine.cache_files import cache_key
from exl.errors import CheckpointError, UnsupportedModelError
from exl.layout import cpu_steps
from exl.layout.specs import Target
from exl.ops.cpu_target import COMPILED, torch_target
from exl.planning.from_headers import open_model, plan_model
from exl.planning.options import EngineOptions
from exl.planning.traffic import embedding_row_bytes, read_bytes
from tests.live_bytes import live_bytes
from tests.model.batches import batch_of, run
from tests.model.cpu_targets import needs_kernels, with_both
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import MIXTURES, Case, build, load_f32, prefill_logits, save
from tests.reference.plain_packer import dequantize, pack_layer
from tests.unit.weights.packed_files import flip

IDS = some_ids(40, seed=3)
GROUP = 32
SPARSE = Case(
    "many",
    "qwen3_moe",
    {
        "head_dim": 16,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_hidden_layers": 2,
    },
)
SHARED = dataclasses.replace(
    next(case for case in MIXTURES if case.name == "qwen2_moe"),
    options={
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 160,
    },
)
UNEVEN = dataclasses.replace(  # dense: codes come by 32 inputs
    SHARED, options={**SHARED.options, "moe_intermediate_size": 44, "shared_expert_intermediate_size": 12}
)


def quantize(folder: Path, bits: int, act_order: bool = False, group: int = GROUP) -> Path:
    """Rounds the matrices of a saved model, but for routers, gates, embedding and head, to codes of 4 bits, which it
    has from then on. Each matrix has a seed of its own."""
    tensors = load_file(folder / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for seed, (name, weight) in enumerate(sorted(tensors.items())):
        module = name.removesuffix(".weight")
        if "proj" not in name or not name.endswith(".weight"):
            found[name] = weight
            continue
        rng = np.random.default_rng(seed)
        N, K = weight.shape
        codes = rng.integers(0, 2**bits, (K, N))
        num_groups = -(-K // group)
        zeros = np.full((num_groups, N), 2 ** (bits - 1))
        scales = rng.uniform(0.2, 0.4, (num_groups, N)).astype(np.float16) * 2.0 ** (4 - bits) / np.sqrt(K)
        scales = scales.astype(np.float16)
        g_idx = np.arange(K) // group
        if act_order:  # q, k and v, and gate and up, share one
            order = np.random.default_rng(seed if "down" in name or "o_proj" in name else 7)
            if "experts." in name and "down" not in name:
                order = np.random.default_rng(int(name.split("experts.")[1].split(".")[0]))
            g_idx = order.permutation(g_idx)
        packed = pack_layer(codes, zeros, scales, bits, g_idx=g_idx if act_order else None)
        found |= {f"{module}.{end}": torch.from_numpy(array) for end, array in packed.items()}
        tensors[name] = torch.from_numpy(dequantize(codes, zeros, scales, g_idx).T).float().contiguous()
    save_file(found, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": act_order
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return save_dense(tensors, config, folder.parent / f"{folder.name}-dense")


def save_dense(tensors: dict[str, torch.Tensor], config: dict, folder: Path) -> Path:
    """The same values without codes, for transformers."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain))
    return folder


def load(folder: Path, cpu: Target, **options) -> Engine:
    settings = {"kv_cache": "f32", "context": 64, "prefill_chunk": 64} | options
    if cpu.compiled:
        settings = {"arithmetic": "f32"} | settings
    return load_engine(folder, EngineOptions(**settings), cpu=cpu)


def decoded(engine: Engine, ids: list[int], num_prompt: int = 5) -> torch.Tensor:
    generator = engine.generator
    sequence = generator.begin(len(ids))
    logits = [generator.extend(sequence, ids[:num_prompt]).clone()]
    logits += [generator.extend(sequence, [token_id]).clone() for token_id in ids[num_prompt:]]
    generator.end(sequence)
    return torch.cat(logits)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(case, bits, act-order, group) -> the folder of a quantized model, and of the same one dense."""
    made: dict[tuple, tuple[Path, Path]] = {}

    def get(case: Case, bits: int = 4, act_order: bool = False, group: int = GROUP) -> tuple[Path, Path]:
        key = case.name, bits, act_order, group
        if key not in made:
            folder = save(build(case), tmp_path_factory.mktemp("-".join(map(str, key))) / "model")
            made[key] = folder, quantize(folder, bits, act_order, group)
        return made[key]

    return get


@with_both
@pytest.mark.parametrize(
    ("bits", "act_order", "group"), [(4, False, 32), (4, True, 32), (3, False, 32), (4, False, 64), (8, True, 64)]
)
def test_quantized_experts_equal_transformers(bits, act_order, group, cpu, folders):
    """Codes that a plain packer wrote; each expert with an order of its own. torch's kernel for 4 bits rounds decode
    rows' activations to bf16, and near ties go to other experts then: most rows are near. Groups of 64: the last ones
    of experts' inputs are shorter."""
    quantized, dense = folders(SHARED, bits, act_order, group)
    engine = load(quantized, cpu)
    expected = prefill_logits(load_f32(dense), IDS)
    assert expected.std() > 0.5
    assert (all_logits(engine, IDS) - expected).abs().max() <= 2e-4
    difference = (decoded(engine, IDS)[1:] - expected[5:]).abs().max(dim=1).values
    assert difference.max() <= 2e-4 if cpu.compiled or bits != 4 else difference.median() <= 0.5


@with_both
def test_experts_may_have_any_width(cpu, tmp_path):
    folder = save(build(UNEVEN), tmp_path / "model")
    engine, expected = load(folder, cpu), prefill_logits(load_f32(folder), IDS)
    assert (all_logits(engine, IDS) - expected).abs().max() <= 2e-4
    assert (decoded(engine, IDS)[1:] - expected[5:]).abs().max() <= 2e-4


@needs_kernels
def test_integer_arithmetic_is_near(folders):
    quantized, dense = folders(SHARED)
    expected = prefill_logits(load_f32(dense), IDS)
    difference = (all_logits(load(quantized, COMPILED, arithmetic="int16"), IDS) - expected).abs().max()
    assert 0 < difference <= 2e-2


def _batched(engine: Engine, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The logits of the last token of each, in one decode step."""
    pages = iter(range(1, 50))
    tables = [[next(pages)] for _ in prompts]
    runner = engine.generator.runner
    for prompt, table in zip(prompts, tables, strict=True):
        run(runner, batch_of([(prompt[:-1], 0, table)]))
    rows = [([prompt[-1]], len(prompt) - 1, table) for prompt, table in zip(prompts, tables, strict=True)]
    return list(run(runner, batch_of(rows, decode=True)))


@with_both
@pytest.mark.parametrize("arithmetic", ["f32", "int16"])
def test_bits_are_the_same_alone_and_in_company(arithmetic, cpu, folders):
    """Decode rows, of both; also in steps that are recorded the second time they come."""
    options = {"arithmetic": arithmetic} if cpu.compiled else {}
    engine = load(folders(SHARED)[0], cpu, max_sequences=8, cache_tokens=8 * 64, **options)
    prompts = [some_ids(3 + i, seed=i) for i in range(7)]
    alone = [_batched(engine, [prompt])[0] for prompt in prompts]
    for _ in range(3):
        for together, one in zip(_batched(engine, prompts), alone, strict=True):
            assert torch.equal(together, one)
    assert len({tuple(row.tolist()) for row in alone}) == len(prompts)


@needs_kernels
@pytest.mark.parametrize("case", [SHARED, SPARSE], ids=str)
def test_bits_are_the_same_in_any_chunks_and_waves(case, folders, monkeypatch):
    """exl's own kernels: rows of prompts, too; pairs of rows and experts at once, or in waves that end anywhere."""
    folder = folders(case)[0]
    whole = all_logits(load(folder, COMPILED, arithmetic="int16"), IDS)
    for chunk in (1, 7, 33) if case is SHARED else (7,):
        engine = load(folder, COMPILED, arithmetic="int16", prefill_chunk=chunk, prefill_window=chunk)
        assert torch.equal(all_logits(engine, IDS), whole)
    monkeypatch.setattr(cpu_steps, "_PAIR_BYTES", 1)
    monkeypatch.setattr(cpu_steps, "RECORDED_ROWS", 5)
    assert torch.equal(all_logits(load(folder, COMPILED, arithmetic="int16"), IDS), whole)


@with_both
def test_bits_are_the_same_with_any_threads(cpu, folders):
    rows = [decoded(load(folders(SHARED)[0], cpu, threads=threads), IDS) for threads in (1, 2)]
    assert torch.equal(*rows)


@with_both
def test_streamed_layers_have_the_bits_of_resident_ones(cpu, folders, tmp_path):
    """128 experts a layer, each of its own values, in less memory than they take; read again, from the packed file."""
    folder = folders(SPARSE)[0]
    with contextlib.closing(load(folder, cpu)) as engine:
        expected, decode = all_logits(engine, IDS), decoded(engine, IDS)
        lines = {line.purpose: line.num_bytes for line in engine.plan.lines}
    assert lines["resident experts"] > 5 * lines["resident layers"] > 0
    for resident, buffers in ((1, 1), (0, 2), (0, 2)):
        options = {"resident_layers": resident, "packed_folder": tmp_path}
        with contextlib.closing(load(folder, cpu, **options)) as engine:
            planned = {line.purpose: line.num_bytes for line in engine.plan.lines}
            assert planned["stream buffers"] == buffers * (lines["resident layers"] + lines["resident experts"]) // 2
            assert engine.plan.layer_counts["disk"] == 2 - resident
            for _ in range(2):
                assert torch.equal(all_logits(engine, IDS), expected)
                assert torch.equal(decoded(engine, IDS), decode)
    blobs = engine.model.layers[0].num_bytes + engine.model.expert_bytes[0]
    assert engine.weights.source.stats.bytes_read % blobs == 0


def test_a_token_reads_its_experts_alone(folders):
    with open_model(folders(SPARSE)[0]) as files:
        plan, model = plan_model(files, EngineOptions(context=64), Target("cpu", compiled=True))
    experts = model.experts[0]
    own = sum(map(read_bytes, (*model.layers, model.head))) + embedding_row_bytes(model)
    assert plan.tokens[0].links()["ram"] == own + 2 * 8 * read_bytes(experts.blob)
    assert experts.count == 128


@with_both
@pytest.mark.parametrize("case", [SHARED, SPARSE], ids=str)
def test_the_plan_counts_what_is_allocated(case, cpu, folders):
    folder = folders(case)[0]
    load(folder, cpu)  # what stays of a first model
    gc.collect()
    before = live_bytes()
    engine = load(folder, cpu, max_sequences=3)
    assert live_bytes() - before == engine.plan.exact_bytes
    decoded(engine, IDS)


@pytest.mark.parametrize("which", ["an expert of the first layer", "one of the last", "a layer"])
def test_damaged_packed_experts_are_noticed(which, folders, tmp_path):
    folder, cpu = folders(SPARSE)[0], torch_target()
    options = {"resident_layers": 0, "packed_folder": tmp_path}
    with contextlib.closing(load(folder, cpu, **options)) as engine:
        all_logits(engine, IDS)
        header = engine.weights.source._reader.packed.header
        num_blobs, path = len(header.sizes), engine.weights.source._reader.packed.path
    assert num_blobs == 1 + 2 + 1 + 2 * 128
    blob_idx = {"an expert of the first layer": 4 + 77, "one of the last": num_blobs - 1, "a layer": 2}[which]
    flip(path, header.offsets[blob_idx] + 5)
    with (
        contextlib.closing(load(folder, cpu, **options)) as engine,
        pytest.raises(CheckpointError, match=f"damaged: blob {blob_idx} "),
    ):
        all_logits(engine, IDS)


def test_a_gpu_is_refused_before_anything_is_done(folders):
    with open_model(folders(SHARED)[0]) as files, pytest.raises(UnsupportedModelError, match="mixtures of 6 experts"):
        plan_model(files, EngineOptions(context=64, vram="4GB"), Target("cuda", arch=86))


def _edited(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    shutil.copy(source / "config.json", folder)
    return folder


def _without_order(tensors: dict[str, torch.Tensor]) -> None:
    """One expert's inputs in order, those of the others not."""
    name = "model.layers.1.mlp.experts.4.down_proj.g_idx"
    tensors[name] = tensors[name].sort().values


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.scales"), "experts.3.up_proj.scales: found nothing"),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.5.down_proj.scales": torch.ones(3, 64)}),
            r"experts.5.down_proj.scales: found f32 \[3, 64\], expected f16 \[3, 64\]",
        ),
        (_without_order, "experts.4.down_proj: found an act-order .* expected one|found no act-order|of one kind"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.6.up_proj.weight": torch.ones(96, 64)}),
            "1 tensors that a qwen2_moe model",
        ),
    ],
    ids=["missing", "another type", "another order", "one too many"],
)
def test_experts_that_differ_are_named(edit, expected, folders, tmp_path):
    folder = _edited(folders(SHARED, 4, True)[0], tmp_path / "model", edit)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=expected):
        load(folder, torch_target())


@needs_kernels
def test_an_expert_with_zeros_of_its_own_is_named(folders, tmp_path):
    """The packer sees what headers do not tell; the layout that it is given is that of all experts."""
    name = "model.layers.1.mlp.experts.4.down_proj"
    folder = _edited(folders(SHARED)[0], tmp_path / "model", lambda t: t[f"{name}.qzeros"].add_(1))
    with pytest.raises(CheckpointError, match=f"{name}.qzeros: found zero point 9, expected 8 everywhere"):
        load(folder, COMPILED)


def _stack(tensors: dict[str, torch.Tensor]) -> None:
    """The experts of each layer in two tensors, as transformers has them in memory."""
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = range(6)
        one = {
            name: [tensors.pop(f"{prefix}{e}.{name}_proj.weight") for e in experts] for name in ("gate", "up", "down")
        }
        tensors[prefix + "gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(one["gate"], one["up"], strict=True)]
        )
        tensors[prefix + "down_proj"] = torch.stack(one["down"])


@with_both
def test_experts_in_one_tensor_are_those_in_many(cpu, folders, tmp_path):
    dense = folders(SHARED)[1]
    folder = _edited(dense, tmp_path / "stacked", _stack)
    assert torch.equal(all_logits(load(folder, cpu), IDS), all_logits(load(dense, cpu), IDS))


@with_both
def test_a_quantized_router_is_dequantized_and_not_rounded(cpu, folders, tmp_path):
    """It multiplies as it does in a file that has the same values dense."""
    quantized = folders(SPARSE)[0]
    rng = np.random.default_rng(5)
    codes, zeros = rng.integers(0, 256, (64, 128)), np.full((2, 128), 128)
    scales = rng.uniform(0.001, 0.002, (2, 128)).astype(np.float16)
    router = torch.from_numpy(dequantize(codes, zeros, scales, np.arange(64) // GROUP).T).float()

    def with_codes(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.gate.weight"]
        for end, array in pack_layer(codes, zeros, scales, 8).items():
            tensors[f"model.layers.1.mlp.gate.{end}"] = torch.from_numpy(array)

    def with_values(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.gate.weight"] = router

    folder = _edited(quantized, tmp_path / "codes", with_codes)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"+:.*mlp\.gate$": {"bits": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    expected = all_logits(load(_edited(quantized, tmp_path / "values", with_values), cpu), IDS)
    engine = load(folder, cpu)
    assert torch.equal(all_logits(engine, IDS), expected)
    assert engine.weights.source.layers[1]["router"][0].fields["weight"].dtype == torch.float32


def test_dense_options_leave_routers_as_they_are(folders):
    with open_model(folders(SPARSE)[1]) as files:
        rounded = files.manifest.with_dense_bits(8)
    layer = dict(rounded.layers[0].linears)
    assert layer["router"][0].bits == 32
    assert layer["qkv"][0].bits == dict(rounded.experts[0].blob.linears)["down"][0].bits == 8


def _in_mxfp4(folder: Path) -> Path:
    """Random codes and scales in the place of a saved gpt-oss model's experts. Returns a folder with the same values
    dense, as transformers has them."""
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(11)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    found: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        E, K, N = tensors[name].shape
        codes = rng.integers(0, 16, (E, N, K))
        exponents = rng.integers(121, 125, (E, N, K // 32))
        weights = numbers[codes] * 2.0 ** (exponents.repeat(32, axis=2) - 127)
        tensors[name] = torch.from_numpy(weights).float().transpose(1, 2).contiguous()
        pairs = codes.reshape(E, N, K // 32, 16, 2)
        found[f"{name}_blocks"] = torch.from_numpy((pairs[..., 0] + 16 * pairs[..., 1]).astype(np.uint8))
        found[f"{name}_scales"] = torch.from_numpy(exponents.astype(np.uint8))
    config = json.loads((folder / "config.json").read_text())
    dense = save_dense(tensors, config, folder.parent / f"{folder.name}-dense")
    kept = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in found}
    save_file(kept | found, folder / "model.safetensors")
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


@with_both
def test_mxfp4_equals_transformers(cpu, tmp_path):
    case = next(case for case in MIXTURES if case.name == "gpt_oss")
    folder = save(build(case), tmp_path / "model")
    expected = prefill_logits(load_f32(_in_mxfp4(folder)), IDS)
    engine = load(folder, cpu)
    assert engine.model.experts[0].blob.linears["down"][0].spec.code_kind == "fp4"
    assert expected.std() > 0.5
    assert (all_logits(engine, IDS) - expected).abs().max() <= 2e-4
    assert (decoded(engine, IDS)[1:] - expected[5:]).abs().max() <= 2e-4


@needs_kernels
def test_mxfp4_in_integers_is_near_and_streamed_alike(tmp_path):
    case = next(case for case in MIXTURES if case.name == "gpt_oss")
    folder = save(build(case), tmp_path / "model")
    expected = prefill_logits(load_f32(_in_mxfp4(folder)), IDS)
    with contextlib.closing(load(folder, COMPILED, arithmetic="int16")) as engine:
        resident = all_logits(engine, IDS)
    assert 0 < (resident - expected).abs().max() <= 2e-2
    options = {"resident_layers": 1, "packed_folder": tmp_path / "packed", "arithmetic": "int16"}
    for _ in range(2):
        with contextlib.closing(load(folder, COMPILED, **options)) as engine:
            assert torch.equal(all_logits(engine, IDS), resident)


def test_layers_that_predict_further_tokens_are_not_read(tmp_path):
    """GLM-4.5's files have one behind the last; anything else there is an error."""
    case = next(case for case in MIXTURES if case.name == "glm4_moe")
    folder = save(build(case), tmp_path / "model")

    def with_tensor(name: str) -> Path:
        return _edited(folder, tmp_path / name, lambda tensors: tensors.update({name: torch.zeros(4, 4)}))

    load(with_tensor("model.layers.3.mlp.experts.0.up_proj.weight"), torch_target())
    with pytest.raises(CheckpointError, match="1 tensors that a glm4_moe model of 3 layers does not have"):
        load(with_tensor("model.layers.4.mlp.experts.0.up_proj.weight"), torch_target())


def test_info_tells_of_experts(folders, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).parents[1] / "data" / "stories260K" / name, tmp_path)
    for path in folders(SPARSE)[0].iterdir():
        shutil.copy(path, tmp_path)
    facts = describe_model_files(str(tmp_path))
    assert facts.shown["layers"] == "2, 64 channels, 8 of 128 experts of 32 in 2 layers"
    one = 3 * 64 * 32
    assert facts.numbers["num_experts"] == 128
    assert facts.numbers["num_parameters"] > 2 * 128 * one
    assert facts.shown["weights"].startswith("66 % 4-bit, groups of 32, symmetric; 32 % 4-bit, one group")  # down: 32
    active = facts.numbers["num_parameters"] - 2 * 120 * one
    assert facts.shown["parameters"].endswith(f", {active:,} for a token")


def test_a_saved_cache_is_of_experts_that_are_rounded_alike(tmp_path):
    save(build(SPARSE), tmp_path / "model")
    first, other = (load(tmp_path / "model", torch_target(), dense=dense) for dense in ("file", 8))
    with contextlib.closing(first), contextlib.closing(other):
        mixed = dataclasses.replace(first, model=dataclasses.replace(first.model, experts=other.model.experts))
        assert cache_key(mixed, tmp_path / "model") != cache_key(first, tmp_path / "model")
