"""Plan: chunks, units, files, digests of code, resources."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from cospadi import digests as digests_module
from cospadi.config import check_config
from cospadi.digests import code_digest, files_digest
from cospadi.errors import ConfigError, CospadiError, UnsupportedModelError
from cospadi.files import TensorFile, read_json, write_json, write_tensors
from cospadi.formats.values import modules_of
from cospadi.methods.few_bits import stored_nbytes
from cospadi.outside import ALL, TOKENIZER, WEIGHTS, remember_fetched
from cospadi.plan import Plan, layers_of, one_of
from cospadi.resources import Shapes
from cospadi.runs import plan_of

PACKAGE = digests_module.PACKAGE
PROJECT = PACKAGE.parents[1]

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def make_plan(model=MODEL, *, rotate=None, **sections) -> Plan:
    config = {
        "run": "r",
        "model": {"name": "m", "source": "hub", "repo": "owner/m", "rotate": rotate},
        "calibration": {"source": "self"},
        "variants": {"a": {"method": "cospadi", "ratio": 0.2}, "b": {"method": "svd_llm", "ratio": 0.4}},
        "evaluation": {"perplexity": None},
        "device": "cpu",
    }
    return Plan(check_config({**config, **sections}), model)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(0, [(0, 29)]), (10, [(0, 9), (10, 19), (20, 29)]), (16, [(0, 15), (16, 29)]), (64, [(0, 29)])],
)
def test_chunks_cover_the_layers_in_order(blocks, expected):
    plan = make_plan(calibration={"source": "self", "blocks_per_job": blocks})
    assert [(chunk[0], chunk[-1]) for chunk in plan.chunks] == expected
    assert plan.hidden_before(0) == []
    for before, after in itertools.pairwise(expected):
        assert plan.hidden_before(after[0]) == [f"results/r/hidden/layers_{before[0]:02d}-{before[1]:02d}.h5"]


def test_activations_of_a_layer_are_those_of_its_chunk():
    plan = make_plan(calibration={"source": "self", "blocks_per_job": 16})
    assert plan.activations_of(15) == "results/r/activations/layers_00-15.h5"
    assert plan.activations_of(16) == "results/r/activations/layers_16-29.h5"


def test_projections_of_different_width_cannot_share():
    variants = {
        name: {"method": method, "ratio": 0.2, "share_within": [["up_proj", "gate_proj"], ["q_proj", "down_proj"]]}
        for name, method in (("a", "cospadi"), ("b", "svd_llm"))
    }
    with pytest.raises(ConfigError) as caught:
        make_plan(variants=variants)
    expected = "share_within: q_proj has 576 inputs, down_proj has 1536 inputs; those that share have the same number"
    assert caught.value.faults == [f"variants.a.{expected}", f"variants.b.{expected}"]


def test_a_job_may_take_several_layers_that_share_nothing():
    variants = {
        "alone": {"method": "svd_llm", "ratio": 0.2},
        "in_twos": {"method": "basis_sharing", "ratio": 0.2},
        "model": {"method": "masa", "ratio": 0.2},
    }
    plan = make_plan(variants=variants, layers_per_job=20)
    assert plan.units("alone") == ["layers_00-19", "layers_20-29"]
    assert plan.units("in_twos")[:2] == ["layers_00-01", "layers_02-03"]  # what shares is one job whatever is asked
    assert plan.units("model") == ["layers_00-29"]
    assert make_plan(variants=variants, layers_per_job=0).units("alone") == ["layers_00-29"]


def test_what_others_wait_for_starts_first_and_then_the_longest_units():
    settings = {"method": "cospadi", "ratio": 0.4}
    plan = make_plan(variants={"long": {**settings, "max_iter": 50}, "short": {**settings, "max_iter": 5}})
    wildcards = {name: SimpleNamespace(variant=name, unit=plan.units(name)[0]) for name in plan.variants}
    learn, chunk = plan.priority("learn"), SimpleNamespace(base="", first="0", last="14")
    order = [plan.priority("collect")(chunk), plan.priority("evaluate_dense")(None)]
    order += [learn(wildcards["long"]), learn(wildcards["short"]), plan.priority("quantize")(wildcards["short"])]
    assert sorted(order, reverse=True) == order and len(set(order)) == len(order)


def test_units_are_layers_or_groups_of_them():
    variants = {
        "one": {"method": "cospadi", "ratio": 0.2},
        "four": {"method": "cospadi", "ratio": 0.2, "group_size": 4, "share": ["q_proj"]},
    }
    plan = make_plan(variants=variants)
    assert plan.units("one")[:2] == ["layer_00", "layer_01"] and len(plan.units("one")) == 30
    assert plan.units("four")[0] == "layers_00-03" and plan.units("four")[-1] == "layers_28-29"
    for variant in variants:
        assert [layer for unit in plan.units(variant) for layer in layers_of(unit)] == list(range(30))
    assert plan.grams_of("layers_28-29") == ["results/r/gram/layer_28.h5", "results/r/gram/layer_29.h5"]
    assert len(plan.of_all_units("x/{variant}/{unit}.json")) == 30 + 8


def test_a_warm_start_waits_for_the_other_variants_layer():
    method = {"method": "cospadi", "ratio": 0.2}
    plan = make_plan(variants={"a": method, "b": {**method, "ratio": 0.4, "warm_start": "a"}})
    assert plan.warm_factors_of("b", "layer_03") == ["results/r/a/factors/layer_03.safetensors"]
    assert plan.warm_factors_of("a", "layer_03") == []


def test_more_than_a_hundred_layers():
    plan = make_plan({**MODEL, "num_hidden_layers": 126})
    assert layers_of(plan.units("a")[-1]) == [125]
    assert plan.units("a")[-1] == "layer_125"


def test_model_and_text_files():
    plan = make_plan()
    assert plan.model_of("dense") == "resources/models/m"
    assert plan.model_of("a") == "results/r/a/model"
    assert plan.text_file("calibration") == [] and plan.text_file("heldout") == []


def test_a_local_model_is_used_where_it_lies(tmp_path):
    local = {"name": "m", "source": "local", "path": str(tmp_path)}
    text = {"name": "t", "source": "hub", "dataset": "d"}
    config = {"run": "r", "model": local, "text": text, "variants": {"a": {"method": "svd_llm", "ratio": 0.2}}}
    plan = Plan(check_config(config), MODEL)
    assert plan.model_of("dense") == str(tmp_path)
    assert plan.text_file("calibration") == ["resources/text/t/calibration.jsonl"]
    assert plan.text_file("heldout") == ["resources/text/t/heldout.jsonl"]


def test_unsupported_architecture_is_refused():
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM"):
        make_plan({**MODEL, "architectures": ["BloomForCausalLM"]})


def test_rounding_is_no_part_of_learning_but_bits_are():
    codes = {"value_bits": 14, "rounding": "truncate"}
    plan = make_plan(variants={"a": {"method": "cospadi", "ratio": 0.2, "codes": codes}})
    assert plan.learning("a")["codes"]["value_bits"] == 14
    assert "rounding" not in plan.learning("a")["codes"]
    assert plan.learning("a")["solver"] == "htp"


# --- blocks removed --------------------------------------------------------------------------------------------------

PRUNED = {
    "both": {"steps": [{"method": "replaceme", "blocks": 4}, {"method": "cospadi", "ratio": 0.2}]},
    "again": {"steps": [{"method": "replaceme", "blocks": 4}, {"method": "svd_llm", "ratio": 0.2}]},
    "other": {"steps": [{"method": "uidl", "blocks": [3, 7]}, {"method": "cospadi", "ratio": 0.2, "group_size": 4}]},
    "plain": {"method": "cospadi", "ratio": 0.2},
}


def test_variants_are_learned_from_the_base_their_first_step_makes():
    plan = make_plan(variants=PRUNED)
    assert plan.factorized == list(PRUNED) and plan.pruned == []
    # equal first steps are made once
    assert [plan.base_of(name) for name in PRUNED] == ["both/pruned/", "both/pruned/", "other/pruned/", ""]
    assert list(plan.pruned_bases) == ["both/pruned/", "other/pruned/"]
    assert plan.fits("both/pruned/") and not plan.fits("other/pruned/")
    assert plan.base_model("both/pruned/") == "results/r/both/pruned/model"
    assert plan.base_model("") == plan.model_of("dense") and plan.model_of("both") == "results/r/both/model"
    assert plan.grams_of("layer_03", "both/pruned/") == ["results/r/both/pruned/gram/layer_03.h5"]
    assert len(plan.units("both")) == 26 and len(plan.units("plain")) == 30
    assert plan.units("other")[-1] == "layers_24-27"
    assert plan.learning("both")["method"] == "cospadi" and "steps" not in plan.learning("both")


def test_a_variant_that_only_loses_blocks_is_the_base_of_those_that_go_on_from_it():
    plan = make_plan(variants={**PRUNED, "cut": {"method": "replaceme", "blocks": 4}})
    assert plan.pruned == ["cut"]
    assert [plan.base_of(name) for name in (*PRUNED, "cut")] == ["cut/", "cut/", "other/pruned/", "", "cut/"]
    assert plan.base_model("cut/") == plan.model_of("cut") == "results/r/cut/model"
    assert plan.units("cut") == [] and len(plan.of_all_units("{variant}{unit}")) == 26 + 26 + 7 + 30
    assert plan.pruning_files("results/r/{base}x") == {
        "both": "results/r/cut/x",
        "again": "results/r/cut/x",
        "other": "results/r/other/pruned/x",
        "cut": "results/r/cut/x",
    }


def test_chunks_of_a_pruned_model_end_where_it_ends():
    plan = make_plan(variants=PRUNED, calibration={"source": "self", "blocks_per_job": 10})
    base = "both/pruned/"
    assert [(chunk[0], chunk[-1]) for chunk in plan.chunks_of(base)] == [(0, 9), (10, 19), (20, 25)]
    assert plan.hidden_before(20, base) == ["results/r/both/pruned/hidden/layers_10-19.h5"]
    assert plan.activations_of(25, base) == "results/r/both/pruned/activations/layers_20-25.h5"


def test_more_blocks_than_there_are_cannot_go():
    variants = {
        "all": {"method": "uidl", "blocks": 30},
        "far": {"method": "replaceme", "blocks": [29, 30]},
        "ok": {"method": "shortgpt", "blocks": 29},
    }
    with pytest.raises(ConfigError) as caught:
        make_plan(variants=variants)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["variants.all.blocks", "variants.far.blocks"]
    assert "30; the model has 30 blocks" in caught.value.faults[0]


def test_a_family_that_cannot_be_folded_into_is_refused_before_any_work():
    gemma = {**MODEL, "architectures": ["Gemma3ForCausalLM"]}
    with pytest.raises(ConfigError) as caught:
        make_plan(
            gemma,
            variants={
                "cut": {"method": "replaceme", "blocks": 4},
                "far": {"method": "uidl", "blocks": 99},
                "turn": {"method": "wanda", "ratio": 0.2, "target": "sequential", "residual_share": 0.5},
                "well": {"method": "wanda", "ratio": 0.2, "target": "sequential"},
            },
        )
    fold, far, repaid = caught.value.faults
    assert repaid.startswith("variants.turn.residual_share: 0.5; Gemma3ForCausalLM has a norm between")
    with pytest.raises(ConfigError, match=r"model\.rotate: 0; Gemma3ForCausalLM is no family whose norms"):
        make_plan(gemma, rotate=0)
    assert re.match(r"variants.cut: .*Gemma3ForCausalLM has a norm behind it", fold)
    assert far == "variants.far.blocks: 99; the model has 30 blocks"
    assert make_plan(gemma, variants={"cut": {"method": "uidl", "blocks": 4}}).pruned == ["cut"]


@pytest.mark.parametrize(
    ("names", "matched", "refused"),
    [
        (["a", "b.c"], ["a", "b.c"], ["", "bxc", "ab", "a|b.c"]),
        (["", "pruned/"], ["", "pruned/"], ["x", "pruned"]),
        ([""], [""], ["x"]),
        ([], [], ["", "x"]),
    ],
)
def test_one_of_matches_these_names_alone(names, matched, refused):
    assert one_of(names)  # Snakemake takes an empty constraint for "anything"
    assert all(re.fullmatch(one_of(names), name) for name in matched)
    assert not any(re.fullmatch(one_of(names), name) for name in refused)


# --- digests ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that may be edited."""
    copy = tmp_path / "cospadi"
    shutil.copytree(digests_module.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(digests_module, "PACKAGE", copy)
    forget()
    yield copy
    forget()


def forget():
    code_digest.cache_clear()
    digests_module._read.cache_clear()


def edit(path):
    with open(path, "a") as file:
        file.write("\nedited = True\n")
    forget()


def digests(plan, each=("learn",)) -> dict[str, str]:
    """Digests of all stages; of those in `each`, of every variant."""
    first = plan.factorized[0]
    parting = ("profile", "allocate")  # of the variants that have these stages
    stages = [stage for stage in plan.stages if stage not in (*each, *parting, "in_turn")]
    found = {stage: plan.code(stage)(SimpleNamespace(variant=first)) for stage in stages}
    for stage in (*each, *parting):
        for name in filter(plan.allocates, plan.factorized) if stage in parting else plan.factorized:
            key = name if stage == "learn" else f"{stage} {name}"
            found[key] = plan.code(stage)(SimpleNamespace(variant=name))
    for name in filter(plan.learns_in_turn, plan.factorized):
        found[name] = plan.code("in_turn")(SimpleNamespace(variant=name))
    return found


METHODS_AND_SOLVERS = {
    "htp": {"method": "cospadi", "ratio": 0.2},
    "ksvd": {"method": "cospadi", "ratio": 0.2, "solver": "ksvd"},
    "exact": {"method": "cospadi", "ratio": 0.2, "group_size": 2, "share": ["q_proj"], "group_metric": "exact"},
    "svd": {"method": "svd_llm", "ratio": 0.2},
    "v2": {"method": "svd_llm_v2", "ratio": 0.2},
    "turn": {"method": "svd_llm", "ratio": 0.2, "target": "sequential"},
}
PARTED = {"v2", "profile v2", "allocate v2"}


def test_layers_and_units_that_are_not_there_are_told():
    plan = make_plan(variants={"turn": METHODS_AND_SOLVERS["turn"]})
    with pytest.raises(CospadiError, match=r"^layer 99 is not there; the model has layers 0 to \d+"):
        plan.activations_of(99)
    with pytest.raises(CospadiError, match=r"^layers_03-77: turn is learned in turn, in layers?_00"):
        plan.streams_before("turn", "layers_03-77")


def test_comments_docstrings_and_layout_are_no_code(package):
    plan = make_plan(variants=METHODS_AND_SOLVERS)
    before = digests(plan)
    for path in package.rglob("*.py"):
        text = path.read_text()
        tree = ast.parse(text)
        # ast.unparse writes no comments, and its own quotes, brackets and line breaks
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body[0].value.value = "Other words."
        path.write_text(f"# edited\n{ast.unparse(tree)}\n")
    forget()
    assert digests(plan) == before
    # a string that is no docstring is code
    with open(package / "gram.py", "a") as file:
        file.write("\ndef f():\n    return 'words'\n")
    forget()
    assert digests(plan)["gram"] != before["gram"]


def test_a_module_that_is_moved_into_another_place_of_the_file_system_is_the_same(package):
    plan = make_plan(variants=METHODS_AND_SOLVERS)
    copied = digests(plan)
    digests_module.PACKAGE = PACKAGE
    forget()
    assert digests(plan) == copied


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("solvers/htp.py", {"htp", "exact"}),
        ("solvers/ksvd.py", {"ksvd"}),
        ("solvers/multi_metric.py", {"exact"}),
        ("solvers/svd.py", {"svd", "turn"} | PARTED),
        ("methods/svd_llm.py", {"svd", "turn"} | PARTED),
        ("methods/svd_llm_v2.py", PARTED),
        # uniform variants read no allocation
        ("profiles.py", PARTED),
        # the registries: a line more changes nothing that was there
        ("methods/__init__.py", set()),
        ("solvers/__init__.py", set()),
        ("sources/__init__.py", set()),
        ("pruning/__init__.py", set()),
        ("sequence.py", {"turn"}),
        ("refinement.py", {"turn"}),
        ("compensation.py", {"turn"}),
        ("student.py", {"turn", "distill"}),
        ("distillation.py", {"distill"}),
        ("factor_training.py", {"turn", "distill"}),
        ("quantization.py", {"quantize", "turn"}),
        ("calibration/collect.py", {"collect", "gram", "gradients", "turn"}),
        ("calibration/head.py", {"head"}),
        ("calibration/gradients.py", {"gradients"}),
        (
            "calibration/walk.py",
            {"collect", "gram", "gradients", "head", "distances", "fit", "drift", "turn", "distill"},
        ),
        ("pruning/edit.py", {"fit", "prune"}),
        ("evaluation/scoring.py", {"evaluate_dense", "evaluate"}),
        ("evaluation/task_files/last_word.yaml", {"evaluate_dense", "evaluate"}),
        # what travels in a checkpoint: the dense model is not evaluated again, packed ones are assembled and then are
        ("runtime/modeling_cospadi.py", {"assemble"}),
        ("runtime/cospadi_cuda_kernels.py", {"assemble"}),
        ("report/plots.py", {"summarize", "plot_distances"}),
    ],
)
def test_an_edit_changes_the_digests_of_the_stages_that_use_the_file(package, file, changed):
    plan = make_plan(variants=METHODS_AND_SOLVERS)
    before = digests(plan)
    edit(package / file)
    after = digests(plan)
    assert {stage for stage in before if before[stage] != after[stage]} == changed


