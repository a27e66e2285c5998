"""The folder for files that exl can make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache_folder(name: str) -> Path:
    """The path of exl's folder ``name`` in the user's cache, by the platform's convention (XDG on Linux).

    Does not create it.
    """
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "exl" / name


# The chat model that `make chat` makes: scripts/fetch_smollm2.py and scripts/chat_model.py.
CHAT_MODEL = "SmolLM2-135M-Instruct"
DENSE_CHAT_MODEL = f"{CHAT_MODEL}-f16"
QUANTIZED_CHAT_MODEL = f"{CHAT_MODEL}-GPTQ-4bit"  # in a folder that is named by the recipe's digest
RECIPE_FOLDER = "recipe-{digest}"


def chat_model_folder(dense: bool = False) -> Path | None:
    """The folder of SmolLM2-135M-Instruct in the user's cache, if ``make chat`` has made it on this machine, else None.

    The model is quantized to 4 bits; with ``dense`` it is the f16 model that was quantized. Only looks: loads and
    fetches nothing. A folder that is not finished is not returned; of several recipes' folders the newest is.
    """
    pattern = DENSE_CHAT_MODEL if dense else f"{RECIPE_FOLDER.format(digest='*')}/{QUANTIZED_CHAT_MODEL}"
    # config.json is written last.
    found = list(user_cache_folder("models").glob(f"{pattern}/config.json"))
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent if found else None
