"""MASA for pretrained models (arXiv 2508.04581): matrix atoms shared by layers, and what they leave in low rank.

``W_l ~ sum_m c_lm A_m + D_l S_l``: the atoms are the leading principal components of the weights of a group of layers
(*matrix PCA*), each weight taken as one long vector; the rest is a truncated SVD in the metric of the activations. The
layers of a group are consecutive, and the distribution of the predicted token drifts little between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cospadi.arrays import on_device, to_numpy
from cospadi.budget import dense_nbytes, factors_nbytes
from cospadi.codecs import IDENTITY, MIXTURE
from cospadi.errors import ConfigError
from cospadi.factorization import Factorization
from cospadi.files import BFLOAT16
from cospadi.methods.base import WHITENING_OPTIONS, Method

OPTIONS: dict[str, dict[str, Any]] = {
    "groups": {
        "type": ["integer", "null"],
        "minimum": 1,
        "default": None,
        "description": "Groups of consecutive layers that may share atoms, parted where the predicted token drifts "
        "most; null: a third as many as layers.",
    },
    "atoms": {
        "type": ["integer", "null"],
        "minimum": 0,
        "default": None,
        "description": "Matrix atoms a group has for each projection; as many as it has layers keep the weights as "
        "they are. null: what makes the error least, for every group and projection.",
    },
    **WHITENING_OPTIONS,
}


@dataclass(frozen=True)
class Choice:
    """How one projection of a group of layers is stored.

    Attributes
    ----------
    n_atoms : int
        Matrix atoms; 0 for none.
    ranks : tuple of (int or None)
        Rank of what is left, a layer; None: the weight stays as it is.
    """

    n_atoms: int
    ranks: tuple[int | None, ...]


def groups_by_drift(drift: Sequence[float], n_groups: int) -> list[range]:
    """Groups of consecutive layers, parted in front of the layers over which the prediction drifts most.

    Parameters
    ----------
    drift : sequence of float
        How far each layer moves the distribution of the predicted token; of layer 0 nothing follows.
    n_groups : int
        At most one a layer.
    """
    order = sorted(range(1, len(drift)), key=lambda layer: (-drift[layer], layer))
    edges = [0, *sorted(order[: n_groups - 1]), len(drift)]
    return [range(first, last) for first, last in itertools.pairwise(edges)]


def matrix_pca(weights: Sequence[np.ndarray], n_atoms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Principal components of matrices as long vectors, by way of their Gram (n, n): nothing larger is formed.

    Parameters
    ----------
    weights : sequence of ndarray (d_in, d_out)
        n of them.
    n_atoms : int
        1 to n.

    Returns
    -------
    atoms : ndarray (n_atoms, d_in, d_out) float32
        Orthonormal: ``tr(A_i^T A_j)`` is 1 for i = j, else 0.
    coefficients : ndarray (n, n_atoms) float32
        ``c_lm = tr(A_m^T W_l)``.
    eigenvalues : ndarray (n,)
        Of the Gram, the largest first; those from `n_atoms` on add up to the squared error.
    """
    vectors = np.stack([weight.ravel() for weight in weights]).astype(np.float64)
    eigenvalues, basis = np.linalg.eigh(vectors @ vectors.T)
    eigenvalues, basis = np.maximum(eigenvalues[::-1], 0), basis[:, ::-1]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(len(basis))])  # the sign is free: make it certain
    lengths = np.sqrt(np.maximum(eigenvalues[:n_atoms], np.finfo(np.float64).tiny))
    atoms = (basis[:, :n_atoms] / lengths).T @ vectors
    coefficients = basis[:, :n_atoms] * lengths
    return (
        atoms.reshape(n_atoms, *weights[0].shape).astype(np.float32),
        coefficients.astype(np.float32),
        eigenvalues,
    )


