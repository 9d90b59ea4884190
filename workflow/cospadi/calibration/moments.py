"""What `head.measure_head` wrote, read again; nothing that a model needs is imported for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cospadi.calibration.activations import FORMAT_VERSION, reading
from cospadi.errors import ArtifactError
from cospadi.provenance import check_provenance

_REMEDY = "Delete it and run again to measure the head anew"


class HeadMoments(NamedTuple):
    """What `measure_head` wrote, a token: float64 Gram (hidden_size, hidden_size), squares and counts (vocabulary,)."""

    gram: np.ndarray
    squares: np.ndarray
    counts: np.ndarray


def read_head_moments(path: str | Path, belongs: Mapping[str, Any]) -> HeadMoments:
    """Moments of a head, each divided by the number of tokens.

    Parameters
    ----------
    path : path-like
    belongs : mapping
        What the file has to say of itself: ``fingerprint``, and of the calibration what is known.

    Raises
    ------
    ArtifactError
        If the file is missing, damaged, or of another model or calibration.
    """
    with reading(path, _REMEDY) as file:
        says, n_tokens = dict(file.attrs), int(file.attrs["n_tokens"])
        parts = [file[name][:].astype(np.float64) for name in HeadMoments._fields]
    check_provenance(path, says, {"format_version": FORMAT_VERSION, **belongs}, _REMEDY)
    if n_tokens < 1 or not all(np.isfinite(part).all() for part in parts):
        raise ArtifactError(path, "holds no token, or numbers that are NaN or infinite", _REMEDY)
    return HeadMoments(*(part / n_tokens for part in parts))
