"""Training small models from scratch, as a run of the workflow: from the text to the report."""

from __future__ import annotations

import copy
import csv
import json
import shutil
import zipfile

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cospadi import training
from cospadi.files import TensorFile

from .conftest import Run

SIZES = {"hidden_size": 24, "intermediate_size": 32, "layers": 3, "heads": 2}
TRAINING = {
    "seeds": [0, 1],
    "language": {
        "vocabulary": 300,
        "length": 32,
        "model": {**SIZES, "initializer_range": 0.1},
        "steps": 30,
        "batch_size": 4,
        "learning_rate": 0.01,
        "evaluations": 3,
        "variants": {"dense": {"attention": "dense"}, "masa": {"attention": "masa", "atoms": 1}},
    },
    "vision": {
        "patch": 4,
        "model": SIZES,
        "steps": 6,
        "batch_size": 16,
        "evaluations": 2,
        "variants": {"repeat": {"attention": "cyclic", "atoms": 2, "projections": ["q_proj", "v_proj"]}},
    },
}
MODELS = {("language", "dense"), ("language", "masa"), ("vision", "repeat")}
SQUARE = 24 * 24


@pytest.fixture(scope="module")
def trained(new_run) -> Run:
    run = new_run("llama")
    run.config |= {"run": "scratch", "training": copy.deepcopy(TRAINING)}
    output = run.snakemake("train")
    (run.folder / "console.txt").write_text(output)
    return run


def history(run: Run, experiment: str, variant: str, seed: int) -> dict:
    path = run.results / "training" / experiment / variant / f"seed_{seed}" / "history.json"
    return json.loads(path.read_text())


def test_a_training_run_makes_nothing_else(trained):
    assert trained.snakemake("--dry-run").count("Nothing to be done") == 1  # all is train
    assert not (trained.results / "summary.tsv").exists()
    made = {path.parent.relative_to(trained.results / "training").parts for path in trained.results.rglob("model")}
    assert made == {(*model, f"seed_{seed}") for model in MODELS for seed in (0, 1)}


def test_models_learn_and_are_counted(trained):
    for experiment, variant in MODELS:
        runs = [history(trained, experiment, variant, seed) for seed in (0, 1)]
        assert runs[0]["training"] != runs[1]["training"]
        for seed, run in enumerate(runs):
            assert run["seed"] == seed
            steps = [step for step, _ in run["heldout"]]
            assert steps == ([10, 20, 30] if experiment == "language" else [3, 6])
    for variant in ("dense", "masa"):
        run = history(trained, "language", variant, 0)
        assert run["training"][-1][1] < run["training"][0][1] - 0.5
        assert run["perplexity"] < 200  # of 300 tokens; a model that knows nothing has 300
    counts = {model: history(trained, *model, 0)["attention_parameters"] for model in MODELS}
    assert counts["language", "dense"] == 3 * 4 * SQUARE
    assert counts["language", "masa"] == 4 * (SQUARE + 3)
    assert counts["vision", "repeat"] == (2 * 2 + 3 * 2) * SQUARE


def test_every_variant_sees_the_same_batches(trained):
    # before the first step nothing but the attention differs, and a new model knows nothing whichever it has
    first = {variant: history(trained, "language", variant, 0)["training"][0] for variant in ("dense", "masa")}
    assert first["dense"][0] == first["masa"][0] == 1
    assert first["dense"][1] == pytest.approx(first["masa"][1], abs=0.3)


def test_table_and_report(trained):
    with open(trained.results / "training.tsv", newline="") as file:
        table = {(row["experiment"], row["variant"]): row for row in csv.DictReader(file, delimiter="\t")}
    assert set(table) == MODELS
    row = table["language", "masa"]
    scores = [history(trained, "language", "masa", seed)["perplexity"] for seed in (0, 1)]
    assert float(row["mean"]) == pytest.approx(sum(scores) / 2, rel=1e-5)
    assert float(row["std"]) == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5, rel=1e-4)
    assert float(row["attention_removed"]) == pytest.approx(1 - (SQUARE + 3) / (3 * SQUARE), rel=1e-5)
    assert table["vision", "repeat"]["metric"] == "accuracy"
    with zipfile.ZipFile(trained.results / "report.zip") as archive:
        assert any(name.endswith("training.svg") for name in archive.namelist())
    console = (trained.folder / "console.txt").read_text()
    assert "66.5 %" in console.split("attention params")[-1]


