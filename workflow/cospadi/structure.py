"""Which matrices and sites does a model have; load a chunk of its layers.

The structure is found by running the architecture itself, never guessed from names: the whole model is built on
PyTorch's meta device, which holds shapes and no values, and a forward pass shows which linear layers a decoder block
has and which of them read the very same tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cospadi.arrays import all_finite
from cospadi.errors import ArtifactError, UnsupportedModelError
from cospadi.files import BFLOAT16, ModelFolder, explaining, read_json
from cospadi.provenance import check_provenance, fingerprint
from cospadi.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

FORMAT_VERSION = 1

SUPPORTED = ("Gemma3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# families whose block adds the MLP's output to the residual as it is; Gemma 3 has a norm between the two
FOLDABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Part(NamedTuple):
    """One of the two parts of a block, by names of modules: ``stream + writer(...readers(norm(stream))...)``."""

    name: str
    norm: str
    readers: tuple[str, ...]
    writer: str


# what is known of a block of every supported family before the model is there (Gemma 3 has more norms)
PARTS = (
    Part("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    Part("mlp", "post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj"),
)
# projections that read the same input, site after site; all of them; and where each is
SITES = tuple(site for part in PARTS for site in (part.readers, (part.writer,)))
PROJECTIONS = tuple(projection for site in SITES for projection in site)
PART_OF = {projection: part for part in PARTS for projection in (*part.readers, part.writer)}

# dtypes a weight may have: name in the safetensors header, name in torch
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_REMEDY = "Fetch the model again, or choose another one"


# keys of config.json that count experts, and those that describe another part beside the language model
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WRAPPERS = ("vision_config", "audio_config", "text_config")


def _of_either(config: Mapping[str, Any], key: str) -> Any:
    """An entry of a config, or of the language model's inside it."""
    inner = config.get("text_config")
    return config.get(key) or (inner.get(key) if isinstance(inner, Mapping) else None)


def check_supported(config: Mapping[str, Any]) -> None:
    """Refuse a model that cannot be taken apart; needs only its ``config.json``, no torch.

    Parameters
    ----------
    config : mapping
        Content of the model's ``config.json``.

    Raises
    ------
    UnsupportedModelError
        If the architecture is not one of `SUPPORTED`, or the weights are quantized already.
    """
    named = config.get("architectures")
    found = [str(name) for name in named] if isinstance(named, list) else []
    supported = f"Supported are {', '.join(SUPPORTED)}"
    # said before the name is: what a mixture or a wrapper lacks is more than support by name
    experts = next((key for key in _EXPERTS if _of_either(config, key)), None)
    if experts:
        raise UnsupportedModelError(
            f"a mixture of experts (config.json: {experts} is {_of_either(config, experts)!r}): an expert meets "
            f"too few calibration tokens for a Gram of its own. Take a dense model. {supported}"
        )
    known = len(found) == 1 and found[0] in SUPPORTED
    wrapped = next((key for key in _WRAPPERS if isinstance(config.get(key), Mapping)), None)
    if wrapped and not known:
        raise UnsupportedModelError(
            f"a model of text and something else (config.json: {wrapped}; {', '.join(found) or 'no architecture'}): "
            "its language model is only a part of it. Save that part as a folder of its own "
            "(AutoModelForCausalLM.from_pretrained(folder).save_pretrained(text_only), and the tokenizer), and give "
            f"that. {supported}"
        )
    if not known:
        raise UnsupportedModelError(
            f"architecture {', '.join(found) or 'not named in config.json'} is not supported; "
            f"supported are {', '.join(SUPPORTED)}"
        )
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else quantized
        raise UnsupportedModelError(
            f"the weights are quantized already (quant_method {method}); take the model in bfloat16, float16 or "
            f"float32. Supported architectures are {', '.join(SUPPORTED)}"
        )


def layer_name(index: int) -> str:
    """Name of layer `index` in artifacts: ``layer_03``."""
    return f"layer_{index:02d}"


