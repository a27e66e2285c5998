"""A peft folder against a model's manifest: every tensor of the adapter belongs to a module of the model and has its
shape, every module that the adapter's configuration names has its tensors, and each byte has its place.

An adapter adds to a linear ``y = x W + b`` the product ``scale * (x A^T) B^T`` with A [r, K] and B [N, r]. What exl
computes as one linear of several modules (q, k and v) has a term for each of them; of a module of which exl makes
several matrices (Phi-3's ``qkv_proj``), B's rows are chosen as the weight's are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from exl.adapters.config import CONFIG_NAME, AdapterConfig
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.header import shown
from exl.errors import CheckpointError, UnsupportedModelError
from exl.formats.load import matrix_spec
from exl.layout.layers import LayerLayout, layer_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, Target
from exl.models.manifest import ModelManifest
from exl.models.other_names import LAYER_PREFIXES

WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTED = ("qkv", "o", "gate_up", "down")  # linears of a layer that adapters may change
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<which>lora_[AB])\.weight")
# Ends of other tensors' names, and what they are.
_OTHERS: Mapping[str, str] = {
    ".lora_magnitude_vector": "of DoRA (use_dora)",
    ".lora_magnitude_vector.weight": "of DoRA (use_dora)",
    ".lora_embedding_A": "of an embedding",
    ".lora_embedding_B": "of an embedding",
    ".lora_A.bias": "a bias (lora_bias)",
    ".lora_B.bias": "a bias (lora_bias)",
    ".bias": "a bias (bias other than 'none')",
    ".base_layer.weight": "a weight of the model itself",
    ".modules_to_save.weight": "a weight of the model itself (modules_to_save)",
}


@dataclass(frozen=True)
class AdapterTerm:
    """What an adapter adds to neighbouring outputs of one linear: those from ``start`` on."""

    a: MatrixSpec  # K inputs, r outputs
    b: tuple[MatrixSpec, ...]  # r inputs; side by side along N
    start: int
    scale: float

    @property
    def rank(self) -> int:
        return self.a.N

    @property
    def width(self) -> int:
        return sum(part.N for part in self.b)


@dataclass(frozen=True)
class AdapterManifest:
    """An adapter that fits a model: by layer and linear what it adds."""

    name: str  # by which requests choose it
    folder: Path
    layers: tuple[Mapping[str, tuple[AdapterTerm, ...]], ...]  # [L]

    @property
    def terms(self) -> Iterator[AdapterTerm]:
        return (term for layer in self.layers for terms in layer.values() for term in terms)

    def layout(self, target: Target) -> AdapterLayout:
        linears = tuple(
            (blob_name(i, name), tuple(spec for term in terms for spec in (LinearSpec((term.a,)), LinearSpec(term.b))))
            for i, layer in enumerate(self.layers)
            for name, terms in layer.items()
        )
        return AdapterLayout(self, layer_layout(BlobSpec((), linears), target))


@dataclass(frozen=True)
class AdapterLayout:
    """One blob: of each linear's terms A and B in turn, under the name ``blob_name`` gives it."""

    manifest: AdapterManifest
    blob: LayerLayout

    @property
    def num_bytes(self) -> int:
        return self.blob.num_bytes


def blob_name(layer_idx: int, linear: str) -> str:
    return f"{layer_idx}/{linear}"


