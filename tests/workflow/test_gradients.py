"""A run whose metric is the loss's gradients, from config to report."""

from __future__ import annotations

import csv
import math
import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cospadi.evaluation.parts import PartsModel
from cospadi.files import ModelFolder, TensorFile, read_json
from cospadi.formats.factorization import tensor_names, unpack
from cospadi.runs import plan_of
from cospadi.status import status

from .conftest import PROJECT, Run, check_finished, rows

SHARED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
NAMES = ["hybrid", "sparsegpt"]
STREAM, TURN = "ectcq", "turn"  # whose layers are learned in turn
CHOICES = ["hybrid", STREAM, "rtn"]
INCREASE, MIXED = 1.005, 0.62
CODED = "coded"
MORE = 14  # windows to train on end to end; the calibration has fewer
BEHIND = {"every": 1, "learning_rate": 0.003, "batch_tokens": 32, "samples": MORE}
PARTS = ["self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
ALONE = {"method": "rtn", "ratio": 0.7, "allocation": "measured", "menu": [0.6, 1, 1.4], "measured_windows": 3}
MENU = {"method": "rtn", "ratio": 0.7, "metric": "gradients", "allocation": "menu", "menu": [0.6, 0.8, 1, 1.4]}


@pytest.fixture(scope="module")
def run(new_run: Callable[..., Run]) -> Run:
    run = new_run("llama", num_hidden_layers=3, hidden_size=64, intermediate_size=128)
    priced = {"ratio": 0.4, "metric": "gradients", "allocation": "global"}
    run.config["variants"] = {
        "sparsegpt": {"method": "sparsegpt", **priced},
        "hybrid": {"method": "hybrid", **priced, "share_within": SHARED, "atoms": 4, "max_iter": 1}
        | {"group_metric": "exact"},
        STREAM: {"method": "ectcq", **priced, "ratio": 0.7, "refine": {"epochs": 1}},
        TURN: {
            "method": "sparsegpt",
            **priced,
            "allocation": "uniform",
            "target": "sequential",
            "residual_share": 0.5,
            "refine": {"samples": 6},
            "distill": {"epochs": 1, "samples": MORE},
            "embedding_bits": 8,
        },
        CODED: {"method": "rtn", "ratio": 0.7, "embedding_bits": 3, "embedding_method": "ectcq", "compensate": BEHIND},
        "rtn": MENU,
        "alone": ALONE,
        "mix": {"method": "choose", "ratio": MIXED, "choose_from": CHOICES, "search": 12},
        "close": {"method": "choose", "max_perplexity_increase": INCREASE, "choose_from": CHOICES},
    }
    run.config["evaluation"] |= {"generate": None, "dtype": "float32"}
    run.config["layers_per_job"] = 3
    run.config["calibration"]["heldout_fraction"] = 0.25
    run.snakemake()
    return run


def test_every_one_comes_out_at_its_bytes(run):
    check_finished(run, sorted([STREAM, *NAMES, CODED, "alone", "close", "mix", "rtn", TURN]))
    table = rows(run.results / "summary.tsv")
    for name in NAMES:
        assert 0.4 <= float(table[name]["ratio_true"]) < 0.41
    for name in NAMES:
        allocation = read_json(run.results / name / "allocation.json")
        given = sum(one["nbytes"] for one in allocation["problems"])
        # a weight and its bit take 17; what is left over is less than one of them a problem
        assert allocation["nbytes"] - 3 * len(allocation["problems"]) < given <= allocation["nbytes"]
        assert len({one["ratio"] for one in allocation["problems"]}) > 3


def test_matrices_that_share_have_their_own_metric_where_the_config_says_so(run):
    shared = {}
    for file in (run.results / "hybrid/factors").glob("*.json"):
        for name, report in read_json(file)["matrices"].items():
            own = name.endswith(("o_proj", "down_proj")) or not report.get("n_atoms")
            assert ("history_exact" in report) == (not own), name
            shared[name] = not own
    assert any(shared.values()) and len(shared) == len(read_json(run.results / "structure.json")["layers"]) * 7


def test_entropy_coded_columns_are_weighted_within_the_bytes(run):
    assert 0.7 <= float(rows(run.results / "summary.tsv")[STREAM]["ratio_true"]) < 0.71
    matrices = read_json(run.results / STREAM / "model" / "config.json")["quantization_config"]["matrices"]
    assert len(matrices) == 21
    assert {spec["codes"]["codec"] for spec in matrices.values()} == {"ectcq256_scaled"}
    assert all(spec["codes"]["n_scales"] == spec["shape"][1] for spec in matrices.values())


def test_units_learned_in_turn_are_refined_and_leave_no_hidden_states(run):
    table = rows(run.results / "summary.tsv")
    for name in (STREAM, TURN):
        assert 0 <= float(table[name]["refinement_gain"]) < 1
        assert 0 < float(table[name]["seconds_refining"]) < float(table[name]["seconds_learning"])
        files = sorted((run.results / name / "factors").glob("*.json"))
        assert list(read_json(files[0])["refined"]) == ["layer_00", "layer_01", "layer_02"]
        assert not list((run.results / name / "streams").glob("*.h5"))
    assert all(table[name]["refinement_gain"] == "" for name in NAMES)


def test_layers_behind_are_trained_to_make_up_for_those_before(run):
    table = rows(run.results / "summary.tsv")
    (file,) = (run.results / CODED / "factors").glob("*.json")
    reports = read_json(file)["compensated"]
    assert list(reports) == ["layer_00", "layer_01"]  # nothing is behind the last
    gains = [1 - report["kl"] / report["kl_before"] for report in reports.values()]
    assert gains[0] > 0.01 and min(gains) >= 0
    assert float(table[CODED]["compensation_gain"]) == pytest.approx(sum(gains) / 2, rel=1e-4)
    assert 0 < float(table[CODED]["seconds_compensating"]) < float(table[CODED]["seconds_learning"])
    assert not list((run.results / CODED / "streams").glob("*.h5"))
    assert all(table[name]["compensation_gain"] == "" for name in (*NAMES, STREAM, TURN))


def test_factors_trained_end_to_end_are_what_is_packed(run):
    table = rows(run.results / "summary.tsv")
    folder = run.results / TURN / "distilled"
    report = read_json(folder / "report.json")
    assert report["kl"] <= report["kl_before"] and len(report["history"]) == 1
    with h5py.File(run.results / f"windows/{MORE}.h5") as more, h5py.File(run.results / "calibration.h5") as windows:
        ids, calibration = more["input_ids"][:], windows["input_ids"][:]
    assert len(ids) == MORE > len(calibration)
    assert report["n_windows"] + 2 <= MORE
    gain = 1 - report["kl"] / report["kl_before"]
    assert float(table[TURN]["distillation_gain"]) == pytest.approx(gain, rel=1e-4, abs=1e-6)
    assert 0 < float(table[TURN]["seconds_distilling"]) < float(table[TURN]["seconds_learning"])
    assert all(table[name]["distillation_gain"] == "" for name in (*NAMES, STREAM))
    for trained in sorted(folder.glob("*.safetensors")):
        packed, file = TensorFile(run.results / TURN / "codes" / trained.name), TensorFile(trained)
        assert packed.entries.keys() == file.entries.keys()
        for name in file.entries:  # values in bfloat16
            values = torch.from_numpy(np.array(file.read(name)))
            stored = values.bfloat16().float() if values.dtype == torch.float32 else values
            np.testing.assert_array_equal(np.asarray(packed.read(name), stored.numpy().dtype), stored.numpy())


def test_other_options_of_training_end_to_end_learn_nothing_anew(run, tmp_path):
    run = run.copy(tmp_path / "copy")
    run.config["variants"][TURN]["distill"] = {"epochs": 2, "samples": MORE + 1}
    planned = run.planned(f"results/tiny/{TURN}/model")
    assert planned["distill_factors"] == 1 and planned["quantize_codes"] == 1 and planned["assemble_model"] == 1
    assert planned["prepare_windows"] == 1 and "prepare_calibration" not in planned
    assert not {"learn_dictionary", "learn_in_turn", "compute_gram", "collect_gradients"} & planned.keys()


def test_embeddings_in_few_bits_are_in_the_model_and_what_is_learned_is_not_of_them(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.folder)
    table, plan = rows(run.results / "summary.tsv"), plan_of("run.yaml")
    for name, codec in ((TURN, "int8"), ("sparsegpt", None), (CODED, "ectcq256_scaled")):
        config = read_json(run.results / name / "model/config.json")
        spec = config["quantization_config"]["matrices"].get("model.embed_tokens", {"codes": {"codec": None}})
        assert spec["codes"]["codec"] == codec
        size = sum(file.stat().st_size for file in (run.results / name / "model").glob("*.safetensors"))
        assert size <= plan.final_nbytes(name), "a budget keeps to it"
        assert float(table[name]["kl"]) > 0 and np.isfinite(float(table[name]["token_perplexity"]))
    run = run.copy(tmp_path / "copy")
    run.config["variants"][TURN]["embedding_bits"] = 4
    planned = run.planned(f"results/tiny/{TURN}/eval.json")
    assert planned["assemble_model"] == planned["evaluate_model"] == 1
    assert not {"learn_in_turn", "distill_factors", "quantize_codes", "measure_head"} & planned.keys()
    run.config["variants"][TURN]["embedding_method"] = "gptq"
    planned = run.planned(f"results/tiny/{TURN}/eval.json")
    assert planned["assemble_model"] == 1 and not {"measure_head", "collect_activations"} & planned.keys()


def test_a_unit_learned_in_turn_waits_for_those_before_it(run, tmp_path):
    run = run.copy(tmp_path / "copy")
    run.config["layers_per_job"] = 1
    planned = run.planned("results/tiny/turn/factors/layer_01.json")
    assert planned["learn_in_turn"] == 2 and "learn_dictionary" not in planned


def table_of(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        return {row["matrices"]: row for row in csv.DictReader(file, delimiter="\t")}


def stored(run: Run, name: str) -> dict[str, dict[str, float]]:
    """What codes/*.json say of every matrix of a variant."""
    reports = [read_json(file)["matrices"] for file in (run.results / name / "codes").glob("*.json")]
    return {name: matrix for unit in reports for name, matrix in unit.items()}


def test_a_menu_chooses_and_its_table_says_what_came_of_it(run):
    table, found = table_of(run.results / "rtn/allocation.tsv"), stored(run, "rtn")
    assert table.keys() == found.keys() and len(table) == 21
    assert len({row["bits"] for row in table.values()}) > 2
    for name, row in table.items():
        assert (row["unit"], row["method"]) == ("layers_00-02", "rtn")
        assert found[name]["nbytes"] <= int(row["bytes"])
        assert found[name]["predicted_rise"] == pytest.approx(float(row["predicted_rise"]), rel=1e-5)
    assert "with the same ratio for all" in (run.results / "logs/allocate_bytes/rtn.log").read_text()


def test_a_measured_allocation_says_what_each_matrix_alone_does_to_the_predictions(run):
    table, path = table_of(run.results / "alone/allocation.tsv"), run.folder / run.config["model"]["path"]
    assert len({row["bits"] for row in table.values()}) > 1
    ids = kept_out(run)
    log = (run.results / "logs/profile_matrices/alone/layers_00-02.log").read_text()
    assert f"measuring on {ids.numel()} tokens of 2 windows, all that are kept out; measured_windows asks for 3" in log
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    codes = TensorFile(run.results / "alone/codes/layers_00-02.safetensors")
    with torch.inference_mode():
        log_p = model(ids).logits.log_softmax(-1)
        for name in [f"model.layers.{layer}.{part}" for layer, part in enumerate(PARTS)]:
            weight, spec = model.get_parameter(f"{name}.weight"), codes.metadata["matrices"][name]
            own = weight.clone()
            tensors = {tensor: codes.read(tensor) for tensor in tensor_names(name, spec)}
            weight.copy_(torch.from_numpy(unpack(tensors, spec, name).reconstruct().T.copy()))
            log_q = model(ids).logits.log_softmax(-1)
            weight.copy_(own)
            divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            # float32 has 1e-7 of logits that are some units large, at each of some hundred words
            assert float(table[name]["predicted_rise"]) == pytest.approx(divergence, rel=1e-3, abs=1e-7)
    problems = read_json(run.results / "alone/profile/layers_00-02.json")["problems"]
    for points in (one["figures"]["points"] for one in problems):
        assert len(points) == 3 and points[0][1] > points[-1][1] > 0


def test_parts_of_finished_variants_make_a_better_one(run, monkeypatch):
    table, found = table_of(run.results / "mix/allocation.tsv"), stored(run, "mix")
    chosen = read_json(run.results / "mix/choice.json")["matrices"]
    assert len(chosen) == 21 and len(set(chosen.values())) > 1
    files = {name: TensorFile(run.results / name / "codes/layers_00-02.safetensors") for name in [*CHOICES, "mix"]}
    for matrix, name in chosen.items():
        specs = files["mix"].metadata["matrices"]
        if name is None:
            weight = ModelFolder(run.folder / run.config["model"]["path"]).read_weight(matrix)
            stored_weight = files["mix"].read(f"{matrix}.values").astype(np.float32).reshape(weight.T.shape)
            np.testing.assert_array_equal(stored_weight.T, weight)
            assert found[matrix]["nbytes"] == found[matrix]["dense_nbytes"] and found[matrix]["predicted_rise"] == 0
            continue
        assert specs[matrix] == files[name].metadata["matrices"][matrix] and found[matrix] == stored(run, name)[matrix]
        for tensor in tensor_names(matrix, specs[matrix]):
            np.testing.assert_array_equal(files["mix"].read(tensor), files[name].read(tensor))
    # gate and up have one dictionary in one of them
    assert all(len({chosen[name] for name in row.split(" + ")}) == 1 for row in table)
    assert any(row.endswith("up_proj") and row.count(" + ") == 1 for row in table)
    # every variant lists its matrices in the model's order, as the plots do
    listed = [list(variant["matrices"]) for variant in read_json(run.results / "summary.json")["variants"].values()]
    assert all(names == listed[1] for names in listed[2:]) and list(chosen) == listed[1]
    numbers = rows(run.results / "summary.tsv")
    rises = {name: float(numbers[name]["predicted_rise"]) for name in [*CHOICES, "mix"]}
    assert rises["mix"] == pytest.approx(sum(float(row["predicted_rise"]) for row in table.values()), rel=1e-4)
    # of those that are as small; then swaps follow what is measured
    log = (run.results / "logs/choose_variants/mix.log").read_text()
    (unswapped,) = map(float, re.findall(r"kept out, predicted rise ([\d.e-]+)", log))
    assert unswapped < min(rises[STREAM], rises["rtn"])
    with open(run.results / "frontier.tsv") as file:
        (row,) = (row for row in csv.DictReader(file, delimiter="\t") if row["variant"] == "mix")
    assert (row["class"], row["method"]) == ("any-bits", "choose")
    assert run.planned("results/tiny/mix/gguf/F32.gguf") == {"export_gguf": 1, "total": 1}
    monkeypatch.chdir(run.folder)
    (shown,) = (line.split() for line in status(plan_of("run.yaml")).splitlines() if line.startswith("mix"))
    assert shown[1:3] == ["3/3", "3/3"] and shown[4] == "yes"


def test_the_fewest_bytes_within_an_increase_of_perplexity_are_searched_for(run):
    log = (run.results / "logs/choose_variants/close.log").read_text()
    found = [
        (int(nbytes), float(times)) for nbytes, times in re.findall(r"(\d+) bytes: perplexity times ([\d.]+)", log)
    ]
    assert len(found) == 6
    (chosen,) = map(int, re.findall(r"chosen: (\d+) bytes", log))
    within = {nbytes: times for nbytes, times in found if times <= INCREASE}
    assert chosen == min(within)
    # no more than it has to be: halving the range of bytes six times would end within a 64th of it
    total = sum(one["dense_nbytes"] for one in stored(run, "close").values())
    below = [nbytes for nbytes, times in found if times > INCREASE and nbytes < chosen]
    assert max(below) > chosen - 0.01 * total
    assert float(rows(run.results / "summary.tsv")["close"]["target_bytes"]) <= chosen
    # what was measured is the perplexity of the model that came out, on the windows that were kept out
    ids = kept_out(run)
    losses = {}
    for folder in (run.folder / run.config["model"]["path"], run.results / "close/model"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        losses[folder.name] = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()
    times = math.exp(losses["model"] - losses["tiny-model"])
    # packed values are bfloat16, also of what stays as it is, which was measured in its own
    assert times == pytest.approx(within[chosen], abs=2e-4)


def kept_out(run: Run) -> torch.Tensor:
    with h5py.File(run.results / "calibration.h5") as windows:
        return torch.from_numpy(windows["input_ids"][-2:].astype(np.int64))


def test_swaps_that_bring_the_predictions_nearer_to_the_dense_model_stay(run):
    log = (run.results / "logs/choose_variants/mix.log").read_text()
    found = [float(value) for value in re.findall(r"divergence ([\d.e-]+)", log)]
    assert len(found) > 1 and found == sorted(found, reverse=True)
    assert sum(stored(run, "mix")[name]["nbytes"] for name in stored(run, "mix")) <= (1 - MIXED) * sum(
        one["dense_nbytes"] for one in stored(run, "mix").values()
    )
    log_p, log_q = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(kept_out(run)).logits.detach().log_softmax(-1)
        for folder in (run.folder / run.config["model"]["path"], run.results / "mix/model")
    )
    # packed values of what stays as it is are bfloat16
    assert float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) == pytest.approx(found[-1], rel=2e-2)


@pytest.mark.parametrize("name", ["mix", "close"])
def test_an_interrupted_search_goes_on_behind_what_it_had_measured(run, tmp_path, monkeypatch, name):
    run = run.copy(tmp_path / "copy")
    folder, settings = run.results / name, run.config["variants"][name]
    whole = read_json(folder / "choice.json")
    choose = runpy.run_path(str(PROJECT / "scripts/choose_variants.py"))["main"]
    variants = {source: str(run.results / source) for source in settings["choose_from"]}
    job = SimpleNamespace(
        input=SimpleNamespace(
            model=str(run.folder / run.config["model"]["path"]),
            windows=str(run.results / "calibration.h5"),
            codes=[f"{source}/codes/layers_00-02.safetensors" for source in variants.values()],
        ),
        output=SimpleNamespace(choice=str(folder / "choice.json"), table=str(folder / "allocation.tsv")),
        params=SimpleNamespace(
            variants=variants,
            units=["layers_00-02"],
            settings=settings,
            dtype="float32",
            device="cpu",
            code="1",
            collection={"heldout_fraction": run.config["calibration"]["heldout_fraction"]},
        ),
    )
    measure = "increase" if name == "close" else "divergence"
    original, calls = getattr(PartsModel, measure), []

    def counted(self, chosen):
        calls.append(chosen)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(self, chosen)

    def chosen():
        calls.clear()
        choose(job, lambda line: None)
        assert not list(folder.glob(".*")) and read_json(folder / "choice.json") == whole
        return len(calls)

    monkeypatch.setattr("cospadi.finished.SAVE_SECONDS", 0)
    monkeypatch.setattr(PartsModel, measure, counted)
    stop_at = None
    n_measured = chosen()
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        chosen()
    stop_at = None
    assert chosen() == n_measured - 3
    # what was measured of other files is not taken
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        chosen()
    Path(job.input.codes[0]).touch()
    stop_at = None
    assert chosen() == n_measured


def test_a_table_that_is_edited_is_followed(run, tmp_path):
    run = run.copy(tmp_path / "copy")
    table = table_of(run.results / "rtn/allocation.tsv")
    first, last = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2))
    # of the same shape; more of one, less of the other; columns that nobody needs are left out
    sizes = sorted({int(row["bytes"]) for name, row in table.items() if name.endswith("q_proj")})
    given = {name: row["bytes"] for name, row in table.items()} | {first: str(sizes[0]), last: "dense"}
    given |= {name: str(sizes[0]) for name in given if name.endswith("o_proj")}
    lines = "".join(f"{nbytes}\t{name}\n" for name, nbytes in given.items())
    (run.folder / "mine.tsv").write_text(f"bytes\tmatrices\n{lines}")
    ours = {"method": "rtn", "metric": "gradients", "ratio": 0.5}
    run.config["variants"]["mine"] = {**ours, "allocation": "file", "allocation_file": "mine.tsv"}
    target = "results/tiny/mine/codes/layers_00-02.json"
    assert run.planned(target) == {"allocate_bytes": 1, "learn_dictionary": 1, "quantize_codes": 1, "total": 3}
    run.snakemake(target)
    found = stored(run, "mine")
    assert found[first]["nbytes"] <= sizes[0] and found[last]["nbytes"] == found[last]["dense_nbytes"]
    same = [name for name in found if name.rsplit(".", 1)[-1] not in ("q_proj", "o_proj")]
    assert [found[name]["squared_error"] for name in same] == [
        stored(run, "rtn")[name]["squared_error"] for name in same
    ]
    assert table_of(run.results / "mine/allocation.tsv")[last]["bytes"] == "dense"
    # what the file says now is what is learned next, whatever its time
    (run.folder / "mine.tsv").touch()
    assert run.planned(target) == {}
    (run.folder / "mine.tsv").write_text(f"bytes\tmatrices\n{lines}".replace(f"dense\t{last}", f"{sizes[0]}\t{last}"))
    os.utime(run.folder / "mine.tsv", (0, 0))
    assert run.planned(target)["learn_dictionary"] == 1


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
