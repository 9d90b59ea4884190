"""COMPOT (arXiv 2602.15200): orthonormal atoms, so that the best codes are a threshold away."""

from __future__ import annotations

from functools import partial

from cospadi.methods import cospadi
from cospadi.methods.base import Method

# The solver is the method; its codes are exact, and another metric's atoms would not be orthonormal
_NOT_HERE = ("solver", "atom_update", "polish", "group_metric")
_SOLVER = {"solver": "procrustes"}

METHOD = Method(
    name="compot",
    summary="Orthonormal dictionary by Procrustes with thresholded codes (COMPOT).",
    options={name: schema for name, schema in cospadi.METHOD.options.items() if name not in _NOT_HERE},
    factors=cospadi.METHOD.factors,
    fit=partial(cospadi.fit, **_SOLVER),
    work=lambda targets, nbytes, options, storage: cospadi.work(targets, nbytes, {**options, **_SOLVER}, storage),
    modules=lambda options: [__name__, *cospadi.modules({**options, **_SOLVER})],
    faults=lambda settings, problems=(): cospadi.faults({**settings, **_SOLVER}, problems),
)
