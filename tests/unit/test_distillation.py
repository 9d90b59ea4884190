"""Factors of a whole model trained end to end: against a plain computation, at the same bytes, never worse."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from cospadi.arrays import held_out_of
from cospadi.calibration.walk import Chunk, Windows, read_windows
from cospadi.calibration.windows import write_windows
from cospadi.distillation import distill
from cospadi.errors import ArtifactError, ConfigError, NumericalError
from cospadi.files import TensorFile
from cospadi.formats.factorization import Factorization, tensor_names, unpack
from cospadi.learning import learn_unit
from cospadi.progress import read_distilled
from cospadi.quantization import quantize_unit
from cospadi.structure import inspect_model
from cospadi.student import Student, teach

from .test_sequence import LENGTH, SAMPLES, SHARED, SILENT, complete, made  # noqa: F401

UNITS = {"layer_00": [0], "layers_01-02": [1, 2]}
OPTIONS = {"epochs": 3, "learning_rate": 0.002, "batch_tokens": 2 * LENGTH}


def learned(made: SimpleNamespace, folder: Path, variant: dict[str, Any]) -> dict[Path, list[int]]:  # noqa: F811
    """Factors of all units."""
    folder.mkdir(exist_ok=True)
    files = {folder / f"{name}.safetensors": layers for name, layers in UNITS.items()}
    for path, layers in files.items():
        arguments = made.model, made.structure, [made.grams[layer] for layer in layers], layers, variant
        gradients = [made.gradients] * len(layers)
        diagnostics = path.with_suffix(".json")
        learn_unit(*arguments, output=path, diagnostics=diagnostics, gradient_files=gradients, **SILENT)
    return files


def packed(made: SimpleNamespace, files: dict[Path, list[int]], variant: dict[str, Any]) -> SimpleNamespace:  # noqa: F811
    """Matrices as the checkpoint has them, and its bytes."""
    found = SimpleNamespace(weights={}, nbytes=0)
    for path, layers in files.items():
        grams, codes = [made.grams[layer] for layer in layers], path.with_suffix(".codes")
        how = {"gradient_files": [made.gradients] * len(layers), "diagnostics": path.with_suffix(".report"), **SILENT}
        quantize_unit(made.model, made.structure, grams, path, layers, variant, output=codes, **how)
        file = TensorFile(codes)
        found.nbytes += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in file.entries.values())
        for matrix, spec in file.metadata["matrices"].items():
            tensors = {tensor: file.read(tensor) for tensor in tensor_names(matrix, spec)}
            found.weights[matrix] = unpack(tensors, spec, matrix).reconstruct()
    return found


def trained(
    made: SimpleNamespace,  # noqa: F811
    files: dict[Path, list[int]],
    variant: dict[str, Any],
    folder: Path,
    **how: Any,
) -> tuple[dict[Path, list[int]], dict[str, Any]]:
    """Files of trained factors, and the report."""
    arguments = made.model, made.model, made.structure, made.windows, files, variant
    report = distill(*arguments, output=folder, **{"dtype": "float32", **how}, **SILENT)
    assert report == read_distilled(folder)
    return {folder / path.name: layers for path, layers in files.items()}, report


def student(teacher: Path, folder: Path, structure: dict[str, Any], read: Windows, n_windows: int) -> Student:
    computed = {"dtype": "float32", "device": "cpu"}
    return Student(folder, structure, read, teach(teacher, read, n_windows, **computed, **SILENT), **computed)


def divergence(made: SimpleNamespace, weights: dict[str, np.ndarray], windows: slice) -> float:  # noqa: F811
    """Nats a token that transformers' model with these weights is from the dense one."""
    from transformers import AutoModelForCausalLM

    read = read_windows(made.windows, made.structure["vocab_size"])
    ids, mask = (torch.from_numpy(part[windows]) for part in read[:2])
    found = []
    for own in ({}, weights):
        model = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32).eval()
        for name, weight in own.items():
            model.get_submodule(name).weight.data.copy_(torch.from_numpy(weight.T.copy()))
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)[mask.bool()])
    dense, own = found
    return float(kl_div(own, dense, log_target=True, reduction="batchmean"))


