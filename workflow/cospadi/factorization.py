"""The one object every method returns: W ~ D S, with its byte count, error and product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.budget import factors_nbytes
from cospadi.codecs import decode_values, encode_values, pack_support, unpack_support
from cospadi.errors import NumericalError
from cospadi.gram import relative_error


@dataclass
class Factorization:
    """A matrix as dictionary times codes, ``W (d_in, d_out) ~ D (d_in, k) @ S (k, d_out)``.

    Arrays are NumPy or torch, both of one kind; every operation works on either.

    Attributes
    ----------
    dictionary : array (d_in, k), float32
    codes : array (k, d_out), float32
        With explicit zeros where `support` is ``"bitmask"``.
    support : {"bitmask", "dense"}
        How the positions of the nonzeros are stored.
    value_codec, dictionary_codec : str
        Keys of `codecs.VALUE_CODECS`: how the file stores codes and dictionary.
    rounding : {"nearest", "truncate"}
        How values are cut to the codec's bits.
    diagnostics : dict
        What the learner has to report: history, shifts, redrawn atoms, seconds.
    """

    dictionary: Any
    codes: Any
    support: str = "bitmask"
    value_codec: str = "bf16"
    dictionary_codec: str = "bf16"
    rounding: str = "nearest"
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out) of the matrix."""
        return self.dictionary.shape[0], self.codes.shape[1]

    @property
    def n_atoms(self) -> int:
        """Columns of the dictionary, k."""
        return self.dictionary.shape[1]

    @property
    def n_nonzero(self) -> int:
        """Stored values of the codes: the nonzeros, or all of them for dense codes."""
        if self.support == "dense":
            return self.codes.shape[0] * self.codes.shape[1]
        return int((self.codes != 0).sum())

    @property
    def nbytes(self) -> int:
        """Bytes this matrix takes in the file: dictionary, values and support."""
        return factors_nbytes(
            *self.shape,
            self.n_atoms,
            self.n_nonzero,
            support=self.support,
            value_codec=self.value_codec,
            dictionary_codec=self.dictionary_codec,
        )

    def reconstruct(self) -> Any:
        """D S, (d_in, d_out)."""
        return self.dictionary @ self.codes

    def __call__(self, x: Any) -> Any:
        """``(x D) S``: inputs (n, d_in) to outputs (n, d_out) through the factors."""
        return (x @ self.dictionary) @ self.codes

    def relative_error(self, weight: Any, gram: Any | None = None) -> float:
        """``||X (W - D S)||_F / ||X W||_F`` with ``X^T X = gram``; ``gram=None`` means the identity.

        Parameters
        ----------
        weight : array (d_in, d_out)
        gram : array (d_in, d_in), optional
        """
        return relative_error(to_numpy(weight), to_numpy(self.reconstruct()), None if gram is None else to_numpy(gram))

    def quantized(self) -> Factorization:
        """The factorization as the file will hold it: the round trip through its codecs, in float32 NumPy."""
        name = "matrix"
        tensors, spec = self.pack(name)
        return unpack(tensors, spec, name)

    def pack(self, name: str, *, dictionary: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Tensors and spec of matrix `name` as they go into the file (docs/format.md).

        Parameters
        ----------
        name : str
        dictionary : str, optional
            Name of the dictionary's tensor, where several matrices share one; default ``<name>.dictionary``.

        Raises
        ------
        NumericalError
            If a factor holds NaN or infinity.
        """
        dictionary_name = dictionary or f"{name}.dictionary"
        atoms, codes = to_numpy(self.dictionary), to_numpy(self.codes)
        for part, array in (("dictionary", atoms), ("codes", codes)):
            if not np.isfinite(array).all():
                raise NumericalError(f"{name}: {part} holds {np.count_nonzero(~np.isfinite(array))} non-finite values")
        tensors = {dictionary_name: encode_values(atoms, self.dictionary_codec, "nearest")}
        if self.support == "bitmask":
            mask = codes != 0
            tensors[f"{name}.support"] = pack_support(mask)
            values = codes.T[mask.T]
        else:
            values = np.ascontiguousarray(codes.T)
        tensors[f"{name}.values"] = encode_values(values, self.value_codec, self.rounding)
        spec = {
            "shape": list(self.shape),
            "dictionary": {
                "codec": self.dictionary_codec,
                "n_atoms": self.n_atoms,
                "tensor": dictionary_name,
            },
            "codes": {"codec": self.value_codec, "support": self.support, "n_nonzero": int(values.size)},
        }
        return tensors, spec


def tensor_names(name: str, spec: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that matrix `name` is read from."""
    support = [f"{name}.support"] if spec["codes"]["support"] == "bitmask" else []
    return [spec["dictionary"]["tensor"], f"{name}.values", *support]


def unpack(tensors: Mapping[str, np.ndarray], spec: Mapping[str, Any], name: str) -> Factorization:
    """Inverse of `Factorization.pack`: float32 factors of matrix `name`.

    Parameters
    ----------
    tensors : mapping
        Holds the `tensor_names` of the matrix.
    spec : mapping
        As written by `Factorization.pack`.
    """
    d_in, d_out = spec["shape"]
    k = spec["dictionary"]["n_atoms"]
    n_nonzero = spec["codes"]["n_nonzero"]
    dictionary = decode_values(np.asarray(tensors[spec["dictionary"]["tensor"]]), spec["dictionary"]["codec"], d_in * k)
    values = decode_values(np.asarray(tensors[f"{name}.values"]).ravel(), spec["codes"]["codec"], n_nonzero)
    if spec["codes"]["support"] == "bitmask":
        codes = np.zeros((d_out, k), np.float32)
        codes[unpack_support(np.asarray(tensors[f"{name}.support"]), k).T] = values
    else:
        codes = values.reshape(d_out, k)
    return Factorization(
        dictionary.reshape(d_in, k),
        np.ascontiguousarray(codes.T),
        support=spec["codes"]["support"],
        value_codec=spec["codes"]["codec"],
        dictionary_codec=spec["dictionary"]["codec"],
    )
