"""The tour in docs/architecture.md: its examples run, and what it names is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
PAGE = (PROJECT / "docs/architecture.md").read_text()
TOY_METHOD = PROJECT / "tests/workflow/toy_method.py"


def travels() -> list[str]:
    """Names in the second column of the table of what travels where."""
    section = PAGE.split("\n## Where things travel")[1].split("\n## ")[0]
    return [line.split("|")[2].strip(" `") for line in section.splitlines() if line.startswith("| ")][1:]


def find(name: str) -> Any:
    """What ``module.name`` or ``module.Class.name`` of the package is."""
    *parts, last = name.split(".")
    try:
        return getattr(importlib.import_module(".".join(["cospadi", *parts])), last)
    except ModuleNotFoundError:
        return getattr(find(".".join(parts)), last)


def test_the_matrix_in_two_pieces_is_as_the_package_computes_it(tour_example):
    code = tour_example("a matrix in two pieces")
    assert code.count("assert ") == 4
    exec(code, {})


def test_the_numbers_in_the_picture_are_those_of_the_example(tour_example):
    names: dict[str, Any] = {}
    exec(tour_example("a matrix in two pieces"), names)
    picture = PAGE.split("```text\n")[1].split("```")[0]
    rows = [re.findall(r"\[([^\]]*)\]", line) for line in picture.splitlines()]
    numbers = [[[0 if n == "." else int(n) for n in part.split()] for part in row] for row in rows if row]
    assert [row[0] for row in numbers] == names["W"].tolist()
    assert [row[1] for row in numbers] == names["D"].tolist()
    assert [row[2] for row in numbers if len(row) > 2] == names["S"].tolist()


@pytest.mark.parametrize("name", travels())
def test_what_travels_is_handled_where_the_table_says(name):
    assert callable(find(name))


def test_each_place_is_told_once():
    assert len(set(travels())) == len(travels()) > 15


@pytest.mark.parametrize(("name", "file"), [("pow2", "toy_codec.py"), ("quarter", "toy_support.py")])
def test_the_formats_in_the_tour_are_those_that_the_workflow_runs(tour_example, name, file):
    assert tour_example(f"runtime/cospadi_{name}.py") == TOY_METHOD.with_name(file).read_text()


def test_the_method_in_the_tour_is_the_one_that_the_workflow_runs(tour_example):
    code = tour_example("methods/magnitudes.py")
    assert code == TOY_METHOD.read_text()
    assert sum(1 for line in code.splitlines() if line) <= 30
