"""Read what the stages of a run wrote, and put it into one dictionary."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi.errors import ArtifactError, listed
from cospadi.files import ModelFolder, read_json
from cospadi.progress import read_distilled, read_report
from cospadi.provenance import check_provenance, fingerprint

FORMAT_VERSION = 1
DENSE = "dense"
_REMEDY = "Delete it if it is there, and run again: what is missing is made"
_ACCURACIES = ("acc_norm", "acc", "exact_match")


def collect(
    run: Mapping[str, Any],
    results: Path,
    *,
    dense_model: Path,
    units: Mapping[str, Sequence[str]] | None = None,
    pruned: Mapping[str, str | Path] | None = None,
) -> dict[str, Any]:
    """Everything known about each variant; parameters and errors as in `report.summarize`.

    Returns
    -------
    dict
        ``variants``: name to a dictionary with the columns of ``summary.tsv`` and

        - ``model``: folder, ``config``: the variant as configured;
        - ``matrices``: name to ``nbytes``, ``dense_nbytes``, ``relative_error`` (of what the file holds),
          ``relative_error_learned`` (before rounding), and the learner's diagnostics;
        - ``tasks``: task to score, ``samples``: generated texts, ``evaluation``: the rest of ``eval.json``.

        ``dense`` comes first, then the variants in the order of the config.
    """
    prunings = {name: read_json(path, _REMEDY) for name, path in (pruned or {}).items()}
    variants: dict[str, dict[str, Any]] = {
        name: _read_variant(name, dict(config), results / name, (units or {}).get(name), prunings.get(name))
        for name, config in run["variants"].items()
        if name != DENSE
    }
    dense_nbytes: dict[str, int] = {}
    for name, variant in variants.items():
        if name not in prunings:  # the layers of a pruned model have other numbers
            dense_nbytes |= {matrix: numbers["dense_nbytes"] for matrix, numbers in variant["matrices"].items()}
    dense_targets = [2 * pruning["dense"]["target_parameters"] for pruning in prunings.values()]
    dense = {
        "method": "none",
        "ratio_asked": 0.0,
        "target_bytes": max([sum(dense_nbytes.values()), *dense_targets]),
        "ratio_true": 0.0,
        "ratio_of_all": None,
        "mean_relative_error": 0.0,
        "worst_matrices": None,
        "predicted_rise": None,
        "compensation_gain": None,
        "seconds_compensating": None,
        "refinement_gain": None,
        "seconds_refining": None,
        "distillation_gain": None,
        "seconds_distilling": None,
        "seconds_learning": 0.0,
        "model": str(dense_model),
        "config": {},
        "matrices": {},
        **_pruned_columns(None),
    }
    variants = {DENSE: dense, **variants}
    asked = (run.get("evaluation") or {}).get("tasks") or []
    for name, variant in variants.items():
        variant["model_bytes"] = _weight_bytes(Path(variant["model"]))
        variant |= _read_scores(results / name / "eval.json", Path(variant["model"]), asked)
    reference = variants[DENSE]["word_perplexity"]
    for variant in variants.values():
        perplexity = variant["word_perplexity"]
        variant["recovery"] = reference / perplexity if reference and perplexity else None
    return {"format_version": FORMAT_VERSION, "variants": variants}


def _read_variant(
    name: str, config: dict[str, Any], folder: Path, units: Sequence[str] | None, pruning: Mapping[str, Any] | None
) -> dict[str, Any]:
    columns = _pruned_columns(pruning)
    if pruning is not None and "steps" not in config:
        return {
            "method": config["method"],
            "ratio_asked": None,
            "target_bytes": 2 * pruning["pruned"]["target_parameters"],
            "ratio_true": columns["target_parameters_removed"],
            "ratio_of_all": None,
            "mean_relative_error": None,
            "worst_matrices": None,
            "predicted_rise": None,
            "compensation_gain": None,
            "seconds_compensating": None,
            "refinement_gain": None,
            "seconds_refining": None,
            "distillation_gain": None,
            "seconds_distilling": None,
            "seconds_learning": pruning["seconds"],
            "model": str(folder / "model"),
            "config": config,
            "matrices": {},
            **columns,
        }
    matrices, trained, seconds, all_nbytes = _read_units(name, folder, units)
    compensated, refined = trained["compensated"], trained["refined"]
    trains = any(step.get("distill") is not None for step in config.get("steps", [config]))
    distilled = read_distilled(folder / "distilled", _REMEDY) if trains else None
    # matrices that share a dictionary count a fraction of it each
    target_bytes = round(sum(matrix["nbytes"] for matrix in matrices.values()))
    rises = [matrix["predicted_rise"] for matrix in matrices.values() if "predicted_rise" in matrix]
    method, asked = config.get("method"), config.get("ratio")
    dense_nbytes = sum(matrix["dense_nbytes"] for matrix in matrices.values())
    # where some matrices stay as they are, the share of all is another one
    ratio_of_all = None if all_nbytes == dense_nbytes else (dense_nbytes - target_bytes) / all_nbytes
    if pruning is not None:  # of all blocks, also those that went in the first step
        method = " + ".join(step["method"] for step in config["steps"])
        asked = config["steps"][-1]["ratio"] * dense_nbytes / all_nbytes
        asked = 1 - (1 - columns["target_parameters_removed"]) * (1 - asked)
        target_bytes += all_nbytes - dense_nbytes
        dense_nbytes, ratio_of_all = 2 * pruning["dense"]["target_parameters"], None
        seconds += pruning["seconds"]
    return {
        "method": method,
        "ratio_asked": asked,
        "target_bytes": target_bytes,
        "ratio_true": 1 - target_bytes / dense_nbytes,
        "ratio_of_all": ratio_of_all,
        "mean_relative_error": sum(matrix["relative_error"] for matrix in matrices.values()) / len(matrices),
        "worst_matrices": _worst(matrices),
        "predicted_rise": sum(rises) if rises else None,
        "compensation_gain": _mean([1 - one["kl"] / one["kl_before"] for one in compensated]),
        "seconds_compensating": sum(one["seconds"] for one in compensated) if compensated else None,
        "refinement_gain": _mean([1 - block["error"] / block["error_before"] for block in refined]),
        "seconds_refining": sum(block["seconds"] for block in refined) if refined else None,
        "distillation_gain": distilled and 1 - distilled["kl"] / distilled["kl_before"],
        "seconds_distilling": distilled and distilled["seconds"],
        "seconds_learning": seconds + (distilled["seconds"] if distilled else 0.0),
        "model": str(folder / "model"),
        "config": config,
        "matrices": matrices,
        **columns,
    }


def place_of(matrix: str) -> tuple[int, str]:
    """Layer and projection of a matrix: ``model.layers.3.self_attn.q_proj`` is (3, "self_attn.q_proj")."""
    _, layer, projection = re.split(r"\.(\d+)\.", matrix, maxsplit=1)
    return int(layer), projection


def _worst(matrices: Mapping[str, Mapping[str, Any]]) -> str:
    """The matrices of the largest relative errors, three at most: ``28.down 0.412, 0.v 0.38``."""

    def said(matrix: str) -> str:
        layer, projection = place_of(matrix)
        short = projection.rpartition(".")[2].removesuffix("_proj")
        return f"{layer}.{short} {matrices[matrix]['relative_error']:.3g}"

    return ", ".join(map(said, sorted(matrices, key=lambda matrix: -matrices[matrix]["relative_error"])[:3]))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _read_units(
    name: str, folder: Path, units: Sequence[str] | None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]], float, int]:
    """Every matrix of a variant, reports of what was trained between layers, the seconds of learning, and the dense
    bytes of all matrices of its layers.
    """
    if units is None:
        units = sorted({path.stem for stage in ("factors", "codes") for path in (folder / stage).glob("*.json")})
    if not units:
        raise ArtifactError(folder / "codes", f"holds no unit of variant {name}", _REMEDY)
    matrices: dict[str, dict[str, Any]] = {}
    unit_of: dict[str, str] = {}
    trained: dict[str, list[dict[str, Any]]] = {"compensated": [], "refined": []}
    seconds, all_nbytes = 0.0, 0
    for unit in units:
        learned, stored = (read_report(folder / part / f"{unit}.json", _REMEDY) for part in ("factors", "codes"))
        if learned["matrices"].keys() != stored["matrices"].keys():
            differing = sorted(learned["matrices"].keys() ^ stored["matrices"].keys())
            raise ArtifactError(
                folder / "codes" / f"{unit}.json",
                f"does not describe the matrices of factors/{unit}.json (differing: {listed(differing)})",
                "Delete it and run again",
            )
        seconds += learned["seconds"]
        for what, reports in trained.items():
            reports += learned.get(what, {}).values()
        all_nbytes += stored["dense_nbytes_all"]
        for matrix, numbers in stored["matrices"].items():
            if matrix in matrices:
                raise ArtifactError(
                    folder / "codes" / f"{unit}.json",
                    f"holds {matrix}, which {unit_of[matrix]}.json holds too",
                    "Delete the one that the config no longer asks for",
                )
            unit_of[matrix] = unit
            diagnostics = dict(learned["matrices"][matrix])
            diagnostics["relative_error_learned"] = diagnostics.pop("relative_error")
            history = diagnostics.get("history", [])
            diagnostics["history"] = {key: [entry[key] for entry in history] for key in ("iteration", "relative_error")}
            matrices[matrix] = {**diagnostics, **numbers}
    return matrices, trained, seconds, all_nbytes


def _pruned_columns(pruning: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a pruning step removed: blocks, and its share of the parameters of the model and of the matrices."""
    if pruning is None:
        return dict.fromkeys(("removed_blocks", "parameters_removed", "target_parameters_removed"))
    shares = {key: 1 - pruning["pruned"][key] / pruning["dense"][key] for key in ("parameters", "target_parameters")}
    return {
        "removed_blocks": _ranges(pruning["removed"]),
        "parameters_removed": shares["parameters"],
        "target_parameters_removed": shares["target_parameters"],
    }


