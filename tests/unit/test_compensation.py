"""Layers that make up for those before them: at the same bytes, in whatever units, and what they hand on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from cospadi.arrays import held_out_of
from cospadi.calibration.windows import write_windows
from cospadi.compensation import Compensation
from cospadi.errors import ArtifactError, ConfigError, NumericalError
from cospadi.factor_training import _Place
from cospadi.files import ModelFolder, TensorFile
from cospadi.formats.factorization import Factorization
from cospadi.quantization import as_stored
from cospadi.student import Student

from .test_distillation import divergence, packed
from .test_distillation import learned as independent
from .test_sequence import LENGTH, SAMPLES, SILENT, complete, learned, made  # noqa: F401

HOW = {"every": 1, "epochs": 2, "learning_rate": 0.004, "batch_tokens": 2 * LENGTH, "samples": 24}
# Methods whose numbers are rounded at once, entropy-coded, of a trellis, and with a dictionary that layers' own
# matrices share
METHODS = {
    "gptq": {"ratio": 0.8, "codes": {"block_size": 16}},
    "ectcq": {"ratio": 0.85, "metric": "gradients"},
    "trellis": {"ratio": 0.8},
    "cospadi": {"ratio": 0.5, "max_iter": 2, "share_within": [["gate_proj", "up_proj"]], "codes": {"value_bits": 8}},
}


def nbytes_of(path: Path) -> int:
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in TensorFile(path).entries.values())


@pytest.mark.parametrize("method", list(METHODS))
def test_layers_behind_make_up_for_what_was_lost_at_the_same_bytes(made, tmp_path, method):  # noqa: F811
    settings = {"method": method, **METHODS[method]}
    variant = complete(**settings)
    plain = packed(made, independent(made, tmp_path / "plain", variant), variant)
    found = learned(made, tmp_path / "found", [[0], [1, 2]], **settings, compensate=HOW)
    assert list(found.compensated) == ["layer_00", "layer_01", "layer_02"]
    for report in found.compensated.values():
        assert report["epoch"] > 0 and report["kl"] < report["kl_before"]
        assert report["kl"] == min(one["error_heldout"] for one in report["history"])
    first = [name for name in found.weights if ".layers.0." in name]
    before, after = (divergence(made, one.weights, slice(0, SAMPLES)) for one in (plain, found))
    assert after < 0.97 * before
    # what the first layers are is what they were
    for name in first:
        np.testing.assert_array_equal(found.weights[name], plain.weights[name])
    assert sum(map(nbytes_of, tmp_path.glob("found/codes_*.safetensors"))) == pytest.approx(plain.nbytes, rel=2e-3)


def test_units_decide_nothing(made, tmp_path):  # noqa: F811
    settings = {"method": "gptq", **METHODS["gptq"], "compensate": HOW, "heldout_fraction": 0.25}
    one = learned(made, tmp_path / "one", [[0, 1, 2]], **settings)
    for name, units in {"three": [[0], [1], [2]], "two": [[0, 1], [2]]}.items():
        other = learned(made, tmp_path / name, units, **settings)
        assert other.compensated.keys() == one.compensated.keys()
        for matrix, weight in one.weights.items():
            np.testing.assert_array_equal(other.weights[matrix], weight)


def test_an_interrupted_training_goes_on_where_it_was_to_the_same_weights(made, tmp_path, monkeypatch):  # noqa: F811
    settings = {"method": "gptq", **METHODS["gptq"], "compensate": HOW}
    units = [[0, 1], [2]]
    whole = learned(made, tmp_path / "whole", units, **settings)
    monkeypatch.setattr("cospadi.factor_training.SAVE_SECONDS", 0)
    backward, calls, read = Student.backward, [], []
    begin = _Place.read

    def reading(self):
        found = begin(self)
        read.append(found and found["step"])
        return found

    monkeypatch.setattr(_Place, "read", reading)

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 35:  # in the second training, behind the second layer, of 22 steps each
            raise KeyboardInterrupt
        return backward(self, batch)

    monkeypatch.setattr(Student, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learned(made, tmp_path / "resumed", units, saved=tmp_path, **settings)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["training_02.pt"]
    read.clear()
    found = learned(made, tmp_path / "resumed", units, saved=tmp_path, **settings)
    assert read == [None, 34 - 22, None]
    assert not list(tmp_path.glob("*.pt"))
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)
    # what is trained is the same at the start of the first training, what is before it is not: nothing is taken
    calls[:] = [None] * 30
    with pytest.raises(KeyboardInterrupt):
        learned(made, tmp_path / "resumed", units, saved=tmp_path, **settings)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["training_01.pt"]
    monkeypatch.setattr("cospadi.compensation.as_stored", lambda *given, stored=as_stored: 1.01 * stored(*given))
    read.clear()
    learned(made, tmp_path / "other", units, saved=tmp_path, **settings)
    assert read == [None, None, None]


def test_a_part_of_an_epoch_is_another_part_in_each_training(made, tmp_path, monkeypatch):  # noqa: F811
    batches: list[list[int]] = []
    backward = Student.backward

    def seen(self, batch):
        batches.append(batch.tolist())
        return backward(self, batch)

    monkeypatch.setattr(Student, "backward", seen)
    settings = {"method": "wanda", "compensate": {**HOW, "epochs": 0.3}}
    found = learned(made, tmp_path / "found", [[0], [1]], **settings)
    # of 24 windows 3 are held out, and 3 of the 11 pairs of the others are three tenths
    (first,), (second,) = (report["history"] for report in found.compensated.values())
    assert first["iteration"] == second["iteration"] == 1 and len(batches) == 6
    parts = [[window for batch in half for window in batch] for half in (batches[:3], batches[3:])]
    assert all(len(set(part)) == 6 and max(part) < 21 for part in parts) and set(parts[0]) != set(parts[1])
    assert 0 < first["error"] < 10 * first["error_heldout"]


def test_layers_are_trained_after_every_few(made, tmp_path):  # noqa: F811
    settings = {"method": "wanda", "compensate": {**HOW, "every": 2}}
    found = learned(made, tmp_path / "found", [[0], [1], [2]], **settings)
    assert list(found.compensated) == ["layer_01"]
    folder = ModelFolder(made.model)
    for name, matrix in found.targets.items():
        as_it_is = np.array_equal(matrix.weight(), folder.read_weight(name))
        assert as_it_is == (".layers.2." not in name)
    # what is handed on is of the layers behind, and the next unit takes it
    with h5py.File(tmp_path / "found/streams_2-2.h5") as file:
        assert {name.split(".")[2] for name in file["trained"]} == {"3"}
        assert {name.split(".")[2] for name in file["stored"]} == {"0", "1", "2"}
    how = {"before": tmp_path / "found/streams_2-2.h5", "dtype": "float32", "batch_tokens": LENGTH, **SILENT}
    Compensation(made.model, made.structure, made.windows, [3], found.variant, **how)


def test_what_is_trained_is_the_divergence_with_learned_layers_as_the_file_has_them(made, tmp_path):  # noqa: F811
    found = learned(made, tmp_path, [[0], [1]], method="gptq", **METHODS["gptq"], compensate=HOW)
    held_out = held_out_of(HOW["samples"])
    first = {name: weight for name, weight in found.weights.items() if ".layers.0." in name}
    report = found.compensated["layer_00"]
    assert report["kl_before"] == pytest.approx(divergence(made, first, held_out), rel=1e-4)
    # and behind the training, with the weights that the next layers are learned from
    with h5py.File(tmp_path / "streams_0-0.h5") as file:
        behind = {name: weight[:] for name, weight in file["trained"].items()}
    assert {name.split(".")[2] for name in behind} == {"1", "2", "3"}
    assert report["kl"] == pytest.approx(divergence(made, first | behind, held_out), rel=1e-4)
    np.testing.assert_array_equal(
        found.targets["model.layers.1.mlp.up_proj"].weight(), behind["model.layers.1.mlp.up_proj"]
    )


def test_training_never_makes_the_layers_behind_worse(made, tmp_path):  # noqa: F811
    plain = learned(made, tmp_path / "plain", [[0, 1, 2]], method="wanda", target="sequential", drift_share=0.0)
    wild = {**HOW, "epochs": 1, "learning_rate": 0.1}
    found = learned(made, tmp_path / "wild", [[0, 1, 2]], method="wanda", compensate=wild, ratio=0.05)
    assert found.compensated["layer_00"]["epoch"] == 0
    assert found.compensated["layer_00"]["kl"] == found.compensated["layer_00"]["kl_before"]
    folder = ModelFolder(made.model)
    assert all(np.array_equal(one.weight(), folder.read_weight(name)) for name, one in found.targets.items())
    assert found.weights.keys() == plain.weights.keys()


def test_what_stays_as_it_is_is_not_what_training_made_of_it(made, tmp_path):  # noqa: F811
    """Nothing is learned of the second layer: the checkpoint has it as the model had it."""
    settings = {"method": "gptq", **METHODS["gptq"], "compensate": HOW}
    found = learned(made, tmp_path, [[0]], **settings)
    with h5py.File(tmp_path / "streams_0-0.h5") as file:
        behind = {name: weight[:] for name, weight in file["trained"].items()}
    how = {"before": tmp_path / "streams_0-0.h5", "dtype": "auto", "batch_tokens": LENGTH, **SILENT}
    second = Compensation(made.model, made.structure, made.windows, [1], complete(**settings), **how)
    factors, reports = second.compressed(1, {})
    others = {name: weight for name, weight in behind.items() if ".layers.1." not in name}
    expected = divergence(made, found.weights | others, held_out_of(HOW["samples"]))
    assert factors == {} and reports["compensated"]["kl_before"] == pytest.approx(expected, rel=1e-4)


def test_nothing_is_behind_the_last_layer(made):  # noqa: F811
    how = {"before": None, "dtype": "float32", "batch_tokens": LENGTH, **SILENT}
    last = Compensation(made.model, made.structure, made.windows, [3], complete(method="wanda", compensate=HOW), **how)
    assert last.compressed(3, {}) == ({}, {})


def test_what_other_settings_or_layers_handed_on_is_refused(made, tmp_path):  # noqa: F811
    settings = {"method": "wanda", "compensate": HOW}
    learned(made, tmp_path, [[0]], **settings)
    streams = tmp_path / "streams_0-0.h5"
    how = {"before": streams, "dtype": "auto", "batch_tokens": LENGTH, **SILENT}
    arguments = made.model, made.structure, made.windows
    Compensation(*arguments, [1], complete(**settings), **how)
    with pytest.raises(ArtifactError, match="settings"):
        Compensation(*arguments, [1], complete(method="wanda", compensate={**HOW, "every": 2}), **how)
    with pytest.raises(ArtifactError, match="last_layer"):
        Compensation(*arguments, [2], complete(**settings), **how)
    with pytest.raises(ArtifactError, match="dtype"):
        Compensation(*arguments, [1], complete(**settings), **{**how, "dtype": "bfloat16"})
    with h5py.File(streams, "a") as file:
        del file["trained"]["model.layers.1.mlp.up_proj"]
        file["trained"]["model.layers.1.mlp.up_proj"] = np.zeros((3, 4), np.float32)
    with pytest.raises(ArtifactError, match=r"up_proj is float32 \(3, 4\)"):
        Compensation(*arguments, [1], complete(**settings), **how)
    streams.write_bytes(streams.read_bytes()[:2000])
    with pytest.raises(ArtifactError, match="to learn the layers up to 0 anew"):
        Compensation(*arguments, [1], complete(**settings), **how)


def test_training_that_diverges_says_which_option_is_to_blame(made, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Student, "backward", lambda self, batch: float("nan"))
    with pytest.raises(NumericalError, match=r"compensate\.learning_rate"):
        learned(made, tmp_path, [[0]], method="wanda", compensate=HOW)


def test_what_cannot_go_together_is_refused():
    with pytest.raises(ConfigError, match=r"variants.v.compensate: layers are fitted to those before them by target"):
        complete(method="wanda", compensate={}, target="sequential")
    with pytest.raises(ConfigError, match=r"variants.v.compensate: layers are fitted to those before them by refine"):
        complete(method="wanda", compensate={}, refine={})
    with pytest.raises(ConfigError, match=r"variants.v.compensate: unknown key"):
        complete(method="masa", compensate={})
    with pytest.raises(ConfigError, match=r"variants.v.compensate: layers are learned in turn, and here several"):
        complete(method="cospadi", group_size=2, compensate={})
    with pytest.raises(ConfigError, match=r"variants.v.compensate: codes.rounding optimal goes back"):
        complete(method="cospadi", codes={"rounding": "optimal"}, compensate={})
    assert (
        complete(method="trellis", ratio=0.8, compensate={})["compensate"]
        == complete(method="wanda", compensate={"every": 5})["compensate"]
    )
    assert complete(method="hybrid", compensate={}, distill={})["distill"]["epochs"] == 2


def test_other_windows_are_trained_on_but_those_that_are_kept_out(made, tmp_path):  # noqa: F811
    ids = np.random.default_rng(0).integers(0, 390, (SAMPLES, LENGTH), np.int32)  # the calibration's
    more = np.concatenate([ids[-4:], np.random.default_rng(1).integers(0, 390, (20, LENGTH), np.int32)])
    write_windows(tmp_path / "more.h5", more, np.ones(more.shape, np.uint8), seed=42)
    variant = complete(method="wanda", ratio=0.7, compensate={**HOW, "samples": 20})
    how = {"before": None, "dtype": "float32", "batch_tokens": LENGTH, "heldout_fraction": 0.25, **SILENT}
    own = Compensation(made.model, made.structure, made.windows, [0], variant, more=tmp_path / "more.h5", **how)
    zero = {f"model.layers.0.mlp.{name}_proj": np.zeros((48, 96), np.float32) for name in ("gate", "up")}
    for name, weight in zero.items():
        own.put(name, Factorization(None, weight, support="dense"))
    _, reports = own.compressed(0, dict.fromkeys(zero))
    # the last eighth of the 20 behind those that are kept out, by transformers
    at = SimpleNamespace(**{**vars(made), "windows": tmp_path / "more.h5"})
    behind = held_out_of(20)
    expected = divergence(at, zero, slice(4 + behind.start, 4 + behind.stop))
    assert reports["compensated"]["kl_before"] == pytest.approx(expected, rel=1e-3) and expected > 0.01


def test_one_window_trains_nothing(made: SimpleNamespace, tmp_path):  # noqa: F811
    """There is none to choose the epoch by, and none is trained on."""
    variant = complete(method="wanda", compensate=HOW)
    alone = tmp_path / "calibration.h5"
    write_windows(alone, np.arange(LENGTH, dtype=np.int32)[None], np.ones((1, LENGTH), np.uint8), seed=1)
    how = {"before": None, "dtype": "float32", "batch_tokens": LENGTH, **SILENT}
    _, reports = Compensation(made.model, made.structure, alone, [0], variant, **how).compressed(0, {})
    assert reports["compensated"]["epoch"] == 0 and reports["compensated"]["history"] == []
