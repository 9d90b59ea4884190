"""Needs: what every stage of a run asks of a machine or a cluster, as a table, before anything runs.

``python -m cospadi.needs --configfile config/llama-3-8b.yaml --model config/models/Meta-Llama-3-8B.json`` counts jobs,
CPUs, memory, time and disk with the functions that the rules themselves use. With ``--results results/demo`` it puts
what a finished run measured beside them. Where there is no ``config.yaml`` the config file has to be complete.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from cospadi.errors import CospadiError
from cospadi.files import read_json
from cospadi.runs import plan_of
from cospadi.stages import Staged
from cospadi.work import Work

GIGA = 1e9


@dataclass(frozen=True)
class Need:
    """One row: jobs that are alike, and what the largest of them needs."""

    name: str
    stage: str
    n_jobs: int
    threads: int
    work: Work
    gpu: bool
    benchmarks: str  # pattern of their benchmark files

    @property
    def minutes(self) -> float:
        """Expected for one job."""
        return self.work.wall(self.threads, self.gpu) / 60

    @property
    def limit(self) -> int:
        """Minutes asked for."""
        return self.work.runtime(1, self.threads, self.gpu)


def needs(plan: Staged) -> list[Need]:
    """What the jobs of a run need, in the order of the workflow."""
    return [
        Need(
            name=f"{stage.rule} {jobs.of}".strip(),
            stage=stage.name,
            n_jobs=jobs.count,
            threads=plan.threads(stage.name),
            work=plan.work(stage.name, jobs.wildcards),
            gpu=bool(plan.gpus(stage.name)),
            benchmarks=jobs.benchmarks,
        )
        for stage in plan.stages.values()
        for jobs in stage.jobs_of(plan)
    ]


def measured(results: Path, need: Need) -> tuple[float, float] | None:
    """Largest memory (bytes) and seconds in the benchmark files of a row's jobs; None where there are none."""
    found = []
    for path in (results / "benchmarks").glob(need.benchmarks):
        with open(path, newline="") as file:
            found += list(csv.DictReader(file, delimiter="\t"))
    if not found:
        return None
    # Snakemake writes NA for a job too short to be looked at
    memory = max((float(row["max_rss"]) for row in found if row["max_rss"] != "NA"), default=0.0)
    return memory * 2**20, max(float(row["s"]) for row in found)


def table(rows: Sequence[Need], results: Path | None = None) -> str:
    """The rows as text, with totals below."""
    headers = ["rule", "jobs", "CPUs", "GPU", "GB asked", "minutes expected", "minutes asked", "GB written by all"]
    lines: list[list[Any]] = []
    for need in rows:
        line = [
            need.name,
            need.n_jobs,
            need.threads,
            int(need.gpu),
            need.work.mem_mb() * 2**20 / GIGA,
            need.minutes,
            need.limit,
            need.n_jobs * need.work.disk / GIGA,
        ]
        if results is not None:
            found = measured(results, need)
            line += [found[0] / GIGA, found[1] / 60] if found else ["", ""]
        lines.append(line)
    if results is not None:
        headers += ["GB measured", "minutes measured"]
    hours = sum(need.n_jobs * need.threads * need.minutes / 60 for need in rows if not need.gpu)
    gpu_hours = sum(need.n_jobs * need.minutes / 60 for need in rows if need.gpu)
    text = tabulate(lines, headers=headers, floatfmt=".3g")
    return f"{text}\n\nexpected in all: {hours:.3g} CPU hours, {gpu_hours:.3g} GPU hours"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m cospadi.needs", description=__doc__)
    parser.add_argument("--configfile", type=Path, help="what differs from config.yaml")
    parser.add_argument("--model", type=Path, help="a config.json to take the shapes from; default: the run's model")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="instead of the config's")
    parser.add_argument("--results", type=Path, help="a finished run, to compare with what it measured")
    options = parser.parse_args(arguments)
    try:
        print(_table_of(options))
    except CospadiError as error:
        raise SystemExit(str(error)) from None


def _table_of(options: argparse.Namespace) -> str:
    changes = {"device": options.device} if options.device else {}
    model_config = read_json(options.model, "Give a model's config.json") if options.model else None
    plan = plan_of(options.configfile, changes, model_config)
    return "\n".join([table(needs(plan), options.results), *plan.told])


if __name__ == "__main__":
    main()
