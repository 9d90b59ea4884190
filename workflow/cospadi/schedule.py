"""Schedule: how long the jobs of a run would take on another number of cores, and what the cores would wait for.

``python -m cospadi.schedule`` says it for the jobs that ran, from their benchmark files.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

from cospadi.errors import CospadiError
from cospadi.needs import core_count
from cospadi.plan import Plan
from cospadi.report.trace import Job, recorded
from cospadi.runs import plan_of

_LAYERS = re.compile(r"layers?_(\d+)(?:-(\d+))?")


def with_order(plan: Any, jobs: Sequence[Job], cores: int) -> list[Job]:
    """Jobs with their threads and with what each of them comes after.

    A job comes after those of the stages that its own reads from, as far as both are of the same model and layers.

    Parameters
    ----------
    plan : Plan
    jobs : sequence of Job
        As `report.trace.recorded` returns them.
    cores : int
        Of the machine that they ran on: no job used more threads.
    """
    stages = {stage.rule: stage for stage in plan.stages.values()}
    number = {name: place for place, name in enumerate(plan.stages)}
    back = {name: max([number[later] for later in stage.after], default=0) for name, stage in plan.stages.items()}
    places = {job.name: _place(job, plan) for job in jobs}
    found = []
    for job in jobs:
        stage, (labels, layers) = stages[job.rule], places[job.name]
        after = set()
        for former in jobs:
            before, other, (names, others) = stages[former.rule], former.name, places[former.name]
            if before.name not in stage.after or former is job:
                continue
            if before is stage:  # a chunk after its neighbour, as the stage walks
                step = -1 if stage.name == "gradients" else 1
                near = layers[0] == others[-1] + 1 if step == 1 else layers[-1] + 1 == others[0]
                if names == labels and near:
                    after.add(other)
            elif number[before.name] < number[stage.name]:
                everything = not labels and not layers  # as tables and plots read
                # on the way to a new base, what is read is of the model as it is
                same = not names if back[before.name] >= number[stage.name] else names <= labels
                if (everything or same) and (not layers or not others or set(layers) & set(others)):
                    after.add(other)
            elif names and names == labels:  # of a base that another stage makes
                after.add(other)
        found.append(replace(job, threads=min(plan.threads(stage.name), cores), after=frozenset(after)))
    return found


def _place(job: Job, plan: Any) -> tuple[frozenset[str], list[int]]:
    """Labels (variant, base) and layers of a job, from the name of its benchmark file."""
    labels, layers = {part for part in job.name.split("/") if part != job.rule}, []
    for found in filter(None, map(_LAYERS.fullmatch, list(labels))):
        labels.discard(found[0])
        layers = list(range(int(found[1]), int(found[2] or found[1]) + 1))
    for variant in labels & set(plan.variants):
        labels |= set(filter(None, plan.base_of(variant).split("/")))
    return frozenset(labels if job.rule != "fetch_text" else ()), layers


def schedule(jobs: Sequence[Job], cores: int) -> dict[str, float]:
    """When each job starts if, whenever cores are free, the first one that can start does.

    Parameters
    ----------
    jobs : sequence of Job
        In the order in which they are preferred. A job of more threads than there are cores takes all of them.
    cores : int

    Returns
    -------
    dict
        Name to seconds after the beginning.

    Raises
    ------
    ValueError
        If jobs wait for each other, or for one that is not there.
    """
    waiting, running, done = list(jobs), [], set()
    starts: dict[str, float] = {}
    free, now = cores, 0.0
    while waiting or running:
        for job in list(waiting):
            threads = min(job.threads, cores)
            if threads <= free and job.after <= done:
                waiting.remove(job)
                starts[job.name] = now
                free -= threads
                heapq.heappush(running, (now + job.seconds, job.name, threads))
        if not running:
            raise ValueError(f"jobs wait for what never ends: {', '.join(job.name for job in waiting[:3])}")
        now, name, threads = heapq.heappop(running)
        free += threads
        done.add(name)
    return starts


def chain(jobs: Iterable[Job]) -> list[Job]:
    """The jobs that wait for each other longest, the first one first: no number of cores is faster than they are."""
    jobs = {job.name: job for job in jobs}

    @functools.cache
    def until(name: str) -> tuple[float, list[Job]]:
        seconds, before = max(map(until, jobs[name].after), key=lambda found: found[0], default=(0.0, []))
        return seconds + jobs[name].seconds, [*before, jobs[name]]

    return max(map(until, jobs), key=lambda found: found[0])[1]


def idle(jobs: Iterable[Job], starts: Mapping[str, float], cores: int) -> Counter[str]:
    """Core-seconds without work, by the rules that ran beside them, ``collect_activations + learn_dictionary``."""
    jobs = list(jobs)
    ends = {job.name: starts[job.name] + job.seconds for job in jobs}
    times = sorted({*starts.values(), *ends.values()})
    found: Counter[str] = Counter()
    for begin, end in pairwise(times):
        running = [job for job in jobs if starts[job.name] <= begin and ends[job.name] >= end]
        used = sum(min(job.threads, cores) for job in running)
        if used < cores:
            found[" + ".join(sorted({job.rule for job in running}))] += (cores - used) * (end - begin)
    return found


def table(plan: Any, cores: Sequence[int], ran_on: int) -> str:
    """A row a number of cores: minutes, the part of the cores that is busy, what the rest waits for most; and the chain
    of jobs that takes longest."""
    jobs = with_order(plan, recorded(plan.results, {stage.rule for stage in plan.stages.values()}), ran_on)
    if not jobs:
        raise CospadiError(f"{plan.results}/benchmarks has no file of a job. Run it first")
    stages = {stage.rule: stage for stage in plan.stages.values()}
    jobs.sort(key=lambda job: -stages[job.rule].priority_of(job.seconds))
    rows = []
    for count in cores:
        starts = schedule(jobs, count)
        seconds = max(starts[job.name] + job.seconds for job in jobs)
        busy = sum(min(job.threads, count) * job.seconds for job in jobs) / (count * seconds)
        waits = [f"{name} ({lost / count / 60:.1f})" for name, lost in idle(jobs, starts, count).most_common(3)]
        rows.append([count, seconds / 60, f"{busy:.0%}", "; ".join(waits)])
    headers = ["cores", "minutes", "busy", "while the others run (minutes of all cores lost)"]
    longest = chain(jobs)
    parts = ", ".join(f"{job.name} {job.seconds:.0f}" for job in longest)
    minutes = sum(job.seconds for job in longest) / 60
    shown = tabulate(rows, headers=headers, floatfmt=".1f")
    return f"{shown}\n\nat least {minutes:.1f} minutes on any number of cores, in seconds: {parts}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m cospadi.schedule", description=__doc__)
    parser.add_argument("--configfile", type=Path, help="what differs from config.yaml; default: the demo")
    tried, here = [1, 2, 4, 8], os.cpu_count()
    parser.add_argument("--cores", type=core_count, nargs="+", default=tried, help="how many to try; default: 1 2 4 8")
    parser.add_argument("--ran-on", type=core_count, default=here, help="cores of the run; default: this machine's")
    options = parser.parse_args(arguments)
    try:
        plan = plan_of(options.configfile)
        if not isinstance(plan, Plan):
            raise CospadiError("a run that trains models has no order of jobs to speak of")
        print(table(plan, options.cores, options.ran_on))
    except CospadiError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
