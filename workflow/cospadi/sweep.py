"""Sweeps: one section of a config that stands for several variants.

``hybrid: {method: hybrid, sweep: {ratio: [0.2, 0.4]}}`` means the variants ``hybrid-20`` and ``hybrid-40``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

SWEEP = "sweep"


def expanded(variants: Any) -> tuple[Any, list[str]]:
    """Variants with every sweep written out, in their order, and what is wrong with the sweeps.

    A variant of a sweep is named after it and its values, with a hyphen before each: a ratio in percent, other values
    as they are. A sweep over several options means all combinations.

    Parameters
    ----------
    variants : mapping
        The section as it stands in the file; what is no mapping is returned as it is, for others to find fault with.

    Returns
    -------
    variants : mapping
        Without the key ``sweep``.
    faults : list of str
        Place, what is wrong, what is allowed. A sweep with faults is its first variant, so that others can look at it.
    """
    if not isinstance(variants, Mapping):
        return variants, []
    whole: dict[Any, Any] = {}
    faults: list[str] = []
    for name, section in variants.items():
        if not isinstance(section, Mapping) or SWEEP not in section:
            made = {name: section}
        else:
            rest = {key: value for key, value in section.items() if key != SWEEP}
            found = list(_faults(section[SWEEP], rest))
            faults += [f"variants.{_shown(name)}.{SWEEP}{fault}" for fault in found]
            made = {name: {**_first(section[SWEEP]), **rest}} if found else _written_out(name, rest, section[SWEEP])
        for variant in made:
            # a plain variant of that name says something else, whichever stands first
            if variant in whole or (variant != name and variant in variants):
                faults.append(
                    f"variants.{_shown(name)}.{SWEEP}: makes {_shown(variant)}, which is a variant already; rename one"
                )
        whole |= made
    return whole, faults


def by_section(faults: Sequence[str], variants: Any) -> list[str]:
    """Faults of the variants that sweeps made: what is wrong in all of one sweep is the fault of its section.

    Parameters
    ----------
    faults : sequence of str
        ``variants.<name>.<key>: what``, with the names that `expanded` gave.
    variants : mapping
        The section as it stands in the file.
    """
    if not isinstance(variants, Mapping):
        return list(faults)
    swept = {name: section for name, section in variants.items() if isinstance(section, Mapping) and SWEEP in section}
    made = {
        variant: name
        for name, section in swept.items()
        if not _faults(section[SWEEP], {})
        for variant in _written_out(name, {}, section[SWEEP])
    }
    told = []
    for fault in faults:
        # of names that begin alike the longest is meant
        variant = max((one for one in made if fault.startswith(f"variants.{one}.")), key=len, default=None)
        if variant is not None:
            rest = fault.removeprefix(f"variants.{variant}.")
            if re.split(r"[.:]", rest)[0] not in swept[made[variant]][SWEEP]:
                fault = f"variants.{made[variant]}.{rest}"
        told.append(fault)
    return told


def _faults(sweep: Any, rest: Mapping[str, Any]) -> list[str]:
    if not isinstance(sweep, Mapping) or not sweep:
        return [": expected options and lists of their values, for example {ratio: [0.2, 0.4]}"]
    if "steps" in rest:
        return [": no sweep beside steps; write the variants out"]
    faults = []
    for option, values in sweep.items():
        if not isinstance(values, list) or not values:
            faults.append(f".{_shown(option)}: expected a list of at least one value")
        elif len({_text(option, value) for value in values}) < len(values):
            faults.append(f".{_shown(option)}: names a value twice")
        if option in rest:
            faults.append(f".{_shown(option)}: stands beside the sweep too; leave one out")
    return faults


def _shown(key: Any) -> str:
    """A key of the file in one line."""
    return str(key) if str(key).isprintable() else json.dumps(str(key))


def _first(sweep: Any) -> dict[str, Any]:
    pairs = sweep.items() if isinstance(sweep, Mapping) else ()
    return {option: values[0] if isinstance(values, list) and values else values for option, values in pairs}


def _written_out(name: Any, rest: Mapping[str, Any], sweep: Mapping[str, list[Any]]) -> dict[str, Any]:
    made = {}
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, values, strict=True))
        made["-".join([str(name), *(_text(*option) for option in chosen.items())])] = {**rest, **chosen}
    return made


def _text(option: str, value: Any) -> str:
    if option == "ratio" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{100 * value:.6g}"
    return str(value).replace(":", "-")
