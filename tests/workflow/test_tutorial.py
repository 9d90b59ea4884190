"""The tutorial: its cells run, what its text says is what comes out, and its page shows the same cells."""

from __future__ import annotations

import re
import subprocess
import tempfile

import pytest
import torch

from .conftest import PROJECT, snakemake
from .tutorial import PAGE, PICTURES, cells, execute, page_of

_OUTPUT = re.compile(r"```text\n.*?\n```\n\n|!\[[^\]]*\]\(tutorial/([^)]*)\)\n\n", flags=re.DOTALL)


def without_numbers(text: str) -> str:
    return re.sub(r"[\s-]+", " ", re.sub(r"\d[\d.]*(e[-+]\d+)?", "0", text)).strip()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Outputs of the cells and the names they leave, run in a folder of its own."""
    start = subprocess.run

    def run(command, **options):
        if list(command[1:3]) != ["-m", "snakemake"]:
            return start(command, **options)
        return subprocess.CompletedProcess(command, *snakemake(PROJECT, *command[3:]))

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tutorial")))
        patch.setattr(subprocess, "run", run)
        return execute(cells())


def test_the_page_shows_the_cells_of_the_notebook():
    page = PAGE.read_text()
    assert _OUTPUT.sub("", page) == page_of(cells()), "run python tests/workflow/tutorial.py"
    assert sorted(filter(None, _OUTPUT.findall(page))) == sorted(path.name for path in PICTURES.iterdir())
    assert not any(cell.get("outputs") for cell in cells())  # they are on the page


def test_the_page_shows_what_the_cells_print_and_draw(ran):
    outputs, _ = ran
    printed = [output.printed for output in outputs if output.printed]
    fresh, kept = page_of(cells(), outputs), PAGE.read_text()
    assert _OUTPUT.findall(fresh) == _OUTPUT.findall(kept)  # in this order, with these pictures
    shown = re.findall(r"```text\n(.*?)```", kept, flags=re.DOTALL)
    # numbers, and the text that the model writes, may differ from machine to machine
    assert [without_numbers(text) for text in printed[:-1]] == [without_numbers(text) for text in shown[:-1]]


def test_one_layer_is_as_the_text_says(ran):
    _, found = ran
    assert found["losses"][-1] < found["losses"][0] - 1.5
    assert found["carried"][31] > 0.75
    factors = found["f"]
    assert 0.55 < factors.nbytes / (2 * found["W"].size) <= 0.6
    assert found["stored"].max() < factors.n_atoms
    assert found["whitened"].relative_error(found["W"]) > found["plain"].relative_error(found["W"])
    assert found["whitened"].relative_error(found["W"], found["G_new"]) < found["plain"].relative_error(
        found["W"], found["G_new"]
    )
    for name, row in found["errors"].items():
        assert row == sorted(row), name
    assert all(one < other for one, other in zip(found["sharing"]["shared"], found["sharing"]["own"], strict=True))
    few = found["few_bits"]
    for name, row in few.items():
        assert list(row.values()) == sorted(row.values(), reverse=True), name
    for bits in few["gptq"]:
        assert few["ectcq"][bits] < few["gptq"][bits] < few["rounded (rtn)"][bits]


def test_the_run_ends_in_a_table_and_a_model_that_loads(ran):
    outputs, found = ran
    table = {row["variant"]: row for row in found["summary"]}
    assert list(table) == ["dense", "cospadi-40", "ectcq-4"]
    dense = float(table["dense"]["token_perplexity"])
    assert dense < 150
    for name in list(table)[1:]:
        assert name in outputs[-4].printed
        assert dense < float(table[name]["token_perplexity"])
        assert float(table[name]["kl"]) > 0
    assert 0.4 <= float(table["cospadi-40"]["ratio_true"]) < 0.5
    assert found["packed"].model.layers[1].mlp.up_proj.n_atoms > found["f"].n_atoms  # they share a dictionary
    assert found["written"].shape[-1] > found["prompt"].shape[-1]
    assert list(found["folder"].glob("results/tutorial/report.zip"))
