"""The one object every method returns: W ~ D S, with its byte count, error and product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.errors import ArtifactError
from cospadi.files import BFLOAT16, SAFETENSORS_DTYPES, TensorFile
from cospadi.formats.codes import unpack_codes
from cospadi.formats.dictionaries import unpack_dictionary
from cospadi.formats.product import Product
from cospadi.formats.values import BLOCK_SIZE, blocks_of_columns
from cospadi.gram import relative_error
from cospadi.runtime.cospadi_entropy import DamagedStreamError
from cospadi.runtime.cospadi_format import (
    content_faults,
    header_faults,
    in_one_line,
    matrices_faults,
    parts_of,
    spec_faults,
    stored_tensors,
)
from cospadi.runtime.cospadi_registry import FACTOR_CODECS
from cospadi.runtime.cospadi_values import Codec


@dataclass
class Factorization(Product):
    """A matrix as dictionary times codes, ``W ~ D S``, and what is added to that; factors and form are a `Product`'s.

    A mixture of matrix atoms (MASA) is ``W = sum_m c_m A_m``: its dictionary holds the atoms side by side, its codes
    are the coefficients alone.

    Attributes
    ----------
    plus : sequence of Factorization
        Further products that are added; they have none of their own. ``a + b`` puts two factorizations together.
    settled : bool
        Whether the method has decided codec and scales too, so that the file between learning and packing holds the
        numbers as the checkpoint will; else they are rounded later.
    diagnostics : dict
        What the learner has to report: history, shifts, redrawn atoms, seconds.
    """

    plus: Sequence[Factorization] = ()
    settled: bool = False
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[Factorization]:
        """The products that are summed, this matrix's own first."""
        return [replace(self, plus=()), *self.plus]

    @property
    def nbytes(self) -> int:
        """Bytes this matrix takes in the file: dictionary, values, scales and support, of all parts."""
        return super().nbytes + sum(part.nbytes for part in self.plus)

    def reconstruct(self) -> Any:
        """D S plus the other parts, (d_in, d_out)."""
        return sum((part.reconstruct() for part in self.plus), super().reconstruct())

    def __call__(self, x: Any) -> Any:
        """``(x D) S`` plus the other parts: inputs (n, d_in) to outputs (n, d_out) through the factors."""
        return sum((part(x) for part in self.plus), super().__call__(x))

    def __add__(self, other: Factorization) -> Factorization:
        """The sum of two matrices; the parts of `other` follow. A mixture is never the first, whatever the order.

        Raises
        ------
        ValueError
            If the shapes differ, or all parts are mixtures: a file cannot hold that sum.
        """
        first, *rest = sorted([*self.parts, *other.parts], key=lambda part: part.on.mixes)
        if self.shape != other.shape or first.on.mixes:
            what = f"{self.shape} and {other.shape}" if self.shape != other.shape else "mixtures alone"
            raise ValueError(f"no sum of {what}: parts have one shape, and the first is no mixture")
        return replace(first, plus=rest, diagnostics=self.diagnostics)

    @classmethod
    def as_it_is(cls, weight: np.ndarray, storage: Mapping[str, Any]) -> Factorization:
        """Of a weight (d_in, d_out) all of which stays, as exactly as the codec of its values (`storage_of`) can."""
        return cls(None, weight, support="dense", **storage)

    def with_storage(self, **changes: Any) -> Factorization:
        """A copy with other codecs, block size or rounding, in all parts."""
        return replace(self, plus=[part.with_storage(**changes) for part in self.plus], **changes)

    def before_rounding(self) -> Factorization:
        """As it is stored between learning and packing: the numbers themselves, unless they are settled."""
        return self if self.settled else self.with_storage(value_codec="float32", dictionary_codec="float32")

    def columns(self, columns: slice) -> Factorization:
        """Factors of these columns of the matrix: the same dictionaries, in all parts."""
        mask = None if self.mask is None else self.mask[:, columns]
        plus = [part.columns(columns) for part in self.plus]
        return replace(self, codes=self.codes[:, columns], mask=mask, plus=plus)

    def with_columns_times(self, weights: np.ndarray) -> Factorization:
        """Factors of the matrix with its columns times `weights` (d_out,), float32, not zero: the same dictionaries.

        Codes that are multiples of scales stay the same multiples, of scales times the weight of their column.
        """
        plus = [part.with_columns_times(weights) for part in self.plus]
        if self.scales is None:
            return replace(self, codes=to_numpy(self.codes) * weights, plus=plus)
        if FACTOR_CODECS[self.value_codec].variable:
            return replace(self._with_scales_of_columns(), plus=plus).with_scales_times(weights)
        if FACTOR_CODECS[self.value_codec].whole:
            codec = FACTOR_CODECS[self.value_codec]
            codes, scales = codec.with_columns_times(to_numpy(self.codes), to_numpy(self.scales), weights)
            return replace(self, codes=codes, scales=scales, plus=plus)
        blocks, counts = self._blocks(), self._counts()
        columns = np.zeros(int(blocks.max(initial=-1)) + 1, np.int64)
        columns[blocks] = np.repeat(np.arange(len(counts)), counts)
        return replace(self, plus=plus).with_scales_times(weights[columns])

    def with_scales_times(self, factors: np.ndarray) -> Factorization:
        """A copy with the scales of this product's codes times `factors` (n_scales,), float32, rounded to bfloat16; the
        codes are the same whole numbers of them.
        """
        codec, codes = FACTOR_CODECS[self.value_codec], to_numpy(self.codes)
        scales = np.array(to_numpy(self.scales))
        steps = len(codes) if codec.variable else 0  # they come first
        own = scales[0] if codec.shifted else scales.reshape(-1)[steps:]
        before = own.astype(np.float32)
        own[:] = (before * factors).astype(BFLOAT16)
        codes = codes * (own.astype(np.float32) / before)[self.scale_of_codes()]
        return replace(self, codes=codes, scales=scales)

    def scale_of_codes(self) -> np.ndarray:
        """Which of its scales each code of this product has, int64 (k, d_out); 0 where none is stored."""
        codes, blocks = to_numpy(self.codes), self._blocks()
        values = self.on.values(codes, self._mask())
        # through the codes' own order; whole numbers as far as float32 has them
        return self.on.codes(blocks.reshape(values.shape), self._mask(), *codes.shape).astype(np.int64)

    def _blocks(self) -> np.ndarray:
        """Block of every stored value, of those under one scale."""
        return blocks_of_columns(self._counts(), self.block_size)

    def _with_scales_of_columns(self) -> Factorization:
        """Entropy-coded codes with a scale for every column, 1 where there was none."""
        codec, codes = FACTOR_CODECS[self.value_codec], to_numpy(self.codes)
        if codec.scaled:
            return self
        scales = np.concatenate([to_numpy(self.scales), np.ones(codes.shape[1], np.float32)])
        return replace(self, scales=scales, value_codec=codec.with_scales, block_size=None)

    def stored_under(self, name: str) -> Factorization:
        """A copy whose dictionaries, of all parts, are the tensors of matrix `name`, which others share with it."""
        plus = [replace(part, tensor=f"{name}.plus.{index}.dictionary") for index, part in enumerate(self.plus)]
        return replace(self, tensor=f"{name}.dictionary", plus=plus)

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

    def pack(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Tensors and spec of matrix `name` as they go into the file (docs/format.md), of all parts.

        Raises
        ------
        NumericalError
            If a factor holds NaN or infinity.
        """
        tensors, spec = super().pack(name)
        for index, part in enumerate(self.plus):
            part_tensors, part_spec = part.pack(f"{name}.plus.{index}")
            tensors |= part_tensors
            spec.setdefault("plus", []).append(part_spec)
        return tensors, spec


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


def read_factors(file: TensorFile, name: str, spec: Mapping[str, Any], remedy: str) -> Factorization:
    """Factors of matrix `name` of a file, by its spec (`read_specs`); errors as of `unpack`."""
    tensors = {tensor: file.read(tensor) for tensor in tensor_names(name, spec)}
    return unpack(tensors, spec, name, source=file.path, remedy=remedy)


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
    try:
        return _unpack(tensors, spec, name)
    except DamagedStreamError as error:
        raise ArtifactError(source or name, f"the codes of {name} are stored in what {error}", remedy) from error


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
        block_size=spec["codes"].get("group_size", spec["dictionary"].get("group_size", BLOCK_SIZE)),
        scales=scales,
        dictionary_scales=dictionary_scales,
        mask=mask,
        tensor=spec["dictionary"].get("tensor"),
        plus=[_unpack(tensors, part, f"{name}.plus.{i}") for i, part in enumerate(spec.get("plus", ()))],
        settled=spec["codes"]["codec"] != "float32",
    )
