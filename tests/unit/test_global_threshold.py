"""One threshold for the weights of a whole model: saliencies by their definition, and bytes within the budget."""

from __future__ import annotations

import numpy as np
import pytest

from cospadi.allocation import Profile
from cospadi.budget import as_is_nbytes, nbytes_left
from cospadi.errors import ConfigError
from cospadi.formats.values import storage_of
from cospadi.methods import METHODS, global_threshold
from cospadi.methods.base import Fit, Method, allocation_faults
from cospadi.methods.single_weights import entries_nbytes, n_entries
from cospadi.problem import Matrix, Metric, Outputs, Problem
from cospadi.solvers.saliency import RIDGE, saliencies

STORAGES = {bits: storage_of({"value_bits": bits, "block_size": 16}) for bits in (16, 4)}
SHAPES = [(48, 64), (48, 32), (96, 48), (48, 48)]
PRICES = [1.0, 3.0, 0.2, 1e3]


def problem_of(index: int, n_matrices: int = 1) -> Problem:
    rng = np.random.default_rng(index)
    shape = SHAPES[index]
    x = rng.normal(size=(300, shape[0])) * np.linspace(0.3, 2, shape[0])
    metric, price = Metric.of(x.T @ x), PRICES[index]
    outputs = Outputs(lambda: np.full(shape[1], 2 * price), 0.5)
    weights = [rng.normal(size=shape).astype(np.float32) for _ in range(n_matrices)]
    return Problem(
        [
            Matrix(f"model.layers.{index}.m{i}_proj", index, "site", shape, metric, lambda w=w: w, outputs)
            for i, w in enumerate(weights)
        ]
    )


def shared_out(ratio: float, storage: dict) -> tuple[list[Profile], list[int | None], int]:
    problems = [problem_of(index, 1 + index % 2) for index in range(4)]
    profiles = [
        Profile(tuple(one.names), tuple(one.shapes), global_threshold.profile(one, 0, storage=storage))
        for one in problems
    ]
    nbytes = nbytes_left([shape for one in profiles for shape in one.shapes], ratio)
    return profiles, global_threshold.share(profiles, nbytes, storage=storage, pattern="matrix"), nbytes


def test_saliency_is_what_the_best_others_leave():
    """Removing a weight and solving for the others of its column costs exactly that."""
    problem = problem_of(0)
    gram = problem.metric.gram
    scale = np.sqrt(np.diag(gram))
    ridged = gram + RIDGE * np.diag(scale**2)
    found = saliencies(problem.weight, gram)
    for i, j in [(0, 0), (17, 5), (47, 63)]:
        others = np.arange(len(gram)) != i
        column = problem.weight[:, j].astype(np.float64)
        change = np.linalg.solve(ridged[np.ix_(others, others)], ridged[others, i] * column[i])
        error = np.insert(-change, i, column[i])
        assert found[i, j] == pytest.approx(error @ ridged @ error, rel=1e-6)


def test_inputs_that_are_never_active_are_missed_by_nobody():
    gram = np.diag([4.0, 0.0, 1.0])
    np.testing.assert_allclose(saliencies(np.ones((3, 2), np.float32), gram)[:, 0], [4 * 1.01, 0, 1.01])


@pytest.mark.parametrize("bits", list(STORAGES))
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8])
def test_the_bytes_are_given_away_and_no_more(ratio, bits):
    storage = STORAGES[bits]
    profiles, found, nbytes = shared_out(ratio, storage)
    own = [as_is_nbytes(one.shapes, storage) for one in profiles]
    taken = [whole if given is None else given for given, whole in zip(found, own, strict=True)]
    assert sum(taken) <= nbytes
    # what is left over is because every matrix has all that it may have
    assert sum(taken) == nbytes or all(given is None for given in found) or sum(own) - sum(taken) < 4
    for given, one in zip(found, profiles, strict=True):
        if given is not None:
            d_in, d_out = one.shapes[0][0], sum(shape[1] for shape in one.shapes)
            n_entries((d_in, d_out), given, pattern="matrix", **storage)  # enough for what the method does with it


def test_shares_are_those_of_the_pooled_weights():
    """What stays of every matrix is what one threshold leaves, within its bounds."""
    storage, ratio = STORAGES[16], 0.4
    profiles, found, _ = shared_out(ratio, storage)
    values = []
    for index in range(4):
        problem = problem_of(index, 1 + index % 2)
        parts = zip(problem.weights, problem.matrices, problem.prices, strict=True)
        values.append(np.concatenate([(p * saliencies(w, m.metric.gram)).ravel() for w, m, p in parts]))
    shapes = [(one.shapes[0][0], sum(shape[1] for shape in one.shapes)) for one in profiles]
    kept = [
        v.size if given is None else n_entries(s, given, **storage)
        for s, given, v in zip(shapes, found, values, strict=True)
    ]
    mean = sum(n_entries(s, nbytes_left([s], ratio), **storage) for s in shapes) / sum(v.size for v in values)
    shares = np.array([n / v.size for n, v in zip(kept, values, strict=True)])
    assert (shares >= mean - global_threshold.MOST_FROM_MEAN - 1e-3).all()
    # weights of a thousand times the price all want to stay: this matrix is as it is, or at its bound
    assert shares[3] == pytest.approx(min(1, mean + global_threshold.MOST_FROM_MEAN), abs=0.01)
    free = [i for i in range(4) if abs(shares[i] - mean) < global_threshold.MOST_FROM_MEAN - 0.01]
    assert len(free) >= 2
    # the threshold of those within their bounds is one: what the first goes without is what the others do
    thresholds = [np.sort(values[i])[::-1][kept[i]] for i in free]
    assert max(thresholds) / min(thresholds) < 1.05
    assert entries_nbytes(shapes[0], kept[0], **storage) <= (found[0] or as_is_nbytes(profiles[0].shapes, storage))


