"""The built wheel, unpacked far from the checkout, does what the library promises."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FROM_PLACE = "import cospadi, sys; assert cospadi.__file__.startswith({place!r}), cospadi.__file__; "


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """Content of the wheel, which is built from what git has."""
    source, wheels, place = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "unpacked"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "workflow", source / "workflow", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", wheels, source], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


@pytest.fixture
def run(unpacked, tmp_path) -> Callable[..., str]:
    """Run Python in an empty folder where only the wheel's package is found; what it printed."""

    def run_python(*arguments: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(unpacked)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run_python


def test_every_file_of_the_package_is_in_the_wheel(unpacked):
    package = ROOT / "workflow" / "cospadi"
    kept = {
        path.relative_to(package) for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    found = {path.relative_to(unpacked / "cospadi") for path in (unpacked / "cospadi").rglob("*") if path.is_file()}
    assert found == kept
    assert {"schemas", "task_files"} <= {part for path in found for part in path.parts}


def test_configs_are_checked_and_counted(run, unpacked, tmp_path, tiny_model):
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    config["model"] = {
        "name": "tiny",
        "source": "local",
        "path": str(tiny_model("llama", max_position_embeddings=1024)),
    }
    config["variants"] = {"a": {"method": "cospadi", "ratio": 0.2}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    checked = run(
        "-c",
        FROM_PLACE.format(place=str(unpacked))
        + "import yaml; from cospadi.config import check_config; "
        + "print(check_config(yaml.safe_load(open('x.yaml')))['variants']['a']['method'])",
    )
    assert checked.strip() == "cospadi"
    table = run("-m", "cospadi.needs", "--configfile", "x.yaml")
    assert "learn_dictionary" in table and "expected in all" in table


def test_matrices_are_factorized_and_folders_written_dense(run, unpacked, tmp_path, packed_model):
    packed = packed_model("llama").packed
    run(
        "-c",
        FROM_PLACE.format(place=str(unpacked))
        + "import numpy as np; from cospadi import factorize; from cospadi.checkpoint import densify; "
        + "W = np.random.default_rng(0).standard_normal((48, 40), dtype=np.float32); "
        + "f = factorize(W, np.eye(48), ratio=0.2); assert f.reconstruct().shape == W.shape; "
        + f"densify({str(packed)!r}, 'dense')",
    )
    assert (tmp_path / "dense" / "config.json").exists()
