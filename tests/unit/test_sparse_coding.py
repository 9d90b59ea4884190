"""Sparse coding of columns against a fixed dictionary, and the public functions around it."""

import itertools
import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cospadi.solvers._arrays import top_mask
from cospadi.solvers.omp import encode_rows

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from cospadi.solvers import coding  # noqa: E402
from cospadi.solvers.coding import ALGORITHMS, dict_learning, sparse_encode  # noqa: E402


def problem(d=30, k=20, n=50, seed=0):
    rng = np.random.default_rng(seed)
    dictionary = rng.standard_normal((d, k))
    return rng.standard_normal((d, n)), dictionary / np.linalg.norm(dictionary, axis=0)


def encode(*arrays, **options):
    """`sparse_encode` with tensors as on a GPU: on the CPU they are computed with as NumPy arrays otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "_on_cpu_as_numpy", lambda array: array)
        return sparse_encode(*arrays, **options)


def errors(target, dictionary, codes):
    return np.linalg.norm(target - dictionary @ np.asarray(codes), axis=0)


def exhaustive(target, dictionary, s):
    """Least error of every column over all supports of `s` atoms."""
    best = np.full(target.shape[1], np.inf)
    for support in itertools.combinations(range(dictionary.shape[1]), s):
        part = dictionary[:, support]
        best = np.minimum(best, np.linalg.norm(target - part @ np.linalg.lstsq(part, target, rcond=None)[0], axis=0))
    return best


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(("d", "k", "s"), [(30, 20, 7), (30, 20, 20), (12, 25, 6), (30, 20, 1)])
def test_omp_equals_scikit_learn(dtype, wrap, d, k, s):
    linear_model = pytest.importorskip("sklearn.linear_model")
    target, dictionary = problem(d, k)
    gram, correlations = dictionary.T @ dictionary, dictionary.T @ target
    expected = linear_model.orthogonal_mp_gram(gram, correlations, n_nonzero_coefs=s)
    codes = np.asarray(encode(wrap(target.astype(dtype)), wrap(dictionary.astype(dtype)), n_nonzero_coefs=s))
    assert ((codes != 0) == (expected != 0)).all()
    np.testing.assert_allclose(codes, expected, atol=1e-4 if dtype == np.float32 else 1e-10)


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_omp_on_degenerate_dictionaries(wrap):
    target, dictionary = problem(d=8, k=6, n=10)
    target[:, 3] = 0
    target[:, 4] = 2 * dictionary[:, 1]
    # duplicates, a negated copy, a combination, a zero atom: rank 6 of 11 atoms
    combined = dictionary[:, [0]] + dictionary[:, [2]]
    wide = np.hstack(
        [dictionary, dictionary[:, [0]], -dictionary[:, [1]], dictionary[:, [2]], combined, np.zeros((8, 1))]
    )
    codes = np.asarray(encode(wrap(target), wrap(wide), n_nonzero_coefs=9))
    used = (codes != 0).sum(axis=0)
    assert used[3] == 0 and used[4] == 1
    assert (np.delete(used, [3, 4]) == 6).all()
    assert not codes[10].any()
    best = np.linalg.norm(target - dictionary @ np.linalg.lstsq(dictionary, target, rcond=None)[0], axis=0)
    np.testing.assert_allclose(errors(target, wide, codes), best, atol=1e-6)


def test_columns_that_single_precision_cannot_solve_are_done_in_double():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((12, 1))
    close = (base + 2e-3 * rng.standard_normal((12, 6))).astype(np.float32)
    target = rng.standard_normal((12, 5)).astype(np.float32)
    codes = sparse_encode(target, close, n_nonzero_coefs=6).numpy()
    assert ((codes != 0).sum(axis=0) == 6).all()
    double = close.astype(np.float64)
    best = np.linalg.norm(target - double @ np.linalg.lstsq(double, target, rcond=None)[0], axis=0)
    np.testing.assert_allclose(errors(target, double, codes.astype(np.float64)), best, rtol=1e-3)


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_omp_takes_the_atoms_of_a_warm_start_first(wrap):
    target, dictionary = problem()
    cold = np.asarray(encode(wrap(target), wrap(dictionary), n_nonzero_coefs=8))
    half = np.asarray(encode(wrap(target), wrap(dictionary), n_nonzero_coefs=4))
    warm = np.asarray(encode(wrap(target), wrap(dictionary), n_nonzero_coefs=8, codes_init=wrap(half)))
    np.testing.assert_allclose(warm, cold, atol=1e-10)
    forced = np.zeros_like(cold)
    forced[:3] = 1
    warm = np.asarray(encode(wrap(target), wrap(dictionary), n_nonzero_coefs=5, codes_init=wrap(forced)))
    assert (warm[:3] != 0).all() and ((warm != 0).sum(axis=0) == 5).all()


@settings(max_examples=60, deadline=None)
@example(d=6, k=6, n=1, share=1.0, rank=6, dtype=np.float32, seed=3)  # single precision takes the last for dependent
@given(
    d=st.integers(1, 8),
    k=st.integers(1, 12),
    n=st.integers(1, 20),
    share=st.floats(0, 1),
    rank=st.integers(1, 8),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 9),
)
def test_omp_is_least_squares_on_its_support_for_any_shape_and_rank(d, k, n, share, rank, dtype, seed):
    rng = np.random.default_rng(seed)
    dictionary = rng.standard_normal((d, min(rank, d))) @ rng.standard_normal((min(rank, d), k))
    dictionary = (dictionary / np.linalg.norm(dictionary, axis=0)).astype(dtype)
    target = rng.standard_normal((d, n)).astype(dtype)
    s = 1 + int(share * (k - 1))
    codes = sparse_encode(target, dictionary, n_nonzero_coefs=s).numpy()
    assert np.isfinite(codes).all()
    count = (codes != 0).sum(axis=0)
    assert (count <= min(s, d)).all()
    left = abs(dictionary.T @ (target - dictionary @ codes)) * (codes != 0)
    assert left.max() <= 2e-3 * max(1, abs(codes).max())
    ours, theirs = (errors(target, dictionary, c) for c in (codes, _torch_codes(target, dictionary, s)))
    np.testing.assert_allclose(ours, theirs, atol=2e-3 if dtype == np.float32 else 1e-6)


def _torch_codes(target, dictionary, s):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = (torch.from_numpy(array).to(device) for array in (target, dictionary))
    return encode(*arrays, n_nonzero_coefs=s).cpu().numpy()


def test_omp_and_htp_find_the_exhaustive_optimum_where_atoms_are_incoherent():
    rng = np.random.default_rng(0)
    dictionary = np.linalg.qr(rng.standard_normal((8, 8)))[0] + 0.03 * rng.standard_normal((8, 8))
    dictionary /= np.linalg.norm(dictionary, axis=0)
    target = rng.standard_normal((8, 40))
    best = exhaustive(target, dictionary, 3)
    found = {
        name: errors(target, dictionary, sparse_encode(target, dictionary, n_nonzero_coefs=3, algorithm=name))
        for name in ("omp", "htp", "threshold")
    }
    assert all((found[name] >= best - 1e-9).all() for name in found)
    # "threshold" does not solve for the coefficients; the pursuits miss the optimum only near ties
    assert np.isclose(found["omp"], best, rtol=1e-6).mean() >= 0.85
    assert np.isclose(found["htp"], best, rtol=1e-4).mean() >= 0.85
    orthonormal = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    best = exhaustive(target, orthonormal, 3)
    for name in ("omp", "htp", "threshold"):
        codes = sparse_encode(target, orthonormal, n_nonzero_coefs=3, algorithm=name)
        np.testing.assert_allclose(errors(target, orthonormal, codes), best, rtol=1e-6)


def test_htp_codes_are_better_than_omp_codes_at_half_the_atoms():
    target, dictionary = problem(d=60, k=50, n=200)
    found = {
        name: np.linalg.norm(
            errors(target, dictionary, sparse_encode(target, dictionary, n_nonzero_coefs=25, algorithm=name))
        )
        for name in ("omp", "htp")
    }
    assert found["htp"] < found["omp"]


def test_polish_makes_thresholded_codes_least_squares():
    target, dictionary = problem()
    codes = sparse_encode(target, dictionary, n_nonzero_coefs=6, algorithm="threshold", polish=True).numpy()
    left = abs(dictionary.T @ (target - dictionary @ codes)) * (codes != 0)
    assert left.max() < 1e-10


@pytest.mark.parametrize("batch_columns", [1, 7, 50])
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_batches_do_not_change_the_codes(wrap, batch_columns):
    target, dictionary = problem()
    whole = encode(wrap(target), wrap(dictionary), n_nonzero_coefs=6)
    parts = encode(wrap(target), wrap(dictionary), n_nonzero_coefs=6, batch_columns=batch_columns)
    np.testing.assert_allclose(np.asarray(parts), np.asarray(whole), atol=1e-12)


def test_thread_counts_do_not_change_a_byte():
    code = (
        "import sys, numpy as np; from cospadi.solvers._threads import n_threads; "
        "from cospadi.solvers.omp import encode_rows; "
        "rng = np.random.default_rng(0); a = rng.standard_normal((40, 30), dtype='f'); "
        "r = rng.standard_normal((300, 30), dtype='f'); "
        "print(n_threads(), hash(encode_rows(r, a, 12).tobytes()))"
    )
    out = {}
    for threads in ("1", "2"):
        env = {**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, "PYTHONHASHSEED": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        out[threads] = done.stdout.split()
    assert [out["1"][0], out["2"][0]] == ["1", "2"]
    assert out["1"][1] == out["2"][1]


def panel_product(width):
    """The kernel's product of a panel, in vectors of `width` bytes."""
    numba = pytest.importorskip("numba")
    from cospadi.solvers import _kernels

    @numba.njit(fastmath={"reassoc", "contract"})
    def product(out, factor, position, weights, n_rows):
        _kernels._subtract_product(out, factor, position, factor.shape[1], weights, n_rows, width)

    return product