@dataclass(frozen=True)
class _Place:
    """Where a module's outputs are: matrices of one linear, side by side, from output ``start`` on."""

    module: str
    layer_idx: int
    linear: str
    start: int
    parts: tuple[MatrixSpec, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs of the module in the file."""
        first = self.parts[0]
        return first.K, first.N if first.rows is None else first.rows.total


def open_weights(folder: Path) -> Checkpoint:
    """The adapter's tensors; to be closed. Raises ``CheckpointError``."""
    path = folder / WEIGHTS_NAME
    if not path.exists():
        others = sorted(found.name for found in folder.glob("adapter_model*"))
        has = f"found {others[0]}" if others else "not there"
        why = "; load it with peft and save it again (safe_serialization=True)" if others else ""
        raise CheckpointError(f"{folder}: {WEIGHTS_NAME}: {has}, expected the tensors of a LoRA adapter of peft{why}")
    return Checkpoint.open(path)


def read_adapter(name: str, folder: Path, model: ModelManifest) -> AdapterManifest:
    """Reads ``adapter_config.json`` and the headers of the tensors. Raises ``ConfigError``, ``CheckpointError`` or
    ``UnsupportedModelError`` that names the key or the tensor, what was found and what was expected."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    config = AdapterConfig.from_folder(folder)
    with open_weights(folder) as tensors:
        return _Reader(name, folder, model, config, tensors).read()


class _Reader:
    def __init__(
        self, name: str, folder: Path, model: ModelManifest, config: AdapterConfig, tensors: Checkpoint
    ) -> None:
        self.name, self.folder, self.config, self.tensors = name, folder, config, tensors
        self.prefix = f"{model.names.layers}."
        self.num_layers = len(model.layers)
        self.places = {place.module: place for place in _places(model)}
        self.layers: list[dict[str, list[AdapterTerm]]] = [{} for _ in model.layers]

    def read(self) -> AdapterManifest:
        found = self._modules()
        for module, place in self.places.items():
            if module in found:
                self._check_named(found[module], place)
                terms = self.layers[place.layer_idx].setdefault(place.linear, [])
                terms.append(self._term(place, found[module]))
            elif self.config.changes(module, place.layer_idx):
                raise CheckpointError(
                    f"{self.tensors.path}: {_PREFIX}{module}.lora_A.weight is missing: {CONFIG_NAME} has this module "
                    "in target_modules"
                )
        if not found:
            raise CheckpointError(f"{self.tensors.path}: found no tensors, expected those of a LoRA adapter")
        layers = tuple({name: tuple(terms) for name, terms in layer.items()} for layer in self.layers)
        return AdapterManifest(self.name, self.folder, layers)

    def _modules(self) -> dict[str, str]:
        """The names of the modules that have tensors -> those names in the adapter's file, without what follows."""
        found: dict[str, str] = {}
        for tensor in self.tensors.tensors:
            self._refuse_others(tensor)
            match = _TENSOR.fullmatch(tensor)
            if match is None or not tensor.startswith(_PREFIX):
                raise CheckpointError(
                    f"{self.tensors.path}: found a tensor {shown(tensor)}, expected names such as "
                    f"{_PREFIX}{next(iter(self.places))}.lora_A.weight"
                )
            module = self._in_model(match["module"][len(_PREFIX) :])
            if module not in self.places:
                raise self._foreign(tensor)
            if found.setdefault(module, match["module"]) != match["module"]:
                raise CheckpointError(
                    f"{self.tensors.path}: found {shown(found[module])} and {shown(match['module'])}, which are one "
                    f"module of the model, {module}"
                )
        return found

    def _in_model(self, module: str) -> str:
        """The module's name in the model's files, where the layers' prefix may be another one."""
        theirs = next((prefix for prefix in LAYER_PREFIXES if module.startswith(prefix)), None)
        return module if theirs is None else self.prefix + module.removeprefix(theirs)

    def _refuse_others(self, tensor: str) -> None:
        for end, what in _OTHERS.items():
            if tensor.endswith(end):
                raise UnsupportedModelError(
                    f"{self.tensors.path}: {shown(tensor)}: found a tensor that is {what}, exl computes A and B of "
                    "LoRA alone"
                )

    def _foreign(self, tensor: str) -> CheckpointError | UnsupportedModelError:
        """Of a module that is none of the linears of the model's layers."""
        match = re.fullmatch(rf"{re.escape(self.prefix)}(\d+)\..*", self._in_model(tensor[len(_PREFIX) :]))
        of_base = f" of {self.config.base}" if self.config.base else ""
        if match is not None and int(match[1]) >= self.num_layers:
            return CheckpointError(
                f"{self.tensors.path}: {shown(tensor)}: found layer {match[1]}{of_base}, the model has "
                f"{self.num_layers} layers"
            )
        ends = sorted({place.module[len(self.prefix) :].partition(".")[2] for place in self.places.values()})
        return UnsupportedModelError(
            f"{self.tensors.path}: {shown(tensor)}: found a change to a module{of_base} that is none of those that "
            f"adapters change in this model's layers: {', '.join(ends)}"
        )

    def _check_named(self, name: str, place: _Place) -> None:
        if not self.config.changes(name[len(_PREFIX) :], place.layer_idx):
            raise CheckpointError(
                f"{self.tensors.path}: found tensors of {shown(name)}, which target_modules and layers_to_transform of "
                f"{CONFIG_NAME} leave out"
            )

    def _term(self, place: _Place, name: str) -> AdapterTerm:
        (K, N), module = place.shape, name[len(_PREFIX) :]
        rank = self.config.rank_of(module)
        a = self._matrix(f"{name}.lora_A", K, rank)
        b = self._matrix(f"{name}.lora_B", rank, N)
        parts = tuple(MatrixSpec(b.name, rank, part.N, b.bits, b.dtype, rows=part.rows) for part in place.parts)
        return AdapterTerm(a, parts, place.start, self.config.scale_of(module))

    def _matrix(self, name: str, K: int, N: int) -> MatrixSpec:
        if f"{name}.weight" not in self.tensors.tensors:
            raise CheckpointError(
                f"{self.tensors.path}: {shown(name)}.weight is missing, the other of A and B is there"
            )
        spec = matrix_spec(self.tensors, name, None)
        if (spec.N, spec.K) != (N, K):
            trained_for = f" (trained for {self.config.base})" if self.config.base else ""
            raise CheckpointError(
                f"{self.tensors.path}: {shown(name)}.weight: found shape [{spec.N}, {spec.K}]{trained_for}, expected "
                f"[{N}, {K}] for the model's module and the rank that {CONFIG_NAME} gives it"
            )
        return spec


def _places(model: ModelManifest) -> Iterator[_Place]:
    """Modules whose outputs lie side by side in a linear that adapters may change, in the order of the linears."""
    for layer_idx, blob in enumerate(model.layers):
        for linear, segments in blob.linears:
            start, run = 0, list[MatrixSpec]()
            for part in [part for segment in segments for part in segment.parts] if linear in ADAPTED else ():
                if run and part.name != run[0].name:
                    yield _place(layer_idx, linear, start, run)
                    start, run = start + sum(one.N for one in run), []
                run.append(part)
            if run:
                yield _place(layer_idx, linear, start, run)


def _place(layer_idx: int, linear: str, start: int, run: list[MatrixSpec]) -> _Place:
    return _Place(run[0].name, layer_idx, linear, start, tuple(run))
