"""Files: written whole or not at all, read with errors that name the file and the remedy.

Tensors travel as safetensors. The ``numpy`` front end of safetensors knows no bfloat16, so tensors are
mapped here straight from the file with ``ml_dtypes.bfloat16``; no stage needs torch to read a weight.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from cospadi.errors import ArtifactError, machine_fault

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_METADATA_KEY = "cospadi"
# what a folder is called, in the temporary folder of the one that takes its place
_ASIDE = ".replaced"
# what lies beside the weights: settings, vocabularies, templates; no weights and no code
_DATA_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".yaml", ".yml", ".vocab", ".bpe"})
_LEGAL = re.compile(
    r"licen[cs]e|copying|copyright|notice|use[-_ ]?policy|terms|patents|eula|attribution", re.IGNORECASE
)
# what Snakemake's cache calls the folder of a fetched model: the digest of all that it was made from
_CACHED = re.compile(r"[0-9a-f]{64}(\..*)?")
_CODE_SUFFIXES = frozenset({".py", ".pyc", ".so", ".sh", ".ipynb", ".exe", ".dll"})
SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(bool),
}


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; move it onto `path` if the block succeeds.

    On any exception (a killed job, a full disk) the temporary file or folder is removed and `path` is
    left as it was, so a reader never sees a half-written artifact. A folder is exchanged with the old one in one step;
    where the system knows none, the old one is set aside for a moment. What a job left behind that had no chance to
    clean up (``kill -9``) is removed when `path` is written again, and what it had set aside is put back.

    Raises
    ------
    ArtifactError
        If the disk is full or the machine does not let it write for another reason (`explaining`).
    """
    path = Path(path)
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        prefix = f".{path.name}.{socket.gethostname()}.{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix)) / path.name
        try:
            yield temporary
            # a machine that stops must not leave the new name with half of the content
            _sync(temporary)
            if path.is_dir() and temporary.is_dir():
                _replace_folder(temporary, path)
            else:
                os.replace(temporary, path)
            _sync_entry(path.parent)
        finally:
            shutil.rmtree(temporary.parent, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """Move a folder in the place of another, which is left in `new`'s parent; at no time is there none to be found."""
    if _exchange(new, path):
        return
    aside = new.parent / _ASIDE
    os.replace(path, aside)
    try:
        _sync_entry(new.parent)
        os.replace(new, path)
    except BaseException:
        os.replace(aside, path)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def _sync(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, from the system's memory onto the disk."""
    for entry in [*path.rglob("*"), path]:
        if not entry.is_symlink():
            _sync_entry(entry)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explaining(path: str | Path) -> Iterator[None]:
    """Name faults of the machine that happen in the block as such: the files themselves may be good.

    Raises
    ------
    ArtifactError
        For a disk that is full, a permission that is missing, a lock that is refused and the like.
    """
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        fault = machine_fault(path, error)
        if fault is None:
            raise
        raise fault from error


def _remove_leftovers(path: Path) -> None:
    """Remove temporary folders of `path` whose process, one of this machine, is gone; what was set aside comes back."""
    start = f".{path.name}.{socket.gethostname()}."
    for folder in path.parent.iterdir():
        pid = folder.name.removeprefix(start).partition(".")[0]
        if folder.name.startswith(start) and pid.isdigit() and not _is_alive(int(pid)):
            if (folder / _ASIDE).exists() and not path.exists():
                os.replace(folder / _ASIDE, path)
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinities are refused."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _finite(text: str) -> float:
    """A number of a JSON file; NaN and infinity are none, and could not be written again."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON")
    return number


def read_json(path: str | Path, remedy: str = "Delete it and run again") -> dict[str, Any]:
    """Read a JSON file, which holds one object, as all of the project's and of a model's do.

    Raises
    ------
    ArtifactError
        If the file is missing, is not JSON, or holds another value.
    """
    try:
        with explaining(path):
            value = json.loads(Path(path).read_text(), parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError as error:
        raise ArtifactError(path, "the file does not exist", remedy) from error
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers of thousands of digits
        raise ArtifactError(path, f"not valid JSON ({error})", remedy) from error
    if not isinstance(value, dict):
        raise ArtifactError(path, f"holds a {type(value).__name__}, expected an object of keys and values", remedy)
    return value


def write_tensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; equal content gives equal bytes.

    Parameters
    ----------
    path : path-like
    tensors : mapping of str to ndarray
        Any dtype of the safetensors format, ``ml_dtypes.bfloat16`` included.
    metadata : mapping, optional
        Any JSON values; kept in the file's header.
    """
    arrays = {}
    for name in sorted(tensors):
        if tensors[name].dtype not in SAFETENSORS_DTYPES.values():
            raise TypeError(f"{name}: dtype {tensors[name].dtype} has no safetensors equivalent")
        arrays[name] = np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape)
    # one key: safetensors writes several in an order that changes from call to call
    header = {_METADATA_KEY: json.dumps(metadata, sort_keys=True)} if metadata else None
    with replacing(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, header)
        temporary.chmod(_file_mode())  # safetensors makes files that only their owner can read


def _file_mode() -> int:
    """Mode of an ordinary new file under the process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


class TensorFile:
    """A safetensors file mapped read-only; a tensor costs memory only when it is copied.

    Parameters
    ----------
    path : path-like
    remedy : str
        What the user does if the file is damaged.

    Attributes
    ----------
    entries : dict
        Tensor name to ``{"dtype", "shape", "data_offsets"}`` as in the file's header.
    metadata : dict
        As given to `write_tensors`; of a foreign file, its header's strings.
    """

    def __init__(self, path: str | Path, remedy: str = "Delete it and run again") -> None:
        self.path = Path(path)
        self._remedy = remedy
        try:
            with explaining(path):
                # safe_open checks the header against the file's length
                with safetensors.safe_open(self.path, framework="np"):
                    pass
                with open(self.path, "rb") as file:
                    length = int.from_bytes(file.read(8), "little")
                    header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            if _METADATA_KEY in metadata:
                metadata = json.loads(metadata[_METADATA_KEY])
                if not isinstance(metadata, dict):
                    raise ValueError(f"its header's {_METADATA_KEY} is a {type(metadata).__name__}, expected an object")
        except FileNotFoundError as error:
            raise ArtifactError(path, "the file does not exist", remedy) from error
        except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ArtifactError(path, f"not a complete safetensors file ({error})", remedy) from error
        self.metadata: dict[str, Any] = metadata
        self.entries: dict[str, dict[str, Any]] = header
        self._start = 8 + length

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self.entries)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the file."""
        first, last = self._entry(name)["data_offsets"]
        return last - first

    def read(self, name: str) -> np.ndarray:
        """Map a tensor read-only in the dtype of the file (bfloat16 as ``ml_dtypes.bfloat16``)."""
        entry = self._entry(name)
        shape = tuple(entry["shape"])
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ArtifactError(
                self.path, f"tensor {name} has dtype {entry['dtype']}, which is not supported", self._remedy
            )
        if 0 in shape:
            return np.empty(shape, dtype)
        offset = self._start + entry["data_offsets"][0]
        return np.memmap(self.path, dtype=dtype, mode="r", offset=offset, shape=shape or (1,)).reshape(shape)

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.entries:
            raise ArtifactError(self.path, f"holds no tensor {name}", self._remedy)
        return self.entries[name]


def _is_file_name(value: Any) -> bool:
    # the index of a folder from elsewhere must not lead out of it
    return isinstance(value, str) and value not in ("", ".", "..") and Path(value).name == value


class ModelFolder:
    """The weights of a Hugging Face folder, one tensor at a time, sharded or not, without torch.

    Parameters
    ----------
    path : path-like
        Folder with ``config.json`` and ``model.safetensors`` or ``model.safetensors.index.json``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._remedy = "Fetch the model again; safetensors weights are required (no .bin files)"
        self.config = read_json(self.path / "config.json", self._remedy)
        index = self.path / "model.safetensors.index.json"
        single_file = self.path / "model.safetensors"
        if index.exists():
            weight_map = read_json(index, self._remedy).get("weight_map")
            if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
                raise ArtifactError(index, "its weight_map is no object of tensors and names of files", self._remedy)
        else:
            single = TensorFile(single_file, self._remedy)
            weight_map = dict.fromkeys(single.names(), single.path.name)
        if single_file.exists() and single_file.name not in weight_map.values():
            raise ArtifactError(
                self.path,
                "holds two models: model.safetensors, which transformers reads, and other files that "
                "model.safetensors.index.json lists",
                "Remove the one that is not meant, with its index",
            )
        self.weight_map: dict[str, str] = weight_map
        self._files: dict[str, TensorFile] = {}

    def file_of(self, name: str) -> TensorFile:
        """The shard that holds tensor `name`."""
        if name not in self.weight_map:
            raise ArtifactError(self.path, f"holds no tensor {name}", self._remedy)
        shard = self.weight_map[name]
        if shard not in self._files:
            self._files[shard] = TensorFile(self.path / shard, self._remedy)
        return self._files[shard]

    def read(self, name: str) -> np.ndarray:
        """Map tensor `name` read-only in its stored dtype and shape."""
        return self.file_of(name).read(name)

    def read_weight(self, matrix: str) -> np.ndarray:
        """Weight of linear layer `matrix` as float32 (d_in, d_out): ``nn.Linear.weight`` transposed."""
        return np.ascontiguousarray(self.read(f"{matrix}.weight").astype(np.float32).T)


def data_files(folder: Path) -> list[Path]:
    """Files beside a model's weights that belong to the model wherever it goes, relative to the folder, sorted.

    Settings, vocabularies and templates, licences and notices under any name; of folders inside, templates and
    licences. No weights, no code, neither ``config.json`` nor ``README.md``, which are written anew.

    Raises
    ------
    ArtifactError
        If one is a link out of the folder.
    """
    found = []
    for parent, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        at_top = Path(parent) == folder
        for name in names:
            suffix = Path(name).suffix.lower()
            is_data = suffix in _DATA_SUFFIXES if at_top else suffix == ".jinja"
            if not (is_data or (_LEGAL.search(name) and suffix not in _CODE_SUFFIXES)) or name.startswith("."):
                continue
            if at_top and (name.lower() in ("config.json", "readme.md") or name.endswith(".index.json")):
                continue
            file = Path(parent, name)
            if file.is_file():
                _check_link(folder, file)
                found.append(file.relative_to(folder))
    return sorted(found)


def _check_link(folder: Path, file: Path) -> None:
    root = folder.resolve()
    if root.parent.name == "snapshots":  # the hub's cache keeps the content of a repository's files beside them
        root = root.parent.parent
    elif _CACHED.fullmatch(file.resolve().parent.name):  # a model that Snakemake took from its cache
        return
    if not file.resolve().is_relative_to(root):
        raise ArtifactError(
            file,
            f"a link out of the model's folder, to {file.resolve()}: what is there would be published",
            "Put a copy in the place of the link if it belongs to the model, or remove the link",
        )
