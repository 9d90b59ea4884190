"""One run of the whole workflow, from a model folder and a text to the report; then what runs again, and what does not.

All tests share one finished run, so they are in one file: ``--dist loadfile`` gives a file to one worker.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from statistics import mean

import pytest
import yaml

from cospadi.files import TensorFile, read_json
from cospadi.runs import plan_of
from cospadi.stage import ended
from cospadi.status import status

from .conftest import check_finished, copy_project, rows

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVALUATED = {"evaluate_model", "summarize", "report"}
LEARNED_AND_AFTER = {"learn_dictionary", "quantize_codes", "assemble_model"} | EVALUATED


@pytest.fixture
def run(finished, tmp_path):
    return finished.copy(tmp_path / "run")


@pytest.fixture
def project(snapshot, tmp_path):
    """A copy of the project whose source may be edited."""
    return copy_project(snapshot, tmp_path / "project")


def rules(planned: dict[str, int]) -> set[str]:
    return set(planned) - {"all", "total"}


def append(path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def test_llama_from_start_to_report(finished):
    check_finished(finished, ["cospadi-20", "svd_llm-40"])
    factors = TensorFile(finished.results / "cospadi-20/factors/layer_03.safetensors")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in factors.names()} == set(MATRICES)
    assert all(name.startswith("model.layers.3.") for name in factors.names())
    console = (finished.folder / "console.txt").read_text()
    assert "svd_llm-40" in console.split("Everything is in")[1]  # the table
    assert 'from_pretrained("results/tiny/cospadi-20/model"' in console
    assert "steps (100%) done" in console


def test_status_says_what_is_done_at_any_time(run, monkeypatch):
    console = (run.folder / "console.txt").read_text()
    assert "cospadi-20: 4 of 4 layers learned, mean relative error 0." in console
    monkeypatch.chdir(run.folder)
    run.arguments()  # writes the config

    def shown() -> tuple[list[str], str]:
        text = status(plan_of("run.yaml"))
        return next(line.split() for line in text.splitlines() if line.startswith("cospadi-20")), text

    row, text = shown()
    error = mean(
        matrix["relative_error"]
        for layer in range(4)
        for matrix in read_json(run.results / f"cospadi-20/codes/layer_0{layer}.json")["matrices"].values()
    )
    assert row[1:3] == ["4/4", "4/4"] and float(row[3]) == pytest.approx(error, rel=1e-3) and row[4] == "yes"
    assert float(row[5]) == pytest.approx(
        float(rows(run.results / "summary.tsv")["cospadi-20"]["token_perplexity"]), 1e-3
    )
    assert "the report is written; about 0 minutes" in text
    # as it is in the middle of learning the last layer
    shutil.rmtree(run.results / "cospadi-20/model")
    for part, end in (("factors", "json"), ("codes", "json"), ("codes", "safetensors")):
        (run.results / f"cospadi-20/{part}/layer_03.{end}").unlink()
    (run.results / "benchmarks/learn_dictionary/cospadi-20/layer_03.tsv").unlink()
    (run.results / "cospadi-20/eval.json").unlink()
    (run.results / "logs/learn_dictionary/cospadi-20/layer_03.log").write_text("10:00:00 iter 3/5 rel_err 0.2\n")
    row, text = shown()
    assert row[1:3] == ["3/4", "3/4"] and row[4:] == ["no", "no"]
    assert next(line.split()[2] for line in text.splitlines() if line.startswith("learn_dictionary cosp")) == "3/4"
    assert "learn_dictionary/cospadi-20/layer_03.log: running; 10:00:00 iter 3/5 rel_err 0.2" in text


def test_jobs_that_need_tokenizers_alone_do_without_torch(finished):
    assert all(ended(path.read_text().splitlines()) for path in (finished.results / "logs").rglob("*.log"))
    jobs = {"prepare_calibration": 1, "assemble_model/*": 2, "collect_activations/*": 2}
    for name, count in jobs.items():
        logs = [path.read_text().splitlines() for path in (finished.results / "logs").glob(f"{name}.log")]
        assert len(logs) == count
        most = max(map(ended, logs))  # bytes
        # torch takes 200 MB, and what transformers imports beside it a hundred more
        assert most > 300e6 if name == "collect_activations/*" else 50e6 < most < 200e6


def test_second_run_has_nothing_to_do(finished):
    assert "Nothing to be done" in finished.snakemake()


def test_densify_target(finished, tmp_path):
    run = finished.copy(tmp_path / "run")
    assert run.planned("results/tiny/cospadi-20/dense") == {"densify": 1, "total": 1}
    run.snakemake("results/tiny/cospadi-20/dense")
    config = json.loads((run.results / "cospadi-20/dense/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config


def test_exports_are_made_when_they_are_asked_for(finished, tmp_path):
    run = finished.copy(tmp_path / "run")
    gguf = "results/tiny/cospadi-20/gguf/Q8_0.gguf"
    run.snakemake(gguf)
    assert (run.folder / gguf).read_bytes()[:4] == b"GGUF"
    refused = run.snakemake("results/tiny/cospadi-20/compressed-tensors", succeeds=False)
    assert "compressed-tensors holds integers alone" in refused


def test_as_a_module_of_another_workflow_it_reads_and_writes_in_that_ones_folder(finished, tmp_path):
    """Its config is a part of the other's, its files have a prefix, relative paths are the other's own."""
    run = finished.copy(tmp_path / "analysis")
    shutil.move(run.folder / "tiny-model", tmp_path)
    shutil.move(run.folder / "articles.jsonl", tmp_path)
    (run.results / "report.zip").unlink()
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump({"compression": run.config}))
    (tmp_path / "Snakefile").write_text(
        f"""
