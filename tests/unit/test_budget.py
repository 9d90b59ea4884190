"""Budget: the file keeps the promised ratio."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.budget import dense_nbytes, factors_nbytes, low_rank, nbytes_left, sparse_shape
from cospadi.errors import ConfigError

SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 8192), (8192, 2048)]


def left(d_in, d_out, ratio):
    return nbytes_left([(d_in, d_out)], ratio)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("value_codec", ["bf16", "bf14"])
def test_sparse_bytes_reach_the_ratio_from_below(d_in, d_out, ratio, value_codec):
    shape = sparse_shape(d_in, d_out, nbytes=left(d_in, d_out, ratio), rho=2.0, value_codec=value_codec)
    nbytes = factors_nbytes(
        d_in, d_out, shape.n_atoms, shape.n_nonzero_coefs * d_out, support="bitmask", value_codec=value_codec
    )
    kept = nbytes / dense_nbytes(d_in, d_out)
    assert 1 - ratio - 0.004 < kept <= 1 - ratio


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_formula_of_the_true_bytes(d_in, d_out):
    expected = 0.8 * d_in * d_out / (d_in + d_out / 2 + d_out / 16)
    assert abs(sparse_shape(d_in, d_out, nbytes=left(d_in, d_out, 0.2), rho=2.0).n_atoms - expected) <= 2


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_paper_equation_11_holds_with_14_bits_at_rho_2(d_in, d_out):
    expected = 0.8 * d_in * d_out / (d_in + d_out / 2)
    assert (
        abs(sparse_shape(d_in, d_out, nbytes=left(d_in, d_out, 0.2), rho=2.0, value_codec="bf14").n_atoms - expected)
        <= 2
    )


@given(st.integers(8, 300), st.integers(8, 300), st.floats(0.05, 0.9), st.floats(1, 4))
def test_no_larger_shape_would_fit(d_in, d_out, ratio, rho):
    try:
        shape = sparse_shape(d_in, d_out, nbytes=left(d_in, d_out, ratio), rho=rho)
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
    assert low_rank(576, 1536, nbytes=left(576, 1536, 0.2)) == int(0.8 * 576 * 1536 / (576 + 1536))


def test_too_few_bytes_say_so():
    with pytest.raises(ConfigError, match=r"1 bytes for a 8x8 matrix: not one atom fits"):
        sparse_shape(8, 8, nbytes=1, rho=2.0)
    with pytest.raises(ConfigError, match="31 bytes for a 8x8 matrix: not even rank 1 fits"):
        low_rank(8, 8, nbytes=31)
    assert low_rank(8, 8, nbytes=32) == 1


def test_bytes_left_are_whole_and_never_more_than_the_ratio_leaves():
    assert nbytes_left([(8, 8)], 0.99) == 1
    assert nbytes_left([(10, 5), (10, 45)], 0.2) == 800
    assert nbytes_left([(25, 20)], 0.9) == 99  # 1 - 0.9 is less than 0.1 in binary


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 8000), st.sampled_from(["bf16", "bf14", "int8", "int4"]))
def test_no_larger_rank_would_fit(d_in, d_out, nbytes, codec):
    def taken(rank):
        storage = {"value_codec": codec, "dictionary_codec": codec if codec != "bf14" else "bf16", "block_size": 16}
        return factors_nbytes(d_in, d_out, rank, rank * d_out, support="dense", **storage), storage

    try:
        rank = low_rank(d_in, d_out, nbytes=nbytes, **taken(1)[1])
    except ConfigError:
        assert taken(1)[0] > nbytes
        return
    assert taken(rank)[0] <= nbytes
    assert rank == min(d_in, d_out) or taken(rank + 1)[0] > nbytes
