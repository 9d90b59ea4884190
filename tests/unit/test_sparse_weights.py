"""Solvers that keep single weights: masks by score, SparseGPT, ADMM, and the hybrid with learned atoms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cospadi.gram import relative_error
from cospadi.solvers import admm, exchange, hybrid, sparsegpt
from cospadi.solvers.entries import best_entries


def problem(d_in: int = 24, d_out: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight (d_in, d_out) and the Gram of inputs that depend on each other, of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6 * d_in, d_in)) @ rng.normal(size=(d_in, d_in)) * np.exp(rng.normal(size=d_in))
    return rng.normal(size=(d_in, d_out)).astype(np.float32), x.T @ x


def scaled(weight: np.ndarray, gram: np.ndarray) -> tuple[admm.Scaled, np.ndarray, np.ndarray]:
    metric = admm.Scaled(gram)
    rows = np.ascontiguousarray((weight * metric.scale[:, None]).T.astype(np.float32))
    return metric, rows, rows @ metric.gram


@pytest.mark.parametrize("pattern", ["matrix", "column", "row", "2:4", "1:3"])
def test_masks_keep_the_largest_where_the_pattern_lets_them(pattern):
    scores = np.random.default_rng(1).random((10, 12))
    mask = best_entries(scores, 57, pattern)
    if pattern == "matrix":
        assert mask.sum() == 57
        assert scores[mask].min() > scores[~mask].max()
        return
    groups = {
        "column": (scores, mask, 5),
        "row": (scores.T, mask.T, 4),
        "2:4": (scores.reshape(-1, 4), mask.reshape(-1, 4), 2),
        "1:3": (scores.reshape(-1, 3), mask.reshape(-1, 3), 1),
    }
    for values, kept in zip(*groups[pattern][:2], strict=True):
        assert kept.sum() == groups[pattern][2]
        assert values[kept].min() > values[~kept].max()


def test_of_equal_scores_the_first_stays():
    assert best_entries(np.ones((2, 3)), 4).tolist() == [[True, True, True], [True, False, False]]
    assert not best_entries(np.ones((2, 3)), 0).any()


def test_sparsegpt_keeps_a_weight_that_has_room():
    weight, gram = problem()
    pruned, mask = sparsegpt.prune(weight, gram, weight.size)
    assert mask.all()
    np.testing.assert_array_equal(pruned, weight)


def test_sparsegpt_is_the_surgeon_of_the_paper():
    """Each removal in turn is the optimal brain surgeon's: all later inputs, by the inverse Hessian of what is left."""
    weight, gram = problem()
    pruned, mask = sparsegpt.prune(weight, gram, weight.size // 2)
    hessian = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    left = weight.astype(np.float64)
    for i in range(len(gram)):
        inverse = np.linalg.inv(hessian[i:, i:])
        error = np.where(mask[i], 0, left[i])
        left[i:] -= inverse[:, :1] * (error / inverse[0, 0])
    np.testing.assert_allclose(pruned, np.where(mask, left, 0), rtol=1e-5, atol=1e-5)
    plain = np.where(best_entries(np.abs(weight).T, weight.size // 2).T, weight, 0)
    assert relative_error(weight, pruned, gram) < 0.8 * relative_error(weight, plain, gram)


@pytest.mark.parametrize("pattern", ["column", "row", "2:4", "2:3"])
def test_sparsegpt_in_patterns(pattern):
    weight, gram = problem()
    pruned, mask = sparsegpt.prune(weight, gram, weight.size // 2, pattern=pattern)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        assert (mask.T.reshape(-1, m).sum(1) == n).all()
    else:
        counts = mask.sum(0 if pattern == "column" else 1)
        assert counts.min() == counts.max() == weight.size // 2 // len(counts)
    assert (pruned[~mask] == 0).all()


def test_sparsegpt_with_inputs_that_are_never_active():
    weight, gram = problem()
    gram[3], gram[:, 3] = 0, 0
    pruned, _ = sparsegpt.prune(weight, gram, weight.size // 2)
    assert np.isfinite(pruned).all() and (pruned[3] == 0).all()


def test_values_on_a_support_are_least_squares():
    weight, gram = problem()
    metric, rows, targets = scaled(weight, gram)
    mask = best_entries(np.abs(rows), rows.size // 2)
    found = admm.fit_values(metric.gram, targets, rows * mask, 200)
    exact = np.zeros_like(rows, dtype=np.float64)
    for column, keep in enumerate(mask):
        h = metric.gram.astype(np.float64)
        exact[column, keep] = np.linalg.solve(h[np.ix_(keep, keep)], (h @ rows[column])[keep])
    best, reached = (admm.squared_error(metric.gram.astype(np.float64), rows - c) for c in (exact, found))
    assert reached <= best * (1 + 1e-3)


def test_admm_finds_the_best_support_of_a_tiny_column():
    weight, gram = problem(8, 1, seed=3)
    metric, rows, targets = scaled(weight, gram)
    h = metric.gram.astype(np.float64)

    def error(keep: tuple[int, ...]) -> float:
        keep = list(keep)
        code = np.zeros(8)
        code[keep] = np.linalg.solve(h[np.ix_(keep, keep)], (h @ rows[0])[keep])
        return (rows[0] - code) @ h @ (rows[0] - code)

    best = min(map(error, itertools.combinations(range(8), 4)))
    start = rows * best_entries(np.abs(rows), 4)
    found = admm.sparse_codes(metric, targets, 4, start=start, schedule=admm.SCHEDULES["long"])
    assert (found != 0).sum() == 4
    assert admm.squared_error(metric.gram, rows - found) <= best * 1.001


@pytest.mark.parametrize("pattern", ["matrix", "column", "2:4"])
@pytest.mark.parametrize("schedule", admm.SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_admm_is_never_above_its_start(pattern, schedule, seed):
    weight, gram = problem(seed=seed)
    metric, _, targets = scaled(weight, gram)
    pruned, mask = sparsegpt.prune(weight, gram, weight.size // 2, pattern=pattern)
    start = np.ascontiguousarray((pruned * metric.scale[:, None]).T.astype(np.float32))
    found = admm.sparse_codes(
        metric, targets, weight.size // 2, start=start, pattern=pattern, schedule=admm.SCHEDULES[schedule]
    )
    assert (found != 0).sum() <= mask.sum()
    errors = [relative_error(weight, (codes / metric.scale).T, gram) for codes in (start, found)]
    assert errors[1] < errors[0]


def restricted_error(h: np.ndarray, row: np.ndarray, keep: np.ndarray) -> float:
    code = np.zeros_like(row)
    code[keep] = np.linalg.solve(h[np.ix_(keep, keep)], (h @ row)[keep])
    return (row - code) @ h @ (row - code)


@pytest.mark.parametrize("namespace", [np, torch])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 8)])
def test_the_exchange_that_is_tried_first_is_the_best(namespace, n, m):
    """By figures of that row itself: against all exchanges inside groups, each with its own least squares."""
    for seed in range(4):
        weight, gram = problem(16, 1, seed)
        metric, rows, _ = scaled(weight, gram)
        h, row = metric.gram.astype(np.float64), rows[0].astype(np.float64)
        kept = best_entries(np.random.default_rng(seed).random((1, 16)), 0, f"{n}:{m}")
        code = np.zeros(16)
        code[kept[0]] = np.linalg.solve(h[np.ix_(kept[0], kept[0])], (h @ row)[kept[0]])
        errors = []
        for i, j in itertools.product(np.flatnonzero(kept[0]), np.flatnonzero(~kept[0])):
            if i // m == j // m:
                other = kept[0].copy()
                other[[i, j]] = False, True
                errors.append(restricted_error(h, row, other))
        given = [namespace.asarray(array) for array in (h, (h @ row)[None], code[None])]
        figures = exchange._figures(given[0], given[2], m)
        ones = namespace.ones_like(given[2][:, 0])
        found = np.asarray(exchange._step(given[0], *figures, admm.fit_values, *given[1:], ones))[0]
        if min(errors) < restricted_error(h, row, kept[0]):
            assert restricted_error(h, row, found != 0) == pytest.approx(min(errors), rel=1e-6)
        else:
            np.testing.assert_array_equal(found != 0, kept[0])


@pytest.mark.parametrize(("namespace", "pattern"), [(np, "2:4"), (torch, "2:4"), (np, "1:4"), (np, "3:8")])
def test_exchanges_end_below_what_admm_ends_with(namespace, pattern):
    n, m = map(int, pattern.split(":"))
    weight, gram = problem(48, 300)
    metric, rows, targets = scaled(weight, gram)
    found = admm.support_by_admm(metric, targets, 0, rows, admm.SCHEDULES["long"], pattern)
    found = admm.fit_values(metric.gram, targets, found, 50)
    given = [namespace.asarray(array) for array in (metric.gram, targets, found)]
    better = np.asarray(exchange.exchanged(*given, m, admm.fit_values))
    errors = [admm.squared_error(metric.gram, rows - codes) for codes in (found, better)]
    assert errors[1] < errors[0]  # how much is a figure of docs/learning.md; that it is less is what the rule says
    assert ((better != 0).reshape(-1, m).sum(1) == n).all()
    # a row alone, too: none is above what it was
    each = [((rows - codes) @ metric.gram * (rows - codes)).sum(1) for codes in (found, better)]
    assert (each[1] <= each[0] * (1 + 1e-4)).all()


@pytest.mark.parametrize("relax", [1.0, 1.6])
@pytest.mark.parametrize("n_nonzero", [0, 1, 5000, 12345, 14399, 14400])
def test_compiled_steps_are_those_of_the_definition(n_nonzero, relax):
    """``X = (H + rho I)^-1 (B + rho (Z - U))``, Z the n largest of ``relax X + (1 - relax) Z + U``, in pieces."""
    weight, gram = problem(24, 600)
    metric, rows, targets = scaled(weight, gram)
    state = admm.split_state(targets, n_nonzero, rows, relax=relax)
    assert not isinstance(state, type(admm.split_state(targets.astype(np.float64), n_nonzero, rows)))
    split, dual, before = rows.astype(np.float64), 0.0, 0.5
    for rho in (0.5, 0.5, 2.0, 1.0):
        dual = dual * before / rho
        inverse = metric.inverse(rho).astype(np.float64)
        moved = relax * ((targets + rho * (split - dual)) @ inverse) + (1 - relax) * split + dual
        state.step(admm.inverses(metric, rho), rho)
        np.testing.assert_allclose(state.moved, moved, rtol=1e-4, atol=1e-4 * np.abs(moved).max())
        mask = best_entries(abs(state.moved), n_nonzero)
        np.testing.assert_array_equal(state.support(), mask)
        moved = state.moved.astype(np.float64)
        split, before = moved * mask, rho
        dual = moved - split


def test_dual_goes_on_under_other_atoms():
    weight, gram = problem(24, 600)
    metric, rows, targets = scaled(weight, gram)
    for dtype in (np.float32, np.float64):
        state = admm.split_state(targets.astype(dtype), 5000, rows.astype(dtype))
        state.step(admm.inverses(metric, 0.5), 0.5)
        before, lengths = state.moved.copy(), np.linspace(1, 2, 24).astype(dtype)
        state.follow(2 * targets.astype(dtype), [(slice(None), lengths)])
        np.testing.assert_allclose(state.moved, before * lengths, rtol=1e-6)
        kept = np.where(state.support(), state.moved, 0)
        expected = (2 * targets + 0.5 * (2 * kept - state.moved)) @ metric.inverse(0.5) + state.moved - kept
        state.step(admm.inverses(metric, 0.5), 0.5)
        np.testing.assert_allclose(state.moved, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_compiled_conjugate_gradients_are_the_others():
    weight, gram = problem(24, 600)
    metric, rows, targets = scaled(weight, gram)
    codes = rows * best_entries(np.abs(rows), 5000)
    codes[7] = 0  # an output with nothing left
    found = admm.fit_values(metric.gram, targets, codes, 6)
    double = admm.fit_values(metric.gram.astype(np.float64), targets.astype(np.float64), codes.astype(np.float64), 6)
    assert found.dtype == np.float32 and not found[7].any()
    np.testing.assert_array_equal(found != 0, codes != 0)
    np.testing.assert_allclose(found, double, atol=2e-3 * np.abs(double).max())
    assert admm.squared_error(metric.gram, rows - found) == pytest.approx(
        admm.squared_error(metric.gram, rows - double.astype(np.float32)), rel=1e-3
    )


def test_inverses_over_identity_and_atoms_are_inverses():
    _, gram = problem()
    metric = admm.Scaled(gram, np.float64)
    atoms = np.random.default_rng(0).normal(size=(3, len(gram)))
    extended = hybrid.Extended(metric, atoms)
    dictionary = np.concatenate([np.eye(len(gram)), atoms.T], axis=1)
    expected = dictionary.T @ metric.gram @ dictionary
    np.testing.assert_allclose(extended.gram, expected, atol=1e-4 * expected.max())
    product = extended.inverse(0.3) @ (extended.gram + 0.3 * np.eye(len(gram) + 3))
    np.testing.assert_allclose(product, np.eye(len(gram) + 3), atol=1e-9)


def test_hybrid_finds_atoms_that_are_there():
    """A weight of a few common directions and a few single entries: no sparse weight is near it, the hybrid is."""
    rng = np.random.default_rng(5)
    d_in, d_out, n_atoms = 32, 96, 3
    weight = rng.normal(size=(d_in, n_atoms)) @ rng.normal(size=(n_atoms, d_out))
    weight += np.where(rng.random(weight.shape) < 0.05, 3 * rng.normal(size=weight.shape), 0)
    _, gram = problem(d_in, 1)
    metric, rows, targets = scaled(weight, gram)
    n_nonzero = n_atoms * d_out + int(0.06 * weight.size)
    sparse = admm.sparse_codes(metric, targets, n_nonzero, start=rows * best_entries(np.abs(rows), n_nonzero))
    codes, atoms, history = hybrid.learn(metric, rows, n_nonzero, n_atoms, start=sparse)
    approximation = codes[:, :d_in] + codes[:, d_in:] @ atoms
    errors = [admm.squared_error(metric.gram, rows - found) for found in (sparse, approximation)]
    assert (codes != 0).sum() <= n_nonzero
    assert errors[1] < errors[0] / 4  # squared
    falling = [entry["relative_error"] for entry in history]
    assert falling == sorted(falling, reverse=True)
    reached = (errors[1] / admm.squared_error(metric.gram, rows)) ** 0.5
    assert reached <= falling[-1] * 1.001


def stacked(
    n_metrics: int, d_in: int = 24, d_out: int = 60, dtype: type = np.float32
) -> tuple[admm.Stacked, np.ndarray]:
    """Metrics of matrices, and their rows below each other, each in the space of its own."""
    metrics, rows = [], []
    for seed in range(n_metrics):
        weight, gram = problem(d_in, d_out, seed=seed)
        metrics.append(admm.Scaled(gram * 10.0**seed, dtype))  # layers whose inputs differ in size, too
        rows.append(np.ascontiguousarray((weight * metrics[-1].scale[:, None]).T.astype(dtype)))
    return admm.Stacked(metrics, [d_out] * n_metrics), np.concatenate(rows)


def test_atoms_of_several_metrics_solve_the_normal_equations_of_all():
    metric, rows = stacked(3, dtype=np.float64)
    rng = np.random.default_rng(0)
    d_in, n_atoms = rows.shape[1], 3
    codes = np.concatenate([rows * best_entries(abs(rows), 900), rng.normal(size=(len(rows), n_atoms))], axis=1)
    finder = hybrid._Together(metric)
    over_unit, dictionary = finder.given(codes, rng.normal(size=(n_atoms, d_in)))
    for _ in range(20):  # eight steps of conjugate gradients each
        dictionary, lengths = finder.update(rows, over_unit, dictionary)
        over_unit = admm.over_parts(lengths, lambda own, c: c * own, over_unit)
    same, atoms = finder.result(over_unit, dictionary)
    np.testing.assert_allclose(same, codes, rtol=1e-9, atol=1e-12)
    gradient, size = 0.0, 0.0
    for part, one in metric.parts:
        shares, left = codes[part, d_in:], rows[part] - codes[part, :d_in]
        image = shares.T @ (left - shares @ (atoms * one.scale)) @ one.gram * one.scale
        gradient, size = gradient + image, size + abs(shares.T @ left @ one.gram * one.scale).max()
    assert abs(gradient).max() < 1e-6 * size


def test_parts_of_one_metric_are_that_metric():
    """ADMM goes the same way whether the rows are one part or several: only atoms are found by other arithmetic."""
    weight, gram = problem(24, 90)
    metric, rows, targets = scaled(weight, gram)
    again = admm.Stacked([metric, admm.Scaled(gram, np.float32)], [40, 50])
    start = rows * best_entries(np.abs(rows), rows.size // 2)
    one, parts = (admm.sparse_codes(each, targets, rows.size // 2, start=start) for each in (metric, again))
    np.testing.assert_allclose(parts, one, rtol=1e-4, atol=1e-4 * abs(one).max())
    assert (parts != 0).sum() == (one != 0).sum()
    codes, atoms, _ = hybrid.learn(metric, rows, rows.size // 2, 3, start=start)
    given = np.concatenate([codes[:, :24], codes[:, 24:]], axis=1)
    better, shared, history = hybrid.learn(
        again, rows, rows.size // 2, 3, start=given, atoms=atoms / metric.scale.astype(np.float32)
    )
    errors = [
        admm.squared_error(metric.gram, rows - c[:, :24] - c[:, 24:] @ a)
        for c, a in ((codes, atoms), (better, (shared * metric.scale).astype(np.float32)))
    ]
    assert 0.9 * errors[0] < errors[1] <= errors[0] * (1 + 1e-4)
    assert len(history) == hybrid.PASSES


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_several_metrics_have_one_budget_and_never_more_error_than_the_start(dtype):
    metric, rows = stacked(3, dtype=dtype)
    targets = admm.over_parts(metric.parts, lambda one, w: w @ one.gram, rows)
    n_nonzero = rows.size // 3
    start = rows * best_entries(np.abs(rows), n_nonzero)
    sparse = admm.sparse_codes(metric, targets, n_nonzero, start=start)
    assert (sparse != 0).sum() <= n_nonzero
    errors = [admm.error_of(metric, rows - codes) for codes in (start, sparse)]
    assert errors[1] < errors[0]
    rng = np.random.default_rng(1)
    atoms = rng.normal(size=(2, rows.shape[1])).astype(dtype)
    cut = start * best_entries(np.abs(start), n_nonzero - 50)
    first = np.concatenate([cut, np.zeros((len(rows), 2), dtype)], axis=1)
    first[:25, -1] = first[30:55, -2] = 1e-3
    codes, found, _ = hybrid.learn(metric, rows, n_nonzero, 2, start=first, atoms=atoms, max_iter=2)

    def error(codes, atoms):
        def left(one, w, c):
            return w - c[:, :-2] - c[:, -2:] @ (atoms * one.scale).astype(dtype)

        return admm.error_of(metric, admm.over_parts(metric.parts, left, rows, codes))

    assert (codes != 0).sum() <= n_nonzero
    assert error(codes, found) < error(first, atoms)


def test_threads_do_not_change_bytes(monkeypatch):
    weight, gram = problem(40, 600)

    def run() -> list[np.ndarray]:
        metric, rows, targets = scaled(weight, gram)
        pruned, _ = sparsegpt.prune(weight, gram, weight.size // 2)
        start = np.ascontiguousarray((pruned * metric.scale[:, None]).T.astype(np.float32))
        sparse = admm.sparse_codes(metric, targets, weight.size // 2, start=start)
        return [pruned, sparse, *hybrid.learn(metric, rows, weight.size // 2, 4, start=sparse, max_iter=2)[:2]]

    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        results.append(run())
    for one, several in zip(*results, strict=True):
        np.testing.assert_array_equal(one, several)


def test_torch_gives_the_same():
    weight, gram = problem()
    pruned, mask = sparsegpt.prune(weight, gram, weight.size // 2)
    tensors, chosen = sparsegpt.prune(torch.from_numpy(weight), torch.from_numpy(gram), weight.size // 2)
    np.testing.assert_array_equal(chosen.numpy(), mask)
    np.testing.assert_allclose(tensors.numpy(), pruned, rtol=1e-5, atol=1e-6)
    metric, rows, targets = scaled(weight, gram)
    start = rows * best_entries(np.abs(rows), rows.size // 2)
    expected = admm.sparse_codes(metric, targets, rows.size // 2, start=start)
    as_torch = admm.Scaled(torch.from_numpy(gram), torch.float32)
    found = admm.sparse_codes(as_torch, torch.from_numpy(targets), rows.size // 2, start=torch.from_numpy(start.copy()))
    errors = [admm.squared_error(metric.gram, rows - codes) for codes in (expected, found.numpy())]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    codes, atoms, _ = hybrid.learn(as_torch, torch.from_numpy(rows), rows.size // 2, 2, start=found, max_iter=3)
    assert codes.shape == (20, 26) and atoms.shape == (2, 24)
    parts = admm.Stacked([as_torch, admm.Scaled(torch.from_numpy(gram), torch.float32)], [8, 12])
    shared = (atoms / as_torch.scale).float()
    better, again, _ = hybrid.learn(
        parts, torch.from_numpy(rows), rows.size // 2, 2, start=codes, atoms=shared, max_iter=1
    )
    errors = [
        admm.squared_error(as_torch.gram, torch.from_numpy(rows) - c[:, :24] - c[:, 24:] @ a)
        for c, a in ((codes, atoms), (better, (again * as_torch.scale).float()))
    ]
    assert errors[1] <= errors[0] * (1 + 1e-4)
