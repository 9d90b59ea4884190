"""Errors a user of the workflow can meet. Each says what, where, the value, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class CospadiError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(CospadiError):
    """Every fault of a configuration in one message.

    Parameters
    ----------
    faults : sequence of str
        One line a fault: config path, value, what is allowed.
    source : str
        The config file(s) the faults were found in.
    complete : mapping, optional
        The config with its defaults, where it is one that the schema allows: then more can be found out about it.
    """

    def __init__(
        self, faults: Sequence[str], source: str = "config", complete: Mapping[str, Any] | None = None
    ) -> None:
        self.faults = list(faults)
        self.complete = complete
        noun = "fault" if len(self.faults) == 1 else "faults"
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(f"{source}: {len(self.faults)} {noun}\n{lines}")


class ArtifactError(CospadiError):
    """A file the workflow reads is missing, damaged, or does not fit the others.

    Parameters
    ----------
    path : path-like
        The file at fault.
    problem : str
        What is wrong with it, with the value found and the one expected.
    remedy : str
        What the user does about it.
    """

    def __init__(self, path: str | Path, problem: str, remedy: str) -> None:
        self.path = Path(path)
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{path}: {problem}. {remedy}")


class UnsupportedModelError(CospadiError):
    """The architecture is not one this package can take apart; lists those that are."""


class NumericalError(CospadiError):
    """Input values make the mathematics meaningless (NaN, empty Gram, all-zero weight)."""
