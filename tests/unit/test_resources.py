"""Resources and needs: estimates against what the demo measured, how they grow, groups of jobs, the table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cospadi import needs as needs_module
from cospadi import schedule as schedule_module
from cospadi.budget import nbytes_left
from cospadi.config import check_config
from cospadi.errors import ConfigError, UnsupportedModelError
from cospadi.formats.values import storage_of
from cospadi.methods import cospadi
from cospadi.needs import measured, needs, table
from cospadi.plan import Plan
from cospadi.problem import Target
from cospadi.resources import Estimates, Shapes
from cospadi.runs import KINDS, Kind, check_run, kind_of, plan_run
from cospadi.stages import drawing
from cospadi.work import JOB_MEMORY, MEBI, PRODUCT, READ, REFERENCE, SLACK, SPARE, START_MINUTES, Cost, Machine, Work

PROJECT = Path(__file__).parents[2]
MODELS = PROJECT / "config/models"

# Largest of the demo's benchmark files: MiB and seconds. 64 x 512 tokens in float32, units of 10 layers, two virtual
# cores of an AMD EPYC Milan (AVX2, no bfloat16). Snakemake looks every half minute at long jobs: it saw 442 MiB of
# fetching, whose peak the system knows
MEASURED = {
    ("fetch", ""): (926, 32.0),
    ("text", ""): (118, 7.2),
    ("inspect", ""): (433, 6.0),
    ("prepare", ""): (158, 2.8),
    ("collect", ""): (1390, 50.4),
    ("gram", ""): (163, 3.0),
    ("learn", "ours-40"): (506, 137.1),
    ("learn", "sparsegpt-20"): (303, 16.4),
    ("learn", "sparsegpt-40"): (292, 15.9),
    ("learn", "cospadi-20"): (277, 66.2),
    ("learn", "cospadi-40"): (283, 53.2),
    ("learn", "svd_llm-20"): (307, 15.7),
    ("learn", "svd_llm-40"): (271, 15.5),
    ("quantize", "ours-40"): (185, 5.3),
    ("quantize", "sparsegpt-20"): (195, 7.4),
    ("quantize", "cospadi-20"): (200, 5.7),
    ("quantize", "svd_llm-20"): (187, 5.0),
    ("assemble", ""): (323, 3.7),
    ("evaluate_dense", ""): (1509, 31.4),
    ("evaluate", ""): (1925, 38.9),
    ("summarize", ""): (151, 6.9),
}
# The same in bfloat16 on two virtual cores of an AMD EPYC with AVX-512, by what jobs say of their memory: MiB
MEASURED_BFLOAT16 = {
    ("fetch", ""): 973,
    ("text", ""): 143,
    ("inspect", ""): 446,
    ("prepare", ""): 167,
    ("collect", ""): 1181,
    ("gram", ""): 197,
    ("learn", "ours-40"): 484,
    ("learn", "sparsegpt-20"): 279,
    ("learn", "cospadi-20"): 314,
    ("learn", "cospadi-40"): 290,
    ("learn", "svd_llm-20"): 287,
    ("quantize", "ours-40"): 185,
    ("quantize", "sparsegpt-20"): 203,
    ("quantize", "cospadi-20"): 197,
    ("assemble", ""): 338,
    ("evaluate_dense", ""): 1298,
    ("evaluate", ""): 1731,
    ("summarize", ""): 158,
}
# Its files were still in memory: they are read at 1 GB/s. The other rates are the reference's
DEMO = Machine({**REFERENCE.rates, READ: 1e9})


def plan_of(model: str = "SmolLM2-135M-Instruct", **sections) -> Plan:
    config = yaml.safe_load((PROJECT / "config.yaml").read_text())
    config["device"] = "cpu"
    return Plan(check_config({**config, **sections}), json.loads((MODELS / f"{model}.json").read_text()))


def wildcards(**changes) -> SimpleNamespace:
    values = {"base": "", "first": "00", "last": "14", "layer": "03", "unit": "layer_03", "variant": "cospadi-20"}
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize("value", [0, -1, None, "12", True, 1.5, []])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_key_value_heads", "head_dim"])
def test_sizes_of_a_model_are_positive_integers(key, value):
    config = json.loads((MODELS / "Llama-3.2-1B.json").read_text()) | {key: value}
    if value is None and key in ("num_key_value_heads", "head_dim"):
        assert Shapes(config).matrices["k_proj"] == (2048, 2048 if key == "num_key_value_heads" else 512)
        return
    with pytest.raises(UnsupportedModelError, match=rf"config.json: {key} is .*; a positive integer is needed"):
        Shapes(config)


def test_learning_all_layers_at_once_takes_what_a_group_needs():
    variant = {"method": "masa", "ratio": 0.2, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    plan = plan_of(variants={"masa-20": variant})
    (unit,) = plan.units("masa-20")
    work = plan.work("learn", wildcards(variant="masa-20", unit=unit))
    assert 223 <= work.memory / MEBI <= 3.1 * 223, "measured: 223 MB, of them 75 before anything is read"
    large = plan_of("Meta-Llama-3-8B", variants={"masa-20": variant})
    work = large.work("learn", wildcards(variant="masa-20", unit=large.units("masa-20")[0]))
    targets = 4 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert work.memory < 2 * targets, "the factors and a group of layers, not copies of all weights"


@pytest.mark.parametrize(("stage", "variant"), MEASURED)
def test_the_demo_stays_within_what_is_asked_for(stage, variant):
    megabytes, seconds = MEASURED[stage, variant]
    plan = plan_of()
    work = plan.work(stage, wildcards(variant=variant or "cospadi-20", unit="layers_00-09"))
    assert 0.8 * megabytes <= work.memory / MEBI <= 1.25 * megabytes
    threads = min(plan.threads(stage), 2)
    assert seconds / 2 <= work.wall(threads, machine=DEMO) <= 2 * seconds
    # two Snakemake processes run beside the stage: 258 MB
    assert megabytes + 258 < work.mem_mb()
    assert seconds < 60 * work.runtime(threads=threads) / 4


@pytest.mark.parametrize(("stage", "variant"), MEASURED_BFLOAT16)
def test_the_demo_in_bfloat16_takes_the_memory_that_is_planned(stage, variant):
    work = plan_of().work(stage, wildcards(variant=variant or "cospadi-20", unit="layers_00-09"))
    assert 0.8 <= work.memory / MEBI / MEASURED_BFLOAT16[stage, variant] <= 1.25


def test_training_end_to_end_takes_the_memory_that_is_planned():
    """Of the demo's model, 128 windows in bfloat16 on the same cores: 3710 MB."""
    settings = {"method": "sparsegpt", "ratio": 0.4, "distill": {"epochs": 1}}
    plan = plan_of(variants={"a": settings}, calibration={"source": "text", "samples": 128, "dtype": "bfloat16"})
    work = plan.work("distill", wildcards(variant="a"))
    assert 0.8 <= work.memory / 3.710e9 <= 1.25
    shorter = plan_of(variants={"a": settings}, calibration={"source": "text", "samples": 64, "dtype": "bfloat16"})
    assert shorter.work("distill", wildcards(variant="a")).core.seconds() == pytest.approx(work.core.seconds() / 2)
    # with windows of its own, more than the calibration's, it is longer, and nothing else is
    options = {"epochs": 1, "samples": 256}
    variants = {"a": {**settings, "distill": options}, "b": {**settings, "distill": {**options, "samples": 64}}}
    own = plan_of(variants=variants, calibration={"source": "text", "samples": 128, "dtype": "bfloat16"})
    seconds = [own.work("distill", wildcards(variant=name)).core.seconds() for name in "ab"]
    assert seconds == pytest.approx([2 * work.core.seconds(), work.core.seconds() / 2])
    assert own.work("more", wildcards(samples=256)).disk == 2 * own.work("prepare", wildcards()).disk
    assert [own.more_windows_of(name, "distill") for name in "ab"] == [["results/demo/windows/256.h5"], []]


