"""Learn the factors of one unit (a layer, or a group of layers) and write them with their diagnostics."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cospadi.budget import nbytes_left
from cospadi.errors import ArtifactError, ConfigError
from cospadi.files import ModelFolder, TensorFile, read_json, write_json, write_tensors
from cospadi.finished import Finished, stamps
from cospadi.formats.factorization import Factorization, dictionary_names, read_factors, read_specs
from cospadi.formats.values import storage_of
from cospadi.gram import check_gradients, check_grams
from cospadi.methods import METHODS, Method
from cospadi.methods.base import AFTERWARDS, Fit
from cospadi.problem import Gradients, Matrix, Metric, OnDemand, Problem, in_turn, matrices_of, shared
from cospadi.provenance import check_provenance, digest_of
from cospadi.runtime.cospadi_registry import FACTOR_CODECS
from cospadi.structure import layer_name

FORMAT_VERSION = 1

_WARM_REMEDY = "Run learn_dictionary of the variant that warm_start names again, for this unit"


def learn_unit(
    model_folder: Path,
    structure: Mapping[str, Any],
    gram_files: Sequence[Path],
    layers: Sequence[int],
    variant: Mapping[str, Any],
    *,
    calibration: Mapping[str, Any] | None = None,
    output: Path,
    diagnostics: Path,
    warm_factors: Path | None = None,
    drift: Path | None = None,
    gradient_files: Sequence[Path] = (),
    allotted: Mapping[tuple[str, ...], int | None] | None = None,
    streams: InTurn | None = None,
    code: str = "",
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> None:
    """Learn every matrix of a unit and write ``factors`` (float32) and diagnostics.

    Matrices that share a dictionary are one `Problem`, and so are all matrices of a model where the method is for that
    (`Method.scope`). A shared dictionary is stored once, under the name of its first matrix. A matrix without outputs
    on the calibration data (its weight or all of its inputs are zero) has nothing to be factorized: it is left out,
    stays as it is in the model, and the diagnostics list it under ``kept_dense``. What an interrupted job of the same
    unit had learned is not learned again (`finished`), but for layers in turn.

    Parameters
    ----------
    model_folder : Path
        Hugging Face folder of the dense model.
    structure : mapping
        From `structure.inspect_model`.
    gram_files : sequence of Path
        One Gram file a layer, in the order of `layers`.
    layers : sequence of int
    variant : mapping
        ``method``, ``ratio``, ``codes`` and the method's options.
    calibration : mapping, optional
        What Grams and drift have to be of (`activations.calibration_of`); without it, all Grams of the same.
    output, diagnostics : Path
        ``factors/<unit>.safetensors`` and ``.json``.
    warm_factors : Path, optional
        Factors of the same unit from another variant, to start from (option ``warm_start``).
    drift : Path, optional
        From `pruning.drift.measure`, for a method that learns the whole model at once.
    gradient_files : sequence of Path
        That each layer is in, from `calibration.gradients.collect_gradients`, where they are the variant's metric.
    allotted : mapping, optional
        Bytes of every problem by the names of its matrices, None for those that stay as they are
        (`profiles.read_allocation`); by default what the ratio leaves of each.
    streams : InTurn, optional
        For a variant whose layers are learned in turn (`problem.learns_in_turn`); they are behind the unit then.
    code : str
        Digest of what learns: nothing is taken from a job that other code interrupted.

    Raises
    ------
    NumericalError
        If a weight holds NaN or infinity.
    ArtifactError
        If Grams, gradients, drift or warm factors are of another model, other layers or another calibration, or the
        allocation has nothing for a problem.
    """
    calibration = check_grams(gram_files, structure, layers, calibration)
    belongs = provenance(structure, layers, variant, calibration)
    method = METHODS[variant["method"]]
    options = method.complete(variant)
    job = _Job(
        method=method,
        options=options,
        ratio=variant["ratio"],
        storage=storage_of(variant["codes"]),
        warm=None if warm_factors is None else _open_warm(warm_factors, belongs),
        drift=None if drift is None else _read_drift(drift, belongs),
        allotted=allotted,
        device=device,
        log=log,
    )
    whole = method.scope == "model"
    gradients = gradients_of(variant, gradient_files, structure, layers, calibration)
    folder = ModelFolder(model_folder)
    matrices = list(matrices_of(folder, structure, layers, gram_files, gradients=gradients, keep_grams=not whole))
    groups = [matrices] if whole else shared(matrices, options)
    trained: dict[str, dict[str, Any]] = {}
    read = [*gram_files, *gradient_files, *filter(None, (warm_factors, drift))]
    given = [code, device, stamps(read), [[*names, nbytes] for names, nbytes in (allotted or {}).items()]]
    with Finished(output if streams is None else None, [belongs, given]) as finished:
        # as if the interrupted job had gone on
        started = time.perf_counter() - sum(
            one.about["report"]["seconds"] for _, one in finished if "report" in one.about
        )
        if streams is not None:
            found = _learn_in_turn(job, matrices, streams, trained)
        else:
            left = finished.left(groups)
            if len(left) < len(groups):
                log(f"{len(groups) - len(left)} of {len(groups)} problems were learned before an interruption")
            found = _learn(job, left, n_layers=len(layers), started=started)
        for one in found:
            if one.factors is None:
                finished.add(one.name, {"kept_dense": one.report["reason"]})
                log(f"warning: {one.name} stays as it is: {one.report['reason']}")
                continue
            packed, spec = one.factors.before_rounding().pack(one.name)
            finished.add(one.name, {"spec": spec, "report": {**one.report, **one.factors.diagnostics}}, packed)
            log(f"{one.name}: relative error {one.report['relative_error']:.4f} in {one.report['seconds']:.1f} s")
        learned = {name: result for name, result in finished if "spec" in result.about}
        kept_dense = {name: result.about["kept_dense"] for name, result in finished if name not in learned}
        specs = {name: result.about["spec"] for name, result in learned.items()}
        dictionaries = {name: set(dictionary_names(spec)) for name, spec in specs.items()}
        reports = {}
        for name, result in learned.items():
            sharers = [other for other, theirs in dictionaries.items() if theirs & dictionaries[name]]
            reports[name] = {**result.about["report"], "shared_with": [other for other in sharers if other != name]}
        tensors = {key: value for result in learned.values() for key, value in result.tensors.items()}
        write_tensors(output, tensors, {**belongs, "matrices": specs, "kept_dense": kept_dense})
        write_json(
            diagnostics,
            {
                "format_version": FORMAT_VERSION,
                "unit": output.stem,
                "method": variant["method"],
                "ratio": variant["ratio"],
                "options": options,
                "device": device,
                "seconds": time.perf_counter() - started,
                "kept_dense": kept_dense,
                **trained,
                "matrices": reports,
            },
        )


def gradients_of(
    variant: Mapping[str, Any],
    files: Sequence[Path],
    structure: Mapping[str, Any],
    layers: Sequence[int],
    calibration: Mapping[str, Any] | None,
) -> Gradients | None:
    """What makes the metric of a variant's matrices, checked as `gram.check_gradients` does; None where Grams do."""
    gradients = Gradients.of(variant, files, alike=not METHODS[variant["method"]].scales_columns)
    if gradients is not None:
        check_gradients(files, structure, layers, calibration)
    return gradients


