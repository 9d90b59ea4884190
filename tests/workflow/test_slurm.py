"""The whole workflow on a real SLURM: a job cancelled, one out of memory, snakemake killed, the controller restarted.

`make slurm-test` runs it. What happened is one story, told once a module; each test asks one question about it.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from tabulate import tabulate

from cospadi.config import check_config
from cospadi.plan import Plan

from .conftest import Run, check_finished
from .slurm import Cluster, Recorded, Unavailable, install, wait_for

pytestmark = pytest.mark.slurm

VARIANTS = ["cospadi-20", "svd_llm-40"]
MODELS = [f"results/tiny/{name}/model" for name in VARIANTS]
LAYER = "results/tiny/cospadi-20/factors/layer_03.safetensors"
# importing torch takes more than this and less than twice this: killed once, and once only
TOO_SMALL = 450


Table = list[tuple[str, object, object]]


UNITS_A_JOB = 2


@dataclass
class Story:
    """What happened, as SLURM and the file system recorded it."""

    local: Run
    run: Run
    plan: Plan
    jobs: list[Recorded] = field(default_factory=list)  # of the whole run, in order of submission
    completed: list[dict[str, str]] = field(default_factory=list)  # the same from the completion log
    together: int = 0  # jobs that ran at the same time, at most
    cancelled: int = 0
    over_restart: list[int] = field(default_factory=list)  # jobs that ran while the controller was down
    kept: dict[str, int] = field(default_factory=dict)  # artifacts at the kill, with their time of change
    done_at_kill: set[int] = field(default_factory=set)
    made: dict[str, int] = field(default_factory=dict)  # artifacts at the end of the run, the same way
    console: str = ""
    layer_jobs: list[Recorded] = field(default_factory=list)
    layer_before: bytes = b""
    layer_after: bytes = b""
    gpu_jobs: list[Recorded] = field(default_factory=list)

    def of(self, part: str) -> list[Recorded]:
        """Jobs of the run whose comment contains `part`."""
        return [job for job in self.jobs if part in job.comment]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        install()
    except Unavailable as reason:
        pytest.skip(str(reason))
    cluster = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def on_cluster(run: Run) -> list[str]:
    """The profile as it is, with what a test needs on top: quick polls, no account, two units a job."""
    return [
        *("--workflow-profile", str(run.project / "profiles/slurm")),
        *("--slurm-no-account", "--slurm-init-seconds-before-status-checks", "1"),
        *("--group-components", f"unit={UNITS_A_JOB}", "--latency-wait", "10"),
    ]


@pytest.fixture(scope="module")
def story(
    cluster: Cluster, new_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory, table: Table
) -> Story:
    local = new_run("llama")
    run = Run(tmp_path_factory.mktemp("cluster"), copy.deepcopy(local.config), local.project)
    model = json.loads((run.folder / run.config["model"]["path"] / "config.json").read_text())
    story = Story(local, run, Plan(check_config(run.config), model))
    _first_part(story, cluster)
    _second_part(story, cluster)
    story.jobs, story.completed, story.made = cluster.jobs(), cluster.completed(), artifacts(story.run)
    _one_layer(story, cluster)
    _with_gpu(story, cluster)
    local.snakemake(*MODELS)
    return story


def _first_part(story: Story, cluster: Cluster) -> None:
    """Out of memory, then a cancelled job, then a killed snakemake."""
    too_small = f"inspect_model:mem_mb={TOO_SMALL} * attempt"
    process = story.run.start(*on_cluster(story.run), "--set-resources", too_small)

    def two_units() -> list[Recorded]:
        launched = cluster.launched("unit")
        return launched if len(launched) > 1 else []

    cancelled, lasting = wait_for(two_units, 400, "two units being learned")[:2]
    story.cancelled = cancelled.id
    cluster.cancel(cancelled)
    cluster.suspend(lasting)  # so that the run cannot end before what is to be seen has been seen

    def learned() -> bool:
        story.together = max(story.together, len(cluster.active(state="RUNNING")))
        ended = [job for job in cluster.jobs() if "unit" in job.comment and job.state == "COMPLETED"]
        again = [job for job in cluster.jobs() if "unit" in job.comment and job.mem_mb == 2 * cancelled.mem_mb]
        # what snakemake has not yet noticed it may be about to touch, and a kill between two files repeats the second
        noticed = console(story.run).count("(Rule: quantize_codes)") // UNITS_A_JOB
        return bool(ended and again and noticed == len(ended))

    wait_for(learned, 400, "a unit finished, another one under way, the cancelled one submitted again")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    cluster.resume(lasting)
    wait_for(lambda: not cluster.active(), 400, "the end of the jobs that nobody waits for any more")
    story.done_at_kill = {job.id for job in cluster.jobs() if job.state == "COMPLETED"}
    story.kept = artifacts(story.run)


def _second_part(story: Story, cluster: Cluster) -> None:
    """The same command again, to the end; the controller is away for a while."""
    process = story.run.start(*on_cluster(story.run))

    # a job without its step would wait minutes for the controller: srun asks again at growing intervals
    def evaluating() -> list[Recorded]:
        assert process.poll() is None, "snakemake ended before an evaluation ran and nothing was just starting"
        running, launched = cluster.active(state="RUNNING"), cluster.launched("")
        ready = len(launched) == len(running) and any("rule_evaluate" in job.comment for job in launched)
        return launched if ready else []

    lasting = wait_for(evaluating, 400, "an evaluation, and nothing that is just starting")
    cluster.stop_controller()
    story.over_restart = [job.id for job in lasting]
    time.sleep(4)
    cluster.start_controller()
    story.console, _ = process.communicate(timeout=600)
    assert process.returncode == 0, story.console
    # what the killed snakemake would have removed when the jobs that read it were done
    story.run.snakemake("--delete-temp-output")


def _one_layer(story: Story, cluster: Cluster) -> None:
    path = story.run.folder / LAYER
    story.layer_before = path.read_bytes()
    path.unlink()
    known = {job.id for job in cluster.jobs()}
    story.run.snakemake(*on_cluster(story.run), LAYER)
    story.layer_after = path.read_bytes()
    story.layer_jobs = [job for job in cluster.jobs() if job.id not in known]


def _with_gpu(story: Story, cluster: Cluster) -> None:
    """Only what is asked for: the GPU of this cluster is none."""
    run = story.run.copy(story.run.folder.parent / "gpu")
    run.config["device"] = "cuda"
    (run.folder / LAYER).unlink()
    known = {job.id for job in cluster.jobs()}
    process = run.start(*on_cluster(run), "--rerun-triggers", "mtime", "--retries", "0", "--", LAYER)
    wait_for(lambda: process.poll() is not None or {job.id for job in cluster.jobs()} - known, 200, "a GPU job")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=200)
    wait_for(lambda: not cluster.active(), 200, "the end of the GPU job")
    story.gpu_jobs = [job for job in cluster.jobs() if job.id not in known]


def console(run: Run) -> str:
    """What the last snakemake of a run has said so far."""
    return max((run.folder / ".snakemake/log").glob("*.log")).read_text()


def artifacts(run: Run) -> dict[str, int]:
    """Every finished file under the results but logs and benchmarks, with its time of change."""
    skipped = {"logs", "benchmarks", "activations"}
    return {
        str(path.relative_to(run.results)): path.stat().st_mtime_ns
        for path in run.results.rglob("*")
        if path.is_file() and path.relative_to(run.results).parts[0] not in skipped
    }


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Rows of what was asked, printed when the module is done."""
    started = time.monotonic()
    rows: Table = []
    yield rows
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{tabulate(rows, headers=['what SLURM or the files show', 'found', 'expected'])}")
        print(f"{len(rows)} rows, wall time {time.monotonic() - started:.0f} s")