def test_training_layers_behind_takes_the_memory_that_is_planned():
    """Of the demo's model, 64 windows in bfloat16, two bits a weight, on the same cores: 4157 MB."""
    settings = {"method": "ectcq", "bits": 2, "metric": "gradients", "allocation": "global", "compensate": {}}
    fewer = {**settings, "compensate": {"every": 20}}
    calibration = {"source": "text", "samples": 64, "dtype": "bfloat16"}
    plan = plan_of(variants={"a": settings, "b": fewer}, calibration=calibration)
    often, rarely = (plan.work("in_turn", wildcards(variant=name, unit="layers_00-09")) for name in "ab")
    assert 0.8 <= often.memory / 4.157e9 <= 1.25
    assert rarely.memory < often.memory and 2 * rarely.core.seconds() < often.core.seconds()
    # and on twice the text twice as long, all but the learning
    more = {**settings, "compensate": {"samples": 128}}
    plan = plan_of(variants={"a": settings, "b": more, "c": {**settings, "compensate": None}}, calibration=calibration)
    few, many = (plan.work("in_turn", wildcards(variant=name, unit="layers_00-09")).core.seconds() for name in "ab")
    learning = plan.work("learn", wildcards(variant="c", unit="layers_00-09")).core.seconds()
    assert many - learning == pytest.approx(2 * (few - learning))
    assert plan.more_windows_of("b", "compensate") == ["results/demo/windows/128.h5"]
    # a unit's share of the trainings is that of its layers
    plan = plan_of(variants={"a": settings}, calibration=calibration, layers_per_job=20)
    twice = plan.work("in_turn", wildcards(variant="a", unit="layers_00-19"))
    assert twice.core.seconds() == pytest.approx(2 * often.core.seconds())


