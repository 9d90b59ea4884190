"""CoSpaDi (arXiv 2509.22075): a learned dictionary with column-sparse codes, calibrated on activations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cospadi.arrays import on_device, to_numpy
from cospadi.budget import SparseShape, nbytes_left, sparse_shape
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import storage_of
from cospadi.gram import Whitening, whitening_factor
from cospadi.methods.base import (
    EXACT,
    METRIC_OPTIONS,
    SHARING_OPTIONS,
    TIME_OPTIONS,
    WARM_OPTIONS,
    WHITENING_OPTIONS,
    Fit,
    Method,
    Problems,
    budget_faults,
    sharing_faults,
    work_of,
)
from cospadi.problem import Problem, Target, side_by_side
from cospadi.registry import choice, option
from cospadi.runtime.cospadi_registry import SUPPORTS
from cospadi.solvers import SOLVERS, several_metrics
from cospadi.solvers.starts import STARTS, dictionary_start, warm_start
from cospadi.work import COMPILED, PRODUCT, Work

AUTO = "auto"
# What `rho: auto` tries: from 3 to its neighbours as long as the error falls, in rounds enough to tell
RHO_GRID = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
RHO_FIRST = 3.0
RHO_ROUNDS = 8
RHO_TRIALS = 4  # that the search takes, most often

OPTIONS: dict[str, dict[str, Any]] = {
    "solver": choice(
        sorted(SOLVERS),
        "How dictionary and codes are found. htp: Procrustes start, hard-thresholding pursuit and a "
        "closed-form dictionary (default); ksvd: the paper's OMP and K-SVD; procrustes: orthonormal atoms.",
        default="htp",
    ),
    "rho": option(
        ["number", "string"],
        "Atoms over nonzeros a column, k / s; 2 in the paper. auto: for every matrix the one of "
        f"{', '.join(f'{rho:g}' for rho in RHO_GRID)} with the least error after {RHO_ROUNDS} rounds, searched uphill "
        f"and downhill from {RHO_FIRST:g}.",
        minimum=1,
        maximum=16,
        pattern=f"^{AUTO}$",
        default=2.0,
    ),
    "support": choice(
        [name for name, support in SUPPORTS.items() if support.is_stored],
        "Where nonzeros may be: any atoms, or two of every four, which GPUs multiply fast. Same bytes "
        "at rho: 2, which 2:4 needs.",
        default="bitmask",
    ),
    **WHITENING_OPTIONS,
    **SHARING_OPTIONS,
    **METRIC_OPTIONS,
    "start": choice(
        [None, *sorted(STARTS)],
        "First dictionary. random: columns of the weight (the paper); spectral: leading directions of "
        "the whitened weight; spectral_original: of the weight itself; procrustes: orthonormal and improved; null: the "
        "solver's own.",
        default=None,
    ),
    **WARM_OPTIONS,
    "atom_update": choice(
        [None, "power", "block", "svd", "mod"],
        "How solver ksvd updates atoms. power: one by one, 8 power iterations (the paper; default); "
        "block: 16 at a time, for GPUs; svd: exact rank-1 fits; mod: all at once in closed form.",
        default=None,
    ),
    "polish": option("boolean", "Solve the final codes exactly on their supports, in double precision.", default=False),
    "max_iter": option(
        ["integer", "null"],
        "Outer iterations at most; null: the solver's own (ksvd: 60, as in the paper).",
        minimum=1,
        default=None,
    ),
    "tol": option(
        ["number", "null"],
        "Stop when an iteration lowers the error by less than this share of it; null: the solver's own.",
        minimum=0,
        default=None,
    ),
    **TIME_OPTIONS,
    "random_state": option("integer", "Seed of every random choice of the solver.", minimum=0, default=42),
}

# Options that go to the solver as they are where they are given
_SOLVER_OPTIONS = ("support", "atom_update", "polish", "max_iter", "tol", "max_seconds")


def fit(problem: Problem, nbytes: int, how: Fit, **options: Any) -> list[Factorization]:
    """``min ||L W - D_L S||_F`` with ``||s_j||_0 <= s``, then ``D = L^{-1} D_L`` (Eqs. 5 to 8).

    Options that are missing have their defaults.
    """
    options = METHOD.complete(options)
    if options["group_metric"] == EXACT and problem.n_metrics > 1:
        return _fit_exactly(problem, nbytes, how, options)
    whitening = problem.metric.whitening(whiten=options["whiten"], eta=options["eta"])
    return problem.split(_fit_as_one(problem, nbytes, how, options, whitening))


def _fit_as_one(
    problem: Problem, nbytes: int, how: Fit, options: Mapping[str, Any], whitening: Whitening
) -> Factorization:
    """Factors of the matrices side by side, in one metric."""
    weight = problem.weight
    target = on_device(whitening.whiten(weight), how.device)
    shape, searched = _choose_shape(target, weight.shape, nbytes, how.storage, options, how.log)
    solution = _learn(target, shape, options, how.log, **_start(target, shape, weight, whitening, how.warm, options))
    diagnostics = _diagnostics(shape, options, searched, solution.history, whitening)
    dictionary = whitening.unwhiten(to_numpy(solution.dictionary))
    return Factorization(
        dictionary, to_numpy(solution.codes), support=options["support"], **how.storage, diagnostics=diagnostics
    )


def _fit_exactly(problem: Problem, nbytes: int, how: Fit, options: Mapping[str, Any]) -> list[Factorization]:
    """``min sum_l ||L_l (W_l - D S_l)||_F^2``: one dictionary for several matrices, each in its own metric.

    The start is the solution in the metric of the mean Gram, in whose whitened space all of this happens.
    """
    whitenings = list(problem.whitenings(whiten=options["whiten"], eta=options["eta"]))
    factors = [whitening.factor for whitening in whitenings]
    mean = whitening_factor(sum(factor.T @ factor for factor in factors) / len(factors))
    start = problem.split(_fit_as_one(problem, nbytes, how, options, mean))
    # L_l seen from the space of the mean: the sum of its squares is the identity there
    seen = [mean.unwhiten_right(factor) for factor in factors]
    given = {name: options[name] for name in ("tol", "max_seconds") if options[name] is not None}
    solution = several_metrics()(
        [on_device(mean.whiten(weight), how.device) for weight in problem.weights],
        [on_device((factor.T @ factor).astype(np.float32), how.device) for factor in seen],
        n_nonzero_coefs=start[0].diagnostics["n_nonzero_coefs"],
        dictionary_init=mean.whiten(start[0].dictionary),
        codes_init=[part.codes for part in start],
        random_state=options["random_state"],
        support=options["support"],
        log=how.log,
        **given,
    )
    dictionary = mean.unwhiten(to_numpy(solution.dictionary))
    return [
        replace(
            part,
            dictionary=dictionary,
            codes=to_numpy(codes),
            diagnostics={
                **part.diagnostics,
                "shift": whitening.shift,
                "eta": whitening.eta,
                "history_exact": solution.history,
            },
        )
        for part, codes, whitening in zip(start, solution.codes, whitenings, strict=True)
    ]


def _learn(target: Any, shape: SparseShape, options: Mapping[str, Any], log: Any, **given: Any) -> Any:
    """Run the solver with the options that differ from its own defaults."""
    changed = {name: options[name] for name in _SOLVER_OPTIONS if options[name] != OPTIONS[name]["default"]}
    return SOLVERS[options["solver"]](
        target,
        n_atoms=shape.n_atoms,
        n_nonzero_coefs=shape.n_nonzero_coefs,
        random_state=options["random_state"],
        log=log,
        **{**changed, **given},
    )


def _most_atoms(size: tuple[int, int], options: Mapping[str, Any]) -> float:
    """As many atoms as can be, where they have to be orthonormal."""
    return min(size) if options["solver"] == "procrustes" else math.inf


def _choose_shape(
    target: Any, size: tuple[int, int], nbytes: int, storage: Mapping[str, Any], options: Mapping[str, Any], log: Any
) -> tuple[SparseShape, dict[str, float]]:
    """k and s; with ``rho: auto`` those of least error among short runs, whose errors are returned by rho."""

    def shape_at(rho: float) -> SparseShape:
        return sparse_shape(*size, nbytes=nbytes, rho=rho, support=options["support"], **storage)

    if options["rho"] != AUTO:
        return shape_at(options["rho"]), {}
    trial = {**options, "max_iter": RHO_ROUNDS, "polish": False}
    if options["max_seconds"] is not None:  # about half of the time for the search, which takes three runs or four
        trial["max_seconds"] = options["max_seconds"] / 8
    most = _most_atoms(size, options)
    grid = [rho for rho in RHO_GRID if shape_at(rho).n_atoms <= most]
    errors: dict[float, float] = {}

    def error_at(index: int) -> float:
        if not 0 <= index < len(grid):
            return math.inf
        rho = grid[index]
        if rho not in errors:
            errors[rho] = _learn(target, shape_at(rho), trial, None).history[-1]["relative_error"]
        return errors[rho]

    best, following = None, min(range(len(grid)), key=lambda index: abs(grid[index] - RHO_FIRST))
    while best is None or error_at(following) < error_at(best):
        best = following
        following = min(best - 1, best + 1, key=error_at)
    if log is not None:
        log(f"rho {grid[best]:g} of " + ", ".join(f"{rho:g}: {error:.4f}" for rho, error in sorted(errors.items())))
    return shape_at(grid[best]), errors


def _start(
    target: Any,
    shape: SparseShape,
    weight: Any,
    whitening: Whitening,
    warm: Factorization | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The solver's ``dictionary_init`` and ``codes_init``, where the options ask for a start of their own."""
    if warm is not None:
        device = str(getattr(target, "device", "cpu"))
        dictionary = on_device(whitening.whiten(to_numpy(warm.dictionary)), device)
        codes = on_device(to_numpy(warm.codes), device)
        dictionary, codes = warm_start(target, dictionary, codes, shape.n_atoms, random_state=options["random_state"])
        return {"dictionary_init": dictionary, "codes_init": codes}
    if options["start"] is None:
        return {}
    return {
        "dictionary_init": dictionary_start(
            options["start"],
            target,
            shape.n_atoms,
            shape.n_nonzero_coefs,
            weight=weight,
            factor=whitening.factor,
            random_state=options["random_state"],
        )
    }


