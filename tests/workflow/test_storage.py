"""A model and a text from an object store, by the Snakefile that docs/cluster.md shows, as it stands there."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from .conftest import PROJECT, Run, snakemake, tiny_config

# no pin of the project's: it calls a program that pip does not bring, and only a folder plays the store
NEEDED = importlib.util.find_spec("snakemake_storage_plugin_fs") and shutil.which("rsync")


@pytest.mark.skipif(not NEEDED, reason="needs rsync, and pip install snakemake-storage-plugin-fs")
def test_a_run_takes_what_another_snakefile_brings(tiny_model, articles, tmp_path):
    store, folder = tmp_path / "store", tmp_path / "run"
    shutil.copytree(tiny_model("llama"), store / "model")
    shutil.copy(articles, store / "articles.jsonl")
    folder.mkdir()
    page = (PROJECT / "docs/cluster.md").read_text()
    (bring,) = re.findall(r"```python\n(# bring\.smk\n.*?)```", page, flags=re.DOTALL)
    (folder / "bring.smk").write_text(bring.replace('"/store/', f'"{store}/'))
    run = Run(folder, tiny_config(Path("brought/model"), Path("brought/articles.jsonl")), PROJECT)
    missing = run.snakemake("--dry-run", succeeds=False)
    assert "brought/model/config.json: the file does not exist" in missing
    arguments = ["--snakefile", str(folder / "bring.smk"), "--directory", str(folder), "--cores", "1"]
    status, output = snakemake(PROJECT, *arguments)
    assert status == 0, output
    for file in ("articles.jsonl", "model/model.safetensors"):
        assert (folder / "brought" / file).read_bytes() == (store / file).read_bytes()
    run.snakemake("results/tiny/calibration.h5")
    assert "Nothing to be done" in snakemake(PROJECT, *arguments)[1]