configfile: "outer.yaml"

module cospadi:
    snakefile: "{run.project}/Snakefile"
    config: config["compression"]
    prefix: "analysis"

use rule * from cospadi as cospadi_*
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(run.project / "workflow")}
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--directory", tmp_path]
    command += ["--snakefile", tmp_path / "Snakefile"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    # all that was there is what the module's rules make: only the report is missing
    assert "2 of 2 steps" in result.stdout + result.stderr
    check_finished(run, ["cospadi-20", "svd_llm-40"])
    assert {path.name for path in tmp_path.iterdir()} == {
        *(".snakemake", "Snakefile", "outer.yaml", "analysis", "tiny-model", "articles.jsonl")
    }
    # variants that read those of others, and units that read those before them, are planned there too
    run.config["variants"] = {
        "weighed": {"method": "svd_llm_v2", "ratio": 0.2, "metric": "gradients"},
        "rounded": {"method": "rtn", "ratio": 0.6, "metric": "gradients"},
        "mixed": {"method": "choose", "ratio": 0.4, "choose_from": ["weighed", "rounded"]},
        "turn": {"method": "wanda", "ratio": 0.2, "target": "sequential"},
    }
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump({"compression": run.config}))
    result = subprocess.run([*command, "-n"], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    for rule in ("choose_variants", "take_unit", "learn_in_turn"):
        assert f"cospadi_{rule} " in result.stdout + result.stderr


def test_a_deleted_model_is_made_again(finished, tmp_path):
    run = finished.copy(tmp_path / "run")
    shutil.rmtree(run.results / "cospadi-20/model")
    planned = run.planned()
    assert planned["assemble_model"] == 1 and "learn_dictionary" not in planned


def test_streamed_grams_equal_those_of_stored_rows(finished, tmp_path):
    import h5py
    import numpy as np

    run = finished.copy(tmp_path / "run")
    run.config["calibration"] |= {"mode": "stream", "blocks_per_job": 4}
    shutil.rmtree(run.results / "gram")
    run.snakemake("results/tiny/gram/layer_02.h5")
    with (
        h5py.File(finished.results / "gram/layer_02.h5") as stored,
        h5py.File(run.results / "gram/layer_02.h5") as streamed,
    ):
        assert set(stored) == set(streamed)
        for site in stored:
            np.testing.assert_allclose(streamed[site]["gram"][:], stored[site]["gram"][:], rtol=1e-5, atol=1e-4)


def test_calibration_on_the_models_own_text_needs_no_data(finished, tmp_path):
    run = finished.copy(tmp_path / "run")
    run.config["text"] = None
    run.config["calibration"]["source"] = "self"
    run.config["evaluation"]["perplexity"] = None
    planned = run.planned()
    assert "fetch_text" not in planned
    run.snakemake("results/tiny/calibration.h5")
    assert (run.results / "calibration.h5").stat().st_mtime > (finished.results / "calibration.h5").stat().st_mtime


def test_calibration_on_conversations_mixed_with_text(run):
    """Through the template in the model's folder; another template makes another text."""
    (run.folder / "chats.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"Describe river {n} " * 10}]}) + "\n"
            for n in range(30)
        )
    )
    parts = [
        {"source": "chat", "path": "chats.jsonl", "share": 3},
        {"source": "jsonl", "path": "articles.jsonl", "share": 1},
    ]
    run.config["text"] = {"name": "mixed", "source": "mixture", "sources": parts}
    target = "results/tiny/calibration.h5"
    assert "no chat template" in run.snakemake(target, succeeds=False)
    template = run.folder / "tiny-model/chat_template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    run.snakemake(target)
    texts = [json.loads(line) for line in (run.folder / "resources/text/mixed--tiny-model/calibration.jsonl").open()]
    assert {text["source"]: text["text"][:6] == "[user]" for text in texts} == {0: True, 1: False}
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    assert rules(run.planned(target)) >= {"fetch_text", "prepare_calibration"}
    run.config["text"]["sources"][0]["path"] = "nowhere.jsonl"
    assert "text.sources.0.path: 'nowhere.jsonl' does not exist" in run.snakemake(target, succeeds=False)


