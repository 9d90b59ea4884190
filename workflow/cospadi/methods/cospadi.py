"""CoSpaDi (arXiv 2509.22075): a learned dictionary with column-sparse codes, calibrated on activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cospadi.arrays import on_device, to_numpy
from cospadi.budget import sparse_shape
from cospadi.factorization import Factorization
from cospadi.methods.base import SHARING_OPTIONS, WHITENING_OPTIONS, Method
from cospadi.solvers import SOLVERS

OPTIONS: dict[str, dict[str, Any]] = {
    "solver": {
        "enum": sorted(SOLVERS),
        "default": "htp",
        "description": "How dictionary and codes are found. htp: Procrustes start, hard-thresholding pursuit and a "
        "closed-form dictionary (default); ksvd: the paper's OMP and K-SVD; procrustes: orthonormal atoms.",
    },
    "rho": {
        "type": "number",
        "minimum": 1,
        "maximum": 16,
        "default": 2.0,
        "description": "Atoms over nonzeros a column, k / s.",
    },
    **WHITENING_OPTIONS,
    **SHARING_OPTIONS,
    "max_iter": {
        "type": ["integer", "null"],
        "minimum": 1,
        "default": None,
        "description": "Outer iterations at most; null: the solver's own (ksvd: 60, as in the paper).",
    },
    "tol": {
        "type": ["number", "null"],
        "minimum": 0,
        "default": None,
        "description": "Stop when an iteration lowers the error by less than this share of it; null: the solver's own.",
    },
    "random_state": {
        "type": "integer",
        "minimum": 0,
        "default": 42,
        "description": "Seed of every random choice of the solver.",
    },
}


def factorize(
    weight: Any,
    whitening: Any,
    *,
    ratio: float,
    storage: Mapping[str, Any],
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
    solver: str = "htp",
    rho: float = 2.0,
    max_iter: int | None = None,
    tol: float | None = None,
    random_state: int = 42,
) -> Factorization:
    """``min ||L W - D_L S||_F`` with ``||s_j||_0 <= s``, then ``D = L^{-1} D_L`` (Eqs. 5 to 8).

    Parameters
    ----------
    weight : array (d_in, d_out), float32
    whitening : Whitening
        Of the matrix's Gram, ``L^T L = G``.
    ratio : float
        Fraction of bytes to remove; k and s follow from it (`budget.sparse_shape`).
    storage : mapping
        How the factors will be stored (`codecs.storage_of`).
    """
    shape = sparse_shape(*weight.shape, ratio=ratio, rho=rho, **storage)
    given = {name: value for name, value in (("max_iter", max_iter), ("tol", tol)) if value is not None}
    solution = SOLVERS[solver](
        on_device(whitening.whiten(weight), device),
        n_atoms=shape.n_atoms,
        n_nonzero_coefs=shape.n_nonzero_coefs,
        random_state=random_state,
        log=log,
        **given,
    )
    return Factorization(
        whitening.unwhiten(to_numpy(solution.dictionary)),
        to_numpy(solution.codes),
        **storage,
        diagnostics={
            "solver": solver,
            "n_atoms": shape.n_atoms,
            "n_nonzero_coefs": shape.n_nonzero_coefs,
            "history": solution.history,
        },
    )


def modules(options: Mapping[str, Any]) -> list[str]:
    """This module and the chosen solver's."""
    return [__name__, f"cospadi.solvers.{options['solver']}"]


METHOD = Method(
    name="cospadi",
    summary="Learned dictionary with column-sparse codes, calibrated on activations (CoSpaDi).",
    options=OPTIONS,
    factorize=factorize,
    modules=modules,
)
