"""Methods that keep every weight in a few bits, through the one-matrix interface and the config."""

from __future__ import annotations

import functools
import itertools
import math
import types
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cospadi import factorize
from cospadi.config import check_config
from cospadi.errors import ConfigError
from cospadi.files import BFLOAT16
from cospadi.formats.factorization import Factorization, unpack
from cospadi.methods import METHODS
from cospadi.runtime import cospadi_compiler, cospadi_entropy_parts
from cospadi.runtime.cospadi_entropy import CODES, MOST, Code, DamagedStreamError, steps_near
from cospadi.runtime.cospadi_entropy_parts import parsed
from cospadi.runtime.cospadi_integers import Integers
from cospadi.runtime.cospadi_registry import CODECS, FACTOR_CODECS
from cospadi.runtime.cospadi_trellis import VALUES
from cospadi.solvers import entropy, float8, trellis
from cospadi.solvers._compiled import compiled
from cospadi.solvers.entropy import SOURCE, Rows, path_with_numpy, round_with_numpy
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


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_of_a_codec_more_those_learn_anew_that_may_choose_it(monkeypatch, method):
    other = Integers(5)
    monkeypatch.setattr(Integers, "__module__", "cospadi.runtime.cospadi_other")
    for codecs in (CODECS, FACTOR_CODECS):
        monkeypatch.setitem(codecs, other.name, other)
    assert factorize(weight(), inputs(), method=method, bits=bits_of("int5", 64)).value_codec == "int5"
    for symmetric in (True, False):
        modules = METHODS[method].modules({**METHODS[method].defaults(), "symmetric": symmetric})
        assert ("cospadi.runtime.cospadi_other" in modules) == symmetric


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


# --- entropy-coded ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["auto", "torch"])
def coder(request) -> Iterator[str]:
    """The compiled coder, and the reference in NumPy."""
    before = cospadi_compiler.chosen()
    cospadi_compiler.choose(request.param)
    yield request.param
    cospadi_compiler.choose(before)


STREAMS = ["ec", "ectcq", "ectcq256"]
STATES = [1, 8, 256]


def path(wanted: np.ndarray, code: Code | None) -> np.ndarray:
    """Whole numbers near those wanted, of those that follow a code."""
    if code is None:
        return np.rint(wanted).astype(int)
    numbers, state = np.zeros(wanted.shape, int), np.zeros(len(wanted), int)
    for j in range(wanted.shape[1]):
        half = np.rint((wanted[:, j] - (state & 1)) / 2).astype(int)
        numbers[:, j], state = 2 * half + (state & 1), code.follow(state, half)
    return numbers


