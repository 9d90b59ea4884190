"""Runs: what kind a config asks for, and who checks and plans it. The one place that knows there is more than one.

``python -m cospadi.runs docs/architecture.md`` draws the stages of every kind anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cospadi import config as compression
from cospadi.checking import Schema
from cospadi.errors import ConfigError, CospadiError, MissingFile
from cospadi.machine import read_machine
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
        faults = [*faults, *([str(error)] if isinstance(error, CospadiError) and not _told(error, faults) else [])]
    if faults:
        raise ConfigError(sorted(set(faults)), source)
    plan.machine = read_machine()
    return plan


def _told(error: CospadiError, faults: Iterable[str]) -> bool:
    """Whether the file that an error is about, or its folder, is said to be missing already."""
    path = getattr(error, "path", None)
    places = () if path is None else (path, path.parent)
    return any(isinstance(fault, MissingFile) and fault.path in places for fault in faults)


def plan_of(
    configfile: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> Staged:
    """The plan that Snakemake would run for a config file, which says what differs from ``config.yaml`` where one is.

    Parameters
    ----------
    configfile : path-like, optional
        None: ``config.yaml`` alone.
    changes : mapping, optional
        Instead of what the file says, ``{"device": "cpu"}``.
    model_config : mapping, optional
        Content of a ``config.json`` to plan with, instead of the model's own.

    Raises
    ------
    CospadiError
        As `plan_run`; also if a file cannot be read.
    """
    changes = {**(_read(Path(configfile)) if configfile else {}), **(changes or {})}
    base = Path("config.yaml")
    config = _read(base) if base.exists() or not changes else {}
    if config and changes:
        # Snakemake's own, so that the plan is what Snakemake would run
        from snakemake.utils import update_config

        update_config(config, changes)
    else:
        config = config or changes
    given = {} if model_config is None or kind_of(config) is not COMPRESS else {"model_config": model_config}
    files = [Path(file) for file in (base, configfile) if file is not None and Path(file).exists()]
    return plan_run(config, overrides=changes, source=str(configfile or base), files=files, **given)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError([f"cannot be read ({error.strerror})"], str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError([f"not YAML ({error})"], str(path)) from error
    if not isinstance(content, dict):
        raise ConfigError([f"holds {type(content).__name__}; expected a mapping of keys to values"], str(path))
    return content


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
