"""The factor object and the one-matrix interface."""

import numpy as np
import pytest
import torch

from cospadi import Factorization, factorize
from cospadi.errors import ConfigError, NumericalError
from cospadi.formats.factorization import unpack

RNG = np.random.default_rng(0)
D_IN, D_OUT = 48, 40
WEIGHT = (RNG.normal(size=(D_IN, D_OUT)) / np.arange(1, D_OUT + 1) ** 0.3).astype(np.float32)
INPUTS = RNG.normal(size=(400, D_IN)) @ np.diag(np.linspace(0.1, 2, D_IN))
GRAM = INPUTS.T @ INPUTS


def error_on_inputs(weight, approximation):
    return np.linalg.norm(INPUTS @ (weight - approximation)) / np.linalg.norm(INPUTS @ weight)


@pytest.mark.parametrize("method", ["cospadi", "svd_llm"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_error_bytes_and_product(method, ratio):
    factors = factorize(WEIGHT, GRAM, method=method, ratio=ratio)
    approximation = factors.reconstruct()
    assert approximation.shape == WEIGHT.shape
    assert factors.relative_error(WEIGHT, GRAM) == pytest.approx(error_on_inputs(WEIGHT, approximation), rel=1e-6)
    assert factors.relative_error(WEIGHT) == pytest.approx(
        np.linalg.norm(WEIGHT - approximation) / np.linalg.norm(WEIGHT), rel=1e-6
    )
    # a small matrix has coarse steps: an atom more or less is 2 % of it
    assert (1 - ratio) - 0.05 < factors.nbytes / (2 * WEIGHT.size) <= 1 - ratio
    x = INPUTS[:5].astype(np.float32)
    np.testing.assert_allclose(factors(x), x @ approximation, rtol=1e-4, atol=1e-4)


def test_dictionary_beats_low_rank_at_equal_bytes():
    errors = {
        method: factorize(WEIGHT, GRAM, method=method, ratio=0.3).relative_error(WEIGHT, GRAM)
        for method in ("cospadi", "svd_llm")
    }
    assert errors["cospadi"] < errors["svd_llm"]


def test_svd_llm_is_the_optimum_of_its_rank():
    factors = factorize(WEIGHT, GRAM, method="svd_llm", ratio=0.4)
    whitened = np.linalg.cholesky(GRAM).T @ WEIGHT
    values = np.linalg.svd(whitened, compute_uv=False)
    expected = np.sqrt((values[factors.n_atoms :] ** 2).sum() / (values**2).sum())
    assert factors.relative_error(WEIGHT, GRAM) == pytest.approx(expected, rel=1e-4)


def test_calibration_lowers_the_error_on_the_inputs():
    with_data = factorize(WEIGHT, GRAM, ratio=0.4)
    data_free = factorize(WEIGHT, GRAM, ratio=0.4, whiten=False)
    assert with_data.relative_error(WEIGHT, GRAM) < data_free.relative_error(WEIGHT, GRAM)
    assert data_free.relative_error(WEIGHT) < with_data.relative_error(WEIGHT)


@pytest.mark.parametrize("value_bits", [16, 14])
@pytest.mark.parametrize("method", ["cospadi", "svd_llm"])
def test_pack_holds_the_counted_bytes_and_unpacks(method, value_bits):
    factors = factorize(WEIGHT, GRAM, method=method, ratio=0.3, value_bits=value_bits)
    tensors, spec = factors.pack("layer")
    assert sum(tensor.nbytes for tensor in tensors.values()) == factors.nbytes
    stored = unpack(tensors, spec, "layer")
    assert stored.shape == (D_IN, D_OUT)
    again, _ = stored.pack("layer")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(tensor), np.asarray(again[name]))
    assert stored.relative_error(WEIGHT, GRAM) < factors.relative_error(WEIGHT, GRAM) + (
        0.02 if value_bits == 14 else 0.005
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_columns_of_settled_integers_are_scaled_by_their_scales(method, symmetric):
    factors = factorize(WEIGHT, GRAM, method=method, ratio=0.7, block_size=16, symmetric=symmetric)
    weights = np.linspace(0.3, 3, D_OUT).astype(np.float32)
    changed = factors.with_columns_times(weights)
    before, after = (one.pack("layer")[0] for one in (factors, changed))
    np.testing.assert_array_equal(before["layer.values"], after["layer.values"])
    # a scale is a bfloat16 of 8 bits
    np.testing.assert_allclose(changed.reconstruct(), factors.reconstruct() * weights, rtol=2**-8)
    np.testing.assert_allclose(changed.quantized().reconstruct(), changed.reconstruct(), rtol=1e-6)


def test_14_bits_buy_more_atoms():
    sixteen = factorize(WEIGHT, GRAM, ratio=0.3, value_bits=16, max_iter=2)
    fourteen = factorize(WEIGHT, GRAM, ratio=0.3, value_bits=14, max_iter=2)
    assert fourteen.n_nonzero > sixteen.n_nonzero
    assert fourteen.n_atoms >= sixteen.n_atoms


@pytest.mark.parametrize("storage", [{"dictionary_bits": 8}, {"value_bits": 4, "dictionary_bits": 4, "block_size": 16}])
@pytest.mark.parametrize("method", ["cospadi", "svd_llm"])
def test_bytes_saved_on_numbers_buy_atoms_and_the_budget_holds(method, storage):
    plain = factorize(WEIGHT, GRAM, method=method, ratio=0.5)
    small = factorize(WEIGHT, GRAM, method=method, ratio=0.5, **storage)
    assert small.n_atoms > plain.n_atoms
    tensors, _ = small.pack("layer")
    assert sum(tensor.nbytes for tensor in tensors.values()) == small.nbytes <= 0.5 * 2 * WEIGHT.size


def test_torch_in_torch_out():
    weight, gram = torch.from_numpy(WEIGHT), torch.from_numpy(GRAM)
    factors = factorize(weight, gram, ratio=0.3)
    assert isinstance(factors.reconstruct(), torch.Tensor)
    reference = factorize(WEIGHT, GRAM, ratio=0.3)
    np.testing.assert_array_equal(factors.codes.numpy(), reference.codes)
    assert factors.nbytes == reference.nbytes
    assert factors.relative_error(weight, gram) == pytest.approx(reference.relative_error(WEIGHT, GRAM))
    x = torch.randn(3, D_IN)
    torch.testing.assert_close(factors(x), x @ factors.dictionary @ factors.codes)


def test_same_random_state_same_result():
    first, second = (factorize(WEIGHT, GRAM, ratio=0.3, random_state=7) for _ in range(2))
    np.testing.assert_array_equal(first.dictionary, second.dictionary)
    np.testing.assert_array_equal(first.codes, second.codes)


def test_every_wrong_argument_in_one_message():
    with pytest.raises(ConfigError) as caught:
        factorize(WEIGHT, GRAM[:5, :5], method="cospadi", ratio=1.2, value_bits=15, solvr="htp")
    message = str(caught.value)
    assert "4 faults" in message
    for part in ("gram has shape (5, 5)", "ratio is 1.2", "value_bits is 15", "did you mean solver?"):
        assert part in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"start": "x"}, "start: x is not allowed; one of null, procrustes, random, spectral, spectral_original"),
        ({"rho": 0.5}, "rho: 0.5 is not allowed; from 1 to 16"),
        ({"eta": -1}, "eta: -1 is not allowed; from 0 to 1"),
        ({"max_iter": 0}, "max_iter: 0 is not allowed; at least 1"),
        ({"warm_start": "a"}, "warm_start: unknown key"),
        ({"atom_update": "mod"}, "atom_update: mod is not for solver htp; leave it out"),
        (
            {"method": "compot", "dictionary_bits": 4, "rho": 4},
            "atoms for weight (48x40); at most 40 can be orthonormal",
        ),
        ({"ratio": 0.999}, "ratio: 0.999 leaves 3 bytes for a 48x40 matrix: not one atom fits"),
        ({"method": "svd_llm", "ratio": 0.999}, "ratio: 0.999 leaves 3 bytes for a 48x40 matrix: not even rank 1 fits"),
        ({"block_size": 0, "value_bits": 4}, "block_size is 0; allowed: at least 1, or None"),
    ],
)
def test_options_are_checked_by_their_schema(options, expected):
    with pytest.raises(ConfigError) as caught:
        factorize(WEIGHT, GRAM, **{"ratio": 0.3, **options})
    assert expected in str(caught.value)


