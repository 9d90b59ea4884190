"""Solvers: the optimality each step claims, degenerate input, and agreement between NumPy and torch."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from cospadi.arrays import orthonormal_rows
from cospadi.errors import NumericalError
from cospadi.runtime.cospadi_registry import SUPPORTS
from cospadi.solvers import SOLVERS, htp, least_squares, multi_metric, starts, svd
from cospadi.solvers._rounds import redraw, ridge_dictionary

LEARNED = ("htp", "ksvd")


def correlated_target(d=48, n=80, seed=0):
    """A target whose spectrum decays like that of a whitened weight."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, d + 1) ** -0.7
    return ((rng.standard_normal((d, d)) * scale) @ rng.standard_normal((d, n))).astype(np.float32)


def relative_error(target, solution):
    return np.linalg.norm(target - solution.dictionary @ solution.codes) / np.linalg.norm(target)


def planted(s, n, seed):
    """Codes of `s` nonzeros over spikes and Walsh functions, 32 atoms in 16 dimensions of coherence 1/4."""
    rng = np.random.default_rng(seed)
    dictionary = np.hstack([np.eye(16), hadamard(16) / 4])
    codes = np.zeros((32, n))
    for column in range(n):
        support = rng.choice(32, s, replace=False)
        codes[support, column] = rng.choice([-1, 1], s) * rng.uniform(0.5, 1.5, s)
    return dictionary, (dictionary @ codes).astype(np.float32)


def modules_after(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    return set(done.stdout.split())


@pytest.mark.parametrize("solver", ["htp", "procrustes"])
def test_the_default_path_loads_neither_numba_nor_torch(solver):
    loaded = modules_after(
        "import numpy as np; from cospadi.solvers import SOLVERS; "
        f"SOLVERS['{solver}'](np.eye(6, dtype='f'), n_atoms=4, n_nonzero_coefs=2, max_iter=2)"
    )
    assert f"cospadi.solvers.{solver}" in loaded
    assert not loaded & {"numba", "torch"}


def test_the_registry_imports_nothing_until_a_solver_is_asked_for():
    loaded = modules_after("from cospadi.solvers import SOLVERS; sorted(SOLVERS)")
    assert not {name for name in loaded if name.startswith("cospadi.solvers.")}


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_history_describes_the_solution(solver):
    target = correlated_target()
    lines = []
    solution = SOLVERS[solver](target, n_atoms=24, n_nonzero_coefs=12, max_iter=6, tol=0, log=lines.append)
    assert solution.dictionary.shape == (48, 24)
    assert solution.codes.shape == (24, 80)
    assert ((solution.codes != 0).sum(axis=0) == 12).all()
    np.testing.assert_allclose(np.linalg.norm(solution.dictionary, axis=0), 1, atol=1e-5)
    errors = [entry["relative_error"] for entry in solution.history]
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(relative_error(target, solution), rel=1e-5)
    assert [entry["iteration"] for entry in solution.history] == list(range(7)) and len(lines) == 7
    assert lines[-1].startswith("iter 6/6 rel_err 0.")


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_the_same_seed_gives_the_same_bytes(solver):
    target = correlated_target()
    one, two = (SOLVERS[solver](target, n_atoms=24, n_nonzero_coefs=8, random_state=3, max_iter=4) for _ in range(2))
    assert one.dictionary.tobytes() == two.dictionary.tobytes()
    assert one.codes.tobytes() == two.codes.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    solver=st.sampled_from(LEARNED),
    d=st.integers(1, 9),
    n=st.integers(1, 12),
    n_atoms=st.integers(1, 14),
    share=st.floats(0, 1),
    fault=st.sampled_from(["none", "rank 1", "zero columns", "equal columns", "zero", "tiny", "huge", "integers"]),
    seed=st.integers(0, 5),
)
def test_any_shape_rank_and_scale(solver, d, n, n_atoms, share, fault, seed):
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((d, n)).astype(np.float32)
    if fault == "rank 1":
        target = np.outer(target[:, 0], target[0]).astype(np.float32)
    elif fault == "zero columns":
        target[:, ::2] = 0
    elif fault == "equal columns":
        target[:] = target[:, :1]
    elif fault in ("zero", "tiny", "huge"):
        target *= {"zero": 0, "tiny": 1e-12, "huge": 1e12}[fault]
    elif fault == "integers":
        target = np.round(2 * target)
    s = 1 + int(share * (n_atoms - 1))
    solution = SOLVERS[solver](target, n_atoms=n_atoms, n_nonzero_coefs=s, random_state=seed, max_iter=5)
    assert np.isfinite(solution.dictionary).all() and np.isfinite(solution.codes).all()
    assert ((solution.codes != 0).sum(axis=0) <= s).all()
    assert not solution.codes[:, ~target.any(axis=0)].any() or solver == "htp"
    errors = [entry["relative_error"] for entry in solution.history]
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] <= 1 + 1e-5
    if target.any():
        assert errors[-1] == pytest.approx(relative_error(target.astype(np.float64), solution), rel=1e-3, abs=1e-5)
    else:
        assert not solution.codes.any()


