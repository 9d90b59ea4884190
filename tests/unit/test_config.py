"""Config: faults, defaults, overrides, documentation."""

from __future__ import annotations

import copy
from pathlib import Path

import jsonschema
import pytest
import yaml

from cospadi.config import check_config, documentation, schema
from cospadi.errors import ConfigError
from cospadi.methods import METHODS
from cospadi.training import config as training_config

PROJECT = Path(__file__).parents[2]
SCHEMAS = [schema, training_config.schema]


@pytest.fixture
def minimal():
    return {
        "run": "r",
        "model": {"name": "m", "source": "hub", "repo": "owner/m"},
        "calibration": {"source": "self"},
        "variants": {"a": {"method": "cospadi", "ratio": 0.2}},
        "evaluation": {"perplexity": None},
    }


def faults(config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    return caught.value.faults


def test_defaults_are_filled_in_at_every_level(minimal):
    given = copy.deepcopy(minimal)
    config = check_config(minimal)
    assert minimal == given  # the argument is left alone
    assert config["calibration"]["samples"] == 256
    assert config["calibration"]["source"] == "self"
    assert config["text"] is None
    assert config["model"]["revision"] == "main"
    variant = config["variants"]["a"]
    assert variant["codes"] == {"value_bits": 16, "group_size": 64, "dictionary_bits": 16, "rounding": "nearest"}
    assert {name: variant[name] for name in METHODS["cospadi"].defaults()} == METHODS["cospadi"].defaults()
    assert check_config(config) == config


def test_two_checks_share_no_state(minimal):
    minimal["variants"]["b"] = {"method": "cospadi", "ratio": 0.4}
    config = check_config(minimal)
    config["variants"]["a"]["codes"]["value_bits"] = 14
    config["calibration"]["samples"] = 1
    assert config["variants"]["b"]["codes"]["value_bits"] == 16
    assert check_config(minimal)["calibration"]["samples"] == 256


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("calibration.lenght", 3, "calibration.lenght: unknown key (did you mean length?); known: source, samples,"),
        ("foo", 1, "foo: unknown key; known: run, model,"),
        (
            "calibration.samples",
            "1e-4",
            "calibration.samples: 1e-4 is not allowed; expected a whole number (YAML reads",
        ),
        ("calibration.samples", True, "calibration.samples: true is not allowed; expected a whole number"),
        ("calibration.samples", 64.0, "calibration.samples: 64.0 is not allowed; expected a whole number"),
        ("calibration.heldout_fraction", float("nan"), "calibration.heldout_fraction: .nan is not allowed"),
        ("calibration.mode", "streem", "calibration.mode: streem is not allowed (did you mean stream?); one of store,"),
        ("device", None, "device: null is not allowed"),
        ("run", "../x", "run: ../x is not allowed; it has to match"),
        ("run", None, "run: null is not allowed; expected text"),
        ("model", None, "model: null is not allowed; expected a mapping"),
        ("model.source", "hubb", "model.source: hubb is not known (did you mean hub?); one of hub, local, wheel_gguf"),
        ("model.repo", "gpt2", "model.repo: gpt2 is not allowed; it has to match"),
        ("model.package", "x==1", "model.package: unknown key; known: name, source, repo, revision"),
        ("text", {"name": "t", "source": "jsonl"}, "text.path: missing"),
        ("text", {"name": "t"}, "text.source: missing; one of file, hub, jsonl, wheel_wikipedia"),
        ("text", {"name": "t", "source": "file", "path": "nowhere.txt"}, "text.path: 'nowhere.txt' does not exist"),
        ("variants", {}, "variants: {} is empty; at least 1 expected"),
        ("variants.dense", {"method": "cospadi", "ratio": 0.2}, "variants: dense is a reserved name"),
        ("variants.a", None, "variants.a: null is not allowed; expected a mapping of keys to values"),
        ("variants.a.method", "cospody", "variants.a.method: cospody is not known (did you mean cospadi?)"),
        ("variants.a.ratio", 1.2, "variants.a.ratio: 1.2 is not allowed; from 0.01 to 0.95"),
        ("variants.a.rank", 3, "variants.a.rank: unknown key"),
        ("variants.a.codes.value_bits", 15, "variants.a.codes.value_bits: 15 is not allowed; one of 16, 14, 8, 4"),
        ("variants.a.targets", ["q_prj"], "variants.a.targets.0: q_prj is not allowed (did you mean q_proj?); one of"),
        ("variants.a.share", ["gate"], "variants.a.share.0: gate is not allowed (did you mean gate_proj?); one of"),
        ("variants.a.share_within", [["q_proj", "kproj"]], "variants.a.share_within.0.1: kproj is not allowed"),
        ("variants.a.share_within", [["q_proj"]], "variants.a.share_within.0: [q_proj] has 1; at least 2"),
        (
            "variants.a.share_within",
            [["q_proj", "k_proj"], ["v_proj", "q_proj"]],
            "variants.a.share_within: q_proj is in 2 lists",
        ),
        ("evaluation.tasks", ["piqa", "piqa"], "evaluation.tasks: [piqa, piqa] names something twice"),
        ("evaluation.perplexity", {}, "evaluation.perplexity: needs the section text"),
        ("calibration.source", "text", "calibration.source: 'text' needs the section text"),
    ],
)
def test_a_fault_names_path_value_and_what_is_allowed(minimal, path, value, expected):
    *parents, key = path.split(".")
    section = minimal
    for parent in parents:
        section = section.setdefault(parent, {})
    section[key] = value
    found = faults(minimal)
    assert len(found) == 1, found
    assert found[0].startswith(expected), found[0]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ({"method": "replaceme"}, "variants.a.blocks: missing"),
        ({"method": "replaceme", "blocks": 0}, "variants.a.blocks: 0 is not allowed; at least 1"),
        ({"method": "replaceme", "blocks": []}, "variants.a.blocks: [] is empty"),
        ({"method": "shortgpt", "blocks": [3]}, "variants.a.blocks: [3] is not allowed; expected a whole number"),
        ({"method": "replaceme", "blocks": 4, "ratio": 0.2}, "variants.a.ratio: unknown key"),
        ({"method": "replaceme", "blocks": 4, "epochs": 3}, "variants.a.epochs: 3 means nothing here; it is an option"),
        ({"method": "replaceme", "blocks": [2, 3], "cuts": 2}, "variants.a.cuts: 2 means nothing here; blocks lists"),
        ({"method": "replaceme", "blocks": [0, 1]}, "variants.a.blocks: block 0 has none before it"),
        ({"method": "replaceme", "blocks": 2, "cuts": 3}, "variants.a.cuts: 3 cuts need as many blocks; 2 go"),
        ({"method": "uidl", "blocks": [2], "metric": "l2"}, "variants.a.metric: l2 means nothing here; blocks lists"),
        ({"steps": []}, "variants.a.steps: [] is empty; at least 2 expected"),
        ({"steps": [{"method": "uidl", "blocks": 2}]}, "variants.a.steps: [{blocks: 2, method: uidl}] has 1"),
        ({"steps": 4}, "variants.a.steps: 4 is not allowed; expected a list"),
        ({"steps": [3, {"method": "cospadi", "ratio": 0.2}]}, "variants.a.steps.0: 3 is not allowed; expected a map"),
        (
            {"steps": [{"method": "uidl", "blocks": 2, "x": 1}, {"method": "cospadi", "ratio": 0.2}]},
            "variants.a.steps.0.x: unknown key; known: method, blocks, metric",
        ),
        (
            {"steps": [{"method": "uidl", "blocks": 2}, {"method": "cospado", "ratio": 0.2}]},
            "variants.a.steps.1.method: cospado is not known (did you mean cospadi?)",
        ),
        (
            {"steps": [{"method": "cospadi", "ratio": 0.2}, {"method": "uidl", "blocks": 2}]},
            "variants.a.steps: cospadi, then uidl; expected one of replaceme, uidl, shortgpt, random_cut, then one of",
        ),
        ({"steps": [], "ratio": 0.2, "method": "cospadi"}, "variants.a.method: unknown key; known: steps"),
    ],
)
def test_faults_of_variants_that_remove_blocks(minimal, variant, expected):
    minimal["variants"]["a"] = variant
    assert faults(minimal)[0].startswith(expected), faults(minimal)


