"""What one unit hands to the next where layers are learned in turn; without torch, as most units hand on nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cospadi.learning import InTurn


@contextmanager
def handed_on(
    unit: Sequence[Any], collection: Mapping[str, Any], given: Mapping[str, Any], made: Mapping[str, Any], **how: Any
) -> Iterator[InTurn | None]:
    """`sequence.Streams`, or `compensation.Compensation`, of a unit that is learned on what is before it; None for one
    that is not.

    Parameters
    ----------
    unit : sequence
        Model folder, structure, windows, layers and settings, as of `Streams`.
    collection : mapping
        Says ``dtype``, ``batch_tokens`` and ``heldout_fraction``.
    given : mapping
        ``streams``: the file of the unit before, in a list that is empty for the first. ``more``: a file of windows to
        train on, where those of the calibration are not enough, in such a list.
    made : mapping
        ``streams``: the file for the unit behind, written once this one has been learned; empty where none is behind.
        Without it nothing is handed on.
    **how
        ``device`` and ``log``.
    """
    if made.get("streams") is None:
        yield None
        return
    _, structure, _, layers, variant = unit
    if variant.get("compensate") is not None:
        from cospadi.compensation import Compensation as OfUnit

        how |= {"more": next(iter(given["more"]), None), "saved": Path(made["streams"]).parent}
    else:
        from cospadi.sequence import Streams as OfUnit

    computed = {key: collection[key] for key in ("dtype", "batch_tokens", "heldout_fraction")}
    streams = OfUnit(*unit, before=next(iter(given["streams"]), None), **computed, **how)
    yield streams
    if layers[-1] + 1 < structure["n_layers"]:
        streams.write(made["streams"])
    else:
        Path(made["streams"]).touch()
