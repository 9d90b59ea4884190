"""Problems: the matrices that are learned together, and what an error in each of them costs.

A `Problem` is all that a method gets to see. It reads weights and second moments when they are first asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cospadi.errors import NumericalError
from cospadi.files import ModelFolder
from cospadi.formats.factorization import Factorization
from cospadi.gram import (
    Whitening,
    gradient_tokens,
    read_gradients,
    read_gram,
    read_token_weights,
    read_weighted_gram,
    sites,
    squared_norm,
    whitening_factor,
)

# Where all layers are one problem, so many whitenings stay in memory: those of a few layers that share
_WHITENINGS_HELD = 4
# What `metric` of a variant may be
ACTIVATIONS, GRADIENTS = "activations", "gradients"
# and `target`
INDEPENDENT, SEQUENTIAL = "independent", "sequential"
# Outputs without any gradient weigh as if theirs had this share of the mean square
_LEAST_SQUARE = 1e-6


class Metric:
    """What an error E of a matrix costs: ``||X E||_F^2 = tr(E^T G E)``, by the Gram ``G = X^T X`` of its inputs X.

    Tokens may weigh more or less in G, by the gradient of the loss at the matrix's outputs (`of_gradients`).

    Every part is read or computed when it is first asked for and kept until `forget`.

    Parameters
    ----------
    d_in : int
        Width of the inputs.
    read : callable
        Reads the Gram, float64 (d_in, d_in).
    read_heldout : callable, optional
        Reads that of the inputs that were kept out; gives None where there are none.
    read_tokens : callable, optional
        Reads what every token counts in it (all windows, those that were kept out too); gives None where each counts 1.
    where : str
        What an error message calls it.
    keep_gram : bool
        False: Grams are read anew each time, for jobs that would hold the Grams of a whole model.
    """

    def __init__(
        self,
        d_in: int,
        read: Callable[[], np.ndarray],
        *,
        read_heldout: Callable[[], np.ndarray | None] = lambda: None,
        read_tokens: Callable[[], np.ndarray | None] = lambda: None,
        where: str = "Gram",
        keep_gram: bool = True,
    ) -> None:
        self.d_in = d_in
        self._read = read
        self._read_heldout = read_heldout
        self._read_tokens = read_tokens
        self._where = where
        self._keep_gram = keep_gram
        self._gram: np.ndarray | None = None
        self._heldout: np.ndarray | None = None
        self._whitenings: dict[float, Whitening] = {}

    @classmethod
    def of(cls, gram: np.ndarray) -> Metric:
        """Of a Gram in memory."""
        return cls(len(gram), lambda: gram)

    @classmethod
    def identity(cls, d_in: int) -> Metric:
        """The error of the matrix itself, ``||E||_F``."""
        return cls(d_in, lambda: np.eye(d_in))

    @classmethod
    def of_file(cls, path: Path, site: str, d_in: int, *, keep_gram: bool = True) -> Metric:
        """Of a site in a Gram file."""

        def heldout() -> np.ndarray | None:
            return read_gram(path, site, heldout=True) if sites(path)[site]["n_heldout"] else None

        return cls(
            d_in, lambda: read_gram(path, site), read_heldout=heldout, where=f"{path}: {site}/gram", keep_gram=keep_gram
        )

    @classmethod
    def of_gradients(
        cls, path: Path, matrix: str, layer: int, plain: Metric, share: float, *, keep_gram: bool = True
    ) -> Metric:
        """Of a matrix in a file of gradients: ``G = sum_t s_t x_t x_t^T / sum_t s_t``, s the squared gradients.

        Parameters
        ----------
        plain : Metric
            Of the site.
        share : float
            Part of the metric that is `plain` over its number of tokens, for which every token weighs the same.
        """

        def mixed(heldout: bool) -> np.ndarray | None:
            gram = read_weighted_gram(path, layer, matrix, heldout=heldout)
            if gram is None or share == 0 or not gram.any():
                return gram
            alike = plain.heldout_gram() if heldout else plain.gram
            n_tokens = gradient_tokens(path, layer, matrix)[heldout]
            return (1 - share) * gram + share / n_tokens * alike

        def tokens() -> np.ndarray:
            weights = read_token_weights(path, layer, matrix)
            if share == 0 or not weights.any():
                return weights
            return (1 - share) * weights + share / gradient_tokens(path, layer, matrix)[0]

        return cls(
            plain.d_in,
            lambda: mixed(False),
            read_heldout=lambda: mixed(True),
            read_tokens=tokens,
            where=f"{path}: {matrix}/gram",
            keep_gram=keep_gram,
        )

    @classmethod
    def mean(cls, metrics: Sequence[Metric]) -> Metric:
        """Of the mean Gram, the paper's metric of matrices with different inputs."""
        where = "mean of " + ", ".join(metric._where for metric in metrics)
        return cls(
            metrics[0].d_in, lambda: sum(metric.gram for metric in metrics) / len(metrics), where=where, keep_gram=False
        )

    @property
    def gram(self) -> np.ndarray:
        """``X^T X``, float64 (d_in, d_in)."""
        if self._gram is not None:
            return self._gram
        gram = self._read()
        if self._keep_gram:
            self._gram = gram
        return gram

    @property
    def diagonal(self) -> np.ndarray:
        """Squared norm of every input, float64 (d_in,): all that a metric of single weights needs."""
        return np.diag(self.gram)

    def heldout_gram(self) -> np.ndarray | None:
        """Gram of the calibration rows that were kept out, None where none were."""
        if self._heldout is not None:
            return self._heldout
        heldout = self._read_heldout()
        if self._keep_gram:
            self._heldout = heldout
        return heldout

    def tokens(self) -> np.ndarray | None:
        """What every token of the calibration windows counts, pads left out, float64 (n_tokens,); None: each 1."""
        return self._read_tokens()

    def whitening(self, *, whiten: bool = True, eta: float = 0.0) -> Whitening:
        """Factor of the Gram with ridge `eta`; without `whiten`, of the identity, for which nothing is read."""
        if not whiten:
            return Whitening(np.eye(self.d_in), shift=0.0, eta=0.0)
        if eta not in self._whitenings:
            try:
                self._whitenings[eta] = whitening_factor(self.gram, eta=eta)
            except NumericalError as error:
                raise NumericalError(f"{self._where}: {error}") from error
        return self._whitenings[eta]

    def squared_norm(self, matrix: np.ndarray) -> float:
        """``||X M||_F^2`` of a matrix M (d_in, n)."""
        return squared_norm(matrix, self.gram)

    def forget(self) -> None:
        """Free what was read and computed; asked for again, it is made again."""
        self._gram = self._heldout = None
        self._whitenings.clear()


