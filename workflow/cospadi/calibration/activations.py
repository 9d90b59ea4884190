"""The files of calibration: how they are read and written, what their bits mean, which windows are held out, and what
everything that is computed from the windows has to say of itself. No torch needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from cospadi.errors import ArtifactError, ConfigError
from cospadi.files import explaining, replacing
from cospadi.provenance import check_provenance

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
WINDOWS_REMEDY = "Delete it and run again to prepare the calibration windows anew"

# how values of a dtype are stored; HDF5 has no bfloat16, so its bits travel as uint16
STORED_AS = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


@contextlib.contextmanager
def reading(path: str | Path, remedy: str) -> Iterator[h5py.File]:
    """Open an HDF5 file to read; whatever is wrong with it, in the block too, becomes one ArtifactError.

    Keep the block to the reading itself, so that no other error is taken for a damaged file.
    """
    try:
        with explaining(path), h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError as error:
        raise ArtifactError(path, "the file does not exist", "Run the workflow again, which makes it") from error
    except (OSError, KeyError, RuntimeError) as error:  # cut short; an entry missing; a checksum that fails
        raise ArtifactError(path, f"not a complete HDF5 file of the expected layout ({error})", remedy) from error


@contextlib.contextmanager
def writing(path: str | Path, attributes: Mapping[str, Any]) -> Iterator[h5py.File]:
    """Write an HDF5 file with these attributes, whole or not at all.

    Raises
    ------
    ArtifactError
        If the machine does not let it write (`files.explaining`).
    """
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(attributes)
        yield file


@dataclass(frozen=True)
class Edge:
    """What one chunk of layers hands to another: values (windows, length, hidden_size) at a layer, in a file.

    Attributes
    ----------
    dataset : str
    layer : str
        Attribute that says which layer.
    what : str
        What they are, with places for shape, dtype and layer.
    remedy : str
        With a place for the layer.
    """

    dataset: str
    layer: str
    what: str
    remedy: str

    def dtype(self, path: str | Path, layer: int) -> str:
        """Dtype of the values of a file."""
        with reading(path, self.remedy.format(layer)) as file:
            dtype = str(file.attrs["dtype"])
        if dtype not in STORED_AS:
            problem = f"dtype is {dtype!r}; allowed: {', '.join(STORED_AS)}"
            raise ArtifactError(path, problem, self.remedy.format(layer))
        return dtype

    def check(
        self, path: str | Path, shape: tuple[int, ...], dtype: str, layer: int, belongs: Mapping[str, Any]
    ) -> None:
        """Refuse values that are not of this shape and dtype, at this layer, or that belong elsewhere."""
        remedy = self.remedy.format(layer)
        with reading(path, remedy) as file:
            says = dict(file.attrs)
            found = file[self.dataset].shape, file.attrs["dtype"], int(file.attrs[self.layer])
        if found != (shape, dtype, layer):
            problem = f"holds {self.what.format(*found)}; expected {shape}, {dtype}, layer {layer}"
            raise ArtifactError(path, problem, remedy)
        check_provenance(path, says, belongs, remedy)

    def read(self, path: str | Path, layer: int, batch: slice, dtype: str) -> torch.Tensor:
        """Values of the windows `batch`."""
        with reading(path, self.remedy.format(layer)) as file:
            block = file[self.dataset][batch]
        return from_stored(block, dtype)


HIDDEN = Edge(
    "hidden",
    "last_layer",
    "hidden states of shape {}, dtype {}, after layer {}",
    "Delete it and run again to collect the layers up to {} anew",
)
COMPRESSED = Edge(
    "compressed",
    "last_layer",
    "hidden states of the compressed model of shape {}, dtype {}, after layer {}",
    "Delete it and run again to learn the layers up to {} anew",
)
GRADIENT = Edge(
    "gradient",
    "first_layer",
    "gradients of shape {}, dtype {}, before layer {}",
    "Delete it and run again to collect the gradients of the layers from {} on anew",
)


def to_stored(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values as they are stored (`STORED_AS`)."""
    import torch

    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def from_stored(block: np.ndarray, dtype: str) -> torch.Tensor:
    """A stored block as a tensor of `dtype`."""
    import torch

    tensor = torch.from_numpy(block)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def to_float32(block: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a stored block as float32; exact for all dtypes of `STORED_AS`."""
    if dtype == "bfloat16":
        return (block.astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float32, copy=False)


def first_heldout(n_windows: int, fraction: float) -> int:
    """Index of the first held-out window: the last `fraction` of the windows is held out, at least one if positive.

    Raises
    ------
    ConfigError
        If `fraction` is not in [0, 1) or leaves no window.
    """
    if not 0 <= fraction < 1:
        raise ConfigError([f"heldout_fraction is {fraction}; allowed is 0 <= heldout_fraction < 1"])
    if fraction == 0:
        return n_windows
    first = n_windows - max(1, round(fraction * n_windows))
    if first < 1:
        raise ConfigError([f"heldout_fraction {fraction} leaves none of {n_windows} windows; take more samples"])
    return first


def calibration_of(windows: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What everything of a run says of the calibration that it was computed from, key by key.

    Reads what the windows say of themselves, not the windows: who reads these compares them with their digest.

    Parameters
    ----------
    windows : path-like
        The calibration windows of the run.
    settings : mapping
        ``dtype`` of the config and, where windows are held out, ``heldout_fraction``.

    Returns
    -------
    dict
        ``tokens`` (digest of the windows); ``heldout_from`` (the first held-out window), if asked for; ``dtype``,
        unless the config leaves it to the machine.
    """
    with reading(windows, WINDOWS_REMEDY) as file:
        says, n_windows = dict(file.attrs), len(file["input_ids"])
    check_provenance(windows, says, {"format_version": FORMAT_VERSION}, WINDOWS_REMEDY)
    if "tokens" not in says:
        raise ArtifactError(windows, "says nothing of its tokens", WINDOWS_REMEDY)
    found = {"tokens": says["tokens"]}
    if "heldout_fraction" in settings:
        found["heldout_from"] = first_heldout(n_windows, settings["heldout_fraction"])
    return found if settings["dtype"] == "auto" else {**found, "dtype": settings["dtype"]}
