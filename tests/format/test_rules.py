"""Every rule of docs/format.md that a reader checks, broken one at a time: all readers refuse, and say where."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_reader import Refused, read_checkpoint, read_matrix, read_tensors
from fuzz import SEEDS, Folder, make_seeds

from cospadi.checkpoint import assemble, densify, target_bytes
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, TensorFile, read_json, write_tensors
from cospadi.formats.factorization import read_specs, unpack
from cospadi.runtime.cospadi_registry import CODECS, FACTOR_CODECS
from cospadi.runtime.modeling_cospadi import CospadiForCausalLM

LAYERS = "model.layers"
Q, K, V, OUT = (f"{LAYERS}.0.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"{LAYERS}.0.mlp.{name}_proj" for name in ("gate", "up", "down"))
MIXED, SUMMED = f"{LAYERS}.1.self_attn.q_proj", f"{LAYERS}.1.self_attn.k_proj"
SCALED = f"{LAYERS}.1.self_attn.v_proj"
STREAM = f"{LAYERS}.1.mlp.down_proj"
SHARED, LAST = f"{LAYERS}.1.mlp.gate_proj", f"{LAYERS}.1.mlp.up_proj"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("seeds")
    make_seeds(root)
    return root


def specs_of(folder: Folder) -> dict[str, Any]:
    return folder.config["quantization_config"]["matrices"]


def spec(name: str, section: str | None, **changes: Any) -> Callable[[Folder], None]:
    """Change keys of a spec, or of a section of it; `...` takes one away."""

    def change(folder: Folder) -> None:
        part = specs_of(folder)[name] if section is None else specs_of(folder)[name][section]
        for key, value in changes.items():
            if value is ...:
                del part[key]
            else:
                part[key] = value

    return change


def header(tensor: str, **changes: Any) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.files["model.safetensors"][0][tensor] |= changes

    return change


def content(tensor: str, at: int, value: int, width: int = 1) -> Callable[[Folder], None]:
    """Set a number of a tensor's bytes, from the end if `at` is negative."""

    def change(folder: Folder) -> None:
        tensors = folder.files["model.safetensors"][1]
        numbers = np.frombuffer(tensors[tensor], f"<u{width}").copy()
        numbers[at] = value
        tensors[tensor] = numbers.tobytes()

    return change


