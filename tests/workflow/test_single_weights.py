"""A run of the methods that keep single weights, from config to loaded checkpoints."""

from __future__ import annotations

import csv
from collections.abc import Callable

import numpy as np
import pytest

from cospadi.files import TensorFile, read_json

from .conftest import Run, check_finished, rows

NAMES = ["alps-40", "hybrid-40", "magnitude-40", "sparse-40", "sparsegpt-24", "wanda-40"]


@pytest.fixture(scope="module")
def run(new_run: Callable[..., Run]) -> Run:
    run = new_run("llama", num_hidden_layers=2, hidden_size=96, intermediate_size=192)
    methods = [name.removesuffix("-40") for name in NAMES if name.endswith("-40")]
    run.config["variants"] = {method: {"method": method, "sweep": {"ratio": [0.4]}} for method in methods}
    run.config["variants"]["sparsegpt-24"] = {"method": "sparsegpt", "ratio": 0.4375, "pattern": "2:4"}
    run.config["variants"]["hybrid"] |= {
        "share_within": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]],
        "atoms": 8,
    }
    run.config["evaluation"] |= {"tasks": ["last_word"], "limit": 2, "generate": None}
    run.config["layers_per_job"] = 2
    run.snakemake()
    return run


def test_every_one_comes_out_at_its_bytes(run):
    check_finished(run, NAMES)
    table = rows(run.results / "summary.tsv")
    for name in NAMES:
        assert float(table[name]["ratio_true"]) < (0.4375 if name.endswith("24") else 0.4) + 0.01


def test_frontier_says_what_is_best_for_these_bytes(run):
    with open(run.results / "frontier.tsv") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert table[0]["variant"] == "dense" and {row["variant"] for row in table[1:]} == set(NAMES)
    assert {row["class"] for row in table} == {"16-bit"}
    for row in table[1:]:
        folder = run.results / row["variant"] / "codes"
        reports = [read_json(file)["matrices"] for file in folder.glob("*.json")]
        nbytes = sum(report["nbytes"] for unit in reports for report in unit.values())
        weights = sum(report["dense_nbytes"] for unit in reports for report in unit.values()) / 2
        assert float(row["bits"]) == pytest.approx(8 * nbytes / weights, rel=1e-5)
        assert float(row["perplexity"]) > 1 and 0 <= float(row["accuracy"]) <= 1
    assert (run.results / "plots/accuracy.svg").exists()


def test_errors_fall_with_insight(run):
    errors = {}
    for name in NAMES:
        reports = [read_json(file)["matrices"] for file in sorted((run.results / name / "codes").glob("*.json"))]
        errors[name] = sum(report["squared_error"] for unit in reports for report in unit.values())
    assert errors["magnitude-40"] > errors["wanda-40"] > errors["alps-40"] >= errors["sparse-40"] * 0.99
    assert errors["hybrid-40"] < errors["magnitude-40"]


def test_what_is_stored(run):
    packed = TensorFile(run.results / "sparsegpt-24/model/model.safetensors")
    assert not [name for name in packed.names() if name.endswith(".dictionary")]
    config = read_json(run.results / "sparsegpt-24/model/config.json")
    specs = config["quantization_config"]["matrices"].values()
    assert {spec["codes"]["support"] for spec in specs} == {"2:4"}
    hybrid = read_json(run.results / "hybrid-40/model/config.json")["quantization_config"]["matrices"]
    stored = TensorFile(run.results / "hybrid-40/model/model.safetensors")
    dictionaries = {part["dictionary"]["tensor"] for spec in hybrid.values() for part in spec.get("plus", ())}
    assert dictionaries <= set(stored.names())
    # one for all that read the same input, under the name of the first
    assert dictionaries and not [name for name in dictionaries if name.split(".")[4] in ("k_proj", "v_proj", "up_proj")]


def test_a_layer_alone_has_the_factors_of_a_job_with_several(run):
    folder = run.results / "hybrid-40" / "factors"
    assert [file.name for file in sorted(folder.glob("*.safetensors"))] == ["layers_00-01.safetensors"]
    together = TensorFile(folder / "layers_00-01.safetensors")
    run.snakemake(str(folder.relative_to(run.folder) / "layer_01.safetensors"))
    alone = TensorFile(folder / "layer_01.safetensors")
    assert set(alone.names()) == {name for name in together.names() if ".1." in name}
    for name in alone.names():
        np.testing.assert_array_equal(alone.read(name), together.read(name))
