"""Gradients, chunk by chunk in reverse: against autograd through the whole model, and the metric made of them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from cospadi.budget import low_rank, nbytes_left
from cospadi.calibration import windows
from cospadi.calibration.alone import Alone
from cospadi.calibration.collect import collect
from cospadi.calibration.gradients import collect_gradients, sampling_draws
from cospadi.calibration.head import measure_head
from cospadi.calibration.moments import read_head_moments
from cospadi.calibration.walk import read_windows
from cospadi.errors import ArtifactError
from cospadi.files import BFLOAT16, ModelFolder, TensorFile, read_json, write_json
from cospadi.formats.factorization import tensor_names, unpack
from cospadi.formats.values import storage_of
from cospadi.learning import learn_unit
from cospadi.methods import METHODS
from cospadi.profiles import allocate, profile_unit, read_allocation
from cospadi.quantization import quantize_unit
from cospadi.structure import inspect_model

SAMPLES, LENGTH, BATCH = 6, 24, 2
CHUNKS = {"one": [range(4)], "three": [range(1), range(1, 3), range(3, 4)]}


def write_windows(path: Path, seed: int = 42) -> Path:
    draw = np.random.default_rng(0)
    mask = np.ones((SAMPLES, LENGTH), np.uint8)
    mask[1, 15:] = 0
    mask[4, :5] = 0  # pads on the left
    windows.write_windows(path, draw.integers(0, 390, (SAMPLES, LENGTH), np.int32), mask, seed=seed)
    return path


def backward(model: Path, folder: Path, chunks: list[range], *, seed: int = 42, **changes) -> SimpleNamespace:
    """Both passes over a model, chunk by chunk: forward for the hidden states, then back."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = SimpleNamespace(windows=write_windows(folder / "calibration.h5", seed), folder=folder, model=model)
    paths.structure = inspect_model(model)
    common = {"batch_tokens": BATCH * LENGTH, "dtype": "float32", "log": lambda line: None, **changes}

    def named(kind: str, chunk: range) -> Path:
        return folder / f"{kind}_{chunk.start}.h5"

    for before, chunk in zip([None, *chunks], chunks, strict=False):
        collect(
            model,
            paths.structure,
            paths.windows,
            chunk,
            hidden_in=before and named("hidden", before),
            rows_out=named("rows", chunk),
            hidden_out=named("hidden", chunk),
            mode="stream",
            **common,
        )
    for index in reversed(range(len(chunks))):
        chunk = chunks[index]
        behind = chunks[index + 1] if index + 1 < len(chunks) else None
        collect_gradients(
            model,
            paths.structure,
            paths.windows,
            chunk,
            hidden_in=named("hidden", chunks[index - 1]) if index else None,
            gradient_in=behind and named("gradient", behind),
            moments_out=named("moments", chunk),
            gradient_out=named("gradient", chunk),
            **common,
        )
    paths.moments = [named("moments", chunk) for chunk in chunks]
    return paths


def moments_of(paths: SimpleNamespace) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for path in paths.moments:
        with h5py.File(path) as file:
            for layer in file.values():
                for key in layer:
                    found[key] = {name: array[:] for name, array in layer[key].items()} | dict(layer[key].attrs)
    return found


