"""Config: faults, defaults, overrides, documentation."""

from __future__ import annotations

import collections
import copy
import datetime
import random
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from cospadi.config import RESERVED, check_config, documentation, schema
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
    assert variant["codes"] == {"value_bits": 16, "block_size": 64, "dictionary_bits": 16, "rounding": "nearest"}
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
        (
            "model.source",
            "hubb",
            "model.source: hubb is not known (did you mean hub?); one of hub, local, random, wheel_gguf",
        ),
        ("model.repo", "gpt2", "model.repo: gpt2 is not allowed; it has to match"),
        ("model.package", "x==1", "model.package: unknown key; known: name, source, repo, revision"),
        ("text", {"name": "t", "source": "jsonl"}, "text.path: missing"),
        ("text", {"name": "t"}, "text.source: missing; one of chat, file, hub, jsonl, mixture, wheel_wikipedia"),
        ("text", {"name": "t", "source": "file", "path": "nowhere.txt"}, "text.path: 'nowhere.txt' does not exist"),
        ("variants", {}, "variants: {} is empty; at least 1 expected"),
        ("variants.dense", {"method": "cospadi", "ratio": 0.2}, "variants: dense is a reserved name"),
        ("variants.a", None, "variants.a: null is not allowed; expected a mapping of keys to values"),
        ("variants.a.method", ["cospadi"], "variants.a.method: [cospadi] is not known"),
        ("model.source", {}, "model.source: {} is not known"),
        ("variants.a.method", "cospody", "variants.a.method: cospody is not known (did you mean cospadi?)"),
        ("variants.a.ratio", 1.2, "variants.a.ratio: 1.2 is not allowed; from 0.01 to 0.95"),
        ("variants.a.rank", 3, "variants.a.rank: unknown key"),
        ("variants.a.codes.value_bits", 15, "variants.a.codes.value_bits: 15 is not allowed; one of 16, 14, 8"),
        ("variants.a.targets", ["q_prj"], "variants.a.targets.0: q_prj is not allowed (did you mean q_proj?); one of"),
        ("variants.a.share", ["gate"], "variants.a.share.0: gate is not allowed (did you mean gate_proj?); one of"),
        ("variants.a.share_within", [["q_proj", "kproj"]], "variants.a.share_within.0.1: kproj is not allowed"),
        ("variants.a.share_within", [["q_proj"]], "variants.a.share_within.0: [q_proj] has 1; at least 2"),
        (
            "variants.a.share_within",
            [["q_proj", "k_proj"], ["v_proj", "q_proj"]],
            "variants.a.share_within: q_proj is in 2 lists",
        ),
        ("run", "demo\n", 'run: "demo\\n" is not allowed; it has to match'),
        ("run", True, "run: true is not allowed; expected text (put it in quotes)"),
        ("run", datetime.date(2024, 1, 1), "run: 2024-01-01 is not allowed; expected text (put it in quotes)"),
        ("run", 2024, "run: 2024 is not allowed; expected text (put it in quotes)"),
        ("run", "r" * 101, f"run: {'r' * 57}... has 101 characters; at most 100 are allowed"),
        ("model.name", "m\n", 'model.name: "m\\n" is not allowed; it has to match'),
        ("model.repo", "owner/m\n", 'model.repo: "owner/m\\n" is not allowed; it has to match'),
        ("model.revision", "", "model.revision: '' is not allowed; it has to match"),
        ("model", [], "model: [] is not allowed; expected a mapping of keys to values"),
        ("model", {"name": "m"}, "model.source: missing; one of hub, local, random, wheel_gguf"),
        ("model.source", {}, "model.source: {} is not known; one of hub, local, random, wheel_gguf"),
        ("model.source", ["hub"], "model.source: [hub] is not known"),
        ("calibration", None, "calibration: null is not allowed; expected a mapping of keys to values"),
        ("calibration", ["samples"], "calibration: [samples] is not allowed; expected a mapping of keys to values"),
        ("calibration.x\n", 1, 'calibration."x\\n": unknown key; known: source'),
        ("calibration.samples", 10**400, "calibration.samples: 1000"),
        ("calibration.samples", 2**53 + 1, "calibration.samples: 9007199254740993 is not allowed; from 1 to 9007"),
        ("calibration.heldout_fraction", float("inf"), "calibration.heldout_fraction: .inf is not allowed; expected a"),
        ("variants", None, "variants: null is not allowed; expected a mapping"),
        ("variants", [], "variants: [] is not allowed; expected a mapping"),
        ("variants.a.method", [], "variants.a.method: [] is not known; one of alps, basis_sharing, choose"),
        ("variants.a.ratio", -0.0, "variants.a.ratio: -0.0 is not allowed; from 0.01 to 0.95"),
        (
            "variants.a.share",
            ["q_proj"],
            "variants.a.share: [q_proj] shares nothing with group_size: 1, a layer alone; ",
        ),
        ("variants.a\n", {"method": "svd_llm", "ratio": 0.2}, 'variants: "a\\n" is not allowed; it has to match'),
        ("evaluation.task_path", "a\0b", "evaluation.task_path:"),
        ("evaluation.task_path", "x" * 5000, "evaluation.task_path:"),
        ("evaluation.tasks", ["piqa", "piqa"], "evaluation.tasks: [piqa, piqa] names something twice"),
        ("evaluation.perplexity", {}, "evaluation.perplexity: needs the section text"),
        ("calibration.source", "text", "calibration.source: 'text' needs the section text"),
        ("evaluation.gpus", 2, "evaluation.gpus: 2 need a device_map, which spreads a model over them: auto"),
        ("evaluation.max_memory.cpu", "8GB", "evaluation.max_memory.cpu: 8GB is used with a device_map alone"),
        (
            "evaluation.max_memory.cpu",
            "8 bananas",
            "evaluation.max_memory.cpu: 8 bananas is not allowed; it has to match",
        ),
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