def test_one_lost_factor_file_is_one_job(run):
    target = "results/tiny/cospadi-20/factors/layer_03.safetensors"
    (run.folder / target).unlink()
    assert run.planned(target) == {"learn_dictionary": 1, "total": 1}
    run.snakemake(target)
    assert (run.folder / target).exists()
    beyond = run.snakemake("--dry-run", target.replace("03", "09"), succeeds=False)
    assert "layer 9 is not there; the model has layers 0 to 3" in beyond


def test_files_of_another_calibration_are_refused_by_name(run, tmp_path):
    """All Grams, or all codes, of a run with another seed: of the right model, layer, shape and time."""
    import h5py

    other = run.copy(tmp_path / "other")
    other.config["calibration"]["seed"] = 7
    codes = [f"results/tiny/cospadi-20/codes/layer_0{layer}.safetensors" for layer in range(4)]
    other.snakemake(*codes)
    factors = "results/tiny/cospadi-20/factors/layer_03.safetensors"
    gram = "results/tiny/gram/layer_03.h5"
    kept = (run.folder / gram).read_bytes()
    shutil.copy(other.folder / gram, run.folder / gram)
    (run.folder / factors).unlink()
    with h5py.File(other.results / "calibration.h5") as file, h5py.File(run.results / "calibration.h5") as mine:
        problem = f"is of tokens {file.attrs['tokens']}; expected is tokens {mine.attrs['tokens']}"
    output = run.snakemake(factors, succeeds=False)
    assert f"{gram}: {problem}" in output and not (run.folder / factors).exists()
    (run.folder / gram).write_bytes(kept)
    run.snakemake(*codes)
    for path in codes:
        shutil.copy(other.folder / path, run.folder / path)
    shutil.rmtree(run.results / "cospadi-20/model")
    output = run.snakemake("results/tiny/cospadi-20/model", succeeds=False)
    assert f"{codes[0]}: {problem}" in output and not (run.results / "cospadi-20/model").exists()


def test_single_layer_recomputes_nothing_else(run):
    before = (run.results / "cospadi-20/factors/layer_00.safetensors").stat().st_mtime_ns
    target = run.results / "cospadi-20/factors/layer_03.safetensors"
    content = target.read_bytes()
    target.unlink()
    output = run.snakemake(str(target.relative_to(run.folder)))
    assert "1 of 1 steps" in output
    assert target.read_bytes() == content  # same config, same machine, same threads: the same bytes
    assert (run.results / "cospadi-20/factors/layer_00.safetensors").stat().st_mtime_ns == before
    assert "Load a model" not in output  # the table belongs to whole runs


def test_what_is_asked_for_later_collects_nothing_and_learns_nothing_anew(run):
    coded = {"embedding_bits": 3, "embedding_method": "ectcq"}
    run.config["variants"]["late"] = {"method": "sparsegpt", "ratio": 0.4, "metric": "gradients", **coded}
    planned = run.planned()
    assert planned["collect_gradients"] == 2 and planned["measure_head"] == 1
    assert planned["learn_dictionary"] == planned["quantize_codes"] == 4  # layers of the new one
    assert planned["assemble_model"] == planned["evaluate_model"] == 1
    assert not {"collect_activations", "compute_gram", "evaluate_dense", "prepare_calibration"} & set(planned)
    del run.config["variants"]["late"]
    (run.results / "hidden/layers_00-01.h5").unlink()
    assert run.planned() == {}


