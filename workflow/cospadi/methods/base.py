"""What every method provides, and the options that several of them have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from cospadi.allocation import AS_IS
from cospadi.budget import nbytes_left
from cospadi.errors import ConfigError
from cospadi.formats.factorization import Factorization
from cospadi.problem import GRADIENTS, INDEPENDENT, SEQUENTIAL, Target, learns_in_turn, shared, side_by_side
from cospadi.registry import Entry, choice, option
from cospadi.structure import PROJECTIONS
from cospadi.work import FACTOR, GPU_PRODUCT, PRODUCT, REFERENCE, THREAD_EXPONENT, Cost, Work

WHITENING_OPTIONS: dict[str, dict[str, Any]] = {
    "whiten": option(
        "boolean",
        "Measure the error on the calibration activations; false: on the weights alone (data-free).",
        default=True,
    ),
    "eta": option(
        "number",
        "Relative ridge on the Gram, G + eta * mean(diag G) * I, against fitting the calibration set.",
        minimum=0,
        maximum=1,
        default=0.0,
    ),
}

SHARING_OPTIONS: dict[str, dict[str, Any]] = {
    "group_size": option(
        "integer",
        "Consecutive layers that one job learns together and that may share dictionaries.",
        minimum=1,
        default=1,
    ),
    "share": option(
        "array",
        "Projections (q_proj, up_proj ...) that share one dictionary across the layers of a group.",
        items={"enum": list(PROJECTIONS)},
        uniqueItems=True,
        default=[],
    ),
    "share_within": option(
        "array",
        "Projections that share one dictionary inside a layer, as lists: [[q_proj, k_proj, v_proj]].",
        items={"type": "array", "items": {"enum": list(PROJECTIONS)}, "minItems": 2, "uniqueItems": True},
        default=[],
    ),
}

# What `group_metric` may be, of the methods that can do both
MEAN, EXACT = "mean", "exact"
METRIC_OPTIONS: dict[str, dict[str, Any]] = {
    "group_metric": choice(
        [MEAN, EXACT],
        "Error of matrices that share and have different inputs or gradients: in the metric of their mean Gram (the "
        "paper), or of each one's own.",
        default=MEAN,
    )
}

WARM_OPTIONS: dict[str, dict[str, Any]] = {
    "warm_start": option(
        ["string", "null"],
        "Variant of the same run whose factors are the start, at another ratio say; null: none.",
        default=None,
    )
}

TIME_OPTIONS: dict[str, dict[str, Any]] = {
    "max_seconds": option(
        ["number", "null"],
        "Seconds that learning a layer may take; its matrices share them by their cost. The result then "
        "depends on the machine. null: no limit.",
        minimum=0.1,
        default=None,
    )
}

# Every matrix the same ratio: what a method does that parts no bytes
UNIFORM = "uniform"
# One threshold or step for the whole model, by what errors cost the loss
GLOBAL = "global"
# Of every method that learns problem by problem: some sizes of each are tried, and one price a byte chooses (`menus`)
MENU = "menu"
# The same sizes, by what each alone does to the predictions of the whole model (`calibration.alone`)
MEASURED = "measured"
# A person's table (`allocation.read_table`)
FILE = "file"
_COMMON = (
    f"{MENU}: every problem is learned at the sizes of the option menu, and those of least predicted rise together are "
    f"taken (metric gradients); {MEASURED}: the same, but what every size of every problem alone does to the model's "
    f"predictions is measured; {FILE}: what allocation_file says; {UNIFORM}: the same ratio for all."
)
# Keys of a variant that say which matrix gets how many bytes, of all methods that learn problem by problem
ALLOCATION_OPTIONS: dict[str, dict[str, Any]] = {
    "allocation": choice(
        [UNIFORM, MENU, MEASURED, FILE], f"Which matrix gets how many of the bytes. {_COMMON}", default=UNIFORM
    ),
    "menu": option(
        "array",
        f"With allocation {MENU} or {MEASURED}: bytes that every problem is learned at, as multiples of what the ratio "
        "leaves of it. What would be no smaller than the matrices is left out; they can always stay as they are.",
        items={"type": "number", "minimum": 0.05, "maximum": 20},
        minItems=1,
        uniqueItems=True,
        default=[0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0],
    ),
    "measured_windows": option(
        "integer",
        f"With allocation {MEASURED}: calibration windows, at most, that the model reads for every size of every "
        "problem: the last ones, of those that calibration.heldout_fraction keeps out of all else where it keeps some.",
        minimum=1,
        default=4,
    ),
    "allocation_file": option(
        ["string", "null"],
        f"With allocation {FILE}: a table as the allocation.tsv of a variant, with tabs between its columns; matrices "
        f"and bytes are read, {AS_IS} for those that stay as they are.",
        minLength=1,
        format="file",
        default=None,
    ),
}
# What an allocation by formula may remove of a matrix, unless the ratio is higher: its paper's guard is not known to us
MOST_REMOVED = 0.8


def allocation_option(rule: str, description: str, *, default: str | None = None) -> dict[str, dict[str, Any]]:
    """The option ``allocation`` of a method that has an `Allocator` of its own; by default its own rule."""
    return {
        "allocation": choice(
            [UNIFORM, rule, MENU, MEASURED, FILE],
            f"Which matrix gets how many of the bytes. {rule}: {description}; {_COMMON}",
            default=default or rule,
        )
    }


@dataclass(frozen=True, kw_only=True)
class Allocator:
    """How a method parts the bytes of a model among its problems, before any of them is learned.

    Attributes
    ----------
    profile : callable
        ``profile(problem, nbytes, *, storage, device, **options) -> mapping``: what `share` has to know of a problem
        that would get `nbytes` if all had the same ratio, in JSON's types.
    share : callable
        ``share(profiles, nbytes, *, storage, **options) -> list``: bytes of each of the `allocation.Profile`, which
        take `nbytes` together at most; None for matrices that stay as they are.
    work : callable
        ``work(targets, nbytes, options, storage) -> Work``: what `profile` takes.
    options : tuple of str
        Those of the method's options that are for this alone, and not for `Method.fit`.
    """

    profile: Callable[..., Mapping[str, Any]]
    share: Callable[..., Sequence[int | None]]
    work: Callable[[Sequence[Target], int, Mapping[str, Any], Mapping[str, Any]], Work]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What `Method.fit` is told besides its problem, bytes and options.

    Attributes
    ----------
    storage : mapping
        How the factors will be stored (`formats.values.storage_of`).
    device : str
        Where to compute.
    log : callable, optional
        Receives a line per iteration.
    warm : Factorization, optional
        Factors of the matrices side by side to start from.
    """

    storage: Mapping[str, Any]
    device: str = "cpu"
    log: Callable[[str], None] | None = None
    warm: Factorization | None = None


