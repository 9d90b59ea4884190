"""Codecs: exact round trips over ragged sizes, and byte counts that equal what is stored."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.codecs import (
    CODEC_OF_BITS,
    INTEGER_CODECS,
    VALUE_CODECS,
    IntegerCodec,
    codec_bits,
    decode_grouped,
    decode_values,
    encode_grouped,
    encode_values,
    fill_pairs,
    find_scales,
    groups_of_atoms,
    groups_of_columns,
    pack_pairs,
    pack_support,
    stored_nbytes,
    support_nbytes,
    unpack_pairs,
    unpack_support,
)
from cospadi.factorization import Factorization, unpack
from cospadi.runtime.cospadi_format import CODECS

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
    assert {bits: codec_bits(codec) for bits, codec in CODEC_OF_BITS.items()} == {16: 16, 14: 14, 8: 8, 4: 4}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 1001])
def test_integers_of_every_width_round_trip_in_the_counted_bytes(bits, n):
    integer = IntegerCodec(bits)
    integers = np.random.default_rng(n).integers(integer.low, integer.high + 1, n).astype(np.int16)
    stored = integer.pack(integers)
    assert stored.nbytes == integer.nbytes(n)
    np.testing.assert_array_equal(integer.unpack(stored, n), integers)


def test_a_width_that_no_codec_has_is_refused():
    with pytest.raises(ValueError, match="integers of 9 bits; allowed: 2 to 8"):
        IntegerCodec(9)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [0, 1, 3, 1001])
def test_the_format_s_shapes_take_the_counted_bytes(codec, n):
    stored = CODECS[codec]
    size = {"BF16": 2, "U8": 1, "I8": 1}[stored.dtype]
    assert np.prod(stored.shape((n,))) * size == stored_nbytes(codec, n) and stored.bits == codec_bits(codec)
    assert stored.scaled == (codec in INTEGER_CODECS)


def test_int4_layout():
    np.testing.assert_array_equal(INTEGER_CODECS["int4"].pack(np.array([1, -8, 7])), [0x81, 0x07])


@given(st.lists(st.integers(0, 40), max_size=9), st.sampled_from([16, 17, None]))
def test_groups_are_the_stored_values_of_a_column_in_order(counts, group_size):
    expected, n_groups = [], 0
    for count in counts:
        size = group_size or max(count, 1)
        expected += [n_groups + i // size for i in range(count)]
        n_groups += -(-count // size)
    np.testing.assert_array_equal(groups_of_columns(np.array(counts, int), group_size), expected)


def test_groups_of_a_dictionary_run_down_its_atoms():
    np.testing.assert_array_equal(groups_of_atoms(3, 2, 2), [[0, 1], [0, 1], [2, 3]])
    np.testing.assert_array_equal(groups_of_atoms(3, 2, None), [[0, 1]] * 3)


@pytest.mark.parametrize(("codec", "step"), [("int8", 1 / 127), ("int4", 1 / 7)])
def test_scales_serve_their_group(codec, step):
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 20)
    values = (draw.standard_normal(600) * 10.0 ** draw.integers(-3, 3, 30)[groups]).astype(np.float32)
    values[groups == 7] = 0
    scales = find_scales(values, groups, codec)
    decoded = decode_grouped(encode_grouped(values, groups, scales, codec), groups, scales, codec)
    largest = np.maximum.reduceat(np.abs(values), np.arange(0, 600, 20))
    assert np.isfinite(scales.astype(np.float32)).all() and not decoded[groups == 7].any()
    plain = np.where(largest > 0, largest * step, 1).astype(ml_dtypes.bfloat16).astype(np.float32)[groups]
    error = np.bincount(groups, (decoded - values) ** 2)
    # never worse than the scale that takes the extreme to the largest integer
    limit = round(1 / step)
    rounded = np.clip(np.rint(values / plain), -limit, limit) * plain
    assert (error <= np.bincount(groups, (rounded - values) ** 2) * (1 + 1e-6)).all()
    again = encode_grouped(decoded, groups, scales, codec)
    np.testing.assert_array_equal(decode_grouped(again, groups, scales, codec), decoded)


@given(st.integers(1, 10), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_pairs_round_trip(quads, n, seed):
    order = np.random.default_rng(seed).random((4 * quads, n)).reshape(quads, 4, n).argsort(axis=1)
    mask = (order < 2).reshape(4 * quads, n)
    packed = pack_pairs(mask)
    assert packed.shape == (n, (4 * quads + 7) // 8) and packed.nbytes == support_nbytes("2:4", 4 * quads, n)
    np.testing.assert_array_equal(unpack_pairs(packed, 4 * quads), mask)
    fewer = mask & (np.random.default_rng(seed + 1).random(mask.shape) < 0.5)
    filled = fill_pairs(fewer)
    assert (filled >= fewer).all() and (filled.reshape(quads, 4, n).sum(1) == 2).all()


def test_pairs_layout_and_what_they_cannot_hold():
    mask = np.zeros((12, 1), bool)
    mask[[0, 3, 4, 5, 10, 11]] = True  # places 0 and 3, 0 and 1, 2 and 3
    np.testing.assert_array_equal(pack_pairs(mask), [[0b0100_1100, 0b1110]])
    mask[1] = True
    with pytest.raises(ValueError, match="not two of every four"):
        pack_pairs(mask)
    with pytest.raises(ValueError, match="a mask of 3 atoms"):
        pack_pairs(np.ones((3, 1), bool))


@pytest.mark.parametrize("support", ["bitmask", "2:4", "dense"])
@pytest.mark.parametrize("value_codec", ["bf16", "bf14", "int8", "int4"])
@pytest.mark.parametrize("dictionary_codec", ["bf16", "int8", "int4", None])
@pytest.mark.parametrize("group_size", [16, None])
def test_factors_pack_to_the_counted_bytes_and_back(support, value_codec, dictionary_codec, group_size):
    """Ragged: columns without a code and with all; every codec with every support."""
    draw = np.random.default_rng(0)
    d_in, k, d_out = (28, 28, 11) if dictionary_codec is None else (21, 36, 11)
    codes = draw.standard_normal((k, d_out)).astype(np.float32)
    if support == "bitmask":
        codes[draw.random(codes.shape) < 0.5] = 0
        codes[:, 3], codes[:, 4] = 0, 1
    elif support == "2:4":
        codes.reshape(-1, 4, d_out)[:, [1, 2]] = 0
        codes[:8, 3] = 0
    dictionary = None if dictionary_codec is None else draw.standard_normal((d_in, k)).astype(np.float32)
    factors = Factorization(
        dictionary,
        codes,
        support=support,
        value_codec=value_codec,
        dictionary_codec=dictionary_codec or "bf16",
        group_size=group_size,
    )
    tensors, spec = factors.pack("m")
    assert sum(tensor.nbytes for tensor in tensors.values()) == factors.nbytes
    stored = unpack(tensors, spec, "m")
    again, spec_again = stored.pack("m")
    assert spec_again == spec and stored.nbytes == factors.nbytes
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
    assert not stored.codes[codes == 0].any() or support == "dense"
    bits = {"bf16": 0.01, "bf14": 0.03, "int8": 0.02, "int4": 0.2}
    assert np.abs(stored.codes - codes).max() < bits[value_codec] * 4
    np.testing.assert_allclose(stored.reconstruct(), stored(np.eye(d_in, dtype=np.float32)), rtol=0, atol=1e-5)
