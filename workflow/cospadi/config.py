"""Config: is it right, and what does it say once the defaults are filled in.

The schema (``schemas/config.schema.yaml`` and the options every method brings) is the only description of a
config: this module checks against it, fills in defaults from it and writes ``docs/configuration.md`` from it
(``python -m cospadi.config docs/configuration.md``).
"""

from __future__ import annotations

import copy
import datetime
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

from cospadi.budget import ratio_of
from cospadi.errors import ConfigError
from cospadi.evaluation import HELDOUT_TASKS
from cospadi.formats.values import CODEC_OF_BITS, DICTIONARY_BITS, bits_faults
from cospadi.methods import METHODS, warm_start_faults
from cospadi.methods.base import (
    ALLOCATION_OPTIONS,
    FILE,
    IN_TURN,
    MEASURED,
    MENU,
    allocation_faults,
    in_turn_faults,
    sharing_option_faults,
)
from cospadi.methods.choose import CHOOSE, INCREASE, SEARCH, choice_faults
from cospadi.problem import SEQUENTIAL
from cospadi.pruning import PRUNERS
from cospadi.registry import entry_schema
from cospadi.sources import MODEL_SOURCES, TEXT_SOURCES
from cospadi.sources.rotation import OPTIONS as ROTATION
from cospadi.sources.texts import SPLIT_OPTIONS
from cospadi.sweep import by_section, expanded

SCHEMAS = Path(__file__).parent / "schemas"
# a config file that names one of these means it instead of the base config's, not besides it
REPLACED = ("model", "text", "variants")
# What else is in the folder of a run, where every variant has a folder of its own
RESERVED = (
    *("dense", "structure.json", "calibration.h5", "activations", "gradients", "gram", "pruning", "drift.json"),
    *("plots", "logs"),
    *(
        "benchmarks",
        "summary.tsv",
        "summary.html",
        "summary.json",
        "frontier.tsv",
        "samples.html",
        "samples.md",
        "explore.html",
        "report.zip",
    ),
    *("config.yaml", "training", "training.tsv", "training.html", "training.json"),
)
# Keys that say how large a variant is
SIZES = ("ratio", "bits", "budget")
# Where no maximum is named; larger ones are no longer exact as floating-point numbers
LARGEST = 2**53
# No config comes near; one that contains itself gets there
DEEPEST = 50

_MISSING = object()
# ten times as fast as the loader in Python, which every job of SLURM would wait for
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Schema = dict[str, Any]


@cache
def schema() -> Schema:
    """The JSON schema of a config, with one alternative for every entry of a registry, and one for several steps."""
    whole = copy.deepcopy(read_schema("config.schema.yaml"))
    parts = whole["$defs"]
    common = parts.pop("variant")["properties"]
    for key, bits in (("value_bits", CODEC_OF_BITS), ("dictionary_bits", DICTIONARY_BITS)):
        common["codes"]["properties"][key]["enum"] = list(bits)
    parting = {**common, **copy.deepcopy(ALLOCATION_OPTIONS)}  # a method with a rule of its own adds a word to it
    alone = {key: part for key, part in common.items() if key not in IN_TURN}
    alternatives = [
        entry_schema(method, "method", parting if method.scope == "problem" else alone) for method in METHODS.values()
    ]
    alternatives.append(entry_schema(CHOOSE, "method", {key: common[key] for key in ("method", *SIZES)}))
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
    whole = yaml.load((SCHEMAS / name).read_text(), _LOADER)
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
        result = _plain(given)
    except RecursionError:
        raise ConfigError(["a section contains itself, or is nested without end"], source) from None
    if not isinstance(result, dict):
        raise ConfigError([f"{_show(result)} is not allowed; expected {_KINDS['object']}"], source)
    sections = result.get("variants") if "variants" in whole["properties"] else None
    if sections is not None:
        result["variants"], wrong = expanded(sections)
        faults += wrong
        faults += _size_faults(result["variants"])
    concrete = _resolve(whole, result, (), faults)
    for error in _Validator(concrete).iter_errors(result):
        faults += _describe(error)
    allowed = not faults
    if allowed:
        result = _complete(concrete, result)
        faults += cross_checks(result)
        faults += _file_faults(concrete, result)
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
        for where, step in [(_at(name), variant), *((_at(name, "steps", i), step) for i, step in places)]:
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
            step["ratio"] = ratio_of(bits) if _finite(None, bits) and 0.8 <= bits <= 15.84 else 0.5


