"""An edit: blocks that are gone, and linear maps folded into MLPs; in files, or in memory while a model is walked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cospadi.calibration.activations import from_stored, to_stored
from cospadi.files import BFLOAT16

if TYPE_CHECKING:
    import torch

    from cospadi.calibration.walk import Chunk


def fold(transform: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """``T^T W`` of a weight (hidden_size, d_in), ``T^T b`` of a bias: in float64, rounded once to the dtype it has."""
    return (transform.T @ stored.astype(np.float64)).astype(stored.dtype)


@dataclass(frozen=True)
class Edit:
    """What has been done to a model: blocks removed, and transforms (d, d) folded into the MLP of others."""

    removed: frozenset[int] = frozenset()
    transforms: Mapping[int, np.ndarray] = field(default_factory=dict)

    @contextlib.contextmanager
    def applied(self, chunk: Chunk) -> Iterator[None]:
        """The chunk as edited: removed blocks pass on what they get, transforms are in the MLPs."""
        removed = [chunk.block(number) for number in self.removed if number in chunk.layers]
        kept = []
        for number, transform in self.transforms.items():
            if number in chunk.layers:
                down = chunk.block(number).mlp.down_proj
                for parameter in (down.weight, down.bias):
                    if parameter is not None:
                        kept.append((parameter, parameter.data))
                        parameter.data = _folded(transform, parameter.data)
        for block in removed:
            block.forward = lambda hidden_states, *_, **__: hidden_states
        try:
            yield
        finally:
            for block in removed:
                del block.forward
            for parameter, data in kept:
                parameter.data = data


def _folded(transform: np.ndarray, parameter: torch.Tensor) -> torch.Tensor:
    """`fold` of a parameter: what is walked has the bits of what will be written."""
    stored = to_stored(parameter)
    dtype = str(parameter.dtype).removeprefix("torch.")
    folded = fold(transform, stored.view(BFLOAT16) if dtype == "bfloat16" else stored)
    return from_stored(folded.view(stored.dtype), dtype).to(parameter.device)
