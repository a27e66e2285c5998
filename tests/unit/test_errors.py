"""An error in one line with all that it came from."""

from __future__ import annotations

from exl.errors import KernelError, chain_of, with_causes


def raised(*errors: BaseException) -> BaseException:
    """The last of them, each raised while the one before it was handled."""
    before = None
    for error in errors:
        error.__context__, before = before, error
    return before


def test_contexts_and_causes_are_told_from_the_last_to_the_first():
    first, second, third = ValueError("invalid argument"), KernelError("linear_q"), RuntimeError("capture")
    second.__cause__ = first
    assert with_causes(raised(second, third)) == (
        "RuntimeError: capture; caused by KernelError: linear_q; caused by ValueError: invalid argument"
    )
    assert chain_of(third) == [third, second, first]


def test_what_was_hidden_on_purpose_stays_hidden():
    error = raised(ValueError("hidden"), KernelError("shown"))
    error.__suppress_context__ = True  # ``from None``
    assert with_causes(error) == "KernelError: shown"


def test_a_text_that_an_error_repeats_is_told_once():
    inner = ValueError("CUDA_ERROR_INVALID_VALUE: invalid argument")
    outer = KernelError(f"embed on grid (1, 1, 1): {inner}")
    outer.__cause__ = inner
    assert with_causes(outer) == "KernelError: embed on grid (1, 1, 1): CUDA_ERROR_INVALID_VALUE: invalid argument"


def test_one_line_without_torchs_advice():
    error = RuntimeError(
        "CUDA error: operation failed due to a previous error during capture\n"
        "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
        "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA`"
    )
    assert with_causes(error) == "RuntimeError: CUDA error: operation failed due to a previous error during capture"
    assert with_causes(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_circle_ends():
    first, second = ValueError("one"), ValueError("two")
    first.__cause__, second.__cause__ = second, first
    assert with_causes(first) == "ValueError: one; caused by ValueError: two"
