"""Budget: the file keeps the promised ratio."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.budget import dense_nbytes, factors_nbytes, low_rank, sparse_shape
from cospadi.errors import ConfigError

SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 8192), (8192, 2048)]


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("value_codec", ["bf16", "bf14"])
def test_sparse_bytes_reach_the_ratio_from_below(d_in, d_out, ratio, value_codec):
    shape = sparse_shape(d_in, d_out, ratio=ratio, rho=2.0, value_codec=value_codec)
    nbytes = factors_nbytes(
        d_in, d_out, shape.n_atoms, shape.n_nonzero_coefs * d_out, support="bitmask", value_codec=value_codec
    )
    kept = nbytes / dense_nbytes(d_in, d_out)
    assert 1 - ratio - 0.004 < kept <= 1 - ratio


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_formula_of_the_true_bytes(d_in, d_out):
    expected = 0.8 * d_in * d_out / (d_in + d_out / 2 + d_out / 16)
    assert abs(sparse_shape(d_in, d_out, ratio=0.2, rho=2.0).n_atoms - expected) <= 2


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_paper_equation_11_holds_with_14_bits_at_rho_2(d_in, d_out):
    expected = 0.8 * d_in * d_out / (d_in + d_out / 2)
    assert abs(sparse_shape(d_in, d_out, ratio=0.2, rho=2.0, value_codec="bf14").n_atoms - expected) <= 2


@given(st.integers(8, 300), st.integers(8, 300), st.floats(0.05, 0.9), st.floats(1, 4))
def test_no_larger_shape_would_fit(d_in, d_out, ratio, rho):
    try:
        shape = sparse_shape(d_in, d_out, ratio=ratio, rho=rho)
    except ConfigError:
        return

    def nbytes(k, s):
        return factors_nbytes(d_in, d_out, k, s * d_out, support="bitmask", value_codec="bf16")

    allowed = (1 - ratio) * dense_nbytes(d_in, d_out)
    assert nbytes(shape.n_atoms, shape.n_nonzero_coefs) <= allowed
    assert 1 <= shape.n_nonzero_coefs <= shape.n_atoms
    more = shape.n_atoms + 1
    assert nbytes(more, max(1, int(more / rho))) > allowed
    assert shape.n_nonzero_coefs == shape.n_atoms or nbytes(shape.n_atoms, shape.n_nonzero_coefs + 1) > allowed


def test_low_rank_is_the_published_rank():
    assert low_rank(576, 1536, ratio=0.2) == int(0.8 * 576 * 1536 / (576 + 1536))


def test_impossible_ratio_says_so():
    with pytest.raises(ConfigError, match=r"ratio 0\.99 leaves 1 bytes of a 8x8 matrix: not one atom fits"):
        sparse_shape(8, 8, ratio=0.99, rho=2.0)
    with pytest.raises(ConfigError, match="not even rank 1 fits"):
        low_rank(8, 8, ratio=0.99)