def atom_counts(n_layers: int, atoms: int | None) -> list[int]:
    """Numbers of atoms that are tried for a group; with as many as layers the weights stay as they are."""
    if atoms is not None:
        return [min(atoms, n_layers)]
    return [0, *(2**i for i in range(n_layers.bit_length()) if 2**i < n_layers), n_layers]


class _Problem:
    """One projection of a group of layers: its spectra, and what every choice costs.

    Parameters
    ----------
    weights, whitenings : sequences
        A layer each.
    atoms : int or None
        The option.
    storage : mapping
        How the factors will be stored.
    """

    def __init__(
        self, weights: Sequence[np.ndarray], whitenings: Sequence[Any], atoms: int | None, storage: Mapping[str, Any]
    ) -> None:
        self.shape = weights[0].shape
        self._storage = storage
        d_in, d_out = self.shape
        self._exact = factors_nbytes(
            d_in, d_out, d_in, d_in * d_out, support="dense", **{**storage, "dictionary_codec": IDENTITY}
        )
        sizes = [
            np.square(w.whiten(weight), dtype=np.float64).sum() for weight, w in zip(weights, whitenings, strict=True)
        ]
        self._left: dict[int, list[np.ndarray]] = {}  # number of atoms: relative squared error by rank, a layer each
        for n_atoms in atom_counts(len(weights), atoms):
            if n_atoms == len(weights):
                self._left[n_atoms] = []
                continue
            rest = weights
            if n_atoms:
                mixtures = mix(*matrix_pca(weights, n_atoms)[:2], storage)
                rest = [weight - mixture.reconstruct() for weight, mixture in zip(weights, mixtures, strict=True)]
            self._left[n_atoms] = [
                _squares_left(whitening.whiten(weight)) / size
                for weight, whitening, size in zip(rest, whitenings, sizes, strict=True)
            ]
        self._n_layers = len(weights)

    def choose(self, price: float) -> Choice:
        """The choice of least squared error plus `price` times bytes."""
        options = []
        for n_atoms, left in self._left.items():
            if n_atoms == self._n_layers:
                options.append((price * self._n_layers * self._exact, Choice(0, (None,) * n_atoms)))
                continue
            value, ranks = price * self._atoms_nbytes(n_atoms), []
            for errors in left:
                costs = errors + price * self._rank_nbytes(1) * np.arange(len(errors))
                rank = max(1, int(costs.argmin()))
                # with atoms asked for, a weight stays as it is only where what is left takes as much
                free = len(self._left) > 1 or self._rank_nbytes(rank) >= self._exact
                exact = free and price * self._exact <= costs[rank]
                value += price * self._exact if exact else costs[rank]
                ranks.append(None if exact else rank)
            options.append((value, Choice(0 if set(ranks) == {None} else n_atoms, tuple(ranks))))
        return min(options, key=lambda option: option[0])[1]

    def nbytes(self, choice: Choice) -> int:
        """Bytes in the file."""
        ranks = (self._exact if rank is None else self._rank_nbytes(rank) for rank in choice.ranks)
        unused = 2 * choice.n_atoms * choice.ranks.count(None)
        return self._atoms_nbytes(choice.n_atoms) - unused + sum(ranks)

    def raised(self, choice: Choice) -> list[tuple[float, int, Choice]]:
        """The choices with one rank more in one layer: what each lowers the squared error by, its bytes, itself."""
        found = []
        for layer, rank in enumerate(choice.ranks):
            left = self._left[choice.n_atoms][layer] if rank is not None else ()
            if rank is not None and rank + 1 < len(left):
                nbytes = self._rank_nbytes(rank + 1) - self._rank_nbytes(rank)
                ranks = (*choice.ranks[:layer], rank + 1, *choice.ranks[layer + 1 :])
                found.append((left[rank] - left[rank + 1], nbytes, Choice(choice.n_atoms, ranks)))
        return found

    def _atoms_nbytes(self, n_atoms: int) -> int:
        """Of the atoms, and the coefficients of all layers."""
        if n_atoms == 0:
            return 0
        d_in, d_out = self.shape
        storage = {**self._storage, "value_codec": "bf16"}
        atoms = factors_nbytes(d_in, d_out, n_atoms * d_out, 0, support=MIXTURE, n_scales=0, **storage)
        return atoms + 2 * n_atoms * self._n_layers

    def _rank_nbytes(self, rank: int) -> int:
        return factors_nbytes(*self.shape, rank, rank * self.shape[1], support="dense", **self._storage)