@pytest.fixture
def check(table: Table) -> Callable[[str, Any, Any], None]:
    """``check(what, found, expected)``: a row of the table, and an assertion."""

    def check(what: str, found: Any, expected: Any) -> None:
        holds = expected(found) if callable(expected) else found == expected
        said = expected.__doc__ if callable(expected) else expected
        table.append((what, found, said))
        assert holds, f"{what}: found {found}, expected {said}"

    return check


def at_least(least: float) -> Callable[[float], bool]:
    def holds(found: float) -> bool:
        return found >= least

    holds.__doc__ = f"at least {least}"
    return holds


# --- the questions ---------------------------------------------------------------------------------------------------


def test_the_run_is_complete(story, check):
    check_finished(story.run, VARIANTS)
    assert "Everything is in results/tiny" in story.console
    check("files missing of those a local run makes", sorted(set(artifacts(story.local)) - set(story.made)), [])


def test_the_checkpoints_are_those_of_a_local_run(story, check):
    for model in MODELS:
        here, there = story.local.folder / model, story.run.folder / model
        names = sorted(path.name for path in here.iterdir())
        assert names == sorted(path.name for path in there.iterdir())
        different = [name for name in names if (here / name).read_bytes() != (there / name).read_bytes()]
        check(f"{model}: files that differ from a local run's, of {len(names)}", different, [])


def test_what_is_asked_for_follows_from_the_shapes(story, check):
    plan, none = story.plan, SimpleNamespace()
    for stage, comment, wildcards in (
        ("prepare", "rule_prepare_calibration", none),
        ("assemble", "rule_assemble_model_wildcards_cospadi-20", SimpleNamespace(variant="cospadi-20")),
        ("evaluate_dense", "rule_evaluate_dense", none),
    ):
        job = story.of(comment)[0]
        asked = plan.mem_mb(stage)(wildcards, attempt=1), plan.runtime(stage)(wildcards, attempt=1, threads=1)
        check(f"{stage}: MB and minutes asked of SLURM", (job.mem_mb, job.minutes), asked)


