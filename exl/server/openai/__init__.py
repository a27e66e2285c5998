"""OpenAI's protocol. Begin with ``chat.py``."""
