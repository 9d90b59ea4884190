"""Turn learned float32 factors into the tensors of the checkpoint, and measure what rounding cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.budget import dense_nbytes
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, TensorFile, write_json, write_tensors
from cospadi.finished import Finished, stamps
from cospadi.formats.factorization import Factorization, dictionary_names, read_factors, read_specs, unpack
from cospadi.formats.values import storage_of
from cospadi.gram import check_grams
from cospadi.learning import FORMAT_VERSION, distilled, gradients_of, provenance
from cospadi.problem import Matrix, in_turn, matrices_of
from cospadi.provenance import CALIBRATION, check_provenance
from cospadi.runtime.cospadi_format import parts_of
from cospadi.runtime.cospadi_registry import FACTOR_CODECS, SUPPORTS

_REMEDY = "Delete it and run again to learn this unit anew"


def quantize_unit(
    model_folder: Path,
    structure: Mapping[str, Any],
    gram_files: Sequence[Path],
    factors: Path,
    layers: Sequence[int],
    variant: Mapping[str, Any],
    *,
    calibration: Mapping[str, Any] | None = None,
    gradient_files: Sequence[Path] = (),
    output: Path,
    diagnostics: Path,
    code: str = "",
    log: Callable[[str], None] = print,
) -> None:
    """Store the codes of a unit with ``codes.value_bits`` and the dictionary with ``codes.dictionary_bits``.

    Writes the packed tensors exactly as they go into the checkpoint, and per matrix its bytes and the relative
    error of what the file holds. Factors, Grams and gradients (`gradient_files`, as of `learning.learn_unit`) have to
    be of one calibration, of `calibration` where it is given. What an interrupted job, of the same `code` (its digest),
    had packed is not packed again.
    """
    codes = variant["codes"]
    folder = ModelFolder(model_folder)
    learned = TensorFile(factors)
    own = provenance(structure, layers, variant, calibration) | distilled(variant)
    check_provenance(factors, learned.metadata, own, _REMEDY)
    belongs = provenance(structure, layers, variant, {key: learned.metadata.get(key) for key in CALIBRATION})
    calibration = check_grams(gram_files, structure, layers, {key: belongs[key] for key in CALIBRATION})
    gradients = gradients_of(variant, gradient_files, structure, layers, calibration)
    learned_specs = read_specs(learned, FACTOR_CODECS, _REMEDY)
    sharers = Counter(part for spec in learned_specs.values() for part in dictionary_names(spec))
    kept_dense = learned.metadata.get("kept_dense", {})

    def learned_factors(name: str) -> Factorization:
        if name not in learned_specs:
            raise ArtifactError(factors, f"has no factors of {name}", _REMEDY)
        return read_factors(learned, name, learned_specs[name], _REMEDY)

    matrices = list(matrices_of(folder, structure, layers, gram_files, gradients=gradients))
    dense_nbytes_all = sum(dense_nbytes(*matrix.shape) for matrix in matrices)
    chosen = [
        matrix
        for matrix in matrices
        if matrix.name not in kept_dense and (not variant.get("targets") or matrix.projection in variant["targets"])
    ]
    groups = _rounded_together(chosen, learned_specs, codes)
    given = [code, stamps([factors, *gram_files, *gradient_files]), dict(codes), variant.get("targets")]
    with Finished(output, [belongs, given]) as finished:
        for group in in_turn(finished.left(groups)):
            rounded = round_factors(group, [learned_factors(matrix.name) for matrix in group], codes)
            for matrix, factorization in zip(group, rounded, strict=True):
                packed, spec, report = _pack(matrix, factorization, sharers)
                finished.add(matrix.name, {"spec": spec, "report": report}, packed)
                log(f"{matrix.name}: {report['nbytes']:.0f} bytes, relative error {report['relative_error']:.4f}")
        specs = {name: result.about["spec"] for name, result in finished}
        strange = learned_specs.keys() - specs.keys()
        if strange:
            raise ArtifactError(
                factors, f"holds factors of {', '.join(sorted(strange))}, which are not of this unit", _REMEDY
            )
        header = {**belongs, "codes": dict(codes), "matrices": specs, "kept_dense": kept_dense}
        write_tensors(output, {key: value for _, one in finished for key, value in one.tensors.items()}, header)
        write_json(
            diagnostics,
            {
                "format_version": FORMAT_VERSION,
                "unit": output.stem,
                # of these layers, with the matrices that the variant leaves as they are
                "dense_nbytes_all": dense_nbytes_all,
                "kept_dense": kept_dense,
                "matrices": {name: result.about["report"] for name, result in finished},
            },
        )


def _pack(
    matrix: Matrix, factors: Factorization, sharers: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Tensors of a matrix as they go into the file, what says how to read them, and its bytes and errors.

    `sharers`: how many matrices have a dictionary, which is in the file once: each counts its part of it.
    """
    weight = matrix.weight()
    packed, spec = factors.pack(matrix.name)
    size = matrix.squared_norm(weight)
    error = matrix.squared_norm(weight - unpack(packed, spec, matrix.name).reconstruct().astype(np.float64))
    report = {
        "nbytes": sum(tensor.nbytes / max(1, sharers[part.removesuffix("_scales")]) for part, tensor in packed.items()),
        "dense_nbytes": dense_nbytes(*weight.shape),
        "squared_norm": size,
        "squared_error": error,
        "relative_error": math.sqrt(max(error, 0.0) / size),
        **matrix.predicted_rise(error),
    }
    return packed, spec, report


def round_factors(
    matrices: Sequence[Matrix], factors: Sequence[Factorization], codes: Mapping[str, Any]
) -> list[Factorization]:
    """Learned float32 factors with the codecs, scales and rounding that the config's section ``codes`` asks for.

    Settled ones are as they will be. With ``rounding: optimal`` all parts are rounded together, in the metric, of all
    matrices that share a dictionary (`rounding.round_together`).
    """
    if all(one.settled for one in factors):
        return list(factors)
    optimal = codes["rounding"] == "optimal"
    rounding = "nearest" if optimal else codes["rounding"]
    chosen = [one.with_storage(**storage_of(codes), rounding=rounding) for one in factors]
    if not optimal or chosen[0].on.mixes:
        return chosen
    from cospadi.rounding import round_together  # numba, which the other roundings do without

    weights = [matrix.weight() for matrix in matrices]
    prices = [matrix.weighted(np.ones(matrix.shape[1], np.float32)) for matrix in matrices]
    return round_together(weights, [matrix.metric.gram for matrix in matrices], chosen, prices)


def as_stored(factors: Factorization, codes: Mapping[str, Any]) -> np.ndarray:
    """The matrix (d_in, d_out) that the checkpoint will have of learned factors, rounded without its metric."""
    (held,) = round_factors([], [factors], codes)
    return held.quantized().reconstruct()


def _rounded_together(
    matrices: Iterable[Matrix], specs: Mapping[str, Any], codes: Mapping[str, Any]
) -> list[list[Matrix]]:
    """Matrices whose dictionaries are rounded in the metric of all who share them, together; others alone."""
    groups: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        own = [
            part["dictionary"]["tensor"]
            for part in parts_of(matrix.name, specs.get(matrix.name, {"plus": ()})).values()
            if "tensor" in part.get("dictionary", {}) and not SUPPORTS[part["codes"]["support"]].mixes
        ]
        shares = own and codes["rounding"] == "optimal"
        groups.setdefault(own[0] if shares else matrix.name, []).append(matrix)
    return list(groups.values())
