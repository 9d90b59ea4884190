"""Two runs in two folders share models, text and Grams through Snakemake's cache."""

from __future__ import annotations

import json
from pathlib import Path

import h5py

from .conftest import PROJECT, Run, tiny_config

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
CACHED = ("fetch_model", "fetch_text", "collect_activations", "compute_gram")


def test_a_second_folder_takes_what_the_first_made(tmp_path, articles, monkeypatch):
    cache, shapes = tmp_path / "cache", tmp_path / "shapes.json"
    cache.mkdir()
    monkeypatch.setenv("SNAKEMAKE_OUTPUT_CACHE", str(cache))
    config = json.loads((PROJECT / "config/models/Llama-3-8B-shapes.json").read_text())
    shapes.write_text(json.dumps({**config, **SIZES, "vocab_size": 300}))
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        settings = tiny_config(Path("shapes"), articles) | {"run": name}
        settings["model"] = {"name": "shapes", "source": "random", "config": str(shapes)}
        settings["calibration"] |= {"blocks_per_job": 1}
        settings["variants"] = {"svd_llm-40": {"method": "svd_llm", "ratio": 0.4}}
        runs.append(Run(tmp_path / name, settings, PROJECT))
    made = "gram/layer_00.h5", "gram/layer_01.h5"
    # the second run goes on to a model, whose tokenizer and settings it takes from the cached one
    for run, more in zip(runs, ([], ["svd_llm-40/model"]), strict=True):
        run.snakemake("--cache", "--", *(f"results/{run.config['run']}/{file}" for file in (*made, *more)))
    # of a job whose results were taken, the log is empty
    first, second = ({log.name for log in run.results.rglob("*.log") if log.stat().st_size} for run in runs)
    assert {"fetch_model.log", "articles.log", "layers_00-00.log", "layers_01-01.log"} <= first
    assert {"inspect_model.log", "svd_llm-40.log"} <= second
    assert not {"fetch_model.log", "articles.log", "layers_00-00.log", "layers_01-01.log"} & second
    for file in made:
        paths = [run.results / file for run in runs]
        assert all(path.resolve().parent == cache for path in paths) and paths[0].resolve() == paths[1].resolve()
    grams = [h5py.File(runs[1].results / file) for file in made]
    assert [gram.attrs["layer"] for gram in grams] == [0, 1]  # each layer its own
    assert (runs[1].results / "svd_llm-40/model/tokenizer.json").read_bytes()
    # other windows are others' activations, of the same model and text
    runs[1].config["calibration"]["seed"] = 7
    runs[1].snakemake("--cache", "--", f"results/second/{made[0]}")
    assert (runs[1].results / made[0]).resolve() != (runs[0].results / made[0]).resolve()
    assert (runs[1].results / "logs/compute_gram/layer_00.log").stat().st_size
    # without the cache nothing is kept there, and every job is measured
    assert (runs[1].results / "benchmarks/inspect_model.tsv").exists()
    assert not [path for rule in CACHED for path in (runs[1].results / "benchmarks").rglob(f"{rule}*")]
