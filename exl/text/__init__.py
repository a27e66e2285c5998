"""Text at the edge: tokens, whole characters, chat templates, log-probabilities.

Imports checkpoint. Begin with ``tokenizer.py``.
"""