# htp makes less of twice as many atoms as dimensions than K-SVD does, whose pursuit starts from nothing every round
@pytest.mark.parametrize(("solver", "gain"), [("htp", 0.9), ("ksvd", 0.75)])
def test_an_overcomplete_dictionary_is_used(solver, gain):
    target = correlated_target(d=16, n=200)
    few = SOLVERS[solver](target, n_atoms=16, n_nonzero_coefs=4, max_iter=12, tol=0)
    many = SOLVERS[solver](target, n_atoms=32, n_nonzero_coefs=4, max_iter=12, tol=0)
    assert relative_error(target, many) < gain * relative_error(target, few)


def test_htp_beats_sixty_rounds_of_ksvd():
    target = correlated_target(d=64, n=160)
    paper = SOLVERS["ksvd"](target, n_atoms=40, n_nonzero_coefs=20, max_iter=60, tol=0)
    ours = SOLVERS["htp"](target, n_atoms=40, n_nonzero_coefs=20)
    assert relative_error(target, ours) < relative_error(target, paper)


def test_annealing_ends_lower_than_the_plain_step():
    target = correlated_target(d=64, n=160)
    shape = {"n_atoms": 40, "n_nonzero_coefs": 20, "max_iter": 25, "tol": 0}
    plain = SOLVERS["htp"](target, steps=(1.0, 1.0), **shape)
    annealed = SOLVERS["htp"](target, **shape)
    assert relative_error(target, annealed) < 0.97 * relative_error(target, plain)


def test_the_adaptive_step_is_steepest_descents():
    rng = np.random.default_rng(0)
    atoms, rows, codes = (rng.standard_normal(shape) for shape in ((12, 20), (7, 20), (7, 12)))
    gradient = (rows - codes @ atoms) @ atoms.T
    step = htp.steepest_step(atoms @ atoms.T, gradient)

    def error(step):
        return ((rows - (codes + step * gradient) @ atoms) ** 2).sum(1)

    for other in (0.99 * step, 1.01 * step):
        assert (error(step) < error(other)).all()
    assert np.isfinite(htp.steepest_step(atoms @ atoms.T, np.zeros((2, 12)))).all()


def test_two_of_four_are_the_largest_of_every_four():
    rng = np.random.default_rng(0)
    values = rng.integers(-3, 4, (200, 12)).astype(np.float32)  # many ties
    mask = SUPPORTS["2:4"].project(values)
    for row, kept in zip(abs(values).reshape(-1, 4), mask.reshape(-1, 4), strict=True):
        expected = np.sort(np.argsort(-row, kind="stable")[:2])
        np.testing.assert_array_equal(np.flatnonzero(kept), expected)
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(SUPPORTS["2:4"].project(torch.from_numpy(values)).numpy(), mask)


