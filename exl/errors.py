"""Every error that exl raises on purpose. One message: what was found, what was expected, where."""

from __future__ import annotations


class ExlError(Exception):
    """Base of all errors that a user of exl can cause or meet."""


class ConfigError(ExlError):
    """An option, argument or configuration file holds a value that makes no sense."""


class CheckpointError(ExlError):
    """A checkpoint's files are damaged, incomplete or hostile."""


class UnsupportedModelError(ExlError):
    """The model is well-formed, but asks for something that exl does not have."""


class MemoryBudgetError(ExlError):
    """What was asked for does not fit in the memory that was given."""


class KernelError(ExlError):
    """A kernel could not be compiled, or was called with arguments it must not be given."""


class NoGpuError(KernelError):
    """There is no NVIDIA GPU, or none that the driver shows: nothing is broken, and nothing has to be installed."""


class ExlWarning(UserWarning):
    """Something was wrong and exl went on with what is most likely meant."""
