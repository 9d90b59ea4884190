"""Windows of tokens go through a model, a chunk of consecutive blocks at a time, and chosen tensors are looked at.

A `Chunk` runs one batch: of token ids, or of the hidden states that the chunk before it gave. So memory holds its
blocks and not the model. `collect` drives one chunk a job, with the hidden states between them in files; a `Walk` goes
through all chunks in one job, in the model as it is and in the model as edited.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from cospadi.arrays import all_finite, slices
from cospadi.calibration.activations import FORMAT_VERSION, WINDOWS_REMEDY, reading
from cospadi.errors import ArtifactError, NumericalError
from cospadi.provenance import check_provenance, tokens_digest
from cospadi.stage import choose_device, choose_dtype
from cospadi.structure import PARTS, find_blocks, load_layers, read_structure

if TYPE_CHECKING:
    import torch

GROUP_BYTES = 2**28
# Of those whose logits are in a CPU's memory, tokens whose numbers are in its cache
_TOKENS_IN_CACHE = 8


class Windows(NamedTuple):
    """Token ids (int64) and mask (int64, 0 on pads), both (samples, length), the seed they were drawn with, and the
    digest of both.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    seed: int
    tokens: str

    def step(self, batch_tokens: int) -> int:
        """Windows that go through a model together: at least one."""
        return max(1, batch_tokens // self.input_ids.shape[1])


def read_windows(path: str | Path, vocab_size: int) -> Windows:
    """Read what `windows.prepare_windows` wrote, for a model that knows `vocab_size` tokens.

    Raises
    ------
    ArtifactError
        If the file is damaged, or holds tokens that the model does not know.
    """
    with reading(path, WINDOWS_REMEDY) as file:
        input_ids = file["input_ids"][:].astype(np.int64)
        attention_mask = file["attention_mask"][:].astype(np.int64)
        says, seed = dict(file.attrs), int(file.attrs.get("seed", -1))
    if input_ids.ndim != 2 or input_ids.size == 0 or input_ids.shape != attention_mask.shape:
        problem = f"input_ids {input_ids.shape} and attention_mask {attention_mask.shape} are no (samples, length)"
        raise ArtifactError(path, problem, WINDOWS_REMEDY)
    if not np.isin(attention_mask, (0, 1)).all() or not attention_mask.any(axis=1).all():
        problem = "attention_mask holds values other than 0 and 1, or a window without tokens"
        raise ArtifactError(path, problem, WINDOWS_REMEDY)
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        problem = f"token ids reach from {input_ids.min()} to {input_ids.max()}, the model knows 0 to {vocab_size - 1}"
        raise ArtifactError(path, problem, "Prepare the calibration windows with the tokenizer of this model")
    tokens = tokens_digest(input_ids, attention_mask)
    check_provenance(path, says, {"format_version": FORMAT_VERSION, "tokens": tokens}, WINDOWS_REMEDY)
    return Windows(input_ids, attention_mask, seed, tokens)


def logged(batches: Sequence[slice], windows: Windows, log: Callable[[str], None]) -> Iterator[slice]:
    """The batches, with a line of progress now and then."""
    begun = logged = time.monotonic()
    for batch in batches:
        yield batch
        now = time.monotonic()
        if now - logged > 1 or batch is batches[-1]:
            rate = windows.attention_mask[: batch.stop].sum() / (now - begun)
            eta = (now - begun) / batch.stop * (batches[-1].stop - batch.stop)
            log(f"{batch.stop}/{batches[-1].stop} windows, {rate:.0f} tokens/s, eta {eta:.0f} s")
            logged = now


class Tap(NamedTuple):
    """A place in a forward pass and who looks at it.

    Attributes
    ----------
    block : int
        Number of the block in the model.
    module : str
        Name of a module inside the block; empty for the block itself.
    side : {"input", "output"}
        What enters the module, or what leaves it.
    see : callable
        ``see(rows, batch)``: rows (n_tokens, d), window after window without pads, of the windows ``batch``, a slice.
    """

    block: int
    module: str
    side: Literal["input", "output"]
    see: Callable[[torch.Tensor, slice], None]


class GradientTap(NamedTuple):
    """A linear layer and who looks at what enters it and at the gradient of the loss at what leaves it.

    Attributes
    ----------
    block : int
        Number of the block in the model.
    module : str
        Name of the layer inside the block.
    see : callable
        ``see(rows, gradients, batch)``: (n_tokens, d_in) and (n_tokens, d_out), as a `Tap` sees them.
    """

    block: int
    module: str
    see: Callable[[torch.Tensor, torch.Tensor, slice], None]


class _SeenEnough(Exception):
    """Ends a forward pass that nobody needs the rest of."""


class Chunk:
    """Consecutive blocks of a model in memory.

    Parameters
    ----------
    model_folder : path-like
    layers : range
        Their numbers in the model.
    dtype : {"bfloat16", "float16", "float32"}
    device : str
    """

    def __init__(self, model_folder: str | Path, layers: range, *, dtype: str, device: str) -> None:
        self.layers = layers
        self.device = device
        self._model = load_layers(model_folder, layers.start, layers.stop - 1, dtype=dtype, device=device)
        _, self._blocks = find_blocks(self._model)

    def block(self, number: int) -> torch.nn.Module:
        """The block that has this number in the model."""
        return self._blocks[number - self.layers.start]

    def run(
        self,
        windows: Windows,
        batch: slice | np.ndarray,
        hidden: torch.Tensor | None,
        taps: Iterable[Tap] = (),
        *,
        trained: bool = False,
        seen_is_enough: bool = False,
    ) -> torch.Tensor | None:
        """Send a batch of windows through the chunk.

        Parameters
        ----------
        windows : Windows
        batch : slice
            Of the windows.
        hidden : tensor (n_windows, length, hidden_size) or None
            What the chunk before gave for them; None: the chunk begins with the token ids.
        taps : iterable of Tap
            All in blocks of the chunk.
        trained : bool
            Whether a gradient will go back through it, to parameters that ask for one.
        seen_is_enough : bool
            Whether to stop where all taps have seen something.

        Returns
        -------
        tensor (n_windows, length, hidden_size) or None
            What the last block gives, before any final norm; None where it stopped.
        """
        import torch

        mask = torch.from_numpy(windows.attention_mask[batch]).to(self.device)
        if hidden is None:
            entrance = {"input_ids": torch.from_numpy(windows.input_ids[batch]).to(self.device)}
        else:
            entrance = {"inputs_embeds": hidden.to(self.device)}
        last: list[torch.Tensor] = []
        waiting = list(taps)

        def look(tap: Tap, tensor: torch.Tensor) -> None:
            tap.see(tensor[mask.bool()], batch)
            waiting.remove(tap)
            if seen_is_enough and not waiting:
                raise _SeenEnough

        with contextlib.ExitStack() as hooks, contextlib.suppress(_SeenEnough):
            _hook(hooks, self._blocks[-1], "output", last.append)
            for tap in waiting:
                module = self.block(tap.block).get_submodule(tap.module)
                _hook(hooks, module, tap.side, partial(look, tap))
            with torch.enable_grad() if trained else torch.inference_mode():
                self._model(**entrance, attention_mask=mask, use_cache=False)
        return last[0] if last else None

    def run_back(
        self,
        windows: Windows,
        batch: slice,
        hidden: torch.Tensor | None,
        gradient_at: Callable[[torch.Tensor], torch.Tensor],
        taps: Iterable[GradientTap],
    ) -> torch.Tensor:
        """Send a batch of windows through the chunk, and the gradient of a loss back through it.

        Memory holds the graph of this batch in these blocks.

        Parameters
        ----------
        windows, batch, hidden
            As of `run`.
        gradient_at : callable
            ``gradient_at(last)``: gradient of the loss at what the last block gives, both
            (n_windows, length, hidden_size).
        taps : iterable of GradientTap

        Returns
        -------
        tensor (n_windows, length, hidden_size)
            Gradient at what enters the chunk.
        """
        import torch

        mask = torch.from_numpy(windows.attention_mask[batch]).to(self.device)
        kept = mask.bool()
        last: list[torch.Tensor] = []
        with contextlib.ExitStack() as hooks, torch.enable_grad():
            if hidden is None:  # the gradient needs a beginning
                hidden = self._model.get_input_embeddings()(torch.from_numpy(windows.input_ids[batch]).to(self.device))
            entrance = hidden.to(self.device).detach().requires_grad_()
            _hook(hooks, self._blocks[-1], "output", last.append)
            for tap in taps:

                def watch(module: Any, inputs: Any, output: torch.Tensor, see: Any = tap.see) -> None:
                    rows = inputs[0].detach()
                    output.register_hook(lambda gradient: see(rows[kept], gradient[kept], batch))

                hooks.callback(self.block(tap.block).get_submodule(tap.module).register_forward_hook(watch).remove)
            self._model(inputs_embeds=entrance, attention_mask=mask, use_cache=False)
            gradient = gradient_at(last[0].detach())
            torch.autograd.backward(last[0], gradient.to(last[0].dtype))
        return entrance.grad

    def entering_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head reads of what the model's last block gives, both (n_tokens, hidden_size)."""
        return self._model.norm(hidden)

    def predict(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Logits in float32 (n_tokens, vocabulary) of what the model's last block gives (n_tokens, hidden_size)."""
        logits = (self.entering_head(hidden) @ head.T).float()
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()


def divergence_of_logits(taught: torch.Tensor, logits: torch.Tensor) -> float:
    """Summed Kullback-Leibler divergence of what is predicted from what should be, by the logits of both (n_tokens,
    vocabulary), float32. In place of `taught` comes its gradient at `logits`: what is predicted less what should be.

    A few tokens at a time on a CPU: several passes over numbers that stay in its cache.
    """
    total = 0.0
    few = _TOKENS_IN_CACHE if taught.device.type == "cpu" else len(taught)
    for part in slices(0, len(taught), few):
        log_p, log_q = taught[part].log_softmax(1), logits[part].log_softmax(1)
        p = log_p.exp()
        total += float(p.flatten().dot((log_p - log_q).flatten()))
        taught[part] = log_q.exp_().sub_(p)
    return total


def _hook(
    hooks: contextlib.ExitStack, module: torch.nn.Module, side: str, look: Callable[[torch.Tensor], None]
) -> None:
    """Have `look` called with what enters or leaves a module, until `hooks` is closed."""
    if side == "input":
        handle = module.register_forward_pre_hook(lambda module, inputs: look(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda module, inputs, output: look(output))
    hooks.callback(handle.remove)


class Edit(Protocol):
    """What is done to a model while it is walked."""

    def applied(self, chunk: Chunk) -> contextlib.AbstractContextManager[None]:
        """A block of code in which the chunk is edited."""


# where what the outputs of a matrix are added to is, in the families of `structure.FOLDABLE`: module in the block, side
ADDED_TO = {part.writer: (part.norm, "input") for part in PARTS}
# and where a kind of place is
_MODULES = {"output": ("", "output"), "mlp": ("mlp", "output"), "residual": ADDED_TO["down_proj"]}


class Place(NamedTuple):
    """A tensor inside a forward pass: of which block, and of which model.

    ``output``: the residual stream behind the block, before any final norm (block -1: the embeddings); ``mlp``: M,
    what the block's MLP gives; ``residual``: Y, what M is added to. `pruned`: in the model as the edit leaves it.
    """

    kind: Literal["output", "mlp", "residual"]
    block: int
    pruned: bool = False

    def tap(self, see: Callable[[torch.Tensor, slice], None]) -> Tap:
        """The place for a `Chunk`."""
        if self.block == -1:
            return Tap(0, "", "input", see)
        return Tap(self.block, *_MODULES[self.kind], see)


class Group(NamedTuple):
    """Rows of a group of windows: place to (n_tokens, hidden_size), pads left out; tokens of each window."""

    rows: dict[Place, torch.Tensor]
    lengths: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A walk through a whole model in one job; `groups` walks.

    Memory holds a chunk of blocks and the rows of a group of windows, however many windows there are: groups are as
    large as `GROUP_BYTES` allows. Where the model has several chunks, they are loaded anew for every group.

    Attributes
    ----------
    model_folder : path-like
        The dense model.
    structure : mapping
        From `structure.inspect_model`.
    windows : path-like
        The calibration windows; pads are left out.
    dtype, batch_tokens, device
        As in `collect.collect`, `dtype` without ``auto``.
    dtype_reason : str
        Why this dtype, for the artifacts.
    blocks_per_job : int
        Blocks in memory at a time; 0 is all.
    log : callable
    """

    model_folder: str | Path
    structure: Mapping[str, Any]
    windows: str | Path
    dtype: Literal["bfloat16", "float16", "float32"]
    batch_tokens: int
    blocks_per_job: int
    device: str = "cpu"
    dtype_reason: str = ""
    log: Callable[[str], None] = print

    @classmethod
    def of_job(cls, job: Any, log: Callable[[str], None]) -> Walk:
        """What Snakemake's `job` walks: its inputs model, structure and windows, its params walk and device."""
        device = choose_device(job.params.device)
        dtype, reason = choose_dtype(job.params.walk["dtype"], device)
        log(f"computing in {dtype}: {reason}")
        return cls(
            model_folder=job.input.model,
            structure=read_structure(job.input.structure),
            windows=job.input.windows,
            device=device,
            log=log,
            **{**job.params.walk, "dtype": dtype, "dtype_reason": reason},
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """What every artifact of a walk says of itself: its model, its windows, what it was computed in and why."""
        return {
            "model": self.structure["model"],
            "fingerprint": self.structure["fingerprint"],
            "tokens": self._windows.tokens,
            "dtype": self.dtype,
            "dtype_reason": self.dtype_reason,
        }

    @cached_property
    def _windows(self) -> Windows:
        return read_windows(self.windows, self.structure["vocab_size"])

    def groups(
        self, places: Sequence[Place], *, edit: Edit | None = None, samples: int | None = None
    ) -> Iterator[Group]:
        """Yield what is found at `places`, a group of windows after the other.

        Parameters
        ----------
        places : sequence of Place
        edit : Edit, optional
            Makes the model of places with ``pruned``.
        samples : int, optional
            Read only so many windows, the first.

        Raises
        ------
        NumericalError
            If a value is not finite.
        """
        import torch

        windows = self._windows
        count, length = windows.input_ids[:samples].shape
        stop = max(place.block for place in places) + 1
        size = self.blocks_per_job or stop
        chunks = [range(first, min(first + size, stop)) for first in range(0, stop, size)] or [range(1)]
        models = sorted({place.pruned for place in places})
        step = windows.step(self.batch_tokens)
        state_bytes = length * self.structure["hidden_size"] * getattr(torch, self.dtype).itemsize
        group = max(step, GROUP_BYTES // (state_bytes * (len(places) + len(models))) // step * step)

        chunk = None
        for start in range(0, count, group):
            end = min(start + group, count)
            batches = list(slices(start, end, step))
            rows: dict[Place, list[torch.Tensor]] = {place: [] for place in places}
            taps = {place: place.tap(_keeping(rows[place], place)) for place in places}
            hidden: dict[tuple[bool, int], torch.Tensor] = {}
            for layers in chunks:
                if chunk is None or len(chunks) > 1:
                    chunk = None  # before the next is loaded
                    chunk = Chunk(self.model_folder, layers, dtype=self.dtype, device=self.device)
                for batch in batches:
                    for pruned in models:
                        here = [tap for place, tap in taps.items() if place.pruned == pruned and tap.block in layers]
                        with edit.applied(chunk) if pruned and edit else contextlib.nullcontext():
                            last = chunk.run(windows, batch, hidden.pop((pruned, batch.start), None), here)
                        if layers is not chunks[-1]:
                            hidden[pruned, batch.start] = last
            self.log(f"{end}/{count} windows")
            lengths = windows.attention_mask[start:end].sum(axis=1)
            yield Group({place: torch.cat(parts) for place, parts in rows.items()}, lengths)


def _keeping(kept: list[torch.Tensor], place: Place) -> Callable[[torch.Tensor, slice], None]:
    """Append the rows of a place to a list, unless they are not finite."""

    def keep(rows: torch.Tensor, batch: slice) -> None:
        if not all_finite(rows):
            raise NumericalError(
                f"block {place.block}: {place.kind} holds NaN or infinity on the calibration windows. Compute in "
                "bfloat16 or float32 (calibration.dtype), and check the model's weights"
            )
        kept.append(rows)

    return keep