@pytest.mark.parametrize("solver", ["htp", "procrustes"])
def test_support_of_two_in_four(solver):
    target = correlated_target(d=48, n=120)
    shape = {"n_atoms": 32, "n_nonzero_coefs": 16, "max_iter": 15}
    free = SOLVERS[solver](target, **shape)
    tied = SOLVERS[solver](target, support="2:4", **shape)
    assert ((tied.codes.reshape(8, 4, 120) != 0).sum(1) == 2).all()
    assert relative_error(target, free) < relative_error(target, tied) < 1.3 * relative_error(target, free)
    with pytest.raises(ValueError, match="multiple of 4 atoms and 2 of every 4 as nonzeros, got 30 and 15"):
        SOLVERS[solver](target, n_atoms=30, n_nonzero_coefs=15, support="2:4")
    with pytest.raises(ValueError, match="support must be one of bitmask, 2:4"):
        SOLVERS[solver](target, support="1:2", **shape)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_no_round_starts_after_the_seconds_allowed(solver):
    target = correlated_target()
    shape = {"n_atoms": 24, "n_nonzero_coefs": 8}
    solution = SOLVERS[solver](target, max_seconds=1e-6, **shape)
    assert len(solution.history) == 1 and np.isfinite(solution.codes).all()
    assert len(SOLVERS[solver](target, max_seconds=0.3, max_iter=10**6, tol=0, **shape).history) < 10**5
    with pytest.raises(ValueError, match="max_seconds must be positive, got 0"):
        SOLVERS[solver](target, max_seconds=0, **shape)


def test_blocks_of_atoms_end_where_single_atoms_do():
    target = correlated_target()
    shape = {"n_atoms": 24, "n_nonzero_coefs": 8, "max_iter": 10, "tol": 0}
    one, block = (SOLVERS["ksvd"](target, atom_update=update, **shape) for update in ("power", "block"))
    assert relative_error(target, block) < 1.03 * relative_error(target, one)
    # a block of one atom is the plain sweep
    single = SOLVERS["ksvd"](target.astype(np.float64), atom_update="block", block_atoms=1, **{**shape, "max_iter": 2})
    plain = SOLVERS["ksvd"](target.astype(np.float64), atom_update="power", **{**shape, "max_iter": 2})
    np.testing.assert_allclose(single.dictionary, plain.dictionary, atol=1e-6)
    np.testing.assert_allclose(single.codes, plain.codes, atol=1e-6)


def metrics_about_the_identity(d, seed, count=2):
    """Positive definite matrices whose mean is the identity."""
    rng = np.random.default_rng(seed)
    found = [(root := rng.standard_normal((2 * d, d))).T @ root for _ in range(count)]
    factor = np.linalg.cholesky(sum(found) / count)
    return [np.linalg.solve(factor, np.linalg.solve(factor, metric).T) for metric in found]


def test_the_dictionary_of_several_metrics_solves_the_normal_equations():
    rng = np.random.default_rng(0)
    d, k = 6, 4
    rows = [rng.standard_normal((n, d)) for n in (9, 12)]
    codes = [rng.standard_normal((len(part), k)) * (rng.random((len(part), k)) < 0.6) for part in rows]
    metrics = metrics_about_the_identity(d, 1)
    found = multi_metric.shared_dictionary(rows, codes, metrics, rng.standard_normal((k, d)), 40)
    # sum_l kron(S_l S_l^T, M_l) vec(D) = vec(sum_l S_l Y_l M_l), by a dense solve
    matrix = sum(np.kron(code.T @ code, metric) for code, metric in zip(codes, metrics, strict=True))
    rhs = sum(code.T @ part @ metric for code, part, metric in zip(codes, rows, metrics, strict=True))
    np.testing.assert_allclose(found, np.linalg.solve(matrix, rhs.ravel()).reshape(k, d), atol=1e-8)


