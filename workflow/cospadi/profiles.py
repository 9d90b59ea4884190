"""Profiles: what bytes are worth to every problem of a model, and from all of them the bytes that each one gets.

For the methods with an `Allocator` (`methods.base`): a job a unit measures, one job decides, and learning then goes on
unit by unit with bytes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi.allocation import Profile
from cospadi.budget import as_is_nbytes, nbytes_left
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, read_json, write_json
from cospadi.formats.values import storage_of
from cospadi.gram import check_grams
from cospadi.learning import gradients_of, provenance
from cospadi.methods import METHODS
from cospadi.problem import Problem, in_turn, matrices_of, shared
from cospadi.provenance import CALIBRATION, check_provenance

_REMEDY = "Delete it and run again to measure and to part the bytes anew"


def profile_unit(
    model_folder: Path,
    structure: Mapping[str, Any],
    gram_files: Sequence[Path],
    layers: Sequence[int],
    variant: Mapping[str, Any],
    output: Path,
    *,
    calibration: Mapping[str, Any] | None = None,
    gradient_files: Sequence[Path] = (),
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> None:
    """Write what the allocation of a variant has to know of every problem of a unit.

    Matrices without outputs on the calibration data are left out, as they are when the unit is learned.

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
    output : Path
        JSON, ``problems``: names and shapes of their matrices, and figures.
    calibration : mapping, optional
        What the Grams have to be of (`activations.calibration_of`); without it, all of the same.
    gradient_files : sequence of Path
        As of `learning.learn_unit`.

    Raises
    ------
    ArtifactError
        If a Gram or gradients are of another model, layer or calibration.
    """
    calibration = check_grams(gram_files, structure, layers, calibration)
    method, storage = METHODS[variant["method"]], storage_of(variant["codes"])
    options = _options(variant)
    problems = []
    gradients = gradients_of(variant, gradient_files, structure, layers, calibration)
    folder = ModelFolder(model_folder)
    groups = shared(matrices_of(folder, structure, layers, gram_files, gradients=gradients), variant)
    for group in in_turn(groups):
        weights = [matrix.weight() for matrix in group]
        kept = [i for i, matrix in enumerate(group) if matrix.squared_norm(weights[i]) > 0]
        if kept:
            problem = Problem([group[i] for i in kept], weights=[group[i].weighted(weights[i]) for i in kept])
            nbytes = nbytes_left(problem.shapes, variant["ratio"])
            figures = method.allocator.profile(problem, nbytes, storage=storage, device=device, **options)
            problems.append({"matrices": problem.names, "shapes": problem.shapes, "figures": figures})
            log(f"{' + '.join(problem.names)}: measured")
    write_json(output, {**provenance(structure, layers, variant, calibration), "problems": problems})


def allocate(
    profile_files: Sequence[Path],
    structure: Mapping[str, Any],
    units: Sequence[Sequence[int]],
    variant: Mapping[str, Any],
    output: Path,
    *,
    calibration: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Part the bytes that the ratio leaves of a variant's matrices, by the method's own rule.

    Parameters
    ----------
    profile_files : sequence of Path
        From `profile_unit`, one a unit.
    units : sequence of sequence of int
        Layers of each.
    output : Path
        JSON, ``problems``: matrices, ``nbytes`` (null: they stay as they are) and the ratio that this is.
    calibration : mapping, optional
        As of `profile_unit`.

    Raises
    ------
    ArtifactError
        If a profile is of another model, unit, variant or calibration.
    ConfigError
        If the ratio leaves fewer bytes than the least that the matrices take.
    """
    profiles = []
    for path, layers in zip(profile_files, units, strict=True):
        found = read_json(path, _REMEDY)
        check_provenance(path, found, provenance(structure, layers, variant, calibration), _REMEDY)
        calibration = {key: found.get(key) for key in CALIBRATION}  # all of the first one's
        profiles += [
            Profile(tuple(one["matrices"]), tuple(map(tuple, one["shapes"])), one["figures"])
            for one in found["problems"]
        ]
    storage = storage_of(variant["codes"])
    every_shape = [shape for profile in profiles for shape in profile.shapes]
    nbytes = nbytes_left(every_shape, variant["ratio"])
    shares = METHODS[variant["method"]].allocator.share(profiles, nbytes, storage=storage, **_options(variant))
    problems, taken = [], 0
    for profile, share in zip(profiles, shares, strict=True):
        own = as_is_nbytes(profile.shapes, storage) if share is None else share
        taken += own
        ratio = 1 - own / nbytes_left(profile.shapes, 0)
        problems.append({"matrices": profile.matrices, "nbytes": share, "ratio": ratio})
        log(f"{' + '.join(profile.matrices)}: {'as it is' if share is None else f'ratio {ratio:.3f}'}")
    if taken > nbytes:
        raise AssertionError(f"{variant['method']}: {taken} bytes were given away, there are {nbytes}")
    belongs = provenance(structure, range(len(structure["layers"])), variant, calibration)
    write_json(output, {**belongs, "nbytes": nbytes, "problems": problems})


def read_allocation(
    path: Path,
    structure: Mapping[str, Any],
    variant: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
) -> dict[tuple[str, ...], int | None]:
    """Bytes of every problem, by the names of its matrices; None for those that stay as they are.

    Raises
    ------
    ArtifactError
        If the file is damaged, or of another model, variant or calibration.
    """
    found = read_json(path, _REMEDY)
    belongs = provenance(structure, range(len(structure["layers"])), variant, calibration)
    check_provenance(path, found, belongs, _REMEDY)
    allotted = {}
    for one in found.get("problems", ()):
        nbytes = one.get("nbytes")
        if not (nbytes is None or (isinstance(nbytes, int) and nbytes > 0)):
            raise ArtifactError(path, f"gives {nbytes} bytes to {', '.join(one.get('matrices', ()))}", _REMEDY)
        allotted[tuple(one["matrices"])] = nbytes
    return allotted


def _options(variant: Mapping[str, Any]) -> dict[str, Any]:
    """What `Allocator.profile` and `Allocator.share` are called with: the options of `Method.fit`, and their own."""
    method = METHODS[variant["method"]]
    options = method.complete(variant)
    return {**method.own(options), **{name: options[name] for name in method.allocator.options}}