def learns_in_turn(settings: Mapping[str, Any]) -> bool:
    """Whether complete settings ask for layers learned one after the other (`sequence`, `compensation`)."""
    return settings.get("target") == SEQUENTIAL or any(
        settings.get(key) is not None for key in ("refine", "compensate")
    )


class Outputs:
    """What an error in each output of a matrix costs, by the gradient g of the loss there.

    Parameters
    ----------
    read : callable
        Reads the mean of ``g_j^2`` over the tokens, float64 (d_out,).
    power : float
        Of ``g_j^2`` in the weight of an output: 1 is what the second order of the loss says, 0 leaves them alike.
    """

    def __init__(self, read: Callable[[], np.ndarray], power: float) -> None:
        self._read = read
        self._power = power

    @property
    def alike(self) -> bool:
        """Whether columns are left as they are."""
        return self._power == 0

    @cached_property
    def squares(self) -> np.ndarray:
        """Mean of ``g_j^2``, float64 (d_out,)."""
        return self._read()

    @property
    def price(self) -> float:
        """Nats that a squared error of 1 costs: half the mean of the squares."""
        return float(self.squares.mean()) / 2

    @cached_property
    def weights(self) -> np.ndarray:
        """What columns are multiplied by before they are factorized, float32 (d_out,), of mean square 1."""
        mean = self.squares.mean()
        if mean <= 0:
            return np.ones(len(self.squares), np.float32)
        weights = np.maximum(self.squares / mean, _LEAST_SQUARE) ** (self._power / 2)
        return (weights / np.sqrt(np.mean(weights**2))).astype(np.float32)


class Gradients(NamedTuple):
    """Where the gradients of layers are, and how they make a metric.

    Attributes
    ----------
    files : sequence of Path
        That each layer is in, from `calibration.gradients.collect_gradients`.
    column_power : float
        As of `Outputs`.
    activation_share : float
        As of `Metric.of_gradients`.
    """

    files: Sequence[Path]
    column_power: float
    activation_share: float

    @classmethod
    def of(cls, variant: Mapping[str, Any], files: Sequence[Path], *, alike: bool = False) -> Gradients | None:
        """Of a variant's settings; None where its metric is another. `alike`: its outputs are not weighted."""
        if variant.get("metric", ACTIVATIONS) != GRADIENTS:
            return None
        return cls(files, 0.0 if alike else variant["column_power"], variant["activation_share"])


