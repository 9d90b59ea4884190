"""MASA for pretrained models: the algebra of matrix atoms, the choice of how many, and from files to files."""

import itertools
import json
import shutil

import h5py
import numpy as np
import pytest
import safetensors.numpy

from cospadi.budget import nbytes_left
from cospadi.calibration.walk import Walk
from cospadi.calibration.windows import prepare_windows
from cospadi.checkpoint import assemble, target_bytes
from cospadi.errors import ConfigError
from cospadi.files import BFLOAT16, ModelFolder, TensorFile, read_json
from cospadi.formats.factorization import tensor_names, unpack
from cospadi.learning import learn_unit
from cospadi.methods import METHODS, masa, svd_llm
from cospadi.methods.base import Fit
from cospadi.problem import Matrix, Metric, Problem, matrices_of
from cospadi.pruning import drift
from cospadi.quantization import quantize_unit
from cospadi.structure import chosen, inspect_model

BF16 = {"value_codec": "bf16", "dictionary_codec": "bf16", "block_size": 64}
D_IN, D_OUT, LAYERS = 48, 40, 6
RNG = np.random.default_rng(0)
NAMES = [f"model.layers.{layer}.self_attn.{p}" for layer in range(LAYERS) for p in ("q_proj", "o_proj")]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def metrics_of(n, d_in=D_IN):
    inputs = [RNG.normal(size=(300, d_in)) * np.linspace(0.3, 2, d_in) for _ in range(n)]
    return [Metric.of(x.T @ x) for x in inputs]


def related(n, shape=(D_IN, D_OUT), own=0.2):
    """Matrices of n layers that are mixtures of two, with something of low rank of their own."""
    atoms = RNG.normal(size=(2, *shape))
    coefficients = RNG.normal(size=(n, 2))
    own_parts = [own * RNG.normal(size=(shape[0], 3)) @ RNG.normal(size=(3, shape[1])) for _ in range(n)]
    return [
        (np.tensordot(c, atoms, 1) + part).astype(np.float32) for c, part in zip(coefficients, own_parts, strict=True)
    ]


def error(weights, metrics, factors):
    """Mean relative squared error."""
    errors = [
        metric.squared_norm(weight - f.reconstruct()) / metric.squared_norm(weight)
        for weight, metric, f in zip(weights, metrics, factors, strict=True)
    ]
    return float(np.mean(errors))


def nbytes(factors):
    """Bytes in the file, shared atoms counted once."""
    tensors = {}
    for number, factor in enumerate(factors):
        packed, _ = factor.pack(f"m{number}")
        tensors |= packed
    return sum(tensor.nbytes for tensor in tensors.values())


def problem_of(weights, metrics, names, **changes):
    matrices = [
        Matrix(name, int(name.split(".")[2]), "site", weight.shape, metric, lambda weight=weight: weight)
        for name, weight, metric in zip(names, weights, metrics, strict=True)
    ]
    return Problem(matrices, **changes)


def factorize(weights, metrics, names, *, ratio=0.3, storage=BF16, **options):
    drift = [1.0] * (1 + max(int(name.split(".")[2]) for name in names))
    problem = problem_of(weights, metrics, names, drift=drift, in_memory=False)
    return masa.fit(problem, nbytes_left(problem.shapes, ratio), Fit(storage=storage), **{"groups": 1, **options})


@pytest.mark.parametrize("n_atoms", [1, 3, 6])
def test_atoms_are_orthonormal_and_the_error_is_that_of_the_discarded_eigenvalues(n_atoms):
    weights = [RNG.normal(size=(D_IN, D_OUT)).astype(np.float32) for _ in range(6)]
    atoms, coefficients, eigenvalues = masa.matrix_pca(weights, n_atoms)
    inner = np.einsum("aij,bij->ab", atoms, atoms)
    np.testing.assert_allclose(inner, np.eye(n_atoms), atol=1e-5)
    np.testing.assert_allclose(coefficients, np.einsum("lij,aij->la", weights, atoms), rtol=1e-4, atol=1e-3)
    left = sum(np.sum((w - np.tensordot(c, atoms, 1)) ** 2) for w, c in zip(weights, coefficients, strict=True))
    assert left == pytest.approx(eigenvalues[n_atoms:].sum(), rel=1e-4, abs=1e-4)
    # the optimum: the singular values of the long vectors side by side
    values = np.linalg.svd(np.stack([w.ravel() for w in weights]), compute_uv=False)
    np.testing.assert_allclose(eigenvalues, values**2, rtol=1e-4)