def test_bad_numbers_are_refused():
    broken = WEIGHT.copy()
    broken[3, 4] = np.nan
    with pytest.raises(NumericalError, match="1 non-finite"):
        factorize(broken, GRAM, ratio=0.3)
    with pytest.raises(NumericalError, match="zero throughout"):
        factorize(np.zeros_like(WEIGHT), GRAM, ratio=0.3)
    factors = Factorization(np.full((4, 2), np.inf, np.float32), np.ones((2, 4), np.float32))
    with pytest.raises(NumericalError, match="dictionary holds 8 non-finite"):
        factors.pack("layer")


def test_a_sum_is_what_its_parts_are_together():
    draw = np.random.default_rng(3)
    sparse = Factorization(None, (WEIGHT * (draw.random(WEIGHT.shape) < 0.4)).astype(np.float32))
    low_rank = Factorization(
        *(draw.normal(size=s).astype(np.float32) for s in ((D_IN, 3), (3, D_OUT))), support="dense"
    )
    mixture = Factorization(
        draw.normal(size=(D_IN, 2 * D_OUT)).astype(np.float32), np.ones(2, np.float32), support="mixture"
    )
    whole = mixture + (sparse + low_rank)
    assert [part.support for part in whole.parts] == ["bitmask", "dense", "mixture"]  # a mixture is never the first
    assert whole.nbytes == sparse.nbytes + low_rank.nbytes + mixture.nbytes
    expected = sparse.reconstruct() + low_rank.reconstruct() + mixture.reconstruct()
    np.testing.assert_array_equal(whole.reconstruct(), expected)
    x = INPUTS[:3].astype(np.float32)
    np.testing.assert_allclose(whole(x), x @ expected, rtol=1e-4, atol=1e-4)
    tensors, spec = whole.pack("m")
    assert sum(tensor.nbytes for tensor in tensors.values()) == whole.nbytes and len(spec["plus"]) == 2
    again, _ = unpack(tensors, spec, "m").pack("m")
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {n: t.tobytes() for n, t in tensors.items()}
    # of some columns, and stored under another name, in all parts
    cut = (sparse + low_rank).columns(slice(5, 9)).stored_under("other")
    np.testing.assert_array_equal(cut.reconstruct(), (sparse + low_rank).reconstruct()[:, 5:9])
    assert [part.tensor for part in cut.parts] == ["other.dictionary", "other.plus.0.dictionary"]


def test_sums_that_no_file_holds_are_refused():
    mixture = Factorization(np.ones((4, 6), np.float32), np.ones(2, np.float32), support="mixture")
    with pytest.raises(ValueError, match="no sum of mixtures alone"):
        mixture + mixture
    with pytest.raises(ValueError, match=r"no sum of \(4, 3\) and \(4, 4\)"):
        mixture + Factorization(None, np.eye(4, dtype=np.float32))