def test_a_format_more_changes_nothing_and_an_edited_one_what_uses_it(package):
    method = {"method": "svd_llm", "ratio": 0.2}
    variants = {"plain": method} | {f"bits{bits}": {**method, "codes": {"value_bits": bits}} for bits in (14, 8)}
    variants["dictionary8"] = {**method, "codes": {"dictionary_bits": 8}}
    plan, each = make_plan(variants=variants), ("learn", "quantize")
    before = digests(plan, each)

    def changed():
        forget()
        after = digests(plan, each)
        return {key for key in before if key.removeprefix("quantize ") in variants and before[key] != after[key]}

    registry = package / "runtime/cospadi_registry.py"
    text = registry.read_text()
    more = text.replace("        Bf14(),\n", "        Bf14(),\n        Bf12(),\n").replace(
        "        Dense(),\n", "        Dense(),\n        Runs(),\n"
    )
    assert more.count("()") == text.count("()") + 2
    registry.write_text(f"from .cospadi_more import Bf12, Runs\n{more}")
    (package / "runtime/cospadi_more.py").write_text("class Bf12:\n    pass\n\n\nclass Runs:\n    pass\n")
    assert not changed()
    assert plan.code("assemble")(SimpleNamespace(variant="plain")) != before["assemble"]  # all of the runtime travels

    for file, users in (
        ("cospadi_bf14", {"bits14"}),
        ("cospadi_integers", {"bits8", "dictionary8"}),
        ("cospadi_supports", set(variants)),
    ):
        path = package / f"runtime/{file}.py"
        text = path.read_text()
        path.write_text(f"{text}\nedited = True\n")
        assert changed() == users | {f"quantize {name}" for name in users}, file
        path.write_text(text)


