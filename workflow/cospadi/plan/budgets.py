"""Budgets: the ratio that leaves a model's file as many bytes as a person wants.

What is not learned stays as it is and counts: the embedding, the head where it is stored apart, norms, biases, and
projections that are not among a variant's targets. The count is of what ``config.json`` says, and never too low.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

from cospadi.budget import nbytes_left
from cospadi.config import read_schema
from cospadi.methods import METHODS
from cospadi.methods.choose import CHOOSE
from cospadi.plan.names import at_step
from cospadi.pruning import PRUNERS, removed_count
from cospadi.resources import Shapes

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# Of the names and places of a matrix's tensors in the file's header; measured, 140 to 420
_HEADER = 1000


def in_bytes(budget: str) -> int:
    """``96MB`` as a number; the config's schema has seen that it is one."""
    number, unit = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)", budget).groups()
    return math.floor(float(number) * UNITS[unit])


def with_ratios(
    config: Mapping[str, Any], shapes: Shapes, model_config: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A complete config with the ratio of every variant that has a ``budget``, and what is wrong with budgets.

    Parameters
    ----------
    config : mapping
    shapes : Shapes
    model_config : mapping
        Content of the model's ``config.json``.
    """
    config, faults = copy.deepcopy(dict(config)), []
    allowed = read_schema("config.schema.yaml")["$defs"]["variant"]["properties"]["ratio"]
    limits = allowed["minimum"], allowed["maximum"]
    for name, variant in config["variants"].items():
        steps = variant.get("steps", [variant])
        settings = next((step for step in steps if step["method"] in [*METHODS, CHOOSE.name]), {})
        budget = settings.get("budget")
        if budget is None:
            continue
        del settings["budget"]
        where = at_step(name, variant, 1)
        n_layers = shapes.n_layers - sum(removed_count(step) for step in steps if step["method"] in PRUNERS)
        of = config["variants"][settings["choose_from"][0]] if "choose_from" in settings else settings
        chosen = of["targets"] or list(shapes.matrices)
        targets = [shapes.matrices[projection] for projection in chosen] * max(n_layers, 1)
        others = _others(shapes, model_config, n_layers, chosen)
        left, dense = in_bytes(budget) - others, nbytes_left(targets, 0)
        ratio = 1 - left / dense
        if limits[0] <= ratio <= limits[1]:
            settings["ratio"] = ratio
            continue
        least, most = (others + nbytes_left(targets, limit) for limit in limits[::-1])
        faults.append(
            f"{where}.budget: {budget}; from {least / 1e6:.4g}MB to {most / 1e6:.4g}MB, of which {others / 1e6:.4g}MB "
            "are embeddings and all else that stays as it is"
        )
    return config, faults


def _others(shapes: Shapes, model_config: Mapping[str, Any], n_layers: int, chosen: list[str]) -> int:
    """Bytes in the file that are not of the target matrices."""
    left_out = [math.prod(shape) for name, shape in shapes.matrices.items() if name not in chosen]
    numbers = shapes.embedding_parameters + shapes.hidden_size + n_layers * (shapes.small_parameters + sum(left_out))
    width = 4 if "float32" in (model_config.get("dtype"), model_config.get("torch_dtype")) else 2
    return width * numbers + _HEADER * n_layers * len(shapes.matrices)
