"""Magnitudes: the weights that move the outputs most stay as they are, as many in every column."""

import numpy as np

from cospadi.formats.factorization import Factorization
from cospadi.formats.values import storage_of
from cospadi.methods.base import Method, budget_faults
from cospadi.methods.single_weights import n_entries
from cospadi.solvers.entries import best_entries
from cospadi.work import Work

POWER = {"type": "number", "minimum": 0, "maximum": 2, "default": 1.0, "description": "How much the inputs count."}


def fit(problem, nbytes, how, *, power=1.0):
    """The largest ``|w_ij| ||x_i||^power``; the diagonal of the Gram is all that is needed."""
    score = np.abs(problem.weight) * problem.metric.diagonal[:, None] ** (power / 2)
    mask = best_entries(score.T, n_entries(problem.shape, nbytes, **how.storage), "column").T
    return problem.split(Factorization(None, problem.weight * mask, support="bitmask", **how.storage))


def faults(settings, problems=()):
    storage = storage_of(settings["codes"])
    return budget_faults(settings, problems, lambda shape, nbytes: n_entries(shape, nbytes, **storage))


METHOD = Method(
    name="magnitudes",
    summary="Weights that matter most, by magnitude and inputs.",
    factors="single weights",
    options={"power": POWER},
    fit=fit,
    work=lambda targets, nbytes, options, storage: Work(3 * 8 * targets[0].shape[0] ** 2, 0),
    modules=lambda options: [__name__],
    faults=faults,
)
