"""K-SVD as CoSpaDi runs it (arXiv 2509.22075, Algorithm 1): OMP codes, then every atom in turn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cospadi.solvers import Solution
from cospadi.solvers._arrays import Array, array_namespace, is_torch_array, leading_rows, row_dots
from cospadi.solvers._rounds import (
    Rounds,
    as_rows,
    finish,
    generator,
    initial,
    redraw,
    ridge_dictionary,
    total_norm,
    unit_rows,
)
from cospadi.solvers._threads import one_blas_thread
from cospadi.solvers.least_squares import conjugate_gradients
from cospadi.solvers.omp import encode_rows
from cospadi.solvers.starts import random_columns

# Conjugate gradient steps on the codes of a block: they are few and start near.
_BLOCK_STEPS = 4
POWER_ITERATIONS = 8  # the paper's
ATOM_UPDATES = ("power", "block", "svd", "mod")


@one_blas_thread
def learn(
    target: Array,
    *,
    n_atoms: int,
    n_nonzero_coefs: int,
    random_state: int | np.random.Generator = 42,
    dictionary_init: Array | None = None,
    codes_init: Array | None = None,
    max_iter: int = 60,
    tol: float = 1e-4,
    max_seconds: float | None = None,
    log: Callable[[str], None] | None = None,
    atom_update: str = "power",
    block_atoms: int = 16,
    polish: bool = False,
    batch_columns: int | None = None,
) -> Solution:
    """Alternate orthogonal matching pursuit and a sweep of rank-1 updates over the atoms.

    OMP gives every column exactly `n_nonzero_coefs` nonzeros; 60 rounds are the paper's. The start is random, and atoms
    that have to be redrawn are, too.

    Parameters
    ----------
    target, n_atoms, n_nonzero_coefs, random_state, max_iter, tol, max_seconds, log
        As of all `cospadi.solvers`.
    dictionary_init : array (d, n_atoms), optional
        Scaled to unit columns. Default: random columns of the target (columns of the original weight, whitened).
    codes_init : array (n_atoms, n), optional
        Gives the first dictionary in closed form (and then `dictionary_init` is not used).
    atom_update : {"power", "block", "svd", "mod"}
        Rank-1 fit of an atom's residual by power iterations (the paper's choice) or exactly, atom by atom, codes
        included; power iterations of `block_atoms` atoms at a time, which are matrix products and what a GPU
        needs; or all atoms at once in closed form, codes kept (method of optimal directions).
    block_atoms : int
    polish : bool
        Solve the codes exactly on their final supports, in double precision (the paper does not).
    batch_columns : int, optional
        Columns coded at once; bounds the memory of the pursuit on CUDA.

    Returns
    -------
    Solution
    """
    if atom_update not in ATOM_UPDATES:
        raise ValueError(f"atom_update must be one of {', '.join(ATOM_UPDATES)}, got {atom_update!r}")
    rows, scale = as_rows(target, n_atoms, n_nonzero_coefs)
    n, d = rows.shape
    xp = array_namespace(rows)
    rng = generator(random_state)
    rounds = Rounds(max_iter, tol, log, max_seconds)
    norm = total_norm(rows)

    atoms = initial(dictionary_init, rows, (d, n_atoms), "dictionary_init")
    codes = initial(codes_init, rows, (n_atoms, n), "codes_init", scale)
    if codes is not None:
        atoms, codes = ridge_dictionary(rows, codes)
    else:
        atoms = random_columns(rows, n_atoms, rng) if atoms is None else unit_rows(atoms)[0]
        codes = xp.zeros((n, n_atoms), dtype=rows.dtype, device=rows.device)

    residual = rows - codes @ atoms
    rounds.record(total_norm(residual) / norm if norm else 0.0)
    best = atoms, codes
    for _ in range(max_iter):
        if norm == 0 or rounds.settled or rounds.time_spent >= 1:
            break
        atoms, codes, n_redrawn = redraw(atoms, codes, residual, rng)
        codes = encode_rows(rows, atoms, n_nonzero_coefs, batch_columns=batch_columns)
        if atom_update == "mod":
            atoms, codes = ridge_dictionary(rows, codes)
        elif atom_update == "block":
            atoms, codes = _sweep_blocks(rows - codes @ atoms, atoms, codes, block_atoms)
        else:
            residual = rows - codes @ atoms
            atoms = xp.asarray(atoms, copy=True)
            _sweep(residual, atoms, codes, atom_update)
        residual = rows - codes @ atoms
        if rounds.record(total_norm(residual) / norm, n_redrawn=n_redrawn):
            best = atoms, codes
    return finish(rows, scale, *best, rounds, polish=polish)


def _sweep(residual: Array, atoms: Array, codes: Array, atom_update: str) -> None:
    """Update every atom and its codes in place; `residual` follows."""
    if atom_update == "power" and not is_torch_array(residual):
        from cospadi.solvers import _kernels

        _kernels.ksvd_sweep(residual, atoms, codes, POWER_ITERATIONS)
        return
    for atom in range(atoms.shape[0]):
        old, code = atoms[atom], codes[:, atom]
        used = code != 0
        # rows that do not use the atom are zero here, so shapes stay the same and a GPU never waits for the host
        own = (residual + code[:, None] * old[None, :]) * used[:, None]
        if atom_update == "svd":
            new = leading_rows(own, 1)[0]
        else:
            new = old
            for _ in range(POWER_ITERATIONS):
                new = unit_rows(((own @ new) @ own)[None, :])[0][0]
        new_code = own @ new
        keep = (new_code**2).sum() > 0
        new = array_namespace(residual).where(keep, new, old)
        residual += code[:, None] * old[None, :] - new_code[:, None] * new[None, :]
        atoms[atom] = new
        codes[:, atom] = new_code


def _sweep_blocks(residual: Array, atoms: Array, codes: Array, block_atoms: int) -> tuple[Array, Array]:
    """Update the atoms a block at a time: directions side by side, then the block's codes together.

    Atoms of a block see the same residual, so two may turn to the same direction; the least-squares codes of the
    block decide between them. Where the block ends no better than it was, its atoms stay and only their codes move.
    """
    xp = array_namespace(residual)
    atoms, codes = xp.asarray(atoms, copy=True), xp.asarray(codes, copy=True)
    for begin in range(0, atoms.shape[0], block_atoms):
        part = slice(begin, begin + block_atoms)
        old, code = atoms[part], codes[:, part]
        used = code != 0
        new = old
        for _ in range(POWER_ITERATIONS):
            along = (residual @ new.T + code * row_dots(old, new)[None, :]) * used
            new = unit_rows(along.T @ residual + row_dots(along.T, code.T)[:, None] * old)[0]
        # an atom that no row uses stays
        new = xp.where((row_dots(new, new) > 0)[:, None], new, old)
        whole = residual + code @ old
        before = total_norm(residual)
        for block in (new, old):
            start = code * row_dots(old, block)[None, :]
            gradient = whole @ block.T - start @ (block @ block.T)
            refit = conjugate_gradients(block @ block.T, start, gradient, used, _BLOCK_STEPS)
            left = whole - refit @ block
            if total_norm(left) <= before:
                residual = left
                atoms[part], codes[:, part] = block, refit
                break
    return atoms, codes
