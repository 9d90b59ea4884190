"""How far does each block move the distribution of the predicted token: the logit lens on the residual stream.

Every state goes through the model's own final norm and head, as if the model ended there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cospadi.calibration.walk import Place, Walk
from cospadi.files import write_json
from cospadi.structure import load_head, load_layers

FORMAT_VERSION = 1

# What is read: every state of a token is as much work as the model's whole head
WINDOWS = 16
TOKENS_A_WINDOW = 16

_TOKENS_AT_ONCE = 64


def measure(walk: Walk, output: str | Path) -> dict[str, Any]:
    """Measure the drift over every block and write it.

    Tokens are taken evenly from the first calibration windows. MASA's authors average the hidden states of a block
    instead; a few tokens with a hundred times the norm of the others would be all that is left of such a mean.

    Parameters
    ----------
    walk : Walk
        Its errors are the errors.
    output : path-like
        JSON to write; the result, below.

    Returns
    -------
    dict
        ``n_layers``, ``n_tokens``; ``drift``: for each block the mean over the tokens of the Kullback-Leibler
        divergence, in nats, of the distribution behind it from the one before it.
    """
    import torch

    n_layers, folder = walk.structure["n_layers"], walk.model_folder
    places = [Place("output", block) for block in range(-1, n_layers)]
    last = load_layers(folder, n_layers - 1, n_layers - 1, dtype=walk.dtype, device=walk.device)
    head = load_head(folder, walk.structure, dtype=walk.dtype, device=walk.device)
    total, n_tokens = torch.zeros(n_layers, dtype=torch.float64), 0
    for group in walk.groups(places, samples=WINDOWS):
        firsts = np.cumsum(group.lengths) - group.lengths
        chosen = np.concatenate(
            [first + _evenly(length, TOKENS_A_WINDOW) for first, length in zip(firsts, group.lengths, strict=True)]
        )
        for start in range(0, len(chosen), _TOKENS_AT_ONCE):
            tokens = torch.from_numpy(chosen[start : start + _TOKENS_AT_ONCE]).to(walk.device)
            before = None
            for place in places:
                with torch.inference_mode():
                    logits = last.norm(group.rows[place][tokens]) @ head.T
                after = logits.float().log_softmax(dim=1)
                if before is not None:
                    total[place.block] += float((before.exp() * (before - after)).sum(dtype=torch.float64))
                before = after
        n_tokens += len(chosen)
    result = {
        "format_version": FORMAT_VERSION,
        **walk.provenance,
        "n_layers": n_layers,
        "n_tokens": n_tokens,
        "drift": (total / n_tokens).tolist(),
    }
    write_json(output, result)
    return result


def _evenly(length: int, count: int) -> np.ndarray:
    """At most `count` positions spread over 0 to `length` - 1, the last among them."""
    return np.unique(np.linspace(0, length, min(count, length) + 1).astype(np.int64)[1:] - 1)