def test_a_variant_is_called_like_nothing_else_in_the_folder_of_a_run(minimal):
    """The list is what the rules write there."""
    written = {"dense"}
    for file in (PROJECT / "workflow" / "rules").glob("*.smk"):
        text = file.read_text()
        written |= set(re.findall(r"<results>/(?:\{base\})?([\w.]+)[\"/]", text))
        written |= {folder for folder in ("logs", "benchmarks") if f"<{folder}>/" in text}
    own = {"model", "factors", "codes", "eval.json"}  # in the folder of a model, never beside it
    assert written - own - {"dense"} == set(RESERVED) - {"dense"}
    for name in RESERVED:
        minimal["variants"] = {name: {"method": "svd_llm", "ratio": 0.2}}
        assert faults(minimal) == [f"variants: {name} is a reserved name; choose another"]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        # a word that is not known: what else is wrong is found as far as it is wrong whatever was meant
        (
            {"method": "cospody", "ratio": 3},
            ["method: cospody is not known (did you mean cospadi?)", "ratio: 3 is not"],
        ),
        ({"method": "cospody"}, ["method: cospody is not known", "ratio: missing"]),
        ({"method": "xyz", "ratio": 0.2, "blocks": 2}, ["method: xyz is not known; one of alps, basis_sharing"]),
        ({"method": "xyz", "ratoi": 0.2}, ["method: xyz is not known", "ratoi: unknown key (did you mean ratio?)"]),
        ({"method": [], "rho": 0.5}, ["method: [] is not known", "rho: 0.5 is not allowed; from 1 to 16"]),
        # the word's own key
        ({"metod": "cospadi", "ratio": 0.2}, ["metod: unknown key (did you mean method?)"]),
        ({"Method": "cospadi", "ratio": 2}, ["Method: unknown key (did you mean method?)", "ratio: 2 is not allowed"]),
        ({"kind": "svd_llm", "rho": 2}, ["kind: unknown key (did you mean method?)", "ratio: missing", "rho: unknown"]),
        ({"metod": "x", "ratio": 0.2}, ["metod: unknown key (did you mean method?)", "metod: x is not known"]),
        ({"ratio": 0.2, "rank": 3}, ["method: missing; one of", "rank: unknown key"]),
        ({"ratio": 3}, ["method: missing; one of", "ratio: 3 is not allowed"]),
        ({}, ["method: missing; one of alps, basis_sharing"]),
        (
            {"stepz": [{"method": "uidl"}, {"method": "svd_llm", "ratio": 0.2}]},
            ["stepz.0.blocks: missing", "stepz: unknown key (did you mean steps?)"],
        ),
        ({"steps": [{"metod": "uidl", "blocks": 2}] * 2}, ["steps.0.metod: unknown key", "steps.1.metod: unknown key"]),
    ],
)
def test_a_typo_in_what_a_section_means_hides_nothing_else_of_it(minimal, variant, expected):
    minimal["variants"]["a"] = variant
    found = faults(minimal)
    assert len(found) == len(expected), found
    for fault, start in zip(found, expected, strict=True):
        assert fault.startswith(f"variants.a.{start}"), found


