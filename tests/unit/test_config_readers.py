"""Every key of the schema is read by the code that it is for: one that nothing reads is a promise not kept."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from cospadi.config import read_schema, schema
from cospadi.methods import METHODS
from cospadi.pruning import PRUNERS
from cospadi.runs import COMPRESS, KINDS, TRAIN, Kind
from cospadi.sources import MODEL_SOURCES, TEXT_SOURCES

PROJECT = Path(__file__).parents[2]
LIBRARY = PROJECT / "workflow" / "cospadi"

PLAN = ("workflow/cospadi/plan/*.py", "workflow/cospadi/stages.py")
RULES = ("Snakefile", "workflow/*.smk", "workflow/rules/*.smk")
LEARNING = (
    *("workflow/cospadi/learning.py", "workflow/cospadi/problem.py", "workflow/cospadi/quantization.py"),
    "workflow/cospadi/formats/*.py",
    *("workflow/cospadi/sequence.py", "workflow/cospadi/refinement.py", "workflow/cospadi/distillation.py"),
    *("workflow/cospadi/compensation.py", "workflow/cospadi/student.py"),
    *("workflow/cospadi/methods/base.py", "workflow/cospadi/methods/menus.py"),
    *("scripts/learn_dictionary.py", "scripts/profile_matrices.py"),
)
EMBEDDINGS = ("workflow/cospadi/embeddings.py",)  # its `asked_of` is how plan and report read what a step asks for
# Where the keys of a section are read for what they are for. Not `resources`: an estimate is no use of a setting.
READERS = {
    "": (*PLAN, *RULES),
    "calibration": ("workflow/cospadi/calibration/*.py", "scripts/collect_activations.py", *PLAN),
    "gram": ("scripts/compute_gram.py",),
    "pruning": RULES,
    "evaluation": ("workflow/cospadi/evaluation/*.py", "workflow/cospadi/plan/paths.py", "workflow/cospadi/stages.py"),
    "training": ("workflow/cospadi/training/*.py", *RULES),
    "variants": (*PLAN, *LEARNING, *EMBEDDINGS),
    "steps": (*PLAN, *EMBEDDINGS),
}
# Turned into other keys while a config is completed, which is all that is done with them
TRANSLATED = {"bits"}  # into `ratio`


class Reads(ast.NodeVisitor):
    """Names that code reads: ``x["name"]``, ``x.get("name")``, and parameters that a function's body uses."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Constant):
            self.found.add(node.slice.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and isinstance(node.args[0], ast.Constant):
            self.found.add(node.args[0].value)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        body = {part.id for line in node.body for part in ast.walk(line) if isinstance(part, ast.Name)}
        self.found |= {argument.arg for argument in node.args.kwonlyargs if argument.arg in body}
        self.generic_visit(node)


@cache
def reads_of(path: Path) -> frozenset[str]:
    text = path.read_text()
    if path.suffix != ".py":  # Snakemake's language: what Python it holds is subscripts
        return frozenset(re.findall(r"\[\"(\w+)\"\]", text))
    reads = Reads()
    reads.visit(ast.parse(text))
    return frozenset(name for name in reads.found if isinstance(name, str))


def reads(*patterns: str) -> set[str]:
    files = [path for pattern in patterns for path in PROJECT.glob(pattern) if path.is_file()]
    assert files, patterns
    return set().union(*map(reads_of, files))


def module_reads(modules: list[str]) -> set[str]:
    paths = [LIBRARY.parent.joinpath(*module.split(".")) for module in modules]
    return set().union(
        *(reads_of(path / "__init__.py" if path.is_dir() else path.with_suffix(".py")) for path in paths)
    )


def choices(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings with every combination of the words among a method's options: they decide which modules are used."""
    words = {name: part["enum"] for name, part in options.items() if "enum" in part}
    defaults = {name: part.get("default") for name, part in options.items()}
    for values in product(*words.values()):
        yield {**defaults, **dict(zip(words, values, strict=True))}


def read_by_method(name: str) -> set[str]:
    """What is read for a method: by its own modules, and by the stages for all of them."""
    method = METHODS[name]
    modules = {module for settings in choices(method.options) for module in method.modules(settings)}
    return module_reads(sorted(modules)) | reads(*READERS["variants"])


def read_by_source(source: Any) -> set[str]:
    return source.names_read() | reads("workflow/cospadi/sources/__init__.py", *PLAN)


def keys(part: dict[str, Any], readers: set[str], where: str) -> Iterator[tuple[str, str, set[str]]]:
    """Place, name and readers' names of every key below a section that has readers."""
    for name, child in part.get("properties", {}).items():
        yield f"{where}.{name}", name, readers
        yield from keys(child, readers, f"{where}.{name}")
    more = part.get("additionalProperties")
    for alternative in [*part.get("oneOf", ()), *([more] if isinstance(more, dict) else [])]:
        yield from keys(alternative, readers, where)


def all_keys(kind: Kind, whole: dict[str, Any]) -> Iterator[tuple[str, str, set[str]]]:
    for section, part in whole["properties"].items():
        yield section, section, reads(*READERS[""])
        registry = {"model": MODEL_SOURCES, "text": TEXT_SOURCES}.get(section)
        if registry is not None:
            for alternative in part["oneOf"]:
                if alternative["type"] == "object":
                    name = alternative["title"]
                    yield from keys(alternative, read_by_source(registry[name]), f"{section}: {name}")
        elif section == "variants":
            for alternative in part["additionalProperties"]["oneOf"]:
                yield from variant_keys(alternative)
        elif section == "threads":
            yield from keys(part, {stage.threads for stage in kind.stages.values()}, section)
        elif part.get("type") == "object":
            yield from keys(part, reads(*READERS[section]), section)


def variant_keys(alternative: dict[str, Any]) -> Iterator[tuple[str, str, set[str]]]:
    name = alternative["title"]
    if name in METHODS:
        yield from keys(alternative, read_by_method(name), f"variants: {name}")
    elif name in PRUNERS:
        # an option of one pruner may be read for it alone, and by another function of the same file
        yield from keys(alternative, reads("workflow/cospadi/pruning/*.py", *READERS["steps"]), f"variants: {name}")
    else:
        yield from keys(
            alternative, reads(*READERS["steps"], *RULES, "scripts/choose_variants.py"), f"variants: {name}"
        )


def unread(kind: Kind, whole: dict[str, Any]) -> list[str]:
    return [where for where, name, readers in all_keys(kind, whole) if name not in readers | TRANSLATED]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_key_is_read(kind):
    assert unread(kind, kind.schema()) == []


def test_every_key_is_looked_for():
    places = {place for kind in KINDS for place, _, _ in all_keys(kind, kind.schema())}
    assert len(places) > 200
    assert {"text: hub.max_documents", "variants: cospadi.codes.rounding", "calibration.packing"} <= places
    assert {"training.language.variants.coefficients", "evaluation.generate.chat", "threads.learn"} <= places


@pytest.mark.parametrize(
    ("registry", "entry"),
    [
        *((MODEL_SOURCES, name) for name in MODEL_SOURCES),
        *((TEXT_SOURCES, name) for name in TEXT_SOURCES),
        *((METHODS, name) for name in METHODS),
        *((PRUNERS, name) for name in PRUNERS),
    ],
)
def test_an_option_that_nothing_reads_is_found(monkeypatch, registry, entry):
    """The test above tried on every entry of every registry, with the name of the fault that made it needed."""
    option = {"type": "integer", "default": 1, "description": "Read by nobody."}
    monkeypatch.setitem(registry[entry].options, "subset", option)
    read_schema.cache_clear()
    schema.cache_clear()
    try:
        found = unread(COMPRESS, schema())
    finally:
        monkeypatch.undo()
        read_schema.cache_clear()
        schema.cache_clear()
    assert found and all(place.endswith(f": {entry}.subset") for place in found), found


@pytest.mark.parametrize(
    ("kind", "section"),
    [*((COMPRESS, name) for name in ("calibration", "gram", "pruning", "evaluation", "threads")), (TRAIN, "training")],
)
def test_a_key_of_a_section_that_nothing_reads_is_found(kind, section):
    whole = {"properties": {section: {"type": "object", "properties": {"lenght": {"type": "integer"}}}}}
    assert unread(kind, whole) == [f"{section}.lenght"]