def test_jobs_run_side_by_side(story, check):
    check("jobs that ran at the same time", story.together, at_least(2))


def test_out_of_memory_is_tried_again_with_more(story, check):
    first, *others = story.of("rule_inspect_model")
    check("inspect_model with too little memory: state", first.state, "FAILED")
    check("its attempts: MB asked", [job.mem_mb for job in (first, *others)], [TOO_SMALL, 2 * TOO_SMALL])
    check("its second attempt: state", others[-1].state, "COMPLETED")


def test_a_cancelled_job_is_tried_again_with_more(story, check):
    cancelled = next(job for job in story.jobs if job.id == story.cancelled)
    check("the cancelled job: state", cancelled.state, "CANCELLED")
    again = [job for job in story.of("unit") if job.mem_mb > cancelled.mem_mb]
    check("jobs submitted in its place", len(again), 1)
    asked = 2 * cancelled.mem_mb, 2 * cancelled.minutes
    check("MB and minutes asked by it", (again[0].mem_mb, again[0].minutes), asked)
    check("its state", again[0].state, "COMPLETED")


def test_nothing_that_was_finished_is_repeated(story, check):
    done = Counter(job.comment for job in story.jobs if job.state == "COMPLETED" and "unit" not in job.comment)
    check("rules and wildcards with more than one completed job", [name for name, n in done.items() if n > 1], [])
    changed = [name for name, changed in story.kept.items() if story.made.get(name) != changed]
    check(f"files finished when snakemake was killed ({len(story.kept)}) and written again", changed, [])
    check("jobs completed at the kill", len(story.done_at_kill), at_least(5))


def test_units_share_jobs(story, check):
    good = [job for job in story.of("unit") if job.state == "COMPLETED"]
    check("SLURM jobs for 8 units, learned and packed, two a job", len(good), 4)
    check("CPUs asked by each: its members run in turn", {job.cpus for job in good}, {1})
    chunks = [job for job in story.of("chunk") if job.state == "COMPLETED"]
    check("SLURM jobs for 2 chunks and their 4 Grams", len(chunks), 2)


def test_jobs_survive_a_restart_of_the_controller(story, check):
    state = {job.id: job.state for job in story.jobs}
    check(
        "jobs that ran while the controller was away: states", {state[id] for id in story.over_restart}, {"COMPLETED"}
    )


def test_the_completion_log_says_the_same(story, check):
    ended = Counter(job.state for job in story.jobs)
    check("states in the completion log", Counter(line["JobState"] for line in story.completed), ended)
    logged = {int(line["JobId"]): line["Tres"] for line in story.completed}
    missing = [job.id for job in story.jobs if f"cpu={job.cpus}," not in logged[job.id]]
    check("jobs whose CPUs it records differently", missing, [])


def test_one_layer_is_one_job(story, check):
    check("SLURM jobs for one layer", len(story.layer_jobs), 1)
    job = story.layer_jobs[0]
    wildcards = SimpleNamespace(variant="cospadi-20", unit="layer_03")
    asked = story.plan.mem_mb("learn")(wildcards, attempt=1), story.plan.runtime("learn")(wildcards, 1, 1)
    check("its MB, minutes, CPUs", (job.mem_mb, job.minutes, job.cpus), (*asked, 1))
    check("its file is the same as before", story.layer_after == story.layer_before, True)


def test_device_cuda_asks_for_a_gpu(story, check):
    check("GPUs asked by a learning job, device cuda", [job.gpus for job in story.gpu_jobs], [1])
    check("its state after Ctrl-C on snakemake", [job.state for job in story.gpu_jobs], ["CANCELLED"])
    check("GPUs asked by all jobs, device cpu", sum(job.gpus for job in story.jobs), 0)


def test_overhead_of_a_job(story, table):
    """No bound is asserted: it is the machine's. SLURM's seconds less the rule's own, where a job is one rule."""
    seconds = {}
    for name, file in (("prepare_calibration", "prepare_calibration"), ("inspect_model", "inspect_model")):
        job = next(job for job in story.of(name) if job.state == "COMPLETED")
        seconds[name] = job.seconds - benchmark(story.run, file)
    for name in VARIANTS:
        job = next(job for job in story.of(f"evaluate_model_wildcards_{name}") if job.state == "COMPLETED")
        seconds[name] = job.seconds - benchmark(story.run, f"evaluate_model/{name}")
    overhead = statistics.median(seconds.values())
    table.append(("seconds a SLURM job takes beside its rule (median)", round(overhead, 1), "measured"))
    assert overhead > 0


def benchmark(run: Run, name: str) -> float:
    with open(run.results / "benchmarks" / f"{name}.tsv", newline="") as file:
        return float(next(csv.DictReader(file, delimiter="\t"))["s"])
