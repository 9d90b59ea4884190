"""One product of a dictionary and codes: the factors and how the file stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.errors import NumericalError
from cospadi.formats.codes import codes_nbytes, n_blocks, pack_codes
from cospadi.formats.dictionaries import IDENTITY, dictionary_nbytes, pack_dictionary
from cospadi.formats.values import BLOCK_SIZE
from cospadi.runtime.cospadi_diagonal import times
from cospadi.runtime.cospadi_registry import FACTOR_CODECS, SUPPORTS
from cospadi.runtime.cospadi_supports import Support


@dataclass
class Product:
    """``W (d_in, d_out) = D (d_in, k) @ S (k, d_out)``, of NumPy or torch arrays, both of one kind.

    Attributes
    ----------
    dictionary : array (d_in, k), float32, or None
        None is the identity (k = d_in), which takes no bytes. (d_in,): a diagonal, of the codec of that name.
    codes : array (k, d_out), float32
        With explicit zeros unless `support` is ``"dense"``. Of a mixture: (n_matrix_atoms,).
    support : str
        Key of `cospadi_registry.SUPPORTS`: how the positions of the nonzeros are stored; ``"2:4"`` has two of every
        four atoms in a row.
    value_codec, dictionary_codec : str
        Keys of `cospadi_registry.FACTOR_CODECS`: how the file stores codes and dictionary.
    rounding : {"nearest", "truncate"}
        How values are cut to the codec's bits.
    block_size : int or None
        Numbers a scale covers where a codec has scales: stored values of a column, rows of an atom; None, all of them.
    scales, dictionary_scales : array, optional
        Scales that codes and dictionary are multiples of already; found by `values.find_scales` where they are needed
        and not given. Of entropy-coded codes the step of every row, (k,), float32, then the scales of its columns; of
        trellis-coded ones the scales of rows and columns, (k + d_out,), float32.
    mask : array (k, d_out), bool, optional
        Codes that are stored, some of which may be zero; default: the nonzeros.
    tensor : str, optional
        Name of the dictionary's tensor, where several matrices share one; default ``<matrix>.dictionary``.
    """

    dictionary: Any
    codes: Any
    support: str = "bitmask"
    value_codec: str = "bf16"
    dictionary_codec: str = "bf16"
    rounding: str = "nearest"
    block_size: int | None = BLOCK_SIZE
    scales: Any | None = None
    dictionary_scales: Any | None = None
    mask: Any | None = None
    tensor: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out) of the matrix."""
        d_in, _, d_out = self.on.sizes(self.dictionary, self.codes)
        return d_in, d_out

    @property
    def n_atoms(self) -> int:
        """Columns of the dictionary, k."""
        return self.on.sizes(self.dictionary, self.codes)[1]

    @property
    def n_nonzero(self) -> int:
        """Stored values of the codes: the nonzeros, all of them for dense codes, the coefficients of a mixture."""
        return int(self._counts().sum())

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file: dictionary, values, scales and support."""
        if FACTOR_CODECS[self._value_codec].whole:
            return sum(tensor.nbytes for tensor in Product.pack(self, "m")[0].values())
        (d_in, d_out), k, counts = self.shape, self.n_atoms, self._counts()
        codec = IDENTITY if self.dictionary is None else self.dictionary_codec
        scales = n_blocks(counts, self.block_size)
        codes = codes_nbytes(self.support, self._value_codec, k, d_out, int(counts.sum()), scales)
        return codes + dictionary_nbytes(d_in, k, codec, self.block_size)

    @property
    def on(self) -> Support:
        """The support itself."""
        return SUPPORTS[self.support]

    def reconstruct(self) -> Any:
        """D S, (d_in, d_out)."""
        if self.dictionary is None:
            return self.codes
        if self.dictionary.ndim == 1:
            return self.dictionary[:, None] * self.codes
        return self.on.product(self.dictionary, self.codes)

    def __call__(self, x: Any) -> Any:
        """``(x D) S``: inputs (n, d_in) to outputs (n, d_out) through the factors."""
        return self.on.product(times(x, self.dictionary), self.codes)

    def pack(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Tensors and spec as they go into the file (docs/format.md), of the matrix or part `name`.

        Raises
        ------
        NumericalError
            If a factor holds NaN or infinity.
        """
        dictionary, dictionary_spec = pack_dictionary(
            None if self.dictionary is None else _finite(self.dictionary, f"{name}: dictionary"),
            self.n_atoms,
            self.tensor or f"{name}.dictionary",
            codec=self.dictionary_codec,
            block_size=self.block_size,
            scales=self.dictionary_scales,
        )
        codes, codes_spec = pack_codes(
            _finite(self.codes, f"{name}: codes"),
            self._mask(),
            name,
            support=self.support,
            codec=self._value_codec,
            block_size=self.block_size,
            scales=self.scales,
            rounding=self.rounding,
        )
        return {**dictionary, **codes}, {"shape": list(self.shape), "dictionary": dictionary_spec, "codes": codes_spec}

    @property
    def _value_codec(self) -> str:
        """What values are stored with."""
        return self.on.value_codec(self.value_codec)

    def stored_mask(self) -> np.ndarray:
        """Codes that are stored, bool (k, d_out): all of them where the support stores no positions."""
        mask = self._mask()
        return np.ones(self.codes.shape, bool) if mask is None else mask

    def _mask(self) -> np.ndarray | None:
        """Codes that are stored, (k, d_out); None where the support stores no positions."""
        if not self.on.is_stored:
            return None
        return self.on.complete(to_numpy(self.codes) != 0 if self.mask is None else to_numpy(self.mask))

    def _counts(self) -> np.ndarray:
        """Stored values a column, (d_out,)."""
        return self.on.counts(to_numpy(self.codes), self._mask())


def _finite(array: Any, what: str) -> np.ndarray:
    array = to_numpy(array)
    if not np.isfinite(array).all():
        raise NumericalError(f"{what} holds {np.count_nonzero(~np.isfinite(array))} non-finite values")
    return array
