"""The one object every method returns: W ~ D S, with its byte count, error and product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.errors import ArtifactError, NumericalError
from cospadi.files import SAFETENSORS_DTYPES, TensorFile
from cospadi.formats.codes import codes_nbytes, n_blocks, pack_codes, unpack_codes
from cospadi.formats.dictionaries import IDENTITY, dictionary_nbytes, pack_dictionary, unpack_dictionary
from cospadi.formats.values import GROUP_SIZE
from cospadi.gram import relative_error
from cospadi.runtime.cospadi_format import (
    content_faults,
    header_faults,
    in_one_line,
    matrices_faults,
    parts_of,
    spec_faults,
    stored_tensors,
)
from cospadi.runtime.cospadi_registry import FACTOR_CODECS, SUPPORTS
from cospadi.runtime.cospadi_supports import Support
from cospadi.runtime.cospadi_values import Codec


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
    support : str
        Key of `cospadi_registry.SUPPORTS`: how the positions of the nonzeros are stored; ``"2:4"`` has two of every
        four atoms in a row.
    value_codec, dictionary_codec : str
        Keys of `cospadi_registry.FACTOR_CODECS`: how the file stores codes and dictionary.
    rounding : {"nearest", "truncate"}
        How values are cut to the codec's bits.
    group_size : int or None
        Numbers a scale covers where a codec has scales: stored values of a column, rows of an atom; None, all of them.
    scales, dictionary_scales : array, optional
        Scales that codes and dictionary are multiples of already; found by `values.find_scales` where they are needed
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
        d_in, _, d_out = self._on.sizes(self.dictionary, self.codes)
        return d_in, d_out

    @property
    def n_atoms(self) -> int:
        """Columns of the dictionary, k."""
        return self._on.sizes(self.dictionary, self.codes)[1]

    @property
    def n_nonzero(self) -> int:
        """Stored values of the codes: the nonzeros, all of them for dense codes, the coefficients of a mixture."""
        return int(self._counts().sum())

    @property
    def nbytes(self) -> int:
        """Bytes this matrix takes in the file: dictionary, values, scales and support, of all parts."""
        (d_in, d_out), k, counts = self.shape, self.n_atoms, self._counts()
        codec = IDENTITY if self.dictionary is None else self.dictionary_codec
        own = dictionary_nbytes(d_in, k, codec, self.group_size)
        scales = n_blocks(counts, self.group_size)
        own += codes_nbytes(self.support, self._stored_value_codec, k, d_out, int(counts.sum()), scales)
        return own + sum(part.nbytes for part in self.plus)

    def reconstruct(self) -> Any:
        """D S plus the other parts, (d_in, d_out)."""
        if self.dictionary is None:
            return sum((part.reconstruct() for part in self.plus), self.codes)
        return self._times(self.dictionary, Factorization.reconstruct)

    def __call__(self, x: Any) -> Any:
        """``(x D) S`` plus the other parts: inputs (n, d_in) to outputs (n, d_out) through the factors."""
        return self._times(x if self.dictionary is None else x @ self.dictionary, lambda part: part(x))

    def __add__(self, other: Factorization) -> Factorization:
        """The sum of two matrices; the parts of `other` follow. A mixture is never the first, whatever the order.

        Raises
        ------
        ValueError
            If the shapes differ, or all parts are mixtures: a file cannot hold that sum.
        """
        first, *rest = sorted(
            (part for one in (self, other) for part in (replace(one, plus=()), *one.plus)),
            key=lambda part: part._on.mixes,
        )
        if self.shape != other.shape or first._on.mixes:
            what = f"{self.shape} and {other.shape}" if self.shape != other.shape else "mixtures alone"
            raise ValueError(f"no sum of {what}: parts have one shape, and the first is no mixture")
        return replace(first, plus=rest, diagnostics=self.diagnostics)

    def with_storage(self, **changes: Any) -> Factorization:
        """A copy with other codecs, block size or rounding, in all parts."""
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
        dictionary_tensors, dictionary_spec = pack_dictionary(
            None if self.dictionary is None else _finite(self.dictionary, f"{name}: dictionary"),
            self.n_atoms,
            dictionary or self.tensor or f"{name}.dictionary",
            codec=self.dictionary_codec,
            group_size=self.group_size,
            scales=self.dictionary_scales,
        )
        codes_tensors, codes_spec = pack_codes(
            _finite(self.codes, f"{name}: codes"),
            self._mask(),
            name,
            support=self.support,
            codec=self._stored_value_codec,
            group_size=self.group_size,
            scales=self.scales,
            rounding=self.rounding,
        )
        tensors = {**dictionary_tensors, **codes_tensors}
        spec = {"shape": list(self.shape), "dictionary": dictionary_spec, "codes": codes_spec}
        for index, part in enumerate(self.plus):
            part_tensors, part_spec = part.pack(f"{name}.plus.{index}")
            tensors |= part_tensors
            spec.setdefault("plus", []).append(part_spec)
        return tensors, spec

    @property
    def _on(self) -> Support:
        return SUPPORTS[self.support]

    @property
    def _stored_value_codec(self) -> str:
        return self._on.value_codec(self.value_codec)

    def _times(self, rows: Any, of_part: Callable[[Factorization], Any]) -> Any:
        """``rows S`` of rows (n, k), plus what the other parts give."""
        return sum((of_part(part) for part in self.plus), self._on.product(rows, self.codes))

    def _mask(self) -> np.ndarray | None:
        """Codes that are stored, (k, d_out); None where the support stores no positions."""
        if not self._on.is_stored:
            return None
        return self._on.complete(to_numpy(self.codes) != 0 if self.mask is None else to_numpy(self.mask))

    def _counts(self) -> np.ndarray:
        """Stored values a column, (d_out,)."""
        return self._on.counts(to_numpy(self.codes), self._mask())


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
        Those the file may have: `cospadi_registry.CODECS`, or `FACTOR_CODECS` of learned factors.
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
    dictionary, dictionary_scales = unpack_dictionary(tensors, spec["dictionary"], d_in)
    codes, mask, scales = unpack_codes(tensors, spec["codes"], name, k, d_out)
    return Factorization(
        dictionary,
        codes,
        support=spec["codes"]["support"],
        value_codec=spec["codes"]["codec"],
        dictionary_codec=spec["dictionary"]["codec"],
        group_size=spec["codes"].get("group_size", spec["dictionary"].get("group_size", GROUP_SIZE)),
        scales=scales,
        dictionary_scales=dictionary_scales,
        mask=mask,
        tensor=spec["dictionary"].get("tensor"),
        plus=[_unpack(tensors, part, f"{name}.plus.{i}") for i, part in enumerate(spec.get("plus", ()))],
    )
