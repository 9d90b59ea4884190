"""A run whose metric is the loss's gradients, from config to report."""

from __future__ import annotations

from collections.abc import Callable

import h5py
import pytest

from cospadi.files import read_json

from .conftest import Run, check_finished, rows

SHARED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
NAMES = ["hybrid", "sparsegpt"]
STREAM = "ectcq"


@pytest.fixture(scope="module")
def run(new_run: Callable[..., Run]) -> Run:
    run = new_run("llama", num_hidden_layers=3, hidden_size=64, intermediate_size=128)
    priced = {"ratio": 0.4, "metric": "gradients", "allocation": "global"}
    run.config["variants"] = {
        "sparsegpt": {"method": "sparsegpt", **priced},
        "hybrid": {"method": "hybrid", **priced, "share_within": SHARED, "atoms": 4, "max_iter": 1},
        STREAM: {"method": "ectcq", **priced, "ratio": 0.7},
    }
    run.config["evaluation"] |= {"generate": None}
    run.config["layers_per_job"] = 3
    run.snakemake()
    return run


def test_every_one_comes_out_at_its_bytes(run):
    check_finished(run, [STREAM, *NAMES])
    table = rows(run.results / "summary.tsv")
    for name in NAMES:
        assert 0.4 <= float(table[name]["ratio_true"]) < 0.41
    for name in NAMES:
        allocation = read_json(run.results / name / "allocation.json")
        given = sum(one["nbytes"] for one in allocation["problems"])
        # a weight and its bit take 17; what is left over is less than one of them a problem
        assert allocation["nbytes"] - 3 * len(allocation["problems"]) < given <= allocation["nbytes"]
        assert len({one["ratio"] for one in allocation["problems"]}) > 3


def test_entropy_coded_columns_are_weighted_within_the_bytes(run):
    assert 0.7 <= float(rows(run.results / "summary.tsv")[STREAM]["ratio_true"]) < 0.71
    matrices = read_json(run.results / STREAM / "model" / "config.json")["quantization_config"]["matrices"]
    assert len(matrices) == 21
    assert {spec["codes"]["codec"] for spec in matrices.values()} == {"ectcq_scaled"}
    assert all(spec["codes"]["n_scales"] == spec["shape"][1] for spec in matrices.values())


def test_predicted_rise_is_that_of_what_is_stored(run):
    table = rows(run.results / "summary.tsv")
    for name in NAMES:
        reports = [read_json(file)["matrices"] for file in (run.results / name / "codes").glob("*.json")]
        rises = [matrix["predicted_rise"] for unit in reports for matrix in unit.values()]
        assert len(rises) > 15 and min(rises) > 0
        assert float(table[name]["predicted_rise"]) == pytest.approx(sum(rises), rel=1e-5)


def test_gradients_are_of_chunks_and_stay(run):
    files = sorted((run.results / "gradients").glob("*.h5"))
    assert [file.name for file in files] == ["layers_00-01.h5", "layers_02-02.h5"]
    for file in files:
        with h5py.File(file) as moments:
            assert all(len(layer) == 7 for layer in moments.values())
    assert run.planned() == {}


def test_a_run_without_them_collects_none(run, tmp_path):
    run = run.copy(tmp_path / "copy")
    run.config["variants"] = {"plain": {"method": "sparsegpt", "ratio": 0.4}}
    assert "collect_gradients" not in run.planned("--forceall")
