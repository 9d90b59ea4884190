"""Layers learned in turn: targets that make up for the layers before, and refined blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cospadi.calibration import windows
from cospadi.calibration.collect import collect
from cospadi.calibration.walk import read_windows
from cospadi.config import check_config
from cospadi.errors import ArtifactError, ConfigError
from cospadi.files import ModelFolder, TensorFile, read_json
from cospadi.formats.factorization import tensor_names, unpack
from cospadi.gram import compute_gram
from cospadi.learning import learn_unit
from cospadi.quantization import quantize_unit
from cospadi.sequence import DAMPING, Streams
from cospadi.structure import inspect_model

SAMPLES, LENGTH = 48, 24
SILENT = {"log": lambda line: None}
SHARED = [["gate_proj", "up_proj"]]


def complete(**given: Any) -> dict[str, Any]:
    """Settings of a variant as a run has them."""
    config = {
        "run": "r",
        "model": {"name": "m", "source": "local", "path": "."},
        "calibration": {"source": "self"},
        "variants": {"v": {"ratio": 0.5, **given}},
        "evaluation": {"perplexity": None},
    }
    return check_config(config)["variants"]["v"]


@pytest.fixture(scope="module")
def made(request, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model of three layers with biases (or another family), its windows, one of them padded, and its Grams."""
    family = getattr(request, "param", "qwen2")
    folder = tmp_path_factory.mktemp(family)
    model = tiny_model(family, dtype="float32")
    mask = np.ones((SAMPLES, LENGTH), np.uint8)
    mask[1, 15:] = 0
    ids = np.random.default_rng(0).integers(0, 390, (SAMPLES, LENGTH), np.int32)
    windows.write_windows(folder / "calibration.h5", ids, mask, seed=42)
    found = SimpleNamespace(model=model, structure=inspect_model(model), windows=folder / "calibration.h5")
    rows = {"rows_out": folder / "rows.h5", "hidden_in": None, "hidden_out": None, "mode": "stream"}
    collect(model, found.structure, found.windows, range(3), dtype="float32", batch_tokens=2 * LENGTH, **rows, **SILENT)
    found.grams = [folder / f"gram_{layer}.h5" for layer in range(3)]
    for layer, path in enumerate(found.grams):
        compute_gram(rows["rows_out"], layer, path, structure=found.structure)
    return found


def learned(made: SimpleNamespace, folder: Path, units: list[list[int]], **given: Any) -> SimpleNamespace:
    """Units of a variant learned in turn and packed: matrices as the file has them, bytes, diagnostics."""
    variant = complete(**given)
    folder.mkdir(exist_ok=True)
    found = SimpleNamespace(weights={}, nbytes=0, refined={}, variant=variant, targets={})
    before = None
    for unit in units:
        grams = [made.grams[layer] for layer in unit]
        name = f"{unit[0]}-{unit[-1]}"
        factors, codes = folder / f"factors_{name}.safetensors", folder / f"codes_{name}.safetensors"
        how = {"dtype": "auto", "batch_tokens": 2 * LENGTH, **SILENT}
        streams = Streams(made.model, made.structure, made.windows, unit, variant, hidden_in=before, **how)
        taken = streams.targets

        def targets(layer, matrices, taken=taken):
            kept = taken(layer, matrices)
            found.targets |= {matrix.name: matrix for matrix in kept}
            return kept

        streams.targets = targets
        arguments = made.model, made.structure, grams
        diagnostics = folder / f"factors_{name}.json"
        learn_unit(*arguments, unit, variant, streams=streams, output=factors, diagnostics=diagnostics, **SILENT)
        streams.write(before := folder / f"streams_{name}.h5")
        report = folder / f"codes_{name}.json"
        quantize_unit(*arguments, factors, unit, variant, output=codes, diagnostics=report, **SILENT)
        found.refined |= read_json(diagnostics).get("refined", {})
        found.nbytes += sum(matrix["nbytes"] for matrix in read_json(report)["matrices"].values())
        file = TensorFile(codes)
        for matrix, spec in file.metadata["matrices"].items():
            tensors = {tensor: file.read(tensor) for tensor in tensor_names(matrix, spec)}
            found.weights[matrix] = unpack(tensors, spec, matrix).reconstruct()
    return found


