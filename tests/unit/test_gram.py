"""Grams equal X^T X; whitening turns the error on the calibration data into an ordinary norm."""

from __future__ import annotations

import copy
import tracemalloc
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cospadi import arrays
from cospadi import gram as gram_module
from cospadi.calibration.activations import writing
from cospadi.errors import ArtifactError, ConfigError, NumericalError
from cospadi.gram import compute_gram, eigen_whitening, read_gram, relative_error, sites, whitening_factor
from cospadi.solvers._arrays import inverse_spd
from cospadi.solvers.admm import Scaled
from cospadi.solvers.sparsegpt import inverse_factor

STRUCTURE = {
    "fingerprint": "of m",
    "layers": [
        {"name": "layer_00", "sites": []},
        {
            "name": "layer_01",
            "sites": [
                {"name": "attn.q", "d_in": 24, "matrices": [{"name": "layers.1.attn.q"}, {"name": "layers.1.attn.k"}]},
                {"name": "mlp.down", "d_in": 40, "matrices": [{"name": "layers.1.mlp.down"}]},
            ],
        },
    ],
}
WINDOW_ROWS = np.array([700, 0, 3000, 900, 400])


def write_rows(path: Path, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """An activation file with uneven windows; the rows in float64, exactly as stored."""
    draw = np.random.default_rng(1)
    exact = {}
    with h5py.File(path, "w") as file:
        file.attrs.update(
            format_version=1,
            model="m",
            fingerprint="of m",
            tokens="t",
            seed=42,
            dtype=dtype,
            dtype_reason="r",
            n_windows=5,
            mode="store",
            heldout_from=5,
        )
        for site in STRUCTURE["layers"][1]["sites"]:
            # columns of very different size and a common offset, as real activations have
            rows = (draw.standard_normal((5000, site["d_in"])) + 0.5) * 10 ** draw.uniform(-2, 2, site["d_in"])
            rows = rows.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
            group = file.create_group(f"layer_01/{site['name']}")
            stored = rows.view(np.uint16) if dtype == "bfloat16" else rows
            group.create_dataset("rows", data=stored, chunks=(500, site["d_in"]), fletcher32=True)
            group["window_rows"] = WINDOW_ROWS
            group.attrs.update(n_tokens=5000, n_heldout=0, n_batches=300, n_skipped=1)
            exact[site["name"]] = rows.astype(np.float64)
    return exact


def random_gram(seed: int, d_in: int, decades: float, n_tokens: int | None = None) -> np.ndarray:
    """Gram of `n_tokens` rows (default 4 d_in) whose principal axes span `decades` orders of magnitude."""
    draw = np.random.default_rng(seed)
    rotation = np.linalg.qr(draw.standard_normal((d_in, d_in)))[0]
    rows = draw.standard_normal((n_tokens or 4 * d_in, d_in)) * np.logspace(0, -decades, d_in) @ rotation
    return rows.T @ rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gram_is_the_second_moment_of_the_rows(tmp_path, dtype):
    exact = write_rows(tmp_path / "rows.h5", dtype)
    compute_gram(tmp_path / "rows.h5", 1, tmp_path / "gram.h5", structure=STRUCTURE)
    assert sites(tmp_path / "gram.h5") == {
        "attn.q": {
            "n_tokens": 5000,
            "n_heldout": 0,
            "n_batches": 300,
            "n_skipped": 1,
            "matrices": ["layers.1.attn.q", "layers.1.attn.k"],
        },
        "mlp.down": {
            "n_tokens": 5000,
            "n_heldout": 0,
            "n_batches": 300,
            "n_skipped": 1,
            "matrices": ["layers.1.mlp.down"],
        },
    }
    for site, rows in exact.items():
        gram = read_gram(tmp_path / "gram.h5", site)
        expected = rows.T @ rows
        scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        assert gram.dtype == np.float64
        assert np.array_equal(gram, gram.T)
        assert np.linalg.norm(gram - expected) <= 1e-6 * np.linalg.norm(expected)
        assert (np.abs(gram - expected) / scale).max() <= 1e-6  # small inputs are as exact as large ones
        with pytest.raises(ArtifactError, match="gram_heldout"):
            read_gram(tmp_path / "gram.h5", site, heldout=True)
    with h5py.File(tmp_path / "gram.h5") as file:
        assert file["attn.q/gram"].fletcher32
        assert {key: file.attrs[key] for key in ("model", "seed", "dtype", "dtype_reason", "layer")} == {
            "model": "m",
            "seed": 42,
            "dtype": dtype,
            "dtype_reason": "r",
            "layer": 1,
        }


def test_the_last_windows_are_held_out(tmp_path):
    exact = write_rows(tmp_path / "rows.h5")
    compute_gram(
        tmp_path / "rows.h5", 1, tmp_path / "gram.h5", structure=STRUCTURE, heldout_fraction=0.4, dtype="float32"
    )
    split = 3700  # rows of the first three of five windows
    for site, rows in exact.items():
        attributes = sites(tmp_path / "gram.h5")[site]
        assert (attributes["n_tokens"], attributes["n_heldout"]) == (split, 1300)
        for heldout, part in ((False, rows[:split]), (True, rows[split:])):
            gram = read_gram(tmp_path / "gram.h5", site, heldout=heldout)
            assert gram.dtype == np.float64
            assert np.linalg.norm(gram - part.T @ part) <= 1e-6 * np.linalg.norm(part.T @ part)


@pytest.mark.parametrize(("fraction", "message"), [(1.0, "allowed is"), (-0.1, "allowed is"), (0.95, "leaves none")])
def test_impossible_splits(tmp_path, fraction, message):
    write_rows(tmp_path / "rows.h5")
    with pytest.raises(ConfigError, match=message):
        compute_gram(tmp_path / "rows.h5", 1, tmp_path / "gram.h5", structure=STRUCTURE, heldout_fraction=fraction)


def test_rows_that_do_not_fit_the_structure_or_are_none(tmp_path):
    write_rows(tmp_path / "rows.h5")
    narrow = {"fingerprint": "of m", "layers": [{}, {"sites": [{"name": "attn.q", "d_in": 23, "matrices": []}]}]}
    with pytest.raises(ArtifactError, match=r"shape \(24, 24\), the structure says 23"):
        compute_gram(tmp_path / "rows.h5", 1, tmp_path / "gram.h5", structure=narrow)
    with h5py.File(tmp_path / "rows.h5", "r+") as file:
        file["layer_01/mlp.down/window_rows"][:4] = 0
    with pytest.raises(NumericalError, match=r"layer_01/mlp.down/gram: no token is left"):
        compute_gram(tmp_path / "rows.h5", 1, tmp_path / "gram.h5", structure=STRUCTURE, heldout_fraction=0.2)
    assert not (tmp_path / "gram.h5").exists()


def test_equal_rows_give_equal_bytes(tmp_path):
    write_rows(tmp_path / "rows.h5")
    for name in ("a", "b"):
        compute_gram(tmp_path / "rows.h5", 1, tmp_path / f"{name}.h5", structure=STRUCTURE)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    with h5py.File(path) as file:
        site = file["layer_01/mlp.down" if "layer_01" in file else "mlp.down"]
        offset = site["rows" if "rows" in site else "gram"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset + 7] ^= 16
    path.write_bytes(data)


def drop_a_site(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["layer_01/mlp.down" if "layer_01" in file else "mlp.down"]


def overwrite(path: Path) -> None:
    path.write_text("not HDF5")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, drop_a_site, overwrite, Path.unlink])
