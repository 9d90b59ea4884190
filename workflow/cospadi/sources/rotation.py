"""A copy of a model that computes the same with other weights: its residual stream in a random orthonormal basis.

The weights of a checkpoint may lie on a grid that a quantizer left (the demo's are 4-bit integers in blocks of 32),
which flatters whoever rounds to a grid like it. Rotated weights lie on none. Norms of the residual stream are folded
into the matrices that read it first: without their weights they commute with a rotation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, read_json, write_json
from cospadi.registry import option
from cospadi.structure import FOLDABLE, PART_OF

OPTIONS: dict[str, dict[str, Any]] = {
    "rotate": option(
        ["integer", "null"],
        "Seed of a random orthonormal basis that the residual stream is turned into once the model is fetched, norms "
        "folded into the matrices: it computes the same, and its weights lie on no quantizer's grid. Give the copy a "
        "`name` of its own. null: as it is.",
        minimum=0,
        default=None,
    )
}

_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_LAYER = re.compile(r"(model\.layers\.\d+)\..+\.(\w+)\.(weight|bias)")


def planned(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the rotated copy: what the head reads is folded into it, so it is the embedding no longer."""
    return {**config, "tie_word_embeddings": False}


def rotate(path: str | Path, seed: int, *, log: Callable[[str], None] = print) -> None:
    """Turn the residual stream of a folder, in place, in float64, rounded once to the dtype of each tensor.

    Raises
    ------
    ArtifactError
        If the family has more norms, or others, than are folded here.
    """
    import torch
    from safetensors.torch import load_file, save_file

    path = Path(path)
    folder = ModelFolder(path)
    architecture = (folder.config.get("architectures") or [None])[0]
    if architecture not in FOLDABLE:
        remedy = f"Set model.rotate to null, or take a model of {', '.join(FOLDABLE)}"
        raise ArtifactError(path / "config.json", f"{architecture} is no family whose norms can be folded", remedy)

    def read(name: str) -> Any:
        return load_file(path / folder.weight_map[name])[name].double()

    norms = {name: read(name) for name in folder.weight_map if name.endswith("layernorm.weight") or name == _NORM}
    tied = _HEAD not in folder.weight_map
    basis = torch.from_numpy(random_basis(len(norms[_NORM]), seed))

    def turned(name: str, tensor: Any) -> Any:
        """A tensor of the copy; rows of a stored weight are outputs."""
        if name in norms:
            return torch.ones_like(tensor)
        if name == _EMBEDDING:
            return tensor.double() @ basis
        if name == _HEAD:
            return tensor.double() * norms[_NORM] @ basis
        layer, projection, kind = found.groups() if (found := _LAYER.fullmatch(name)) else ("", "", "")
        part = PART_OF.get(projection)
        if part is None or (kind == "bias" and projection in part.readers):
            return tensor
        if projection in part.readers:
            return tensor.double() * norms[f"{layer}.{part.norm}.weight"] @ basis
        # what is added to the stream
        return (basis.T @ tensor.double()) if kind == "weight" else tensor.double() @ basis

    for file in sorted(set(folder.weight_map.values())):
        tensors = load_file(path / file)
        if tied and _EMBEDDING in tensors:
            tensors[_HEAD] = tensors[_EMBEDDING]
        made = {name: turned(name, tensor).to(tensor.dtype).contiguous() for name, tensor in tensors.items()}
        (path / file).unlink()  # it may be another folder's too, by a hard link
        save_file(made, path / file, {"format": "pt"})
        index = path / "model.safetensors.index.json"
        if tied and _HEAD in made and index.exists():
            content = read_json(index)
            content["weight_map"][_HEAD] = file
            index.write_text(json.dumps(content, indent=2))
    config = path / "config.json"
    content = planned(read_json(config))
    config.unlink()
    write_json(config, content)
    origin = path / "ORIGIN.md"
    text = origin.read_text() if origin.exists() else ""
    line = f"- Rotated: the residual stream is in a random orthonormal basis (seed {seed}), norms are folded\n"
    origin.write_text(f"{text}{line}")
    log(f"turned the residual stream of {len(folder.weight_map)} tensors into basis {seed}")


def random_basis(size: int, seed: int) -> np.ndarray:
    """A random orthonormal basis, float64 (size, size), of all alike."""
    basis, triangle = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return basis * np.sign(np.diag(triangle))
