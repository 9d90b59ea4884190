"""Menus: what every problem of a model could be, for methods without one threshold or step for all of it.

A problem is learned at several sizes; each gives its bytes in the file and the nats a token that its error costs, by
the metric of gradients, or as measured in the model where it alone is exchanged. One price a byte for the whole model
then chooses among the points of all problems. To stay as it is, at its own bytes and the error of the codec of the
values (none in 16 bits), is one point of every problem.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cospadi.allocation import AS_IS, Points, Profile, choose, filled
from cospadi.budget import nbytes_left
from cospadi.errors import ConfigError
from cospadi.formats.factorization import Factorization, unpack
from cospadi.methods.base import MEASURED, MENU, Allocator, Fit, Method
from cospadi.problem import Problem, Target
from cospadi.work import Work, in_all

# Matrices by name, as stored, to the nats a token that they cost the model when they alone are exchanged
Measure = Callable[[Mapping[str, np.ndarray]], float]

# A size of which less is used is only asked for as far as it is
_USED = 0.95


def allocator_of(method: Method, settings: Mapping[str, Any], measure: Measure | None = None) -> Allocator:
    """How a variant with complete settings that ask for it parts its bytes: by the method's own rule, or by a menu.

    `measure` says what the sizes cost; without it the metric does.
    """
    if settings["allocation"] not in (MENU, MEASURED):
        return method.allocator
    sizes = settings["menu"]
    return Allocator(profile=partial(profile, method, sizes, measure), share=share, work=partial(_work, method, sizes))


def profile(
    method: Method,
    sizes: Sequence[float],
    measure: Measure | None,
    problem: Problem,
    nbytes: int,
    *,
    storage: Mapping[str, Any],
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """``points``: bytes in the file and what they cost in nats a token at each size that the method can do, once;
    ``as_is``: what the matrices as they are cost, where the codec of the values does not hold them exactly.
    """
    if options.get("max_seconds") is not None:
        options["max_seconds"] /= len(sizes)

    def learned(size: int) -> tuple[int, float]:
        factors = method.fit(problem, size, Fit(storage=storage, device=device), **options)
        factors = [matrix.restored(one) for matrix, one in zip(problem.matrices, factors, strict=True)]
        return _stored(problem, factors, measure)

    found: dict[int, float] = {}
    for size in _bytes_of(sizes, nbytes, problem.shapes):
        with contextlib.suppress(ConfigError):  # too few bytes for this matrix are none of its choices
            taken, rise = learned(size)
            while taken <= _USED * size:  # a search for fewer bytes need not end where that for more did
                size, (taken, rise) = taken, learned(taken)
            found[size] = min(rise, found.get(size, rise))
    return {"points": sorted(found.items()), "as_is": _as_is(problem, storage, measure)}


def _bytes_of(sizes: Sequence[float], nbytes: int, shapes: Sequence[tuple[int, int]]) -> list[int]:
    dense = nbytes_left(shapes, 0)
    return [int(size * nbytes) for size in sorted(sizes) if size * nbytes < dense]


def _stored(problem: Problem, factors: Sequence[Factorization], measure: Measure | None) -> tuple[int, float]:
    """Bytes of factors of a problem's matrices in the file, and the nats a token that their error costs."""
    tensors: dict[str, np.ndarray] = {}
    stored: dict[str, np.ndarray] = {}
    for matrix, one in zip(problem.matrices, factors, strict=True):
        packed, spec = one.pack(matrix.name)
        stored[matrix.name] = unpack(packed, spec, matrix.name).reconstruct()
        tensors |= packed  # a dictionary that they share is there once
    return sum(tensor.nbytes for tensor in tensors.values()), (measure or _predicted(problem))(stored)


def _as_is(problem: Problem, storage: Mapping[str, Any], measure: Measure | None) -> float:
    """The nats a token that it costs to store a problem's matrices as they are, in the codec of the values."""
    weights = [matrix.weight() for matrix in problem.matrices]
    factors = [Factorization.as_it_is(weight, storage) for weight in weights]
    if all(np.array_equal(one.quantized().codes, weight) for one, weight in zip(factors, weights, strict=True)):
        return 0.0
    return _stored(problem, factors, measure)[1]


def _predicted(problem: Problem) -> Measure:
    """What errors of a problem's matrices cost by its metric."""

    def measure(stored: Mapping[str, np.ndarray]) -> float:
        errors = [one.squared_norm(one.weight() - stored[one.name].astype(np.float64)) for one in problem.matrices]
        return float(sum(price * error for price, error in zip(problem.prices, errors, strict=True)))

    return measure


def share(profiles: Sequence[Profile], nbytes: int, *, storage: Mapping[str, Any], **options: Any) -> list[int | None]:
    """Bytes of least predicted rise; never more of it than the same ratio for all would leave.

    Raises
    ------
    ConfigError
        If the fewest bytes of all are more than that.
    """
    menus = {index: Points(one.points(storage)) for index, one in enumerate(profiles)}
    highest = max((rise for one in profiles for _, rise in one.figures["points"]), default=1.0)
    found = [choose(menus, nbytes, highest=highest or 1.0)]
    ratio = 1 - nbytes / nbytes_left([shape for one in profiles for shape in one.shapes], 0)
    alike = {index: menus[index].within(nbytes_left(one.shapes, ratio)) for index, one in enumerate(profiles)}
    if None not in alike.values():  # one price is the optimum on convex hulls, which points need not be on
        found.append(filled(menus, alike, nbytes))
    chosen = min(found, key=lambda points: sum(point.error for point in points.values()))
    return [None if chosen[index].method == AS_IS else chosen[index].nbytes for index in menus]


def rises(profiles: Sequence[Profile], shares: Sequence[int | None]) -> list[float | None]:
    """What each problem costs at its bytes: the least of its points that are no larger; None without one."""
    found = []
    for one, nbytes in zip(profiles, shares, strict=True):
        within = [rise for size, rise in one.figures["points"] if nbytes is not None and size <= nbytes]
        found.append(one.as_is if nbytes is None else min(within, default=None))
    return found


def _work(
    method: Method,
    sizes: Sequence[float],
    targets: Sequence[Target],
    nbytes: int,
    options: Mapping[str, Any],
    storage: Mapping[str, Any],
) -> Work:
    works = []
    for size in _bytes_of(sizes, nbytes, [target.shape for target in targets]):
        with contextlib.suppress(ConfigError):  # too few bytes
            works.append(method.work(targets, size, options, storage))
    memory = max((work.memory for work in works), default=0.0)
    return Work(memory, 0, *in_all(works))
