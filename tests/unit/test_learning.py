"""Learning and quantizing one unit: what the two stages write, from files to files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from cospadi import finished
from cospadi.budget import nbytes_left, sparse_shape
from cospadi.checkpoint import check_codes
from cospadi.errors import ArtifactError, NumericalError
from cospadi.files import BFLOAT16, ModelFolder, TensorFile, read_json, write_json, write_tensors
from cospadi.formats.factorization import tensor_names, unpack
from cospadi.learning import learn_unit
from cospadi.methods import METHODS
from cospadi.problem import matrices_of, shared
from cospadi.profiles import allocate, profile_unit, read_allocation
from cospadi.provenance import fingerprint
from cospadi.quantization import quantize_unit

D, INNER = 32, 48
SHAPES = {"q_proj": (D, D), "k_proj": (D, 16), "gate_proj": (D, INNER), "up_proj": (D, INNER), "down_proj": (INNER, D)}
SITES = [("attn", ["q_proj", "k_proj"]), ("mlp", ["gate_proj", "up_proj"]), ("down", ["down_proj"])]


@pytest.fixture(scope="module")
def unit(tmp_path_factory):
    """A model of two layers with its Grams: folder, structure, Gram files."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    tensors, layers, grams = {}, [], []
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name, (d_in, d_out) in SHAPES.items():
            weight = rng.normal(size=(d_out, d_in)) / np.arange(1, d_in + 1) ** 0.3
            tensors[f"{prefix}.{name}.weight"] = weight.astype(BFLOAT16)
        layers.append(
            {
                "name": f"layer_{layer:02d}",
                "sites": [
                    {
                        "name": site,
                        "matrices": [{"name": f"{prefix}.{name}", "shape": list(SHAPES[name])} for name in names],
                    }
                    for site, names in SITES
                ],
            }
        )
        path = folder / f"gram_{layer}.h5"
        with h5py.File(path, "w") as file:
            for site, names in SITES:
                for key, rows in (("gram", 300), ("gram_heldout", 200)):
                    x = rng.normal(size=(rows, SHAPES[names[0]][0])) * np.linspace(0.2, 2, SHAPES[names[0]][0])
                    file.create_dataset(f"{site}/{key}", data=x.T @ x)
                file[site].attrs["n_heldout"] = 200
        grams.append(path)
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", {})
    model = fingerprint(ModelFolder(folder))
    for layer, path in enumerate(grams):
        with h5py.File(path, "r+") as file:
            file.attrs.update(format_version=1, fingerprint=model, layer=layer, tokens="some")
    return folder, {"fingerprint": model, "layers": layers}, grams


def run(unit, tmp_path, layers, *, warm_factors=None, allotted=None, **variant):
    folder, structure, grams = unit
    variant = {"ratio": 0.3, "codes": {"value_bits": 16, "rounding": "nearest"}, **variant}
    arguments = folder, structure, [grams[layer] for layer in layers]
    learn_unit(
        *arguments,
        layers,
        variant,
        output=tmp_path / "factors.safetensors",
        diagnostics=tmp_path / "factors.json",
        warm_factors=warm_factors,
        allotted=allotted,
        log=lambda line: None,
    )
    quantize_unit(
        *arguments,
        tmp_path / "factors.safetensors",
        layers,
        variant,
        output=tmp_path / "codes.safetensors",
        diagnostics=tmp_path / "codes.json",
        log=lambda line: None,
    )
    return (
        TensorFile(tmp_path / "codes.safetensors"),
        read_json(tmp_path / "factors.json"),
        read_json(tmp_path / "codes.json"),
    )


def read(file, name):
    spec = file.metadata["matrices"][name]
    return unpack({tensor: file.read(tensor) for tensor in tensor_names(name, spec)}, spec, name)


@pytest.mark.parametrize("method", ["cospadi", "svd_llm", "compot"])
def test_one_layer_from_files_to_files(unit, tmp_path, method):
    codes, learned, quantized = run(unit, tmp_path, [1], method=method)
    names = [f"model.layers.1.{name}" for name in SHAPES]
    assert sorted(learned["matrices"]) == sorted(quantized["matrices"]) == sorted(names)
    assert sum(codes.nbytes(tensor) for tensor in codes.names()) == sum(
        m["nbytes"] for m in quantized["matrices"].values()
    )
    for name in names:
        report, stored = learned["matrices"][name], quantized["matrices"][name]
        assert report["shape"] == list(SHAPES[name.rsplit(".", 1)[1]])
        assert stored["nbytes"] <= 0.7 * stored["dense_nbytes"] == 0.7 * 2 * np.prod(report["shape"])
        assert 0 < report["relative_error"] < stored["relative_error"] + 1e-4 < report["relative_error"] + 0.01
        assert report["relative_error_heldout"] > 0
        assert report["shared_with"] == []


