"""The one object every method returns: W ~ D S, with its byte count, error and product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.budget import factors_nbytes
from cospadi.codecs import (
    GROUP_SIZE,
    IDENTITY,
    INTEGER_CODECS,
    MIXTURE,
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
from cospadi.errors import ArtifactError, NumericalError
from cospadi.files import BFLOAT16, SAFETENSORS_DTYPES, TensorFile
from cospadi.gram import relative_error
from cospadi.runtime.cospadi_format import (
    FACTOR_CODECS,
    Codec,
    content_faults,
    header_faults,
    in_one_line,
    matrices_faults,
    parts_of,
    spec_faults,
    stored_tensors,
)


@dataclass
class Factorization:
    """A matrix as dictionary times codes, ``W (d_in, d_out) ~ D (d_in, k) @ S (k, d_out)``, plus others of its kind.

    Arrays are NumPy or torch, both of one kind; every operation works on either. A mixture of matrix atoms (MASA) is
    ``W = sum_m c_m A_m``: its dictionary holds the atoms side by side, its codes are the coefficients alone.

    Attributes
    ----------
    dictionary : array (d_in, k), float32, or None
        None is the identity (k = d_in), which takes no bytes.
    codes : array (k, d_out), float32
        With explicit zeros unless `support` is ``"dense"``. Of a mixture: (n_matrix_atoms,).
    support : {"bitmask", "dense", "2:4", "mixture"}
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
    tensor : str, optional
        Name of the dictionary's tensor, where several matrices share one; default ``<matrix>.dictionary``.
    plus : sequence of Factorization
        Further parts that are added; they have none of their own.
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
    tensor: str | None = None
    plus: Sequence[Factorization] = ()
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out) of the matrix."""
        if self.support == MIXTURE:
            d_in, k = self.dictionary.shape
            return d_in, k // self.codes.shape[0]
        return (self.codes if self.dictionary is None else self.dictionary).shape[0], self.codes.shape[1]

    @property
    def n_atoms(self) -> int:
        """Columns of the dictionary, k."""
        return self.codes.shape[0] * (self.shape[1] if self.support == MIXTURE else 1)

    @property
    def n_nonzero(self) -> int:
        """Stored values of the codes: the nonzeros, all of them for dense codes, the coefficients of a mixture."""
        return self.codes.shape[0] if self.support == MIXTURE else int(self._counts().sum())

    @property
    def nbytes(self) -> int:
        """Bytes this matrix takes in the file: dictionary, values, scales and support, of all parts."""
        counts = None if self.support == MIXTURE else self._counts()
        own = factors_nbytes(
            *self.shape,
            self.n_atoms,
            self.n_nonzero,
            support=self.support,
            value_codec=self._stored_value_codec,
            dictionary_codec=IDENTITY if self.dictionary is None else self.dictionary_codec,
            group_size=self.group_size,
            n_scales=0
            if counts is None
            else int((-(-counts // (self.group_size or max(1, counts.max(initial=1))))).sum()),
        )
        return own + sum(part.nbytes for part in self.plus)

    def reconstruct(self) -> Any:
        """D S plus the other parts, (d_in, d_out)."""
        if self.support == MIXTURE:
            product = self._mixed(self.dictionary)
        else:
            product = self.codes if self.dictionary is None else self.dictionary @ self.codes
        return sum((part.reconstruct() for part in self.plus), product)

    def __call__(self, x: Any) -> Any:
        """``(x D) S`` plus the other parts: inputs (n, d_in) to outputs (n, d_out) through the factors."""
        projected = x if self.dictionary is None else x @ self.dictionary
        product = self._mixed(projected) if self.support == MIXTURE else projected @ self.codes
        return sum((part(x) for part in self.plus), product)

    def with_storage(self, **changes: Any) -> Factorization:
        """A copy with other codecs, group size or rounding, in all parts."""
        return replace(self, plus=[part.with_storage(**changes) for part in self.plus], **changes)

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
        parts = [part.pack(f"{name}.plus.{index}") for index, part in enumerate(self.plus)]
        codes = _finite(self.codes, f"{name}: codes")
        dictionary_spec: dict[str, Any] = {"codec": IDENTITY, "n_atoms": self.n_atoms}
        if self.dictionary is not None:
            atoms = _finite(self.dictionary, f"{name}: dictionary")
            tensor = dictionary or self.tensor or f"{name}.dictionary"
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
        if self.support == MIXTURE:
            values, counts = codes, None
        elif self.support == "dense":
            values = np.ascontiguousarray(codes.T)
            counts = np.full(codes.shape[1], self.n_atoms)
        else:
            mask = self._mask()
            tensors[f"{name}.support"] = (pack_pairs if self.support == "2:4" else pack_support)(mask)
            values = codes.T[mask.T]
            counts = mask.sum(0)
        codec = self._stored_value_codec
        codes_spec = {"codec": codec, "support": self.support, "n_nonzero": int(values.size)}
        if codec in INTEGER_CODECS:
            groups, scales = groups_of_columns(counts, self.group_size).reshape(values.shape), self.scales
            if scales is None:
                scales = find_scales(values.ravel(), groups.ravel(), codec)
            scales = to_numpy(scales).astype(BFLOAT16)
            tensors[f"{name}.values"] = encode_grouped(values, groups, scales, codec, self.rounding)
            tensors[f"{name}.scales"] = scales
            codes_spec |= {"group_size": self.group_size, "n_scales": int(scales.size)}
        else:
            tensors[f"{name}.values"] = encode_values(values, codec, self.rounding)
        spec = {"shape": list(self.shape), "dictionary": dictionary_spec, "codes": codes_spec}
        if parts:
            spec["plus"] = [part_spec for _, part_spec in parts]
            for part_tensors, _ in parts:
                tensors |= part_tensors
        return tensors, spec

    @property
    def _stored_value_codec(self) -> str:
        """Coefficients of a mixture are few, and all of the matrix hangs on each: they are never cut."""
        return "bf16" if self.support == MIXTURE and self.value_codec != "float32" else self.value_codec

    def _mixed(self, rows: Any) -> Any:
        """``sum_m c_m rows_m`` of rows (n, k) that stand side by side in blocks of d_out, (n, d_out)."""
        blocks = rows.reshape(rows.shape[0], self.codes.shape[0], -1)
        return (blocks * self.codes[None, :, None]).sum(1)

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
    """Names of the tensors that hold a matrix's dictionaries, which it may share with others."""
    return [tensor for tensor, kind in _tensors("", spec).items() if kind.startswith("dictionary")]