def random_codes(seed: int, k: int, d_out: int, size: float, codec: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes that a codec can store, of rows and columns of many sizes, and their steps."""
    rng = np.random.default_rng(seed)
    steps = steps_near(np.exp(2 * rng.normal(size=k)))
    wanted = rng.standard_t(3, size=(k, d_out)) * np.exp(rng.normal(size=d_out) + rng.normal(size=(k, 1))) * size
    wanted = np.clip(wanted * (rng.random((k, 1)) < 0.9) * 100.0 ** (rng.random((k, 1)) < 0.1), -5e5, 5e5)
    numbers = path(wanted, CODECS[codec].code)
    return (numbers * steps[:, None]).astype(np.float32), steps


@pytest.mark.parametrize("codec", STREAMS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 40),
    d_out=st.integers(1, 40),
    size=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
)
def test_streams_round_trip_and_both_coders_agree(codec, seed, k, d_out, size):
    codes, steps = random_codes(seed, k, d_out, size, codec)
    stored = {}
    for choice, laid_out in (("auto", np.asfortranarray(codes)), ("torch", codes)):
        cospadi_compiler.choose(choice)
        stored[choice] = CODECS[codec].pack_codes(laid_out, steps)
        np.testing.assert_array_equal(CODECS[codec].unpack(stored[choice], 0).reshape(d_out, k).T, codes)
    cospadi_compiler.choose("auto")
    assert stored["auto"].tobytes() == stored["torch"].tobytes()
    np.testing.assert_array_equal(CODECS[codec].steps(stored["auto"]), steps)
    assert not list(CODECS[codec].faults_of(stored["auto"], (k, d_out)))
    assert list(CODECS[codec].faults_of(stored["auto"], (k + 1, d_out)))
    # what a loaded model and the reader of the format see
    decoded = CODECS[codec].decode(torch.from_numpy(stored["auto"].copy()), (d_out, k))
    np.testing.assert_array_equal(decoded.numpy().T, codes)
    found = {}
    for choice in ("auto", "torch"):
        cospadi_compiler.choose(choice)
        found[choice] = [part.numpy() for part in CODECS[codec].numbers(torch.from_numpy(stored["auto"].copy()))]
    cospadi_compiler.choose("auto")
    assert all(np.array_equal(*parts) for parts in zip(*found.values(), strict=True))
    check_digits(*found["auto"], np.rint(codes / steps[:, None]).astype(int), steps)


def check_digits(digits, rows, all_steps, whole, steps):
    """Against the whole numbers (k, d_out): rows of digits, which of them are there again, and their steps."""
    k = len(whole)
    np.testing.assert_array_equal(digits.T[:k], whole.astype(np.int8))
    np.testing.assert_array_equal(np.unique(rows), np.flatnonzero((whole != whole.astype(np.int8)).any(1)))
    every = [*range(k), *rows]
    assert max(map(every.count, every)) <= 3
    found = np.zeros(whole.shape, int)
    np.add.at(found, every, digits.T.astype(int) * np.rint(all_steps / steps[every]).astype(int)[:, None])
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("codec", STREAMS)
def test_large_matrices_have_several_streams(codec, coder):
    # the compiled coder decodes four and three at a time, of which the last has fewer rows
    k, n_streams = (60, 3) if coder == "torch" else (156, 7)
    codes, steps = random_codes(0, k, 3000, 1.0, codec)
    stored = CODECS[codec].pack_codes(codes, steps)
    np.testing.assert_array_equal(CODECS[codec].unpack(stored, 0).reshape(3000, k).T, codes)
    edges = parsed(stored).edges
    assert len(edges) - 1 == n_streams
    if coder == "torch":
        return
    found = [part.numpy() for part in CODECS[codec].numbers(torch.from_numpy(stored.copy()))]
    assert len(found[1]) > 16
    check_digits(*found, np.rint(codes / steps[:, None]).astype(int), steps)
    for begin in edges[:-1]:
        damaged = stored.copy()
        damaged[begin + 3] ^= 0x80  # of a state
        with pytest.raises(DamagedStreamError):
            CODECS[codec].unpack(damaged, 0)


@pytest.fixture
def plain(monkeypatch):
    """Steps, scales and tables are written as they are, not deflated: files may have them so, too."""
    monkeypatch.setattr(cospadi_entropy_parts, "_deflated", lambda beside: beside)


@pytest.mark.parametrize("codec", STREAMS)
def test_steps_scales_and_tables_are_deflated_where_that_is_less(codec, coder, monkeypatch):
    for k, d_out, is_less in ((1, 1, False), (96, 400, True)):
        codes, steps = random_codes(1, k, d_out, 1.0, codec)
        deflated = CODECS[codec].pack_codes(codes, steps)
        with monkeypatch.context() as patch:
            patch.setattr(cospadi_entropy_parts, "_deflated", lambda beside: beside)
            plain = CODECS[codec].pack_codes(codes, steps)
        assert (len(deflated) < len(plain)) == is_less
        for stored in (deflated, plain):
            np.testing.assert_array_equal(CODECS[codec].unpack(stored, 0).reshape(d_out, k).T, codes)
            assert not list(CODECS[codec].faults_of(stored, codes.shape))


def test_what_does_not_inflate_to_what_its_header_says_is_refused(coder):
    codes, steps = random_codes(1, 96, 400, 1.0, "ec")
    stored = CODECS["ec"].pack_codes(codes, steps)
    size = int.from_bytes(stored[24:28].tobytes(), "little")
    beside, behind = zlib.decompress(stored[28 : 28 + size].tobytes(), -15), stored[28 + size :].tobytes()

    def with_beside(deflated: bytes, size: int | None = None) -> np.ndarray:
        length = (len(deflated) if size is None else size).to_bytes(4, "little")
        body = stored[4:24].tobytes() + length + deflated + behind
        return np.frombuffer(zlib.crc32(body).to_bytes(4, "little") + body, np.uint8)

    deflate = cospadi_entropy_parts._deflated
    np.testing.assert_array_equal(CODECS["ec"].unpack(with_beside(deflate(beside)), 0).reshape(400, 96).T, codes)
    for wrong in (
        with_beside(deflate(beside[:-1])),
        with_beside(deflate(beside + b"1")),
        with_beside(deflate(beside) + b"1"),
        with_beside(deflate(beside)[:-1]),
        with_beside(b"\xff" + deflate(beside)[1:]),
        with_beside(deflate(beside), 2**32 - 1),
        with_beside(b""),
    ):
        assert list(CODECS["ec"].faults_of(wrong, codes.shape)) == ["is cut short, or its header is wrong"]
        with pytest.raises(ValueError, match="is cut short, or its header is wrong"):
            CODECS["ec"].unpack(wrong, 0)
    # a header that asks for more than any deflated bytes can be is refused before there is room for it
    huge = stored.copy()
    huge[4:12] = np.frombuffer(np.array([2**31, 2**31], "<u4").tobytes(), np.uint8)
    with pytest.raises(ValueError, match="is cut short, or its header is wrong"):
        CODECS["ec"].unpack(huge, 0)


def test_tables_that_are_none_are_refused(coder, plain):
    codes, steps = random_codes(0, 9, 20, 1.0, "ec")
    for change, fault in (
        (lambda tables: np.put(tables, 1, tables[1] ^ 1), "has a table whose frequencies do not make a whole"),
        (lambda tables: np.put(tables, 0, 255), "has tables that are cut short"),
        (lambda tables: tables.fill(0), "has bytes behind its tables"),
    ):
        stored = CODECS["ec"].pack_codes(codes, steps).copy()
        change(parsed(stored).tables)
        with pytest.raises(DamagedStreamError, match=fault):
            CODECS["ec"].unpack(stored, 0)


@pytest.mark.parametrize("codec", STREAMS)
def test_bytes_are_those_of_the_entropy(codec):
    """Numbers of one distribution: what is beside their entropy is scales, tables and ends, counted here."""
    rng = np.random.default_rng(0)
    k, d_out = 400, 800
    steps = np.full(k, steps_near(np.ones(1))[0])
    wanted = 1.5 * rng.normal(size=(k, d_out))
    numbers = path(wanted, CODECS[codec].code)
    stored = CODECS[codec].pack_codes((numbers * steps[:, None]).astype(np.float32), steps)
    groups = [numbers[numbers & 1 == odd] for odd in (0, 1)] if CODECS[codec].code else [numbers]
    entropy = 0.0
    for group in groups:
        counts = np.bincount(group.ravel() - group.min())
        entropy += -(counts[counts > 0] * np.log2(counts[counts > 0] / counts.sum())).sum()
    n_streams = len(parsed(stored).edges) - 1
    beside = 8 * (2 * k + d_out + 36 * n_streams + 200)
    assert entropy < 8 * stored.nbytes < 1.002 * entropy + beside


@pytest.mark.parametrize("codec", STREAMS)
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_bytes=st.integers(1, 4), data=st.data())
def test_a_damaged_stream_is_refused_or_decoded_within_its_bounds(codec, seed, n_bytes, data):
    """With the checksum it is refused; with one that fits the damage, nothing outside is touched either way."""
    codes, steps = random_codes(seed % 7, 19, 23, 1.0, codec)
    stored = CODECS[codec].pack_codes(codes, steps).copy()
    for _ in range(n_bytes):
        stored[data.draw(st.integers(4, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    if stored.tobytes() != CODECS[codec].pack_codes(codes, steps).tobytes():
        assert list(CODECS[codec].faults_of(stored, codes.shape)) == ["is damaged: its checksum is another"]
    if data.draw(st.booleans()):
        stored = stored[: data.draw(st.integers(24, len(stored)))]
    stored[:4] = np.frombuffer(zlib.crc32(stored[4:].tobytes()).to_bytes(4, "little"), np.uint8)
    outcomes = []
    for choice in ("auto", "torch"):
        cospadi_compiler.choose(choice)
        faults = list(CODECS[codec].faults_of(stored, codes.shape))
        try:
            numbers = [] if faults else CODECS[codec].numbers(torch.from_numpy(stored.copy()))
            digits = b"".join(part.numpy().tobytes() for part in numbers)
            outcomes.append(None if faults else CODECS[codec].unpack(stored, 0).tobytes() + digits)
        except DamagedStreamError:
            outcomes.append("damaged")
    cospadi_compiler.choose("auto")
    assert outcomes[0] == outcomes[1]


def test_what_cannot_be_coded_is_refused():
    steps = steps_near(np.ones(2))
    for codec in ("ectcq", "ectcq256"):
        with pytest.raises(ValueError, match="do not follow the trellis"):
            CODECS[codec].pack_codes(np.ones((2, 3), np.float32) * steps[:, None], steps)
    with pytest.raises(ValueError, match=r"numbers up to 600000; allowed: 520192"):
        CODECS["ec"].pack_codes(np.full((2, 3), 600000, np.float32) * steps[:, None], steps)
    with pytest.raises(ValueError, match="steps are not those that can be stored"):
        CODECS["ec"].pack_codes(np.ones((2, 3), np.float32), np.full(2, 1.01, np.float32))


@pytest.mark.parametrize("code", CODES.values(), ids=str)
def test_the_trellis_is_the_best_path(code):
    """Viterbi in NumPy against all numbers near every value, for short rows."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        values = (2 * rng.normal(size=5)).astype(np.float32)
        numbers = path_with_numpy(values, code)
        best = math.inf
        for halves in itertools.product(range(-4, 5), repeat=5):
            cost, state = 0.0, 0
            for value, half in zip(values, halves, strict=True):
                cost += (value - 2 * half - (state & 1)) ** 2
                state = code.follow(state, half)
            best = min(best, cost)
        assert ((values - numbers) ** 2).sum() == pytest.approx(best, rel=1e-5)
        assert (path(numbers[None].astype(float), code)[0] == numbers).all()


@pytest.mark.parametrize("states", STATES)
def test_rounding_in_c_is_that_of_the_reference(states):
    rng = np.random.default_rng(states)
    d_in, d_out, code = 20, 150, CODES.get(states)
    wanted = (rng.normal(size=(d_in, d_out)) * np.exp(rng.normal(size=(d_in, 1)))).astype(np.float32)
    wanted[3] = 0
    wanted[5] *= 3e4  # beyond the numbers of a table
    wanted[7, 9], wanted[8, 9] = 1e9, -1e9  # beyond any number
    upper = np.triu(rng.normal(size=(d_in, d_in))).astype(np.float32)
    pivots = np.exp(rng.normal(size=d_in))
    rows = Rows(upper, steps_near(0.3 * pivots), np.exp(rng.normal(size=d_out)).astype(np.float32), pivots, code)
    in_c = functools.partial(entropy._round_compiled, compiled(SOURCE, "entropy-coded rounding"))
    for i in range(d_in):  # one by one: paths that are as near lead to others
        left, errors = [wanted.copy(), wanted.copy()], np.empty((2, 1, d_out), np.float32)
        for one, error, round_rows in zip(left, errors, (round_with_numpy, in_c), strict=True):
            round_rows(one, error, i, i + 1, rows)
            numbers = np.rint(one[i] / rows.steps[i]).astype(int)
            np.testing.assert_array_equal(one[i], numbers.astype(np.float32) * rows.steps[i])
            assert np.abs(numbers).max() <= 2 * MOST
            np.testing.assert_array_equal(numbers, path(numbers[None].astype(float), code)[0])
            np.testing.assert_allclose(error[0], (wanted[i] - one[i]) / pivots[i], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(np.delete(one, i, 0), np.delete(wanted, i, 0))
        assert np.mean(left[0][i] == left[1][i]) > 0.9
        within = np.abs(wanted[i]) < 1e8
        distances = [((wanted[i] - one[i])[within].astype(float) ** 2).sum() for one in left]
        assert distances[1] == pytest.approx(distances[0], rel=1e-2)
    # and what the first leaves to those after it
    left, errors = [wanted.copy(), wanted.copy()], np.empty((2, 2, d_out), np.float32)
    for one, error, round_rows in zip(left, errors, (round_with_numpy, in_c), strict=True):
        round_rows(one, error, 1, 3, rows)
        one[2] += rows.upper[1, 2] * error[0]
        assert np.abs(one[2] - wanted[2]).max() < 3 * rows.steps[2]


@pytest.mark.parametrize("states", STATES)
def test_without_a_compiler_the_same_is_learned_more_slowly(states, monkeypatch):
    w, gram = weight(40, 24), inputs(40)
    expected = factorize(w, gram, method="ectcq", bits=4, states=states)
    monkeypatch.setattr(entropy, "compiled", lambda source, what: None)
    found = factorize(w, gram, method="ectcq", bits=4, states=states)
    assert found.nbytes == pytest.approx(expected.nbytes, rel=0.01)
    assert found.relative_error(w, gram) == pytest.approx(expected.relative_error(w, gram), rel=0.03)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("bits", [2, 3, 4.5])
def test_the_rate_is_hit(states, bits):
    for d_in, d_out in ((64, 48), (96, 200)):
        w, gram = weight(d_in, d_out), inputs(d_in)
        found = factorize(w, gram, method="ectcq", bits=bits, states=states)
        tensors, spec = found.pack("m")
        assert sum(tensor.nbytes for tensor in tensors.values()) == found.nbytes
        assert bits - 0.01 - 64 / w.size <= 8 * found.nbytes / w.size <= bits
        np.testing.assert_array_equal(unpack(tensors, spec, "m").codes, found.codes)
    with pytest.raises(ConfigError, match="is the least"):
        factorize(weight(), inputs(), method="ectcq", bits=0.5, states=states)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("bits", [1.5, 3, 4])
def test_the_rate_is_hit_where_all_inputs_cost_alike(states, bits):
    """Without data: their steps are the same, to the sixteenth of an octave that they are stored to."""
    w = weight(192, 600)
    found = factorize(w, None, method="ectcq", bits=bits, states=states)
    assert bits - 0.01 - 64 / w.size <= 8 * found.nbytes / w.size <= bits
    steps = np.asarray(found.scales)
    assert steps.max() / steps.min() == pytest.approx(2 ** (1 / 16), rel=1e-3)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("bits", [0.7, 0.9])
def test_few_passes_hit_the_rate_where_most_numbers_are_zero(states, bits):
    """There a step twice as long saves much less than a bit, the more so where few inputs carry all energy."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3000, 384)) * np.exp(2 * rng.normal(size=384))
    w = weight(384, 192)
    found = factorize(w, x.T @ x, method="ectcq", bits=bits, states=states)
    assert bits - 0.01 - 64 / w.size <= 8 * found.nbytes / w.size <= bits
    assert found.diagnostics["n_passes"] <= 6


def test_each_step_of_insight_pays_at_equal_bits():
    """Rounding, error feedback, entropy coding, the trellis: where numbers pay for scales and tables of their own."""
    w, gram = weight(192, 400), inputs(192)
    given = {"bits": 3 + 17 / 64, "block_size": 64}
    errors = [factorize(w, gram, method=method, **given).relative_error(w, gram) for method in ("rtn", "gptq")]
    errors += [
        factorize(w, gram, method="ectcq", states=states, bits=given["bits"]).relative_error(w, gram)
        for states in STATES
    ]
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.75 * errors[1] and errors[3] < 0.95 * errors[2]
    assert errors[4] < 0.98 * errors[3]


@pytest.mark.parametrize("states", STATES)
def test_inputs_that_carry_all_energy_get_the_bits_that_they_need(states):
    """A thousand times as active as the others: numbers of thousands of steps, and an error as small as elsewhere."""
    w, gram = weight(96, 200), inputs(96)
    plain = factorize(w, gram, method="ectcq", bits=3.5, states=states).relative_error(w, gram)
    scale = np.ones(96)
    scale[[7, 50]] = 3000
    found = factorize(w, gram * scale[:, None] * scale, method="ectcq", bits=3.5, states=states)
    steps = np.asarray(found.scales)[:, None]
    assert np.abs(found.codes / steps)[[7, 50]].max() > 1000
    assert found.relative_error(w, gram * scale[:, None] * scale) < plain


def test_entropy_coding_where_an_input_is_never_active():
    w, gram = weight(), inputs()
    gram[5], gram[:, 5] = 0, 0
    found = factorize(w, gram, method="ectcq", bits=4)
    assert np.isfinite(found.codes).all() and not found.codes[5].any()


@pytest.mark.parametrize("states", STATES)
def test_a_scale_for_every_column_comes_to_an_entropy_coded_matrix(states):
    w, gram = weight(), inputs()
    found = factorize(w, gram, method="ectcq", bits=3, states=states)
    scales = np.exp(np.random.default_rng(0).normal(size=w.shape[1])).astype(np.float32)
    kept = scales.astype(BFLOAT16).astype(np.float32)
    times = found.with_columns_times(scales)
    np.testing.assert_array_equal(times.codes, found.codes * kept)
    tensors, spec = times.pack("m")
    assert spec["codes"]["codec"] == f"{STREAMS[STATES.index(states)]}_scaled"
    # the numbers are stored as before
    np.testing.assert_array_equal(tensors["m.values"], found.pack("m")[0]["m.values"])
    assert times.nbytes == found.nbytes + 2 * w.shape[1] == sum(tensor.nbytes for tensor in tensors.values())
    again = unpack(tensors, spec, "m")
    np.testing.assert_array_equal(again.codes, times.codes)
    packed = again.pack("m")[0]
    assert all(packed[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
    np.testing.assert_allclose(again.with_columns_times(1 / kept).codes, found.codes, rtol=2**-7)


def random_trellis(seed: int, k: int, d_out: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes along random paths, and their scales."""
    rng = np.random.default_rng(seed)
    states, state = np.empty((k, d_out), int), np.zeros(k, int)
    for j in range(d_out):
        state = rng.integers(0, 2**bits, k) << 12 - bits | state >> bits
        states[:, j] = state
    words = np.exp(rng.normal(size=k + d_out)).astype(np.float32).view(np.uint32) & 0xFFFF0000
    scales = words.view(np.float32) * rng.choice(np.float32([-1, 1]), k + d_out)
    return VALUES[states].astype(np.float32) * scales[:k, None] * scales[k:], scales


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(2, 4),
    st.integers(0, 2**16),
    st.data(),
)
def test_a_trellis_round_trips_and_damage_is_refused(seed, k, d_out, bits, place, data):
    codec = CODECS[f"trellis{bits}"]
    codes, scales = random_trellis(seed, k, d_out, bits)
    stored = codec.pack_codes(codes, scales)
    assert stored.shape == codec.shape_of_codes((d_out, k), {})
    for found, expected in zip(codec.unpack_codes(stored, (k, d_out)), (codes, scales), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(codec.decode(torch.from_numpy(stored.copy()), (d_out, k)).numpy().T, codes)
    assert not list(codec.faults_of(stored, (k, d_out)))
    doubled, wider = codec.with_columns_times(codes, scales, np.full(d_out, 2, np.float32))
    np.testing.assert_array_equal(doubled, 2 * codes)
    np.testing.assert_array_equal(
        codec.pack_codes(doubled, wider)[: codec.n_stream_bytes(k, d_out)], stored[: -2 * (k + d_out) - 4]
    )
    broken = stored.copy()
    broken[place % len(broken)] ^= data.draw(st.integers(1, 255))
    assert list(codec.faults_of(broken, (k, d_out))) == ["is damaged: its checksum is another"]
    # of what has a checksum that fits, any bits are codes; scales and what lies behind a row have to be right
    broken = stored.copy()
    broken[-6:-4] = 0xFF
    behind = bits * d_out % 8
    broken[codec.n_stream_bytes(k, d_out) - 1] |= 128 if behind else 0
    broken[-4:] = np.frombuffer(zlib.crc32(broken[:-4]).to_bytes(4, "little"), np.uint8)
    faults = list(codec.faults_of(broken, (k, d_out)))
    assert faults[0] == "holds 1 scales that are NaN or infinite"
    assert faults[1:] == (["has bits set behind the last number of a row"] if behind else [])


def test_what_is_no_path_is_refused():
    codes, scales = random_trellis(0, 5, 7, 3)
    for wrong in (codes + scales[:5, None], codes[:, ::-1], 100 * codes):
        with pytest.raises(ValueError, match="do not follow the trellis"):
            CODECS["trellis3"].pack_codes(np.ascontiguousarray(wrong), scales)
    with pytest.raises(ValueError, match="no bfloat16 numbers, or some are 0"):
        CODECS["trellis3"].pack_codes(codes, scales * np.float32(1.001))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_best_path_is_the_best_of_all(bits):
    """The C source against the reference in NumPy, and both against all paths of short rows."""
    rng = np.random.default_rng(bits)
    in_c, reference = trellis._follower(bits), functools.partial(trellis.follow_with_numpy, bits=bits)
    assert isinstance(in_c, types.FunctionType)  # not the reference
    for n in (1, 3, 60):
        row = (4000 * rng.normal(size=n)).astype(np.float32)
        weights = np.exp(rng.normal(size=n)).astype(np.float32)
        found = [
            (weights.astype(float) ** 2 * (row - follow(row, np.ones(n, np.float32), weights)) ** 2).sum()
            for follow in (in_c, reference)
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-4)
        if n == 3:
            best = math.inf
            for symbols in itertools.product(range(2**bits), repeat=n):
                state, cost = 0, 0.0
                for j, symbol in enumerate(symbols):
                    state = symbol << 12 - bits | state >> bits
                    cost += weights[j] ** 2 * (row[j] - VALUES[state]) ** 2
                best = min(best, cost)
            assert found[1] == pytest.approx(best, rel=1e-6)


def test_a_trellis_takes_the_bits_that_fit_and_beats_rounding_at_fewer_bytes():
    w, gram = weight(128, 160), inputs(128)
    beside = (16 * (128 + 160) + 32) / w.size
    errors = []
    for bits in (2, 3, 4):
        found = factorize(w, gram, method="trellis", bits=bits + beside)
        assert (found.value_codec, 8 * found.nbytes / w.size) == (f"trellis{bits}", pytest.approx(bits + beside))
        tensors, spec = found.pack("m")
        np.testing.assert_array_equal(unpack(tensors, spec, "m").codes, found.codes)
        gptq = factorize(w, gram, method="gptq", bits=bits + 0.25, block_size=64)
        once = factorize(w, gram, method="trellis", bits=bits + beside, sweeps=0)
        assert CODECS[gptq.value_codec].bits == bits and found.nbytes < gptq.nbytes
        errors.append(found.relative_error(w, gram))
        assert errors[-1] < 0.9 * gptq.relative_error(w, gram) and errors[-1] < once.relative_error(w, gram)
    # half with every bit, but for the tails of these weights
    assert errors[2] < 0.75 * errors[1] and errors[1] < 0.75 * errors[0]
    with pytest.raises(ConfigError, match="2 bits a weight and their scales take"):
        factorize(w, gram, method="trellis", bits=2)


def test_a_trellis_where_an_input_is_never_active():
    w, gram = weight(), inputs()
    gram[5], gram[:, 5] = 0, 0
    found = factorize(w, gram, method="trellis", bits=5)
    assert np.isfinite(found.codes).all() and not found.codes[5].any()


# --- scaled inputs ----------------------------------------------------------------------------------------------------


def heavy(d_in: int = D_IN) -> np.ndarray:
    """A Gram of which a few inputs carry most."""
    scales = np.ones(d_in)
    scales[[7, 20, 50]] = 30
    return inputs(d_in) * scales[:, None] * scales


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_where_all_inputs_are_as_active_they_are_not_scaled(method, symmetric):
    w, gram = weight(), inputs()
    activity = np.sqrt(np.diagonal(gram))
    gram = gram / activity[:, None] / activity
    np.fill_diagonal(gram, 1)
    options = {"method": method, "bits": 5.75, "value_bits": 4, "block_size": 16, "symmetric": symmetric}
    plain = factorize(w, gram, **options)
    found = factorize(w, gram, scale_inputs=True, **options)
    assert found.dictionary is None and found.diagnostics["power"] == 0
    np.testing.assert_array_equal(found.codes, plain.codes)
    np.testing.assert_array_equal(found.scales, plain.scales)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("codec", ["int3", "int4", "uint3"])
def test_scaled_inputs_serve_those_that_carry_all(method, codec):
    w, gram = weight(d_out=64), heavy()
    asked = bits_of(codec, 16) + 16 / 64
    options = {"method": method, "block_size": 16, "symmetric": codec.startswith("int")}
    plain = factorize(w, gram, bits=bits_of(codec, 16), **options)
    found = factorize(w, gram, bits=asked, scale_inputs=True, **options)
    assert found.value_codec == plain.value_codec == codec
    assert found.relative_error(w, gram) < (0.5 if method == "rtn" else 0.9) * plain.relative_error(w, gram)
    # the file has them, and they are counted
    assert 8 * found.nbytes / w.size == asked
    tensors, spec = found.pack("m")
    assert tensors["m.dictionary"].shape == (D_IN,) and spec["dictionary"]["codec"] == "diagonal"
    assert sum(tensor.nbytes for tensor in tensors.values()) == found.nbytes
    stored = unpack(tensors, spec, "m")
    np.testing.assert_array_equal(stored.reconstruct(), found.reconstruct())
    x = np.random.default_rng(0).normal(size=(3, D_IN)).astype(np.float32)
    np.testing.assert_allclose(stored(x), x @ stored.reconstruct(), rtol=1e-4, atol=1e-4)
    again, _ = stored.pack("m")
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
    # a byte less, and they cost a bit of every weight
    less = factorize(w, gram, bits=asked - 8 / w.size, scale_inputs=True, **options)
    assert CODECS[less.value_codec].bits < CODECS[codec].bits


def test_an_input_that_is_never_active_is_scaled_and_costs_nothing():
    w, gram = weight(), heavy()
    gram[5], gram[:, 5] = 0, 0
    for method in ("rtn", "gptq"):
        found = factorize(w, gram, method=method, bits=5, block_size=16, scale_inputs=True)
        assert np.isfinite(found.reconstruct()).all() and found.relative_error(w, gram) < 0.1
    assert factorize(w, 0 * gram, method="rtn", bits=5, block_size=16, scale_inputs=True).dictionary is None


def test_scaled_inputs_are_found_on_torch_as_in_numpy():
    w, gram = weight(), heavy()
    options = {"method": "gptq", "bits": 5, "block_size": 16, "scale_inputs": True}
    here = factorize(w, gram, **options)
    there = factorize(torch.from_numpy(w), torch.from_numpy(gram), **options)
    np.testing.assert_array_equal(there.dictionary, here.dictionary)
    assert there.relative_error(w, gram) == pytest.approx(here.relative_error(w, gram), rel=0.02)


# --- float8, entropy-coded --------------------------------------------------------------------------------------------


def test_float8_is_that_of_torch():
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=5000) * np.exp2(rng.integers(-12, 10, 5000))).astype(np.float32)
    numbers = np.concatenate([numbers, np.float32([0, 1e9, -1e9, 448, 464, 2**-9, 2**-10, 3 * 2**-10, 17 * 2**-9])])
    expected = torch.from_numpy(numbers.clip(-448, 448)).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(float8.to_float8(numbers * np.float32(512)) / 512, expected)


