"""SVD-LLM (ICLR 2025), its whitening step: the best rank-r product in the metric of the activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cospadi.arrays import on_device, to_numpy
from cospadi.budget import low_rank
from cospadi.factorization import Factorization
from cospadi.methods.base import SHARING_OPTIONS, WHITENING_OPTIONS, Method


def factorize(
    weight: Any,
    whitening: Any,
    *,
    ratio: float,
    storage: Mapping[str, Any],
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
) -> Factorization:
    """Truncated SVD ``L W ~ U_r Sigma_r V_r^T``; ``D = L^{-1} U_r``, ``S = U_r^T L W``.

    Parameters
    ----------
    weight : array (d_in, d_out), float32
    whitening : Whitening
        Of the matrix's Gram; the identity's gives plain SVD.
    ratio : float
        Fraction of bytes to remove; the rank follows from it (`budget.low_rank`).
    storage : mapping
        How the factors will be stored (`codecs.storage_of`).
    """
    from cospadi.solvers import svd

    rank = low_rank(*weight.shape, ratio=ratio, **storage)
    solution = svd.truncated(on_device(whitening.whiten(weight), device), rank)
    return Factorization(
        whitening.unwhiten(to_numpy(solution.dictionary)),
        to_numpy(solution.codes),
        support="dense",
        **storage,
        diagnostics={"solver": "svd", "n_atoms": rank, "n_nonzero_coefs": rank, "history": solution.history},
    )


def modules(options: Mapping[str, Any]) -> list[str]:
    """This module and the SVD."""
    return [__name__, "cospadi.solvers.svd"]


METHOD = Method(
    name="svd_llm",
    summary="Truncated SVD in the metric of the activations (SVD-LLM); whiten: false is plain SVD.",
    options={**WHITENING_OPTIONS, **SHARING_OPTIONS},
    factorize=factorize,
    modules=modules,
)