# Peak in GB with one thread and a projection of Llama-3-8B's shapes (docs/cluster.md)
WIDE = {
    ("learn", "sparsegpt", "down_proj"): 4.82,
    ("learn", "ectcq", "down_proj"): 5.18,
    ("learn", "hybrid", "v_proj"): 1.24,
    ("quantize", "sparsegpt", "down_proj"): 3.66,
}


@pytest.mark.parametrize(("stage", "method", "projection"), WIDE)
def test_a_wide_site_takes_what_is_planned(stage, method, projection):
    options = {"hybrid": {"ratio": 0.4, "schedule": "short", "max_iter": 1}, "ectcq": {"ratio": 0.8}}
    settings = {"method": method, "ratio": 0.2, "targets": [projection], **options.get(method, {})}
    plan = plan_of("Meta-Llama-3-8B", variants={"a": settings}, layers_per_job=1)
    work = plan.work(stage, wildcards(variant="a", unit="layer_00"))
    assert 0.8 <= work.memory / 1e9 / WIDE[stage, method, projection] <= 1.25


@pytest.mark.parametrize(
    ("name", "size"),
    [("dense", 269060552), ("ours-40", 184201076), ("cospadi-20", 226473152), ("svd_llm-40", 183871152)],
)
def test_sizes_of_the_demos_models_are_known_before(name, size):
    """Bytes of their weight files in the run that `MEASURED` is of."""
    assert size <= plan_of().final_nbytes(name) <= 1.005 * size


@pytest.mark.parametrize("stage", ["collect", "gram", "distances", "drift", "prepare", "evaluate"])
def test_auto_is_planned_as_the_larger_of_its_dtypes(stage):
    works = {}
    for dtype in ("auto", "bfloat16", "float32"):
        calibration = {"dtype": dtype, "source": "self", "mode": "store"}
        plan = plan_of(calibration=calibration, evaluation={"dtype": dtype})
        works[dtype] = plan.work(stage, wildcards())
    assert works["auto"] == works["float32"]
    smaller = works["bfloat16"]
    assert works["auto"].memory + works["auto"].wall() > smaller.memory + smaller.wall()
    assert works["auto"].disk >= smaller.disk


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({"method": "sparsegpt"}, 2),  # float32 for bfloat16
        ({"method": "sparse", "codes": {"value_bits": 4, "rounding": "optimal"}}, 8),
        ({"method": "ectcq"}, 1),  # written as they will stay
        ({"method": "gptq"}, 1),
    ],
)
def test_factors_wait_to_be_packed_in_float32_unless_they_are_settled(settings, times):
    plan = plan_of(variants={"one": {"ratio": 0.75, **settings}})
    need = next(row for row in needs(plan, cores=1) if row.stage == "learn")
    shapes = Shapes(json.loads((MODELS / "SmolLM2-135M-Instruct.json").read_text()))
    packed = nbytes_left(list(shapes.matrices.values()) * shapes.n_layers, 0.75)
    assert need.n_jobs * need.work.disk == pytest.approx(times * packed, rel=1e-3)


