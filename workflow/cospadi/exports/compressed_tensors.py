"""compressed-tensors (vLLM, transformers), format ``pack-quantized``: integers of 2 to 8 bits, exactly as they are.

A row of ``weight_packed`` is a stream of bits from the lowest on, number after number, ``2^(bits - 1)`` added to each,
filled up to words of 32 bits; zero points are packed alike, down the outputs. Scales are a row an output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.checkpoint import (
    StoredTensor,
    check_loads,
    dense_config,
    dense_weight,
    matrices_of,
    open_packed,
    packed_factors,
    write_folder,
)
from cospadi.errors import ArtifactError
from cospadi.exports import Grid, grid_of
from cospadi.files import BFLOAT16

# The library's version whose format this is
VERSION = "0.20.0"


def export(packed_folder: str | Path, output: str | Path, *, log: Callable[[str], None] = print) -> None:
    """Write a packed model, all of whose matrices are integers under scales, as a compressed-tensors folder.

    Raises
    ------
    ArtifactError
        If a matrix is anything else, or its last block is shorter than the others.
    """
    model, packing = open_packed(packed_folder)
    check_loads(model.path)
    specs = matrices_of(packing)
    schemes: dict[tuple[int, int | None, bool], list[str]] = {}
    tensors: list[StoredTensor] = []

    @lru_cache(maxsize=1)  # the parts of a matrix are written one after the other
    def packed(name: str) -> dict[str, np.ndarray]:
        return packed_tensors(grid_of(packed_factors(model, name, specs[name])))

    for name, spec in specs.items():
        grid = _checked(model.path, name, spec, grid_of(packed_factors(model, name, spec)))
        d_in = spec["shape"][0]
        size = None if grid.block_size == d_in else grid.block_size
        schemes.setdefault((grid.bits, size, grid.zeros is None), []).append(name)
        for part, array in packed_tensors(grid).items():
            read = partial(lambda name, part: packed(name)[part], name, part)
            tensors.append(StoredTensor(f"{name}.{part}", array.nbytes, read))
    # its readers look up tokens in a dense embedding alone
    embeddings = packing["matrices"].keys() - specs.keys()
    tensors += [dense_weight(model, packing, name) for name in sorted(embeddings)]
    inside = tuple(f"{name}." for name in packing["matrices"])
    others = [name for name in model.weight_map if not name.startswith(inside) or name.endswith(".bias")]
    tensors += [StoredTensor.of(model.file_of(name), name) for name in others]
    dense = {name.removesuffix(".weight") for name in others if _is_linear(model, name)}
    config = {**dense_config(model), "quantization_config": _quantization(schemes, sorted(dense | {"lm_head"}))}
    write_folder(output, config, tensors, base=model.path)
    log(f"{len(specs)} matrices as they are, in {', '.join(f'{bits} bits' for bits, *_ in schemes)}: {output}")


def _is_linear(model: Any, name: str) -> bool:
    return name.endswith("_proj.weight") and len(model.file_of(name).entries[name]["shape"]) == 2


def _checked(folder: Path, name: str, spec: dict[str, Any], grid: Grid | None) -> Grid:
    remedy = "Export it as gguf, or write it dense (make densify), which takes 16 bits a weight"
    if grid is None:
        codes = f"codes ({spec['codes']['codec']}, {spec['codes']['support']})"
        stored = f"{codes} over a dictionary ({spec['dictionary']['codec']}){' and more' if 'plus' in spec else ''}"
        problem = f"{name} has {stored}; compressed-tensors holds integers alone"
        raise ArtifactError(folder, problem, remedy)
    if spec["shape"][0] % grid.block_size:
        problem = f"{name} has {spec['shape'][0]} inputs in blocks of {grid.block_size}; expected whole blocks"
        raise ArtifactError(folder, problem, remedy)
    return grid


def packed_tensors(grid: Grid) -> dict[str, np.ndarray]:
    """The tensors of a matrix, by the last part of their names."""
    offset = 2 ** (grid.bits - 1)
    signed = 0 if grid.zeros is None else offset  # numbers from 0 on are meant as from -offset on
    tensors = {
        "weight_packed": _words(grid.numbers - signed + offset, grid.bits),
        "weight_scale": grid.scales.astype(BFLOAT16),
        "weight_shape": np.array(grid.numbers.shape, np.int64),
    }
    if grid.zeros is not None:
        tensors["weight_zero_point"] = np.ascontiguousarray(_words(grid.zeros.T - signed + offset, grid.bits).T)
    return tensors


def _words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers below ``2^bits`` as streams of int32."""
    rows, n = numbers.shape
    by_bit = np.unpackbits(numbers.astype(np.uint8)[:, :, None], axis=2, count=bits, bitorder="little")
    by_bit = np.pad(by_bit.reshape(rows, n * bits), ((0, 0), (0, -n * bits % 32)))
    return np.packbits(by_bit, axis=1, bitorder="little").view("<i4")


def _quantization(schemes: dict[tuple[int, int | None, bool], list[str]], ignore: list[str]) -> dict[str, Any]:
    groups = {
        f"group_{index}": {
            # one scheme for all is the form that every reader knows
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for index, ((bits, size, symmetric), names) in enumerate(schemes.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