def provenance(
    structure: Mapping[str, Any],
    layers: Sequence[int],
    variant: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What factors of a unit belong to: version, model, layers, the settings that decide them, and the calibration."""
    # how values are rounded is decided later, and what training makes of them
    codes = {key: value for key, value in variant["codes"].items() if key != "rounding"}
    variant = {key: value for key, value in variant.items() if key not in AFTERWARDS}
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": structure["fingerprint"],
        "layers": list(layers),
        "settings": digest_of({**variant, "codes": codes}),
        **(calibration or {}),
    }


def distilled(variant: Mapping[str, Any]) -> dict[str, Any]:
    """What factors that were trained end to end belong to besides: how; nothing where a variant's are not."""
    return {"distilled": digest_of(dict(variant["distill"]))} if variant.get("distill") is not None else {}


class InTurn(Protocol):
    """What layers that are learned one after the other know of those before: `sequence`, `compensation`."""

    def targets(self, layer: int, matrices: Sequence[Matrix]) -> list[Matrix]:
        """The matrices of the next layer as they are to be learned, in the order of the model."""

    def put(self, name: str, factors: Factorization) -> None:
        """Have matrix `name` of that layer be what the checkpoint will have."""

    def compressed(
        self, layer: int, learned: Mapping[str, Factorization]
    ) -> tuple[dict[str, Factorization], dict[str, dict[str, Any]]]:
        """Go on behind the layer, whose other matrices stay as they are: its factors, which may have been trained, and
        what training did, by kind, for the diagnostics.
        """

    def write(self, path: str | Path) -> None:
        """Leave what the next unit has to know in a file."""


class _Job(NamedTuple):
    """What all problems of a unit have in common."""

    method: Method
    options: dict[str, Any]
    ratio: float
    storage: dict[str, Any]
    warm: TensorFile | None
    drift: Sequence[float] | None
    allotted: Mapping[tuple[str, ...], int | None] | None
    device: str
    log: Callable[[str], None]


class _Learned(NamedTuple):
    """Factors of a matrix and what the diagnostics say of it whatever the method; None for one that stays dense."""

    name: str
    factors: Factorization | None
    report: dict[str, Any]


def _learn(job: _Job, groups: Sequence[Sequence[Matrix]], *, n_layers: int, started: float) -> Iterator[_Learned]:
    """One problem after the other; the time that there may be for `n_layers` counts from `started`."""
    means: dict[frozenset[Metric], Metric] = {}  # q, k and v follow each other and share a metric
    for index, group in enumerate(in_turn(groups)):
        in_memory = job.method.scope == "problem"
        weights = [matrix.weight() for matrix in group] if in_memory else OnDemand(group, Matrix.weight)
        sizes = [matrix.squared_norm(weight) for matrix, weight in zip(group, weights, strict=True)]
        for matrix, size in zip(group, sizes, strict=True):
            if size <= 0:
                yield _Learned(matrix.name, None, {"reason": _why_dense(matrix)})
        kept = [i for i, size in enumerate(sizes) if size > 0]
        if kept:
            problem_started = time.perf_counter()
            metrics = frozenset(group[i].metric for i in kept)
            problem = Problem(
                [group[i] for i in kept],
                weights=[group[i].weighted(weights[i]) for i in kept] if in_memory else None,
                metric=means.get(metrics),
                drift=job.drift,
                in_memory=in_memory,
            )
            if in_memory:
                means[metrics] = problem.metric
            options = job.method.own(job.options)
            if options.get("max_seconds") is not None:
                left = job.options["max_seconds"] * n_layers - (problem_started - started)
                options["max_seconds"] = share_of_time(left, group, groups[index:])
            nbytes = _nbytes(job, problem, group)
            if nbytes is None:
                found = [Factorization.as_it_is(weights[i], job.storage) for i in kept]
            else:
                try:
                    found = job.method.fit(problem, nbytes, _how(job, problem), **options)
                except ConfigError as error:
                    raise ConfigError([f"{' + '.join(problem.names)}: {fault}" for fault in error.faults]) from error
                found = [group[i].restored(factors) for i, factors in zip(kept, found, strict=True)]
            seconds = (time.perf_counter() - problem_started) / len(kept)
            for place, i in enumerate(kept):
                factors, found[place] = found[place], None  # each is freed once it is packed
                report = _report(group[i], weights[i], factors, sizes[i])
                yield _Learned(group[i].name, factors, {**report, "seconds": seconds})
        later = {frozenset(matrix.metric for matrix in other) for other in groups[index + 1 :]}
        means = {key: mean for key, mean in means.items() if key in later}


def _learn_in_turn(
    job: _Job, matrices: Sequence[Matrix], streams: InTurn, trained: dict[str, dict[str, Any]]
) -> Iterator[_Learned]:
    """One layer after the other, on what the compressed ones before it give; `trained` gets what training did."""
    for layer, own in itertools.groupby(matrices, lambda matrix: matrix.layer):
        targets = streams.targets(layer, list(own))
        learned = []
        for one in _learn(job, shared(targets, job.options), n_layers=1, started=time.perf_counter()):
            if one.factors is not None:
                streams.put(one.name, one.factors)
            learned.append(one)
        factors = {one.name: one.factors for one in learned if one.factors is not None}
        factors, reports = streams.compressed(layer, factors)
        for what, report in reports.items():
            trained.setdefault(what, {})[layer_name(layer)] = report
        yield from (one._replace(factors=factors.get(one.name)) for one in learned)


def _nbytes(job: _Job, problem: Problem, group: Sequence[Matrix]) -> int | None:
    """Bytes that a problem may take; None where its matrices stay as they are.

    A person's table has bytes of all matrices of the `group`: those of them that have outputs get their part.
    """
    if job.allotted is None:
        return nbytes_left(problem.shapes, job.ratio)
    if tuple(problem.names) in job.allotted:
        return job.allotted[tuple(problem.names)]
    whole = tuple(matrix.name for matrix in group)
    if whole not in job.allotted:
        raise ArtifactError(
            "allocation.json",
            f"has no bytes for {' + '.join(problem.names)}",
            "Delete it and the profiles of the variant, and run again",
        )
    nbytes = job.allotted[whole]
    return nbytes and nbytes * nbytes_left(problem.shapes, 0) // nbytes_left([matrix.shape for matrix in group], 0)


def _read_drift(path: Path, belongs: Mapping[str, Any]) -> list[float]:
    remedy = "Delete it and run again to measure the drift anew"
    found = read_json(path, remedy)
    check_provenance(path, found, {key: belongs[key] for key in ("format_version", "fingerprint", "tokens")}, remedy)
    return found["drift"]


def _open_warm(path: Path, belongs: Mapping[str, Any]) -> TensorFile:
    """Factors to start from: of another variant, so of other settings."""
    factors = TensorFile(path, _WARM_REMEDY)
    check_provenance(path, factors.metadata, {k: v for k, v in belongs.items() if k != "settings"}, _WARM_REMEDY)
    return factors


def _how(job: _Job, problem: Problem) -> Fit:
    label = "all layers" if job.method.scope == "model" else " + ".join(problem.names)
    return Fit(
        storage=job.storage,
        device=job.device,
        log=lambda line: job.log(f"{label}: {line}"),
        warm=None if job.warm is None else _read_side_by_side(job.warm, problem.matrices),
    )


def _why_dense(matrix: Matrix) -> str:
    if matrix.weight().any():
        if matrix.outputs is not None and not matrix.outputs.squares.any():
            return "no gradient of the loss reaches its outputs on the calibration data"
        return f"its outputs are zero for all inputs of the calibration data ({matrix.site})"
    return "its weight is zero throughout"


def _report(matrix: Matrix, weight: np.ndarray, factors: Factorization, size: float) -> dict[str, Any]:
    difference = weight.astype(np.float64) - factors.reconstruct()
    error = matrix.squared_norm(difference)
    report = {
        "shape": list(weight.shape),
        "site": matrix.site,
        "squared_norm": size,
        "squared_error": error,
        "relative_error": math.sqrt(max(error, 0.0) / size),
        **matrix.predicted_rise(error),
    }
    heldout = matrix.metric.heldout_gram()
    heldout_size = 0.0 if heldout is None else matrix.squared_norm(weight, heldout)
    if heldout_size > 0:
        report["relative_error_heldout"] = math.sqrt(max(matrix.squared_norm(difference, heldout), 0.0) / heldout_size)
    return report


def share_of_time(seconds: float, group: Sequence[Matrix], groups: Sequence[Sequence[Matrix]]) -> float:
    """What one of some problems may take of the seconds that there are for all of them, by what each costs."""
    return max(1e-3, seconds * _cost(group) / sum(map(_cost, groups)))


def _cost(group: Sequence[Matrix]) -> int:
    """What learning a problem costs, in units of its own: products of a dictionary with the weights."""
    d_in, d_out = group[0].shape[0], sum(matrix.shape[1] for matrix in group)
    return d_in * d_out * min(d_in, d_out)


def _read_side_by_side(factors: TensorFile, matrices: Sequence[Matrix]) -> Factorization | None:
    """Learned factors of the matrices of a problem as one matrix, columns weighted, with the dictionary of the first.

    None where an allocation left a matrix as it is: there is no dictionary to start from.

    Raises
    ------
    ArtifactError
        If a matrix is not in the file.
    """
    specs = read_specs(factors, FACTOR_CODECS, _WARM_REMEDY)
    found = []
    for matrix in matrices:
        name = matrix.name
        if name not in specs:
            raise ArtifactError(factors.path, f"has no factors of {name}", "Name another variant as warm_start")
        found.append(matrix.weighted_factors(read_factors(factors, name, specs[name], _WARM_REMEDY)))
    if any(part.dictionary is None for part in found):
        return None
    return replace(found[0], codes=np.concatenate([part.codes for part in found], axis=1))