@pytest.mark.parametrize("support", ["bitmask", "2:4"])
def test_everyones_own_metric_lowers_the_error_that_the_mean_metric_leaves(support):
    targets = [correlated_target(d=24, n=60, seed=seed).astype(np.float64) for seed in (0, 1)]
    metrics = metrics_about_the_identity(24, 2)
    shape = {"n_nonzero_coefs": 8, "support": support}
    start = SOLVERS["htp"](np.hstack(targets), n_atoms=16, **shape)
    before = start.codes[:, :60], start.codes[:, 60:]
    found = multi_metric.learn(
        targets, metrics, dictionary_init=start.dictionary, codes_init=before, max_iter=15, **shape
    )

    def error(dictionary, codes):
        lost = [target - dictionary @ code for target, code in zip(targets, codes, strict=True)]
        return sum(np.trace(e.T @ metric @ e) for e, metric in zip(lost, metrics, strict=True))

    whole = sum(np.trace(target.T @ metric @ target) for target, metric in zip(targets, metrics, strict=True))
    errors = [entry["relative_error"] for entry in found.history]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx((error(start.dictionary, before) / whole) ** 0.5, rel=1e-6)
    assert errors[-1] == pytest.approx((error(found.dictionary, found.codes) / whole) ** 0.5, rel=1e-6)
    assert errors[-1] < 0.98 * errors[0]
    assert all(((code != 0).sum(0) <= 8).all() for code in found.codes)


THREADS = """
import sys
import numpy as np
from cospadi.solvers import SOLVERS
rng = np.random.default_rng(0)
target = (rng.standard_normal((384, 384)) * np.arange(1, 385) ** -0.7) @ rng.standard_normal((384, 512))
for solver in ("htp", "procrustes"):
    solution = SOLVERS[solver](target.astype(np.float32), n_atoms=256, n_nonzero_coefs=96, max_iter=6)
    print(repr(float(solution.history[-1]["relative_error"])))
"""


def test_the_number_of_threads_does_not_change_the_error():
    found = []
    for count in ("1", "2", "4"):
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), count)
        command = [sys.executable, "-c", THREADS]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **threads})
        found.append([float(line) for line in done.stdout.split()])
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


@pytest.mark.parametrize("solver", LEARNED)
@pytest.mark.parametrize("noise", [0, 0.1])
def test_a_planted_dictionary_is_recovered_from_a_rough_start(solver, noise):
    truth, target = planted(s=2, n=900, seed=1)
    rough = truth + noise * np.random.default_rng(0).standard_normal(truth.shape)
    start = abs(np.sum(truth * rough, axis=0)) / np.linalg.norm(rough, axis=0)
    solution = SOLVERS[solver](target, n_atoms=32, n_nonzero_coefs=2, max_iter=40, tol=0, dictionary_init=rough)
    assert noise == 0 or start.mean() < 0.95
    assert abs(truth.T @ solution.dictionary).max(axis=1).min() > 0.9999
    assert relative_error(target, solution) < 1e-3


def test_procrustes_equals_the_best_orthonormal_pair_of_an_exhaustive_search():
    # two orthonormal atoms in the plane, one nonzero a column: one angle decides everything
    target = correlated_target(d=2, n=9, seed=4)
    angles = np.linspace(0, np.pi / 2, 20001)
    atoms = np.stack([np.cos(angles), np.sin(angles)])
    along = (target.T @ atoms) ** 2
    across = (target**2).sum(axis=0)[:, None] - along
    best = np.minimum(along, across).sum(axis=0).min() ** 0.5 / np.linalg.norm(target)
    starts_tried = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in (0.1, 0.5, 0.9, 1.3)]
    found = min(
        relative_error(target, SOLVERS["procrustes"](target, n_atoms=2, n_nonzero_coefs=1, dictionary_init=start))
        for start in starts_tried
    )
    assert found == pytest.approx(best, rel=1e-5)


def test_procrustes_keeps_orthonormal_atoms_and_refuses_more_than_fit():
    target = correlated_target()
    solution = SOLVERS["procrustes"](target, n_atoms=24, n_nonzero_coefs=12)
    np.testing.assert_allclose(solution.dictionary.T @ solution.dictionary, np.eye(24), atol=1e-5)
    with pytest.raises(ValueError, match="at most min"):
        SOLVERS["procrustes"](target, n_atoms=49, n_nonzero_coefs=12)


