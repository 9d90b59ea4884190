"""Codecs: exact round trips over ragged sizes, and byte counts that equal what is stored."""

import ml_dtypes
import numpy as np
import pytest
from cospadi.codecs import (
    CODEC_OF_BITS,
    VALUE_CODECS,
    decode_values,
    encode_values,
    pack_support,
    support_nbytes,
    unpack_support,
)
from hypothesis import given
from hypothesis import strategies as st

finite = st.floats(-(2.0**99), 2.0**99, width=32, allow_nan=False)


@pytest.mark.parametrize("codec", VALUE_CODECS)
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 7, 8, 9, 1001])
def test_stored_bytes_are_the_counted_bytes(codec, n):
    values = np.random.default_rng(n).normal(size=n).astype(np.float32)
    assert encode_values(values, codec).nbytes == VALUE_CODECS[codec].nbytes(n)


@given(st.lists(finite, max_size=40))
def test_bf16_rounds_as_ml_dtypes(values):
    values = np.array(values, np.float32)
    stored = encode_values(values, "bf16")
    np.testing.assert_array_equal(stored, values.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(decode_values(stored, "bf16", values.size), stored.astype(np.float32))


@pytest.mark.parametrize("codec", VALUE_CODECS)
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@given(values=st.lists(finite, max_size=40))
def test_a_stored_number_is_stored_again_without_loss(codec, rounding, values):
    values = np.array(values, np.float32)
    once = decode_values(encode_values(values, codec, rounding), codec, values.size)
    twice = decode_values(encode_values(once, codec, rounding), codec, values.size)
    np.testing.assert_array_equal(once, twice)


def test_bf14_truncation_drops_two_mantissa_bits_of_bfloat16():
    values = np.array([1.0, 1.0 + 2**-5, 1.0 + 2**-5 + 2**-6, -3.14159, 0.0], np.float32)
    decoded = decode_values(encode_values(values, "bf14", "truncate"), "bf14", 5)
    expected = (values.view(np.uint32) & np.uint32(0xFFFC0000)).view(np.float32)
    np.testing.assert_array_equal(decoded, expected)
    assert decoded[3] == -3.125


def test_bf14_nearest_halves_the_worst_error_of_truncation():
    values = np.linspace(1, 2, 4097, dtype=np.float32)[:-1]
    error = {
        rounding: np.abs(decode_values(encode_values(values, "bf14", rounding), "bf14", values.size) - values).max()
        for rounding in ("nearest", "truncate")
    }
    assert error["nearest"] == 2**-6  # half a step of 5 mantissa bits
    assert 2**-6 < error["truncate"] < 2**-5


def test_bf14_stream_layout():
    # word >> 2 of 1.0 is 0x0FE0, of -2.0 is 0x3000: value i at bits [14 i, 14 i + 14), little-endian
    stream = encode_values(np.array([1.0, -2.0], np.float32), "bf14")
    assert int.from_bytes(stream.tobytes(), "little") == 0x0FE0 | 0x3000 << 14


@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_support_round_trip(k, n, seed):
    mask = np.random.default_rng(seed).random((k, n)) < 0.5
    packed = pack_support(mask)
    assert packed.shape == (n, (k + 7) // 8)
    assert packed.nbytes == support_nbytes("bitmask", k, n)
    np.testing.assert_array_equal(unpack_support(packed, k), mask)


def test_support_bit_order():
    mask = np.zeros((10, 1), bool)
    mask[[1, 9]] = True
    np.testing.assert_array_equal(pack_support(mask), [[0b10, 0b10]])


def test_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="'floor'; allowed: nearest, truncate"):
        encode_values(np.ones(1, np.float32), "bf14", "floor")


def test_every_width_of_the_config_has_its_codec():
    assert {bits: VALUE_CODECS[codec].bits for bits, codec in CODEC_OF_BITS.items()} == {16: 16, 14: 14}
