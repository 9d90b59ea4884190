"""The transform T of a cut: what the MLP before it should have added, so that the blocks of the cut are not missed.

With M the MLP's output, Y what it is added to and L what leaves the cut (ReplaceMe, section 2), T is chosen so that
``M T + Y ~ L``. Least squares needs sums alone; the cosine objective streams its rows from disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np
import scipy.linalg

from cospadi.arrays import orthonormal_rows
from cospadi.calibration.activations import STORED_AS, from_stored, reading, to_stored
from cospadi.errors import NumericalError

if TYPE_CHECKING:
    import torch

Structure = Literal["full", "diagonal", "orthogonal"]

_ROWS_AT_ONCE = 4096
# rows that stay together when the order of the tokens is drawn; one chunk of the file
_SEGMENT = 64
_REMEDY = "Run the job again, which writes it anew"


class Moments:
    """Sums over tokens that least squares needs, in float64: ``M^T M``, ``M^T R`` and ``|R|^2`` with ``R = L - Y``.

    Parameters
    ----------
    width : int
        d, the size of the residual stream.
    device : str
    normalize : bool
        Divide M and R of each token by the norm of its L first. A few tokens have a hundred times the norm of the
        others (massive activations); in plain sums nothing but them counts.
    """

    def __init__(self, width: int, device: str = "cpu", *, normalize: bool = False) -> None:
        import torch

        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.gram)
        self.square = 0.0
        self.n_tokens = 0
        self._normalize = normalize

    def add(self, mlp: torch.Tensor, residual: torch.Tensor, target: torch.Tensor) -> None:
        """Add tokens: M, Y and L, each (n, d) of any float dtype."""
        for first in range(0, len(mlp), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            left = mlp[rows].double()
            right = target[rows].double() - residual[rows].double()
            if self._normalize:
                norm = target[rows].double().norm(dim=1, keepdim=True).clamp(min=1e-30)
                left, right = left / norm, right / norm
            self.gram += left.T @ left
            self.cross += left.T @ right
            self.square += float(right.square().sum())
        self.n_tokens += len(mlp)

    def solve(self, structure: Structure = "full", *, ridge: float = 0.0) -> np.ndarray:
        """T (d, d) float64 that minimises ``|M T - R|^2 + alpha |T|^2``.

        Parameters
        ----------
        structure : {"full", "diagonal", "orthogonal"}
            Full: ``(M^T M + alpha I)^{-1} M^T R`` by Cholesky. Diagonal: the same, channel by channel. Orthogonal:
            the polar factor of ``M^T R`` (Procrustes), where the ridge has no say.
        ridge : float
            alpha as a fraction of the mean diagonal of ``M^T M``.

        Raises
        ------
        NumericalError
            If the sums are not finite or ``M^T M`` is singular.
        """
        gram, cross = self.gram.cpu().numpy(), self.cross.cpu().numpy()
        if not (np.isfinite(gram).all() and np.isfinite(cross).all()) or not gram.any():
            raise NumericalError("the MLP's outputs are zero, NaN or infinite; check the model's weights")
        if structure == "orthogonal":
            return orthonormal_rows(cross)
        alpha = ridge * np.trace(gram) / len(gram)
        if structure == "diagonal":
            return np.diag(np.diag(cross) / np.maximum(np.diag(gram) + alpha, np.finfo(np.float64).tiny))
        try:
            factor = scipy.linalg.cho_factor(gram + alpha * np.eye(len(gram)), lower=True)
        except np.linalg.LinAlgError as error:
            raise NumericalError(
                f"M^T M over {self.n_tokens} tokens is singular (ridge {ridge}); take more calibration tokens than "
                f"the {len(gram)} channels, or a larger ridge"
            ) from error
        return scipy.linalg.cho_solve(factor, cross)

    def error(self, transform: np.ndarray) -> float:
        """``|M T + Y - L| / |L - Y|``, Frobenius norms; with the identity, what removal alone does."""
        gram, cross = self.gram.cpu().numpy(), self.cross.cpu().numpy()
        square = self.square - 2 * np.sum(transform * cross) + np.sum(transform * (gram @ transform))
        return float(np.sqrt(max(square, 0.0) / self.square)) if self.square else 0.0


class Rows:
    """M, Y and L of every token in an HDF5 file, in the dtype they were computed in; appended, then streamed.

    Parameters
    ----------
    path : Path
    width : int
    dtype : {"bfloat16", "float16", "float32"}
    """

    names = ("mlp", "residual", "target")

    def __init__(self, path: Path, width: int, dtype: str) -> None:
        self.path, self.dtype, self.width = path, dtype, width
        self.n_tokens = 0
        with h5py.File(path, "w") as file:
            for name in self.names:
                file.create_dataset(
                    name,
                    (0, width),
                    STORED_AS[dtype],
                    maxshape=(None, width),
                    chunks=(_SEGMENT, width),
                    fletcher32=True,
                )

    def add(self, mlp: torch.Tensor, residual: torch.Tensor, target: torch.Tensor) -> None:
        """Append tokens: M, Y and L, each (n, d)."""
        with h5py.File(self.path, "r+") as file:
            for name, tensor in zip(self.names, (mlp, residual, target), strict=True):
                file[name].resize(self.n_tokens + len(tensor), axis=0)
                file[name][self.n_tokens :] = to_stored(tensor)
        self.n_tokens += len(mlp)

    def batches(self, size: int, order: np.random.Generator | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
        """M, Y and L (n, d) float32 in batches of about `size` tokens; `order` shuffles segments of 64 neighbours."""
        starts = np.arange(0, self.n_tokens, _SEGMENT)
        if order is not None:
            starts = order.permutation(starts)
        together = max(1, size // _SEGMENT)
        with reading(self.path, _REMEDY) as file:
            datasets = [file[name] for name in self.names]
            for first in range(0, len(starts), together):
                picked = starts[first : first + together]
                tensors = []
                for dataset in datasets:
                    block = np.concatenate([dataset[start : start + _SEGMENT] for start in picked])
                    tensors.append(from_stored(block, self.dtype).float())
                yield tuple(tensors)


def fit_cosine(
    rows: Rows,
    start: np.ndarray,
    *,
    loss: Literal["exact", "practical"] = "exact",
    structure: Structure = "full",
    epochs: int = 10,
    lr: float = 1e-4,
    batch_tokens: int = 1024,
    l1: float = 0.0,
    l2: float = 0.0,
    random_state: int = 42,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """T that minimises the mean of 1 - cosine between prediction and target, by Adam over streamed rows.

    Parameters
    ----------
    rows : Rows
    start : ndarray (d, d)
        Where T starts; brought to `structure` first.
    loss : {"exact", "practical"}
        Exact: ``1 - cos(M T + Y, L)``; practical: ``1 - cos(M T, L - Y)``.
    structure : {"full", "diagonal", "orthogonal"}
        Diagonal: Adam on d numbers. Orthogonal: after each step T becomes its nearest orthogonal matrix.
    epochs, lr, batch_tokens
        The paper's are 10, 1e-4 and 1024.
    l1, l2 : float
        Weights of ``sum |T| / d`` and ``sum T^2 / d``, added to the loss.
    random_state : int
        Seed of the order of the tokens.

    Returns
    -------
    transform : ndarray (d, d) float64
    history : list of dict
        ``epoch`` and ``loss``, the mean over all tokens before it (0: at the start) and after the last; without
        penalties.

    Raises
    ------
    NumericalError
        If the loss is no longer finite.
    """
    import torch

    initial = torch.from_numpy(np.asarray(start, np.float32)).to(device)
    if structure == "diagonal":
        initial = initial.diagonal().clone()
    elif structure == "orthogonal":
        initial = orthonormal_rows(initial)
    parameter = initial.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([parameter], lr=lr)
    order = np.random.default_rng(random_state)
    begun = time.perf_counter()

    def distance(mlp: torch.Tensor, residual: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        product = mlp * parameter if structure == "diagonal" else mlp @ parameter
        if loss == "practical":
            return 1 - torch.cosine_similarity(product, target - residual, dim=1)
        return 1 - torch.cosine_similarity(product + residual, target, dim=1)

    def mean_loss() -> float:
        with torch.no_grad():
            total = sum(
                float(distance(*(tensor.to(device) for tensor in batch)).double().sum())
                for batch in rows.batches(_ROWS_AT_ONCE)
            )
        return total / rows.n_tokens

    history = [{"epoch": 0, "loss": mean_loss()}]
    for epoch in range(1, epochs + 1):
        running = 0.0
        for batch in rows.batches(batch_tokens, order):
            losses = distance(*(tensor.to(device) for tensor in batch))
            penalty = (l1 * parameter.abs().sum() + l2 * parameter.square().sum()) / rows.width
            optimizer.zero_grad()
            (losses.mean() + penalty).backward()
            optimizer.step()
            if structure == "orthogonal":
                with torch.no_grad():
                    parameter.copy_(orthonormal_rows(parameter))
            running += float(losses.detach().sum())
        if not np.isfinite(running):
            raise NumericalError(f"the cosine objective became {running} in epoch {epoch}; lower lr ({lr})")
        history.append({"epoch": epoch, "loss": running / rows.n_tokens})
        log(f"epoch {epoch}/{epochs} loss {running / rows.n_tokens:.6f} {time.perf_counter() - begun:.1f}s")
    history[-1]["loss"] = mean_loss()
    result = parameter.detach().double().cpu().numpy()
    return (np.diag(result) if structure == "diagonal" else result), history
