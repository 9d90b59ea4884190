"""Layers that are sums: mixtures of matrix atoms, and packed factors that are added up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from format_reader import read_matrix
from format_writer import BFLOAT16, random_matrix

from cospadi.errors import ArtifactError
from cospadi.formats.factorization import Factorization, tensor_names, unpack
from cospadi.runtime.cospadi_linear import pack_, packed_layers, unpack_
from cospadi.runtime.cospadi_mixture import MIXED_ROWS, MixtureLinear, SummedLinear, packed_module

D_IN, D_OUT = 40, 33


def make(n_atoms=3, *, summed=False, codec="bf16", dictionary="bf16", bias=False):
    """A layer and its weight (d_in, d_out) by the independent reader."""
    draw = np.random.default_rng(0)
    if summed:
        tensors, spec = random_matrix(draw, D_IN, D_OUT, 12, codec, "bitmask", dictionary)
        more, part = random_matrix(draw, D_IN, D_OUT, n_atoms, codec, "mixture", dictionary, "m.plus.0")
        tensors, spec = {**tensors, **more}, {**spec, "plus": [part]}
    else:
        tensors, spec = random_matrix(draw, D_IN, D_OUT, n_atoms, codec, "mixture", dictionary)
    layer = packed_module(spec, torch.nn.Parameter(torch.randn(D_OUT)) if bias else None)
    for name, array in tensors.items():
        stored = torch.from_numpy(array.view(np.int16) if array.dtype == BFLOAT16 else array.copy())
        parameter = layer.get_parameter(name.removeprefix("m."))
        assert parameter.shape == stored.shape
        parameter.data = stored.view(parameter.dtype)
    return layer, torch.from_numpy(read_matrix(tensors, "m", spec))


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dictionary", ["bf16", "bf14", "int8", "int4"])
@pytest.mark.parametrize("n_atoms", [1, 3])
def test_product_is_that_of_the_reader(summed, dictionary, n_atoms):
    layer, weight = make(n_atoms, summed=summed, dictionary=dictionary, bias=True)
    assert type(layer) is (SummedLinear if summed else MixtureLinear)
    for rows in (1, MIXED_ROWS, MIXED_ROWS + 1, 30):
        x = torch.randn(2, rows // 2 + 1, D_IN)
        expected = x.double() @ weight.double() + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=3e-5)
    exact, error = x.double() @ weight.double(), {}
    layer.bias.data.zero_()
    for name, y in (("packed", layer(x.bfloat16())), ("dense", x.bfloat16() @ weight.bfloat16())):
        error[name] = float((y.detach().double() - exact).square().mean().sqrt())
    assert error["packed"] <= 2 * error["dense"]


def test_gradient_compilation_and_pickle():
    import pickle

    layer, weight = make(summed=True)
    x = torch.randn(20, D_IN, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(1).expand(20, -1), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (3, 20):
        x = torch.randn(rows, D_IN)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_nothing_is_kept_between_calls():
    layer, _ = make(summed=True)
    before = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(20, D_IN))
    assert {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()} == before
    kept = [name for part in layer.modules() for name in vars(part) if torch.is_tensor(vars(part)[name])]
    assert kept == []
    half = layer.to(torch.bfloat16)
    assert half.values.dtype == half.plus[0].dictionary.dtype == torch.bfloat16


@pytest.mark.parametrize("summed", [False, True])
def test_unpacked_for_many_rows_it_is_one_dense_weight(summed):
    layer, weight = make(summed=summed)
    model = torch.nn.ModuleDict({"layer": layer})
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))
    packed, names = layer(x), set(model.state_dict())
    unpack_(model, torch.float32)
    torch.testing.assert_close(layer.unpacked_weight.T, weight, rtol=1e-5, atol=1e-5)
    assert all(part.unpacked_codes is None for part in packed_layers(model).values())
    torch.testing.assert_close(layer(x), packed, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names
    pack_(model)
    assert layer.unpacked_weight is None and torch.equal(layer(x), packed)


def test_unpacked_parts_can_be_trained_and_are_stored():
    layer, weight = make(summed=True)
    model = torch.nn.ModuleDict({"layer": layer})
    assert set(packed_layers(model)) == {"layer", "layer.plus.0"}
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))
    target = x @ (weight + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))

    def loss():
        return (layer(x) - target).square().mean()

    before = float(loss())
    names = set(model.state_dict())
    unpack_(model, torch.float32, trainable=True)
    assert set(model.state_dict()) == names and float(loss().detach()) == pytest.approx(before, rel=1e-4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    trained = float(loss().detach())
    pack_(model)
    assert trained < 0.9 * before and float(loss()) < 0.5 * (trained + before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["plus"][0]["codes"].update(n_nonzero=5), "5 coefficients do not fit 99 columns"),
        (lambda spec: spec["plus"][0].update(plus=[]), "what is added is no sum itself"),
        (lambda spec: spec["plus"][0].update(side="output"), "its spec has side, which is not known"),
    ],
)
def test_a_spec_that_is_not_understood_is_refused(change, message):
    draw = np.random.default_rng(0)
    _, spec = random_matrix(draw, D_IN, D_OUT, 12)
    _, part = random_matrix(draw, D_IN, D_OUT, 3, "bf16", "mixture", name="m.plus.0")
    spec["plus"] = [part]
    change(spec)
    with pytest.raises(ValueError, match=message):
        packed_module(spec)


@pytest.mark.parametrize("storage", [{}, {"value_codec": "int8", "dictionary_codec": "int8", "block_size": 16}])
def test_factors_round_trip_through_the_file_s_tensors_and_count_their_bytes(storage):
    draw = np.random.default_rng(0)
    atoms = draw.normal(size=(D_IN, 2 * D_OUT)).astype(np.float32)
    mixture = Factorization(atoms, np.array([0.7, -1.3], np.float32), support="mixture", tensor="first.dictionary")
    factors = Factorization(
        draw.normal(size=(D_IN, 5)).astype(np.float32),
        draw.normal(size=(5, D_OUT)).astype(np.float32),
        support="dense",
        plus=[mixture],
    ).with_storage(**storage)
    tensors, spec = factors.pack("m")
    assert set(tensors) == set(tensor_names("m", spec)) and "first.dictionary" in tensors
    assert sum(tensor.nbytes for tensor in tensors.values()) == factors.nbytes
    stored = unpack(tensors, spec, "m")
    assert stored.shape == (D_IN, D_OUT) and stored.plus[0].n_atoms == 2 * D_OUT
    np.testing.assert_allclose(stored.reconstruct(), read_matrix(tensors, "m", spec), rtol=1e-5, atol=1e-5)
    again, same_spec = stored.pack("m")
    assert same_spec == spec and all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
    exact = atoms[:, :D_OUT] * 0.7 - atoms[:, D_OUT:] * 1.3 + factors.dictionary @ factors.codes
    np.testing.assert_allclose(stored.reconstruct(), exact, atol=0.1)
    x = draw.normal(size=(3, D_IN)).astype(np.float32)
    np.testing.assert_allclose(stored(x), x @ stored.reconstruct(), rtol=1e-4, atol=1e-4)


def test_atoms_that_belong_to_no_matrix_are_an_error(tiny_model, tmp_path):
    from cospadi.checkpoint import assemble
    from cospadi.files import write_tensors

    draw = np.random.default_rng(0)
    name = "model.layers.0.self_attn.q_proj"
    tensors, spec = random_matrix(draw, 48, 48, 2, "bf16", "mixture", name=name)
    tensors["elsewhere.dictionary"] = tensors.pop(f"{name}.dictionary")
    spec["dictionary"]["tensor"] = "elsewhere.dictionary"
    write_tensors(tmp_path / "codes.safetensors", tensors, {"format_version": 1, "matrices": {name: spec}})
    with pytest.raises(ArtifactError, match=r"elsewhere\.dictionary, which belongs to no packed matrix"):
        assemble(tiny_model("llama"), [tmp_path / "codes.safetensors"], tmp_path / "out", variant={})