def test_what_is_asked_for():
    second = Cost({PRODUCT: REFERENCE.rates[PRODUCT]})
    work = Work(1000 * MEBI, 30.0, second * 240, second * 12)
    assert work.mem_mb() == JOB_MEMORY / MEBI + SPARE * 1000
    assert work.mem_mb(3) == 3 * work.mem_mb()
    assert work.wall(1) == 270 and work.wall(gpu=True) == 42
    assert 30 + 240 / 8 < work.wall(8) < 30 + 240 / 5
    assert work.runtime() == START_MINUTES + SLACK * 270 / 60
    assert work.runtime(2) == 2 * work.runtime()


def test_learning_grows_with_the_cube_of_the_width():
    config = plan_of().config
    model = json.loads((MODELS / "Meta-Llama-3-8B.json").read_text())
    # three times as wide in everything, the key and value heads too
    wide = {**model, "hidden_size": 3 * 4096, "intermediate_size": 3 * 14336, "num_attention_heads": 96}
    wide |= {"num_key_value_heads": 24}
    settings = {"method": "cospadi", "ratio": 0.2, "rho": 2.0, "solver": "htp"}
    one, three = (Estimates(config, shapes).learn(settings) for shapes in (model, wide))
    assert three.core.seconds() / one.core.seconds() == pytest.approx(27, rel=0.01)
    assert three.memory / one.memory == pytest.approx(9, rel=0.05)


def test_settings_decide_what_learning_takes():
    estimates = plan_of().estimates
    settings = {"method": "cospadi", "ratio": 0.2, "rho": 2.0, "solver": "htp", "max_iter": 25}
    base = estimates.learn(settings)

    def seconds(*unit, **changes) -> float:
        return estimates.learn({**settings, **changes}, *unit).core.seconds()

    assert seconds(max_iter=5) < seconds() / 2
    assert seconds(ratio=0.6) < seconds() / 2
    assert seconds(solver="ksvd", max_iter=60) > 10 * seconds()
    assert estimates.learn({"method": "svd_llm", "ratio": 0.2}).core.seconds() < seconds() / 5
    group = {"share": ["gate_proj"], "group_size": 2}
    assert seconds(2, **group) > 2 * seconds()
    assert estimates.learn({**settings, **group}, 2).memory > 1.1 * base.memory
    assert base.gpu.seconds() < seconds() / 5


def test_benchmarked_solvers_take_the_time_that_benchmarks_say():
    # benchmarks/README.md, one thread: 576 x 1536 at ratio .2
    targets, nbytes = [Target(0, "up_proj", (576, 1536))], nbytes_left([(576, 1536)], 0.2)
    works = [cospadi.work(targets, nbytes, {"solver": solver}, storage_of({})) for solver in ("htp", "ksvd")]
    seconds = [work.core.seconds() for work in works]
    assert 3.40 / 2 < seconds[0] < 2 * 3.40
    assert 183 / 2 < seconds[1] < 2 * 183


def test_searching_rho_takes_more_than_a_rho_that_is_given():
    estimates = plan_of().estimates
    works = (estimates.learn({"method": "cospadi", "ratio": 0.2, "rho": rho}) for rho in (2.0, "auto"))
    given, searched = (work.core.seconds() for work in works)
    assert 1.2 * given < searched < 5 * given
    # a whole run can be planned with it
    assert plan_of(variants={"a": {"method": "cospadi", "ratio": 0.2, "rho": "auto"}}).mem_mb("learn")(
        wildcards(variant="a"), 1
    )