def test_as_many_atoms_as_layers_reproduce_every_matrix():
    weights = [RNG.normal(size=(D_IN, D_OUT)).astype(np.float32) for _ in range(LAYERS)]
    atoms, coefficients, _ = masa.matrix_pca(weights, LAYERS)
    for weight, c in zip(weights, coefficients, strict=True):
        np.testing.assert_allclose(np.tensordot(c, atoms, 1), weight, atol=1e-5)
    rounded = [weight.astype(BFLOAT16).astype(np.float32) for weight in weights]
    factors = factorize(rounded, metrics_of(LAYERS), NAMES[::2], atoms=LAYERS, ratio=0.0)
    assert nbytes(factors) == LAYERS * 2 * D_IN * D_OUT
    for weight, factor in zip(rounded, factors, strict=True):
        np.testing.assert_array_equal(factor.quantized().reconstruct(), weight)


def test_related_layers_share_atoms_and_beat_low_rank_at_equal_bytes():
    weights, metrics, names = related(LAYERS), metrics_of(LAYERS), NAMES[::2]
    factors = factorize(weights, metrics, names, ratio=0.5)
    assert {len(factor.plus) for factor in factors} == {1}
    assert {factor.plus[0].n_nonzero for factor in factors} == {2}, "as many atoms as there are"
    dense = LAYERS * 2 * D_IN * D_OUT
    assert 0.45 * dense < nbytes(factors) <= 0.5 * dense
    low_rank = []
    for weight, metric, name in zip(weights, metrics, names, strict=True):
        low_rank += svd_llm.fit(problem_of([weight], [metric], [name]), dense // LAYERS // 2, Fit(storage=BF16))
    assert error(weights, metrics, factors) < 0.1 * error(weights, metrics, low_rank)


def test_unrelated_layers_share_none_and_bytes_go_where_they_lower_the_error():
    metrics = metrics_of(2 * LAYERS)
    easy = [
        RNG.normal(size=(D_IN, 4)) @ RNG.normal(size=(4, D_OUT)) + 0.01 * RNG.normal(size=(D_IN, D_OUT))
        for _ in range(LAYERS)
    ]
    hard = [RNG.normal(size=(D_IN, D_OUT)) for _ in range(LAYERS)]
    weights = [w.astype(np.float32) for pair in zip(easy, hard, strict=True) for w in pair]
    factors = factorize(weights, metrics, NAMES, ratio=0.4)
    assert all(not factor.plus for factor in factors)
    assert all(factor.dictionary is None for factor in factors[1::2]), "what low rank cannot hold stays as it is"
    assert all(factor.n_atoms < 10 for factor in factors[::2])
    assert nbytes(factors) <= 0.6 * 2 * LAYERS * 2 * D_IN * D_OUT


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_atoms_in_few_bits_are_made_up_for_by_the_rest(codec):
    weights, metrics = related(LAYERS), metrics_of(LAYERS)
    storage = {**BF16, "dictionary_codec": codec}
    factors = factorize(weights, metrics, NAMES[::2], ratio=0.6, atoms=2, storage=storage)
    assert nbytes(factors) <= 0.4 * LAYERS * 2 * D_IN * D_OUT
    for factor in factors:
        mixture = factor.plus[0]
        np.testing.assert_array_equal(mixture.quantized().reconstruct(), mixture.reconstruct())
    assert error(weights, metrics, [factor.quantized() for factor in factors]) < 0.05


def test_a_ratio_that_the_atoms_do_not_leave_room_for_is_an_error():
    with pytest.raises(
        ConfigError, match=r"ratio: 2303 bytes are left .* is the least with these atoms. Lower the ratio"
    ):
        factorize(related(LAYERS), metrics_of(LAYERS), NAMES[::2], ratio=0.9, atoms=3)


def test_groups_are_parted_where_the_prediction_drifts():
    assert masa.groups_by_drift([9, 1, 5, 1, 1, 7, 1], 3) == [range(0, 2), range(2, 5), range(5, 7)]
    assert masa.groups_by_drift([9, 1, 1, 1], 2) == [range(0, 1), range(1, 4)]  # the earliest of equals
    assert masa.groups_by_drift([0, 0, 0], 3) == [range(0, 1), range(1, 2), range(2, 3)]
    assert masa.groups_by_drift([0, 1, 2], 1) == [range(0, 3)]


def test_drift_is_the_divergence_of_the_predictions_behind_each_block(tiny_model, tiny_text, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_model("qwen2", dtype="float32")
    windows = {"source": "text", "samples": 5, "length": 24, "seed": 0, "packing": "packed"}
    prepare_windows(folder, windows, tiny_text / "calibration.jsonl", tmp_path / "windows.h5")
    walk = Walk(
        model_folder=folder,
        structure=inspect_model(folder),
        windows=tmp_path / "windows.h5",
        dtype="float32",
        batch_tokens=48,
        blocks_per_job=3,
        log=lambda line: None,
    )
    found = drift.measure(walk, tmp_path / "drift.json")
    assert read_json(tmp_path / "drift.json") == found and found["n_tokens"] == 5 * 16

    model = AutoModelForCausalLM.from_pretrained(folder)
    states = []
    hooks = [block.register_forward_hook(lambda m, i, output: states.append(output)) for block in model.model.layers]
    model.model.layers[0].register_forward_pre_hook(lambda m, inputs: states.append(inputs[0]))
    with h5py.File(tmp_path / "windows.h5") as file:
        ids = torch.from_numpy(file["input_ids"][:].astype(np.int64))
    with torch.no_grad():
        model(ids)
        chosen_tokens = np.unique(np.linspace(0, 24, 17).astype(int)[1:] - 1)
        p = [torch.log_softmax(model.lm_head(model.model.norm(s))[:, chosen_tokens], -1) for s in states]
    expected = [(a.exp() * (a - b)).sum(-1).mean() for a, b in itertools.pairwise(p)]
    assert len(hooks) == len(found["drift"]) == 4
    np.testing.assert_allclose(found["drift"], expected, rtol=1e-4)


def test_targets_are_the_projections_that_are_named(tiny_model):
    structure = inspect_model(tiny_model("llama"))
    attention = chosen(structure, ATTENTION)
    names = [m["name"] for layer in attention["layers"] for site in layer["sites"] for m in site["matrices"]]
    assert len(names) == 16 and all("self_attn" in name for name in names)
    assert chosen(structure, None) == structure


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory):
    """A model whose q matrices are related, its attention learned and packed: model, structure, codes, diagnostics."""
    folder = tmp_path_factory.mktemp("masa")
    shutil.copytree(tiny_model("llama"), folder / "dense")
    structure = inspect_model(folder / "dense")
    tensors = safetensors.numpy.load_file(folder / "dense" / "model.safetensors")
    shared = related(4, (48, 48))
    grams = []
    for layer, weight in enumerate(shared):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = np.ascontiguousarray(weight.T).astype(BFLOAT16)
        grams.append(folder / f"layer_{layer:02d}.h5")
        with h5py.File(grams[-1], "w") as file:
            file.attrs.update(format_version=1, fingerprint=structure["fingerprint"], layer=layer, tokens="some")
            for site in structure["layers"][layer]["sites"]:
                x = RNG.normal(size=(300, site["d_in"])) * np.roll(np.linspace(0.3, 2, site["d_in"]), 10 * layer)
                file.create_dataset(f"{site['name']}/gram", data=x.T @ x)
                file[site["name"]].attrs["n_heldout"] = 0
    safetensors.numpy.save_file(tensors, folder / "dense" / "model.safetensors", {"format": "pt"})
    found = {"format_version": 1, "fingerprint": structure["fingerprint"], "tokens": "some"}
    (folder / "drift.json").write_text(json.dumps({**found, "drift": [1.0, 0.1, 0.1, 0.1]}))
    codes = {"value_bits": 16, "rounding": "nearest"}
    variant = {"method": "masa", "ratio": 0.3, "groups": 1, "targets": list(ATTENTION), "codes": codes}
    arguments = folder / "dense", structure, grams
    learn_unit(
        folder / "dense",
        chosen(structure, ATTENTION),
        grams,
        range(4),
        variant,
        drift=folder / "drift.json",
        output=folder / "factors.safetensors",
        diagnostics=folder / "factors.json",
        log=lambda line: None,
    )
    quantize_unit(
        *arguments,
        folder / "factors.safetensors",
        range(4),
        variant,
        output=folder / "codes.safetensors",
        diagnostics=folder / "codes.json",
        log=lambda line: None,
    )
    return folder, structure


def test_every_matrix_is_learned_from_its_own_weight_and_inputs(learned):
    folder, structure = learned
    grams = [folder / f"layer_{layer:02d}.h5" for layer in range(4)]
    matrices = list(matrices_of(ModelFolder(folder / "dense"), chosen(structure, ATTENTION), range(4), grams))
    weights = [ModelFolder(folder / "dense").read_weight(matrix.name) for matrix in matrices]
    metrics = [matrix.metric for matrix in matrices]
    expected = factorize(weights, metrics, [matrix.name for matrix in matrices])
    file = TensorFile(folder / "factors.safetensors")
    for matrix, factors in zip(matrices, expected, strict=True):
        spec = file.metadata["matrices"][matrix.name]
        found = unpack({part: file.read(part) for part in tensor_names(matrix.name, spec)}, spec, matrix.name)
        np.testing.assert_allclose(found.reconstruct(), factors.reconstruct(), atol=1e-5)


def test_learning_and_packing_from_files_to_files(learned):
    folder, structure = learned
    codes = TensorFile(folder / "codes.safetensors")
    factors, stored = (read_json(folder / f"{name}.json") for name in ("factors", "codes"))
    specs = codes.metadata["matrices"]
    assert specs.keys() == factors["matrices"].keys() == stored["matrices"].keys() and len(specs) == 16
    q = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)]
    assert [specs[name]["plus"][0]["dictionary"]["tensor"] for name in q] == [f"{q[0]}.plus.0.dictionary"] * 4
    n_atoms = specs[q[0]]["plus"][0]["codes"]["n_nonzero"]
    assert factors["matrices"][q[0]]["matrix_atoms"] == n_atoms > 0 and factors["matrices"][q[0]]["group"] == [0, 3]
    # bytes: what is in the file, once
    file_bytes = sum(codes.nbytes(name) for name in codes.names())
    assert sum(m["nbytes"] for m in stored["matrices"].values()) == pytest.approx(file_bytes)
    dense = sum(m["dense_nbytes"] for m in stored["matrices"].values())
    assert 0.68 * dense < file_bytes <= 0.7 * dense
    assert stored["dense_nbytes_all"] == 2 * structure["target_parameters"] > dense
    weights = ModelFolder(folder / "dense")
    for name, spec in specs.items():
        found = unpack({part: codes.read(part) for part in tensor_names(name, spec)}, spec, name)
        left = np.linalg.norm(found.reconstruct() - weights.read_weight(name)) / np.linalg.norm(
            weights.read_weight(name)
        )
        assert left < 0.8 and stored["matrices"][name]["relative_error"] == pytest.approx(
            factors["matrices"][name]["relative_error"], abs=0.01
        )
    assemble(folder / "dense", [folder / "codes.safetensors"], folder / "model", variant={"method": "masa"})
    count = target_bytes(folder / "model")
    assert (count["nbytes"], count["dense_nbytes"]) == (file_bytes, dense)


def test_the_registry_has_the_method_and_says_that_it_learns_the_model_in_one_job():
    assert METHODS["masa"] is masa.METHOD
    assert [name for name, method in METHODS.items() if method.scope == "model"] == ["masa"]
