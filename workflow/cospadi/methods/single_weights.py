"""What the methods have in common that keep single weights: ``W ~ S``, a mask and the values that stay.

The dictionary is the identity and takes no bytes, so the whole budget goes to values and the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from cospadi.arrays import on_device, to_numpy
from cospadi.budget import factors_nbytes
from cospadi.errors import ConfigError
from cospadi.formats.dictionaries import IDENTITY
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import storage_of
from cospadi.methods.base import GLOBAL, Fit, Method, Problems, budget_faults, work_of
from cospadi.problem import Metric, Problem, Target, side_by_side
from cospadi.registry import option
from cospadi.runtime.cospadi_registry import SUPPORTS
from cospadi.solvers.entries import kept_of
from cospadi.work import COMPILED, LOOP, PRODUCT, Work

# Patterns that a support has of its own
_PATTERNED = tuple(name for name, support in SUPPORTS.items() if support.pattern is not None)

PATTERN = option(
    "string",
    "Where weights may stay. matrix: anywhere; column, row: as many in every output, or every input; "
    "n:m (2:4, 1:4, 4:8): n of every m inputs, m 2, 4, 8, 16 or 32, under the same 1-bit mask, which removes "
    "15/16 - n/m of the bytes of bfloat16. GPUs with sparse tensor cores multiply 2:4 fast, and no other.",
    pattern=r"^(matrix|column|row|[1-9][0-9]?:(2|4|8|16|32))$",
    default="matrix",
)


def support_of(pattern: str) -> str:
    """How the file stores the positions of a pattern: its own way where a support has one, else a bit a position."""
    return pattern if pattern in _PATTERNED else "bitmask"


def entries_nbytes(
    shape: tuple[int, int],
    n: int,
    *,
    pattern: str = "matrix",
    value_codec: str,
    block_size: int | None,
    dictionary_codec: str = IDENTITY,
    n_atoms: int = 0,
) -> int:
    """Bytes of n weights that stay, mask and scales counted; with `n_atoms` learned atoms beside the identity.

    Integer values are counted with the most scales that columns of any lengths can have.
    """
    d_in, d_out = shape
    most_scales = d_out * (2 if n_atoms else 1) + (n // block_size if block_size else 0)
    total = factors_nbytes(
        d_in,
        d_out,
        d_in,
        n,
        support=support_of(pattern),
        value_codec=value_codec,
        dictionary_codec=IDENTITY,
        block_size=block_size,
        n_scales=most_scales,
    )
    if n_atoms:
        total += factors_nbytes(
            d_in,
            d_out,
            n_atoms,
            0,
            support="bitmask",
            value_codec=value_codec,
            dictionary_codec=dictionary_codec,
            block_size=block_size,
            n_scales=0,
        )
    return total


def n_entries(
    shape: tuple[int, int],
    nbytes: int,
    *,
    pattern: str = "matrix",
    value_codec: str,
    block_size: int | None,
    dictionary_codec: str = IDENTITY,
    n_atoms: int = 0,
) -> int:
    """Weights that stay within `nbytes`, by the count of `entries_nbytes`.

    Raises
    ------
    ConfigError
        If not even one fits, or the pattern takes more.
    """
    d_in, d_out = shape
    stored = {"value_codec": value_codec, "block_size": block_size, "dictionary_codec": dictionary_codec}
    taken = functools.partial(entries_nbytes, shape, pattern=pattern, n_atoms=n_atoms, **stored)
    quota = kept_of(pattern)
    if quota is not None:
        n, m = quota
        here = f"{nbytes} bytes for a {d_in}x{d_out} matrix: {pattern}"
        if n >= m:
            raise ConfigError([f"{here} removes nothing; keep fewer than {m} of {m}"])
        if d_in % m:
            raise ConfigError([f"{here} needs a multiple of {m} inputs"])
        n_kept = d_in // m * n * d_out
        if taken(n_kept) > nbytes:
            raise ConfigError([f"{here} takes {taken(n_kept)}"])
        return n_kept
    low, high = 0, d_in * d_out
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if taken(middle) <= nbytes else (low, middle - 1)
    if low == 0:
        raise ConfigError([f"{nbytes} bytes for a {d_in}x{d_out} matrix: not one weight fits beside the mask"])
    return low


def inputs_of(problem: Problem, device: str) -> tuple[Any, Any]:
    """Weight (d_in, d_out) in float32 and Gram (d_in, d_in) in float64, on the device."""
    return on_device(problem.weight, device), gram_on(problem.metric, device)


def gram_on(metric: Metric, device: str) -> Any:
    """Gram in float64, on the device."""
    return on_device(np.asarray(metric.gram, np.float64), device)


@functools.lru_cache(maxsize=1)
def scaled(metric: Metric, device: str) -> Any:
    """`admm.Scaled` of a metric; that of the last is kept, since q, k and v follow each other."""
    from cospadi.solvers import admm

    return admm.Scaled(gram_on(metric, device), admm.single_precision(device))


def kept(weights: Any, mask: Any, pattern: str, storage: Mapping[str, Any], **diagnostics: Any) -> Factorization:
    """Factors of what stays of the weights side by side (d_in, sum of d_out), under a mask of the same shape."""
    codes, mask = np.ascontiguousarray(to_numpy(weights), np.float32), to_numpy(mask)
    return Factorization(None, codes * mask, support=support_of(pattern), mask=mask, **storage, diagnostics=diagnostics)


def method(
    *,
    name: str,
    summary: str,
    keep: Callable[..., tuple[Any, Any]],
    solver: str,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    products: float = 0.0,
    inversions: float = 0.0,
    squares: float | None = None,
    compiled: bool = False,
    allocation: ModuleType | None = None,
) -> Method:
    """A method that says which weights stay and what they become; the rest is the same for all such.

    Parameters
    ----------
    name, summary : str
    keep : callable
        ``keep(problem, n_kept, pattern, device, **options) -> weights, mask``, both (d_in, sum of d_out); on the device
        or not.
    solver : str
        The module of `solvers` that it uses.
    options : mapping
        By default ``pattern`` alone.
    products, inversions, squares, compiled
        What it computes and holds, as in `work`.
    allocation : module, optional
        Of a method whose bytes can be parted among matrices: `methods.global_threshold`.
    """
    own = {"pattern": PATTERN} if options is None else options

    def fit(problem: Problem, nbytes: int, how: Fit, **given: Any) -> list[Factorization]:
        chosen = {option: schema["default"] for option, schema in own.items()} | given
        pattern = chosen.pop("pattern")
        n_kept = n_entries(problem.shape, nbytes, pattern=pattern, **how.storage)
        weights, mask = keep(problem, n_kept, pattern, how.device, **chosen)
        n_nonzero = int(to_numpy(mask).sum())
        return problem.split(kept(weights, mask, pattern, how.storage, solver=solver, n_nonzero=n_nonzero))

    return Method(
        name=name,
        summary=summary,
        options=own if allocation is None else {**own, **allocation.OPTION},
        factors="single weights",
        fit=fit,
        work=lambda targets, nbytes, options, storage: work(
            targets, products=products, inversions=inversions, squares=squares, compiled=compiled
        ),
        modules=lambda options: [
            *(__name__, keep.__module__, f"cospadi.solvers.{solver}"),
            *(allocation.modules(options) if allocation else ()),
        ],
        faults=faults,
        allocator=allocation and allocation.ALLOCATOR,
    )


def work(
    targets: Sequence[Target],
    *,
    products: float = 0.0,
    inversions: float = 0.0,
    squares: float | None = None,
    seconds_a_weight: float = 0.0,
    compiled: bool = False,
) -> Work:
    """Work of a problem: so many products of a square matrix with the weight, so many inversions of the Gram; loops of
    compiled code that stay on the CPU, by their seconds.

    In memory are the Gram and what is made of it, float64: `squares` in all, by default its inverse if there is one;
    and the compiler, where there are loops or the solver is `compiled`.
    """
    d, n = side_by_side([target.shape for target in targets])
    found = work_of(d, n, 0, inversions * 2 * d**3, more={PRODUCT: products * 2 * d * d * n})
    loops = {LOOP: seconds_a_weight * d * n} if seconds_a_weight else {}
    squares = 1 + bool(inversions) if squares is None else squares
    # the weight, what is left of it and what it becomes, in both precisions
    memory = squares * 8 * d**2 + 40 * d * n + (COMPILED if compiled or loops else 0)
    return replace(found, memory=memory, core=found.core + loops, gpu=found.gpu + loops)


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Ratios that leave no weight, or less than the pattern takes."""
    storage = storage_of(settings.get("codes", {}))
    pattern = settings["pattern"]
    if settings.get("allocation") == GLOBAL and kept_of(pattern) is not None:
        yield f"allocation: {GLOBAL}; pattern {pattern} keeps as many of every matrix"
    yield from budget_faults(
        settings, problems, lambda shape, nbytes: n_entries(shape, nbytes, pattern=pattern, **storage)
    )
