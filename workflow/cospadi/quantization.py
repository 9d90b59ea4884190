"""Turn learned float32 factors into the tensors of the checkpoint, and measure what rounding cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.budget import dense_nbytes
from cospadi.codecs import CODEC_OF_BITS
from cospadi.factorization import tensor_names, unpack
from cospadi.files import ModelFolder, TensorFile, write_json, write_tensors
from cospadi.gram import relative_error
from cospadi.learning import FORMAT_VERSION, matrices_of


def quantize_unit(
    model_folder: Path,
    structure: Mapping[str, Any],
    gram_files: Sequence[Path],
    factors: Path,
    layers: Sequence[int],
    variant: Mapping[str, Any],
    *,
    output: Path,
    diagnostics: Path,
    log: Callable[[str], None] = print,
) -> None:
    """Store the codes of a unit with ``codes.value_bits`` and the dictionary in bfloat16.

    Writes the packed tensors exactly as they go into the checkpoint, and per matrix its bytes and the relative
    error of what the file holds.
    """
    codec = CODEC_OF_BITS[variant["codes"]["value_bits"]]
    rounding = variant["codes"]["rounding"]
    folder = ModelFolder(model_folder)
    learned = TensorFile(factors)
    learned_specs = learned.metadata["matrices"]
    sharers = Counter(spec["dictionary"]["tensor"] for spec in learned_specs.values())
    tensors: dict[str, np.ndarray] = {}
    specs: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    for matrix in matrices_of(structure, layers, gram_files):
        name = matrix.name
        spec = learned_specs[name]
        dictionary = spec["dictionary"]["tensor"]
        parts = {tensor: learned.read(tensor) for tensor in tensor_names(name, spec)}
        factorization = replace(
            unpack(parts, spec, name), value_codec=codec, dictionary_codec="bf16", rounding=rounding
        )
        packed, specs[name] = factorization.pack(name, dictionary=dictionary)
        tensors.update(packed)
        weight = folder.read_weight(name)
        stored = unpack(packed, specs[name], name)
        codes_nbytes = sum(tensor.nbytes for key, tensor in packed.items() if key != dictionary)
        reports[name] = {
            # a shared dictionary is in the file once: each matrix counts its part of it
            "nbytes": codes_nbytes + packed[dictionary].nbytes / sharers[dictionary],
            "dense_nbytes": dense_nbytes(*weight.shape),
            "relative_error": relative_error(weight, stored.reconstruct(), matrix.gram()),
        }
        log(f"{name}: {reports[name]['nbytes']:.0f} bytes, relative error {reports[name]['relative_error']:.4f}")
    write_tensors(output, tensors, {"format_version": FORMAT_VERSION, "matrices": specs})
    write_json(diagnostics, {"format_version": FORMAT_VERSION, "unit": output.stem, "matrices": reports})
