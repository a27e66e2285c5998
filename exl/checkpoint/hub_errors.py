"""Errors of the Hugging Face hub, explained in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from exl.errors import CheckpointError

Token = str | bool | None  # as in huggingface_hub: None: the token saved by logging in, if any; False: no token


@contextmanager
def explain_hub_errors(what: str, revision: str | None = None) -> Iterator[None]:
    """Turns errors of huggingface_hub and the network into ``CheckpointError``: one line that begins with ``what``."""
    from huggingface_hub.errors import HTTPError  # from the HTTP library that the installed version uses

    try:
        yield
    except CheckpointError:
        raise
    except ImportError as error:
        raise CheckpointError(
            f"{what}: a plan without a download needs huggingface_hub 1.0 or newer: {first_line(error)}"
        ) from None
    except (HTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{what}, and {_reason(error, revision)}") from None


def _reason(error: BaseException, revision: str | None) -> str:
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "not in huggingface_hub's cache, and offline mode (HF_HUB_OFFLINE) allows no download"
    if isinstance(error, errors.LocalEntryNotFoundError) and cause is not None:
        return _reason(cause, revision)
    if isinstance(error, errors.GatedRepoError):
        return "its repository is gated: ask for access on its page, then log in (hf auth login) or give a token"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "Hugging Face has no such repository, or a private one: log in (hf auth login) or give a token for that"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"its repository has no revision {revision!r}"
    if isinstance(error, errors.EntryNotFoundError):
        return "its repository has no such file"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "Hugging Face does not know the token (401)"
    if status == 403:
        return "the token may not read its repository (403)"
    if status is not None:
        return f"Hugging Face answered with status {status}: {first_line(error)}"
    if isinstance(error, errors.HTTPError | ConnectionError):
        return f"Hugging Face cannot be reached: {first_line(error)}"
    return f"cannot be downloaded from Hugging Face: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
