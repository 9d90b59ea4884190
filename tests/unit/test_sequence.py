"""Layers learned in turn: targets that make up for the layers before, and refined blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from cospadi.calibration import windows
from cospadi.calibration.collect import collect
from cospadi.calibration.gradients import collect_gradients
from cospadi.calibration.walk import read_windows
from cospadi.compensation import Compensation
from cospadi.config import check_config
from cospadi.errors import ArtifactError, ConfigError
from cospadi.files import ModelFolder, TensorFile, read_json
from cospadi.formats.factorization import tensor_names, unpack
from cospadi.gram import compute_gram
from cospadi.handing import handed_on
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
    how = {"dtype": "float32", "batch_tokens": 2 * LENGTH, "heldout_fraction": 0.25, **SILENT}
    collect(model, found.structure, found.windows, range(3), **rows, **how)
    found.grams = [folder / f"gram_{layer}.h5" for layer in range(3)]
    for layer, path in enumerate(found.grams):
        compute_gram(rows["rows_out"], layer, path, structure=found.structure, heldout_fraction=0.25)
    found.gradients = folder / "gradients.h5"
    back = {"hidden_in": None, "gradient_in": None, "gradient_out": folder / "back.h5", "moments_out": found.gradients}
    collect_gradients(model, found.structure, found.windows, range(found.structure["n_layers"]), **back, **how)
    return found


@pytest.mark.parametrize(
    ("kind", "settings"), [("sequence.Streams", {}), ("compensation.Compensation", {"compensate": {}})]
)
def test_a_unit_that_none_is_behind_hands_nothing_on(tmp_path, monkeypatch, kind, settings):
    of_unit = SimpleNamespace(write=lambda path: Path(path).write_text("for the next"))
    monkeypatch.setattr(f"cospadi.{kind}", lambda *unit, **how: of_unit)
    collection = {"dtype": "float32", "batch_tokens": LENGTH, "heldout_fraction": 0.0}
    for layers, text in (([0, 1], "for the next"), ([2, 3], "")):
        unit, made = ("model", {"n_layers": 4}, "windows", layers, settings), {"streams": tmp_path / f"{layers[0]}.h5"}
        with handed_on(unit, collection, {"streams": [], "more": []}, made, **SILENT) as streams:
            assert streams is of_unit
        assert made["streams"].read_text() == text


def learned(
    made: SimpleNamespace,
    folder: Path,
    units: list[list[int]],
    *,
    heldout_fraction: float = 0.0,
    saved: Path | None = None,
    **given: Any,
) -> SimpleNamespace:
    """Units of a variant learned in turn and packed: matrices as the file has them, bytes, diagnostics."""
    variant = complete(**given)
    folder.mkdir(exist_ok=True)
    found = SimpleNamespace(weights={}, nbytes=0, refined={}, compensated={}, variant=variant, targets={})
    before = None
    for unit in units:
        grams = [made.grams[layer] for layer in unit]
        name = f"{unit[0]}-{unit[-1]}"
        factors, codes = folder / f"factors_{name}.safetensors", folder / f"codes_{name}.safetensors"
        how = {"dtype": "float32", "batch_tokens": 2 * LENGTH, "heldout_fraction": heldout_fraction, **SILENT}
        kind = Streams if variant.get("compensate") is None else Compensation
        how |= {} if saved is None else {"saved": saved}
        streams = kind(made.model, made.structure, made.windows, unit, variant, before=before, **how)
        taken = streams.targets

        def targets(layer, matrices, taken=taken):
            kept = taken(layer, matrices)
            found.targets |= {matrix.name: matrix for matrix in kept}
            return kept

        streams.targets = targets
        arguments = made.model, made.structure, grams
        diagnostics = folder / f"factors_{name}.json"
        of_unit = {"gradient_files": [made.gradients] * len(unit), **SILENT}
        learn_unit(*arguments, unit, variant, streams=streams, output=factors, diagnostics=diagnostics, **of_unit)
        streams.write(before := folder / f"streams_{name}.h5")
        report = folder / f"codes_{name}.json"
        quantize_unit(*arguments, factors, unit, variant, output=codes, diagnostics=report, **of_unit)
        for what in ("refined", "compensated"):
            vars(found)[what].update(read_json(diagnostics).get(what, {}))
        found.nbytes += sum(matrix["nbytes"] for matrix in read_json(report)["matrices"].values())
        file = TensorFile(codes)
        for matrix, spec in file.metadata["matrices"].items():
            tensors = {tensor: file.read(tensor) for tensor in tensor_names(matrix, spec)}
            found.weights[matrix] = unpack(tensors, spec, matrix).reconstruct()
    return found


def inputs(
    made: SimpleNamespace, weights: dict[str, np.ndarray], names: list[str], *, heldout: int = 0
) -> tuple[dict, torch.Tensor]:
    """What enters the modules `names` in a model with these weights, pads left out, and its last hidden states; of all
    windows but the last `heldout`.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32).eval()
    read = read_windows(made.windows, made.structure["vocab_size"])
    ids, mask = (torch.from_numpy(part[: SAMPLES - heldout]) for part in read[:2])
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(torch.from_numpy(weight.T.copy()))
    seen: dict[str, np.ndarray] = {}
    for name in names:
        hook = lambda module, rows, name=name: seen.__setitem__(name, rows[0][mask.bool()].double().numpy())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        last = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return seen, last[mask.bool()]


