"""MASA for pretrained models (arXiv 2508.04581): matrix atoms shared by layers, and what they leave in low rank.

``W_l ~ sum_m c_lm A_m + D_l S_l``: the atoms are the leading principal components of the weights of a group of layers
(*matrix PCA*), each weight taken as one long vector; the rest is a truncated SVD in the metric of the activations. The
layers of a group are consecutive, and the distribution of the predicted token drifts little between them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cospadi.allocation import Menu, Point, choose
from cospadi.budget import as_is_nbytes, factors_nbytes, nbytes_left
from cospadi.errors import ConfigError
from cospadi.files import BFLOAT16
from cospadi.formats.factorization import Factorization
from cospadi.methods import svd_llm
from cospadi.methods.base import WHITENING_OPTIONS, Fit, Method
from cospadi.problem import Problem, Target
from cospadi.registry import option
from cospadi.runtime.cospadi_supports import MIXTURE
from cospadi.solvers.svd import squares_left
from cospadi.work import Cost, Work

OPTIONS: dict[str, dict[str, Any]] = {
    "groups": option(
        ["integer", "null"],
        "Groups of consecutive layers that may share atoms, parted where the predicted token drifts "
        "most; null: a third as many as layers.",
        minimum=1,
        default=None,
    ),
    "atoms": option(
        ["integer", "null"],
        "Matrix atoms a group has for each projection; as many as it has layers keep the weights as "
        "they are. null: what makes the error least, for every group and projection.",
        minimum=0,
        default=None,
    ),
    **WHITENING_OPTIONS,
}


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
    return (atoms.reshape(n_atoms, *weights[0].shape).astype(np.float32), coefficients.astype(np.float32), eigenvalues)


def atom_counts(n_layers: int, atoms: int | None) -> list[int]:
    """Numbers of atoms that are tried for a group; with as many as layers the weights stay as they are."""
    if atoms is not None:
        return [min(atoms, n_layers)]
    return [0, *(2**i for i in range(n_layers.bit_length()) if 2**i < n_layers), n_layers]


class _Menu(Menu):
    """One projection of a group of layers: its spectra, and what every choice costs.

    A choice is a `Point` with options ``atoms`` (number of matrix atoms, 0 for none) and ``ranks`` (of what is left, a
    layer each; None: the weight stays as it is). Its error is the sum of the layers' relative squared errors.

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
        self._exact = as_is_nbytes([self.shape], storage)
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
                squares_left(whitening.whiten(weight)) / size
                for weight, whitening, size in zip(rest, whitenings, sizes, strict=True)
            ]
        self._n_layers = len(weights)

    def at(self, price: float) -> Point:
        options = []
        for n_atoms, left in self._left.items():
            if n_atoms == self._n_layers:
                options.append((price * self._n_layers * self._exact, 0, (None,) * n_atoms))
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
            options.append((value, 0 if set(ranks) == {None} else n_atoms, tuple(ranks)))
        return self._point(*min(options, key=lambda option: option[0])[1:])

    def raised(self, point: Point) -> list[tuple[float, int, Point]]:
        found = []
        n_atoms, ranks = point.options["atoms"], point.options["ranks"]
        for layer, rank in enumerate(ranks):
            left = self._left[n_atoms][layer] if rank is not None else ()
            if rank is not None and rank + 1 < len(left):
                gain, more = left[rank] - left[rank + 1], self._rank_nbytes(rank + 1) - self._rank_nbytes(rank)
                options = {"atoms": n_atoms, "ranks": (*ranks[:layer], rank + 1, *ranks[layer + 1 :])}
                found.append((gain, more, Point(point.nbytes + more, point.error - gain, "masa", options)))
        return found

    def _point(self, n_atoms: int, ranks: tuple[int | None, ...]) -> Point:
        unused = 2 * n_atoms * ranks.count(None)
        nbytes = sum(self._exact if rank is None else self._rank_nbytes(rank) for rank in ranks)
        error = sum(self._left[n_atoms][layer][rank] for layer, rank in enumerate(ranks) if rank is not None)
        return Point(
            self._atoms_nbytes(n_atoms) - unused + nbytes, float(error), "masa", {"atoms": n_atoms, "ranks": ranks}
        )

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


