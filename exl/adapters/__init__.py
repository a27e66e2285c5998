"""LoRA adapters as peft saves them: read, checked against a model, and where their bytes lie. Imports what is below
``models``, and that. Begin with ``manifest.py``."""
