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
from cospadi.methods.base import EXACT, METRIC_OPTIONS, SHARING_OPTIONS, Fit, Method, Problems, sharing_faults
from cospadi.methods.single_weights import PATTERN, gram_on, inputs_of, n_entries, scaled
from cospadi.problem import Problem, Target, side_by_side
from cospadi.registry import choice, option
from cospadi.solvers.entries import kept_of
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
    "atoms": option(
        ["integer", "string", "null"],
        "Learned atoms of a problem. null: a sixth of the inputs where there are twice as many outputs, "
        "an eighteenth where there are as many, else none, and fewer at ratios above 0.4; auto: searched by error. "
        "Never kept where none is better.",
        minimum=0,
        pattern=f"^{AUTO}$",
        default=None,
    ),
    "max_iter": option(
        "integer", "Passes through the penalties, 42 iterations of codes and 14 of atoms each.", minimum=1, default=3
    ),
    "schedule": choice(
        ["short", "long", "adaptive"],
        "Penalties of the ADMM that finds a support without atoms: 30 iterations, 100, or as ALPS does.",
        default="adaptive",
    ),
    **global_threshold.OPTION,
    **SHARING_OPTIONS,
    **METRIC_OPTIONS,
}


class Scene(NamedTuple):
    """What ADMM sees: `admm.Scaled` or `admm.Stacked`, the rows (d_out, d_in) in the scaled space of each, and what the
    columns of the weight were divided by, (d_out,).
    """

    metric: Any
    rows: Any
    sizes: Any


class Found(NamedTuple):
    """Codes (d_out, d_in + k) over ``[I | A]`` and atoms (k, d_in) in the scaled space, and their squared error."""

    codes: Any
    atoms: Any
    error: float
    history: dict[str, list[dict[str, Any]]]


def fit(
    problem: Problem,
    nbytes: int,
    how: Fit,
    *,
    pattern: str = PATTERN["default"],
    atoms: int | str | None = None,
    max_iter: int = OPTIONS["max_iter"]["default"],
    schedule: str = OPTIONS["schedule"]["default"],
    group_metric: str = OPTIONS["group_metric"]["default"],
) -> list[Factorization]:
    """Codes and atoms of least error within `nbytes`.

    Matrices of one problem count by the price of their errors where gradients say it; else alike: each is divided by
    the norm of its outputs on the calibration data while the entries compete.
    """
    from cospadi.solvers import admm, sparsegpt
    from cospadi.solvers.entries import best_entries

    d_in, d_out = problem.shape
    metric = scaled(problem.metric, how.device)
    weight, gram = inputs_of(problem, how.device)
    scene = _scene(problem, weight, [metric] * len(problem.matrices))

    def room(n_atoms: int) -> int:
        return n_entries(problem.shape, nbytes, pattern=pattern, n_atoms=n_atoms, **how.storage)

    n_kept, penalties = room(0), admm.SCHEDULES[schedule]
    pruned, _ = sparsegpt.prune(weight / scene.sizes, gram, n_kept, pattern=pattern)
    start = admm.as_dtype((pruned * metric.scale[:, None]).T, metric.gram)
    sparse = _without_atoms(scene, n_kept, start, penalties, pattern)

    def with_atoms(n_atoms: int, rounds: int, tell: Callable[[str], None] | None) -> Found:
        n_nonzero = room(n_atoms)
        cut = sparse.codes * best_entries(abs(sparse.codes), n_nonzero)
        return _with_atoms(scene, n_nonzero, n_atoms, max_iter=rounds, start=cut, pattern=pattern, log=tell)

    if atoms == AUTO:
        counts = sorted({max(1, round(share * d_in)) for share in SHARES_TRIED})
        trials = {n_atoms: with_atoms(n_atoms, TRIAL, None).error for n_atoms in counts if _fits(room, n_atoms)}
        n_atoms = min(trials, key=trials.get, default=0)
    else:
        n_atoms = atoms_by_rule(d_in, d_out, nbytes, pattern) if atoms is None else atoms
    candidates = [sparse]
    if n_atoms and sparse.error > 0 and _fits(room, n_atoms):  # few bits may be enough to keep every weight
        candidates.append(with_atoms(n_atoms, max_iter, how.log))
    if group_metric == EXACT and problem.n_metrics > 1:
        if how.log is not None:
            how.log("in the metric of each matrix")
        metrics = {
            one: admm.Scaled(gram_on(one, how.device), metric.gram.dtype) for one in dict.fromkeys(problem.metrics)
        }
        own = _scene(problem, weight, [metrics[one] for one in problem.metrics])
        sparse, *rest = [_seen_in(own, scene, found) for found in candidates]
        candidates = [_without_atoms(own, n_kept, sparse.codes, penalties, pattern)]
        for found in rest:
            given = {"start": found.codes, "atoms": found.atoms, "pattern": pattern, "log": how.log}
            better = _with_atoms(own, room(n_atoms), n_atoms, max_iter=max_iter, **given)
            history = {**found.history, "history_exact": better.history["history"]}
            candidates.append(better._replace(history=history))
        scene = own
    best = min(candidates, key=lambda found: found.error)
    if how.log is not None and len(candidates) > 1:
        how.log(f"{n_atoms} atoms: squared error {candidates[1].error / candidates[0].error:.3f} of that without")
    return _factors(problem, best, scene, pattern, how.storage)


