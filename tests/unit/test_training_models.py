"""Attention weights that layers share: the algebra, and transformers' own machinery on such models."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from cospadi import training
from cospadi.errors import UnsupportedModelError
from cospadi.files import TensorFile

LAYERS, HIDDEN = 6, 32
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 60, "num_key_value_heads": 2, "initializer_range": 0.2}
PICTURE = {**SIZES, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10, "initializer_range": 0.2}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=16)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**PICTURE)),
}
ALL = dict.fromkeys(training.QKVO, 2)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def new(family: str = "llama"):
    model = FAMILIES[family]().eval()
    with torch.no_grad():  # new biases are zero; a lost one would not show
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def inputs(model) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.rand(3, 1, 8, 8, generator=draw)}
    return {"input_ids": torch.randint(0, 60, (3, 11), generator=draw)}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**inputs(model)).logits


@torch.no_grad()
def check_rounding(factored, plain) -> None:
    """Logits of the float32 models apart by a few roundings; one column of one matrix .1 % off is hundreds of them."""
    exact = logits(copy.deepcopy(plain).double())
    errors = [(logits(model).double() - exact).square().mean().sqrt() for model in (factored, plain)]
    assert 0 < errors[0] < 10 * errors[1]


def check_same(loaded, model) -> None:
    """Equal tensors; logits to rounding, which depends on where in memory a tensor begins."""
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def loss(model) -> torch.Tensor:
    given = inputs(model)
    return model(**given, labels=given["input_ids"]).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_atoms_as_layers_is_the_dense_model(family):
    model = new(family)
    before = logits(model)
    atoms = dict.fromkeys(training.QKVO, LAYERS)
    one_hot = training.share_attention(copy.deepcopy(model), atoms=atoms, coefficients="sequential", keep_weights=True)
    assert torch.equal(logits(one_hot), before)
    # any coefficients of full rank will do
    free = training.share_attention(copy.deepcopy(model), atoms=atoms, coefficients="free", keep_weights=True)
    assert not torch.equal(free.pools["q_proj"].atoms, one_hot.pools["q_proj"].atoms)
    assert (logits(free) - before).abs().max() < 1e-4 * before.abs().max()


def test_weight_is_the_mixture_of_atoms():
    model = training.share_attention(new(), atoms={"v_proj": 3}, coefficients="mlp")
    pool = model.pools["v_proj"]
    coefficients = pool.coefficients()
    assert coefficients.shape == (LAYERS, 3)
    for layer, block in enumerate(model.model.layers):
        expected = sum(c * atom for c, atom in zip(coefficients[layer], pool.atoms, strict=True))
        torch.testing.assert_close(block.self_attn.v_proj.weight, expected)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    # to begin with, mixed weights have the variance of the atoms
    assert coefficients.square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("coefficients", "atoms", "chosen"),
    [
        ("sequential", 2, [0, 0, 0, 1, 1, 1]),
        ("sequential", 4, [0, 0, 1, 2, 2, 3]),
        ("cyclic", 2, [0, 1, 0, 1, 0, 1]),
        ("cyclic", 4, [0, 1, 2, 3, 0, 1]),
    ],
)
def test_sharing_whole_matrices_is_one_fixed_atom_a_layer(coefficients, atoms, chosen):
    dense = new()
    model = training.share_attention(
        copy.deepcopy(dense), atoms={"q_proj": atoms}, coefficients=coefficients, keep_weights=True
    )
    for layer, atom in enumerate(chosen):
        group = [block for block, other in zip(dense.model.layers, chosen, strict=True) if other == atom]
        mean = torch.stack([block.self_attn.q_proj.weight for block in group]).mean(0)
        torch.testing.assert_close(model.model.layers[layer].self_attn.q_proj.weight, mean)
    trained = {name for name, _ in model.named_parameters() if name.startswith("pools")}
    assert trained == {"pools.q_proj.atoms"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("coefficients", training.COEFFICIENTS)
def test_materialised_is_the_same_model(family, coefficients):
    model = training.share_attention(new(family), atoms=ALL, coefficients=coefficients)
    ordinary = training.materialise(model)
    assert type(ordinary) is type(FAMILIES[family]())
    assert torch.equal(logits(ordinary), logits(model))
    assert ordinary.config.model_type == family


def test_materialised_low_rank_is_the_same_model():
    model = training.low_rank_attention(new(), rank={"q_proj": 5, "o_proj": 7})
    ordinary = training.materialise(model)
    check_rounding(model, ordinary)
    assert torch.linalg.matrix_rank(ordinary.model.layers[2].self_attn.o_proj.weight) == 7
    # nothing is lost at full rank
    dense = new()
    full = training.low_rank_attention(copy.deepcopy(dense), rank={"q_proj": HIDDEN})
    check_rounding(full, dense)


def test_materialised_keeps_dtype_and_leaves_the_shared_model_alone():
    model = training.share_attention(new().to(torch.bfloat16), atoms=ALL)
    before = logits(model)
    ordinary = training.materialise(model)
    assert {parameter.dtype for parameter in ordinary.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(ordinary), before)
    assert torch.equal(logits(model), before)


def test_parameter_counts():
    query, key = HIDDEN * HIDDEN, HIDDEN * HIDDEN // 2  # two key heads for four query heads
    dense = new()
    assert training.attention_parameters(dense) == LAYERS * 2 * (query + key)
    count = training.attention_parameters
    assert count(training.share_attention(new(), atoms=ALL, coefficients="cyclic")) == 2 * 2 * (query + key)
    mixed = 2 * 2 * (query + key) + 4 * LAYERS * 2
    assert count(training.share_attention(new(), atoms=ALL, coefficients="free")) == mixed
    model = training.share_attention(new(), atoms=ALL, coefficients="mlp")
    assert count(model) == mixed
    qkv = training.share_attention(new(), atoms=dict.fromkeys(training.QKV, 2), coefficients="sequential")
    assert count(qkv) == 2 * (query + 2 * key) + LAYERS * query
    assert count(training.low_rank_attention(new(), rank={"q_proj": 4})) == count(dense) - LAYERS * (query - 8 * HIDDEN)
    # atoms are parameters once, whatever the number of layers that use them
    rest = sum(p.numel() for n, p in dense.named_parameters() if "self_attn" not in n)
    training.keep_coefficients(model)
    assert sum(p.numel() for p in model.parameters()) == rest + mixed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("coefficients", ["mlp", "free", "cyclic"])
def test_saved_and_loaded(family, coefficients, tmp_path):
    model = training.share_attention(new(family), atoms={"q_proj": 3, "o_proj": 2}, coefficients=coefficients)
    model.save_pretrained(tmp_path)
    file = TensorFile(tmp_path / "model.safetensors")
    # every atom once, and no weight of a layer (transformers stores a ViT's q_proj as query)
    assert sorted(entry["shape"][0] for name, entry in file.entries.items() if name.endswith(".atoms")) == [2, 3]
    assert not [name for name in file.names() if name.endswith(("q_proj.weight", "query.weight", "o_proj.weight"))]
    auto = AutoModelForImageClassification if family == "vit" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    check_same(loaded, model)


def test_low_rank_saved_and_loaded(tmp_path):
    model = training.low_rank_attention(new(), rank={"q_proj": 5})
    model.save_pretrained(tmp_path)
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), model)


def test_coefficients_kept_without_what_makes_them(tmp_path):
    model = training.share_attention(new(), atoms=ALL, coefficients="mlp")
    before = logits(model)
    training.keep_coefficients(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert not [
        name for name in TensorFile(tmp_path / "model.safetensors").names() if "mlp" in name and "pools" in name
    ]
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), model)


def test_copied_and_pickled():
    model = training.share_attention(new(), atoms=ALL)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        # the copy's layers use the copy's atoms
        other.pools["q_proj"].atoms.data.zero_()
        assert other.model.layers[1].self_attn.q_proj.weight.abs().max() == 0
    assert model.model.layers[1].self_attn.q_proj.weight.abs().max() > 0


@pytest.mark.parametrize("coefficients", ["mlp", "free"])
def test_gradients_are_the_sum_over_layers(coefficients):
    model = training.share_attention(new(), atoms={"q_proj": 2}, coefficients=coefficients)
    pool = model.pools["q_proj"]
    # the same numbers from the dense model: dL/dA_s = sum_l c_ls dL/dW_l, dL/dc_ls = <A_s, dL/dW_l>
    dense = training.materialise(model)
    loss(dense).backward()
    by_layer = torch.stack([block.self_attn.q_proj.weight.grad for block in dense.model.layers])
    loss(model).backward()
    expected = torch.einsum("ls,lij->sij", pool.coefficients(), by_layer)
    torch.testing.assert_close(pool.atoms.grad, expected, rtol=1e-4, atol=1e-6)
    if coefficients == "free":
        expected = torch.einsum("sij,lij->ls", pool.atoms, by_layer)
        torch.testing.assert_close(pool.coefficients.values.grad, expected, rtol=1e-4, atol=1e-5)
    else:
        assert all(parameter.grad.abs().max() > 0 for parameter in pool.coefficients.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = training.share_attention(new(), atoms=ALL).train()
    loss(model).backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss(model).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-5, atol=1e-7)


def test_compiled():
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 2}))  # tracing takes seconds a layer
    training.share_attention(model, atoms=ALL)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss(compiled), loss(model))
    loss(compiled).backward()
    gradient = model.pools["v_proj"].atoms.grad.clone()
    model.zero_grad()
    loss(model).backward()
    torch.testing.assert_close(gradient, model.pools["v_proj"].atoms.grad, rtol=1e-4, atol=1e-6)


def test_trained_by_trainer_and_resumed(tmp_path):
    tokens = torch.randint(0, 60, (1, 12)).repeat(16, 1)  # one window, to be learned by heart
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def trainer(steps: int) -> Trainer:
        torch.manual_seed(3)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=10,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
            seed=0,
        )
        return Trainer(training.share_attention(new(), atoms=ALL), arguments, train_dataset=data)

    whole = trainer(20)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    resumed = trainer(20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == pytest.approx(losses, rel=1e-4)
    # its checkpoints are models
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20").eval()
    check_same(loaded, whole.model.eval())


def test_generates():
    model = training.share_attention(new(), atoms=ALL)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    shared = model.generate(**inputs(model), **options)
    assert torch.equal(shared, training.materialise(model).generate(**inputs(model), **options))
    assert shared.shape == (3, 16)


WITHOUT_PACKAGE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "cospadi" not in sys.modules
torch.save(model(torch.arange(11)[None]).logits, sys.argv[2])
"""


