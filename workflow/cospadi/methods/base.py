"""What every method provides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cospadi.factorization import Factorization
from cospadi.registry import Entry
from cospadi.structure import PROJECTIONS

WHITENING_OPTIONS: dict[str, dict[str, Any]] = {
    "whiten": {
        "type": "boolean",
        "default": True,
        "description": "Measure the error on the calibration activations; false: on the weights alone (data-free).",
    },
    "eta": {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 0.0,
        "description": "Relative ridge on the Gram, G + eta * mean(diag G) * I, against fitting the calibration set.",
    },
}

SHARING_OPTIONS: dict[str, dict[str, Any]] = {
    "group_size": {
        "type": "integer",
        "minimum": 1,
        "default": 1,
        "description": "Consecutive layers that one job learns together and that may share dictionaries.",
    },
    "share": {
        "type": "array",
        "items": {"enum": list(PROJECTIONS)},
        "uniqueItems": True,
        "default": [],
        "description": "Projections (q_proj, up_proj ...) that share one dictionary across the layers of a group.",
    },
    "share_within": {
        "type": "array",
        "items": {"type": "array", "items": {"enum": list(PROJECTIONS)}, "minItems": 2, "uniqueItems": True},
        "default": [],
        "description": "Projections that share one dictionary inside a layer, as lists: [[q_proj, k_proj, v_proj]].",
    },
}


@dataclass(frozen=True, kw_only=True)
class Method(Entry):
    """A way to factorize matrices; every option has a default.

    Attributes
    ----------
    factorize : callable
        ``factorize(weight, whitening, *, ratio, storage, device, log, **options) -> Factorization`` with weight
        (d_in, d_out) float32 and a `gram.Whitening`, which `whiten` and `eta` have shaped already: they are not passed.
    modules : callable
        ``modules(options) -> list[str]``: the modules whose code decides the result, for rerun triggers.
    joint : callable
        ``joint(options)``: a function for matrices that share and have different inputs,
        ``(weights, whitenings, *, ratio, storage, device, log, **options) -> list[Factorization]``, each matrix in its
        own metric; or None where the mean Gram of their inputs is the metric of all of them, as of one wide matrix.
    whole_model : callable, optional
        For methods that learn all layers in one job, with different projections in one problem:
        ``(names, weights, whitenings, drift, *, ratio, storage, device, log, **options)`` yields the index of each name
        with its factors; `drift`: how far every layer moves the predicted token (`pruning.drift`). Weights and
        whitenings are read when they are asked for.
    """

    factorize: Callable[..., Factorization]
    modules: Callable[[Mapping[str, Any]], list[str]]
    joint: Callable[[Mapping[str, Any]], Callable[..., list[Factorization]] | None] = lambda options: None
    whole_model: Callable[..., Iterator[tuple[int, Factorization]]] | None = None

    def own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that `factorize` takes: all but those of whitening and sharing, which are settled before it."""
        settled = {**WHITENING_OPTIONS, **SHARING_OPTIONS}
        return {name: value for name, value in options.items() if name not in settled}
