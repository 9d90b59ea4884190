"""COMPOT (arXiv 2602.15200): orthonormal atoms, so that the best codes are a threshold away."""

from __future__ import annotations

from functools import partial

from cospadi.methods import cospadi
from cospadi.methods.base import Method

METHOD = Method(
    name="compot",
    summary="Orthonormal dictionary by Procrustes with thresholded codes (COMPOT).",
    options={name: schema for name, schema in cospadi.METHOD.options.items() if name != "solver"},
    factorize=partial(cospadi.factorize, solver="procrustes"),
    modules=lambda options: [__name__, *cospadi.modules({**options, "solver": "procrustes"})],
)
