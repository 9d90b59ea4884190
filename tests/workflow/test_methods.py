"""A method from outside: one file and one line, and it goes from the config to the report."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

from cospadi.files import ModelFolder, TensorFile
from cospadi.formats.factorization import tensor_names, unpack

from .conftest import Run, check_finished, copy_project, rows

TOY = Path(__file__).with_name("toy_method.py")


@pytest.fixture(scope="module")
def run(snapshot, tiny_model, articles, tmp_path_factory):
    """A project with one module and one line more, and a run of the new method that went through."""
    from .conftest import tiny_config

    folder = tmp_path_factory.mktemp("toy")
    project = copy_project(snapshot, folder / "project")
    methods = project / "workflow/cospadi/methods"
    shutil.copy2(TOY, methods / "magnitudes.py")
    registry = (methods / "__init__.py").read_text()
    (methods / "__init__.py").write_text(
        registry.replace("import (\n", "import (\n    magnitudes,\n").replace(
            "_MODULES = (", "_MODULES = (\n    magnitudes,"
        )
    )
    assert (methods / "__init__.py").read_text().count("magnitudes") == 2
    config = tiny_config(tiny_model("llama"), articles)
    config["variants"] = {"magnitudes-30": {"method": "magnitudes", "ratio": 0.3, "power": 0.5}}
    (folder / "run").mkdir()
    run = Run(folder / "run", config, project)
    run.snakemake()
    return run


def test_a_method_of_one_file_and_one_line_runs_from_config_to_report(run):
    check_finished(run, ["magnitudes-30"])
    assert rows(run.results / "summary.tsv")["magnitudes-30"]["method"] == "magnitudes"
    name = "model.layers.2.mlp.down_proj"
    codes = TensorFile(run.results / "magnitudes-30/codes/layer_02.safetensors")
    spec = codes.metadata["matrices"][name]
    factors = unpack({part: codes.read(part) for part in tensor_names(name, spec)}, spec, name)
    weight = ModelFolder(run.config["model"]["path"]).read_weight(name)
    with h5py.File(run.results / "gram/layer_02.h5") as file:
        site = next(site for site in file if name in file[site].attrs["matrices"])
        diagonal = np.diag(file[site]["gram"][()])
    found = factors.reconstruct()
    np.testing.assert_array_equal(found[found != 0], weight[found != 0])
    score = np.abs(weight) * diagonal[:, None] ** 0.25
    for column in range(weight.shape[1]):
        there = found[:, column] != 0
        assert score[there, column].min() >= score[~there, column].max()
    report = json.loads((run.results / "magnitudes-30/factors/layer_02.json").read_text())
    assert report["options"] == {"power": 0.5}
    packed = load_file(run.results / "magnitudes-30/model/model.safetensors")
    assert f"{name}.support" in packed and f"{name}.dictionary" not in packed


def test_its_options_and_faults_are_checked_like_any_other(run):
    broken = Run(run.folder, {**run.config}, run.project)
    broken.config["variants"] = {"a": {"method": "magnitudes", "ratio": 0.3, "power": 3}}
    assert "variants.a.power: 3 is not allowed; from 0 to 2" in broken.snakemake("--dry-run", succeeds=False)
    broken.config["variants"] = {"a": {"method": "magnitudes", "ratio": 0.95}}
    assert "not one weight fits beside the mask" in broken.snakemake("--dry-run", succeeds=False)
