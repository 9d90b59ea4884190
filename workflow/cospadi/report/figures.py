"""What all plots look like: colours, lines, markers, layout, legends, and the files they end in.

Figures are made through matplotlib's objects and never through pyplot: no display, no global state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cospadi.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart with any colour vision; yellow is left out, it vanishes on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LAYOUT = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cospadi",
}


class Style(NamedTuple):
    """How what belongs to one name is drawn, in every plot of a run."""

    color: str
    linestyle: Any
    marker: str


def style(colour: int, line: int, marker: int) -> Style:
    """The style of these numbers; what is used up comes round again, a colour with another marker."""
    place = marker + colour // len(COLOURS)
    return Style(COLOURS[colour % len(COLOURS)], LINES[line % len(LINES)], MARKERS[place % len(MARKERS)])


def styles_of(names: Iterable[str]) -> dict[str, Style]:
    """One colour and marker a name; when the colours come round again, with another line and marker."""
    return {name: style(number, number // len(COLOURS), number) for number, name in enumerate(names)}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(_LAYOUT)
    return Figure(figsize=(width, height), layout="constrained")


def draw_line(axis: Any, x: Sequence[float], y: Sequence[float], style: Style) -> None:
    """A line with a few markers on it."""
    axis.plot(x, y, **style._asdict(), markersize=4, markevery=max(1, len(x) // 8), lw=1.6)


def draw_legend(figure: Figure, styles: Mapping[str, Style], solvers: Sequence[str | None] = ()) -> None:
    """Names below the figure, each with the solver that learned it where `solvers` says so."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **style._asdict(), markersize=5, label=name if solver is None else f"{name} ({solver})")
        for (name, style), solver in zip(styles.items(), solvers or [None] * len(styles), strict=True)
    ]
    inches = 0.75 + 0.09 * max(len(handle.get_label()) for handle in handles)
    columns = min(len(handles), max(1, int(figure.get_figwidth() / inches)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3.2)


def save(figure: Figure, paths: Sequence[Path]) -> None:
    """Write a figure to every path; the suffix decides the format."""
    for path in paths:
        with replacing(path) as temporary:
            # no date inside: equal numbers give equal files
            figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
