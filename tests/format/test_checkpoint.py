"""Files: what `assemble` and `densify` write, read by a reader that shares no code with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from format_reader import read_checkpoint
from format_writer import BFLOAT16, PACKINGS, matrices_of, write_codes
from safetensors import safe_open
from worked_example import BEGIN, END, worked_example

from cospadi.checkpoint import assemble, densify, target_bytes
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, TensorFile


def load_all(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


@pytest.mark.parametrize("family", PACKINGS)
def test_untouched_tensors_are_copied_and_targets_replaced(packed_model, family):
    folders = packed_model(family)
    base, packed = load_all(folders.base), load_all(folders.packed)
    specs = json.loads((folders.packed / "config.json").read_text())["quantization_config"]["matrices"]
    codes = safetensors.numpy.load_file(folders.codes)
    untouched = base.keys() - {f"{name}.weight" for name in specs}
    assert packed.keys() == untouched | codes.keys()
    for name in untouched:
        assert packed[name].tobytes() == base[name].tobytes() and packed[name].dtype == base[name].dtype
    for name, tensor in codes.items():
        assert packed[name].tobytes() == tensor.tobytes() and packed[name].shape == tensor.shape
    assert ("lm_head.weight" in packed) == (family in {"mistral", "qwen2"})
    assert ("model.layers.0.self_attn.q_proj.bias" in packed) == (family == "qwen2")


@pytest.mark.parametrize("family", PACKINGS)
def test_densified_weights_are_what_the_independent_reader_computes(packed_model, family):
    folders = packed_model(family)
    expected, dense = read_checkpoint(folders.packed), load_all(folders.dense)
    for name, weight in expected.items():
        assert dense[f"{name}.weight"].dtype == np.float32
        np.testing.assert_allclose(dense[f"{name}.weight"], weight.T, rtol=0, atol=1e-6)
    base = load_all(folders.base)
    assert dense.keys() == base.keys()
    for name in base.keys() - {f"{name}.weight" for name in expected}:
        assert dense[name].tobytes() == base[name].tobytes()
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (folders.dense, folders.base))
    original.pop("transformers_version")
    assert config == original


def test_densified_weights_are_rounded_once_to_the_dtype_of_the_base_model(packed_model):
    folders = packed_model("llama", dtype="bfloat16")
    dense = load_all(folders.dense)
    for name, weight in read_checkpoint(folders.packed).items():
        assert dense[f"{name}.weight"].dtype == BFLOAT16
        error = np.abs(dense[f"{name}.weight"].astype(np.float32) - weight.T)
        assert (error <= np.abs(weight.T) * 2**-8 + 1e-7).all()


def test_bytes_are_those_of_the_headers(packed_model):
    folders = packed_model("qwen3")
    count = target_bytes(folders.packed)
    assert count["nbytes"] == sum(tensor.nbytes for tensor in safetensors.numpy.load_file(folders.codes).values())
    assert count["dense_nbytes"] == sum(2 * rows * columns for rows, columns in matrices_of(folders.base).values())
    assert count["ratio"] == 1 - count["nbytes"] / count["dense_nbytes"]
    assert sum(matrix["nbytes"] for matrix in count["matrices"].values()) == pytest.approx(count["nbytes"], rel=1e-12)
    # q (48, 64), k 27 atoms: mask, 8-bit values, scales, and a third of the 4-bit dictionary it shares with k and v
    codes = TensorFile(folders.codes)
    name = "model.layers.0.self_attn.q_proj"
    spec = codes.metadata["matrices"][name]["codes"]
    dictionary = 48 * 27 / 2 + 2 * 27 * 48 / 16
    expected = 64 * 4 + spec["n_nonzero"] + 2 * spec["n_scales"] + dictionary / 3
    assert count["matrices"][name]["nbytes"] == pytest.approx(expected)


def test_shards_index_and_header(packed_model):
    folders = packed_model("llama")
    index = json.loads((folders.packed / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folders.packed.glob("*.safetensors"))
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    total = 0
    for shard in shards:
        file = TensorFile(folders.packed / shard)
        assert {name for name, where in index["weight_map"].items() if where == shard} == set(file.names())
        size = sum(file.nbytes(name) for name in file.names())
        assert size <= 100_000 or len(file.names()) == 1
        total += size
        with safe_open(folders.packed / shard, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert (folders.packed / shard).stat().st_mode == (folders.packed / "config.json").stat().st_mode
    assert index["metadata"]["total_size"] == total


def test_folder_is_complete(packed_model):
    folders = packed_model("qwen2")
    names = {path.name for path in folders.packed.iterdir()}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "modeling_cospadi.py"} <= names
    assert "__init__.py" not in names
    assert {path.name for path in folders.dense.iterdir()} == {path.name for path in folders.base.iterdir()}
    config = json.loads((folders.packed / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"], config["hidden_size"]) == ("cospadi", "qwen2", 48)
    assert config["quantization_config"]["variant"] == {"method": "by hand"}
    for path in folders.packed.glob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("from cospadi", "import cospadi")), f"{path.name} needs the package: {line}"


def test_model_card_names_base_licence_bytes_figures_and_load_line(packed_model, tmp_path):
    folders = packed_model("llama")
    base = tmp_path / "base"
    shutil.copytree(folders.base, base)
    (base / "ORIGIN.md").write_text("# Origin\n\n- Base model: some/model-1B\n- Model licence: apache-2.0\n")
    assemble(base, [folders.codes], tmp_path / "out", variant={"ratio": 0.2}, card={"word perplexity": 12.5})
    card = (tmp_path / "out" / "README.md").read_text()
    nbytes = sum(tensor.nbytes for tensor in safetensors.numpy.load_file(folders.codes).values())
    for text in (
        "base_model: some/model-1B",
        "license: apache-2.0",
        f"{nbytes:,}",
        "| word perplexity | 12.5 |",
        'from_pretrained("out", trust_remote_code=True)',
        "On CPUs without bfloat16 instructions (most laptops) load with `dtype=torch.float32`",
        '{"ratio": 0.2}',
    ):
        assert text in card
    assert (tmp_path / "out" / "ORIGIN.md").exists()


def break_codes(path: Path, change) -> None:
    """Rewrite a codes file after `change(tensors, specs)`."""
    file = TensorFile(path)
    tensors = {name: np.array(file.read(name)) for name in file.names()}
    metadata = file.metadata
    change(tensors, metadata["matrices"])
    safetensors.numpy.save_file(tensors, path, {"cospadi": json.dumps(metadata)})


NAME = "model.layers.0.mlp.up_proj"


def _shorten(tensors, specs):
    tensors[f"{NAME}.values"] = tensors[f"{NAME}.values"][:-1].copy()


def _set_bit(tensors, specs):
    tensors[f"{NAME}.support"][0, 0] |= 1


def _transpose(tensors, specs):
    specs[NAME]["shape"].reverse()
    tensors[f"{NAME}.dictionary"] = np.zeros((96, 27), BFLOAT16)
    tensors[f"{NAME}.support"] = np.resize(tensors[f"{NAME}.support"], (48, 4))
    count = int(np.bitwise_count(tensors[f"{NAME}.support"]).sum())
    tensors[f"{NAME}.values"] = np.zeros(count, BFLOAT16)
    specs[NAME]["codes"]["n_nonzero"] = count


def _rename_dictionary(tensors, specs):
    tensors["shared.dictionary"] = tensors.pop(f"{NAME}.dictionary")
    specs[NAME]["dictionary"]["tensor"] = "shared.dictionary"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, specs: tensors.pop(f"{NAME}.support"), f"tensor {NAME}.support is missing"),
        (_shorten, rf"{NAME}.values has shape \(1276,\), expected \(1277,\)"),
        (_set_bit, f"{NAME} has .* positions for .* values"),
        (_transpose, rf"{NAME}.weight has shape \[96, 48\], the codes are for \[48, 96\]"),
        (lambda tensors, specs: specs[NAME]["codes"].update(codec="int5"), "codec 'int5'"),
        (_rename_dictionary, "shared.dictionary, which belongs to no packed matrix"),
        (
            lambda tensors, specs: specs[NAME].update(dictionary={"codec": "identity", "n_atoms": 27}),
            "27 atoms in an identity dictionary",
        ),
        (lambda tensors, specs: specs.update({"model.layers.9.mlp.up_proj": specs.pop(NAME)}), "layers.9"),
    ],
    ids=["missing", "short", "positions", "shape", "codec", "dictionary", "identity", "name"],
)
def test_bad_codes_give_one_error_and_leave_nothing(packed_model, tmp_path, change, message):
    folders = packed_model("llama")
    codes = tmp_path / "codes.safetensors"
    shutil.copyfile(folders.codes, codes)
    break_codes(codes, change)
    with pytest.raises(ArtifactError, match=message):
        assemble(folders.base, [codes], tmp_path / "out", variant={})
    assert {path.name for path in tmp_path.iterdir()} == {"codes.safetensors"}


def test_the_same_matrix_in_two_codes_files_is_an_error(packed_model, tmp_path):
    folders = packed_model("llama")
    with pytest.raises(ArtifactError, match="in another codes file too"):
        assemble(folders.base, [folders.codes, folders.codes], tmp_path / "out", variant={})


def test_a_truncated_codes_file_is_an_error(packed_model, tmp_path):
    folders = packed_model("llama")
    (tmp_path / "codes.safetensors").write_bytes(folders.codes.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        assemble(folders.base, [tmp_path / "codes.safetensors"], tmp_path / "out", variant={})


def test_packing_a_packed_model_and_densifying_a_dense_one_are_errors(packed_model, tmp_path):
    folders = packed_model("llama")
    with pytest.raises(ArtifactError, match="quantized already"):
        assemble(folders.packed, [folders.codes], tmp_path / "out", variant={})
    with pytest.raises(ArtifactError, match="quant_method None"):
        densify(folders.base, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_second_assembly_gives_the_same_bytes(packed_model, tmp_path):
    folders = packed_model("qwen3")
    for name in ("one", "two"):
        assemble(folders.base, [folders.codes], tmp_path / name / "model", variant={"ratio": 0.2})
    for path in (tmp_path / "one" / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "model" / path.name).read_bytes(), path.name


def test_matrices_in_many_codes_files(packed_model, tmp_path):
    """A unit a file, as the workflow writes them; the files' order does not matter."""
    folders = packed_model("mistral")
    shapes = matrices_of(folders.base)
    for layer in range(4):
        part = {name: shape for name, shape in shapes.items() if f"layers.{layer}." in name}
        write_codes(tmp_path / f"layer_{layer:02d}.safetensors", part)
    files = sorted(tmp_path.glob("*.safetensors"), reverse=True)
    assemble(folders.base, files, tmp_path / "out", variant={})
    assert target_bytes(tmp_path / "out")["matrices"].keys() == shapes.keys()
    densify(tmp_path / "out", tmp_path / "dense")
    assert ModelFolder(tmp_path / "dense").weight_map.keys() == ModelFolder(folders.base).weight_map.keys()


def test_worked_example_of_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    shown = text.partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == worked_example().strip(), "run python tests/format/worked_example.py"