def test_a_chunk_and_its_grams_are_one_job():
    plan = plan_of()
    collect, gram = plan.group("collect"), plan.group("gram")
    assert collect(wildcards(first="15", last="29")) == gram(wildcards(layer="29")) == "chunk_15-29"
    assert gram(wildcards(layer="14")) == "chunk_00-14"
    # Grams that take longer than collecting would only hold its CPUs, or its GPU
    long = plan_of(
        "Llama-3.2-1B",
        calibration={"samples": 256, "length": 1024, "mode": "store", "blocks_per_job": 2, "dtype": "bfloat16"},
    )
    assert long.group("collect")(wildcards(first="00", last="01")) is None
    assert long.group("gram")(wildcards(layer="01")) is None


def test_small_units_share_a_job_and_large_ones_do_not():
    small, large = plan_of(), plan_of("Meta-Llama-3-8B")
    for stage in ("learn", "quantize"):
        assert small.group(stage)(wildcards()) == "unit"
        assert large.group(stage)(wildcards()) is None
    # between learning and packing there is a job of all units
    trained = plan_of(variants={"cospadi-20": {"method": "cospadi", "ratio": 0.2, "distill": {}}})
    assert trained.group("learn")(wildcards()) is trained.group("quantize")(wildcards()) is None


def test_gpu_stages_take_the_time_of_a_gpu():
    config = yaml.safe_load((PROJECT / "config.yaml").read_text())
    shapes = json.loads((MODELS / "Meta-Llama-3-8B.json").read_text())
    cpu, gpu = (Plan(check_config({**config, "device": device}), shapes) for device in ("cpu", "cuda"))
    for stage in ("collect", "learn", "evaluate"):
        minutes = [plan.runtime(stage)(wildcards(), attempt=1, threads=8) for plan in (cpu, gpu)]
        assert minutes[1] < minutes[0]
    assert cpu.runtime("quantize")(wildcards(), 1, 1) == gpu.runtime("quantize")(wildcards(), 1, 1)
    assert [plan.resources("learn")["gpu"] for plan in (cpu, gpu)] == [0, 1]
    assert set(gpu.resources("quantize")) == {"mem_mb", "runtime"}


def test_a_spread_model_asks_for_its_gpus_and_for_the_memory_that_it_may_take():
    spread = {"device_map": "auto", "gpus": 4, "max_memory": {"gpu": "70GB", "cpu": "40GB"}}
    plan = plan_of("Meta-Llama-3-70B", device="cuda", evaluation={"perplexity": {"max_tokens": 100_000}} | spread)
    whole = plan_of("Meta-Llama-3-70B", device="cuda", evaluation={"perplexity": {"max_tokens": 100_000}})
    for stage in ("evaluate", "evaluate_dense"):
        assert plan.resources(stage)["gpu"] == 4 and whole.resources(stage)["gpu"] == 1
        memory = plan.work(stage, wildcards()).memory
        assert 40e9 < memory < 60e9 < 200e9 < whole.work(stage, wildcards()).memory
    assert plan.resources("learn")["gpu"] == 1
    # what searches walk through is whole
    assert plan.estimates.search(3) == whole.estimates.search(3)


def test_needs_of_every_rule_with_a_model():
    plan = plan_of()
    rows = {need.name.split()[0]: need for need in needs(plan)}
    assert rows["collect_activations"].n_jobs == 2 and rows["compute_gram"].n_jobs == 30
    assert [need.n_jobs for need in needs(plan) if need.name.startswith("learn_dictionary")] == [3] * 7
    assert rows["evaluate_model"].n_jobs == 7
    # rows of 15 layers and the hidden states, in the larger of the dtypes that `auto` may be
    assert rows["collect_activations"].work.disk == 4 * 64 * 512 * (15 * (3 * 576 + 1536) + 576)
    assert rows["compute_gram"].work.disk == 8 * (3 * 576**2 + 1536**2)
    # the rules ask for the same
    assert rows["compute_gram"].limit == plan.runtime("gram")(wildcards(), attempt=1, threads=1)


