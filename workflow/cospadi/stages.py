"""Stages: what the table of a run's kind says about each, and what rules and `needs` ask of a plan that has one.

A stage is one rule of Snakemake. Its entry in the table of its kind of run (`plan.stages`, `training.stages`) says how
many jobs it has, what each takes, and which code decides what comes out; the rule's own file says what it reads and
writes. Adding a stage is an entry and a file.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cospadi.digests import code_digest
from cospadi.sources import TEXT_SOURCES
from cospadi.stage import has_gpu
from cospadi.work import MEBI, REFERENCE, Machine, Work

TABLES_AND_PLOTS = Work(160 * MEBI, 7)


@dataclass(frozen=True)
class Jobs:
    """Jobs of a stage that are alike.

    Attributes
    ----------
    count : int
    wildcards : namespace
        Of the largest of them.
    benchmarks : str
        Pattern of their benchmark files below ``benchmarks/``.
    of : str
        What sets them apart from the stage's other jobs: a variant, a base.
    """

    count: int
    benchmarks: str
    wildcards: Any = field(default_factory=SimpleNamespace)
    of: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a kind of run. Every callable gets the plan first.

    Attributes
    ----------
    name, rule : str
        What the rules' files and the config call it; the rule's name.
    result : str
        What it makes, for a reader.
    after : tuple of str
        Stages whose files it reads.
    jobs : callable, optional
        ``jobs(plan)`` yields `Jobs`; none for a stage that runs only when its file is asked for. Default: one.
    work : Work or callable
        Of one job, or ``work(plan, wildcards) -> Work``. Default: that of tables and plots.
    code : tuple of str or callable
        Modules that decide the result, or ``code(plan, wildcards) -> digest``.
    threads : str, optional
        Key of the config's section ``threads``; None for one thread.
    uses_gpu : bool
        Whether it uses a GPU where there is one.
    gpus : str, optional
        Section of the config whose ``gpus`` is how many; None: one.
    only : str
        Which runs it is part of, in a word or two; empty: of all.
    files : str
        Pattern, below the results, of what its jobs write and that stays; ``{of}`` is that of `Jobs`. Empty: small.
    priority : float, optional
        Jobs of a higher one start first where several can; None: above 0, below 1, the longer ones first.
    """

    name: str
    rule: str
    result: str
    after: tuple[str, ...] = ()
    jobs: Callable[[Any], Iterable[Jobs]] | None = None
    work: Work | Callable[[Any, Any], Work] = TABLES_AND_PLOTS
    code: tuple[str, ...] | Callable[[Any, Any], str] = ()
    threads: str | None = None
    uses_gpu: bool = False
    gpus: str | None = None
    only: str = ""
    files: str = ""
    priority: float | None = 0

    def jobs_of(self, plan: Any) -> Iterable[Jobs]:
        """Its jobs in a run."""
        return [Jobs(1, f"{self.rule}.tsv")] if self.jobs is None else self.jobs(plan)

    def work_of(self, plan: Any, wildcards: Any) -> Work:
        """What one job takes."""
        return self.work if isinstance(self.work, Work) else self.work(plan, wildcards)

    def priority_of(self, seconds: float) -> float:
        """Of a job that takes so long."""
        return 1 - 1 / (1 + seconds) if self.priority is None else self.priority

    def code_of(self, plan: Any, wildcards: Any) -> str:
        """Digest of the code that decides what one job makes."""
        return code_digest(*self.code) if isinstance(self.code, tuple) else self.code(plan, wildcards)


def fetch_text(jobs: Callable[[Any], Iterable[Jobs]], result: str) -> Stage:
    """The stage of every kind of run that reads text."""
    return Stage(
        name="text",
        rule="fetch_text",
        result=result,
        jobs=jobs,
        work=lambda plan, wildcards: TEXT_SOURCES[plan.config["text"]["source"]].work(None),
        code=("cospadi.sources.texts",),
        threads="fetch",
    )


def report(*after: str) -> Stage:
    """The last stage of every kind of run."""
    return Stage(name="report", rule="report", result="all of it in one zip", after=after)


def table_of(*stages: Stage) -> dict[str, Stage]:
    """Stages by name, in the order of the workflow."""
    return {stage.name: stage for stage in stages}


def drawing(stages: Mapping[str, Stage]) -> str:
    """The stages as a Mermaid flowchart: an arrow where one reads what another wrote, unless it follows from others."""
    place = {name: number for number, name in enumerate(stages)}
    lines = ["flowchart TB"]
    lines += [f'    {stage.name}["{stage.rule}<br><small>{stage.result}</small>"]' for stage in stages.values()]
    for stage in stages.values():
        for before in stage.after:
            if place[before] >= place[stage.name]:
                lines.append(f"    {before} -.-> {stage.name}")
            elif not _leads(stages, stages[before], stage, around=True):
                lines.append(f"    {before} --> {stage.name}")
    lines += ["    classDef some stroke-dasharray: 5 4"]
    lines += [f"    class {name} some" for name, stage in stages.items() if stage.only]
    return "\n".join(lines)


