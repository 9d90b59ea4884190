"""Models trained from scratch with attention weights that all layers share (MASA, arXiv 2508.04581), and the rivals.

>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from cospadi import training
>>> model = training.share_attention(LlamaForCausalLM(LlamaConfig(...)), atoms=dict.fromkeys(training.QKVO, 4))
>>> ...  # train it
>>> training.materialise(model).save_pretrained("folder")  # an ordinary Llama
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from cospadi.training.models import (
        ORDINARY,
        attention_parameters,
        keep_coefficients,
        low_rank_attention,
        materialise,
        share_attention,
        write_ordinary,
    )
    from cospadi.training.sharing import COEFFICIENTS, QKV, QKVO

__all__ = [
    "COEFFICIENTS",
    "ORDINARY",
    "QKV",
    "QKVO",
    "attention_parameters",
    "keep_coefficients",
    "low_rank_attention",
    "materialise",
    "share_attention",
    "write_ordinary",
]


def __getattr__(name: str) -> Any:
    # on first use: the plan reads this room's light modules, and has no use for torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cospadi.training import models, sharing

    return getattr(models if hasattr(models, name) else sharing, name)


@wrapt.when_imported("transformers")
def _register_classes(transformers: Any) -> None:
    """Let ``from_pretrained`` know the classes of shared models."""
    from cospadi.training import models  # noqa: F401
