"""Exchange entries of codes inside their groups, where each keeps n of m: what ADMM settles on can still be bettered.

Where entry i of a row leaves its support S, entry j of its group comes, and all other values follow, the squared error
changes by

    ``s_i^2 / A_ii - (r_j + K_ij s_i / A_ii)^2 / (V_j + K_ij^2 / A_ii)``

with ``A = H_SS^-1``, ``K = A H_SJ``, ``V_j = H_jj - H_jS K_j`` and the gradient ``r = B - H S``. A is another for
every row and costs as much as an inverse of H, but its figures hardly differ between rows: means over a few say which
exchanges promise most, and conjugate gradients what they bring. A row that is worse for its exchanges goes back, and
tries fewer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from cospadi.solvers._arrays import Array, array_namespace, row_dots
from cospadi.solvers._threads import over_rows

# Rows whose figures are looked at, tries of every row, and conjugate gradient steps after each
SAMPLE, ROUNDS, CG_STEPS = 8, 12, 12
# At first those exchanges of a row are tried together that promise this share of the best; a row that fails with those
# that promise the larger share is done
SHARE, LAST_SHARE = 0.3, 0.98


def exchanged(gram: Array, targets: Array, codes: Array, m: int, fit: Callable[..., Array]) -> Array:
    """Codes of no larger error, with as many entries in every group of m.

    Parameters
    ----------
    gram : array (d_in, d_in)
        H, with ones on its diagonal.
    targets : array (d_out, d_in)
        B, ``H W`` a row an output.
    codes : array (d_out, d_in)
        With the best values on their support.
    m : int
        Divides d_in.
    fit : callable
        ``fit(gram, targets, codes, n_steps)``: codes with better values on their support.
    """
    rest, shares = _figures(gram, codes, m)
    step = functools.partial(_step, gram, rest, shares, fit)

    def better(b: Array, c: Array) -> Array:
        xp = array_namespace(c)
        c, share = xp.asarray(c, copy=True), xp.full_like(c[:, 0], SHARE)
        for _ in range(ROUNDS):
            left = xp.nonzero(share < LAST_SHARE)[0]
            if len(left) == 0:
                break
            before, wanted = c[left], b[left]
            tried = step(wanted, before, share[left])
            errors = [row_dots(rows, rows @ gram - 2 * wanted) for rows in (before, tried)]
            improved = errors[1] < errors[0]
            c[left] = xp.where(improved[:, None], tried, before)
            share[left] = xp.where(improved, share[left], (1 + share[left]) / 2)
        return c

    return over_rows(better, targets, codes)


def _step(
    gram: Array, rest: Array, shares: Array, fit: Callable[..., Array], targets: Array, codes: Array, share: Array
) -> Array:
    """Codes after the exchanges that promise most in every row."""
    xp = array_namespace(codes)
    groups, m = rest.shape

    def grouped(rows: Array) -> Array:
        return rows.reshape(-1, groups, m)

    s, r, kept = grouped(codes), grouped(targets - codes @ gram), grouped(codes != 0)
    gone = s * rest  # s_i / A_ii
    places = xp.arange(m, device=codes.device)
    change, leaves, comes, value = None, None, None, None
    for j in range(m):
        k = shares[:, :, j]
        top, below = r[:, :, j, None] + k * gone, rest[:, j, None] + k**2 * rest
        delta = xp.where(kept & ~kept[:, :, j, None], s * gone - top**2 / below, xp.inf)
        one = places == xp.argmin(delta, axis=-1)[..., None]
        least, given = xp.min(delta, axis=-1), xp.sum(xp.where(one, top / below, 0), axis=-1)
        if change is None:
            change, leaves, value, comes = least, one, given, xp.zeros_like(least, dtype=xp.int64)
            continue
        less = least < change
        change, value = xp.where(less, least, change), xp.where(less, given, value)
        leaves, comes = xp.where(less[..., None], one, leaves), xp.where(less, j, comes)
    chosen = (change < 0) & (change <= share[:, None] * xp.min(change, axis=1)[:, None])
    s = xp.where(leaves & chosen[..., None], 0, s)
    s = xp.where((places == comes[..., None]) & chosen[..., None], value[..., None], s)
    return fit(gram, targets, s.reshape(codes.shape), CG_STEPS)


def _figures(gram: Array, codes: Array, m: int) -> tuple[Array, Array]:
    """Means over a few rows: of ``1 / A_ii`` and ``V_j``, (groups, m), which both are what the support leaves of an
    input; of ``K_ij`` within groups, (groups, m, m).
    """
    xp = array_namespace(gram)
    double = xp.astype(gram, xp.float64)
    groups = gram.shape[0] // m
    rest, shares, counts = xp.zeros_like(double[0]), xp.zeros_like(double[:, :m]), xp.zeros_like(double[:, :m])
    every = max(1, len(codes) // SAMPLE)
    for row in codes[::every][:SAMPLE]:
        inside, outside = xp.nonzero(row != 0)[0], xp.nonzero(row == 0)[0]
        block = double[inside]
        inverse = xp.linalg.inv(block[:, inside])
        found = xp.zeros_like(double)
        found[inside] = inverse @ block
        rest[inside] += 1 / xp.linalg.diagonal(inverse)
        rest[outside] += 1 - row_dots(double[outside][:, inside], found[inside][:, outside].T)
        found[:, inside] = 0
        place = xp.arange(groups, device=gram.device)
        blocks = found.reshape(groups, m, groups, m)[place, :, place, :]
        shares += blocks.reshape(-1, m)
        counts += blocks.reshape(-1, m) != 0
    n = min(SAMPLE, len(codes[::every]))
    shares = shares / xp.clip(counts, 1, None)
    return (
        xp.astype(xp.clip(rest / n, 1e-6, None), gram.dtype).reshape(groups, m),
        xp.astype(shares, gram.dtype).reshape(groups, m, m),
    )
