"""What every kind of model and of text provides: its options, and the functions that read them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cospadi.registry import Entry
from cospadi.work import NUMPY, Work


@dataclass(frozen=True, kw_only=True)
class Source(Entry):
    """One line of a registry of sources: a word that a section's ``source`` may be.

    A reader takes options as keyword-only parameters of the same name (`called`), so a key that the schema allows and
    a reader calls by another name cannot exist.

    Attributes
    ----------
    read : callable or None
        Brings the model (`models`) or the text (`texts`) here; None: it is used where it lies.
    plan : callable, optional
        Of a model: ``plan(root, resources, *, ...) -> (path, what, remedy)``, the ``config.json`` that jobs are planned
        with, what a user calls it, and what to do if it is wrong.
    work : callable
        ``work(shapes) -> Work`` of bringing it here; `shapes` are the model's (`resources.Shapes`), of text None.
    """

    read: Callable[..., Any] | None = None
    plan: Callable[..., Any] | None = None
    work: Callable[[Any], Work] = lambda shapes: Work(1.4 * NUMPY, 8)

    def names_read(self) -> set[str]:
        """Options that a reader takes."""
        return {name for reader in (self.read, self.plan) if reader is not None for name in _keywords(reader)}


def called(reader: Callable[..., Any], section: Mapping[str, Any], *arguments: Any) -> Any:
    """Call a reader with the options of a complete section that it takes.

    Parameters
    ----------
    reader : callable
    section : mapping
        From `config.check_config`, which has filled in the defaults.
    *arguments
        What the reader takes besides.
    """
    return reader(*arguments, **{name: section[name] for name in _keywords(reader)})


def _keywords(reader: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(reader).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
