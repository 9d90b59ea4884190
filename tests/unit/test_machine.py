"""The machine that is measured: its file, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cospadi import machine
from cospadi.errors import ArtifactError
from cospadi.machine import read_machine
from cospadi.needs import needs, table
from cospadi.runs import plan_of
from cospadi.status import stages_table
from cospadi.work import FORWARD, GPU_PRODUCT, READ, REFERENCE, START, Cost, Work

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the demo's config and no results."""
    for name in ("config.yaml", "config"):
        (tmp_path / name).symlink_to(PROJECT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_measurement_is_what_plans_limits_and_status_are_made_with(folder, monkeypatch, capsys):
    before = plan_of(None, {"device": "cpu"})
    assert before.machine is REFERENCE
    # every kind is measured once, and turns are not repeated
    monkeypatch.setattr(machine, "_SECONDS", 0.0)
    monkeypatch.setattr(machine, "_TURNS", 1)
    monkeypatch.setattr(machine, "_IMPORTS", "import json")
    monkeypatch.setattr(machine, "_DISK_BYTES", 2**22)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    machine.main([])
    written = json.loads((folder / "resources/machine.json").read_text())
    measured = set(machine._MEASURED) | {READ}
    assert set(written["rates"]) == measured and min(written["rates"].values()) > 0
    assert "plans, time limits" in capsys.readouterr().out
    # a machine a tenth as fast in everything takes ten times as long
    slow = {kind: rate / 10 for kind, rate in REFERENCE.rates.items()}
    (folder / "resources/machine.json").write_text(json.dumps({**written, "rates": slow, "words": "a slow one"}))
    plan = plan_of(None, {"device": "cpu"})
    rows = [needs(one, cores=2) for one in (before, plan)]
    for fast, late in zip(*rows, strict=True):
        assert late.minutes == pytest.approx(10 * fast.minutes)
        assert late.limit > fast.limit and late.work.memory == fast.work.memory
    assert table(rows[1]).endswith("times are of a slow one")
    assert plan.runtime("fetch")(None, 1, 1) > before.runtime("fetch")(None, 1, 1)
    assert stages_table(plan)[1] == pytest.approx(10 * stages_table(before)[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format_version": 2, "rates": {}}, "no measurement of a machine of version 1"),
        ({"format_version": 1, "rates": {"forwards": 1.0}}, "rates.forwards: 1.0; a number above zero of forward"),
        ({"format_version": 1, "rates": {"forward": 0}}, "rates.forward: 0; a number above zero"),
        ({"format_version": 1, "rates": {"forward": "fast"}}, "rates.forward: 'fast'"),
    ],
)
def test_a_file_that_is_no_measurement_is_refused(tmp_path, content, message):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=rf"{message}.*make calibrate"):
        read_machine(path)


def test_work_is_operations_and_a_machine_makes_seconds_of_them():
    one = Cost({FORWARD: REFERENCE.rates[FORWARD]})
    both = one + {GPU_PRODUCT: 3 * REFERENCE.rates[GPU_PRODUCT]}
    assert (one * 2).seconds() == 2 and both.seconds() == 4
    work = Work(0, 3.0, one, moved=5 * REFERENCE.rates[READ])
    assert work.wall() == 3 + 5 + 1
    assert work.wall(machine=machine.Machine({**REFERENCE.rates, START: 3.0})) == 1 + 5 + 1
