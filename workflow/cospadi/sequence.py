"""Learn layers in turn, each knowing what the compressed ones before it make of the calibration windows.

Two streams of hidden states go through the model, a block after the other: one of the model as it is, one of the model
as compressed so far. Between two jobs they are in a file. With them the weight that a method gets can make up for what
has gone wrong before (`target: sequential`), and a block can be refined (`refinement`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cospadi.arrays import all_finite
from cospadi.calibration.activations import COMPRESSED, FORMAT_VERSION, HIDDEN, STORED_AS, to_stored, writing
from cospadi.calibration.collect import chosen_dtype
from cospadi.calibration.walk import Chunk, Tap, Windows, read_windows
from cospadi.errors import NumericalError
from cospadi.formats.factorization import Factorization
from cospadi.problem import GRADIENTS, SEQUENTIAL, Matrix, Metric
from cospadi.provenance import digest_of
from cospadi.quantization import round_factors
from cospadi.refinement import Block, refine

if TYPE_CHECKING:
    import torch

# Ridge on the Gram of what enters a matrix in the compressed model, as a share of its mean diagonal
DAMPING = 0.01


class Streams:
    """Hidden states of the calibration windows, of the model as it is and of what is made of it, layer by layer.

    Parameters
    ----------
    model_folder : path-like
        The model as it is.
    structure : mapping
    windows : path-like
    layers : sequence of int
        Of the unit: consecutive.
    variant : mapping
        Complete settings.
    hidden_in : path-like or None
        What `write` left of the unit before; None for the first.
    dtype, batch_tokens, device
        As of `calibration.collect.collect`.
    log : callable
    """

    def __init__(
        self,
        model_folder: str | Path,
        structure: Mapping[str, Any],
        windows: str | Path,
        layers: Sequence[int],
        variant: Mapping[str, Any],
        *,
        hidden_in: str | Path | None,
        dtype: str,
        batch_tokens: int,
        device: str = "cpu",
        log: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._structure, self._variant = Path(model_folder), structure, variant
        self._windows: Windows = read_windows(windows, structure["vocab_size"])
        self._dtype, reason = chosen_dtype(dtype, device, hidden_in, layers[0] - 1)
        self._batch_tokens, self._device, self._log = batch_tokens, device, log
        self._dense: torch.Tensor | None = None
        self._compressed: torch.Tensor | None = None
        self._block: Block | None = None
        self._last = layers[0] - 1
        log(f"computing in {self._dtype}: {reason}")
        if hidden_in is not None:
            belongs, shape = self._belongs(), (*self._windows.input_ids.shape, structure["hidden_size"])
            for edge in (HIDDEN, COMPRESSED):
                edge.check(hidden_in, shape, self._dtype, self._last, belongs)
            everything = slice(0, len(self._windows.input_ids))
            self._dense = HIDDEN.read(hidden_in, self._last, everything, self._dtype)
            self._compressed = COMPRESSED.read(hidden_in, self._last, everything, self._dtype)

    def targets(self, layer: int, matrices: Sequence[Matrix]) -> list[Matrix]:
        """The matrices of the next layer as they are to be learned.

        With `target: sequential` their weight is ``W + share (G^ + ridge)^-1 (C - G^) W``, where ``G^ = X^^T X^`` and
        ``C = X^^T X`` of what enters them in the model compressed so far, X^, and in the model as it is, X. Share 1 is
        the least squares of ``X W`` on X^. G^ is the metric, unless gradients make one; then every token's inputs count
        over their norm.
        """
        chunk = Chunk(self._folder, range(layer, layer + 1), dtype=self._dtype, device=self._device)
        self._block = Block(chunk, self._structure["layers"][layer]["prefix"], self._windows, self._batch_tokens)
        if self._variant["target"] != SEQUENTIAL or self._compressed is None:
            self._next = self._block.through(self._dense)
            return list(matrices)
        moments = self._moments(layer)
        found = []
        for matrix in matrices:
            gram, change, metric = moments[matrix.site]
            found.append(
                replace(
                    matrix,
                    read=_repaying(matrix, gram, change, self._variant["drift_share"]),
                    metric=matrix.metric if matrix.outputs is not None else metric,
                )
            )
        return found

    def compressed(
        self, layer: int, learned: Mapping[str, Factorization]
    ) -> tuple[dict[str, Factorization], dict[str, Any]]:
        """Go on through the layer as the checkpoint will have it, refined where the variant asks for it.

        Parameters
        ----------
        layer : int
            That `targets` was asked for last.
        learned : mapping
            Name of a matrix to its factors; those that are not there stay as they are.

        Returns
        -------
        factors : dict
        report : dict
            For the diagnostics; empty where nothing is refined.
        """

        def rounded(name: str, factors: Factorization) -> np.ndarray:
            (held,) = round_factors([], [factors], self._variant["codes"])
            return held.quantized().reconstruct()

        factors, report = dict(learned), {}
        if self._variant["refine"] is not None and factors:
            refined = refine(
                self._block,
                factors,
                self._compressed,
                self._next,
                rounded,
                **self._variant["refine"],
                seed=self._windows.seed % 2**63 + layer,
                log=lambda line: self._log(f"layer {layer}: {line}"),
            )
            factors, report = refined.factors, refined.report
        else:
            for name, one in factors.items():
                self._block.set_weight(name, rounded(name, one))
        self._compressed, self._dense = self._block.through(self._compressed), self._next
        if not all_finite(self._compressed):
            raise NumericalError(f"layer {layer}: what the compressed block gives is NaN or infinite")
        self._block, self._last = None, layer
        return factors, report

    def write(self, path: str | Path) -> None:
        """Leave the hidden states behind the last layer to the next unit."""
        attributes = {**self._belongs(), "dtype": self._dtype, "last_layer": self._last}
        with writing(path, attributes) as file:
            for edge, values in ((HIDDEN, self._dense), (COMPRESSED, self._compressed)):
                chunks = (1, *values.shape[1:])
                kept = file.create_dataset(
                    edge.dataset, values.shape, STORED_AS[self._dtype], chunks=chunks, fletcher32=True
                )
                kept[:] = to_stored(values)

    def _belongs(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self._structure["fingerprint"],
            "tokens": self._windows.tokens,
            "settings": digest_of(dict(self._variant)),
        }

    def _moments(self, layer: int) -> dict[str, tuple[np.ndarray, np.ndarray, Metric]]:
        """G^, C - G^ and the metric of G^, of every site of a layer whose own matrices are as they are; its output."""
        import torch

        sites = [site["name"] for site in self._structure["layers"][layer]["sites"]]
        sums: dict[str, list[torch.Tensor]] = {}
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        outputs = []
        # tokens with massive activations rule a plain Gram and have hardly any gradient
        alike = self._variant["metric"] == GRADIENTS

        def keep(site: str) -> Callable[[torch.Tensor, slice], None]:
            def see(rows: torch.Tensor, batch: slice) -> None:
                rows = rows.float()
                size = rows.square().mean(1, keepdim=True).sqrt() if alike else torch.ones_like(rows[:, :1])
                size = size.clamp(min=1e-12)
                seen[site] = rows / size, size

            return see

        def add(site: str) -> Callable[[torch.Tensor, slice], None]:
            def see(rows: torch.Tensor, batch: slice) -> None:
                as_is, size = seen.pop(site)
                rows = rows.float() / size
                if site not in sums:
                    width = rows.shape[1]
                    sums[site] = [torch.zeros(width, width, dtype=torch.float64, device=rows.device) for _ in range(2)]
                sums[site][0] += rows.T @ rows
                sums[site][1] += rows.T @ (as_is - rows)

            return see

        for batch in self._block.batches():
            taps = [Tap(layer, site, "input", keep(site)) for site in sites]
            outputs.append(self._block.run(batch, self._dense, taps=taps).cpu())
            self._block.run(batch, self._compressed, taps=[Tap(layer, site, "input", add(site)) for site in sites])
        self._next = torch.cat(outputs).clone()
        found = {}
        for site, (gram, change) in sums.items():
            gram, change = ((gram + gram.T) / 2).cpu().numpy(), change.cpu().numpy()
            if not (np.isfinite(gram).all() and np.isfinite(change).all()):
                raise NumericalError(f"layer {layer}, {site}: its input is NaN or infinite in the compressed model")
            found[site] = gram, change, Metric.of(gram)
        return found


def _repaying(matrix: Matrix, gram: np.ndarray, change: np.ndarray, share: float) -> Callable[[], np.ndarray]:
    """Reads a matrix as its inputs in the compressed model want it."""

    @functools.cache
    def read() -> np.ndarray:
        import scipy.linalg

        weight = matrix.weight().astype(np.float64)
        ridge = DAMPING * np.diagonal(gram).mean() or 1.0
        factor = scipy.linalg.cho_factor(gram + ridge * np.eye(len(gram)))
        return (weight + share * scipy.linalg.cho_solve(factor, change @ weight)).astype(np.float32)

    return read