def test_a_typo_in_source_is_found_with_the_rest_of_the_section(minimal):
    minimal["model"] = {"name": "m", "sourse": "hub", "repo": "gpt2"}
    minimal["text"] = {"name": "t", "source": "jsnl", "path": "", "seed": -1}
    found = faults(minimal)
    expected = ["model.repo: gpt2", "model.sourse: unknown key (did you mean source?)", "text.path: '' is empty"]
    expected += ["text.seed: -1 is not allowed; at least 0", "text.source: jsnl is not known (did you mean jsonl?)"]
    assert len(found) == len(expected) and all(map(str.startswith, found, expected)), found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"method": "basis_sharing", "group_size": 1},
            ["share: [q_proj, k_proj, v_proj, gate_proj, up_proj] shares not"],
        ),
        ({"group_size": 2, "share": ["up_proj"], "targets": ["q_proj"]}, ["share: [up_proj] shares nothing: targets"]),
        (
            {"share_within": [["q_proj", "k_proj"]], "targets": ["q_proj", "o_proj"]},
            ["share_within.0: [q_proj, k_proj]"],
        ),
        ({"share_within": [["q_proj", "k_proj"]], "targets": ["q_proj", "k_proj"]}, []),
        ({"group_size": 2, "share": ["q_proj", "up_proj"], "targets": ["q_proj"]}, []),
    ],
)
def test_sharing_that_shares_nothing_is_refused(minimal, options, expected):
    minimal["variants"]["a"] |= options
    found = faults(minimal) if expected else check_config(minimal) and []
    assert len(found) == len(expected) and all(
        fault.startswith(f"variants.a.{start}") for fault, start in zip(found, expected, strict=True)
    ), found


def test_keys_that_are_no_text(minimal):
    minimal["variants"] = {20: {"method": "svd_llm", "ratio": 0.2}, True: None, "a": {1: 2, "method": "svd_llm"}}
    assert faults(minimal)[0] == "variants.True: null is not allowed; expected a mapping of keys to values"
    assert [fault.partition(";")[0] for fault in faults(minimal)[1:]] == [
        "variants.a.1: unknown key",
        "variants.a.ratio: missing",
        "variants: 20 is not allowed",
        "variants: true is not allowed",
    ]


@pytest.mark.parametrize("config", [None, [], 3, "run: demo", {}])
def test_what_is_no_config(config):
    assert faults(config)


def test_a_config_that_contains_itself(minimal):
    minimal["calibration"]["source"] = minimal
    assert faults(minimal) == ["a section contains itself, or is nested without end"]


def test_mappings_of_any_class_are_read(minimal):
    """Snakemake reads JSON into ordered dictionaries."""
    minimal["variants"]["a"] = collections.OrderedDict(minimal["variants"]["a"])
    assert check_config(minimal)["variants"]["a"]["solver"] == "htp"
    minimal["variants"]["a"]["ratio"] = collections.OrderedDict(x=1)
    assert faults(minimal) == ["variants.a.ratio: {x: 1} is not allowed; expected a number"]


