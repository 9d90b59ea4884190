"""Status: what of a run is done and what is left, read from its files; it can be asked while the run is going.

``python -m cospadi.status --configfile my.yaml`` (`make status CONFIG=my.yaml`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from cospadi.errors import CospadiError
from cospadi.needs import Need, measured, needs
from cospadi.plan import DENSE, Plan
from cospadi.progress import learned
from cospadi.runs import plan_of
from cospadi.stage import ended
from cospadi.stages import Staged

# A log that got no line for so long is of a job that was stopped
_QUIET_SECONDS = 600


def variants_table(plan: Plan) -> str:
    """A row a model: layers learned and packed of how many, their error so far, what else is there."""
    results, rows = Path(plan.results), []
    for name in (DENSE, *plan.variants):
        done = packed = error = ""
        if name in plan.factorized + plan.choosing:
            layers = plan.n_layers_of(plan.base_of(name))
            factors, codes = (learned(results / name / part) for part in ("factors", "codes"))
            done, packed = f"{factors.layers}/{layers}", f"{codes.layers}/{layers}"
            error = codes.error if codes.layers == layers else factors.error
        assembled = "" if name == DENSE else "yes" if Path(plan.model_of(name), "config.json").exists() else "no"
        perplexity = _evaluated(results / name / "eval.json")
        rows.append([name, done, packed, error, assembled, perplexity])
    headers = ["variant", "layers learned", "packed", "error so far", "model", "perplexity"]
    return tabulate(rows, headers=headers, floatfmt=".4g", disable_numparse=[1, 2])


def _evaluated(file: Path) -> str:
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError):
        return "no"
    perplexity = (result.get("perplexity") or {}).get("token")
    return "yes" if perplexity is None else f"{perplexity:.4g}"


def stages_table(plan: Staged) -> tuple[str, float]:
    """A row for jobs that are alike: done, of how many, minutes one took and all that are left will; minutes in all."""
    results, rows, left = Path(plan.results), [], 0.0
    for need in needs(plan):
        if need.stage == "report":  # Snakemake writes that without a benchmark
            continue
        done = min(len(list((results / "benchmarks").glob(need.benchmarks))), need.n_jobs)
        if need.stage in _shared(plan):  # perhaps by another run
            done = need.n_jobs
        found = measured(results, need)
        minutes = found[1] / 60 if found else need.minutes
        todo = (need.n_jobs - done) * minutes
        left += todo * _share_of_machine(need)
        rows.append([need.name, f"{done}/{need.n_jobs}", minutes if found else "", todo or ""])
    headers = ["rule", "jobs done", "minutes the longest took", "minutes of the rest, one after the other"]
    return tabulate(rows, headers=headers, floatfmt=".2g", disable_numparse=[1]), left


def _shared(plan: Staged) -> set[str]:
    """Stages whose files all runs of this folder share, and which are there."""
    texts = [plan.text_file(part) for part in ("calibration", "heldout")]
    files = {"text": [file for part in texts for file in ([part] if isinstance(part, str) else part)]}
    if isinstance(plan, Plan):
        files["fetch"] = [plan.model_folder]
    return {stage for stage, paths in files.items() if all(Path(path).exists() for path in paths)}


def _share_of_machine(need: Need) -> float:
    """Part of this machine's cores that one job takes."""
    cores = os.cpu_count() or 1
    return min(need.threads, cores) / cores


def unfinished(results: Path) -> Iterator[str]:
    """Last line of the log of every job that has not ended: it is running, was stopped, or failed."""
    for log in sorted((results / "logs").rglob("*.log")):
        lines = log.read_text(errors="replace").strip().splitlines()
        if not lines or ended(lines) is not None or log.name == "report.log":
            continue
        age = time.time() - log.stat().st_mtime
        failed = any(line.startswith("Traceback") for line in lines)
        state = "failed" if failed else "running" if age < _QUIET_SECONDS else f"stopped {age / 60:.0f} minutes ago"
        yield f"  {log.relative_to(results / 'logs')}: {state}; {lines[-1].strip()}"


def status(plan: Staged) -> str:
    """All of it, as text."""
    stages, left = stages_table(plan)
    parts = [variants_table(plan)] if isinstance(plan, Plan) else []
    parts.append(stages)
    if jobs := list(unfinished(Path(plan.results))):
        parts.append("\n".join(["jobs that have not ended:", *jobs]))
    report = "written" if Path(plan.results, "report.zip").exists() else "not there yet"
    parts.append(f"the report is {report}; about {left:.2g} minutes of other jobs are left on this machine")
    return f"{plan.results}\n\n" + "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the status."""
    parser = argparse.ArgumentParser(prog="python -m cospadi.status", description=__doc__)
    parser.add_argument("--configfile", type=Path, help="what differs from config.yaml; default: the demo")
    options = parser.parse_args(arguments)
    try:
        print(status(plan_of(options.configfile)))
    except CospadiError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