def panel_operands(dtype, n_rows=37, n_columns=160):
    rng = np.random.default_rng(0)
    shapes = (4, n_columns), (n_rows, n_columns), (n_rows, 4)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_panel_product_is_right_in_vectors_of_every_width(dtype):
    position, columns = 16, {}
    for width in (16, 32, 64):
        out, factor, weights = panel_operands(dtype)
        block = slice(position, position + 3 * width // out.itemsize)
        exact = out.astype(np.float64)
        exact[:, block] -= weights.T.astype(np.float64) @ factor[:, block].astype(np.float64)
        # sums of n terms, one rounding a product and a sum at most, and the last difference
        terms = abs(out) + abs(weights).T @ abs(factor)
        bound = 2 * (len(factor) + 1) * np.finfo(dtype).eps * terms
        before = out.copy()
        panel_product(width)(out, factor, position, weights, len(factor))
        assert (abs(out - exact) <= bound).all()
        assert not (out == before)[:, block].any()
        outside = np.delete(np.arange(out.shape[1]), np.r_[block])
        assert (out[:, outside] == before[:, outside]).all()
        columns[width] = out[:, block]
    # a number is summed in the same order whatever the width
    for width in (16, 32):
        assert (columns[width] == columns[64][:, : columns[width].shape[1]]).all()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="assembly of x86-64")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("processor", "features", "register"),
    [("haswell", "+sse2,+avx,+avx2,+fma,-avx512f", "ymm"), ("skylake-avx512", "+avx,+avx2,+fma,+avx512f", "zmm")],
)
def test_sums_of_the_panel_product_stay_in_the_registers_a_processor_has(processor, features, register, dtype):
    llvm = pytest.importorskip("llvmlite.binding")
    from cospadi.solvers import _kernels

    product = panel_product(_kernels.vector_bytes(features))
    out, factor, weights = panel_operands(dtype)
    product(out, factor, 0, weights, len(factor))
    module = llvm.parse_assembly(product.inspect_llvm(product.signatures[0]))
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=processor, opt=3)
    parts = re.split(r"^\S+:.*$", machine.emit_assembly(module), flags=re.MULTILINE)
    sums = [re.findall(r"^\s+vfmadd\d+p[sd]\s.*", part, flags=re.MULTILINE) for part in parts]
    loops = [(part, lines) for part, lines in zip(parts, sums, strict=True) if lines]
    assert loops
    for part, lines in loops:
        # four rows of three vectors, once or a few times unrolled: more are pieces of vectors wider than a register
        assert len(lines) % 12 == 0
        assert all(set(re.findall(r"%([xyz]mm)\d+", line)) == {register} for line in lines)
        assert not re.search(r"\(%r[sb]p", part), "sums go through the stack"
        assert not re.search(r"^\s+v?mov\S+\s+%[xyz]mm\d+, .*\(", part, flags=re.MULTILINE), "sums are stored"


