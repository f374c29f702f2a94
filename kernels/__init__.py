"""Kernels of the hot paths; `reference.py` is the specification, fallback and oracle of each in plain PyTorch."""
