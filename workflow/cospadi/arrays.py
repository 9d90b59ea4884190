"""Arrays: NumPy on the CPU, torch on a GPU, and the two steps between them."""

from __future__ import annotations

from typing import Any

import numpy as np


def to_numpy(array: Any) -> np.ndarray:
    """A NumPy array of a NumPy or torch array; torch's half-precision floats become float32."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    if array.is_floating_point() and array.element_size() < 4:
        array = array.float()
    return array.numpy()


def on_device(array: np.ndarray, device: str) -> Any:
    """`array` itself for ``"cpu"``, else a torch tensor of the same dtype on `device`."""
    if device == "cpu":
        return array
    import torch

    return torch.as_tensor(array, device=device)