def test_vectors_are_as_wide_as_the_registers_of_this_processor():
    pytest.importorskip("numba")
    from cospadi.solvers import _kernels

    try:
        with open("/proc/cpuinfo") as file:
            flags = set(re.search(r"^flags\s*:(.*)$", file.read(), flags=re.MULTILINE)[1].split())
    except (OSError, TypeError):
        pytest.skip("no flags of an x86-64 processor in /proc/cpuinfo")
    if {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"} & set(os.environ):
        pytest.skip("numba compiles for another processor")
    expected = 64 if "avx512f" in flags else 32 if "avx" in flags else 16
    assert expected == _kernels._VECTOR_BYTES


def test_code_for_another_processor_is_compiled_anew_and_right(tmp_path):
    """Nodes of a cluster share a home folder, and the cache in it."""
    code = """
import sys, numpy as np
from cospadi.solvers import _kernels
rng = np.random.default_rng(0)
factor, gram, rows = rng.standard_normal((30, 144)), rng.standard_normal((100, 100)), np.zeros((4, 144))
panel, order = np.array([31, 77, 40, 99], np.uint32), rng.permutation(100).astype(np.uint32)
_kernels._prepare(panel, 4, rows, factor, gram, order, 30, 100, np.zeros((30, 4)))
exact = gram[order[panel]][:, order[30:]] - factor[:, panel].T @ factor[:, 30:100]
error = abs(rows[:, 30:100] - exact).max()
print(_kernels._VECTOR_BYTES, len(_kernels._prepare.stats.cache_hits), error < 1e-12)
"""
    found = []
    for features in ("", "+avx", "+avx") if platform.machine() in ("x86_64", "AMD64") else ("", ""):
        env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "generic"}
        env["NUMBA_CPU_FEATURES"] = features
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        found.append(done.stdout.split())
    expected = [["16", "0", "True"], ["32", "0", "True"], ["32", "1", "True"]]
    assert found == (expected if len(found) == 3 else [["16", "0", "True"], ["16", "1", "True"]])


