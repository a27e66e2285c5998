"""All parts put together, token ids in and out: runner, graphs of steps, generator.

Imports everything below it. Begin with ``build.py``, then ``generator.py`` and ``runner.py``.
"""
