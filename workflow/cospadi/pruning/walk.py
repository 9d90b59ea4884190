"""Walk the calibration windows through a model, as it is and as pruned so far, and look at chosen places.

Memory holds a chunk of blocks and the rows of a group of windows, however many windows there are: groups are as
large as `GROUP_BYTES` allows. Where the model has several chunks, they are loaded anew for every group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cospadi.calibration.collect import read_windows
from cospadi.errors import NumericalError
from cospadi.stage import choose_device, choose_dtype
from cospadi.structure import find_blocks, load_layers, read_structure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GROUP_BYTES = 2**28


class Place(NamedTuple):
    """A tensor inside a forward pass: of which block, and of which model.

    ``output``: the residual stream behind the block, before any final norm (block -1: the embeddings); ``mlp``: M,
    what the block's MLP gives; ``residual``: Y, what M is added to. `pruned`: in the model as the edit leaves it.
    """

    kind: Literal["output", "mlp", "residual"]
    block: int
    pruned: bool = False


@dataclass(frozen=True)
class Edit:
    """What has been done to a model: blocks removed, and transforms (d, d) folded into the MLP of others."""

    removed: frozenset[int] = frozenset()
    transforms: Mapping[int, np.ndarray] = field(default_factory=dict)


class Group(NamedTuple):
    """Rows of a group of windows: place to (n_tokens, hidden_size), pads left out; tokens of each window."""

    rows: dict[Place, torch.Tensor]
    lengths: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What is walked, and how; `groups` walks.

    Attributes
    ----------
    model_folder : path-like
        The dense model.
    structure : mapping
        From `structure.inspect_model`.
    windows : path-like
        The calibration windows; pads are left out.
    dtype, batch_tokens, device
        As in `calibration.collect.collect`, `dtype` without ``auto``.
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
    def arithmetic(self) -> dict[str, str]:
        """What every artifact of a walk says about the numbers in it."""
        return {"dtype": self.dtype, "dtype_reason": self.dtype_reason}

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

        input_ids, attention_mask, _ = read_windows(self.windows, self.structure["vocab_size"])
        input_ids, attention_mask = input_ids[:samples], attention_mask[:samples]
        samples, length = input_ids.shape
        stop = max(place.block for place in places) + 1
        size = self.blocks_per_job or stop
        chunks = [range(first, min(first + size, stop)) for first in range(0, stop, size)] or [range(1)]
        models = sorted({place.pruned for place in places})
        step = max(1, self.batch_tokens // length)
        state_bytes = length * self.structure["hidden_size"] * getattr(torch, self.dtype).itemsize
        group = max(step, GROUP_BYTES // (state_bytes * (len(places) + len(models))) // step * step)

        model = None
        for start in range(0, samples, group):
            end = min(start + group, samples)
            batches = [slice(first, min(first + step, end)) for first in range(start, end, step)]
            rows: dict[Place, list[torch.Tensor]] = {place: [] for place in places}
            hidden: dict[tuple[bool, int], torch.Tensor] = {}
            for chunk in chunks:
                if model is None or len(chunks) > 1:
                    model = None  # before the next is loaded
                    model = load_layers(
                        self.model_folder, chunk.start, chunk.stop - 1, dtype=self.dtype, device=self.device
                    )
                for batch in batches:
                    mask = torch.from_numpy(attention_mask[batch]).to(self.device)
                    for pruned in models:
                        if chunk.start == 0:
                            entrance = {"input_ids": torch.from_numpy(input_ids[batch]).to(self.device)}
                        else:
                            entrance = {"inputs_embeds": hidden.pop((pruned, batch.start))}
                        with _edited(model, chunk, edit if pruned else None):
                            found, last = _forward(
                                model,
                                chunk,
                                {**entrance, "attention_mask": mask},
                                [p for p in places if p.pruned == pruned],
                            )
                        if chunk is not chunks[-1]:
                            hidden[pruned, batch.start] = last
                        for place, tensor in found.items():
                            rows[place].append(_finite(tensor[mask.bool()], place))
            self.log(f"{end}/{samples} windows")
            lengths = attention_mask[start:end].sum(axis=1)
            yield Group({place: torch.cat(parts) for place, parts in rows.items()}, lengths)


def transformed(weight: torch.Tensor, transform: np.ndarray) -> torch.Tensor:
    """``T^T W_down`` in float64, rounded once to the dtype of `weight` (hidden_size, d_in); also for a bias."""
    import torch

    exact = torch.from_numpy(np.asarray(transform, np.float64)).to(weight.device).T @ weight.double()
    return exact.to(weight.dtype)


@contextlib.contextmanager
def _edited(model: PreTrainedModel, chunk: range, edit: Edit | None) -> Iterator[None]:
    """The chunk as `edit` leaves it: removed blocks pass on what they get, transforms are in the MLPs."""
    if edit is None:
        yield
        return
    _, blocks = find_blocks(model)
    removed = [blocks[index - chunk.start] for index in edit.removed if index in chunk]
    kept = []
    for index, transform in edit.transforms.items():
        if index in chunk:
            down = blocks[index - chunk.start].mlp.down_proj
            for parameter in (down.weight, down.bias):
                if parameter is not None:
                    kept.append((parameter, parameter.data))
                    parameter.data = transformed(parameter.data, transform)
    for block in removed:
        block.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for block in removed:
            del block.forward
        for parameter, data in kept:
            parameter.data = data


def _forward(
    model: PreTrainedModel, chunk: range, entrance: Mapping[str, torch.Tensor], places: Sequence[Place]
) -> tuple[dict[Place, torch.Tensor], torch.Tensor]:
    """What is at those of `places` that lie in the chunk, and what its last block gives."""
    import torch

    _, blocks = find_blocks(model)
    found: dict[Any, torch.Tensor] = {}

    def output_to(key: Any) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            found[key] = output

        return hook

    def input_to(key: Any) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple) -> None:
            found[key] = inputs[0]

        return hook

    handles = [blocks[-1].register_forward_hook(output_to("last"))]
    for place in places:
        if place.block == -1 and chunk.start == 0:
            handles.append(blocks[0].register_forward_pre_hook(input_to(place)))
        elif place.block in chunk:
            block = blocks[place.block - chunk.start]
            if place.kind == "output":
                handles.append(block.register_forward_hook(output_to(place)))
            elif place.kind == "mlp":
                handles.append(block.mlp.register_forward_hook(output_to(place)))
            else:
                handles.append(block.post_attention_layernorm.register_forward_pre_hook(input_to(place)))
    try:
        with torch.inference_mode():
            model(**entrance, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    last = found.pop("last")
    return found, last


def _finite(rows: torch.Tensor, place: Place) -> torch.Tensor:
    if not rows.isfinite().all():
        raise NumericalError(
            f"block {place.block}: {place.kind} holds NaN or infinity on the calibration windows. Compute in bfloat16 "
            "or float32 (calibration.dtype), and check the model's weights"
        )
    return rows