def test_a_number_that_equals_one_of_those_allowed_is_that_one(minimal):
    minimal["variants"]["a"]["codes"] = {"value_bits": 8.0}
    bits = check_config(minimal)["variants"]["a"]["codes"]["value_bits"]
    assert bits == 8 and isinstance(bits, int)


def test_keys_that_stand_twice_in_a_file(minimal, tmp_path):
    file = tmp_path / "twice.yaml"
    text = "run: a\ncalibration: &c {samples: 3, samples: 4}\nvariants:\n  a: {<<: *c, <<: *c}\n  b: 1\n  'a': 2\n"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_config(minimal, files=[file, tmp_path / "missing.yaml"])
    assert caught.value.faults == [
        f"calibration.samples: stands twice in {file}, in lines 2 and 2",
        f"variants.a: stands twice in {file}, in lines 4 and 6",
    ]
    file.write_text("run: [unclosed")
    assert check_config(minimal, files=[file])["run"] == "r"  # who reads the file says what is wrong with it


def test_files_are_files_and_folders_are_folders(minimal, tmp_path):
    minimal["model"] = {"name": "m", "source": "local", "path": __file__}
    minimal["text"] = {"name": "t", "source": "file", "path": str(tmp_path)}
    minimal["evaluation"]["task_path"] = str(tmp_path / "none")
    expected = [
        f"'tmp/none' does not exist (looked in {Path.cwd()})",
        f"{__file__!r} is a file; expected a folder",
        "'tmp' is a folder; expected a file",
    ]
    assert [fault.partition(" ")[2].replace(str(tmp_path), "tmp") for fault in faults(minimal)] == expected
    minimal["lenght"] = 3  # found with the rest, whatever else is wrong
    minimal["model"]["rotated"] = 3
    found = [fault.partition(" ")[2].replace(str(tmp_path), "tmp") for fault in faults(minimal)]
    assert [fault for fault in found if fault in expected] == expected and len(found) == 5
    minimal["model"]["path"] = ["a"]
    assert len(faults(minimal)) == 5


_STRANGE = (
    None,
    True,
    0,
    -1,
    -0.0,
    0.5,
    float("nan"),
    float("inf"),
    10**400,
    2**60,
    "",
    "a",
    "demo\n",
    "a\0b",
    "x" * 300,
)
_STRANGE += ("\ud800", [], {}, [[]], {"a": 1}, {1: 2}, {None: None}, datetime.date(2024, 1, 1), b"x", {1, 2}, (1, 2))
_STRANGE += ("1e-4", "auto", ["q_proj"], ["q_proj"] * 2, [1, "a"], 16.0, object(), collections.OrderedDict(a=1))


def _places(value, path=()):
    yield path
    if len(path) < 8 and isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


def _at(value, path):
    for key in path:
        value = value[key]
    return value


def _mutate(config, draw, keys):
    """Change one place: another value, no value, one key more, a typo, what stands elsewhere, that thing itself."""
    places = list(_places(config))[1:]
    if not places:
        return
    *above, key = draw.choice(places)
    parent, elsewhere = _at(config, above), _at(config, draw.choice(places))
    match draw.randrange(6):
        case 0:
            parent[key] = copy.deepcopy(draw.choice(_STRANGE))
        case 1:
            del parent[key]
        case 2 if isinstance(parent, dict):
            parent[draw.choice([*keys, 1, None, True, "x\n", 2.5, (1, 2)])] = copy.deepcopy(draw.choice(_STRANGE))
        case 3 if isinstance(parent, dict):
            parent[str(key)[:-1]] = parent.pop(key)
        case 4:
            parent[key] = copy.deepcopy(elsewhere)
        case 5:
            parent[key] = elsewhere


