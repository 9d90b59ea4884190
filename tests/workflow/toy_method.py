"""Magnitudes: of every column the weights that move its outputs most, as they are."""

import numpy as np

from cospadi.budget import factors_nbytes
from cospadi.codecs import IDENTITY
from cospadi.factorization import Factorization
from cospadi.methods.base import WHITENING_OPTIONS, Method
from cospadi.work import Work

POWER = {"type": "number", "minimum": 0, "maximum": 2, "default": 1.0, "description": "How much the inputs count."}


def kept(shape, nbytes, storage):
    """Weights a column, as many as fit."""
    d_in, d_out = shape
    storage = {**storage, "dictionary_codec": IDENTITY}
    fits = [s for s in range(d_in) if factors_nbytes(*shape, d_in, s * d_out, support="bitmask", **storage) <= nbytes]
    return max(fits, default=0)


def fit(problem, nbytes, *, storage, device="cpu", log=None, warm=None, power=1.0, whiten=True, eta=0.0):
    """The largest ``|w_ij| ||x_i||^power``; the diagonal of the Gram is all that is needed."""
    s = kept(problem.shape, nbytes, storage)
    score = np.abs(problem.weight) * problem.metric.diagonal[:, None] ** (power / 2 if whiten else 0)
    codes = np.where(score >= -np.sort(-score, axis=0)[s - 1], problem.weight, 0)
    return [Factorization(None, codes, support="bitmask", **storage, diagnostics={"n_nonzero_coefs": s})]


METHOD = Method(
    name="magnitudes",
    summary="Weights that matter most, by magnitude and inputs.",
    factors="single weights",
    options={"power": POWER, **WHITENING_OPTIONS},
    fit=fit,
    work=lambda targets, nbytes, options, storage: Work(8 * targets[0].shape[0] ** 2, 0, 1.0, 1.0),
    modules=lambda options: [__name__],
    faults=lambda settings, problems=(): (
        f"ratio: {settings['ratio']} leaves no weight of {problem[0].projection}"
        for problem in problems
        if not kept(problem[0].shape, (1 - settings["ratio"]) * 2 * np.prod(problem[0].shape), {"value_codec": "bf16"})
    ),
)
