"""Files: whole or not at all, and errors that name the file."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cospadi.calibration.activations import reading
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, TensorFile, read_json, replacing, write_json, write_tensors


def test_tensors_round_trip_bit_for_bit_and_agree_with_torch(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {
        "bf16": np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "f32": np.array([1.5, -2.5], np.float32),
        "u8": np.arange(5, dtype=np.uint8),
        "empty": np.empty((0, 3), np.float32),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    write_tensors(path, tensors, {"spec": {"a": [1, 2]}, "b": 1, "c": 2, "d": 3})
    file = TensorFile(path)
    assert file.metadata == {"spec": {"a": [1, 2]}, "b": 1, "c": 2, "d": 3}
    for name, tensor in tensors.items():
        assert file.read(name).dtype == tensor.dtype
        np.testing.assert_array_equal(file.read(name), tensor)
        assert file.nbytes(name) == tensor.nbytes
    torch.testing.assert_close(load_file(path)["bf16"], torch.arange(6.0).reshape(2, 3).to(torch.bfloat16))
    first = path.read_bytes()
    for _ in range(8):
        write_tensors(path, dict(reversed(tensors.items())), {"d": 3, "c": 2, "b": 1, "spec": {"a": [1, 2]}})
        assert path.read_bytes() == first


def test_truncated_tensor_file_names_file_and_remedy(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": np.zeros(100, np.float32)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"t\.safetensors: not a complete safetensors file .* run again"):
        TensorFile(path)


def test_missing_files_and_tensors_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"no\.safetensors: the file does not exist"):
        TensorFile(tmp_path / "no.safetensors")
    write_tensors(tmp_path / "t.safetensors", {"a": np.zeros(1, np.float32)})
    with pytest.raises(ArtifactError, match="holds no tensor b"):
        TensorFile(tmp_path / "t.safetensors").read("b")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"bad\.json: not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


KILLED_WHILE_REPLACING = """
import os, sys, shutil
from cospadi import files
path, exchanges, moment = sys.argv[1:]
if exchanges == "no":
    files._exchange = lambda first, second: False
calls, replace, exchange = [], os.replace, files._exchange
def dies(step):
    def run(*arguments, **options):
        result = step(*arguments, **options)
        calls.append(arguments)
        if len(calls) == int(moment):
            os._exit(9)
        return result
    return run
os.replace = dies(replace)
if exchanges == "yes":
    files._exchange = dies(exchange)
shutil.rmtree = dies(shutil.rmtree)
with files.replacing(path) as temporary:
    temporary.mkdir()
    (temporary / "new").touch()