@pytest.mark.parametrize("update", ["power", "svd", "mod"])
def test_ksvd_updates_lower_the_error_of_omp_alone(update):
    target = correlated_target()
    solution = SOLVERS["ksvd"](target, n_atoms=24, n_nonzero_coefs=8, max_iter=8, tol=0, atom_update=update)
    errors = [entry["round_error"] for entry in solution.history]
    assert errors[-1] < 0.85 * errors[1]


def test_the_compiled_sweep_equals_a_plain_one():
    from cospadi.solvers import _kernels

    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((9, 13))
    atoms /= np.linalg.norm(atoms, axis=1)[:, None]
    codes = rng.standard_normal((31, 9)) * (rng.random((31, 9)) < 0.5)
    codes[:, 4] = 0
    rows = rng.standard_normal((31, 13))
    residual, swept, swept_codes = rows - codes @ atoms, atoms.copy(), codes.copy()
    _kernels.ksvd_sweep(residual, swept, swept_codes, 8)

    plain, plain_codes = atoms.copy(), codes.copy()
    for atom in range(9):
        users = np.flatnonzero(plain_codes[:, atom])
        if users.size == 0:
            continue
        plain_codes[users, atom] = 0
        own = rows[users] - plain_codes[users] @ plain
        u = plain[atom]
        for _ in range(8):
            u = own.T @ (own @ u)
            u /= np.linalg.norm(u)
        plain[atom], plain_codes[users, atom] = u, own @ u
    np.testing.assert_allclose(swept, plain, atol=1e-9)
    np.testing.assert_allclose(swept_codes, plain_codes, atol=1e-9)
    np.testing.assert_allclose(residual, rows - plain_codes @ plain, atol=1e-9)


def test_the_dictionary_step_is_least_squares():
    rng = np.random.default_rng(0)
    rows, codes = rng.standard_normal((40, 12)), rng.standard_normal((40, 6)) * [1, 1e3, 1e-3, 1, 0, 1]
    atoms, scaled = ridge_dictionary(rows, codes)
    best = codes @ np.linalg.lstsq(codes, rows, rcond=None)[0]
    np.testing.assert_allclose(scaled @ atoms, best, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), [1, 1, 1, 1, 0, 1], atol=1e-12)


def test_dead_and_duplicate_atoms_are_redrawn_from_bad_columns_without_changing_the_fit():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 8))
    atoms = np.linalg.qr(rng.standard_normal((8, 6)))[0].T.copy()
    atoms[3] = -atoms[1]
    atoms[4] = 0
    atoms[5] = atoms[1]
    codes = rng.standard_normal((20, 6))
    before = codes @ atoms
    residual = rows - before
    new_atoms, new_codes, n_redrawn = redraw(atoms, codes, residual, np.random.default_rng(0))
    assert n_redrawn == 3
    np.testing.assert_allclose(new_codes @ new_atoms, before, atol=1e-12)
    assert not new_codes[:, 3:].any()
    worst = np.argsort(-np.linalg.norm(residual, axis=1))[:6]
    directions = residual[worst] / np.linalg.norm(residual[worst], axis=1)[:, None]
    for atom in (3, 4, 5):
        assert np.isclose(directions @ new_atoms[atom], 1).any()


def test_conjugate_gradients_and_the_exact_polish_agree_with_lstsq():
    rng = np.random.default_rng(0)
    rows, atoms = rng.standard_normal((6, 12)), rng.standard_normal((9, 12))
    codes = rng.standard_normal((6, 9)) * (rng.random((6, 9)) < 0.6)
    codes[5] = 0
    gradient = (rows - codes @ atoms) @ atoms.T
    by_steps = least_squares.conjugate_gradients(atoms @ atoms.T, codes, gradient, codes != 0, 20)
    exact = least_squares.restricted(rows, atoms, codes)
    for column in range(6):
        support = np.flatnonzero(codes[column])
        expected = np.linalg.lstsq(atoms[support].T, rows[column], rcond=None)[0]
        np.testing.assert_allclose(by_steps[column, support], expected, atol=1e-8)
        np.testing.assert_allclose(exact[column, support], expected, atol=1e-10)
        assert not np.delete(exact[column], support).any()


