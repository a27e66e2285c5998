"""The first minutes on a GPU: ``python -m benchmarks.gpu_run --out DIR --seconds 480``. See ``docs/gpu.md``.

``runner.py`` runs stages and writes summaries; ``driver.py`` runs one stage's items in worker processes that may die;
``worker.py`` is the code in those processes. None of the three imports torch or exl.
"""