"""


@pytest.mark.parametrize(("exchanges", "moments"), [("yes", 2), ("no", 3)])
def test_a_machine_that_stops_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(tmp_path, exchanges, moments):
    """Stopped after every step in turn: setting aside, moving, cleaning up."""
    path = tmp_path / "model"
    for moment in range(1, moments + 2):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        (path / "old").touch()
        command = [sys.executable, "-c", KILLED_WHILE_REPLACING, str(path), exchanges, str(moment)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == (9 if moment <= moments else 0), done.stderr
        if exchanges == "yes":  # whoever reads it finds it at once
            assert [entry.name for entry in path.iterdir()] == ["new"]
        with pytest.raises(RuntimeError), replacing(path):
            raise RuntimeError("whoever writes next puts it back first")
        (left,) = (entry.name for entry in path.iterdir())
        assert left == ("old" if exchanges == "no" and moment == 1 else "new")
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_cannot_take_the_place_of_another_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    monkeypatch.setattr("cospadi.files._exchange", lambda first, second: False)
    replace = os.replace

    def refuses(source, target):
        if target == path and source.name == "model":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("os.replace", refuses)
    with pytest.raises(ArtifactError, match=r"model: the disk .* fails"), replacing(path) as temporary:
        temporary.mkdir()
    assert [entry.name for entry in path.iterdir()] == ["old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_job_left_is_removed_and_a_living_one_is_not_disturbed(tmp_path):
    path = tmp_path / "a.json"
    code = "import sys, os; from cospadi.files import replacing\nwith replacing(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(path) as first:
        first.write_text("1")
        with replacing(path) as second:  # another writer of the same file does not take the first one's away
            second.write_text("2")
        assert first.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "1"


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(ArtifactError, match=r"a\.json: the disk is full \(\d+ MiB left\)"),
        replacing(tmp_path / "a.json"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_safetensors_is_said_too(tmp_path, monkeypatch):
    def save_file(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", save_file)
    with pytest.raises(ArtifactError, match=r"t\.safetensors: the disk is full"):
        write_tensors(tmp_path / "t.safetensors", {"a": np.zeros(1, np.float32)})
    assert not list(tmp_path.iterdir())


def test_tensor_files_can_be_read_by_others(tmp_path):
    previous = os.umask(0o022)
    try:
        write_tensors(tmp_path / "t.safetensors", {"a": np.zeros(1, np.float32)})
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "t.safetensors").stat().st_mode) == 0o644


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_replaces_a_folder(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale").touch()
    with replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "fresh").touch()
    assert [entry.name for entry in target.iterdir()] == ["fresh"]


def test_model_folder_reads_shards_and_names_the_missing_one(tmp_path):
    write_json(tmp_path / "config.json", {})
    weight = torch.arange(6.0).reshape(2, 3)
    save_file({"a.weight": weight.to(torch.bfloat16)}, tmp_path / "model-1.safetensors")
    write_json(
        tmp_path / "model.safetensors.index.json",
        {"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}},
    )
    folder = ModelFolder(tmp_path)
    np.testing.assert_array_equal(folder.read_weight("a"), weight.numpy().T)
    with pytest.raises(ArtifactError, match=r"model-2\.safetensors: the file does not exist"):
        folder.read_weight("b")


# --- faults of the machine ----------------------------------------------------------------------------------------

MACHINE = {
    errno.EACCES: "permission denied. Give this user the right",
    errno.EROFS: "read-only",
    errno.EMFILE: r"too many files are open. Raise the limit \(ulimit -n\)",
    errno.EDQUOT: "quota .* is used up. Free space",
    errno.ENOSPC: r"the disk is full \(\d+ MiB left\). Free space",
    errno.EIO: "the disk or the network in front of it fails",
    errno.ESTALE: "network's file system has lost the file",
}


def _good_files(folder):
    import h5py

    write_json(folder / "a.json", {"a": 1})
    write_tensors(folder / "t.safetensors", {"a": np.zeros(4, np.float32)})
    with h5py.File(folder / "x.h5", "w") as file:
        file["a"] = np.zeros(3)
    return {
        "a.json": read_json,
        "t.safetensors": TensorFile,
        "x.h5": lambda path: reading(path, "Delete it and run again").__enter__(),
    }


@pytest.mark.parametrize("number", MACHINE)
def test_a_fault_of_the_machine_is_not_taken_for_damage(tmp_path, monkeypatch, number):
    readers = _good_files(tmp_path)

    def refused(*arguments, **options):
        raise OSError(number, os.strerror(number))

    def refused_by_safetensors(*arguments, **options):
        raise SafetensorError(f"Error while opening: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr("io.open", refused)
    monkeypatch.setattr("h5py.File", refused)
    monkeypatch.setattr("safetensors.safe_open", refused_by_safetensors)
    for name, read in readers.items():
        with pytest.raises(ArtifactError, match=f"{name}: .*{MACHINE[number]}") as raised:
            read(tmp_path / name)
        assert not {"Delete", "Fetch", "complete"} & set(str(raised.value).split())
    # and of writing, wherever in the block it happens
    before = sorted(entry.name for entry in tmp_path.iterdir())
    for fault in (OSError(number, os.strerror(number)), RuntimeError(f"Can't close file (errno = {number}, ...)")):
        with pytest.raises(ArtifactError, match=f"b.bin: .*{MACHINE[number]}"), replacing(tmp_path / "b.bin"):
            raise fault
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before


def test_a_lock_that_is_refused_is_named(tmp_path):
    import h5py

    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["a"] = 1
        file.flush()
        code = f"from cospadi.calibration.activations import reading\nwith reading({str(path)!r}, 'Delete it'): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = done.stderr.splitlines()[-1]
    assert "x.h5: the lock is refused: another process has the file open" in message, done.stderr
    assert "HDF5_USE_FILE_LOCKING=FALSE" in message and "Delete it" not in message


def test_other_errors_are_still_told_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="of mathematics"), replacing(tmp_path / "b.bin"):
        raise RuntimeError("of mathematics")
    (tmp_path / "x.h5").write_bytes(b"no HDF5")
    with pytest.raises(ArtifactError, match="not a complete HDF5 file"), reading(tmp_path / "x.h5", "Delete it"):
        pass


@pytest.mark.parametrize("folder", [False, True])
def test_what_gets_its_name_is_on_the_disk(tmp_path, monkeypatch, folder):
    """Content first, then the name, then the folder that has the name."""
    events = []
    replace, sync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda *pair: events.append("renamed") or replace(*pair))
    with replacing(tmp_path / "a") as temporary:
        if folder:
            (temporary / "b").mkdir(parents=True)
            (temporary / "b" / "c").write_text("1")
        else:
            temporary.write_text("1")
    named = events.index("renamed")
    assert [os.path.basename(path) for path in events[:named]] == (["b", "c", "a"] if folder else ["a"])
    assert events[named + 1 :] == [str(tmp_path)]
