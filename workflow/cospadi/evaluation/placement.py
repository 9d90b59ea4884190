"""Where the weights of an evaluated model are: on one device, or on several GPUs, in memory and on the disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cospadi.sizes import nbytes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of what is free; the rest is for what the layers compute
_SHARE = 0.9


def room(limits: Mapping[str, str | None], device: str) -> dict[int | str, int]:
    """Bytes of weights that every device may hold, as ``max_memory`` of transformers wants them.

    Parameters
    ----------
    limits : mapping
        ``gpu``, of each, and ``cpu``: texts such as ``60GB``; None, or nothing, for nine tenths of what is free.
    device : {"cpu", "cuda"}
        Without ``cuda`` GPUs get nothing.
    """
    import psutil

    found: dict[int | str, int] = {}
    for number in range(torch.cuda.device_count() if device.startswith("cuda") else 0):
        free, _ = torch.cuda.mem_get_info(number)
        found[number] = _least(free, limits.get("gpu"))
    found["cpu"] = _least(psutil.virtual_memory().available, limits.get("cpu"))
    return found


def _least(free: int, limit: str | None) -> int:
    return int(_SHARE * free) if limit is None else min(free, nbytes_of(limit))


def loading_arguments(evaluation: Mapping[str, Any], device: str, offload: Path) -> dict[str, Any]:
    """What ``from_pretrained`` is told of devices; nothing for a model that is whole on one.

    Parameters
    ----------
    evaluation : mapping
        Of the config: ``device_map`` and ``max_memory``.
    device : {"cpu", "cuda"}
    offload : Path
        Folder for weights on the disk that are not as they are in the model's own files.
    """
    if not evaluation.get("device_map"):
        return {}
    limits = evaluation.get("max_memory", {})
    return {"device_map": evaluation["device_map"], "max_memory": room(limits, device), "offload_folder": str(offload)}


def is_spread(model: PreTrainedModel) -> bool:
    """Whether accelerate brings inputs and weights to where they are computed: such a model stays where it is."""
    return hasattr(model, "_hf_hook")


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go, and logits come from; a parameter on the disk has no device of its own."""
    return torch.device(model._hf_hook.execution_device) if is_spread(model) else model.device


def placement(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the weights on each device, by its name (``cuda:0``, ``cpu``, ``disk``); tied ones count once."""
    devices = getattr(model, "hf_device_map", {})
    found: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        module = name
        while module and module not in devices:
            module = module.rpartition(".")[0]
        device = devices.get(module, model.device)
        found[device if device == "disk" else str(torch.device(device))] += weight.nbytes
    return dict(found)
