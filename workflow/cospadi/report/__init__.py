"""What came out of a run: one table, plots, and the generated texts side by side. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi.files import read_json, write_json
from cospadi.report.explore import write_explorer
from cospadi.report.frontier import write_frontier
from cospadi.report.plots import plot_accuracy, plot_allocation, plot_convergence, plot_errors, plot_pareto
from cospadi.report.summary import collect
from cospadi.report.tables import console_text, write_page, write_samples, write_table
from cospadi.report.trace import plot_trace, recorded
from cospadi.stage import choose_device, choose_dtype

PLOTS = {
    "errors": plot_errors,
    "pareto": plot_pareto,
    "accuracy": plot_accuracy,
    "allocation": plot_allocation,
    "convergence": plot_convergence,
    "trace": plot_trace,
}

__all__ = ["closing_message", "collect", "summarize"]


def summarize(
    run: Mapping[str, Any],
    results: Path,
    *,
    dense_model: Path,
    units: Mapping[str, Sequence[str]] | None = None,
    pruned: Mapping[str, str | Path] | None = None,
    rules: Collection[str] = (),
    output: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Gather the artifacts of a run and write everything a reader looks at.

    Writes into `output`: ``summary.tsv`` (one row a variant), ``summary.json`` (also every matrix), ``summary.html``,
    ``frontier.tsv`` (what is best for how many bytes), ``samples.html``, ``samples.md``, ``explore.html`` (plots that
    answer to the pointer) and ``plots/{errors,pareto,accuracy,allocation,convergence,trace}.{png,svg}``.

    Parameters
    ----------
    run : mapping
        The run's config; of it ``variants`` (name to ``method``, ``ratio`` ...) and ``evaluation.tasks`` are read.
        ``dense`` is added if it is not among the variants.
    results : Path
        ``results/<run>``: holds ``factors/<unit>.json``, ``codes/<unit>.json``, ``eval.json`` and ``model/`` of each
        variant in a folder of its name, and ``dense/eval.json``.
    dense_model : Path
        Folder of the model that was compressed.
    units : mapping, optional
        Unit names of each compressed variant; by default those that have a file.
    pruned : mapping, optional
        Variants that lose blocks, to the ``pruned.json`` of that step.
    rules : collection of str
        Rules whose jobs are drawn over time, as far as they have a file in ``benchmarks/``.
    output : Path, optional
        Folder; by default `results`.
    log : callable
        Takes one line of progress.

    Returns
    -------
    dict
        The content of ``summary.json``.

    Raises
    ------
    ArtifactError
        If a file of a variant is missing, damaged, or does not fit the others.
    """
    summary = collect(run, results, dense_model=dense_model, units=units, pruned=pruned)
    summary["jobs"] = [job.measured() for job in recorded(results, rules)]
    output = output or results
    write_json(output / "summary.json", summary)
    write_table(summary, output / "summary.tsv")
    write_frontier(summary, output / "frontier.tsv")
    write_page(summary, output / "summary.html")
    write_samples(summary, output / "samples.html")
    write_samples(summary, output / "samples.md")
    write_explorer(summary, output / "explore.html")
    for name, plot in PLOTS.items():
        plot(summary, [output / "plots" / f"{name}.{suffix}" for suffix in ("png", "svg")])
        log(f"plotted {name}")
    return summary


def closing_message(plan: Any) -> str:
    """What the console shows at the end of a run: the table, where each model lies, and how one is loaded here.

    Parameters
    ----------
    plan : Plan
        Only its ``results`` is read.

    Returns
    -------
    str
        Empty if there is no summary, as after making a single file.
    """
    path = Path(plan.results) / "summary.json"
    return console_text(read_json(path), *choose_dtype("auto", choose_device("auto"))) if path.exists() else ""
