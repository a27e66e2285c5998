"""Quantizes in a child process that kills itself at a given step: python quantize_child.py SRC DST STEP JSON."""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from exl.quantize.options import QuantizeOptions
from exl.quantize.run import quantize

torch.set_num_threads(1)
source, destination, last_step, options = sys.argv[1:]


def progress(done: int, total: int, what: str) -> None:
    if done >= int(last_step):
        os.kill(os.getpid(), signal.SIGKILL)


quantize(source, destination, QuantizeOptions(**json.loads(options)), progress)
