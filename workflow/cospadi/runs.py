"""Runs: what kind a config asks for, and who checks and plans it. The one place that knows there is more than one.

``python -m cospadi.runs docs/architecture.md`` draws the stages of every kind anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cospadi import config as compression
from cospadi.config import Schema
from cospadi.errors import ConfigError, CospadiError
from cospadi.plan import Plan
from cospadi.stages import Stage, Staged, draw
from cospadi.training import config as training
from cospadi.training.plan import TrainingPlan


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes
    ----------
    name : str
        Its Snakefile is ``workflow/<name>.smk``, its rule for everything is called that, and the report's first page is
        ``workflow/report/<name>.rst``.
    schema : callable
        Schema of its config.
    cross_checks : callable
        ``cross_checks(config)`` of a complete config: lines of faults that no schema can say.
    plan : callable
        ``plan(config)`` of a complete config.
    """

    name: str
    schema: Callable[[], Mapping[str, Any]]
    cross_checks: Callable[[dict[str, Any]], Iterable[str]]
    plan: Callable[..., Staged]

    @property
    def stages(self) -> Mapping[str, Stage]:
        """Its table."""
        return self.plan.stages


COMPRESS = Kind("compress", compression.schema, compression.cross_checks, Plan)
TRAIN = Kind("train", training.schema, training.cross_checks, TrainingPlan)
KINDS = (COMPRESS, TRAIN)


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind of run that a config asks for: one with the section ``training`` trains, every other compresses."""
    return COMPRESS if config.get("training") is None else TRAIN


def check_run(
    config: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    source: str = "config",
    files: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """Check a config and fill in the defaults, whichever kind of run it asks for.

    Keys that only another kind of run has are left out: ``config.yaml`` has them, and a file with the section
    ``training`` comes on top of it.
    """
    kind = kind_of(config)
    whole, others = kind.schema(), [other.schema() for other in KINDS if other is not kind]
    own = _own(config, whole, others)
    return compression.checked(own, whole, kind.cross_checks, overrides=overrides, source=source, files=files)


def plan_run(
    config: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    source: str = "config",
    files: Iterable[str | Path] = (),
    **given: Any,
) -> Staged:
    """`check_run`, then the plan of the run; what both find wrong comes in one message.

    Parameters
    ----------
    config, overrides, source, files
        As `config.check_config` takes them.
    **given
        For the plan: ``model_config``, of a run that compresses.

    Raises
    ------
    ConfigError
        With all faults.
    CospadiError
        If the model cannot be read, or is none that can be taken apart.
    """
    kind, faults = kind_of(config), []
    try:
        complete = check_run(config, overrides=overrides, source=source, files=files)
    except ConfigError as error:
        if error.complete is None:
            raise
        complete, faults = error.complete, error.faults
    try:
        plan = kind.plan(complete, **given)
    except ConfigError as error:
        faults = [*faults, *error.faults]
    except Exception as error:  # with what is wrong already, a plan may not be possible
        if not faults:
            raise
        faults = [*faults, *([str(error)] if isinstance(error, CospadiError) else [])]
    if faults:
        raise ConfigError(sorted(set(faults)), source)
    return plan


def _own(config: Mapping[str, Any], schema: Schema, others: Sequence[Schema]) -> dict[str, Any]:
    """A config without the keys that other schemas know and this one does not."""
    kept = {}
    for key, value in config.items():
        part = schema["properties"].get(key)
        elsewhere = [other["properties"][key] for other in others if key in other["properties"]]
        if part is None and elsewhere:
            continue
        if part is not None and "properties" in part and isinstance(value, Mapping):
            value = _own(value, part, [other for other in elsewhere if "properties" in other])
        kept[key] = value
    return kept


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(draw(page.read_text(), {kind.name: kind.stages for kind in KINDS}))
