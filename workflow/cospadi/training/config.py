"""Config of a run that trains models from scratch: is it right, and what does it say once the defaults are filled in.

``python -m cospadi.training.config docs/configuration-training.md`` writes its documentation. This module is light.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cospadi.checking import Schema, document
from cospadi.config import read_schema, without_references
from cospadi.sources import needs_template

# each a section of the config and a folder of the results
EXPERIMENTS = ("language", "vision")


@cache
def schema() -> Schema:
    """The JSON schema of a config with the section ``training``."""
    return without_references(read_schema("training.schema.yaml"))


def cross_checks(config: dict[str, Any]) -> Iterator[str]:
    """What no schema can say: experiments that are missing, sizes that do not fit each other."""
    training = config["training"]
    if training["language"] is None and training["vision"] is None:
        yield "training: has neither language nor vision; add one"
    if training["language"] is not None and config["text"] is None:
        yield "training.language: needs the section text; add it, or set training.language to null"
    if needs_template(config["text"]):
        yield "text.source: chat needs a model's chat template, and models that are trained from scratch have none"
    for experiment in EXPERIMENTS:
        if training[experiment] is not None:
            yield from _experiment_faults(experiment, training[experiment])


def _experiment_faults(experiment: str, settings: Mapping[str, Any]) -> Iterator[str]:
    where, sizes = f"training.{experiment}", settings["model"]
    heads, hidden = sizes["heads"], sizes["hidden_size"]
    # rotary embeddings turn pairs of numbers
    parts = 2 * heads if experiment == "language" else heads
    if hidden % parts:
        yield f"{where}.model.hidden_size: {hidden}; it has to be a multiple of {parts} for {heads} heads"
    for name, variant in settings["variants"].items():
        here = f"{where}.variants.{name}"
        if variant.get("atoms", 0) > sizes["layers"]:
            yield f"{here}.atoms: {variant['atoms']}; the model has {sizes['layers']} layers"
        if variant.get("rank", 0) > hidden:
            yield f"{here}.rank: {variant['rank']}; the matrices are {hidden} x {hidden}"
        if experiment == "vision" and variant["attention"] == "gqa":
            yield f"{here}.attention: gqa; a ViT has no key and value heads of their own"
        elif heads % variant.get("kv_heads", heads):
            yield f"{here}.kv_heads: {variant['kv_heads']}; {heads} heads have to be a multiple of it"


def documentation() -> str:
    """``docs/configuration-training.md``, from the schema."""
    return document(
        "Configuration of a run that trains from scratch",
        "cospadi.training.config docs/configuration-training.md",
        [
            "A config file with the section `training` asks for such a run: `make run CONFIG=config/masa-train.yaml`.",
            "It compresses nothing, so the sections that only say how a model is compressed (`model`, `variants` and",
            "the like, of `config.yaml`) are not read. Everything else is as in [the other kind of",
            "run](configuration.md).",
        ],
        schema(),
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(documentation())
