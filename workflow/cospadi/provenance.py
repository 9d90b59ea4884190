"""Provenance: what an artifact belongs to. Whoever writes one says it, whoever reads one checks it.

Files of a run look alike: the Gram of one layer has the shape of the next one's. So each says which model, tokens,
layers and settings it was made from, and a copy in the wrong place is refused by name instead of being computed with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder

# What everything of a run that was computed on the calibration windows says of them
CALIBRATION = ("tokens", "heldout_from", "dtype")

# Of each tensor so many bytes count, from its start and its end: models that were trained apart differ there
_SAMPLE = 4096


def fingerprint(folder: ModelFolder) -> str:
    """What tells one model from another: SHA-256 of its config, of its tensors' names, dtypes and shapes, and of some
    bytes of each tensor. The same for any sharding; reads a few KiB a tensor.
    """
    digest = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for name in sorted(folder.weight_map):
        entry = folder.file_of(name).entries[name] if name in folder.file_of(name) else {}
        digest.update(json.dumps([name, entry.get("dtype"), entry.get("shape")]).encode())
        if entry:
            flat = folder.read(name).reshape(-1).view(np.uint8)
            digest.update(flat[:_SAMPLE].tobytes() + flat[-_SAMPLE:].tobytes())
    return digest.hexdigest()[:32]


def digest_of(settings: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def digest_of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """BLAKE2 of the values of arrays, one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for one in arrays:
        digest.update(np.ascontiguousarray(one).data)
    return digest.hexdigest()


def tokens_digest(input_ids: np.ndarray, attention_mask: np.ndarray) -> str:
    """SHA-256 of calibration windows: ids and mask, both (samples, length)."""
    digest = hashlib.sha256(str(input_ids.shape).encode())
    digest.update(np.ascontiguousarray(input_ids, np.int64).tobytes())
    digest.update(np.ascontiguousarray(attention_mask, np.uint8).tobytes())
    return digest.hexdigest()[:32]


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of an HDF5 file as ordinary values of Python."""
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in attributes.items()}


def check_provenance(path: str | Path, found: Mapping[str, Any], expected: Mapping[str, Any], remedy: str) -> None:
    """Refuse an artifact that belongs elsewhere.

    Parameters
    ----------
    path : path-like
        Named in the error.
    found : mapping
        What the artifact says of itself.
    expected : mapping
        What it has to say, key by key.
    remedy : str

    Raises
    ------
    ArtifactError
        Naming the first key that differs, and both values.
    """
    for key, value in expected.items():
        have = plain(found).get(key)
        if have != value:
            says = f"says nothing of its {key}" if have is None else f"is of {key} {have}"
            raise ArtifactError(path, f"{says}; expected is {key} {value}", remedy)