def test_polished_codes_are_the_least_squares_ones():
    target = correlated_target()
    solution = SOLVERS["htp"](target, n_atoms=24, n_nonzero_coefs=8, max_iter=4, polish=True)
    residual = target - solution.dictionary @ solution.codes
    left = abs(solution.dictionary.T @ residual) * (solution.codes != 0)
    assert left.max() < 1e-5 * abs(solution.dictionary.T @ target).max()


def test_truncated_svd_is_the_best_approximation_of_its_rank():
    target = correlated_target()
    solution = svd.truncated(target, 10)
    u, s, vt = np.linalg.svd(target.astype(np.float64))
    np.testing.assert_allclose(
        solution.dictionary @ solution.codes, (u[:, :10] * s[:10]) @ vt[:10], atol=1e-5 * abs(target).max()
    )
    np.testing.assert_allclose(solution.dictionary.T @ solution.dictionary, np.eye(10), atol=1e-5)
    assert solution.history[-1]["relative_error"] == pytest.approx(np.linalg.norm(s[10:]) / np.linalg.norm(s), rel=1e-4)
    wide = svd.truncated(correlated_target(d=80, n=20), 20)
    assert wide.history[-1]["relative_error"] < 1e-5
    with pytest.raises(ValueError, match="rank must be at most"):
        svd.truncated(target, 49)


def test_starts():
    target = correlated_target()
    rng = np.random.default_rng(0)
    rows = np.ascontiguousarray(target.T)
    atoms = starts.random_columns(rows, 100, rng)
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, atol=1e-6)
    assert np.isclose(atoms[:80] @ (rows / np.linalg.norm(rows, axis=1)[:, None]).T, 1, atol=1e-5).any(axis=1).all()

    whitening = np.triu(rng.standard_normal((48, 48))).astype(np.float32) + 8 * np.eye(48, dtype=np.float32)
    start = starts.spectral_original(target, whitening, 12)
    left = np.linalg.svd(target)[0][:, :12]
    np.testing.assert_allclose(np.linalg.matrix_rank(np.hstack([start, whitening @ left]), tol=1e-2), 12)

    learned = SOLVERS["htp"](target, n_atoms=24, n_nonzero_coefs=8, max_iter=6)
    kept, _ = starts.warm_start(target, learned.dictionary, learned.codes, 16)
    cold = SOLVERS["htp"](target, n_atoms=16, n_nonzero_coefs=6, max_iter=2, tol=0)
    warm = SOLVERS["htp"](target, n_atoms=16, n_nonzero_coefs=6, max_iter=2, tol=0, dictionary_init=kept)
    assert kept.shape == (48, 16)
    assert relative_error(target, warm) < 1.1 * relative_error(target, cold)


