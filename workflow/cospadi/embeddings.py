"""Embeddings: the table of the tokens and the head of a model in few bits, each number rounded for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cospadi.arrays import slices
from cospadi.budget import factors_nbytes
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder
from cospadi.formats.dictionaries import IDENTITY
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import CODEC_OF_BITS
from cospadi.runtime.cospadi_format import EMBEDDING, HEAD, embedding_faults
from cospadi.structure import has_own_head

_AT_ONCE = 4096  # tokens; a multiple of 8, so that a piece ends with a byte


def embeddings_of(base: ModelFolder) -> list[str]:
    """The embedding, and the head where it is another matrix."""
    return [EMBEDDING, HEAD] if f"{HEAD}.weight" in base.weight_map and has_own_head(base) else [EMBEDDING]


def pack_embedding(base: ModelFolder, name: str, bits: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and spec of an embedding or a head (vocabulary, hidden_size), as of `Factorization.pack`.

    Each number is rounded to nearest under the scale of its block, `BLOCK_SIZE` numbers of a token. For the format it
    is a matrix (hidden_size, vocabulary), a column of which is a token.

    Parameters
    ----------
    base : ModelFolder
    name : str
        Of the module.
    bits : int
        A number.

    Raises
    ------
    ArtifactError
        If the rows are no whole bytes.
    NumericalError
        If a number is NaN or infinite.
    """
    weight = base.read(f"{name}.weight")
    vocabulary, hidden_size = weight.shape
    pieces: dict[str, list[np.ndarray]] = {}
    spec: dict[str, Any] = {}
    for tensors, spec in _pieces(weight, name, CODEC_OF_BITS[bits]):  # noqa: B007 (the last one)
        for tensor, array in tensors.items():
            pieces.setdefault(tensor, []).append(array)
    codes = spec["codes"] | {"n_nonzero": vocabulary * hidden_size}
    codes["n_scales"] = sum(map(len, pieces[f"{name}.scales"]))
    spec = {**spec, "shape": [hidden_size, vocabulary], "codes": codes}
    for fault in embedding_faults(spec):
        raise ArtifactError(base.path, f"{name}: {fault}", "Set embedding_bits to 8 or 16")
    return {tensor: np.concatenate(parts) for tensor, parts in pieces.items()}, spec


def _pieces(weight: np.ndarray, name: str, codec: str) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Some tokens at a time, each as a matrix of its own."""
    for rows in slices(0, len(weight), _AT_ONCE):
        columns = np.ascontiguousarray(weight[rows].astype(np.float32).T)
        yield Factorization(None, columns, support="dense", value_codec=codec).pack(name)


def embedding_nbytes(vocabulary: int, hidden_size: int, bits: int) -> int:
    """Bytes of an embedding or a head in the file, scales counted."""
    return factors_nbytes(
        hidden_size,
        vocabulary,
        hidden_size,
        hidden_size * vocabulary,
        support="dense",
        value_codec=CODEC_OF_BITS[bits],
        dictionary_codec=IDENTITY,
    )