def test_steps_get_their_defaults(minimal):
    minimal["variants"]["a"] = {"steps": [{"method": "replaceme", "blocks": 4}, {"method": "cospadi", "ratio": 0.3}]}
    first, second = check_config(minimal)["variants"]["a"]["steps"]
    assert first["objective"] == "least_squares" and first["cuts"] == 1
    assert second["codes"]["value_bits"] == 16 and second["rho"] == 2.0
    assert check_config(check_config(minimal)) == check_config(minimal)


def test_all_faults_come_in_one_message(minimal):
    minimal["calibration"]["samples"] = 0
    minimal["variants"]["a"]["ratio"] = 3
    del minimal["run"]
    with pytest.raises(ConfigError) as caught:
        check_config(minimal, source="mine.yaml")
    assert str(caught.value).startswith("mine.yaml: 3 faults\n")
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "calibration.samples",
        "run",
        "variants.a.ratio",
    ]


def test_overrides_replace_model_text_and_variants_and_merge_the_rest(minimal):
    overrides = {
        "variants": {"b": {"method": "svd_llm", "ratio": 0.4}},
        "calibration": {"samples": 5},
        "model": {"name": "n", "source": "hub", "repo": "owner/n"},
    }
    merged = copy.deepcopy(minimal)  # as Snakemake merges
    merged["variants"] |= overrides["variants"]
    merged["calibration"] |= overrides["calibration"]
    merged["model"] = {**minimal["model"], **overrides["model"], "package": "left over"}
    config = check_config(merged, overrides=overrides)
    assert list(config["variants"]) == ["b"]
    assert config["model"] == {**overrides["model"], "revision": "main"}
    assert config["calibration"]["samples"] == 5
    assert config["calibration"]["source"] == "self"


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3-8b", "qwen3-8b"])
def test_configs_of_the_project_are_right(name, monkeypatch):
    monkeypatch.chdir(PROJECT)
    base = yaml.safe_load((PROJECT / "config.yaml").read_text())
    overrides = yaml.safe_load((PROJECT / "config" / f"{name}.yaml").read_text())
    merged = {**base, **overrides}
    for section in ("calibration", "evaluation", "threads"):
        merged[section] = {**base[section], **overrides[section]}
    config = check_config(merged, overrides=overrides)
    assert config["calibration"]["samples"] == 256 and config["calibration"]["length"] == 1024
    assert {variant["ratio"] for variant in config["variants"].values()} == {0.2, 0.3, 0.4}
    assert len(config["evaluation"]["tasks"]) == 9