def _unused(settings: Mapping[str, Any]) -> set[str]:
    """Keys of a complete step that decide nothing: factors are the same as before these keys came."""
    unused = {"bits", *(key for key in ("budget", INCREASE, SEARCH) if not settings.get(key))}
    unused |= {"ratio"} if INCREASE not in unused else set()
    if settings.get("method") not in METHODS:
        return unused
    unused |= {"residual_share"} if settings.get("target") != SEQUENTIAL else set()
    used = {
        MENU: {"allocation", "menu"},
        MEASURED: {"allocation", "menu", "measured_windows"},
        FILE: {"allocation", "allocation_file"},
    }.get(settings.get("allocation"), set())
    return unused | (ALLOCATION_OPTIONS.keys() - used - METHODS[settings["method"]].options.keys())


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy of plain dictionaries and lists: what YAML and JSON readers give is of many classes."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(value, Mapping):
        return {key: _plain(child, depth + 1) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child, depth + 1) for child in value]
    return copy.deepcopy(value)


def repeated_keys(path: str | Path) -> list[str]:
    """Keys that stand twice in one section of a YAML file: readers keep the last, and say nothing."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []  # who reads the file itself says what is wrong with it
    faults: list[str] = []
    seen: set[int] = set()

    def walk(node: yaml.Node | None, where: tuple[str, ...]) -> None:
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            return  # an anchor's second use is the same node
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                walk(child, (*where, str(index)))
            return
        lines: dict[str, int] = {}
        for key, child in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and key.tag != "tag:yaml.org,2002:merge":
                faults.append(f"{_at(*where, name)}: stands twice in {path}, in lines {lines[name]} and {line}")
            lines[name] = line
            walk(child, (*where, name))

    walk(root, ())
    return faults


def option_faults(options: Mapping[str, Schema], given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with values of options, by the schema of each."""
    part = {"type": "object", "additionalProperties": False, "properties": dict(options)}
    faults: list[str] = []
    for error in _Validator(_resolve(part, given, (), faults)).iter_errors(dict(given)):
        faults += _describe(error)
    yield from faults


def _finite(_checker: Any, value: Any) -> bool:
    return _whole(_checker, value) or (isinstance(value, float) and math.isfinite(value))


