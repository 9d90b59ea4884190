"""Faults of a run that show when it is planned: what the config asks for and the model cannot give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cospadi import methods
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, TensorFile, data_files
from cospadi.plan.variants import Variants
from cospadi.pruning import PRUNERS, removed_count
from cospadi.resources import Shapes
from cospadi.structure import FOLDABLE
from cospadi.tokenizer import TOKENIZER_FILES, has_tokenizer

# where the projections are in a block of every supported family
_PARENTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_NAMED = 3  # tensors at fault that a message names


def planning_faults(variants: Variants, shapes: Shapes, model_config: Mapping[str, Any]) -> Iterator[str]:
    """One line a fault: config path, value, what the model allows.

    Parameters
    ----------
    variants : Variants
    shapes : Shapes
    model_config : mapping
        Content of the model's ``config.json``.
    """
    yield from _pruning_faults(variants, model_config["architectures"][0])
    yield from _method_faults(variants, shapes)
    yield from _position_faults(variants.config, model_config)


def _pruning_faults(variants: Variants, architecture: str) -> Iterator[str]:
    for name in variants.variants:
        step = variants.pruning_step(name)
        if step is None:
            continue
        where = f"variants.{name}.steps.0" if variants.factorizing(name) else f"variants.{name}"
        highest = max(step["blocks"]) if isinstance(step["blocks"], list) else -1
        if removed_count(step) >= variants.n_layers or highest >= variants.n_layers:
            yield f"{where}.blocks: {step['blocks']}; the model has {variants.n_layers} blocks"
        if PRUNERS[step["method"]].fits and architecture not in FOLDABLE:
            yield (
                f"{where}: {step['method']} folds a linear map into the MLP's last matrix, and "
                f"{architecture} has a norm behind it. It works with {', '.join(FOLDABLE)}; "
                "uidl, shortgpt and random_cut work with every family"
            )


def _method_faults(variants: Variants, shapes: Shapes) -> Iterator[str]:
    """What methods cannot do with matrices of these shapes."""
    for name in variants.factorized:
        where = f"variants.{name}.steps.1" if variants.pruning_step(name) else f"variants.{name}"
        n_layers = variants.n_layers_of(variants.base_of(name))
        if n_layers > 0:
            settings = variants.factorizing(name)
            yield from (f"{where}.{fault}" for fault in methods.planning_faults(settings, shapes.matrices, n_layers))


def _position_faults(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> Iterator[str]:
    """Windows that are longer than the model has positions."""
    positions = model_config.get("text_config", model_config).get("max_position_embeddings")
    windows = {"calibration.length": config["calibration"]["length"]}
    if config["evaluation"]["perplexity"] is not None:
        windows["evaluation.perplexity.window"] = config["evaluation"]["perplexity"]["window"]
    for where, length in windows.items():
        if positions is not None and length > positions:
            yield f"{where}: {length}; the model has {positions} positions (max_position_embeddings)"


def local_model_faults(path: str, shapes: Shapes) -> Iterator[str]:
    """What is missing or damaged in a local model's folder. Headers are read, no weights.

    Parameters
    ----------
    path : str
        The config's ``model.path``.
    shapes : Shapes
        Of its ``config.json``.
    """
    try:
        folder = ModelFolder(path)
    except ArtifactError as error:
        yield f"model.path: {error}"
        return
    shards: dict[str, TensorFile] = {}
    for shard in sorted(set(folder.weight_map.values())):
        try:
            shards[shard] = TensorFile(folder.path / shard, "Fetch the model again")
        except ArtifactError as error:
            yield f"model.path: {error}"
    missing = [
        name
        for name, shard in folder.weight_map.items()
        if shard in shards and name not in shards[shard]  # of a shard at fault all has been said
    ]
    expected = _expected(shapes)
    missing += [name for name in expected if name not in folder.weight_map]
    if missing:
        yield f"model.path: {path}: lacks {_listed(missing)}. Fetch the model again"
    for name, shape in expected.items():
        shard = shards.get(folder.weight_map.get(name, ""))
        found = tuple(shard.entries[name]["shape"]) if shard is not None and name in shard else shape
        if found != shape:
            yield (
                f"model.path: {shard.path}: tensor {name} has shape {found}, expected {shape} by config.json. "
                "Take weights and config.json from the same model"
            )
    try:
        data_files(folder.path)
    except ArtifactError as error:
        yield f"model.path: {error}"
    if not has_tokenizer(folder.path):
        yield f"model.path: {path}: holds no tokenizer ({', '.join(TOKENIZER_FILES)})"


def _expected(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Names and shapes of the weights that every supported family has."""
    expected = {"model.embed_tokens.weight": (shapes.vocabulary, shapes.hidden_size)}
    for layer in range(shapes.n_layers):
        for parent, projections in _PARENTS.items():
            for projection in projections:
                d_in, d_out = shapes.matrices[projection]
                expected[f"model.layers.{layer}.{parent}.{projection}.weight"] = (d_out, d_in)
    return expected


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {', '.join(names[:_NAMED])}{more}"