def _squares_left(whitened: np.ndarray) -> np.ndarray:
    """Squared error of the best approximation of every rank, 0 to full."""
    tall = whitened if whitened.shape[0] >= whitened.shape[1] else whitened.T
    tall = tall.astype(np.float64)
    squares = np.maximum(np.linalg.eigvalsh(tall.T @ tall), 0)  # the smallest first
    return np.append(np.cumsum(squares)[::-1], 0.0)


def choose_all(problems: Mapping[Any, _Problem], ratio: float) -> dict[Any, Choice]:
    """The choices of least summed relative squared error within the bytes that `ratio` leaves of all matrices.

    One price a byte for all of them, by bisection; what is left over goes where one more rank lowers the error most.

    Raises
    ------
    ConfigError
        If the least that can be stored is more than that.
    """
    dense = sum(len(p.choose(0.0).ranks) * dense_nbytes(*p.shape) for p in problems.values())
    allowed = (1 - ratio) * dense

    def at(price: float) -> tuple[dict[Any, Choice], int]:
        choices = {key: problem.choose(price) for key, problem in problems.items()}
        return choices, sum(problems[key].nbytes(choice) for key, choice in choices.items())

    low, high = 1e-15, 1.0
    best, nbytes = at(high)
    if nbytes > allowed:
        raise ConfigError(
            [
                f"ratio {ratio} leaves {allowed:.0f} bytes of the matrices; {nbytes} is the least with these atoms. "
                "Lower the ratio, or leave atoms to be chosen (null)"
            ]
        )
    for _ in range(60):
        price = (low * high) ** 0.5
        choices, nbytes = at(price)
        if nbytes > allowed:
            low = price
        else:
            best, high = choices, price
    left_over = allowed - sum(problems[key].nbytes(choice) for key, choice in best.items())
    while True:
        steps = [
            (gain / nbytes, nbytes, key, choice)
            for key, problem in problems.items()
            for gain, nbytes, choice in problem.raised(best[key])
            if nbytes <= left_over
        ]
        if not steps:
            return best
        _, nbytes, key, choice = max(steps, key=lambda step: step[0])
        best, left_over = {**best, key: choice}, left_over - nbytes


def mix(atoms: np.ndarray, coefficients: np.ndarray, storage: Mapping[str, Any]) -> list[Factorization]:
    """The mixtures of a group's layers, as the file will hold them.

    Parameters
    ----------
    atoms : ndarray (n_atoms, d_in, d_out)
    coefficients : ndarray (n_layers, n_atoms)
    """
    coefficients = coefficients.astype(BFLOAT16).astype(np.float32)
    side_by_side = np.concatenate(list(atoms), axis=1)  # (d_in, n_atoms d_out)
    stored = Factorization(side_by_side, coefficients[0], support=MIXTURE, **storage).quantized()
    return [
        Factorization(stored.dictionary, row, support=MIXTURE, dictionary_scales=stored.dictionary_scales, **storage)
        for row in coefficients
    ]


def factorize(
    weight: Any, whitening: Any, *, groups: int | None = None, atoms: int | None = None, **common: Any
) -> Factorization:
    """One matrix alone: no other layer is there to share with, so this is the low-rank part (`svd_llm.factorize`)."""
    from cospadi.methods import svd_llm

    return svd_llm.factorize(weight, whitening, **common)


