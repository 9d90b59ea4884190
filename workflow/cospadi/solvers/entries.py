"""Which entries of a weight stay: masks by score, for a whole matrix, each column, each row, or m of every n.

As everywhere in `solvers`, arrays are transposed: a row of an array is one output neuron, a column of the weight.
"""

from __future__ import annotations

import re

from cospadi.solvers._arrays import Array, array_namespace, device_of, top_mask

# Where the budget is spent: over all entries, the same in every column (output) or row (input) of W; or "n:m"
PATTERNS = ("matrix", "column", "row")


def kept_of(pattern: str) -> tuple[int, int] | None:
    """``(n, m)`` of a pattern ``"n:m"``, n kept of every m inputs of an output; None for the others."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(found[1]), int(found[2])) if found else None


def best_entries(scores: Array, n_kept: int, pattern: str = "matrix") -> Array:
    """Mask of the entries with the largest scores.

    Parameters
    ----------
    scores : array (d_out, d_in)
        Not negative, finite.
    n_kept : int
        Entries that stay, at most. ``"column"`` and ``"row"`` keep the same number in each, rounded down; ``"n:m"``
        keeps n of every m inputs whatever `n_kept`.
    pattern : str
        One of `PATTERNS`, or ``"n:m"``.

    Returns
    -------
    array (d_out, d_in), bool
        Of equal scores the first stays.

    Raises
    ------
    ValueError
        If m of ``"n:m"`` does not divide d_in.
    """
    d_out, d_in = scores.shape
    quota = kept_of(pattern)
    if quota is not None:
        n, m = quota
        if d_in % m:
            raise ValueError(f"pattern {pattern} needs a multiple of {m} inputs, the matrix has {d_in}")
        return top_mask(scores.reshape(-1, m), n).reshape(d_out, d_in)
    if pattern == "matrix":
        return _top(scores.reshape(1, -1), n_kept).reshape(d_out, d_in)
    if pattern == "column":
        return _top(scores, n_kept // d_out)
    return _top(scores.T, n_kept // d_in).T


def _top(scores: Array, count: int) -> Array:
    if count > 0:
        return top_mask(scores, count)
    xp = array_namespace(scores)
    return xp.zeros(scores.shape, dtype=xp.bool, **device_of(scores))