METHODS = {
    "hybrid": {"atoms": 6, "share_within": SHARED, "max_iter": 1},
    "cospadi": {"codes": {"value_bits": 8}, "max_iter": 2},
    "svd_llm": {},
    "gptq": {"ratio": 0.7, "codes": {"block_size": 16}, "scale_inputs": True},
    "ectcq": {"ratio": 0.8, "metric": "gradients"},
}


@pytest.mark.parametrize("method", list(METHODS))
def test_a_distilled_model_predicts_more_nearly_what_the_dense_one_does_at_the_same_bytes(made, tmp_path, method):  # noqa: F811
    variant = complete(method=method, **METHODS[method], distill=OPTIONS)
    files = learned(made, tmp_path / "learned", variant)
    plain = packed(made, files, variant | {"distill": None})
    files, report = trained(made, files, variant, tmp_path / "distilled")
    found = packed(made, files, variant)
    assert found.nbytes == plain.nbytes
    assert report["epoch"] > 0 and report["n_trained"] > 0
    assert report["kl"] < report["kl_before"]
    assert [entry["iteration"] for entry in report["history"]] == [1, 2, 3]
    assert report["kl"] == min(entry["error_heldout"] for entry in report["history"])
    # what the checkpoint will hold, by transformers' own model; values are rounded to bfloat16 or 8 bits between
    held_out = held_out_of(SAMPLES)
    before, after = (divergence(made, one.weights, held_out) for one in (plain, found))
    assert after < before
    np.testing.assert_allclose([before, after], [report["kl_before"], report["kl"]], rtol=0.03)
    for name, weight in found.weights.items():
        if method in ("gptq", "ectcq"):  # whole numbers stay
            np.testing.assert_array_equal(weight == 0, plain.weights[name] == 0)
        assert not np.array_equal(weight, plain.weights[name])


@pytest.mark.parametrize("method", ["ectcq", "gptq", "hybrid"])
def test_a_model_is_trained_in_bfloat16(made, tmp_path, method):  # noqa: F811
    # a step is smaller than what numbers near 1 differ by in bfloat16
    variant = complete(method=method, **METHODS[method], distill=OPTIONS)
    _, report = trained(made, learned(made, tmp_path, variant), variant, tmp_path / "distilled", dtype="bfloat16")
    assert report["epoch"] > 0 and report["kl"] < report["kl_before"]


