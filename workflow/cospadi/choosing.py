"""Choosing: a model made of parts of finished variants, each matrix from the one where its bytes are worth most.

Nothing is learned again: the packed tensors are taken as they are. Matrices that share a dictionary in any of the
variants are taken together. What an error costs is what the variants say of what they stored, in nats a token.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cospadi.allocation import AS_IS, Point, Points, choose, filled, write_table
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, TensorFile, read_json, write_json, write_tensors
from cospadi.formats.factorization import Factorization, read_specs, tensor_names
from cospadi.learning import FORMAT_VERSION
from cospadi.progress import read_report
from cospadi.provenance import CALIBRATION, check_provenance, digest_of
from cospadi.runtime.cospadi_registry import CODECS

# Choices that are measured for a `Target`
EVALUATIONS = 6
_REMEDY = "Delete it and run again to choose anew"


class Unit(NamedTuple):
    """Files of a unit of a variant."""

    learned: Path
    stored: Path
    codes: Path

    @classmethod
    def of(cls, variant: Path, name: str) -> Unit:
        """In the folder of a variant."""
        codes = variant / "codes"
        return cls(variant / "factors" / f"{name}.json", codes / f"{name}.json", codes / f"{name}.safetensors")


class Target(NamedTuple):
    """How far perplexity may go up, and who measures it.

    Attributes
    ----------
    increase : float
        Perplexity over the dense model's, at most.
    measure : callable
        ``measure(chosen) -> increase`` of matrix to variant, None for those that stay as they are.
    """

    increase: float
    measure: Callable[[Mapping[str, str | None]], float]


class Search(NamedTuple):
    """Swaps of bytes between matrices, and who measures what they do.

    Attributes
    ----------
    trials : int
    measure : callable
        ``measure(chosen) -> divergence`` from the dense model, of a choice as of `Target`.
    seed : int
        Of the swaps.
    """

    trials: int
    measure: Callable[[Mapping[str, str | None]], float]
    seed: int


def choose_variants(
    variants: Mapping[str, Path],
    units: Sequence[str],
    size: float | Target,
    output: Path,
    *,
    table: Path,
    search: Search | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Choose a variant for every matrix, for the least predicted rise in so many bytes.

    Never predicted to be worse than the best of the variants that fit into these bytes. Swaps may follow.

    Parameters
    ----------
    variants : mapping
        Name to folder.
    units : sequence of str
        Of all of them.
    size : float or Target
        The ratio; or what the fewest bytes are searched for that keep to it, in `EVALUATIONS` measurements.
    output : Path
        JSON, ``matrices``: name to variant, null where it stays as it is.
    table : Path
        The same for a person (`allocation.write_table`).
    search : Search, optional
        Where the size is a ratio.

    Raises
    ------
    ConfigError
        If the smallest parts take more than the ratio leaves.
    ArtifactError
        If a variant says nothing of the gradients, or not what it stored of every matrix.
    """
    menus: dict[tuple[str, ...], dict[str, Point]] = {}
    unit_of: dict[tuple[str, ...], str] = {}
    dense: dict[str, int] = {}
    for unit in units:
        files = {name: Unit.of(folder, unit) for name, folder in variants.items()}
        stored = {name: _reports(file.stored) for name, file in files.items()}
        sizes = {matrix: one["dense_nbytes"] for found in stored.values() for matrix, one in found.items()}
        for group in _together(sizes, [read_report(file.learned)["matrices"] for file in files.values()]):
            whole = sum(sizes[matrix] for matrix in group)
            points = {name: _point(name, group, found, sizes) for name, found in stored.items()}
            points = {name: point for name, point in points.items() if point.nbytes < whole}
            menus[group], unit_of[group] = {**points, AS_IS: Point(whole, 0.0, AS_IS)}, unit
        dense |= sizes
    for name in variants:
        own = {group: menu.get(name, menu[AS_IS]) for group, menu in menus.items()}
        log(f"{name}: {_nbytes(own)} bytes, predicted rise {_rise(own):.4g} nats a token")
    if isinstance(size, Target):
        chosen = _smallest(menus, list(variants), size, log)
    else:
        nbytes = math.floor((1 - size) * sum(dense.values()))
        chosen = _best(menus, nbytes, list(variants))
        if search is not None:
            chosen = _searched(menus, chosen, nbytes, search, log)
    log(f"chosen: {_nbytes(chosen)} bytes, predicted rise {_rise(chosen):.4g} nats a token")
    lines = []
    for group, point in chosen.items():
        left = point.nbytes / sum(dense[matrix] for matrix in group)
        nbytes = None if point.method == AS_IS else point.nbytes
        about = {"unit": unit_of[group], "matrices": group, "method": point.method, "bytes": nbytes}
        lines.append({**about, "bits": 16 * left, "ratio": 1 - left, "predicted_rise": point.error})
    write_json(output, {"format_version": FORMAT_VERSION, "matrices": _names(chosen)})
    write_table(table, lines)


