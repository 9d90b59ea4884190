"""A layer's real sizes go through the whole workflow within the memory that was planned."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from cospadi.checkpoint import verify
from cospadi.needs import measured, needs
from cospadi.plan import Plan
from cospadi.runs import plan_of

from .conftest import PROJECT, environment_of

GIGA = 1e9


def check(plan: Plan, results: Path) -> None:
    """Every job within 12 GB, and as planned; models as large as planned, and whole."""
    for need in needs(plan, cores=1):
        found = measured(results, need)
        if found is None:
            assert need.stage == "report"
            continue
        memory, _, left = found  # the peak that every job's log tells
        assert memory < 12 * GIGA, need.name
        assert memory < 1.25 * need.work.memory, need.name
        if left is not None:
            assert left == pytest.approx(need.n_jobs * need.work.disk, rel=0.25), need.name
    for variant in plan.variants:
        folder = results / variant / "model"
        verify(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert size == pytest.approx(plan.final_nbytes(variant), rel=0.01)
    with open(results / "summary.tsv", newline="") as file:
        assert len(list(csv.DictReader(file, delimiter="\t"))) == 1 + len(plan.variants)


@pytest.mark.slow
def test_the_shapes_of_8b_within_12_gigabytes(tmp_path, monkeypatch):
    """An hour of one core, and the package index."""
    for name in ("config.yaml", "config"):
        (tmp_path / name).symlink_to(PROJECT / name)
    # as a user starts it: jobs of the other tests are forks, and have the memory of what they are forks of
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--cores", "1"]
    command += ["--directory", str(tmp_path), "--configfile", str(tmp_path / "config/shapes-8b.yaml")]
    done = subprocess.run(command, env=environment_of(PROJECT), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.chdir(tmp_path)
    check(plan_of("config/shapes-8b.yaml"), tmp_path / "results/shapes-8b")
