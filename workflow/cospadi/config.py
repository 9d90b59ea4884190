"""Config: is it right, and what does it say once the defaults are filled in.

The schema (``workflow/schemas/config.schema.yaml`` and the options every method brings) is the only description of a
config: this module checks against it, fills in defaults from it and writes ``docs/configuration.md`` from it
(``python -m cospadi.config docs/configuration.md``).
"""

from __future__ import annotations

import copy
import difflib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

from cospadi.errors import ConfigError
from cospadi.methods import METHODS
from cospadi.pruning import PRUNERS
from cospadi.registry import Entry
from cospadi.sources import MODEL_SOURCES, TEXT_SOURCES
from cospadi.sources.texts import SPLIT_OPTIONS

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
# a config file that names one of these means it instead of the base config's, not besides it
REPLACED = ("model", "text", "variants")

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
    alternatives = [_entry_schema(method, "method", common) for method in METHODS.values()]
    alternatives += [_entry_schema(pruner, "method", {"method": _PRUNING}) for pruner in PRUNERS.values()]
    parts["steps"]["properties"]["steps"]["items"] = {"oneOf": alternatives}
    parts["variant"] = {"oneOf": [*alternatives, parts.pop("steps")]}
    return without_references(whole)


@cache
def read_schema(name: str) -> Schema:
    """A file of the folder of schemas, with what the sources of models and text bring to it; every caller gets the same
    object.
    """
    whole = yaml.load((SCHEMAS / name).read_text(), _LOADER)
    for section, sources, after in (("model", MODEL_SOURCES, {}), ("text", TEXT_SOURCES, SPLIT_OPTIONS)):
        if section in whole["$defs"]:
            common = whole["$defs"].pop(section)["properties"]
            alternatives = [_entry_schema(source, "source", common, after) for source in sources.values()]
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


def _entry_schema(entry: Entry, word: str, common: Mapping[str, Schema], after: Mapping[str, Schema] = {}) -> Schema:
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