def test_a_variant_names_the_modules_of_its_formats():
    """An option that names a support, whatever the option is called."""
    built_in = ["cospadi.runtime.cospadi_supports", "cospadi.runtime.cospadi_values"]
    assert modules_of({"support": "bitmask", "codes": {}}) == built_in
    assert modules_of({"pattern": "2:4", "codes": {"value_bits": 14}}) == ["cospadi.runtime.cospadi_bf14", *built_in]
    assert modules_of({"codes": {"dictionary_bits": 4}}) == ["cospadi.runtime.cospadi_integers", *built_in]


def test_imports_are_found_wherever_they_stand(package):
    (package / "one.py").write_text("def f():\n    from cospadi import two\n")
    (package / "two.py").write_text("from .pack import three\nimport os\n")
    (package / "pack").mkdir()
    (package / "pack" / "__init__.py").write_text("")
    (package / "pack" / "three.py").write_text("from . import four\n")
    (package / "pack" / "four.py").write_text("import cospadi.five\n")
    (package / "five.py").write_text("")
    (package / "six.py").write_text("")
    before = code_digest("cospadi.one")
    for name, reached in (("two", True), ("pack/three", True), ("pack/four", True), ("five", True), ("six", False)):
        edit(package / f"{name}.py")
        after = code_digest("cospadi.one")
        assert (after != before) == reached, name
        before = after