def test_integers_with_small_groups_stay_within_the_bytes(unit, tmp_path):
    storage = {"value_bits": 4, "dictionary_bits": 8, "block_size": 16, "rounding": "optimal"}
    codes, learned, quantized = run(unit, tmp_path, [1], method="cospadi", codes=storage, max_iter=5)
    stored = sum(codes.nbytes(tensor) for tensor in codes.names())
    dense = sum(m["dense_nbytes"] for m in quantized["matrices"].values())
    assert 0.63 < stored / dense <= 0.7  # small matrices have coarse steps
    assert max(m["relative_error"] for m in quantized["matrices"].values()) < 0.5
    sixteen = run(unit, tmp_path, [1], method="cospadi", max_iter=5)[1]
    name = "model.layers.1.gate_proj"
    assert learned["matrices"][name]["n_atoms"] > sixteen["matrices"][name]["n_atoms"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cospadi", {"share_within": [["gate_proj", "up_proj"]], "max_iter": 5, "ratio": 0.6}),
        ("basis_sharing", {"ratio": 0.6}),
        ("hybrid", {"atoms": 3, "max_iter": 1, "share_within": [["gate_proj", "up_proj"]], "ratio": 0.65}),
    ],
)
def test_dictionaries_that_are_shared_are_rounded_for_all_who_share_them(unit, tmp_path, method, options):
    errors = {}
    for rounding in ("nearest", "optimal"):
        storage = {"value_bits": 4, "dictionary_bits": 4, "block_size": 16, "rounding": rounding}
        codes, _, quantized = run(unit, tmp_path, [0, 1], method=method, codes=storage, **options)
        errors[rounding] = sum(m["squared_error"] for m in quantized["matrices"].values())
        stored = sum(codes.nbytes(tensor) for tensor in codes.names())
        assert stored <= (1 - options["ratio"]) * sum(m["dense_nbytes"] for m in quantized["matrices"].values())
        pair = [read(codes, f"model.layers.0.{name}").parts[-1].dictionary for name in ("gate_proj", "up_proj")]
        if "share_within" in options:
            np.testing.assert_array_equal(*pair)
    # inputs of single weights do not depend on each other here
    assert errors["optimal"] < (1.0 if method == "hybrid" else 0.9) * errors["nearest"]


def test_error_is_that_of_what_the_file_holds(unit, tmp_path):
    codes, _, quantized = run(unit, tmp_path, [0], method="cospadi", codes={"value_bits": 14, "rounding": "truncate"})
    folder, _, grams = unit
    name = "model.layers.0.q_proj"
    weight = TensorFile(folder / "model.safetensors").read(f"{name}.weight").astype(np.float64).T
    with h5py.File(grams[0]) as file:
        factor = np.linalg.cholesky(file["attn/gram"][()]).T
    difference = weight - read(codes, name).reconstruct()
    expected = np.linalg.norm(factor @ difference) / np.linalg.norm(factor @ weight)
    assert quantized["matrices"][name]["relative_error"] == pytest.approx(expected, rel=1e-6)


def test_same_unit_twice_gives_the_same_bytes(unit, tmp_path):
    digests = []
    for attempt in ("a", "b"):
        run(unit, tmp_path / attempt, [0], method="cospadi")
        digests.append([(tmp_path / attempt / f"{stage}.safetensors").read_bytes() for stage in ("factors", "codes")])
    assert digests[0] == digests[1]


def test_layers_of_a_group_share_what_the_variant_says(unit, tmp_path):
    codes, learned, quantized = run(unit, tmp_path, [0, 1], method="basis_sharing")
    specs = codes.metadata["matrices"]
    first = "model.layers.0.gate_proj.dictionary"
    assert specs["model.layers.1.gate_proj"]["dictionary"]["tensor"] == first
    assert "model.layers.1.gate_proj.dictionary" not in codes
    assert "model.layers.1.down_proj.dictionary" in codes  # down keeps its own
    assert learned["matrices"]["model.layers.1.gate_proj"]["shared_with"] == ["model.layers.0.gate_proj"]
    total = sum(m["nbytes"] for m in quantized["matrices"].values())
    assert total == pytest.approx(sum(codes.nbytes(tensor) for tensor in codes.names()))
    assert total <= 0.7 * sum(m["dense_nbytes"] for m in quantized["matrices"].values())


def test_sharing_inside_a_layer(unit, tmp_path):
    codes, learned, _ = run(unit, tmp_path, [0], method="cospadi", share_within=[["gate_proj", "up_proj"]])
    gate, up = read(codes, "model.layers.0.gate_proj"), read(codes, "model.layers.0.up_proj")
    np.testing.assert_array_equal(gate.dictionary, up.dictionary)
    assert learned["matrices"]["model.layers.0.up_proj"]["shared_with"] == ["model.layers.0.gate_proj"]


