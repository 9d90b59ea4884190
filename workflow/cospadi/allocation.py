"""Allocation: which of the things that matrices could be make the least error together, within so many bytes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cospadi.errors import ConfigError

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
