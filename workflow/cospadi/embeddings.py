"""Embeddings: the table of the tokens and the head of a model in few bits, as one matrix whose columns are tokens.

The head multiplies with it, so an error E of it costs ``tr(E^T G E C)``, with G the Gram of what enters the head and C,
a diagonal, how much the loss feels each token's logit. The table is read, a column at a time, so there an error costs
its square times how often the token comes. A matrix that is both costs both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cospadi.arrays import slices
from cospadi.budget import factors_nbytes
from cospadi.errors import ArtifactError
from cospadi.files import BFLOAT16, ModelFolder
from cospadi.formats.dictionaries import IDENTITY
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import BLOCK_SIZE, CODEC_OF_BITS
from cospadi.runtime.cospadi_format import EMBEDDING, HEAD, embedding_faults
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.structure import has_own_head

if TYPE_CHECKING:
    from cospadi.calibration.moments import HeadMoments

_AT_ONCE = 4096  # tokens; a multiple of 8, so that a piece ends with a byte

# What the table counts beside the head in a matrix that is both, as a share of the mean diagonal of the Gram
READ_SHARE = 0.1
# Power of how much a token counts in the weight of its column, and what every token counts, however rare
COLUMN_POWER, LEAST = 0.25, 1e-9


class Metric(NamedTuple):
    """What errors of an embedding or a head cost: Gram, float64 (hidden_size, hidden_size), and weights of the tokens,
    float32 (vocabulary,), whose reciprocals are in bfloat16.
    """

    gram: np.ndarray
    weights: np.ndarray


class Rounding(NamedTuple):
    """One way to store an embedding.

    Attributes
    ----------
    bits : tuple
        The numbers of bits that there are; of what is decoded, between which (least, most) any is.
    learned : bool
        Whether it asks what errors cost.
    decoded : bool
        Whether memory holds every number once more, decoded.
    nbytes : callable
        ``nbytes(hidden_size, vocabulary, bits)``: bytes in the file, at most.
    pieces : callable
        ``pieces(weight, bits, metric)``: factorizations of some tokens at a time, of a weight (vocabulary,
        hidden_size).
    """

    bits: tuple[float, ...]
    learned: bool
    decoded: bool
    nbytes: Callable[[int, int, float], int]
    pieces: Callable[[np.ndarray, float, Metric | None], Iterator[Factorization]]

    def has(self, bits: float) -> bool:
        """Whether a number can have so many."""
        return self.bits[0] <= bits <= self.bits[1] if self.decoded else bits in self.bits

    @property
    def words(self) -> str:
        """The bits that there are."""
        return f"{self.bits[0]} to {self.bits[1]}" if self.decoded else ", ".join(map(str, self.bits))


def _nbytes_of_integers(hidden_size: int, vocabulary: int, bits: float) -> int:
    return factors_nbytes(
        hidden_size,
        vocabulary,
        hidden_size,
        hidden_size * vocabulary,
        support="dense",
        value_codec=CODEC_OF_BITS[bits],
        dictionary_codec=IDENTITY,
    )


def _columns(weight: np.ndarray) -> Iterator[np.ndarray]:
    """Some tokens at a time, each a column: float32 (hidden_size, n)."""
    for rows in slices(0, len(weight), _AT_ONCE):
        yield np.ascontiguousarray(weight[rows].astype(np.float32).T)


def _nearest(weight: np.ndarray, bits: float, metric: Metric | None) -> Iterator[Factorization]:
    """Each number for itself."""
    for columns in _columns(weight):
        yield Factorization(None, columns, support="dense", value_codec=CODEC_OF_BITS[bits])


def _fed_forward(weight: np.ndarray, bits: float, metric: Metric | None) -> Iterator[Factorization]:
    """Each number of a token making up for those before it (GPTQ); how much a token counts is then all the same."""
    from cospadi.solvers.gptq import quantize

    codec = CODEC_OF_BITS[bits]
    for columns in _columns(weight):
        codes, scales = quantize(columns, metric.gram, codec=codec, block_size=BLOCK_SIZE)
        yield Factorization(None, codes, support="dense", value_codec=codec, scales=scales.astype(BFLOAT16))


def _coded(weight: np.ndarray, bits: float, metric: Metric | None) -> Iterator[Factorization]:
    """Entropy-coded numbers along a trellis (`ectcq`), all tokens at once."""
    from cospadi.solvers import entropy

    codec = CODECS["ectcq256"]
    columns = weight.T.astype(np.float32) * metric.weights
    nbytes = _nbytes_of_streams(*columns.shape, bits) - 2 * len(metric.weights)  # of the scales of the tokens
    found = entropy.quantize(columns, metric.gram, codec, nbytes)
    exact = Factorization(None, found.codes, support="dense", value_codec=codec.name, scales=found.steps, settled=True)
    yield exact.with_columns_times(1 / metric.weights)


def _nbytes_of_streams(hidden_size: int, vocabulary: int, bits: float) -> int:
    return int(bits * hidden_size * vocabulary / 8)


# by the names of the methods that do the same to matrices
NEAREST = "rtn"
ROUNDINGS = {
    NEAREST: Rounding((8, 6, 4), False, False, _nbytes_of_integers, _nearest),
    "gptq": Rounding((8, 6, 4), True, False, _nbytes_of_integers, _fed_forward),
    "ectcq": Rounding((1, 12), True, True, _nbytes_of_streams, _coded),
}


def asked_of(settings: Mapping[str, Any]) -> tuple[float, str]:
    """Bits a number that a step's settings ask for, 16 where they are as they are, and the method that rounds them."""
    return settings.get("embedding_bits", 16), settings.get("embedding_method", NEAREST)


def faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """Options of the embedding, complete, that do not go together."""
    if "embedding_bits" not in settings:
        return
    bits, method = settings["embedding_bits"], settings["embedding_method"]
    rounding = ROUNDINGS[method]
    if bits == 16:
        if method != NEAREST:
            yield f"embedding_method: {method} has nothing to round; set embedding_bits"
    elif not rounding.has(bits):
        yield f"embedding_bits: {bits}; {method} has {rounding.words}; 16 is as it is"


def embeddings_of(base: ModelFolder) -> list[str]:
    """The embedding, and the head where it is another matrix."""
    return [EMBEDDING, HEAD] if f"{HEAD}.weight" in base.weight_map and has_own_head(base) else [EMBEDDING]


def metric_of(name: str, moments: HeadMoments, *, is_tied: bool) -> Metric:
    """What errors of a module cost, by what the head's moments are on the calibration text.

    Parameters
    ----------
    name : str
        Of the embedding or the head.
    moments : HeadMoments
    is_tied : bool
        Whether the embedding is the head as well.
    """
    size = len(moments.gram)
    head = moments.gram * (size / np.trace(moments.gram))
    read, felt = moments.counts, moments.squares
    if is_tied:
        gram, counted = head + READ_SHARE * np.eye(size), felt + read
    else:
        gram, counted = (np.eye(size), read) if name == EMBEDDING else (head, felt)
    weights = (counted + LEAST) ** (COLUMN_POWER / 2)
    scales = (np.exp(np.log(weights).mean()) / weights).astype(BFLOAT16)
    return Metric(gram, 1 / scales.astype(np.float32))


def pack_embedding(
    base: ModelFolder, name: str, bits: float, method: str = NEAREST, moments: HeadMoments | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and spec of an embedding or a head (vocabulary, hidden_size), as of `Factorization.pack`.

    For the format it is a matrix (hidden_size, vocabulary), a column of which is a token. Numbers under scales have
    blocks of `BLOCK_SIZE`.

    Parameters
    ----------
    base : ModelFolder
    name : str
        Of the module.
    bits : float
        A number; with `ectcq` of the file, all counted.
    method : str
        One of `ROUNDINGS`.
    moments : HeadMoments, optional
        Of the model's head, for methods that ask what errors cost.

    Raises
    ------
    ArtifactError
        If the rows are no whole bytes.
    NumericalError
        If a number is NaN or infinite.
    """
    weight = base.read(f"{name}.weight")
    rounding = ROUNDINGS[method]
    metric = metric_of(name, moments, is_tied=embeddings_of(base) == [EMBEDDING]) if rounding.learned else None
    tensors: dict[str, list[np.ndarray]] = {}
    spec: dict[str, Any] = {}
    for piece in rounding.pieces(weight, bits, metric):
        packed, spec = piece.pack(name)
        for tensor, array in packed.items():
            tensors.setdefault(tensor, []).append(array)
    spec = _of_all(spec, weight.shape, sum(map(len, tensors[f"{name}.scales"])))
    for fault in embedding_faults(spec):
        raise ArtifactError(
            base.path, f"{name}: {fault}", "Set embedding_bits to 8 or 16, or embedding_method to ectcq"
        )
    return {tensor: np.concatenate(parts) for tensor, parts in tensors.items()}, spec


def _of_all(spec: Mapping[str, Any], shape: tuple[int, int], n_scales: int) -> dict[str, Any]:
    """The spec of the last piece, as that of all of them."""
    codes = spec["codes"] | {"n_nonzero": shape[0] * shape[1], "n_scales": n_scales}
    return {**spec, "shape": [*shape[::-1]], "codes": codes}


def embedding_nbytes(vocabulary: int, hidden_size: int, bits: float, method: str = NEAREST) -> int:
    """Bytes of an embedding or a head in the file, scales counted; of a stream at most."""
    return ROUNDINGS[method].nbytes(hidden_size, vocabulary, bits)