def test_gradients_are_those_of_the_divergence(made):  # noqa: F811
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(0)
    read = read_windows(made.windows, made.structure["vocab_size"])
    name = "model.layers.1.mlp.up_proj"
    dense = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32).eval()
    weight = dense.get_submodule(name).weight.detach()
    mask = rng.random(weight.T.shape) < 0.5
    codes = np.where(mask, weight.T.numpy(), 0).astype(np.float32)
    model = student(made.model, made.model, made.structure, read, SAMPLES)
    module = model.give([(name, Factorization(None, codes, support="bitmask", mask=mask))])[name]
    batch = np.array([1, 5])  # one of them has pads
    error = model.backward(batch)

    ids, attended = (torch.from_numpy(part[batch]) for part in read[:2])
    with torch.no_grad():
        log_p = dense(input_ids=ids, attention_mask=attended).logits.log_softmax(-1)[attended.bool()]
    parameter = torch.nn.Parameter(torch.from_numpy(codes.T.copy()))
    dense.get_submodule(name).weight = parameter
    log_q = dense(input_ids=ids, attention_mask=attended).logits.log_softmax(-1)[attended.bool()]
    expected = kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    expected.backward()
    assert error == pytest.approx(expected.item(), rel=1e-4)
    (found,) = module.parameters()
    wanted = parameter.grad.T * torch.from_numpy(mask)
    torch.testing.assert_close(found.grad, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_a_model_of_fewer_blocks_learns_from_the_one_with_all(made, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM

    dense, small = (AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32).eval() for _ in range(2))
    del small.model.layers[1]
    small.config.num_hidden_layers = 2
    small.config.layer_types = small.config.layer_types[:2]
    small.save_pretrained(tmp_path)
    for file in made.model.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    read = read_windows(made.windows, made.structure["vocab_size"])
    model = student(made.model, tmp_path, inspect_model(tmp_path), read, 4)
    ids, attended = (torch.from_numpy(part[:4]) for part in read[:2])
    small.model.layers[1].self_attn.layer_idx = 1
    with torch.no_grad():
        log_p, log_q = (
            one(input_ids=ids, attention_mask=attended, use_cache=False).logits.double().log_softmax(-1)
            for one in (dense, small)
        )
    kept = attended.bool()
    expected = kl_div(log_q[kept], log_p[kept], log_target=True, reduction="batchmean").item()
    assert expected > 0.01
    assert model.divergence(slice(0, 4)) == pytest.approx(expected, rel=1e-3)


def test_training_never_makes_a_model_worse(made, tmp_path):  # noqa: F811
    variant = complete(method="wanda", ratio=0.05, distill={"epochs": 1, "learning_rate": 0.1, "samples": 16})
    files = learned(made, tmp_path / "learned", variant)
    distilled, report = trained(made, files, variant, tmp_path / "distilled")
    assert report["epoch"] == 0 and report["kl"] == report["kl_before"] and len(report["history"]) == 1
    for before, after in zip(files, distilled, strict=True):
        one, other = TensorFile(before), TensorFile(after)
        assert one.entries.keys() == other.entries.keys()
        assert all(np.array_equal(one.read(name), other.read(name)) for name in one.entries)


def test_windows_kept_out_and_one_window_alone_are_not_trained_on(made, tmp_path):  # noqa: F811
    variant = complete(method="wanda", distill={"samples": 2})
    files = learned(made, tmp_path / "learned", variant)
    _, report = trained(made, files, variant, tmp_path / "two")
    assert len(report["history"]) == 2  # one to train on, one to look at
    # of 48 windows all but the first are kept out of everything
    _, report = trained(made, files, variant, tmp_path / "one", heldout_fraction=0.97)
    assert report["history"] == [] and report["epoch"] == 0


@pytest.mark.parametrize("method", ["hybrid", "gptq"])
def test_an_interrupted_job_goes_on_where_it_was_to_the_same_numbers(made, tmp_path, monkeypatch, method):  # noqa: F811
    variant = complete(method=method, **METHODS[method], distill=OPTIONS)
    files = learned(made, tmp_path / "learned", variant)
    whole, expected = trained(made, files, variant, tmp_path / "whole")

    monkeypatch.setattr("cospadi.factor_training.SAVE_SECONDS", 0)
    backward, calls, lines = Student.backward, [], []

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) in (5, 30):  # in the first epoch, of 21 steps, and in the second
            raise KeyboardInterrupt
        return backward(self, batch)

    monkeypatch.setattr(Student, "backward", interrupted)
    saved = tmp_path / "distilling.pt"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(made, files, variant, tmp_path / "resumed", saved=saved)
        assert saved.exists() and not (tmp_path / "resumed").exists()
    arguments = made.model, made.model, made.structure, made.windows, files, variant
    report = distill(*arguments, output=tmp_path / "resumed", saved=saved, dtype="float32", log=lines.append)
    assert len(calls) == 3 * 21 + 2 and any("going on from step 28 of 63" in line for line in lines)
    assert not saved.exists()
    assert {**report, "seconds": 0} == {**expected, "seconds": 0}
    for path in whole:
        one, other = TensorFile(path), TensorFile(tmp_path / "resumed" / path.name)
        assert all(np.array_equal(one.read(name), other.read(name)) for name in one.entries)


