"""A codec and a support from outside: a file and a line each, and they go from the config to a loaded model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .conftest import Run, copy_project, tiny_config

HERE = Path(__file__).parent
REGISTRY = "workflow/cospadi/runtime/cospadi_registry.py"
FORMATS = {
    "toy_codec.py": ("cospadi_pow2", "PowersOfTwo", "        Bf14(),\n"),
    "toy_support.py": ("cospadi_quarter", "OneOfFour", "        Dense(),\n"),
}
VARIANTS = {
    "both": {"method": "wanda", "ratio": 0.8, "pattern": "1:4", "codes": {"value_bits": 5}},
    "powers": {"method": "cospadi", "ratio": 0.5, "max_iter": 3, "codes": {"value_bits": 5}},
    "quarter": {"method": "cospadi", "ratio": 0.5, "max_iter": 3, "support": "1:4", "rho": 4},
}

EVALUATED = [f"results/tiny/{name}/eval.json" for name in VARIANTS]

# with the project's package: what the codes files hold
UNPACKED = """
import sys, pathlib, numpy as np
from cospadi.files import TensorFile
from cospadi.formats.factorization import read_specs, tensor_names, unpack
from cospadi.runtime.cospadi_registry import CODECS
found = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    file = TensorFile(path)
    for name, spec in read_specs(file, CODECS, "Pack it again").items():
        factors = unpack({part: file.read(part) for part in tensor_names(name, spec)}, spec, name)
        found[name] = factors.reconstruct()
np.savez(sys.argv[2], **found)
"""

# without the package: what the folder's own code makes of them, and that training keeps their form
LOADED = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
assert not any(name.split(".")[0] == "cospadi" for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
found = {}
for name in model.config.packing["matrices"]:
    layer = model.get_submodule(name)
    found[name] = layer(torch.eye(layer.in_features)).numpy()
    before = layer.values.clone()
    layer.unpack(torch.float32, trainable=True)
    layer.pack()
    assert torch.equal(layer.values, before)
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def run(snapshot, tiny_model, articles, tmp_path_factory):
    """A project with two modules and a line more for each, and a run that went through."""
    folder = tmp_path_factory.mktemp("toys")
    project = copy_project(snapshot, folder / "project")
    registry = project / REGISTRY
    text = registry.read_text()
    for file, (module, name, before) in FORMATS.items():
        shutil.copy2(HERE / file, registry.with_name(f"{module}.py"))
        assert text.count(before) == 1
        text = text.replace(before, f"{before}        {name}(),\n")
        text = text.replace("from .cospadi_values", f"from .{module} import {name}\nfrom .cospadi_values")
    registry.write_text(text)
    config = tiny_config(tiny_model("llama"), articles)
    config["variants"] = VARIANTS
    (folder / "run").mkdir()
    run = Run(folder / "run", config, project)
    run.snakemake(*EVALUATED)
    return run


def codes_of(run: Run, variant: str) -> list[dict]:
    """Specs of the codes of all matrices."""
    config = json.loads((run.results / variant / "model/config.json").read_text())
    return [spec["codes"] for spec in config["quantization_config"]["matrices"].values()]


def test_a_codec_and_a_support_of_a_file_and_a_line_run_from_config_to_an_evaluated_model(run):
    found = {name: {(codes["codec"], codes["support"]) for codes in codes_of(run, name)} for name in VARIANTS}
    assert found == {"both": {("pow2", "1:4")}, "powers": {("pow2", "bitmask")}, "quarter": {("bf16", "1:4")}}
    for name, settings in VARIANTS.items():
        # the ratio is kept because the budget asks the format what it takes
        reports = [json.loads(path.read_text()) for path in (run.results / name / "codes").glob("*.json")]
        matrices = [matrix for report in reports for matrix in report["matrices"].values()]
        taken = sum(matrix["nbytes"] for matrix in matrices) / sum(matrix["dense_nbytes"] for matrix in matrices)
        assert 1 - settings["ratio"] - 0.1 < taken <= 1 - settings["ratio"]
        assert all(matrix["relative_error"] < 1 for matrix in matrices)
        assert json.loads((run.results / name / "eval.json").read_text())["perplexity"]["token"] > 1


@pytest.mark.parametrize("variant", ["powers", "quarter", "both"])
def test_the_folder_s_own_code_computes_what_was_packed(run, variant, tmp_path):
    packed = {**os.environ, "PYTHONPATH": str(run.project / "workflow")}
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    alone["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    for code, source, environment in (
        (UNPACKED, run.results / variant / "codes", packed),
        (LOADED, run.results / variant / "model", alone),
    ):
        output = tmp_path / f"{source.name}.npz"
        done = subprocess.run(
            [sys.executable, "-c", code, source, output], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    expected, found = np.load(tmp_path / "codes.npz"), np.load(tmp_path / "model.npz")
    assert set(expected) == set(found) and len(expected.files) == len(codes_of(run, variant))
    for name in expected:
        assert np.abs(expected[name]).max() > 0
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)


def test_a_change_of_a_format_makes_again_what_uses_it(run):
    assert run.planned(*EVALUATED) == {}
    path = (run.project / REGISTRY).with_name("cospadi_pow2.py")
    text = path.read_text()
    path.write_text(text + "\nEDITED = True\n")
    try:
        planned = run.planned(*EVALUATED)
    finally:
        path.write_text(text)
    jobs = {name: len(list((run.results / name / "codes").glob("*.safetensors"))) for name in VARIANTS}
    users = jobs["powers"] + jobs["both"]
    assert planned["learn_dictionary"] == planned["quantize_codes"] == users
    # all of the runtime travels in a packed folder
    assert planned["assemble_model"] == len(VARIANTS)


def test_what_is_not_registered_is_refused_by_name(run):
    registry = run.project / REGISTRY
    text = registry.read_text()
    codes = run.results / "quarter/codes"
    try:
        registry.write_text(text.replace("        OneOfFour(),\n", ""))
        broken = Run(run.folder, {**run.config, "variants": {"quarter": VARIANTS["quarter"]}}, run.project)
        output = broken.snakemake("--dry-run", succeeds=False)
        assert "variants.quarter.support: '1:4' is not allowed (did you mean 2:4?); one of bitmask, '2:4'" in output
        environment = {**os.environ, "PYTHONPATH": str(run.project / "workflow")}
        done = subprocess.run(
            [sys.executable, "-c", UNPACKED, codes, "x.npz"], env=environment, capture_output=True, text=True
        )
        assert "support '1:4' is not known; this code reads bitmask, dense, 2:4, mixture" in done.stderr
    finally:
        registry.write_text(text)