def test_damaged_files_are_named_and_nothing_is_written(tmp_path, damage):
    rows, gram, other = tmp_path / "rows.h5", tmp_path / "gram.h5", tmp_path / "other.h5"
    write_rows(rows)
    compute_gram(rows, 1, gram, structure=STRUCTURE)
    damage(rows)
    with pytest.raises(ArtifactError, match=r"rows\.h5"):
        compute_gram(rows, 1, other, structure=STRUCTURE)
    damage(gram)
    with pytest.raises(ArtifactError, match=r"gram\.h5"):
        read_gram(gram, "mlp.down")
    if damage in (truncate, overwrite, Path.unlink):
        with pytest.raises(ArtifactError, match=r"gram\.h5"):
            sites(gram)
    assert {path.name for path in tmp_path.iterdir()} <= {"rows.h5", "gram.h5"}


@pytest.mark.parametrize(("value", "place"), [(np.nan, 4000), (np.inf, 0), (3e38, 10)])
def test_rows_that_are_not_finite_or_overflow(tmp_path, value, place):
    write_rows(tmp_path / "rows.h5", "float32")
    with h5py.File(tmp_path / "rows.h5", "r+") as file:
        file["layer_01/mlp.down/rows"][place, 3] = value
    with pytest.raises(NumericalError, match=r"layer_01/mlp.down/gram: holds NaN or infinity"):
        compute_gram(tmp_path / "rows.h5", 1, tmp_path / "gram.h5", structure=STRUCTURE)
    assert not (tmp_path / "gram.h5").exists()


