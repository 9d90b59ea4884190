"""Single weights beside a few learned atoms, ``W ~ S_0 + A S_1``: the dictionary ``[I | A]``.

Supports by ADMM in the budget of the whole problem, values by least squares, atoms in closed form (`solvers.hybrid`).
With no atoms it is a sparse weight (`sparse`), with no identity a learned dictionary (`cospadi`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from cospadi.arrays import on_device, to_numpy
from cospadi.budget import dense_nbytes
from cospadi.errors import ConfigError
from cospadi.formats.factorization import Factorization
from cospadi.methods import global_threshold, single_weights
from cospadi.methods.base import SHARING_OPTIONS, Fit, Method, Problems, sharing_faults
from cospadi.methods.single_weights import PATTERN, inputs_of, n_entries, scaled
from cospadi.problem import Problem, Target, side_by_side
from cospadi.work import Work

AUTO = "auto"
# Learned atoms by rule, as a share of the inputs: where outputs are many (gate and up together), and where they are
# not; in proportion fewer where less than this share of the bytes is left, since an atom is paid for before any weight
SHARE_WIDE, SHARE_SQUARE = 1 / 6, 1 / 18
SHARE_LEFT = 0.6
# What `atoms: auto` tries beside none, and in how many passes
SHARES_TRIED = (1 / 36, 1 / 18, 1 / 9, 1 / 5)
TRIAL = 1

OPTIONS: dict[str, dict[str, Any]] = {
    "pattern": PATTERN,
    "atoms": {
        "type": ["integer", "string", "null"],
        "minimum": 0,
        "pattern": f"^{AUTO}$",
        "default": None,
        "description": "Learned atoms of a problem. null: a sixth of the inputs where there are twice as many outputs, "
        "an eighteenth where there are as many, else none, and fewer at ratios above 0.4; auto: searched by error. "
        "Never kept where none is better.",
    },
    "max_iter": {
        "type": "integer",
        "minimum": 1,
        "default": 3,
        "description": "Passes through the penalties, 42 iterations of codes and 14 of atoms each.",
    },
    "schedule": {
        "enum": ["short", "long", "adaptive"],
        "default": "adaptive",
        "description": "Penalties of the ADMM that finds a support without atoms: 30 iterations, 100, or as ALPS does.",
    },
    **global_threshold.OPTION,
    **SHARING_OPTIONS,
}


class Found(NamedTuple):
    """Codes (d_out, d_in + k) over ``[I | A]`` and atoms (k, d_in) in the scaled space, and their squared error."""

    codes: Any
    atoms: Any
    error: float
    history: list[dict[str, Any]]


def fit(
    problem: Problem,
    nbytes: int,
    how: Fit,
    *,
    pattern: str = PATTERN["default"],
    atoms: int | str | None = None,
    max_iter: int = OPTIONS["max_iter"]["default"],
    schedule: str = OPTIONS["schedule"]["default"],
) -> list[Factorization]:
    """Codes and atoms of least error within `nbytes`.

    Matrices of one problem count by the price of their errors where gradients say it; else alike: each is divided by
    the norm of its outputs on the calibration data while the entries compete.

    Parameters
    ----------
    problem : Problem
        Matrices with several inputs are taken in the metric of their mean Gram.
    nbytes : int
    how : Fit
    pattern, atoms, max_iter, schedule
        As in `OPTIONS`.
    """
    from cospadi.solvers import admm, hybrid, sparsegpt
    from cospadi.solvers.entries import best_entries

    d_in, d_out = problem.shape
    metric = scaled(problem.metric, how.device)
    weight, gram = inputs_of(problem, how.device)
    sizes = _sizes(problem, metric, weight)
    rows = ((weight / sizes) * metric.scale[:, None]).T
    rows = admm.as_dtype(rows, metric.gram)
    targets = rows @ metric.gram

    def room(n_atoms: int) -> int:
        return n_entries(problem.shape, nbytes, pattern=pattern, n_atoms=n_atoms, **how.storage)

    n_kept = room(0)
    pruned, _ = sparsegpt.prune(weight / sizes, gram, n_kept, pattern=pattern)
    start = admm.as_dtype((pruned * metric.scale[:, None]).T, metric.gram)
    sparse = admm.sparse_codes(metric, targets, n_kept, start=start, schedule=admm.SCHEDULES[schedule], pattern=pattern)
    best = Found(sparse, rows[:0], admm.squared_error(metric.gram, rows - sparse), [])

    def with_atoms(n_atoms: int, rounds: int, tell: Callable[[str], None] | None) -> Found:
        n_nonzero = room(n_atoms)
        cut = sparse * best_entries(abs(sparse), n_nonzero)
        codes, found, history = hybrid.learn(
            metric, rows, n_nonzero, n_atoms, start=cut, max_iter=rounds, pattern=pattern, log=tell
        )
        left = rows - codes[:, :d_in] - codes[:, d_in:] @ found
        return Found(codes, found, admm.squared_error(metric.gram, left), history)

    if atoms == AUTO:
        counts = sorted({max(1, round(share * d_in)) for share in SHARES_TRIED})
        trials = {n_atoms: with_atoms(n_atoms, TRIAL, None).error for n_atoms in counts if _fits(room, n_atoms)}
        n_atoms = min(trials, key=trials.get, default=0)
    else:
        n_atoms = atoms_by_rule(d_in, d_out, nbytes, pattern) if atoms is None else atoms
    if n_atoms and best.error > 0 and _fits(room, n_atoms):  # few bits may be enough to keep every weight
        found = with_atoms(n_atoms, max_iter, how.log)
        if how.log is not None:
            how.log(f"{n_atoms} atoms: squared error {found.error / best.error:.3f} of that without")
        if found.error < best.error:
            best = found
    return _factors(problem, best, metric, sizes, pattern, how.storage)


def atoms_by_rule(d_in: int, d_out: int, nbytes: int, pattern: str) -> int:
    """Learned atoms where the options name none."""
    if pattern != "matrix" or d_out < d_in:
        return 0
    share = SHARE_WIDE if d_out >= 2 * d_in else SHARE_SQUARE
    return round(d_in * share * min(1.0, nbytes / dense_nbytes(d_in, d_out) / SHARE_LEFT))


def _fits(room: Callable[[int], int], n_atoms: int) -> bool:
    try:
        return room(n_atoms) > 0
    except ConfigError:
        return False


def _sizes(problem: Problem, metric: Any, weight: Any) -> Any:
    """What the columns of each matrix are divided by, (d_out,): ``||X W_i||_F``, or with prices the root of how much
    cheaper its errors are than the mean's; 1 where a problem has one matrix alone.
    """
    from cospadi.solvers import admm

    if len(problem.matrices) == 1:
        return on_device(np.ones(problem.shape[1], np.float32), _device(weight))
    edges = np.cumsum([0, *(d_out for _, d_out in problem.shapes)])
    if problem.prices is None:
        rows = admm.as_dtype((weight * metric.scale[:, None]).T, metric.gram)
        sizes = [admm.squared_error(metric.gram, rows[a:b]) ** 0.5 or 1.0 for a, b in itertools.pairwise(edges)]
    else:
        sizes = np.sqrt(np.mean(problem.prices) / np.asarray(problem.prices))
    repeated = np.repeat(np.asarray(sizes, np.float32), np.diff(edges))
    return on_device(repeated, _device(weight))


def _device(array: Any) -> str:
    return "cpu" if isinstance(array, np.ndarray) else str(array.device)


def _factors(
    problem: Problem, found: Found, metric: Any, sizes: Any, pattern: str, storage: Mapping[str, Any]
) -> list[Factorization]:
    d_in = problem.shape[0]
    scale, sizes = to_numpy(metric.scale)[:, None], to_numpy(sizes)
    codes = to_numpy(found.codes).T
    mask = codes != 0
    n_atoms = codes.shape[0] - d_in
    diagnostics = {"solver": "admm", "n_atoms": n_atoms, "n_nonzero": int(mask.sum()), "history": found.history}
    values = np.concatenate([codes[:d_in] / scale, codes[d_in:]]) * sizes
    values = values.astype(np.float32)
    plus = []
    if n_atoms:
        atoms = (to_numpy(found.atoms).T / scale).astype(np.float32)
        plus = [Factorization(atoms, values[d_in:], support="bitmask", mask=mask[d_in:], **storage)]
    identity = single_weights.kept(values[:d_in], mask[:d_in], pattern, storage, **diagnostics)
    return problem.split(replace(identity, plus=plus))


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: products with the inverse, an iteration each."""
    d, n = side_by_side([target.shape for target in targets])
    atoms = options["atoms"]
    rounds = options["max_iter"]
    if atoms == AUTO:
        rounds += TRIAL * len(SHARES_TRIED)
    elif (atoms_by_rule(d, n, nbytes, options["pattern"]) if atoms is None else atoms) == 0:
        rounds = 0
    penalties = {"short": 6, "long": 20}.get(options["schedule"], 20)
    found = single_weights.work(targets, products=5 * penalties + 40 * rounds, inversions=5 + penalties * (1 + rounds))
    # the scaled Gram in both precisions and inverses in one, of which so many stay (`solvers.admm`)
    square = 4 * d**2
    inverses = max(square, min(penalties * square, 2**30))
    # the split, its dual, what they start from and move to, of every matrix side by side
    return replace(found, memory=found.memory + 3 * square + inverses + 10 * 4 * n * d)


def modules(options: Mapping[str, Any]) -> list[str]:
    """This module and its solvers."""
    solvers = ["cospadi.solvers.admm", "cospadi.solvers.hybrid", "cospadi.solvers.sparsegpt"]
    return [__name__, *solvers, *global_threshold.modules(options)]


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Budgets too small, sharing that cannot be, and atoms beside a pattern that has no place for them."""
    yield from sharing_faults(problems)
    yield from single_weights.faults(settings, problems)
    if settings["pattern"] != "matrix" and settings["atoms"]:
        yield f"atoms: {settings['atoms']}; learned atoms are for pattern matrix"


METHOD = Method(
    name="hybrid",
    summary="Single weights under a 1-bit mask beside a few learned atoms, supports by ADMM (ours).",
    options=OPTIONS,
    factors="single weights and atoms",
    fit=fit,
    work=work,
    modules=modules,
    faults=faults,
    allocator=global_threshold.ALLOCATOR,
)