def factorize_layers(
    names: Sequence[str],
    weights: Sequence[np.ndarray],
    whitenings: Sequence[Any],
    drift: Sequence[float],
    *,
    ratio: float,
    storage: Mapping[str, Any],
    device: str = "cpu",
    log: Callable[[str], None] = print,
    groups: int | None = None,
    atoms: int | None = None,
) -> Iterator[tuple[int, Factorization]]:
    """Factorize the same projections of all layers.

    The weights and whitenings of a group of layers are read twice, for its spectra and for its factors, and not kept.

    Parameters
    ----------
    names : sequence of str
        Such as ``model.layers.3.self_attn.q_proj``.
    weights : sequence of ndarray (d_in, d_out), float32
    whitenings : sequence of gram.Whitening
    drift : sequence of float
        One a layer, from `pruning.drift.measure`.
    ratio : float
        Fraction of the bytes of all these matrices to remove.
    storage : mapping
        How the factors will be stored (`codecs.storage_of`).
    groups, atoms
        As in `OPTIONS`.

    Yields
    ------
    index : int
        Of the name.
    factors : Factorization
        Atoms are named after the first matrix of their group that is made of them.

    Raises
    ------
    ConfigError
        If the ratio cannot be reached.
    """
    from cospadi.solvers import svd

    spans = groups_by_drift(drift, min(len(drift), groups or -(-len(drift) // 3)))
    log("groups of layers: " + ", ".join(f"{span[0]}-{span[-1]}" for span in spans))
    members: dict[tuple[int, str], list[int]] = {}
    for index, name in enumerate(names):
        layer = int(next(part for part in name.split(".") if part.isdigit()))
        group = next(number for number, span in enumerate(spans) if layer in span)
        members.setdefault((group, name.rsplit(".", 1)[-1]), []).append(index)
    problems = {
        key: _Problem([weights[i] for i in indices], [whitenings[i] for i in indices], atoms, storage)
        for key, indices in members.items()
    }
    choices = choose_all(problems, ratio)

    for key, indices in members.items():
        choice, group = choices[key], [weights[i] for i in indices]
        mixtures: Sequence[Factorization | None] = [None] * len(indices)
        if choice.n_atoms:
            mixtures = mix(*matrix_pca(group, choice.n_atoms)[:2], storage)
        span, projection = spans[key[0]], key[1]
        owner = next((names[i] for i, rank in zip(indices, choice.ranks, strict=True) if rank is not None), "")
        log(
            f"layers {span[0]}-{span[-1]} {projection}: {choice.n_atoms} atoms, rank "
            + " ".join("full" if rank is None else str(rank) for rank in choice.ranks)
        )
        for i, weight, rank, mixture in zip(indices, group, choice.ranks, mixtures, strict=True):
            diagnostics = {"group": [span[0], span[-1]], "matrix_atoms": choice.n_atoms, "rank": rank}
            if rank is None:
                yield i, Factorization(None, weight, support="dense", **storage, diagnostics=diagnostics)
                continue
            plus = []
            if mixture is not None:
                mixture.tensor = f"{owner}.plus.0.dictionary"
                weight, plus = weight - mixture.reconstruct(), [mixture]
            solution = svd.truncated(on_device(whitenings[i].whiten(weight), device), rank)
            yield (
                i,
                Factorization(
                    whitenings[i].unwhiten(to_numpy(solution.dictionary)),
                    to_numpy(solution.codes),
                    support="dense",
                    **storage,
                    plus=plus,
                    diagnostics=diagnostics,
                ),
            )


def modules(options: Mapping[str, Any]) -> list[str]:
    """This module and the SVD."""
    return [__name__, "cospadi.solvers.svd"]


METHOD = Method(
    name="masa",
    summary="Matrix atoms shared by groups of layers, and what they leave in low rank (MASA's matrix PCA).",
    options=OPTIONS,
    factorize=factorize,
    modules=modules,
    whole_model=factorize_layers,
)
