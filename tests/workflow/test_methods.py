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
    config = tiny_config(tiny_model("llama"), articles) | {"layers_per_job": 2}
    config["variants"] = {
        "magnitudes-30": {"method": "magnitudes", "ratio": 0.3, "power": 0.5},
        "svd_llm_v2-40": {"method": "svd_llm_v2", "ratio": 0.4},
        "rocket-40": {"method": "rocket", "ratio": 0.4, "candidate_ratios": [0.2, 0.3, 0.5, 0.6]},
    }
    (folder / "run").mkdir()
    run = Run(folder / "run", config, project)
    run.snakemake()
    return run


def test_a_method_of_one_file_and_one_line_runs_from_config_to_report(run):
    check_finished(run, sorted(run.config["variants"]))
    assert rows(run.results / "summary.tsv")["magnitudes-30"]["method"] == "magnitudes"
    name = "model.layers.2.mlp.down_proj"
    codes = TensorFile(run.results / "magnitudes-30/codes/layers_02-03.safetensors")
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
    report = json.loads((run.results / "magnitudes-30/factors/layers_02-03.json").read_text())
    assert report["options"] == {"power": 0.5}
    packed = load_file(run.results / "magnitudes-30/model/model.safetensors")
    assert f"{name}.support" in packed and f"{name}.dictionary" not in packed


@pytest.mark.parametrize("variant", ["svd_llm_v2-40", "rocket-40"])
def test_bytes_are_parted_before_units_are_learned(run, variant):
    folder, settings = run.results / variant, run.config["variants"][variant]
    allocation = json.loads((folder / "allocation.json").read_text())
    given = {name: one["nbytes"] for one in allocation["problems"] for name in one["matrices"]}
    model = ModelFolder(run.config["model"]["path"])
    dense = {name: 2 * model.read_weight(name).size for name in given}
    assert len({round(1 - given[name] / dense[name], 3) for name in given}) > 2, "ratios differ"
    assert sum(given.values()) <= (1 - settings["ratio"]) * sum(dense.values())
    for path in folder.glob("codes/*.json"):
        for name, numbers in json.loads(path.read_text())["matrices"].items():
            assert numbers["nbytes"] <= given.pop(name)
    assert not given, "every matrix was learned"


def test_an_allocation_is_made_again_when_its_settings_change(run, tmp_path):
    variant = "svd_llm_v2-40"
    again = run.copy(tmp_path / "again")
    target = f"results/tiny/{variant}/factors/layers_00-01.safetensors"
    assert again.planned(target) == {}
    again.config["variants"][variant]["ratio"] = 0.5
    planned = again.planned(target)
    assert planned["profile_matrices"] == 2 and planned["allocate_bytes"] == planned["learn_dictionary"] == 1


def test_its_options_and_faults_are_checked_like_any_other(run):
    broken = Run(run.folder, {**run.config}, run.project)
    broken.config["variants"] = {"a": {"method": "magnitudes", "ratio": 0.3, "power": 3}}
    assert "variants.a.power: 3 is not allowed; from 0 to 2" in broken.snakemake("--dry-run", succeeds=False)
    broken.config["variants"] = {"a": {"method": "magnitudes", "ratio": 0.95}}
    assert "not one weight fits beside the mask" in broken.snakemake("--dry-run", succeeds=False)
