"""What an error in the last matrix of a model, the head, costs the loss; for embedding and head in few bits.

The loss sees the head's output itself, so nothing has to be sent back: with p the predicted distribution, the expected
square of the gradient at token j's logit is ``p_j (1 - p_j)``, for a label that is sampled from p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.arrays import add_product, all_finite, slices, symmetrize
from cospadi.calibration.activations import FORMAT_VERSION, HIDDEN, first_heldout, writing
from cospadi.calibration.walk import Chunk, logged, read_windows
from cospadi.errors import NumericalError
from cospadi.structure import load_head

# Tokens whose logits are in memory at a time
_TOKENS_AT_ONCE = 256


def measure_head(
    model_folder: str | Path,
    structure: Mapping[str, Any],
    windows: str | Path,
    *,
    hidden_in: str | Path,
    output: str | Path,
    batch_tokens: int,
    device: str = "cpu",
    heldout_fraction: float = 0.0,
    log: Callable[[str], None] = print,
) -> None:
    """Second moments at the head, over the calibration windows that are not held out, pads left out.

    Parameters
    ----------
    model_folder, structure, windows, batch_tokens, device, heldout_fraction, log
        As of `collect.collect`.
    hidden_in : path-like
        The ``hidden_out`` that `collect.collect` wrote for the last layers; its dtype is the one to compute in.
    output : path-like
        Written, float64: ``gram (hidden_size, hidden_size)``, the sum over the tokens of ``|g|^2 x x^T`` with x what
        enters the head and ``|g|^2 = sum_j p_j (1 - p_j)``; ``squares (vocabulary,)``, the sum of ``p_j (1 - p_j)``;
        ``counts (vocabulary,)``, how often each token is read. Attributes: ``n_tokens``.

    Raises
    ------
    NumericalError
        If a prediction is not finite.
    ArtifactError
        If windows or hidden states are damaged, do not fit the model or belong elsewhere.
    """
    import torch

    last_layer = structure["n_layers"] - 1
    read = read_windows(windows, structure["vocab_size"])
    belongs = {"format_version": FORMAT_VERSION, "fingerprint": structure["fingerprint"], "tokens": read.tokens}
    samples, length = read.input_ids.shape
    dtype = HIDDEN.dtype(hidden_in, last_layer)
    HIDDEN.check(hidden_in, (samples, length, structure["hidden_size"]), dtype, last_layer, belongs)
    heldout_from = first_heldout(samples, heldout_fraction)
    counted = read.attention_mask[:heldout_from].astype(bool)
    # of a chunk the final norm alone is asked for
    chunk = Chunk(model_folder, range(last_layer, last_layer + 1), dtype=dtype, device=device)
    head = load_head(model_folder, structure, dtype=dtype, device=device)
    gram = torch.zeros(2 * [structure["hidden_size"]], dtype=torch.float64, device=device)
    squares = torch.zeros(len(head), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in logged(list(slices(0, heldout_from, read.step(batch_tokens))), read, log):
            rows = HIDDEN.read(hidden_in, last_layer, batch, dtype)[torch.from_numpy(counted[batch])].to(device)
            for some in slices(0, len(rows), _TOKENS_AT_ONCE):
                p = chunk.predict(rows[some], head).softmax(dim=1)
                slopes = p * (1 - p)
                weights = slopes.sum(dim=1, keepdim=True)
                entering = chunk.entering_head(rows[some]).float() * weights.sqrt()
                if not (all_finite(weights) and all_finite(entering)):
                    raise NumericalError(
                        f"what the model predicts is NaN or infinite (windows {batch.start}-{batch.stop - 1}). Compute "
                        "in bfloat16 or float32, and check the model's weights"
                    )
                squares += slopes.sum(dim=0, dtype=torch.float64)
                add_product(gram, entering)
    counts = np.bincount(read.input_ids[:heldout_from][counted], minlength=len(head))
    attributes = {"model": structure["model"], "dtype": dtype, "heldout_from": heldout_from}
    with writing(output, {**belongs, **attributes, "n_tokens": int(counted.sum())}) as file:
        file.create_dataset("gram", data=symmetrize(gram.cpu().numpy()), fletcher32=True)
        file.create_dataset("squares", data=squares.cpu().numpy(), fletcher32=True)
        file.create_dataset("counts", data=counts.astype(np.float64), fletcher32=True)
