"""Which files of a folder are the model. Other files lie beside them, and each has a name that shows what it is.

Ignored: names that begin with a dot (macOS's ``._model.safetensors``, ``.ipynb_checkpoints``, ``.DS_Store``), LoRA
adapters as peft names them, ``consolidated*.safetensors``, which are the same weights in Mistral's own format.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exl.checkpoint.header import parse_index, shown
from exl.checkpoint.lfs import lfs_pointer
from exl.checkpoint.source import FileSource
from exl.errors import CheckpointError, warn_user

INDEX_SUFFIX = ".safetensors.index.json"
_SINGLE, _INDEX = "model.safetensors", f"model{INDEX_SUFFIX}"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_ADAPTER = re.compile(r"adapter_model.*\.(safetensors|bin)")
_ORIGINAL = re.compile(r"consolidated.*\.(safetensors|pth|index\.json)")
# What a download has before it is finished: huggingface_hub, browsers, wget and curl by custom, aria2.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")
_ARIA2 = ".aria2"  # lies beside a file that has its full size from the start
_HUB_DOWNLOADS = ".cache/huggingface/download"  # of downloads into a folder of the user's choice
# Files of a training run that are no weights of a model.
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(bin|pt|pth|pkl)")
_MAX_LISTED = 100  # folders that are searched for a model once none is where it should be

_WITH_TORCH = "load it with torch.load(..., weights_only=True) and save it with safetensors.torch.save_file"
_WITH_TRANSFORMERS = (
    "load it with transformers and save it again: model.save_pretrained(folder, safe_serialization=True)"
)
_OTHER_FORMATS: Mapping[str, str] = {
    **{".bin": _WITH_TRANSFORMERS, ".h5": _WITH_TRANSFORMERS, ".msgpack": _WITH_TRANSFORMERS},
    **{".pt": _WITH_TORCH, ".pth": _WITH_TORCH, ".ckpt": _WITH_TORCH},
    ".gguf": "GGUF is llama.cpp's format; take the model's GPTQ or original files instead",
}
_MERGE = (
    "a LoRA adapter holds changes to another model, which adapter_config.json names (base_model_name_or_path): load "
    "that model, and give this folder as lora="
)


@dataclass(frozen=True)
class ModelFileNames:
    """The files that hold a model, relative to its folder."""

    names: list[str]
    weight_map: dict[str, str] | None = None  # {tensor: shard}; None: no index
    index: str = ""  # its name


def is_folder(path: Path) -> bool:
    """False for a ``.safetensors`` file or an index. ``CheckpointError`` for anything else that is not a folder."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISREG(mode):
        if path.suffix != ".safetensors" and not path.name.endswith(INDEX_SUFFIX):
            raise CheckpointError(f"{path}: expected a folder or a .safetensors file{_conversion(path.suffix)}")
        return False
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: neither a file nor a folder, expected a model folder or a .safetensors file")
    return True


def files_of_path(folder: FileSource, name: str) -> ModelFileNames:
    """The files that a path's last part stands for: an index or one shard of several stands for all shards."""
    if name.endswith(INDEX_SUFFIX):
        return _files_of_index(folder, name, folder.names())
    shard = _SHARD.fullmatch(name)
    if shard is None or int(shard[3]) < 2:
        return ModelFileNames([name])
    names = folder.names()
    index = f"{shard[1]}{INDEX_SUFFIX}"
    return _files_of_index(folder, index, names) if index in names else _numbered(folder, [name], names)


def choose_files(source: FileSource) -> ModelFileNames:
    """The model's files among those of a folder or repository.

    In this order: ``model.safetensors`` (as in transformers, also beside an index); ``model.safetensors.index.json`` or
    the only index, with its shards; all of a set of numbered shards; the only safetensors file, whatever its name.
    Raises ``CheckpointError`` that says what is there instead. Warns (``ExlWarning``) of an adapter, which is not
    applied, and of an index whose shards are gone while one whole file is there.
    """
    names = source.names()
    visible = [name for name in names if not name.startswith(".")]
    weights = [n for n in visible if n.endswith(".safetensors") and not _ADAPTER.match(n) and not _ORIGINAL.match(n)]
    chosen = _choose(source, visible, weights, names)
    for name in chosen.names:
        if name + _ARIA2 in names:
            raise CheckpointError(f"{source.path}: {name}: its download has not finished: {name}{_ARIA2} is beside it")
    adapter = next((name for name in visible if _ADAPTER.match(name)), None)
    if adapter is not None:
        warn_user(f"{source.path}: {adapter} is not applied, only {', '.join(chosen.names[:1])} is used: {_MERGE}")
    return chosen


def _choose(source: FileSource, visible: list[str], weights: list[str], names: list[str]) -> ModelFileNames:
    if _SINGLE in weights:
        return ModelFileNames([_SINGLE])
    indices = [name for name in visible if name.endswith(INDEX_SUFFIX) and not _ORIGINAL.match(name)]
    index = _INDEX if _INDEX in indices else indices[0] if len(indices) == 1 else None
    if index is not None:
        return _files_of_index(source, index, names, weights)
    if len(weights) == 1 and not _is_numbered(weights[0]):
        return ModelFileNames(weights)
    if weights and all(map(_is_numbered, weights)):
        return _numbered(source, weights, names)
    if weights:
        raise CheckpointError(
            f"{source.path}: {len(weights)} safetensors files ({_some(weights)}) but no {_INDEX}; "
            "give the path of the file that is meant"
        )
    raise _nothing(source, visible, names)


