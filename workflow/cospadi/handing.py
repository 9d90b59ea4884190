"""What one unit hands to the next where layers are learned in turn; without torch, as most units hand on nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cospadi.learning import InTurn


@contextmanager
def handed_on(
    unit: Sequence[Any], collection: Mapping[str, Any], before: Sequence[str], after: str | None, **how: Any
) -> Iterator[InTurn | None]:
    """`sequence.Streams`, or `compensation.Compensation`, of a unit that is learned on what is before it; None for one
    that is not.

    Parameters
    ----------
    unit : sequence
        Model folder, structure, windows, layers and settings, as of `Streams`.
    collection : mapping
        Says ``dtype``, ``batch_tokens`` and ``heldout_fraction``.
    before : sequence of str
        The file of the unit before, if there is one.
    after : str or None
        The file for the unit behind, written once this one has been learned; None: nothing is handed on.
    **how
        ``device`` and ``log``.
    """
    if after is None:
        yield None
        return
    *_, variant = unit
    if variant.get("compensate") is not None:
        from cospadi.compensation import Compensation as OfUnit
    else:
        from cospadi.sequence import Streams as OfUnit

    computed = {key: collection[key] for key in ("dtype", "batch_tokens", "heldout_fraction")}
    streams = OfUnit(*unit, before=next(iter(before), None), **computed, **how)
    yield streams
    streams.write(after)