def test_whatever_a_config_is_only_a_config_error_comes_of_it(monkeypatch):
    monkeypatch.chdir(PROJECT)
    base = yaml.safe_load((PROJECT / "config.yaml").read_text())
    base["variants"] |= {
        "steps": {"steps": [{"method": "replaceme", "blocks": 4}, {"method": "basis_sharing", "ratio": 0.2}]},
        "masa": {"method": "masa", "ratio": 0.2},
        "warm": {"method": "cospadi", "ratio": 0.2, "warm_start": "cospadi-40"},
    }
    check_config(base)
    keys = sorted(set(re.findall(r"^\| `(\w+)` \|", documentation(), re.MULTILINE)))
    valid = refused = 0
    for seed in range(1000):
        config, draw = copy.deepcopy(base), random.Random(seed)
        for _ in range(draw.randint(1, 3)):
            _mutate(config, draw, keys)
        try:
            complete = check_config(config)
        except ConfigError as error:
            assert all(fault.isprintable() for fault in error.faults), (seed, error.faults)
            refused += 1
        else:
            assert check_config(complete) == complete, seed
            valid += 1
    assert valid > 20 and refused > 500, (valid, refused)


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


@pytest.fixture
def config_of(monkeypatch):
    """A config of the project, complete: merged into the demo's as Snakemake does."""
    monkeypatch.chdir(PROJECT)

    def read(name):
        base, overrides = (yaml.safe_load(Path(file).read_text()) for file in ("config.yaml", f"config/{name}.yaml"))
        merged = {**base, **overrides}
        for section in {"calibration", "evaluation", "threads"} & overrides.keys():
            merged[section] = {**base[section], **overrides[section]}
        return check_config(merged, overrides=overrides)

    return read


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3-8b", "qwen3-8b"])
def test_configs_of_the_project_are_right(name, config_of):
    config = config_of(name)
    assert config["calibration"]["samples"] == 256 and config["calibration"]["length"] == 1024
    assert {variant["ratio"] for variant in config["variants"].values()} == {0.2, 0.3, 0.4}
    assert len(config["evaluation"]["tasks"]) == 9


def test_replaceme_config_is_right(config_of):
    config = config_of("replaceme")
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


def test_masa_config_is_right(config_of):
    config = config_of("masa")
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
        ({"support": "2:4", "rho": 3.0}, "rho: 3.0; support 2:4 has 2 nonzeros in 4 atoms, which is rho: 2"),
        ({"support": "2:4", "solver": "ksvd"}, "variants.a.support: 2:4 is not for solver ksvd; leave it out"),
        ({"atom_update": "mod"}, "variants.a.atom_update: mod is not for solver htp; leave it out"),
        ({"solver": "procrustes", "polish": True}, "a.polish: True is not for solver procrustes; leave it out"),
        ({"start": "spectral", "warm_start": "b"}, "start: warm_start is a start too; leave one of them out"),
        ({"warm_start": "bb"}, "warm_start: bb is no variant that learns factors (did you mean b?); one of b, c, s, t"),
        ({"warm_start": "u"}, "warm_start: u is no variant that learns factors; one of b, c, s, t"),
        ({"warm_start": "a"}, "variants.a.warm_start: a: it starts from a"),
        ({"warm_start": "c"}, "variants.a.warm_start: c: it starts from c from a"),
        ({"warm_start": "b", "group_size": 2}, "variants.a.warm_start: b has group_size 1, here it is 2"),
        (
            {"warm_start": "s"},
            "s is made by svd_llm, which gives low rank; cospadi starts from those of cospadi, compot",
        ),
        ({"warm_start": "t"}, "variants.a.warm_start: t has no factors of k_proj, v_proj, o_proj, gate_proj, up_proj"),
        (
            {"warm_start": "b", "share_within": [["gate_proj", "up_proj"]]},
            "variants.a.warm_start: b has several dictionaries for gate_proj, up_proj, here it is one",
        ),
        ({"menu": [1.0]}, "variants.a.menu: [1.0] is of allocation menu or measured, here it is uniform; leave it out"),
        ({"measured_windows": 2}, "variants.a.measured_windows: 2 is of allocation measured, here it is uniform"),
        ({"allocation": "menu"}, "a.allocation: menu compares what errors in different matrices cost; set metric to"),
        (
            {"method": "ectcq", "allocation": "global"},
            "a.allocation: global compares what errors in different matrices",
        ),
        ({"method": "trellis", "refine": {}}, "variants.a.refine: paths and scales of a trellis are decided together"),
        ({"method": "ectcq", "refine": {}}, "variants.a.refine: numbers and steps are decided together"),
    ],
)
def test_options_of_learning_that_do_not_go_together(minimal, options, expected):
    method = {"method": "cospadi", "ratio": 0.2}
    minimal["variants"]["a"] |= options
    minimal["variants"] |= {"b": method, "c": {**method, "warm_start": "a"}, "u": {"method": "uidl", "blocks": 2}}
    minimal["variants"] |= {
        "s": {"method": "svd_llm", "ratio": 0.2},
        "t": {**method, "targets": ["q_proj", "down_proj"]},
    }
    assert any(expected in fault for fault in faults(minimal))