def check_config(
    config: Mapping[str, Any], *, overrides: Mapping[str, Any] | None = None, source: str = "config"
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

    Returns
    -------
    dict
        A complete config; `config` is left as it was.

    Raises
    ------
    ConfigError
        With all faults: config path, value, what is allowed.
    """
    return checked(config, schema(), _cross_checks, overrides=overrides, source=source)


def checked(
    config: Mapping[str, Any],
    whole: Schema,
    cross_checks: Callable[[dict[str, Any]], Iterable[str]],
    *,
    overrides: Mapping[str, Any] | None = None,
    source: str = "config",
) -> dict[str, Any]:
    """`check_config` for any schema (without references) and what no schema can say, as lines of faults."""
    result = copy.deepcopy(dict(config))
    for section in REPLACED:
        if overrides and section in overrides and section in whole["properties"]:
            result[section] = copy.deepcopy(overrides[section])
    faults: list[str] = []
    concrete = _resolve(whole, result, (), faults)
    for error in _Validator(concrete).iter_errors(result):
        faults += _describe(error)
    allowed = not faults
    if allowed:
        _fill_defaults(concrete, result)
        faults += cross_checks(result)
    if faults:
        raise ConfigError(sorted(set(faults)), source, result if allowed else None)
    return result


def _finite(_checker: Any, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(_checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_Validator = validators.extend(
    Draft202012Validator,
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
            names = [key for key in given if isinstance(key, str) and key not in part["properties"]]
            part["properties"] |= {key: _resolve(extra, given[key], (*path, key), faults) for key in names}
            part["additionalProperties"] = False
    if part.get("type") == "array" and "oneOf" in part.get("items", {}) and isinstance(value, list):
        entries = [_resolve(part["items"], entry, (*path, str(i)), faults) for i, entry in enumerate(value)]
        part = {**part, "prefixItems": entries, "items": False}
    part.pop("$defs", None)
    return part


def _alternative(alternatives: list[Schema], value: Any, path: tuple[str, ...], faults: list[str]) -> Schema | None:
    """The alternative of a ``oneOf`` that `value` means; None if it is missing, or means none (a fault is noted)."""
    where = ".".join(path)
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
    for alternative in list(objects):
        if not any("const" in child for child in alternative["properties"].values()):
            if any(key in value for key in alternative["required"]):
                return alternative
            objects.remove(alternative)
    key = next(name for name, child in objects[0]["properties"].items() if "const" in child)
    kinds = {alternative["properties"][key]["const"]: alternative for alternative in objects}
    if value.get(key) in kinds:
        return kinds[value[key]]
    found = f"{_show(value[key])} is not known{_meant(value[key], kinds)}" if key in value else "missing"
    faults.append(f"{where}.{key}: {found}; one of {', '.join(sorted(kinds))}")
    return None


def _fill_defaults(part: Schema, value: Any) -> None:
    if isinstance(value, list):
        for child, entry in zip(part.get("prefixItems", []), value, strict=False):
            _fill_defaults(child, entry)
    if not isinstance(value, dict):
        return
    for key, child in part.get("properties", {}).items():
        if key not in value and "default" in child:
            value[key] = copy.deepcopy(child["default"])
        if key in value:
            _fill_defaults(child, value[key])


def _meant(name: Any, known: Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(name), [str(value) for value in known], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _show(value: Any) -> str:
    """A value as YAML would have it, shortened."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(error: ValidationError) -> list[str]:
    """A fault in one line (several of them where keys are unknown or missing)."""
    steps = [str(step) for step in error.absolute_path]
    where = ".".join(steps)
    value, limit, part = error.instance, error.validator_value, error.schema
    match error.validator:
        case "additionalProperties":
            known = part["properties"]
            unknown = [key for key in value if key not in known]
            names = ", ".join(known)
            return [
                f"{'.'.join([*steps, str(key)])}: unknown key{_meant(key, known)}; known: {names}" for key in unknown
            ]
        case "required":
            return [f"{'.'.join([*steps, key])}: missing" for key in limit if key not in value]
        case "type":
            kinds = [limit] if isinstance(limit, str) else limit
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            return [f"{where}: {_show(value)} is not allowed; expected {expected}{_text_number(value, kinds)}"]
        case "enum":
            return [
                f"{where}: {_show(value)} is not allowed{_meant(value, limit)}; one of {', '.join(map(_show, limit))}"
            ]
        case "minimum" | "maximum":
            return [f"{where}: {_show(value)} is not allowed; {_interval(part)}"]
        case "pattern":
            return [f"{where}: {_show(value)} is not allowed; it has to match {limit}"]
        case "not":
            return [f"{where}: {_show(value)} is a reserved name; choose another"]
        case "uniqueItems":
            return [f"{where}: {_show(value)} names something twice"]
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


def _text_number(value: Any, kinds: list[str]) -> str:
    """YAML reads 1e-4 as text; say so."""
    if not isinstance(value, str) or not {"number", "integer"} & set(kinds):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    return f" (YAML reads this as text: write {number:.1e})" if "e" in value.lower() else " (remove the quotes)"


def _interval(part: Schema) -> str:
    low, high = part.get("minimum"), part.get("maximum")
    if low is not None and high is not None:
        return f"from {low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}"


def _cross_checks(config: dict[str, Any]) -> Iterator[str]:
    """What no schema can say: keys that depend on each other, and files that have to be there."""
    if config["text"] is None:
        if config["calibration"]["source"] == "text":
            yield "calibration.source: 'text' needs the section text; add it, or set calibration.source to self"
        if config["evaluation"]["perplexity"] is not None:
            yield "evaluation.perplexity: needs the section text; add it, or set evaluation.perplexity to null"
        if "last_word" in config["evaluation"]["tasks"]:
            yield "evaluation.tasks: last_word needs the section text; add it, or leave the task out"
    for name, variant in config["variants"].items():
        yield from _step_faults(f"variants.{name}", variant)
    yield from _warm_start_faults(config["variants"])
    files = [("model", "config"), ("model", "path"), ("text", "path"), ("evaluation", "task_path")]
    yield from missing_files(config, files)


def missing_files(config: Mapping[str, Any], places: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Faults of the places (section and key) that name a file or folder that is not there."""
    for section, key in places:
        path = (config[section] or {}).get(key)
        if path is not None and not Path(path).exists():
            yield f"{section}.{key}: {path!r} does not exist (looked in {Path.cwd()})"


def _step_faults(where: str, variant: dict[str, Any]) -> Iterator[str]:
    steps = variant.get("steps")
    if steps is None:
        entry = (PRUNERS | METHODS)[variant["method"]]
        yield from (f"{where}.{fault}" for fault in entry.faults(variant))
        sharing = Counter(name for bundle in variant.get("share_within", ()) for name in bundle)
        yield from (f"{where}.share_within: {name} is in {n} lists" for name, n in sharing.items() if n > 1)
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
        if learned[source].get("group_size") != settings.get("group_size"):
            yield f"{where} has another group_size"
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
