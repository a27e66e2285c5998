"""What an answer consists of: text, reasoning, tool calls, read from its tokens while they come.

Imports the tokenizer's wing and below; never the engine. Begin with ``parts.py``, then ``choose.py``.
"""
