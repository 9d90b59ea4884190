"""What travels inside a checkpoint: unpacking, ``y = (x D) S``, the classes transformers loads.

The other modules of this folder are copied flat into every checkpoint, so they import torch, transformers, safetensors,
the standard library and one another (``from .x import y``), and nothing else.
"""