def test_replaceme_config_is_right(monkeypatch):
    monkeypatch.chdir(PROJECT)
    base = yaml.safe_load((PROJECT / "config.yaml").read_text())
    overrides = yaml.safe_load((PROJECT / "config" / "replaceme.yaml").read_text())
    merged = {**base, **overrides}
    for section in ("calibration", "evaluation"):
        merged[section] = {**base[section], **overrides[section]}
    config = check_config(merged, overrides=overrides)
    assert list(config["variants"]) == [
        *(f"replaceme_ls-{count}" for count in (4, 6, 8)),
        "replaceme_cosine-6",
        "replaceme_multi-8",
        *(f"uidl-{count}" for count in (4, 6, 8)),
        *(f"shortgpt-{count}" for count in (4, 6, 8)),
        "replaceme_ls-4_cospadi-20",
    ]
    for name, variant in config["variants"].items():
        count = int(name.split("-")[1].split("_")[0])
        assert variant.get("steps", [variant])[0]["blocks"] == count
    # the combined variant goes on from the one that is its first step
    assert config["variants"]["replaceme_ls-4_cospadi-20"]["steps"][0] == config["variants"]["replaceme_ls-4"]


def test_masa_config_is_right(monkeypatch):
    monkeypatch.chdir(PROJECT)
    base = yaml.safe_load((PROJECT / "config.yaml").read_text())
    overrides = yaml.safe_load((PROJECT / "config" / "masa.yaml").read_text())
    config = check_config(
        {**base, **overrides, "evaluation": {**base["evaluation"], **overrides["evaluation"]}}, overrides=overrides
    )
    names = ["masa-20", "masa-30", "masa_shared-20", "svd_llm_attention-20", "svd_llm_attention-30"]
    assert list(config["variants"]) == names
    for name, variant in config["variants"].items():
        assert variant["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert variant["ratio"] == int(name.rsplit("-", 1)[1]) / 100


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_schema_is_one(schema):
    # here and not at every start: that takes a seventh of a second, twice in every SLURM job
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_of_the_schema_is_described_and_closed(schema):
    def walk(part, where):
        for alternative in part.get("oneOf", []):
            if alternative.get("type") == "object":
                walk(alternative, where)
        if part.get("type") == "object":
            assert "additionalProperties" in part, where
            required = part.get("required", [])
            for key, child in part.get("properties", {}).items():
                assert "description" in child, f"{where}.{key}"
                assert key in required or "default" in child or "const" in child, f"{where}.{key} has no default"
                walk(child, f"{where}.{key}")

    whole = schema()
    walk(whole, "config")
    for name, definition in whole["$defs"].items():
        walk(definition, name)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_defaults_of_the_schema_obey_it(schema):
    def walk(part):
        if isinstance(part, dict):
            if "default" in part and "type" in part and part["type"] != "object":
                jsonschema.validate(part["default"], {key: part[key] for key in part if key != "default"})
            for child in part.values():
                walk(child)

    walk(schema())


@pytest.mark.parametrize(
    ("name", "module", "documentation"),
    [
        ("configuration", "cospadi.config", documentation),
        ("configuration-training", "cospadi.training.config", training_config.documentation),
    ],
)
def test_documentation_follows_the_schema(name, module, documentation):
    path = PROJECT / "docs" / f"{name}.md"
    assert path.read_text() == documentation(), f"run: python -m {module} {path.relative_to(PROJECT)}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rho": "best"}, "variants.a.rho: best is not allowed; it has to match ^auto$"),
        ({"rho": 0.5}, "variants.a.rho: 0.5 is not allowed; from 1 to 16"),
        ({"support": "2:4", "rho": 3.0}, "rho: 3.0; support 2:4 has two nonzeros in four atoms, which is rho: 2"),
        ({"support": "2:4", "solver": "ksvd"}, "variants.a.support: 2:4 is not for solver ksvd; leave it out"),
        ({"atom_update": "mod"}, "variants.a.atom_update: mod is not for solver htp; leave it out"),
        ({"solver": "procrustes", "polish": True}, "a.polish: True is not for solver procrustes; leave it out"),
        ({"start": "spectral", "warm_start": "b"}, "start: warm_start is a start too; leave one of them out"),
        ({"warm_start": "bb"}, "warm_start: bb is no variant that learns factors (did you mean b?); one of b, c"),
        ({"warm_start": "u"}, "warm_start: u is no variant that learns factors; one of b, c"),
        ({"warm_start": "a"}, "variants.a.warm_start: a: it starts from a"),
        ({"warm_start": "c"}, "variants.a.warm_start: c: it starts from c from a"),
        ({"warm_start": "b", "group_size": 2}, "variants.a.warm_start: b has another group_size"),
    ],
)
def test_options_of_learning_that_do_not_go_together(minimal, options, expected):
    method = {"method": "cospadi", "ratio": 0.2}
    minimal["variants"]["a"] |= options
    minimal["variants"] |= {"b": method, "c": {**method, "warm_start": "a"}, "u": {"method": "uidl", "blocks": 2}}
    assert any(expected in fault for fault in faults(minimal))


def test_options_of_learning_that_do_go_together(minimal):
    ksvd = {"method": "cospadi", "ratio": 0.2, "solver": "ksvd", "atom_update": "block", "polish": True}
    minimal["variants"] = {
        "a": {**ksvd, "start": "spectral_original", "rho": "auto", "max_seconds": 60},
        "b": {"method": "compot", "ratio": 0.4, "support": "2:4", "warm_start": "a"},
        "c": {"method": "cospadi", "ratio": 0.2, "group_size": 2, "share": ["q_proj"], "group_metric": "exact"},
    }
    assert check_config(minimal)["variants"]["b"]["rho"] == 2