def test_needs_of_a_run_that_removes_blocks():
    steps = {"steps": [{"method": "replaceme", "blocks": 4}, {"method": "cospadi", "ratio": 0.2}]}
    rows = {need.name: need for need in needs(plan_of(variants={"a": steps}, layers_per_job=1))}
    assert rows["fit_transforms a/pruned/"].n_jobs == 1 and rows["measure_distances"].n_jobs == 1
    assert rows["learn_dictionary a"].n_jobs == 26 and rows["compute_gram a/pruned/"].n_jobs == 26


def test_what_a_run_measured_stands_beside(tmp_path):
    rows = needs(plan_of())
    gram = next(need for need in rows if need.stage == "gram")
    folder = tmp_path / "benchmarks/compute_gram"
    folder.mkdir(parents=True)
    (folder / "layer_00.tsv").write_text("s\tmax_rss\n2.5\t200\n")
    (folder / "layer_01.tsv").write_text("s\tmax_rss\n6.0\tNA\n")
    assert measured(tmp_path, gram)[:2] == (200 * MEBI, 6.0)
    log = tmp_path / "logs/compute_gram/layer_01.log"  # of a job that Snakemake had no time to look at
    log.parent.mkdir(parents=True)
    log.write_text("10:00:00 done in 5.9 s\n")  # by an older version
    assert measured(tmp_path, gram)[0] == 200 * MEBI
    log.write_text("10:00:00 a line\n10:00:05 done in 5.9 s, 640.5 MB of memory at most\n")
    for layer in range(30):
        path = tmp_path / f"gram/layer_{layer:02d}.h5"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10**6))
    assert measured(tmp_path, gram) == (640.5e6, 6.0, 30e6)
    lines = table(rows, tmp_path).splitlines()
    assert "GB measured" in lines[0]
    assert next(line for line in lines if line.startswith("compute_gram")).split()[-3:] == ["0.64", "0.1", "0.03"]
    assert "CPU hours" in lines[-2]


def test_the_command_prints_the_table(capsys, monkeypatch):
    monkeypatch.chdir(PROJECT)
    model = str(MODELS / "Meta-Llama-3-8B.json")
    needs_module.main(["--configfile", "config/llama-3-8b.yaml", "--model", model, "--device", "cuda", "--cores", "8"])
    lines = capsys.readouterr().out.splitlines()
    learn = next(line for line in lines if line.startswith("learn_dictionary cospadi-20")).split()
    assert learn[2:5] == ["32", "8", "1"]  # jobs, CPUs, GPU
    sizes = {line.split()[0]: line.split()[1:] for line in lines[-7:]}
    assert sizes["dense"] == ["1.606e+04", "100.0%"] and sizes["cospadi-20"][1] == sizes["svd_llm-20"][1] == "82.6%"


