"""What the loss of single weights costs, for one threshold over many matrices: the optimal brain surgeon's measure."""

from __future__ import annotations

from cospadi.solvers._arrays import Array, array_namespace, inverse_spd, over_outer

# Ridge on the Gram with ones on its diagonal: with less, inputs that depend on each other make all weights look free
RIDGE = 0.01


def saliencies(weight: Array, gram: Array) -> Array:
    """Squared error that removing each weight adds when the others of its column make up for it.

    ``(w_ij c_i)^2 / [H^-1]_ii`` with ``H = G / (c c^T) + RIDGE I``, ``c = sqrt(diag G)``.

    Parameters
    ----------
    weight : array (d_in, d_out)
    gram : array (d_in, d_in), float64

    Returns
    -------
    array (d_in, d_out), float64
        Zero for inputs that are never active.
    """
    xp = array_namespace(gram)
    scale = xp.sqrt(xp.clip(xp.linalg.diagonal(gram), 0, None))
    safe = xp.where(scale > 0, scale, xp.ones_like(scale))
    free = xp.linalg.diagonal(inverse_spd(over_outer(xp.asarray(gram, copy=True), safe), RIDGE))
    return xp.astype(weight, gram.dtype) ** 2 * (scale**2 / free)[:, None]