def test_masks_have_exactly_the_count_asked_for_even_with_ties():
    values = np.array([[1.0, -1, 1, 1, 0], [0, 0, 0, 0, 0], [5, 4, -4, 4, 3]], np.float32)
    expected = np.array([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]], bool)
    assert (top_mask(values, 2) == expected).all()
    assert (top_mask(torch.from_numpy(values), 2).numpy() == expected).all()
    assert top_mask(values, 5).all() and top_mask(values, 9).all()
    random = np.random.default_rng(0).standard_normal((40, 33)).astype(np.float32)
    kept = top_mask(random, 11)
    assert (kept.sum(axis=1) == 11).all()
    assert (np.where(kept, abs(random), np.inf).min(axis=1) >= np.where(kept, 0, abs(random)).max(axis=1)).all()


def test_arguments_are_checked():
    target, dictionary = problem()
    with pytest.raises(ValueError, match="algorithm must be one of omp, htp, threshold, got 'lasso'"):
        sparse_encode(target, dictionary, n_nonzero_coefs=3, algorithm="lasso")
    with pytest.raises(ValueError, match=r"dictionary must have shape \(29, 20\), got \(30, 20\)"):
        sparse_encode(target[1:], dictionary, n_nonzero_coefs=3)
    with pytest.raises(ValueError, match="between 1 and n_atoms = 20, got 21"):
        sparse_encode(target, dictionary, n_nonzero_coefs=21)
    with pytest.raises(ValueError, match="solver must be one of htp, ksvd, procrustes, got 'adam'"):
        dict_learning(target, n_components=4, n_nonzero_coefs=2, solver="adam")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tensors_on_the_cpu_take_the_compiled_path(algorithm, monkeypatch):
    """The same bytes as NumPy arrays give, as tensors of the same dtype; nothing is computed in torch."""
    target, dictionary = problem()
    tensors = torch.from_numpy(target).requires_grad_(), torch.from_numpy(dictionary)
    wanted = {"n_nonzero_coefs": 6, "algorithm": algorithm}
    expected = sparse_encode(target, dictionary, **wanted)
    learned = dict_learning(target, n_components=20, n_nonzero_coefs=6, max_iter=2)
    computed = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            computed.append(func)
            return func(*args, **(kwargs or {}))

    with Recorded():
        codes = sparse_encode(*tensors, **wanted)
        again = dict_learning(tensors[0], n_components=20, n_nonzero_coefs=6, max_iter=2)
    assert {str(func) for func in computed} <= {"aten.detach.default", "aten.lift_fresh.default"}
    assert codes.dtype == torch.float64 and torch.equal(codes, expected)
    assert torch.equal(again[0], learned[0]) and torch.equal(again[1], learned[1])
    half = sparse_encode(tensors[0].bfloat16(), tensors[1].bfloat16(), **wanted)
    assert half.dtype == torch.float32


def test_dict_learning_gives_torch_and_what_the_solver_gives():
    target, _ = problem()
    dictionary, codes, history = dict_learning(target, n_components=20, n_nonzero_coefs=6, solver="htp", max_iter=8)
    assert dictionary.shape == (30, 20) and codes.shape == (20, 50) and dictionary.dtype == torch.float64
    assert ((codes != 0).sum(0) == 6).all()
    error = torch.linalg.norm(torch.from_numpy(target) - dictionary @ codes) / np.linalg.norm(target)
    assert float(error) == pytest.approx(history[-1]["relative_error"], rel=1e-9)
    same, _, _ = dict_learning(torch.from_numpy(target).half(), n_components=20, n_nonzero_coefs=6, max_iter=1)
    assert same.dtype == torch.float32
    assert encode_rows(target.T.copy(), dictionary.numpy().T.copy(), 6).shape == (50, 20)
