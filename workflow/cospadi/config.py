"""Config: is it right, and what does it say once the defaults are filled in.

The schema (``schemas/config.schema.yaml`` and the options every method brings) is the only description of a
config: from it come faults and defaults (`checking`) and ``docs/configuration.md``
(``python -m cospadi.config docs/configuration.md``). What no schema can say is here.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cospadi import checking
from cospadi.budget import ratio_of
from cospadi.checking import KINDS, LOADER, Schema, did_you_mean, document, place, plain, repeated_keys, shown
from cospadi.embeddings import NEAREST
from cospadi.embeddings import faults as embedding_faults
from cospadi.errors import ConfigError
from cospadi.evaluation import HELDOUT_TASKS
from cospadi.formats.values import CODEC_OF_BITS, DICTIONARY_BITS, bits_faults
from cospadi.methods import METHODS, warm_start_faults
from cospadi.methods.base import (
    ALLOCATION_OPTIONS,
    EMBEDDINGS,
    FILE,
    MEASURED,
    MENU,
    OF_LAYERS,
    allocation_faults,
    of_layers_faults,
    sharing_option_faults,
)
from cospadi.methods.choose import CHOOSE, INCREASE, SEARCH, choice_faults
from cospadi.problem import SEQUENTIAL
from cospadi.pruning import PRUNERS
from cospadi.registry import entry_schema
from cospadi.sources import MODEL_SOURCES, TEXT_SOURCES
from cospadi.sources.rotation import OPTIONS as ROTATION
from cospadi.sources.texts import SPLIT_OPTIONS
from cospadi.structure import PROJECTIONS
from cospadi.sweep import by_section, expanded

SCHEMAS = Path(__file__).parent / "schemas"
# a config file that names one of these means it instead of the base config's, not besides it
REPLACED = ("model", "text", "variants")
# What else is in the folder of a run, where every variant has a folder of its own
RESERVED = (
    *("dense", "structure.json", "calibration.h5", "activations", "gradients", "gram", "hidden", "head.h5"),
    *("pruning", "drift.json"),
    *("plots", "logs", "benchmarks", "summary.tsv", "summary.html", "summary.json", "frontier.tsv", "samples.html"),
    *("samples.md", "explore.html", "report.zip", "config.yaml", "windows"),
    *("training", "training.tsv", "training.html", "training.json"),
)
# Keys that say how large a variant is
SIZES = ("ratio", "bits", "budget")


@cache
def schema() -> Schema:
    """The JSON schema of a config, with one alternative for every entry of a registry, and one for several steps."""
    whole = copy.deepcopy(read_schema("config.schema.yaml"))
    parts = whole["$defs"]
    common = parts.pop("variant")["properties"]
    common["targets"]["items"] = {"enum": list(PROJECTIONS)}
    for key, bits in (("value_bits", CODEC_OF_BITS), ("dictionary_bits", DICTIONARY_BITS)):
        common["codes"]["properties"][key]["enum"] = list(bits)
    parting = {**common, **copy.deepcopy(ALLOCATION_OPTIONS)}  # a method with a rule of its own adds a word to it
    alone = {key: part for key, part in common.items() if key not in OF_LAYERS}
    alternatives = [
        entry_schema(method, "method", parting if method.scope == "problem" else alone) for method in METHODS.values()
    ]
    of_whole = {key: common[key] for key in ("method", *SIZES, *EMBEDDINGS)}
    alternatives.append(entry_schema(CHOOSE, "method", of_whole))
    alternatives += [entry_schema(pruner, "method", {"method": _PRUNING}) for pruner in PRUNERS.values()]
    whole["properties"]["variants"]["propertyNames"]["not"] = {"enum": list(RESERVED)}
    parts["steps"]["properties"]["steps"]["items"] = {"oneOf": alternatives}
    parts["variant"] = {"oneOf": [*alternatives, parts.pop("steps")]}
    return without_references(whole)


@cache
def read_schema(name: str) -> Schema:
    """A file of the folder of schemas, with what the sources of models and text bring to it; every caller gets the same
    object.
    """
    whole = yaml.load((SCHEMAS / name).read_text(), LOADER)
    for section, sources, after in (("model", MODEL_SOURCES, ROTATION), ("text", TEXT_SOURCES, SPLIT_OPTIONS)):
        if section in whole["$defs"]:
            common = whole["$defs"].pop(section)["properties"]
            alternatives = [entry_schema(source, "source", common, after) for source in sources.values()]
            whole["properties"][section]["oneOf"] += alternatives
    return whole


def without_references(whole: Schema) -> Schema:
    """A schema with what its references name in their place; keys beside a ``$ref`` (a description) add to that.

    A reference is ``#/path/in/this/schema`` or ``file#/path``, a file beside it.
    """

    def inline(part: Any, root: Schema) -> Any:
        if isinstance(part, list):
            return [inline(entry, root) for entry in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            file, _, path = part["$ref"].partition("#/")
            root_of_target = target = read_schema(file) if file else root
            for key in path.split("/"):
                target = target[key]
            target = inline(target, root_of_target)
            part = {**target, **{key: value for key, value in part.items() if key != "$ref"}}
        return {key: inline(value, root) for key, value in part.items()}

    return inline(whole, whole)


_PRUNING = {"description": "How blocks are removed."}


def check_config(
    config: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    source: str = "config",
    files: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """Check a config and fill in the defaults.

    Parameters
    ----------
    config : mapping
        As Snakemake merged it from the files.
    overrides : mapping, optional
        What the command line's ``--configfile`` and ``--config`` say. ``model``, `text` and `variants` are taken from
        there whole when named there; Snakemake would merge them into the base config's.
    source : str
        Named in the error message.
    files : iterable of path-like
        YAML files that it was merged from: looked through for keys that stand twice, of which YAML keeps the last.

    Returns
    -------
    dict
        A complete config; `config` is left as it was.

    Raises
    ------
    ConfigError
        With all faults: config path, value, what is allowed.
    """
    return checked(config, schema(), cross_checks, overrides=overrides, source=source, files=files)


def checked(
    config: Mapping[str, Any],
    whole: Schema,
    cross_checks: Callable[[dict[str, Any]], Iterable[str]],
    *,
    overrides: Mapping[str, Any] | None = None,
    source: str = "config",
    files: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """`check_config` for any schema (without references) and what no schema can say, as lines of faults."""
    faults = [fault for file in files for fault in repeated_keys(file)]
    given = dict(config) if isinstance(config, Mapping) else config
    if isinstance(given, dict) and overrides:
        known = [section for section in REPLACED if section in whole["properties"]]
        given |= {section: overrides[section] for section in known if section in overrides}
    try:
        result = plain(given)
    except RecursionError:
        raise ConfigError(["a section contains itself, or is nested without end"], source) from None
    if not isinstance(result, dict):
        raise ConfigError([f"{shown(result)} is not allowed; expected {KINDS['object']}"], source)
    sections = result.get("variants") if "variants" in whole["properties"] else None
    if sections is not None:
        result["variants"], wrong = expanded(sections)
        faults += wrong
        faults += _size_faults(result["variants"])
    concrete = checking.against(whole, result, faults)
    allowed = not faults
    result = checking.completed(concrete, result) if allowed else result
    faults += checking.file_faults(concrete, result)
    if allowed:
        faults += cross_checks(result)
        for _, settings in _steps(result.get("variants")):
            for key in _unused(settings):
                settings.pop(key, None)
        if result.get("model", {}).get("rotate", 0) is None:  # models that were fetched before it came stay as they are
            del result["model"]["rotate"]
    if faults:
        raise ConfigError(sorted(set(by_section(faults, sections))), source, result if allowed else None)
    return result


def _steps(variants: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where the settings of each step of each variant stand, and they."""
    for name, variant in variants.items() if isinstance(variants, dict) else ():
        steps = variant.get("steps") if isinstance(variant, dict) else None
        places = enumerate(steps) if isinstance(steps, list) else ()
        for where, step in [(place(name), variant), *((place(name, "steps", i), step) for i, step in places)]:
            if isinstance(step, dict):
                yield f"variants.{where}", step


