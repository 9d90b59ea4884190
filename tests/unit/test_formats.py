"""Codecs and supports: exact round trips over ragged sizes, and byte counts that equal what is stored."""

import importlib
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cospadi.formats.factorization import Factorization, unpack
from cospadi.formats.values import (
    CODEC_OF_BITS,
    DICTIONARY_BITS,
    blocks_of_atoms,
    blocks_of_columns,
    find_scales,
    restore,
    store,
)
from cospadi.runtime.cospadi_integers import Integers, Shifted
from cospadi.runtime.cospadi_registry import CODECS, FACTOR_CODECS, SUPPORTS

# entropy-coded and trellis-coded matrices: test_few_bits
NUMBERS = [name for name, codec in CODECS.items() if not codec.whole]
PLAIN = [name for name, codec in FACTOR_CODECS.items() if not codec.scaled and not codec.whole]
finite = st.floats(-(2.0**99), 2.0**99, width=32, allow_nan=False)


def encode(values, codec, rounding="nearest"):
    return store(values, codec, None, rounding=rounding)[0]


def decode(stored, codec, n):
    return restore(stored, codec, None, (n,))[0]


@pytest.mark.parametrize("codec", PLAIN)
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 7, 8, 9, 1001])
def test_stored_bytes_are_the_counted_bytes(codec, n):
    values = np.random.default_rng(n).normal(size=n).astype(np.float32)
    stored = encode(values, codec)
    assert stored.nbytes == FACTOR_CODECS[codec].nbytes(n) and stored.shape == FACTOR_CODECS[codec].shape((n,))


@given(st.lists(finite, max_size=40))
def test_bf16_rounds_as_ml_dtypes(values):
    values = np.array(values, np.float32)
    stored = encode(values, "bf16")
    np.testing.assert_array_equal(stored, values.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(decode(stored, "bf16", values.size), stored.astype(np.float32))


@pytest.mark.parametrize("codec", PLAIN)
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@given(values=st.lists(finite, max_size=40))
def test_a_stored_number_is_stored_again_without_loss(codec, rounding, values):
    values = np.array(values, np.float32)
    once = decode(encode(values, codec, rounding), codec, values.size)
    twice = decode(encode(once, codec, rounding), codec, values.size)
    np.testing.assert_array_equal(once, twice)


def test_bf14_truncation_drops_two_mantissa_bits_of_bfloat16():
    values = np.array([1.0, 1.0 + 2**-5, 1.0 + 2**-5 + 2**-6, -3.14159, 0.0], np.float32)
    decoded = decode(encode(values, "bf14", "truncate"), "bf14", 5)
    expected = (values.view(np.uint32) & np.uint32(0xFFFC0000)).view(np.float32)
    np.testing.assert_array_equal(decoded, expected)
    assert decoded[3] == -3.125


def test_bf14_nearest_halves_the_worst_error_of_truncation():
    values = np.linspace(1, 2, 4097, dtype=np.float32)[:-1]
    error = {
        rounding: np.abs(decode(encode(values, "bf14", rounding), "bf14", values.size) - values).max()
        for rounding in ("nearest", "truncate")
    }
    assert error["nearest"] == 2**-6  # half a step of 5 mantissa bits
    assert 2**-6 < error["truncate"] < 2**-5


def test_bf14_stream_layout():
    # word >> 2 of 1.0 is 0x0FE0, of -2.0 is 0x3000: value i at bits [14 i, 14 i + 14), little-endian
    stream = encode(np.array([1.0, -2.0], np.float32), "bf14")
    assert int.from_bytes(stream.tobytes(), "little") == 0x0FE0 | 0x3000 << 14


@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_support_round_trip(k, n, seed):
    mask = np.random.default_rng(seed).random((k, n)) < 0.5
    packed = SUPPORTS["bitmask"].pack(mask)
    assert packed.shape == (n, (k + 7) // 8)
    assert packed.nbytes == SUPPORTS["bitmask"].nbytes(k, n)
    np.testing.assert_array_equal(SUPPORTS["bitmask"].unpack(packed, k), mask)


def test_support_bit_order():
    mask = np.zeros((10, 1), bool)
    mask[[1, 9]] = True
    np.testing.assert_array_equal(SUPPORTS["bitmask"].pack(mask), [[0b10, 0b10]])


def test_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="'floor'; allowed: nearest, truncate"):
        encode(np.ones(1, np.float32), "bf14", "floor")


def test_every_width_of_the_config_has_its_codec():
    widths = {16: "bf16", 14: "bf14", **{bits: f"int{bits}" for bits in (8, 6, 4, 3, 2)}}
    assert widths == CODEC_OF_BITS and DICTIONARY_BITS == (16, 8, 6, 4, 3, 2)


def test_every_codec_and_support_has_a_line_in_the_description_of_the_format():
    page = (Path(__file__).parents[2] / "docs/format.md").read_text()
    described = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    assert not [name for name in (*CODECS, *SUPPORTS) if f"`{name}`" not in described]


def test_two_codecs_of_as_many_bits_are_refused(monkeypatch):
    monkeypatch.setitem(CODECS, "other4", CODECS["int4"])
    monkeypatch.delitem(sys.modules, "cospadi.formats.values")
    with pytest.raises(ValueError, match="bf16, bf14, int8, int6, int4, int3, int2, int4 two have as many bits"):
        importlib.import_module("cospadi.formats.values")


@pytest.mark.parametrize("kind", [Integers, Shifted])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 1001])
def test_integers_of_every_width_round_trip_in_the_counted_bytes(kind, bits, n):
    codec = kind(bits)
    integers = np.random.default_rng(n).integers(codec.low, codec.high + 1, n).astype(np.float32)
    stored = codec.pack(integers, "nearest")
    assert stored.nbytes == codec.nbytes(n)
    np.testing.assert_array_equal(codec.unpack(stored, n), integers)
    # what a loaded model does is the same, and a number beyond the end is the last
    decoded = codec.decode(torch.from_numpy(stored.copy()), (n,))
    np.testing.assert_array_equal(decoded.float().numpy(), integers)
    far = torch.from_numpy(np.append(integers, [1e9, -1e9]))
    again = codec.decode(codec.encode(far), (n + 2,)).float().numpy()
    np.testing.assert_array_equal(again, np.append(integers, [codec.high, codec.low]))


