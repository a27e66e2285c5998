"""Several files of a folder that say different things about its quantization: the tensors show which is true.

Shapes show bits and groups, ``g_idx`` how many inputs a group has, symmetric zeros the ``checkpoint_format``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.base import QuantConfig
from exl.checkpoint.quant.gptq import GptqConfig
from exl.errors import ConfigError, warn_user
from exl.formats.gptq import format_of_zeros, gptq_fits, gptq_spec, stored_sizes

_REMOTE_ZEROS = 4  # modules whose zeros are read if each takes a request over the network

_SHAPED = ("bits", "group_size", "rules")  # what shapes show


def settle_quant(checkpoint: Checkpoint, quant: QuantConfig | None) -> QuantConfig | None:
    """``quant`` without ``others``: with the values that the tensors show wherever its files disagree.

    Warns (``ExlWarning``) of the files, the fields and the values, and of what a file asks for and exl leaves out.
    Raises ``ConfigError`` that names them where the tensors fit none of them, or cannot tell.
    """
    if quant is not None and quant.note is not None:
        warn_user(f"{checkpoint.path}: {quant.note}")
    if quant is None or not quant.others:
        return quant
    # What GPTQModel writes in planes looks like other bits of GPTQ: no tensor tells them apart.
    planes = any(getattr(file, "checkpoint_format", "") == "gptq_p" for file in (quant, *quant.others))
    if not isinstance(quant, GptqConfig) or planes:
        raise _disagreement(checkpoint, quant)
    files = [quant, *quant.others]
    modules = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
    if not modules:
        return replace(quant, others=())
    settled = replace(_settle_shapes(checkpoint, modules, files), others=())
    settled = _settle_zeros(checkpoint, modules, files, settled)
    differing = [key for key in GptqConfig.deciding if len(_values(files, key)) > 1]
    found = "; ".join(f"{_stated(files, key)}, taking {_shown(key, getattr(settled, key))}" for key in differing)
    warn_user(f"{checkpoint.path}: files disagree about the quantization, going by the tensors: {found}")
    return settled


def _disagreement(checkpoint: Checkpoint, quant: QuantConfig) -> ConfigError:
    """Of files of another method than GPTQ, whose disagreements nobody has met."""
    other = quant.others[0]
    key = next(key for key in quant.deciding if getattr(quant, key) != getattr(other, key))
    return ConfigError(
        f"{checkpoint.path}: {_stated([quant, other], key)}: correct the file that is wrong, or delete it"
    )


def _settle_shapes(checkpoint: Checkpoint, modules: Sequence[str], files: Sequence[GptqConfig]) -> GptqConfig:
    """The values of bits, group size and rules that fit all modules. They may come from different files."""
    fitting = []
    for values in product(*(_values(files, key) for key in _SHAPED)):
        stated = dict(zip(_SHAPED, values, strict=True))
        # Named after the file that says all of it, if one does.
        file = next((f for f in files if all(getattr(f, key) == stated[key] for key in _SHAPED)), None)
        source = " and ".join(f.source for f in files) if file is None else file.source
        config = replace(files[0] if file is None else file, **stated, source=source)
        if all(gptq_fits(checkpoint, name, _of_module(config, name)) for name in modules):
            fitting.append(config)
    if not fitting:
        raise _fits_none(checkpoint, modules, files)
    first, *others = fitting
    for other in others:
        if name := next((name for name in modules if not _same(checkpoint, name, first, other)), None):
            key = next(key for key in _SHAPED if getattr(first, key) != getattr(other, key))
            raise ConfigError(
                f"{checkpoint.path}: {_stated(files, key)}; the tensors of {name} fit both, so that they cannot tell: "
                "correct the file that is wrong, or delete it"
            )
    return first


def _same(checkpoint: Checkpoint, name: str, one: GptqConfig, other: GptqConfig) -> bool:
    """Whether two configurations that fit a module mean the same: -1 and K are both one group."""
    specs = [gptq_spec(checkpoint, name, _of_module(config, name)) for config in (one, other)]
    return specs[0].bits == specs[1].bits and specs[0].group_size == specs[1].group_size


def _fits_none(checkpoint: Checkpoint, modules: Sequence[str], files: Sequence[GptqConfig]) -> ConfigError:
    """An error for values that the tensors contradict. Raises the format's own error for damaged tensors."""
    unfit = {file.source: [n for n in modules if not gptq_fits(checkpoint, n, _of_module(file, n))] for file in files}
    name = next((name for name in modules if all(name in some for some in unfit.values())), None)
    if name is None:  # a module for each
        differing = "; ".join(_stated(files, key) for key in _SHAPED if len(_values(files, key)) > 1)
        wrong = " and ".join(f"those of {some[0]} contradict {source}" for source, some in unfit.items() if some)
        return ConfigError(f"{checkpoint.path}: {differing}; no file fits all tensors: {wrong}")
    sizes = stored_sizes(checkpoint, name)
    key = "bits" if sizes is None or all(_of_module(file, name).bits != sizes[0] for file in files) else "group_size"
    if sizes is None or len(_values(files, key)) == 1:
        for file in files:
            gptq_spec(checkpoint, name, _of_module(file, name))
    bits, K, G = sizes or (0, 0, 0)
    return ConfigError(
        f"{checkpoint.path}: {_stated(files, key)}; the tensors of {name} have {bits} bits and {K} inputs in {G} "
        f"group{'s' * (G > 1)}"
    )


def _settle_zeros(
    checkpoint: Checkpoint, modules: Sequence[str], files: Sequence[GptqConfig], settled: GptqConfig
) -> GptqConfig:
    """``checkpoint_format`` and ``sym`` by the zeros. For a plan of remote files, which needs neither, a few decide."""
    formats, symmetries = _values(files, "checkpoint_format"), _values(files, "sym")
    if len(formats) == len(symmetries) == 1:
        return settled
    some = modules[:_REMOTE_ZEROS] if checkpoint.is_remote else modules
    found = [format_of_zeros(checkpoint, name, _of_module(settled, name)) for name in some]
    if len(symmetries) > 1:
        settled = replace(settled, sym=None not in found)
    shown = set(found) - {None}
    if len(formats) > 1:
        if len(shown) != 1:
            why = "are not symmetric" if not shown else "are of both formats"
            raise ConfigError(
                f"{checkpoint.path}: {_stated(files, 'checkpoint_format')}; the zeros {why}, so that they cannot tell: "
                "correct the file that is wrong, or delete it"
            )
        settled = replace(settled, checkpoint_format=shown.pop())
    return settled


def _of_module(config: GptqConfig, name: str) -> GptqConfig:
    return config.for_quantized(name)  # as ``formats.load``: the tensors say that it is


def _values(files: Iterable[QuantConfig], key: str) -> list[Any]:
    """Different values of a field, in the order of the files."""
    found: list[Any] = []
    for file in files:
        if getattr(file, key) not in found:
            found.append(getattr(file, key))
    return found


def _stated(files: Sequence[QuantConfig], key: str) -> str:
    said = " and ".join(f"{_shown(key, getattr(file, key))} in {file.source}" for file in files)
    return f"{'dynamic' if key == 'rules' else key}: found {said}"


def _shown(key: str, value: Any) -> str:
    if key == "rules":
        return f"{len(value)} rule{'s' * (len(value) != 1)}"
    return str(value).lower() if isinstance(value, bool) else str(value)
