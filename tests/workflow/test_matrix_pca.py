"""Runs in which one job learns all layers, of the attention matrices alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cospadi.files import TensorFile, read_json
from cospadi.stage import choose_dtype

from .conftest import rows

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def learned(new_run: Callable):
    """A run with shared atoms, with low rank beside it, and with atoms after blocks were removed."""
    run = new_run("llama", num_hidden_layers=3)
    shared = {"method": "masa", "ratio": 0.3, "targets": ATTENTION, "groups": 1, "atoms": 1}
    run.config["variants"] = {
        "masa-30": dict(shared),
        "svd-30": {"method": "svd_llm", "ratio": 0.3, "targets": ATTENTION},
        "short-1_masa-30": {"steps": [{"method": "shortgpt", "blocks": 1}, shared]},
    }
    run.config["evaluation"]["generate"] = None
    run.snakemake()
    return run


def test_one_job_learns_the_attention_of_all_layers(learned):
    drift = read_json(learned.results / "drift.json")
    assert (drift["dtype"], drift["dtype_reason"]) == choose_dtype("auto", "cpu")
    assert len(drift["drift"]) == 3 and min(drift["drift"]) > 0
    factors = TensorFile(learned.results / "masa-30/factors/layers_00-02.safetensors")
    names = factors.metadata["matrices"]
    assert len(names) == 12 and all(name.rpartition(".")[2] in ATTENTION for name in names)
    owner = "model.layers.0.self_attn.q_proj.plus.0.dictionary"
    packed = TensorFile(learned.results / "masa-30/model/model.safetensors")
    assert owner in packed and "model.layers.1.self_attn.q_proj.plus.0.dictionary" not in packed
    assert "model.layers.0.mlp.up_proj.weight" in packed and "model.layers.0.self_attn.q_proj.weight" not in packed
    assert len(list((learned.results / "svd-30/factors").glob("*.json"))) == 3
    assert len(read_json(learned.results / "short-1_masa-30/pruned/drift.json")["drift"]) == 2


def test_both_ratios_are_in_the_table(learned):
    table = rows(learned.results / "summary.tsv")
    structure = read_json(learned.results / "structure.json")
    attention = 3 * 2 * 48 * (48 + 24)
    share = attention / structure["target_parameters"]
    for name in ("masa-30", "svd-30"):
        assert 0.3 <= float(table[name]["ratio_true"]) < 0.35
        assert float(table[name]["ratio_of_all"]) == pytest.approx(share * float(table[name]["ratio_true"]), rel=1e-4)
        assert float(table[name]["token_perplexity"]) > 1
    assert table["dense"]["ratio_of_all"] == ""
    # a block of three, and of the attention of two
    both = 1 / 3 + 2 / 3 * share * 0.3
    assert float(table["short-1_masa-30"]["ratio_asked"]) == pytest.approx(both, abs=1e-5)
    assert both <= float(table["short-1_masa-30"]["ratio_true"]) < both + 0.03


def test_a_second_run_has_nothing_to_do_and_other_targets_learn_again(learned, tmp_path):
    assert "Nothing to be done" in learned.snakemake()
    run = learned.copy(tmp_path / "run")
    run.config["variants"]["masa-30"]["targets"] = ["q_proj", "k_proj"]
    planned = run.planned()
    assert planned["learn_dictionary"] == 1 and "measure_drift" not in planned
    run.config["variants"]["masa-30"]["targets"] = ["query"]
    assert "variants.masa-30.targets.0: query is not allowed; one of q_proj, k_proj" in run.snakemake(succeeds=False)
