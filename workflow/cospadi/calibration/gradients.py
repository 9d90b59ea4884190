"""Walk the chunks of a model in reverse with the gradient of its loss, and keep what an error in each matrix costs.

Labels are sampled from the model itself, so the squares of the gradients are the Fisher information: what an error of
the outputs does to the distribution of the predicted token. A chunk goes forward again from the hidden states before
it, then the gradient that the chunk behind it left goes back through it. Memory holds the graph of one batch in one
chunk, never the model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from cospadi.arrays import all_finite, slices
from cospadi.calibration.activations import (
    FORMAT_VERSION,
    GRADIENT,
    HIDDEN,
    STORED_AS,
    first_heldout,
    to_stored,
    writing,
)
from cospadi.calibration.collect import RunningGram, chosen_dtype
from cospadi.calibration.walk import Chunk, GradientTap, Windows, logged, read_windows
from cospadi.errors import NumericalError
from cospadi.structure import load_head

if TYPE_CHECKING:
    import torch

# Tokens whose logits are in memory at a time
_TOKENS_AT_ONCE = 256


def collect_gradients(
    model_folder: str | Path,
    structure: Mapping[str, Any],
    windows: str | Path,
    layers: range,
    *,
    hidden_in: str | Path | None,
    gradient_in: str | Path | None,
    moments_out: str | Path,
    gradient_out: str | Path,
    dtype: Literal["auto", "bfloat16", "float16", "float32"],
    batch_tokens: int,
    device: str = "cpu",
    heldout_fraction: float = 0.0,
    gram_dtype: Literal["float64", "float32"] = "float64",
    log: Callable[[str], None] = print,
) -> None:
    """Second moments of the loss's gradients at every matrix of consecutive layers.

    With x a matrix's input and d the gradient at its output, of the summed cross-entropy of the windows' tokens.

    Parameters
    ----------
    model_folder, structure, windows, layers, batch_tokens, device, heldout_fraction, log
        As of `collect.collect`; held-out windows add to ``gram_heldout`` alone.
    hidden_in : path-like or None
        The ``hidden_out`` that `collect.collect` wrote for the layers before; None where there are none.
    gradient_in : path-like or None
        The `gradient_out` of the layers behind; None where there are none: then labels are sampled, with the seed that
        the windows were drawn with.
    moments_out : path-like
        Written: a group ``layer_03/<matrix>`` for each matrix, with ``gram (d_in, d_in)``, the sum of ``|d|^2 x x^T``
        over the tokens, ``squares (d_out,)`` float64, the sum of d's squares, ``token_weights``
        float32, the ``|d|^2`` of every token of all windows, pads left out, and, with `heldout_fraction`,
        ``gram_heldout``. Attributes: ``n_tokens``, ``n_heldout``, and ``weight``, ``weight_heldout``, the sums of
        ``|d|^2``.
    gradient_out : path-like
        Written: ``gradient (samples, length, hidden_size)`` at what enters the chunk.
    dtype
        ``auto`` is that of the hidden states or gradients that it goes on from.
    gram_dtype : {"float64", "float32"}
        Dtype of the stored Grams.

    Raises
    ------
    NumericalError
        If a gradient is not finite.
    ArtifactError
        If windows, hidden states or gradients are damaged, do not fit the model or belong elsewhere.
    """
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= structure["n_layers"]:
        raise ValueError(f"{layers} is no range of consecutive layers of a model of {structure['n_layers']} layers")
    if (hidden_in is None) != (layers.start == 0):
        raise ValueError("hidden_in is needed by every chunk but the one that starts at layer 0")
    if (gradient_in is None) != (layers.stop == structure["n_layers"]):
        raise ValueError("gradient_in is needed by every chunk but the one that ends the model")
    read = read_windows(windows, structure["vocab_size"])
    belongs = {"format_version": FORMAT_VERSION, "fingerprint": structure["fingerprint"], "tokens": read.tokens}
    samples, length = read.input_ids.shape
    shape = (samples, length, structure["hidden_size"])
    if hidden_in is None and gradient_in is not None:
        dtype, reason = GRADIENT.dtype(gradient_in, layers.stop), "the chunk behind was computed in it"
    else:
        dtype, reason = chosen_dtype(dtype, device, hidden_in, layers.start - 1)
    log(f"computing in {dtype}: {reason}")
    if hidden_in is not None:
        HIDDEN.check(hidden_in, shape, dtype, layers.start - 1, belongs)
    if gradient_in is not None:
        GRADIENT.check(gradient_in, shape, dtype, layers.stop, {**belongs, "seed": read.seed})
    heldout_from = first_heldout(samples, heldout_fraction)
    attributes = {
        **belongs,
        "model": structure["model"],
        "seed": read.seed,
        "dtype": dtype,
        "dtype_reason": reason,
        "n_windows": samples,
        "heldout_from": heldout_from,
    }

    chunk = Chunk(model_folder, layers, dtype=dtype, device=device)
    head = None if gradient_in is not None else load_head(model_folder, structure, dtype=dtype, device=device)
    batches = list(slices(0, samples, read.step(batch_tokens)))
    with contextlib.ExitStack() as stack:
        moments_file = stack.enter_context(writing(moments_out, attributes))
        gradient_file = stack.enter_context(writing(gradient_out, {**attributes, "first_layer": layers.start}))
        gradient = gradient_file.create_dataset(
            "gradient", shape, STORED_AS[dtype], chunks=(1, *shape[1:]), fletcher32=True
        )
        matrices, taps = [], []
        for index in layers:
            layer = structure["layers"][index]
            for matrix in (matrix for site in layer["sites"] for matrix in site["matrices"]):
                group = moments_file.create_group(f"{layer['name']}/{matrix['name']}")
                matrices.append(_Moments(group, matrix["shape"], read, heldout_from, device, gram_dtype))
                taps.append(GradientTap(index, matrix["name"].removeprefix(f"{layer['prefix']}."), matrices[-1].see))
        for batch in logged(batches, read, log):
            entrance = None if hidden_in is None else HIDDEN.read(hidden_in, layers.start - 1, batch, dtype)

            def gradient_at(last: torch.Tensor, batch: slice = batch) -> torch.Tensor:
                if gradient_in is None:
                    return _gradient_of_loss(chunk, head, last, read, batch)
                return GRADIENT.read(gradient_in, layers.stop, batch, dtype).to(device)

            gradient[batch] = to_stored(chunk.run_back(read, batch, entrance, gradient_at, taps))
        for one in matrices:
            one.finish()


def sampling_draws(windows: Windows) -> np.ndarray:
    """A number between 0 and 1 for every token, float64 (samples, length), by which its label is sampled.

    The same whatever the batches, the chunks and the device.
    """
    return np.random.default_rng(windows.seed % 2**63).random(windows.input_ids.shape)


def _gradient_of_loss(
    chunk: Chunk, head: torch.Tensor, last: torch.Tensor, windows: Windows, batch: slice
) -> torch.Tensor:
    """Gradient of the summed cross-entropy at what the last block gives, (n_windows, length, hidden_size).

    A label is where the distribution function of the prediction passes the token's number of `sampling_draws`. Pads
    have no label.
    """
    import torch

    kept = torch.from_numpy(windows.attention_mask[batch]).bool()
    draws = torch.from_numpy(sampling_draws(windows)[batch])[kept].to(last.device)
    rows = last[kept.to(last.device)]
    gradient = torch.zeros_like(rows)
    for start in range(0, len(rows), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        states = rows[part].requires_grad_()
        logits = chunk.predict(states, head)
        slopes = logits.detach().softmax(dim=1)
        reached = slopes.cumsum(dim=1, dtype=torch.float64)
        labels = torch.searchsorted(reached, draws[part, None] * reached[:, -1:]).clamp(max=len(head) - 1)
        # the gradient of the cross-entropy at the logits: what is predicted less what is there
        slopes.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=slopes.dtype))
        (gradient[part],) = torch.autograd.grad(logits, states, slopes)
    whole = torch.zeros_like(last)
    whole[kept.to(last.device)] = gradient
    return whole


class _Moments:
    """Takes what enters a matrix and the gradient at what leaves it out of a backward pass."""

    def __init__(
        self,
        group: h5py.Group,
        shape: tuple[int, int],
        windows: Windows,
        heldout_from: int,
        device: str,
        gram_dtype: str,
    ) -> None:
        import torch

        self._group = group
        self._gram = RunningGram(group, shape[0], windows.attention_mask, heldout_from, device, gram_dtype)
        self._lengths = windows.attention_mask.sum(axis=1, dtype=np.int64)
        self._heldout_from = heldout_from
        self._heldout_weight = 0.0
        self._squares = torch.zeros(shape[1], dtype=torch.float64, device=device)
        self._weights: list[np.ndarray] = []

    def see(self, rows: torch.Tensor, gradients: torch.Tensor, batch: slice) -> None:
        squares = gradients.float().square()
        weights = squares.sum(dim=1, keepdim=True)
        if not (all_finite(weights) and all_finite(rows)):
            raise NumericalError(
                f"{self._group.name[1:]}: its input or the gradient at its output is NaN or infinite (windows "
                f"{batch.start}-{batch.stop - 1}). Compute in bfloat16 or float32, and check the model's weights"
            )
        counted = int(self._lengths[batch.start : min(batch.stop, self._heldout_from)].sum())
        self._squares += squares[:counted].sum(dim=0)
        self._heldout_weight += float(weights[counted:].sum())
        self._weights.append(weights[:, 0].cpu().numpy())
        self._gram.add(rows.float() * weights.sqrt(), batch)

    def finish(self) -> None:
        n_tokens, n_heldout = self._gram.finish()
        self._group.create_dataset("squares", data=self._squares.cpu().numpy(), fletcher32=True)
        self._group.create_dataset("token_weights", data=np.concatenate(self._weights), fletcher32=True)
        weight = float(self._squares.sum())
        self._group.attrs.update(
            n_tokens=n_tokens, n_heldout=n_heldout, weight=weight, weight_heldout=self._heldout_weight
        )
