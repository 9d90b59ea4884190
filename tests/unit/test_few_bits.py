"""Methods that keep every weight in a few bits, through the one-matrix interface and the config."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi import factorize
from cospadi.config import check_config
from cospadi.errors import ConfigError
from cospadi.formats.factorization import Factorization, unpack
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.solvers.gptq import quantize

# As many tokens as several inputs are correlated in, and a few inputs that carry most of the energy
D_IN, D_OUT = 64, 48


def inputs(d_in: int = D_IN, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8 * d_in, d_in)) @ rng.normal(size=(d_in, d_in)) * np.exp(0.5 * rng.normal(size=d_in))
    return x.T @ x


def weight(d_in: int = D_IN, d_out: int = D_OUT, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, size=(d_in, d_out)).astype(np.float32)


def bits_of(codec: str, group: int | None, d_in: int = D_IN) -> float:
    """Bits a weight that a grid takes."""
    blocks = -(-d_in // (group or d_in))
    return CODECS[codec].bits + blocks / d_in * (16 + CODECS[codec].bits * codec.startswith("u"))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("group", [None, 64, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_as_many_bits_as_fit_are_stored_in_as_many_bytes(method, group, symmetric):
    w, gram = weight(), inputs()
    errors = []
    for bits in (2, 3, 4, 6, 8):
        codec = f"{'' if symmetric else 'u'}int{bits}"
        asked = bits_of(codec, group)
        found = factorize(w, gram, method=method, bits=asked, block_size=group, symmetric=symmetric)
        assert (found.value_codec, 8 * found.nbytes / w.size) == (codec, asked)
        tensors, spec = found.pack("m")
        assert sum(tensor.nbytes for tensor in tensors.values()) == found.nbytes
        # what was decided is what the file holds, and stays it
        stored = unpack(tensors, spec, "m")
        np.testing.assert_array_equal(stored.codes, found.codes)
        again, _ = stored.pack("m")
        assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
        # a little less is one grid down, and more bits than value_bits are never taken
        if bits > 2:
            less = factorize(w, gram, method=method, bits=asked - 0.01, block_size=group, symmetric=symmetric)
            assert CODECS[less.value_codec].bits < bits
        if bits > 3:
            capped = factorize(w, gram, method=method, bits=15, value_bits=bits, block_size=group, symmetric=symmetric)
            assert CODECS[capped.value_codec].bits == bits
        errors.append(found.relative_error(w, gram))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01  # steps of 8 bits
    with pytest.raises(ConfigError, match="2 bits a weight and their scales take"):
        factorize(w, gram, method=method, bits=1.9, block_size=group, symmetric=symmetric)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from(["int2", "int3", "int8", "uint2", "uint4"]),
    st.sampled_from([None, 16, 17, 64]),
    st.booleans(),
)
def test_gptq_where_inputs_do_not_depend_on_each_other_is_rounding(seed, d_in, d_out, codec, group, act_order):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(d_in, d_out)).astype(np.float32)
    gram = np.diag(np.exp(rng.normal(size=d_in)))
    rounded, scales = quantize(w, gram, codec=codec, block_size=group, act_order=act_order)
    nearest = Factorization(None, w, support="dense", value_codec=codec, block_size=group).quantized()
    np.testing.assert_array_equal(rounded, nearest.codes)
    np.testing.assert_array_equal(scales, np.asarray(nearest.scales, np.float32))


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_with_fine_steps_is_exact(act_order):
    """A weight on the grid of its codec stays as it is, whatever the inputs; one beside it within a step of 8 bits."""
    w, gram = weight(), inputs()
    on_grid = factorize(w, method="rtn", bits=bits_of("int8", None), block_size=None).codes
    found = factorize(on_grid, gram, method="gptq", bits=9, block_size=None, act_order=act_order)
    np.testing.assert_allclose(found.codes, on_grid, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding_where_inputs_depend_on_each_other(symmetric, act_order):
    worst = 0.0
    for seed, codec in ((seed, codec) for seed in range(3) for codec in ("int2", "int3", "int4", "int8")):
        w, gram = weight(seed=seed), inputs(seed=seed)
        options = {"bits": bits_of(codec if symmetric else f"u{codec}", 16), "block_size": 16, "symmetric": symmetric}
        rounding = factorize(w, gram, method="rtn", **options).relative_error(w, gram)
        made_up = factorize(w, gram, method="gptq", act_order=act_order, **options).relative_error(w, gram)
        worst = max(worst, made_up / rounding)
    assert worst < 0.9


def test_zero_points_serve_blocks_that_lie_on_one_side():
    w, gram = np.abs(weight()) + 1, inputs()
    for method in ("rtn", "gptq"):
        symmetric = factorize(w, gram, method=method, bits=4.3, block_size=None, value_bits=4)
        shifted = factorize(w, gram, method=method, bits=4.4, block_size=None, value_bits=4, symmetric=False)
        # half of the symmetric integers have nothing to stand for
        assert shifted.relative_error(w, gram) < 0.7 * symmetric.relative_error(w, gram)


def test_an_input_that_is_never_active_costs_nothing():
    w, gram = weight(), inputs()
    gram[5], gram[:, 5] = 0, 0
    found = factorize(w, gram, method="gptq", bits=4.5, block_size=16)
    assert np.isfinite(found.codes).all() and not found.codes[5].any()
    assert found.relative_error(w, gram) < factorize(w, gram, method="rtn", bits=4.5).relative_error(w, gram)


def test_torch_gives_what_numpy_gives():
    torch = pytest.importorskip("torch")
    w, gram = weight(), inputs()
    for group in (None, 16):
        options = {"codec": "uint4", "block_size": group, "act_order": group is None}
        here, scales = quantize(w, gram, **options)
        there, same = quantize(torch.from_numpy(w), torch.from_numpy(gram), **options)
        # where sums round differently a weight may fall on the other side of a step
        assert (np.abs(there.numpy() - here) > 1e-6).mean() < 0.01
        np.testing.assert_allclose(same[0], scales[0], rtol=0.05)


@pytest.fixture
def minimal() -> dict:
    model = {"name": "m", "source": "hub", "repo": "owner/m"}
    return {"run": "r", "model": model, "calibration": {"source": "self"}, "evaluation": {"perplexity": None}}


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"bits": 3.25, "ratio": 0.5}, "variants.a.bits: stands beside ratio, which says the same; leave one out"),
        ({"bits": "3"}, "variants.a.bits: '3' is not allowed; expected a number or null (remove the quotes)"),
        ({"bits": 16}, "variants.a.bits: 16 is not allowed; from 0.8 to 15.84"),
        ({}, "variants.a.ratio: missing"),
    ],
)
def test_bits_stand_for_a_ratio_or_are_refused(minimal, given, fault):
    minimal["variants"] = {"a": {"method": "gptq", **given}}
    with pytest.raises(ConfigError) as error:
        check_config(minimal)
    assert error.value.faults == [fault]


def test_bits_are_a_ratio_in_every_method_step_and_sweep(minimal):
    minimal["variants"] = {
        "a": {"method": "gptq", "bits": 3.25},
        "b": {"method": "cospadi", "sweep": {"bits": [4, 8.0]}},
        "c": {"steps": [{"method": "shortgpt", "blocks": 1}, {"method": "rtn", "bits": 8}]},
    }
    variants = check_config(minimal)["variants"]
    assert [variants[name]["ratio"] for name in ("a", "b-4", "b-8.0")] == [1 - 3.25 / 16, 0.75, 0.5]
    assert variants["c"]["steps"][1]["ratio"] == 0.5
    assert "bits" not in variants["a"]
    # a complete config is one again
    assert check_config({**minimal, "variants": variants})["variants"] == variants
