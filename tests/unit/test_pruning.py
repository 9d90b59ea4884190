"""Depth pruning: distances, choice of blocks, transforms, folding."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cospadi.calibration.activations import calibration_of
from cospadi.calibration.walk import Place, Walk
from cospadi.calibration.windows import write_windows
from cospadi.errors import ArtifactError, ConfigError, NumericalError, UnsupportedModelError
from cospadi.files import ModelFolder, read_json, write_json
from cospadi.pruning import PRUNERS
from cospadi.pruning.distances import measure
from cospadi.pruning.edit import Edit
from cospadi.pruning.estimators import Moments, Rows, fit_cosine
from cospadi.pruning.fitting import fit_transforms
from cospadi.pruning.folding import insert_transform, prune, read_transforms
from cospadi.pruning.selection import (
    choose,
    contiguous,
    cuts_of,
    least_influence,
    provenance,
    random_cut,
    read_selection,
    select,
    several,
)
from cospadi.structure import inspect_model

FOLDABLE = ("llama", "mistral", "qwen2", "qwen3")


def walk_of(folder: Path, windows: Path, dtype: str = "float32", blocks_per_job: int = 0) -> Walk:
    """A walk through a tiny model that tells nothing."""
    return Walk(
        model_folder=folder,
        structure=inspect_model(folder),
        windows=windows,
        dtype=dtype,
        batch_tokens=128,
        blocks_per_job=blocks_per_job,
        log=lambda line: None,
    )


def settings(method: str, **options) -> dict:
    defaults = {name: part["default"] for name, part in PRUNERS[method].options.items() if "default" in part}
    return {"method": method, **defaults, **options}


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Ten windows of 32 tokens; some have pads, on the right and on the left."""
    draw = np.random.default_rng(0)
    mask = np.ones((10, 32), np.uint8)
    mask[1, 20:] = 0
    mask[6, 1:] = 0
    mask[9, :5] = 0
    write_windows(tmp_path / "windows.h5", draw.integers(0, 390, mask.shape, np.int32), mask)
    return tmp_path / "windows.h5"