def _names(chosen: Mapping[tuple[str, ...], Point]) -> dict[str, str | None]:
    """Matrix to the variant that it is taken from."""
    return {
        matrix: None if point.method == AS_IS else point.method for group, point in chosen.items() for matrix in group
    }


def _reports(path: Path) -> dict[str, Any]:
    found = read_report(path)["matrices"]
    silent = next((name for name, one in found.items() if "predicted_rise" not in one), None)
    if silent is not None:
        raise ArtifactError(path, f"says nothing of the predicted rise of {silent}", "Set its metric to gradients")
    return found


def _together(sizes: Mapping[str, int], learned: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Matrices in the order of the model, with those that they share a dictionary with in any variant."""
    group_of = {matrix: {matrix} for matrix in sizes}
    for reports in learned:
        for matrix, report in reports.items():
            for other in report["shared_with"]:
                merged = group_of[matrix] | group_of[other]
                group_of |= dict.fromkeys(merged, merged)
    return list(dict.fromkeys(tuple(name for name in sizes if name in group_of[matrix]) for matrix in sizes))


def _point(name: str, group: Sequence[str], found: Mapping[str, Any], sizes: Mapping[str, int]) -> Point:
    """What a variant stored of some matrices; one that it says nothing of stayed as it is."""
    nbytes = sum(found[matrix]["nbytes"] if matrix in found else sizes[matrix] for matrix in group)
    rise = sum(found[matrix]["predicted_rise"] for matrix in group if matrix in found)
    return Point(math.ceil(nbytes - 1e-6), rise, name)


def _best(
    menus: Mapping[tuple[str, ...], Mapping[str, Point]], nbytes: int, variants: Sequence[str]
) -> dict[tuple[str, ...], Point]:
    points = {group: Points(list(menu.values())) for group, menu in menus.items()}
    highest = max(point.error for menu in menus.values() for point in menu.values())
    found = [choose(points, nbytes, highest=highest or 1.0)]
    for name in variants:
        own = {group: menu.get(name, menu[AS_IS]) for group, menu in menus.items()}
        if _nbytes(own) <= nbytes:
            found.append(filled(points, own, nbytes))
    return min(found, key=_rise)


def _smallest(
    menus: Mapping[tuple[str, ...], Mapping[str, Point]],
    variants: Sequence[str],
    target: Target,
    log: Callable[[str], None],
) -> dict[tuple[str, ...], Point]:
    """The smallest of at most `EVALUATIONS` choices that keeps to the target; the first is what is predicted to, the
    others are where the prediction, times what was measured over what it had said, meets the target.
    """
    wanted = math.log(target.increase)
    least, most = (sum(find(one.nbytes for one in menu.values()) for menu in menus.values()) for find in (min, max))
    best_in = functools.cache(lambda nbytes: _best(menus, nbytes, variants))
    low, high, best, factor = least - 1, most, best_in(most), 1.0
    for _ in range(EVALUATIONS):
        probe = _fewest(lambda nbytes, rise=wanted / factor: _rise(best_in(nbytes)) <= rise, least, most)
        # behind what is known already: where a prediction says little
        probe = probe if low < probe < high else (low + high) // 2
        chosen = best_in(probe)
        found = target.measure(_names(chosen))
        log(f"{_nbytes(chosen)} bytes: perplexity times {found:.6g} on windows that were kept out")
        if found <= target.increase:
            best, high = chosen, _nbytes(chosen)
        else:
            low = probe
        if found > 1 and _rise(chosen) > 0:
            factor = math.log(found) / _rise(chosen)
        if high - low <= 1:
            break
    return best


def _fewest(enough: Callable[[int], bool], least: int, most: int) -> int:
    """The fewest bytes that are enough, to a ten-thousandth of the range; the most are."""
    low, high = least - 1, most
    while high - low > max((most - least) / 10_000, 1):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _searched(
    menus: Mapping[tuple[str, ...], Mapping[str, Point]],
    chosen: dict[tuple[str, ...], Point],
    nbytes: int,
    search: Search,
    log: Callable[[str], None],
) -> dict[tuple[str, ...], Point]:
    """What swaps make of a choice: those stay that lower what is measured."""
    draw = np.random.default_rng(search.seed)
    least = search.measure(_names(chosen))
    log(f"divergence {least:.6g} nats a token on windows that were kept out, predicted rise {_rise(chosen):.6g}")
    for trial in range(1, search.trials + 1):
        swapped = _swapped(menus, chosen, nbytes, draw)
        found = math.inf if swapped is None else search.measure(_names(swapped))
        if found < least:
            chosen, least = swapped, found
            log(f"swap {trial}/{search.trials}: divergence {least:.6g}")
    return chosen


def _swapped(
    menus: Mapping[tuple[str, ...], Mapping[str, Point]],
    chosen: Mapping[tuple[str, ...], Point],
    nbytes: int,
    draw: np.random.Generator,
) -> dict[tuple[str, ...], Point] | None:
    """A choice in which one group has its next larger part, and others, as they come, their next smaller ones until
    all of them fit; None where there is none.
    """
    groups = list(menus)
    order = [groups[index] for index in draw.permutation(len(groups))]
    larger = {group: [one for one in menus[group].values() if one.nbytes > chosen[group].nbytes] for group in order}
    first = next((group for group in order if larger[group]), None)
    if first is None:
        return None
    found = {**chosen, first: min(larger[first], key=lambda point: point.nbytes)}
    for group in order:
        smaller = [one for one in menus[group].values() if one.nbytes < found[group].nbytes]
        if group != first and smaller and _nbytes(found) > nbytes:
            found[group] = max(smaller, key=lambda point: point.nbytes)
    return found if _nbytes(found) <= nbytes else None


def _nbytes(points: Mapping[Any, Point]) -> int:
    return sum(point.nbytes for point in points.values())


def _rise(points: Mapping[Any, Point]) -> float:
    return sum(point.error for point in points.values())


def take_unit(
    model: Path,
    variants: Mapping[str, Path],
    choice: Path,
    layers: Sequence[int],
    settings: Mapping[str, Any],
    taken: Unit,
) -> None:
    """Write a unit of the chosen parts: packed tensors, and what is said of each matrix.

    Parameters
    ----------
    model : Path
        Folder of the dense model, for what stays as it is: stored like any other part, so that its bytes count.
    variants : mapping
        Name to folder.
    choice : Path
        From `choose_variants`.
    layers : sequence of int
        Of the unit.
    settings : mapping
        Of the variant that chooses.
    taken : Unit
        Files to write.

    Raises
    ------
    ArtifactError
        If the variants are of different models or calibrations, or one lacks a matrix that was chosen of it.
    """
    started, unit, base = time.perf_counter(), taken.codes.stem, ModelFolder(model)
    chosen = read_json(choice, _REMEDY)
    check_provenance(choice, chosen, {"format_version": FORMAT_VERSION}, _REMEDY)
    chosen = chosen["matrices"]
    tensors, specs, reports, diagnostics = {}, {}, {}, {}
    belongs: dict[str, Any] = {"format_version": FORMAT_VERSION, "layers": list(layers)}
    kept: dict[str, str] = {}
    whole = 0
    for name, folder in variants.items():
        files = Unit.of(folder, unit)
        codes = TensorFile(files.codes)
        check_provenance(files.codes, codes.metadata, belongs, "Run the variants of choose_from again, on one model")
        belongs |= {key: codes.metadata.get(key) for key in ("fingerprint", *CALIBRATION)}
        stored, learned = read_report(files.stored), read_report(files.learned)
        whole = stored["dense_nbytes_all"]
        found = read_specs(codes, CODECS, "Delete it and run again")
        kept |= {matrix: why for matrix, why in stored["kept_dense"].items() if chosen.get(matrix, name) == name}
        for matrix, spec in found.items():
            report = stored["matrices"][matrix]
            if chosen[matrix] == name:
                specs[matrix] = spec
                tensors |= {part: codes.read(part) for part in tensor_names(matrix, spec)}
                reports[matrix], diagnostics[matrix] = report, {**learned["matrices"][matrix], "from": name}
            elif chosen[matrix] is None and matrix not in specs:
                packed, specs[matrix], reports[matrix] = _as_is(base, matrix, report)
                tensors |= packed
                about = {"shape": spec["shape"], "shared_with": [], "seconds": 0.0}
                diagnostics[matrix] = {**about, "relative_error": reports[matrix]["relative_error"], "from": AS_IS}
    # in the model's order, not one variant after another: a reader of reports draws and lists them as they come
    reports, diagnostics = ({name: found[name] for name in chosen if name in found} for found in (reports, diagnostics))
    header = {**belongs, "settings": digest_of(dict(settings)), "matrices": specs, "kept_dense": kept}
    write_tensors(taken.codes, tensors, header)
    about = {"format_version": FORMAT_VERSION, "unit": unit, "kept_dense": kept}
    write_json(taken.stored, {**about, "dense_nbytes_all": whole, "matrices": reports})
    seconds = time.perf_counter() - started
    write_json(taken.learned, {**about, "method": settings["method"], "seconds": seconds, "matrices": diagnostics})


def _as_is(model: ModelFolder, matrix: str, report: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict]:
    """Tensors, spec and report of a matrix in bfloat16; of another dtype it is rounded, by what a variant's report says
    of the cost of errors.
    """
    weight = model.read_weight(matrix)
    factors = Factorization(None, weight, support="dense", value_codec="bf16")
    packed, spec = factors.pack(matrix)
    error = factors.quantized().relative_error(weight)
    squared = error**2 * report["squared_norm"]
    price = report["predicted_rise"] / report["squared_error"] if report["squared_error"] > 0 else 0.0
    sizes = {"nbytes": factors.nbytes, "dense_nbytes": report["dense_nbytes"], "squared_norm": report["squared_norm"]}
    errors = {"squared_error": squared, "relative_error": error, "predicted_rise": price * squared}
    return packed, spec, {**sizes, **errors}