def test_a_full_disk_is_told_apart_from_other_errors(tmp_path):
    # what h5py raises when it cannot even close the file
    full = RuntimeError(
        "Can't close dataset (file write failed: errno = 28, error message = 'No space left on device')"
    )
    with pytest.raises(ArtifactError, match=r"gram\.h5: the disk is full"), writing(tmp_path / "gram.h5", {}):
        raise full
    with pytest.raises(RuntimeError, match="other"), writing(tmp_path / "gram.h5", {}):
        raise RuntimeError("other")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(0, 3), st.floats(-20, 20))
def test_whitening_properties(seed, d_in, decades, size):
    gram = random_gram(seed, d_in, decades) * 10.0**size
    whitening = whitening_factor(gram)
    weight = np.random.default_rng(seed).standard_normal((d_in, 7)).astype(np.float32)
    assert np.array_equal(whitening.factor, np.triu(whitening.factor))
    mean = np.mean(np.diag(gram))
    shifted = gram + whitening.shift * mean * np.eye(d_in)
    assert np.linalg.norm(whitening.factor.T @ whitening.factor - shifted) <= 1e-13 * np.linalg.norm(gram)
    back = whitening.unwhiten(whitening.whiten(weight))
    # rounding L W to float32 is all that is lost, times the condition of the factor
    condition = np.linalg.cond(whitening.factor)
    assert np.linalg.norm(back - weight) <= 2**-23 * (1 + condition) * np.linalg.norm(weight)
    # ||L E|| is the error on the data
    error = np.linalg.norm(whitening.whiten(weight).astype(np.float64))
    assert error == pytest.approx(np.sqrt(np.trace(weight.T.astype(np.float64) @ shifted @ weight)), rel=1e-6)


@settings(max_examples=25, deadline=None)
@example(11949, 3, 6.0, False, 0)  # no pivot is small, and yet the inverse is huge
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(4, 12), st.booleans(), st.integers(0, 3))
def test_ill_conditioned_grams_get_the_smallest_shift_that_makes_them_solvable(seed, d_in, decades, singles, dead):
    gram = random_gram(seed, d_in, decades)
    gram[: min(dead, d_in - 1)] = gram[:, : min(dead, d_in - 1)] = 0  # dead inputs
    if singles:  # rounding as a single-precision Gram has it: eigenvalues below zero
        gram = gram.astype(np.float32).astype(np.float64)
    whitening = whitening_factor(gram)
    mean = np.mean(np.diag(gram))
    smallest = np.linalg.eigvalsh(gram)[0] / mean
    assert 0 <= whitening.shift <= max(0, -smallest) + 2.1e-9
    if smallest > 2e-9:
        assert whitening.shift == 0
    difference = whitening.factor.T @ whitening.factor - gram - whitening.shift * mean * np.eye(d_in)
    assert np.abs(difference).max() <= 1e-12 * mean * d_in
    unit = whitening.unwhiten(np.eye(d_in))
    assert np.isfinite(unit).all()
    assert np.linalg.norm(unit, 2) <= 1.1 / np.sqrt(mean * 0.5e-9) * np.sqrt(d_in)


