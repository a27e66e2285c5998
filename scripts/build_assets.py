"""Makes the model that ships with exl: exl/assets/stories, from tests/data/stories260K.

python scripts/build_assets.py
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from exl.checkpoint.hub import BUNDLED_MODEL
from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize

DATA = Path(__file__).parents[1] / "tests" / "data"


def main() -> None:
    options = QuantizeOptions(bits=4, group_size=32, calibration=DATA / "calibration" / "stories260K.txt")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "stories"
        quantize(DATA / "stories260K", made, options)
        for path in made.iterdir():
            shutil.copy(path, BUNDLED_MODEL / path.name)


if __name__ == "__main__":
    main()
