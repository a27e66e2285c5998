"""From text to token ids and back: tokenizer, streaming of whole characters, chat templates, log-probabilities.

Imports checkpoint. Begin with ``tokenizer.py``.
"""
