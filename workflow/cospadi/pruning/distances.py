"""How far do the activations move from block to block: every metric, for every start and length of a cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cospadi.calibration.walk import Place, Walk
from cospadi.files import write_json

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1

_TOKENS_AT_ONCE = 256


def measure(walk: Walk, output: str | Path, *, samples: int | None) -> dict[str, Any]:
    """Measure the distances between the residual stream before and behind every possible cut, and write them.

    The stream is taken before the final norm, also behind the last block. All metrics come from the inner products
    of a token's states, ``(n_layers + 1)^2`` a token, so that no state is kept longer than its group of windows.

    Parameters
    ----------
    walk : Walk
        Its errors are the errors.
    output : path-like
        JSON to write; the result, below.
    samples : int or None
        Windows to read, the first of them; None: all.

    Returns
    -------
    dict
        ``n_layers``, ``n_tokens``, ``n_windows``, ``samples`` (as asked for); ``metrics``: ``angular``,
        ``angular_last``, ``cosine``, ``cosine_worst`` (mean over the windows of their worst token) and ``l2``, each
        ``[start][length - 1]`` for the cut of `length` blocks from block `start` on; ``block_influence`` (ShortGPT):
        mean of 1 - cosine over each block alone.
    """
    import torch

    n_layers = walk.structure["n_layers"]
    places = [Place("output", block) for block in range(-1, n_layers)]
    names = ("angular", "angular_last", "cosine", "cosine_worst", "l2")
    sums = {name: torch.zeros(n_layers + 1, n_layers + 1, dtype=torch.float64) for name in names}
    n_tokens = n_windows = 0
    for group in walk.groups(places, samples=samples):
        states = [group.rows[place] for place in places]
        ends = np.cumsum(group.lengths) - 1
        window = torch.from_numpy(np.repeat(np.arange(len(ends)), group.lengths)).to(walk.device)
        worst = torch.zeros(len(ends), n_layers + 1, n_layers + 1, dtype=torch.float64, device=walk.device)
        for first in range(0, len(states[0]), _TOKENS_AT_ONCE):
            tokens = slice(first, first + _TOKENS_AT_ONCE)
            cosine, ratio = _compare(torch.stack([state[tokens] for state in states], dim=1))
            angle = torch.arccos(cosine.clamp(-1, 1)) / torch.pi
            last = torch.from_numpy(ends[(ends >= first) & (ends < first + _TOKENS_AT_ONCE)] - first)
            sums["angular"] += angle.sum(0).cpu()
            sums["angular_last"] += angle[last.to(angle.device)].sum(0).cpu()
            sums["cosine"] += (1 - cosine).sum(0).cpu()
            place = window[tokens, None, None].expand_as(cosine)
            worst.scatter_reduce_(0, place, 1 - cosine, "amax")
            sums["l2"] += ratio.sum(0).cpu()
        sums["cosine_worst"] += worst.sum(0).cpu()
        n_tokens += len(states[0])
        n_windows += len(ends)
    counts = {**dict.fromkeys(names, n_tokens), "angular_last": n_windows, "cosine_worst": n_windows}
    metrics = {
        name: [
            [float(total[start, end]) / counts[name] for end in range(start + 1, n_layers + 1)]
            for start in range(n_layers)
        ]
        for name, total in sums.items()
    }
    result = {
        "format_version": FORMAT_VERSION,
        **walk.provenance,
        "samples": samples,
        "n_layers": n_layers,
        "n_tokens": n_tokens,
        "n_windows": n_windows,
        "metrics": metrics,
        "block_influence": [row[0] for row in metrics["cosine"]],
    }
    write_json(output, result)
    return result


def _compare(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a token's states (n_tokens, n_states, d), all against all: cosine, and ``|b - a| / |a|`` at [:, a, b]."""
    states = states.double()
    inner = states @ states.mT
    square = inner.diagonal(dim1=1, dim2=2).clamp(min=1e-300)  # a state of zeros has no direction
    cosine = inner / (square[:, :, None] * square[:, None, :]).sqrt()
    difference = (square[:, :, None] + square[:, None, :] - 2 * inner).clamp(min=0).sqrt()
    return cosine, difference / square[:, :, None].sqrt()
