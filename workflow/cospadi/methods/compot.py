"""COMPOT (arXiv 2602.15200): orthonormal atoms, so that the best codes are a threshold away.

Its allocation looks at the weights alone. The singular values of all matrices, each over the norm of its matrix, go
into one pool; the largest stay, and a matrix gets the bytes that the rank left of it would take. Here the ratio of a
matrix stays between 0 and .8 (or the ratio asked for, where that is more), and a matrix gets no more bytes than
orthonormal atoms can use; the paper has such guards, its values we do not know. Uniform is the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cospadi.allocation import Profile
from cospadi.budget import nbytes_left, sparse_shape
from cospadi.errors import ConfigError
from cospadi.methods import cospadi
from cospadi.methods.base import MOST_REMOVED, UNIFORM, Allocator, Method, allocation_option, work_of
from cospadi.problem import Problem, Target, side_by_side
from cospadi.solvers.svd import squares_left
from cospadi.work import Work

RULE = "spectra"

# The solver is the method; its codes are exact, and another metric's atoms would not be orthonormal
_NOT_HERE = ("solver", "atom_update", "polish", "group_metric")
_SOLVER = {"solver": "procrustes"}


def profile(
    problem: Problem, nbytes: int, *, storage: Mapping[str, Any], device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """``singular_values`` of the weight over its Frobenius norm, the largest first."""
    left = squares_left(problem.weight)
    squares = np.maximum(-np.diff(left), 0)
    return {"singular_values": np.sqrt(squares / left[0]).tolist()}


def share(profiles: Sequence[Profile], nbytes: int, *, storage: Mapping[str, Any], **options: Any) -> list[int]:
    """Bytes by the rank that one threshold for all normalised singular values leaves of each matrix."""
    shapes = [side_by_side(one.shapes) for one in profiles]
    dense = np.array([nbytes_left(one.shapes, 0) for one in profiles])
    ratio = 1 - nbytes / dense.sum()
    rhos = cospadi.RHO_GRID if options["rho"] == cospadi.AUTO else [options["rho"]]
    stored = {"rho": min(rhos), "support": options["support"], **storage}
    bounds = [_bounds(shape, ratio, stored) for shape in shapes]
    least, most = np.array(bounds).T
    of_a_rank = dense * [sum(shape) / math.prod(shape) for shape in shapes]
    spectra = [np.array(one.figures["singular_values"])[::-1] for one in profiles]
    pool = np.sort(np.concatenate(spectra))[::-1]

    def at(kept: int) -> np.ndarray:
        threshold = pool[kept - 1] if kept else np.inf
        ranks = np.array([len(values) - np.searchsorted(values, threshold) for values in spectra])
        return np.clip(np.floor(ranks * of_a_rank), least, most).astype(int)

    low, high = 0, len(pool)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if at(middle).sum() <= nbytes else (low, middle - 1)
    return at(low).tolist()


def _bounds(shape: tuple[int, int], ratio: float, stored: Mapping[str, Any]) -> tuple[int, int]:
    """Fewest and most bytes of a matrix."""
    least = nbytes_left([shape], max(MOST_REMOVED, ratio))
    try:
        sparse_shape(*shape, nbytes=least, **stored)
    except ConfigError:  # a matrix so small that this is no atom
        least = nbytes_left([shape], ratio)
    low, high = least, nbytes_left([shape], 0)
    while low < high:
        middle = (low + high + 1) // 2
        fits = sparse_shape(*shape, nbytes=middle, **stored).n_atoms <= min(shape)
        low, high = (middle, high) if fits else (low, middle - 1)
    return least, low


def _profiling(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    d, n = side_by_side([target.shape for target in targets])
    return work_of(d, n, 1, 10 * min(d, n) ** 3 + 2 * d * n * min(d, n))


METHOD = Method(
    name="compot",
    summary="Orthonormal dictionary by Procrustes with thresholded codes (COMPOT).",
    options={
        **allocation_option(
            RULE,
            "by the rank that one threshold for the singular values of all weights, each over its norm, leaves",
            default=UNIFORM,
        ),
        **{name: schema for name, schema in cospadi.METHOD.options.items() if name not in _NOT_HERE},
    },
    factors=cospadi.METHOD.factors,
    fit=partial(cospadi.fit, **_SOLVER),
    work=lambda targets, nbytes, options, storage: cospadi.work(targets, nbytes, {**options, **_SOLVER}, storage),
    modules=lambda options: [__name__, *cospadi.modules({**options, **_SOLVER})],
    faults=lambda settings, problems=(): cospadi.faults({**settings, **_SOLVER}, problems),
    allocator=Allocator(profile=profile, share=share, work=_profiling),
)
