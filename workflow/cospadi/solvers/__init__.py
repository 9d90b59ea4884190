"""Ways to find a dictionary D and codes S with ``target ~ D S``: one module each, one signature.

``SOLVERS[name](target, *, n_atoms, n_nonzero_coefs, ...)`` returns a :class:`Solution`. A module is imported when its
solver is first asked for, so a job that runs ``htp`` never pays for numba.

What all of them take (each ``learn`` says what it does with the starts, and has options of its own):

target : array (d, n), float32 or float64
    Whitened weight ``L W``; NumPy, or a torch tensor on any device.
n_atoms, n_nonzero_coefs : int
    k and s.
random_state : int or Generator, optional
    Of all that is drawn at random.
dictionary_init : array (d, n_atoms), optional
codes_init : array (n_atoms, n), optional
max_iter : int, optional
    Rounds.
tol : float, optional
    Stop when a round changes the relative error by less than this share of it.
max_seconds : float, optional
    No round starts after so many seconds.
log : callable, optional
    Called with one line a round.
support : {"bitmask", "2:4"}, optional
    Not of ``ksvd``. Any atoms, or two of every four in a row, `n_atoms` a multiple of 4 and `n_nonzero_coefs` half of
    it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SOLVERS", "Solution", "several_metrics"]


@dataclass
class Solution:
    """Dictionary and codes of one target, and how they were found.

    Attributes
    ----------
    dictionary : array (d, k)
        Atoms as columns, of unit Euclidean norm in the space of the target.
    codes : array (k, n)
        Dense array with zeros; at most ``n_nonzero_coefs`` nonzeros a column.
    history : list of dict
        One entry a round: ``iteration`` (0 is the start), ``relative_error`` = ``||target - D S||_F / ||target||_F`` of
        the best pair so far (which is the one returned; it never rises), ``seconds`` since the start, ``n_redrawn``
        atoms redrawn in that round, and what the solver adds.
    """

    dictionary: Any
    codes: Any
    history: list[dict[str, Any]] = field(default_factory=list)


def _htp() -> Callable[..., Solution]:
    from cospadi.solvers.htp import learn

    return learn


def _ksvd() -> Callable[..., Solution]:
    from cospadi.solvers.ksvd import learn

    return learn


def _procrustes() -> Callable[..., Solution]:
    from cospadi.solvers.procrustes import learn

    return learn


def several_metrics() -> Callable[..., Solution]:
    """`multi_metric.learn`: one dictionary for several targets, each in its own metric."""
    from cospadi.solvers.multi_metric import learn

    return learn


class _Registry(Mapping[str, Callable[..., Solution]]):
    """Solver names to their ``learn`` functions; the module of a name is imported on first use."""

    def __init__(self, **importing: Callable[[], Callable[..., Solution]]) -> None:
        self._importing = importing

    def __getitem__(self, name: str) -> Callable[..., Solution]:
        return self._importing[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._importing)

    def __len__(self) -> int:
        return len(self._importing)


SOLVERS: Mapping[str, Callable[..., Solution]] = _Registry(htp=_htp, ksvd=_ksvd, procrustes=_procrustes)