def first_bit(tensor: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        tensors = folder.files["model.safetensors"][1]
        tensors[tensor] = bytes([tensors[tensor][0] ^ 1]) + tensors[tensor][1:]

    return change


def without(tensor: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        for part in folder.files["model.safetensors"]:
            del part[tensor]

    return change


def added(tensor: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        entries, tensors = folder.files["model.safetensors"]
        entries[tensor], tensors[tensor] = {"dtype": "U8", "shape": [3]}, b"abc"

    return change


def packing(**changes: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.config["quantization_config"].update(changes)


def own_dictionary(name: str, **changes: Any) -> Callable[[Folder], None]:
    """Of a matrix that shares one: its own idea of it."""
    return spec(name, "dictionary", **changes)


RULES: dict[str, tuple[Callable[[Folder], None], str]] = {
    "version is a number": (packing(format_version=True), "format_version True is not known"),
    "model type": (
        lambda folder: folder.config.update(model_type="llama"),
        "model_type is 'llama', expected 'cospadi'",
    ),
    "weight dtype": (packing(weight_dtype="I8"), "weight_dtype is 'I8'"),
    "key of the packing": (packing(entropy="x"), "quantization_config has entropy, which is not known"),
    "variant": (packing(variant=[]), r"variant is \[\], expected an object"),
    "no matrices": (packing(matrices={}), r"matrices is \{\}"),
    "list of matrices": (packing(matrices=[]), r"matrices is \[\]"),
    "module path": (lambda folder: specs_of(folder).update({"a..b": {}}), "'a..b' is no module path"),
    "spec": (lambda folder: specs_of(folder).update({Q: 3}), f"{Q}: its spec is 3, expected an object"),
    "key of the spec": (spec(Q, None, side="output"), f"{Q}: its spec has side, which is not known"),
    "key of the codes": (spec(Q, "codes", order="row"), f"{Q}: its codes has order, which is not known"),
    "key of the dictionary": (spec(Q, "dictionary", order=1), f"{Q}: its dictionary has order, which is not known"),
    "key that another codec has": (spec(Q, "codes", group_size=16), f"{Q}: its codes has group_size, which is not"),
    "missing key": (spec(V, "codes", n_scales=...), f"{V}: its codes lacks n_scales"),
    "shape of three": (spec(Q, None, shape=[36, 32, 1]), f"{Q}: shape is"),
    "negative shape": (spec(Q, None, shape=[36, -32]), f"{Q}: shape is"),
    "true for one": (spec(Q, "dictionary", n_atoms=True), f"{Q}: n_atoms is True"),
    "number that is not whole": (spec(Q, "codes", n_nonzero=64.0), rf"{Q}: n_nonzero is 64\.0"),
    "no atoms": (spec(Q, "dictionary", n_atoms=0), f"{Q}: n_atoms is 0"),
    "other number of atoms": (own_dictionary(K, n_atoms=14), f"{K}: its dictionary is {Q}.dictionary, whose owner has"),
    "huge number of atoms": (spec(DOWN, "dictionary", n_atoms=2**62), f"{DOWN}: n_atoms is"),
    "more numbers than fit": (
        lambda folder: specs_of(folder)[Q].update(
            shape=[2**31 - 1, 32], dictionary={**specs_of(folder)[Q]["dictionary"], "n_atoms": 2**31 - 1}
        ),
        f"{Q}: 2147483647 atoms .* are more than any file holds",
    ),
    "group of nothing": (spec(V, "codes", group_size=0), f"{V}: codes.group_size is 0"),
    "negative group": (spec(V, "dictionary", group_size=-16), f"{V}: dictionary.group_size is -16"),
    "huge group": (spec(V, "dictionary", group_size=2**63), f"{V}: dictionary.group_size is"),
    "one scale": (spec(UP, "codes", n_scales=1), f"{UP}: 1 scales for 252 values"),
    "too few scales": (spec(V, "codes", n_scales=3), rf"{V}.scales has shape \(\d+,\), expected \(3,\)"),
    "bytes of a stream": (spec(STREAM, "codes", n_bytes=3), rf"{STREAM}.values has shape \(\d+,\), expected \(3,\)"),
    "no bytes of a stream": (spec(STREAM, "codes", n_bytes=None), f"{STREAM}: n_bytes is None, expected a whole"),
    "support of a stream": (
        spec(STREAM, "codes", support="bitmask"),
        f"{STREAM}: codec 'ectcq256' is for support 'dense', not 'bitmask'",
    ),
    "codec of codes in a dictionary": (
        spec(Q, "dictionary", codec="uint4"),
        f"{Q}: codec 'uint4' is one of codes, not",
    ),
    "codec of dictionaries in codes": (
        spec(Q, "codes", codec="diagonal"),
        f"{Q}: codec 'diagonal' is one of dictionaries, not of codes",
    ),
    "codec": (spec(Q, "codes", codec="float32"), f"{Q}: codec 'float32' is not known"),
    "codec of another type": (spec(Q, "codes", codec=["bf16"]), rf"{Q}: codec \['bf16'\] is not known"),
    "support": (spec(Q, "codes", support="5:7"), f"{Q}: support '5:7' is not known"),
    "pairs of too few atoms": (spec(OUT, "codes", n_nonzero=7), f"{OUT}: n_nonzero is 7"),
    "atoms that are no fours": (
        lambda folder: specs_of(folder)[Q]["codes"].update(support="2:4"),
        f"{Q}: support '2:4' needs a multiple of 4 atoms, not 13",
    ),
    "identity": (spec(DOWN, "dictionary", n_atoms=24), f"{DOWN}: 24 atoms in an identity dictionary of 28"),
    "diagonal": (spec(SCALED, "dictionary", n_atoms=24), f"{SCALED}: 24 atoms in a diagonal dictionary of 36"),
    "diagonal to mix": (
        spec(MIXED, "dictionary", codec="diagonal", group_size=...),
        f"{MIXED}: 64 atoms to mix in a diagonal dictionary of 36",
    ),
    "shape of a diagonal": (
        header(f"{SCALED}.dictionary", shape=[36, 1]),
        rf"{SCALED}.dictionary has shape \(36, 1\), expected \(36,\)",
    ),
    "mixture": (spec(MIXED, "codes", n_nonzero=3), f"{MIXED}: 3 coefficients do not fit"),
    "sum of nothing": (spec(SUMMED, None, plus=[]), rf"{SUMMED}: plus is \[\]"),
    "sum whose matrix has no shape": (spec(SUMMED, None, shape=7), f"{SUMMED}: shape is 7, expected two"),
    "sum of another shape": (
        lambda folder: specs_of(folder)[SUMMED].update(plus=[specs_of(folder)[OUT]]),
        rf"{SUMMED}: plus.0: shape .* is not the matrix's",
    ),
    "sum of a sum": (
        lambda folder: specs_of(folder)[SUMMED]["plus"][0].update(plus=[]),
        rf"{SUMMED}: plus.0: what is added is no sum itself",
    ),
    "mixture with something added": (
        lambda folder: specs_of(folder)[MIXED].update(plus=specs_of(folder)[SUMMED]["plus"]),
        f"{MIXED}: a mixture has nothing added",
    ),
    "dictionary of nobody": (
        own_dictionary(K, tensor="x.dictionary"),
        f"{K}: its dictionary is x.dictionary, which belongs",
    ),
    "tensor that is no dictionary": (
        own_dictionary(K, tensor=f"{Q}.values"),
        f"{K}: dictionary.tensor is '{Q}.values'",
    ),
    "other group of a shared dictionary": (
        own_dictionary(UP, group_size=17),
        f"{UP}: its dictionary is {GATE}.dictionary",
    ),
    "lost tensor": (without(f"{Q}.values"), f"tensor {Q}.values is missing"),
    "float16 values": (header(f"{Q}.values", dtype="F16"), f"{Q}.values has dtype F16, expected BF16"),
    "int16 values": (header(f"{Q}.values", dtype="I16"), f"{Q}.values has dtype I16, expected BF16"),
    "float16 dictionary": (header(f"{Q}.dictionary", dtype="F16"), f"{Q}.dictionary has dtype F16, expected BF16"),
    "float16 scales": (header(f"{V}.scales", dtype="F16"), f"{V}.scales has dtype F16, expected BF16"),
    "signed support": (header(f"{Q}.support", dtype="I8"), f"{Q}.support has dtype I8, expected U8"),
    "shape of a tensor": (
        header(f"{Q}.support", shape=[2, 32]),
        rf"{Q}.support has shape \(2, 32\), expected \(32, 2\)",
    ),
    "tensor left over": (added(f"{Q}.weight"), f"{Q}.weight belongs to a packed matrix but is none of its tensors"),
    "part left over": (added(f"{SUMMED}.plus.1.values"), "plus.1.values belongs to a packed matrix"),
    "one position too many or too few": (
        first_bit(f"{OUT.replace('.0.', '.1.')}.support"),
        r"has \d+ positions for \d+ values",
    ),
    "positions behind the last atom": (content(f"{Q}.support", 1, 0x80), f"{Q}.support has bits set from atom 13 on"),
    "pair in the wrong order": (content(f"{OUT}.support", 0, 0x41), f"{OUT}.support has 1 bytes whose pairs"),
    "pair of one atom": (content(f"{OUT}.support", 0, 0x40), f"{OUT}.support has 1 bytes whose pairs"),
    "pairs behind the last": (content(f"{OUT}.support", 1, 0x44), f"{OUT}.support has 1 bytes whose pairs"),
    "bits behind the last number": (content(f"{LAST}.values", -1, 0xFF), "has bits set behind its last number"),
    "a byte of a stream": (content(f"{STREAM}.values", -9, 0xFF), f"{STREAM}.values is damaged: its checksum"),
    "a byte of a trellis": (content(f"{SUMMED}.values", 9, 0x81), f"{SUMMED}.values is damaged: its checksum"),
    "a byte of a checksum": (content(f"{STREAM}.values", 2, 0xFF), f"{STREAM}.values is damaged: its checksum"),
    "NaN in values": (content(f"{Q}.values", 0, 0x7FC0, 2), f"{Q}.values holds 1 values that are NaN or infinite"),
    "infinity in scales": (content(f"{V}.scales", 0, 0xFF80, 2), f"{V}.scales holds 1 values that are NaN"),
    "NaN in scales of a dictionary": (
        content(f"{V}.dictionary_scales", 0, 0x7FFF, 2),
        f"{V}.dictionary_scales holds 1",
    ),
    "NaN in a dictionary": (content(f"{Q}.dictionary", 5, 0x7FC0, 2), f"{Q}.dictionary holds 1 values"),
    "NaN in a diagonal": (content(f"{SCALED}.dictionary", 5, 0x7FC0, 2), f"{SCALED}.dictionary holds 1 values"),
    "NaN in 14 bits": (content(f"{GATE}.values", slice(0, 7), 0xFF), f"{GATE}.values holds 4 values that are NaN"),
    "NaN in the last of 14 bits": (
        content(f"{SHARED}.dictionary", slice(-9, None), 0xFF),
        f"{SHARED}.dictionary holds",
    ),
    "NaN of a mixture": (content(f"{MIXED}.values", 1, 0x7F80, 2), f"{MIXED}.values holds 1 values"),
}


def refused(readers: dict[str, Callable[[], Any]], kinds: tuple[type, ...]) -> dict[str, str]:
    texts = {}
    for name, read in readers.items():
        with pytest.raises(kinds) as caught:
            read()
        texts[name] = str(caught.value)
    return texts


@pytest.mark.parametrize("rule", RULES)
def test_all_readers_refuse_and_name_folder_and_tensor(seeds, tmp_path, rule):
    change, message = RULES[rule]
    folder = Folder(seeds / "one")
    change(folder)
    path = tmp_path / "broken"
    folder.write(path)
    with pytest.raises(Refused):
        read_checkpoint(path)
    texts = refused(
        {"densify": lambda: densify(path, tmp_path / "dense"), "bytes": lambda: target_bytes(path)}, (ArtifactError,)
    ) | refused({"loader": lambda: CospadiForCausalLM.from_pretrained(path)}, (OSError, ValueError))
    for reader, text in texts.items():
        assert str(path) in text and re.search(message, text), (reader, text)
        assert text.endswith("again"), (reader, text)  # the remedy
    assert {left.name for left in tmp_path.iterdir()} == {"broken"}


@pytest.mark.parametrize("rule", [rule for rule in RULES if "position" in rule or "NaN" in rule or "pair " in rule])
def test_assemble_and_unpack_read_what_they_pack(seeds, tmp_path, rule):
    """The same damage in a codes file."""
    folder = Folder(seeds / "one")
    RULES[rule][0](folder)
    folder.write(tmp_path / "broken")
    tensors, matrices = read_tensors(tmp_path / "broken"), specs_of(folder)
    codes = TensorFile(seeds / "codes.safetensors")
    kept = {name: np.asarray(tensors[name]) for name in codes.names()}
    write_tensors(tmp_path / "codes.safetensors", kept, {"format_version": 1, "matrices": matrices})
    with pytest.raises(ArtifactError, match=rf"codes\.safetensors: .*{RULES[rule][1]}"):
        assemble(seeds / "base", [tmp_path / "codes.safetensors"], tmp_path / "out", variant={})
    assert not (tmp_path / "out").exists()
    bad = []
    for name, part in matrices.items():
        try:
            read_matrix(tensors, name, part)
        except Refused:
            bad.append(name)
            with pytest.raises(ArtifactError, match=name):
                unpack(tensors, part, name)
        else:
            unpack(tensors, part, name)
    assert bad


def test_a_sound_folder_is_taken_by_all(seeds, tmp_path):
    for name, *_ in SEEDS:
        expected = read_checkpoint(seeds / name)
        densify(seeds / name, tmp_path / name)
        CospadiForCausalLM.from_pretrained(seeds / name)
        dense = ModelFolder(tmp_path / name)
        for matrix, weight in expected.items():
            np.testing.assert_allclose(dense.read_weight(matrix), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "tensor", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_densify_refuses_a_folder_that_lacks_a_tensor_of_the_rest_of_the_model(seeds, tmp_path, tensor):
    folder = Folder(seeds / "one")
    without(tensor)(folder)
    folder.write(tmp_path / "broken")
    with pytest.raises(ArtifactError, match=f"broken: .*tensor {tensor} is missing"):
        densify(tmp_path / "broken", tmp_path / "dense")
    with pytest.raises(OSError, match=f"broken: .*tensor {tensor} is missing"):
        CospadiForCausalLM.from_pretrained(tmp_path / "broken")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "[]", r"config.json"),
        ("config.json", "null", r"config.json"),
        ("config.json", '{"a": ' + "9" * 5000 + "}", r"config.json"),
        ("config.json", "[" * 100_000, r"config.json"),
        ("model.safetensors.index.json", "[]", r"index.json"),
        ("model.safetensors.index.json", '{"weight_map": []}', "weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "weight_map|a is in 3"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}', "weight_map|a is in"),
    ],
)
def test_valid_json_of_the_wrong_shape_is_an_error_that_names_the_file(seeds, tmp_path, file, text, message):
    path = Path(shutil.copytree(seeds / "three", tmp_path / "broken"))
    (path / file).write_text(text)
    for read in (lambda: ModelFolder(path), lambda: densify(path, tmp_path / "dense")):
        with pytest.raises(ArtifactError, match=message):
            read()
    with pytest.raises((OSError, ValueError), match=f"broken.*({message})"):
        CospadiForCausalLM.from_pretrained(path)


def test_a_header_whose_own_entry_is_no_object_is_an_error_that_names_the_file(tmp_path):
    import safetensors.numpy

    path = tmp_path / "t.safetensors"
    for text in ("[]", "3", "{", '"x"'):
        safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, path, {"cospadi": text})
        with pytest.raises(ArtifactError, match=r"t\.safetensors"):
            TensorFile(path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"list\.json: holds a list"):
        read_json(tmp_path / "list.json")


@pytest.mark.parametrize(
    "metadata", [None, {"x": 1}, {"matrices": []}, {"matrices": 3}, {"matrices": {"m": {"shape": 3}}}]
)
def test_a_factors_or_codes_file_without_sound_specs_is_an_error_that_names_it(seeds, tmp_path, metadata):
    path = tmp_path / "layer_00.safetensors"
    write_tensors(path, {"m.values": np.zeros(3, np.float32)}, metadata)
    for codecs in (CODECS, FACTOR_CODECS):
        with pytest.raises(ArtifactError, match=r"layer_00\.safetensors: .*\. Make it again"):
            read_specs(TensorFile(path), codecs, "Make it again")
    with pytest.raises(ArtifactError, match=r"layer_00\.safetensors: "):
        assemble(seeds / "base", [path], tmp_path / "out", variant={})
    assert not (tmp_path / "out").exists()


def test_both_an_index_and_one_file_are_refused(seeds, tmp_path):
    path = Path(shutil.copytree(seeds / "three", tmp_path / "broken"))
    shutil.copyfile(seeds / "one" / "model.safetensors", path / "model.safetensors")
    with pytest.raises(ArtifactError, match="holds both"):
        densify(path, tmp_path / "dense")
    with pytest.raises(OSError, match="broken: it holds both"):
        CospadiForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("base_model_type", ["llama"], r"base_model_type \['llama'\] is not known"),
        ("base_model_type", "cospadi", "base_model_type 'cospadi' is not known"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000 in config.json, for"),
        ("vocab_size", 10**8, "embed_tokens.weight has shape .*, expected"),
        ("num_attention_heads", 0, "config.json makes no"),
        ("hidden_size", "wide", "config.json makes no"),
    ],
)
def test_a_config_that_no_model_fits_is_refused_before_memory_is_taken(seeds, tmp_path, key, value, message):
    folder = Folder(seeds / "one")
    folder.config[key] = value
    folder.write(tmp_path / "broken")
    with pytest.raises((OSError, ValueError), match=f"broken: .*{message}"):
        CospadiForCausalLM.from_pretrained(tmp_path / "broken")
    with pytest.raises(ArtifactError, match=f"broken: .*{message}"):
        densify(tmp_path / "broken", tmp_path / "dense")


def test_a_repository_of_the_hub_is_checked_as_a_folder_is(seeds, tmp_path):
    """From the cache that a download fills; nothing is fetched."""
    for name in ("one", "three"):
        snapshot = tmp_path / f"models--some--{name}" / "snapshots" / ("0" * 40)
        shutil.copytree(seeds / name, snapshot)
        (tmp_path / f"models--some--{name}" / "refs").mkdir()
        (tmp_path / f"models--some--{name}" / "refs" / "main").write_text("0" * 40)
        options = {"cache_dir": tmp_path, "local_files_only": True}
        CospadiForCausalLM.from_pretrained(f"some/{name}", verify=True, **options)
        shard = next(snapshot.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-3])
        with pytest.raises(OSError, match=f"some/{name}: .*{shard.name} is damaged or cut short"):
            CospadiForCausalLM.from_pretrained(f"some/{name}", **options)