def inputs(made: SimpleNamespace, weights: dict[str, np.ndarray], names: list[str]) -> tuple[dict, torch.Tensor]:
    """What enters the matrices `names` in a model with these weights, pads left out, and its last hidden states."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32).eval()
    read = read_windows(made.windows, made.structure["vocab_size"])
    ids, mask = torch.from_numpy(read.input_ids), torch.from_numpy(read.attention_mask)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(torch.from_numpy(weight.T.copy()))
    seen: dict[str, np.ndarray] = {}
    for name in names:
        hook = lambda module, rows, name=name: seen.__setitem__(name, rows[0][mask.bool()].double().numpy())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        last = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return seen, last[mask.bool()]


@pytest.mark.parametrize("made", ["qwen2", "gemma3_text"], indirect=True)
def test_a_sequential_target_is_the_least_squares_of_the_outputs_on_what_the_compressed_layers_give(made, tmp_path):
    found = learned(made, tmp_path, [[0], [1, 2]], method="sparsegpt", target="sequential", drift_share=0.75)
    names = [name for name in found.weights if ".layers.2." in name]
    before = {name: weight for name, weight in found.weights.items() if ".layers.2." not in name}
    assert len(names) == 7 and len(before) == 14
    dense, compressed = (inputs(made, weights, names)[0] for weights in ({}, before))
    for name in names:
        x, own, weight = dense[name], compressed[name], ModelFolder(made.model).read_weight(name).astype(np.float64)
        gram = own.T @ own
        ridge = DAMPING * np.diagonal(gram).mean() * np.eye(len(gram))
        expected = weight + 0.75 * np.linalg.solve(gram + ridge, own.T @ (x - own) @ weight)
        np.testing.assert_allclose(found.targets[name].weight(), expected, rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(found.targets[name].metric.gram, gram, rtol=1e-3, atol=1e-3 * gram.max())
        # the outputs that it is to have are nearer to those of the dense model
        assert np.linalg.norm(own @ expected - x @ weight) < np.linalg.norm(own @ weight - x @ weight)
    first = [name for name in found.weights if ".layers.0." in name]
    for name in first:  # nothing has gone wrong before it
        np.testing.assert_array_equal(found.targets[name].weight(), ModelFolder(made.model).read_weight(name))


METHODS = {
    "hybrid": {"atoms": 6, "share_within": SHARED, "max_iter": 1},
    "gptq": {"ratio": 0.75, "codes": {"block_size": 16}},
    "sparsegpt": {"ratio": 0.7, "target": "sequential", "codes": {"value_bits": 8}},
}


@pytest.mark.parametrize("method", list(METHODS))
def test_refined_blocks_give_more_nearly_what_the_dense_ones_do_at_the_same_bytes(made, tmp_path, method):
    settings = {"method": method, **METHODS[method]}
    refine = {"epochs": 4, "learning_rate": 0.02, "batch_tokens": 2 * LENGTH}
    units = [[0], [1, 2]]
    plain = learned(made, tmp_path / "plain", units, **settings, **({} if "target" in settings else {"refine": None}))
    found = learned(made, tmp_path / "refined", units, **settings, refine=refine)
    assert found.nbytes == plain.nbytes
    assert list(found.refined) == ["layer_00", "layer_01", "layer_02"]
    for report in found.refined.values():
        assert report["error"] <= report["error_before"] and report["n_trained"] > 0
    assert found.refined["layer_00"]["epoch"] > 0
    assert found.refined["layer_00"]["error"] < found.refined["layer_00"]["error_before"]
    dense, before, after = (inputs(made, one, [])[1] for one in ({}, plain.weights, found.weights))
    assert (after - dense).norm() < (before - dense).norm()  # of the whole model
    if method == "hybrid":
        again = learned(made, tmp_path / "again", [[0, 1]], **settings, refine=refine)
        for name, weight in again.weights.items():  # in whatever units
            np.testing.assert_array_equal(found.weights[name], weight)
    if method == "gptq":
        name = "model.layers.0.mlp.up_proj"
        ratio = found.weights[name] / np.where(plain.weights[name] == 0, 1, plain.weights[name])
        # under one scale, sixteen inputs of a column, all numbers are multiplied by the same
        groups = ratio.reshape(-1, 16, ratio.shape[1])
        spread = np.ptp(np.where(groups == 0, groups.max(1, keepdims=True), groups), axis=1)
        assert np.median(spread) < 0.02 and np.abs(groups - 1).max() > 0.001


def test_refining_never_makes_a_block_worse(made, tmp_path):
    refine = {"epochs": 1, "learning_rate": 0.1, "batch_tokens": LENGTH}
    plain = learned(made, tmp_path / "plain", [[0]], method="wanda", ratio=0.05)
    found = learned(made, tmp_path / "refined", [[0]], method="wanda", ratio=0.05, refine=refine)
    assert found.refined["layer_00"]["epoch"] == 0
    assert all(np.array_equal(found.weights[name], weight) for name, weight in plain.weights.items())


def test_streams_of_other_settings_are_refused(made, tmp_path):
    learned(made, tmp_path, [[0]], method="wanda", target="sequential")
    variant = complete(method="wanda", target="sequential", drift_share=1.0)
    how = {"hidden_in": tmp_path / "streams_0-0.h5", "dtype": "auto", "batch_tokens": LENGTH, **SILENT}
    with pytest.raises(ArtifactError, match="settings"):
        Streams(made.model, made.structure, made.windows, [1], variant, **how)
    with pytest.raises(ArtifactError, match="after layer 0"):
        Streams(made.model, made.structure, made.windows, [2], complete(method="wanda", target="sequential"), **how)


def test_what_cannot_be_learned_in_turn_is_refused():
    with pytest.raises(ConfigError, match=r"variants.v.refine: unknown key"):
        complete(method="masa", refine={})
    with pytest.raises(ConfigError, match=r"variants.v.target: layers are learned in turn, and here several"):
        complete(method="cospadi", group_size=2, target="sequential")
    with pytest.raises(
        ConfigError, match=r"variants.v.target: codes.rounding optimal goes back to the weight as it is"
    ):
        complete(method="cospadi", codes={"rounding": "optimal"}, target="sequential")
    with pytest.raises(ConfigError, match=r"variants.v.drift_share: 0.25 is of target sequential"):
        complete(method="cospadi", drift_share=0.25)