def test_a_width_that_no_codec_has_is_refused():
    for kind in (Integers, Shifted):
        with pytest.raises(ValueError, match="integers of 9 bits; allowed: 2 to 8"):
            kind(9)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (7, 11), (1001,)])
def test_learning_and_loading_agree_on_every_codec(name, shape):
    """NumPy and torch, each written for its side: one stored tensor, one set of numbers."""
    codec = CODECS[name]
    numbers = np.random.default_rng(1).normal(size=shape).astype(np.float32) * (20 if codec.scaled else 1)
    stored = codec.pack(numbers, "nearest")
    assert stored.shape == codec.shape(shape) and not list(codec.faults(stored, numbers.size))
    words = torch.from_numpy(stored.view(np.int16) if codec.dtype == "BF16" else stored.copy())
    tensor = words.view(torch.bfloat16) if codec.dtype == "BF16" else words
    assert torch.equal(codec.encode(torch.from_numpy(numbers)), tensor)
    unpacked = codec.unpack(stored, numbers.size).reshape(shape)
    np.testing.assert_array_equal(codec.decode(tensor, shape).float().numpy(), unpacked)
    held = np.clip(numbers, codec.low, codec.high) if codec.scaled else numbers
    bound = 0.5 if codec.scaled else np.abs(numbers).max(initial=0) * 2.0**-codec.significant_bits
    assert np.abs(unpacked - held).max(initial=0) <= bound


STORED_SUPPORTS = [name for name, support in SUPPORTS.items() if support.is_stored]


