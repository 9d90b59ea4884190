"""Runs that remove blocks, alone and before a factorization."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import h5py
import pytest

from cospadi.files import TensorFile, read_json
from cospadi.stage import choose_dtype

from .conftest import rows


@pytest.fixture(scope="module")
def pruned(new_run: Callable):
    """A run with a variant of each kind, on a model of three blocks."""
    run = new_run("llama", num_hidden_layers=3)
    run.config["variants"] = {
        "ls-1": {"method": "replaceme", "blocks": 1},
        "ls-1_cospadi-20": {
            "steps": [{"method": "replaceme", "blocks": 1}, {"method": "cospadi", "ratio": 0.2, "max_iter": 3}]
        },
        "short-1_svd-40": {"steps": [{"method": "shortgpt", "blocks": 1}, {"method": "svd_llm", "ratio": 0.4}]},
    }
    run.config["evaluation"]["tasks"] = ["last_word"]
    run.config["evaluation"]["generate"] = None
    run.snakemake()
    return run


def test_table(pruned):
    table = rows(pruned.results / "summary.tsv")
    assert list(table) == ["dense", *pruned.config["variants"]]
    assert table["ls-1"]["method"] == "replaceme"
    assert float(table["ls-1"]["ratio_true"]) == pytest.approx(1 / 3, abs=1e-5)
    assert table["ls-1"]["target_parameters_removed"] == table["ls-1"]["ratio_true"]
    assert 0 < float(table["ls-1"]["parameters_removed"]) < 1 / 3
    assert 3 * int(table["ls-1"]["target_bytes"]) == 2 * int(table["dense"]["target_bytes"])
    assert table["ls-1_cospadi-20"]["method"] == "replaceme + cospadi"
    # of all blocks: a third went, and a fifth of what was left
    assert float(table["ls-1_cospadi-20"]["ratio_asked"]) == pytest.approx(1 - 2 / 3 * 0.8, abs=1e-5)
    assert 0.466 <= float(table["ls-1_cospadi-20"]["ratio_true"]) < 0.54
    assert table["ls-1_cospadi-20"]["removed_blocks"] == table["ls-1"]["removed_blocks"] in ("1", "2")
    assert table["short-1_svd-40"]["method"] == "shortgpt + svd_llm"
    assert table["dense"]["removed_blocks"] == ""
    assert all(0 <= float(row["last_word"]) <= 1 for row in table.values())


def test_every_walk_says_what_it_was_computed_in(pruned):
    dtype, reason = choose_dtype("auto", "cpu")
    for path in ("pruning/distances.json", "ls-1/pruning/transforms.json", "dense/eval.json", "ls-1/eval.json"):
        found = read_json(pruned.results / path)
        assert (found["dtype"], found["dtype_reason"]) == (dtype, reason)
    for base in ("ls-1", "short-1_svd-40/pruned"):
        with h5py.File(pruned.results / base / "gram/layer_00.h5") as file:
            assert (file.attrs["dtype"], file.attrs["dtype_reason"]) == (dtype, reason)
    for log in ("measure_distances", "ls-1/fit_transforms"):
        assert f"computing in {dtype}: {reason}" in (pruned.results / "logs" / f"{log}.log").read_text()


def test_models(pruned):
    results = pruned.results
    config = read_json(results / "ls-1/model/config.json")
    assert config["num_hidden_layers"] == 2 and config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    packed = read_json(results / "ls-1_cospadi-20/model/config.json")
    assert packed["num_hidden_layers"] == 2 and len(packed["quantization_config"]["matrices"]) == 14
    # what both have in common was made once
    assert (results / "ls-1/gram/layer_01.h5").exists() and not (results / "ls-1/gram/layer_02.h5").exists()
    assert not (results / "ls-1_cospadi-20/pruned").exists()
    assert (results / "short-1_svd-40/pruned/model/config.json").exists()
    assert not (results / "gram").exists()  # nothing is learned from the model as it is
    (transform,) = TensorFile(results / "ls-1/pruning/transforms.safetensors").names()
    folded = int(transform.removeprefix("layer_"))
    assert read_json(results / "ls-1/pruning/selection.json")["removed"] == [folded + 1]
    assert not list(results.glob("**/activations/*.h5"))


def test_targets_and_reruns(pruned, tmp_path):
    assert pruned.planned() == {}
    run = pruned.copy(tmp_path / "run")
    target = "results/tiny/ls-1_cospadi-20/factors/layer_01.safetensors"
    (run.folder / target).unlink()
    assert run.planned(target) == {"learn_dictionary": 1, "total": 1}
    assert run.planned("results/tiny/short-1_svd-40/dense") == {"densify": 1, "total": 1}
    run.config["variants"]["ls-1"]["ridge"] = 0.5  # now the two differ, and the second gets a base of its own
    planned = run.planned()
    assert planned["fit_transforms"] == 2 and "measure_distances" not in planned
    assert planned["compute_gram"] == planned["learn_dictionary"] == 2  # the base of the third keeps what it has


def test_a_choice_of_another_step_is_refused_by_name(pruned, tmp_path):
    run = pruned.copy(tmp_path / "run")
    results = run.results
    selection = "pruning/selection.json"
    shutil.copy(results / "short-1_svd-40/pruned" / selection, results / "ls-1" / selection)
    shutil.rmtree(results / "ls-1/model")
    output = run.snakemake("results/tiny/ls-1/model", succeeds=False)
    assert f"ls-1/{selection}: is of settings" in output and not (results / "ls-1/model").exists()


def test_distances_of_other_windows_are_not_plotted(pruned, tmp_path):
    run = pruned.copy(tmp_path / "run")
    distances, plot = run.results / "pruning/distances.json", run.results / "plots/distances.svg"
    distances.write_text(json.dumps({**read_json(distances), "tokens": "others"}))
    plot.unlink()
    output = run.snakemake("results/tiny/plots/distances.svg", succeeds=False)
    assert "distances.json: is of tokens others; expected is tokens" in output and not plot.exists()


def test_report_shows_the_distances(pruned):
    import zipfile

    with zipfile.ZipFile(pruned.results / "report.zip") as archive:
        assert any("distances" in name for name in archive.namelist())
    assert (pruned.results / "plots/distances.png").stat().st_size > 10_000