def test_fewer_tokens_than_inputs():
    gram = random_gram(3, 32, 0.0, n_tokens=10)
    whitening = whitening_factor(gram)
    assert 0 < whitening.shift < 2.1e-9
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((32, 5)).astype(np.float32)
    back = whitening.unwhiten(whitening.whiten(weight))
    assert relative_error(weight, back, gram) < 1e-6  # what the data sees comes back, however singular the Gram


def test_dead_inputs_are_shifted_and_come_back():
    gram = np.diag([4.0, 0.0, 1.0, 9.0])
    whitening = whitening_factor(gram)
    assert whitening.shift == pytest.approx(1e-9)
    assert np.diag(whitening.factor) == pytest.approx(np.sqrt(np.diag(gram) + 3.5e-9))
    weight = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert np.allclose(whitening.unwhiten(whitening.whiten(weight)), weight, rtol=1e-6)


def test_one_large_input_does_not_hide_the_small_ones():
    gram = np.diag([1e6, 1.0, 1.0, 1e-2])
    assert whitening_factor(gram).shift == 0


def test_ridge_is_relative_to_the_mean_diagonal():
    gram = random_gram(5, 12, 1.0)
    for scale in (1.0, 1e8):
        whitening = whitening_factor(gram * scale, eta=0.01)
        expected = scale * (gram + 0.01 * np.mean(np.diag(gram)) * np.eye(12))
        assert np.allclose(whitening.factor.T @ whitening.factor, expected, rtol=1e-12, atol=1e-13 * expected.max())
        assert (whitening.eta, whitening.shift) == (0.01, 0.0)
    for whitening in (whitening_factor, eigen_whitening):
        with pytest.raises(ValueError, match="eta is -1"):
            whitening(gram, eta=-1.0)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.zeros((3, 3)), "no calibration data"),
        (np.diag([1.0, np.nan, 1.0]), "NaN"),
        (np.diag([1.0, np.inf, 1.0]), "NaN or infinity"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "smallest eigenvalue"),
        (np.ones((3, 2)), "shape"),
    ],
)
def test_what_is_no_gram(gram, message):
    with pytest.raises(NumericalError, match=message):
        whitening_factor(gram)


def test_relative_error_is_the_error_on_the_data():
    draw = np.random.default_rng(2)
    rows = draw.standard_normal((300, 16)) * np.logspace(0, -3, 16)
    weight = draw.standard_normal((16, 9)).astype(np.float32)
    near = weight + 1e-3 * draw.standard_normal((16, 9)).astype(np.float32)
    gram = rows.T @ rows
    expected = np.linalg.norm(rows @ (weight.astype(np.float64) - near)) / np.linalg.norm(rows @ weight)
    assert relative_error(weight, near, gram) == pytest.approx(expected, rel=1e-10)
    factor = whitening_factor(gram).factor
    whitened = np.linalg.norm(factor @ (weight.astype(np.float64) - near)) / np.linalg.norm(factor @ weight)
    assert relative_error(weight, near, gram) == pytest.approx(whitened, rel=1e-10)
    plain = np.linalg.norm(weight.astype(np.float64) - near) / np.linalg.norm(weight)
    assert relative_error(weight, near) == pytest.approx(plain, rel=1e-6)
    assert relative_error(weight, weight, gram) == 0.0
    assert relative_error(weight, np.zeros_like(weight), gram) == 1.0


def test_tiny_errors_do_not_cancel():
    gram = random_gram(7, 16, 2.0)
    weight = np.random.default_rng(0).standard_normal((16, 4))
    assert relative_error(weight, weight * (1 + 1e-12), gram) == pytest.approx(1e-12, rel=1e-3)


def test_relative_error_of_nothing():
    weight = np.ones((3, 2))
    with pytest.raises(NumericalError, match="zero on the calibration data"):
        relative_error(np.zeros((3, 2)), weight)
    with pytest.raises(NumericalError, match="zero on the calibration data"):
        relative_error(weight, weight, np.zeros((3, 3)))
    with pytest.raises(NumericalError, match="NaN"):
        relative_error(weight, weight * np.nan)