def fit(
    problem: Problem,
    nbytes: int,
    how: Fit,
    *,
    groups: int | None = None,
    atoms: int | None = None,
    whiten: bool = True,
    eta: float = 0.0,
) -> list[Factorization]:
    """Factorize the same projections of all layers.

    The weights and whitenings of a group of layers are read twice, for its spectra and for its factors, and not kept.

    Parameters
    ----------
    problem : Problem
        All matrices of a model, with its drift; without one, matrices that have no other layer to share with: these get
        the low-rank part alone (`svd_llm.fit`).
    nbytes : int
        Of all of them together.
    how : Fit
    groups, atoms
        As in `OPTIONS`.

    Returns
    -------
    list of Factorization
        Atoms are named after the first matrix of their group that is made of them.

    Raises
    ------
    ConfigError
        If these are too few bytes.
    """
    if problem.drift is None:
        return svd_llm.fit(problem, nbytes, how, whiten=whiten, eta=eta)
    log = how.log or (lambda line: None)
    weights, whitenings = problem.weights, problem.whitenings(whiten=whiten, eta=eta)
    spans = groups_by_drift(problem.drift, _n_groups(len(problem.drift), groups))
    log("groups of layers: " + ", ".join(f"{span[0]}-{span[-1]}" for span in spans))
    members: dict[tuple[int, str], list[int]] = {}
    for index, matrix in enumerate(problem.matrices):
        group = next(number for number, span in enumerate(spans) if matrix.layer in span)
        members.setdefault((group, matrix.projection), []).append(index)
    menus = {
        key: _Menu([weights[i] for i in indices], [whitenings[i] for i in indices], atoms, how.storage)
        for key, indices in members.items()
    }
    try:
        points = choose(menus, nbytes)
    except ConfigError as error:
        raise ConfigError(
            [f"{error.faults[0]} with these atoms. Lower the ratio, or leave atoms to be chosen (null)"]
        ) from error

    found: dict[int, Factorization] = {}
    for key, indices in members.items():
        n_atoms, ranks = points[key].options["atoms"], points[key].options["ranks"]
        group = [weights[i] for i in indices]
        mixtures: Sequence[Factorization | None] = [None] * len(indices)
        if n_atoms:
            mixtures = mix(*matrix_pca(group, n_atoms)[:2], how.storage)
        span, projection = spans[key[0]], key[1]
        owner = next((problem.names[i] for i, rank in zip(indices, ranks, strict=True) if rank is not None), "")
        log(
            f"layers {span[0]}-{span[-1]} {projection}: {n_atoms} atoms, rank "
            + " ".join("full" if rank is None else str(rank) for rank in ranks)
        )
        for i, weight, rank, mixture in zip(indices, group, ranks, mixtures, strict=True):
            diagnostics = {"group": [span[0], span[-1]], "matrix_atoms": n_atoms, "rank": rank}
            if rank is None:
                found[i] = Factorization(None, weight, support="dense", **how.storage, diagnostics=diagnostics)
                continue
            if mixture is not None:
                mixture.tensor = f"{owner}.plus.0.dictionary"
                weight = weight - mixture.reconstruct()
            low_rank = svd_llm.truncated(weight, rank, whitenings[i], storage=how.storage, device=how.device)
            settled = {key: low_rank.diagnostics[key] for key in ("shift", "eta")}
            low_rank = replace(low_rank, diagnostics={**diagnostics, **settled})
            found[i] = low_rank if mixture is None else low_rank + mixture
    return [found[i] for i in range(len(problem.matrices))]


def _n_groups(n_layers: int, groups: int | None) -> int:
    return min(n_layers, groups or -(-n_layers // 3))


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of all matrices: the low-rank part of each; in memory a projection of a group in float64, twice."""
    dense = nbytes_left([target.shape for target in targets], 0)
    each: Counter[tuple[int, int]] = Counter(target.shape for target in targets)
    core, gpu = Cost(), Cost()
    for shape, count in each.items():
        part = nbytes * nbytes_left([shape], 0) // dense
        one = svd_llm.work([Target(0, "", shape)], part, options, storage)
        core, gpu = core + one.core * count, gpu + one.gpu * count
    n_layers = len({target.layer for target in targets})
    largest = max(d_in * d_out for d_in, d_out in each)
    widest = max(d_in for d_in, _ in each)
    # where the groups are parted is not known yet: the largest may be three times the mean
    layers = min(n_layers, 3 * n_layers / _n_groups(n_layers, options.get("groups")))
    return Work(20 * layers * largest + 10 * 8 * widest**2, 0, core, gpu)


METHOD = Method(
    name="masa",
    summary="Matrix atoms shared by groups of layers, and what they leave in low rank (MASA's matrix PCA).",
    options=OPTIONS,
    factors="matrix atoms and low rank",
    fit=fit,
    work=work,
    modules=lambda options: [__name__, "cospadi.solvers.svd"],
    scope="model",
    scales_columns=False,  # atoms are mixed whole
)
