"""Which kernels compute on the CPU: exl's own, where they can run, else torch's."""

from __future__ import annotations

import functools
import logging

from exl.errors import KernelError
from exl.layout.specs import Target

logger = logging.getLogger(__name__)

COMPILED = Target("cpu", compiled=True)


@functools.cache
def torch_target() -> Target:
    """How weights lie for this torch's kernels, on this processor."""
    from exl.ops.torch_linear import probe_int4pack  # a plan for kernels that do run need not wait for torch

    return Target("cpu", int4pack=probe_int4pack())


@functools.cache
def why_not_compiled() -> str | None:
    """What keeps exl's own kernels from running here; None: nothing. The first call loads and runs one."""
    try:
        from exl.cpu_kernels import probe
        from exl.cpu_kernels.library import shared_library

        reason = probe.why_not()
        if reason is not None:
            return reason
        shared_library()
    except (ImportError, OSError) as error:  # no llvmlite, or one whose library this system does not load
        return f"llvmlite cannot be imported ({error})"
    except (KernelError, RuntimeError) as error:  # LLVM's own errors
        return " ".join(str(error).split())
    return None


def cpu_target() -> Target:
    """The target of this machine's CPU. Says once in the log, in one line, why it is not exl's own kernels'."""
    reason = why_not_compiled()
    if reason is None:
        return COMPILED
    _say_once(reason)
    return torch_target()


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("computing through torch, slower and less exact: exl's own CPU kernels cannot run: %s", reason)
