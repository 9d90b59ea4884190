"""Walk a chunk of decoder blocks over the calibration windows and keep what enters every matrix.

The chunk starts from tokens or from the hidden states the chunk before left, so memory holds its blocks and one
batch, never the model. Mode ``store`` writes the rows themselves; mode ``stream`` adds them up to Grams at once and
needs no disk for rows.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import h5py
import numpy as np

from cospadi.arrays import add_product, all_finite, slices, symmetrize
from cospadi.calibration.activations import FORMAT_VERSION, HIDDEN, STORED_AS, Edge, first_heldout, to_stored, writing
from cospadi.calibration.walk import Chunk, Tap, logged, read_windows
from cospadi.errors import ArtifactError, NumericalError
from cospadi.stage import choose_dtype

if TYPE_CHECKING:
    import torch

LOSS_LIMIT = 0.01  # share of batches that may be lost to NaN or infinity

_CHUNK_BYTES = 2**20


def collect(
    model_folder: str | Path,
    structure: Mapping[str, Any],
    windows: str | Path,
    layers: range,
    *,
    hidden_in: str | Path | None,
    rows_out: str | Path,
    hidden_out: str | Path | None,
    mode: Literal["store", "stream"],
    dtype: Literal["auto", "bfloat16", "float16", "float32"],
    batch_tokens: int,
    device: str = "cpu",
    heldout_fraction: float = 0.0,
    log: Callable[[str], None] = print,
) -> None:
    """Collect the inputs of every matrix of consecutive layers.

    Parameters
    ----------
    model_folder : path-like
        A Hugging Face folder.
    structure : mapping
        What `cospadi.structure.inspect_model` found in it.
    windows : path-like
        HDF5 with ``input_ids (samples, length)`` and ``attention_mask (samples, length)``.
    layers : range
        The chunk: consecutive layer numbers, from 0.
    hidden_in : path-like or None
        The `hidden_out` of the chunk before; None when the chunk starts at layer 0.
    rows_out : path-like
        Written: a group ``layer_03/<site>`` for each site, with ``rows (n_tokens, d_in)`` and
        ``window_rows (samples,)``, the number of rows from each window (mode ``store``); or ``gram (d_in, d_in)``
        float64 and, with `heldout_fraction`, ``gram_heldout`` (mode ``stream``). Pad tokens are left out. Attributes:
        ``n_tokens``, ``n_heldout`` (in ``gram_heldout``), ``n_batches``, ``n_skipped`` (batches left out because
        the input of this site was not finite).
    hidden_out : path-like or None
        Written: ``hidden (samples, length, hidden_size)``, what the last block gives, before any final norm.
    mode : {"store", "stream"}
    dtype : {"auto", "bfloat16", "float16", "float32"}
        Dtype of the forward pass and of what is stored; bfloat16 is stored as its bits in uint16. ``auto`` is that of
        `hidden_in`, so that all chunks of a run have one whatever machine they are on; for the first chunk it is what
        `stage.choose_dtype` gives. Written as the attributes ``dtype`` and ``dtype_reason``.
    batch_tokens : int
        Tokens in a forward pass; at least one window is taken.
    device : str
    heldout_fraction : float
        Mode ``stream``: share of the windows, the last ones, whose rows go to ``gram_heldout``. In mode ``store``
        that is decided when the Gram is computed.
    log : callable
        Takes a progress line.

    Raises
    ------
    NumericalError
        If more than 1 % of the batches are lost at a site.
    ArtifactError
        If the windows or hidden states are damaged or do not fit the model, or the disk is too small.
    """
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= structure["n_layers"]:
        raise ValueError(f"{layers} is no range of consecutive layers of a model of {structure['n_layers']} layers")
    if (hidden_in is None) != (layers.start == 0):
        raise ValueError("hidden_in is needed by every chunk but the one that starts at layer 0")
    read = read_windows(windows, structure["vocab_size"])
    belongs = {"format_version": FORMAT_VERSION, "fingerprint": structure["fingerprint"], "tokens": read.tokens}
    samples, length = read.input_ids.shape
    hidden_shape = (samples, length, structure["hidden_size"])
    dtype, reason = chosen_dtype(dtype, device, hidden_in, layers.start - 1)
    log(f"computing in {dtype}: {reason}")
    if hidden_in is not None:
        HIDDEN.check(hidden_in, hidden_shape, dtype, layers.start - 1, belongs)
    heldout_from = first_heldout(samples, heldout_fraction)
    _check_disk(structure, layers, rows_out, hidden_out, mode, dtype, int(read.attention_mask.sum()), hidden_shape)
    attributes = {
        **belongs,
        "model": structure["model"],
        "seed": read.seed,
        "dtype": dtype,
        "dtype_reason": reason,
        "n_windows": samples,
        "mode": mode,
        "heldout_from": heldout_from,
    }

    chunk = Chunk(model_folder, layers, dtype=dtype, device=device)
    batches = list(slices(0, samples, read.step(batch_tokens)))
    with contextlib.ExitStack() as stack:
        rows_file = stack.enter_context(writing(rows_out, attributes))
        sites, taps = [], []
        for index in layers:
            layer = structure["layers"][index]
            for site in layer["sites"]:
                group = rows_file.create_group(f"{layer['name']}/{site['name']}")
                if mode == "store":
                    sink: _Sink = _Rows(group, site["d_in"], dtype, read.attention_mask)
                else:
                    sink = RunningGram(group, site["d_in"], read.attention_mask, heldout_from, device)
                sites.append(_Site(group, sink, len(batches)))
                taps.append(Tap(index, site["name"], "input", sites[-1].see))
        hidden = None
        if hidden_out is not None:
            hidden_file = stack.enter_context(writing(hidden_out, {**attributes, "last_layer": layers.stop - 1}))
            hidden = hidden_file.create_dataset(
                "hidden", hidden_shape, STORED_AS[dtype], chunks=(1, *hidden_shape[1:]), fletcher32=True
            )
        for batch in logged(batches, read, log):
            entrance = None if hidden_in is None else HIDDEN.read(hidden_in, layers.start - 1, batch, dtype)
            last = chunk.run(read, batch, entrance, taps)
            if hidden is not None:
                hidden[batch] = to_stored(last)
        for site in sites:
            site.finish()


class _Sink(Protocol):
    """Where the rows of a site go."""

    def add(self, rows: torch.Tensor, batch: slice) -> None: ...

    def finish(self) -> tuple[int, int]:
        """Write what is left; tokens taken, and those of them held out."""


class _Rows:
    """Rows appended to a dataset, beside the number of rows from each window."""

    def __init__(self, group: h5py.Group, d_in: int, dtype: str, attention_mask: np.ndarray) -> None:
        stored = np.dtype(STORED_AS[dtype])
        capacity = int(attention_mask.sum())
        height = min(capacity, max(1, _CHUNK_BYTES // (d_in * stored.itemsize)))
        self._group = group
        self._lengths = attention_mask.sum(axis=1, dtype=np.int64)
        self._window_rows = np.zeros_like(self._lengths)
        self._filled = 0
        self._rows = group.create_dataset(
            "rows", (capacity, d_in), stored, chunks=(height, d_in), maxshape=(capacity, d_in), fletcher32=True
        )

    def add(self, rows: torch.Tensor, batch: slice) -> None:
        self._rows[self._filled : self._filled + len(rows)] = to_stored(rows)
        self._filled += len(rows)
        self._window_rows[batch] = self._lengths[batch]

    def finish(self) -> tuple[int, int]:
        self._rows.resize(self._filled, axis=0)
        self._group.create_dataset("window_rows", data=self._window_rows, fletcher32=True)
        return self._filled, 0


class RunningGram:
    """Gram of the rows: float32 product a batch, float64 sum, one for each side of the split."""

    def __init__(
        self,
        group: h5py.Group,
        d_in: int,
        attention_mask: np.ndarray,
        heldout_from: int,
        device: str,
        dtype: str = "float64",
    ) -> None:
        import torch

        self._group = group
        self._lengths = attention_mask.sum(axis=1, dtype=np.int64)
        self._heldout_from = heldout_from
        self._dtype = dtype
        names = ["gram", "gram_heldout"] if heldout_from < len(attention_mask) else ["gram"]
        self._grams = {name: torch.zeros(d_in, d_in, dtype=torch.float64, device=device) for name in names}
        self._tokens = dict.fromkeys(("gram", "gram_heldout"), 0)

    def add(self, rows: torch.Tensor, batch: slice) -> None:
        split = int(self._lengths[batch.start : min(batch.stop, self._heldout_from)].sum())
        for name, part in (("gram", rows[:split]), ("gram_heldout", rows[split:])):
            if len(part):
                add_product(self._grams[name], part.float())
                self._tokens[name] += len(part)

    def finish(self) -> tuple[int, int]:
        for name, gram in self._grams.items():
            array = symmetrize(gram.cpu().numpy()).astype(self._dtype, copy=False)
            self._group.create_dataset(name, data=array, chunks=True, fletcher32=True)
        return self._tokens["gram"], self._tokens["gram_heldout"]


class _Site:
    """Takes the input of one site out of a forward pass, unless it is not finite."""

    def __init__(self, group: h5py.Group, sink: _Sink, n_batches: int) -> None:
        self._group = group
        self._sink = sink
        self._n_batches = n_batches
        self._n_skipped = 0

    def see(self, rows: torch.Tensor, batch: slice) -> None:
        if all_finite(rows):
            self._sink.add(rows, batch)
            return
        self._n_skipped += 1
        if self._n_skipped > LOSS_LIMIT * self._n_batches:
            raise NumericalError(
                f"{self._group.name[1:]}: the input was NaN or infinite in {self._n_skipped} of {self._n_batches} "
                f"batches, more than the {LOSS_LIMIT:.0%} that may be lost (last: windows "
                f"{batch.start}-{batch.stop - 1}). Compute in bfloat16 or float32, and check the model's weights"
            )

    def finish(self) -> None:
        n_tokens, n_heldout = self._sink.finish()
        self._group.attrs.update(
            n_tokens=n_tokens, n_heldout=n_heldout, n_batches=self._n_batches, n_skipped=self._n_skipped
        )


def chosen_dtype(
    dtype: str, device: str, hidden_in: str | Path | None, last_layer: int, edge: Edge = HIDDEN
) -> tuple[str, str]:
    """Dtype to compute in and why; ``auto`` goes on in the dtype of the chunk before."""
    chosen, reason = choose_dtype(dtype, device)
    if dtype != "auto" or hidden_in is None:
        return chosen, reason
    before = edge.dtype(hidden_in, last_layer)
    follows = "the chunk before was computed in it"
    return before, follows if before == chosen else f"{follows}; for this machine alone it would be {chosen} ({reason})"


def _check_disk(
    structure: Mapping[str, Any],
    layers: range,
    rows_out: str | Path,
    hidden_out: str | Path | None,
    mode: str,
    dtype: str,
    n_tokens: int,
    hidden_shape: tuple[int, ...],
) -> None:
    """Stop before the work rather than in the middle of it when the disk is too small."""
    size = np.dtype(STORED_AS[dtype]).itemsize
    widths = [site["d_in"] for index in layers for site in structure["layers"][index]["sites"]]
    needed = n_tokens * size * sum(widths) if mode == "store" else 8 * sum(width**2 for width in widths)
    if hidden_out is not None:
        needed += size * int(np.prod(hidden_shape))
    folder = Path(rows_out).parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ArtifactError(
            rows_out,
            f"{needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free",
            "Free space, take fewer blocks a job, fewer calibration windows, or collect in mode stream",
        )
