from __future__ import annotations

import signal

import torch

# Tiny matrices: a second thread only waits, and on a busy machine it waits for milliseconds at every barrier.
torch.set_num_threads(1)

# A test run that was started in the background ignores Ctrl-C; tests that raise it for themselves must be heard.
if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.default_int_handler)
