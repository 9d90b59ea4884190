"""The law of the house: a room imports only from rooms before it. The order is the table in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PACKAGE = PROJECT / "workflow/cospadi"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def rooms() -> list[str]:
    """Names in the first column of the table of rooms."""
    section = (PROJECT / "docs/architecture.md").read_text().split("\n## Rooms of the library")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name.rstrip("/") for cell in cells for name in re.findall(r"`([\w/]+)`", cell)]


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imported_rooms(module: Path) -> Iterator[str]:
    """Rooms that a module imports from, anywhere in it but where types alone are checked."""
    tree = ast.parse((PACKAGE / module).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["cospadi", *module.parts[:-1]][: len(module.parts) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("cospadi."):
                yield name.split(".")[1]


def test_every_module_is_in_a_room_and_every_room_is_there():
    listed = rooms()
    assert len(set(listed)) == len(listed) > 20
    # the package itself is the door to all of them
    assert {room_of(module) for module in MODULES} - {"__init__"} == set(listed)


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_only_from_rooms_before_it(room):
    before = {*rooms()[: rooms().index(room)], room}
    modules = [module for module in MODULES if room_of(module) == room]
    found = {(str(module), other) for module in modules for other in imported_rooms(module) if other not in before}
    assert not found
    if room == "runtime":  # it travels alone
        assert not {other for module in modules for other in imported_rooms(module)} - {"runtime"}


def test_modules_are_named_and_not_found_by_strings():
    """An import by a string hides from readers, and from the digest of the code that a result depends on."""
    by_string = {
        str(module)
        for module in MODULES
        for node in ast.walk(ast.parse((PACKAGE / module).read_text()))
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).endswith(("import_module", "__import__"))
    }
    assert by_string == {"__init__.py"}  # the door, which loads on first use