def inspect_model(model_folder: str | Path) -> dict[str, Any]:
    """Take stock of a model: its layers, the linear layers in them, and which of those share an input.

    Every weight is looked up in the folder's safetensors with its shape, and the tokenizer is checked against the
    embedding. Memory: headers only.

    Parameters
    ----------
    model_folder : path-like
        A Hugging Face folder.

    Returns
    -------
    dict
        Ready for JSON::

            {"format_version": 1, "model": "SmolLM2-135M", "fingerprint": "3f0c...", "model_type": "llama",
             "architecture": "LlamaForCausalLM",
             "n_layers": 30, "hidden_size": 576, "vocab_size": 49152, "dtype": "bfloat16", "tied_head": true,
             "total_parameters": 134515008, "target_parameters": 106168320, "untouched_bytes": 56693376,
             "layers": [{"name": "layer_00", "prefix": "model.layers.0", "sites": [
                 {"name": "self_attn.q_proj", "d_in": 576, "matrices": [
                     {"name": "model.layers.0.self_attn.q_proj", "shape": [576, 576], "bias": false}, ...]}, ...]}]}

        ``shape`` is (d_in, d_out); a site is named after its first matrix; `target_parameters` counts the weights of
        all matrices (biases excluded), `untouched_bytes` every other tensor of the files.

    Raises
    ------
    UnsupportedModelError
        If the architecture is not one of `SUPPORTED`.
    ArtifactError
        If a weight is missing, has another shape or a dtype other than bfloat16, float16 and float32, or if the
        tokenizer is missing or has more entries than the embedding.
    """
    folder = ModelFolder(model_folder)
    check_supported(folder.config)
    model = _meta_model(folder)
    for name, parameter in model.named_parameters():
        _check_tensor(folder, name, tuple(parameter.shape))
    _check_tokenizer(folder.path, model.get_input_embeddings().num_embeddings)

    layers = _find_layers(model)
    matrices = [matrix for layer in layers for site in layer["sites"] for matrix in site["matrices"]]
    targets = [f"{matrix['name']}.weight" for matrix in matrices]
    return {
        "format_version": FORMAT_VERSION,
        "model": folder.path.resolve().name,
        "fingerprint": fingerprint(folder),
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "n_layers": len(layers),
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.get_input_embeddings().num_embeddings,
        "dtype": DTYPES[folder.file_of(targets[0]).entries[targets[0]]["dtype"]],
        "tied_head": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "total_parameters": sum(weight.numel() for weight in model.parameters()),
        "target_parameters": sum(math.prod(matrix["shape"]) for matrix in matrices),
        "untouched_bytes": sum(folder.file_of(name).nbytes(name) for name in set(folder.weight_map) - set(targets)),
        "layers": layers,
    }


def read_structure(path: str | Path) -> dict[str, Any]:
    """What `inspect_model` wrote.

    Raises
    ------
    ArtifactError
        If the file is missing, is none, or is of another version.
    """
    remedy = "Delete it and run again to inspect the model anew"
    structure = read_json(path, remedy)
    check_provenance(path, structure, {"format_version": FORMAT_VERSION}, remedy)
    return structure


def chosen(structure: Mapping[str, Any], projections: Sequence[str] | None) -> dict[str, Any]:
    """A structure with the matrices of some of `PROJECTIONS` alone, as if the others were none; None: all."""
    if projections is None:
        return dict(structure)
    layers = []
    for layer in structure["layers"]:
        sites = []
        for site in layer["sites"]:
            matrices = [m for m in site["matrices"] if m["name"].rsplit(".", 1)[-1] in projections]
            if matrices:
                sites.append({**site, "matrices": matrices})
        layers.append({**layer, "sites": sites})
    return {**structure, "layers": layers}


def load_layers(model_folder: str | Path, first: int, last: int, *, dtype: str, device: str) -> PreTrainedModel:
    """Load layers `first` to `last` (both included) of a model as a small model of its own.

    Only the tensors of these layers are read, so memory holds a chunk and never the model. The result is the base
    model, without head; its output has gone through the final norm, so take what the last block gives with a hook.

    Parameters
    ----------
    model_folder : path-like
    first, last : int
        Layer numbers from 0. With `first` > 0 there is no embedding: pass ``inputs_embeds``, the hidden states after
        layer `first` - 1.
    dtype : {"bfloat16", "float16", "float32"}
        Dtype to compute in.
    device : str
        Where to compute: ``"cpu"``, ``"cuda"``.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode; block ``i`` of it is layer `first` + ``i``.

    Raises
    ------
    UnsupportedModelError
        If the architecture is not one of `SUPPORTED`.
    ArtifactError
        If a tensor is missing, has the wrong shape, or holds NaN or infinity.
    """
    import torch
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    folder = ModelFolder(model_folder)
    check_supported(folder.config)
    config = _read_config(folder)
    if not 0 <= first <= last < config.num_hidden_layers:
        raise ValueError(f"layers {first}-{last} of a model of {config.num_hidden_layers} layers")

    with no_init_weights():  # parameters stay untouched memory; buffers such as rotary frequencies are computed
        model = AutoModel.from_config(_sliced(config, first, last), dtype=getattr(torch, dtype))
    if first > 0:
        model.set_input_embeddings(torch.nn.Identity())
    blocks, _ = find_blocks(model)
    state = {}
    for name, parameter in model.named_parameters():
        source = name
        if name.startswith(f"{blocks}."):
            index, rest = name.removeprefix(f"{blocks}.").split(".", 1)
            source = f"{blocks}.{first + int(index)}.{rest}"
        tensor = read_tensor(folder, f"{model.base_model_prefix}.{source}", tuple(parameter.shape))
        state[name] = tensor.to(parameter.dtype)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False).to(device)


def load_head(model_folder: str | Path, structure: Mapping[str, Any], *, dtype: str, device: str) -> torch.Tensor:
    """Weight of the head (vocabulary, hidden_size) in `dtype`; the embedding where it is tied."""
    import torch

    name = "model.embed_tokens.weight" if structure["tied_head"] else "lm_head.weight"
    shape = (structure["vocab_size"], structure["hidden_size"])
    return read_tensor(ModelFolder(model_folder), name, shape).to(getattr(torch, dtype)).to(device)


