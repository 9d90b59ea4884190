"""Every value of every option of the schema is planned: enum members, both ends of ranges, defaults, null, lists.

From `check_config` through `Plan` and `needs`, all of them; through a dry run of the workflow, one of every option.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from cospadi.checking import LARGEST
from cospadi.config import check_config, schema
from cospadi.errors import ConfigError
from cospadi.methods import METHODS
from cospadi.methods.base import FILE, TRAINING
from cospadi.needs import needs, table
from cospadi.plan import Plan
from cospadi.pruning import PRUNERS

from .test_plans import jobs, snakemake

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# Values of options that the schema alone does not tell: texts with a pattern, names of files, what depends on the model
TOLD: dict[str, list[Any]] = {
    "name": ["m", "n" * 100],
    "rho": [1, 2.0, 16],
    "candidate_ratios": [[0.01], [0.2, 0.5, 0.95]],
    "rhos": [[1], [1.5, 16.0]],
    "warm_start": [None, "start"],
    "allocation_file": [None],
    "menu": [[0.05, 1], [1, 20]],
    "embedding_bits": [16, 8, 6, 4],
    "budget": [None, "250KB", "0.3 MB", "244.14 KiB"],
    "cpu": [None, "1B", "0.3 MB", "60GB"],
    "gpu": [None, "1B", "24 GiB"],
    "repo": ["owner/model"],
    "revision": ["main", "0123abc", "refs/pr/1"],
    "package": ["some-wheel==1.0"],
    "sha256": ["0" * 64],
    "members": [[{"package": "some-wheel==1.0", "member": "x", "sha256": "0" * 64}]],
    "blocks": [1, 2, [1], [1, 2]],
    "cuts": [1, 2],
    "tasks": [[], ["last_word"], ["piqa", "next_sentence", "sentence_order"]],
    "prompts": [["The"], ["The", "A"]],
    "share_within": [[], [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]],
    "pattern": ["matrix", "column", "row", "2:4", "3:8"],
    "path": ["model"],
    "config": ["model/config.json"],
    "task_path": [None, "model"],
}
TOLD_OF_TEXT = {**TOLD, "path": ["texts.jsonl"], "config": [None, "de"]}
TOLD_OF_TEXT["sources"] = [[{"source": "jsonl", "path": "texts.jsonl", "share": share} for share in (0.3, 0.7)]]
# What an option needs beside it to mean something
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("evaluation", "gpus"): {"device_map": "auto"},
    ("evaluation", "max_memory"): {"device_map": "auto"},
    ("cospadi", "atom_update"): {"solver": "ksvd"},
    ("cospadi", "polish"): {"solver": "ksvd"},
    **{(method, "support"): {"rho": 2.0} for method in METHODS},
    **{(method, "share"): {"group_size": 2} for method in METHODS},
    **{(method, "group_size"): {"share": []} for method in METHODS},
    **{("replaceme", name): {"objective": "cosine"} for name in ("loss", "start", "epochs", "lr", "batch_tokens")},
    **{("replaceme", name): {"objective": "cosine"} for name in ("l1", "l2", "random_state")},
    ("replaceme", "cuts"): {"blocks": 2},
    **{("codes", name): {"rounding": "optimal"} for name in ("value_bits", "dictionary_bits")},
    **{
        (method, option): {"metric": "gradients"}
        for method in METHODS
        for option in ("allocation", "column_power", "activation_share")
    },
    **{(method, "menu"): {"metric": "gradients", "allocation": "menu"} for method in METHODS},
    **{(method, "measured_windows"): {"allocation": "measured"} for method in METHODS},
    **{(method, "embedding_method"): {"embedding_bits": 8} for method in METHODS},
    # layers that are learned together are not learned in turn
    **{
        (method, option): ({"target": "sequential"} if option.endswith("_share") else {})
        | ({"group_size": 1, "share": []} if "group_size" in METHODS[method].options else {})
        for method in METHODS
        for option in ("target", "refine", "compensate", "drift_share", "residual_share")
    },
    **{("ectcq", option): {"metric": "gradients"} for option in TRAINING},  # whose columns have scales
}


def values(name: str, part: Mapping[str, Any], told: Mapping[str, list[Any]] = TOLD) -> list[Any]:
    """Values that an option may have, each once; 1 and True are two."""
    kinds = part.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    found = [part[key] for key in ("const", "default", "minimum") if key in part]
    found += part.get("enum", [])
    if name in told:
        found = [value for value in told[name] if "array" in kinds or not isinstance(value, list)]
    elif {"integer", "number"} & set(kinds):
        found.append(part.get("maximum", LARGEST))
    elif "boolean" in kinds:
        found += [False, True]
    elif "array" in kinds:
        items = part["items"]["enum"]
        found += [*([item] for item in items), items]
    elif "string" in kinds:
        found.append("x")
    if "null" in kinds:
        found.append(None)
    return list({repr(value): copy.deepcopy(value) for value in found}.values())


def alternatives(part: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Title to schema of the mappings that a section may be."""
    objects = part.get("oneOf", [part])
    return {part.get("title", ""): part for part in objects if part.get("type") == "object"}