def test_problems_of_both_kinds_of_sharing(unit):
    folder, structure, grams = unit
    matrices = list(matrices_of(ModelFolder(folder), structure, [0, 1], grams))
    options = {"share": ["q_proj", "k_proj"], "share_within": [["q_proj", "k_proj"]]}
    problems = [[m.name.removeprefix("model.layers.") for m in problem] for problem in shared(matrices, options)]
    assert problems[0] == ["0.q_proj", "0.k_proj", "1.q_proj", "1.k_proj"]
    assert problems[1:] == [[f"{layer}.{name}"] for layer in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")]


def test_a_broken_weight_stops_the_unit_and_leaves_nothing(unit, tmp_path):
    folder, structure, grams = unit
    tensors = {
        name: TensorFile(folder / "model.safetensors").read(name)
        for name in TensorFile(folder / "model.safetensors").names()
    }
    broken = tensors["model.layers.0.down_proj.weight"].copy()
    broken[2, 3] = np.inf
    model = tmp_path / "broken"
    write_tensors(model / "model.safetensors", {**tensors, "model.layers.0.down_proj.weight": broken})
    write_json(model / "config.json", {})
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.down_proj\.weight holds 1 non-finite"):
        run((model, structure, grams), tmp_path / "out", [0], method="svd_llm")
    assert not (tmp_path / "out").exists()


def test_diagnostics_are_plain_json(unit, tmp_path):
    run(unit, tmp_path, [0], method="cospadi", max_iter=3)
    report = json.loads((tmp_path / "factors.json").read_text())
    assert report["options"]["max_iter"] == 3
    history = report["matrices"]["model.layers.0.q_proj"]["history"]
    errors = [entry["relative_error"] for entry in history]
    assert len(errors) >= 2
    assert errors == sorted(errors, reverse=True)


def total_error(unit, learned, names):
    """Squared error on the calibration data of several matrices together, as a share of their outputs."""
    folder, _, grams = unit
    weights = TensorFile(folder / "model.safetensors")
    lost = kept = 0.0
    for name in names:
        layer = int(name.split(".")[2])
        with h5py.File(grams[layer]) as file:
            gram = file["mlp/gram"][()]
        weight = weights.read(f"{name}.weight").astype(np.float64).T
        output = np.trace(weight.T @ gram @ weight)
        kept += output
        lost += learned["matrices"][name]["relative_error"] ** 2 * output
    return (lost / kept) ** 0.5


def test_a_group_in_everyones_own_metric_fits_better_than_in_the_mean(unit, tmp_path):
    names = [f"model.layers.{layer}.gate_proj" for layer in (0, 1)]
    errors = {}
    for metric in ("mean", "exact"):
        options = {"share": ["gate_proj"], "group_metric": metric, "max_iter": 10}
        codes, learned, _ = run(unit, tmp_path / metric, [0, 1], method="cospadi", **options)
        errors[metric] = total_error(unit, learned, names)
        tensors = [codes.metadata["matrices"][name]["dictionary"]["tensor"] for name in names]
        assert tensors == ["model.layers.0.gate_proj.dictionary"] * 2
    assert errors["exact"] < 0.99 * errors["mean"]
    assert learned["matrices"][names[0]]["history_exact"][-1]["relative_error"] == pytest.approx(
        errors["exact"], rel=1e-3
    )


def test_layers_share_atoms_beside_single_weights_in_everyones_own_metric(unit, tmp_path):
    errors = {}
    for metric in ("mean", "exact"):
        options = {"share": ["gate_proj", "up_proj"], "share_within": [["gate_proj", "up_proj"]], "atoms": 3}
        codes, learned, quantized = run(
            unit, tmp_path / metric, [0, 1], method="hybrid", group_metric=metric, max_iter=1, **options
        )
        names = [f"model.layers.{layer}.{name}_proj" for layer in (0, 1) for name in ("gate", "up")]
        errors[metric] = sum(learned["matrices"][name]["relative_error"] ** 2 for name in names)
        assert sum(quantized["matrices"][name]["nbytes"] for name in names) <= 0.7 * sum(
            quantized["matrices"][name]["dense_nbytes"] for name in names
        )
        parts = [part for name in names for part in codes.metadata["matrices"][name].get("plus", ())]
        assert {part["dictionary"]["tensor"] for part in parts} <= {f"{names[0]}.plus.0.dictionary"}
    assert errors["exact"] < 0.95 * errors["mean"]
    assert "history_exact" in learned["matrices"][names[0]] or not parts


def test_one_input_needs_no_metric_of_its_own(unit, tmp_path):
    results = []
    for metric in ("mean", "exact"):
        options = {"share_within": [["gate_proj", "up_proj"]], "group_metric": metric, "max_iter": 3}
        run(unit, tmp_path / metric, [0], method="cospadi", **options)
        results.append(TensorFile(tmp_path / metric / "factors.safetensors").read("model.layers.0.up_proj.values"))
    np.testing.assert_array_equal(*results)


def test_rho_auto_takes_the_best_of_its_grid(unit, tmp_path):
    _, learned, _ = run(unit, tmp_path, [0], method="cospadi", rho="auto", max_iter=8)
    for report in learned["matrices"].values():
        searched = {float(rho): error for rho, error in report["rho_search"].items()}
        best = min(searched, key=searched.__getitem__)
        assert len(searched) >= 3
        assert (
            report["n_atoms"]
            == sparse_shape(*report["shape"], nbytes=nbytes_left([report["shape"]], 0.3), rho=best).n_atoms
        )
        assert report["history"][-1]["relative_error"] == pytest.approx(searched[best], rel=1e-6)
    compot = run(unit, tmp_path, [0], method="compot", rho="auto", max_iter=3)[1]["matrices"]
    assert all(report["n_atoms"] <= min(report["shape"]) for report in compot.values())


@pytest.mark.parametrize("method", ["cospadi", "compot"])
def test_two_of_four_from_learning_to_file(unit, tmp_path, method):
    codes, learned, quantized = run(unit, tmp_path, [0], method=method, support="2:4")
    for name, spec in codes.metadata["matrices"].items():
        assert spec["codes"]["support"] == "2:4"
        mask = read(codes, name).codes != 0
        assert (mask.reshape(-1, 4, mask.shape[1]).sum(1) <= 2).all()
        assert quantized["matrices"][name]["nbytes"] <= 0.7 * quantized["matrices"][name]["dense_nbytes"]
        assert quantized["matrices"][name]["relative_error"] < learned["matrices"][name]["relative_error"] + 0.01


def test_a_warm_start_begins_where_the_other_variant_ended(unit, tmp_path):
    _, first, _ = run(unit, tmp_path / "first", [0], method="cospadi")
    start = tmp_path / "first" / "factors.safetensors"
    _, again, _ = run(
        unit, tmp_path / "again", [0], method="cospadi", warm_factors=start, warm_start="first", max_iter=1
    )
    for name, report in again["matrices"].items():
        end = first["matrices"][name]["history"][-1]["relative_error"]
        assert report["history"][0]["relative_error"] == pytest.approx(end, rel=0.01)
    with pytest.raises(ArtifactError, match=r"is of layers \[0\]; expected is layers \[1\]"):
        run(unit, tmp_path / "more", [1], method="cospadi", warm_factors=start, warm_start="first")


def test_a_layer_keeps_to_its_seconds(unit, tmp_path):
    # a million rounds would take half an hour
    _, learned, _ = run(unit, tmp_path, [0], method="cospadi", max_iter=1_000_000, tol=0, max_seconds=0.5)
    assert 0.4 < learned["seconds"] < 20
    assert all(len(report["history"]) < 100_000 for report in learned["matrices"].values())


def changed_model(unit, folder, **weights):
    """The model with other weights: the unit, with the last part of the names as keywords."""
    model, structure, grams = unit
    file = TensorFile(model / "model.safetensors")
    tensors = {name: file.read(name) for name in file.names()}
    for name, change in weights.items():
        key = f"model.layers.0.{name}.weight"
        tensors[key] = change(tensors[key].copy())
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", {})
    return folder, structure, grams


@pytest.mark.parametrize("sharing", [{}, {"share_within": [["gate_proj", "up_proj"]]}])
@pytest.mark.parametrize("method", ["cospadi", "svd_llm"])
def test_a_matrix_without_outputs_stays_as_it_is(unit, tmp_path, method, sharing):
    changed = changed_model(unit, tmp_path / "model", gate_proj=lambda weight: weight * 0)
    (tmp_path / "grams.h5").write_bytes(unit[2][0].read_bytes())
    with h5py.File(tmp_path / "grams.h5", "r+") as file:
        file["down/gram"][...] = 0  # an up or gate projection that is zero leaves no inputs
    changed = (*changed[:2], [tmp_path / "grams.h5"])
    codes, learned, quantized = run(changed, tmp_path, [0], method=method, **sharing)
    gate, down = "model.layers.0.gate_proj", "model.layers.0.down_proj"
    assert learned["kept_dense"] == quantized["kept_dense"] == codes.metadata["kept_dense"]
    assert learned["kept_dense"] == {
        gate: "its weight is zero throughout",
        down: "its outputs are zero for all inputs of the calibration data (down)",
    }
    rest = {f"model.layers.0.{name}" for name in SHAPES} - {gate, down}
    assert codes.metadata["matrices"].keys() == learned["matrices"].keys() == quantized["matrices"].keys() == rest
    # the others are as if it were not there
    alone = run(unit, tmp_path / "alone", [0], method=method)[0]
    np.testing.assert_array_equal(
        read(codes, "model.layers.0.up_proj").reconstruct(), read(alone, "model.layers.0.up_proj").reconstruct()
    )


def test_a_table_of_bytes_knows_nothing_of_matrices_without_outputs(unit, tmp_path):
    """What is left of a group gets its part of the group's bytes."""
    changed = changed_model(unit, tmp_path / "model", gate_proj=lambda weight: weight * 0)
    gate, up, down = (f"model.layers.0.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    sizes = {f"model.layers.0.{name}": 500 for name in ("q_proj", "k_proj")} | {f"{gate} + {up}": 3001, down: "dense"}
    (tmp_path / "table.tsv").write_text(
        "".join(f"{key}\t{value}\n" for key, value in {"matrices": "bytes", **sizes}.items())
    )
    variant = {"method": "svd_llm", "ratio": 0.3, "codes": {"value_bits": 16, "rounding": "nearest"}}
    variant |= {
        "share_within": [["gate_proj", "up_proj"]],
        "allocation": "file",
        "allocation_file": str(tmp_path / "table.tsv"),
    }
    allocate([], changed[1], UNITS, variant, tmp_path / "given.json", **table_in(tmp_path))
    allotted = read_allocation(tmp_path / "given.json", changed[1], variant)
    _, learned, quantized = run(changed, tmp_path, [0], allotted=allotted, **variant)
    assert learned["kept_dense"].keys() == {gate}
    assert 1500 - 2 * (D + INNER) < quantized["matrices"][up]["nbytes"] <= 1500


@pytest.mark.parametrize("options", [{}, {"share": ["q_proj"], "group_metric": "exact"}, {"share": ["gate_proj"]}])
def test_weights_and_grams_are_read_once_a_job(unit, tmp_path, monkeypatch, options):
    from cospadi import problem

    found = []
    plain_gram, plain_weight = problem.read_gram, ModelFolder.read_weight

    def read_gram(path, site, *, heldout=False):
        found.append((path.name, site, heldout))
        return plain_gram(path, site, heldout=heldout)

    monkeypatch.setattr(problem, "read_gram", read_gram)
    monkeypatch.setattr(ModelFolder, "read_weight", lambda self, name: found.append(name) or plain_weight(self, name))
    run(unit, tmp_path, [0, 1], method="cospadi", max_iter=2, group_size=2, **options)
    sites = [(f"gram_{layer}.h5", site, heldout) for layer in (0, 1) for site, _ in SITES for heldout in (True, False)]
    weights = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in SHAPES]
    # learning reads both kinds of Grams, packing one of them
    packed = [site for site in sites if not site[2]]
    assert sorted(map(str, found)) == sorted(map(str, [*sites, *packed, *weights, *weights]))


def test_data_free_learning_factors_no_gram(unit, tmp_path, monkeypatch):
    from cospadi import problem

    monkeypatch.setattr(problem, "whitening_factor", None)
    _, learned, _ = run(unit, tmp_path, [0], method="svd_llm", whiten=False)
    name = "model.layers.0.q_proj"
    weight = TensorFile(unit[0] / "model.safetensors").read(f"{name}.weight").astype(np.float64)
    values = np.linalg.svd(weight, compute_uv=False)
    rank = learned["matrices"][name]["n_atoms"]
    left = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    assert learned["matrices"][name]["history"][-1]["relative_error"] == pytest.approx(left, rel=1e-4)


def test_squared_errors_add_up_to_the_relative_one(unit, tmp_path):
    _, learned, quantized = run(unit, tmp_path, [0], method="svd_llm")
    for name, report in learned["matrices"].items():
        weight = ModelFolder(unit[0]).read_weight(name).astype(np.float64)
        with h5py.File(unit[2][0]) as file:
            gram = file[f"{report['site']}/gram"][()]
        assert report["squared_norm"] == pytest.approx(np.trace(weight.T @ gram @ weight))
        for stage in (report, quantized["matrices"][name]):
            assert stage["relative_error"] == pytest.approx((stage["squared_error"] / report["squared_norm"]) ** 0.5)


def test_what_belongs_elsewhere_is_refused(unit, tmp_path):
    """Another layer's Gram or factors, another model's, other settings, a future version, a matrix too few."""
    variant = {"method": "svd_llm", "ratio": 0.3, "codes": {"value_bits": 16, "rounding": "nearest"}}
    run(unit, tmp_path, [0], **variant)
    folder, structure, grams = unit
    mine = tmp_path / "factors.safetensors"
    output, diagnostics = tmp_path / "other.safetensors", tmp_path / "other.json"
    arguments = folder, structure, [grams[0]], [0]

    def learn(gram: Path, structure: dict = structure) -> None:
        learn_unit(folder, structure, [gram], [0], variant, output=output, diagnostics=diagnostics)

    def quantize(factors: Path, layer: int = 0, **changes) -> None:
        changed = {**variant, **changes}
        grams_of = [grams[layer]]
        quantize_unit(folder, structure, grams_of, factors, [layer], changed, output=output, diagnostics=diagnostics)

    def edited(path: Path, edit: Callable[[dict], None]) -> Path:
        file = TensorFile(path)
        metadata = json.loads(json.dumps(file.metadata))
        edit(metadata)
        write_tensors(tmp_path / "edited.safetensors", {name: file.read(name) for name in file.names()}, metadata)
        return tmp_path / "edited.safetensors"

    with pytest.raises(ArtifactError, match=r"gram_1\.h5.*is of layer 1; expected is layer 0"):
        learn(grams[1])
    with pytest.raises(ArtifactError, match=r"is of fingerprint .*; expected is fingerprint another"):
        learn(grams[0], {**structure, "fingerprint": "another"})
    shutil.copy(grams[0], tmp_path / "future.h5")
    with h5py.File(tmp_path / "future.h5", "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(ArtifactError, match="format_version 99; expected is format_version 1"):
        learn(tmp_path / "future.h5")
    shutil.copy(grams[1], tmp_path / "other_tokens.h5")
    with h5py.File(tmp_path / "other_tokens.h5", "r+") as file:
        file.attrs["tokens"] = "others"
    with pytest.raises(ArtifactError, match="is of tokens others; expected is tokens some"):
        both = [grams[0], tmp_path / "other_tokens.h5"]
        learn_unit(folder, structure, both, [0, 1], variant, output=output, diagnostics=diagnostics)
    # all of them of other calibration windows, which the run's windows alone can tell
    calibration = {"tokens": "of this run"}
    with pytest.raises(ArtifactError, match=r"gram_0\.h5.*is of tokens some; expected is tokens of this run"):
        learn_unit(*arguments, variant, calibration=calibration, output=output, diagnostics=diagnostics)
    with pytest.raises(ArtifactError, match=r"factors\.safetensors: is of tokens some; expected is tokens of this run"):
        files = {"output": output, "diagnostics": diagnostics}
        quantize_unit(*arguments[:3], mine, [0], variant, calibration=calibration, **files)
    with pytest.raises(ArtifactError, match=r"factors\.safetensors: is of layers \[0\]; expected is layers \[1\]"):
        learn_unit(
            folder, structure, [grams[1]], [1], variant, warm_factors=mine, output=output, diagnostics=diagnostics
        )
    with pytest.raises(ArtifactError, match=r"factors\.safetensors: is of tokens some; expected is tokens others"):
        grams_of_others = [shutil.copy(grams[0], tmp_path / "others_0.h5")]
        with h5py.File(grams_of_others[0], "r+") as file:
            file.attrs["tokens"] = "others"
        arguments = folder, structure, grams_of_others, [0]
        learn_unit(*arguments, variant, warm_factors=mine, output=output, diagnostics=diagnostics)
    with pytest.raises(ArtifactError, match=r"others_0\.h5: is of tokens others; expected is tokens some"):
        quantize_unit(*arguments[:3], mine, [0], variant, output=output, diagnostics=diagnostics)
    with pytest.raises(ArtifactError, match=r"is of layers \[0\]; expected is layers \[1\]"):
        quantize(mine, layer=1)
    with pytest.raises(ArtifactError, match="is of settings"):
        quantize(mine, ratio=0.2)
    with pytest.raises(ArtifactError, match="format_version 99"):
        quantize(edited(mine, lambda metadata: metadata.update(format_version=99)))
    with pytest.raises(ArtifactError, match=r"has no factors of model\.layers\.0\.down_proj"):
        quantize(edited(mine, lambda metadata: metadata["matrices"].pop("model.layers.0.down_proj")))
    assert not output.exists() and not diagnostics.exists()
    # how values are rounded is decided after learning
    quantize(mine, codes={"value_bits": 16, "rounding": "truncate"})
    assert output.exists()


def test_codes_of_a_variant_are_complete_and_of_this_model(unit, tmp_path):
    folder = unit[0]
    variant = {"method": "svd_llm", "codes": {"value_bits": 16, "rounding": "nearest"}}
    files = []
    for layer in (0, 1):
        run(unit, tmp_path / str(layer), [layer], **variant)
        files.append(tmp_path / str(layer) / "codes.safetensors")
    check_codes(folder, files, None)
    with pytest.raises(ArtifactError, match=r"no file has the codes of model\.layers\.1\..* and \d more"):
        check_codes(folder, files[:1], None)
    run(unit, tmp_path / "other", [1], **variant, ratio=0.5)
    with pytest.raises(ArtifactError, match="is of settings"):
        check_codes(folder, [files[0], tmp_path / "other" / "codes.safetensors"], None)
    with pytest.raises(ArtifactError, match="is of tokens some; expected is tokens of this run"):
        check_codes(folder, files, None, {"tokens": "of this run"})
    with h5py.File(unit[2][1], "r+") as file:
        file.attrs["tokens"] = "others"
    try:
        run(unit, tmp_path / "other", [1], **variant)
    finally:
        with h5py.File(unit[2][1], "r+") as file:
            file.attrs["tokens"] = "some"
    with pytest.raises(ArtifactError, match="is of tokens others; expected is tokens some"):
        check_codes(folder, [files[0], tmp_path / "other" / "codes.safetensors"], None)
    another = tmp_path / "another"
    shutil.copytree(folder, another)
    write_json(another / "config.json", {"vocab_size": 7})
    with pytest.raises(ArtifactError, match="is of fingerprint"):
        check_codes(another, files, None)


UNITS = {"layer_00": [0], "layer_01": [1]}


def table_in(folder):
    return {"table": folder / "allocation.tsv", "log": lambda line: None}


def parted(unit, folder, **settings):
    """A variant, the profiles of both layers and the allocation, from files to files."""
    model, structure, grams = unit
    variant = {
        **METHODS[settings["method"]].defaults(),
        "codes": {"value_bits": 16, "rounding": "nearest"},
        "ratio": 0.3,
        **settings,
    }
    for layer in (0, 1):
        output = folder / f"{layer}.json"
        profile_unit(model, structure, [grams[layer]], [layer], variant, output, log=lambda line: None)
    profiles = [folder / "0.json", folder / "1.json"]
    allocate(profiles, structure, UNITS, variant, folder / "allocation.json", **table_in(folder))
    return variant, profiles, folder / "allocation.json"


PARTING = {"svd_llm_v2": {}, "rocket": {}, "compot": {"allocation": "spectra"}}


@pytest.mark.parametrize("method", PARTING)
def test_a_unit_is_learned_at_the_bytes_that_the_allocation_gives(unit, tmp_path, method):
    variant, _, path = parted(unit, tmp_path, method=method, **PARTING[method])
    allotted = read_allocation(path, unit[1], variant)
    assert len(allotted) == 2 * len(SHAPES)
    assert sum(allotted.values()) <= nbytes_left([*SHAPES.values()] * 2, 0.3)
    _, learned, quantized = run(unit, tmp_path, [1], allotted=allotted, **variant)
    for name, report in quantized["matrices"].items():
        # one more atom with a code a column does not fit
        d_in, d_out = learned["matrices"][name]["shape"]
        assert allotted[(name,)] - 2 * (d_in + d_out) - 2 * d_out < report["nbytes"] <= allotted[(name,)]


def test_what_the_allocation_leaves_as_it_is_is_exact_and_counted(unit, tmp_path):
    variant, _, path = parted(unit, tmp_path, method="rocket", candidate_ratios=[0.5])
    allotted = read_allocation(path, unit[1], variant)
    name = "model.layers.1.k_proj"
    codes, learned, quantized = run(unit, tmp_path, [1], allotted={**allotted, (name,): None}, **variant)
    np.testing.assert_array_equal(read(codes, name).reconstruct(), ModelFolder(unit[0]).read_weight(name))
    assert quantized["matrices"][name]["nbytes"] == 2 * D * 16 and not quantized["kept_dense"]
    assert learned["matrices"][name]["relative_error"] == 0
    # another variant that starts from these factors starts this matrix anew
    arguments = {"method": "cospadi", "max_iter": 2, "warm_start": "other"}
    (tmp_path / "factors.safetensors").rename(tmp_path / "other.safetensors")
    warm = run(unit, tmp_path, [1], warm_factors=tmp_path / "other.safetensors", **arguments)[1]["matrices"]
    cold = run(unit, tmp_path, [1], method="cospadi", max_iter=2)[1]["matrices"]
    same = {matrix for matrix in warm if warm[matrix]["squared_error"] == cold[matrix]["squared_error"]}
    assert same == {name}
    del allotted[(name,)]
    with pytest.raises(ArtifactError, match=f"has no bytes for {name}"):
        run(unit, tmp_path, [1], allotted=allotted, **variant)


def test_profiles_and_allocations_of_something_else_are_refused(unit, tmp_path):
    variant, profiles, path = parted(unit, tmp_path, method="svd_llm_v2")
    with pytest.raises(ArtifactError, match="is of settings"):
        read_allocation(path, unit[1], {**variant, "ratio": 0.4})
    with pytest.raises(ArtifactError, match="is of layers"):
        allocate(profiles[::-1], unit[1], UNITS, variant, path, **table_in(tmp_path))
    with pytest.raises(ArtifactError, match="is of settings"):
        allocate(profiles, unit[1], UNITS, {**variant, "eta": 0.1}, path, **table_in(tmp_path))
    for wrong in (-5, 2.5, "many"):
        content = read_json(path)
        content["problems"][0]["nbytes"] = wrong
        write_json(tmp_path / "wrong.json", content)
        with pytest.raises(ArtifactError, match=f"gives {wrong} bytes to model.layers.0.q_proj"):
            read_allocation(tmp_path / "wrong.json", unit[1], variant)


def relative_errors(lines):
    return [line for line in lines if "relative error" in line]


def stopping_after(count, lines):
    """A log of `lines` that stops the job after `count` matrices."""

    def log(line):
        lines.append(line)
        if len(relative_errors(lines)) == count:
            raise KeyboardInterrupt

    return log


@pytest.mark.parametrize(
    "variant", [{"method": "cospadi", "share_within": [["q_proj", "k_proj"]]}, {"method": "ectcq"}]
)
def test_an_interrupted_unit_goes_on_behind_the_matrices_it_had(unit, tmp_path, monkeypatch, variant):
    folder, structure, grams = unit
    monkeypatch.setattr(finished, "SAVE_SECONDS", 0)
    variant = {"ratio": 0.3, "codes": {"value_bits": 16, "rounding": "nearest"}, **variant}
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def learn(place, log, code="one"):
        given = {"output": place / "unit.safetensors", "diagnostics": place / "unit.json", "code": code, "log": log}
        learn_unit(folder, structure, grams, [0, 1], variant, **given)

    def pack(place, log, code="one"):
        given = {"output": place / "codes.safetensors", "diagnostics": place / "codes.json", "code": code, "log": log}
        quantize_unit(folder, structure, grams, whole / "unit.safetensors", [0, 1], variant, **given)

    for job, name in ((learn, "unit"), (pack, "codes")):
        job(whole, lambda line: None)
        lines = []
        with pytest.raises(KeyboardInterrupt):
            job(cut, stopping_after(5, lines))
        assert not (cut / f"{name}.safetensors").exists() and (cut / f".{name}.safetensors.finished").is_dir()
        lines = []
        job(cut, lines.append)
        # the fifth is k_proj's neighbour or not yet saved: what was complete is not done again
        assert 4 <= len(relative_errors(lines)) <= 6, lines
        assert (cut / f"{name}.safetensors").read_bytes() == (whole / f"{name}.safetensors").read_bytes()
        assert not list(cut.glob(".*"))
        were, are = (read_json(place / f"{name}.json")["matrices"] for place in (whole, cut))
        for report in (*were.values(), *are.values()):
            report.pop("seconds", None)
            report.pop("history", None)
        assert are == were and list(are) == list(were)


def test_nothing_is_taken_from_a_job_of_other_code_data_or_bytes(unit, tmp_path, monkeypatch):
    folder, structure, grams = unit
    monkeypatch.setattr(finished, "SAVE_SECONDS", 0)
    grams = [Path(shutil.copy(path, tmp_path)) for path in grams]
    variant = {"method": "sparsegpt", "ratio": 0.3, "codes": {"value_bits": 16, "rounding": "nearest"}}

    def learn(log, code="one"):
        output, diagnostics = tmp_path / "unit.safetensors", tmp_path / "unit.json"
        learn_unit(
            folder, structure, grams, [0, 1], variant, output=output, diagnostics=diagnostics, code=code, log=log
        )

    def interrupted():
        with pytest.raises(KeyboardInterrupt):
            learn(stopping_after(6, []))
        return sorted((tmp_path / ".unit.safetensors.finished").iterdir())

    def left(**given):
        lines = []
        learn(lines.append, **given)
        return len(relative_errors(lines))

    interrupted()
    assert left() == 4
    interrupted()
    assert left(code="two") == 10
    interrupted()
    grams[1].touch()
    assert left() == 10
    files = interrupted()
    files[2].write_bytes(files[2].read_bytes()[:-1])  # those before it are good
    assert left() == 8
    interrupted()
    variant["ratio"] = 0.4
    assert left() == 10


def test_an_interrupted_profile_goes_on_behind_the_problems_it_had(unit, tmp_path, monkeypatch):
    model, structure, grams = unit
    monkeypatch.setattr(finished, "SAVE_SECONDS", 0)
    variant = {**METHODS["rocket"].defaults(), "method": "rocket", "codes": {"value_bits": 16, "rounding": "nearest"}}
    variant["ratio"] = 0.3

    def measured(name, log):
        profile_unit(model, structure, grams, [0, 1], variant, tmp_path / name, log=log)
        return (tmp_path / name).read_bytes()

    lines = []

    def stopping(line):
        lines.append(line)
        if len(lines) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured("cut.json", stopping)
    late = []
    cut = measured("cut.json", late.append)
    assert cut == measured("whole.json", lambda line: None)
    # the last line came before its problem was kept
    assert len(late) == 10 - 3 and not set(late) & set(lines[:3])
