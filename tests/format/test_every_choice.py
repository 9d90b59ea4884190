"""Every method, solver, support, number of bits and rounding that a config may choose: learned, packed, loaded.

The choices are those of the schema, so a new method, support or codec is among them by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cospadi
from cospadi.config import schema
from cospadi.files import BFLOAT16
from cospadi.formats.factorization import unpack
from cospadi.formats.values import bits_faults
from cospadi.methods import METHODS
from cospadi.runtime.cospadi_linear import PackedLinear
from cospadi.runtime.cospadi_registry import CODECS

D_IN, D_OUT, RATIO = 48, 40, 0.5
# what decides how a method's factors look; the other options change only their numbers
SHAPING = ("solver", "support", "start", "atom_update", "polish", "scale_inputs")


def codes_choices() -> dict[str, list[Any]]:
    variants = schema()["properties"]["variants"]["additionalProperties"]["oneOf"]
    codes = next(part for part in variants if part["title"] == "cospadi")["properties"]["codes"]["properties"]
    return {name: codes[name]["enum"] for name in ("value_bits", "dictionary_bits")}


def choices(method: str) -> Iterator[dict[str, Any]]:
    """Every combination of the options that shape a method's factors, less those that the method refuses."""
    entry = METHODS[method]
    words = {name: part.get("enum", [False, True]) for name, part in entry.options.items() if name in SHAPING}
    for values in itertools.product(*words.values()):
        given = dict(zip(words, values, strict=True))
        if "max_iter" in entry.options:
            given["max_iter"] = 1
        if not list(entry.faults({**entry.defaults(), **given})):
            yield given


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, D_IN)) * np.linspace(0.3, 2, D_IN)
    weight = rng.normal(size=(D_IN, D_OUT)) / np.arange(1, D_IN + 1)[:, None] ** 0.3
    return weight.astype(BFLOAT16).astype(np.float32), x.T @ x


def loaded(tensors: dict[str, np.ndarray], spec: dict[str, Any], name: str) -> PackedLinear:
    """A layer that holds packed tensors, as loading a checkpoint makes it."""
    layer = PackedLinear(spec)
    for key, array in tensors.items():
        stored = torch.from_numpy(array.view(np.int16) if array.dtype == BFLOAT16 else array.copy())
        part = getattr(layer, key.removeprefix(f"{name}."))
        assert part.shape == stored.shape, key
        part.data = stored.view(part.dtype)
    return layer


def check(
    problem: tuple[np.ndarray, np.ndarray],
    method: str,
    given: dict[str, Any],
    codes: dict[str, Any],
    ratio: float = RATIO,
) -> None:
    weight, gram = problem
    factorization = cospadi.factorize(weight, gram, method=method, ratio=ratio, **codes, **given)
    # what memory holds of it once it is loaded is planned by this
    assert CODECS[factorization.value_codec].variable == METHODS[method].decoded
    tensors, spec = factorization.pack("m")
    # the promise of a ratio is bytes in the file; a tiny matrix has few sizes between which to choose
    assert sum(tensor.nbytes for tensor in tensors.values()) <= (1 - ratio) * 2 * D_IN * D_OUT
    stored = unpack(tensors, spec, "m").reconstruct()
    assert np.isfinite(stored).all()
    # better than nothing, which is an error of 1
    assert np.linalg.norm(weight - stored) < np.linalg.norm(weight)
    x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ torch.from_numpy(stored).double()
    size = x.double().abs() @ torch.from_numpy(stored).double().abs() + 1
    # two float32 products one after the other, each of at most as many terms as there are inputs or atoms
    bound = 4 * D_IN * torch.finfo(torch.float32).eps
    assert ((loaded(tensors, spec, "m")(x).double() - expected).abs() / size).max() < bound


@pytest.mark.parametrize("method", METHODS)
def test_every_choice_of_a_method_is_learned_packed_and_loaded(problem, method):
    made = list(choices(method))
    assert made
    for given in made:
        check(problem, method, given, {})


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_bits_is_learned_packed_and_loaded(problem, method):
    words = codes_choices()
    bits = [dict(zip(words, values, strict=True)) for values in itertools.product(*words.values())]
    # the supports and solvers alone: each with all bits and roundings
    shapes = {(given.get("solver"), given.get("support")): given for given in choices(method)}
    for given, codes, rounding in itertools.product(shapes.values(), bits, ("nearest", "truncate", "optimal")):
        few = list(bits_faults({**codes, "rounding": "nearest"}, own_codec=False))
        if codes["value_bits"] == codes["dictionary_bits"] if rounding == "optimal" else not few:
            ratio = 0.75 if few else RATIO  # as many bytes as some method has use for
            check(problem, method, given, {**codes, "block_size": 16, "rounding": rounding}, ratio)
