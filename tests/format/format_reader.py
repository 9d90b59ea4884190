"""A reader of packed checkpoints that knows docs/format.md, safetensors and NumPy, and nothing of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # gives NumPy the bfloat16 that the safetensors front end asks for
import numpy as np
from safetensors import safe_open


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Every matrix of the checkpoint, dense: name to float32 (d_in, d_out)."""
    config = json.loads((folder / "config.json").read_text())
    packing = config["quantization_config"]
    assert packing["quant_method"] == "cospadi" and packing["format_version"] == 1
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return {name: read_matrix(tensors, name, spec) for name, spec in packing["matrices"].items()}


def read_matrix(tensors: dict[str, np.ndarray], name: str, spec: dict[str, Any]) -> np.ndarray:
    """``W = D S`` plus the other parts, float32 (d_in, d_out)."""
    (d_in, d_out), k, codes = spec["shape"], spec["dictionary"]["n_atoms"], spec["codes"]
    more = [read_matrix(tensors, f"{name}.plus.{i}", part) for i, part in enumerate(spec.get("plus", []))]
    dictionary = read_dictionary(tensors, d_in, **spec["dictionary"])
    if codes["support"] == "mixture":
        coefficients = numbers(tensors[f"{name}.values"], codes["codec"], codes["n_nonzero"])
        atoms = np.split(dictionary, codes["n_nonzero"], axis=1)
        return sum((c * atom for c, atom in zip(coefficients, atoms, strict=True)), sum(more))
    values = numbers(tensors[f"{name}.values"], codes["codec"], codes["n_nonzero"])
    scales = tensors.get(f"{name}.scales")
    rows, taken, n_groups = np.zeros((d_out, k), np.float32), 0, 0
    for column, row in enumerate(rows):
        atoms = atoms_of(
            None if codes["support"] == "dense" else tensors[f"{name}.support"][column], k, codes["support"]
        )
        size = codes.get("group_size") or k
        for group in [atoms[first : first + size] for first in range(0, len(atoms), size)]:
            row[group] = values[taken : taken + len(group)] * (1 if scales is None else np.float32(scales[n_groups]))
            taken, n_groups = taken + len(group), n_groups + 1
    assert taken == len(values) and (scales is None or n_groups == len(scales) == codes["n_scales"])
    return dictionary @ rows.T + sum(more)


def read_dictionary(
    tensors: dict[str, np.ndarray], d_in: int, codec: str, n_atoms: int, tensor: str = "", group_size: int | None = None
) -> np.ndarray:
    """Dictionary, float32 (d_in, n_atoms)."""
    if codec == "identity":
        return np.eye(d_in, dtype=np.float32)
    dictionary = numbers(tensors[tensor], codec, d_in * n_atoms).reshape(d_in, n_atoms)
    if codec in ("int8", "int4"):
        for i in range(d_in):
            dictionary[i] *= tensors[f"{tensor}_scales"][i // (group_size or d_in)].astype(np.float32)
    return dictionary


def atoms_of(row: np.ndarray, k: int, support: str) -> list[int]:
    """Atoms whose codes are stored, of one column."""
    if support == "dense":
        return list(range(k))
    if support == "bitmask":
        return [i for i in range(k) if row[i // 8] >> (i % 8) & 1]
    pairs = [int(row[quad // 2]) >> (4 * (quad % 2)) & 15 for quad in range(k // 4)]
    return [4 * quad + atom for quad, pair in enumerate(pairs) for atom in (pair & 3, pair >> 2)]


def numbers(stored: np.ndarray, codec: str, n: int) -> np.ndarray:
    """Decode `n` numbers, float32, before scaling."""
    if codec in ("bf16", "int8"):
        assert stored.dtype == {"bf16": ml_dtypes.bfloat16, "int8": np.int8}[codec]
        return stored.astype(np.float32).ravel()
    bits = {"bf14": 14, "int4": 4}[codec]
    assert stored.dtype == np.uint8 and len(stored) == -(-bits * n // 8)
    stream = int.from_bytes(stored.tobytes(), "little")
    words = np.array([stream >> (bits * i) & (2**bits - 1) for i in range(n)], np.uint32)
    if codec == "int4":
        return np.where(words < 8, words, words - 16.0).astype(np.float32)
    return (words << 18).view(np.float32)
