"""Learn the factors of one unit (a layer, or a group of layers) and write them with their diagnostics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.codecs import storage_of
from cospadi.errors import ConfigError, NumericalError
from cospadi.factorization import Factorization
from cospadi.files import ModelFolder, write_json, write_tensors
from cospadi.gram import Whitening, read_gram, relative_error, sites, whitening_factor
from cospadi.methods import METHODS

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Matrix:
    """One target matrix: where its inputs are measured and what it is called."""

    gram_file: Path
    site: str
    name: str

    @property
    def projection(self) -> str:
        """Last part of the name, ``q_proj``."""
        return self.name.rsplit(".", 1)[-1]

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
                yield Matrix(gram_file, site["name"], matrix["name"])


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
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> None:
    """Learn every matrix of a unit and write ``factors`` (float32) and diagnostics.

    Matrices that share a dictionary are one problem: their weights side by side, in the metric of their mean Gram
    (the paper's grouped variant); a shared dictionary is stored once, under the name of its first matrix.

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

    Raises
    ------
    NumericalError
        If a weight holds NaN or infinity, or is zero throughout.
    ConfigError
        If matrices that shall share a dictionary have inputs of different width.
    """
    method = METHODS[variant["method"]]
    options = method_options(variant)
    folder = ModelFolder(model_folder)
    tensors: dict[str, np.ndarray] = {}
    specs: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    started = time.perf_counter()
    whitening: Whitening | None = None
    measured: set[tuple[Path, str]] = set()
    for problem in shared_problems(list(matrices_of(structure, layers, gram_files)), options):
        problem_started = time.perf_counter()
        weights = [check_weight(folder.read_weight(m.name), f"{folder.path}: {m.name}.weight") for m in problem]
        inputs = {(matrix.gram_file, matrix.site) for matrix in problem}
        if whitening is None or inputs != measured:  # q, k and v follow each other and share theirs
            whitening = whitening_of(mean_gram(problem), options, weights[0].shape[0])
            measured = inputs
        names = [m.name for m in problem]
        label = " + ".join(names)
        factorization = method.factorize(
            np.concatenate(weights, axis=1),
            whitening,
            ratio=variant["ratio"],
            storage=storage_of(variant["codes"]),
            device=device,
            log=lambda line, label=label: log(f"{label}: {line}"),
            **method.own(options),
        )
        seconds = time.perf_counter() - problem_started
        parts = split_codes(factorization, [weight.shape[1] for weight in weights])
        for matrix, weight, part in zip(problem, weights, parts, strict=True):
            stored = replace(part, value_codec="float32", dictionary_codec="float32")
            packed, specs[matrix.name] = stored.pack(matrix.name, dictionary=f"{names[0]}.dictionary")
            tensors.update(packed)
            approximation = part.reconstruct()
            report = {
                "shape": list(weight.shape),
                "site": matrix.site,
                "shared_with": [name for name in names if name != matrix.name],
                "relative_error": relative_error(weight, approximation, matrix.gram()),
                "shift": whitening.shift,
                "eta": whitening.eta,
                "seconds": seconds / len(problem),
                **part.diagnostics,
            }
            heldout = matrix.heldout_gram()
            if heldout is not None:
                report["relative_error_heldout"] = relative_error(weight, approximation, heldout)
            reports[matrix.name] = report
            log(f"{matrix.name}: relative error {report['relative_error']:.4f} in {report['seconds']:.1f} s")
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


def mean_gram(problem: Sequence[Matrix]) -> np.ndarray:
    """Mean Gram of the distinct sites of a problem, the paper's metric of a group."""
    distinct = {(matrix.gram_file, matrix.site): matrix for matrix in problem}
    total: np.ndarray | None = None
    for matrix in distinct.values():
        gram = matrix.gram()
        if total is not None and gram.shape != total.shape:
            raise ConfigError(
                [f"{problem[0].name} and {matrix.name} cannot share a dictionary: {len(total)} and {len(gram)} inputs"],
                "share",
            )
        total = gram if total is None else total + gram
    return total / len(distinct)


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
