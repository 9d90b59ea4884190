"""Second moments of what enters a matrix, and the whitening that follows from them.

With ``L^T L = G = X^T X`` the error on the calibration data is an ordinary norm: ``||X E||_F = ||L E||_F``
(CoSpaDi, arXiv 2509.22075, section 3). All of it is NumPy in float64; no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import scipy.linalg

from cospadi.arrays import add_product, row_blocks, slices, symmetrize
from cospadi.calibration.activations import FORMAT_VERSION, STORED_AS, first_heldout, reading, to_float32, writing
from cospadi.errors import ArtifactError, NumericalError
from cospadi.provenance import CALIBRATION, check_provenance, plain
from cospadi.structure import layer_name

# eigenvalues below this share of the mean diagonal are rounding noise of the Gram, not calibration data
EPS = 1e-9

_BLOCK_VALUES = 2**23  # float32 values of a row block: 32 MiB
_SYMMETRIC_ROWS = 256  # of a block of a symmetric product
_BLOCK_ROWS = 4096  # more rows in one float32 product would cost digits
_ROWS_REMEDY = "Delete it and run again to collect the activations anew"
_GRAM_REMEDY = "Delete it and run again to compute the Gram anew"
_GRADIENTS_REMEDY = "Delete it and run again to collect the gradients anew"


def compute_gram(
    activations: str | Path,
    layer: int,
    output: str | Path,
    *,
    structure: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
    heldout_fraction: float = 0.0,
    dtype: Literal["float64", "float32"] = "float64",
) -> None:
    """Gram ``G = X^T X`` of every site of a layer: uncentred, not averaged.

    Rows are read block by block: float32 product a block, float64 sum. A file collected in mode ``stream`` holds the
    sums already; they are checked and copied.

    Parameters
    ----------
    activations : path-like
        What `cospadi.calibration.collect.collect` wrote for a chunk with this layer.
    layer : int
    output : path-like
        Written: a group for each site with ``gram (d_in, d_in)`` and, if asked for, ``gram_heldout``; attributes
        ``n_tokens`` (in ``gram``), ``n_heldout`` (in ``gram_heldout``), ``n_skipped`` (batches lost to NaN or
        infinity), ``n_batches``, ``matrices`` (full names).
    structure : mapping
        What `cospadi.structure.inspect_model` found.
    calibration : mapping, optional
        What the activations have to be of (`activations.calibration_of`).
    heldout_fraction : float
        Share of the windows, the last ones, whose rows go to ``gram_heldout``; 0 <= heldout_fraction < 1.
    dtype : {"float64", "float32"}
        Dtype of the stored Grams.

    Raises
    ------
    ConfigError
        If `heldout_fraction` leaves no window.
    ArtifactError
        If the activations are damaged, lack the layer, have another width than the structure says, are of another
        model or other windows, or were streamed with another `heldout_fraction`.
    NumericalError
        If a Gram is not finite or no token is left for it.
    """
    name = layer_name(layer)
    with reading(activations, _ROWS_REMEDY) as file:
        says = dict(file.attrs)
        header = {key: file.attrs[key] for key in ("fingerprint", "tokens", "model", "seed", "dtype", "dtype_reason")}
        n_windows, mode, streamed_from = int(file.attrs["n_windows"]), file.attrs["mode"], file.attrs["heldout_from"]
    # rows that are stored are parted here, whatever was held out when they were collected
    asked = {key: value for key, value in (calibration or {}).items() if key != "heldout_from"}
    belongs = {"format_version": FORMAT_VERSION, "fingerprint": structure["fingerprint"], **asked}
    check_provenance(activations, says, belongs, _ROWS_REMEDY)
    heldout_from = first_heldout(n_windows, heldout_fraction)
    if mode == "stream" and streamed_from != heldout_from:
        raise ArtifactError(
            activations,
            f"was streamed with the windows from {streamed_from} on held out, asked for is {heldout_from}",
            _ROWS_REMEDY,
        )

    header |= {"format_version": FORMAT_VERSION, "layer": layer, "heldout_from": heldout_from}
    with writing(output, header) as target:
        for site in structure["layers"][layer]["sites"]:
            with reading(activations, _ROWS_REMEDY) as file:
                source = file[f"{name}/{site['name']}"]
                counts = {key: int(source.attrs[key]) for key in ("n_tokens", "n_heldout", "n_batches", "n_skipped")}
                if mode == "stream":
                    parts = dict.fromkeys(source)
                else:
                    split = int(source["window_rows"][:heldout_from].sum())
                    n_rows = len(source["rows"])
                    if source["rows"].dtype != np.dtype(STORED_AS[header["dtype"]]):
                        problem = f"{name}/{site['name']} holds {source['rows'].dtype}, no {header['dtype']}"
                        raise ArtifactError(activations, problem, _ROWS_REMEDY)
                    counts.update(n_tokens=split, n_heldout=n_rows - split)
                    parts = {"gram": (0, split)} | ({"gram_heldout": (split, n_rows)} if heldout_fraction > 0 else {})
            group = target.create_group(site["name"])
            group.attrs.update(counts, matrices=[matrix["name"] for matrix in site["matrices"]])
            for key, part in parts.items():  # one in memory at a time
                where = f"{name}/{site['name']}/{key}"
                with reading(activations, _ROWS_REMEDY) as file:
                    source = file[f"{name}/{site['name']}"]
                    gram = source[key][:] if part is None else _gram_of_rows(source["rows"], *part, header["dtype"])
                if gram.shape != (site["d_in"], site["d_in"]):
                    problem = f"{where} has shape {gram.shape}, the structure says {site['d_in']} inputs"
                    raise ArtifactError(activations, problem, _ROWS_REMEDY)
                _check_gram(gram, f"{activations}: {where}")
                if counts["n_heldout" if key == "gram_heldout" else "n_tokens"] == 0:
                    raise NumericalError(f"{activations}: {where}: no token is left; take more calibration windows")
                group.create_dataset(key, data=gram.astype(dtype, copy=False), chunks=True, fletcher32=True)
                del gram


def check_grams(
    paths: Sequence[str | Path],
    structure: Mapping[str, Any],
    layers: Sequence[int],
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Refuse Gram files that are not of this model, of these layers, one a file, and of one calibration.

    Parameters
    ----------
    paths : sequence of path-like
    structure : mapping
        From `structure.inspect_model`.
    layers : sequence of int
    calibration : mapping, optional
        What they have to be of (`activations.calibration_of`), as far as it is known; of the rest, all of the same.

    Returns
    -------
    dict
        ``tokens``, ``heldout_from`` and ``dtype`` of the calibration, for what is made from them.

    Raises
    ------
    ArtifactError
        If one is of another version, model or layer, of another calibration, or lacks a site.
    """
    expected = dict(calibration or {})
    for layer, path in zip(layers, paths, strict=True):
        with reading(path, _GRAM_REMEDY) as file:
            says, there = plain(file.attrs), set(file)
        belongs = {"format_version": FORMAT_VERSION, "fingerprint": structure["fingerprint"], "layer": layer}
        check_provenance(path, says, {**belongs, **expected}, _GRAM_REMEDY)
        missing = [site["name"] for site in structure["layers"][layer]["sites"] if site["name"] not in there]
        if missing:
            raise ArtifactError(path, f"has no Gram of {', '.join(missing)}", _GRAM_REMEDY)
        expected = {key: says.get(key) for key in CALIBRATION}
    return expected