@pytest.mark.parametrize("bits", [2, 3.25, 4.25])
def test_float8_takes_the_bits_that_were_asked_for(bits):
    for d_in, d_out in ((64, 48), (96, 200)):
        w = weight(d_in, d_out)
        found = factorize(w, method="entquant", bits=bits)
        tensors, spec = found.pack("m")
        assert sum(tensor.nbytes for tensor in tensors.values()) == found.nbytes
        # a step of one of the columns is the least that can be changed
        assert bits - 0.01 - 64 / w.size - 1 / d_out <= 8 * found.nbytes / w.size <= bits
        np.testing.assert_array_equal(unpack(tensors, spec, "m").codes, found.codes)
        steps = np.asarray(found.scales)[d_in:]
        numbers = torch.from_numpy(found.codes / steps / 512)
        assert torch.equal(numbers.to(torch.float8_e4m3fn).float(), numbers)
        # without data
        np.testing.assert_array_equal(factorize(w, inputs(d_in), method="entquant", bits=bits).codes, found.codes)
    with pytest.raises(ConfigError, match="is the least"):
        factorize(w, method="entquant", bits=0.5)


def test_float8_beats_blocks_of_integers_where_there_are_no_data():
    w = weight(192, 400)
    bits = bits_of("int3", 64)
    found, rounded = (factorize(w, method=method, bits=bits, block_size=64) for method in ("entquant", "rtn"))
    assert found.relative_error(w) < 0.8 * rounded.relative_error(w)
    # and never takes more than its numbers are worth
    most = factorize(w, method="entquant", bits=12)
    assert 8 * most.nbytes / w.size < 8 and most.relative_error(w) < 2**-4 / 3**0.5
    assert not factorize(np.where(np.arange(400) == 3, 0, w), method="entquant", bits=3).codes[:, 3].any()
