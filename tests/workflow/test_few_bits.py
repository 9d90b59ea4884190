"""A run of the methods that keep every weight in a few bits, from config to loaded checkpoints."""

from __future__ import annotations

import csv
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from cospadi.checkpoint import densify
from cospadi.files import TensorFile, read_json

from .conftest import Run, check_finished, rows

# bytes of the file that are about 4 bits a weight
BUDGET = 240_000
# bytes in memory that are about 3.5, once a text of so many tokens was read
ON_GPU, TOKENS = 259_300, 64
# name to what makes it, and the codec that is the most that fits
VARIANTS = {
    "rtn-3.25": ({"method": "rtn", "bits": 3.25}, "int3"),
    "gptq-3.25": ({"method": "gptq", "bits": 3.25}, "int3"),
    "ectcq-3.25": ({"method": "ectcq", "bits": 3.25}, "ectcq256"),
    "ectcq_8-3.25": ({"method": "ectcq", "bits": 3.25, "states": 8}, "ectcq"),
    "trellis-3.5": ({"method": "trellis", "budget": f"{ON_GPU / 1000}KB on the GPU with {TOKENS} tokens"}, "trellis3"),
    "scalar-4": ({"method": "ectcq", "budget": f"{BUDGET / 1000}KB", "states": 1}, "ec"),
    "gptq-zeros": ({"method": "gptq", "bits": 2.3, "symmetric": False, "act_order": True}, "uint2"),
    "awq-3.5": ({"method": "rtn", "bits": 3.5, "scale_inputs": True}, "int3"),
    "entquant-3.5": ({"method": "entquant", "bits": 3.5}, "ec_scaled"),
}
SHAPES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192}


@pytest.fixture(scope="module")
def run(new_run: Callable[..., Run]) -> Run:
    run = new_run("llama", **SHAPES)
    run.config["variants"] = {name: given for name, (given, _) in VARIANTS.items()}
    run.config["evaluation"] |= {"tasks": [], "generate": None}
    run.config["layers_per_job"] = 2
    run.snakemake()
    return run


def test_every_one_comes_out_in_its_bits(run):
    check_finished(run, sorted(VARIANTS))
    with open(run.results / "frontier.tsv") as file:
        table = {row["variant"]: row for row in csv.DictReader(file, delimiter="\t")}
    for name, (given, codec) in VARIANTS.items():
        assert table[name]["class"] == "any-bits"
        assert float(table[name]["bits"]) <= given.get("bits", 16)
        for file in sorted((run.results / name / "codes").glob("*.safetensors")):
            assert {spec["codes"]["codec"] for spec in TensorFile(file).metadata["matrices"].values()} == {codec}


def test_a_budget_is_of_the_whole_file(run):
    size = (run.results / "scalar-4/model/model.safetensors").stat().st_size
    assert float(rows(run.results / "summary.tsv")["scalar-4"]["model_bytes"]) == size
    # what is kept for names of tensors, 1000 bytes a matrix, is nearly used
    assert BUDGET - 14 * 1000 < size <= BUDGET


def test_a_budget_of_a_gpu_is_of_what_is_in_memory_once_a_text_was_read(run):
    from transformers import AutoModelForCausalLM

    found = {}
    for name in ("trellis-3.5", "ectcq-3.25"):
        folder = run.results / name / "model"
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        with torch.no_grad():
            cache = model(torch.arange(3, TOKENS + 3)[None], use_cache=True).past_key_values
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        found[name] = sum(tensor.nbytes for tensor in [*model.parameters(), *kept])
    n_weights = 2 * (2 * 128 * (128 + 64) + 3 * 128 * 192)
    # with another bit a weight it would be too much
    assert found["trellis-3.5"] <= ON_GPU < found["trellis-3.5"] + n_weights / 8
    # what an entropy-coded matrix is decoded to is there besides, as the plan counts it
    file = sum(entry.nbytes for entry in load_file(folder / "model.safetensors").values())
    assert found["ectcq-3.25"] == file + 2 * n_weights + sum(tensor.nbytes for tensor in kept)


def test_what_was_learned_is_what_is_stored(run):
    errors = {}
    for name in VARIANTS:
        units = [(run.results / name / part).glob("*.json") for part in ("factors", "codes")]
        learned, stored = ([read_json(file)["matrices"] for file in sorted(files)] for files in units)
        for before, after in zip(learned, stored, strict=True):
            for matrix, report in before.items():
                assert report["relative_error"] == pytest.approx(after[matrix]["relative_error"], rel=1e-6)
        errors[name] = sum(report["squared_error"] for unit in stored for report in unit.values())
    assert (
        errors["scalar-4"]
        < errors["ectcq-3.25"]
        < errors["ectcq_8-3.25"]
        < errors["trellis-3.5"]
        < errors["gptq-3.25"]
        < errors["awq-3.5"]
        < errors["rtn-3.25"]
        < errors["gptq-zeros"]
    )


def test_a_loaded_model_computes_what_the_dense_folder_does(run):
    from transformers import AutoModelForCausalLM

    for name in VARIANTS:
        folder = run.results / name / "model"
        packed = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        tokens = torch.arange(3, 40)[None]
        with torch.no_grad():
            logits = packed(tokens).logits
        dense = run.results / f"{name}-dense"
        densify(folder, dense)
        plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        with torch.no_grad():
            expected = plain(tokens).logits
        # the dense folder's weights are rounded to the dtype of the model
        scale = expected.abs().max()
        assert (logits - expected).abs().max() < 2e-2 * scale
