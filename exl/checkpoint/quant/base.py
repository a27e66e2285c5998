"""What every quantization configuration answers, whatever method it is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, kw_only=True)
class QuantConfig(ABC):
    """A checkpoint's configuration, or the parameters of one module of it: what :meth:`for_module` returns.

    The parameters of a module name the format of its tensors by their class. A method may mix formats: AutoRound packs
    as GPTQ or as AWQ does, and its modules have parameters of those.
    """

    bits: int  # of a weight; if modules differ, of most
    source: str = "quantize_config.json"  # file, for error messages
    others: tuple[QuantConfig, ...] = field(default=(), repr=False)  # other files of the folder, if they disagree

    method: ClassVar[str]  # Hugging Face's quant_method
    deciding: ClassVar[tuple[str, ...]] = ()  # fields in which files of one folder must not disagree

    @property
    @abstractmethod
    def layout(self) -> str:
        """Which of the method's ways to pack, in the file's words: ``"gptq_v2"``."""

    @property
    def note(self) -> str | None:
        """What the file asks for besides and exl leaves out, because results are only better without; None: nothing."""
        return None

    @abstractmethod
    def for_module(self, name: str) -> QuantConfig | None:
        """Parameters of one module, such as ``"model.layers.0.mlp.up_proj"``; None: the file says that it is dense.

        Raises ``ConfigError`` if the file's patterns need too many steps.
        """

    @abstractmethod
    def for_quantized(self, name: str) -> QuantConfig:
        """Parameters of a module whose tensors are quantized: those of :meth:`for_module`, or if the file says that it
        is dense, what all other modules have. Raises ``ConfigError`` if there is no such thing."""

    def agrees(self, other: QuantConfig) -> bool:
        """Whether two files say the same of all that decides how weights are read."""
        return all(getattr(self, key) == getattr(other, key) for key in self.deciding)


class QuantMethod(Protocol):
    """A module of this folder that reads configurations of one method."""

    # What one file says, by field; what it leaves out, or has as null, is missing.
    read_fields: Callable[[Mapping[str, Any], str], dict[str, Any]]
    # The configuration, from all that the folder's files say and the name of the first.
    make: Callable[[str, Mapping[str, Any]], QuantConfig]