def full_pass(folder: Path, windows: Path) -> dict[str, torch.Tensor]:
    """States of all tokens that are no pads, from the whole model: stream (block + 1), mlp and residual of block."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with h5py.File(windows) as file:
        ids, mask = (torch.from_numpy(file[key][:].astype(np.int64)) for key in ("input_ids", "attention_mask"))
    found = {}

    def keep(name):
        return lambda module, inputs, output: found.update({name: output[mask.bool()]})

    layers = model.model.layers
    for index, block in enumerate(layers):
        block.mlp.register_forward_hook(keep(f"mlp {index}"))
        block.register_forward_hook(keep(f"stream {index + 1}"))
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for index in range(len(layers)):
        assert torch.equal(states[index][mask.bool()], found.get(f"stream {index}", states[0][mask.bool()]))
    found["stream 0"] = states[0][mask.bool()]
    return found


# --- walking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOLDABLE)
@pytest.mark.parametrize("blocks_per_job", [0, 1, 3])
def test_walk_sees_what_the_whole_model_sees(tiny_model, windows, family, blocks_per_job):
    folder = tiny_model(family)
    expected = full_pass(folder, windows)
    places = [Place("output", -1), Place("mlp", 1), Place("residual", 1), Place("output", 1), Place("output", 3)]
    (group,) = walk_of(folder, windows, blocks_per_job=blocks_per_job).groups(places)
    names = ["stream 0", "mlp 1", None, "stream 2", "stream 4"]
    for place, name in zip(places, names, strict=True):
        if name is not None:
            torch.testing.assert_close(group.rows[place], expected[name], rtol=1e-4, atol=1e-5)
    # Y + M is what leaves the block: this is what a linear map behind M can be folded into
    total = group.rows[places[1]] + group.rows[places[2]]
    torch.testing.assert_close(total, group.rows[places[3]], rtol=1e-5, atol=1e-6)
    assert group.lengths.tolist() == [32, 20, 32, 32, 32, 32, 1, 32, 32, 27]


def test_groups_of_windows_follow_each_other(tiny_model, windows, monkeypatch):
    folder = tiny_model("llama")
    places = [Place("output", 2), Place("mlp", 0)]
    (whole,) = walk_of(folder, windows).groups(places)
    monkeypatch.setattr("cospadi.calibration.walk.GROUP_BYTES", 1)  # a batch, four windows, is the least
    for blocks in (0, 2):
        groups = list(walk_of(folder, windows, blocks_per_job=blocks).groups(places))
        assert [len(group.lengths) for group in groups] == [4, 4, 2]
        for place in places:
            together = torch.cat([group.rows[place] for group in groups])
            torch.testing.assert_close(together, whole.rows[place], rtol=1e-4, atol=1e-5)
    (first,) = walk_of(folder, windows).groups(places, samples=3)
    assert len(first.rows[places[0]]) == 32 + 20 + 32


@pytest.mark.parametrize("blocks_per_job", [0, 2])
def test_the_edited_model_is_the_one_that_is_written(tiny_model, windows, tmp_path, blocks_per_job):
    folder = tiny_model("qwen2", dtype="float32")
    structure = inspect_model(folder)
    transform = np.random.default_rng(1).normal(size=(48, 48)) / 7
    prune(folder, structure, [1, 2], tmp_path / "pruned", transforms={0: transform}, settings={})
    places = [Place("output", 3, True), Place("mlp", 3, True), Place("output", 3)]
    edit = Edit(frozenset({1, 2}), {0: transform})
    (group,) = walk_of(folder, windows, blocks_per_job=blocks_per_job).groups(places, edit=edit)
    expected = full_pass(tmp_path / "pruned", windows)
    torch.testing.assert_close(group.rows[places[0]], expected["stream 2"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(group.rows[places[1]], expected["mlp 1"], rtol=1e-4, atol=1e-4)
    # and the model as it is stays as it is, in the same walk
    torch.testing.assert_close(group.rows[places[2]], full_pass(folder, windows)["stream 4"], rtol=1e-4, atol=1e-4)


def test_values_that_are_not_finite_are_named(tiny_model, windows):
    folder = tiny_model("llama")
    places = [Place("mlp", 1)]
    edit = Edit(frozenset(), {1: np.full((48, 48), np.inf)})
    with pytest.raises(NumericalError, match="block 1: mlp holds NaN or infinity"):
        list(walk_of(folder, windows).groups([Place("mlp", 1, True), *places], edit=edit))


# --- distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_distances_are_those_of_the_hidden_states(tiny_model, windows, tmp_path, family):
    folder = tiny_model(family)
    measure(walk_of(folder, windows, blocks_per_job=3), tmp_path / "distances.json", samples=None)
    result = read_json(tmp_path / "distances.json")
    found = full_pass(folder, windows)
    states = [found[f"stream {index}"].double() for index in range(5)]
    lengths = [32, 20, 32, 32, 32, 32, 1, 32, 32, 27]
    last = np.cumsum(lengths) - 1
    assert (result["n_layers"], result["n_tokens"], result["n_windows"]) == (4, 272, 10)
    for start, end in itertools.combinations(range(5), 2):
        before, after = states[start], states[end]
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=1)
        angle = torch.arccos(cosine) / torch.pi
        expected = {
            "angular": angle.mean(),
            "angular_last": angle[last].mean(),
            "cosine": (1 - cosine).mean(),
            "cosine_worst": torch.stack([part.max() for part in (1 - cosine).split(lengths)]).mean(),
            "l2": ((after - before).norm(dim=1) / before.norm(dim=1)).mean(),
        }
        for name, value in expected.items():
            assert result["metrics"][name][start][end - start - 1] == pytest.approx(float(value), rel=1e-4), name
    assert result["block_influence"] == [row[0] for row in result["metrics"]["cosine"]]
    assert [len(row) for row in result["metrics"]["l2"]] == [4, 3, 2, 1]


# --- choice ----------------------------------------------------------------------------------------------------------


def distance_of(steps: list[float]) -> list[list[float]]:
    """Distance over a cut as the sum over its blocks."""
    return [list(itertools.accumulate(steps[start:])) for start in range(len(steps))]


STEPS = [0.1, 5, 3, 1, 2, 9, 4, 1, 1, 6]  # block 0 moves least, and stays all the same


def test_one_cut_is_where_the_distance_is_smallest():
    distance = distance_of(STEPS)
    assert contiguous(distance, 1) == range(3, 4)  # the earliest of three
    assert contiguous(distance, 2) == range(7, 9)
    assert contiguous(distance, 3) == range(2, 5)  # 6, as blocks 6 to 8, which come later
    assert contiguous(distance, 9) == range(1, 10)


def test_several_cuts_keep_a_block_between_them_unless_they_may_merge():
    distance = distance_of(STEPS)
    assert several(distance, 4, 2) == [range(3, 5), range(7, 9)]
    assert several(distance, 3, 3) == [range(1, 2), range(3, 4), range(7, 8)]
    assert several(distance, 3, 3, merge=True) == [range(3, 4), range(7, 9)]
    assert several(distance, 5, 2) == [range(2, 5), range(7, 9)]  # as even as can be, the longer one first
    with pytest.raises(ConfigError, match="3 cuts with 9 blocks in all find no place in 10 blocks; 2 did"):
        several(distance, 9, 3)


def test_influence_and_chance():
    assert least_influence(STEPS, 4) == [range(0, 1), range(3, 4), range(7, 9)]
    cuts = [random_cut(10, 3, seed) for seed in range(200)]
    assert {cut.start for cut in cuts} == set(range(1, 8))  # every place but the first block
    assert random_cut(10, 3, 5) == random_cut(10, 3, 5)


def test_runs_of_blocks_are_cuts():
    assert cuts_of([7, 3, 4, 9, 5]) == [range(3, 6), range(7, 8), range(9, 10)]


def test_selection_is_recorded():
    distances = {
        "n_layers": 10,
        "metrics": {"cosine_worst": distance_of(STEPS), "angular_last": distance_of(STEPS[::-1])},
        "block_influence": STEPS,
    }
    chosen = select(settings("replaceme", blocks=4, cuts=2), distances)
    assert chosen["removed"] == [3, 4, 7, 8] and chosen["cuts"] == [[3, 4], [7, 8]]
    assert chosen["distances"]["cosine_worst"] == [3, 2]
    assert select(settings("uidl", blocks=2), distances)["removed"] == [1, 2]  # by its own metric
    assert select(settings("shortgpt", blocks=2), distances)["removed"] == [0, 3]
    assert select(settings("replaceme", blocks=[8, 2, 3]), distances)["cuts"] == [[2, 3], [8, 8]]
    with pytest.raises(ConfigError, match=r"\[10\] are not there; the model has blocks 0 to 9"):
        select(settings("uidl", blocks=[3, 10]), distances)


def test_what_belongs_elsewhere_is_refused(tiny_model, windows, tmp_path):
    """Distances, choice and transforms of another model, other windows, other settings or another cut."""
    folder = tiny_model("llama", dtype="float32")
    walk, mine = walk_of(folder, windows), calibration_of(windows, {"dtype": "float32"})
    step, structure = settings("replaceme", blocks=1), walk.structure
    distances, chosen_file, transforms = (tmp_path / name for name in ("d.json", "s.json", "t.safetensors"))
    measure(walk, distances, samples=6)
    write_json(chosen_file, choose(distances, structure, step, samples=6, calibration=mine))
    selection = read_selection(chosen_file, structure, step, mine)
    fit_transforms(walk, selection, step, output=transforms, diagnostics=tmp_path / "t.json")
    belongs = {**provenance(structure, step), **mine, "cuts": selection["cuts"]}
    (block,) = read_transforms(transforms, belongs)
    assert selection["removed"] == [block + 1]

    another = {**structure, "fingerprint": "another"}
    with h5py.File(windows) as file:
        write_windows(tmp_path / "others.h5", file["input_ids"][:][::-1], file["attention_mask"][:][::-1])
    others = calibration_of(tmp_path / "others.h5", {"dtype": "float32"})
    for changes, differs in (
        ({"structure": another}, "fingerprint"),
        ({"calibration": others}, "tokens"),
        ({"calibration": {**mine, "dtype": "bfloat16"}}, "dtype"),
        ({"samples": None}, "samples"),
    ):
        arguments = {"structure": structure, "settings": step, "samples": 6, "calibration": mine, **changes}
        with pytest.raises(ArtifactError, match=rf"d\.json: is of {differs} "):
            choose(distances, **arguments)
        if differs != "samples":
            with pytest.raises(ArtifactError, match=rf"s\.json: is of {differs} "):
                read_selection(chosen_file, arguments["structure"], step, arguments["calibration"])
            wrong = {**belongs, **provenance(arguments["structure"], step), **arguments["calibration"]}
            with pytest.raises(ArtifactError, match=rf"t\.safetensors: is of {differs} "):
                read_transforms(transforms, wrong)
    with pytest.raises(ArtifactError, match=r"s\.json: is of settings "):
        read_selection(chosen_file, structure, {**step, "ridge": 0.5}, mine)
    with pytest.raises(ArtifactError, match=r"t\.safetensors: is of cuts \[\[.*\]\]; expected is cuts \[\[1, 3\]\]"):
        read_transforms(transforms, {**belongs, "cuts": [[1, 3]]})


# --- estimators ------------------------------------------------------------------------------------------------------


def planted(transform: np.ndarray, n: int = 600, noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """M, Y and ``L = M T + Y``, with M of uneven channels."""
    draw = np.random.default_rng(seed)
    width = len(transform)
    mlp = draw.normal(size=(n, width)) * np.geomspace(0.1, 10, width)
    residual = draw.normal(size=(n, width)) * 3
    target = mlp @ transform + residual + noise * draw.normal(size=(n, width))
    return tuple(torch.from_numpy(part) for part in (mlp, residual, target))


TRUTH = {
    "full": np.random.default_rng(1).normal(size=(12, 12)),
    "diagonal": np.diag(np.random.default_rng(2).uniform(-2, 2, 12)),
    "orthogonal": np.linalg.qr(np.random.default_rng(3).normal(size=(12, 12)))[0],
}


@pytest.mark.parametrize("structure", TRUTH)
def test_least_squares_finds_a_planted_map_exactly(structure):
    rows = planted(TRUTH[structure])
    moments = Moments(12)
    for first in range(0, 600, 250):  # in any portions
        moments.add(*(part[first : first + 250] for part in rows))
    found = moments.solve(structure)
    np.testing.assert_allclose(found, TRUTH[structure], atol=1e-9)
    assert moments.n_tokens == 600
    assert moments.error(found) < 1e-6


def test_error_and_ridge_against_numpy():
    mlp, residual, target = planted(TRUTH["full"], noise=2.0)
    moments = Moments(12)
    moments.add(mlp, residual, target)
    m, r = mlp.numpy(), (target - residual).numpy()
    alpha = 0.1 * np.trace(m.T @ m) / 12
    expected = np.linalg.solve(m.T @ m + alpha * np.eye(12), m.T @ r)
    found = moments.solve("full", ridge=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert moments.error(found) == pytest.approx(np.linalg.norm(m @ expected - r) / np.linalg.norm(r), rel=1e-9)
    assert moments.error(np.eye(12)) == pytest.approx(np.linalg.norm(m - r) / np.linalg.norm(r), rel=1e-9)


def test_too_few_tokens_need_a_ridge():
    moments = Moments(12)
    moments.add(*planted(TRUTH["full"], n=8))
    with pytest.raises(NumericalError, match="8 tokens is singular"):
        moments.solve("full", ridge=0.0)
    assert np.isfinite(moments.solve("full", ridge=1e-3)).all()


@pytest.fixture
def stored(tmp_path):
    """Writes planted rows to a file in two portions."""

    def make(rows, dtype: str = "float32") -> Rows:
        file = Rows(tmp_path / "rows.h5", rows[0].shape[1], dtype)
        for part in (slice(0, 100), slice(100, None)):
            file.add(*(tensor[part].to(getattr(torch, dtype)) for tensor in rows))
        return file

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_rows_come_back_whatever_the_order(stored, dtype):
    rows = planted(TRUTH["full"], n=333)
    file = stored(rows, dtype)
    expected = [tensor.to(getattr(torch, dtype)).float() for tensor in rows]
    in_order = [torch.cat(parts) for parts in zip(*file.batches(100), strict=True)]
    shuffled = [torch.cat(parts) for parts in zip(*file.batches(128, np.random.default_rng(0)), strict=True)]
    for found, mixed, right in zip(in_order, shuffled, expected, strict=True):
        assert torch.equal(found, right)
        assert not torch.equal(mixed, right)
    key = [int(torch.nonzero((expected[0] == row).all(1))[0]) for row in shuffled[0]]
    assert sorted(key) == list(range(333))
    for mixed, right in zip(shuffled, expected, strict=True):  # M, Y and L of a token stay together
        assert torch.equal(mixed, right[key])


@pytest.mark.parametrize("loss", ["exact", "practical"])
@pytest.mark.parametrize("structure", TRUTH)
def test_cosine_objective_comes_near_a_planted_map(stored, loss, structure):
    truth = np.eye(12) + 0.2 * (TRUTH[structure] - np.eye(12)) if structure != "orthogonal" else TRUTH[structure]
    start = truth if structure == "orthogonal" else np.eye(12)
    if structure == "orthogonal":  # a turn by small angles away
        turn = np.linalg.qr(np.eye(12) + 0.1 * np.random.default_rng(5).normal(size=(12, 12)))
        start = truth @ turn[0] @ np.diag(np.sign(np.diag(turn[1])))
    file = stored(planted(truth))
    found, history = fit_cosine(
        file, start, loss=loss, structure=structure, epochs=100, lr=5e-3, batch_tokens=128, log=lambda line: None
    )
    assert len(history) == 101
    assert history[-1]["loss"] < 0.02 * history[0]["loss"]
    if structure == "diagonal":
        assert np.count_nonzero(found - np.diag(np.diag(found))) == 0
    if structure == "orthogonal":
        np.testing.assert_allclose(found @ found.T, np.eye(12), atol=1e-5)
    if loss == "exact":  # practical knows no scale of a token
        scale = np.geomspace(0.1, 10, 12)[:, None]  # of M's channels: how well a row can be known
        np.testing.assert_allclose(found * scale, truth * scale, atol=0.05)


def test_cosine_objective_is_repeatable_and_penalties_shrink(stored):
    file = stored(planted(TRUTH["full"], noise=1.0))
    options = {"epochs": 5, "lr": 1e-2, "batch_tokens": 128, "log": lambda line: None}
    plain, _ = fit_cosine(file, np.eye(12), **options)
    again, _ = fit_cosine(file, np.eye(12), **options)
    assert np.array_equal(plain, again)
    other, _ = fit_cosine(file, np.eye(12), random_state=1, **options)
    assert not np.array_equal(plain, other)
    for penalty, norm in (({"l1": 1.0}, lambda t: np.abs(t).sum()), ({"l2": 1.0}, lambda t: np.square(t).sum())):
        small, _ = fit_cosine(file, np.eye(12), **options, **penalty)
        assert norm(small) < 0.9 * norm(plain)


def test_an_objective_that_is_no_number_is_named(stored):
    rows = planted(TRUTH["full"])
    rows[2][5, 5] = torch.nan
    with pytest.raises(NumericalError, match=r"became nan in epoch 1; lower lr \(0.1\)"):
        fit_cosine(stored(rows), np.eye(12), lr=0.1, epochs=3, log=lambda line: None)


# --- fitting and folding ---------------------------------------------------------------------------------------------


@pytest.fixture
def fit(windows, tmp_path):
    """Chooses, fits and folds on a tiny model; gives the folder, the transforms and the diagnostics."""

    def run(folder: Path, removed: list[int], name: str = "fit", dtype: str = "float32", **options):
        structure = inspect_model(folder)
        variant = settings("replaceme", blocks=removed, **options)
        selection = {"cuts": [[cut.start, cut.stop - 1] for cut in cuts_of(removed)], "removed": removed}
        out = tmp_path / name
        fit_transforms(
            walk_of(folder, windows, dtype),
            selection,
            variant,
            output=out / "t.safetensors",
            diagnostics=out / "t.json",
        )
        transforms = read_transforms(out / "t.safetensors")
        prune(folder, structure, removed, out / "model", transforms=transforms, settings=variant)
        assert sorted(path.name for path in out.iterdir()) == ["model", "t.json", "t.safetensors"]  # no rows left
        return out / "model", transforms, read_json(out / "t.json")

    return run


@pytest.fixture(scope="module")
def linear_model(tiny_model, tmp_path_factory) -> Path:
    """A model whose blocks 2 and 3 only add ``M_1 A`` to the stream: MLP 1 reads a channel that is left alone.

    Block 1's MLP output M has no gate to speak of and is copied by block 2 as its own MLP output, twice over: that
    is what a transform of block 1 can stand in for.
    """
    import shutil

    folder = tmp_path_factory.mktemp("linear") / "model"
    shutil.copytree(tiny_model("llama", dtype="float32"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = model.model.layers
    with torch.no_grad():
        for block in layers[2:]:
            block.self_attn.o_proj.weight.zero_()
        # the stream that enters block 1's MLP is norm(Y); block 2 gets norm(Y + M). With MLP 1 giving nothing, both
        # norms see the same Y, and an MLP 2 like that of block 1 but for W_down is a linear map of M's inner values
        layers[2].mlp.gate_proj.weight.copy_(layers[1].mlp.gate_proj.weight)
        layers[2].mlp.up_proj.weight.copy_(layers[1].mlp.up_proj.weight)
        layers[2].post_attention_layernorm.weight.copy_(layers[1].post_attention_layernorm.weight)
        layers[3].mlp.down_proj.weight.zero_()
        layers[1].mlp.down_proj.weight.mul_(1e-6)
        mix = torch.from_numpy(np.random.default_rng(7).normal(size=(48, 48))).float()
        layers[2].mlp.down_proj.weight.copy_(mix @ layers[1].mlp.down_proj.weight * 1e6)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, windows: Path, model=None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if model is None else model
    with h5py.File(windows) as file:
        ids, mask = (torch.from_numpy(file[key][:].astype(np.int64)) for key in ("input_ids", "attention_mask"))
    with torch.no_grad():
        return model.eval()(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def test_planted_linear_blocks_are_replaced_without_loss(linear_model, windows, fit):
    folder, transforms, report = fit(linear_model, [2, 3], ridge=0.0)
    assert list(transforms) == [1]
    expected, found = logits(linear_model, windows), logits(folder, windows)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    removed = prune(linear_model, inspect_model(linear_model), [2, 3], folder.parent / "plain", settings={})
    plain = logits(folder.parent / "plain", windows)
    scale = float(expected.std())
    assert float((found - expected).abs().max()) < 2e-3 * scale
    assert float((plain - expected).abs().max()) > 0.1 * scale  # removal alone is no match
    cut = report["fits"][0]
    assert cut["error"] < 1e-3 < 0.5 < cut["error_removal"]
    assert (cut["blocks"], cut["folded_into"], cut["n_tokens"]) == ([2, 3], 1, 272)
    assert removed["pruned"]["target_parameters"] == removed["dense"]["target_parameters"] / 2


@pytest.mark.parametrize(("family", "normalize"), [*((family, False) for family in FOLDABLE), ("llama", True)])
def test_the_fit_is_least_squares_on_the_stream_before_the_final_norm(tiny_model, windows, fit, family, normalize):
    folder = tiny_model(family)
    _, transforms, report = fit(folder, [2, 3], ridge=0.0, normalize=normalize)  # ends at the last block
    found = full_pass(folder, windows)
    mlp = found["mlp 1"].double().numpy()
    residual = found["stream 2"].double().numpy() - mlp
    target = found["stream 4"].double().numpy()  # not `hidden_states[-1]`, which is normed
    if normalize:
        norm = np.linalg.norm(target, axis=1, keepdims=True)
        mlp, residual, target = mlp / norm, residual / norm, target / norm
    expected = np.linalg.lstsq(mlp, target - residual, rcond=None)[0]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(transforms[1], expected, atol=2e-3 * scale)
    error = np.linalg.norm(mlp @ expected - (target - residual)) / np.linalg.norm(target - residual)
    assert report["fits"][0]["error"] == pytest.approx(error, rel=1e-3)


def test_pads_do_not_enter(tiny_model, windows, fit):
    folder = tiny_model("llama")
    _, before, _ = fit(folder, [2], name="before")
    with h5py.File(windows) as file:
        ids, mask = file["input_ids"][:], file["attention_mask"][:]
    write_windows(windows, np.where(mask == 0, 7, ids), mask)  # other tokens under the pads
    _, after, _ = fit(folder, [2], name="after")
    np.testing.assert_allclose(before[1], after[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prefix", ["pruned", "original"])
def test_several_cuts(tiny_model, windows, fit, prefix):
    folder = tiny_model("llama", num_hidden_layers=6)
    _, transforms, report = fit(folder, [1, 3, 4], prefix=prefix, ridge=0.0, normalize=False)
    assert sorted(transforms) == [0, 2]
    assert [cut["blocks"] for cut in report["fits"]] == [[1, 1], [3, 4]]
    original = full_pass(folder, windows)
    target = original["stream 5"].double().numpy()
    seen = original
    if prefix == "pruned":  # what the model with the first cut made has before the second
        structure = inspect_model(folder)
        prune(folder, structure, [1], folder.parent / "first", transforms={0: transforms[0]}, settings={})
        seen = full_pass(folder.parent / "first", windows)
    name = 1 if prefix == "pruned" else 2
    mlp = seen[f"mlp {name}"].double().numpy()
    residual = seen[f"stream {name + 1}"].double().numpy() - mlp
    expected = np.linalg.lstsq(mlp, target - residual, rcond=None)[0]
    # the walk rounds folded weights to float32, the folder to bfloat16
    np.testing.assert_allclose(transforms[2], expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options", [{"start": "identity"}, {}, {"start": "identity", "loss": "practical", "structure": "diagonal"}]
)
def test_cosine_fits_lower_the_cosine_distance(tiny_model, windows, fit, options):
    folder = tiny_model("llama")
    _, transforms, report = fit(folder, [2, 3], dtype="bfloat16", objective="cosine", epochs=5, lr=5e-3, **options)
    history = report["fits"][0]["history"]
    assert [entry["epoch"] for entry in history] == list(range(6))
    assert history[-1]["loss"] < (0.95 if options == {"start": "identity"} else 0.999) * history[0]["loss"]
    assert transforms[1].shape == (48, 48)


@pytest.mark.parametrize("family", FOLDABLE)
def test_folding_equals_the_transform_as_a_layer_of_its_own(tiny_model, windows, tmp_path, family):
    folder = tiny_model(family, dtype="float32")
    transform = np.random.default_rng(3).normal(size=(48, 48)) / 7
    prune(folder, inspect_model(folder), [1], tmp_path / "folded", transforms={0: transform}, settings={})
    prune(folder, inspect_model(folder), [1], tmp_path / "plain", settings={})
    unfused = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    plain = logits(tmp_path / "plain", windows)
    insert_transform(unfused, 0, transform)
    expected, found = logits(folder, windows, unfused), logits(tmp_path / "folded", windows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert float((found - plain).abs().max()) > 0.01 * float(expected.std())


def test_a_bias_of_the_mlp_is_folded_too(tiny_model, windows, tmp_path):
    folder = tiny_model("llama", dtype="float32", mlp_bias=True)
    transform = np.random.default_rng(3).normal(size=(48, 48)) / 7
    prune(folder, inspect_model(folder), [2], tmp_path / "folded", transforms={1: transform}, settings={})
    before, after = ModelFolder(folder), ModelFolder(tmp_path / "folded")
    bias = "model.layers.1.mlp.down_proj.bias"
    np.testing.assert_allclose(after.read(bias), transform.T @ before.read(bias), rtol=1e-5)


@pytest.mark.parametrize("family", [*FOLDABLE, "gemma3_text"])
def test_a_pruned_folder_is_an_ordinary_model(tiny_model, windows, tmp_path, family):
    folder = tiny_model(family, dtype="float32")
    structure = inspect_model(folder)
    counts = prune(folder, structure, [1, 2], tmp_path / "pruned", settings={"method": "uidl", "blocks": 2})
    pruned = inspect_model(tmp_path / "pruned")  # refuses shapes, names or a tokenizer that do not fit
    assert pruned["n_layers"] == 2 and pruned["tied_head"] == structure["tied_head"]
    assert counts["pruned"]["parameters"] == pruned["total_parameters"]
    assert counts["pruned"]["target_parameters"] == pruned["target_parameters"]
    assert counts["dense"]["parameters"] == structure["total_parameters"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kinds = getattr(model.config, "layer_types", None)
    for index in (2, 1):
        del model.model.layers[index]
    model.config.num_hidden_layers = 2
    if kinds:
        model.config.layer_types = [kinds[0], kinds[3]]
        assert read_json(tmp_path / "pruned" / "config.json")["layer_types"] == [kinds[0], kinds[3]]
    torch.testing.assert_close(logits(tmp_path / "pruned", windows), logits(folder, windows, model))
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "Blocks removed, numbered from 0: 1, 2" in card and json.dumps("uidl") in card


def test_sharded_models_are_pruned_too(tiny_model, windows, tmp_path):
    folder = tiny_model("llama", sharded=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    structure = inspect_model(folder)
    prune(folder, structure, [3], tmp_path / "pruned", settings={}, max_shard_bytes=60_000)
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 1
    assert inspect_model(tmp_path / "pruned")["n_layers"] == 3


def test_a_norm_behind_the_mlp_is_refused(tiny_model, windows, fit, tmp_path):
    folder = tiny_model("gemma3_text")
    with pytest.raises(UnsupportedModelError, match=r"Gemma3ForCausalLM.*norm behind it.*LlamaForCausalLM"):
        fit(folder, [2])
    with pytest.raises(UnsupportedModelError, match="Gemma3ForCausalLM"):
        prune(folder, inspect_model(folder), [1], tmp_path / "p", transforms={0: np.eye(48)}, settings={})
    assert not (tmp_path / "p").exists()


def test_transforms_of_another_model_are_refused(tiny_model, tmp_path):
    folder = tiny_model("llama")
    structure = inspect_model(folder)
    for block, width in ((0, 47), (1, 48)):  # a wrong width; a block that goes itself
        with pytest.raises(ArtifactError, match=f"block {block} has a transform of shape"):
            prune(folder, structure, [1], tmp_path / "p", transforms={block: np.eye(width)}, settings={})
    with pytest.raises(ConfigError, match="all 4 blocks would go"):
        prune(folder, structure, [0, 1, 2, 3], tmp_path / "p", settings={})
