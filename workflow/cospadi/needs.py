"""Needs: what every stage of a run asks of a machine or a cluster, as a table, before anything runs.

``python -m cospadi.needs --configfile config/llama-3-8b.yaml --model config/models/Meta-Llama-3-8B.json`` counts jobs,
CPUs, memory, time and disk with the functions that the rules themselves use, and says how large every model will be
(`make plan CONFIG=`). With ``--results results/demo`` it puts what a finished run measured beside them. Where there is
no ``config.yaml`` the config file has to be complete.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from cospadi.errors import CospadiError
from cospadi.files import read_json
from cospadi.plan import DENSE, Plan
from cospadi.runs import plan_of
from cospadi.stage import ended
from cospadi.stages import Staged
from cospadi.work import Machine, Work

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
    machine: Machine
    benchmarks: str  # pattern of their benchmark files
    files: str  # and of what they write and that stays, both below the results

    @property
    def minutes(self) -> float:
        """Expected for one job."""
        return self.work.wall(self.threads, self.gpu, self.machine) / 60

    @property
    def limit(self) -> int:
        """Minutes asked for."""
        return self.work.runtime(1, self.threads, self.gpu, self.machine)


def needs(plan: Staged, cores: int | None = None) -> list[Need]:
    """What the jobs of a run need, in the order of the workflow; on so many cores, by default this machine's."""
    cores = cores or os.cpu_count() or 1
    return [
        Need(
            name=f"{stage.rule} {jobs.of}".strip(),
            stage=stage.name,
            n_jobs=jobs.count,
            threads=min(plan.threads(stage.name), cores),
            work=plan.work(stage.name, jobs.wildcards),
            gpu=bool(plan.gpus(stage.name)),
            machine=plan.machine,
            benchmarks=jobs.benchmarks,
            files=stage.files.format(of=jobs.of),
        )
        for stage in plan.stages.values()
        for jobs in stage.jobs_of(plan)
    ]


def measured(results: Path, need: Need) -> tuple[float, float, float | None] | None:
    """Largest memory (bytes) and seconds of a row's jobs, by their logs and benchmark files; bytes of what they left.

    None where there are none; the bytes are None where the stage's files are small, shared or temporary.
    """
    found, memory, folder = [], [0.0], results / "benchmarks"
    for path in folder.glob(need.benchmarks):
        with open(path, newline="") as file:
            found += list(csv.DictReader(file, delimiter="\t"))
        log = (results / "logs" / path.relative_to(folder)).with_suffix(".log")
        if log.exists():
            memory.append(ended(log.read_text(errors="replace").splitlines()) or 0.0)
    if not found:
        return None
    # What jobs say of themselves misses no peak. Snakemake looks now and then, at what a job started too; NA is a job
    # too short for that
    memory += [float(row["max_rss"]) * 2**20 for row in found if row["max_rss"] != "NA"]
    left = sum(path.stat().st_size for path in results.glob(need.files)) if need.files else None
    return max(memory), max(float(row["s"]) for row in found), left


def table(rows: Sequence[Need], results: Path | None = None) -> str:
    """The rows as text, with totals below."""
    headers = ["rule", "jobs", "CPUs", "GPU", "GB", "GB asked", "minutes", "minutes asked", "GB written by all"]
    lines: list[list[Any]] = []
    for need in rows:
        line = [
            need.name,
            need.n_jobs,
            need.threads,
            int(need.gpu),
            need.work.memory / GIGA,
            need.work.mem_mb() * 2**20 / GIGA,
            need.minutes,
            need.limit,
            need.n_jobs * need.work.disk / GIGA,
        ]
        if results is not None:
            found = measured(results, need)
            memory, seconds, left = found or (None, None, None)
            line += ["" if value is None else value for value in (found and memory / GIGA, found and seconds / 60)]
            line.append("" if left is None else left / GIGA)
        lines.append(line)
    if results is not None:
        headers += ["GB measured", "minutes measured", "GB there"]
    hours = sum(need.n_jobs * need.threads * need.minutes / 60 for need in rows if not need.gpu)
    gpu_hours = sum(need.n_jobs * need.minutes / 60 for need in rows if need.gpu)
    largest = max(rows, key=lambda need: need.work.memory)
    staying = [need for need in rows if need.files or need.stage == "fetch"]
    stays = sum(need.n_jobs * (need.work.disk - need.work.passing) for need in staying)
    goes = sum(need.n_jobs * need.work.disk for need in rows) - stays
    return (
        f"{tabulate(lines, headers=headers, floatfmt='.3g')}\n\n"
        f"expected in all: {sum(need.n_jobs for need in rows)} jobs, {hours:.3g} CPU hours, {gpu_hours:.3g} GPU hours; "
        f"at most {largest.work.memory / GIGA:.3g} GB of memory a job ({largest.name}); {stays / GIGA:.3g} GB of disk "
        f"stay, {goes / GIGA:.3g} GB are there for a while\n"
        f"times are of {rows[0].machine.words}"
    )


def sizes_table(plan: Plan) -> str:
    """A row a variant: bytes of its model's weights, and how many of those of the model as it is."""
    dense = plan.final_nbytes(DENSE)
    rows = [
        [name, size / 1e6, f"{size / dense:.1%}"]
        for name in (DENSE, *plan.variants)
        if (size := plan.final_nbytes(name))
    ]
    return tabulate(rows, headers=["variant", "MB of weights", "of dense"], floatfmt=".4g")


def core_count(text: str) -> int:
    """A number of cores on a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of cores, from 1 up")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m cospadi.needs", description=__doc__)
    parser.add_argument("--configfile", type=Path, help="what differs from config.yaml")
    parser.add_argument("--model", type=Path, help="a config.json to take the shapes from; default: the run's model")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="instead of the config's")
    parser.add_argument("--cores", type=core_count, help="most threads of a job; default: this machine's cores")
    parser.add_argument("--results", type=Path, help="a finished run, to compare with what it measured")
    options = parser.parse_args(arguments)
    try:
        print(_table_of(options))
    except CospadiError as error:
        raise SystemExit(str(error)) from None


def _table_of(options: argparse.Namespace) -> str:
    if options.results is not None and not Path(options.results, "benchmarks").is_dir():
        raise CospadiError(f"--results: {options.results} has no folder benchmarks, as a run's results have")
    changes = {"device": options.device} if options.device else {}
    model_config = read_json(options.model, "Give a model's config.json") if options.model else None
    plan = plan_of(options.configfile, changes, model_config)
    told = ["\n".join(plan.told)] if plan.told else []
    sizes = [sizes_table(plan)] if isinstance(plan, Plan) else []
    return "\n\n".join([table(needs(plan, options.cores), options.results), *sizes, *told])


if __name__ == "__main__":
    main()
