"""Structure: found by running the architecture, checked against the files; chunks of layers equal the model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cospadi.errors import ArtifactError, UnsupportedModelError
from cospadi.files import ModelFolder, write_tensors
from cospadi.structure import PART_OF, SITES, SUPPORTED, check_supported, inspect_model, load_layers

FAMILIES = {
    # family: output widths of q and of k and v; biases of those; tied head
    "llama": ((48, 24), False, True),
    "mistral": ((48, 24), False, False),
    "qwen2": ((48, 24), True, False),
    "qwen3": ((64, 32), False, True),
    "gemma3_text": ((64, 32), False, True),
}


def changed_copy(model: Path, folder: Path, change) -> Path:
    """A copy of a model whose tensors, a dict, went through `change`; one safetensors file."""
    shutil.copytree(model, folder)
    weights = ModelFolder(folder)
    tensors = {name: np.array(weights.read(name)) for name in weights.weight_map}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def edit_config(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize("architectures", [["OPTForCausalLM"], ["Gemma3ForConditionalGeneration"], [], None, 5, [[]]])
def test_other_architectures_are_refused_with_the_list_of_supported_ones(architectures):
    with pytest.raises(UnsupportedModelError) as caught:
        check_supported({"architectures": architectures})
    assert all(name in str(caught.value) for name in SUPPORTED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, "of experts .*num_local_experts is 8"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, "mixture of experts .*num_experts is 128"),
        ({"architectures": ["X"], "text_config": {"n_routed_experts": 64}}, "n_routed_experts is 64.*Take a dense"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}, "vision_config": {}},
            r"text and something else \(config.json: vision_config; Gemma3ForConditionalGeneration\).*Save that part",
        ),
    ],
)
def test_experts_and_wrappers_are_refused_with_what_to_do(config, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        check_supported(config)
    assert all(name in str(caught.value) for name in SUPPORTED)


def test_quantized_weights_are_refused():
    with pytest.raises(UnsupportedModelError, match="gptq"):
        check_supported({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}})


def test_the_light_part_imports_neither_torch_nor_transformers():
    code = (
        "import sys, cospadi.structure, cospadi.gram; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("family", FAMILIES)
def test_structure_of_every_family(tiny_model, family):
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family)
    structure = inspect_model(folder)
    (q_out, kv_out), bias, tied = FAMILIES[family]

    assert structure["architecture"] in SUPPORTED
    assert structure["n_layers"] == len(structure["layers"]) == 4
    assert (structure["hidden_size"], structure["vocab_size"], structure["dtype"]) == (48, 400, "bfloat16")
    assert structure["tied_head"] is tied
    for index, layer in enumerate(structure["layers"]):
        prefix = f"model.layers.{index}"
        assert (layer["name"], layer["prefix"]) == (f"layer_{index:02d}", prefix)
        found = [
            (site["name"], site["d_in"], [(m["name"], *m["shape"], m["bias"]) for m in site["matrices"]])
            for site in layer["sites"]
        ]
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        assert found == [
            (
                "self_attn.q_proj",
                48,
                [
                    (f"{attention}.q_proj", 48, q_out, bias),
                    (f"{attention}.k_proj", 48, kv_out, bias),
                    (f"{attention}.v_proj", 48, kv_out, bias),
                ],
            ),
            ("self_attn.o_proj", q_out, [(f"{attention}.o_proj", q_out, 48, False)]),
            ("mlp.gate_proj", 48, [(f"{mlp}.gate_proj", 48, 96, False), (f"{mlp}.up_proj", 48, 96, False)]),
            ("mlp.down_proj", 96, [(f"{mlp}.down_proj", 96, 48, False)]),
        ]
        names = [[name.removeprefix(f"{prefix}.") for name, *_ in matrices] for *_, matrices in found]
        assert names == [[f"{PART_OF[name].name}.{name}" for name in site] for site in SITES]
    target = 4 * (2 * 48 * q_out + 2 * 48 * kv_out + 3 * 48 * 96)
    total = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert structure["target_parameters"] == target
    assert structure["total_parameters"] == total
    assert structure["untouched_bytes"] == 2 * (total - target)
    assert json.loads(json.dumps(structure)) == structure


def test_sites_follow_the_tensors_and_not_the_names(tiny_model, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    folder = tiny_model("llama")
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(2 * x))
    )
    changed = [site["name"] for site in inspect_model(folder)["layers"][0]["sites"]]
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    plain = [site["name"] for site in inspect_model(folder)["layers"][0]["sites"]]
    assert changed == ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert plain == ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


def test_a_head_stored_with_values_of_its_own_is_not_tied(tiny_model, tmp_path):
    def add_head(tensors):
        tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]

    folder = changed_copy(tiny_model("llama"), tmp_path / "model", add_head)
    structure = inspect_model(folder)
    assert structure["tied_head"] is False
    assert structure["total_parameters"] == inspect_model(tiny_model("llama"))["total_parameters"] + 400 * 48


DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(DOWN), "holds no tensor model.layers.2.mlp.down_proj.weight"),
        (lambda tensors: tensors.update({DOWN: tensors[DOWN].T.copy()}), r"shape \(96, 48\), expected \(48, 96\)"),
        (lambda tensors: tensors.update({DOWN: tensors[DOWN].astype(np.int8)}), "dtype I8"),
    ],
)
def test_weights_that_do_not_fit_the_architecture(tiny_model, tmp_path, change, message):
    folder = changed_copy(tiny_model("llama"), tmp_path / "model", change)
    with pytest.raises(ArtifactError, match=message):
        inspect_model(folder)


def test_truncated_shard(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=shard.name):
        inspect_model(folder)


def test_model_type_that_contradicts_the_architecture(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    edit_config(folder, architectures=["MistralForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        inspect_model(folder)


def test_tokenizer_must_fit_the_embedding(tiny_model, tmp_path):
    def cut(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300]

    folder = changed_copy(tiny_model("llama"), tmp_path / "model", cut)
    edit_config(folder, vocab_size=300)
    with pytest.raises(ArtifactError, match="id 389, but the embedding has 300 rows"):
        inspect_model(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ArtifactError, match="no usable tokenizer"):
        inspect_model(folder)


def test_a_token_added_outside_the_embedding_is_let_pass(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<image {index}>" for index in range(20)], special_tokens=True)
    assert len(tokenizer) > 400
    tokenizer.save_pretrained(folder)
    assert inspect_model(folder)["vocab_size"] == 400


def test_a_chunk_reads_its_own_tensors_only(tiny_model, monkeypatch):
    folder = tiny_model("qwen3")
    read = []
    plain = ModelFolder.read
    monkeypatch.setattr(ModelFolder, "read", lambda self, name: read.append(name) or plain(self, name))
    chunk = load_layers(folder, 1, 2, dtype="float32", device="cpu")
    assert sum(parameter.numel() for parameter in chunk.parameters()) == 2 * (92160 // 4 + 2 * 48 + 2 * 16) + 48
    assert {name.split(".")[2] for name in read if "layers" in name} == {"1", "2"}
    assert not any("embed" in name or "head" in name for name in read)
    assert np.array_equal(
        chunk.layers[1].mlp.down_proj.weight.numpy().T, ModelFolder(folder).read_weight("model.layers.2.mlp.down_proj")
    )


@pytest.mark.parametrize("layers", [(2, 1), (0, 4), (-1, 0)])
def test_layers_that_do_not_exist(tiny_model, layers):
    with pytest.raises(ValueError, match="of a model of 4 layers"):
        load_layers(tiny_model("llama"), *layers, dtype="float32", device="cpu")


def test_nan_in_a_weight_is_found_on_loading(tiny_model, tmp_path):
    def spoil(tensors):
        tensors[DOWN][5, 7] = np.nan

    folder = changed_copy(tiny_model("llama"), tmp_path / "model", spoil)
    load_layers(folder, 0, 1, dtype="float32", device="cpu")
    with pytest.raises(ArtifactError, match=f"{DOWN} holds NaN"):
        load_layers(folder, 2, 2, dtype="float32", device="cpu")
