"""Ordinary transformers models with shared attention weights, and back.

A converted model is of a class of its own (`SharedLlamaForCausalLM` ...) with a model type of its own
(``masa_llama``). So ``save_pretrained`` stores every atom once, ``from_pretrained`` builds the pools again, ``Trainer``
and its checkpoints work, and a program without this package refuses the folder instead of loading random attention.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    ViTForImageClassification,
)

from cospadi.errors import UnsupportedModelError
from cospadi.files import replacing
from cospadi.training.sharing import (
    COEFFICIENTS,
    QKVO,
    AtomPool,
    FreeCoefficients,
    LowRankLinear,
    SharedLinear,
    find_projections,
    rebuild,
    stacked,
)

ORDINARY = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, ViTForImageClassification)
_SHARED: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def share_attention(
    model: PreTrainedModel, *, atoms: Mapping[str, int], coefficients: str = "mlp", keep_weights: bool = False
) -> PreTrainedModel:
    """Let the layers of a model draw attention weights from pools of matrix atoms, ``W_l = sum_s c_ls A_s``.

    The model is changed in place and returned; train it as any other. Biases stay with their layers.

    Parameters
    ----------
    model : PreTrainedModel
        Of a class in `ORDINARY`, usually new from a config. Random parts (coefficients) come from torch's generator;
        atoms begin as the weights of S of the layers.
    atoms : mapping of str to int
        Projection (``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, or any other linear layer that every block has) to
        the number S of atoms of its pool; each kind has its own. What is not named stays as it is.
    coefficients : {"mlp", "free", "sequential", "cyclic"}
        From an embedding of each layer through an MLP (the paper's), parameters themselves, or one fixed atom a layer:
        consecutive layers share one, or layer l has atom l mod S ("repeat all over").
    keep_weights : bool
        Set the atoms to those that come closest to the model's weights; exact where S is the number of layers.

    Returns
    -------
    PreTrainedModel
        The same object.

    Raises
    ------
    UnsupportedModelError
        If the model is of another class, or shares already.
    ValueError
        If a projection does not exist, S is not between 1 and the number of layers, or the kind of coefficients is
        unknown.
    """
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"coefficients: {coefficients!r} is not known; one of {', '.join(COEFFICIENTS)}")
    weights = _check(model, atoms, "atoms")
    for projection, stack in weights.items():
        if atoms[projection] > len(stack):
            raise ValueError(f"atoms: {atoms[projection]} for {projection}, but there are {len(stack)} layers")
    _convert(model, {"atoms": dict(atoms), "coefficients": coefficients})
    if keep_weights:
        for pool, stack in zip(model.pools.values(), weights.values(), strict=True):
            pool.fit(stack)
    return model


def low_rank_attention(model: PreTrainedModel, *, rank: Mapping[str, int]) -> PreTrainedModel:
    """Replace attention weights by products of two narrow matrices, which start as the truncated SVD of the weights.

    Parameters
    ----------
    model : PreTrainedModel
        As for `share_attention`; changed in place and returned.
    rank : mapping of str to int
        Projection to its rank.

    Raises
    ------
    UnsupportedModelError, ValueError
        As `share_attention`.
    """
    for projection, stack in _check(model, rank, "rank").items():
        if rank[projection] > min(stack.shape[1:]):
            raise ValueError(f"rank: {rank[projection]} for {projection}, but it is {tuple(stack.shape[1:])}")
    return _convert(model, {"rank": dict(rank)})


def keep_coefficients(model: PreTrainedModel) -> PreTrainedModel:
    """Drop what makes the coefficients (embeddings and MLP) and keep their values: training is over, the file smaller.

    In place; the logits stay the same. Coefficients of the other kinds are left as they are.
    """
    for pool in getattr(model, "pools", {}).values():
        if pool.coefficients.trained_only:
            pool.coefficients = _as_values(pool)
    if model.config.shared_attention.get("coefficients") == "mlp":
        model.config.shared_attention = {**model.config.shared_attention, "coefficients": "free"}
    return model


def materialise(model: PreTrainedModel) -> PreTrainedModel:
    """The ordinary model with the same weights: ``W_l`` written out, layer by layer.

    Its ``save_pretrained`` folder is one that every tool loads, and it computes nothing that a dense model does not.

    Parameters
    ----------
    model : PreTrainedModel
        From `share_attention` or `low_rank_attention`. It is left as it is.

    Returns
    -------
    PreTrainedModel
        Of the ordinary class (``LlamaForCausalLM`` ...), in the dtype and on the device of `model`.
    """
    ordinary = _ordinary_class(model)
    config = model.config.to_dict()
    for key in ("shared_attention", "model_type", "architectures"):
        config.pop(key, None)
    state = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, SharedLinear | LowRankLinear):
                state[f"{name}.weight"] = module.weight
    made = [name.removesuffix("weight") for name in state]
    parts = {f"{name}{factor}" for name in made for factor in ("down", "up")}  # of low-rank layers
    for name, tensor in model.state_dict().items():
        if not name.startswith("pools.") and name not in parts:
            state[name] = tensor
    with torch.random.fork_rng(devices=[]):  # the random weights it begins with are nobody's business
        dense = ordinary(ordinary.config_class(**config))
    dense.to(model.device, model.dtype).load_state_dict(state)
    return dense.train(model.training)


def write_ordinary(folder: str | Path, output: str | Path) -> None:
    """Write the model in `folder` as an ordinary one (`materialise`), with its tokenizer if there is one.

    Raises
    ------
    UnsupportedModelError
        If the model in `folder` shares no attention weights: it is an ordinary one already.
    """
    config = AutoConfig.from_pretrained(folder)
    loaders = {shared.config_class: shared for shared in _SHARED.values()}
    if type(config) not in loaders:
        raise UnsupportedModelError(f"{folder} is an ordinary model already ({config.model_type}): use it as it is")
    model = materialise(loaders[type(config)].from_pretrained(folder))
    with replacing(output) as temporary:
        model.save_pretrained(temporary)
        for file in Path(folder).glob("tokenizer*"):
            shutil.copy2(file, temporary)


def attention_parameters(model: nn.Module) -> int:
    """Numbers that inference needs for the attention weights, whichever way they are made.

    Atoms, and coefficients where they are trained; both factors of a low-rank weight; the weight of an ordinary
    layer. Neither biases nor what makes the coefficients.
    """
    count = sum(pool.n_kept() for name, pool in getattr(model, "pools", {}).items() if name in QKVO)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in QKVO and not name.startswith("pools."):
            count += module.weight.numel() if isinstance(module, nn.Linear) else module.n_kept()
    return count


def _check(model: PreTrainedModel, sizes: Mapping[str, int], what: str) -> dict[str, torch.Tensor]:
    """The weights of each projection that `sizes` names (n_layers, d_out, d_in)."""
    if type(model) in _SHARED.values():
        raise UnsupportedModelError(f"{type(model).__name__} shares attention weights already")
    if type(model) not in _SHARED:
        known = ", ".join(cls.__name__ for cls in ORDINARY)
        raise UnsupportedModelError(f"{type(model).__name__} cannot share attention weights; one of {known} can")
    if not sizes:
        raise ValueError(f"{what}: names no projection")
    weights = {}
    for projection, size in sizes.items():
        linears = find_projections(model, projection)
        if not linears:
            raise ValueError(f"{what}: {type(model).__name__} has no linear layers called {projection}")
        if size < 1:
            raise ValueError(f"{what}: {size} for {projection}; at least 1")
        weights[projection] = stacked(linears)
    return weights


def _convert(model: PreTrainedModel, spec: dict[str, Any]) -> PreTrainedModel:
    shared = _SHARED[type(model)]
    config = shared.config_class(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    config.shared_attention = spec
    config._attn_implementation = model.config._attn_implementation
    before = model.config
    for module in model.modules():
        if getattr(module, "config", None) is before:
            module.config = config
    rebuild(model, spec)
    model.__class__ = shared
    return model


def _as_values(pool: AtomPool) -> FreeCoefficients:
    values = pool.coefficients().detach()
    kept = FreeCoefficients(*values.shape).to(values.device, values.dtype)
    kept.values.data.copy_(values)
    return kept


def _ordinary_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    for ordinary, shared in _SHARED.items():
        if type(model) is shared:
            return ordinary
    raise UnsupportedModelError(f"{type(model).__name__} shares no attention weights, so there are none to write out")


class _SharedAttention:
    """What a class of shared models adds to the ordinary one: pools, built as its config says."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        rebuild(self, config.shared_attention)


def _define(ordinary: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of shared models for an ordinary one, known to the Auto classes."""
    name = f"Shared{ordinary.__name__}"
    plain = ordinary.config_class
    place = {"__module__": __name__}
    annotated = {"__annotations__": {"shared_attention": dict[str, Any] | None}, "shared_attention": None}
    config = type(f"Shared{plain.__name__}", (plain,), {**place, **annotated, "model_type": f"masa_{plain.model_type}"})
    model = type(name, (_SharedAttention, ordinary), {**place, "config_class": config})
    AutoConfig.register(config.model_type, config)
    auto = AutoModelForImageClassification if ordinary is ViTForImageClassification else AutoModelForCausalLM
    auto.register(config, model)
    globals().update({config.__name__: config, name: model})  # where pickle looks for them
    return model


for _ordinary in ORDINARY:
    _SHARED[_ordinary] = _define(_ordinary)
