"""Methods that part the bytes of a model among its matrices: against their formulas, and against exhaustive search."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg

from cospadi.allocation import Profile
from cospadi.budget import as_is_nbytes, low_rank, nbytes_left, sparse_shape
from cospadi.errors import ConfigError
from cospadi.formats.values import storage_of
from cospadi.gram import eigen_whitening, whitening_factor
from cospadi.methods import METHODS, compot, rocket, svd_llm_v2
from cospadi.methods.base import Fit
from cospadi.problem import Matrix, Metric, Problem

BF16 = storage_of({})
D_IN, D_OUT = 48, 40


def problem_of(seed=0, shape=(D_IN, D_OUT), rows=300, name="model.layers.0.q_proj"):
    """A problem of one matrix whose inputs are correlated and of uneven size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, shape[0])) * np.linspace(0.3, 2, shape[0])
    x[:, 1:] += 0.5 * x[:, :-1]
    weight = (rng.normal(size=shape) / np.arange(1, shape[0] + 1)[:, None] ** 0.3).astype(np.float32)
    return Problem([Matrix(name, 0, "site", shape, Metric.of(x.T @ x), lambda: weight)])


def profiles_of(figures, shape=(D_IN, D_OUT), projection="q_proj"):
    return [Profile((f"model.layers.{layer}.{projection}",), (shape,), figure) for layer, figure in enumerate(figures)]


# --- SVD-LLM V2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(D_IN, D_OUT), (D_OUT, D_IN)])
def test_error_of_the_truncation_is_the_singular_values_left_out(shape):
    problem = problem_of(shape=shape)
    nbytes = nbytes_left([shape], 0.5)
    rank = low_rank(*shape, nbytes=nbytes, **BF16)
    gram = problem.metric.gram
    root = scipy.linalg.sqrtm(gram).real  # another root than the method's, the same singular values
    left_out = np.linalg.svd(root @ problem.weight, compute_uv=False)[rank:]
    (found,) = METHODS["svd_llm_v2"].fit(problem, nbytes, Fit(storage=BF16))
    assert found.n_atoms == rank
    error = problem.metric.squared_norm(problem.weight - found.reconstruct())
    # factors in float32: errors of a few roundings of the weight, beside an error of a fifth of it
    assert error == pytest.approx(np.square(left_out).sum(), rel=1e-4)
    assert svd_llm_v2.profile(problem, nbytes, storage=BF16)["loss"] == pytest.approx(
        np.linalg.norm(left_out), rel=1e-6
    )
    (cholesky,) = METHODS["svd_llm"].fit(problem, nbytes, Fit(storage=BF16))
    np.testing.assert_allclose(found.reconstruct(), cholesky.reconstruct(), atol=1e-4)


def test_a_singular_gram_is_taken_as_it_is():
    problem = problem_of(rows=16)
    whitening = eigen_whitening(problem.metric.gram)
    assert len(whitening.factor) == 16 and whitening.shift == 0 < whitening_factor(problem.metric.gram).shift
    np.testing.assert_allclose(whitening.factor.T @ whitening.factor, problem.metric.gram, atol=1e-9)
    np.testing.assert_allclose(whitening.factor @ whitening.inverse, np.eye(16), atol=1e-9)
    # with as much rank as there are directions nothing is lost on the calibration data
    (found,) = METHODS["svd_llm_v2"].fit(problem, nbytes_left(problem.shapes, 0.05), Fit(storage=BF16))
    assert found.n_atoms == 16 < low_rank(D_IN, D_OUT, nbytes=nbytes_left(problem.shapes, 0.05), **BF16)
    error = problem.metric.squared_norm(problem.weight - found.reconstruct())
    assert error < 1e-10 * problem.metric.squared_norm(problem.weight)


def test_ratios_are_those_of_the_logarithms_of_the_losses():
    losses = [20.0, 90.0, 400.0]
    profiles = profiles_of([{"loss": loss} for loss in losses])
    others = profiles_of([{"loss": 7.0}] * 2, projection="o_proj")
    ratio, dense = 0.3, nbytes_left([(D_IN, D_OUT)], 0)
    found = svd_llm_v2.share([*profiles, *others], nbytes_left([(D_IN, D_OUT)] * 5, ratio), storage=BF16)
    inverse = [1 / math.log(loss) for loss in losses]
    expected = [3 * ratio * one / sum(inverse) for one in inverse]
    np.testing.assert_allclose([1 - nbytes / dense for nbytes in found[:3]], expected, atol=1 / dense)
    assert found[3] == found[4] == pytest.approx((1 - ratio) * dense, abs=1)
    assert found[0] < found[1] < found[2], "the greater the loss, the more bytes"


