"""Loading packed folders through transformers and lm-eval, with the package and without, in two processes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from format_writer import PACKINGS, matrices_of, write_codes

from cospadi.checkpoint import assemble, densify
from cospadi.runtime import cospadi_format

HERE = Path(__file__).parent
NAME = "model.layers.2.mlp.gate_proj"
SHARD = "model-00002-of-00003.safetensors"


def run(script: str, arguments: list[str | Path], home: Path, **changes: str) -> dict[str, Any]:
    """Run a script of this folder; its JSON result."""
    result = home / "result.json"
    environment = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **changes}
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments, result],
        env=environment,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


def broken_copy(folder: Path, target: Path, change: Callable[[dict, dict], None]) -> Path:
    """Copy of a single-shard folder after ``change(config, tensors)``."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    tensors = safetensors.numpy.load_file(target / "model.safetensors")
    change(config, tensors)
    (target / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def _matrices(config: dict) -> dict:
    return config["quantization_config"]["matrices"]


def _rename(config: dict, tensors: dict, old: str, new: str) -> None:
    """Give a packed matrix another name, everywhere."""
    spec = _matrices(config)[new] = _matrices(config).pop(old)
    spec["dictionary"]["tensor"] = f"{new}.dictionary"
    for name in [name for name in tensors if name.startswith(f"{old}.")]:
        tensors[name.replace(old, new)] = tensors.pop(name)


BROKEN: dict[str, tuple[Callable[[dict, dict], Any], str, str]] = {
    "version": (
        lambda config, tensors: config["quantization_config"].update(format_version=2),
        "ValueError",
        "format_version 2 is not known",
    ),
    "codec": (
        lambda config, tensors: _matrices(config)[NAME]["codes"].update(codec="int5"),
        "ValueError",
        f"{NAME}: codec 'int5' is not known",
    ),
    "family": (
        lambda config, tensors: config.update(base_model_type="llama99"),
        "ValueError",
        "base_model_type 'llama99' is not known",
    ),
    "dtype": (
        lambda config, tensors: config.update(dtype=576),
        "ValueError",
        "dtype is 576, expected the name of a dtype",
    ),
    "infinity": (
        lambda config, tensors: config.update(rms_norm_eps=float("inf")),
        "OSError",
        "config.json is not valid JSON (Infinity is no number of JSON)",
    ),
    "layer": (
        lambda config, tensors: _rename(config, tensors, NAME, "model.layers.9.x"),
        "ValueError",
        "config.json packs model.layers.9.x, which Qwen2ForCausalLM does not have",
    ),
    "missing tensor": (lambda config, tensors: tensors.pop(f"{NAME}.values"), "OSError", f"{NAME}.values is missing"),
    "missing dictionary": (
        lambda config, tensors: tensors.pop(f"{NAME}.dictionary"),
        "OSError",
        f"{NAME}.dictionary is missing",
    ),
    "missing norm": (
        lambda config, tensors: tensors.pop("model.norm.weight"),
        "OSError",
        "model.norm.weight is missing",
    ),
    "shape": (
        lambda config, tensors: tensors.update({f"{NAME}.support": tensors[f"{NAME}.support"][:-1].copy()}),
        "OSError",
        f"{NAME}.support has shape (95, 4), expected (96, 4)",
    ),
    "dense weight left over": (
        lambda config, tensors: tensors.update({f"{NAME}.weight": np.zeros((96, 48), np.float32)}),
        "OSError",
        f"{NAME}.weight belongs to a packed matrix",
    ),
    "no packing": (
        lambda config, tensors: config.pop("quantization_config"),
        "ValueError",
        "no quantization_config of a packed checkpoint",
    ),
}


@pytest.fixture(scope="module")
def without_package(packed_model, tmp_path_factory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("without")
    families, broken = {}, {}
    for family in PACKINGS:
        folders = packed_model(family)
        families[family] = [str(folders.packed), str(folders.dense), str(home / f"{family}-saved")]
    tied = packed_model("llama")
    assemble(tied.base, [tied.codes], home / "few-bits", variant={}, embedding_bits=8)
    densify(home / "few-bits", home / "few-bits-dense")
    families["few bits"] = [str(home / name) for name in ("few-bits", "few-bits-dense", "few-bits-saved")]
    source = packed_model("qwen2").packed
    for index, (name, (change, _, _)) in enumerate(BROKEN.items()):
        broken[name] = str(broken_copy(source, home / f"broken-{index}", change))
    for name in ("truncated", "lost shard"):
        broken[name] = str(home / name.replace(" ", "_"))
        shutil.copytree(packed_model("llama").packed, broken[name])
    shard = Path(broken["truncated"], SHARD)
    shard.write_bytes(shard.read_bytes()[:-50])
    Path(broken["lost shard"], SHARD).unlink()
    # a copy under a name that was not loaded with trust before
    shutil.copytree(packed_model("llama").packed, home / "fresh")
    tasks = home / "tasks.json"
    told = {"families": families, "broken": broken, "fresh": str(home / "fresh"), "few bits": "few bits"}
    tasks.write_text(json.dumps(told))
    return run("without_package.py", [tasks], home, PYTHONPATH="")


@pytest.mark.parametrize("family", PACKINGS)
def test_logits_equal_the_densified_folder_s(without_package, family):
    found = without_package["families"][family]
    # three roundings (W = D S of the dense folder, z = x D, y = z S) where the dense product has one: sqrt(3) times it
    errors = found["float32_error"]
    assert 0 < errors["packed"] < 2 * 3**0.5 * errors["dense"]
    # in bfloat16 one rounds z = x D, the other W: neither is closer to the exact logits by more than a factor of two
    errors = found["bfloat16_error"]
    assert 0 < errors["packed"] < 2 * errors["dense"]
    assert found["generated"] == found["generated_dense"] and len(found["generated"][0]) == 13
    assert found["tokens"][0] == found["tokens"][1]


@pytest.mark.parametrize("family", PACKINGS)
def test_model_is_the_base_family_s_with_packed_linears(without_package, family):
    found = without_package["families"][family]
    base = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3"}
    assert found["base"] == f"{base[family]}ForCausalLM"
    modules = {
        "gemma3_text": ["DenseLinear", "PackedLinear"],
        "mistral": ["MixtureLinear", "PackedLinear", "SummedLinear"],
    }
    assert found["modules"] == modules.get(family, ["PackedLinear"])
    assert found["tied_head"] == (family not in {"mistral", "qwen2"})
    assert found["shared"] == found["tied_again"] == (family == "qwen3")
    assert found["shared_atoms"] == (family == "mistral")
    assert (found["trainable"], found["on_meta"]) == (0, 0)


@pytest.mark.parametrize("family", PACKINGS)
def test_save_pretrained_round_trips(without_package, family):
    found = without_package["families"][family]
    assert found["saved_equal"] and found["saved_code"]
    assert found["saved_config_lacks"] == []
    assert found["saved_error"] == 0


def test_embeddings_in_few_bits(without_package):
    found, options = without_package["families"]["few bits"], without_package["options of embeddings in few bits"]
    errors = found["float32_error"]
    assert 0 < errors["packed"] < 2 * 3**0.5 * errors["dense"]
    assert found["generated"] == found["generated_dense"] and len(found["generated"][0]) == 13
    assert found["saved_equal"] and found["saved_code"] and found["saved_config_lacks"] == []
    assert found["saved_error"] == found["on_meta"] == 0
    assert options["dtype"] == ["torch.bfloat16"] * 2
    assert options["device_map"] == options["direct"] == options["pickled"] == 0
    assert options["built"] and options["pickled_config"] and options["gradient"] > 0
    assert options["footprint"] <= options["file_bytes"]


def test_loading_options(without_package):
    found = without_package["options"]
    assert found["dtype"] == ["torch.bfloat16"] * 2
    assert found["packed_dtypes"] == ["torch.bfloat16"]
    assert found["device_map"] == found["direct"] == found["pickled"] == 0
    assert found["pickled_config"]
    assert found["built"]
    assert found["gradient"] > 0 and np.isfinite(found["gradient"])
    # nothing dense is kept: what the model holds is what the files hold, less their headers
    assert found["footprint"] <= found["file_bytes"]


def test_lm_eval_takes_the_path(without_package):
    found = without_package["evaluation"]
    np.testing.assert_allclose(found["packed"], found["dense"], rtol=1e-5)


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_does_not_fit_gives_one_error(without_package, name):
    _, kind, message = BROKEN[name]
    found, text = without_package["broken"][name]
    assert found == kind and message in text


def test_damaged_weight_files_give_an_error(without_package):
    kind, text = without_package["broken"]["truncated"]
    assert kind == "OSError" and SHARD in text and "cut short" in text
    kind, text = without_package["broken"]["lost shard"]
    assert kind == "FileNotFoundError" and SHARD in text


def test_other_loaders_refuse(without_package):
    kind, text = without_package["refused"]["auto without trust"]
    assert kind == "ValueError" and "trust_remote_code=True" in text
    kind, text = without_package["refused"]["class of the base family"]
    assert kind == "ValueError" and "use AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in text


def test_the_copy_of_the_code_is_complete_for_every_version_of_transformers():
    """Older versions copy what the entry module names, and not what those modules need in turn."""
    from transformers.dynamic_module_utils import get_relative_imports

    runtime = Path(cospadi_format.__file__).parent
    modules = {path.stem for path in runtime.glob("*.py")} - {"__init__"}
    entries = {reference.partition(".")[0] for reference in cospadi_format.AUTO_MAP.values()}
    assert entries == {"configuration_cospadi", "modeling_cospadi"}
    for entry in entries:
        assert set(get_relative_imports(runtime / f"{entry}.py")) == modules - {entry}


def test_the_oldest_transformers_is_said(packed_model):
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]
    assert f"transformers>={cospadi_format.TRANSFORMERS}" in project["dependencies"]
    card = (packed_model("qwen2").packed / "README.md").read_text()
    assert f"transformers {cospadi_format.TRANSFORMERS} or newer" in card


def test_a_config_of_defaults_alone_is_of_its_family():
    """transformers 5.0 makes one for each that it logs."""
    import transformers  # brings the format along

    from cospadi.runtime.configuration_cospadi import family_config

    config = family_config("llama")()
    assert isinstance(config, transformers.LlamaConfig)
    assert copy.copy(config).base_model_type == config.base_model_type == "llama"
    assert config.to_dict()["vocab_size"] == config.vocab_size


def test_import_of_the_package_is_enough(packed_model, tmp_path):
    packed = packed_model("qwen2").packed
    unknown = broken_copy(packed, tmp_path / "unknown", BROKEN["version"][0])
    found = run("with_package.py", [packed, tmp_path / "saved", unknown], tmp_path)
    assert found["light"] == []
    assert found["class"] == ["cospadi.runtime.modeling_cospadi"] * 3
    assert found["error"] == [0, 0]
    assert {path.name for path in packed.glob("*.py")} <= set(found["saved"])
    assert found["auto_map"] == json.loads((packed / "config.json").read_text())["auto_map"]
    assert "format_version 2 is not known" in found["unknown_version"]
    assert found["evaluated"] == "CospadiForCausalLM"
    # a config that is printed, or logged at loading, does not list hundreds of matrices
    assert '"matrices": "of 28 matrices"' in found["printed"] and "model.layers" not in found["printed"]


def test_resident_memory_is_that_of_the_file(tmp_path, tiny_model):
    """In a fresh process: packed tensors as they are in the file, and never a dense copy beside them."""
    base = tiny_model("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_key_value_heads=4)
    write_codes(tmp_path / "codes.safetensors", matrices_of(base), codec="int8", n_atoms=256)
    assemble(base, [tmp_path / "codes.safetensors"], tmp_path / "packed", variant={})
    found = run("memory.py", [tmp_path / "packed"], tmp_path)
    assert found["dense_bytes"] > 4 * found["file_bytes"] > 2**26
    assert found["loaded"] - found["imported"] <= 1.25 * found["file_bytes"]
    # a product unpacks the codes of one matrix, and lets them go
    assert found["peak"] - found["imported"] <= 1.25 * found["file_bytes"] + 2**26


def test_adapters_train_on_a_packed_model_and_come_back(packed_model, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    import cospadi  # noqa: F401 (registers the packed classes)

    packed = packed_model("qwen3").packed
    ids = torch.randint(3, 390, (4, 24), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(packed)
    before = model(ids).logits.detach()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    stored = {name: p.detach().clone() for name, p in adapted.named_parameters() if "base_layer" in name}
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(stored[name], p) for name, p in adapted.named_parameters() if name in stored)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(fresh(ids).logits, before)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
        with loaded.disable_adapter():
            torch.testing.assert_close(loaded(ids).logits, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="nothing can be merged into it"):
        loaded.merge_and_unload()