def of_whole_model(paths: SimpleNamespace) -> dict[str, dict[str, np.ndarray]]:
    """The same by one backward pass through the whole model, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    read = read_windows(paths.windows, paths.structure["vocab_size"])
    ids, mask = torch.from_numpy(read.input_ids), torch.from_numpy(read.attention_mask)
    model = AutoModelForCausalLM.from_pretrained(paths.model, dtype=torch.float64).eval()
    names = [m["name"] for layer in paths.structure["layers"] for s in layer["sites"] for m in s["matrices"]]
    seen = {}
    for name in names:

        def hook(module, inputs, output, name=name):
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        model.get_submodule(name).register_forward_hook(hook)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    reached = logits.detach().softmax(-1).cumsum(-1)
    labels = (reached < torch.from_numpy(sampling_draws(read))[..., None]).sum(-1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    (losses * mask.flatten()).sum().backward()
    found = {}
    for name, (rows, output) in seen.items():
        rows, gradients = rows[mask.bool()].numpy(), output.grad[mask.bool()].numpy()
        gram = (rows * np.square(gradients).sum(1, keepdims=True)).T @ rows
        tokens = np.square(gradients).sum(1)
        found[name] = {
            "gram": gram,
            "squares": np.square(gradients).sum(0),
            "n_tokens": len(rows),
            "token_weights": tokens,
        }
    return found


@pytest.mark.parametrize("chunks", list(CHUNKS))
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_chunk_by_chunk_is_autograd_of_the_whole_model(tiny_model, tmp_path, family, chunks):
    paths = backward(tiny_model(family, dtype="float32"), tmp_path / chunks, CHUNKS[chunks])
    found, expected = moments_of(paths), of_whole_model(paths)
    assert found.keys() == expected.keys() and len(found) == 4 * 7
    for name, one in found.items():
        assert one["n_tokens"] == expected[name]["n_tokens"] == SAMPLES * LENGTH - 9 - 5
        for key in ("gram", "squares", "token_weights"):
            # float32 rounds at 1e-7; some fifty operations in a row, and squares, are within a thousand of that
            np.testing.assert_allclose(one[key], expected[name][key], rtol=1e-4, atol=1e-4 * expected[name][key].max())


@pytest.mark.parametrize("heldout", [0.0, 0.4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_what_the_head_s_errors_cost_is_what_the_whole_model_predicts(tiny_model, tmp_path, family, heldout):
    import torch
    from transformers import AutoModelForCausalLM

    paths = backward(tiny_model(family, dtype="float32"), tmp_path, CHUNKS["three"], heldout_fraction=heldout)
    how = {"batch_tokens": BATCH * LENGTH, "heldout_fraction": heldout, "log": lambda line: None}
    measure_head(
        paths.model,
        paths.structure,
        paths.windows,
        hidden_in=tmp_path / "hidden_3.h5",
        output=tmp_path / "head.h5",
        **how,
    )
    read = read_windows(paths.windows, paths.structure["vocab_size"])
    kept = slice(0, SAMPLES - round(heldout * SAMPLES))
    ids, mask = torch.from_numpy(read.input_ids[kept]), torch.from_numpy(read.attention_mask[kept])
    model, entering = AutoModelForCausalLM.from_pretrained(paths.model, dtype=torch.float64).eval(), []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        p = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.softmax(-1)[mask.bool()]
    rows, slopes = entering[0][mask.bool()], p * (1 - p)
    belongs = {"fingerprint": paths.structure["fingerprint"], "tokens": read.tokens}
    found = read_head_moments(tmp_path / "head.h5", belongs)
    n = len(rows)
    assert n == {0.0: SAMPLES * LENGTH - 9 - 5, 0.4: 4 * LENGTH - 9}[heldout]
    expected = {
        "gram": (rows * slopes.sum(-1, keepdim=True)).T @ rows / n,
        "squares": slopes.sum(0) / n,
        "counts": torch.bincount(ids[mask.bool()], minlength=p.shape[1]).double() / n,
    }
    for name, one in expected.items():
        whole = one.numpy()
        np.testing.assert_allclose(getattr(found, name), whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """Gradients and Grams of a model of four layers, the last window held out."""
    from cospadi.gram import compute_gram

    folder = tmp_path_factory.mktemp("made")
    paths = backward(tiny_model("llama", dtype="float32"), folder, [range(0, 2), range(2, 4)], heldout_fraction=0.1)
    paths.grams = [folder / f"gram_{layer}.h5" for layer in range(4)]
    for layer, path in enumerate(paths.grams):
        rows = folder / f"rows_{layer // 2 * 2}.h5"
        compute_gram(rows, layer, path, structure=paths.structure, heldout_fraction=0.1)
    paths.gradients = [paths.moments[layer // 2] for layer in range(4)]
    return paths


def settings(method: str, **options) -> dict:
    plain = {"metric": "gradients", "column_power": 0.5, "activation_share": 0.0, "allocation": "uniform"}
    return {"method": method, "ratio": 0.4, "codes": {"value_bits": 16, "rounding": "nearest"}, **plain, **options}


def learned(made: SimpleNamespace, folder: Path, variant: dict, layers: list[int], **options) -> tuple[dict, dict]:
    """Both stages of a unit: what their diagnostics say."""
    arguments = made.structure, [made.grams[layer] for layer in layers]
    files = {"gradient_files": [made.gradients[layer] for layer in layers], "log": lambda line: None}
    factors, diagnostics = folder / "factors.safetensors", folder / "factors.json"
    drift = None
    if METHODS[variant["method"]].scope == "model":
        drift = folder / "drift.json"
        belongs = {"format_version": 1, "fingerprint": made.structure["fingerprint"]}
        tokens = read_windows(made.windows, made.structure["vocab_size"]).tokens
        write_json(drift, {**belongs, "tokens": tokens, "drift": [1.0] * 4})
    learn_unit(
        made.model,
        *arguments,
        layers,
        variant,
        output=factors,
        diagnostics=diagnostics,
        drift=drift,
        **options,
        **files,
    )
    quantize_unit(
        made.model,
        *arguments,
        factors,
        layers,
        variant,
        output=folder / "codes.safetensors",
        diagnostics=folder / "codes.json",
        **files,
    )
    return read_json(diagnostics), read_json(folder / "codes.json")


# of 4 bits a value a matrix as it is takes less than the ratio leaves, and errs
OF_MENUS = [(name, 16) for name, one in METHODS.items() if one.scope == "problem"] + [("sparsegpt", 4), ("rtn", 4)]


@pytest.mark.parametrize(("method", "bits"), OF_MENUS)
def test_a_menu_gives_every_problem_its_bytes_and_says_what_comes_of_it(made, tmp_path, method, bits):
    few = {"max_iter": 2} if "max_iter" in METHODS[method].options else {}
    sharing = {"group_size": 1, "share": []} if "share" in METHODS[method].options else {}
    variant = settings(method, **METHODS[method].defaults() | few | sharing)
    variant |= {"allocation": "menu", "menu": [0.3, 0.6, 0.8, 1.0, 1.2] if bits < 16 else [0.6, 0.8, 1.0, 1.2]}
    variant["codes"] = {**variant["codes"], "value_bits": bits, "block_size": 16}
    files, lines = {"gradient_files": [made.gradients[1]], "log": lambda line: None}, []
    profile_unit(made.model, made.structure, [made.grams[1]], [1], variant, tmp_path / "profile.json", **files)
    units = {"layer_01": [1]}
    output, table = tmp_path / "allocation.json", tmp_path / "allocation.tsv"
    allocate([tmp_path / "profile.json"], made.structure, units, variant, output, table=table, log=lines.append)
    with open(table) as file:
        rows = {row["matrices"]: row for row in csv.DictReader(file, delimiter="\t")}
    measured = {
        " + ".join(one["matrices"]): one["figures"]["points"]
        for one in read_json(tmp_path / "profile.json")["problems"]
    }
    assert rows.keys() == measured.keys()
    allotted = read_allocation(output, made.structure, variant)
    found = learned(made, tmp_path, variant, [1], allotted=allotted)[1]["matrices"]
    best = uniform = n_as_is = 0
    for (*names,), nbytes in allotted.items():
        row, points = rows[" + ".join(names)], measured[" + ".join(names)]
        dense = sum(found[name]["dense_nbytes"] for name in names)
        rise = sum(found[name]["predicted_rise"] for name in names)
        # what the profile saw is what is learned; as they are, too, in the codec of the values
        assert rise == pytest.approx(float(row["predicted_rise"]), rel=1e-5)
        assert nbytes is not None or bits < 16 or rise < 1e-2 * max(rise for _, rise in points)
        assert sum(found[name]["nbytes"] for name in names) <= (nbytes or dense)
        n_as_is += nbytes is None
        assert row["bytes"] == ("dense" if nbytes is None else str(nbytes))
        assert nbytes is None or [nbytes, float(row["predicted_rise"])] == pytest.approx(
            min(points, key=lambda point: abs(point[0] - nbytes)),
            rel=1e-5,  # six digits
        )
        best += float(row["predicted_rise"])
        uniform += min(rise for size, rise in points if size <= 0.6 * dense)
    assert sum(found[name]["nbytes"] for name in found) <= 0.6 * sum(one["dense_nbytes"] for one in found.values())
    assert best <= uniform * (1 + 1e-5)
    assert n_as_is or bits == 16
    assert any(line.startswith(f"predicted rise {best:.4g} nats a token; with the same ratio") for line in lines)


def test_the_sizes_of_a_menu_share_the_seconds_of_a_layer(made, tmp_path, monkeypatch):
    method, seconds = METHODS["cospadi"], []

    def fit(*problem, max_seconds, **options):
        seconds.append(max_seconds)
        return method.fit(*problem, max_seconds=max_seconds, **options)

    monkeypatch.setitem(METHODS, "cospadi", replace(method, fit=fit))
    endless = {"max_iter": 10**6, "tol": 0, "max_seconds": 0.7}
    variant = settings("cospadi", **method.defaults() | endless | {"allocation": "menu", "menu": [0.7, 1.0]})
    files, profile = {"gradient_files": [made.gradients[1]], "log": lambda line: None}, tmp_path / "profile.json"
    profile_unit(made.model, made.structure, [made.grams[1]], [1], variant, profile, **files)
    assert len(seconds) == 2 * 7 and sum(seconds) == pytest.approx(0.7)
    tables = {"output": tmp_path / "allocation.json", "table": tmp_path / "allocation.tsv"}
    allocate([profile], made.structure, {"layer_01": [1]}, variant, **tables, log=lambda line: None)
    allotted = read_allocation(tables["output"], made.structure, variant)
    found = learned(made, tmp_path, variant, [1], allotted=allotted)[0]["matrices"]
    # a million rounds would take half an hour
    assert len(found) == 7 and all(len(one.get("history", ())) < 100_000 for one in found.values())


@pytest.mark.parametrize(
    ("asked", "kept_out", "count", "told"),
    [
        (1, 0.34, 1, ""),
        (4, 0.34, 2, ", all that are kept out; measured_windows asks for 4"),
        (9, 0.0, SAMPLES, ", all that are there; measured_windows asks for 9"),
    ],
)
def test_of_fewer_windows_than_are_asked_for_the_log_tells(made, asked, kept_out, count, told):
    lines, how = [], {"batch_tokens": BATCH * LENGTH, "heldout_fraction": kept_out}
    Alone(made.model, made.structure, made.windows, 3, n_windows=asked, **how, log=lines.append)
    tokens = read_windows(made.windows, made.structure["vocab_size"]).attention_mask[-count:].sum()
    assert lines == [f"measuring on {tokens} tokens of {count} windows{told}"]


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_learns_in_the_metric_of_the_gradients(made, tmp_path, method):
    few = {"max_iter": 2} if "max_iter" in METHODS[method].options else {}
    layers = [0, 1, 2, 3] if METHODS[method].scope == "model" else [1]
    variant = settings(method, **METHODS[method].defaults() | few)
    variant["allocation"] = "uniform"
    diagnostics, report = learned(made, tmp_path, variant, layers)
    names = [name for name in moments_of(made) if int(name.split(".")[2]) in layers]
    assert sorted(diagnostics["matrices"]) == sorted(report["matrices"]) == sorted(names)
    weights, moments = ModelFolder(made.model), moments_of(made)
    power = 0.5 if METHODS[method].scales_columns else 0.0
    codes = TensorFile(tmp_path / "codes.safetensors")
    for name, found in report["matrices"].items():
        # the error by the formula, of what the file holds
        weight, one, spec = weights.read_weight(name), moments[name], codes.metadata["matrices"][name]
        stored = unpack({tensor: codes.read(tensor) for tensor in tensor_names(name, spec)}, spec, name).reconstruct()
        columns = (one["squares"] / one["squares"].mean()) ** (power / 2)
        error, size = ((m * columns).astype(np.float64) for m in (weight - stored, weight))
        gram = one["gram"]
        expected = np.sqrt(np.sum(error * (gram @ error)) / np.sum(size * (gram @ size)))
        assert found["relative_error"] == pytest.approx(expected, rel=1e-4)
        assert 0 < found["relative_error"] < 1
        mean_square = np.mean(columns**2)
        rise = np.sum(error * (gram @ error)) / mean_square / one["squares"].sum()
        rise *= one["squares"].mean() / one["n_tokens"] / 2
        assert found["predicted_rise"] == pytest.approx(rise, rel=1e-3)
        assert 0 <= diagnostics["matrices"][name]["relative_error_heldout"] < 1.5


def test_columns_are_weighted_before_and_restored_after(made, tmp_path):
    """Low rank of full column power is the weighted least-squares optimum: no other factors have a lower error."""
    name = "model.layers.1.mlp.up_proj"
    diagnostics, _ = learned(made, tmp_path, settings("svd_llm", column_power=1.0, whiten=True, eta=0.0), [1])
    one, weight = moments_of(made)[name], ModelFolder(made.model).read_weight(name).astype(np.float64)
    root = np.linalg.cholesky(one["gram"] / one["squares"].sum() + 1e-12 * np.eye(len(weight))).T
    columns = np.sqrt(one["squares"] / one["squares"].mean())
    values = np.linalg.svd(root @ (weight * columns), compute_uv=False)
    rank = low_rank(*weight.shape, nbytes=nbytes_left([weight.shape], 0.4), **storage_of({}))
    optimum = np.sqrt(np.square(values[rank:]).sum() / np.square(values).sum())
    assert diagnostics["matrices"][name]["relative_error"] == pytest.approx(optimum, rel=1e-4)


def test_weights_that_stay_are_exactly_those_of_the_model(made, tmp_path):
    learned(made, tmp_path, settings("wanda", pattern="column"), [1])
    codes = TensorFile(tmp_path / "codes.safetensors")
    for name, spec in codes.metadata["matrices"].items():
        stored = unpack({tensor: codes.read(tensor) for tensor in tensor_names(name, spec)}, spec, name).reconstruct()
        weight = ModelFolder(made.model).read_weight(name).astype(BFLOAT16).astype(np.float32)
        assert np.count_nonzero(stored) > 0.4 * stored.size
        # a column times its weight and over it again is off by a rounding of float32, which may tip one of bfloat16
        np.testing.assert_allclose(stored[stored != 0], weight[stored != 0], rtol=2**-7)
        assert np.mean(stored[stored != 0] == weight[stored != 0]) > 0.99


def test_share_of_the_activations_is_mixed_by_token(made):
    from cospadi.gram import read_gram, read_weighted_gram
    from cospadi.problem import Gradients, matrices_of

    gradients = Gradients.of(settings("svd_llm", activation_share=0.25), [made.gradients[3]])
    (matrix,) = (
        one
        for one in matrices_of(ModelFolder(made.model), made.structure, [3], [made.grams[3]], gradients=gradients)
        if one.projection == "down_proj"
    )
    weighted = read_weighted_gram(made.gradients[3], 3, matrix.name)
    plain = read_gram(made.grams[3], matrix.site) / moments_of(made)[matrix.name]["n_tokens"]
    np.testing.assert_allclose(matrix.metric.gram, 0.75 * weighted + 0.25 * plain, rtol=1e-12)


def test_gradients_that_belong_elsewhere_are_refused(made, tiny_model, tmp_path):
    other = backward(tiny_model("llama", dtype="float32"), tmp_path / "other", [range(0, 2), range(2, 4)], seed=7)
    variant = settings("wanda", pattern="column")
    arguments = made.model, made.structure, [made.grams[1]], [1], variant
    outputs = {"output": tmp_path / "f.safetensors", "diagnostics": tmp_path / "f.json", "log": lambda line: None}
    with pytest.raises(ArtifactError, match="heldout_from"):
        learn_unit(*arguments, gradient_files=[other.moments[0]], **outputs)
    with pytest.raises(ArtifactError, match=r"not a complete HDF5|has no gradients of"):
        learn_unit(*arguments, gradient_files=[made.gradients[3]], **outputs)
    assert not outputs["output"].exists()
    # labels of another seed go on with nobody else's gradients
    with pytest.raises(ArtifactError, match="is of seed 7; expected is seed 42"):
        collect_gradients(
            made.model,
            made.structure,
            made.windows,
            range(0, 2),
            hidden_in=None,
            gradient_in=other.folder / "gradient_2.h5",
            moments_out=tmp_path / "moments.h5",
            gradient_out=tmp_path / "gradient.h5",
            batch_tokens=BATCH * LENGTH,
            dtype="float32",
            log=lambda line: None,
        )


def test_the_seed_decides_the_labels(made, tiny_model, tmp_path):
    again = backward(tiny_model("llama", dtype="float32"), tmp_path / "again", [range(4)], heldout_fraction=0.1)
    other = backward(tiny_model("llama", dtype="float32"), tmp_path / "other", [range(4)], heldout_fraction=0.1, seed=7)
    name = "model.layers.1.mlp.up_proj"
    same, changed, first = (moments_of(one)[name]["squares"] for one in (again, other, made))
    np.testing.assert_allclose(same, first, rtol=1e-5)  # other chunks, the same labels
    assert np.abs(changed / first - 1).max() > 0.1


def test_factors_are_weighted_like_the_weight_and_restored():
    from cospadi import factorize
    from cospadi.problem import Matrix, Metric, Outputs

    rng = np.random.default_rng(0)
    weight, squares = rng.normal(size=(24, 32)).astype(np.float32), rng.gamma(0.5, size=32)
    squares[3] = 0.0  # no gradient: a small weight, not none
    outputs = Outputs(lambda: squares, 0.5)
    matrix = Matrix("m", 0, "s", weight.shape, Metric.identity(24), lambda: weight, outputs)
    assert np.mean(outputs.weights**2, dtype=np.float64) == pytest.approx(1, rel=1e-6) and outputs.weights.min() > 0
    for method in ("cospadi", "hybrid"):
        factors = factorize(weight, method=method, ratio=0.3)
        there = matrix.weighted_factors(factors)
        np.testing.assert_allclose(there.reconstruct(), matrix.weighted(factors.reconstruct()), rtol=1e-4, atol=1e-6)
        back = matrix.restored(there)
        np.testing.assert_allclose(back.reconstruct(), factors.reconstruct(), rtol=1e-4, atol=1e-6)
        assert back.nbytes == factors.nbytes