def variants() -> Iterator[tuple[tuple[str, ...], Any, dict[str, Any]]]:
    """Place, value and settings of variants that between them have every value of every option of method and pruner."""
    parts = alternatives(schema()["properties"]["variants"]["additionalProperties"])
    assert set(parts) == {*METHODS, *PRUNERS, "choose", "steps"}
    for method in (*METHODS, *PRUNERS):
        needed = {"method": method, **({"ratio": 0.2} if method in METHODS else {"blocks": 1})}
        for option, part in parts[method]["properties"].items():
            for value in values(option, part):
                if (option, value) == ("allocation", FILE):  # its table has a test of its own
                    continue
                place = method, option
                without = {"ratio"} if option in ("bits", "budget") and value is not None else set()
                given = {name: needed[name] for name in needed.keys() - without}
                yield place, value, {**given, **BESIDE.get(place, {}), option: value}
            for alternative in alternatives(part).values() if method != "trellis" or option not in TRAINING else ():
                for name, child in alternative["properties"].items():
                    around, beside = BESIDE.get((method, option), {}), BESIDE.get((option, name), {})
                    for value in values(name, child):
                        yield (method, option, name), value, {**needed, **around, option: {**beside, name: value}}
    for pruner in PRUNERS:
        for method in METHODS:
            first, second = {"method": pruner, "blocks": 1}, {"method": method, "ratio": 0.2}
            yield ("steps", f"{pruner}-{method}"), None, {"steps": [first, second]}


def sections(base: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any, dict[str, Any]]]:
    """Place, value and config: `base` with one key of one section changed."""

    def changed(path: tuple[str, ...], part: Mapping[str, Any], told: Mapping[str, list[Any]]) -> Iterator[Any]:
        for title, alternative in alternatives(part).items():
            properties = alternative["properties"]
            needed = {name: values(name, properties[name], told)[0] for name in alternative.get("required", ())}
            for name, child in properties.items():
                if child.get("type") == "object" or "oneOf" in child:
                    yield from changed((*path, name), child, told)
                    continue
                for value in values(name, child, told):
                    config = copy.deepcopy(base)
                    section = config
                    for outer, key in itertools.pairwise(path):
                        section = section.setdefault(outer, {})
                        section.update(BESIDE.get((outer, key), {}))
                    old = section.get(path[-1], {}) if not title or not needed else {}
                    section[path[-1]] = {**old, **needed, **BESIDE.get((path[-1], name), {}), name: value}
                    yield (*path, title, name), value, config

    for section, part in schema()["properties"].items():
        if section == "variants":
            continue
        if part.get("type") == "object" or "oneOf" in part:
            yield from changed((section,), part, TOLD_OF_TEXT if section == "text" else TOLD)
        else:
            for value in values("name" if section == "run" else section, part):
                yield (section,), value, {**copy.deepcopy(base), section: value}
    nothing = {"perplexity": None, "tasks": [], "generate": None}
    yield ("text",), None, {**base, "text": None, "calibration": {"source": "self"}, "evaluation": nothing}