class Target(NamedTuple):
    """A matrix as far as a plan knows it."""

    layer: int
    projection: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Matrix:
    """One target matrix: what it is called, where it is, its shape (d_in, d_out), its metric and its weight.

    `outputs` says which columns count more than others, None where they all count alike. Methods see the weight with
    its columns `weighted`; what they make of it is `restored`.
    """

    name: str
    layer: int
    site: str
    shape: tuple[int, int]
    metric: Metric
    read: Callable[[], np.ndarray]
    outputs: Outputs | None = None

    @property
    def projection(self) -> str:
        """Last part of the name, ``q_proj``."""
        return self.name.rsplit(".", 1)[-1]

    def weight(self) -> np.ndarray:
        """The weight, float32 (d_in, d_out), read anew.

        Raises
        ------
        NumericalError
            If it holds NaN or infinity; names where it comes from.
        """
        return self.read()

    def weighted(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix (d_in, d_out) with its columns times their weights, in its dtype."""
        return matrix if self.alike else matrix * self.outputs.weights

    def weighted_factors(self, factors: Factorization) -> Factorization:
        """Factors of the weighted matrix from those of the matrix."""
        return factors if self.alike else factors.with_columns_times(self.outputs.weights)

    def restored(self, factors: Factorization) -> Factorization:
        """Factors of the matrix from those of the weighted one."""
        return factors if self.alike else factors.with_columns_times(1 / self.outputs.weights)

    def squared_norm(self, matrix: np.ndarray, gram: np.ndarray | None = None) -> float:
        """What an error (d_in, d_out) costs: its squared norm in the metric, or that of `gram`, columns weighted."""
        return squared_norm(self.weighted(matrix), self.metric.gram if gram is None else gram)

    def predicted_rise(self, squared_error: float) -> dict[str, float]:
        """For a report: how many nats a token the model's loss rises by such an error, where gradients say it."""
        return {} if self.outputs is None else {"predicted_rise": self.outputs.price * squared_error}

    @property
    def alike(self) -> bool:
        """Whether its columns count alike, so that they are not weighted."""
        return self.outputs is None or self.outputs.alike


_Some = TypeVar("_Some", Matrix, Target)


def matrices_of(
    folder: ModelFolder,
    structure: Mapping[str, Any],
    layers: Sequence[int],
    gram_files: Sequence[Path],
    *,
    gradients: Gradients | None = None,
    keep_grams: bool = True,
) -> Iterator[Matrix]:
    """Every target matrix of `layers`, in the order of the model; one Gram file a layer, one `Metric` a site, or with
    `gradients` one a matrix.
    """
    for place, (layer, gram_file) in enumerate(zip(layers, gram_files, strict=True)):
        for site in structure["layers"][layer]["sites"]:
            d_in = site["matrices"][0]["shape"][0]
            metric = Metric.of_file(gram_file, site["name"], d_in, keep_gram=keep_grams and gradients is None)
            for matrix in site["matrices"]:
                name, own, outputs = matrix["name"], metric, None
                if gradients is not None:
                    path, power = gradients.files[place], gradients.column_power
                    own = Metric.of_gradients(
                        path, name, layer, metric, gradients.activation_share, keep_gram=keep_grams
                    )
                    outputs = Outputs(partial(read_gradients, path, layer, name), power)
                yield Matrix(name, layer, site["name"], tuple(matrix["shape"]), own, _reader(folder, name), outputs)


def _reader(folder: ModelFolder, name: str) -> Callable[[], np.ndarray]:
    return lambda: check_finite(folder.read_weight(name), f"{folder.path}: {name}.weight")


def check_finite(weight: np.ndarray, where: str) -> np.ndarray:
    """`weight` itself.

    Raises
    ------
    NumericalError
        If it holds NaN or infinity; names `where` it comes from.
    """
    bad = np.count_nonzero(~np.isfinite(weight))
    if bad:
        raise NumericalError(f"{where} holds {bad} non-finite values; repair it, or fetch the model again")
    return weight


def shared(matrices: Iterable[_Some], options: Mapping[str, Any]) -> list[list[_Some]]:
    """Matrices that share a dictionary, together; a list of one for a matrix with its own.

    ``share`` names the projections whose matrices share across the layers of the unit, each projection for itself;
    ``share_within`` lists projections that share inside a layer (q, k and v; gate and up). A projection in both
    shares both ways. Options that are not there share nothing.
    """
    bundles = options.get("share_within") or ()
    bundle_of = {name: f"bundle {i}" for i, bundle in enumerate(bundles) for name in bundle}
    problems: dict[Hashable, list[_Some]] = {}
    for matrix in matrices:
        layer = "all" if matrix.projection in (options.get("share") or ()) else matrix.layer
        problems.setdefault((layer, bundle_of.get(matrix.projection, matrix.projection)), []).append(matrix)
    return list(problems.values())


def in_turn(groups: Sequence[Sequence[Matrix]]) -> Iterator[Sequence[Matrix]]:
    """The groups one after the other; metrics that no later one needs leave the memory when it is done."""
    for index, group in enumerate(groups):
        yield group
        later = {matrix.metric for other in groups[index + 1 :] for matrix in other}
        for metric in {matrix.metric for matrix in group} - later:
            metric.forget()


class Problem:
    """Matrices that are learned together; most often one, or those that share a dictionary.

    Parameters
    ----------
    matrices : sequence of Matrix
        With equal d_in where they share a dictionary; the matrices of a whole model are of several shapes.
    weights : sequence of ndarray, optional
        Where they are in memory already, with their columns weighted.
    metric : Metric, optional
        Of all matrices together; default: the mean of their metrics.
    drift : sequence of float, optional
        How far every layer of the model moves the predicted token (`pruning.drift`), for a whole model.
    in_memory : bool
        False: a weight or whitening is made anew each time it is asked for, for a whole model.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        *,
        weights: Sequence[np.ndarray] | None = None,
        metric: Metric | None = None,
        drift: Sequence[float] | None = None,
        in_memory: bool = True,
    ) -> None:
        self.matrices = list(matrices)
        self.drift = drift
        self._in_memory = in_memory
        self._weights = weights
        self._metric = metric

    @property
    def names(self) -> list[str]:
        """Full names of the matrices."""
        return [matrix.name for matrix in self.matrices]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of each matrix."""
        return [matrix.shape for matrix in self.matrices]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out) of the matrices side by side."""
        return side_by_side(self.shapes)

    @property
    def metrics(self) -> list[Metric]:
        """Metric of each matrix; matrices with the same inputs have the same object."""
        return [matrix.metric for matrix in self.matrices]

    @property
    def prices(self) -> list[float] | None:
        """Nats that a squared error of 1 costs in each matrix; None where no gradients say so."""
        outputs = [matrix.outputs for matrix in self.matrices]
        return None if None in outputs else [one.price for one in outputs]

    @property
    def n_metrics(self) -> int:
        """Number of different metrics."""
        return len(set(self.metrics))

    @cached_property
    def metric(self) -> Metric:
        """Metric of all matrices together: that of the mean Gram of their inputs."""
        if self._metric is not None:
            return self._metric
        distinct = list(dict.fromkeys(self.metrics))
        return distinct[0] if len(distinct) == 1 else Metric.mean(distinct)

    @cached_property
    def weights(self) -> Sequence[np.ndarray]:
        """Weight of each matrix, float32 (d_in, d_out), with its columns weighted."""
        if self._weights is not None:
            return self._weights
        weights = OnDemand(self.matrices, lambda matrix: matrix.weighted(matrix.weight()))
        return list(weights) if self._in_memory else weights

    @property
    def weight(self) -> np.ndarray:
        """The weights side by side, float32 (d_in, sum of d_out)."""
        return self.weights[0] if len(self.matrices) == 1 else np.concatenate(self.weights, axis=1)

    def whitenings(self, *, whiten: bool = True, eta: float = 0.0) -> Sequence[Whitening]:
        """Whitening of each matrix's own metric (`Metric.whitening`), made when it is asked for."""
        recent: list[Metric] = []

        def make(matrix: Matrix) -> Whitening:
            whitening = matrix.metric.whitening(whiten=whiten, eta=eta)
            if not self._in_memory:
                recent[:] = [*(metric for metric in recent if metric is not matrix.metric), matrix.metric]
                while len(recent) > _WHITENINGS_HELD:
                    recent.pop(0).forget()
            return whitening

        return OnDemand(self.matrices, make)

    def split(self, factorization: Factorization) -> list[Factorization]:
        """Factors of each matrix from those of the matrices side by side: one dictionary, each its columns of codes."""
        return self.sharing(split_codes(factorization, [d_out for _, d_out in self.shapes]))

    def sharing(self, parts: Sequence[Factorization]) -> list[Factorization]:
        """Factors with one dictionary: where there are several, it is stored under the name of the first matrix."""
        return list(parts) if len(parts) == 1 else [part.stored_under(self.names[0]) for part in parts]


def side_by_side(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Shape of matrices with equal d_in that stand side by side."""
    return shapes[0][0], sum(d_out for _, d_out in shapes)


def split_codes(factorization: Factorization, widths: Sequence[int]) -> list[Factorization]:
    """Factors of matrices that stand side by side: one dictionary, each its columns of the codes, in all parts."""
    edges = itertools.accumulate(widths, initial=0)
    return [factorization.columns(slice(*edge)) for edge in itertools.pairwise(edges)]


class OnDemand(Sequence):
    """A sequence whose entries are made anew each time they are asked for."""

    def __init__(self, matrices: Sequence[Matrix], make: Callable[[Matrix], Any]) -> None:
        self._matrices = matrices
        self._make = make

    def __len__(self) -> int:
        return len(self._matrices)

    def __getitem__(self, index: int) -> Any:
        return self._make(self._matrices[index])