SITES = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
REPAID = {"o_proj": "", "down_proj": ".post_attention_layernorm"}  # what their outputs are added to


@pytest.mark.parametrize(
    ("made", "given"),
    [
        ("qwen2", {"residual_share": 0.5}),
        ("qwen2", {"residual_share": 0.25, "metric": "gradients", "activation_share": 0.3}),
        ("gemma3_text", {}),
    ],
    indirect=["made"],
)
def test_a_sequential_target_is_the_least_squares_of_the_outputs_on_what_the_compressed_layers_give(
    made, tmp_path, given
):
    settings = {"method": "sparsegpt", "target": "sequential", "drift_share": 0.75, **given}
    found = learned(made, tmp_path, [[0], [1, 2]], **settings, heldout_fraction=0.25)
    names = [name for name in found.weights if ".layers.2." in name]
    assert len(names) == 7 and len(found.weights) == 21
    places = {name: f"{name.rsplit('.', 2)[0]}{REPAID[part]}" for name in names if (part := last(name)) in REPAID}
    dense = inputs(made, {}, [*names, *places.values()], heldout=12)[0]
    for name in names:
        place = 2, SITES[last(name)]
        # those of its own layer that come before it, too
        before = {other: one for other, one in found.weights.items() if (layer_of(other), SITES[last(other)]) < place}
        compressed = inputs(made, before, [name, *places.values()], heldout=12)[0]
        x, own, weight = dense[name], compressed[name], ModelFolder(made.model).read_weight(name).astype(np.float64)
        tokens = np.ones((len(x), 1))
        if "metric" in given:
            with h5py.File(made.gradients) as file:
                squares = file["layer_02"][name]["token_weights"][: len(x)].astype(np.float64)[:, None]
            tokens = 0.7 * squares / squares.sum() + 0.3 / len(x)
        gram, tokens = own.T @ (tokens * own), np.sqrt(tokens)  # few tokens have most of the weight
        fitted = own.T @ (tokens * own)
        ridge = DAMPING * np.diagonal(fitted).mean() * np.eye(len(fitted))
        missing = 0.75 * own.T @ (tokens * (x - own)) @ weight
        target = x @ weight
        if name in places and given.get("residual_share"):
            lacking = dense[places[name]] - compressed[places[name]]
            missing += given["residual_share"] * own.T @ (tokens * lacking)
            target = target + given["residual_share"] * lacking
        expected = weight + np.linalg.solve(fitted + ridge, missing)
        np.testing.assert_allclose(found.targets[name].weight(), expected, rtol=1e-3, atol=3e-4)
        np.testing.assert_allclose(found.targets[name].metric.gram, gram, rtol=1e-3, atol=1e-3 * gram.max())
        assert found.targets[name].weight().flags.c_contiguous  # as those of the model are
        # the outputs that it is to have are nearer to those of the dense model
        after, before = (np.sum(tokens * np.square(own @ one - target)) for one in (expected, weight))
        assert after < before
    first = [name for name in found.weights if ".layers.0." in name and SITES[last(name)] == 0]
    for name in first:  # nothing has gone wrong before it
        np.testing.assert_array_equal(found.targets[name].weight(), ModelFolder(made.model).read_weight(name))


def last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


METHODS = {
    "hybrid": {"atoms": 6, "share_within": SHARED, "max_iter": 1},
    "gptq": {"ratio": 0.7, "codes": {"block_size": 16}, "scale_inputs": True},
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
    how = {"before": tmp_path / "streams_0-0.h5", "dtype": "auto", "batch_tokens": LENGTH, **SILENT}
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
    with pytest.raises(ConfigError, match=r"variants.v.residual_share: 0.5 is of target sequential"):
        complete(method="cospadi", residual_share=0.5)
    assert not {"residual_share", "compensate"} & complete(method="wanda").keys()