def test_the_command_does_without_a_config_of_the_working_directory(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = {"run": "r", "training": {"vision": yaml.safe_load(VISION)}, "device": "cpu"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    needs_module.main(["--configfile", "mine.yaml"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train_model", "vision/dense", "3"] in [row[:3] for row in rows]
    with pytest.raises(SystemExit, match=r"config.yaml: 1 fault\n  - cannot be read \(No such file or directory\)"):
        needs_module.main([])
    with pytest.raises(SystemExit, match="--results: nowhere has no folder benchmarks"):
        needs_module.main(["--configfile", "mine.yaml", "--results", "nowhere"])
    for main in (needs_module.main, schedule_module.main):
        with pytest.raises(SystemExit):
            main(["--configfile", "mine.yaml", "--cores", "0"])
        assert "'0' is no number of cores, from 1 up" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("run: [")
    with pytest.raises(SystemExit, match=r"broken.yaml: 1 fault\n  - not YAML"):
        needs_module.main(["--configfile", "broken.yaml"])


# --- the tables of stages --------------------------------------------------------------------------------------------

VISION = """
model: {hidden_size: 8, intermediate_size: 8, layers: 2, heads: 2}
steps: 5
variants: {dense: {attention: dense}}
"""


def rules_of(kind: Kind) -> dict[str, str]:
    """Name and text of the rules that a kind of run has."""
    included = re.findall(r'include: "rules/(\w+)\.smk"', (PROJECT / f"workflow/{kind.name}.smk").read_text())
    text = "\n".join((PROJECT / "workflow/rules" / f"{file}.smk").read_text() for file in included)
    return {rule.partition(":")[0]: rule for rule in re.split(r"^rule ", text, flags=re.MULTILINE)[1:]}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_rule_is_a_stage_and_asks_its_own_entry(kind):
    rules = rules_of(kind)
    assert {stage.rule for stage in kind.stages.values()} == set(rules)
    for stage in kind.stages.values():
        asked = set(re.findall(r'plan\.(?:threads|resources|code)\("(\w+)"\)', rules[stage.rule]))
        assert asked <= {stage.name}
        assert stage.threads is None or f'threads: plan.threads("{stage.name}")' in rules[stage.rule]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_stages_come_after_what_they_read(kind):
    names = list(kind.stages)
    for stage in kind.stages.values():
        assert set(stage.after) <= set(names)
        # a pruned model is inspected again, after the one that it is made from
        assert stage.name == "inspect" or all(names.index(before) <= names.index(stage.name) for before in stage.after)
        assert stage.threads is None or stage.threads in kind.schema()["properties"]["threads"]["properties"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_drawing_in_the_documentation_is_of_these_stages(kind):
    page = (PROJECT / "docs/architecture.md").read_text()
    drawn = f"<!-- stages: {kind.name} -->\n```mermaid\n{drawing(kind.stages)}\n```"
    assert drawn in page, "run: python -m cospadi.runs docs/architecture.md"


def test_faults_of_the_config_and_of_its_plan_come_in_one_message():
    config = yaml.safe_load((PROJECT / "config.yaml").read_text())
    config["calibration"]["length"] = 9000
    config["variants"]["cospadi-20"]["warm_start"] = "cospadi-20"
    config["variants"]["gone"] = {"method": "uidl", "blocks": 30}
    with pytest.raises(ConfigError, match=r"mine\.yaml: 3 faults") as caught:
        plan_run(config, source="mine.yaml")
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "calibration.length",
        "variants.cospadi-20.warm_start",
        "variants.gone.blocks",
    ]
    # where one makes the other impossible, the first is told
    config["model"]["config"] = "nowhere.json"
    with pytest.raises(ConfigError) as caught:
        plan_run(config)
    (missing,) = [fault for fault in caught.value.faults if "nowhere.json" in fault]  # once, where the config says it
    assert "model.config: 'nowhere.json' does not exist" in missing
    config["variants"]["gone"]["blokcs"] = 1
    with pytest.raises(ConfigError) as caught:
        plan_run(config)
    # what the schema refuses comes before the rest, but for files that are not there
    assert [("nowhere.json" in fault, "gone" in fault) for fault in caught.value.faults] == [(1, 0), (0, 1)]


def test_needs_of_training_count_every_model_and_every_stage():
    config = yaml.safe_load((PROJECT / "config/masa-train.yaml").read_text())
    config["text"] = {"name": "t", "source": "hub", "dataset": "d"}
    config = check_run(config)
    rows = needs(kind_of(config).plan(config))
    assert [need.stage for need in rows] == ["text", "tokenizer", "tokens", *["train"] * 9, "summarize", "report"]
    assert {need.n_jobs for need in rows if need.stage == "train"} == {3}
    vision = check_run({"run": "r", "training": {"vision": yaml.safe_load(VISION)}})
    assert [need.stage for need in needs(kind_of(vision).plan(vision))] == ["train", "summarize", "report"]


def test_a_run_that_trains_leaves_out_what_only_the_other_kind_has_and_refuses_what_none_has():
    config = yaml.safe_load((PROJECT / "config.yaml").read_text()) | {"training": {"vision": yaml.safe_load(VISION)}}
    assert set(check_run(config)) == {"run", "text", "device", "training", "threads"}
    assert set(check_run(config)["threads"]) == {"fetch", "train"}
    config["varaints"], config["threads"]["lern"] = {}, 1
    with pytest.raises(ConfigError) as caught:
        check_run(config)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["threads.lern", "varaints"]
