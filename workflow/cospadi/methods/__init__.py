"""Methods: what a variant of the config calls ``method``.

A method turns a problem and its bytes into factors. Adding one means one module in this folder and one line in
`METHODS`; its options appear in the config's schema and documentation by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cospadi.methods import (
    alps,
    basis_sharing,
    compot,
    cospadi,
    ectcq,
    entquant,
    geopair,
    gptq,
    hybrid,
    magnitude,
    masa,
    rocket,
    rtn,
    sparse,
    sparsegpt,
    svd_llm,
    svd_llm_v2,
    trellis,
    wanda,
)
from cospadi.methods.base import Method, planned_problems
from cospadi.problem import Target, shared
from cospadi.structure import PROJECTIONS

_MODULES = (
    *(cospadi, hybrid, sparse, svd_llm, svd_llm_v2, compot, rocket, geopair, basis_sharing, masa),
    *(magnitude, wanda, sparsegpt, alps),
    *(rtn, gptq, ectcq, trellis, entquant),
)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES}

__all__ = ["METHODS", "Method", "planning_faults", "warm_start_faults"]


def planning_faults(
    settings: Mapping[str, Any], matrices: Mapping[str, tuple[int, int]], n_layers: int
) -> Iterator[str]:
    """What a variant's method cannot do with a model, ``key: what``.

    Parameters
    ----------
    settings : mapping
        Complete, of a step that factorizes.
    matrices : mapping
        Projection to (d_in, d_out), of one layer.
    n_layers : int
        Of the model that it is learned from.
    """
    method = METHODS[settings["method"]]
    size = n_layers if method.scope == "model" else min(settings.get("group_size", 1), n_layers)
    problems = {}
    for layers in {size, n_layers % size or size}:  # the last group may be smaller
        for problem in planned_problems(settings, method, matrices, layers):
            problems[tuple((target.projection, target.shape) for target in problem)] = problem
    yield from dict.fromkeys(method.faults(settings, list(problems.values())))


def warm_start_faults(settings: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[str]:
    """Why a variant cannot start from the factors of another; both complete, of steps that factorize the same model.

    Every matrix has to be in the factors of the same unit; matrices that share a dictionary have to share one there.
    """
    method, other = METHODS[settings["method"]], METHODS[source["method"]]
    if other.factors != method.factors:
        alike = ", ".join(name for name, one in METHODS.items() if one.factors == method.factors)
        yield f"is made by {other.name}, which gives {other.factors}; {method.name} starts from those of {alike}"
        return
    size = settings.get("group_size", 1)
    if source.get("group_size", 1) != size:
        yield f"has group_size {source.get('group_size', 1)}, here it is {size}"
        return
    chosen, there = (one.get("targets") or PROJECTIONS for one in (settings, source))
    missing = [name for name in chosen if name not in there]
    if missing:
        yield f"has no factors of {', '.join(missing)} (targets)"
        return
    targets = [Target(layer, name, (0, 0)) for layer in range(size) for name in chosen]
    dictionary_of = {target: number for number, problem in enumerate(shared(targets, source)) for target in problem}
    for problem in shared(targets, settings):
        if len({dictionary_of[target] for target in problem}) > 1:
            names = ", ".join(dict.fromkeys(target.projection for target in problem))
            yield f"has several dictionaries for {names}, here it is one; share and share_within have to be alike"
            return
