"""What one unit hands to the next where layers are learned in turn; without torch, as most units hand on nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cospadi.sequence import Streams


@contextmanager
def handed_on(
    *unit: Any, collection: Mapping[str, Any], hidden_out: str | Path | None, **how: Any
) -> Iterator[Streams | None]:
    """`sequence.Streams` of a unit that is learned on what is before it, written to `hidden_out` behind it.

    Parameters
    ----------
    *unit, **how
        As of `Streams`; None, and nothing is computed, where `hidden_out` is None.
    collection : mapping
        Says ``dtype`` and ``batch_tokens``.
    """
    if hidden_out is None:
        yield None
        return
    from cospadi.sequence import Streams

    streams = Streams(*unit, dtype=collection["dtype"], batch_tokens=collection["batch_tokens"], **how)
    yield streams
    streams.write(hidden_out)