def test_models_load_with_their_tokenizer(trained):
    folder = trained.results / "training" / "language" / "masa" / "seed_1" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "SharedLlamaForCausalLM"
    assert model.num_parameters() == history(trained, "language", "masa", 1)["kept_parameters"]
    # nothing that only training needs
    assert not [name for name in TensorFile(folder / "model.safetensors").names() if "embeddings" in name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("The old river crosses").input_ids) == "The old river crosses"


def test_ordinary_model_is_a_target(trained, tmp_path):
    run = trained.copy(tmp_path / "run")
    target = "results/scratch/training/language/masa/seed_0/dense"
    assert run.planned(target) == {"materialise": 1, "total": 1}
    run.snakemake(target)
    assert AutoConfig.from_pretrained(run.folder / target).model_type == "llama"
    assert training.attention_parameters(AutoModelForCausalLM.from_pretrained(run.folder / target)) == 3 * 4 * SQUARE
    assert (run.folder / target / "tokenizer.json").exists()


def test_what_runs_again(trained, tmp_path):
    run = trained.copy(tmp_path / "run")
    run.config["training"]["language"]["variants"]["masa"]["coefficients"] = "free"
    assert run.planned() == {"train_model": 2, "summarize_training": 1, "report": 1, "all": 1, "total": 5}
    run = trained.copy(tmp_path / "more")
    run.config["training"]["seeds"].append(2)
    assert run.planned()["train_model"] == 3  # one more of each
    run.config["training"]["seeds"].pop()
    shutil.rmtree(run.results / "training" / "vision" / "repeat" / "seed_0" / "model")
    assert run.planned()["train_model"] == 1


def test_equal_seeds_give_equal_models(trained, tmp_path):
    run = trained.copy(tmp_path / "run")
    folder = run.results / "training" / "language" / "masa" / "seed_0"
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "history.json").unlink()
    run.snakemake(str(folder.relative_to(run.folder) / "history.json"))
    assert (folder / "model" / "model.safetensors").read_bytes() == weights


def test_too_little_text_says_what_to_do(trained, tmp_path):
    run = trained.copy(tmp_path / "run")
    run.config["training"]["language"]["vocabulary"] = 50000
    output = run.snakemake(succeeds=False)
    assert "but training.language.vocabulary is 50000" in output
    assert "lower the vocabulary" in output


def test_all_faults_in_one_message(trained, tmp_path):
    run = trained.copy(tmp_path / "run")
    language = run.config["training"]["language"]
    language["stpes"] = language.pop("steps")
    language["variants"] |= {"x": {"attention": "msa"}, "y": {"attention": "gqa"}}
    output = run.snakemake(succeeds=False)
    assert "5 faults" in output
    assert "training.language.steps: missing" in output
    assert "training.language.stpes: unknown key (did you mean steps?)" in output
    assert "training.language.variants.x.attention: msa is not known (did you mean masa?)" in output
    assert "training.language.variants.x.atoms: missing" in output  # as masa, which is meant, needs it
    assert "training.language.variants.y.kv_heads: missing" in output

    run = trained.copy(tmp_path / "sizes")
    run.config["text"] = None
    run.config["calibration"]["source"], run.config["evaluation"]["perplexity"] = "self", None
    training = run.config["training"]
    training["language"]["model"]["hidden_size"] = 26
    training["language"]["variants"] = {
        "a": {"attention": "masa", "atoms": 4},
        "b": {"attention": "low_rank", "rank": 27},
        "c": {"attention": "gqa", "kv_heads": 3},
    }
    training["vision"]["variants"] = {"d": {"attention": "gqa", "kv_heads": 1}}
    output = run.snakemake(succeeds=False)
    assert "6 faults" in output
    assert "training.language: needs the section text" in output
    assert "training.language.model.hidden_size: 26; it has to be a multiple of 4 for 2 heads" in output
    assert "training.language.variants.a.atoms: 4; the model has 3 layers" in output
    assert "training.language.variants.b.rank: 27; the matrices are 26 x 26" in output
    assert "training.language.variants.c.kv_heads: 3; 2 heads have to be a multiple of it" in output
    assert "training.vision.variants.d.attention: gqa; a ViT has no key and value heads of their own" in output


def test_without_the_section_there_is_no_such_target(new_run):
    output = new_run("llama").snakemake("train", "--dry-run", succeeds=False)
    assert "this run trains nothing" in output
