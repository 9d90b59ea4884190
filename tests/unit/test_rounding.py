"""Rounding in the metric of the data: against nearest rounding and against every choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cospadi.formats.factorization import Factorization
from cospadi.formats.values import store
from cospadi.gram import relative_error
from cospadi.problem import Metric
from cospadi.quantization import round_factors
from cospadi.rounding import round_codes


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


@pytest.mark.parametrize(("value_bits", "gain"), [(16, 1.0), (14, 0.99), (8, 1.0), (4, 0.95)])
@pytest.mark.parametrize("dictionary_bits", [16, 4, None])
def test_optimal_rounding_costs_less_than_nearest(value_bits, gain, dictionary_bits):
    dictionary, codes, weight, gram = problem(k=24)
    if dictionary_bits is None:
        dictionary, codes, weight = None, codes, codes + 0.1 * np.random.default_rng(1).standard_normal(codes.shape)
    wanted = {"value_bits": value_bits, "dictionary_bits": dictionary_bits or 16, "block_size": 16}
    error = {}
    for rounding in ("nearest", "optimal"):
        factors = round_factors(
            Factorization(dictionary, codes), {**wanted, "rounding": rounding}, weight, Metric.of(gram)
        )
        held = factors.quantized()
        error[rounding] = relative_error(weight, held.reconstruct(), gram)
        assert not held.codes[codes == 0].any()
    np.testing.assert_array_equal(held.codes, factors.codes)  # on the grid already: packing changes nothing
    assert error["optimal"] <= gain * error["nearest"] * (1 + 1e-9)


def test_no_single_code_can_be_moved_to_a_better_value():
    dictionary, codes, weight, gram = problem()
    mask = codes != 0
    rounded, scales = round_codes(codes, mask, dictionary, weight, gram, codec="int4", block_size=None)
    moments, target = dictionary.T @ gram @ dictionary, dictionary.T @ gram @ weight

    def error(column, j):
        return column @ moments @ column - 2 * column @ target[:, j]

    groups = np.flatnonzero(mask.any(0))
    for scale, j in zip(scales.astype(np.float32), groups, strict=True):
        least = error(rounded[:, j], j)
        for i in np.flatnonzero(mask[:, j]):
            for integer in range(-8, 8):
                moved = rounded[:, j].copy()
                moved[i] = integer * scale
                assert error(moved, j) >= least - 1e-4 * abs(least)


def test_two_codes_find_the_best_pair():
    dictionary, _, weight, gram = problem(k=2, d_out=6)
    codes = np.linalg.lstsq(dictionary.T @ gram @ dictionary, dictionary.T @ gram @ weight, rcond=None)[0].astype("f")
    rounded, scales = round_codes(codes, codes != 0, dictionary, weight, gram, codec="int4", block_size=None)
    for j, scale in enumerate(scales.astype(np.float32)):
        pairs = [np.array(pair, np.float32) * scale for pair in itertools.product(range(-8, 8), repeat=2)]
        errors = [relative_error(weight[:, [j]], dictionary @ pair[:, None], gram) for pair in pairs]
        found = relative_error(weight[:, [j]], dictionary @ rounded[:, [j]], gram)
        assert found <= 1.02 * min(errors)


@pytest.mark.parametrize("codec", ["bf16", "bf14"])
def test_rounded_codes_are_numbers_of_the_codec(codec):
    dictionary, codes, weight, gram = problem()
    rounded, scales = round_codes(codes, codes != 0, dictionary, weight, gram, codec=codec, block_size=64)
    assert scales is None
    words = store(rounded, "bf16", None)[0].astype(np.float32)
    np.testing.assert_array_equal(words, rounded)
    if codec == "bf14":
        assert not (rounded.view(np.uint32) & 0x0003FFFF).any()


def test_an_unknown_codec_is_refused():
    dictionary, codes, weight, gram = problem()
    with pytest.raises(
        ValueError, match=r"codec 'float32' has no rounding to decide; known: bf16, .*int6, int4, int3, int2$"
    ):
        round_codes(codes, codes != 0, dictionary, weight, gram, codec="float32", block_size=64)