def check_gradients(
    paths: Sequence[str | Path],
    structure: Mapping[str, Any],
    layers: Sequence[int],
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Refuse gradients that are not of this model, these layers or this calibration.

    Parameters
    ----------
    paths : sequence of path-like
        From `calibration.gradients.collect_gradients`: the file that each layer is in.
    structure, layers, calibration
        As of `check_grams`.

    Raises
    ------
    ArtifactError
        If one is of another version, model or calibration, or lacks a matrix.
    """
    for layer, path in zip(layers, paths, strict=True):
        found = structure["layers"][layer]
        with reading(path, _GRADIENTS_REMEDY) as file:
            says, there = plain(file.attrs), set(file.get(found["name"], ()))
        belongs = {"format_version": FORMAT_VERSION, "fingerprint": structure["fingerprint"]}
        check_provenance(path, says, {**belongs, **(calibration or {})}, _GRADIENTS_REMEDY)
        names = [matrix["name"] for site in found["sites"] for matrix in site["matrices"]]
        missing = [name for name in names if name not in there]
        if missing:
            raise ArtifactError(path, f"has no gradients of {', '.join(missing)}", _GRADIENTS_REMEDY)


def read_gradients(path: str | Path, layer: int, matrix: str) -> np.ndarray:
    """Mean square of the gradient at every output of a matrix, float64 (d_out,).

    Raises
    ------
    ArtifactError
        If the file is missing or damaged.
    """
    with reading(path, _GRADIENTS_REMEDY) as file:
        group = file[layer_name(layer)][matrix]
        return group["squares"][:] / int(group.attrs["n_tokens"])


def gradient_tokens(path: str | Path, layer: int, matrix: str) -> tuple[int, int]:
    """Tokens whose gradients are in a matrix's moments, and those that were held out.

    Raises
    ------
    ArtifactError
        If the file is missing or damaged.
    """
    with reading(path, _GRADIENTS_REMEDY) as file:
        says = file[layer_name(layer)][matrix].attrs
        return int(says["n_tokens"]), int(says["n_heldout"])


def read_token_weights(path: str | Path, layer: int, matrix: str) -> np.ndarray:
    """Squared gradient at a matrix's outputs, of every token of all windows, pads left out: float64 (n_tokens,).

    Divided by the sum of those that are not held out, as `read_weighted_gram` is.

    Raises
    ------
    ArtifactError
        If the file is missing or damaged.
    """
    with reading(path, _GRADIENTS_REMEDY) as file:
        group = file[layer_name(layer)][matrix]
        weights, total = group["token_weights"][:].astype(np.float64), float(group.attrs["weight"])
    return weights / total if total > 0 else weights


def read_weighted_gram(path: str | Path, layer: int, matrix: str, *, heldout: bool = False) -> np.ndarray | None:
    """Gram of a matrix's inputs, each weighted by the squared gradient at its outputs: float64 (d_in, d_in).

    Divided by the sum of the weights, so how large the gradients are is left to `read_gradients`. None where no window
    was held out; zeros where no gradient reaches the matrix.

    Raises
    ------
    ArtifactError
        If the file is missing or damaged.
    """
    with reading(path, _GRADIENTS_REMEDY) as file:
        group = file[layer_name(layer)][matrix]
        if heldout and not group.attrs["n_heldout"]:
            return None
        gram = group["gram_heldout" if heldout else "gram"][:].astype(np.float64, copy=False)
        weight = float(group.attrs["weight_heldout" if heldout else "weight"])
    _check_gram(gram, f"{path}: {matrix}")
    if weight > 0:
        gram /= weight
    return gram


def sites(path: str | Path) -> dict[str, dict[str, Any]]:
    """Sites of a Gram file, each with its attributes ``n_tokens``, ``n_heldout``, ``n_skipped``, ``matrices``.

    Raises
    ------
    ArtifactError
        If the file is missing or damaged.
    """
    with reading(path, _GRAM_REMEDY) as file:
        return {name: plain(group.attrs) for name, group in file.items()}


def read_gram(path: str | Path, site: str, *, heldout: bool = False) -> np.ndarray:
    """Gram of a site, float64 (d_in, d_in); with `heldout` that of the held-out windows.

    Raises
    ------
    ArtifactError
        If the file is missing or damaged, or holds no such Gram.
    """
    with reading(path, _GRAM_REMEDY) as file:
        return file[site]["gram_heldout" if heldout else "gram"][:].astype(np.float64, copy=False)


@dataclasses.dataclass(frozen=True)
class Whitening:
    """Map between a weight and its whitened form; see `whitening_factor`.

    Attributes
    ----------
    factor : ndarray, float64 (d_in, d_in)
        Upper triangular ``L`` with ``L^T L = G + (shift + eta mean(diag G)) I``.
    shift : float
        Added to the diagonal because ``G`` alone was singular, as a share of its mean diagonal; 0 if not needed.
    eta : float
        Ridge asked for, as a share of the mean diagonal.
    """

    factor: np.ndarray
    shift: float
    eta: float

    def whiten(self, weight: np.ndarray) -> np.ndarray:
        """``W_L = L W``: float32 (d_in, n) of `weight` (d_in, n), computed in float64."""
        return (self.factor @ weight.astype(np.float64)).astype(np.float32)

    def unwhiten(self, dictionary: np.ndarray) -> np.ndarray:
        """``D = L^{-1} D_L`` by a triangular solve: float32 (d_in, k) of `dictionary` (d_in, k), in float64."""
        solution = scipy.linalg.solve_triangular(self.factor, dictionary.astype(np.float64), lower=False)
        return solution.astype(np.float32)

    def unwhiten_right(self, matrix: np.ndarray) -> np.ndarray:
        """``A L^{-1}`` of `matrix` A (m, d_in), by a triangular solve in float64: A, seen from the whitened space."""
        return scipy.linalg.solve_triangular(self.factor, matrix.astype(np.float64).T, lower=False, trans="T").T


@dataclasses.dataclass(frozen=True)
class EigenWhitening:
    """Map between a weight and its whitened form by the eigenvectors of the Gram; see `eigen_whitening`.

    Attributes
    ----------
    factor : ndarray, float64 (r, d_in)
        ``Lambda^1/2 V^T`` of the r eigenvalues that are no rounding noise.
    inverse : ndarray, float64 (d_in, r)
        ``V Lambda^-1/2``.
    shift : float
        0: nothing is added to a singular Gram.
    eta : float
        Ridge asked for, as a share of the mean diagonal.
    """

    factor: np.ndarray
    inverse: np.ndarray
    shift: float
    eta: float

    def whiten(self, weight: np.ndarray) -> np.ndarray:
        """``Lambda^1/2 V^T W``: float32 (r, n) of `weight` (d_in, n), computed in float64."""
        return (self.factor @ weight.astype(np.float64)).astype(np.float32)

    def unwhiten(self, dictionary: np.ndarray) -> np.ndarray:
        """``V Lambda^-1/2 D_L``: float32 (d_in, k) of `dictionary` (r, k), in float64."""
        return (self.inverse @ dictionary.astype(np.float64)).astype(np.float32)


def eigen_whitening(gram: np.ndarray, *, eta: float = 0.0) -> EigenWhitening:
    """Whitening by ``G = V Lambda V^T`` instead of Cholesky: no Gram is too singular for it (SVD-LLM V2).

    Directions whose eigenvalue is under 1e-9 of the mean diagonal hold no calibration data and are left out.

    Parameters
    ----------
    gram : ndarray (d_in, d_in)
        Symmetric, positive semidefinite up to rounding.
    eta : float
        Relative ridge, as in `whitening_factor`.

    Raises
    ------
    NumericalError
        If the Gram holds NaN or infinity, is not symmetric, or is zero.
    """
    gram, mean = _with_mean(gram, eta)
    # in the order of LAPACK, and in its own place
    scaled = np.divide(gram, mean, order="F")
    values, vectors = scipy.linalg.eigh(scaled, overwrite_a=True, check_finite=False)
    del scaled
    values = values + eta
    kept = values > EPS
    roots, vectors = np.sqrt(values[kept] * mean), vectors[:, kept]
    factor = roots[:, None] * vectors.T
    vectors /= roots
    return EigenWhitening(factor, vectors, shift=0.0, eta=eta)


def whitening_factor(gram: np.ndarray, *, eta: float = 0.0) -> Whitening:
    """Upper triangular ``L`` with ``L^T L = G``, by Cholesky in float64.

    A singular Gram (fewer tokens than inputs, dead inputs, rounding) is shifted by ``-lambda_min + eps`` on the
    diagonal, with ``eps`` = 1e-9 of the mean diagonal; so is one with a pivot below ``eps / 2``, or an inverse
    as large as if it had one, where solving would only blow up rounding noise. The shift is reported.

    Parameters
    ----------
    gram : ndarray (d_in, d_in)
        Symmetric, positive semidefinite up to rounding.
    eta : float
        Relative ridge: ``G + eta mean(diag G) I`` is factored.

    Returns
    -------
    Whitening

    Raises
    ------
    NumericalError
        If the Gram holds NaN or infinity, is not symmetric, has an eigenvalue far below zero, or is zero.
    """
    gram, mean = _with_mean(gram, eta)

    def scaled(shift: float = 0.0) -> np.ndarray:
        """The Gram relative to its mean diagonal, in the order of LAPACK, which works in its place."""
        found = np.divide(gram, mean, order="F")
        diagonal = np.einsum("ii->i", found)
        diagonal += eta
        diagonal += shift
        return found

    shift = 0.0
    factor = _cholesky(scaled())
    if factor is None:
        smallest = float(
            scipy.linalg.eigvalsh(scaled(), subset_by_index=[0, 0], overwrite_a=True, check_finite=False)[0]
        )
        if smallest < -1e-5 * len(gram):  # the largest is at most len(gram)
            raise NumericalError(f"Gram: smallest eigenvalue is {smallest:.1e} of the mean diagonal, no Gram has that")
        margin = EPS
        while factor is None:
            shift = max(0.0, margin - smallest)
            factor = _cholesky(scaled(shift))
            margin *= 2
    factor *= math.sqrt(mean)
    return Whitening(factor=factor, shift=shift, eta=eta)


def relative_error(weight: np.ndarray, approximation: np.ndarray, gram: np.ndarray | None = None) -> float:
    """Error on the calibration data, ``||X (W - W~)||_F / ||X W||_F = ||L (W - W~)||_F / ||L W||_F``.

    Computed as ``tr(E^T G E)`` in float64 with ``E = W - W~`` formed first, so nothing cancels.

    Parameters
    ----------
    weight, approximation : ndarray (d_in, d_out)
    gram : ndarray (d_in, d_in) or None
        None: the plain Frobenius error.

    Raises
    ------
    NumericalError
        If a value is not finite, or the denominator is zero.
    """
    weight = np.asarray(weight, dtype=np.float64)
    error = squared_norm(weight - np.asarray(approximation, dtype=np.float64), gram)
    size = squared_norm(weight, gram)
    if size <= 0:
        raise NumericalError("the weight is zero on the calibration data: no relative error exists")
    return math.sqrt(max(error, 0.0) / size)


def squared_norm(matrix: np.ndarray, gram: np.ndarray | None = None) -> float:
    """``||X M||_F^2 = tr(M^T G M)`` of a matrix M (d_in, n), in float64; without a Gram ``||M||_F^2``.

    Raises
    ------
    NumericalError
        If a value is not finite.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if gram is None:
        size = float(np.sum(matrix * matrix))
    else:  # tr(G M M^T): both are symmetric, which takes half the operations of G M
        size = 0.0
        for start in range(0, len(matrix), _SYMMETRIC_ROWS):
            here, below = slice(start, start + _SYMMETRIC_ROWS), slice(start + _SYMMETRIC_ROWS, None)
            rows = matrix[here]
            size += float(np.vdot(gram[here, here], rows @ rows.T))
            size += 2 * float(np.vdot(gram[here, below], rows @ matrix[below].T))
    if not math.isfinite(size):
        raise NumericalError("weight, approximation or Gram holds NaN or infinity")
    return size


def _gram_of_rows(rows: h5py.Dataset, start: int, stop: int, dtype: str) -> np.ndarray:
    d_in = rows.shape[1]
    step = max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // d_in))
    gram = np.zeros((d_in, d_in))
    for part in slices(start, stop, step):
        block = to_float32(rows[part], dtype)
        with np.errstate(over="ignore"):  # an overflow is found in the sum
            add_product(gram, block)
    return symmetrize(gram)


def _with_mean(gram: np.ndarray, eta: float) -> tuple[np.ndarray, float]:
    """A Gram that can be whitened with ridge `eta`, in float64, and its mean diagonal."""
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta is {eta}; allowed is eta >= 0")
    gram = np.asarray(gram, dtype=np.float64)
    _check_gram(gram, "Gram")
    mean = float(np.mean(np.diag(gram)))
    if mean <= 0:
        raise NumericalError("the Gram is zero: no calibration data reached this matrix")
    return gram, mean


def _check_gram(gram: np.ndarray, where: str) -> None:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise NumericalError(f"{where}: shape {gram.shape}, a square matrix is needed")
    blocks = list(row_blocks(len(gram)))
    if not all(np.isfinite(gram[rows]).all() for rows in blocks):
        raise NumericalError(f"{where}: holds NaN or infinity; collect the activations in bfloat16 or float32")
    asymmetry = max(np.abs(gram[rows] - gram[:, rows].T).max() for rows in blocks)
    if asymmetry > 1e-6 * max(np.abs(gram[rows]).max() for rows in blocks):
        raise NumericalError(f"{where}: not symmetric")


def _cholesky(gram: np.ndarray) -> np.ndarray | None:
    """Upper factor of a Gram of mean diagonal about 1, or None where it is singular to working precision.

    The factor takes the place of the Gram, which is in the order of LAPACK.
    """
    norm = max(np.abs(gram[:, columns]).sum(axis=0).max() for columns in row_blocks(len(gram)))
    try:
        factor = scipy.linalg.cholesky(gram, lower=False, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
    # a small pivot is enough to tell, but in an unlucky order none is small: LAPACK's estimate of ||G^-1||_1 sees that
    if np.diag(factor).min() ** 2 < EPS / 2:
        return None
    reciprocal, _ = scipy.linalg.lapack.dpocon(factor, norm)
    return factor if reciprocal * norm >= EPS / 2 / math.sqrt(len(factor)) else None
