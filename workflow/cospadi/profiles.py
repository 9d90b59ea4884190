"""Profiles: what bytes are worth to every problem of a model, and from all of them the bytes that each one gets.

For the methods with an `Allocator` (`methods.base`): a job a unit measures, one job decides, and learning then goes on
unit by unit with bytes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cospadi.allocation import Profile, read_table, write_table
from cospadi.budget import as_is_nbytes, nbytes_left
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, read_json, write_json
from cospadi.finished import Finished, stamps
from cospadi.formats.values import storage_of
from cospadi.gram import check_grams
from cospadi.learning import gradients_of, provenance, share_of_time
from cospadi.methods import METHODS, menus
from cospadi.methods.base import FILE, MEASURED, MENU
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
    measure: menus.Measure | None = None,
    code: str = "",
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
    measure : callable, optional
        What matrices cost the model that alone are exchanged (`calibration.alone`), where the allocation asks for it.
    code : str
        Digest of what measures: what an interrupted job of the same unit and code had measured is not measured again.

    Raises
    ------
    ArtifactError
        If a Gram or gradients are of another model, layer or calibration.
    """
    calibration = check_grams(gram_files, structure, layers, calibration)
    method, storage = METHODS[variant["method"]], storage_of(variant["codes"])
    options, allocator = _options(variant), menus.allocator_of(method, variant, measure)
    gradients = gradients_of(variant, gradient_files, structure, layers, calibration)
    folder = ModelFolder(model_folder)
    groups = shared(matrices_of(folder, structure, layers, gram_files, gradients=gradients), variant)
    belongs = provenance(structure, layers, variant, calibration)
    given = [code, device, stamps([*gram_files, *gradient_files])]
    with Finished(output, [belongs, given]) as finished:
        for group in in_turn([group for group in groups if group[0].name not in finished]):
            weights = [matrix.weight() for matrix in group]
            kept = [i for i, matrix in enumerate(group) if matrix.squared_norm(weights[i]) > 0]
            problems = []
            if kept:
                problem = Problem([group[i] for i in kept], weights=[group[i].weighted(weights[i]) for i in kept])
                nbytes = nbytes_left(problem.shapes, variant["ratio"])
                own = dict(options)
                if own.get("max_seconds") is not None:
                    own["max_seconds"] = share_of_time(own["max_seconds"] * len(layers), group, groups)
                figures = allocator.profile(problem, nbytes, storage=storage, device=device, **own)
                problems.append({"matrices": problem.names, "shapes": problem.shapes, "figures": figures})
                log(f"{' + '.join(problem.names)}: measured")
            finished.add(group[0].name, {"problems": problems})
        write_json(output, {**belongs, "problems": [one for _, result in finished for one in result.about["problems"]]})


