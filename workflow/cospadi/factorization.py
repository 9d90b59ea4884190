"""The one object every method returns: W ~ D S, with its byte count, error and product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.budget import factors_nbytes
from cospadi.codecs import (
    GROUP_SIZE,
    IDENTITY,
    INTEGER_CODECS,
    decode_grouped,
    decode_values,
    encode_grouped,
    encode_values,
    fill_pairs,
    find_scales,
    groups_of_atoms,
    groups_of_columns,
    pack_pairs,
    pack_support,
    unpack_pairs,
    unpack_support,
)
from cospadi.errors import NumericalError
from cospadi.files import BFLOAT16
from cospadi.gram import relative_error


@dataclass
class Factorization:
    """A matrix as dictionary times codes, ``W (d_in, d_out) ~ D (d_in, k) @ S (k, d_out)``.

    Arrays are NumPy or torch, both of one kind; every operation works on either.

    Attributes
    ----------
    dictionary : array (d_in, k), float32, or None
        None is the identity (k = d_in), which takes no bytes.
    codes : array (k, d_out), float32
        With explicit zeros unless `support` is ``"dense"``.
    support : {"bitmask", "dense", "2:4"}
        How the positions of the nonzeros are stored; ``"2:4"`` has two of every four atoms in a row.
    value_codec, dictionary_codec : str
        Keys of `codecs.VALUE_CODECS` or `codecs.INTEGER_CODECS`: how the file stores codes and dictionary.
    rounding : {"nearest", "truncate"}
        How values are cut to the codec's bits.
    group_size : int or None
        Numbers a scale covers where a codec has scales: stored values of a column, rows of an atom; None, all of them.
    scales, dictionary_scales : array, optional
        Scales that codes and dictionary are multiples of already; found by `codecs.find_scales` where they are needed
        and not given.
    mask : array (k, d_out), bool, optional
        Codes that are stored, some of which may be zero; default: the nonzeros.
    diagnostics : dict
        What the learner has to report: history, shifts, redrawn atoms, seconds.
    """

    dictionary: Any
    codes: Any
    support: str = "bitmask"
    value_codec: str = "bf16"
    dictionary_codec: str = "bf16"
    rounding: str = "nearest"
    group_size: int | None = GROUP_SIZE
    scales: Any | None = None
    dictionary_scales: Any | None = None
    mask: Any | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out) of the matrix."""
        return (self.codes if self.dictionary is None else self.dictionary).shape[0], self.codes.shape[1]

    @property
    def n_atoms(self) -> int:
        """Rows of the codes, k."""
        return self.codes.shape[0]

    @property
    def n_nonzero(self) -> int:
        """Stored values of the codes: the nonzeros, or all of them for dense codes."""
        return int(self._counts().sum())

    @property
    def nbytes(self) -> int:
        """Bytes this matrix takes in the file: dictionary, values, scales and support."""
        counts = self._counts()
        return factors_nbytes(
            *self.shape,
            self.n_atoms,
            int(counts.sum()),
            support=self.support,
            value_codec=self.value_codec,
            dictionary_codec=IDENTITY if self.dictionary is None else self.dictionary_codec,
            group_size=self.group_size,
            n_scales=int((-(-counts // (self.group_size or max(1, counts.max(initial=1))))).sum()),
        )

    def reconstruct(self) -> Any:
        """D S, (d_in, d_out)."""
        return self.codes if self.dictionary is None else self.dictionary @ self.codes

    def __call__(self, x: Any) -> Any:
        """``(x D) S``: inputs (n, d_in) to outputs (n, d_out) through the factors."""
        return (x if self.dictionary is None else x @ self.dictionary) @ self.codes

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
        tensors: dict[str, np.ndarray] = {}
        codes = _finite(self.codes, f"{name}: codes")
        dictionary_spec: dict[str, Any] = {"codec": IDENTITY, "n_atoms": self.n_atoms}
        if self.dictionary is not None:
            atoms = _finite(self.dictionary, f"{name}: dictionary")
            tensor = dictionary or f"{name}.dictionary"
            dictionary_spec = {"codec": self.dictionary_codec, "n_atoms": self.n_atoms, "tensor": tensor}
            if self.dictionary_codec in INTEGER_CODECS:
                groups, scales = groups_of_atoms(*atoms.shape, self.group_size), self.dictionary_scales
                if scales is None:
                    scales = find_scales(atoms.ravel(), groups.ravel(), self.dictionary_codec)
                scales = to_numpy(scales).astype(BFLOAT16)
                tensors[tensor] = encode_grouped(atoms, groups, scales.ravel(), self.dictionary_codec)
                tensors[f"{tensor}_scales"] = scales.reshape(-1, self.n_atoms)
                dictionary_spec["group_size"] = self.group_size
            else:
                tensors[tensor] = encode_values(atoms, self.dictionary_codec, "nearest")
        if self.support == "dense":
            values = np.ascontiguousarray(codes.T)
            counts = np.full(codes.shape[1], self.n_atoms)
        else:
            mask = self._mask()
            tensors[f"{name}.support"] = (pack_pairs if self.support == "2:4" else pack_support)(mask)
            values = codes.T[mask.T]
            counts = mask.sum(0)
        codes_spec = {"codec": self.value_codec, "support": self.support, "n_nonzero": int(values.size)}
        if self.value_codec in INTEGER_CODECS:
            groups, scales = groups_of_columns(counts, self.group_size).reshape(values.shape), self.scales
            if scales is None:
                scales = find_scales(values.ravel(), groups.ravel(), self.value_codec)
            scales = to_numpy(scales).astype(BFLOAT16)
            tensors[f"{name}.values"] = encode_grouped(values, groups, scales, self.value_codec, self.rounding)
            tensors[f"{name}.scales"] = scales
            codes_spec |= {"group_size": self.group_size, "n_scales": int(scales.size)}
        else:
            tensors[f"{name}.values"] = encode_values(values, self.value_codec, self.rounding)
        return tensors, {"shape": list(self.shape), "dictionary": dictionary_spec, "codes": codes_spec}

    def _mask(self) -> np.ndarray:
        """Codes that are stored, (k, d_out)."""
        mask = to_numpy(self.codes) != 0 if self.mask is None else to_numpy(self.mask)
        return fill_pairs(mask) if self.support == "2:4" else mask

    def _counts(self) -> np.ndarray:
        """Stored values a column, (d_out,)."""
        if self.support == "dense":
            return np.full(self.codes.shape[1], self.n_atoms)
        return self._mask().sum(0)


def _finite(array: Any, what: str) -> np.ndarray:
    array = to_numpy(array)
    if not np.isfinite(array).all():
        raise NumericalError(f"{what} holds {np.count_nonzero(~np.isfinite(array))} non-finite values")
    return array


def dictionary_names(spec: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that hold a matrix's dictionary, which it may share with others."""
    dictionary = spec["dictionary"]
    if dictionary["codec"] == IDENTITY:
        return []
    scales = [f"{dictionary['tensor']}_scales"] if dictionary["codec"] in INTEGER_CODECS else []
    return [dictionary["tensor"], *scales]


def tensor_names(name: str, spec: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that matrix `name` is read from."""
    scales = [f"{name}.scales"] if spec["codes"]["codec"] in INTEGER_CODECS else []
    support = [] if spec["codes"]["support"] == "dense" else [f"{name}.support"]
    return [*dictionary_names(spec), f"{name}.values", *scales, *support]


def unpack(tensors: Mapping[str, np.ndarray], spec: Mapping[str, Any], name: str) -> Factorization:
    """Inverse of `Factorization.pack`: float32 factors of matrix `name`.

    Parameters
    ----------
    tensors : mapping
        Holds the `tensor_names` of the matrix.
    spec : mapping
        As written by `Factorization.pack`.
    """
    (d_in, d_out), k = spec["shape"], spec["dictionary"]["n_atoms"]
    dictionary_codec, value_codec = spec["dictionary"]["codec"], spec["codes"]["codec"]
    support = spec["codes"]["support"]
    group_size = spec["codes"].get("group_size", spec["dictionary"].get("group_size", GROUP_SIZE))
    dictionary = dictionary_scales = mask = scales = None
    if dictionary_codec in INTEGER_CODECS:
        stored, dictionary_scales = (np.asarray(tensors[part]) for part in dictionary_names(spec))
        groups = groups_of_atoms(d_in, k, spec["dictionary"]["group_size"])
        dictionary = decode_grouped(stored, groups, dictionary_scales.ravel(), dictionary_codec)
    elif dictionary_codec != IDENTITY:
        stored = np.asarray(tensors[spec["dictionary"]["tensor"]])
        dictionary = decode_values(stored, dictionary_codec, d_in * k).reshape(d_in, k)
    if support == "dense":
        counts = np.full(d_out, k)
    else:
        mask = (unpack_pairs if support == "2:4" else unpack_support)(np.asarray(tensors[f"{name}.support"]), k)
        counts = mask.sum(0)
    stored = np.asarray(tensors[f"{name}.values"]).ravel()
    if value_codec in INTEGER_CODECS:
        scales = np.asarray(tensors[f"{name}.scales"])
        values = decode_grouped(stored, groups_of_columns(counts, spec["codes"]["group_size"]), scales, value_codec)
    else:
        values = decode_values(stored, value_codec, spec["codes"]["n_nonzero"])
    if mask is None:
        codes = values.reshape(d_out, k)
    else:
        codes = np.zeros((d_out, k), np.float32)
        codes[mask.T] = values
    return Factorization(
        dictionary,
        np.ascontiguousarray(codes.T),
        support=support,
        value_codec=value_codec,
        dictionary_codec=dictionary_codec,
        group_size=group_size,
        scales=scales,
        dictionary_scales=dictionary_scales,
        mask=mask,
    )
