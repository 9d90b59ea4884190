"""Budgets: the ratio that leaves a model's file, or what of it is in a GPU's memory, as many bytes as a person wants.

What is not learned counts, too: the embedding and the head where it is stored apart, in the bits that a variant says,
and as they are norms, biases, and projections that are not among its targets. On a GPU keys and values of a number of
tokens count too, and the matrices of methods whose codes are decoded when a model is loaded. The count is of what
``config.json`` says, and never too low.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cospadi.budget import nbytes_left
from cospadi.config import read_schema
from cospadi.embeddings import ROUNDINGS, asked_of, embedding_nbytes
from cospadi.methods import METHODS
from cospadi.methods.choose import CHOOSE
from cospadi.plan.names import at_step
from cospadi.pruning import PRUNERS, removed_count
from cospadi.resources import Shapes
from cospadi.sizes import nbytes_of

# Of the names and places of a matrix's tensors in the file's header; measured, 140 to 420
_HEADER = 1000
# Tokens whose keys and values are in memory on a GPU, where a budget says nothing of them; fewer if the model has fewer
CONTEXT = 4096


class Budget(NamedTuple):
    """What a person wrote.

    Attributes
    ----------
    nbytes : int
    on_gpu : bool
        Whether it is of the memory of a GPU once the model is loaded, and not of the file.
    tokens : int or None
        Whose keys and values are in memory.
    """

    nbytes: int
    on_gpu: bool
    tokens: int | None

    @classmethod
    def of(cls, text: str) -> Budget:
        """Of ``96MB``, ``4GB on the GPU`` or ``4GB on the GPU with 8192 tokens``, as the config's schema allows it."""
        size, on_gpu, tokens = re.fullmatch(r"(.*?)( on the GPU)?(?: with ([0-9]+) tokens)?", text).groups()
        return cls(nbytes_of(size), on_gpu is not None, tokens and int(tokens))


def with_ratios(
    config: Mapping[str, Any], shapes: Shapes, model_config: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """A complete config with the ratio of every variant that has a ``budget``, what is wrong with budgets, and what the
    others consist of.

    Parameters
    ----------
    config : mapping
    shapes : Shapes
    model_config : mapping
        Content of the model's ``config.json``.
    """
    config, faults, told = copy.deepcopy(dict(config)), [], []
    allowed = read_schema("config.schema.yaml")["$defs"]["variant"]["properties"]["ratio"]
    limits = allowed["minimum"], allowed["maximum"]
    for name, variant in config["variants"].items():
        settings = _factorizing(variant)
        if settings.get("budget") is None:
            continue
        text = settings.pop("budget")
        budget, where = Budget.of(text), f"{at_step(name, variant, 1)}.budget: {text}"
        sources, n_layers, targets, others = _parts(config, variant, shapes, model_config)
        width = _width(model_config)
        parts = {"embeddings and all else that is not among the matrices": others}
        if budget.on_gpu:
            decoded = [one["method"] for one in sources if METHODS[one["method"]].decoded]
            if decoded and "choose_from" in settings:
                faults.append(
                    f"{where}; matrices of {decoded[0]} are decoded when they are loaded, so what memory holds depends "
                    "on what is chosen; give bytes of the file"
                )
                continue
            tokens = budget.tokens or min(CONTEXT, shapes.positions or CONTEXT)
            keys = shapes.matrices["k_proj"][1]
            parts[f"keys and values of {tokens} tokens"] = 2 * width * n_layers * keys * tokens
            if decoded:
                parts[f"what matrices of {decoded[0]} are decoded to"] = width * sum(map(math.prod, targets))
            bits, method = asked_of(settings)
            if bits < 16 and ROUNDINGS[method].decoded:
                parts["what embeddings are decoded to"] = width * shapes.embedding_parameters
        others = sum(parts.values())
        consists = ", ".join(f"{_megabytes(nbytes)} {what}" for what, nbytes in parts.items())
        left, dense = budget.nbytes - others, nbytes_left(targets, 0)
        ratio = 1 - left / dense
        if limits[0] <= ratio <= limits[1]:
            settings["ratio"] = ratio
            told.append(f"{where}: {consists}, {_megabytes(left)} compressed matrices (ratio {ratio:.4g})")
            continue
        least, most = (others + nbytes_left(targets, limit) for limit in limits[::-1])
        faults.append(f"{where}; from {_megabytes(least)} to {_megabytes(most)}, of which {consists}")
    return config, faults, told


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.4g}MB"


def model_nbytes(
    config: Mapping[str, Any], variant: Mapping[str, Any] | None, shapes: Shapes, model_config: Mapping[str, Any]
) -> int | None:
    """Bytes of the weights of a variant of a complete config with ratios (None: of the model as it is); None where no
    ratio says so.
    """
    settings = _factorizing(variant) if variant else {}
    *_, targets, others = _parts(config, variant or {"steps": []}, shapes, model_config)
    if settings and settings.get("ratio") is None:
        return None
    if not settings:
        return others + _width(model_config) * sum(map(math.prod, targets))
    return others + nbytes_left(targets, settings["ratio"])


def _factorizing(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the step of a variant that says how many bytes its matrices get; empty where there is none."""
    return next((step for step in _steps(variant) if step["method"] in [*METHODS, CHOOSE.name]), {})


def _steps(variant: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return variant.get("steps", [variant])


def _parts(
    config: Mapping[str, Any], variant: Mapping[str, Any], shapes: Shapes, model_config: Mapping[str, Any]
) -> tuple[list[Mapping[str, Any]], int, list[tuple[int, int]], int]:
    """Settings of who learns the matrices of a variant, its layers, shapes of the matrices, bytes of all else in its
    files."""
    settings = _factorizing(variant)
    n_layers = shapes.n_layers - sum(removed_count(step) for step in _steps(variant) if step["method"] in PRUNERS)
    sources = [config["variants"][source] for source in settings.get("choose_from", ())] or [settings]
    chosen = sources[0].get("targets") or list(shapes.matrices)
    targets = [shapes.matrices[projection] for projection in chosen] * max(n_layers, 1)
    others = _others(shapes, _width(model_config), n_layers, chosen, asked_of(settings))
    return sources, n_layers, targets, others


def _width(model_config: Mapping[str, Any]) -> int:
    return 4 if "float32" in (model_config.get("dtype"), model_config.get("torch_dtype")) else 2


def _others(shapes: Shapes, width: int, n_layers: int, chosen: list[str], embedding: tuple[float, str]) -> int:
    """Bytes in the file that are not of the target matrices."""
    embeddings = width * shapes.embedding_parameters
    if embedding[0] < 16:
        one = shapes.vocabulary, shapes.hidden_size
        embeddings = shapes.embedding_parameters // math.prod(one) * embedding_nbytes(*one, *embedding)
    left_out = [math.prod(shape) for name, shape in shapes.matrices.items() if name not in chosen]
    numbers = shapes.hidden_size + n_layers * (shapes.small_parameters + sum(left_out))
    return embeddings + width * numbers + _HEADER * n_layers * len(shapes.matrices)
