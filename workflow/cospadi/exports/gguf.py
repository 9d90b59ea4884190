"""GGUF (llama.cpp): a model in one file, its matrices dense, or in blocks of 32 numbers under a float16 scale.

``Q4_0`` and ``Q8_0`` are integers of 4 and 8 bits, ``Q4_1`` has a least value beside the scale. Matrices that are
stored as such integers, in blocks of a multiple of 32, keep them; others are rounded anew, by the rules of llama.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.checkpoint import check_loads, matrices_of, open_packed, packed_factors, target_bytes
from cospadi.errors import ArtifactError
from cospadi.exports import Grid, bits_of, grid_of
from cospadi.files import ModelFolder, replacing

_BLOCK = 32
# Codec's bits, and whether it has zero points, of what a type holds exactly
_SAME = {(8, False): "Q8_0", (4, False): "Q4_0", (4, True): "Q4_1"}
# Families whose tensors and numbers llama.cpp knows under the same names
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
# Those whose rotary embedding turns neighbouring outputs, where transformers turns halves
_NEIGHBOURS = ("llama", "mistral")
# How text is cut before byte pairs are merged, as tokenizer.json has it: regular expressions, and whether digits come
# one by one, to llama.cpp's word
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
    ((), False): "gpt-2",
    ((), True): "smollm",
    ((_QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"),), False): "llama-bpe",
    ((_QWEN,), False): "qwen2",
}


def export(
    packed_folder: str | Path, output: str | Path, *, kind: str = "BF16", log: Callable[[str], None] = print
) -> None:
    """Write a packed model as one GGUF file.

    Parameters
    ----------
    packed_folder, output : path-like
    kind : str
        Of `exports.GGUF_TYPES`: how matrices are stored. Embeddings take ``Q8_0`` where this is a type of blocks,
        vectors float32.

    Raises
    ------
    ArtifactError
        If the model's family, rotary embedding or tokenizer is none that GGUF files written here can describe.
    """
    import gguf

    model, packing = open_packed(packed_folder)
    check_loads(model.path)
    specs, matrices, family = packing["matrices"], matrices_of(packing), model.config["base_model_type"]
    if family not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ArtifactError(
            model.path, f"models of the family {family} are not written as GGUF; known: {known}", _REMEDY
        )
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[family]]
    names = gguf.get_tensor_name_map(architecture, model.config["num_hidden_layers"])
    inside = {f"{name}.": name for name in specs}
    kept = 0
    with replacing(output) as path:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture], use_temp_file=True)
        _add_config(writer, model, kind)
        _add_tokenizer(writer, model)

        def add(name: str, array: np.ndarray, wanted: str) -> None:
            renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if renamed is None:
                raise ArtifactError(model.path, f"llama.cpp has no place for {name} in a {family}", _REMEDY)
            stored = gguf.GGMLQuantizationType[wanted]
            # rows of blocks are bytes, whose shape says how many numbers they are
            writer.add_tensor(renamed, array, raw_dtype=stored)

        for name in model.weight_map:
            module = name.rsplit(".", 1)[0]
            if any(name.startswith(prefix) for prefix in inside) and not name.endswith(".bias"):
                continue
            array = np.asarray(model.read(name)).astype(np.float32)
            wanted = (
                "F32"
                if array.ndim == 1
                else _possible(kind if module.endswith("_proj") else _embedded(kind), array.shape[-1])
            )
            add(
                name,
                gguf.quants.quantize(_ordered(array, module, model.config), gguf.GGMLQuantizationType[wanted]),
                wanted,
            )
        for name, spec in specs.items():
            factors = packed_factors(model, name, spec)
            wanted = kind if name in matrices else _embedded(kind)
            blocks = _blocks(grid_of(factors), wanted)
            kept += blocks is not None and name in matrices
            wanted = wanted if blocks is not None else _possible(wanted, spec["shape"][0])
            if blocks is None:
                dense = np.ascontiguousarray(factors.reconstruct().T)
                blocks = gguf.quants.quantize(dense, gguf.GGMLQuantizationType[wanted])
            add(f"{name}.weight", np.ascontiguousarray(_ordered(blocks, name, model.config)), wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    log(_what_is_lost(model, matrices, kind, kept))


_REMEDY = "Write it dense (make densify) and convert that with llama.cpp's own tools"


def _what_is_lost(model: ModelFolder, specs: Mapping[str, Any], kind: str, kept: int) -> str:
    import gguf

    if kept == len(specs):
        return f"all {kept} matrices are the integers that they were, in {kind}"
    numbers, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    before = bits_of(specs, target_bytes(model.path)["nbytes"])
    return (
        f"{len(specs) - kept} of {len(specs)} matrices were multiplied out and stored as {kind}: "
        f"{8 * nbytes / numbers:g} bits a weight where the packed folder has {before:.3g}; "
        "what supports, dictionaries and entropy coding saved is lost"
    )


def _possible(kind: str, width: int) -> str:
    """A type for rows of so many numbers, which may be no whole blocks."""
    return kind if kind in ("F32", "F16", "BF16") or width % _BLOCK == 0 else "F16"


def _embedded(kind: str) -> str:
    return "Q8_0" if kind.startswith("Q") else kind


def _blocks(grid: Grid | None, kind: str) -> np.ndarray | None:
    """Bytes (d_out, ...) of integers in blocks of 32; None where the type does not hold these."""
    if grid is None or _SAME.get((grid.bits, grid.zeros is not None)) != kind:
        return None
    (d_out, d_in), size = grid.numbers.shape, grid.block_size
    scales = grid.scales.astype(np.float16)
    if size % _BLOCK or d_in % _BLOCK or not np.array_equal(scales.astype(np.float32), grid.scales):
        return None
    block = np.arange(d_in // _BLOCK) * _BLOCK // size
    parts = [scales[:, block]]
    if grid.zeros is not None:
        parts.append((-grid.zeros * grid.scales).astype(np.float16)[:, block])
    numbers = grid.numbers.reshape(d_out, -1, _BLOCK)
    if grid.bits == 4:
        words = (numbers + (8 if grid.zeros is None else 0)).astype(np.uint8)
        words = words[:, :, : _BLOCK // 2] | words[:, :, _BLOCK // 2 :] << 4
    else:
        words = numbers.astype(np.int8).view(np.uint8)
    heads = [np.ascontiguousarray(part).view(np.uint8).reshape(d_out, -1, 2) for part in parts]
    return np.concatenate([*heads, words], axis=2).reshape(d_out, -1)


def _ordered(rows: np.ndarray, module: str, config: Mapping[str, Any]) -> np.ndarray:
    """Rows, or numbers, of queries and keys in the order in which llama.cpp turns them."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rsplit(".", 1)[-1])
    if heads is None or config["base_model_type"] not in _NEIGHBOURS:
        return rows
    n_heads = config.get(heads) or config["num_attention_heads"]
    halves = rows.reshape(n_heads, 2, len(rows) // n_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _add_config(writer: Any, model: ModelFolder, kind: str) -> None:
    import gguf

    config = model.config
    n_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and window < config["max_position_embeddings"]:
        problem = f"its attention sees {window} tokens (sliding_window), which such a file cannot say"
        raise ArtifactError(model.path, problem, _REMEDY)
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    writer.add_name(model.path.parent.name)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or n_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    writer.add_rope_freq_base(theta)
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif scaling == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, theta, head_dim))
    elif scaling != "default":
        raise ArtifactError(model.path, f"rotary embeddings scaled by {scaling} are not written as GGUF", _REMEDY)


