"""Learn layers in turn, each knowing what the compressed ones before it make of the calibration windows.

Two streams of hidden states go through the model, a block after the other: one of the model as it is, one of the model
as compressed so far. Between two jobs they are in a file. With them the weight that a method gets can make up for what
has gone wrong before (`target: sequential`), and a block can be refined (`refinement`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cospadi.arrays import add_product, all_finite, symmetrize
from cospadi.calibration.activations import (
    COMPRESSED,
    FORMAT_VERSION,
    HIDDEN,
    STORED_AS,
    first_heldout,
    to_stored,
    writing,
)
from cospadi.calibration.collect import chosen_dtype
from cospadi.calibration.walk import ADDED_TO, Chunk, Windows, read_windows
from cospadi.errors import NumericalError
from cospadi.formats.factorization import Factorization
from cospadi.problem import SEQUENTIAL, Matrix, Metric
from cospadi.provenance import digest_of
from cospadi.quantization import as_stored
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
    before : path-like or None
        What `write` left of the unit before; None for the first.
    dtype, batch_tokens, device
        As of `calibration.collect.collect`.
    heldout_fraction : float
        Of the windows, the last ones, that nothing is fitted to.
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
        before: str | Path | None,
        dtype: str,
        batch_tokens: int,
        heldout_fraction: float = 0.0,
        device: str = "cpu",
        log: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._structure, self._variant = Path(model_folder), structure, variant
        self._windows: Windows = read_windows(windows, structure["vocab_size"])
        self._counted = first_heldout(len(self._windows.input_ids), heldout_fraction)
        self._dtype, reason = chosen_dtype(dtype, device, before, layers[0] - 1, COMPRESSED)
        self._batch_tokens, self._device, self._log = batch_tokens, device, log
        self._dense: torch.Tensor | None = None
        self._compressed: torch.Tensor | None = None
        self._block: Block | None = None
        self._as_is: Block | None = None
        self._last = layers[0] - 1
        log(f"computing in {self._dtype}: {reason}")
        if before is not None:
            belongs, shape = self._belongs(), (*self._windows.input_ids.shape, structure["hidden_size"])
            for edge in (HIDDEN, COMPRESSED):
                edge.check(before, shape, self._dtype, self._last, belongs)
            everything = slice(0, len(self._windows.input_ids))
            self._dense = HIDDEN.read(before, self._last, everything, self._dtype)
            self._compressed = COMPRESSED.read(before, self._last, everything, self._dtype)

    def targets(self, layer: int, matrices: Sequence[Matrix]) -> list[Matrix]:
        """The matrices of the next layer as they are to be learned, in the order of the model.

        With `target: sequential` weight and metric are of the model as compressed so far: until the first matrix of a
        site is read, with whatever `put` has put before. With X what enters a matrix in the model as it is, X^ in the
        compressed one, and R and R^ what its outputs are added to (o_proj and down_proj), the weight is

            ``W + (G^ + ridge)^-1 (drift_share (X^^T X - G^) W + residual_share X^^T (R - R^))``,  ``G^ = X^^T X``

        Shares of 1 are the least squares of ``R + X W - R^`` on X^. With the metric of gradients every token counts by
        the square root of its weight there: few tokens have most of the weight, too few to fit as many numbers to.
        """
        self._block = self._load(layer)
        if self._variant["target"] != SEQUENTIAL:
            self._next = self._block.through(self._dense)
            return list(matrices)
        self._as_is = self._load(layer)
        self._next = self._as_is.through(self._dense)
        found = []
        for _, own in itertools.groupby(matrices, lambda matrix: matrix.site):
            own = list(own)
            moments = functools.cache(functools.partial(self._moments, own))
            metrics = {
                one: Metric(one.d_in, lambda one=one, moments=moments: moments()[one].gram)
                for one in dict.fromkeys(matrix.metric for matrix in own)
            }
            found += [self._fitted(matrix, moments, metrics[matrix.metric]) for matrix in own]
        return found

    def put(self, name: str, factors: Factorization) -> None:
        """Have matrix `name` of the layer that `targets` was asked for last be what the checkpoint will have."""
        self._block.set_weight(name, self._rounded(factors))

    def compressed(
        self, layer: int, learned: Mapping[str, Factorization]
    ) -> tuple[dict[str, Factorization], dict[str, dict[str, Any]]]:
        """Go on through the layer as the checkpoint will have it, refined where the variant asks for it.

        Parameters
        ----------
        layer : int
            That `targets` was asked for last.
        learned : mapping
            Name of a matrix to its factors, which were `put`; those that are not there stay as they are.

        Returns
        -------
        factors : dict
        reports : dict
            ``refined``, for the diagnostics; empty where nothing is.
        """
        factors, reports = dict(learned), {}
        if self._variant["refine"] is not None and factors:
            options = self._variant["refine"]
            refined = refine(
                self._block,
                factors,
                self._compressed,
                self._next,
                self._rounded,
                **{**options, "samples": min(options["samples"] or self._counted, self._counted)},
                seed=self._windows.seed % 2**63 + layer,
                log=lambda line: self._log(f"layer {layer}: {line}"),
            )
            factors, reports = refined.factors, {"refined": refined.report}
        self._compressed, self._dense = self._block.through(self._compressed), self._next
        if not all_finite(self._compressed):
            raise NumericalError(f"layer {layer}: what the compressed block gives is NaN or infinite")
        self._block, self._as_is, self._last = None, None, layer
        return factors, reports

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

    def _load(self, layer: int) -> Block:
        chunk = Chunk(self._folder, range(layer, layer + 1), dtype=self._dtype, device=self._device)
        return Block(chunk, self._structure["layers"][layer]["prefix"], self._windows, self._batch_tokens)

    def _rounded(self, factors: Factorization) -> np.ndarray:
        return as_stored(factors, self._variant["codes"])

    def _fitted(self, matrix: Matrix, moments: Callable[[], Mapping[Metric, _Moments]], metric: Metric) -> Matrix:
        """A matrix as its inputs in the compressed model want it."""
        drift, residual = self._variant["drift_share"], self._variant["residual_share"]

        @functools.cache
        def read() -> np.ndarray:
            import scipy.linalg

            weight, one = matrix.weight().astype(np.float64), moments()[matrix.metric]
            missing = drift * one.change @ weight
            if one.owed is not None:
                missing += residual * one.owed
            ridge = DAMPING * np.diagonal(one.inputs).mean() or 1.0
            factor = scipy.linalg.cho_factor(one.inputs + ridge * np.eye(len(one.inputs)))
            found = weight + scipy.linalg.cho_solve(factor, missing)
            return np.ascontiguousarray(found, np.float32)  # LAPACK gives columns

        return replace(matrix, read=read, metric=metric)

    def _moments(self, matrices: Sequence[Matrix]) -> dict[Metric, _Moments]:
        """Second moments of what enters matrices of one site, for each of their metrics."""
        site = (matrices[0].site, "input")
        added_to = ADDED_TO.get(matrices[0].projection) if self._variant["residual_share"] > 0 else None
        sums = {matrix.metric: _Moments(matrix.metric.tokens()) for matrix in matrices}
        lengths = self._windows.attention_mask.sum(axis=1)
        for batch in self._block.batches(self._counted):
            as_is, own = (
                block.rows(batch, hidden, [site] if added_to is None else [added_to, site])
                for block, hidden in ((self._as_is, self._dense), (self._block, self._compressed))
            )
            owed = None if added_to is None else as_is[added_to] - own[added_to]
            tokens = slice(int(lengths[: batch.start].sum()), int(lengths[: batch.stop].sum()))
            for one in sums.values():
                one.add(own[site], as_is[site], owed, tokens)
        for one in sums.values():
            if not one.finish():
                raise NumericalError(f"{matrices[0].name}: its input is NaN or infinite in the compressed model")
        return sums


class _Moments:
    """Sums over the tokens of what enters a matrix in the compressed model, X^: with itself, each token with its weight
    (None: 1), `gram`; with the square root of that, with itself (`inputs`), with what it lacks of what enters in the
    model as it is (`change`), and with what the stream that the outputs are added to lacks (`owed`, None where it does
    not matter).
    """

    def __init__(self, weights: np.ndarray | None) -> None:
        self._weights = weights
        self._sums: dict[str, torch.Tensor] = {}
        self.gram: np.ndarray | None = None
        self.inputs: np.ndarray | None = None
        self.change: np.ndarray | None = None
        self.owed: np.ndarray | None = None

    def add(self, own: torch.Tensor, as_is: torch.Tensor, owed: torch.Tensor | None, tokens: slice) -> None:
        import torch

        own = fitted = own.float()
        if self._weights is not None:
            weights = torch.from_numpy(self._weights[tokens]).to(own)[:, None]
            fitted = own * weights.sqrt()
            self._add("gram", own * weights, own)
        self._add("inputs", fitted, own)
        self._add("change", fitted, as_is.float() - own)
        if owed is not None:
            self._add("owed", fitted, owed.float())

    def _add(self, name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        import torch

        if name not in self._sums:
            self._sums[name] = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float64)
        add_product(self._sums[name], left, right)

    def finish(self) -> bool:
        """Whether all of it is finite."""
        for name, total in self._sums.items():
            setattr(self, name, total.cpu().numpy())
        self._sums.clear()
        self.inputs = symmetrize(self.inputs)
        self.gram = self.inputs if self.gram is None else symmetrize(self.gram)
        return all(
            np.isfinite(part).all() for part in (self.gram, self.inputs, self.change, self.owed) if part is not None
        )
