"""Menus: what every problem of a model could be, for methods without one threshold or step for all of it.

A problem is learned at several sizes; each gives its bytes in the file and the nats a token that its error costs, by
the metric of gradients. One price a byte for the whole model then chooses among the points of all problems. To stay as
it is, at its own bytes and no error, is one point of every problem.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cospadi.allocation import AS_IS, Points, Profile, choose, filled
from cospadi.budget import nbytes_left
from cospadi.errors import ConfigError
from cospadi.formats.factorization import Factorization, unpack
from cospadi.methods.base import MENU, Allocator, Fit, Method
from cospadi.problem import Problem, Target
from cospadi.work import Work

# A size of which less is used is only asked for as far as it is; of more the very same is learned again
_USED = 0.95


def allocator_of(method: Method, settings: Mapping[str, Any]) -> Allocator:
    """How a variant with complete settings that ask for it parts its bytes: by the method's own rule, or by a menu."""
    if settings["allocation"] != MENU:
        return method.allocator
    sizes = settings["menu"]
    return Allocator(profile=partial(profile, method, sizes), share=share, work=partial(_work, method, sizes))


def profile(
    method: Method,
    sizes: Sequence[float],
    problem: Problem,
    nbytes: int,
    *,
    storage: Mapping[str, Any],
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """``points``: bytes in the file and predicted rise in nats a token at each size that the method can do, once."""
    if options.get("max_seconds") is not None:
        options["max_seconds"] /= len(sizes)
    found: dict[int, float] = {}
    for size in _bytes_of(sizes, nbytes, problem.shapes):
        try:
            factors = method.fit(problem, size, Fit(storage=storage, device=device), **options)
        except ConfigError:  # too few bytes for this matrix are none of its choices
            continue
        taken, rise = _stored(problem, factors)
        size = size if taken > _USED * size else taken
        found[size] = min(rise, found.get(size, rise))
    return {"points": sorted(found.items())}


def _bytes_of(sizes: Sequence[float], nbytes: int, shapes: Sequence[tuple[int, int]]) -> list[int]:
    dense = nbytes_left(shapes, 0)
    return [int(size * nbytes) for size in sorted(sizes) if size * nbytes < dense]


def _stored(problem: Problem, factors: Sequence[Factorization]) -> tuple[int, float]:
    """Bytes of a problem's factors in the file, and the nats a token that their error costs."""
    tensors: dict[str, np.ndarray] = {}
    rise = 0.0
    for matrix, price, one in zip(problem.matrices, problem.prices, factors, strict=True):
        packed, spec = matrix.restored(one).pack(matrix.name)
        stored = unpack(packed, spec, matrix.name).reconstruct().astype(np.float64)
        rise += price * matrix.squared_norm(matrix.weight() - stored)
        tensors |= packed  # a dictionary that they share is there once
    return sum(tensor.nbytes for tensor in tensors.values()), float(rise)


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
    """Predicted rise of each problem at its bytes: the least of its points that are no larger; None without one."""
    found = []
    for one, nbytes in zip(profiles, shares, strict=True):
        within = [rise for size, rise in one.figures["points"] if nbytes is not None and size <= nbytes]
        found.append(0.0 if nbytes is None else min(within, default=None))
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
    return Work(memory, 0, sum(work.core for work in works), sum(work.gpu for work in works))