@pytest.fixture
def base(tmp_path, monkeypatch) -> dict[str, Any]:
    """A config, in a working directory that has what it names."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    # what the hub would be asked for
    stored = tmp_path / "resources" / "configs" / "owner--model@main.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps(LLAMA))
    (tmp_path / "texts.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    monkeypatch.chdir(tmp_path)
    return {
        "run": "sweep",
        "model": {"name": "m", "source": "hub", "repo": "owner/model"},
        "text": {"name": "t", "source": "jsonl", "path": "texts.jsonl"},
        "calibration": {"samples": 8, "length": 64},
        "evaluation": {"perplexity": {"window": 64}},
        "variants": {"start": {"method": "cospadi", "ratio": 0.3}},
    }


def is_end(place: tuple[str, ...], value: Any) -> bool:
    """Whether a value is an end of a range, where a model of four small layers may refuse what another would take."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def planned(config: Mapping[str, Any]) -> Plan:
    """A plan of which every function of the rules was asked."""
    plan = Plan(check_config(config), LLAMA)
    assert "expected in all" in table(needs(plan))
    for name, stage in plan.stages.items():
        for alike in stage.jobs_of(plan):
            assert plan.mem_mb(name)(alike.wildcards, attempt=1) > 0
            assert plan.runtime(name)(alike.wildcards, attempt=1, threads=plan.threads(name)) > 0
            if name in ("collect", "gram", "learn"):
                plan.group(name)(alike.wildcards)
            if name == "learn":
                assert len(plan.code(name)(alike.wildcards)) == 64
    parts = [plan.learning(variant) for variant in plan.factorized]
    json.dumps([*parts, plan.collection(), plan.pruning(), plan.windows(), plan.reported()])
    return plan


def test_every_value_of_every_option_of_a_variant_is_planned_and_one_of_each_dry_run(base, tmp_path):
    start, accepted, refused = base["variants"]["start"], {}, []
    for number, (place, value, settings) in enumerate(variants()):
        config = {**base, "variants": {"start": start, f"v{number}": settings}}
        try:
            planned(config)
        except ConfigError as error:
            refused.append(f"{place} {value!r}: {error}")
            assert is_end(place, value), refused[-1]
            assert all(f"variants.v{number}." in fault for fault in error.faults), refused[-1]
        else:
            accepted.setdefault(place, {})[f"v{number}"] = settings
    # the most that may be removed, as a ratio and in bits, is too much for some methods on matrices as small
    assert number > 250 and len(refused) < 2 * len(METHODS), refused
    # the last of every option's values: the other end, or the last word
    chosen = dict(list(settings.items())[-1] for settings in accepted.values())
    # all layers in a job: more jobs of a kind would say no more
    config = {**base, "layers_per_job": 4, "variants": {"start": start, **chosen}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result = snakemake(tmp_path)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    found = jobs(result.stdout + result.stderr)
    plan = planned(config)
    assert found["evaluate_model"] == len(chosen) + 1
    learned = {True: 0, False: 0}
    for variant in plan.factorized:
        learned[plan.learns_in_turn(variant)] += len(plan.units(variant))
    assert learned[True] > 0 and found["learn_in_turn"] == learned[True]
    assert found["learn_dictionary"] == learned[False]


def test_every_value_of_every_other_key_is_planned(base):
    refused, places = [], []
    for place, value, config in sections(base):
        places.append(place)
        try:
            planned(config)
        except ConfigError as error:
            refused.append(f"{place} {value!r}: {error}")
            assert is_end(place, value), refused[-1]
            assert all(place[-1] in fault for fault in error.faults), refused[-1]
    assert len(places) > 120 and len(refused) < 6, refused