def test_options_of_learning_that_do_go_together(minimal):
    ksvd = {"method": "cospadi", "ratio": 0.2, "solver": "ksvd", "atom_update": "block", "polish": True}
    minimal["variants"] = {
        "a": {**ksvd, "start": "spectral_original", "rho": "auto", "max_seconds": 60},
        "b": {"method": "compot", "ratio": 0.4, "support": "2:4", "warm_start": "a"},
        "c": {"method": "cospadi", "ratio": 0.2, "group_size": 2, "share": ["q_proj"], "group_metric": "exact"},
        # from factors of more matrices, and of one dictionary where this has several
        "d": {"method": "cospadi", "ratio": 0.4, "group_size": 2, "targets": ["q_proj"], "warm_start": "c"},
    }
    assert check_config(minimal)["variants"]["b"]["rho"] == 2


def test_a_sweep_is_one_variant_for_every_combination_named_after_its_values(minimal):
    minimal["variants"] = {
        "a": {"method": "cospadi", "sweep": {"ratio": [0.2, 0.4375]}, "rho": 3.0},
        "b": {"method": "sparsegpt", "sweep": {"pattern": ["matrix", "row"], "ratio": [0.5]}},
        "c": {"method": "svd_llm", "ratio": 0.3},
        "d": {"method": "uidl", "sweep": {"blocks": [2, 4]}},
    }
    variants = check_config(minimal)["variants"]
    assert list(variants) == ["a-20", "a-43.75", "b-matrix-50", "b-row-50", "c", "d-2", "d-4"]
    assert (variants["a-43.75"]["ratio"], variants["a-43.75"]["rho"]) == (0.4375, 3.0)
    assert (variants["b-row-50"]["pattern"], variants["b-row-50"]["ratio"]) == ("row", 0.5)
    assert variants["d-4"]["blocks"] == 4
    assert check_config(check_config(minimal)) == check_config(minimal)


def test_faults_of_sweeps_are_told_together_with_all_others(minimal):
    minimal["variants"] = {
        "a": {"method": "cospadi", "sweep": {"ratio": 0.2}},
        "b": {"method": "cospadi", "sweep": {"ratio": [0.2, 0.2]}},
        "c": {"method": "cospadi", "ratio": 0.2, "sweep": {"ratio": [0.3]}, "rhoo": 2.0},
        "d": {
            "steps": [{"method": "uidl", "blocks": 1}, {"method": "svd_llm", "ratio": 0.2}],
            "sweep": {"ratio": [0.3]},
        },
        "e": {"method": "cospadi", "sweep": {"ratio": [0.3]}},
        "e-30": {"method": "cospadi", "ratio": 0.3},
        "f": {"method": "cospadi", "sweep": [0.3]},
        "g": {"method": "cospadi", "sweep": {"ratio": [0.3, 7]}},
    }
    found = "\n".join(faults(minimal))
    assert "variants.a.sweep.ratio: expected a list of at least one value" in found
    assert "variants.b.sweep.ratio: names a value twice" in found
    assert "variants.c.sweep.ratio: stands beside the sweep too; leave one out" in found
    assert "variants.c.rhoo: unknown key (did you mean rho?)" in found
    assert "variants.d.sweep: no sweep beside steps" in found
    assert "variants.e.sweep: makes e-30, which is a variant already; rename one" in found
    assert "variants.f.sweep: expected options and lists of their values" in found
    assert "variants.g-700.ratio: 7 is not allowed; from 0.01 to 0.95" in found
    assert "empty" not in found