def _scene(problem: Problem, weight: Any, metrics: Sequence[Any]) -> Scene:
    """Of the `admm.Scaled` of each matrix. Columns are divided by ``||X W_i||_F`` of their matrix, or with prices by
    the root of how much cheaper its errors are than the mean's; by 1 where a problem has one matrix alone.
    """
    from cospadi.solvers import admm

    widths = [d_out for _, d_out in problem.shapes]
    metric = metrics[0] if len(set(metrics)) == 1 else admm.Stacked(metrics, widths)

    def rows_of(columns: Any) -> Any:
        """Of columns (d_in, d_out) in the scaled space of each."""
        return admm.over_parts(metric.parts, lambda one, c: admm.as_dtype(c * one.scale, one.gram), columns.T)

    if len(problem.matrices) == 1:
        sizes = [1.0]
    elif problem.prices is None:
        edges = itertools.pairwise(itertools.accumulate(widths, initial=0))
        rows = rows_of(weight)
        sizes = [
            admm.squared_error(one.gram, rows[slice(*edge)]) ** 0.5 or 1.0
            for one, edge in zip(metrics, edges, strict=True)
        ]
    else:
        sizes = np.sqrt(np.mean(problem.prices) / np.asarray(problem.prices))
    repeated = on_device(np.repeat(np.asarray(sizes, np.float32), widths), _device(weight))
    return Scene(metric, rows_of(weight / repeated), repeated)


def _without_atoms(scene: Scene, n_kept: int, start: Any, schedule: Any, pattern: str) -> Found:
    from cospadi.solvers import admm

    metric, rows, _ = scene
    targets = admm.over_parts(metric.parts, lambda one, w: w @ one.gram, rows)
    codes = admm.sparse_codes(metric, targets, n_kept, start=start, schedule=schedule, pattern=pattern)
    return Found(codes, rows[:0], admm.error_of(metric, rows - codes), {"history": []})


def _with_atoms(scene: Scene, n_nonzero: int, n_atoms: int, **given: Any) -> Found:
    from cospadi.solvers import admm, hybrid

    metric, rows, _ = scene
    d_in = rows.shape[1]
    codes, atoms, history = hybrid.learn(metric, rows, n_nonzero, n_atoms, **given)

    def left(one: Any, w: Any, c: Any) -> Any:
        return w - c[:, :d_in] - c[:, d_in:] @ admm.as_dtype(atoms * (one.scale / metric.scale), one.gram)

    error = admm.error_of(metric, admm.over_parts(metric.parts, left, rows, codes))
    return Found(codes, atoms, error, {"history": history})


def _seen_in(own: Scene, scene: Scene, found: Found) -> Found:
    """What was found in one scene as another sees it."""
    from cospadi.solvers import admm

    d_in = own.rows.shape[1]
    codes = found.codes * (scene.sizes / own.sizes)[:, None]
    for rows, one in own.metric.parts:
        codes[rows, :d_in] *= one.scale / scene.metric.scale
    atoms = admm.as_dtype(found.atoms * (own.metric.scale / scene.metric.scale), found.atoms)
    return found._replace(codes=codes, atoms=atoms)


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


def _device(array: Any) -> str:
    return "cpu" if isinstance(array, np.ndarray) else str(array.device)


def _factors(
    problem: Problem, found: Found, scene: Scene, pattern: str, storage: Mapping[str, Any]
) -> list[Factorization]:
    d_in = problem.shape[0]
    metric = scene.metric
    codes = to_numpy(found.codes).T
    mask = codes != 0
    n_atoms = codes.shape[0] - d_in
    diagnostics = {"solver": "admm", "n_atoms": n_atoms, "n_nonzero": int(mask.sum()), **found.history}
    values = codes.astype(np.float64)
    for rows, one in metric.parts:
        values[:d_in, rows] /= to_numpy(one.scale)[:, None]
    values = (values * to_numpy(scene.sizes)).astype(np.float32)
    plus = []
    if n_atoms:
        atoms = (to_numpy(found.atoms) / to_numpy(metric.scale)).T.astype(np.float32)
        plus = [Factorization(atoms, values[d_in:], support="bitmask", mask=mask[d_in:], **storage)]
    identity = single_weights.kept(values[:d_in], mask[:d_in], pattern, storage, **diagnostics)
    return problem.split(replace(identity, plus=plus))


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: products with the inverse, an iteration each."""
    d, n = side_by_side([target.shape for target in targets])
    atoms = options["atoms"]
    rounds = options["max_iter"]
    # with gradients every matrix has a metric of its own
    n_metrics = len(targets) if options.get("group_metric") == EXACT else 0
    if atoms == AUTO:
        rounds += TRIAL * len(SHARES_TRIED)
    elif (atoms_by_rule(d, n, nbytes, options["pattern"]) if atoms is None else atoms) == 0:
        rounds = 0
    penalties = {"short": 6, "long": 20}.get(options["schedule"], 20)
    exchanges = 100 if kept_of(options["pattern"]) else 0
    found = single_weights.work(
        targets,
        products=(5 * penalties + 40 * rounds + exchanges) * (1 + bool(n_metrics)),
        inversions=(5 + penalties * (1 + rounds)) * (1 + n_metrics),
        compiled=True,
    )
    # the scaled Gram in both precisions and inverses in one, of which so many stay (`solvers.admm`)
    square = 4 * d**2
    inverses = max(square, min(penalties * square, 2**30))
    # the split, its dual, what they start from and move to, products, of every matrix side by side and its atoms
    memory = (3 * square + inverses) * (1 + n_metrics) + 16 * 4 * n * d
    return replace(found, memory=found.memory + memory)


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
    modules=lambda options: [
        *(__name__, "cospadi.solvers.admm", "cospadi.solvers.hybrid", "cospadi.solvers.sparsegpt"),
        *global_threshold.modules(options),
    ],
    faults=faults,
    allocator=global_threshold.ALLOCATOR,
)
