"""Codes files made by hand: the layout of docs/format.md, written without the package's codecs."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# every codec and support, shared dictionaries, mixtures and sums, several shards, matrices left dense
PACKINGS = {
    "llama": {"codec": "bf16", "support": "bitmask"},
    "mistral": {"codec": "int4", "support": "dense", "dictionary": "int8", "mixed": True},
    "qwen2": {"codec": "bf14", "support": "bitmask"},
    "qwen3": {"codec": "int8", "support": "bitmask", "dictionary": "int4", "shared": True},
    "gemma3_text": {"codec": "bf14", "support": "2:4", "dictionary": "identity"},
}
GROUP_SIZE = 16


def matrices_of(model_folder: Path) -> dict[str, tuple[int, int]]:
    """Name and shape (d_in, d_out) of every projection of a model folder."""
    names: dict[str, tuple[int, int]] = {}
    for path in model_folder.glob("*.safetensors"):
        for name, tensor in safetensors.numpy.load_file(path).items():
            if name.endswith("_proj.weight"):
                names[name.removesuffix(".weight")] = tensor.T.shape
    return dict(sorted(names.items()))


def write_codes(
    path: Path,
    shapes: dict[str, tuple[int, int]],
    *,
    codec: str = "bf16",
    support: str = "bitmask",
    dictionary: str = "bf16",
    shared: bool = False,
    mixed: bool = False,
    n_atoms: int | None = None,
) -> None:
    """Random factors for matrices of these shapes, ragged in every way, in one codes file.

    With a bitmask column 0 of every matrix has no nonzero and column 1 has all. With `shared`, q, k and v (gate and up)
    of a layer share a dictionary. With `mixed`, down is a mixture of matrix atoms that all layers share, and to q, k, v
    and o such a mixture is added.
    """
    draw = np.random.default_rng(len(shapes))
    tensors: dict[str, np.ndarray] = {}
    specs: dict[str, Any] = {}
    owners: dict[tuple[str, str], str] = {}
    for name, (d_in, d_out) in shapes.items():
        site = "down" if "down" in name else "o" if "o_proj" in name else "mlp" if "mlp" in name else "qkv"
        owner = owners.setdefault((name.rpartition("_proj")[0].rsplit(".", 2)[0], site), name) if shared else name
        first = owners.setdefault(("first", name.rsplit(".", 1)[-1]), name)
        if mixed and site == "down":
            parts, specs[name] = random_matrix(draw, d_in, d_out, 3, codec, "mixture", dictionary, name, first)
            tensors.update(parts)
            continue
        parts, specs[name] = random_matrix(
            draw, d_in, d_out, n_atoms or (27 if support == "bitmask" else 16), codec, support, dictionary, name, owner
        )
        tensors.update(parts)
        if mixed and site != "mlp":
            names = f"{name}.plus.0", f"{first}.plus.0"
            parts, spec = random_matrix(draw, d_in, d_out, 2, codec, "mixture", dictionary, *names)
            specs[name]["plus"] = [spec]
            tensors.update(parts)
    header = {"cospadi": json.dumps({"format_version": 1, "matrices": specs})}
    safetensors.numpy.save_file(tensors, path, header)


def random_matrix(
    draw: np.random.Generator,
    d_in: int,
    d_out: int,
    k: int,
    codec: str = "bf16",
    support: str = "bitmask",
    dictionary: str = "bf16",
    name: str = "m",
    owner: str | None = None,
    group_size: int | None = GROUP_SIZE,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and spec of one matrix; the dictionary is written only if `owner` is the matrix itself (or None).

    `k` is the number of atoms; with support ``mixture``, of matrix atoms.
    """
    tensors: dict[str, np.ndarray] = {}
    n_mixed = k
    k = d_in if dictionary in ("identity", "diagonal") else k * d_out if support == "mixture" else k
    spec: dict[str, Any] = {"shape": [d_in, d_out], "dictionary": {"codec": dictionary, "n_atoms": k}}
    if dictionary != "identity":
        tensor = f"{owner or name}.dictionary"
        spec["dictionary"]["tensor"] = tensor
        if is_scaled(dictionary):
            spec["dictionary"]["group_size"] = group_size
        if owner in (None, name):
            tensors[tensor] = random_numbers(draw, (d_in,) if dictionary == "diagonal" else (d_in, k), dictionary)
            if is_scaled(dictionary):
                n_groups = -(-d_in // (group_size or d_in))
                tensors[f"{tensor}_scales"] = random_scales(draw, (n_groups, k), dictionary)
    if support == "mixture":
        spec["codes"] = {"codec": "bf16", "support": support, "n_nonzero": n_mixed}
        tensors[f"{name}.values"] = random_numbers(draw, (n_mixed,), "bf16")
        return tensors, spec
    mask = np.ones((d_out, k), bool)
    if support == "bitmask":
        mask = draw.random((d_out, k)) < 0.5
        mask[0], mask[min(1, d_out - 1)] = False, True
        tensors[f"{name}.support"] = np.packbits(mask, axis=1, bitorder="little")
    elif support == "2:4":
        first, second = np.array(list(itertools.combinations(range(4), 2)))[draw.integers(0, 6, (d_out, k // 4))].T
        pairs = (first | second << 2).T.astype(np.uint8)
        pairs = np.concatenate([pairs, np.zeros((d_out, pairs.shape[1] % 2), np.uint8)], axis=1)
        tensors[f"{name}.support"] = pairs[:, ::2] | pairs[:, 1::2] << 4
        mask = np.stack([(first == atom) | (second == atom) for atom in range(4)]).T.reshape(d_out, k)
    counts = mask.sum(1)
    spec["codes"] = {"codec": codec, "support": support, "n_nonzero": int(mask.sum())}
    shape = (d_out, k) if support == "dense" else (int(mask.sum()),)
    n_scales = int((-(-counts // (group_size or k))).sum())
    if codec.startswith("ec"):
        tensors[f"{name}.values"] = random_stream(draw, k, d_out, codec)
        spec["codes"]["n_bytes"] = tensors[f"{name}.values"].nbytes
        if codec.endswith("_scaled"):
            spec["codes"] |= {"group_size": group_size, "n_scales": n_scales}
            tensors[f"{name}.scales"] = (0.5 + draw.random(n_scales)).astype(BFLOAT16)
        return tensors, spec
    if codec.startswith("trellis"):
        tensors[f"{name}.values"] = random_trellis(draw, k, d_out, bits_of(codec))
        return tensors, spec
    if codec.startswith("uint"):  # zero points follow
        shape = (int(mask.sum()) + n_scales,)
    tensors[f"{name}.values"] = random_numbers(draw, shape, codec)
    if is_scaled(codec):
        spec["codes"] |= {"group_size": group_size, "n_scales": n_scales}
        tensors[f"{name}.scales"] = random_scales(draw, (n_scales,), codec)
    return tensors, spec


def random_numbers(draw: np.random.Generator, shape: tuple[int, ...], codec: str) -> np.ndarray:
    """Random stored numbers, around 0.2 large if they have no scale."""
    n = int(np.prod(shape))
    if codec == "int8":
        return draw.integers(-128, 128, shape).astype(np.int8)
    if is_scaled(codec):
        bits = bits_of(codec)
        stream = sum(int(word) << bits * i for i, word in enumerate(draw.integers(0, 2**bits, n)))
        return np.frombuffer(stream.to_bytes(-(-bits * n // 8), "little"), np.uint8).copy()
    values = (draw.standard_normal(shape) / 5).astype(BFLOAT16)
    return pack14(values.ravel()) if codec == "bf14" else values


def random_scales(draw: np.random.Generator, shape: tuple[int, ...], codec: str) -> np.ndarray:
    """Random scales of either sign that make numbers around 0.2 large."""
    sign = draw.choice([-1, 1], shape)
    return (sign * (0.5 + draw.random(shape)) / (1.56 * 2 ** bits_of(codec))).astype(BFLOAT16)


def random_stream(draw: np.random.Generator, k: int, d_out: int, codec: str) -> np.ndarray:
    """Random codes around 0.2 large, rows and columns of several sizes, as the package's coder stores them."""
    from cospadi.runtime.cospadi_entropy import steps_near
    from cospadi.runtime.cospadi_registry import CODECS

    steps = steps_near(0.1 * np.exp(0.3 * draw.standard_normal(k)))
    wanted = draw.standard_normal((k, d_out)) * np.exp(0.5 * draw.standard_normal(d_out)) * 2
    wanted[k // 2] *= 300  # one row of numbers wider than a table; its step is as much smaller
    steps[k // 2] /= 256
    numbers, state, code = np.rint(wanted).astype(int), np.zeros(k, int), CODECS[codec].code
    for j in range(0 if code is None else d_out):
        half = np.rint((wanted[:, j] - (state & 1)) / 2).astype(int)
        numbers[:, j], state = 2 * half + (state & 1), code.follow(state, half)
    return CODECS[codec].pack_codes((numbers * steps[:, None]).astype(np.float32), steps).copy()


def random_trellis(draw: np.random.Generator, k: int, d_out: int, bits: int) -> np.ndarray:
    """Random bits, which are codes around 0.2 large whatever they are, under scales of either sign."""
    rows = draw.integers(0, 256, (k, -(-bits * d_out // 8)), np.uint8)
    rows[:, -1] &= 255 >> -bits * d_out % 8
    scales = np.exp(0.3 * draw.standard_normal(k + d_out)) * draw.choice([-1, 1], k + d_out)
    scales[:k] *= 5e-5
    body = b"".join(rows[i : i + 32].T.tobytes() for i in range(0, k, 32)) + scales.astype(BFLOAT16).tobytes()
    return np.frombuffer(body + zlib.crc32(body).to_bytes(4, "little"), np.uint8).copy()


def is_scaled(codec: str) -> bool:
    return codec.startswith(("int", "uint"))


def bits_of(codec: str) -> int:
    return int(codec[-1])


def pack14(values: np.ndarray) -> np.ndarray:
    """Upper 14 bits of every bfloat16, as one little-endian bit stream padded to a whole byte."""
    stream = 0
    for i, word in enumerate(values.view(np.uint16)):
        stream |= (int(word) >> 2) << (14 * i)
    return np.frombuffer(stream.to_bytes(-(-14 * len(values) // 8), "little"), np.uint8)


def write_head(base: Path, path: Path, **changes) -> Path:
    """What errors of a head cost, drawn: what enters it goes together, and few tokens come often."""
    from cospadi.calibration.activations import writing
    from cospadi.files import ModelFolder
    from cospadi.provenance import fingerprint

    draw, folder = np.random.default_rng(0), ModelFolder(base)
    vocabulary, hidden_size = folder.read("model.embed_tokens.weight").shape
    states = draw.normal(size=(500, 12)) @ draw.normal(size=(12, hidden_size)) + draw.normal(size=(500, hidden_size))
    often = 1 / np.arange(1, vocabulary + 1)
    parts = {"gram": states.T @ states, "squares": 300 * often, "counts": np.rint(200 * often)}
    with writing(path, {"format_version": 1, "fingerprint": fingerprint(folder), "n_tokens": 500} | changes) as file:
        for name, part in parts.items():
            file[name] = part
    return path
