"""Methods that keep single weights, through the one-matrix interface and as problems of several matrices."""

from __future__ import annotations

import numpy as np
import pytest

from cospadi import factorize
from cospadi.budget import dense_nbytes, nbytes_left
from cospadi.errors import ConfigError
from cospadi.formats.values import storage_of
from cospadi.methods import METHODS
from cospadi.methods.base import Fit
from cospadi.problem import Matrix, Metric, Outputs, Problem

NAMES = ["magnitude", "wanda", "sparsegpt", "alps", "sparse", "hybrid"]


def inputs(d_in: int = 48, seed: int = 0) -> np.ndarray:
    """Gram of inputs that depend on each other, of different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8 * d_in, d_in)) @ rng.normal(size=(d_in, d_in)) * np.exp(0.5 * rng.normal(size=d_in))
    return x.T @ x


def weight(d_in: int = 48, d_out: int = 96, seed: int = 1) -> np.ndarray:
    """A weight with something in common between its outputs."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(d_in, 4)) @ rng.normal(size=(4, d_out))
    return (rng.standard_t(4, size=(d_in, d_out)) + common).astype(np.float32)


def problem(gram: np.ndarray | list[np.ndarray], *weights: np.ndarray, priced: bool = False) -> Problem:
    """Of matrices with one Gram, or each with its own; `priced`: with gradients."""
    metrics = [Metric.of(one) for one in gram] if isinstance(gram, list) else [Metric.of(gram)] * len(weights)
    matrices = []
    for i, (one, metric) in enumerate(zip(weights, metrics, strict=True)):
        squares = np.random.default_rng(i).gamma(1.0, 10.0**i, size=one.shape[1])
        outputs = Outputs(lambda squares=squares: squares, 0.5) if priced else None
        matrices.append(Matrix(f"model.layers.0.m{i}_proj", 0, "site", one.shape, metric, lambda one=one: one, outputs))
    return Problem(matrices)


def exact_error(matrices: Problem, factors: list) -> float:
    """What the matrices of a problem lose together, each in its own metric: as their prices say, or relative."""
    total = 0.0
    for i, (matrix, one) in enumerate(zip(matrices.matrices, factors, strict=True)):
        there = matrices.weights[i]
        size = matrix.metric.squared_norm(there) if matrices.prices is None else 1 / matrices.prices[i]
        total += matrix.metric.squared_norm(there - one.reconstruct()) / size
    return total


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("codes", [{}, {"value_bits": 8}, {"value_bits": 4, "block_size": 16}])
@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_bytes_are_what_was_asked_for(method, codes, ratio):
    w = weight()
    found = factorize(w, inputs(), method=method, ratio=ratio, **codes)
    allowed = (1 - ratio) * dense_nbytes(*w.shape)
    assert found.nbytes <= allowed
    # within the scales that columns of unequal length might have needed, or all weights are there
    nothing_left = found.n_nonzero == w.size or 2 * (allowed - found.nbytes) < 0.1 * dense_nbytes(*w.shape)
    assert nothing_left
    tensors, _ = found.pack("m")
    assert sum(tensor.nbytes for tensor in tensors.values()) == found.nbytes


def test_who_is_better():
    """Each step of insight pays: norms of inputs, making up, the support by ADMM, learned atoms."""
    w, gram = weight(), inputs()
    errors = [factorize(w, gram, method=method, ratio=0.4).relative_error(w, gram) for method in NAMES]
    magnitude, wanda, sparsegpt, alps, sparse, hybrid = errors
    assert magnitude > wanda > sparsegpt > alps
    assert sparsegpt > sparse >= hybrid
    assert sparse < 0.95 * sparsegpt


def test_wanda_where_inputs_do_not_depend_on_each_other_is_magnitude_of_the_scaled_weight():
    w = weight()
    scale = np.exp(np.random.default_rng(2).normal(size=len(w)))
    found = factorize(w, np.diag(scale**2), method="wanda", ratio=0.4, pattern="matrix")
    expected = factorize((w * scale[:, None]).astype(np.float32), method="magnitude", ratio=0.4)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.codes, w * found.mask)


@pytest.mark.parametrize("method", NAMES)
def test_two_of_four_is_stored_as_such(method):
    w, gram = weight(), inputs()
    found = factorize(w, gram, method=method, ratio=0.4375, pattern="2:4")
    assert found.support == "2:4"
    assert found.nbytes == 0.5625 * dense_nbytes(*w.shape)
    assert (found.mask.T.reshape(-1, 4).sum(1) == 2).all()
    np.testing.assert_allclose(found.quantized().reconstruct(), found.reconstruct(), rtol=2**-8)
    with pytest.raises(ConfigError, match="2:4 takes"):
        factorize(w, gram, method=method, ratio=0.45, pattern="2:4")


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "4:8", "3:16", "20:32"])
def test_n_of_m_is_stored_under_a_bit_a_position(pattern):
    w, gram = weight(d_in=64), inputs(d_in=64)
    n, m = map(int, pattern.split(":"))
    ratio = 15 / 16 - n / m
    errors = []
    for method in NAMES:
        found = factorize(w, gram, method=method, ratio=ratio, pattern=pattern)
        assert found.support == "bitmask"
        assert found.nbytes == (1 - ratio) * dense_nbytes(*w.shape)
        assert sum(tensor.nbytes for tensor in found.pack("m")[0].values()) == found.nbytes
        assert (found.mask.T.reshape(-1, m).sum(1) == n).all()
        errors.append(found.relative_error(w, gram))
        with pytest.raises(ConfigError, match=f"{pattern} takes"):
            factorize(w, gram, method=method, ratio=ratio + 0.01, pattern=pattern)
    assert errors[0] == max(errors) and errors[-1] == errors[-2] < errors[3] < errors[2]  # ours, ALPS, SparseGPT


