"""A dictionary that scales inputs and mixes none: ``D = diag(d)``, stored and kept as the vector d."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cospadi_values import Bf16


class Diagonal(Bf16):
    """A bfloat16 number an input; of dictionaries alone, with an atom for every input."""

    name, diagonal = "diagonal", True
    for_dictionaries = for_configs = in_codes = False

    def numbers_of_dictionary(self, d_in: int, k: int) -> tuple[int, ...]:
        return (d_in,)


def is_diagonal(spec: Mapping[str, Any]) -> bool:
    """Whether the dictionary of a matrix with this valid spec is a diagonal."""
    return spec["dictionary"]["codec"] == Diagonal.name


def times(x: Any, dictionary: Any | None) -> Any:
    """``x D`` of rows (..., d_in), NumPy or torch: D is (d_in, k), its diagonal (d_in,), or None, the identity."""
    if dictionary is None:
        return x
    if dictionary.ndim > 1:
        return x @ dictionary
    if x.shape[-1] != len(dictionary):  # of one number, it would be repeated
        raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a matrix of {len(dictionary)} rows")
    return x * dictionary


def times_transposed(z: Any, dictionary: Any | None) -> Any:
    """``z D^T`` of rows (..., k), as of `times`."""
    return times(z, dictionary if dictionary is None or dictionary.ndim == 1 else dictionary.T)