def allocate(
    profile_files: Sequence[Path],
    structure: Mapping[str, Any],
    units: Mapping[str, Sequence[int]],
    variant: Mapping[str, Any],
    output: Path,
    *,
    table: Path,
    calibration: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Part the bytes that the ratio leaves of a variant's matrices: by the method's own rule, by a menu, by a file.

    Parameters
    ----------
    profile_files : sequence of Path
        From `profile_unit`, one a unit; none where a file says it all.
    units : mapping
        Name of each unit to its layers.
    output : Path
        JSON, ``problems``: matrices, ``nbytes`` (null: they stay as they are) and the ratio that this is.
    table : Path
        The same for a person (`allocation.write_table`).
    calibration : mapping, optional
        As of `profile_unit`.

    Raises
    ------
    ArtifactError
        If a profile is of another model, unit, variant or calibration.
    ConfigError
        If the ratio leaves fewer bytes than the least that the matrices take.
    """
    if variant["allocation"] == FILE:
        shares = _of_file(variant["allocation_file"], structure, units)
    else:
        shares, calibration = _of_profiles(profile_files, structure, units, variant, calibration, log)
    storage, every_shape = storage_of(variant["codes"]), [shape for one in shares for shape in one.shapes]
    nbytes = nbytes_left(every_shape, variant["ratio"])
    problems, lines, taken = [], [], 0
    for one in shares:
        own = as_is_nbytes(one.shapes, storage) if one.nbytes is None else one.nbytes
        taken += own
        ratio = 1 - own / nbytes_left(one.shapes, 0)
        problems.append({"matrices": list(one.matrices), "nbytes": one.nbytes, "ratio": ratio})
        about = {"unit": one.unit, "matrices": one.matrices, "method": variant["method"], "bytes": one.nbytes}
        lines.append({**about, "bits": 16 * (1 - ratio), "ratio": ratio, "predicted_rise": one.rise})
        log(f"{' + '.join(one.matrices)}: {'as it is' if one.nbytes is None else f'ratio {ratio:.3f}'}")
    if taken > nbytes:
        raise AssertionError(f"{variant['method']}: {taken} bytes were given away, there are {nbytes}")
    log(f"{taken} bytes of {nbytes}")
    belongs = provenance(structure, range(len(structure["layers"])), variant, calibration)
    write_json(output, {**belongs, "nbytes": nbytes, "problems": problems})
    write_table(table, lines)


class _Share(NamedTuple):
    """What a problem of a unit gets: bytes, None to stay as it is, and the rise that is predicted of it, if known."""

    unit: str
    matrices: tuple[str, ...]
    shapes: Sequence[tuple[int, int]]
    nbytes: int | None
    rise: float | None = None


def _of_file(path: str | Path, structure: Mapping[str, Any], units: Mapping[str, Sequence[int]]) -> list[_Share]:
    """What a person's table says; it was checked when the run was planned."""
    unit_of = {layer: unit for unit, layers in units.items() for layer in layers}
    places = {
        matrix["name"]: (unit_of[number], tuple(matrix["shape"]))
        for number, layer in enumerate(structure["layers"])
        for site in layer["sites"]
        for matrix in site["matrices"]
    }
    return [
        _Share(places[row.matrices[0]][0], row.matrices, [places[name][1] for name in row.matrices], row.nbytes)
        for row in read_table(path)
    ]


def _of_profiles(
    files: Sequence[Path],
    structure: Mapping[str, Any],
    units: Mapping[str, Sequence[int]],
    variant: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
    log: Callable[[str], None],
) -> tuple[list[_Share], Mapping[str, Any] | None]:
    """What an allocator makes of the profiles of all units, and the calibration that all of them are of."""
    profiles, places = [], []
    for path, (unit, layers) in zip(files, units.items(), strict=True):
        found = read_json(path, _REMEDY)
        check_provenance(path, found, provenance(structure, layers, variant, calibration), _REMEDY)
        calibration = {key: found.get(key) for key in CALIBRATION}  # all of the first one's
        for one in found["problems"]:
            profiles.append(Profile(tuple(one["matrices"]), tuple(map(tuple, one["shapes"])), one["figures"]))
            places.append(unit)
    ratio, storage = variant["ratio"], storage_of(variant["codes"])
    nbytes = nbytes_left([shape for profile in profiles for shape in profile.shapes], ratio)
    allocator = menus.allocator_of(METHODS[variant["method"]], variant)
    shares = allocator.share(profiles, nbytes, storage=storage, **_options(variant))
    rises: Sequence[float | None] = [None] * len(profiles)
    if variant["allocation"] in (MENU, MEASURED):
        rises = menus.rises(profiles, shares)
        alike = menus.rises(profiles, [nbytes_left(profile.shapes, ratio) for profile in profiles])
        compared = "" if None in alike else f"; with the same ratio for all {sum(alike):.4g}"
        log(f"predicted rise {sum(rises):.4g} nats a token{compared}")
    shared_out = zip(places, profiles, shares, rises, strict=True)
    return [_Share(unit, one.matrices, one.shapes, share, rise) for unit, one, share, rise in shared_out], calibration


def read_allocation(
    path: str | Path,
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
    extra = menus.allocator_of(method, variant).options
    return {**method.own(options), **{name: options[name] for name in extra}}