def test_no_matrix_loses_more_than_the_guard_and_the_bytes_are_all_there():
    # the smallest loss asks for more than all of its matrix
    losses = [{"loss": 0.0}, {"loss": 1e9}, {"loss": 1e9}]
    nbytes = nbytes_left([(D_IN, D_OUT)] * 3, 0.5)
    found = svd_llm_v2.share(profiles_of(losses), nbytes, storage=BF16)
    assert found[0] == nbytes_left([(D_IN, D_OUT)], 0.8)
    assert found[1] == found[2] and nbytes - 3 < sum(found) <= nbytes
    # of a matrix so small that this is less than a rank, the rank stays
    found = svd_llm_v2.share(profiles_of(losses, shape=(8, 8)), nbytes_left([(8, 8)] * 3, 0.5), storage=BF16)
    assert found[0] == 32 > nbytes_left([(8, 8)], 0.8) and low_rank(8, 8, nbytes=32, **BF16) == 1


# --- ROCKET ----------------------------------------------------------------------------------------------------------


def reference(problem, n_atoms, s, *, exponent=0.5, beta=0.005, ridge=0.001):
    """The paper's formulas, entry by entry, in float64."""
    factor = np.linalg.cholesky(problem.metric.gram).T
    target = factor @ problem.weight.astype(np.float64)
    basis = np.linalg.eigh(target @ target.T)[1][:, ::-1][:, :n_atoms]
    codes = basis.T @ target
    importance = np.abs(codes) * np.linalg.norm(np.linalg.inv(factor) @ basis, axis=0)[:, None] ** exponent
    own = max(1, s - math.ceil(beta * s))
    mask = np.zeros(codes.shape, bool)
    for j in range(codes.shape[1]):
        mask[np.argsort(-importance[:, j])[:own], j] = True
    left = sorted((-importance[i, j], i, j) for i, j in np.argwhere(~mask))
    for _, i, j in left[: codes.shape[1] * (s - own)]:
        mask[i, j] = True
    codes *= mask
    moments = codes @ codes.T
    mu = ridge * np.trace(moments) / n_atoms
    dictionary = np.linalg.solve(factor, target @ codes.T @ np.linalg.inv(moments + mu * np.eye(n_atoms)))
    return dictionary @ codes, mask


@pytest.mark.parametrize("shape", [(D_IN, D_OUT), (D_OUT, 2 * D_IN)])
def test_rocket_is_the_formulas_of_the_paper(shape):
    problem = problem_of(shape=shape)
    nbytes = nbytes_left([shape], 0.4)
    (found,) = METHODS["rocket"].fit(problem, nbytes, Fit(storage=BF16), rhos=[2.0], over_sparsify=0.2)
    size = sparse_shape(*shape, nbytes=nbytes, rho=2.0, **BF16)
    assert size.n_atoms < min(shape) and size.n_nonzero_coefs >= 5
    expected, mask = reference(problem, size.n_atoms, size.n_nonzero_coefs, beta=0.2)
    np.testing.assert_array_equal(found.mask, mask)
    assert len(set(mask.sum(0))) > 1, "some columns won codes from others"
    np.testing.assert_allclose(found.reconstruct(), expected, atol=1e-4 * np.abs(expected).max())
    error = np.linalg.norm(problem.weight - found.reconstruct()) / np.linalg.norm(problem.weight)
    assert found.diagnostics["weight_error"] == pytest.approx(error, rel=1e-4)
    assert found.nbytes <= nbytes


def test_rocket_takes_the_best_rho_for_the_weight_and_as_many_atoms_as_there_are():
    problem = problem_of()
    nbytes = nbytes_left(problem.shapes, 0.3)
    each = {
        rho: METHODS["rocket"].fit(problem, nbytes, Fit(storage=BF16), rhos=[rho])[0].diagnostics["weight_error"]
        for rho in (1.0, 1.5, 2.0, 3.0)
    }
    (found,) = METHODS["rocket"].fit(problem, nbytes, Fit(storage=BF16), rhos=list(each))
    assert found.diagnostics["weight_error"] == min(each.values()) < max(each.values())
    assert each[found.diagnostics["rho"]] == min(each.values())
    # more atoms than eigenvectors cannot be: the bytes go to codes
    (wide,) = METHODS["rocket"].fit(
        problem_of(shape=(16, 200)), nbytes_left([(16, 200)], 0.3), Fit(storage=BF16), rhos=[4.0]
    )
    assert wide.n_atoms == 16 and 16 / wide.diagnostics["n_nonzero_coefs"] < 4
    # with rho 1 it is the truncated SVD in the metric of the activations
    (dense,) = METHODS["rocket"].fit(problem, nbytes, Fit(storage=BF16), rhos=[1.0], ridge=0.0)
    (svd,) = METHODS["svd_llm"].fit(problem, nbytes, Fit(storage=BF16))
    assert dense.support == "dense" and dense.n_atoms == svd.n_atoms
    np.testing.assert_allclose(dense.reconstruct(), svd.reconstruct(), atol=1e-4)


