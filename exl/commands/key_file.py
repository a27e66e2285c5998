"""Files of API keys."""

from __future__ import annotations

from pathlib import Path

from exl.errors import ConfigError
from exl.user_text import read_text


def read_keys(path: Path, expected: str) -> list[str]:
    """Its lines that are not empty. Raises ``ConfigError``: there is none, but ``expected`` was."""
    lines = [line.strip() for line in read_text(path, f"--api-key-file: {path}").splitlines()]
    keys = [line for line in lines if line]
    if not keys:
        raise ConfigError(f"--api-key-file: {path}: found no key, expected {expected}")
    return keys
