"""Plots of a run. Each function takes the summary and the files to write (the suffix decides the format)."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.report.figures import COLOURS, Style, draw_legend, draw_line, new_figure, style
from cospadi.report.figures import save as _save
from cospadi.report.frontier import bytes_of, family, front
from cospadi.report.summary import place_of

# With more variants than that, names beside the points hide the points, and a legend of groups stands below
LABELLED = 14
_ERROR = r"relative error  $\|X(W-DS)\|\,/\,\|XW\|$"


def plot_errors(summary: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Relative error by layer: one panel a projection, one line a variant."""
    variants = _factorized(summary)
    if not variants:
        figure = new_figure(8, 3)
        _say(figure.subplots(), "No variant of this run factorizes matrices")
        _save(figure, paths)
        return
    styles = _styles(_compressed(summary))  # a variant looks the same in every plot
    styles = {name: styles[name] for name in variants}
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, variant in variants.items():
        for matrix, numbers in variant["matrices"].items():
            layer, projection = place_of(matrix)
            panels.setdefault(projection, {}).setdefault(name, []).append((layer, numbers["relative_error"]))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(3.1 * columns + 0.6, 2.5 * rows + 1.1)
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axis, (projection, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            layers, errors = zip(*sorted(points), strict=True)
            draw_line(axis, layers, errors, styles[name])
        axis.set_title(projection, loc="left", fontweight="bold")
        axis.set_ylim(bottom=0)
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("layer")
    figure.supylabel(_ERROR, fontsize=10)
    figure.suptitle("Error of every compressed matrix on the calibration inputs (lower is better)", fontsize=12)
    draw_legend(figure, styles)
    _save(figure, paths)


def plot_pareto(summary: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Bytes (`frontier.bytes_of`) against perplexity; the dense model as a line, the Pareto front marked."""
    _plot_sizes(summary, "word_perplexity", "word perplexity on held-out text  (lower is better)", paths)


def plot_accuracy(summary: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Bytes against the mean accuracy of the tasks, drawn as `plot_pareto`."""
    _plot_sizes(summary, "mean_accuracy", "mean accuracy of the tasks  (higher is better)", paths, least=False)


def _plot_sizes(summary: Mapping[str, Any], key: str, label: str, paths: Sequence[Path], *, least: bool = True) -> None:
    variants = {name: v for name, v in _compressed(summary).items() if v[key] is not None}
    dense = summary["variants"]["dense"]
    styles = _styles(_compressed(summary))
    figure = new_figure(8, 5.2 + 0.2 * max(0, min(len(variants), LABELLED) - 6))
    axis = figure.subplots()
    if not variants or dense[key] is None:
        _say(axis, f"{'Perplexity' if least else 'Accuracy'} was not measured in this run")
        _save(figure, paths)
        return
    counted = bytes_of(summary)
    points = {name: (v[counted.key] / 1e6, v[key]) for name, v in variants.items()}
    full = dense[counted.key] / 1e6
    best = front(points, least=least)
    for names in _groups(variants).values():
        line = sorted(points[name] for name in names)
        look = styles[names[0]]
        axis.plot(*zip(*line, strict=True), color=look.color, linestyle=look.linestyle, lw=1.2, alpha=0.5, zorder=1)
    for name, point in points.items():
        axis.plot(*point, marker=styles[name].marker, color=styles[name].color, markersize=9, linestyle="")
    ring = {"markersize": 16, "markerfacecolor": "none", "markeredgecolor": "#444444", "markeredgewidth": 1.0}
    axis.plot(*zip(*(points[name] for name in best), strict=True), "o", **ring, linestyle="", zorder=0)
    axis.axhline(dense[key], color="#666666", lw=1.2, linestyle=(0, (4, 2)))
    axis.plot(full, dense[key], marker="*", color="#444444", markersize=14)
    axis.annotate(f"dense  {dense[key]:.4g}", (full, dense[key]), xytext=(6, 9), textcoords="offset points", ha="right")
    if least and max(y for _, y in points.values()) > 3 * dense[key]:
        _logarithmic(axis)
    lowest = min(x for x, _ in points.values())
    axis.set_xlim(lowest - 0.12 * (full - lowest), full + 0.08 * (full - lowest))
    axis.margins(y=0.12)
    share = axis.secondary_xaxis("top", functions=(lambda x: 100 * x / full, lambda p: p * full / 100))
    share.set_xlabel("percent of the dense bytes (bfloat16)")
    axis.set_xlabel(f"bytes of {counted.what} in the file, masks counted  [MB]")
    axis.set_ylabel(label)
    axis.set_title(
        "Size against quality; lines join variants that differ only in how much they remove,\n"
        "rings are the Pareto front: nothing smaller is as good",
        fontsize=12,
        pad=12,
    )
    if len(variants) <= LABELLED:
        _label(axis, {name: (f"{name}  {y:.4g}", x, y) for name, (x, y) in points.items()}, styles)
    else:
        draw_legend(figure, {family(names): styles[names[0]] for names in _groups(variants).values()})
    _save(figure, paths)


def plot_convergence(summary: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Relative error by iteration: median over all matrices and the band of the middle 80 %."""
    variants = _factorized(summary)
    curves = {}
    for name, variant in variants.items():
        histories = [m["history"]["relative_error"] for m in variant["matrices"].values() if m["history"]["iteration"]]
        if histories:
            length = max(map(len, histories))
            # a matrix that stopped early keeps its last error
            curves[name] = np.array([errors + errors[-1:] * (length - len(errors)) for errors in histories])
    closed = [name for name in variants if name not in curves]
    figure = new_figure(10.5, 4.6)
    if not curves:
        _say(figure.subplots(), "No variant of this run was learned in iterations")
        _save(figure, paths)
        return
    styles = {name: style for name, style in _styles(_compressed(summary)).items() if name in curves}
    left, right = figure.subplots(1, 2)
    banded = len(curves) <= 4  # more bands than that hide one another
    for name, errors in curves.items():
        style = styles[name]
        iterations = np.arange(errors.shape[1])
        final = np.where(errors[:, -1:] > 0, errors[:, -1:], 1)
        for axis, values in ((left, errors), (right, 100 * (errors / final - 1))):
            low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
            if banded:
                axis.fill_between(iterations, low, high, color=style.color, alpha=0.13, lw=0)
            draw_line(axis, iterations, middle, style)
    left.set_ylim(bottom=0)
    left.set_ylabel(_ERROR)
    left.set_title("Error", loc="left", fontweight="bold")
    right.set_yscale("symlog", linthresh=1, linscale=0.6)
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter("{x:g}")
    right.set_ylabel("error above its last value  [%]")
    right.set_title("How much is still to gain", loc="left", fontweight="bold")
    for axis in (left, right):
        axis.set_xlabel("iteration (0 is the start)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(x=0.02)
    title = "Convergence: median over the matrices" + (", band = the middle 80 % of them" if banded else "")
    if closed:
        title += "\n" + textwrap.fill(f"learned without iterations: {', '.join(closed)}", 120)
    figure.suptitle(title, fontsize=11)
    solvers = [next(iter(variants[name]["matrices"].values())).get("solver") for name in curves]
    draw_legend(figure, styles, solvers)
    _save(figure, paths)


def plot_allocation(summary: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Bits a weight by layer and projection: one panel a variant whose matrices got unequal shares of the bytes."""
    maps = {
        name: grid for name, v in _factorized(summary).items() if (grid := _bits_by_place(v["matrices"])) is not None
    }
    if not maps:
        figure = new_figure(8, 3)
        _say(figure.subplots(), "Every variant of this run left all its matrices the same share of their bytes")
        _save(figure, paths)
        return
    columns = min(2, len(maps))
    rows = -(-len(maps) // columns)
    figure = new_figure(6.2 * columns + 1, 2.5 * rows + 0.9)
    axes = figure.subplots(rows, columns, squeeze=False)
    highest = max(np.nanmax(bits) for _, _, bits in maps.values())
    for axis, (name, (projections, layers, bits)) in zip(axes.flat, maps.items(), strict=False):
        mesh = axis.pcolormesh(
            layers, range(len(projections)), bits, cmap="viridis", vmin=0, vmax=highest, shading="nearest"
        )
        axis.set_yticks(range(len(projections)), projections)
        axis.invert_yaxis()
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(name, loc="left", fontweight="bold")
        axis.grid(False)
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    figure.supxlabel("layer", fontsize=10)
    figure.colorbar(mesh, ax=axes, label="bits a weight in the file")
    figure.suptitle("Who got the bytes", fontsize=12)
    _save(figure, paths)


def plot_distances(distances: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Distance over every cut by start and length, one panel a metric; the smallest of each length is marked.

    `distances` is what `pruning.distances.measure` wrote.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter

    titles = {
        "angular": "angle over $\\pi$, mean over all tokens",
        "angular_last": "angle over $\\pi$, last token of each window",
        "cosine": "1 - cosine, mean over all tokens",
        "cosine_worst": "1 - cosine, worst token of each window",
        "l2": "relative L2",
    }
    n_layers = distances["n_layers"]
    figure = new_figure(16, 8.2)
    *axes, left_over = figure.subplots(2, 3).flat
    left_over.set_axis_off()
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        values = np.full((n_layers, n_layers), np.nan)  # (length - 1, start)
        for start, row in enumerate(distances["metrics"][name]):
            values[: len(row), start] = row
        values[values <= 0] = np.nan
        values[:, 0] = np.nan  # never cut, and so far from all others that it would take most of the colours
        edges = np.arange(n_layers + 1) - 0.5
        mesh = axis.pcolormesh(edges, edges + 1, values, norm=LogNorm(), cmap="viridis", rasterized=False)
        best = [int(np.nanargmin(row[1:])) + 1 for row in values[:-1] if np.isfinite(row[1:]).any()]
        axis.plot(best, range(1, len(best) + 1), "o", color="white", markeredgecolor="black", markersize=4)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xlabel("first block of the cut")
        axis.set_ylabel("blocks in the cut")
        axis.grid(False)
        bar = figure.colorbar(mesh, ax=axis)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        bar.ax.yaxis.set_major_formatter("{x:g}")
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle("How far the hidden states move over a cut (less is better); dots: the best cut of each length")
    _save(figure, paths)


def _compressed(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: variant for name, variant in summary["variants"].items() if name != "dense"}


def _factorized(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: variant for name, variant in summary["variants"].items() if variant["matrices"]}


def _bits_by_place(matrices: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[int], np.ndarray] | None:
    """Projections, layers and bits a weight of each (NaN where a layer has none); None if all are alike."""
    bits = {place_of(matrix): 16 * numbers["nbytes"] / numbers["dense_nbytes"] for matrix, numbers in matrices.items()}
    # whole atoms and whole weights: shares that are meant to be equal differ a little
    if max(bits.values()) - min(bits.values()) < 0.03 * max(bits.values()):
        return None
    layers = sorted({layer for layer, _ in bits})
    projections = list(dict.fromkeys(projection for _, projection in bits))
    return projections, layers, np.array([[bits.get((n, p), np.nan) for n in layers] for p in projections])


def _groups(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of the variants that differ only in how much they remove."""
    groups: dict[str, list[str]] = {}
    for name, variant in variants.items():
        config = variant["config"]
        steps = config.get("steps", [config])
        rest = [{key: value for key, value in step.items() if key not in ("ratio", "blocks")} for step in steps]
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(name)
    return groups


def _styles(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Style]:
    """One colour a group, one line and marker a ratio in it; if all are of one group, one colour a variant.

    Where the legend names groups alone, all of a group look alike.
    """
    groups = list(_groups(variants).values())
    if len(variants) > LABELLED:
        looks = {name: style(n, n // len(COLOURS), n) for n, names in enumerate(groups) for name in names}
        return {name: looks[name] for name in variants}
    if len(groups) == 1:
        groups = [[name] for name in variants]
    styles = {}
    for number, names in enumerate(groups):
        for position, name in enumerate(names):
            # colours come round again with another line
            styles[name] = style(number, position + number // len(COLOURS), number + 3 * position)
    return {name: styles[name] for name in variants}


def _label(axis: Any, labels: Mapping[str, tuple[str, float, float]], styles: Mapping[str, Style]) -> None:
    """Text beside each point in the point's colour, moved where two would overlap, with a line to the point then."""
    from adjustText import adjust_text

    axis.figure.draw_without_rendering()  # now data coordinates have a place on the page
    ordered = sorted(labels.items(), key=lambda item: item[1][2])
    _, x, y = zip(*(label for _, label in ordered), strict=True)
    # they start beside their points, above and below in turn: texts that lie on each other do not part
    texts = []
    for index, (name, (text, *point)) in enumerate(ordered):
        start = axis.transData.transform(point) + axis.figure.dpi / 72 * np.array([9, (6, -12)[index % 2]])
        texts.append(axis.text(*axis.transData.inverted().transform(start), text, fontsize=9, color=styles[name].color))
    line = {"arrowstyle": "-", "color": "#999999", "lw": 0.7}
    # steps and not seconds are bounded, so that equal runs give equal plots
    adjust_text(
        texts,
        list(x),
        list(y),
        target_x=list(x),
        target_y=list(y),
        ax=axis,
        iter_lim=2000,
        expand=(1.1, 1.5),
        force_text=(0.3, 0.6),
        force_static=(0.2, 0.5),
        arrowprops=line,
    )


def _logarithmic(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _say(axis: Any, text: str) -> None:
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