def test_editing_a_solver_reruns_what_it_learned_and_what_follows(run, project):
    run.project = project
    run.snakemake("--touch")  # the project moved: only the edit below is to be seen
    assert rules(run.planned("--rerun-triggers", "mtime", "params", "input")) <= {"report"}
    append(project / "workflow/cospadi/solvers/htp.py", "\n# a comment changes nothing\n")
    assert rules(run.planned()) <= {"report"}
    append(project / "workflow/cospadi/solvers/htp.py", "\nedited = True\n")
    planned = run.planned()
    assert rules(planned) == LEARNED_AND_AFTER
    assert planned["learn_dictionary"] == 4  # cospadi-20 alone: svd_llm does not use this solver
    assert planned["assemble_model"] == 1
    assert run.planned("results/tiny/svd_llm-40/eval.json") == {}


def test_editing_collection_reruns_it_though_its_output_is_temporary(run, project):
    run.project = project
    append(project / "workflow/cospadi/calibration/collect.py", "\nedited = True\n")
    planned = run.planned()
    assert planned["collect_activations"] == 2
    assert planned["compute_gram"] == 4
    assert planned["learn_dictionary"] == 8
    assert not {"fetch_text", "inspect_model", "prepare_calibration"} & set(planned)


def test_editing_a_kernel_leaves_the_dense_evaluation_alone(run, project):
    run.project = project
    run.snakemake("--touch")
    append(project / "workflow/cospadi/runtime/cospadi_cuda_kernels.py", "\nedited = True\n")
    planned = run.planned()
    assert rules(planned) == {"assemble_model"} | EVALUATED
    assert planned["assemble_model"] == planned["evaluate_model"] == 2  # dense stays


def overwrite(path, old: bytes, new: bytes) -> None:
    """Write into a file, which keeps its size and time: what an older backup put in its place looks like."""
    assert len(old) == len(new)
    status, content = path.stat(), path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


FROM_COLLECTION = {"collect_activations", "compute_gram"} | LEARNED_AND_AFTER
FROM_TEXT = {"prepare_calibration", "evaluate_dense"} | FROM_COLLECTION
FROM_MODEL = {"inspect_model"} | FROM_TEXT


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("tiny-model/model.safetensors", None, None, FROM_MODEL - {"prepare_calibration"}),
        ("tiny-model/config.json", b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05', FROM_MODEL),
        ("tiny-model/tokenizer.json", b"river", b"rivet", FROM_MODEL),
        ("articles.jsonl", b"river", b"rivet", {"fetch_text"} | FROM_TEXT),
    ],
    ids=["weights", "config", "tokenizer", "text"],
)
def test_a_file_that_is_edited_in_place_runs_what_reads_it_again(run, file, old, new, expected):
    path = run.folder / file
    if old is None:
        old = path.read_bytes()[-8:]
        new = bytes(byte ^ 1 for byte in old)
    overwrite(path, old, new)
    planned = run.planned()
    assert rules(planned) == expected
    assert planned["evaluate_model"] == 2
    overwrite(path, new, old)
    assert run.planned() == {}


def test_files_that_nothing_reads_and_new_times_run_nothing(run):
    (run.folder / "tiny-model/pytorch_model.bin").write_bytes(b"the same in another format")
    (run.folder / "tiny-model/.cache").mkdir()
    for name in ("tiny-model/model.safetensors", "tiny-model/config.json", "articles.jsonl"):
        os.utime(run.folder / name)
    assert run.planned() == {}


def test_what_only_travels_is_only_assembled_again(run):
    (run.folder / "tiny-model/LICENSE").write_text("Do as you like.")
    planned = run.planned()
    assert rules(planned) == {"assemble_model"} | EVALUATED
    assert planned["evaluate_model"] == 2  # the dense model says what it said


def test_a_damaged_model_is_found_before_any_work(run):
    path = run.folder / "tiny-model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    run.config["evaluation"]["perplexity"]["window"] = 600
    output = run.snakemake("--dry-run", succeeds=False)
    assert "2 faults" in output and "Traceback" not in output
    assert "model.path: tiny-model/model.safetensors: not a complete safetensors file" in output
    assert "evaluation.perplexity.window: 600; the model has 512 positions" in output