def _whole(_checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pattern(_validator: Any, pattern: str, value: Any, _part: Schema) -> Iterator[ValidationError]:
    """`$` is the end in JSON Schema; in Python a line's end may follow it."""
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = validators.extend(
    Draft202012Validator,
    {"pattern": _pattern},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many({"number": _finite, "integer": _whole}),
)


def _resolve(part: Schema, value: Any, path: tuple[str, ...], faults: list[str]) -> Schema:
    """The schema that holds for `value`, with every ``oneOf`` decided.

    With one alternative left, the validator's messages name the fault itself instead of "matches none of".
    """
    if "oneOf" in part:
        chosen = _alternative(part["oneOf"], value, path, faults)
        kept = {key: part[key] for key in ("default", "description") if key in part}
        part = {**chosen, **kept} if chosen is not None else kept
    part = dict(part)
    if part.get("type") == "object":
        given = value if isinstance(value, Mapping) else {}
        part = {**part, "properties": dict(part.get("properties", {}))}
        for key, child in part["properties"].items():
            default = child.get("default", _MISSING)
            part["properties"][key] = _resolve(child, given.get(key, default), (*path, key), faults)
        if isinstance(part.get("additionalProperties"), dict):
            extra = part["additionalProperties"]
            names = [key for key in given if key not in part["properties"]]
            part["properties"] |= {key: _resolve(extra, given[key], (*path, str(key)), faults) for key in names}
            part["additionalProperties"] = False
    if part.get("type") == "array" and "oneOf" in part.get("items", {}) and isinstance(value, list):
        entries = [_resolve(part["items"], entry, (*path, str(i)), faults) for i, entry in enumerate(value)]
        part = {**part, "prefixItems": entries, "items": False}
    if {"integer", "number"} & set(_kinds(part)) and "maximum" not in part:
        part = {**part, "maximum": LARGEST}
    part.pop("$defs", None)
    return part


def _kinds(part: Schema) -> list[str]:
    kinds = part.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _alternative(alternatives: list[Schema], value: Any, path: tuple[str, ...], faults: list[str]) -> Schema | None:
    """The alternative of a ``oneOf`` that `value` means; None if it is missing, or means none (a fault is noted)."""
    where = _at(*path)
    null = next((alternative for alternative in alternatives if alternative.get("type") == "null"), None)
    objects = [alternative for alternative in alternatives if alternative.get("type") == "object"]
    if value is _MISSING:
        return None
    if value is None and null is not None:
        return null
    if not isinstance(value, Mapping):
        faults.append(f"{where}: {_show(value)} is not allowed; expected {_KINDS['object']}")
        return None
    if len(objects) == 1:
        return objects[0]
    named = [alternative for alternative in objects if _word(alternative)]
    key = _word(named[0])
    kinds = {alternative["properties"][key]["const"]: alternative for alternative in named}
    # alternatives without such a word are known by what they require
    others = {
        name: alternative for alternative in objects if not _word(alternative) for name in alternative["required"]
    }
    for name, alternative in others.items():
        if name in value:
            return alternative
    if key in value:
        return _named(kinds, key, key, value, where, faults)
    known = {name for alternative in objects for name in alternative["properties"]}
    for name in value:
        if name not in known:
            meant = _close(name, [key, *others]) or (key if value[name] in list(kinds) else None)
            if meant in others:
                faults.append(f"{_at(*path, name)}: unknown key (did you mean {meant}?)")
                return _renamed(others[meant], meant, name, others[meant]["properties"][meant])
            if meant:
                faults.append(f"{_at(*path, name)}: unknown key (did you mean {meant}?)")
                return _named(kinds, key, name, value, where, faults)
    faults.append(f"{where}.{key}: missing; one of {', '.join(sorted(kinds))}")
    return _likeliest(named, None, key, key, value)


def _word(alternative: Schema) -> str | None:
    """The key that says that a section means this alternative."""
    return next((name for name, child in alternative["properties"].items() if "const" in child), None)


def _named(
    kinds: Mapping[str, Schema], key: str, name: str, value: Mapping[str, Any], where: str, faults: list[str]
) -> Schema:
    """The alternative that `value` means by `key`, which it calls `name`."""
    word = value[name]
    if word in list(kinds):  # never hashed: it may be a list
        return kinds[word] if name == key else _renamed(kinds[word], key, name, {})
    meant = _close(word, kinds)
    faults.append(f"{where}.{name}: {_show(word)} is not known{_meant(word, kinds)}; one of {', '.join(sorted(kinds))}")
    return _likeliest(list(kinds.values()), kinds.get(meant), key, name, value)


def _renamed(alternative: Schema, key: str, name: str, part: Schema) -> Schema:
    """An alternative whose `key` a section calls `name`, which is a fault already told."""
    properties = {known: child for known, child in alternative["properties"].items() if known != key}
    required = [known for known in alternative["required"] if known != key]
    return {**alternative, "properties": {**properties, name: part}, "required": required}


def _likeliest(
    alternatives: Sequence[Schema], meant: Schema | None, key: str, name: str, value: Mapping[str, Any]
) -> Schema:
    """A schema for a section that does not say what it means: it finds what is wrong whichever of them it is."""
    best = meant or max(alternatives, key=lambda part: sum(known in part["properties"] for known in value))
    properties: Schema = {}
    for alternative in [best, *alternatives]:
        for known, part in alternative["properties"].items():
            if known not in properties or (known in value and not _fits(properties[known], value[known])):
                fits_better = known in value and _fits(part, value[known])
                properties[known] = part if known not in properties or fits_better else properties[known]
    required = set(best["required"]) if meant else set.intersection(*(set(part["required"]) for part in alternatives))
    whole = {**best, "properties": properties, "required": [known for known in best["required"] if known in required]}
    return _renamed(whole, key, name, {})


def _fits(part: Schema, value: Any) -> bool:
    faults: list[str] = []
    return _Validator(_resolve(part, value, (), faults)).is_valid(value) and not faults


def _complete(part: Schema, value: Any) -> Any:
    """A valid value with its defaults; 16.0 is 16 where that is one of those allowed."""
    if isinstance(value, list):
        children = [*part.get("prefixItems", []), *[part.get("items") or {}] * len(value)]
        return [_complete(child, entry) for child, entry in zip(children, value, strict=False)]
    if not isinstance(value, dict):
        return next((allowed for allowed in part.get("enum", []) if allowed == value), value)
    properties = part.get("properties", {})
    missing = {key: copy.deepcopy(child["default"]) for key, child in properties.items() if "default" in child}
    filled = {**value, **{key: default for key, default in missing.items() if key not in value}}
    return {key: _complete(properties.get(key, {}), child) for key, child in filled.items()}


def _close(name: Any, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    return close[0] if close else None


def _meant(name: Any, known: Iterable[Any]) -> str:
    close = _close(name, [str(value) for value in known])
    return f" (did you mean {close}?)" if close else ""


def _at(*path: Any) -> str:
    """A place in the config, ``variants.a.ratio``."""
    return ".".join(str(step) if str(step).isprintable() else json.dumps(str(step)) for step in path)


def _show(value: Any) -> str:
    """A value in one line as YAML would have it, shortened."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")
    except yaml.YAMLError:  # of no kind that YAML can write
        text = repr(value)
    if not text.isprintable():
        text = json.dumps(value, default=repr) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(error: ValidationError) -> list[str]:
    """A fault in one line (several of them where keys are unknown or missing)."""
    steps = list(error.absolute_path)
    where = _at(*steps)
    value, limit, part = error.instance, error.validator_value, error.schema
    match error.validator:
        case "additionalProperties":
            known = part["properties"]
            unknown = [key for key in value if key not in known]
            names = ", ".join(known)
            return [f"{_at(*steps, key)}: unknown key{_meant(key, known)}; known: {names}" for key in unknown]
        case "required":
            return [f"{_at(*steps, key)}: missing" for key in limit if key not in value]
        case "type":
            kinds = [limit] if isinstance(limit, str) else limit
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            return [f"{where}: {_show(value)} is not allowed; expected {expected}{_remedy(value, kinds)}"]
        case "enum":
            return [
                f"{where}: {_show(value)} is not allowed{_meant(value, limit)}; one of {', '.join(map(_show, limit))}"
            ]
        case "minimum" if part["maximum"] == LARGEST:
            return [f"{where}: {_show(value)} is not allowed; at least {limit}"]
        case "minimum" | "maximum":
            return [f"{where}: {_show(value)} is not allowed; {_interval(part)}"]
        case "pattern":
            return [f"{where}: {_show(value)} is not allowed; it has to match {limit}"]
        case "not":
            return [f"{where}: {_show(value)} is a reserved name; choose another"]
        case "uniqueItems":
            return [f"{where}: {_show(value)} names something twice"]
        case "maxLength":
            return [f"{where}: {_show(value)} has {len(value)} characters; at most {limit} are allowed"]
        case "minItems" | "minLength" | "minProperties":
            found = "is empty" if len(value) == 0 else f"has {len(value)}"
            return [f"{where}: {_show(value)} {found}; at least {limit} expected"]
        case "maxItems":
            return [f"{where}: {len(value)} entries; at most {limit} expected"]
    return [f"{where}: {error.message}"]


_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "object": "a mapping of keys to values",
    "array": "a list",
    "null": "null",
}


def _remedy(value: Any, kinds: list[str]) -> str:
    """YAML reads 1e-4 as text, and 2024, on and 2024-01-01 as none; say so."""
    numeric = {"number", "integer"} & set(kinds)
    if isinstance(value, str) and numeric:
        try:
            number = float(value)
        except ValueError:
            return ""
        return f" (YAML reads this as text: write {number:.1e})" if "e" in value.lower() else " (remove the quotes)"
    if "string" in kinds and not numeric and isinstance(value, bool | int | float | datetime.date):
        return " (put it in quotes)"
    return ""


def _interval(part: Schema) -> str:
    low, high = part.get("minimum"), part.get("maximum")
    if low is not None and high is not None:
        return f"from {low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}"


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
    for name, variant in config["variants"].items():
        yield from _step_faults(f"variants.{name}", variant)
    yield from _warm_start_faults(config["variants"])
    yield from choice_faults(config["variants"], config["calibration"]["heldout_fraction"])


def _file_faults(part: Schema, value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Files and folders of this machine that are named and are not there."""
    if isinstance(value, dict):
        for key, child in part.get("properties", {}).items():
            yield from _file_faults(child, value[key], (*path, str(key)))
    elif isinstance(value, list):
        for index, (child, entry) in enumerate(zip(part.get("prefixItems", ()), value, strict=False)):
            yield from _file_faults(child, entry, (*path, str(index)))
    elif part.get("format") in ("file", "folder") and value is not None:
        where, file = _at(*path), Path(value)
        try:
            if not file.exists():
                yield f"{where}: {value!r} does not exist (looked in {Path.cwd()})"
            elif file.is_dir() != (part["format"] == "folder"):
                yield f"{where}: {value!r} is {'a folder' if file.is_dir() else 'a file'}; expected a {part['format']}"
        except (OSError, ValueError) as error:
            yield f"{where}: {_show(value)} cannot be looked at ({error})"


def _step_faults(where: str, variant: dict[str, Any]) -> Iterator[str]:
    steps = variant.get("steps")
    if steps is None:
        entry = (PRUNERS | METHODS | {CHOOSE.name: CHOOSE})[variant["method"]]
        yield from (f"{where}.{fault}" for fault in entry.faults(variant))
        yield from (f"{where}.{fault}" for fault in sharing_option_faults(variant, entry.defaults()))
        if "codes" in variant:
            yield from (f"{where}.codes.{fault}" for fault in bits_faults(variant["codes"], own_codec=entry.own_codec))
        yield from (f"{where}.{fault}" for fault in allocation_faults(variant))
        if entry.name in METHODS:
            yield from (f"{where}.{fault}" for fault in in_turn_faults(variant))
        for name, default in (("column_power", 0.5), ("activation_share", 0.0)):
            if variant.get("metric") == "activations" and variant[name] != default:
                yield f"{where}.{name}: {_show(variant[name])} says how gradients weigh; set metric to gradients"
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
            yield f"{where} is no variant that learns factors{_meant(source, others)}; one of {', '.join(others)}"
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


def document(title: str, module: str, introduction: list[str], whole: Schema) -> str:
    """A page of documentation of a schema (without references), which ``python -m module`` writes."""
    lines = [f"# {title}", "", f"<!-- Written by `python -m {module}` from the schema; do not edit. -->", ""]
    lines += [*introduction, "", *_table(whole)]
    for key, child in whole["properties"].items():
        lines += _section(f"`{key}`", child, 2)
    return "\n".join(lines) + "\n"


def _section(title: str, part: Schema, level: int) -> list[str]:
    if isinstance(part.get("additionalProperties"), dict):
        return _section(title, {**part["additionalProperties"], "description": part["description"]}, level)
    if "oneOf" in part:
        objects = [choice for choice in part["oneOf"] if choice.get("type") == "object"]
        if len(objects) == 1 and "description" in part:  # that, or null
            return _section(title, {**objects[0], "description": part["description"]}, level)
        lines = ["", f"{'#' * level} {title}", "", part["description"]] if "description" in part else []
        for alternative in objects:
            lines += _section(f"{title}: {alternative['title']}", alternative, level + 1)
        return lines
    if part.get("type") != "object":
        return []
    lines = ["", f"{'#' * level} {title}", "", part["description"], "", *_table(part)]
    for key, child in part["properties"].items():
        lines += _section(f"{title} `{key}`".replace("` `", "."), child, level + 1)
    return lines


def _table(part: Schema) -> list[str]:
    required = part.get("required", [])
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, child in part["properties"].items():
        default = "required" if key in required else f"`{_show(child['default'])}`" if "default" in child else ""
        if child.get("default") == {}:
            default = "see below"
        description = child.get("description", "").replace("|", "\\|")
        lines.append(f"| `{key}` | {_values(child)} | {default} | {description} |")
    return lines


def _values(part: Schema) -> str:
    if "const" in part:
        return f"`{part['const']}`"
    if "enum" in part:
        return ", ".join(f"`{_show(value)}`" for value in part["enum"])
    if "oneOf" in part or part.get("type") == "object":
        return "section"
    kinds = part["type"] if isinstance(part["type"], list) else [part["type"]]
    text = " or ".join(_KINDS[kind] for kind in kinds)
    return f"{text}, {_interval(part)}" if "minimum" in part or "maximum" in part else text


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(documentation())
