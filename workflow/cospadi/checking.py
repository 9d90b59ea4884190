"""Checking: what a schema says, of a value and to a reader.

A value is checked against a JSON schema without references: every fault is a line that a person understands, and
defaults are filled in. From the same schema the page is written that documents it.
"""

from __future__ import annotations

import copy
import datetime
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

from cospadi.errors import MissingFile

# Where no maximum is named; larger ones are no longer exact as floating-point numbers
LARGEST = 2**53
# No config comes near; one that contains itself gets there
DEEPEST = 50
_MISSING = object()
# ten times as fast as the loader in Python, which every job of SLURM would wait for
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Schema = dict[str, Any]


def against(whole: Schema, value: Any, faults: list[str]) -> Schema:
    """The schema that holds for `value`, with every ``oneOf`` decided; what is wrong with it is added to `faults`."""
    concrete = _resolve(whole, value, (), faults)
    for error in _Validator(concrete).iter_errors(value):
        faults += _describe(error)
    return concrete


def option_faults(options: Mapping[str, Schema], given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with values of options, by the schema of each."""
    part = {"type": "object", "additionalProperties": False, "properties": dict(options)}
    faults: list[str] = []
    against(part, dict(given), faults)
    yield from faults


def completed(part: Schema, value: Any) -> Any:
    """A valid value with its defaults; 16.0 is 16 where that is one of those allowed."""
    if isinstance(value, list):
        children = [*part.get("prefixItems", []), *[part.get("items") or {}] * len(value)]
        return [completed(child, entry) for child, entry in zip(children, value, strict=False)]
    if not isinstance(value, dict):
        return next((allowed for allowed in part.get("enum", []) if allowed == value), value)
    properties = part.get("properties", {})
    missing = {key: copy.deepcopy(child["default"]) for key, child in properties.items() if "default" in child}
    filled = {**value, **{key: default for key, default in missing.items() if key not in value}}
    return {key: completed(properties.get(key, {}), child) for key, child in filled.items()}


def file_faults(part: Schema, value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Files and folders of this machine that are named and are not there."""
    if isinstance(value, dict):
        for key, child in part.get("properties", {}).items():
            if key in value:
                yield from file_faults(child, value[key], (*path, str(key)))
    elif isinstance(value, list):
        for index, (child, entry) in enumerate(zip(part.get("prefixItems", ()), value, strict=False)):
            yield from file_faults(child, entry, (*path, str(index)))
    elif part.get("format") in ("file", "folder") and value and isinstance(value, str):
        where, file = place(*path), Path(value)
        try:
            if not file.exists():
                yield MissingFile.at(file, f"{where}: {value!r} does not exist (looked in {Path.cwd()})")
            elif file.is_dir() != (part["format"] == "folder"):
                yield f"{where}: {value!r} is {'a folder' if file.is_dir() else 'a file'}; expected a {part['format']}"
        except (OSError, ValueError) as error:
            yield f"{where}: {shown(value)} cannot be looked at ({error})"


def plain(value: Any, depth: int = 0) -> Any:
    """A copy of plain dictionaries and lists: what YAML and JSON readers give is of many classes."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(value, Mapping):
        return {key: plain(child, depth + 1) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child, depth + 1) for child in value]
    return copy.deepcopy(value)


def repeated_keys(path: str | Path) -> list[str]:
    """Keys that stand twice in one section of a YAML file: readers keep the last, and say nothing."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=LOADER)
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
                faults.append(f"{place(*where, name)}: stands twice in {path}, in lines {lines[name]} and {line}")
            lines[name] = line
            walk(child, (*where, name))

    walk(root, ())
    return faults


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
    where = place(*path)
    null = next((alternative for alternative in alternatives if alternative.get("type") == "null"), None)
    objects = [alternative for alternative in alternatives if alternative.get("type") == "object"]
    if value is _MISSING:
        return None
    if value is None and null is not None:
        return null
    if not isinstance(value, Mapping):
        faults.append(f"{where}: {shown(value)} is not allowed; expected {KINDS['object']}")
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
                faults.append(f"{place(*path, name)}: unknown key (did you mean {meant}?)")
                return _renamed(others[meant], meant, name, others[meant]["properties"][meant])
            if meant:
                faults.append(f"{place(*path, name)}: unknown key (did you mean {meant}?)")
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
    faults.append(
        f"{where}.{name}: {shown(word)} is not known{did_you_mean(word, kinds)}; one of {', '.join(sorted(kinds))}"
    )
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


def _close(name: Any, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    return close[0] if close else None


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    close = _close(name, [str(value) for value in known]) if isinstance(name, str) else None  # numbers are not misspelt
    return f" (did you mean {close}?)" if close else ""


def place(*path: Any) -> str:
    """A place in the config, ``variants.a.ratio``."""
    return ".".join(str(step) if str(step).isprintable() else json.dumps(str(step)) for step in path)


def shown(value: Any) -> str:
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
    where = place(*steps)
    value, limit, part = error.instance, error.validator_value, error.schema
    match error.validator:
        case "additionalProperties":
            known = part["properties"]
            unknown = [key for key in value if key not in known]
            names = ", ".join(known)
            return [f"{place(*steps, key)}: unknown key{did_you_mean(key, known)}; known: {names}" for key in unknown]
        case "required":
            return [f"{place(*steps, key)}: missing" for key in limit if key not in value]
        case "type":
            kinds = [limit] if isinstance(limit, str) else limit
            expected = " or ".join(KINDS[kind] for kind in kinds)
            return [f"{where}: {shown(value)} is not allowed; expected {expected}{_remedy(value, kinds)}"]
        case "enum":
            words = ", ".join(map(shown, limit))
            return [f"{where}: {shown(value)} is not allowed{did_you_mean(value, limit)}; one of {words}"]
        case "minimum" if part["maximum"] == LARGEST:
            return [f"{where}: {shown(value)} is not allowed; at least {limit}"]
        case "minimum" | "maximum":
            return [f"{where}: {shown(value)} is not allowed; {_interval(part)}"]
        case "pattern":
            return [f"{where}: {shown(value)} is not allowed; it has to match {limit}"]
        case "not":
            return [f"{where}: {shown(value)} is a reserved name; choose another"]
        case "uniqueItems":
            return [f"{where}: {shown(value)} names something twice"]
        case "maxLength":
            return [f"{where}: {shown(value)} has {len(value)} characters; at most {limit} are allowed"]
        case "minItems" | "minLength" | "minProperties":
            found = "is empty" if len(value) == 0 else f"has {len(value)}"
            return [f"{where}: {shown(value)} {found}; at least {limit} expected"]
        case "maxItems":
            return [f"{where}: {len(value)} entries; at most {limit} expected"]
    return [f"{where}: {error.message}"]


KINDS = {
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
        default = "required" if key in required else f"`{shown(child['default'])}`" if "default" in child else ""
        if child.get("default") == {}:
            default = "see below"
        description = child.get("description", "").replace("|", "\\|")
        lines.append(f"| `{key}` | {_values(child)} | {default} | {description} |")
    return lines


def _values(part: Schema) -> str:
    if "const" in part:
        return f"`{part['const']}`"
    if "enum" in part:
        return ", ".join(f"`{shown(value)}`" for value in part["enum"])
    if "oneOf" in part or part.get("type") == "object":
        return "section"
    kinds = part["type"] if isinstance(part["type"], list) else [part["type"]]
    text = " or ".join(KINDS[kind] for kind in kinds)
    return f"{text}, {_interval(part)}" if "minimum" in part or "maximum" in part else text