def _ranges(numbers: Sequence[int]) -> str:
    """``3-5 9`` for 3, 4, 5 and 9."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _read_scores(path: Path, model: Path, asked: Sequence[str]) -> dict[str, Any]:
    evaluation = read_json(path, _REMEDY)
    belongs = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(ModelFolder(model))}
    check_provenance(path, evaluation, belongs, "Delete it and run again to evaluate the model anew")
    perplexity = evaluation.get("perplexity", {})
    scores = {
        name: scored["metrics"][scored["primary"]]
        for name, scored in evaluation.get("tasks", {}).items()
        if "primary" in scored
    }
    # a group such as mmlu also lists its members
    tasks = {name: scores[name] for name in asked if name in scores} or scores
    accuracies = [score for name, score in tasks.items() if evaluation["tasks"][name]["primary"] in _ACCURACIES]
    return {
        "word_perplexity": perplexity.get("word"),
        "token_perplexity": perplexity.get("token"),
        "kl": perplexity.get("kl"),
        "bits_per_byte": perplexity.get("bits_per_byte"),
        "mean_accuracy": sum(accuracies) / len(accuracies) if accuracies else None,
        "tasks": tasks,
        "seconds_evaluating": evaluation["seconds"]["total"],
        "samples": evaluation.get("samples", []),
        "evaluation": {key: value for key, value in evaluation.items() if key not in ("samples", "tasks")},
    }


def _weight_bytes(folder: Path) -> int:
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ArtifactError(folder, "holds no safetensors file", _REMEDY)
    return sum(file.stat().st_size for file in files)
