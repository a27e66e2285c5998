"""How well a model predicts a text: which tokens are predicted from which, the figures over them, and predictions on
disk. Imports text and errors; ``exl/evaluate.py``, which runs models, is built on it. Begin with ``passages.py``."""
