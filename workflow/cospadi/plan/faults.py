"""Faults of a run that show when it is planned: what the config asks for and the model cannot give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cospadi import methods
from cospadi.allocation import AS_IS, read_table
from cospadi.budget import as_is_nbytes, nbytes_left
from cospadi.errors import ArtifactError, ConfigError, listed
from cospadi.files import ModelFolder, TensorFile, data_files
from cospadi.formats.values import storage_of
from cospadi.methods.base import MEASURED, MENU, planned_problems
from cospadi.plan.names import at_step, layers_of
from cospadi.plan.variants import Variants
from cospadi.problem import Target
from cospadi.pruning import PRUNERS, removed_count
from cospadi.resources import Shapes
from cospadi.structure import FOLDABLE, PART_OF
from cospadi.tokenizer import TOKENIZER_FILES, has_chat_template, has_tokenizer


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
    yield from _residual_faults(variants, model_config["architectures"][0])
    yield from _rotation_faults(variants.config["model"], model_config["architectures"][0])
    yield from _menu_faults(variants, shapes)
    for name in variants.factorized:
        for path in filter(_is_file, variants.allocation_file(name)):
            where = at_step(name, variants.config["variants"][name], 1)
            yield from (
                f"{where}.allocation_file: {path}: {fault}" for fault in _table_faults(variants, name, path, shapes)
            )
    yield from _position_faults(variants.config, shapes.positions)


def _pruning_faults(variants: Variants, architecture: str) -> Iterator[str]:
    for name in variants.variants:
        step = variants.pruning_step(name)
        if step is None:
            continue
        where = at_step(name, variants.config["variants"][name], 0)
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
        where = at_step(name, variants.config["variants"][name], 1)
        n_layers = variants.n_layers_of(variants.base_of(name))
        if n_layers > 0:
            settings = variants.factorizing(name)
            yield from (f"{where}.{fault}" for fault in methods.planning_faults(settings, shapes.matrices, n_layers))


def _residual_faults(variants: Variants, architecture: str) -> Iterator[str]:
    for name in variants.factorized:
        share = variants.factorizing(name).get("residual_share", 0)
        if share > 0 and architecture not in FOLDABLE:
            where = at_step(name, variants.config["variants"][name], 1)
            yield (
                f"{where}.residual_share: {share}; {architecture} has a norm between what its matrices "
                f"give and the residual stream; set it to 0. It works with {', '.join(FOLDABLE)}"
            )


def _rotation_faults(model: Mapping[str, Any], architecture: str) -> Iterator[str]:
    if model.get("rotate") is not None and architecture not in FOLDABLE:
        yield (
            f"model.rotate: {model['rotate']}; {architecture} is no family whose norms can be folded; set it to null. "
            f"It works with {', '.join(FOLDABLE)}"
        )


def _is_file(path: str) -> bool:
    return Path(path).is_file()  # that one is missing is told already


def _menu_faults(variants: Variants, shapes: Shapes) -> Iterator[str]:
    """Menus whose least sizes, of those that a method can do with, take more than the ratio leaves."""
    for name in variants.factorized:
        settings = variants.factorizing(name)
        if not variants.allocates(name) or settings["allocation"] not in (MENU, MEASURED):
            continue
        method, storage = methods.METHODS[settings["method"]], storage_of(settings["codes"])
        least: dict[tuple, int] = {}  # of problems of the same shapes, which most are
        taken, every = 0, []
        for unit in variants.units(name):
            for targets in planned_problems(settings, method, shapes.matrices, len(layers_of(unit))):
                own = tuple(target.shape for target in targets)
                if own not in least:
                    sizes = [int(size * nbytes_left(own, settings["ratio"])) for size in settings["menu"]]
                    able = [nbytes for nbytes in sizes if not list(_ratio_faults(settings, targets, nbytes))]
                    least[own] = min([as_is_nbytes(own, storage), *able])
                taken, every = taken + least[own], [*every, *own]
        nbytes = nbytes_left(every, settings["ratio"])
        if taken > nbytes:
            where = at_step(name, variants.config["variants"][name], 1)
            yield (
                f"{where}.menu: {settings['menu']}; the matrices take {taken} bytes at least, "
                f"ratio {settings['ratio']:.6g} leaves {nbytes}; add 1.0, or a smaller one"
            )


def _ratio_faults(settings: Mapping[str, Any], targets: list[Target], nbytes: int) -> Iterator[str]:
    """Why a method cannot do with so many bytes of a problem."""
    # half a byte more, so that of the ratio, which is no exact number, as many whole ones are left
    ratio = 1 - (nbytes + 0.5) / nbytes_left([target.shape for target in targets], 0)
    for fault in methods.METHODS[settings["method"]].faults({**settings, "ratio": ratio}, [targets]):
        if fault.startswith("ratio: "):
            yield fault.removeprefix("ratio: ")


def _table_faults(variants: Variants, name: str, path: str, shapes: Shapes) -> Iterator[str]:
    """What is wrong with a person's table of a variant's bytes: every problem once, bytes that its method can do with,
    and together no more than the ratio leaves.
    """
    try:
        rows = read_table(path)
    except ConfigError as error:
        yield from error.faults
        return
    settings = variants.factorizing(name)
    method, storage = methods.METHODS[settings["method"]], storage_of(settings["codes"])
    problems: dict[tuple[str, ...], list[Target]] = {}
    for unit in variants.units(name):
        layers = layers_of(unit)
        for targets in planned_problems(settings, method, shapes.matrices, len(layers)):
            problems[tuple(_matrix_name(layers[one.layer], one.projection) for one in targets)] = targets
    matrices = {matrix: names for names in problems for matrix in names}
    taken = 0
    for row in rows:
        targets, shown = problems.get(row.matrices), " + ".join(row.matrices)
        if targets is None:
            known = matrices.get(row.matrices[0])
            what = f"shares its bytes: {' + '.join(known)}" if known else f"is no matrix of {name}"
            yield f"line {row.line}: {shown} {what}"
            continue
        sizes = [target.shape for target in targets]
        dense = nbytes_left(sizes, 0)
        taken += as_is_nbytes(sizes, storage) if row.nbytes is None else row.nbytes
        if row.nbytes is not None and row.nbytes > dense:
            yield f"line {row.line}: {row.nbytes} bytes for {shown}, which takes {dense} as it is; write {AS_IS}"
        elif row.nbytes is not None:
            for fault in _ratio_faults(settings, targets, row.nbytes):
                yield f"line {row.line}: {shown}: {fault}"
    missing = [" + ".join(names) for names in problems.keys() - {row.matrices for row in rows}]
    if missing:
        yield f"says nothing of {len(missing)} of {len(problems)} problems ({listed(sorted(missing))})"
    every = [target.shape for targets in problems.values() for target in targets]
    nbytes = nbytes_left(every, settings["ratio"])
    if taken > nbytes:
        needed = 1 - taken / nbytes_left(every, 0)
        yield (
            f"gives {taken} bytes, {taken - nbytes} more than the {nbytes} that ratio {settings['ratio']:.6g} leaves; "
            f"ratio {max(0.0, math.floor(1e6 * needed) / 1e6):.6g} leaves as many"
        )


def _matrix_name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.{PART_OF[projection].name}.{projection}"


def _position_faults(config: Mapping[str, Any], positions: int | None) -> Iterator[str]:
    """Windows that are longer than the model has positions."""
    windows = {"calibration.length": config["calibration"]["length"]}
    if config["evaluation"]["perplexity"] is not None:
        windows["evaluation.perplexity.window"] = config["evaluation"]["perplexity"]["window"]
    for where, length in windows.items():
        if positions is not None and length > positions:
            yield f"{where}: {length}; the model has {positions} positions (max_position_embeddings)"


def local_model_faults(path: str, shapes: Shapes, chats: bool) -> Iterator[str]:
    """What is missing or damaged in a local model's folder. Headers are read, no weights.

    Parameters
    ----------
    path : str
        The config's ``model.path``.
    shapes : Shapes
        Of its ``config.json``.
    chats : bool
        Whether its template has to make text of conversations.
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
        what = "tensor" if len(missing) == 1 else "tensors"
        yield f"model.path: {path}: lacks {what} {listed(missing)}. Fetch the model again"
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
        if chats and not has_chat_template(folder.path):
            remedy = "Take the model's version that was trained to chat, or give text (text.source: jsonl)"
            yield f"text: conversations, but {path} has no chat template (chat_template.jinja). {remedy}"
    except ArtifactError as error:
        yield f"model.path: {error}"
    if not has_tokenizer(folder.path):
        yield f"model.path: {path}: holds no tokenizer ({', '.join(TOKENIZER_FILES)})"


def _expected(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Names and shapes of the weights that every supported family has."""
    expected = {"model.embed_tokens.weight": (shapes.vocabulary, shapes.hidden_size)}
    for layer in range(shapes.n_layers):
        for projection, (d_in, d_out) in shapes.matrices.items():
            expected[f"{_matrix_name(layer, projection)}.weight"] = (d_out, d_in)
    return expected