def test_what_is_wrong_in_all_of_a_sweep_is_told_once(minimal):
    minimal["variants"] = {
        "a": {"method": "cospadi", "sweep": {"ratio": [0.2, 0.4, 0.4375, 5]}, "rhoo": 2.0},
        "b": {"method": "svdllm", "sweep": {"ratio": [0.2, 0.4]}},
        "c": {"method": "cospadi", "sweep": {"ratio": [0.2, 0.4]}, "share": ["q_proj"]},
    }
    found = faults(minimal)
    assert [fault.split(":")[0] for fault in found] == ["variants.a-500.ratio", "variants.a.rhoo", "variants.b.method"]
    del minimal["variants"]["a"], minimal["variants"]["b"]
    assert [fault.split(":")[0] for fault in faults(minimal)] == ["variants.c.share"]


def test_the_frontiers_compare_every_method_that_factorizes_all_matrices():
    """Those that store 16-bit numbers in one file, those with codecs of their own, or few bits, in the other."""
    known = {name: method for name, method in METHODS.items() if method.scope == "problem"}
    for file, own_codec in (("frontier", False), ("bits", True)):
        config = yaml.safe_load((PROJECT / f"config/{file}.yaml").read_text())
        plain = [variant for variant in config["variants"].values() if "value_bits" not in variant.get("codes", {})]
        compared = {variant["method"] for variant in plain}
        assert compared == {name for name, method in known.items() if method.own_codec == own_codec}


