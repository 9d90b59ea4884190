"""Packed models under tools of other people, which do to any model what they do to this one."""

from __future__ import annotations

import pytest
import torch

IDS = torch.randint(3, 390, (2, 24), generator=torch.Generator().manual_seed(0))


def load(folder, **kwargs):
    from transformers import AutoModelForCausalLM

    import cospadi  # noqa: F401 (registers the packed classes)

    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model):
    return torch.cat([model(IDS).logits, model(IDS[:, :3]).logits], dim=1)  # many rows and a few


def assert_close(found, expected, bound=2e-5):
    assert float((found - expected).abs().max()) < bound * float(expected.std())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_preparing_for_kbit_training_changes_no_product(packed_model, tmp_path, family):
    peft = pytest.importorskip("peft")
    packed = packed_model(family).packed
    model = load(packed)
    expected = logits(model)
    prepared = peft.prepare_model_for_kbit_training(model)
    assert torch.bfloat16 not in {p.dtype for p in prepared.parameters()}, "the tool casts what is stored"
    assert_close(logits(prepared), expected)
    prepared.save_pretrained(tmp_path / "saved")
    assert_close(logits(load(tmp_path / "saved")), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_dispatching_with_a_dtype_changes_no_product(packed_model, family):
    import accelerate
    from transformers import AutoModelForCausalLM

    packed = packed_model(family).packed
    expected = load(packed)
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(expected.config)
    model.tie_weights()
    model = accelerate.load_checkpoint_and_dispatch(
        model, str(packed), device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    assert_close(logits(model), logits(expected))


def test_casting_every_parameter_to_half_precision_rounds_and_no_more(packed_model):
    model = load(packed_model("llama").packed)
    expected = logits(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float16)
    # every tensor is rounded to 11 bits
    assert_close(logits(model), expected, bound=64 * 2**-11)