def _size_faults(variants: Any) -> Iterator[str]:
    """Say what is meant by ``bits`` as the ``ratio`` that all else goes by; what is wrong where several are given.

    What a ``budget`` leaves depends on the model: until a plan knows it (`plan.budgets`), the ratio is any.
    """
    for where, step in _steps(variants):
        first, *others = [key for key in (*SIZES, INCREASE) if step.get(key) is not None] or [None]
        if step.get("method") not in [*METHODS, CHOOSE.name]:
            continue
        yield from (f"{where}.{key}: stands beside {first}, which says the same; leave one out" for key in others)
        if first is not None and "ratio" not in step:
            bits = step[first] if first == "bits" else None  # one that is no number, or out of range, the schema finds
            step["ratio"] = ratio_of(bits) if isinstance(bits, int | float) and 0.8 <= bits <= 15.84 else 0.5


def _unused(settings: Mapping[str, Any]) -> set[str]:
    """Keys of a complete step that decide nothing: factors are the same as before these keys came."""
    unused = {"bits", *(key for key in ("budget", INCREASE, SEARCH) if not settings.get(key))}
    unused |= {"ratio"} if INCREASE not in unused else set()
    unused |= {*EMBEDDINGS} if settings.get("embedding_bits") == 16 else set()
    unused |= {"embedding_method"} if settings.get("embedding_method") == NEAREST else set()
    if settings.get("method") not in METHODS:
        return unused
    unused |= {"compensate"} if settings.get("compensate") is None else set()
    unused |= {"residual_share"} if settings.get("target") != SEQUENTIAL else set()
    used = {
        MENU: {"allocation", "menu"},
        MEASURED: {"allocation", "menu", "measured_windows"},
        FILE: {"allocation", "allocation_file"},
    }.get(settings.get("allocation"), set())
    return unused | (ALLOCATION_OPTIONS.keys() - used - METHODS[settings["method"]].options.keys())


