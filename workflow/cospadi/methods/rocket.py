"""ROCKET (arXiv 2602.11008): one pass from eigenvectors to sparse codes, and a knapsack over the whole model.

The leading eigenvectors b_i of the whitened weight are the basis, ``C = B^T L W`` the codes. A code is as important as
``|c_ij| ||L^-1 b_i||^lambda``: half in the metric of the activations, half in that of the weight. Every column keeps
its most important codes but for a share beta, which goes to the most important ones of the whole matrix; the dictionary
is then a ridge regression. Each matrix is measured at several ratios, and a knapsack chooses among them: the least sum
of relative errors of the weights within the bytes, where no error is above the smallest cap that the bytes allow.

What differs from the paper: its ratio leaves the mask of the codes out, here every byte counts, so there is less of
everything at the same ratio. At each ratio the best of a few rho is taken, the paper's grid has 21. The knapsack is
solved by one price a byte (`allocation.choose`) and not exactly. Leaving a matrix as it is may be chosen, as the paper
means it. There is no refinement by Adam, which the paper does not mention and its code has.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cospadi.allocation import AS_IS, Point, Points, Profile, choose
from cospadi.arrays import on_device, to_numpy
from cospadi.budget import SparseShape, low_rank, nbytes_left, sparse_shape
from cospadi.errors import ConfigError
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import storage_of
from cospadi.methods.base import (
    WHITENING_OPTIONS,
    Allocator,
    Fit,
    Method,
    Problems,
    allocation_option,
    budget_faults,
    work_of,
)
from cospadi.problem import Problem, Target, side_by_side
from cospadi.registry import option
from cospadi.work import PRODUCT, Work

RULE = "knapsack"

OPTIONS: dict[str, dict[str, Any]] = {
    **allocation_option(RULE, "every matrix one of its candidate_ratios, for the least sum of errors of the weights"),
    "candidate_ratios": option(
        "array",
        "Ratios that the knapsack chooses among, besides the variant's own and a matrix as it is.",
        items={"type": "number", "minimum": 0.01, "maximum": 0.95},
        minItems=1,
        uniqueItems=True,
        default=[round(0.05 * i, 2) for i in range(1, 15)],
    ),
    "rhos": option(
        "array",
        "Atoms over nonzeros a column that are tried; the best for the weight itself is taken. 1: all "
        "codes stay, and no mask is stored.",
        items={"type": "number", "minimum": 1, "maximum": 16},
        minItems=1,
        uniqueItems=True,
        default=[1.0, 1.5, 2.0, 2.5, 3.0],
    ),
    "importance": option(
        "number",
        "Exponent lambda: how much the length of an atom in the space of the weight counts.",
        minimum=0,
        maximum=2,
        default=0.5,
    ),
    "over_sparsify": option(
        "number",
        "Share beta of its codes that every column gives to the most important ones of the matrix.",
        minimum=0,
        maximum=1,
        default=0.005,
    ),
    "ridge": option(
        "number",
        "Ridge of the dictionary, as a share of the mean energy of an atom's codes.",
        minimum=0,
        maximum=1,
        default=0.001,
    ),
    **WHITENING_OPTIONS,
}


class _Analysis(NamedTuple):
    """A weight in its eigenbasis: (d, n), its codes (n, r), lengths of the atoms before whitening (r,), shift."""

    weight: Any
    codes: Any
    lengths: Any
    shift: float


class _Found(NamedTuple):
    """Factors at some rho: dictionary (d, k), codes (n, k), what of them is stored, and the error of the weight."""

    rho: float
    shape: SparseShape
    dictionary: Any
    codes: Any
    mask: Any
    error: float


def fit(problem: Problem, nbytes: int, how: Fit, **options: Any) -> list[Factorization]:
    """The best of ``rhos`` for the weight itself, each in one pass.

    There are at most as many atoms as eigenvectors. Options that are missing have their defaults.
    """
    options = METHOD.complete(options)
    analysis = _analyse(problem, how.device, options)
    found = _best(analysis, problem.shape, nbytes, how.storage, options)
    if how.log is not None:
        how.log(f"rho {found.rho:g}, {found.shape.n_atoms} atoms, error of the weight {found.error:.4f}")
    codes, mask = to_numpy(found.codes).T, to_numpy(found.mask).T
    dense = found.rho == 1
    return problem.split(
        Factorization(
            np.ascontiguousarray(to_numpy(found.dictionary)),
            np.ascontiguousarray(codes),
            support="dense" if dense else "bitmask",
            mask=None if dense else np.ascontiguousarray(mask),
            **how.storage,
            diagnostics={
                "solver": "eigenbasis",
                "n_atoms": found.shape.n_atoms,
                "n_nonzero_coefs": found.shape.n_nonzero_coefs,
                "rho": found.rho,
                "weight_error": found.error,
                "shift": analysis.shift,
                "eta": options["eta"],
            },
        )
    )


def _analyse(problem: Problem, device: str, options: Mapping[str, Any]) -> _Analysis:
    from cospadi.solvers import eigenbasis

    whitening = problem.metric.whitening(whiten=options["whiten"], eta=options["eta"])
    weight = problem.weight
    basis, codes = eigenbasis.analysis(on_device(whitening.whiten(weight), device), min(weight.shape))
    lengths = np.linalg.norm(whitening.unwhiten(to_numpy(basis)), axis=0)
    return _Analysis(on_device(weight, device), codes, on_device(lengths, device), whitening.shift)


def _shapes(
    size: tuple[int, int], nbytes: int, rhos: Sequence[float], storage: Mapping[str, Any]
) -> dict[float, SparseShape]:
    """Rho to k and s, of those for which the bytes are enough; `ConfigError` if they are for none."""
    found, fault = {}, None
    for rho in rhos:
        try:
            if rho == 1:
                rank = low_rank(*size, nbytes=nbytes, **storage)
                found[rho] = SparseShape(rank, rank)
            else:
                found[rho] = sparse_shape(*size, nbytes=nbytes, rho=rho, most_atoms=min(size), **storage)
        except ConfigError as error:
            fault = error
    if not found:
        raise fault
    return found


def _best(
    analysis: _Analysis, size: tuple[int, int], nbytes: int, storage: Mapping[str, Any], options: Mapping[str, Any]
) -> _Found:
    from cospadi.solvers import eigenbasis

    best = None
    for rho, shape in _shapes(size, nbytes, options["rhos"], storage).items():
        codes = analysis.codes[:, : shape.n_atoms]
        importance = abs(codes) * analysis.lengths[None, : shape.n_atoms] ** options["importance"]
        share_ = options["over_sparsify"]
        mask = eigenbasis.important(importance, shape.n_nonzero_coefs, share_)
        if rho > 1 and not _fits(mask, nbytes, size[0], storage):
            # columns of different lengths may have more scales than columns of the same
            mask = eigenbasis.important(importance, shape.n_nonzero_coefs, 0.0)
        kept = codes * mask
        dictionary, error = eigenbasis.ridge_dictionary(analysis.weight, kept, options["ridge"])
        if best is None or error < best.error:
            best = _Found(rho, shape, dictionary, kept, mask, error)
    return best


def _fits(mask: Any, nbytes: int, d_in: int, storage: Mapping[str, Any]) -> bool:
    codes = np.ascontiguousarray(to_numpy(mask).T)
    return Factorization(np.empty((d_in, len(codes)), np.float32), codes, mask=codes, **storage).nbytes <= nbytes


def profile(
    problem: Problem, nbytes: int, *, storage: Mapping[str, Any], device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """``points``: bytes and ``||W - W~||_F / ||W||_F`` at every ratio that may be chosen, all in one analysis;
    ``as_is``: the same of the weight as it is, in the codec of the values.
    """
    options = METHOD.complete(options)
    analysis = _analyse(problem, device, options)
    sizes = {nbytes, *(nbytes_left(problem.shapes, ratio) for ratio in options["candidate_ratios"])}
    points = []
    for size in sorted(sizes):
        try:
            points.append([size, _best(analysis, problem.shape, size, storage, options).error])
        except ConfigError:  # a ratio that is too high for this matrix is none of its choices
            continue
    off = [
        one.weighted(weight - Factorization.as_it_is(weight, storage).quantized().codes)
        for one in problem.matrices
        for weight in [one.weight()]
    ]
    as_is = np.linalg.norm(np.concatenate(off, axis=1)) / np.linalg.norm(problem.weight)
    return {"points": points, "as_is": float(as_is)}


def share(profiles: Sequence[Profile], nbytes: int, *, storage: Mapping[str, Any], **options: Any) -> list[int | None]:
    """Bytes of least summed error, where no error is above the smallest cap that the bytes allow.

    Raises
    ------
    ConfigError
        If the fewest bytes of all are more than that.
    """
    choices = [one.points(storage) for one in profiles]

    def allowed(cap: float) -> list[list[Point]]:
        return [[point for point in points if point.error <= cap] for points in choices]

    caps = sorted({point.error for points in choices for point in points})
    first = bisect.bisect_left(
        caps,
        True,
        key=lambda cap: sum(min((p.nbytes for p in points), default=math.inf) for points in allowed(cap)) <= nbytes,
    )
    menus = {index: Points(points) for index, points in enumerate(allowed(caps[min(first, len(caps) - 1)]))}
    chosen = choose(menus, nbytes, highest=max(1.0, caps[-1]))
    return [None if chosen[index].method == AS_IS else chosen[index].nbytes for index in range(len(profiles))]


def _passes(
    targets: Sequence[Target], nbytes: int, rhos: Sequence[float], ratios: int, storage: Mapping[str, Any]
) -> Work:
    """Work of an analysis, and of a pass for every rho at so many ratios."""
    d, n = side_by_side([target.shape for target in targets])
    k = max(shape.n_atoms for shape in _shapes((d, n), nbytes, rhos, storage).values())
    one = 2 * n * k * k + 2 * n * k * d + 2 * k * k * d + k**3 / 3 + 40 * n * k
    analysis = 10 * min(d, n) ** 3 + 2 * d * n * min(d, n) + d * d * min(d, n)
    return work_of(d, n, k, analysis, more={PRODUCT: ratios * len(rhos) * one})


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: eigenvectors, and a pass for every rho."""
    return _passes(targets, nbytes, METHOD.complete(options)["rhos"], 1, storage)


def profiling(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a profile: as many passes as there are candidates."""
    options = METHOD.complete(options)
    return _passes(targets, nbytes, options["rhos"], 1 + len(options["candidate_ratios"]), storage)


def modules(options: Mapping[str, Any]) -> list[str]:
    """This module and the solver."""
    return [__name__, "cospadi.solvers.eigenbasis"]


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Ratios that leave no atom."""
    storage = storage_of(settings.get("codes", {}))
    rhos = METHOD.complete(settings)["rhos"]
    yield from budget_faults(settings, problems, lambda shape, nbytes: _shapes(shape, nbytes, rhos, storage))


METHOD = Method(
    name="rocket",
    summary="Eigenbasis of the whitened weight, codes by importance, ridge dictionary, in one pass (ROCKET).",
    options=OPTIONS,
    factors="sparse codes",
    fit=fit,
    work=work,
    modules=modules,
    faults=faults,
    allocator=Allocator(profile=profile, share=share, work=profiling, options=("candidate_ratios",)),
)