def find_blocks(base: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """Name and list of the decoder blocks of a base model: its child list with one entry a layer."""
    from torch import nn

    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == base.config.num_hidden_layers:
            return name, child
    raise UnsupportedModelError(f"{type(base).__name__} has no list of {base.config.num_hidden_layers} decoder blocks")


def _read_config(folder: ModelFolder) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        with explaining(folder.path / "config.json"):
            return AutoConfig.from_pretrained(folder.path)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(folder.path / "config.json", f"not a model configuration ({error})", _REMEDY) from error


def _sliced(config: PreTrainedConfig, first: int, last: int) -> PreTrainedConfig:
    values = config.to_dict()
    values["num_hidden_layers"] = last - first + 1
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][first : last + 1]
    return type(config).from_dict(values)


def _meta_model(folder: ModelFolder) -> PreTrainedModel:
    """The whole causal model without values."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _read_config(folder)
    if has_own_head(folder):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if type(model).__name__ not in folder.config["architectures"]:
        raise UnsupportedModelError(
            f"{folder.path / 'config.json'}: model_type {config.model_type} builds a {type(model).__name__}, "
            f"but architectures says {folder.config['architectures'][0]}"
        )
    return model.eval()


def has_own_head(folder: ModelFolder) -> bool:
    """Whether a head is stored beside the embedding with other values: transformers then ignores the wish to tie."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head not in folder.weight_map or embedding not in folder.weight_map:
        return False
    return not np.array_equal(_bits(folder.read(head)), _bits(folder.read(embedding)))


def _find_layers(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Run the model on no values and note which tensor enters every linear layer of every block."""
    import torch
    from torch import nn

    blocks_name, blocks = find_blocks(model.base_model)
    seen: list[tuple[int, str, nn.Linear, torch.Tensor]] = []  # the tensors are kept, so that identity means something
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(
                    lambda module, inputs, index=index, name=name: seen.append((index, name, module, inputs[0]))
                )
    length = 4
    with torch.device("meta"), torch.no_grad():
        # a ready-made mask: making one would look at values
        mask = torch.zeros(1, 1, length, length, dtype=model.dtype)
        model(input_ids=torch.zeros(1, length, dtype=torch.long), attention_mask=mask, use_cache=False)

    layers = []
    for index in range(len(blocks)):
        prefix = f"{model.base_model_prefix}.{blocks_name}.{index}"
        sites: list[dict[str, Any]] = []
        inputs: list[torch.Tensor] = []
        for _, name, module, tensor in (entry for entry in seen if entry[0] == index):
            matrix = {
                "name": f"{prefix}.{name}",
                "shape": [module.in_features, module.out_features],
                "bias": module.bias is not None,
            }
            known = next((position for position, other in enumerate(inputs) if other is tensor), None)
            if known is None:
                inputs.append(tensor)
                sites.append({"name": name, "d_in": module.in_features, "matrices": [matrix]})
            else:
                sites[known]["matrices"].append(matrix)
        layers.append({"name": layer_name(index), "prefix": prefix, "sites": sites})
    return layers


def _check_tensor(folder: ModelFolder, name: str, shape: tuple[int, ...]) -> None:
    entry = folder.file_of(name).entries.get(name)
    path = folder.path / folder.weight_map[name]
    if entry is None:
        raise ArtifactError(path, f"holds no tensor {name}, though the index says so", _REMEDY)
    if tuple(entry["shape"]) != shape:
        raise ArtifactError(path, f"tensor {name} has shape {tuple(entry['shape'])}, expected {shape}", _REMEDY)
    if entry["dtype"] not in DTYPES:
        raise ArtifactError(path, f"tensor {name} has dtype {entry['dtype']}, expected {', '.join(DTYPES)}", _REMEDY)


def read_tensor(folder: ModelFolder, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a model folder, in the dtype it is stored in.

    Raises
    ------
    ArtifactError
        If it is missing, has another shape, or holds NaN or infinity.
    """
    import torch

    _check_tensor(folder, name, shape)
    array = folder.read(name)
    tensor = torch.from_numpy(np.array(_bits(array)))  # a copy: the mapping of the file must not outlive this call
    if array.dtype == BFLOAT16:
        tensor = tensor.view(torch.bfloat16)
    if not all_finite(tensor):
        raise ArtifactError(folder.file_of(name).path, f"tensor {name} holds NaN or infinity", _REMEDY)
    return tensor


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array


def _check_tokenizer(path: Path, vocab_size: int) -> None:
    tokenizer = load_tokenizer(path, _REMEDY)
    # tokens added beside the vocabulary may lie outside (Gemma 3 has one for images): plain text never yields them
    added = set(tokenizer.added_tokens_decoder)
    largest = max((index for index in tokenizer.get_vocab().values() if index not in added), default=-1)
    if not 0 <= largest < vocab_size:
        raise ArtifactError(
            path,
            f"the tokenizer's vocabulary reaches id {largest}, but the embedding has {vocab_size} rows",
            "Take tokenizer and weights from the same model",
        )
