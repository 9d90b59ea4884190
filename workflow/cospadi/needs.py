"""Needs: what every stage of a run asks of a machine or a cluster, as a table, before anything runs.

``python -m cospadi.needs --configfile config/llama-3-8b.yaml --model config/models/Meta-Llama-3-8B.json`` counts jobs,
CPUs, memory, time and disk with the functions that the rules themselves use. With ``--results results/demo`` it puts
what a finished run measured beside them.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from tabulate import tabulate

from cospadi.config import check_config
from cospadi.errors import CospadiError
from cospadi.plan import GPU_STAGES, Plan
from cospadi.resources import Work

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


def needs(plan: Plan) -> list[Need]:
    """What the jobs of a run need, in the order of the workflow."""
    return [
        Need(name, stage, n_jobs, _threads(plan, stage), plan.work(stage, wildcards), _on_gpu(plan, stage), files)
        for name, stage, n_jobs, wildcards, files in _jobs(plan)
        if n_jobs
    ]


def _jobs(plan: Plan) -> Iterator[tuple[str, str, int, SimpleNamespace, str]]:
    """Rule (and variant), stage, number of jobs, wildcards of the largest, benchmark files."""
    yield "fetch_model", "fetch", int(plan.config["model"]["source"] != "local"), SimpleNamespace(), "fetch_model.tsv"
    yield "prepare_calibration", "prepare", 1, SimpleNamespace(), "prepare_calibration.tsv"
    if plan.pruned_bases:
        yield "measure_distances", "prune", 1, SimpleNamespace(base=""), "measure_distances.tsv"
    for base in dict.fromkeys(plan.base_of(variant) for variant in plan.factorized):
        if base:
            wildcards = SimpleNamespace(base=base)
            yield f"fit_transforms {base}", "prune", int(plan.fits(base)), wildcards, f"{base}fit_transforms.tsv"
        chunks = plan.chunks_of(base)
        widest = max(chunks, key=len)
        wildcards = SimpleNamespace(base=base, first=widest[0], last=widest[-1])
        yield "inspect_model", "inspect", 1, SimpleNamespace(base=base), f"{base}inspect_model.tsv"
        yield f"collect_activations {base}", "collect", len(chunks), wildcards, f"{base}collect_activations/*.tsv"
        wildcards = SimpleNamespace(base=base, layer=0)
        yield f"compute_gram {base}", "gram", plan.n_layers_of(base), wildcards, f"{base}compute_gram/*.tsv"
    for stage, rule in (("learn", "learn_dictionary"), ("quantize", "quantize_codes")):
        for variant in plan.factorized:
            units = plan.units(variant)
            wildcards = SimpleNamespace(variant=variant, unit=units[0])
            yield f"{rule} {variant}", stage, len(units), wildcards, f"{rule}/{variant}/*.tsv"
    yield "assemble_model", "assemble", len(plan.factorized), SimpleNamespace(), "assemble_model/*.tsv"
    yield "evaluate_model", "evaluate", len(plan.models), SimpleNamespace(), "evaluate_model/*.tsv"


def _threads(plan: Plan, stage: str) -> int:
    return plan.config["threads"].get(stage, 1)


def _on_gpu(plan: Plan, stage: str) -> bool:
    return bool(plan.gpus()) and stage in GPU_STAGES


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
            need.name.strip(),
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


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with another one over it, key by key, as Snakemake does."""
    result = dict(copy.deepcopy(base))
    for key, value in changes.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merged(old, value) if both else copy.deepcopy(value)
    return result


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
    config = yaml.safe_load(Path("config.yaml").read_text())
    changes = yaml.safe_load(options.configfile.read_text()) if options.configfile else {}
    if options.device:
        changes["device"] = options.device
    config = check_config(merged(config, changes), overrides=changes, source=str(options.configfile or "config.yaml"))
    model = json.loads(options.model.read_text()) if options.model else None
    return table(needs(Plan(config, model)), options.results)


if __name__ == "__main__":
    main()