def _files_of_index(
    source: FileSource, index: str, names: Sequence[str], weights: Sequence[str] = ()
) -> ModelFileNames:
    """``weights``: files that may be the model if none of the shards is there."""
    raw = source.read_small(index)
    if (pointer := lfs_pointer(raw)) is not None:
        raise CheckpointError(f"{index}: {pointer}")
    weight_map = parse_index(raw, index)
    shards = sorted(set(weight_map.values()))
    # Shards in subfolders are looked for when they are opened.
    missing = [shard for shard in shards if Path(shard).name == shard and shard not in names]
    if not missing:
        return ModelFileNames(shards, weight_map, index)
    whole = [name for name in weights if not _is_numbered(name)]
    if missing == shards and len(whole) == 1:
        warn_user(
            f"{source.path}: {index} lists {_count(shards, 'shard')} ({_some(shards)}), none of which is there; "
            f"going by {whole[0]}, which is"
        )
        return ModelFileNames(whole)
    there = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    raise CheckpointError(
        f"{source.path}: {index} lists {_count(shards, 'shard')}, and {_count(missing, 'is', 'are')} missing: "
        f"{_some(missing)}; found {_some(there) if there else 'no safetensors file'}{_unfinished(source, names)}"
    )


def _is_numbered(name: str) -> bool:
    shard = _SHARD.fullmatch(name)
    return shard is not None and int(shard[3]) > 1


def _numbered(source: FileSource, weights: Iterable[str], names: Sequence[str]) -> ModelFileNames:
    """All shards of one set, which their names tell: the index is lost."""
    sets = sorted({(shard[1], shard[3]) for shard in map(_SHARD.fullmatch, weights) if shard is not None})
    if len(sets) > 1:
        found = " and ".join(f"{stem}-*-of-{count}.safetensors" for stem, count in sets)
        raise CheckpointError(f"{source.path}: found shards of {len(sets)} models, {found}, but no {_INDEX}")
    ((stem, count),) = sets
    shards = [f"{stem}-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))]
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise CheckpointError(
            f"{source.path}: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}; "
            f"and so is {stem}{INDEX_SUFFIX}, which would list them{_unfinished(source, names)}"
        )
    return ModelFileNames(shards)


def _nothing(source: FileSource, visible: list[str], names: list[str]) -> CheckpointError:
    """What is there instead of weights."""
    expected = f"expected {_SINGLE} or {_INDEX} with its shards"
    if adapter := next((name for name in visible if _ADAPTER.match(name)), None):
        return CheckpointError(f"{source.path}: found only a LoRA adapter, {adapter}, {expected}: {_MERGE}")
    if original := next((name for name in visible if _ORIGINAL.match(name)), None):
        return CheckpointError(
            f"{source.path}: found only {original}, weights in the format of the model's makers, {expected}: "
            "exl reads the files that transformers takes"
        )
    others = (Path(name).suffix for name in visible if not _TRAINING.fullmatch(name))
    suffix = next((suffix for suffix in others if suffix in _OTHER_FORMATS), "")
    what = (
        f"only {suffix} weights" if suffix else f"no weights among {_count(visible, 'file')}" if visible else "nothing"
    )
    message = f"{source.path}: found {what}, {expected}{_conversion(suffix)}{_unfinished(source, names)}"
    if not suffix and (places := _models_below(source, visible)):
        message += (
            f". Below it, {_some(places)} {'has' if len(places) == 1 else 'have'} safetensors files: give that path"
        )
    if "params.json" in visible and "config.json" not in visible:
        message += ". params.json belongs to the format of the model's makers, which exl does not read"
    return CheckpointError(message)


def _models_below(source: FileSource, names: Iterable[str]) -> list[str]:
    """Folders with safetensors files, one level down; if there are none, two levels, as in a hub cache."""
    places = list(names)
    for _ in range(2):
        inside = {place: source.names_in(place) for place in places[:_MAX_LISTED]}
        found = [place for place, some in inside.items() if any(name.endswith(".safetensors") for name in some)]
        if found:
            return [f"{place}/" for place in found]
        places = [f"{place}/{name}" for place, some in inside.items() for name in some if not name.startswith(".")]
    return []


def _unfinished(source: FileSource, names: Iterable[str]) -> str:
    """Says that a download has not finished, if files show it."""
    parts = [name for name in names if name.endswith(_UNFINISHED)]
    parts += [f"{_HUB_DOWNLOADS}/{name}" for name in source.names_in(_HUB_DOWNLOADS) if name.endswith(_UNFINISHED)]
    if not parts:
        return ""
    return f". A download has not finished ({_some(parts, 1)}): start it again, it goes on where it ended"


def _some(names: Sequence[str], limit: int = 3) -> str:
    listed = ", ".join(name if name.isprintable() and len(name) <= 100 else shown(name) for name in names[:limit])
    return listed + (", ..." if len(names) > limit else "")


def _count(names: Sequence[str], one: str, many: str | None = None) -> str:
    return f"{len(names)} {one if len(names) == 1 else many or one + 's'}"


def _conversion(suffix: str) -> str:
    hint = _OTHER_FORMATS.get(suffix)
    return f". exl reads safetensors: {hint}" if hint else ""