@pytest.mark.parametrize("method", ["sparse", "hybrid", "alps", "sparsegpt", "wanda"])
def test_a_threshold_needs_prices_and_weights_that_are_free(method):
    complete = METHODS[method].defaults() | {"ratio": 0.4, "metric": "activations", "allocation": "global"}
    assert METHODS[method].allocates(complete)
    assert "set metric to gradients" in "".join(allocation_faults(complete))
    complete["metric"] = "gradients"
    assert not list(METHODS[method].faults(complete))
    assert "pattern 2:4" in "".join(METHODS[method].faults({**complete, "pattern": "2:4"}))


def test_torch_and_numpy_count_the_same_weights(monkeypatch):
    """Tensors go where `device` says; here it is torch on the CPU."""
    import torch

    problem = problem_of(0)
    expected = saliencies(problem.weight, problem.metric.gram)
    found = saliencies(torch.from_numpy(problem.weight), torch.from_numpy(problem.metric.gram))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    counts = global_threshold.profile(problem, 0, storage=STORAGES[16])
    monkeypatch.setattr(global_threshold, "on_device", lambda array, device: torch.from_numpy(array))
    monkeypatch.setattr(global_threshold, "gram_on", lambda metric, device: torch.from_numpy(metric.gram))
    # a saliency on the edge of two steps may be counted in either
    other = global_threshold.profile(problem, 0, storage=STORAGES[16])
    assert other["lowest"] == counts["lowest"] and sum(other["counts"]) == sum(counts["counts"]) == 48 * 64
    assert np.abs(np.cumsum(other["counts"]) - np.cumsum(counts["counts"])).max() <= 2


def step_problem(layer: int, price: float, *, d_in: int = 96, column_power: float = 0.0) -> Problem:
    rng = np.random.default_rng(layer)
    x = rng.normal(size=(2000, d_in)) * np.linspace(0.3, 2, d_in)
    weight = (rng.normal(size=(d_in, 256)) * np.linspace(1, 2, d_in)[:, None]).astype(np.float32)
    outputs = Outputs(lambda: np.linspace(price, 3 * price, 256), column_power)
    return Problem(
        [Matrix(f"layers.{layer}.m_proj", layer, "s", weight.shape, Metric.of(x.T @ x), lambda: weight, outputs)]
    )


def profiles_of(method: Method, problems: list[Problem], options: dict) -> list[Profile]:
    return [
        Profile(tuple(one.names), tuple(one.shapes), method.allocator.profile(one, 0, storage=STORAGES[16], **options))
        for one in problems
    ]


def test_one_step_for_the_model_gives_a_bit_for_four_times_the_price():
    method, options = METHODS["ectcq"], {"states": 8, "damping": 0.01}
    problems = [step_problem(layer, price) for layer, price in enumerate([1.0, 4.0, 16.0])]
    profiles = profiles_of(method, problems, options)
    nbytes = nbytes_left([shape for one in profiles for shape in one.shapes], 1 - 4 / 16)
    found = method.allocator.share(profiles, nbytes, storage=STORAGES[16], **options)
    assert nbytes - 3 <= sum(found) <= nbytes
    bits = np.array(found) * 8 / (96 * 256)
    np.testing.assert_allclose(np.diff(bits), 1, atol=0.1)  # weights and inputs are drawn anew for each
    errors = []
    for problem, own in zip(problems, found, strict=True):
        (factors,) = method.fit(problem, own, Fit(storage=STORAGES[16]), **options)
        assert factors.nbytes <= own
        error = problem.metric.squared_norm(problem.weight - factors.reconstruct())
        errors.append(problem.prices[0] * error)
    # what an error costs is then the same in all of them, within what is left of a bit
    assert max(errors) / min(errors) < 1.2


def test_no_matrix_is_left_without_bits():
    method, options = METHODS["ectcq"], {"states": 8, "damping": 0.01}
    problems = [step_problem(layer, price) for layer, price in enumerate([1e-12, 1.0])]
    profiles = profiles_of(method, problems, options)
    nbytes = nbytes_left([shape for one in profiles for shape in one.shapes], 1 - 2 / 16)
    bits = np.array(method.allocator.share(profiles, nbytes, storage=STORAGES[16], **options)) * 8 / (96 * 256)
    np.testing.assert_allclose(bits, [0.75, 3.25], atol=0.01)
    with pytest.raises(ConfigError, match="is the least"):
        method.allocator.share(profiles, nbytes_left([(96, 256)], 0.99), storage=STORAGES[16], **options)


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 256), (96, 256), (576, 256)])
def test_what_a_matrix_is_left_with_is_enough_for_it(d_in, d_out):
    """Steps, tables and scales of columns counted."""
    method, options = METHODS["ectcq"], {"states": 8, "damping": 0.01}
    problems = [step_problem(layer, price, d_in=d_in, column_power=0.5) for layer, price in enumerate([1e-12, 1.0])]
    profiles = profiles_of(method, problems, options)
    nbytes = nbytes_left([shape for one in profiles for shape in one.shapes], 1 - 4 / 16)
    found = method.allocator.share(profiles, nbytes, storage=STORAGES[16], **options)
    for problem, own in zip(problems, found, strict=True):
        (factors,) = method.fit(problem, own, Fit(storage=STORAGES[16]), **options)
        scaled = factors.with_columns_times(np.full(d_out, 1.5, np.float32))
        assert own - (0.01 * d_in * d_out + 64) / 8 <= scaled.nbytes <= own