Problems = Sequence[Sequence[Target]]


@dataclass(frozen=True, kw_only=True)
class Method(Entry):
    """A way to factorize matrices; every option has a default. What a method knows is in its module, and only there.

    Attributes
    ----------
    factors : str
        What `fit` gives, in a word or two; a warm start (`WARM_OPTIONS`) is from factors of the same kind.
    fit : callable
        ``fit(problem, nbytes, how, **options) -> list of Factorization``, one for each matrix of the `problem.Problem`,
        which take `nbytes` in the file at most, all together; `how` is a `Fit`. Options are complete but for those of
        `SHARING_OPTIONS` and `WARM_OPTIONS`, which are settled before; ``max_seconds`` (`TIME_OPTIONS`) is what this
        problem may take.
    work : callable
        ``work(targets, nbytes, options, storage) -> Work``: what `fit` takes for a problem of these `problem.Target`,
        besides the process and the factors that it gives.
    modules : callable
        ``modules(options) -> list[str]``: the modules whose code decides the result, for rerun triggers.
    faults : callable
        ``faults(settings, problems=()) -> lines``: what is wrong with complete settings that no schema can say,
        ``key: what``; with the problems of the planned model (lists of `problem.Target`) also what it cannot do there.
    scope : {"problem", "model"}
        What `fit` gets: the matrices that share a dictionary, or all matrices of the model in one job, with its drift.
    decoded : bool
        Whether what it stores is decoded once, when a model is loaded, and takes as much memory as the weight besides.
    own_codec : bool
        Whether it stores values in a codec of its own, however many bits ``codes.value_bits`` allows.
    allocator : Allocator, optional
        Its own, of a method with a rule of its own (`allocation_option`).
    scales_columns : bool
        Whether each column of what it gives can be scaled for itself, so that columns can weigh differently while it
        is learned (metric gradients).
    """

    factors: str
    fit: Callable[..., list[Factorization]]
    work: Callable[[Sequence[Target], int, Mapping[str, Any], Mapping[str, Any]], Work]
    modules: Callable[[Mapping[str, Any]], list[str]]
    faults: Callable[..., Iterable[str]] = lambda settings, problems=(): ()
    scope: Literal["problem", "model"] = "problem"
    decoded: bool = False
    own_codec: bool = False
    scales_columns: bool = True
    allocator: Allocator | None = None

    def allocates(self, settings: Mapping[str, Any]) -> bool:
        """Whether complete settings ask for bytes that differ from matrix to matrix."""
        return self.scope == "problem" and settings.get("allocation", UNIFORM) != UNIFORM

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The method's own options among a variant's settings, defaults filled in."""
        return {name: settings.get(name, default) for name, default in self.defaults().items()}

    def own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that `fit` takes: all but those that are settled before it."""
        settled = {*SHARING_OPTIONS, *WARM_OPTIONS, "allocation", *(self.allocator.options if self.allocator else ())}
        return {name: value for name, value in options.items() if name not in settled}


