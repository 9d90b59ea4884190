"""Learn the factors of one unit (a layer, or a group of layers) and write them with their diagnostics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.codecs import storage_of
from cospadi.errors import ArtifactError, NumericalError
from cospadi.factorization import Factorization, dictionary_names, tensor_names, unpack
from cospadi.files import ModelFolder, TensorFile, read_json, write_json, write_tensors
from cospadi.gram import Whitening, read_gram, relative_error, sites, whitening_factor
from cospadi.methods import METHODS

FORMAT_VERSION = 1


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
    method = METHODS[variant["method"]]
    options = method_options(variant)
    folder = ModelFolder(model_folder)
    warm = None if warm_factors is None else TensorFile(warm_factors)
    tensors: dict[str, np.ndarray] = {}
    specs: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    started = time.perf_counter()
    matrices = list(matrices_of(structure, layers, gram_files))
    at_once = method.whole_model is not None
    problems = [matrices] if at_once else shared_problems(matrices, options)
    allowed = None if options.get("max_seconds") is None else options["max_seconds"] * len(layers)
    held: dict[frozenset[tuple[Path, str]], Whitening] = {}
    for index, problem in enumerate(problems):
        problem_started = time.perf_counter()
        weights = [check_weight(folder.read_weight(m.name), f"{folder.path}: {m.name}.weight") for m in problem]
        names = [m.name for m in problem]
        label = "all layers" if at_once else " + ".join(names)
        own = method.own(options)
        if allowed is not None:
            left = allowed - (problem_started - started)
            own["max_seconds"] = max(1e-3, left * _cost(problem) / sum(map(_cost, problems[index:])))
        if warm is not None:
            own["warm"] = _read_side_by_side(warm, names)
        arguments = {
            "ratio": variant["ratio"],
            "storage": storage_of(variant["codes"]),
            "device": device,
            "log": lambda line, label=label: log(f"{label}: {line}"),
            **own,
        }
        joint = method.joint(options) if len(_inputs(problem)) > 1 else None
        if at_once:
            joint = partial(_all_at_once, method, names, drift)
        metrics = [problem] if joint is None else [[matrix] for matrix in problem]
        # q, k and v follow each other and share a metric; of other metrics none stays in memory
        held = {inputs: whitening for inputs, whitening in held.items() if inputs in map(_inputs, metrics)}
        for sharing in metrics:
            if _inputs(sharing) not in held:
                held[_inputs(sharing)] = whitening_of(mean_gram(sharing), options, sharing[0].shape[0])
        if joint is None:
            whitenings = [held[_inputs(problem)]] * len(problem)
            factorization = method.factorize(np.concatenate(weights, axis=1), whitenings[0], **arguments)
            parts = split_codes(factorization, [weight.shape[1] for weight in weights])
        else:
            whitenings = [held[_inputs([matrix])] for matrix in problem]
            parts = joint(weights, whitenings, **arguments)
        seconds = time.perf_counter() - problem_started
        for matrix, weight, part, whitening in zip(problem, weights, parts, whitenings, strict=True):
            stored = part.with_storage(value_codec="float32", dictionary_codec="float32")
            owner = matrix.name if at_once else names[0]
            packed, specs[matrix.name] = stored.pack(matrix.name, dictionary=part.tensor or f"{owner}.dictionary")
            tensors.update(packed)
            report = {
                **_report(matrix, weight, part, whitening),
                "seconds": seconds / len(problem),
                **part.diagnostics,
            }
            reports[matrix.name] = report
            log(f"{matrix.name}: relative error {report['relative_error']:.4f} in {report['seconds']:.1f} s")
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
            "options": options,
            "device": device,
            "seconds": time.perf_counter() - started,
            "matrices": reports,
        },
    )


def _report(matrix: Matrix, weight: np.ndarray, factors: Factorization, whitening: Whitening) -> dict[str, Any]:
    """What the diagnostics say of every matrix, whatever the method."""
    approximation = factors.reconstruct()
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


def _all_at_once(
    method: Any, names: Sequence[str], drift: Path, weights: Sequence[Any], whitenings: Sequence[Whitening], **more: Any
) -> list[Factorization]:
    return method.whole_model(names, weights, whitenings, read_json(drift)["drift"], **more)


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
