"""Running the workflow as a user does: the project's Snakefile, a working directory, a config file."""

from __future__ import annotations

import copy
import csv
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[2]


def copy_project(source: Path, folder: Path) -> Path:
    """The parts of the project that a run needs, in a folder where they may be edited."""
    folder.mkdir()
    for name in ("Snakefile", "workflow", "scripts", "envs", "profiles"):
        path = source / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, folder / name)
    return folder


def environment_of(project: Path) -> dict[str, str]:
    """The environment in which a project's Snakefile and scripts import the project's code."""
    return {**os.environ, "PYTHONPATH": str(project / "workflow")}


@functools.cache
def _warm() -> subprocess.Popen[str]:
    """The process that starts snakemake in this one's stead (warm.py); it ends when this one does."""
    command, pipe = [sys.executable, str(Path(__file__).with_name("warm.py"))], subprocess.PIPE
    # what is imported once has one number of threads: that of the tests' jobs
    environment = environment_of(PROJECT) | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1)


def snakemake(project: Path, *arguments: str) -> tuple[int, str]:
    """Run a project's snakemake to its end: exit status and output."""
    with tempfile.NamedTemporaryFile("r") as file:
        given = {"project": str(project), "arguments": arguments, "output": file.name}
        print(json.dumps({**given, "environment": environment_of(project)}), file=_warm().stdin)
        return int(_warm().stdout.readline()), file.read()


@dataclass
class Run:
    """A working directory with a config, and the project whose Snakefile runs in it."""

    folder: Path
    config: dict[str, Any]
    project: Path

    @property
    def results(self) -> Path:
        return self.folder / "results" / self.config["run"]

    def arguments(self, *arguments: str) -> list[str]:
        """Of `snakemake` with this run's Snakefile, directory and config."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.config))
        given = ["--snakefile", str(self.project / "Snakefile"), "--directory", str(self.folder)]
        return [*given, "--configfile", str(path), "--cores", "2", *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start snakemake as a user does, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", *self.arguments(*arguments)],
            env=environment_of(self.project),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def snakemake(self, *arguments: str, succeeds: bool = True) -> str:
        """Run snakemake to its end; its output."""
        status, output = snakemake(self.project, *self.arguments(*arguments))
        assert (status == 0) == succeeds, output
        return output

    def planned(self, *arguments: str) -> dict[str, int]:
        """Rule name to number of jobs that a dry run lists."""
        output = self.snakemake("--quiet", "rules", "--dry-run", *arguments)
        if "Nothing to be done" in output:
            return {}
        table = output.split("Job stats:")[1].split("Reasons:")[0]
        rows = (line.split() for line in table.splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}

    def copy(self, folder: Path) -> Run:
        """The same run in another folder, with its times and Snakemake's records."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Run(folder, copy.deepcopy(self.config), self.project)


def tiny_config(model: Path, text: Path) -> dict[str, Any]:
    """A run of seconds on a model folder and a JSONL file."""
    return {
        "run": "tiny",
        "model": {"name": model.name, "source": "local", "path": str(model)},
        "text": {"name": "articles", "source": "jsonl", "path": str(text)},
        "calibration": {"samples": 8, "length": 64, "blocks_per_job": 2, "batch_tokens": 128},
        "device": "cpu",
        "variants": {
            "cospadi-20": {"method": "cospadi", "ratio": 0.2, "max_iter": 5},
            "svd_llm-40": {"method": "svd_llm", "ratio": 0.4, "codes": {"value_bits": 14, "rounding": "truncate"}},
        },
        "evaluation": {
            "perplexity": {"max_tokens": 500, "window": 64},
            "generate": {"prompts": ["The old river"], "max_new_tokens": 5},
        },
        "threads": {"prepare": 1, "collect": 1, "evaluate": 1},
    }


def rows(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file, delimiter="\t")}


def check_finished(run: Run, variants: list[str]) -> None:
    """What every finished run has, whatever the model."""
    table = rows(run.results / "summary.tsv")
    assert list(table) == ["dense", *variants]
    for name in variants:
        asked = table[name]["ratio_asked"]  # of the config, with its sweeps written out
        # on matrices this small one atom is a few percent; the promise is "not more bytes than asked"
        assert float(asked or 0) <= float(table[name]["ratio_true"]) < float(asked or 0.9) + 0.1
        assert bool(asked) != ("max_perplexity_increase" in run.config["variants"].get(name, {}))
        assert (run.results / name / "model" / "config.json").exists()
        assert float(table[name]["token_perplexity"]) > 1
        assert float(table[name]["kl"]) > 0
    assert table["dense"]["kl"] == ""
    with zipfile.ZipFile(run.results / "report.zip") as archive:
        assert any(name.endswith("report.html") for name in archive.namelist())
        assert sum(name.endswith(".svg") for name in archive.namelist()) >= 3
    jobs = json.loads((run.results / "summary.json").read_text())["jobs"]
    assert {"inspect_model", "compute_gram", "learn_dictionary", "evaluate_model"} <= {job["rule"] for job in jobs}
    # temporary artifacts are gone
    assert not list(run.results.glob("activations/*.h5"))


@pytest.fixture(scope="session")
def articles(tiny_text: Path) -> Path:
    """All tiny articles in one JSONL file."""
    path = tiny_text / "articles.jsonl"
    path.write_text("".join((tiny_text / f"{part}.jsonl").read_text() for part in ("calibration", "heldout")))
    return path


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it is now: an edit while tests run would, rightly, make finished jobs run again."""
    return copy_project(PROJECT, tmp_path_factory.mktemp("snapshot") / "project")


@pytest.fixture(scope="session")
def new_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path], articles: Path, snapshot: Path
) -> Callable[..., Run]:
    """Factory ``new_run(family, **model_changes) -> Run`` in a folder with nothing but model and text."""

    def make(family: str, **changes: Any) -> Run:
        folder = tmp_path_factory.mktemp(f"run-{family}")
        model = shutil.copytree(tiny_model(family, **changes), folder / "tiny-model")
        text = shutil.copy(articles, folder / "articles.jsonl")
        return Run(folder, tiny_config(model.relative_to(folder), text.relative_to(folder)), snapshot)

    return make


@pytest.fixture(scope="session")
def finished(new_run: Callable[..., Run]) -> Run:
    """A Llama run that has been through; shared, so copy it before changing anything."""
    run = new_run("llama")
    process = run.start()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    (run.folder / "console.txt").write_text(output)
    return run
