"""GeoPair: the dictionary against a dense solve of its equation, what is stored, and what a pair gains."""

import numpy as np
import pytest

from cospadi.budget import nbytes_left, sparse_shape
from cospadi.formats.values import storage_of
from cospadi.methods import METHODS
from cospadi.methods.base import Fit, planned_problems
from cospadi.problem import Matrix, Metric, Problem
from cospadi.solvers import sylvester

BF16 = storage_of({})
D_IN, D_OUT = 40, 48


def pair(seed=0, alike=0.8):
    """One projection of two layers: weights that are alike, inputs that are not."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(D_IN, 8)) @ rng.normal(size=(8, 2 * D_OUT)) / 3
    weights = alike * common + rng.normal(size=common.shape)
    matrices = []
    for layer, weight in enumerate(np.split(weights.astype(np.float32), 2, axis=1)):
        x = rng.normal(size=(300, D_IN)) * rng.permutation(np.linspace(0.1, 2, D_IN))
        metric = Metric.of(x.T @ x)
        matrices.append(
            Matrix(f"model.layers.{layer}.q_proj", layer, "site", weight.shape, metric, lambda weight=weight: weight)
        )
    return Problem(matrices)


def error(problem, factors):
    """Squared error of all matrices, over the squared norm of what they give."""
    each = zip(problem.metrics, problem.weights, factors, strict=True)
    left = [(metric.squared_norm(weight - f.reconstruct()), metric.squared_norm(weight)) for metric, weight, f in each]
    return sum(part for part, _ in left) / sum(size for _, size in left)


@pytest.mark.parametrize("seed", range(3))
def test_sylvester_equation_is_solved(seed):
    rng = np.random.default_rng(seed)
    k, d = 7, 9
    grams = [x.T @ x for x in rng.normal(size=(2, 20, d))]
    moments = [s.T @ s for s in rng.normal(size=(2, 30, k))]
    right = rng.normal(size=(k, d))
    found = sylvester.solve_sylvester(sylvester._together(*grams), moments, right)
    # vec(A D^T G) = (A kron G) vec(D^T), row by row
    system = sum(np.kron(moment, gram) for moment, gram in zip(moments, grams, strict=True))
    np.testing.assert_allclose(found.ravel(), np.linalg.solve(system, right.ravel()), rtol=1e-8)


def test_atoms_of_one_matrix_in_directions_of_the_other_are_left_zero():
    # the first metric sees the first half of the inputs, the second the rest; each matrix has an atom of its own
    grams = np.diag([1.0, 1, 0, 0]), np.diag([0.0, 0, 1, 1])
    moments = np.diag([1.0, 0]), np.diag([0.0, 1])
    right = np.array([[1.0, 2, 0, 0], [0, 0, 3, 4]])
    found = sylvester.solve_sylvester(sylvester._together(*grams), moments, right)
    np.testing.assert_allclose(found, right, atol=1e-12)


def test_a_pair_shares_a_dictionary_that_is_exact_for_its_codes():
    problem = pair()
    nbytes = nbytes_left(problem.shapes, 0.4)
    found = METHODS["geopair"].fit(problem, nbytes, Fit(storage=BF16), eta=1e-3)
    shape = sparse_shape(*problem.shape, nbytes=nbytes, rho=2.5, **BF16)
    assert {f.n_atoms for f in found} == {shape.n_atoms}
    assert {f.tensor for f in found} == {"model.layers.0.q_proj.dictionary"}
    assert all((f.codes != 0).sum(0).max() <= shape.n_nonzero_coefs for f in found)
    tensors = {}
    for index, f in enumerate(found):
        tensors |= f.pack(f"m{index}")[0]
    assert sum(tensor.nbytes for tensor in tensors.values()) <= nbytes
    history = [entry["round_error"] for entry in found[0].diagnostics["history"]]
    assert len(history) == 21 and min(history) < 0.9 * history[0]
    # that of the metrics with their ridge; without it all but the same
    assert min(history) ** 2 == pytest.approx(error(problem, found), rel=0.02)
    # no other dictionary has a lower error with these codes
    rng = np.random.default_rng(1)
    metrics = [metric.whitening(eta=1e-3).factor for metric in problem.metrics]
    codes = [f.codes.astype(np.float64) for f in found]
    rounds = sylvester._together(*[factor.T @ factor for factor in metrics])
    right = sum(
        s @ w.T.astype(np.float64) @ factor.T @ factor
        for s, w, factor in zip(codes, problem.weights, metrics, strict=True)
    )
    best = sylvester.solve_sylvester(rounds, [s @ s.T + 1e-9 * np.eye(len(s)) for s in codes], right).T

    def objective(dictionary):
        parts = zip(metrics, problem.weights, codes, strict=True)
        return sum(np.square(factor @ (w - dictionary @ s)).sum() for factor, w, s in parts)

    assert objective(best) <= objective(found[0].dictionary)
    for _ in range(20):
        assert objective(best) < objective(best + 1e-3 * rng.normal(size=best.shape))


def test_a_pair_is_better_than_two_of_its_own_and_than_the_mean_metric():
    problem = pair()
    nbytes = nbytes_left(problem.shapes, 0.4)
    mine = error(problem, METHODS["geopair"].fit(problem, nbytes, Fit(storage=BF16)))
    alone = [
        METHODS["geopair"].fit(Problem([matrix]), nbytes // 2, Fit(storage=BF16))[0] for matrix in problem.matrices
    ]
    assert alone[0].tensor is None, "nothing is shared"
    assert mine < error(problem, alone)
    shared = METHODS["basis_sharing"].fit(problem, nbytes, Fit(storage=BF16))
    assert mine < error(problem, shared)


def test_pairs_are_projections_of_two_layers_and_more_than_two_are_refused():
    method = METHODS["geopair"]
    settings = {"ratio": 0.4, "codes": {}, "targets": None, **method.defaults()}
    matrices = {"q_proj": (64, 64), "down_proj": (128, 64)}
    problems = planned_problems(settings, method, matrices, 2)
    assert [[(t.layer, t.projection) for t in one] for one in problems] == [
        [(0, "q_proj"), (1, "q_proj")],
        [(0, "down_proj"), (1, "down_proj")],
    ]
    assert not list(method.faults(settings, problems))
    (fault,) = method.faults({**settings, "group_size": 3})
    assert fault == "group_size: 3; a Sylvester equation is for two layers at most"