def _llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What llama.cpp divides the frequencies of Llama 3.1 and later by, float32 (head_dim / 2,)."""
    lengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    share = np.clip((original / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


def _add_tokenizer(writer: Any, model: ModelFolder) -> None:
    import gguf

    path = model.path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    cut = _cut(content.get("pre_tokenizer"))
    if content.get("model", {}).get("type") != "BPE" or cut not in _CUTS:
        known = ", ".join(_CUTS.values())
        problem = f"its tokenizer is none of byte pairs cut in a way that llama.cpp has a word for here ({known})"
        raise ArtifactError(path, problem, _REMEDY)
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    words = {place: word for word, place in content["model"]["vocab"].items()}
    tokens, kinds = [], []
    for place in range(model.config["vocab_size"]):
        entry = added.get(place)
        tokens.append(entry["content"] if entry else words.get(place, f"[PAD{place}]"))
        kind = "NORMAL" if place in words else "UNUSED"
        kinds.append(gguf.TokenType[("CONTROL" if entry["special"] else "USER_DEFINED") if entry else kind])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_CUTS[cut])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(model.path, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)


def _cut(pre_tokenizer: Mapping[str, Any] | None) -> tuple[tuple[str, ...], bool] | None:
    """Regular expressions of a pre-tokenizer, and whether it has digits one by one; None for what is not known."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    expressions, digits, by_bytes = [], False, False
    for part in parts:
        match part:
            case {"type": "ByteLevel"}:
                by_bytes = True
            case {"type": "Digits", "individual_digits": True}:
                digits = True
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}:
                expressions.append(expression)
            case _:
                return None
    return (tuple(expressions), digits) if by_bytes else None
