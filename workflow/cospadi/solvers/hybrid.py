"""Sparse weights beside a few learned atoms: ``W ~ S_0 + A S_1``, the dictionary ``[I | A]``.

The identity atoms are free (they take no bytes), so most of the budget buys single weights; a few learned atoms say
what many outputs have in common. Codes of both come from one ADMM over ``[I | A]`` (`solvers.admm`), the atoms in
closed form every few of its iterations. Neither waits for the other to settle: a rising penalty freezes both together,
and ADMM's dual, which remembers what was dropped, goes on under the new atoms.

Where outputs have several metrics (`admm.Stacked`) every one has codes in its own, and the atoms that all of them share
solve the normal equations of all metrics together, by conjugate gradients (`multi_metric`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from cospadi.solvers._arrays import Array, array_namespace, device_of, leading_rows, spd_solver
from cospadi.solvers._threads import one_blas_thread, over_rows, transposed_product
from cospadi.solvers.admm import Parts, Scaled, Stacked, error_of, inverses, over_parts, split_state, values_of
from cospadi.solvers.entries import best_entries
from cospadi.solvers.multi_metric import DICTIONARY_STEPS, dictionary_of

# Penalties of a pass, with how many iterations of the codes each; the atoms follow after every penalty. Passes that
# start low again let the support change once more, with the atoms known (measured in docs/learning.md).
PENALTIES = tuple(0.1 * 1.3**i for i in range(14))
TIMES = 3
PASSES = 3
# Over-relaxation of the codes, and conjugate gradient steps before the atoms follow, and at the beginning and the end
RELAX = 1.6
CG_STEPS, LAST_CG_STEPS = 2, 20
RIDGE = 1e-5


class Extended:
    """The Gram of ``[I | A]`` in the scaled space, its inverses by Schur complement from those of the identity part.

    Parameters
    ----------
    metric : Scaled
    atoms : array (k, d_in)
        A in the scaled space, a row an atom of unit length ``a^T H a = 1``.
    """

    def __init__(self, metric: Scaled, atoms: Array) -> None:
        xp = array_namespace(atoms)
        self._metric = metric
        self.atoms = atoms
        self._seen = atoms @ metric.gram  # (k, d_in): A^T H
        inner = self._seen @ atoms.T
        self._inner = inner + RIDGE * _eye(inner)
        self.gram = xp.concat(
            [xp.concat([metric.gram, self._seen.T], axis=1), xp.concat([self._seen, self._inner], axis=1)]
        )

    def targets(self, targets: Array) -> Array:
        """``[I | A]^T H W`` of ``H W``, both a row an output."""
        xp = array_namespace(targets)
        return xp.concat([targets, over_rows(lambda b: b @ self.atoms.T, targets)], axis=1)

    def inverse(self, rho: float) -> Array:
        """``([I | A]^T H [I | A] + rho I)^-1``."""
        xp = array_namespace(self._seen)
        first = self._metric.inverse(rho)
        solved = self._seen @ first  # (k, d_in)
        schur = self._inner + rho * _eye(self._inner) - solved @ self._seen.T
        corner = spd_solver(schur)(_eye(schur))
        side = -(corner @ solved)
        return xp.concat([xp.concat([first - solved.T @ side, side.T], axis=1), xp.concat([side, corner], axis=1)])


class Dictionary(NamedTuple):
    """``[I | A]`` as the rows of every part see it, A of unit length there.

    Attributes
    ----------
    atoms : array (k, d_in)
        A in the space that its finder solves for it in.
    parts : list of (slice, Extended)
    lengths : list of (slice, array (k,))
        Of that A in the space of every part.
    """

    atoms: Array
    parts: Parts
    lengths: Parts

    def targets(self, targets: Array) -> Array:
        return over_parts(self.parts, Extended.targets, targets)


class _Alone:
    """Atoms of one metric, in its scaled space and of unit length: in closed form."""

    def __init__(self, metric: Scaled) -> None:
        self._metric = metric

    def dictionary(self, atoms: Array) -> Dictionary:
        return Dictionary(atoms, [(slice(None), Extended(self._metric, atoms))], [])

    def first(self, left: Array, n_atoms: int) -> Dictionary:
        return self.dictionary(_first_atoms(self._metric, left, n_atoms))

    def update(self, weights: Array, codes: Array, before: Dictionary) -> tuple[Dictionary, Parts]:
        """The best atoms for these codes, and what codes over ``[I | A]`` have to be multiplied by with them."""
        atoms, lengths = _update(self._metric, weights, codes, before.atoms)
        return self.dictionary(atoms), [(slice(None), lengths)]

    def result(self, codes: Array, dictionary: Dictionary) -> tuple[Array, Array]:
        return codes, dictionary.atoms


class _Together:
    """Atoms that several metrics share: by conjugate gradients, in the space where the mean of the metrics, each over
    its mean diagonal, is the identity.
    """

    def __init__(self, metric: Stacked) -> None:
        self._parts = metric.parts
        plain = [one.plain for _, one in metric.parts]
        mean = Scaled(sum(plain[1:], start=plain[0]) / len(plain), plain[0].dtype)
        self._whitened = mean.factor.T * mean.scale[:, None]  # atoms of the weight times it are those of this space
        back = mean.unwhiten(_eye(mean.gram)) / mean.scale[None, :]  # and the other way
        self._views, self._seen, self._metrics, self._sizes = [], [], [], []
        for _, one in metric.parts:
            xp = array_namespace(one.gram)
            view = back * one.scale[None, :]  # to the scaled space of this part
            seen = xp.astype(one.gram, view.dtype) @ view.T
            own = view @ seen
            size = float(xp.mean(xp.linalg.diagonal(own)))
            self._sizes.append(size)
            found = zip((self._views, self._seen, self._metrics), (view, seen, own / size), strict=True)
            for where, array in found:
                where.append(xp.astype(array, one.gram.dtype))
        self._back = xp.astype(back, one.gram.dtype)

    def given(self, codes: Array, atoms: Array) -> tuple[Array, Dictionary]:
        """Codes over ``[I | A]``, A those of the weight, and A as they are here."""
        xp = array_namespace(atoms)
        d_in = atoms.shape[1]
        found = self._dictionary(xp.astype(xp.astype(atoms, self._whitened.dtype) @ self._whitened, atoms.dtype))
        return over_parts(
            found.lengths, lambda own, c: xp.concat([c[:, :d_in], c[:, d_in:] * own], axis=1), codes
        ), found

    def result(self, codes: Array, dictionary: Dictionary) -> tuple[Array, Array]:
        """The other way."""
        xp = array_namespace(codes)
        d_in = dictionary.atoms.shape[1]

        def over_shared(own: Array, c: Array) -> Array:
            return xp.concat([c[:, :d_in], c[:, d_in:] / own], axis=1)

        return over_parts(dictionary.lengths, over_shared, codes), dictionary.atoms @ self._back

    def update(self, weights: Array, codes: Array, before: Dictionary) -> tuple[Dictionary, Parts]:
        """As `_Alone.update`."""
        xp = array_namespace(codes)
        d_in = weights.shape[1]
        moments, rhs = [], []
        for (rows, lengths), seen, size in zip(before.lengths, self._seen, self._sizes, strict=True):
            shares = codes[rows, d_in:] / lengths
            moments.append(size * transposed_product(shares, shares))
            rhs.append(transposed_product(shares, weights[rows] - codes[rows, :d_in]) @ seen)
        after = self._dictionary(dictionary_of(moments, rhs, self._metrics, before.atoms, DICTIONARY_STEPS))
        ones = xp.ones_like(codes[0, :d_in])
        changes = zip(after.lengths, before.lengths, strict=True)
        return after, [(rows, xp.concat([ones, new / old])) for (rows, new), (_, old) in changes]

    def _dictionary(self, atoms: Array) -> Dictionary:
        parts, lengths = [], []
        for (rows, metric), view in zip(self._parts, self._views, strict=True):
            xp = array_namespace(atoms)
            found = atoms @ view
            length = _lengths(metric, found)
            length = xp.where(length > 0, length, 1.0)
            parts.append((rows, Extended(metric, found / length[:, None])))
            lengths.append((rows, length))
        return Dictionary(atoms, parts, lengths)


@one_blas_thread
def learn(
    metric: Scaled | Stacked,
    weights: Array,
    n_nonzero: int,
    n_atoms: int,
    *,
    start: Array,
    atoms: Array | None = None,
    max_iter: int = PASSES,
    pattern: str = "matrix",
    log: Callable[[str], None] | None = None,
) -> tuple[Array, Array, list[dict[str, Any]]]:
    """One ADMM of the codes over ``[I | A]``, whose atoms A move along with it; the best pair is kept.

    Parameters
    ----------
    metric : Scaled or Stacked
    weights : array (d_out, d_in)
        In the scaled space of every row, ``c * W^T``; weights of several matrices may stand below each other.
    n_nonzero : int
        Of both parts together.
    n_atoms : int
        Learned atoms, at least 1.
    start : array (d_out, d_in) or (d_out, d_in + n_atoms)
        Sparse codes over the identity alone; with `atoms` over both.
    atoms : array (n_atoms, d_in), optional
        First atoms, as they are returned; a `Stacked` metric needs them. The result is never worse than they are.
    max_iter : int
        Passes through `PENALTIES`.

    Returns
    -------
    codes : array (d_out, d_in + n_atoms)
    atoms : array (n_atoms, d_in)
        In the scaled space, ``metric.scale`` times those of the weight itself.
    history : list of dict
        ``iteration``, ``relative_error``, ``seconds``.
    """
    xp = array_namespace(weights)
    began = time.perf_counter()
    d_in = weights.shape[1]
    size = error_of(metric, weights)
    targets = over_parts(metric.parts, lambda one, w: over_rows(lambda w: w @ one.gram, w), weights)
    finder = _Alone(metric) if isinstance(metric, Scaled) else _Together(metric)

    def error_at(codes: Array, dictionary: Dictionary) -> float:
        def left(one: Extended, w: Array, c: Array) -> Array:
            return w - c[:, :d_in] - _product(c[:, d_in:], one.atoms)

        return error_of(metric, over_parts(dictionary.parts, left, weights, codes))

    if atoms is None:
        dictionary = finder.first(weights - start, n_atoms)
        codes = xp.concat([start, xp.zeros_like(weights[:, :n_atoms])], axis=1)
        best, least = (codes, dictionary), float("inf")
    else:
        codes, dictionary = finder.given(start, atoms)
        codes = values_of(dictionary, dictionary.targets(targets), codes, LAST_CG_STEPS)
        best, least = (codes, dictionary), error_at(codes, dictionary)
    history = []
    wanted = dictionary.targets(targets)
    state = split_state(wanted, n_nonzero, codes, pattern, relax=RELAX)
    for iteration in range(max_iter):
        for rho in PENALTIES:
            inverse = inverses(dictionary, rho)
            for _ in range(TIMES):
                state.step(inverse, rho)
            codes = values_of(dictionary, wanted, state.moved * state.support(), CG_STEPS)
            dictionary, lengths = finder.update(weights, codes, dictionary)
            codes = over_parts(lengths, lambda own, c: c * own, codes)
            wanted = dictionary.targets(targets)
            state.follow(wanted, lengths)
        codes = codes * best_entries(abs(codes), n_nonzero, pattern)
        error = error_at(codes, dictionary)
        if error < least:
            best, least = (codes, dictionary), error
        entry = {
            "iteration": iteration,
            "relative_error": float((least / size) ** 0.5) if size else 0.0,
            "seconds": time.perf_counter() - began,
        }
        history.append(entry)
        if log is not None:
            log(f"iter {iteration + 1}/{max_iter} rel_err {entry['relative_error']:.5f} {entry['seconds']:.1f}s")
    codes, dictionary = best
    codes = values_of(dictionary, dictionary.targets(targets), codes, LAST_CG_STEPS)
    return *finder.result(codes, dictionary), history


def _first_atoms(metric: Scaled, left: Array, n_atoms: int) -> Array:
    """Leading directions of what the identity part leaves, in the scaled space."""
    factor = metric.factor  # H = L^T L
    whitened = over_rows(lambda r: r @ factor.T, left)
    directions = leading_rows(whitened, n_atoms)  # (n_atoms, d_in), whitened
    return _unit(metric, metric.unwhiten(directions))


def _update(metric: Scaled, weights: Array, codes: Array, atoms: Array) -> tuple[Array, Array]:
    """Atoms of least error for these codes, ``A = (W - S_0) S_1^T (S_1 S_1^T)^-1``, of unit length.

    Codes over ``[I | A]`` have to be multiplied by the lengths (d_in + k,) that are returned with them.
    """
    xp = array_namespace(codes)
    d_in = weights.shape[1]
    shares = codes[:, d_in:]
    moments = transposed_product(shares, shares)
    mean = float(xp.mean(xp.linalg.diagonal(moments)))
    ones = xp.ones_like(codes[0, :])
    if mean == 0:
        return atoms, ones
    right = transposed_product(shares, weights - codes[:, :d_in])  # (k, d_in)
    found = spd_solver(moments + RIDGE * mean * _eye(moments))(right)
    used = (shares != 0).sum(0) > 0
    found = xp.where(used[:, None], found, atoms)
    lengths = _lengths(metric, found)
    lengths = xp.where(lengths > 0, lengths, 1.0)
    return found / lengths[:, None], xp.concat([ones[:d_in], lengths])


def _unit(metric: Scaled, atoms: Array) -> Array:
    xp = array_namespace(atoms)
    lengths = _lengths(metric, atoms)
    return atoms / xp.where(lengths > 0, lengths, 1.0)[:, None]


def _lengths(metric: Scaled, atoms: Array) -> Array:
    xp = array_namespace(atoms)
    return xp.sqrt(xp.clip(((atoms @ metric.gram) * atoms).sum(1), 0.0, None))


def _product(codes: Array, atoms: Array) -> Array:
    return over_rows(lambda c: c @ atoms, codes)


def _eye(like: Array) -> Array:
    xp = array_namespace(like)
    return xp.eye(like.shape[0], dtype=like.dtype, **device_of(like))