def _diagnostics(
    shape: SparseShape,
    options: Mapping[str, Any],
    searched: Mapping[float, float],
    history: list[dict[str, Any]],
    whitening: Whitening,
) -> dict[str, Any]:
    found = {
        "solver": options["solver"],
        "n_atoms": shape.n_atoms,
        "n_nonzero_coefs": shape.n_nonzero_coefs,
        "shift": whitening.shift,
        "eta": whitening.eta,
        "history": history,
    }
    if searched:
        found["rho_search"] = {f"{rho:g}": error for rho, error in searched.items()}
    return found


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: the solver's cubic terms at measured rates; ``rho: auto`` is the grid's mean, and a search."""
    options = METHOD.complete(options)
    d, n = side_by_side([target.shape for target in targets])
    searching = options["rho"] == AUTO
    rho = sum(RHO_GRID) / len(RHO_GRID) if searching else options["rho"]
    k = sparse_shape(d, n, nbytes=nbytes, rho=rho, support=options["support"], **storage).n_atoms
    runs = [options["max_iter"], *[RHO_ROUNDS] * (RHO_TRIALS if searching else 0)]
    if options["solver"] == "ksvd":
        # pursuit: Gram rows against every column; sweep: eight power iterations, two products each, and the update
        s = k / rho
        found = work_of(d, n, k, sum((rounds or 60) * n * s * (k * s + 36 * d) for rounds in runs))
        return replace(found, memory=found.memory + COMPILED)
    conjugate_gradients, pursuit_and_dictionary = 3, 2
    a_round = 2 * n * k * k * (conjugate_gradients + pursuit_and_dictionary) + 6 * n * k * d + 2 * k * k * d + k**3 / 3
    start = 10 * min(d, n) ** 3 + 3 * (4 * n * k * d + 20 * k * k * d)
    products = sum((rounds or 25) * a_round + 20 * n * k * k for rounds in runs)
    return work_of(d, n, k, len(runs) * start, more={PRODUCT: products})


def modules(options: Mapping[str, Any]) -> list[str]:
    """This module, the chosen solver's, and that of the exact metric of groups where it is asked for."""
    exact = options.get("group_metric") == EXACT
    return [__name__, f"cospadi.solvers.{options['solver']}", *["cospadi.solvers.multi_metric"] * exact]


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Options that the solver does not take or that contradict each other; shapes that it cannot have."""
    options = METHOD.complete(settings)
    taken = inspect.signature(SOLVERS[options["solver"]]).parameters
    for name in (*_SOLVER_OPTIONS, "start"):
        parameter = "dictionary_init" if name == "start" else name
        if options[name] != OPTIONS[name]["default"] and parameter not in taken:
            yield f"{name}: {options[name]} is not for solver {options['solver']}; leave it out"
    kept, among = SUPPORTS[options["support"]].pattern or (0, 0)
    if kept and options["rho"] != among / kept:
        yield (
            f"rho: {options['rho']}; support {options['support']} has {kept} nonzeros in {among} atoms, "
            f"which is rho: {among / kept:g}"
        )
    if options["start"] is not None and options["warm_start"] is not None:
        yield "start: warm_start is a start too; leave one of them out"
    yield from sharing_faults(problems)
    yield from _shape_faults(settings, options, problems)


def _shape_faults(settings: Mapping[str, Any], options: Mapping[str, Any], problems: Problems) -> Iterator[str]:
    """What the bytes leave no room for, and more orthonormal atoms than there can be."""
    storage = storage_of(settings.get("codes", {}))
    rhos = RHO_GRID if options["rho"] == AUTO else [options["rho"]]

    def n_atoms(shape: tuple[int, int], nbytes: int) -> int:
        # the fewest, of what is searched
        return min(
            sparse_shape(*shape, nbytes=nbytes, rho=rho, support=options["support"], **storage).n_atoms for rho in rhos
        )

    budget = list(budget_faults(settings, problems, n_atoms))
    yield from budget
    for problem in problems if not budget else ():
        shape = side_by_side([target.shape for target in problem])
        most = _most_atoms(shape, options)
        k = n_atoms(shape, nbytes_left([target.shape for target in problem], settings["ratio"]))
        if k > most:
            names = ", ".join(dict.fromkeys(target.projection for target in problem))
            yield (
                f"rho: {options['rho']} at ratio {settings['ratio']} is {k} atoms for {names} ({shape[0]}x{shape[1]}); "
                f"at most {most} can be orthonormal: raise the ratio or the bits, or lower rho"
            )


METHOD = Method(
    name="cospadi",
    summary="Learned dictionary with column-sparse codes, calibrated on activations (CoSpaDi).",
    options=OPTIONS,
    factors="sparse codes",
    fit=fit,
    work=work,
    modules=modules,
    faults=faults,
)
