"""Anthropic's protocol. Begin with ``messages.py``."""