def planned_problems(
    settings: Mapping[str, Any], method: Method, matrices: Mapping[str, tuple[int, int]], n_layers: int
) -> list[list[Target]]:
    """What `Method.fit` will get of a unit with `n_layers` layers.

    Parameters
    ----------
    settings : mapping
        Of a variant.
    method : Method
        That the settings name.
    matrices : mapping
        Projection to (d_in, d_out), of one layer.
    """
    chosen = settings.get("targets") or matrices
    targets = [Target(i, name, shape) for i in range(n_layers) for name, shape in matrices.items() if name in chosen]
    return [targets] if method.scope == "model" else shared(targets, settings)


def sharing_option_faults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Values of `SHARING_OPTIONS` that contradict each other, or by which nothing is shared.

    Parameters
    ----------
    settings : mapping
        Complete, of a step; one without these options has no faults.
    defaults : mapping
        Of the step's method.
    """
    share, bundles, targets = settings.get("share", ()), settings.get("share_within", ()), settings.get("targets")
    for name, count in Counter(name for bundle in bundles for name in bundle).items():
        if count > 1:
            yield f"share_within: {name} is in {count} lists"
    for index, bundle in enumerate(bundles):
        if targets is not None and len(set(bundle) & set(targets)) < 2:
            yield f"share_within.{index}: {_list(bundle)} shares nothing: targets has fewer than two of them"
    if share and settings["group_size"] == 1:
        yield (
            f"share: {_list(share)} shares nothing with group_size: 1, a layer alone; "
            "set group_size to 2 or more, or share to []"
        )
    # a method's own default is for all projections, whichever are chosen
    given = share and share != defaults["share"]
    if given and targets is not None and not set(share) & set(targets):
        yield f"share: {_list(share)} shares nothing: targets has none of them; set share to []"


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"


def sharing_faults(problems: Problems) -> Iterator[str]:
    """Projections that cannot have one dictionary: a dictionary has as many rows as they have inputs."""
    for problem in problems:
        widths = {target.projection: target.shape[0] for target in problem}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{projection} has {width} inputs" for projection, width in widths.items())
            yield f"share_within: {found}; those that share have the same number"


def allocation_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """Keys of `ALLOCATION_OPTIONS` that contradict each other, in complete settings."""
    given, path = settings.get("allocation"), settings.get("allocation_file")
    if given in (MENU, GLOBAL) and settings["metric"] != GRADIENTS:
        yield f"allocation: {given} compares what errors in different matrices cost; set metric to {GRADIENTS}"
    if given == FILE and path is None:
        yield f"allocation: {FILE} needs a table; set allocation_file"
    if given != FILE and path is not None:
        yield f"allocation_file: {path} is read with allocation {FILE} alone, here it is {given}"
    for key, rules in (("menu", (MENU, MEASURED)), ("measured_windows", (MEASURED,))):
        value = settings.get(key, default := ALLOCATION_OPTIONS[key]["default"])
        if given not in rules and value != default:
            yield f"{key}: {value} is of allocation {' or '.join(rules)}, here it is {given}; leave it out"


# Options that train factors; those and the ones of layers that are learned in turn, which methods that learn the whole
# model at once do not have
TRAINING = ("refine", "distill")
OF_LAYERS = ("target", "drift_share", "residual_share", "compensate", *TRAINING)

# Options that decide nothing of what is learned, but what is done with it
EMBEDDINGS = ("embedding_bits", "embedding_method")
AFTERWARDS = ("distill", *EMBEDDINGS)


def trained_by(settings: Mapping[str, Any]) -> list[str]:
    """Keys of complete settings that ask for training of factors."""
    return [key for key in TRAINING if settings.get(key) is not None]


def of_layers_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """Options of layers that are learned in turn, or of training, where it cannot be, or where they say nothing."""
    for key, default in (("drift_share", 0.5), ("residual_share", 0.0)):
        if settings.get("target") == INDEPENDENT and settings[key] != default:
            yield f"{key}: {settings[key]} is of target {SEQUENTIAL}; set target to it"
    keys = [key for key in ("compensate", *TRAINING) if settings.get(key) is not None]
    if settings.get("target") == SEQUENTIAL:
        keys.insert(0, "target")
    if "compensate" in keys:
        for key in filter(keys.__contains__, ("target", "refine")):
            yield f"compensate: layers are fitted to those before them by {key} already; leave out one of the two"
    if keys and learns_in_turn(settings) and settings.get("group_size", 1) > 1:
        yield f"{keys[0]}: layers are learned in turn, and here several are learned together ({settings['method']})"
    if keys and settings["codes"]["rounding"] == "optimal":
        yield f"{keys[0]}: codes.rounding optimal goes back to the weight as it is; take nearest"


def budget_faults(
    settings: Mapping[str, Any], problems: Problems, fits: Callable[[tuple[int, int], int], Any]
) -> Iterator[str]:
    """What the ratio leaves too few bytes for, by trying.

    Parameters
    ----------
    fits : callable
        ``fits(shape, nbytes)`` of matrices side by side; raises `ConfigError` where not even the least is possible.
    """
    for problem in problems:
        shape = side_by_side([target.shape for target in problem])
        try:
            fits(shape, nbytes_left([target.shape for target in problem], settings["ratio"]))
        except ConfigError as error:
            yield f"ratio: {settings['ratio']} leaves {error.faults[0]}"


def work_of(
    d_in: int, d_out: int, n_atoms: int, solver_flops: float, *, more: Mapping[str, float] = MappingProxyType({})
) -> Work:
    """Work of one problem: whitening, solver, error.

    Parameters
    ----------
    d_in, d_out : int
        Of its matrices side by side.
    n_atoms : int
    solver_flops : float
        At the rate of eigenvectors and triangular solves.
    more : mapping
        What the solver does at other rates, by kind.
    """
    square = 8 * d_in**2
    # measured by tracemalloc for htp: 12, 45 and 22 MiB for 576 x 576, 576 x 1536 and 1536 x 576; this gives 13, 44, 29
    solver = 8 * 4 * n_atoms * d_out + 6 * 4 * d_in * d_out + 3 * 8 * min(d_in, d_out) ** 2
    error = 3 * 8 * d_in * d_out  # measured in float64 once the solver is done
    # the Gram and its factor
    memory = 2 * square + 2 * 4 * d_in * d_out + max(solver, error)
    whitening_and_error = d_in**3 / 3 + 6 * d_in * d_in * d_out
    core = Cost({FACTOR: whitening_and_error + solver_flops}) + more
    # only the products move to a GPU: eigenvectors and whitening stay where they are, a quarter of the time
    products = Cost({GPU_PRODUCT: core.seconds() * REFERENCE.rates[PRODUCT]})
    return Work(memory, 0, core, core * (0.25 / 8**THREAD_EXPONENT) + products)
