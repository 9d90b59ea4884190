"""Checksums: bytes that changed since a folder was written are found, with the weight file and tensor they are in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cospadi
from cospadi.errors import ArtifactError
from cospadi.files import TensorFile

NAME = "model.layers.2.mlp.gate_proj.values"


@pytest.fixture
def folder(packed_model, tmp_path) -> Path:
    """A copy, to be damaged, of a folder with several weight files."""
    return Path(shutil.copytree(packed_model("llama").packed, tmp_path / "packed"))


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def flip(folder: Path, tensor: str, bit: int = 0) -> Path:
    """Flip a bit in the middle of a tensor; the file it is in."""
    path = shard_of(folder, tensor)
    data = bytearray(path.read_bytes())
    first, last = TensorFile(path).entries[tensor]["data_offsets"]
    data[8 + int.from_bytes(data[:8], "little") + (first + last) // 2 // 2 * 2] ^= 1 << bit
    path.write_bytes(data)
    return path


def test_a_folder_as_written_verifies(folder):
    shards = sorted(folder.glob("*.safetensors"))
    tensors = [name for shard in shards for name in TensorFile(shard).names()]
    expected = sum(TensorFile(shard).nbytes(name) for shard in shards for name in TensorFile(shard).names())
    assert cospadi.verify(folder) == {"files": len(shards), "tensors": len(tensors), "nbytes": expected}
    listed = json.loads((folder / "cospadi_checksums.json").read_text())
    assert listed["files"].keys() == {shard.name for shard in shards}
    assert sorted(name for file in listed["files"].values() for name in file["tensors"]) == sorted(tensors)


def test_checksums_are_sha256_of_file_and_tensor(folder):
    import hashlib

    listed = json.loads((folder / "cospadi_checksums.json").read_text())["files"]
    for name, entry in listed.items():
        data = (folder / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        file = TensorFile(folder / name)
        for tensor, digest in entry["tensors"].items():
            assert digest == hashlib.sha256(file.read(tensor).tobytes()).hexdigest()


@pytest.mark.parametrize("tensor", [NAME, "model.norm.weight", "model.layers.0.self_attn.q_proj.dictionary"])
def test_a_flipped_bit_is_found_with_file_and_tensor(folder, tensor):
    """The lowest bit of a value: nothing else can tell."""
    path = flip(folder, tensor)
    with pytest.raises(ArtifactError, match=rf"{path.name}: the bytes of tensor {tensor} are not those") as caught:
        cospadi.verify(folder)
    assert str(folder) in str(caught.value) and str(caught.value).count("the bytes of") == 1


def test_every_other_way_to_differ_is_found(folder, tmp_path):
    shard = shard_of(folder, NAME)

    def message(change) -> str:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        change(copy)
        with pytest.raises(ArtifactError) as caught:
            cospadi.verify(copy)
        shutil.rmtree(copy)
        return str(caught.value)

    assert "cospadi_checksums.json does not exist" in message(lambda copy: (copy / "cospadi_checksums.json").unlink())
    for content in ("[]", '{"files": 3}', '{"files": {"a": []}}', "{"):
        text = message(lambda copy, content=content: (copy / "cospadi_checksums.json").write_text(content))
        assert "cospadi_checksums.json" in text
    assert f"{shard.name}, which cospadi_checksums.json lists, does not" in message(
        lambda copy: (copy / shard.name).unlink()
    )
    assert "extra.safetensors is not in cospadi_checksums.json" in message(
        lambda copy: shutil.copyfile(copy / shard.name, copy / "extra.safetensors")
    )
    cut = message(lambda copy: (copy / shard.name).write_bytes((copy / shard.name).read_bytes()[:-9]))
    assert f"{shard.name}: its bytes are not those that were written" in cut
    other = message(
        lambda copy: shutil.copyfile(
            next(p for p in copy.glob("*.safetensors") if p.name != shard.name), copy / shard.name
        )
    )
    assert f"{shard.name}: tensor model." in other and "is missing; " in other


def test_loading_compares_them_on_request(folder):
    from transformers import AutoModelForCausalLM

    flip(folder, NAME)
    AutoModelForCausalLM.from_pretrained(folder)  # another value, but a valid one
    with pytest.raises(OSError, match=f"the bytes of tensor {NAME} are not those"):
        AutoModelForCausalLM.from_pretrained(folder, verify=True)


def test_saving_writes_new_ones(packed_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed_model("llama").packed, verify=True)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert cospadi.verify(tmp_path / "saved")["files"] > 2
    model.save_pretrained(tmp_path / "saved")  # other weight files in the same folder
    assert cospadi.verify(tmp_path / "saved")["files"] == 1


def test_the_command_says_what_it_compared_or_what_changed(folder):
    def run() -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "cospadi.checkpoint", "verify", folder]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    done = run()
    assert done.returncode == 0 and "tensors" in done.stdout and "are as written" in done.stdout, done.stderr
    path = flip(folder, NAME)
    done = run()
    assert done.returncode == 1 and f"{path.name}: the bytes of tensor {NAME}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_what_is_uploaded_has_the_checksums_of_its_weights(folder, tmp_path, monkeypatch, way):
    import huggingface_hub
    from transformers import AutoModelForCausalLM

    uploaded = tmp_path / "hub"

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            (uploaded / operation.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, uploaded / operation.path_in_repo)

    def missing(*args, **kwargs):
        raise huggingface_hub.errors.EntryNotFoundError("no card")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **kwargs: huggingface_hub.RepoUrl(f"me/{repo_id}")
    )
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", missing)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if way == "push_to_hub":
        model.push_to_hub("packed")
    else:
        # an earlier saving in several files, of which one counts no longer
        model.save_pretrained(tmp_path / "packed", max_shard_size="200KB")
        model.save_pretrained(tmp_path / "packed", push_to_hub=True)
        assert cospadi.verify(tmp_path / "packed")["files"] == 1
    assert (uploaded / "cospadi_checksums.json").exists()
    assert cospadi.verify(uploaded)["files"] == 1
