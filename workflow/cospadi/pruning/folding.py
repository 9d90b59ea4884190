"""Write what is left of a model as an ordinary one of fewer layers, with every transform folded into an MLP."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cospadi.cards import origin_card, pruned_card
from cospadi.checkpoint import MAX_SHARD_BYTES, StoredTensor, write_folder
from cospadi.errors import ArtifactError, ConfigError, UnsupportedModelError
from cospadi.files import ModelFolder, TensorFile
from cospadi.provenance import check_provenance
from cospadi.pruning.edit import fold
from cospadi.structure import FOLDABLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDY = "Delete it and run again to fit the transforms anew"


def check_foldable(architecture: str) -> None:
    """Refuse a family whose MLP output goes through a norm: a linear map cannot be folded through that.

    Raises
    ------
    UnsupportedModelError
        Naming the families that can be folded, and the methods that need no folding.
    """
    if architecture not in FOLDABLE:
        raise UnsupportedModelError(
            f"{architecture}: replaceme folds a linear map into the MLP's last matrix, and this family has a norm "
            f"behind it. It works with {', '.join(FOLDABLE)}; uidl, shortgpt and random_cut work with every family"
        )


def read_transforms(path: str | Path, belongs: Mapping[str, Any] | None = None) -> dict[int, np.ndarray]:
    """Transforms written by `fitting.fit_transforms`: block to (d, d) float64.

    Raises
    ------
    ArtifactError
        If they do not belong to what they have to, key by key.
    """
    file = TensorFile(path, _REMEDY)
    check_provenance(path, file.metadata, belongs or {}, _REMEDY)
    return {int(name.removeprefix("layer_")): np.array(file.read(name)) for name in file.names()}


def prune(
    model_folder: str | Path,
    structure: Mapping[str, Any],
    removed: Sequence[int],
    output: str | Path,
    *,
    transforms: Mapping[int, np.ndarray] | None = None,
    settings: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a model without some of its blocks.

    Parameters
    ----------
    model_folder : path-like
        The dense model.
    structure : mapping
        From `structure.inspect_model`.
    removed : sequence of int
        Blocks that go, numbered from 0.
    output : path-like
        Folder to write, whole or not at all: an ordinary Hugging Face model of the same family.
    transforms : mapping, optional
        Block to T (d, d): its MLP gives ``M T``, by ``W_down <- T^T W_down`` in float64, rounded once.
    settings : mapping
        The pruning step, for the model card.

    Returns
    -------
    dict
        ``parameters`` and ``target_parameters`` of the dense model (``dense``) and of what is left (``pruned``).

    Raises
    ------
    ConfigError
        If no block would stay.
    ArtifactError
        If a transform does not fit.
    UnsupportedModelError
        If there are transforms and the family cannot take them.
    """
    folder = ModelFolder(model_folder)
    transforms = dict(transforms or {})
    if transforms:
        check_foldable(structure["architecture"])
    kept = [index for index in range(structure["n_layers"]) if index not in set(removed)]
    if not kept:
        raise ConfigError([f"blocks: all {structure['n_layers']} blocks would go"])
    folded: dict[str, np.ndarray] = {}
    for block, transform in transforms.items():
        name = f"{structure['layers'][block]['prefix']}.mlp.down_proj"
        width = structure["hidden_size"]
        if transform.shape != (width, width) or block not in kept:
            raise ArtifactError(
                "transforms", f"block {block} has a transform of shape {transform.shape}, {(width, width)} fit", _REMEDY
            )
        folded |= {f"{name}.{part}": transform for part in ("weight", "bias")}

    stem = structure["layers"][0]["prefix"].removesuffix("0")
    tensors = []
    for name in folder.weight_map:
        block = _block_of(name, stem)
        if block is not None and block not in kept:
            continue
        file = folder.file_of(name)
        new_name = name
        if block is not None:
            new_name = f"{stem}{kept.index(block)}{name.removeprefix(f'{stem}{block}')}"
        tensors.append(
            StoredTensor(new_name, file.nbytes(name), functools.partial(_read, file, name, folded.get(name)))
        )
    texts = {"README.md": pruned_card(folder, Path(output).name, removed, settings)}
    if not (folder.path / "ORIGIN.md").exists():
        texts["ORIGIN.md"] = origin_card(folder)
    write_folder(output, _config(folder, kept), tensors, base=folder.path, texts=texts, max_shard_bytes=max_shard_bytes)
    gone_parameters = sum(
        math.prod(folder.file_of(name).entries[name]["shape"])
        for name in folder.weight_map
        if _block_of(name, stem) in set(removed)
    )
    gone_targets = sum(
        math.prod(matrix["shape"])
        for index in removed
        for site in structure["layers"][index]["sites"]
        for matrix in site["matrices"]
    )
    total, targets = structure["total_parameters"], structure["target_parameters"]
    return {
        "dense": {"parameters": total, "target_parameters": targets},
        "pruned": {"parameters": total - gone_parameters, "target_parameters": targets - gone_targets},
    }


def insert_transform(model: PreTrainedModel, block: int, transform: np.ndarray) -> None:
    """Put T behind the MLP of a loaded model's block as a linear layer of its own, unfolded: to train it, say.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place. It is no ordinary model any more: fold T (`prune`) before saving it.
    block : int
    transform : ndarray (d, d)
    """
    import torch
    from torch import nn

    mlp = model.get_submodule(f"{model.base_model_prefix}.layers.{block}.mlp")
    linear = nn.Linear(
        *transform.shape, bias=False, dtype=mlp.down_proj.weight.dtype, device=mlp.down_proj.weight.device
    )
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(np.ascontiguousarray(transform.T)))
    mlp.down_proj = nn.Sequential(mlp.down_proj, linear)


def _block_of(name: str, stem: str) -> int | None:
    """Number of the block a tensor belongs to."""
    if not name.startswith(stem):
        return None
    return int(name.removeprefix(stem).partition(".")[0])


def _read(file: TensorFile, name: str, transform: np.ndarray | None) -> np.ndarray:
    stored = file.read(name)
    return stored if transform is None else fold(transform, stored)


def _config(folder: ModelFolder, kept: Sequence[int]) -> dict[str, Any]:
    """``config.json`` for the blocks that are left, each with the kind of attention it had."""
    from transformers import AutoConfig

    config = {key: value for key, value in folder.config.items() if key != "transformers_version"}
    config["num_hidden_layers"] = len(kept)
    # where config.json names only a pattern, transformers knows what it means for each block
    kinds = getattr(AutoConfig.from_pretrained(folder.path), "layer_types", None)
    if kinds:
        config["layer_types"] = [kinds[index] for index in kept]
    return config
