"""Rounding in the metric of the data: against nearest rounding and against every choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cospadi import factorize
from cospadi.errors import ConfigError
from cospadi.formats.factorization import Factorization, unpack
from cospadi.formats.values import store
from cospadi.gram import relative_error
from cospadi.rounding import round_codes, round_dictionary, round_together


def problem(d_in=24, k=16, d_out=13, seed=0):
    """Dictionary, least-squares codes on half of the atoms, weight and Gram, of strongly correlated inputs."""
    draw = np.random.default_rng(seed)
    inputs = draw.standard_normal((200, d_in)) @ draw.standard_normal((d_in, d_in))
    gram = inputs.T @ inputs
    dictionary = draw.standard_normal((d_in, k)).astype(np.float32)
    codes = draw.standard_normal((k, d_out)).astype(np.float32)
    codes[draw.random((k, d_out)) < 0.5] = 0
    weight = (dictionary @ codes + 0.1 * draw.standard_normal((d_in, d_out))).astype(np.float32)
    moments = dictionary.T @ gram @ dictionary
    for j in range(d_out):
        here = codes[:, j] != 0
        codes[here, j] = np.linalg.solve(moments[np.ix_(here, here)], (dictionary.T @ gram @ weight)[here, j])
    return dictionary, codes, weight, gram


def factors(dictionary, codes, codec, block_size, **form):
    return Factorization(dictionary, codes, value_codec=codec, block_size=block_size, mask=codes != 0, **form)


@pytest.mark.parametrize(
    ("codec", "gain"), [("bf16", 1.0), ("bf14", 0.99), ("int8", 1.0), ("int4", 0.8), ("int2", 0.8)]
)
@pytest.mark.parametrize("dictionary_codec", ["bf16", "int4", None])
def test_optimal_rounding_costs_less_than_nearest(codec, gain, dictionary_codec):
    dictionary, codes, weight, gram = problem(k=24, d_out=40)
    if dictionary_codec is None:
        dictionary, codes, weight = None, codes, codes + 0.1 * np.random.default_rng(1).standard_normal(codes.shape)
    chosen = factors(dictionary, codes, codec, 16, dictionary_codec=dictionary_codec or "bf16")
    (found,) = round_together([weight], [gram], [chosen], [np.ones(40, np.float32)])
    held = found.quantized()
    assert not held.codes[codes == 0].any() and found.nbytes == chosen.nbytes
    # on the grid already: packing changes nothing
    np.testing.assert_array_equal(held.codes, found.codes)
    np.testing.assert_array_equal(held.reconstruct(), found.reconstruct())
    nearest = relative_error(weight, chosen.quantized().reconstruct(), gram)
    gain = min(gain, 0.8) if dictionary_codec == "int4" else gain
    assert relative_error(weight, held.reconstruct(), gram) <= gain * nearest * (1 + 1e-9)


def test_no_single_code_can_be_moved_to_a_better_value():
    """Neither of a dictionary's codes nor of the single weights beside it."""
    dictionary, codes, weight, gram = problem()
    entries = (
        np.random.default_rng(2).standard_normal(weight.shape).astype(np.float32) * (np.arange(24) % 5 == 0)[:, None]
    )
    parts = [factors(None, entries, "int4", None), factors(dictionary, codes, "int4", None)]
    rounded = round_codes(parts, weight, gram)
    both = np.concatenate([np.eye(24, dtype=np.float32), dictionary], axis=1)
    column_of = np.concatenate([part.codes for part in rounded])
    moments, target = both.T @ gram @ both, both.T @ gram @ weight

    def error(column, j):
        return column @ moments @ column - 2 * column @ target[:, j]

    for part, start, end in zip(rounded, (0, 24), (24, 40), strict=True):
        filled = np.flatnonzero(part.mask.any(0))
        for scale, j in zip(part.scales.astype(np.float32), filled, strict=True):
            least = error(column_of[:, j], j)
            for i in np.flatnonzero(part.mask[:, j]) + start:
                assert start <= i < end
                for integer in range(-8, 8):
                    moved = column_of[:, j].copy()
                    moved[i] = integer * scale
                    assert error(moved, j) >= least - 1e-4 * abs(least)


def test_two_codes_find_the_best_pair():
    dictionary, _, weight, gram = problem(k=2, d_out=6)
    codes = np.linalg.lstsq(dictionary.T @ gram @ dictionary, dictionary.T @ gram @ weight, rcond=None)[0].astype("f")
    (rounded,) = round_codes([factors(dictionary, codes, "int4", None)], weight, gram)
    for j, scale in enumerate(rounded.scales.astype(np.float32)):
        pairs = [np.array(pair, np.float32) * scale for pair in itertools.product(range(-8, 8), repeat=2)]
        errors = [relative_error(weight[:, [j]], dictionary @ pair[:, None], gram) for pair in pairs]
        found = relative_error(weight[:, [j]], dictionary @ rounded.codes[:, [j]], gram)
        assert found <= 1.02 * min(errors)