def cross_checks(config: dict[str, Any]) -> Iterator[str]:
    """What no schema can say: keys that depend on each other, and files that have to be there."""
    if config["text"] is None:
        if config["calibration"]["source"] == "text":
            yield "calibration.source: 'text' needs the section text; add it, or set calibration.source to self"
        if config["evaluation"]["perplexity"] is not None:
            yield "evaluation.perplexity: needs the section text; add it, or set evaluation.perplexity to null"
        for task in HELDOUT_TASKS:
            if task in config["evaluation"]["tasks"]:
                yield f"evaluation.tasks: {task} needs the section text; add it, or leave the task out"
    if config["model"]["rotate"] is not None and MODEL_SOURCES[config["model"]["source"]].read is None:
        yield f"model.rotate: {config['model']['rotate']} is for models that are fetched; a local one stays as it is"
    yield from _placement_faults(config["evaluation"])
    for name, variant in config["variants"].items():
        yield from _step_faults(f"variants.{name}", variant)
    yield from _warm_start_faults(config["variants"])
    yield from choice_faults(config["variants"], config["calibration"]["heldout_fraction"])


def _placement_faults(evaluation: dict[str, Any]) -> Iterator[str]:
    """Options of a device map without one."""
    if evaluation["device_map"] is None:
        if evaluation["gpus"] > 1:
            yield f"evaluation.gpus: {evaluation['gpus']} need a device_map, which spreads a model over them: auto"
        for device, limit in evaluation["max_memory"].items():
            if limit is not None:
                yield f"evaluation.max_memory.{device}: {limit} is used with a device_map alone; set it to auto"


def _step_faults(where: str, variant: dict[str, Any]) -> Iterator[str]:
    steps = variant.get("steps")
    if steps is None:
        entry = (PRUNERS | METHODS | {CHOOSE.name: CHOOSE})[variant["method"]]
        yield from (f"{where}.{fault}" for fault in entry.faults(variant))
        yield from (f"{where}.{fault}" for fault in sharing_option_faults(variant, entry.defaults()))
        if "codes" in variant:
            yield from (f"{where}.codes.{fault}" for fault in bits_faults(variant["codes"], own_codec=entry.own_codec))
        yield from (f"{where}.{fault}" for fault in embedding_faults(variant))
        yield from (f"{where}.{fault}" for fault in allocation_faults(variant))
        if entry.name in METHODS:
            yield from (f"{where}.{fault}" for fault in of_layers_faults(variant))
        for name, default in (("column_power", 0.5), ("activation_share", 0.0)):
            if variant.get("metric") == "activations" and variant[name] != default:
                yield f"{where}.{name}: {shown(variant[name])} says how gradients weigh; set metric to gradients"
        return
    first, second = (step["method"] for step in steps)
    if first not in PRUNERS or second not in METHODS:
        yield (
            f"{where}.steps: {first}, then {second}; expected one of {', '.join(PRUNERS)}, "
            f"then one of {', '.join(METHODS)}"
        )
    for index, step in enumerate(steps):
        yield from _step_faults(f"{where}.steps.{index}", step)


def _warm_start_faults(variants: Mapping[str, Any]) -> Iterator[str]:
    """A start is another variant's factors of the same matrices; no variant waits for itself."""
    learned = {name: variant.get("steps", [variant])[-1] for name, variant in variants.items()}
    pruned = {name: variant["steps"][0] if "steps" in variant else None for name, variant in variants.items()}
    for name, settings in learned.items():
        source = settings.get("warm_start")
        if source is None:
            continue
        where = f"variants.{name}.warm_start: {source}"
        if source not in learned or learned[source]["method"] not in METHODS:
            others = [other for other, step in learned.items() if other != name and step["method"] in METHODS]
            yield f"{where} is no variant that learns factors{did_you_mean(source, others)}; one of {', '.join(others)}"
            continue
        if pruned[source] != pruned[name]:
            yield f"{where} starts from another model"
        yield from (f"{where} {fault}" for fault in warm_start_faults(settings, learned[source]))
        seen = [name]
        while source in learned and source not in seen:
            seen.append(source)
            source = learned[source].get("warm_start")
        if source == name:
            yield f"{where}: it starts from {' from '.join([*seen[1:], name])}"


def documentation() -> str:
    """``docs/configuration.md``, from the schema."""
    replaced = ", ".join(f"`{section}`" for section in REPLACED)
    return document(
        "Configuration",
        "cospadi.config docs/configuration.md",
        [
            "`config.yaml` is the demo. Another run is another file, given as `make run CONFIG=my.yaml` or",
            "`snakemake --cores all --configfile my.yaml`. It says what differs from `config.yaml`, key by key; only",
            f"{replaced} replace those of `config.yaml` as a whole where they are given.",
            "Write small numbers as `1.0e-4`: YAML reads `1e-4` as text.",
            "",
            "Unknown keys and values out of range are refused before any work, all of them in one message.",
            "",
            "A run that trains models from scratch (`config/masa-train.yaml`) has a [configuration of its",
            "own](configuration-training.md).",
        ],
        schema(),
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(documentation())
