"""EntQuant (Putzky et al., ICML 2026): float8 numbers under a scale an output, chosen so that they are of few bits.

No data is looked at. With f rounding to float8 (e4m3), a scale s of column w costs
``||w - s f(w / s)||_1 / ||W||_1 + price * ||f(w / s)||_1 / n``; the second norm stands for the entropy. The paper goes
down that by L-BFGS; columns do not depend on each other, so here the best of a row of scales is taken. The price is
searched until the bytes are those asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cospadi.files import BFLOAT16
from cospadi.runtime.cospadi_entropy import Entropy
from cospadi.solvers.entropy import Found, search

# Whole steps of the least float8 number that a number takes: exact up to 16, then 4 significant bits
LARGEST = 448 * 2**9
_EXACT_BITS = 4
# Steps that are tried, in powers of two of the root mean square of a column. Shorter ones have no finer numbers, since
# all are cut to 4 bits; of longer ones hardly a number is left
STEPS = 2.0 ** (np.arange(-24, 9) / 4)


def quantize(weight: np.ndarray, codec: Entropy, nbytes: int, *, log: Callable[[str], None] | None = None) -> Found:
    """Codes within `nbytes`, header, tables and scales included.

    Parameters
    ----------
    weight : ndarray (d_in, d_out), float32
    codec : Entropy
        That has scales of columns.

    Returns
    -------
    Found
        With the steps of the inputs, which are 1, and then those of the outputs.

    Raises
    ------
    ConfigError
        If not even the longest steps take so few bytes.
    """
    d_in, d_out = weight.shape
    sizes = np.sqrt((weight.astype(np.float64) ** 2).mean(0))
    sizes[sizes == 0] = 1.0
    steps = (sizes * STEPS[:, None]).astype(BFLOAT16).astype(np.float32)  # as the file holds them
    errors, norms = np.empty(steps.shape), np.empty(steps.shape)
    for index, step in enumerate(steps):
        numbers = to_float8(weight / step)
        errors[index] = np.abs(weight - numbers * step).sum(0, dtype=np.float64)
        norms[index] = np.abs(numbers).sum(0, dtype=np.float64)
    errors /= np.abs(weight).sum(dtype=np.float64) or 1.0
    norms /= weight.size
    ones = np.ones(d_in, np.float32)

    def attempt(factor: float) -> Found:
        # of an even spread the best step goes with the root of the price
        chosen = steps[np.argmin(errors + 4.0**factor * norms, axis=0), np.arange(d_out)]
        numbers = to_float8(weight / chosen)
        taken = codec.pack_codes(numbers, ones).nbytes + 2 * d_out
        return Found(numbers * chosen, np.concatenate([ones, chosen]), taken, 0)

    # where a Gaussian is spread over a step in the proportion that takes so many bits
    return search(attempt, weight.shape, nbytes, 1.37 - 8 * nbytes / weight.size, log=log)


def to_float8(numbers: np.ndarray) -> np.ndarray:
    """The float8 (e4m3) nearest to each number, ties to even; all in steps of the least one, 2^-9: whole, float32."""
    numbers = np.clip(numbers, -LARGEST, LARGEST)
    _, exponents = np.frexp(numbers)
    step = np.ldexp(np.float32(1), np.maximum(exponents - _EXACT_BITS, 0))
    return np.rint(numbers / step) * step
