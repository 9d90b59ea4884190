"""A config written for a model: what it says follows from config.json and the machine, and the workflow takes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cospadi.errors import CospadiError, UnsupportedModelError
from cospadi.new import config_for, main
from cospadi.runs import plan_run

from ..conftest import FAMILIES

MODELS = Path(__file__).parents[2] / "config/models"
GIGA = 10**9


@pytest.fixture
def hub(monkeypatch):
    """A hub of one repository, `someone/big`: Llama-3-8B's config.json."""
    import huggingface_hub

    def hf_hub_download(repo, filename, *, revision):
        assert (repo, filename, revision) == ("someone/big", "config.json", "main")
        return str(MODELS / "Meta-Llama-3-8B.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_model_of_every_family_has_a_config_that_plans(tiny_model, tiny_text, family):
    folder, text = tiny_model(family), tiny_text / "calibration.jsonl"
    content = config_for(str(folder), text=str(text), cores=2)
    plan = plan_run(yaml.safe_load(content))
    assert plan.model_folder == str(folder) and plan.config["text"]["path"] == str(text)
    assert plan.config["calibration"]["length"] == 512  # all positions that the model has
    assert plan.config["calibration"]["samples"] * 512 == 32 * 1024
    assert plan.config["evaluation"]["generate"]["chat"] is False  # the tokenizer has no template
    shared = {str(part) for variant in plan.config["variants"].values() for part in variant.get("share_within", [])}
    assert shared == {"['q_proj', 'k_proj', 'v_proj']", "['gate_proj', 'up_proj']"}
    assert json.loads((folder / "config.json").read_text())["architectures"][0] in content.splitlines()[0]


@pytest.mark.parametrize("disk", [20 * GIGA, 80 * GIGA, 2000 * GIGA])
@pytest.mark.parametrize("memory", [64 * GIGA, 256 * GIGA])
def test_a_model_of_the_hub_gets_as_many_layers_a_job_as_memory_and_disk_take(
    hub, tiny_text, tmp_path, monkeypatch, memory, disk
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    text = str(tiny_text / "calibration.jsonl")
    content = config_for("someone/big", text=text, cores=8, memory=memory, resources=tmp_path)
    config = yaml.safe_load(content)
    calibration = config["calibration"]
    assert calibration["length"] == 1024 and calibration["samples"] == 14336 * 16 // 1024
    plan = plan_run(config, model_config=json.loads((MODELS / "Meta-Llama-3-8B.json").read_text()))
    blocks = calibration["blocks_per_job"]
    assert plan.estimates.collect(blocks).memory <= memory / 2
    more = plan.estimates.collect(blocks + 1)
    rows = min(disk, memory) / 2
    if calibration["mode"] == "store":
        assert plan.estimates.collect(blocks).disk <= rows
        assert more.memory > memory / 2 or more.disk > rows
    else:
        assert more.memory > memory / 2 or blocks == plan.n_layers
        plan.config["calibration"]["mode"] = "store"
        assert plan.estimates.collect(1).disk > rows  # not even one layer's rows fit
    at_once = 8 / config["threads"]["learn"]
    assert at_once * max(plan.estimates.learn(plan.factorizing(name)).memory for name in plan.variants) <= memory


def test_a_model_that_is_too_large_for_the_machine_is_told_so(hub, tiny_text, tmp_path):
    text = str(tiny_text / "calibration.jsonl")
    content = config_for("someone/big", text=text, cores=8, memory=16 * GIGA, resources=tmp_path)
    config = yaml.safe_load(content)
    assert config["calibration"]["blocks_per_job"] == 1
    warned = {
        line.split(":")[0].strip() for line in content.splitlines() if line.endswith("more than this machine has")
    }
    assert warned == {"blocks_per_job"}
    # evaluation reads from the disk what memory does not hold
    assert config["evaluation"]["device_map"] == "auto" and config["evaluation"]["max_memory"] == {"cpu": "8GB"}
    plan = plan_run(config, model_config=json.loads((MODELS / "Meta-Llama-3-8B.json").read_text()))
    assert plan.estimates.evaluate().memory <= 16 * GIGA < plan.estimates.evaluate(whole=True).memory


def test_without_a_text_the_model_calibrates_itself(tiny_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no config.yaml here
    plan = plan_run(yaml.safe_load(config_for(str(tiny_model("llama")))))
    assert plan.config["text"] is None and plan.config["calibration"]["source"] == "self"
    assert plan.config["evaluation"]["perplexity"] is None


def test_the_command_writes_a_file_once(tiny_model, tiny_text, tmp_path, capsys):
    arguments = [
        str(tiny_model("qwen3")),
        "--text",
        str(tiny_text / "heldout.jsonl"),
        "--output",
        str(tmp_path / "a.yaml"),
    ]
    main(arguments)
    assert f"make run CONFIG={tmp_path}/a.yaml" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["model"]["source"] == "local"
    with pytest.raises(SystemExit, match="is there already"):
        main(arguments)


@pytest.mark.parametrize("name", ["500", "1e3", "null", "2024-01-01"])
def test_a_folder_may_be_called_like_a_number(tiny_model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model("llama"), name)
    main([name, "--output", "a.yaml"])
    config = yaml.safe_load(Path("a.yaml").read_text())
    assert config["run"] == config["model"]["name"] == name


def test_letters_and_spaces_of_any_kind_may_be_in_paths(tiny_model, tiny_text, tmp_path, capsys):
    folder, text = tmp_path / "мой проект" / "model é ", tmp_path / "мой проект" / "my text.jsonl"
    shutil.copytree(tiny_model("llama"), folder)
    shutil.copy(tiny_text / "calibration.jsonl", text)
    file = tmp_path / "a b.yaml"
    main([str(folder), "--text", str(text), "--output", str(file)])
    assert f"make run CONFIG='{file}'" in capsys.readouterr().out and f"CONFIG='{file}'" in file.read_text()
    assert f"path: {tmp_path}/мой проект/my text.jsonl" in file.read_text()
    config = yaml.safe_load(file.read_text())
    assert config["model"] == {"name": "model", "source": "local", "path": str(folder)}
    assert plan_run(config).model_folder == str(folder)


def test_a_folder_that_is_not_there_and_not_on_the_hub_is_said_to_be_neither(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CospadiError, match=r"models/nowhere: there is no such folder, and .*the hub cannot be reached"):
        config_for("models/nowhere", resources=tmp_path)


def test_what_cannot_be_planned_is_refused_and_nothing_is_written(tmp_path):
    for nowhere in ("nowhere", "./nowhere", "../a/nowhere", "/nowhere/b"):
        with pytest.raises(SystemExit, match="neither a folder nor a name on the hub"):
            main([nowhere, "--output", str(tmp_path / "a.yaml")])
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}))
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM"):
        config_for(str(tmp_path))
    (tmp_path / "config.json").write_bytes((MODELS / "Llama-3.2-1B.json").read_bytes())
    with pytest.raises(CospadiError, match=r"'nothing\.txt' is no file"):
        config_for(str(tmp_path), text="nothing.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
