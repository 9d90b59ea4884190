"""When jobs ran, and when they would: schedules worked out by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from cospadi.report.trace import Job, lanes, recorded
from cospadi.runs import plan_run
from cospadi.schedule import chain, idle, schedule, table, with_order

PROJECT = Path(__file__).parents[2]
A = Job("a", "collect", 4, threads=8)
B = Job("b", "learn", 3, after=frozenset("a"))
C = Job("c", "learn", 5, after=frozenset("a"))
D = Job("d", "learn", 2, after=frozenset("a"))
E = Job("e", "table", 1, after=frozenset("bcd"))


@pytest.mark.parametrize(
    ("cores", "starts", "waits"),
    [
        (1, {"a": 0, "b": 4, "c": 7, "d": 12, "e": 14}, {}),
        (2, {"a": 0, "b": 4, "c": 4, "d": 7, "e": 9}, {"table": 1}),  # c and d end together
        (4, {"a": 0, "b": 4, "c": 4, "d": 4, "e": 9}, {"learn": 2 + 2 + 6, "table": 3}),
        (16, {"a": 0, "b": 4, "c": 4, "d": 4, "e": 9}, {"collect": 32, "learn": 26 + 14 + 30, "table": 15}),
    ],
)
def test_first_that_can_start_does(cores, starts, waits):
    jobs = [A, B, C, D, E]
    assert schedule(jobs, cores) == starts
    found = idle(jobs, starts, cores)
    work = sum(job.seconds * min(job.threads, cores) for job in jobs)
    assert sum(found.values()) == cores * (starts["e"] + 1) - work
    assert found == waits


def test_no_number_of_cores_is_faster_than_the_longest_chain():
    assert chain([A, B, C, D, E]) == [A, C, E]
    assert schedule([A, B, C, D, E], 100)["e"] + E.seconds == 4 + 5 + 1


def test_a_job_that_never_can_start_is_named():
    with pytest.raises(ValueError, match="what never ends: e"):
        schedule([A, B, E], 2)


def record(results: Path, name: str, started: float, seconds: float) -> None:
    path = results / "benchmarks" / f"{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\n{seconds}\t-\n")
    os.utime(path, (1e9 + started + seconds,) * 2)


def test_jobs_are_read_from_their_benchmarks(tmp_path):
    record(tmp_path, "learn_dictionary/b/layer_01", 10, 5)
    record(tmp_path, "learn_dictionary/b/layer_00", 8, 4)
    record(tmp_path, "cut/compute_gram/layer_00", 5, 3)
    record(tmp_path, "of_old/layer_00", 0, 3)
    jobs = recorded(tmp_path, {"learn_dictionary", "compute_gram"})
    assert [(job.name, job.rule) for job in jobs] == [
        ("cut/compute_gram/layer_00", "compute_gram"),
        ("learn_dictionary/b/layer_00", "learn_dictionary"),
        ("learn_dictionary/b/layer_01", "learn_dictionary"),
    ]
    assert [job.started for job in jobs] == pytest.approx([0, 3, 5]) and [job.seconds for job in jobs] == [3, 4, 5]
    assert lanes(jobs) == [0, 0, 1]
    assert recorded(tmp_path / "nothing", {"learn_dictionary"}) == []


def test_order_is_that_of_the_stages(tmp_path, monkeypatch):
    """Of one model of two chunks, one variant of it and one of what is left without a block."""
    monkeypatch.chdir(PROJECT)
    variants = {
        "plain": {"method": "svd_llm", "ratio": 0.2},
        "cut": {"steps": [{"method": "shortgpt", "blocks": 1}, {"method": "svd_llm", "ratio": 0.2}]},
    }
    config = yaml.safe_load((PROJECT / "config.yaml").read_text()) | {"variants": variants, "layers_per_job": 10}
    plan = plan_run(config)
    chunks = ["collect_activations/layers_00-14", "collect_activations/layers_15-29"]
    grams = ["compute_gram/layer_03", "compute_gram/layer_12"]
    base = ["prune_model", "inspect_model", "collect_activations/layers_00-14", "compute_gram/layer_03"]
    base = [f"cut/pruned/{name}" for name in base]
    learned = [f"learn_dictionary/{variant}/layers_00-09" for variant in variants]
    ends = [f"{rule}/{variant}" for variant in variants for rule in ("assemble_model", "evaluate_model")]
    packed = [name.replace("learn_dictionary", "quantize_codes") for name in learned]
    names = ["fetch_model", "fetch_text/x", "inspect_model", *chunks, *grams, *base, *learned, *packed, *ends]
    for number, name in enumerate([*names, "summarize"]):
        record(tmp_path, name, number, 1)
    jobs = with_order(plan, recorded(tmp_path, {stage.rule for stage in plan.stages.values()}), 2)
    after = {job.name: job.after for job in jobs}
    assert len(after) == len(names) + 1 and {job.threads for job in jobs} == {1, 2}
    assert chunks[0] in after[chunks[1]] and chunks[1] not in after[chunks[0]]
    assert after[grams[0]] & {*chunks, *base} == {chunks[0]}
    assert after[base[2]] >= {base[0], base[1]} and not after[base[2]] & set(chunks)
    assert after[base[1]] >= {base[0]} and not after["inspect_model"] & set(base)
    assert after[learned[0]] & {*grams, *base} == {grams[0]}
    assert base[3] in after[learned[1]] and learned[0] not in after[packed[1]]
    assert after["assemble_model/plain"] >= {packed[0]} and packed[1] not in after["assemble_model/plain"]
    assert after["evaluate_model/cut"] >= {"assemble_model/cut"}
    assert "assemble_model/plain" not in after["evaluate_model/cut"]
    assert after["summarize"] >= {*learned, *ends}
    plan.results = str(tmp_path)
    shown, _, longest = table(plan, [1, 8], 2).rpartition("\n\n")
    rows = [line.split() for line in shown.splitlines()[2:]]
    assert longest.startswith("at least 0.2 minutes on any number of cores")
    assert longest.endswith("assemble_model/cut 1, evaluate_model/cut 1, summarize 1")
    assert rows[0][:3] == ["1", f"{len(jobs) / 60:.1f}", "100%"] and float(rows[1][1]) < float(rows[0][1])
