"""What came out of training from scratch: a table of means over seeds, and the loss curves."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from cospadi.files import read_json, replacing, write_json
from cospadi.report.figures import draw_legend, draw_line, new_figure, save, styles_of
from cospadi.report.tables import write_numbers

_EXPERIMENTS = {"language": ("perplexity", "{:.2f}"), "vision": ("accuracy", "{:.4f}")}
_HEADINGS = ("experiment", "model", "attention", "attention params", "removed", "held-out", "std", "loss", "seconds")
_MEANINGS = (
    ("attention params", "numbers that inference needs for the query, key, value and output weights of all layers"),
    ("removed", "share of them that is gone, against a layer's own four square matrices"),
    ("held-out", "perplexity a token on the held-out text (lower is better); accuracy on the held-out digits (higher)"),
    ("std", "standard deviation over the seeds"),
    ("loss", "cross-entropy on what was held out, mean over the seeds"),
    ("seconds", "of training one model, mean over the seeds"),
)


def summarize_training(
    training: Mapping[str, Any], folder: Path, output: Path, *, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Gather the histories of all models and write ``training.{tsv,json,html}`` and ``plots/training.{svg,png}``.

    Parameters
    ----------
    training : mapping
        The config's section `training`.
    folder : Path
        Holds ``<experiment>/<variant>/seed_<seed>/history.json``.
    output : Path
    log : callable

    Returns
    -------
    dict
        The content of ``training.json``: by experiment and variant, means over seeds and every seed's curve.

    Raises
    ------
    ArtifactError
        If a history is missing or damaged.
    """
    summary = {}
    for name in _EXPERIMENTS:
        settings = training[name]
        if settings is not None:
            variants = settings["variants"]
            summary[name] = {
                variant: _row(name, settings, config, folder / name / variant, training["seeds"])
                for variant, config in variants.items()
            }
    write_json(output / "training.json", summary)
    _write_table(summary, output / "training.tsv")
    write_numbers(_HEADINGS, _cells(summary), _MEANINGS, output / "training.html")
    _plot(summary, [output / "plots" / f"training.{suffix}" for suffix in ("svg", "png")])
    for line in training_text(summary).splitlines():
        log(line)
    return summary


def training_text(summary: Mapping[str, Any]) -> str:
    """The table for the console."""
    return tabulate(_cells(summary), _HEADINGS, disable_numparse=True, colalign=["left"] * 3 + ["right"] * 6)


def training_message(results: Path) -> str:
    """What the console shows at the end of a run that trained models: the table, and where they are."""
    summary = read_json(results / "training.json")
    return f"\n{training_text(summary)}\n\nModels: {results}/training/<experiment>/<model>/seed_<seed>/model"


def _row(
    experiment: str, settings: Mapping[str, Any], config: Mapping[str, Any], folder: Path, seeds: list[int]
) -> dict[str, Any]:
    histories = [read_json(folder / f"seed_{seed}" / "history.json") for seed in seeds]
    metric = _EXPERIMENTS[experiment][0]
    scores = [history[metric] for history in histories]
    dense = 4 * settings["model"]["layers"] * settings["model"]["hidden_size"] ** 2
    kept = histories[0]["attention_parameters"]
    return {
        "config": dict(config),
        "metric": metric,
        "attention_parameters": kept,
        "attention_removed": 1 - kept / dense,
        "parameters": histories[0]["kept_parameters"],
        "scores": scores,
        "mean": statistics.fmean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else None,
        "loss": statistics.fmean(history["heldout_loss"] for history in histories),
        "seconds": statistics.fmean(history["seconds"] for history in histories),
        "device": histories[0]["device"],
        "curves": [{"training": history["training"], "heldout": history["heldout"]} for history in histories],
    }


def _cells(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for experiment, variants in summary.items():
        show = _EXPERIMENTS[experiment][1].format
        for name, row in variants.items():
            rows.append(
                [
                    experiment,
                    name,
                    row["config"]["attention"],
                    str(row["attention_parameters"]),
                    f"{100 * row['attention_removed']:.1f} %",
                    show(row["mean"]),
                    "" if row["std"] is None else show(row["std"]),
                    f"{row['loss']:.4f}",
                    f"{row['seconds']:.0f}",
                ]
            )
    return rows


def _write_table(summary: Mapping[str, Any], path: Path) -> None:
    keys = ("attention_parameters", "attention_removed", "parameters", "metric", "mean", "std", "loss", "seconds")
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["experiment", "variant", *keys])
        for experiment, variants in summary.items():
            for name, row in variants.items():
                values = [row[key] for key in keys]
                numbers = [f"{value:.6g}" if isinstance(value, float) else value for value in values]
                writer.writerow([experiment, name, *numbers])


def _plot(summary: Mapping[str, Any], paths: list[Path]) -> None:
    """Training and held-out loss by step, a row an experiment: mean over the seeds, band from least to most."""
    figure = new_figure(10.5, 4.6 * len(summary))
    styles = styles_of(dict.fromkeys(name for variants in summary.values() for name in variants))
    for axes, (experiment, variants) in zip(
        figure.subplots(len(summary), 2, squeeze=False), summary.items(), strict=True
    ):
        for axis, part in zip(axes, ("training", "heldout"), strict=True):
            for name, row in variants.items():
                curves = np.array([curve[part] for curve in row["curves"]])  # (seeds, points, 2)
                steps, losses = curves[0, :, 0], curves[:, :, 1]
                axis.fill_between(steps, losses.min(0), losses.max(0), color=styles[name].color, alpha=0.13, lw=0)
                draw_line(axis, steps, losses.mean(0), styles[name])
            axis.set_xlabel("step")
            axis.set_ylabel("cross-entropy")
            axis.set_title(f"{experiment}: {'training' if part == 'training' else 'held out'}", loc="left")
    draw_legend(figure, styles)
    save(figure, paths)