def test_what_another_training_left_is_not_gone_on_from(made, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("cospadi.factor_training.SAVE_SECONDS", 0)
    saved, backward, stop = tmp_path / "distilling.pt", Student.backward, [7]

    def interrupted(self, batch):
        stop[0] -= 1
        if stop[0] == 0:
            raise KeyboardInterrupt
        return backward(self, batch)

    monkeypatch.setattr(Student, "backward", interrupted)
    one, other = (
        complete(method="wanda", distill={**OPTIONS, "epochs": 1, "learning_rate": rate}) for rate in (1e-3, 2e-3)
    )
    files = learned(made, tmp_path / "learned", one)
    with pytest.raises(KeyboardInterrupt):
        trained(made, files, one, tmp_path / "one", saved=saved)
    whole = saved.read_bytes()
    wanted = trained(made, files, other, tmp_path / "wanted")[1]["history"]
    for left in (whole, whole[: len(whole) // 2], b""):
        saved.write_bytes(left)
        assert trained(made, files, other, tmp_path / "other", saved=saved)[1]["history"] == wanted
        assert not saved.exists()


def test_other_windows_are_trained_on_but_none_that_the_calibration_keeps_out(made, tmp_path, monkeypatch):  # noqa: F811
    read = read_windows(made.windows, made.structure["vocab_size"])
    other = np.random.default_rng(1).integers(0, 390, (SAMPLES, LENGTH), np.int32)
    ids = np.concatenate([read.input_ids, other])[np.random.default_rng(2).permutation(2 * SAMPLES)].astype(np.int32)
    write_windows(tmp_path / "more.h5", ids, np.ones_like(ids, np.uint8), seed=3)
    seen = []
    run = Chunk.run
    monkeypatch.setattr(
        Chunk, "run", lambda self, windows, *rest, **how: seen.append(windows) or run(self, windows, *rest, **how)
    )
    variant = complete(method="wanda", distill={"epochs": 1, "samples": 80})
    files = learned(made, tmp_path / "learned", variant)
    how = {"more": tmp_path / "more.h5", "heldout_fraction": 0.25}
    _, report = trained(made, files, variant, tmp_path / "distilled", **how)
    kept_out = {row.tobytes() for row in read.input_ids[36:]}
    assert len(kept_out) == 12 and report["n_windows"] == 70  # of 84, of which 80 are asked for and ten look on
    (used,) = {id(one): one for one in seen}.values()
    rows = [row.tobytes() for row in used.input_ids]
    assert len(rows) == 84 and kept_out.isdisjoint(rows)
    assert {row.tobytes() for row in read.input_ids[:36]} <= set(rows)


def test_factors_trained_otherwise_are_refused(made, tmp_path):  # noqa: F811
    variant = complete(method="wanda", distill={"epochs": 1, "samples": 4})
    files = learned(made, tmp_path / "learned", variant)
    distilled, _ = trained(made, files, variant, tmp_path / "distilled")
    with pytest.raises(ArtifactError, match="distilled"):
        packed(made, files, variant)
    with pytest.raises(ArtifactError, match="distilled"):
        packed(made, distilled, complete(method="wanda", distill={"epochs": 2, "samples": 4}))
    with pytest.raises(ArtifactError, match="settings"):
        trained(made, files, complete(method="wanda", ratio=0.3, distill={}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_training_that_diverges_names_the_option(made, tmp_path, monkeypatch):  # noqa: F811
    variant = complete(method="wanda", distill={"epochs": 1, "samples": 4})
    files = learned(made, tmp_path / "learned", variant)
    monkeypatch.setattr(Student, "backward", lambda self, batch: float("nan"))
    with pytest.raises(NumericalError, match=r"set a lower distill\.learning_rate"):
        trained(made, files, variant, tmp_path / "distilled")
    assert not (tmp_path / "distilled").exists()


def test_what_has_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match=r"variants.v.distill: unknown key"):
        complete(method="masa", distill={})
    with pytest.raises(ConfigError, match=r"variants.v.distill: codes.rounding optimal goes back to the weight"):
        complete(method="cospadi", codes={"rounding": "optimal"}, distill={})
    with pytest.raises(ConfigError, match=r"variants.v.distill: paths and scales of a trellis"):
        complete(method="trellis", distill={})
    with pytest.raises(ConfigError, match=r"variants.v.distill: numbers and steps are decided together"):
        complete(method="ectcq", distill={})
    assert complete(method="cospadi", group_size=2, share=["gate_proj"], distill={})["distill"]["epochs"] == 2
