"""When the jobs of a run ran: read from their benchmark files, and drawn."""

from __future__ import annotations

import csv
import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cospadi.report.figures import new_figure, save, styles_of


@dataclass(frozen=True)
class Job:
    """A job that ran.

    Attributes
    ----------
    name : str
        Of its benchmark file: ``learn_dictionary/cospadi-20/layer_03``.
    rule : str
    seconds : float
        How long it took, its start-up included.
    started : float
        In seconds since the first of the run started.
    threads : int
        Cores that it occupies.
    after : frozenset of str
        Names of the jobs whose files it reads.
    """

    name: str
    rule: str
    seconds: float
    started: float = 0.0
    threads: int = 1
    after: frozenset[str] = frozenset()

    def measured(self) -> dict[str, Any]:
        """What the benchmark file says, for JSON."""
        return {"name": self.name, "rule": self.rule, "seconds": self.seconds, "started": self.started}


def recorded(results: str | Path, rules: Collection[str]) -> list[Job]:
    """The jobs of some rules that left a benchmark file under ``<results>/benchmarks``, in the order of their start."""
    folder, found = Path(results, "benchmarks"), []
    for path in folder.rglob("*.tsv"):
        name = path.relative_to(folder).with_suffix("")
        rule = next((part for part in name.parts if part in rules), None)
        if rule is not None:
            with open(path, newline="") as file:
                seconds = sum(float(row["s"]) for row in csv.DictReader(file, delimiter="\t"))
            found.append((path.stat().st_mtime - seconds, str(name), rule, seconds))
    first = min(found, default=(0.0,))[0]
    return [Job(name, rule, seconds, start - first) for start, name, rule, seconds in sorted(found)]


def lanes(jobs: Sequence[Job]) -> list[int]:
    """The line that each job is drawn on: the lowest that is free when it starts."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    found = []
    for job in jobs:
        while busy and busy[0][0] <= job.started + 0.5:  # times of files are not those of processes
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (job.started + job.seconds, lane))
        found.append(lane)
    return found


def plot_trace(summary: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Jobs over time, those that ran beside each other on lines of their own; a colour a rule."""
    jobs = [Job(**job) for job in summary["jobs"]]
    places = lanes(jobs)
    figure = new_figure(10, 1.6 + 0.3 * (max(places, default=0) + 1))
    axis = figure.subplots()
    styles = styles_of(dict.fromkeys(job.rule for job in jobs))
    for rule, style in styles.items():
        bars = [
            (job.started / 60, job.seconds / 60, lane)
            for job, lane in zip(jobs, places, strict=True)
            if job.rule == rule
        ]
        starts, widths, heights = zip(*bars, strict=True)
        # the second time round a colour is pale
        alpha = 1.0 if style.linestyle == "-" else 0.5
        axis.barh(
            heights,
            widths,
            left=starts,
            height=0.8,
            color=style.color,
            alpha=alpha,
            edgecolor="white",
            lw=0.5,
            label=rule,
        )
    axis.set_xlabel("minutes since the first job started")
    axis.set_ylabel("jobs at a time")
    axis.set_yticks(range(max(places, default=0) + 1), range(1, max(places, default=0) + 2))
    if jobs:
        figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    save(figure, paths)
