"""What ``exl serve`` costs, and whether it holds: ``python -m benchmarks.serving``. Begin with ``__main__.py``."""
