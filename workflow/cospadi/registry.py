"""What the registries have in common: methods (`methods.METHODS`), pruners (`pruning.PRUNERS`), sources of models and
of text (`sources.MODEL_SOURCES`, `sources.TEXT_SOURCES`).

This module is light: the config and the plan read it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a registry: a word that a variant's ``method``, or a section's ``source``, may be.

    Attributes
    ----------
    name : str
        The word.
    summary : str
        One sentence for documentation and report.
    options : mapping
        JSON schema of each option, with description and, unless it must be given, default.
    faults : callable
        ``faults(settings) -> lines``: what is wrong with complete settings that no schema can say, ``key: what``.
    """

    name: str
    summary: str
    options: Mapping[str, Mapping[str, Any]]
    faults: Callable[[Mapping[str, Any]], Iterable[str]] = lambda settings: ()

    def defaults(self) -> dict[str, Any]:
        """Option name to default value, of those that have one."""
        return {name: schema["default"] for name, schema in self.options.items() if "default" in schema}


def option(kind: str | list[str], description: str, **schema: Any) -> dict[str, Any]:
    """JSON schema of an option: its ``type``, what it is for, and what else holds (``default``, ``minimum`` ...)."""
    return {"type": kind, **schema, "description": description}


def choice(words: list[Any], description: str, **schema: Any) -> dict[str, Any]:
    """JSON schema of an option that is one of some words."""
    return {"enum": words, **schema, "description": description}


def with_defaults(options: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options, some with other defaults."""
    return {name: {**schema, "default": defaults.get(name, schema["default"])} for name, schema in options.items()}


def entry_schema(
    entry: Entry,
    word: str,
    common: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Schema of a section that means `entry` by key `word`: common options, the entry's own, common ones again."""
    properties = copy.deepcopy({**common, **entry.options, **after})
    properties[word] = {"const": entry.name, "description": common[word]["description"]}
    return {
        "title": entry.name,
        "description": entry.summary,
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, part in properties.items() if "default" not in part],
        "properties": properties,
    }
