"""What a checkpoint says about its quantization: a module for each method, one question that all answer.

Begin with ``base.py``.
"""
