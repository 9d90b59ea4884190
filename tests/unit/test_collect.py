"""Collection: what is stored is bitwise what enters every matrix of the full model, whatever the chunks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from cospadi.calibration import windows
from cospadi.calibration.activations import calibration_of, first_heldout, to_float32
from cospadi.calibration.collect import collect
from cospadi.errors import ArtifactError, NumericalError
from cospadi.gram import check_grams, compute_gram, read_gram, sites
from cospadi.provenance import tokens_digest
from cospadi.structure import inspect_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
BATCH = 4  # windows a batch in these tests


def write_windows(path: Path, samples: int = 10, length: int = 32, pads: bool = True) -> Path:
    draw = np.random.default_rng(0)
    mask = np.ones((samples, length), np.uint8)
    if pads:
        mask[1, 20:] = 0
        mask[6, 1:] = 0
        mask[9, :5] = 0  # pads on the left
    windows.write_windows(path, draw.integers(0, 390, (samples, length), np.int32), mask, seed=42)
    return path


@pytest.fixture
def job(tiny_model, tmp_path):
    """Runs `collect` on a tiny model; every argument can be replaced."""

    def run(family: str = "llama", layers: range = range(4), name: str = "all", **changes) -> SimpleNamespace:
        paths = SimpleNamespace(
            windows=tmp_path / "calibration.h5",
            rows=tmp_path / f"layers_{name}.h5",
            hidden=tmp_path / f"hidden_{name}.h5",
            model=tiny_model(family),
        )
        if not paths.windows.exists():
            write_windows(paths.windows)
        arguments = {
            "hidden_in": None,
            "rows_out": paths.rows,
            "hidden_out": paths.hidden,
            "mode": "store",
            "dtype": "bfloat16",
            "batch_tokens": BATCH * 32,
            "device": "cpu",
            "log": lambda line: None,
        }
        paths.structure = inspect_model(paths.model)
        collect(paths.model, paths.structure, paths.windows, layers, **{**arguments, **changes})
        return paths

    return run


def rows_of(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {f"{layer}/{site}": group["rows"][:] for layer in file for site, group in file[layer].items()}


def full_model(folder: Path, windows: Path, dtype: str):
    """Rows entering every matrix, output of every block and `output_hidden_states`, from the whole model."""
    import torch
    from transformers import AutoModelForCausalLM

    with h5py.File(windows) as file:
        ids, mask = (torch.from_numpy(file[key][:].astype(np.int64)) for key in ("input_ids", "attention_mask"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    keep = mask.bool()
    rows: dict[str, list] = {}
    blocks: list[list] = [[] for _ in model.model.layers]
    hidden: list[list] = [[] for _ in model.model.layers]

    def bits(tensor):
        return (tensor.view(torch.uint16) if dtype == "bfloat16" else tensor).numpy()

    def record(key):
        return lambda module, inputs: rows.setdefault(key, []).append(bits(inputs[0][keep[now]]))

    for index, block in enumerate(model.model.layers):
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(record(f"layer_{index:02d}/{name}"))
        block.register_forward_hook(lambda module, inputs, output, index=index: blocks[index].append(bits(output)))
    with torch.inference_mode():
        for start in range(0, len(ids), BATCH):
            now = slice(start, start + BATCH)
            output = model(input_ids=ids[now], attention_mask=mask[now], use_cache=False, output_hidden_states=True)
            for index, states in enumerate(output.hidden_states[1:]):
                hidden[index].append(bits(states))
    return (
        {key: np.concatenate(parts) for key, parts in rows.items()},
        [np.concatenate(parts) for parts in blocks],
        [np.concatenate(parts) for parts in hidden],
    )


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "bfloat16") for family in FAMILIES), ("llama", "float32"), ("gemma3_text", "float16")],
)
def test_walking_in_chunks_gives_bitwise_what_the_full_model_computes(job, family, dtype):
    expected_rows = None
    for chunk in (4, 2, 1):
        hidden_in = None
        for start in range(0, 4, chunk):
            paths = job(family, range(start, start + chunk), f"{chunk}-{start}", hidden_in=hidden_in, dtype=dtype)
            if expected_rows is None:
                expected_rows, blocks, hidden = full_model(paths.model, paths.windows, dtype)
            for name, rows in rows_of(paths.rows).items():
                assert np.array_equal(rows, expected_rows[name]), name
            with h5py.File(paths.hidden) as file:
                assert np.array_equal(file["hidden"][:], blocks[start + chunk - 1])
            hidden_in = paths.hidden
    for index in range(3):
        assert np.array_equal(blocks[index], hidden[index])
    # what transformers calls the last hidden state has gone through the final norm; what is stored has not
    assert not np.array_equal(blocks[3], hidden[3])
    # every matrix of a site was seen to read the rows stored once for the site
    assert np.array_equal(expected_rows["layer_02/self_attn.k_proj"], expected_rows["layer_02/self_attn.q_proj"])


def test_layout_of_the_file(job):
    paths = job(layers=range(2), name="00-01")
    with h5py.File(paths.rows) as file, h5py.File(paths.windows) as windows:
        lengths = windows["attention_mask"][:].sum(axis=1)
        assert dict(file.attrs) == {
            "format_version": 1,
            "model": paths.model.name,
            "fingerprint": paths.structure["fingerprint"],
            "tokens": tokens_digest(windows["input_ids"][:], windows["attention_mask"][:]),
            "seed": 42,
            "dtype": "bfloat16",
            "dtype_reason": "the config asks for it",
            "n_windows": 10,
            "mode": "store",
            "heldout_from": 10,
        }
        assert list(file) == ["layer_00", "layer_01"]
        for site in paths.structure["layers"][1]["sites"]:
            group = file[f"layer_01/{site['name']}"]
            assert group["rows"].shape == (lengths.sum(), site["d_in"])
            assert group["rows"].dtype == np.uint16
            assert group["rows"].fletcher32
            assert np.array_equal(group["window_rows"][:], lengths)
            assert dict(group.attrs) == {"n_tokens": lengths.sum(), "n_heldout": 0, "n_batches": 3, "n_skipped": 0}
    with h5py.File(paths.hidden) as file:
        assert file["hidden"].shape == (10, 32, 48)
        assert file["hidden"].fletcher32
        assert (file.attrs["last_layer"], file.attrs["dtype"]) == (1, "bfloat16")


def test_pad_tokens_never_enter(job):
    paths = job()
    before = rows_of(paths.rows)
    with h5py.File(paths.windows) as file:
        mask = file["attention_mask"][:]
        ids = file["input_ids"][:]
    windows.write_windows(paths.windows, np.where(mask == 0, (ids + 17) % 390, ids), mask, seed=42)
    after = rows_of(job(name="other pads").rows)
    assert sum(map(len, before.values())) == 16 * int(mask.sum())
    for name in before:
        assert np.array_equal(before[name], after[name]), name


def test_equal_arguments_give_equal_bytes(job):
    first, second = job(name="first"), job(name="second")
    assert first.rows.read_bytes() == second.rows.read_bytes()
    assert first.hidden.read_bytes() == second.hidden.read_bytes()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_streamed_grams_equal_those_of_stored_rows(job, family, tmp_path):
    stored = job(family, name="stored")
    streamed = job(family, name="streamed", mode="stream", heldout_fraction=0.25)
    assert first_heldout(10, 0.25) == 8
    with h5py.File(streamed.rows) as file:
        assert "rows" not in file["layer_02/mlp.down_proj"]
    for layer in (0, 3):
        for name, source in (("stored", stored), ("streamed", streamed)):
            compute_gram(source.rows, layer, tmp_path / f"{name}.h5", structure=source.structure, heldout_fraction=0.25)
        assert sites(tmp_path / "stored.h5") == sites(tmp_path / "streamed.h5")
        for site, attributes in sites(tmp_path / "stored.h5").items():
            with h5py.File(stored.rows) as file:
                rows = to_float32(file[f"layer_{layer:02d}/{site}/rows"][:], "bfloat16").astype(np.float64)
            split = attributes["n_tokens"]
            assert split + attributes["n_heldout"] == len(rows) == 10 * 32 - 12 - 31 - 5
            for heldout, part in ((False, rows[:split]), (True, rows[split:])):
                exact = part.T @ part
                for name in ("stored", "streamed"):
                    gram = read_gram(tmp_path / f"{name}.h5", site, heldout=heldout)
                    assert np.array_equal(gram, gram.T)
                    assert np.linalg.norm(gram - exact) <= 1e-6 * np.linalg.norm(exact)


def test_streaming_with_another_split_is_noticed(job, tmp_path):
    paths = job(mode="stream", heldout_fraction=0.25)
    with pytest.raises(ArtifactError, match="windows from 8 on held out, asked for is 10"):
        compute_gram(paths.rows, 0, tmp_path / "gram.h5", structure=paths.structure)
    assert not (tmp_path / "gram.h5").exists()


def spoil(path: Path, windows: list[int]) -> None:
    with h5py.File(path, "r+") as file:
        file["hidden"][windows, 2, 3] = np.uint16(0x7FC0)  # NaN in bfloat16


@pytest.mark.parametrize("mode", ["store", "stream"])
def test_up_to_one_percent_of_batches_may_be_lost_and_is_counted(job, tmp_path, mode):
    write_windows(tmp_path / "calibration.h5", samples=100, length=4, pads=False)
    options = {"batch_tokens": 4, "mode": mode}
    clean = job(layers=range(1), name="0", **options)
    job(layers=range(1, 2), name="clean", hidden_in=clean.hidden, **options)
    spoil(clean.hidden, [50])
    lossy = job(layers=range(1, 2), name="1", hidden_in=clean.hidden, **options)
    kept = np.delete(np.arange(400).reshape(100, 4), [50], axis=0).ravel()
    with h5py.File(lossy.rows) as file, h5py.File(tmp_path / "layers_clean.h5") as reference:
        for site in file["layer_01"]:
            group = file["layer_01"][site]
            assert dict(group.attrs) == {"n_tokens": 396, "n_heldout": 0, "n_batches": 100, "n_skipped": 1}
            if mode == "store":
                assert np.array_equal(group["rows"][:], reference["layer_01"][site]["rows"][:][kept])
                assert group["window_rows"][:].tolist() == [0 if w == 50 else 4 for w in range(100)]
            else:
                assert np.isfinite(group["gram"][:]).all()
    compute_gram(lossy.rows, 1, tmp_path / "gram.h5", structure=lossy.structure)
    counted = sites(tmp_path / "gram.h5")["mlp.down_proj"]
    assert (counted["n_tokens"], counted["n_batches"], counted["n_skipped"]) == (396, 100, 1)


def test_more_than_one_percent_lost_fails_and_leaves_nothing(job, tmp_path):
    write_windows(tmp_path / "calibration.h5", samples=100, length=4, pads=False)
    clean = job(layers=range(1), name="0", batch_tokens=4)
    spoil(clean.hidden, [50, 99])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NumericalError, match=r"layer_01/self_attn.q_proj: .* in 2 of 100 batches"):
        job(layers=range(1, 2), name="1", hidden_in=clean.hidden, batch_tokens=4)
    assert sorted(tmp_path.iterdir()) == before


def test_an_exception_in_the_middle_leaves_nothing(job, tmp_path):
    write_windows(tmp_path / "calibration.h5")

    def fail(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(log=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.h5"]


def test_progress_lines(job):
    lines = []
    job(log=lines.append)
    assert re.fullmatch(r"10/10 windows, \d+ tokens/s, eta 0 s", lines[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file["input_ids"].__setitem__((3, 4), 400), "token ids reach from 1 to 400"),
        (lambda file: file["input_ids"].__setitem__((3, 4), -1), "token ids reach from -1"),
        (lambda file: file["attention_mask"].__setitem__(3, 0), "a window without tokens"),
        (lambda file: file["attention_mask"].__setitem__((3, 0), 2), "other than 0 and 1"),
        (lambda file: file.__delitem__("attention_mask"), "expected layout"),
        (lambda file: file["input_ids"].__setitem__((3, 4), 389), "is of tokens .*; expected is tokens"),
    ],
)
def test_windows_that_do_not_fit(job, tmp_path, change, message):
    with h5py.File(write_windows(tmp_path / "calibration.h5"), "r+") as file:
        change(file)
    with pytest.raises(ArtifactError, match=message):
        job()
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.h5"]


def test_what_was_computed_on_other_windows_is_refused(job, tmp_path):
    """Windows of another seed or held out elsewhere, other arithmetic: in every file between tokens and Grams."""
    settings = {"dtype": "bfloat16", "heldout_fraction": 0.2}
    paths = job()
    mine = calibration_of(paths.windows, settings)
    assert set(mine) == {"tokens", "heldout_from", "dtype"} and mine["heldout_from"] == 8
    assert calibration_of(paths.windows, {"dtype": "auto"}) == {"tokens": mine["tokens"]}
    others = write_windows(tmp_path / "others.h5", pads=False)
    compute_gram(paths.rows, 0, tmp_path / "g.h5", structure=paths.structure, calibration=mine, heldout_fraction=0.2)
    assert check_grams([tmp_path / "g.h5"], paths.structure, [0], mine) == mine
    for changed, differs in (
        (calibration_of(others, settings), "tokens"),
        (mine | {"dtype": "float32"}, "dtype"),
        (calibration_of(paths.windows, {**settings, "heldout_fraction": 0.5}), "heldout_from"),
    ):
        with pytest.raises(ArtifactError, match=rf"g\.h5: is of {differs} "):
            check_grams([tmp_path / "g.h5"], paths.structure, [0], changed)
        if differs != "heldout_from":  # stored rows are parted when the Gram is computed
            with pytest.raises(ArtifactError, match=rf"layers_all\.h5: is of {differs} "):
                compute_gram(paths.rows, 0, tmp_path / "no.h5", structure=paths.structure, calibration=changed)
    with h5py.File(others, "r+") as file:
        del file.attrs["tokens"]
    with pytest.raises(ArtifactError, match=r"others\.h5: says nothing of its tokens"):
        calibration_of(others, settings)


def test_truncated_windows(job, tmp_path):
    path = write_windows(tmp_path / "calibration.h5")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ArtifactError, match=r"calibration.h5: not a complete HDF5 file"):
        job()


def test_hidden_states_of_another_chunk_or_dtype(job):
    paths = job(layers=range(1), name="0")
    with pytest.raises(ArtifactError, match=r"after layer 0; expected .* layer 1"):
        job(layers=range(2, 3), name="2", hidden_in=paths.hidden)
    with pytest.raises(ArtifactError, match=r"dtype bfloat16, .* float32, layer 0"):
        job(layers=range(1, 3), name="1", hidden_in=paths.hidden, dtype="float32")
    with pytest.raises(ValueError, match="hidden_in"):
        job(layers=range(1, 3), name="1")


@pytest.mark.parametrize("mode", ["store", "stream"])
def test_auto_goes_on_in_the_dtype_of_the_chunk_before(job, mode, monkeypatch):
    natively = {"first machine": ("float32", "no instructions"), "second machine": ("bfloat16", "AMX")}
    machine, lines = "first machine", []
    monkeypatch.setattr(
        "cospadi.calibration.collect.choose_dtype",
        lambda dtype, device: natively[machine] if dtype == "auto" else (dtype, "asked"),
    )
    first = job(layers=range(1), name="0", dtype="auto", mode=mode, log=lines.append)
    assert "computing in float32: no instructions" in lines
    machine = "second machine"
    second = job(layers=range(1, 4), name="1", hidden_in=first.hidden, dtype="auto", mode=mode, log=lines.append)
    reason = "the chunk before was computed in it; for this machine alone it would be bfloat16 (AMX)"
    assert f"computing in float32: {reason}" in lines
    # what is found is what one machine finds with that dtype
    whole = job(name="whole", dtype="float32", mode=mode)
    for path, said in ((first.rows, "no instructions"), (second.rows, reason), (second.hidden, reason)):
        with h5py.File(path) as file:
            assert (file.attrs["dtype"], file.attrs["dtype_reason"]) == ("float32", said)
    with h5py.File(second.hidden) as ours, h5py.File(whole.hidden) as theirs:
        assert ours["hidden"].dtype == np.float32 and np.array_equal(ours["hidden"], theirs["hidden"])


def test_auto_refuses_hidden_states_of_an_unknown_dtype(job):
    paths = job(layers=range(1), name="0")
    with h5py.File(paths.hidden, "a") as file:
        file.attrs["dtype"] = "float8"
    with pytest.raises(ArtifactError, match=r"hidden_0.h5: dtype is 'float8'; allowed: bfloat16, float16, float32"):
        job(layers=range(1, 2), name="1", hidden_in=paths.hidden, dtype="auto")


def test_corrupted_hidden_states_are_found_by_their_checksum(job):
    paths = job(layers=range(1), name="0")
    with h5py.File(paths.hidden) as file:
        offset = file["hidden"].id.get_chunk_info(4).byte_offset
    data = bytearray(paths.hidden.read_bytes())
    data[offset + 11] ^= 4
    paths.hidden.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"hidden_0.h5: not a complete"):
        job(layers=range(1, 2), name="1", hidden_in=paths.hidden)


def test_a_disk_that_is_too_small_is_noticed_before_the_work(job, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(ArtifactError, match=r"0.0001 GB are free"):
        job()
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.h5"]


def test_last_chunk_may_leave_out_its_hidden_states(job, tmp_path):
    job(hidden_out=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.h5", "layers_all.h5"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_finite_is_about_each_value_and_not_their_sum(dtype):
    import torch

    from cospadi.arrays import all_finite

    largest = torch.finfo(getattr(torch, dtype)).max
    rows = torch.full((300, 70), largest, dtype=getattr(torch, dtype))
    assert all_finite(rows) and all_finite(-rows)
    for strange in ([float("nan")], [float("inf")], [float("-inf")], [float("inf"), float("-inf")]):
        spoilt = torch.ones_like(rows)
        spoilt[7, : len(strange)] = torch.tensor(strange)
        assert not all_finite(spoilt)
