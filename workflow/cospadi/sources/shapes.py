"""A model of a real one's shapes with random weights: what its size takes is seen before the model is there.

The spectrum of every matrix decays as trained ones do, by a power of the rank, so that what is cut off is neither all
nor nothing. The tokenizer knows bytes and pairs of common ones: text has tokens, and nothing is learned from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.errors import ArtifactError
from cospadi.files import write_json
from cospadi.structure import PARTS

# The blank first, as byte-level tokenizers write it
_COMMON = "Ġetaoinshrdlucmfwygpbvk"
_END = "<|endoftext|>"


def write_random(
    output: Path, config: Mapping[str, Any], *, seed: int, decay: float, log: Callable[[str], None] = print
) -> None:
    """Write a Hugging Face folder in bfloat16, a file for each block.

    Parameters
    ----------
    output : Path
        Folder; made here. The caller writes it through ``files.replacing``.
    config : mapping
        Content of its ``config.json``.
    seed : int
        Equal seeds give equal models, on one machine and version of NumPy.
    decay : float
        Singular value i of a matrix of a block is about ``i^-decay`` of the largest.

    Raises
    ------
    ArtifactError
        If the vocabulary has not even the bytes.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    output.mkdir(parents=True)
    write_json(output / "config.json", dict(config))
    _write_tokenizer(output, config["vocab_size"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(output))
    files: dict[str, list[str]] = {}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in shapes:
        block = name.split(".layers.")[-1].partition(".")[0] if ".layers." in name else "the rest"
        files.setdefault(block, []).append(name)
    unit_norm = 0.0 if config["model_type"].startswith("gemma") else 1.0  # Gemma adds one to what is stored
    residual = config["hidden_size"] ** -0.5  # size of the embedding, and of what all blocks add to it
    weight_map, total, place = {}, 0, 0
    for number, (block, names) in enumerate(files.items(), 1):
        tensors = {}
        for name in names:
            draw, shape = np.random.default_rng([seed, place]), shapes[name]
            place += 1
            if len(shape) == 1:
                value = np.full(shape, unit_norm) if "norm" in name else 0.1 * draw.standard_normal(shape)
            elif block == "the rest":
                value = residual * draw.standard_normal(shape, np.float32)
            else:
                value = _decaying(shape, decay, draw)
                if any(name.endswith(f".{part.writer}.weight") for part in PARTS):
                    value *= residual / (2 * config["num_hidden_layers"]) ** 0.5
            tensors[name] = torch.from_numpy(value).to(torch.bfloat16)
            total += tensors[name].nbytes
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, output / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        log(f"{file}: {block}, {len(names)} tensors")
    write_json(output / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _decaying(shape: tuple[int, int], decay: float, draw: np.random.Generator) -> np.ndarray:
    """A weight as it is stored, float32 (d_out, d_in), that keeps the size of its inputs: a product of Gaussian factors
    about singular values that decay."""
    d_out, d_in = shape
    values = np.arange(1, min(shape) + 1, dtype=np.float32) ** -decay
    values *= (d_in * np.sum(values**2, dtype=np.float64)) ** -0.5
    left = draw.standard_normal((d_out, len(values)), np.float32)
    return (left * values) @ draw.standard_normal((len(values), d_in), np.float32)


def _write_tokenizer(output: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [_END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if vocabulary < len(tokens):
        problem = f"vocab_size is {vocabulary}; bytes and the end of a text are {len(tokens)} tokens"
        raise ArtifactError(output / "config.json", problem, "Take a larger vocab_size in the file of model.config")
    pairs = list(product(_COMMON, repeat=2))[: vocabulary - len(tokens)]
    ids = {token: number for number, token in enumerate([*tokens, *map("".join, pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END).save_pretrained(output)
