"""Sparse coding and dictionary learning as functions of their own, for other projects.

Names and meanings follow scikit-learn where it has them, transposed: signals and atoms are columns here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.runtime.cospadi_registry import SUPPORTS
from cospadi.solvers import SOLVERS
from cospadi.solvers._arrays import Array, array_namespace, is_torch_array
from cospadi.solvers._rounds import as_rows, check_support, initial
from cospadi.solvers._threads import one_blas_thread, over_rows
from cospadi.solvers.htp import largest_eigenvalue, pursue
from cospadi.solvers.least_squares import conjugate_gradients, restricted
from cospadi.solvers.starts import threshold

ALGORITHMS = ("omp", "htp", "threshold")


@one_blas_thread
def sparse_encode(
    target: Array,
    dictionary: Array,
    *,
    n_nonzero_coefs: int,
    algorithm: str = "omp",
    gram: Array | None = None,
    codes_init: Array | None = None,
    support: str = "bitmask",
    max_iter: int = 20,
    polish: bool = False,
    batch_columns: int | None = None,
) -> Any:
    """Sparse codes of the columns of `target`: ``target ~ dictionary @ codes``, few nonzeros a column.

    Parameters
    ----------
    target : array or tensor (d, n)
        NumPy, or torch on any device; other dtypes than float32 and float64 become float32. Tensors on the CPU are
        computed with as NumPy arrays, whose kernels are compiled.
    dictionary : array or tensor (d, k)
        Atoms as columns; the greedy and thresholding rules are meant for unit norm.
    n_nonzero_coefs : int
        Nonzeros a column, 1 to k. Fewer only where the dictionary's rank, or an exact fit, leaves no more to choose.
    algorithm : {"omp", "htp", "threshold"}
        Orthogonal matching pursuit; hard-thresholding pursuit, from `codes_init` or from zero; or the largest inner
        products alone, which is exact for orthonormal atoms.
    gram : array or tensor (k, k), optional
        ``dictionary.T @ dictionary`` where it is known.
    codes_init : array or tensor (k, n), optional
        Warm start. ``omp`` takes its atoms first; ``htp`` starts there; ``threshold`` has no use for it.
    support : {"bitmask", "2:4"}
        Any atoms, or two of every four in a row (``htp`` and ``threshold``).
    max_iter : int
        Rounds of ``htp``. A column keeps its codes of least error.
    polish : bool
        Solve the codes exactly on their supports, in double precision.
    batch_columns : int, optional
        Columns ``omp`` handles at once, which bounds its memory on CUDA.

    Returns
    -------
    codes : tensor (k, n)
        torch, on the device of `target`.

    Raises
    ------
    ValueError
        If shapes or options do not fit.
    NumericalError
        If an array holds NaN or infinities.
    """
    target = _on_cpu_as_numpy(target)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if getattr(dictionary, "ndim", None) != 2:
        raise ValueError(f"dictionary must be a matrix (d, k), got shape {getattr(dictionary, 'shape', None)}")
    n_atoms = dictionary.shape[1]
    check_support(support, n_atoms, n_nonzero_coefs)
    if SUPPORTS[support].pattern is not None and algorithm == "omp":
        raise ValueError(f"algorithm omp chooses any atoms; support {support} needs htp or threshold")
    rows, scale = as_rows(target, n_atoms, n_nonzero_coefs)
    n, d = rows.shape
    atoms = initial(dictionary, rows, (d, n_atoms), "dictionary")
    gram = initial(gram, rows, (n_atoms, n_atoms), "gram")
    gram = atoms @ atoms.T if gram is None else gram
    codes = initial(codes_init, rows, (n_atoms, n), "codes_init", scale)
    if algorithm == "omp":
        from cospadi.solvers.omp import encode_rows

        codes = encode_rows(rows, atoms, n_nonzero_coefs, gram=gram, codes_init=codes, batch_columns=batch_columns)
    elif algorithm == "htp":
        if codes is None:
            codes = array_namespace(rows).zeros((n, n_atoms), dtype=rows.dtype, device=rows.device)
        codes = over_rows(lambda y, c: _htp(y, atoms, gram, c, n_nonzero_coefs, max_iter, support), rows, codes)
    else:
        codes = threshold(rows, atoms, n_nonzero_coefs, support)
    if polish:
        codes = restricted(rows, atoms, codes)
    return as_torch(codes.T * scale)


def _htp(
    rows: Array, atoms: Array, gram: Array, codes: Array, n_nonzero_coefs: int, max_iter: int, support: str
) -> Array:
    """Hard-thresholding pursuit with the step shrinking from 6 to 1 over ``||D^T D||``; the best codes of each row."""
    xp = array_namespace(rows)
    best, best_error = codes, None
    bound = largest_eigenvalue(gram)
    for iteration in range(max_iter if bound > 0 else 0):
        step = 6 ** (1 - iteration / max(1, max_iter - 1)) / bound
        codes = pursue(gram, codes, (rows - codes @ atoms) @ atoms.T, n_nonzero_coefs, step, 3, support=support)
        residual = rows - codes @ atoms
        error = xp.sum(residual * residual, axis=1)
        if best_error is None:
            best, best_error = codes, error
        better = error < best_error
        best = xp.where(better[:, None], codes, best)
        best_error = xp.where(better, error, best_error)
    return conjugate_gradients(gram, best, (rows - best @ atoms) @ atoms.T, best != 0, 10)


def dict_learning(
    target: Array,
    *,
    n_components: int,
    n_nonzero_coefs: int,
    solver: str = "htp",
    max_iter: int | None = None,
    tol: float | None = None,
    dictionary_init: Array | None = None,
    codes_init: Array | None = None,
    random_state: int | np.random.Generator = 42,
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Learn a dictionary and sparse codes: ``target ~ dictionary @ codes``.

    Parameters
    ----------
    target : array or tensor (d, n)
        NumPy, or torch on any device; as in `sparse_encode`.
    n_components : int
        Atoms k.
    n_nonzero_coefs : int
        Nonzeros a column of the codes.
    solver : str
        A name in `cospadi.solvers.SOLVERS`.
    max_iter : int, optional
        Rounds. Default: the solver's own.
    tol : float, optional
        Stop when a round changes the relative error by less than this share of it. Default: the solver's own.
    dictionary_init : array or tensor (d, n_components), optional
    codes_init : array or tensor (n_components, n), optional
    random_state : int or numpy Generator
    log : callable, optional
        Called with one line a round.
    **options
        Options of the solver's ``learn``.

    Returns
    -------
    dictionary : tensor (d, n_components)
        torch, on the device of `target`; unit columns.
    codes : tensor (n_components, n)
    history : list of dict
        See :class:`cospadi.solvers.Solution`.

    Raises
    ------
    ValueError
        If the solver is not known, or shapes or options do not fit.
    NumericalError
        If an array holds NaN or infinities.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    given = {name: value for name, value in (("max_iter", max_iter), ("tol", tol)) if value is not None}
    solution = SOLVERS[solver](
        _on_cpu_as_numpy(target),
        n_atoms=n_components,
        n_nonzero_coefs=n_nonzero_coefs,
        random_state=random_state,
        dictionary_init=dictionary_init,
        codes_init=codes_init,
        log=log,
        **given,
        **options,
    )
    return as_torch(solution.dictionary), as_torch(solution.codes), solution.history


def _on_cpu_as_numpy(array: Array) -> Array:
    """The array as NumPy where it is in the CPU's memory: the solvers are many times faster there than in torch."""
    return to_numpy(array) if is_torch_array(array) and array.is_cpu else array


def as_torch(array: Array) -> Any:
    """The array as a contiguous torch tensor; a NumPy array's memory is shared where it can be."""
    import torch

    return array.contiguous() if is_torch_array(array) else torch.from_numpy(np.ascontiguousarray(array))
