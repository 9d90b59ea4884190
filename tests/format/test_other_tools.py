"""Packed models under tools of other people, which do to any model what they do to this one."""

from __future__ import annotations

import pytest
import torch
import transformers

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


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_adapters_for_all_linear_layers(packed_model, family):
    peft = pytest.importorskip("peft")
    model = load(packed_model(family).packed)
    expected = logits(model)
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert not any(".plus." in name for name in names), "a sum is one linear layer"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapters = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert adapters == {f"base_model.model.{name}" for name in names}
    assert_close(logits(adapted), expected)
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_every_linear_layer_can_be_replaced_by_another(packed_model):
    model = load(packed_model("mistral").packed)
    expected = logits(model)

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Wrapped(module))
    assert_close(logits(model), expected)


def _placed(where):
    whole = {name: "cpu" for name in ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb")}
    return whole | {f"model.layers.{index}": where(index) for index in range(4)}


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_layers_on_the_disk_compute_the_same(packed_model, tmp_path, family):
    packed = packed_model(family).packed
    model = load(packed, device_map=_placed(lambda index: "disk"), offload_folder=tmp_path)
    assert_close(logits(model), logits(load(packed)))


def test_an_old_transformers_does_not_find_what_is_shared_on_the_disk(packed_model, tmp_path, monkeypatch):
    packed = packed_model("mistral").packed
    loader = type(load(packed)).from_pretrained.__func__
    monkeypatch.setitem(loader.__globals__, "_FINDS_SHARED", (99, 1))
    expected = rf"share one dictionary, and transformers {transformers.__version__} finds.* Take transformers 99\.1"
    with pytest.raises(ValueError, match=expected):
        load(packed, device_map=_placed(lambda index: "disk"), offload_folder=tmp_path)
    load(packed, device_map=_placed(lambda index: "cpu"))


@pytest.mark.parametrize("on_disk", [(0, 2), (1, 3)])
def test_a_dictionary_that_is_on_the_disk_for_some_layers_only_is_refused(packed_model, tmp_path, on_disk):
    device_map = _placed(lambda index: "disk" if index in on_disk else "cpu")
    with pytest.raises(
        ValueError, match=r"puts .* on the disk and .* elsewhere, but they share one dictionary.*Put both"
    ):
        load(packed_model("mistral").packed, device_map=device_map, offload_folder=tmp_path)
    # dictionaries of qwen3 are shared within a layer
    model = load(packed_model("qwen3").packed, device_map=device_map, offload_folder=tmp_path)
    assert_close(logits(model), logits(load(packed_model("qwen3").packed)))