def test_variants_that_do_not_compare_are_not_chosen_from(minimal):
    priced = {"metric": "gradients", "ratio": 0.4}
    minimal["variants"] = {
        "plain": {"method": "svd_llm", "ratio": 0.4},
        "a": {"method": "svd_llm", **priced},
        "b": {"method": "rtn", **priced, "ratio": 0.6, "column_power": 0.25},
        "c": {"method": "svd_llm", **priced, "group_size": 2, "share": ["q_proj"]},
        "d": {"method": "masa", **priced},
        "e": {"method": "rtn", **priced, "ratio": 0.6, "targets": ["q_proj"]},
        "cut": {"steps": [{"method": "uidl", "blocks": 1}, {"method": "svd_llm", **priced}]},
        "turn": {"method": "svd_llm", **priced, "target": "sequential"},
        "owed": {"method": "svd_llm", **priced, "target": "sequential", "drift_share": 0, "residual_share": 0.5},
        "own": {"method": "svd_llm", **priced, "target": "sequential", "drift_share": 0},
        "taught": {"method": "svd_llm", **priced, "distill": {}},
        "behind": {"method": "svd_llm", **priced, "compensate": {}},
    }
    minimal["variants"]["mix"] = {
        "method": "choose",
        "bits": 4,
        "choose_from": ["a", "plain", "b", "c", "d", "e", "cut", "x", "turn", "owed", "own", "taught", "behind"],
    }
    where, known = (
        "variants.mix.choose_from:",
        "is no variant that learns matrix by matrix, in one step; one of plain, a, b, c, e, turn, owed, own, taught, "
        "behind",
    )
    other = (
        "makes up for what its own matrices before each got wrong, and here others are before them; "
        "set its drift_share and residual_share to 0, or its target to independent"
    )
    assert sorted(faults(minimal)) == [
        f"{where} b has column_power 0.25, a has 0.5; they have to be alike",
        f"{where} behind makes up for what its own matrices before each lost, and here others are before them; "
        "leave out its compensate",
        f"{where} c has group_size 2, a has 1; they have to be alike",
        *(f"{where} {name} {known}" for name in ("cut", "d")),
        f"{where} e has targets ['q_proj'], a has None; they have to be alike",
        f"{where} owed {other}",
        f"{where} plain does not say what its errors cost; set its metric to gradients",
        f"{where} taught was trained as a whole, and here others are beside its matrices; leave out its distill",
        f"{where} turn {other}",
        f"{where} x {known}",
    ]
    minimal["variants"] = {name: minimal["variants"][name] for name in ("a", "mix")}
    minimal["variants"]["mix"] |= {"choose_from": ["a", "a"], "max_perplexity_increase": 1.05}
    assert faults(minimal) == [
        "variants.mix.choose_from: [a, a] names something twice",
        "variants.mix.max_perplexity_increase: stands beside bits, which says the same; leave one out",
    ]
    del minimal["variants"]["mix"]["bits"]
    minimal["variants"] |= {"b": {"method": "rtn", **priced, "ratio": 0.6}}
    minimal["variants"]["mix"]["choose_from"] = ["a", "b"]
    (fault,) = faults(minimal)
    assert fault.startswith(
        "variants.mix.max_perplexity_increase: is measured on calibration windows that are kept out"
    )
    minimal["calibration"]["heldout_fraction"] = 0.1
    assert check_config(minimal)["variants"]["mix"] == {
        **{"method": "choose", "choose_from": ["a", "b"], "max_perplexity_increase": 1.05}
    }
    minimal["variants"]["mix"]["embedding_bits"] = 8
    (fault,) = faults(minimal)
    assert fault.startswith("variants.mix.embedding_bits: 8 are not in the perplexity that max_perplexity_increase is")
    minimal["variants"]["mix"] |= {"embedding_bits": 16, "embedding_method": "ectcq"}
    assert faults(minimal) == ["variants.mix.embedding_method: ectcq has nothing to round; set embedding_bits"]
    del minimal["variants"]["mix"]["embedding_bits"], minimal["variants"]["mix"]["embedding_method"]
    minimal["variants"]["mix"] |= {"search": 10}
    assert faults(minimal) == [
        "variants.mix.search: swaps keep to a size; give a ratio in place of max_perplexity_increase"
    ]
    minimal["variants"]["mix"] = {"method": "choose", "choose_from": ["a", "b"], "bits": 4, "search": 10}
    minimal["variants"]["mix"]["embedding_bits"] = 8
    assert check_config(minimal)["variants"]["mix"]["search"] == 10
    minimal["calibration"]["heldout_fraction"] = 0
    (fault,) = faults(minimal)
    assert fault.startswith("variants.mix.search: is measured on calibration windows that are kept out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embedding_bits": 5}, "embedding_bits: 5; rtn has 8, 6, 4; 16 is as it is"),
        ({"embedding_bits": 3.5, "embedding_method": "gptq"}, "embedding_bits: 3.5; gptq has 8, 6, 4; 16 is as it is"),
        ({"embedding_bits": 12.5, "embedding_method": "ectcq"}, "embedding_bits: 12.5; ectcq has 1 to 12; 16 is as it"),
        ({"embedding_method": "gptq"}, "embedding_method: gptq has nothing to round; set embedding_bits"),
        ({"embedding_bits": 4, "embedding_method": "gptq"}, None),
        ({"embedding_bits": 2.25, "embedding_method": "ectcq"}, None),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_bits_of_embeddings_are_those_of_their_method(minimal, options, words, nested):
    step = {"method": "svd_llm", "ratio": 0.4, **options}
    minimal["variants"] = {"a": {"steps": [{"method": "uidl", "blocks": 2}, step]} if nested else step}
    found = faults(minimal) if words else []
    where = "variants.a.steps.1" if nested else "variants.a"
    assert [fault.startswith(f"{where}.{words}") for fault in found] == [True] * (words is not None)
    if words is None:
        assert check_config(minimal)
