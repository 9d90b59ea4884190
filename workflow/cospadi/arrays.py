"""Arrays: NumPy on the CPU, torch on a GPU, the steps between them, and what several rooms compute with either."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
from array_api_compat import is_torch_array

# Enough for singular values a millionth of the largest: each step makes small ones half as large again.
_NEWTON_SCHULZ_STEPS = 60
# Values of a square matrix that are looked at together: 32 MiB in float64
_BLOCK_VALUES = 2**22
# Rows of a Gram that a product is computed of at a time: what is beside a wide one stays small, and OpenBLAS (0.3.31,
# two threads) dies of all 28672 inputs of 2048 tokens at once
PRODUCT_ROWS = 4096
# Of the windows that a training reads, the share and the most that tell which of its epochs is the best
_HELD_OUT, _MOST_HELD_OUT = 1 / 8, 32


def held_out_of(count: int) -> slice:
    """The windows, the last of `count`, that a training looks at and does not train on."""
    return slice(count - min(max(1, round(_HELD_OUT * count)), _MOST_HELD_OUT), count)


def to_numpy(array: Any) -> np.ndarray:
    """A NumPy array of a NumPy or torch array; torch's half-precision floats become float32."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    if array.is_floating_point() and array.element_size() < 4:
        array = array.float()
    return array.numpy()


def on_device(array: np.ndarray, device: str) -> Any:
    """`array` itself for ``"cpu"``, else a torch tensor of the same dtype on `device`."""
    if device == "cpu":
        return array
    import torch

    return torch.as_tensor(array, device=device)


def all_finite(tensor: Any) -> bool:
    """Whether a torch tensor holds neither NaN nor infinity."""
    import torch

    # a sum is infinite or NaN where a value is, and takes a fortieth of the time that looking at each of them does
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def orthonormal_rows(matrix: Any) -> Any:
    """The matrix with orthonormal rows nearest to a (k, d) matrix, k <= d (its polar factor).

    On CPU by SVD. For torch by Newton-Schulz iterations, matrix products only, because an SVD on a GPU takes seconds;
    by SVD if they do not settle, as for a matrix of deficient rank.
    """
    if is_torch_array(matrix):
        import torch

        gram = matrix @ matrix.T
        identity = torch.eye(gram.shape[0], dtype=matrix.dtype, device=matrix.device)
        # the Frobenius norm of the Gram bounds the largest singular value, squared
        rows = matrix / torch.linalg.matrix_norm(gram).sqrt().clamp_min(torch.finfo(matrix.dtype).tiny)
        tolerance = 32 * torch.finfo(matrix.dtype).eps
        for _ in range(_NEWTON_SCHULZ_STEPS):
            gram = rows @ rows.T
            if bool((gram - identity).abs().max() < tolerance):
                return rows
            rows = 1.5 * rows - 0.5 * (gram @ rows)
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, _, vt = scipy.linalg.svd(matrix, full_matrices=False, check_finite=False)
    return u @ vt


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """The range from `start` to `stop` in pieces of `step`; the last may be shorter."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def row_blocks(size: int) -> Iterator[slice]:
    """Rows of a square matrix, as many at a time as leave what is computed of them small beside the matrix."""
    return slices(0, size, max(1, _BLOCK_VALUES // max(size, 1)))


def add_product(total: Any, left: Any, right: Any = None) -> None:
    """``total += left^T right`` in its own place, `PRODUCT_ROWS` of its rows at a time.

    Parameters
    ----------
    total : array (d, e), float64
        NumPy or torch, as the others.
    left : array (n, d), float32
    right : array (n, e), float32, optional
        None: `left` again. The half above the diagonal is computed then, and taken for the other but within a block,
        where rounding may differ (`symmetrize`).
    """
    if right is None and is_torch_array(left) and left.device.type == "cpu":
        total, left = total.numpy(), left.numpy()  # NumPy sees that a product is symmetric, and does half of it
    for here in slices(0, left.shape[1], PRODUCT_ROWS):
        if right is not None:
            total[here] += left[:, here].T @ right
            continue
        product = left[:, here].T @ left[:, here.start :]
        total[here, here.start :] += product
        total[here.stop :, here] += product[:, here.stop - here.start :].T


def symmetrize(matrix: np.ndarray) -> np.ndarray:
    """``(M + M^T) / 2`` of a square matrix in its own place: the Gram of a wide site is gigabytes."""
    for rows in row_blocks(len(matrix)):
        for columns in row_blocks(len(matrix)):
            if columns.start <= rows.start:
                part = (matrix[rows, columns] + matrix[columns, rows].T) / 2
                matrix[rows, columns], matrix[columns, rows] = part, part.T
    return matrix