@pytest.fixture
def folder(tmp_path):
    """A folder with a small file and one that counts as large."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(100))
    return path


def test_large_files_count_with_size_time_and_their_first_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(digests_module, "_HASHED_WHOLE", 50)
    monkeypatch.setattr(digests_module, "_PART", 10)
    large, files = folder / "model.safetensors", sorted(folder.iterdir())
    before = files_digest(files, folder)
    times = large.stat().st_mtime_ns
    assert files_digest(files, folder) == before == files_digest(reversed(files), folder)
    moved = shutil.copytree(folder, tmp_path / "moved")  # a copy keeps the times
    assert files_digest(moved.iterdir(), moved) == before
    os.utime(folder / "config.json")
    assert files_digest(files, folder) == before
    seen = {before}
    for edit in (
        lambda: os.utime(large, ns=(times, times + 1)),
        lambda: large.write_bytes(bytes(101)),
        lambda: large.write_bytes(b"x" + bytes(100)) and os.utime(large, ns=(times, times)),
        lambda: (folder / "config.json").write_text("[]"),
        lambda: large.unlink(),
    ):
        edit()
        digests_module._content.cache_clear()
        digest = files_digest(files, folder)
        assert digest not in seen
        seen.add(digest)


def test_what_a_fetched_model_was_planned_for_is_shapes_and_arithmetic():
    planned = make_plan().planned_digest()
    assert make_plan({**MODEL, "use_cache": False, "_name_or_path": "x"}).planned_digest() == planned
    assert make_plan({**MODEL, "rope_theta": 1e6}).planned_digest() != planned


def test_a_fetched_model_counts_once_it_is_edited(local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_plan().model_digest(WEIGHTS, TOKENIZER) == [None, None]  # not there yet
    folder = shutil.copytree(local, tmp_path / "resources/models/m")
    remember_fetched("resources/models/m")
    assert make_plan().model_digest(WEIGHTS, TOKENIZER, ALL) == [None, None, None]
    (folder / "tokenizer.json").write_text("[]")
    digests_module._content.cache_clear()
    weights, tokenizer, whole = make_plan().model_digest(WEIGHTS, TOKENIZER, ALL)
    assert weights is None and tokenizer is not None and whole is not None
    assert make_plan().model_digest(WEIGHTS, base="a/pruned/") == [None]  # a rule makes it of the other


def test_the_users_tasks_count_with_all_their_files(tmp_path):
    assert make_plan().tasks_digest() is None
    (tmp_path / "tasks/deeper").mkdir(parents=True)
    (tmp_path / "tasks/mine.yaml").write_text("task: mine")
    evaluation = {"perplexity": None, "task_path": str(tmp_path / "tasks")}
    before = make_plan(evaluation=evaluation).tasks_digest()
    (tmp_path / "tasks/deeper/helper.py").write_text("def f(): pass")
    digests_module._content.cache_clear()
    assert make_plan(evaluation=evaluation).tasks_digest() != before


# --- faults of a local model -----------------------------------------------------------------------------------------

SMALL = {
    **MODEL,
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}


@pytest.fixture
def local(tmp_path):
    """A local model in two shards, and its tensors."""
    shapes = {"embed_tokens": (10, 8)} | {
        f"layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (12, 8),
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
        }.items()
    }
    names = {f"model.{name}.weight": shape for name, shape in shapes.items()}
    shards = {"a.safetensors": list(names)[:8], "b.safetensors": list(names)[8:]}
    for shard, members in shards.items():
        write_tensors(tmp_path / shard, {name: np.zeros(names[name], np.float32) for name in members})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    write_json(tmp_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(tmp_path / "config.json", SMALL)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def local_faults(folder, **sections) -> list[str]:
    model = {"name": "m", "source": "local", "path": str(folder)}
    config = {"run": "r", "model": model, "calibration": {"source": "self", "length": 16}}
    config |= {"variants": {"a": {"method": "svd_llm", "ratio": 0.2}}, "evaluation": {"perplexity": None}} | sections
    try:
        Plan(check_config(config))
    except ConfigError as error:
        return error.faults
    return []


def test_a_whole_local_model_has_no_faults(local):
    assert local_faults(local) == []


def test_conversations_without_a_template_are_refused_before_any_work(local):
    (local / "chats.jsonl").touch()
    chat = {"source": "chat", "path": str(local / "chats.jsonl")}
    for text in (chat, {"source": "mixture", "sources": [chat, chat]}):
        (fault,) = local_faults(local, text={"name": "t", **text})
        assert fault.startswith(f"text: conversations, but {local} has no chat template (chat_template.jinja). Take")
    (local / "tokenizer_config.json").write_text("[]")
    (fault,) = local_faults(local, text={"name": "t", **chat})
    assert fault.startswith(f"model.path: {local}/tokenizer_config.json: holds a list")
    (local / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert local_faults(local, text={"name": "t", **chat}) == []


def test_all_that_a_local_model_lacks_is_found_when_planning(local):
    write_json(local / "config.json", {**SMALL, "max_position_embeddings": 12})
    content = (local / "b.safetensors").read_bytes()
    (local / "b.safetensors").write_bytes(content[:-1])
    (local / "tokenizer.json").unlink()
    names = [name for name in TensorFile(local / "a.safetensors").names() if "embed" not in name]
    write_tensors(
        local / "a.safetensors", {name: np.zeros((8, 9) if "q_proj" in name else (1, 1), np.float32) for name in names}
    )
    faults = local_faults(local, variants={"a": {"method": "uidl", "blocks": 2}})
    assert faults[:2] == [
        "variants.a.blocks: 2; the model has 2 blocks",
        "calibration.length: 16; the model has 12 positions (max_position_embeddings)",
    ]
    assert faults[2].startswith(f"model.path: {local}/b.safetensors: not a complete safetensors file")
    assert faults[3] == f"model.path: {local}: lacks tensor model.embed_tokens.weight. Fetch the model again"
    assert "a.safetensors: tensor model.layers.0.self_attn.q_proj.weight has shape (8, 9), expected (8, 8)" in faults[4]
    assert (
        faults[-1]
        == f"model.path: {local}: holds no tokenizer (tokenizer.json, tokenizer.model, tekken.json, vocab.json)"
    )


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "b.safetensors").unlink(), "b.safetensors: the file does not exist"),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "model.safetensors: the file does not exist",
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json: not valid JSON"),
        (
            lambda folder: write_json(folder / "config.json", {**SMALL, "num_hidden_layers": 3}),
            "lacks tensors model.layers.2",
        ),
        (
            lambda folder: write_json(folder / "config.json", {**SMALL, "num_hidden_layers": 3}),
            "v_proj.weight and 4 more",
        ),
    ],
)
def test_each_fault_of_a_local_model_names_its_file(local, damage, expected):
    damage(local)
    faults = local_faults(local)
    assert any(fault.startswith("model.path: ") and expected in fault for fault in faults), faults


def test_windows_longer_than_the_models_positions_are_refused_together():
    evaluation = {"perplexity": {"window": 300}}
    text = {"name": "t", "source": "hub", "dataset": "d"}
    with pytest.raises(ConfigError) as caught:
        make_plan(
            {**MODEL, "max_position_embeddings": 256},
            calibration={"source": "self", "length": 257},
            evaluation=evaluation,
            text=text,
        )
    positions = "the model has 256 positions (max_position_embeddings)"
    assert caught.value.faults == [
        f"calibration.length: 257; {positions}",
        f"evaluation.perplexity.window: 300; {positions}",
    ]
    nested = {**MODEL, "text_config": {"max_position_embeddings": 300}}
    make_plan(nested, calibration={"source": "self", "length": 257}, evaluation=evaluation, text=text)


def test_a_budget_leaves_what_all_else_does_not_take():
    """Dense bytes of the targets are 2 x 30 x 3,538,944; embeddings, norms and names come first."""
    others = 2 * (49152 * 576 + 576 + 30 * (4 * 576 + 2 * 64)) + 30 * 7 * 1000
    dense = 2 * 30 * (2 * 576 * (576 + 192) + 3 * 576 * 1536)
    variants = {
        "whole": {"method": "ectcq", "budget": "96.5 MB"},
        "few": {"method": "rtn", "budget": "0.2GiB", "targets": ["up_proj", "down_proj"]},
        "fewer": {"steps": [{"method": "uidl", "blocks": 10}, {"method": "svd_llm", "budget": "150MB"}]},
    }
    found = make_plan(variants=variants).config["variants"]
    assert found["whole"]["ratio"] == pytest.approx(1 - (96_500_000 - others) / dense)
    some = 2 * 30 * 2 * 576 * 1536
    assert found["few"]["ratio"] == pytest.approx(1 - (0.2 * 2**30 - others - (dense - some)) / some)
    fewer = others - 10 * (2 * (4 * 576 + 2 * 64) + 7 * 1000)
    assert found["fewer"]["steps"][1]["ratio"] == pytest.approx(1 - (150e6 - fewer) / (dense * 2 / 3))
    rounded = {name: {"method": "ectcq", "budget": "96.5 MB", "embedding_bits": int(name)} for name in ("8", "4")}
    given = make_plan(variants=rounded).config["variants"]
    for bits in (8, 4):  # a scale for 64 numbers is a quarter of a bit
        saved = 49152 * 576 * (16 - bits - 0.25) / 8
        assert given[str(bits)]["ratio"] == pytest.approx(1 - (96_500_000 - others + saved) / dense)
    coded = {"method": "ectcq", "budget": "96.5 MB", "embedding_bits": 3.5, "embedding_method": "ectcq"}
    saved = 49152 * 576 * (16 - 3.5) / 8
    given = make_plan(variants={"coded": coded}).config["variants"]["coded"]
    assert given["ratio"] == pytest.approx(1 - (96_500_000 - others + saved) / dense)
    plain = make_plan(variants={"a": {"method": "svd_llm", "ratio": 0.4}}).config["variants"]["a"]
    assert not {"embedding_bits", "embedding_method"} & plain.keys()
    assert "budget" not in {**plain, **found["whole"]}
    with pytest.raises(ConfigError) as caught:
        make_plan(variants={"a": {"method": "rtn", "budget": "56MB"}, "b": {"method": "rtn", "budget": "1GB"}})
    limits = f"from {(others + 0.05 * dense) / 1e6:.4g}MB to {(others + 0.99 * dense) / 1e6:.4g}MB"
    assert [fault.partition(", of which")[0] for fault in caught.value.faults] == [
        f"variants.a.budget: 56MB; {limits}",
        f"variants.b.budget: 1GB; {limits}",
    ]


def test_a_budget_of_a_gpu_leaves_what_is_in_its_memory_besides():
    matrices = 30 * (2 * 576 * (576 + 192) + 3 * 576 * 1536)
    dense, others = 2 * matrices, 2 * (49152 * 576 + 576 + 30 * (4 * 576 + 2 * 64)) + 30 * 7 * 1000
    cache = 2 * 2 * 30 * 192  # of a token: keys and values of 3 heads of 64
    plan = make_plan(
        variants={
            "a": {"method": "trellis", "budget": "0.26GB on the GPU"},
            "b": {"method": "trellis", "budget": "320MB on the GPU with 8192 tokens"},
            "c": {"method": "ectcq", "budget": "450MB on the GPU with 1000 tokens"},
        }
    )
    found = plan.config["variants"]
    assert found["a"]["ratio"] == pytest.approx(1 - (260e6 - others - 4096 * cache) / dense)
    assert found["b"]["ratio"] == pytest.approx(1 - (320e6 - others - 8192 * cache) / dense)
    # a stream stays beside what it is decoded to
    assert found["c"]["ratio"] == pytest.approx(1 - (450e6 - others - 1000 * cache - dense) / dense)
    coded = {"method": "trellis", "embedding_bits": 3, "embedding_method": "ectcq", "budget": "0.26GB on the GPU"}
    plan_of_coded = make_plan(variants={"a": coded})
    saved = 49152 * 576 * (16 - 3) / 8 - 49152 * 576 * 2  # and decoded beside
    expected = 1 - (260e6 - others + saved - 4096 * cache) / dense
    assert plan_of_coded.config["variants"]["a"]["ratio"] == pytest.approx(expected)
    rounded = {"method": "trellis", "embedding_bits": 8, "budget": "0.26GB on the GPU"}  # stays as it is stored
    saved = 49152 * 576 * (16 - 8.25) / 8
    expected = 1 - (260e6 - others + saved - 4096 * cache) / dense
    assert make_plan(variants={"a": rounded}).config["variants"]["a"]["ratio"] == pytest.approx(expected)
    assert plan.told[1].startswith("variants.b.budget: 320MB on the GPU with 8192 tokens: 56.98MB embeddings")
    assert plan.told[1].endswith(f"(ratio {found['b']['ratio']:.4g})")
    gradients = {"metric": "gradients", "ratio": 0.8}
    variants = {
        "a": {"method": "ectcq", "budget": "200MB on the GPU"},
        "rtn": {"method": "rtn", **gradients},
        "ec": {"method": "ectcq", **gradients},
        "b": {"method": "choose", "choose_from": ["rtn", "ec"], "budget": "200MB on the GPU"},
    }
    with pytest.raises(ConfigError) as caught:
        make_plan(variants=variants)
    first, second = caught.value.faults
    assert (
        first.startswith("variants.a.budget: 200MB on the GPU; from") and "212.3MB what matrices of ectcq are" in first
    )
    assert second.startswith("variants.b.budget: 200MB on the GPU; matrices of ectcq are decoded")


LAYER, MLP = "model.layers.0", ("gate_proj", "up_proj", "down_proj")
TABLE = {f"{LAYER}.self_attn.{name}_proj": 30_000 for name in "qkvo"} | {
    f"{LAYER}.mlp.gate_proj + {LAYER}.mlp.up_proj": 80_000,
    f"{LAYER}.mlp.down_proj": "dense",
}


def faults_of_table(folder, lines, **settings) -> list[str]:
    """What a plan says of a table of the bytes of a model of one layer, 64 wide, 512 in its MLP."""
    path = folder / "mine.tsv"
    path.write_text("\n".join(["\t".join(line) for line in lines]) + "\n")
    asked = {"method": "hybrid", "ratio": 0.2, "share_within": [["gate_proj", "up_proj"]], **settings}
    model = {**MODEL, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 1}
    model["num_key_value_heads"] = 1
    try:
        make_plan(model, variants={"a": {**asked, "allocation": "file", "allocation_file": str(path)}})
    except ConfigError as error:
        prefix = f"variants.a.allocation_file: {path}: "
        assert all(fault.startswith(prefix) for fault in error.faults), error
        return [fault.removeprefix(prefix) for fault in error.faults]
    return []


def table_of(changes=(), *, columns=("matrices", "bytes")) -> list[tuple[str, ...]]:
    rows = {**TABLE, **{f"{LAYER}.self_attn.{name}_proj": 7000 for name in "qkvo"}, **dict(changes)}
    return [columns, *((names, str(nbytes)) for names, nbytes in rows.items() if nbytes is not None)]


def test_a_table_of_bytes_is_checked_before_any_work(tmp_path):
    q, down = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"
    gate, up = f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"
    assert faults_of_table(tmp_path, table_of()) == []
    columns = "has no column bytes; its columns are matrices, nbytes"
    assert faults_of_table(tmp_path, table_of(columns=("matrices", "nbytes"))) == [columns]
    wrong = "line 2: bytes are '7e3'; a whole number from 1 on, or dense"
    assert faults_of_table(tmp_path, table_of({q: "7e3"})) == [wrong]
    assert faults_of_table(tmp_path, [*table_of(), (q, "7000")]) == [f"line 8: {q} stands in line 2 too"]
    (fault,) = faults_of_table(tmp_path, table_of({q: None}))
    assert fault == f"says nothing of 1 of 6 problems ({q})"
    # all that is wrong, in one message: bytes in all, of one matrix, too many, too few; names
    rows = table_of({q: 9000, down: 3, f"{gate} + {up}": None, gate: 100_000, "model.layers.1.mlp.up_proj": 5})
    found = faults_of_table(tmp_path, rows)
    assert f"line 2: 9000 bytes for {q}, which takes 8192 as it is; write dense" in found
    assert any(
        fault.startswith(f"line 6: {down}: ") and "leaves 3 bytes for a 512x64 matrix" in fault for fault in found
    )
    assert f"line 7: {gate} shares its bytes: {gate} + {up}" in found
    assert "line 8: model.layers.1.mlp.up_proj is no matrix of a" in found
    assert any(fault.startswith("says nothing of 1 of 6 problems") for fault in found)
    (fault,) = faults_of_table(tmp_path, table_of({f"{gate} + {up}": 131_000}))
    # 4 x 7000 + 131,000 + 2 x 512 x 64 of 0.8 x 2 x (4 x 64^2 + 3 x 64 x 512)
    assert fault == "gives 224536 bytes, 41036 more than the 183500 that ratio 0.2 leaves; ratio 0.0211 leaves as many"


def test_a_table_of_just_the_bytes_that_a_method_takes_is_enough(tmp_path):
    path = tmp_path / "mine.tsv"
    asked = {"method": "rtn", "ratio": 0.8, "allocation": "file", "allocation_file": str(path)}
    for width in range(64, 320, 16):
        model = {**MODEL, "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1}
        model |= {"num_attention_heads": 1, "num_key_value_heads": 1}
        # two bits a weight and a scale for 64, the least, as a menu writes it and a person feeds it back
        sizes = {name: stored_nbytes(shape, "int2", 64) for name, shape in Shapes(model).matrices.items()}
        rows = {f"{LAYER}.{'mlp' if name in MLP else 'self_attn'}.{name}": nbytes for name, nbytes in sizes.items()}

        def planned(rows: dict[str, int], model=model) -> None:
            path.write_text("".join(f"{name}\t{nbytes}\n" for name, nbytes in {"matrices": "bytes", **rows}.items()))
            make_plan(model, variants={"a": asked})

        planned(rows)
        with pytest.raises(ConfigError, match="2 bits a weight and their scales take"):
            planned({**rows, f"{LAYER}.self_attn.q_proj": sizes["q_proj"] - 1})


def test_a_menu_that_the_ratio_cannot_pay_for_is_refused_before_any_work():
    menu = {"method": "rtn", "ratio": 0.8, "metric": "gradients"}
    make_plan(variants={"a": {**menu, "allocation": "menu", "menu": [0.9, 2.0]}})
    for allocation, sizes in (("menu", [1.2, 2.0]), ("measured", [0.5, 1.5])):  # half of it is too little for any
        with pytest.raises(ConfigError) as caught:
            make_plan(variants={"a": {**menu, "allocation": allocation, "menu": sizes}})
        (fault,) = caught.value.faults
        assert fault.startswith(f"variants.a.menu: {sizes}; the matrices take ") and "bytes at least" in fault


def test_more_metrics_than_a_sylvester_equation_has_are_refused_before_any_work():
    pair, inputs = {"method": "geopair", "ratio": 0.3}, ["q_proj", "k_proj", "v_proj"]
    make_plan(variants={"a": {**pair, "share_within": [inputs, ["gate_proj", "up_proj"]]}})  # a metric a layer
    alone = {**pair, "metric": "gradients", "group_size": 1, "share": []}  # a metric a matrix
    make_plan(variants={"a": {**alone, "share_within": [["gate_proj", "up_proj"]]}})
    with pytest.raises(
        ConfigError,
        match=r"variants\.a\.share_within: q_proj, k_proj, v_proj have 3 metrics with metric gradients; .* two",
    ):
        make_plan(variants={"a": {**alone, "share_within": [inputs]}})


def test_the_scales_of_entropy_coded_columns_are_counted_before_any_work():
    model = {**MODEL, "hidden_size": 40, "intermediate_size": 92, "num_attention_heads": 4, "num_key_value_heads": 2}
    coded = {"method": "ectcq", "ratio": 0.9}
    make_plan(model, variants={"a": coded, "b": {**coded, "metric": "gradients", "column_power": 0}})
    with pytest.raises(
        ConfigError, match=r"variants\.a\.ratio: 0\.9 leaves 119 bytes for a 40x20 matrix: 150 is the least"
    ):
        make_plan(model, variants={"a": {**coded, "metric": "gradients"}})


def test_a_model_in_float32_has_as_many_bytes():
    half, whole = (make_plan({**MODEL, "dtype": dtype}).final_nbytes("dense") for dtype in ("bfloat16", "float32"))
    assert half == pytest.approx(269060552, rel=0.005) and whole == pytest.approx(2 * half, rel=0.005)


# --- resources -------------------------------------------------------------------------------------------------------


def test_resources_grow_with_shapes_and_attempts():
    big = {**MODEL, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32}
    small_plan, big_plan = make_plan(), make_plan(big)
    wildcards = SimpleNamespace(first="00", last="09", layer="03", unit="layer_03", variant="a", name="a", base="")
    for stage in ("fetch", "prepare", "collect", "prune", "gram", "learn", "quantize", "assemble", "evaluate"):
        small, large = small_plan.mem_mb(stage)(wildcards, attempt=1), big_plan.mem_mb(stage)(wildcards, attempt=1)
        assert 400 < small < large or stage == "fetch"
        assert small_plan.mem_mb(stage)(wildcards, attempt=2) == 2 * small
        minutes = small_plan.runtime(stage)(wildcards, attempt=1, threads=1)
        assert 5 < minutes < 24 * 60
        assert small_plan.runtime(stage)(wildcards, attempt=3, threads=1) == 3 * minutes
    # a layer of an 8B model: 218 million weights in float32 and Grams of 3 x 4096^2 + 14336^2 in float64
    assert 5_000 < big_plan.mem_mb("learn")(wildcards, attempt=1) < 16_000


def test_more_threads_take_less_time():
    wildcards = SimpleNamespace(variant="a", unit="layer_03")
    runtime = make_plan({**MODEL, "hidden_size": 8192, "intermediate_size": 28672}).runtime("learn")
    assert runtime(wildcards, attempt=1, threads=8) < runtime(wildcards, attempt=1, threads=1) / 4


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    "file", ["config.yaml", *sorted(str(p.relative_to(PROJECT)) for p in PROJECT.glob("config/*.yaml"))]
)
def test_the_configs_that_come_with_the_project_fit_the_shapes_of_their_models(file, monkeypatch):
    """Sizes that a matrix of the model is too small for, say, are found when planning."""
    monkeypatch.chdir(PROJECT)
    base, config = (yaml.safe_load((PROJECT / name).read_text()) for name in ("config.yaml", file))
    name = {**base, **config}["model"]["name"]
    shapes = {path.stem: read_json(path) for path in PROJECT.glob("config/models/*.json")} | {"Qwen3-8B-Base": QWEN3_8B}
    plan = plan_of(file, {"device": "cpu"}, shapes[name.removesuffix("-rotated")])
    assert plan.results == f"results/{config['run']}"
