from __future__ import annotations

import torch

# Tiny matrices: a second thread only waits, and on a busy machine it waits for milliseconds at every barrier.
torch.set_num_threads(1)
