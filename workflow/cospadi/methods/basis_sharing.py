"""Basis Sharing (ICLR 2025): SVD in the metric of the activations, one basis for consecutive layers."""

from __future__ import annotations

from dataclasses import replace

from cospadi.methods import svd_llm
from cospadi.registry import with_defaults
from cospadi.structure import PARTS

# The published protocol: pairs of layers share q, k, v, gate and up; o and down keep their own basis
DEFAULTS = {"group_size": 2, "share": [projection for part in PARTS for projection in part.readers]}

METHOD = replace(
    svd_llm.METHOD,
    name="basis_sharing",
    summary="Truncated SVD with one basis for the same projection of consecutive layers (Basis Sharing).",
    options=with_defaults(svd_llm.METHOD.options, DEFAULTS),
    modules=lambda options: [__name__, *svd_llm.METHOD.modules(options)],
)
