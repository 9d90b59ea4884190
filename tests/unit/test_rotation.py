"""A model in another basis of its residual stream computes the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cospadi.config import check_config
from cospadi.errors import ArtifactError, ConfigError
from cospadi.files import ModelFolder, read_json
from cospadi.sources import check_model_folder
from cospadi.sources.rotation import random_basis, rotate


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_rotated_copy_computes_the_same(tiny_model: Callable[..., Path], tmp_path, family, tied):
    made = Path(shutil.copytree(tiny_model(family, dtype="float32", tie_word_embeddings=tied), tmp_path / "model"))
    model = ModelFolder(made)
    # norms that say something
    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(0)
    for file in set(model.weight_map.values()):
        tensors = load_file(made / file)
        for name, tensor in tensors.items():
            if "norm" in name or name.endswith("bias"):
                tensors[name] = tensor + 0.5 * torch.rand(tensor.shape, generator=draw)
        save_file(tensors, made / file, {"format": "pt"})
    copy = Path(shutil.copytree(made, tmp_path / "rotated"))
    rotate(copy, 3, log=lambda line: None)
    check_model_folder(copy, log=lambda line: None)
    expected, found = logits(made), logits(copy)
    assert (found - expected).abs().max() < 1e-4
    assert read_json(copy / "config.json")["tie_word_embeddings"] is False
    name = "model.layers.0.self_attn.q_proj"
    before, after = (ModelFolder(folder).read_weight(name) for folder in (made, copy))
    assert np.abs(after - before).mean() > 0.5 * np.abs(before).mean()
    again = Path(shutil.copytree(made, tmp_path / "again"))
    rotate(again, 3, log=lambda line: None)
    assert all(
        (again / file).read_bytes() == (copy / file).read_bytes() for file in ModelFolder(copy).weight_map.values()
    )


def test_a_family_with_more_norms_is_refused(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model("gemma3_text"), tmp_path / "model"))
    with pytest.raises(ArtifactError, match="Gemma3ForCausalLM is no family whose norms can be folded"):
        rotate(folder, 0)


def test_a_basis_is_orthonormal():
    basis = random_basis(40, 1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(40), atol=1e-13)
    assert not np.allclose(basis, random_basis(40, 2))


def test_a_local_model_stays_as_it_is(tiny_model):
    config = {
        "run": "r",
        "model": {"name": "m", "source": "hub", "repo": "owner/m"},
        "calibration": {"source": "self"},
        "variants": {"a": {"method": "rtn", "bits": 4.25}},
        "evaluation": {"perplexity": None},
    }
    assert "rotate" not in check_config(config)["model"]
    config["model"]["rotate"] = 5
    assert check_config(config)["model"]["rotate"] == 5
    config["model"] = {"name": "m", "source": "local", "path": str(tiny_model("llama")), "rotate": 5}
    with pytest.raises(ConfigError, match=r"model\.rotate: 5 is for models that are fetched"):
        check_config(config)