def _leads(stages: Mapping[str, Stage], first: Stage, last: Stage, *, around: bool = False) -> bool:
    """Whether arrows go from one stage to a later one, by stages that are there wherever these two are."""
    place = list(stages).index
    between = [stages[name] for name in last.after if place(first.name) < place(name) < place(last.name)]
    between = [stage for stage in between if stage.only in ("", first.only, last.only)]
    return (first.name in last.after and not around) or any(_leads(stages, first, stage) for stage in between)


def draw(document: str, tables: Mapping[str, Mapping[str, Stage]]) -> str:
    """A Markdown document with its drawings made anew: each follows a line ``<!-- stages: name of the table -->``."""

    def drawn(found: re.Match[str]) -> str:
        return f"{found[1]}\n```mermaid\n{drawing(tables[found[2]])}\n```"

    return re.sub(r"(<!-- stages: (\w+) -->)\n```mermaid\n.*?\n```", drawn, document, flags=re.DOTALL)


class Staged:
    """What every kind of plan answers about its stages.

    Attributes
    ----------
    config : mapping
        Complete.
    results : str
        ``results/<run>``.
    stages : mapping
        Name to `Stage`.
    machine : Machine
        Whose rates turn work into seconds; `runs.plan_run` sets the one that was measured.
    place : callable
        Where the file of a path of this plan lies. Rules need not ask, Snakemake puts a module's prefix before theirs.
    told : list of str
        What a person should know of what was planned, a line each.
    """

    stages: Mapping[str, Stage]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.place: Callable[[str], str] = str
        self.told: list[str] = []
        self.machine: Machine = REFERENCE
        self.config = config
        self.results = f"results/{config['run']}"
        self._started = time.time()

    def gpus(self, stage: str) -> int:
        """GPUs that a job of `stage` asks for."""
        device, asking = self.config["device"], self.stages[stage]
        if not asking.uses_gpu or device == "cpu" or (device == "auto" and not has_gpu()):
            return 0
        return 1 if asking.gpus is None else self.config[asking.gpus]["gpus"]

    def threads(self, stage: str) -> int:
        """CPU threads of a job of `stage`."""
        key = self.stages[stage].threads
        return 1 if key is None else self.config["threads"][key]

    def work(self, stage: str, wildcards: Any) -> Work:
        """What the job of `stage` with these wildcards does (`resources`)."""
        return self.stages[stage].work_of(self, wildcards)

    def resources(self, stage: str) -> dict[str, Any]:
        """What a job of `stage` asks Snakemake for, by keyword: memory, time, a GPU where it uses one."""
        asked = {"mem_mb": self.mem_mb(stage), "runtime": self.runtime(stage)}
        return asked | ({"gpu": self.gpus(stage)} if self.stages[stage].uses_gpu else {})

    def mem_mb(self, stage: str) -> Callable[..., int]:
        """Memory of a job of `stage` in MiB, a function for Snakemake: from shapes, times the attempt."""

        def mem_mb(wildcards: Any, attempt: int) -> int:
            return self.work(stage, wildcards).mem_mb(attempt)

        return mem_mb

    def runtime(self, stage: str) -> Callable[..., int]:
        """Time limit of a job of `stage` in minutes, a function for Snakemake: the same way."""

        def runtime(wildcards: Any, attempt: int, threads: int) -> int:
            return self.work(stage, wildcards).runtime(attempt, threads, bool(self.gpus(stage)), self.machine)

        return runtime

    def priority(self, stage: str) -> Callable[[Any], float]:
        """Priority of a job of `stage`, a function for Snakemake."""
        return lambda wildcards: self.stages[stage].priority_of(self.work(stage, wildcards).wall(machine=self.machine))

    def code(self, stage: str) -> Callable[[Any], str]:
        """Digest of the code that decides what a job of `stage` makes, a function for Snakemake."""
        return lambda wildcards: self.stages[stage].code_of(self, wildcards)

    def template_model(self) -> list[str]:
        """The model whose chat template makes text of conversations; none, unless a kind of run has one."""
        return []

    def template_digest(self) -> list[str | None]:
        """Digest of what makes text of conversations, where there are any."""
        return []

    def has_written(self, name: str) -> bool:
        """Whether file `name` of the results is newer than this plan; making one layer leaves no new table to show."""
        path = Path(self.results, name)
        return path.exists() and path.stat().st_mtime >= self._started

    def closing_message(self) -> str:
        """What the console shows at the end of a run; nothing where it made no table."""
        raise NotImplementedError