def run_without_package(folder, output) -> subprocess.CompletedProcess[str]:
    """Plain transformers in a process that cannot import this package, whichever way it is installed."""
    block = "import sys; sys.modules['cospadi'] = None\n"
    code = block + WITHOUT_PACKAGE.replace('"cospadi" not in sys.modules', "sys.modules['cospadi'] is None")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, str(folder), str(output)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_merged_checkpoint_loads_without_this_package(tmp_path):
    model = training.share_attention(new(), atoms=ALL)
    model.save_pretrained(tmp_path / "shared")
    training.write_ordinary(tmp_path / "shared", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "shared_attention" not in config
    result = run_without_package(tmp_path / "dense", tmp_path / "logits.pt")
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = model(torch.arange(11)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)
    # the shared one is refused there, rather than loaded with random attention
    result = run_without_package(tmp_path / "shared", tmp_path / "never.pt")
    assert result.returncode != 0
    assert "masa_llama" in result.stderr
    with pytest.raises(UnsupportedModelError, match="ordinary model already"):
        training.write_ordinary(tmp_path / "dense", tmp_path / "again")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"atoms": {"q_proj": 7}}, "atoms: 7 for q_proj, but there are 6 layers"),
        ({"atoms": {"q_proj": 0}}, "atoms: 0 for q_proj; at least 1"),
        ({"atoms": {"query": 2}}, "no linear layers called query"),
        ({"atoms": {}}, "names no projection"),
        ({"atoms": ALL, "coefficients": "mpl"}, "'mpl' is not known; one of mlp, free"),
    ],
)
def test_faults_are_named(arguments, message):
    model = new()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        training.share_attention(model, **arguments)
    assert type(model) is LlamaForCausalLM
    assert torch.equal(logits(model), before)


def test_faults_of_models_and_ranks():
    with pytest.raises(ValueError, match=r"rank: 33 for q_proj, but it is \(32, 32\)"):
        training.low_rank_attention(new(), rank={"q_proj": 33})
    shared = training.share_attention(new(), atoms={"q_proj": 2})
    with pytest.raises(UnsupportedModelError, match="shares attention weights already"):
        training.share_attention(shared, atoms={"k_proj": 2})
    with pytest.raises(UnsupportedModelError, match="LlamaModel cannot share"):
        training.share_attention(new().model, atoms={"q_proj": 2})
    with pytest.raises(UnsupportedModelError, match="none to write out"):
        training.materialise(new())


def test_other_linear_layers_can_share_too():
    model = training.share_attention(new(), atoms={"gate_proj": 3}, coefficients="free")
    assert model.pools["gate_proj"].atoms.shape == (3, 40, HIDDEN)
    assert torch.equal(logits(training.materialise(model)), logits(model))