def tensor_names(name: str, spec: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that matrix `name` is read from, dictionaries first."""
    tensors = _tensors(name, spec)
    return sorted(tensors, key=lambda tensor: not tensors[tensor].startswith("dictionary"))


def _tensors(name: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """Tensors of all parts of a matrix to what they are of it."""
    return {
        tensor: kind
        for part in parts_of(name, spec).items()
        for tensor, (kind, _, _) in stored_tensors(*part, FACTOR_CODECS).items()
    }


def read_specs(file: TensorFile, codecs: Mapping[str, Codec], remedy: str) -> dict[str, Any]:
    """Specs of all matrices of a factors or codes file, after its header was checked against them.

    Parameters
    ----------
    file : TensorFile
    codecs : mapping
        Those the file may have: `cospadi_format.CODECS`, or `FACTOR_CODECS` of learned factors.
    remedy : str
        What the user does if the file is at fault.

    Raises
    ------
    ArtifactError
        Naming the file, matrix and tensor.
    """
    matrices = file.metadata.get("matrices")
    if not isinstance(matrices, dict):
        raise ArtifactError(file.path, "the header describes no matrices", remedy)
    faults = matrices_faults(matrices, codecs) if matrices else []
    if not faults:
        entries = {name: (entry["dtype"], entry["shape"]) for name, entry in file.entries.items()}
        faults = header_faults(matrices, entries, codecs)
    if faults:
        raise ArtifactError(file.path, in_one_line(faults), remedy)
    return matrices


def unpack(
    tensors: Mapping[str, np.ndarray],
    spec: Mapping[str, Any],
    name: str,
    *,
    source: str | Path | None = None,
    remedy: str = "Make its file again",
) -> Factorization:
    """Inverse of `Factorization.pack`: float32 factors of matrix `name`.

    Parameters
    ----------
    tensors : mapping
        Holds the `tensor_names` of the matrix; all of it is checked before it is used.
    spec : mapping
        As written by `Factorization.pack`.
    source : path-like, optional
        File or folder the tensors are from, for errors.
    remedy : str
        What the user does if they are at fault.

    Raises
    ------
    ArtifactError
        If spec or tensors are not as docs/format.md says.
    """
    faults = spec_faults(spec, FACTOR_CODECS)
    if not faults:
        given = [tensor for tensor in tensor_names(name, spec) if tensor in tensors]
        entries = {tensor: (_dtype_name(tensors[tensor]), tensors[tensor].shape) for tensor in given}
        faults = header_faults({name: spec}, entries, FACTOR_CODECS)
    if not faults:
        faults = content_faults(parts_of(name, spec), lambda tensor: np.asarray(tensors[tensor]), FACTOR_CODECS)
    if faults:
        raise ArtifactError(source or name, in_one_line(faults), remedy)
    return _unpack(tensors, spec, name)


def _dtype_name(array: Any) -> str:
    """Dtype of a tensor in safetensors' words; another's own name."""
    dtype = np.asarray(array).dtype
    return next((word for word, known in SAFETENSORS_DTYPES.items() if known == dtype), str(dtype))


def _unpack(tensors: Mapping[str, np.ndarray], spec: Mapping[str, Any], name: str) -> Factorization:
    (d_in, d_out), k = spec["shape"], spec["dictionary"]["n_atoms"]
    dictionary_codec, value_codec = spec["dictionary"]["codec"], spec["codes"]["codec"]
    support = spec["codes"]["support"]
    group_size = spec["codes"].get("group_size", spec["dictionary"].get("group_size", GROUP_SIZE))
    dictionary = dictionary_scales = mask = scales = None
    if dictionary_codec in INTEGER_CODECS:
        tensor = spec["dictionary"]["tensor"]
        stored, dictionary_scales = np.asarray(tensors[tensor]), np.asarray(tensors[f"{tensor}_scales"])
        groups = groups_of_atoms(d_in, k, spec["dictionary"]["group_size"])
        dictionary = decode_grouped(stored, groups, dictionary_scales.ravel(), dictionary_codec)
    elif dictionary_codec != IDENTITY:
        stored = np.asarray(tensors[spec["dictionary"]["tensor"]])
        dictionary = decode_values(stored, dictionary_codec, d_in * k).reshape(d_in, k)
    if support == MIXTURE:
        counts = None
    elif support == "dense":
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
    if support == MIXTURE:
        codes = values
    elif mask is None:
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
        tensor=spec["dictionary"].get("tensor"),
        plus=[_unpack(tensors, part, f"{name}.plus.{i}") for i, part in enumerate(spec.get("plus", ()))],
    )
