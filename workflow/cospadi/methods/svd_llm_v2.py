"""SVD-LLM V2 (NAACL 2025): the metric by eigenvectors, and more rank where truncation would lose more.

With ``G = V Lambda V^T`` the best product of rank r in the metric of the activations comes from the SVD of
``Lambda^1/2 V^T W``, and its error is exactly the root of the squares of the singular values that are left out. Nothing
is added to a singular Gram. That error at the ratio asked for decides which matrix gets how many bytes.

What the paper leaves open is decided here so: the ratio is the fraction of bytes removed; a loss up to e counts as e,
since the rule divides by its logarithm, which also makes it depend on the number of tokens; no matrix loses more than
.8 of its bytes (or the ratio asked for, where that is more) nor its last rank, and what it cannot give the others of
its kind do. Without that guard the o of the demo's first layer, whose loss is small, was left with rank 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cospadi.allocation import Profile
from cospadi.budget import factors_nbytes, low_rank, nbytes_left
from cospadi.formats.factorization import Factorization
from cospadi.gram import EigenWhitening, eigen_whitening
from cospadi.methods import svd_llm
from cospadi.methods.base import MOST_REMOVED, WHITENING_OPTIONS, Allocator, Fit, Method, allocation_option
from cospadi.problem import Metric, Problem
from cospadi.solvers.svd import squares_left

RULE = "loss"


@functools.lru_cache(maxsize=1)
def _whitening(metric: Metric, eta: float) -> EigenWhitening:
    """That of the last metric is kept: q, k and v follow each other."""
    return eigen_whitening(metric.gram, eta=eta)


def fit(problem: Problem, nbytes: int, how: Fit, *, eta: float = 0.0) -> list[Factorization]:
    """Truncated SVD ``Lambda^1/2 V^T W ~ U_r Sigma_r Z_r^T``; ``D = V Lambda^-1/2 U_r``, ``S = Sigma_r Z_r^T``."""
    whitening = _whitening(problem.metric, eta)
    rank = min(low_rank(*problem.shape, nbytes=nbytes, **how.storage), len(whitening.factor))
    return problem.split(svd_llm.truncated(problem.weight, rank, whitening, storage=how.storage, device=how.device))


def profile(
    problem: Problem, nbytes: int, *, storage: Mapping[str, Any], device: str = "cpu", eta: float = 0.0
) -> dict[str, Any]:
    """``loss``, ``||X (W - W_r)||_F`` at the rank that so many bytes are enough for."""
    rank = low_rank(*problem.shape, nbytes=nbytes, **storage)
    left = squares_left(_whitening(problem.metric, eta).whiten(problem.weight))
    return {"loss": math.sqrt(left[min(rank, len(left) - 1)])}


def share(profiles: Sequence[Profile], nbytes: int, *, storage: Mapping[str, Any], eta: float = 0.0) -> list[int]:
    """Bytes by ``ratio_i ~ 1 / log(loss_i)`` among the matrices of a kind, which keep what they had together."""
    found = [0] * len(profiles)
    ratio = 1 - nbytes / nbytes_left([shape for one in profiles for shape in one.shapes], 0)
    for kind in dict.fromkeys(one.kind for one in profiles):
        members = [index for index, one in enumerate(profiles) if one.kind == kind]
        dense = [nbytes_left(profiles[index].shapes, 0) for index in members]
        guard = max(MOST_REMOVED, ratio)
        least = [max(nbytes_left(profiles[i].shapes, guard), _rank_one(profiles[i], storage)) for i in members]
        losses = [max(math.e, profiles[index].figures["loss"]) for index in members]
        weights = [size / math.log(loss) for size, loss in zip(dense, losses, strict=True)]
        most = [size - low for size, low in zip(dense, least, strict=True)]
        for index, size, removed in zip(members, dense, _parted(ratio * sum(dense), weights, most), strict=True):
            found[index] = math.floor(size - removed)
    return found


def _rank_one(one: Profile, storage: Mapping[str, Any]) -> int:
    d_in, d_out = one.shapes[0][0], sum(shape[1] for shape in one.shapes)
    return factors_nbytes(d_in, d_out, 1, d_out, support="dense", **storage)


def _parted(total: float, weights: Sequence[float], most: Sequence[float]) -> list[float]:
    """Parts of `total` in proportion to `weights`, none above its `most`; the others take what one cannot."""
    parts, open_ = [0.0] * len(weights), set(range(len(weights)))
    while open_:
        share_ = (total - sum(parts[i] for i in range(len(parts)) if i not in open_)) / sum(weights[i] for i in open_)
        full = {i for i in open_ if weights[i] * share_ > most[i]}
        for i in full or open_:
            parts[i] = most[i] if full else weights[i] * share_
        open_ -= full or open_
    return parts


METHOD = Method(
    name="svd_llm_v2",
    summary="Truncated SVD in the metric of the activations, by eigenvectors, with ranks by loss (SVD-LLM V2).",
    options={
        **allocation_option(RULE, "the ratio of a matrix goes with 1 / log(loss) among those of its projection"),
        "eta": WHITENING_OPTIONS["eta"],
    },
    factors=svd_llm.METHOD.factors,
    fit=fit,
    work=svd_llm.work,
    modules=lambda options: [__name__, *svd_llm.METHOD.modules(options)],
    faults=svd_llm.faults,
    allocator=Allocator(profile=profile, share=share, work=svd_llm.work),
)
