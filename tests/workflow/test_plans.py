"""Dry runs: configs for models that are not here, SLURM, faults of a config, style."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from . import conftest
from .conftest import PROJECT

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    **LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
QWEN_8B = {
    **LLAMA_8B,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory where the project's configs find the files they name."""
    (tmp_path / "config").symlink_to(PROJECT / "config")
    (tmp_path / "config.yaml").symlink_to(PROJECT / "config.yaml")
    return tmp_path


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = ["--snakefile", str(PROJECT / "Snakefile"), "--directory", str(folder), "--dry-run", *arguments]
    status, output = conftest.snakemake(PROJECT, *given)
    return subprocess.CompletedProcess(given, status, output, "")


def jobs(output: str) -> dict[str, int]:
    rows = (line.split() for line in output.split("Job stats:")[-1].splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


@pytest.mark.parametrize(
    ("name", "model_config", "repo", "chunks"),
    [
        ("llama-3.2-1b", LLAMA_1B, "meta-llama/Llama-3.2-1B", 8),
        ("llama-3-8b", LLAMA_8B, "meta-llama/Meta-Llama-3-8B", 8),
        ("qwen3-8b", QWEN_8B, "Qwen/Qwen3-8B-Base", 9),
    ],
)
def test_hub_models_are_planned_from_their_config(folder, name, model_config, repo, chunks):
    stored = folder / "resources" / "configs" / f"{repo.replace('/', '--')}@main.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps(model_config))
    result = snakemake(folder, "--configfile", str(PROJECT / "config" / f"{name}.yaml"))
    assert result.returncode == 0, result.stdout + result.stderr
    planned = jobs(result.stdout + result.stderr)
    layers = model_config["num_hidden_layers"]
    assert planned["collect_activations"] == chunks
    assert planned["compute_gram"] == layers
    assert planned["learn_dictionary"] == 6 * layers  # the demo's variants are replaced, not added to
    assert planned["evaluate_model"] == 6


def test_paper_config(folder):
    result = snakemake(folder, "--configfile", str(PROJECT / "config" / "paper.yaml"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert jobs(result.stdout + result.stderr)["learn_dictionary"] == 5 * 30


def test_demo_on_slurm(folder):
    result = snakemake(folder, "--executor", "slurm", "--workflow-profile", str(PROJECT / "profiles" / "slurm"))
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "warning" not in output.lower()
    layers_per_job = yaml.safe_load((PROJECT / "config.yaml").read_text())["layers_per_job"]
    assert jobs(output)["learn_dictionary"] == 7 * 30 / layers_per_job


def test_deployed_as_a_module_a_config_file_replaces_the_variants_of_the_template(tmp_path):
    """The folder that `snakedeploy deploy-workflow` makes: a Snakefile with a module, a copy of `config/`."""
    shutil.copytree(PROJECT / "config", tmp_path / "config")
    (tmp_path / "Snakefile").write_text(
        f"""
configfile: "config/config.yaml"

module cospadi:
    snakefile: "{PROJECT}/Snakefile"
    config: config

use rule * from cospadi
"""
    )
    command = [sys.executable, "-m", "snakemake", "--directory", str(tmp_path), "--snakefile", tmp_path / "Snakefile"]
    command += ["--dry-run", "--configfile", str(tmp_path / "config/paper.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert jobs(result.stdout + result.stderr)["learn_dictionary"] == 5 * 30


def test_all_faults_of_a_config_in_one_message(folder):
    config = yaml.safe_load((PROJECT / "config.yaml").read_text())
    config["calibration"]["lenght"] = 3
    config["variants"]["cospadi-20"]["ratio"] = 2
    config["variants"]["svd_llm"]["method"] = "svdllm"
    (folder / "faulty.yaml").write_text(yaml.safe_dump(config))
    result = snakemake(folder, "--configfile", str(folder / "faulty.yaml"))
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "faulty.yaml" in output and "3 faults" in output
    assert "calibration.lenght: unknown key (did you mean length?)" in output
    assert "variants.cospadi-20.ratio: 2 is not allowed; from 0.01 to 0.95" in output
    assert "variants.svd_llm.method: svdllm is not known (did you mean svd_llm?)" in output
    assert "Traceback" not in output
    assert not (folder / "results").exists()


def test_an_unsupported_model_is_refused_with_those_that_are_not(folder):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(
        json.dumps({**LLAMA_1B, "architectures": ["BloomForCausalLM"], "model_type": "bloom"})
    )
    (folder / "bloom.yaml").write_text(yaml.safe_dump({"model": {"name": "bloom", "source": "local", "path": "model"}}))
    result = snakemake(folder, "--configfile", str(folder / "bloom.yaml"))
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "BloomForCausalLM" in output and "LlamaForCausalLM" in output and "Gemma3ForCausalLM" in output


def test_parsing_imports_nothing_heavy(folder):
    program = (
        "import sys\nfrom snakemake.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('HEAVY', [m for m in ('torch', 'transformers', 'lm_eval', 'numba', 'datasets') if m in sys.modules])"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "--snakefile",
        str(PROJECT / "Snakefile"),
        "--directory",
        str(folder),
        "-n",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "HEAVY []" in result.stdout, result.stdout[-500:] + result.stderr[-2000:]


def test_scripts_are_thin():
    scripts = sorted((PROJECT / "scripts").glob("*.py"))
    assert len(scripts) >= 12
    assert {path.name: n for path in scripts if (n := len(path.read_text().splitlines())) >= 40} == {}


def test_every_rule_says_what_it_does_and_needs():
    for path in sorted((PROJECT / "workflow" / "rules").glob("*.smk")):
        for rule in path.read_text().split("\nrule ")[1:]:
            name = rule.partition(":")[0]
            for part in ("log:", "message:", "conda:", "script:"):
                assert f"    {part}" in rule, f"{path.name}: rule {name} has no {part}"
            if "localrule: True" not in rule:
                for part in ("benchmark:", "    **plan.resources("):
                    assert part in rule, f"{path.name}: rule {name} has no {part}"


def test_lock_files_agree():
    def pins(name):
        lines = (PROJECT / "envs" / name).read_text().replace("\\\n", " ").splitlines()
        found = [line.split() for line in lines if line and line[0] != "#"]
        assert all(len(words) > 1 and words[-1].startswith("--hash=sha256:") for words in found)
        return {words[0] for words in found}

    lock, torch, cpu = pins("lock.txt"), pins("torch.txt"), pins("torch-cpu.txt")
    conda = yaml.safe_load((PROJECT / "envs/cospadi.yaml").read_text())["dependencies"][-1]["pip"]
    assert lock | {"torch==2.13.0"} == set(conda)
    assert all("==" in pin and "+" not in pin for pin in lock | torch)
    assert "snakemake-executor-plugin-slurm==2.8.0" in lock
    assert "torch==2.13.0" in torch and cpu == {"torch==2.13.0+cpu"}
    installed = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout  # the pins are all that each of them needs
    # what torch and the rest both need is the same
    assert not {pin.partition("==")[0] for pin in torch - lock} & {pin.partition("==")[0] for pin in lock}


def edges(output: str) -> set[tuple[str, str]]:
    """Pairs of rules in Snakemake's graph: one that reads what the other made."""
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', output))
    return {(names[before], names[after]) for before, after in re.findall(r"(\d+) -> (\d+)", output)}


def rulegraph(folder: Path, config: dict, *targets: str) -> set[tuple[str, str]]:
    (folder / "graph.yaml").write_text(yaml.safe_dump(config))
    result = snakemake(folder, "--rulegraph", "--configfile", str(folder / "graph.yaml"), "--", *targets)
    assert result.returncode == 0, result.stderr
    return {edge for edge in edges(result.stdout) if "all" not in edge}


def test_the_tables_of_stages_have_the_arrows_that_snakemake_finds(folder):
    from cospadi.plan.stages import STAGES
    from cospadi.training.plan import STAGES as TRAINING

    def arrows(stages) -> set[tuple[str, str]]:
        return {(stages[before].rule, stage.rule) for stage in stages.values() for before in stage.after}

    coded = {"embedding_bits": 3, "embedding_method": "ectcq"}
    variants = {
        "cut": {"method": "replaceme", "blocks": 2},
        "both": {"steps": [{"method": "uidl", "blocks": 3}, {"method": "cospadi", "ratio": 0.2, **coded}]},
        "plain": {"method": "cospadi", "ratio": 0.2, **coded},
        "parted": {"method": "svd_llm_v2", "ratio": 0.2, "distill": {}},
        "cut_parted": {"steps": [{"method": "replaceme", "blocks": 2}, {"method": "svd_llm_v2", "ratio": 0.2}]},
        "masa": {"steps": [{"method": "replaceme", "blocks": 2}, {"method": "masa", "ratio": 0.2}]},
        "weighed": {"method": "svd_llm_v2", "ratio": 0.2, "metric": "gradients"},
        "behind": {"method": "rtn", "ratio": 0.6, "compensate": {"samples": 200}},
        "rounded": {"method": "rtn", "ratio": 0.6, "metric": "gradients", "target": "sequential", "drift_share": 0},
        "mixed": {"method": "choose", "ratio": 0.4, "choose_from": ["weighed", "rounded"]},
        "cut_weighed": {
            "steps": [{"method": "replaceme", "blocks": 2}, {"method": "svd_llm", "ratio": 0.2, "metric": "gradients"}]
        },
    }
    turn = {"method": "svd_llm_v2", "ratio": 0.2, "metric": "gradients", "target": "sequential"}
    turn["distill"] = {"samples": 200}
    variants |= {"turn": turn, "cut_turn": {"steps": [{"method": "replaceme", "blocks": 2}, turn]}}
    asked = [f"results/graph/plain/{name}" for name in ("dense", "gguf/Q8_0.gguf", "compressed-tensors")]
    found = rulegraph(folder, {"run": "graph", "variants": variants}, "all", *asked)
    found |= rulegraph(folder, {"run": "graph", "variants": {"masa": {"method": "masa", "ratio": 0.2}}}, "all")
    assert found == arrows(STAGES)
    config = yaml.safe_load((PROJECT / "config/masa-train.yaml").read_text())
    dense = "results/masa-train/training/language/masa-qkv/seed_0/dense"
    assert rulegraph(folder, config, "all", dense) == arrows(TRAINING)
