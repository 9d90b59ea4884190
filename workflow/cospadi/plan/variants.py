"""Variants, the bases they are learned from, and the parts in which each is collected and learned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cospadi.embeddings import ROUNDINGS, asked_of
from cospadi.errors import CospadiError
from cospadi.methods import METHODS
from cospadi.methods.base import FILE
from cospadi.methods.choose import CHOOSE
from cospadi.plan.names import parts, unit_name
from cospadi.problem import GRADIENTS, learns_in_turn
from cospadi.pruning import PRUNERS, removed_count

DENSE = "dense"  # the model as it is, evaluated beside the variants


class Variants:
    """What follows from the config's section ``variants`` and the number of layers.

    A *base* is a model that something is learned from. It is named by what stands between the results and its
    artifacts: nothing for the model as it is, ``a/`` for the pruned model of variant a, ``b/pruned/`` for what the
    first step of variant b leaves, where no variant is just that.

    Attributes
    ----------
    variants : list of str
        Names of the compressed models, in the order of the config.
    factorized, choosing, pruned : list of str
        Variants with matrices to learn; those that take parts of others; those that only lose blocks.
    pruned_bases : dict
        Base to the settings of the pruning step that makes it.
    chunks : list of range
        Layers of each collection job of the model as it is.
    """

    def __init__(self, config: Mapping[str, Any], n_layers: int) -> None:
        self.config = config
        self.n_layers = n_layers
        self.variants = list(config["variants"])
        self.factorized = [name for name in self.variants if self.factorizing(name)]
        self.choosing = [name for name in self.variants if self.sources_of(name)]
        self.pruned = [name for name in self.variants if name not in self.factorized + self.choosing]
        self._base_of, self.pruned_bases = self._find_bases()

    @property
    def chunks(self) -> list[range]:
        """Layers of each collection job of the model as it is."""
        return self.chunks_of("")

    def steps(self, variant: str) -> list[dict[str, Any]]:
        """Settings of each step of a variant; most have one."""
        settings = self.config["variants"][variant]
        return settings.get("steps", [settings])

    def factorizing(self, variant: str) -> dict[str, Any] | None:
        """Settings of the step that factorizes, if there is one."""
        return next((step for step in self.steps(variant) if step["method"] in METHODS), None)

    def embedding(self, variant: str) -> tuple[float, str]:
        """Bits a number of a variant's embedding, and of its head, 16 as they are; and the method that rounds them."""
        settings = self.factorizing(variant) or self.config["variants"][variant]
        return asked_of(settings)

    def asks_head(self, variant: str) -> bool:
        """Whether a variant's embedding is rounded by what its errors cost."""
        bits, method = self.embedding(variant)
        return bits < 16 and ROUNDINGS[method].learned

    def head_bases(self) -> list[str]:
        """Bases whose heads are asked what errors cost."""
        return list(
            dict.fromkeys(self.base_of(name) for name in [*self.factorized, *self.choosing] if self.asks_head(name))
        )

    def sources_of(self, variant: str) -> list[str]:
        """Variants that a variant chooses from; none for those that learn, or only lose blocks."""
        settings = self.config["variants"][variant]
        return settings["choose_from"] if settings.get("method") == CHOOSE.name else []

    def packed(self, variant: str) -> list[dict[str, Any]]:
        """Settings by which the matrices of a variant are stored: its own, or of those that it chooses from."""
        return [self.factorizing(name) for name in self.sources_of(variant) or [variant]]

    def pruning_step(self, variant: str) -> dict[str, Any] | None:
        """Settings of the step that removes blocks, if there is one."""
        step = self.steps(variant)[0]
        return step if step["method"] in PRUNERS else None

    def base_of(self, variant: str) -> str:
        """Base that a variant is learned from, or for one that only loses blocks, the one that it is."""
        return self._base_of[variant]

    def learned_bases(self) -> list[str]:
        """Bases that something is learned from."""
        return list(dict.fromkeys(self.base_of(variant) for variant in self.factorized))

    def inspected_bases(self) -> list[str]:
        """Bases whose matrices have to be known. Blocks are chosen and fitted in the model as it is, base ``""``."""
        return list(dict.fromkeys([*([""] if self.pruned_bases else []), *self.learned_bases()]))

    def fits(self, base: str) -> bool:
        """Whether transforms are fitted for a pruned base."""
        return PRUNERS[self.pruned_bases[base]["method"]].fits

    def _find_bases(self) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Base of every variant, and the step that makes each; equal steps are made once."""
        made: dict[str, str] = {}
        bases: dict[str, str] = {}
        for name in [*self.pruned, *self.factorized, *self.choosing]:
            step = self.pruning_step(name)
            if step is None:
                bases[name] = ""
                continue
            key = json.dumps(step, sort_keys=True)
            bases[name] = f"{name}/" if name in self.pruned else made.get(key, f"{name}/pruned/")
            made.setdefault(key, bases[name])
        return bases, {base: self.steps(name)[0] for name, base in bases.items() if base}

    def n_layers_of(self, base: str) -> int:
        """Number of a base's decoder blocks."""
        return self.n_layers - (removed_count(self.pruned_bases[base]) if base else 0)

    def chunks_of(self, base: str) -> list[range]:
        """Layers of each collection job of a base."""
        layers = self.n_layers_of(base)
        return parts(layers, self.config["calibration"]["blocks_per_job"] or layers)

    def chunk_with(self, layer: int, base: str) -> range:
        """The chunk of a base that a layer is in.

        Raises
        ------
        CospadiError
            If the base has no such layer: someone asked for a file of it.
        """
        found = [chunk for chunk in self.chunks_of(base) if layer in chunk]
        if not found:
            raise CospadiError(f"layer {layer} is not there; the model has layers 0 to {self.n_layers_of(base) - 1}")
        return found[0]

    def learns_model(self, variant: str) -> bool:
        """Whether a variant's method learns all layers in one job."""
        settings = self.factorizing(variant)
        return settings is not None and METHODS[settings["method"]].scope == "model"

    def weighs_by_gradients(self, variant: str) -> bool:
        """Whether the gradients of the loss are a variant's metric."""
        settings = self.factorizing(variant)
        return settings is not None and settings.get("metric") == GRADIENTS

    def gradient_bases(self) -> list[str]:
        """Bases whose gradients something is learned with."""
        return list(dict.fromkeys(self.base_of(name) for name in self.factorized if self.weighs_by_gradients(name)))

    def learns_in_turn(self, variant: str) -> bool:
        """Whether a variant's units are learned one after the other, each on what those before it give."""
        settings = self.factorizing(variant)
        return settings is not None and learns_in_turn(settings)

    def distills(self, variant: str) -> bool:
        """Whether a variant's factors are trained end to end once all are learned."""
        settings = self.factorizing(variant)
        return settings is not None and settings.get("distill") is not None

    def more_samples(self, variant: str, option: str) -> int | None:
        """How many windows a variant is trained on by an option, where the calibration has not as many."""
        samples = ((self.factorizing(variant) or {}).get(option) or {}).get("samples")
        return samples if samples is not None and samples > self.config["calibration"]["samples"] else None

    def allocates(self, variant: str) -> bool:
        """Whether a variant's bytes are parted among its matrices before they are learned."""
        settings = self.factorizing(variant)
        return settings is not None and METHODS[settings["method"]].allocates(settings)

    def allocation_file(self, variant: str) -> list[str]:
        """The table of a variant whose allocation a person wrote, as a list that is empty for the others."""
        settings = self.factorizing(variant)
        return [settings["allocation_file"]] if self.allocates(variant) and settings["allocation"] == FILE else []

    def units(self, variant: str) -> list[str]:
        """Units of a variant: what one learning job each handles; none where nothing is learned."""
        if sources := self.sources_of(variant):
            return self.units(sources[0])
        settings = self.factorizing(variant)
        if settings is None:
            return []
        layers = self.n_layers_of(self.base_of(variant))
        together = settings.get("group_size", 1)
        if self.learns_model(variant):
            size = layers
        elif together > 1:
            size = together
        else:
            size = self.config["layers_per_job"] or layers
        return [unit_name(group) for group in parts(layers, size)]
