"""Allocation: which of the things that matrices could be make the least error together, within so many bytes; and the
table of what was chosen, which a person can read, edit and feed back.
"""

from __future__ import annotations

import csv
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from cospadi.budget import as_is_nbytes
from cospadi.errors import ConfigError
from cospadi.files import replacing

# What a table says in place of bytes of matrices that stay as they are; the method of such a point
AS_IS = "dense"

# Prices between the highest and this share of it are tried, halfway each time on a logarithmic scale
_LOWEST = 1e-15
_BISECTIONS = 60


@dataclass(frozen=True)
class Point:
    """What a matrix or a problem could be.

    Attributes
    ----------
    nbytes : int
        Bytes in the file.
    error : float
        Squared, in the metric of its inputs, on one scale for everything that bytes are shared among.
    method : str
        That makes it so, of `cospadi.methods.METHODS`.
    options : mapping
        The method's.
    """

    nbytes: int
    error: float
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Profile:
    """What an allocation knows of a problem.

    Attributes
    ----------
    matrices : tuple of str
        Names of its matrices.
    shapes : tuple of (d_in, d_out)
    figures : mapping
        What the method measured of it.
    """

    matrices: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    figures: Mapping[str, Any] = field(hash=False)

    @property
    def kind(self) -> tuple[str, ...]:
        """Projections of its matrices: problems of all layers have the same."""
        return tuple(name.rsplit(".", 1)[-1] for name in self.matrices)

    def points(self, storage: Mapping[str, Any]) -> list[Point]:
        """The figure ``points``, bytes and errors, and one more for the matrices themselves: `AS_IS`, of the error
        `as_is`; without those that take as much and err as much.
        """
        whole = as_is_nbytes(self.shapes, storage)
        measured = [Point(nbytes, error) for nbytes, error in self.figures["points"]]
        better = [point for point in measured if point.nbytes < whole or point.error < self.as_is]
        return [*better, Point(whole, self.as_is, AS_IS)]

    @property
    def as_is(self) -> float:
        """Error of the matrices as they are, where the codec of the values cannot hold them exactly."""
        return self.figures.get("as_is", 0.0)


class Menu(Protocol):
    """What one matrix or problem could be: a list of points, or what knows them without listing them."""

    def at(self, price: float) -> Point:
        """The point of least error plus `price` times bytes."""

    def raised(self, point: Point) -> Iterable[tuple[float, int, Point]]:
        """Points with more bytes than `point`: what each lowers the error by, its bytes more, itself."""


class Points(Menu):
    """A menu from a list; with a price it gives the points of their lower convex hull."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = sorted(points, key=lambda point: (point.nbytes, point.error))

    def at(self, price: float) -> Point:
        return min(self._points, key=lambda point: point.error + price * point.nbytes)

    def within(self, nbytes: int) -> Point | None:
        """The point of least error that takes `nbytes` at most."""
        small = [point for point in self._points if point.nbytes <= nbytes]
        return min(small, key=lambda point: point.error, default=None)

    def raised(self, point: Point) -> list[tuple[float, int, Point]]:
        return [
            (point.error - other.error, other.nbytes - point.nbytes, other)
            for other in self._points
            if other.nbytes > point.nbytes and other.error < point.error
        ]


_Key = TypeVar("_Key", bound=Hashable)


def choose(menus: Mapping[_Key, Menu], nbytes: int, *, highest: float = 1.0) -> dict[_Key, Point]:
    """The points of least summed error that take `nbytes` at most.

    One price a byte for all of them, by bisection, which is the optimum on the convex hulls; what is left over then
    goes where it lowers the error most a byte.

    Parameters
    ----------
    menus : mapping
    nbytes : int
    highest : float
        Price at which every menu gives the point of fewest bytes: the largest error of any is high enough.

    Raises
    ------
    ConfigError
        If the fewest bytes are more than that.
    """

    def at(price: float) -> tuple[dict[_Key, Point], int]:
        chosen = {key: menu.at(price) for key, menu in menus.items()}
        return chosen, sum(point.nbytes for point in chosen.values())

    low, high = highest * _LOWEST, highest
    best, taken = at(high)
    if taken > nbytes:
        raise ConfigError([f"ratio: {nbytes} bytes are left of the matrices; {taken} is the least"])
    for _ in range(_BISECTIONS):
        price = (low * high) ** 0.5
        chosen, taken = at(price)
        if taken > nbytes:
            low = price
        else:
            best, high = chosen, price
    return filled(menus, best, nbytes)


def filled(menus: Mapping[_Key, Menu], best: Mapping[_Key, Point], nbytes: int) -> dict[_Key, Point]:
    """Points with what they leave of `nbytes` given away, each time where it lowers the error most a byte."""
    best = dict(best)
    left_over = nbytes - sum(point.nbytes for point in best.values())
    while True:
        steps = [
            (gain / more, more, key, point)
            for key, menu in menus.items()
            for gain, more, point in menu.raised(best[key])
            if more <= left_over
        ]
        if not steps:
            return best
        _, more, key, point = max(steps, key=lambda step: step[0])
        best, left_over = {**best, key: point}, left_over - more


class Row(NamedTuple):
    """What a problem gets: a line of the table of an allocation.

    Attributes
    ----------
    matrices : tuple of str
        Names of its matrices, which share their bytes.
    nbytes : int or None
        In the file; None: they stay as they are.
    line : int
        In the file that it was read from.
    """

    matrices: tuple[str, ...]
    nbytes: int | None
    line: int = 0


COLUMNS = ("unit", "matrices", "method", "bytes", "bits", "ratio", "predicted_rise")
_BETWEEN = " + "


def write_table(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write the table of an allocation: a line a problem with `COLUMNS`.

    ``bytes`` is `AS_IS` for None. Numbers have six digits; what is not known is left empty.
    """
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for line in lines:
            shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in line.items()}
            nbytes = AS_IS if line["bytes"] is None else line["bytes"]
            writer.writerow({**shown, "matrices": _BETWEEN.join(line["matrices"]), "bytes": nbytes})


def read_table(path: str | Path) -> list[Row]:
    """Read a table as `write_table` writes it: of its columns only ``matrices`` and ``bytes``, in any order.

    Raises
    ------
    ConfigError
        With all faults of the file: line, value, what is allowed.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t", strict=True)
            lines = [(reader.line_num, line) for line in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"cannot be read as a table with tabs between its columns ({error})"]) from error
    missing = [name for name in ("matrices", "bytes") if name not in columns]
    if missing:
        raise ConfigError(
            [f"has no column {' and none '.join(missing)}; its columns are {', '.join(columns) or 'none'}"]
        )
    rows, faults = [], []
    first: dict[str, int] = {}
    for number, line in lines:
        names, text = line["matrices"] or "", (line["bytes"] or "").strip()
        matrices = tuple(name.strip() for name in names.split(_BETWEEN.strip()))
        if text != AS_IS and not (text.isascii() and text.isdigit() and int(text) > 0):
            faults.append(f"line {number}: bytes are {text!r}; a whole number from 1 on, or {AS_IS}")
            continue
        for name in matrices:
            if name in first:
                faults.append(f"line {number}: {name} stands in line {first[name]} too")
            first.setdefault(name, number)
        rows.append(Row(matrices, None if text == AS_IS else int(text), number))
    if faults:
        raise ConfigError(faults)
    return rows
