"""docs/tutorial.ipynb: its cells, what they print and draw, and the page docs/tutorial.md that shows both.

``python tests/workflow/tutorial.py`` runs the notebook and writes the page and its pictures again.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK, PAGE, PICTURES = DOCS / "tutorial.ipynb", DOCS / "tutorial.md", DOCS / "tutorial"
_HEAD = "<!-- Written by `python tests/workflow/tutorial.py` from tutorial.ipynb; do not edit. -->"


class Output(NamedTuple):
    """What a cell printed, and its pictures as PNG, by the name of the figure."""

    printed: str = ""
    pictures: dict[str, bytes] = {}  # noqa: RUF012 (never written to)


def cells() -> list[nbformat.NotebookNode]:
    """Of the notebook, each with ``cell_type`` and ``source``."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook.cells


def execute(cells: Iterable[nbformat.NotebookNode]) -> tuple[list[Output], dict[str, Any]]:
    """Run the code cells one after the other, in this process: an output for every cell, and the names they leave."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for cell in cells:
        printed, pictures = io.StringIO(), {}
        if cell.cell_type == "code":
            with contextlib.redirect_stdout(printed):
                exec(compile(cell.source, f"<{cell.id}>", "exec"), names)
        for number in pyplot.get_fignums():
            figure, picture = pyplot.figure(number), io.BytesIO()
            figure.savefig(picture, format="png", dpi=90, metadata={"Software": None})
            pictures[figure.get_label()] = picture.getvalue()
        pyplot.close("all")
        outputs.append(Output(printed.getvalue(), pictures))
    return outputs, names


def file_of(picture: str) -> str:
    """Name of the file of a figure."""
    return re.sub(r"\W+", "-", picture) + ".png"


def page_of(cells: Sequence[nbformat.NotebookNode], outputs: Sequence[Output] = ()) -> str:
    """The notebook as a page; without outputs, its cells alone."""
    parts = [_HEAD]
    for cell, output in itertools.zip_longest(cells, outputs, fillvalue=Output()):
        parts.append(f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source)
        if output.printed:
            parts.append(f"```text\n{output.printed.rstrip()}\n```")
        parts += [f"![{name}]({PICTURES.name}/{file_of(name)})" for name in output.pictures]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    found = cells()
    made, _ = execute(found)
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir()
    for name, picture in itertools.chain.from_iterable(output.pictures.items() for output in made):
        (PICTURES / file_of(name)).write_bytes(picture)
    PAGE.write_text(page_of(found, made))
