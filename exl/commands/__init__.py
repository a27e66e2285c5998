"""The commands of ``exl``, a module each. None imports torch before it runs."""