@pytest.mark.parametrize(
    ("edit", "expected", "jobs"),
    [
        (lambda c: c["variants"]["cospadi-20"].update(ratio=0.3), LEARNED_AND_AFTER, 4),
        (
            lambda c: c["variants"]["svd_llm-40"]["codes"].update(rounding="nearest"),
            LEARNED_AND_AFTER - {"learn_dictionary"},
            0,
        ),
        (lambda c: c["evaluation"]["perplexity"].update(window=32), EVALUATED | {"evaluate_dense"}, 0),
        (lambda c: c["evaluation"]["perplexity"].update(kl=False), EVALUATED | {"evaluate_dense"}, 0),
        (lambda c: c["threads"].update(learn=2), {"report"}, 0),
    ],
    ids=["ratio", "rounding", "window", "kl", "threads"],
)
def test_editing_the_config_reruns_what_depends_on_it(run, edit, expected, jobs):
    edit(run.config)
    planned = run.planned()
    assert rules(planned) == expected
    assert planned.get("learn_dictionary", 0) == jobs


def test_killed_in_the_middle_of_learning_it_goes_on(run):
    learned = run.results / "cospadi-20/factors"
    shutil.rmtree(learned.parent)
    process = run.start("--cores", "1")
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and len(list(learned.glob("layer_*.json"))) < 2:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in learned.glob("layer_*.json")}
    assert 2 <= len(before) < 4

    output = run.snakemake()

    assert "Everything is in results/tiny" in output
    assert len(list(learned.glob("layer_*.safetensors"))) == 4
    # the job that was cut off may have written its file, but Snakemake had not seen it end
    repeated = [path for path, modified in before.items() if path.stat().st_mtime_ns != modified]
    assert len(repeated) <= 1
    assert "Nothing to be done" in run.snakemake()


def test_a_model_that_memory_has_no_room_for_is_read_from_the_disk(run):
    names = ["dense", "cospadi-20", "svd_llm-40"]
    before = {name: read_json(run.results / name / "eval.json") for name in names}
    run.config["evaluation"] |= {"device_map": "auto", "max_memory": {"cpu": "1KB"}, "dtype": "float32"}
    run.snakemake(*(f"results/tiny/{name}/eval.json" for name in names))
    for name in names:
        found = read_json(run.results / name / "eval.json")
        assert found["placement"].keys() == {"disk"} and found["dtype"] == "float32"
        assert [path.name for path in (run.results / name).glob(".offload*")] == []
        # those before may have been scored in bfloat16
        assert found["perplexity"]["token"] == pytest.approx(before[name]["perplexity"]["token"], rel=0.01)


def test_a_warm_start_and_an_exact_group_run_as_single_targets(run):
    method = {"method": "cospadi", "max_iter": 2}
    run.config["variants"] |= {
        "warm-40": {**method, "ratio": 0.4, "warm_start": "cospadi-20", "support": "2:4"},
        "exact-20": {**method, "ratio": 0.2, "group_size": 2, "share": ["up_proj"], "group_metric": "exact"},
    }
    targets = [
        "results/tiny/warm-40/codes/layer_03.safetensors",
        "results/tiny/exact-20/codes/layers_02-03.safetensors",
    ]
    assert run.planned(*targets) == {"learn_dictionary": 2, "quantize_codes": 2, "total": 4}
    run.snakemake(*targets)
    warm = read_json(run.results / "warm-40/factors/layer_03.json")
    assert warm["options"]["warm_start"] == "cospadi-20"
    specs = TensorFile(run.folder / targets[0]).metadata["matrices"]
    assert {spec["codes"]["support"] for spec in specs.values()} == {"2:4"}
    (run.results / "cospadi-20/factors/layer_03.safetensors").unlink()
    (run.results / "warm-40/factors/layer_03.safetensors").unlink()
    assert run.planned("results/tiny/warm-40/factors/layer_03.safetensors") == {"learn_dictionary": 2, "total": 2}
    exact = read_json(run.results / "exact-20/factors/layers_02-03.json")["matrices"]
    assert exact["model.layers.2.mlp.up_proj"]["history_exact"] == exact["model.layers.3.mlp.up_proj"]["history_exact"]
    assert "history_exact" not in exact["model.layers.2.mlp.down_proj"]
    run.config["variants"]["warm-40"]["warm_start"] = "warm-40"
    output = run.snakemake(*targets, succeeds=False)
    assert "variants.warm-40.warm_start: warm-40: it starts from warm-40" in output


def test_jobs_that_wait_keep_no_core_busy(finished, tmp_path):
    """Snakemake looks for jobs that may start when one has ended, and not more and more often in between."""
    run = finished.copy(tmp_path / "run")
    output = run.snakemake("--cores", "1", "--verbose", "--forcerun", "learn_dictionary", "--until", "learn_dictionary")
    ended, looks = output.count("Finished jobid"), output.count("Ready jobs: ")
    assert ended > 3 and looks <= ended + 2