def peak_in_squares(function, d_in: int) -> float:
    """Memory that a call takes at its peak, in float64 arrays of (d_in, d_in)."""
    tracemalloc.start()
    try:
        kept = function()
        del kept
        return tracemalloc.get_traced_memory()[1] / (8 * d_in**2)
    finally:
        tracemalloc.stop()


def test_wide_grams_are_worked_on_in_their_place(tmp_path, monkeypatch):
    """Beside what a call gives, at most one array of the Gram's size in float64, whatever the width."""
    d_in = 600
    monkeypatch.setattr(arrays, "_BLOCK_VALUES", 20 * d_in)  # as many rows as of a wide site
    gram = random_gram(0, d_in, 1.0)
    gram = (gram + gram.T) / 2
    singular = random_gram(1, d_in, 0.0, n_tokens=100)
    singular = (singular + singular.T) / 2
    assert whitening_factor(gram).shift == 0 < whitening_factor(singular).shift
    assert peak_in_squares(lambda: whitening_factor(gram), d_in) < 1.1
    assert peak_in_squares(lambda: whitening_factor(singular), d_in) < 1.3
    order = np.argsort(-np.diagonal(gram))
    for turn in (None, order):
        assert peak_in_squares(lambda turn=turn: inverse_factor(gram, 0.01, turn), d_in) < 1.2
    # the scaled Gram in both precisions, an inverse in float32, and what that is made of
    assert peak_in_squares(lambda: Scaled(gram).inverse(0.1), d_in) < 2.7
    # a chunk of rows, their float32 product and the sum
    write_rows(tmp_path / "rows.h5", "float32")
    structure = copy.deepcopy(STRUCTURE)
    rows = np.random.default_rng(0).standard_normal((5000, d_in)).astype(np.float32)
    with h5py.File(tmp_path / "rows.h5", "r+") as file:
        del file["layer_01/mlp.down/rows"]
        file["layer_01/mlp.down"].create_dataset("rows", data=rows, chunks=(500, d_in))
    structure["layers"][1]["sites"][1]["d_in"] = d_in
    monkeypatch.setattr(gram_module, "_BLOCK_VALUES", 50 * d_in)
    made = tmp_path / "gram.h5"
    assert peak_in_squares(lambda: compute_gram(tmp_path / "rows.h5", 1, made, structure=structure), d_in) < 2.1
    exact = rows.astype(np.float64).T @ rows
    assert np.abs(read_gram(made, "mlp.down") - exact).max() < 1e-5 * np.abs(exact).max()
    # in blocks as at once
    matrix = np.random.default_rng(2).standard_normal((101, 101))
    monkeypatch.setattr(arrays, "_BLOCK_VALUES", 1000)
    assert np.array_equal(arrays.symmetrize(matrix.copy()), (matrix + matrix.T) / 2)
    assert np.allclose(inverse_spd(gram), np.linalg.inv(gram), rtol=0, atol=1e-10 * np.abs(np.linalg.inv(gram)).max())
    assert np.array_equal(inverse_spd(gram), inverse_spd(gram).T)
    # of inputs in another order as of a Gram in that order
    added = np.arange(d_in)
    assert np.array_equal(inverse_spd(gram, added, order), inverse_spd(gram[np.ix_(order, order)] + np.diag(added)))


@pytest.mark.parametrize("rows", [1, 5, 13, 4096])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_products_are_added_up_some_rows_at_a_time(rows, kind, monkeypatch):
    """OpenBLAS died of 28672 inputs at once (Llama-3-70B)."""
    monkeypatch.setattr(arrays, "PRODUCT_ROWS", rows)
    rng = np.random.default_rng(0)
    before, other = rng.standard_normal((13, 13)), rng.standard_normal((13, 9))
    left, right = rng.standard_normal((40, 13), np.float32), rng.standard_normal((40, 9), np.float32)
    total, cross = kind((before + before.T).copy()), kind(other.copy())
    arrays.add_product(total, kind(left))
    arrays.add_product(cross, kind(left), kind(right))
    left, right = left.astype(np.float64), right.astype(np.float64)
    np.testing.assert_allclose(np.asarray(total), before + before.T + left.T @ left, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(cross), other + left.T @ right, rtol=1e-5, atol=1e-5)