def test_patterns_that_cannot_be():
    with pytest.raises(ConfigError, match="1:32 needs a multiple of 32"):
        factorize(weight(), inputs(), method="sparse", ratio=0.5, pattern="1:32")
    with pytest.raises(ConfigError, match="4:4 removes nothing"):
        factorize(weight(), inputs(), method="sparse", ratio=0.5, pattern="4:4")
    for pattern in ("2:5", "0:4", "diagonal"):
        with pytest.raises(ConfigError, match="pattern"):
            factorize(weight(), inputs(), method="sparse", ratio=0.5, pattern=pattern)


@pytest.mark.parametrize("pattern", ["column", "row"])
def test_patterns_spread_the_budget(pattern):
    w, gram = weight(), inputs()
    for method in NAMES:
        counts = factorize(w, gram, method=method, ratio=0.4, pattern=pattern).mask.sum(0 if pattern == "column" else 1)
        assert counts.min() == counts.max()


def test_matrices_of_a_problem_share_atoms_and_budget():
    gram, whole = inputs(), weight(d_out=160)
    both = problem(gram, whole[:, :96], 100 * whole[:, 96:])
    nbytes = nbytes_left(both.shapes, 0.4)
    found = METHODS["hybrid"].fit(both, nbytes, Fit(storage=storage_of({})), atoms=8)
    names = {part.tensor for factors in found for part in factors.plus}
    assert names == {"model.layers.0.m0_proj.plus.0.dictionary"}
    packed = {}
    for matrix, factors in zip(both.matrices, found, strict=True):
        packed |= factors.pack(matrix.name)[0]
    assert 0.99 * nbytes < sum(tensor.nbytes for tensor in packed.values()) <= nbytes
    # the larger weights do not take the budget of the smaller
    errors = [f.relative_error(w, gram) for f, w in zip(found, both.weights, strict=True)]
    assert max(errors) < 2 * min(errors)


@pytest.mark.parametrize("priced", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("method", "options"), [("hybrid", {"atoms": 6}), ("sparse", {}), ("sparse", {"pattern": "column"})]
)
def test_everyones_own_metric_is_never_worse_than_that_of_the_mean(method, options, seed, priced):
    """Inputs that differ in direction and in size, as those of neighbouring layers do, and prices as of gradients."""
    grams = [inputs(seed=seed), 30 * inputs(seed=seed + 10), inputs(seed=seed) + inputs(seed=seed + 10)]
    matrices = problem(
        grams, weight(seed=seed), 4 * weight(d_out=64, seed=seed + 1), weight(seed=seed + 2), priced=priced
    )
    nbytes = nbytes_left(matrices.shapes, 0.4)
    errors = {}
    for metric in ("mean", "exact"):
        found = METHODS[method].fit(matrices, nbytes, Fit(storage=storage_of({})), group_metric=metric, **options)
        errors[metric] = exact_error(matrices, found)
        assert sum(one.n_nonzero for one in found) > 0
        atoms = [part for one in found for part in one.plus]
        assert len({part.dictionary.tobytes() for part in atoms}) <= 1  # one dictionary for all of them
        assert sum(2 * one.n_nonzero + 2 * sum(part.n_nonzero for part in one.plus) for one in found) < nbytes
    # here inputs have hardly anything in common, so it is worth a lot
    assert errors["exact"] < 0.9 * errors["mean"]


def test_equal_metrics_agree_with_their_mean():
    gram = inputs()
    matrices = problem([gram, gram.copy()], weight(), weight(seed=2))
    nbytes = nbytes_left(matrices.shapes, 0.4)

    def error(method: str, metric: str, **options: int) -> float:
        found = METHODS[method].fit(matrices, nbytes, Fit(storage=storage_of({})), group_metric=metric, **options)
        return exact_error(matrices, found)

    # it goes on from what the mean has found, with as many passes again, and has no more to gain than those
    assert 0.9 * error("hybrid", "mean", max_iter=4) < error("hybrid", "exact", max_iter=2)
    assert error("hybrid", "exact", max_iter=2) < error("hybrid", "mean", max_iter=2)
    assert 0.95 * error("sparse", "mean") < error("sparse", "exact") <= error("sparse", "mean")
    # the same inputs, and so the same object: nothing is computed twice
    together = problem(gram, weight(), weight(seed=2))
    codes = [
        METHODS["hybrid"].fit(together, nbytes, Fit(storage=storage_of({})), group_metric=metric)[1].codes
        for metric in ("mean", "exact")
    ]
    np.testing.assert_array_equal(*codes)


def test_atoms_are_searched_and_never_worse_than_none():
    w, gram = weight(d_out=320), inputs()
    none, searched = (factorize(w, gram, method="hybrid", ratio=0.4, atoms=a) for a in (0, "auto"))
    assert not none.plus
    assert searched.diagnostics["n_atoms"] > 0 and searched.plus
    assert searched.relative_error(w, gram) < none.relative_error(w, gram)
    too_many = factorize(w, gram, method="hybrid", ratio=0.6, atoms=40)
    assert too_many.relative_error(w, gram) <= factorize(w, gram, method="sparse", ratio=0.6).relative_error(w, gram)


def test_dead_inputs_and_budgets_too_small():
    w, gram = weight(), inputs()
    gram[5], gram[:, 5] = 0, 0
    for method in NAMES:
        found = factorize(w, gram, method=method, ratio=0.4)
        assert np.isfinite(found.codes).all()
        assert found.relative_error(w, gram) < 1
        with pytest.raises(ConfigError, match="not one weight"):
            factorize(w, gram, method=method, ratio=0.95)