@pytest.mark.parametrize("name", STORED_SUPPORTS)
@pytest.mark.parametrize("k", [4, 8, 12, 36])
def test_learning_and_loading_agree_on_every_support(name, k):
    support, draw = SUPPORTS[name], np.random.default_rng(k)
    values = draw.normal(size=(k, 9)).astype(np.float32)
    mask = draw.random((k, 9)) < 0.5 if support.pattern is None else support.project(values.T).T
    mask = support.complete(mask)
    stored = support.pack(mask)
    assert stored.shape == support.shape(k, 9) and stored.nbytes == support.nbytes(k, 9)
    np.testing.assert_array_equal(support.unpack(stored, k), mask)
    np.testing.assert_array_equal(support.mask(torch.from_numpy(stored), k).numpy().T, mask)
    if support.pattern is not None:
        kept, among = support.pattern
        assert (mask.reshape(k // among, among, 9).sum(1) == kept).all()
        np.testing.assert_array_equal(support.project(torch.from_numpy(values.T.copy())).numpy().T, mask)
    np.testing.assert_array_equal(support.codes(support.values(values, mask), mask, k, 9), values * mask)


def test_int4_layout():
    np.testing.assert_array_equal(CODECS["int4"].pack(np.array([1.0, -8, 7]), "nearest"), [0x81, 0x07])


@given(st.lists(st.integers(0, 40), max_size=9), st.sampled_from([16, 17, None]))
def test_blocks_are_the_stored_values_of_a_column_in_order(counts, block_size):
    expected, n_groups = [], 0
    for count in counts:
        size = block_size or max(count, 1)
        expected += [n_groups + i // size for i in range(count)]
        n_groups += -(-count // size)
    np.testing.assert_array_equal(blocks_of_columns(np.array(counts, int), block_size), expected)


def test_blocks_of_a_dictionary_run_down_its_atoms():
    np.testing.assert_array_equal(blocks_of_atoms(3, 2, 2), [[0, 1], [0, 1], [2, 3]])
    np.testing.assert_array_equal(blocks_of_atoms(3, 2, None), [[0, 1]] * 3)


@pytest.mark.parametrize(("codec", "step"), [("int8", 1 / 127), ("int4", 1 / 7)])
def test_scales_serve_their_group(codec, step):
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 20)
    values = (draw.standard_normal(600) * 10.0 ** draw.integers(-3, 3, 30)[groups]).astype(np.float32)
    values[groups == 7] = 0
    scales = find_scales(values, groups, codec)
    assert scales.dtype == ml_dtypes.bfloat16

    def held(numbers):
        stored, same = store(numbers, codec, lambda: groups, scales=scales)
        return restore(stored, codec, lambda: groups, (600,), scales=same)[0]

    decoded = held(values)
    largest = np.maximum.reduceat(np.abs(values), np.arange(0, 600, 20))
    assert np.isfinite(scales.astype(np.float32)).all() and not decoded[groups == 7].any()
    plain = np.where(largest > 0, largest * step, 1).astype(ml_dtypes.bfloat16).astype(np.float32)[groups]
    error = np.bincount(groups, (decoded - values) ** 2)
    # never worse than the scale that takes the extreme to the largest integer
    limit = round(1 / step)
    rounded = np.clip(np.rint(values / plain), -limit, limit) * plain
    assert (error <= np.bincount(groups, (rounded - values) ** 2) * (1 + 1e-6)).all()
    np.testing.assert_array_equal(held(decoded), decoded)


@given(st.integers(1, 10), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_pairs_round_trip(quads, n, seed):
    order = np.random.default_rng(seed).random((4 * quads, n)).reshape(quads, 4, n).argsort(axis=1)
    mask = (order < 2).reshape(4 * quads, n)
    pairs = SUPPORTS["2:4"]
    packed = pairs.pack(mask)
    assert packed.shape == (n, (4 * quads + 7) // 8) and packed.nbytes == pairs.nbytes(4 * quads, n)
    np.testing.assert_array_equal(pairs.unpack(packed, 4 * quads), mask)
    fewer = mask & (np.random.default_rng(seed + 1).random(mask.shape) < 0.5)
    filled = pairs.complete(fewer)
    assert (filled >= fewer).all() and (filled.reshape(quads, 4, n).sum(1) == 2).all()


def test_pairs_layout_and_what_they_cannot_hold():
    mask = np.zeros((12, 1), bool)
    mask[[0, 3, 4, 5, 10, 11]] = True  # places 0 and 3, 0 and 1, 2 and 3
    np.testing.assert_array_equal(SUPPORTS["2:4"].pack(mask), [[0b0100_1100, 0b1110]])
    mask[1] = True
    with pytest.raises(ValueError, match="not two of every four"):
        SUPPORTS["2:4"].pack(mask)
    with pytest.raises(ValueError, match="a mask of 3 atoms"):
        SUPPORTS["2:4"].pack(np.ones((3, 1), bool))


@pytest.mark.parametrize("support", ["bitmask", "2:4", "dense"])
@pytest.mark.parametrize("value_codec", [name for name in NUMBERS if CODECS[name].in_codes])
@pytest.mark.parametrize("dictionary_codec", ["bf16", "int8", "int6", "int4", None])
@pytest.mark.parametrize("block_size", [16, None])
def test_factors_pack_to_the_counted_bytes_and_back(support, value_codec, dictionary_codec, block_size):
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
        block_size=block_size,
    )
    tensors, spec = factors.pack("m")
    assert sum(tensor.nbytes for tensor in tensors.values()) == factors.nbytes
    stored = unpack(tensors, spec, "m")
    again, spec_again = stored.pack("m")
    assert spec_again == spec and stored.nbytes == factors.nbytes
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
    assert not stored.codes[codes == 0].any() or support == "dense"
    errors = {"bf16": 0.01, "bf14": 0.03, "int8": 0.02, "int6": 0.06, "int4": 0.2, "int3": 0.35, "int2": 0.6}
    # of a zero point more, and the same number of steps between the extremes
    assert np.abs(stored.codes - codes).max() < errors[value_codec.removeprefix("u")] * 4
    np.testing.assert_allclose(stored.reconstruct(), stored(np.eye(d_in, dtype=np.float32)), rtol=0, atol=1e-5)