def test_a_solution_is_a_start():
    target = correlated_target()
    for solver in LEARNED:
        first = SOLVERS[solver](target, n_atoms=24, n_nonzero_coefs=8, max_iter=5, tol=0)
        given = {"dictionary_init": first.dictionary, "codes_init": first.codes}
        second = SOLVERS[solver](target, n_atoms=24, n_nonzero_coefs=8, max_iter=3, tol=0, **given)
        assert second.history[0]["relative_error"] <= first.history[-1]["relative_error"] * 1.0001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_nonzero_coefs": 25}, "between 1 and n_atoms = 24, got 25"),
        ({"n_nonzero_coefs": 0}, "got 0"),
        ({"n_atoms": 0}, "n_atoms must be at least 1"),
        ({"dictionary_init": np.zeros((3, 3))}, r"dictionary_init must have shape \(48, 24\), got \(3, 3\)"),
        ({"max_iter": -1}, "max_iter must not be negative"),
    ],
)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_wrong_arguments_are_named(solver, change, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[solver](correlated_target(), **{"n_atoms": 24, "n_nonzero_coefs": 8, **change})


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_nan_is_refused(solver):
    target = correlated_target()
    target[3, 5] = np.nan
    with pytest.raises(NumericalError, match="NaN"):
        SOLVERS[solver](target, n_atoms=24, n_nonzero_coefs=8)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("shape", [(48, 80, 24, 8), (20, 60, 20, 5)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_tensors_take_the_same_path(solver, shape, device):
    torch = pytest.importorskip("torch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    d, n, k, s = shape
    target = correlated_target(d, n)
    shared = {"n_atoms": k, "n_nonzero_coefs": s, "max_iter": 5, "tol": 0}
    ours = SOLVERS[solver](target.astype(np.float64), **shared)
    theirs = SOLVERS[solver](torch.from_numpy(target).to(device).double(), **shared)
    assert theirs.codes.device.type == device
    np.testing.assert_allclose(theirs.codes.cpu().numpy(), ours.codes, atol=1e-6)
    np.testing.assert_allclose(theirs.dictionary.cpu().numpy(), ours.dictionary, atol=1e-6)
    # a column that is an atom itself leaves nothing but rounding, by which K-SVD takes its next atoms: from round to
    # round precisions part
    single = SOLVERS[solver](torch.from_numpy(target).to(device), **shared)
    assert single.codes.dtype == torch.float32
    checked = 1 if solver == "ksvd" else -1
    assert single.history[checked]["relative_error"] == pytest.approx(ours.history[checked]["relative_error"], rel=0.01)


def test_polar_factors_agree():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    matrix = (np.geomspace(1, 1e-5, 12)[:, None] * rng.standard_normal((12, 20))).astype(np.float64)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(orthonormal_rows(matrix), u @ vt, atol=1e-10)
    np.testing.assert_allclose(orthonormal_rows(torch.from_numpy(matrix)).numpy(), u @ vt, atol=1e-8)
    matrix[3] = matrix[5]
    rows = orthonormal_rows(torch.from_numpy(matrix).float())
    np.testing.assert_allclose((rows @ rows.T).numpy(), np.eye(12), atol=1e-5)


@pytest.mark.parametrize("update", ["svd", "mod"])
def test_torch_takes_the_other_atom_updates(update):
    torch = pytest.importorskip("torch")
    target = correlated_target(20, 60).astype(np.float64)
    shared = {"n_atoms": 16, "n_nonzero_coefs": 5, "max_iter": 3, "tol": 0, "atom_update": update, "polish": True}
    ours = SOLVERS["ksvd"](target, **shared)
    theirs = SOLVERS["ksvd"](torch.from_numpy(target), **shared)
    np.testing.assert_allclose((theirs.dictionary @ theirs.codes).numpy(), ours.dictionary @ ours.codes, atol=1e-7)


def test_torch_takes_the_same_path_with_several_metrics_and_blocks_of_atoms():
    torch = pytest.importorskip("torch")
    targets = [correlated_target(d=24, n=60, seed=seed).astype(np.float64) for seed in (0, 1)]
    metrics = metrics_about_the_identity(24, 2)
    rng = np.random.default_rng(0)
    dictionary, codes = rng.standard_normal((24, 16)), rng.standard_normal((16, 60))
    arguments = [targets, metrics, dictionary, [codes, codes]]

    def learn(targets, metrics, dictionary, codes):
        return multi_metric.learn(
            targets, metrics, n_nonzero_coefs=16, dictionary_init=dictionary, codes_init=codes, max_iter=3
        )

    def tensors(value):
        return [tensors(part) for part in value] if isinstance(value, list) else torch.from_numpy(value)

    ours, theirs = learn(*arguments), learn(*map(tensors, arguments))
    np.testing.assert_allclose(theirs.dictionary.numpy(), ours.dictionary, atol=1e-6)
    target = correlated_target().astype(np.float64)
    shape = {"n_atoms": 24, "n_nonzero_coefs": 8, "atom_update": "block", "max_iter": 3}
    ours, theirs = (SOLVERS["ksvd"](array, **shape) for array in (target, torch.from_numpy(target)))
    np.testing.assert_allclose(theirs.codes.numpy(), ours.codes, atol=1e-6)
