"""Learn the factors of one unit (a layer, or a group of layers) and write them with their diagnostics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cospadi.codecs import storage_of
from cospadi.errors import ArtifactError, NumericalError
from cospadi.factorization import Factorization, dictionary_names, tensor_names, unpack
from cospadi.files import ModelFolder, TensorFile, read_json, write_json, write_tensors
from cospadi.gram import Whitening, read_gram, relative_error, sites, whitening_factor
from cospadi.methods import METHODS, Method

FORMAT_VERSION = 1

# Where all layers are one problem, so many whitenings stay in memory: those of a few layers that share
_WHITENINGS_HELD = 4


@dataclass(frozen=True)
class Matrix:
    """One target matrix: where its inputs are measured, what it is called, and its shape (d_in, d_out)."""

    gram_file: Path
    site: str
    name: str
    shape: tuple[int, int]

    @property
    def projection(self) -> str:
        """Last part of the name, ``q_proj``."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def inputs(self) -> tuple[Path, str]:
        """What its inputs are, equal for matrices that read the same ones."""
        return self.gram_file, self.site

    def gram(self) -> np.ndarray:
        """Gram of the matrix's inputs."""
        return read_gram(self.gram_file, self.site)

    def heldout_gram(self) -> np.ndarray | None:
        """Gram of the calibration rows that were kept out, None where none were."""
        if not sites(self.gram_file)[self.site]["n_heldout"]:
            return None
        return read_gram(self.gram_file, self.site, heldout=True)


def matrices_of(structure: Mapping[str, Any], layers: Sequence[int], gram_files: Sequence[Path]) -> Iterator[Matrix]:
    """Every target matrix of `layers`, in the order of the model; one Gram file a layer."""
    for layer, gram_file in zip(layers, gram_files, strict=True):
        for site in structure["layers"][layer]["sites"]:
            for matrix in site["matrices"]:
                yield Matrix(gram_file, site["name"], matrix["name"], tuple(matrix["shape"]))


def shared_problems(matrices: Sequence[Matrix], options: Mapping[str, Any]) -> list[list[Matrix]]:
    """Matrices that share a dictionary, together; a list of one for a matrix with its own.

    ``share`` names the projections whose matrices share across the layers of the unit, each projection for itself;
    ``share_within`` lists projections that share inside a layer (q, k and v; gate and up). A projection in both
    shares both ways.
    """
    bundle_of = {name: f"bundle {i}" for i, bundle in enumerate(options["share_within"]) for name in bundle}
    problems: dict[tuple[str, str], list[Matrix]] = {}
    for matrix in matrices:
        layer = "all" if matrix.projection in options["share"] else str(matrix.gram_file)
        problems.setdefault((layer, bundle_of.get(matrix.projection, matrix.projection)), []).append(matrix)
    return list(problems.values())