def menus_of(errors):
    """Profiles with points at equal steps of bytes."""
    whole = as_is_nbytes([(D_IN, D_OUT)], BF16)
    return profiles_of([{"points": [[(i + 1) * whole // 8, e] for i, e in enumerate(column)]} for column in errors])


def test_knapsack_is_the_least_sum_under_the_smallest_cap():
    rng = np.random.default_rng(0)
    for _ in range(20):
        # convex errors over equal steps, for which the price a byte is exact
        errors = np.sort(np.cumsum(np.sort(rng.random((4, 5)), axis=1), axis=1), axis=1)[:, ::-1] / 5
        profiles = menus_of(errors.tolist())
        whole = as_is_nbytes([(D_IN, D_OUT)], BF16)
        points = [[*map(tuple, one.figures["points"]), (whole, 0.0)] for one in profiles]
        nbytes = int(rng.integers(4 * whole // 8, 4 * whole))
        every = [chosen for chosen in itertools.product(*points) if sum(p[0] for p in chosen) <= nbytes]
        cap = min(max(error for _, error in chosen) for chosen in every)
        best = min(sum(e for _, e in chosen) for chosen in every if max(e for _, e in chosen) <= cap)
        found = rocket.share(profiles, nbytes, storage=BF16)
        taken = [whole if size is None else size for size in found]
        mine = [dict(column)[size] for column, size in zip(points, taken, strict=True)]
        assert sum(taken) <= nbytes and max(mine) <= cap
        assert sum(mine) == pytest.approx(best)
    assert rocket.share(profiles, 4 * whole, storage=BF16) == [None] * 4, "with all the bytes nothing is changed"
    with pytest.raises(ConfigError, match="is the least"):
        rocket.share(profiles, 4 * (whole // 8) - 1, storage=BF16)


def test_a_profile_has_the_error_of_every_ratio():
    problem = problem_of()
    nbytes = nbytes_left(problem.shapes, 0.33)
    options = {"candidate_ratios": [0.1, 0.5, 0.95], "rhos": [1.0, 2.0]}
    allocator = METHODS["rocket"].allocator
    points = allocator.profile(problem, nbytes, storage=BF16, **options)["points"]
    assert [size for size, _ in points] == [nbytes_left(problem.shapes, ratio) for ratio in (0.95, 0.5, 0.33, 0.1)]
    assert sorted((error for _, error in points), reverse=True) == [error for _, error in points]
    (found,) = METHODS["rocket"].fit(problem, nbytes, Fit(storage=BF16), rhos=[1.0, 2.0])
    assert points[2][1] == found.diagnostics["weight_error"]


# --- COMPOT ----------------------------------------------------------------------------------------------------------

ORTHONORMAL = {"rho": 2.0, "support": "bitmask"}


def test_compot_pools_singular_values_of_weights_over_their_norms():
    problem = problem_of()
    figures = compot.profile(problem, 0, storage=BF16)
    expected = np.linalg.svd(problem.weight / np.linalg.norm(problem.weight), compute_uv=False)
    np.testing.assert_allclose(figures["singular_values"], expected, atol=1e-6)
    # spectra that fall at different speeds, so that a threshold leaves different ranks
    spectra = [np.exp(-speed * np.arange(D_OUT)) for speed in (0.02, 0.05, 0.1)]
    spectra = [values / np.linalg.norm(values) for values in spectra]
    profiles = profiles_of([{"singular_values": values.tolist()} for values in spectra])
    nbytes = nbytes_left([(D_IN, D_OUT)] * 3, 0.5)
    found = compot.share(profiles, nbytes, storage=BF16, **ORTHONORMAL)
    low, high = nbytes_left([(D_IN, D_OUT)], 0.8), nbytes_left([(D_IN, D_OUT)], 0)
    every = []
    for threshold in np.concatenate(spectra):
        ranks = [np.count_nonzero(values >= threshold) for values in spectra]
        every.append([min(max(2 * rank * (D_IN + D_OUT), low), high) for rank in ranks])
    assert found == max((one for one in every if sum(one) <= nbytes), key=sum)
    assert len(set(found)) == 3 and min(found) == found[2], "what is left of the steepest spectrum is the least"


def test_compot_gives_no_more_bytes_than_orthonormal_atoms_can_use():
    wide = (16, 400)
    profiles = profiles_of([{"singular_values": [1.0] * 16}, {"singular_values": [1e-3] * 16}], shape=wide)
    nbytes = nbytes_left([wide] * 2, 0.3)
    first, second = compot.share(profiles, nbytes, storage=BF16, **ORTHONORMAL)
    assert second == first < nbytes // 2, "neither can use all that is there"
    assert sparse_shape(*wide, nbytes=first, rho=2.0, **BF16).n_atoms == 16
    assert sparse_shape(*wide, nbytes=first + 1, rho=2.0, **BF16).n_atoms == 17
    (found,) = METHODS["compot"].fit(problem_of(shape=wide), first, Fit(storage=BF16), max_iter=2)
    assert found.n_atoms == 16 and found.nbytes <= first
    # where more has to go than the guard allows, that is the guard
    assert (
        compot.share(profiles, nbytes_left([wide] * 2, 0.9), storage=BF16, **ORTHONORMAL)
        == [nbytes_left([wide], 0.9)] * 2
    )