@pytest.mark.parametrize("codec", ["bf16", "bf14"])
def test_rounded_codes_are_numbers_of_the_codec(codec):
    dictionary, codes, weight, gram = problem()
    (rounded,) = round_codes([factors(dictionary, codes, codec, 64)], weight, gram)
    assert rounded.scales is None
    words = store(rounded.codes, "bf16", None)[0].astype(np.float32)
    np.testing.assert_array_equal(words, rounded.codes)
    if codec == "bf14":
        assert not (rounded.codes.view(np.uint32) & 0x0003FFFF).any()


@pytest.mark.parametrize("codec", ["int8", "int4", "int3"])
def test_a_dictionary_whose_numbers_cannot_help_each_other_is_rounded_to_nearest(codec):
    draw = np.random.default_rng(0)
    dictionary = draw.standard_normal((40, 9)).astype(np.float32)
    usage, gram = np.diag(draw.random(9)), np.diag(draw.random(40))
    rounded, scales = round_dictionary(dictionary, usage, gram, codec=codec, block_size=16)
    nearest = Factorization(dictionary, np.eye(9, dtype="f"), dictionary_codec=codec, block_size=16).quantized()
    np.testing.assert_array_equal(rounded, nearest.dictionary)
    np.testing.assert_array_equal(scales, nearest.dictionary_scales.ravel())


def test_rows_make_up_for_rows_and_atoms_for_atoms():
    """Where either alone is correlated, and by the product of both where both are."""
    draw = np.random.default_rng(0)
    dictionary = draw.standard_normal((64, 32)).astype(np.float32)

    def correlated(n):
        x = draw.standard_normal((4 * n, n)) @ draw.standard_normal((n, n))
        return x.T @ x

    nearest = Factorization(dictionary, np.eye(32, dtype="f"), dictionary_codec="int4", block_size=16).quantized()
    gains = []
    for gram, usage in ((correlated(64), np.eye(32)), (np.eye(64), correlated(32)), (correlated(64), correlated(32))):
        rounded, _ = round_dictionary(dictionary, usage, gram, codec="int4", block_size=16)
        off, before = rounded - dictionary, nearest.dictionary - dictionary
        gains.append(np.vdot(gram @ off, off @ usage) / np.vdot(gram @ before, before @ usage))
    assert max(gains[:2]) < 0.7 and gains[2] < 1.2 * gains[0] * gains[1]


def test_an_unknown_codec_is_refused():
    dictionary, codes, weight, gram = problem()
    with pytest.raises(
        ValueError, match=r"codec 'float32' has no rounding to decide; known: bf16, .*int6, int4, int3, int2$"
    ):
        round_codes([factors(dictionary, codes, "float32", 64)], weight, gram)


# --- through the one-matrix interface ---------------------------------------------------------------------------------

METHODS_OF_FACTORS = {
    "cospadi": {"max_iter": 5},
    "hybrid": {"atoms": 4, "max_iter": 1},
    "sparse": {},
    "alps": {},
    "sparsegpt": {},
    "wanda": {},
    "svd_llm": {},
}


@pytest.mark.parametrize("method", METHODS_OF_FACTORS)
@pytest.mark.parametrize(("bits", "gain"), [(8, 1.0), (4, 0.85), (3, None)])
def test_every_factor_can_have_few_bits(method, bits, gain):
    """The bytes are those asked for, the support follows from them, and rounding costs less than to nearest."""
    draw = np.random.default_rng(3)
    x = draw.standard_normal((300, 64)) @ draw.standard_normal((64, 64))
    weight, gram = draw.standard_normal((64, 96)).astype(np.float32), x.T @ x
    given = {"method": method, "bits": 0.75 * bits, "block_size": 16, **METHODS_OF_FACTORS[method]}
    if method in ("cospadi", "svd_llm"):
        given["dictionary_bits"] = bits
    found = factorize(weight, gram, value_bits=bits, rounding="optimal", **given)
    tensors, spec = found.pack("m")
    taken = sum(tensor.nbytes for tensor in tensors.values())
    assert taken == found.nbytes and 0.65 * bits < 8 * taken / weight.size <= 0.75 * bits
    wide = factorize(weight, gram, value_bits=16, **{**given, "dictionary_bits": 16})
    assert sum(part.n_nonzero for part in found.parts) > 1.2 * sum(part.n_nonzero for part in wide.parts)
    np.testing.assert_array_equal(unpack(tensors, spec, "m").reconstruct(), found.reconstruct())
    if bits > 3:
        learned = factorize(weight, gram, value_bits=bits, **given)
        exact, nearest, optimal = (
            one.relative_error(weight, gram) ** 2 for one in (learned, learned.quantized(), found)
        )
        assert optimal - exact < gain * (nearest - exact)
    else:
        with pytest.raises(ConfigError, match="value_bits: 3 are too few for numbers that are rounded one by one"):
            factorize(weight, gram, value_bits=bits, **given)


@pytest.mark.parametrize("method", ["hybrid", "sparse", "gptq"])
def test_factors_of_a_tensor_are_tensors(method):
    weight, gram = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), torch.eye(48)
    found = factorize(weight, gram, method=method, ratio=0.5, value_bits=8, rounding="optimal")
    assert found.reconstruct().shape == weight.shape and isinstance(found.reconstruct(), torch.Tensor)