def method_options(variant: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own options of a variant, defaults filled in."""
    method = METHODS[variant["method"]]
    return {name: variant.get(name, default) for name, default in method.defaults().items()}


def whitening_of(gram: np.ndarray | None, options: Mapping[str, Any], d_in: int) -> Whitening:
    """Whitening that a method's options ask for: of `gram`, ridged by ``eta``, or of the identity."""
    if gram is None or not options["whiten"]:
        return whitening_factor(np.eye(d_in))
    return whitening_factor(gram, eta=options["eta"])


def learn_unit(
    model_folder: Path,
    structure: Mapping[str, Any],
    gram_files: Sequence[Path],
    layers: Sequence[int],
    variant: Mapping[str, Any],
    *,
    output: Path,
    diagnostics: Path,
    warm_factors: Path | None = None,
    drift: Path | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> None:
    """Learn every matrix of a unit and write ``factors`` (float32) and diagnostics.

    Matrices that share a dictionary are one problem: their weights side by side, in the metric of their mean Gram
    (the paper's grouped variant), or each in its own where the method can (`Method.joint`); a shared dictionary is
    stored once, under the name of its first matrix.

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
    output, diagnostics : Path
        ``factors/<unit>.safetensors`` and ``.json``.
    warm_factors : Path, optional
        Factors of the same unit from another variant, to start from (option ``warm_start``).
    drift : Path, optional
        From `pruning.drift.measure`, for a method that learns the whole model at once (`Method.whole_model`).

    Raises
    ------
    NumericalError
        If a weight holds NaN or infinity, or is zero throughout.
    """
    job = _Job(ModelFolder(model_folder), variant, device, log)
    matrices = list(matrices_of(structure, layers, gram_files))
    tensors: dict[str, np.ndarray] = {}
    specs: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    started = time.perf_counter()
    if job.method.whole_model is None:
        warm = None if warm_factors is None else TensorFile(warm_factors)
        learned = _learn_problems(job, matrices, warm, n_layers=len(layers))
    else:
        learned = _learn_together(job, matrices, read_json(drift)["drift"])
    for one in learned:
        name = one.matrix.name
        stored = one.factors.with_storage(value_codec="float32", dictionary_codec="float32")
        packed, specs[name] = stored.pack(name, dictionary=one.factors.tensor or f"{one.owner}.dictionary")
        tensors.update(packed)
        reports[name] = {**_report(one), "seconds": one.seconds, **one.factors.diagnostics}
        log(f"{name}: relative error {reports[name]['relative_error']:.4f} in {one.seconds:.1f} s")
    dictionaries = {name: set(dictionary_names(spec)) for name, spec in specs.items()}
    for name, report in reports.items():
        report["shared_with"] = [
            other for other, theirs in dictionaries.items() if other != name and theirs & dictionaries[name]
        ]
    write_tensors(output, tensors, {"format_version": FORMAT_VERSION, "matrices": specs})
    write_json(
        diagnostics,
        {
            "format_version": FORMAT_VERSION,
            "unit": output.stem,
            "method": variant["method"],
            "ratio": variant["ratio"],
            "options": job.options,
            "device": device,
            "seconds": time.perf_counter() - started,
            "matrices": reports,
        },
    )


@dataclass(frozen=True)
class _Job:
    """What all matrices of a unit have in common."""

    folder: ModelFolder
    variant: Mapping[str, Any]
    device: str
    log: Callable[[str], None]

    @cached_property
    def method(self) -> Method:
        return METHODS[self.variant["method"]]

    @cached_property
    def options(self) -> dict[str, Any]:
        return method_options(self.variant)

    def weight(self, matrix: Matrix) -> np.ndarray:
        """The weight (d_in, d_out), float32."""
        return check_weight(self.folder.read_weight(matrix.name), f"{self.folder.path}: {matrix.name}.weight")

    def whitening(self, matrices: Sequence[Matrix]) -> Whitening:
        """Of the mean Gram of what the matrices read."""
        return whitening_of(mean_gram(matrices), self.options, matrices[0].shape[0])

    def arguments(self, label: str) -> dict[str, Any]:
        """What every method is called with."""
        return {
            "ratio": self.variant["ratio"],
            "storage": storage_of(self.variant["codes"]),
            "device": self.device,
            "log": lambda line: self.log(f"{label}: {line}"),
            **self.method.own(self.options),
        }


class _Learned(NamedTuple):
    """Factors of a matrix, whose name their dictionary goes by, and how long they took."""

    matrix: Matrix
    weight: np.ndarray
    whitening: Whitening
    factors: Factorization
    owner: str
    seconds: float


def _learn_problems(
    job: _Job, matrices: Sequence[Matrix], warm: TensorFile | None, *, n_layers: int
) -> Iterator[_Learned]:
    """One problem after the other, each of the matrices that share a dictionary."""
    started = time.perf_counter()
    problems = shared_problems(matrices, job.options)
    allowed = None if job.options.get("max_seconds") is None else job.options["max_seconds"] * n_layers
    held: dict[frozenset[tuple[Path, str]], Whitening] = {}
    for index, problem in enumerate(problems):
        problem_started = time.perf_counter()
        weights = [job.weight(matrix) for matrix in problem]
        names = [matrix.name for matrix in problem]
        arguments = job.arguments(" + ".join(names))
        if allowed is not None:
            left = allowed - (problem_started - started)
            arguments["max_seconds"] = max(1e-3, left * _cost(problem) / sum(map(_cost, problems[index:])))
        if warm is not None:
            arguments["warm"] = _read_side_by_side(warm, names)
        joint = job.method.joint(job.options) if len(_inputs(problem)) > 1 else None
        metrics = [problem] if joint is None else [[matrix] for matrix in problem]
        # q, k and v follow each other and share a metric; of other metrics none stays in memory
        held = {inputs: whitening for inputs, whitening in held.items() if inputs in map(_inputs, metrics)}
        for sharing in metrics:
            if _inputs(sharing) not in held:
                held[_inputs(sharing)] = job.whitening(sharing)
        if joint is None:
            whitenings = [held[_inputs(problem)]] * len(problem)
            factorization = job.method.factorize(np.concatenate(weights, axis=1), whitenings[0], **arguments)
            parts = split_codes(factorization, [weight.shape[1] for weight in weights])
        else:
            whitenings = [held[_inputs([matrix])] for matrix in problem]
            parts = joint(weights, whitenings, **arguments)
        seconds = (time.perf_counter() - problem_started) / len(problem)
        for matrix, weight, part, whitening in zip(problem, weights, parts, whitenings, strict=True):
            yield _Learned(matrix, weight, whitening, part, names[0], seconds)


def _learn_together(job: _Job, matrices: Sequence[Matrix], drift: Sequence[float]) -> Iterator[_Learned]:
    """All matrices in one problem, which reads what it needs when it needs it."""
    reading = {matrix.inputs: matrix for matrix in matrices}
    whitening_at = lru_cache(_WHITENINGS_HELD)(lambda inputs: job.whitening([reading[inputs]]))
    weights = _OnDemand(matrices, job.weight)
    whitenings = _OnDemand(matrices, lambda matrix: whitening_at(matrix.inputs))
    names = [matrix.name for matrix in matrices]
    before = time.perf_counter()
    for index, factors in job.method.whole_model(names, weights, whitenings, drift, **job.arguments("all layers")):
        now = time.perf_counter()
        yield _Learned(matrices[index], weights[index], whitenings[index], factors, names[index], now - before)
        before = now


class _OnDemand(Sequence):
    """A sequence whose entries are made anew each time they are asked for."""

    def __init__(self, matrices: Sequence[Matrix], make: Callable[[Matrix], Any]) -> None:
        self._matrices = matrices
        self._make = make

    def __len__(self) -> int:
        return len(self._matrices)

    def __getitem__(self, index: int) -> Any:
        return self._make(self._matrices[index])


def _report(learned: _Learned) -> dict[str, Any]:
    """What the diagnostics say of every matrix, whatever the method."""
    matrix, weight, whitening = learned.matrix, learned.weight, learned.whitening
    approximation = learned.factors.reconstruct()
    report = {
        "shape": list(weight.shape),
        "site": matrix.site,
        "relative_error": relative_error(weight, approximation, matrix.gram()),
        "shift": whitening.shift,
        "eta": whitening.eta,
    }
    heldout = matrix.heldout_gram()
    if heldout is not None:
        report["relative_error_heldout"] = relative_error(weight, approximation, heldout)
    return report


def _inputs(matrices: Sequence[Matrix]) -> frozenset[tuple[Path, str]]:
    return frozenset(matrix.inputs for matrix in matrices)


def _cost(problem: Sequence[Matrix]) -> int:
    """What learning a problem costs, in units of its own: products of a dictionary with the weights."""
    d_in, d_out = problem[0].shape[0], sum(matrix.shape[1] for matrix in problem)
    return d_in * d_out * min(d_in, d_out)


def _read_side_by_side(factors: TensorFile, names: Sequence[str]) -> Factorization:
    """Learned factors of the matrices of a problem as one matrix, with the dictionary of the first.

    Raises
    ------
    ArtifactError
        If a matrix is not in the file.
    """
    found = []
    for name in names:
        spec = factors.metadata["matrices"].get(name)
        if spec is None:
            raise ArtifactError(factors.path, f"has no factors of {name}", "Name another variant as warm_start")
        found.append(unpack({tensor: factors.read(tensor) for tensor in tensor_names(name, spec)}, spec, name))
    return replace(found[0], codes=np.concatenate([part.codes for part in found], axis=1))


def mean_gram(problem: Sequence[Matrix]) -> np.ndarray:
    """Mean Gram of the distinct sites of a problem, the paper's metric of a group."""
    distinct = {matrix.inputs: matrix for matrix in problem}
    return sum(matrix.gram() for matrix in distinct.values()) / len(distinct)


def split_codes(factorization: Factorization, widths: Sequence[int]) -> list[Factorization]:
    """Factors of the matrices whose weights stood side by side: one dictionary, each its columns of the codes."""
    edges = np.cumsum([0, *widths])
    return [
        replace(factorization, codes=factorization.codes[:, first:last]) for first, last in itertools.pairwise(edges)
    ]


def check_weight(weight: np.ndarray, where: str) -> np.ndarray:
    """`weight` itself, refused where no method could mean anything.

    Raises
    ------
    NumericalError
        If it holds NaN or infinity, or is zero throughout; names `where` it comes from.
    """
    bad = np.count_nonzero(~np.isfinite(weight))
    if bad:
        raise NumericalError(f"{where} holds {bad} non-finite values; repair it, or fetch the model again")
    if not weight.any():
        raise NumericalError(f"{where} is zero throughout; there is nothing to factorize")
    return weight
