"""A stage from outside: the pieces that docs/architecture.md shows, put where it says, make a file."""

import json

import numpy as np
import pytest

from cospadi.files import ModelFolder

from .conftest import Run, copy_project, tiny_config


@pytest.fixture
def run(snapshot, tiny_model, articles, tour_example, tmp_path):
    """A project with the stage of the tour."""
    project = copy_project(snapshot, tmp_path / "project")
    table = project / "workflow/cospadi/plan/stages.py"
    before, line, after = table.read_text().partition("STAGES = table_of(\n")
    table.write_text(f"{before}{line}{tour_example('plan/stages.py').rstrip()},\n{after}")
    for name in ("rules/norms.smk", "scripts/measure_norms.py"):
        (project / ("workflow" if name.startswith("rules") else "") / name).write_text(tour_example(name))
    rules = project / "workflow/compress.smk"
    include = 'include: "rules/inspect.smk"\n'
    assert include in rules.read_text()
    rules.write_text(rules.read_text().replace(include, f'{include}include: "rules/norms.smk"\n'))
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run", tiny_config(tiny_model("llama"), articles), project)


def test_a_stage_of_the_tour_makes_its_file_when_it_is_asked_for(run):
    run.snakemake("results/tiny/norms.json")
    found = json.loads((run.results / "norms.json").read_text())
    assert len(found) == 7 * 4
    name = "model.layers.3.mlp.up_proj"
    weight = ModelFolder(run.config["model"]["path"]).read_weight(name)
    assert found[name] == pytest.approx(np.linalg.norm(weight.astype(np.float64)), rel=1e-5)
    assert (run.results / "logs/measure_norms.log").exists()
    # a run as a whole does without it
    assert "measure_norms" not in run.planned()
