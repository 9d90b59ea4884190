"""MASA: attention weights shared by all layers, for models trained from scratch (arXiv 2508.04581).

>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from cospadi import masa
>>> model = masa.share_attention(LlamaForCausalLM(LlamaConfig(...)), atoms=dict.fromkeys(masa.QKVO, 4))
>>> ...  # train it
>>> masa.materialise(model).save_pretrained("folder")  # an ordinary Llama
"""

from cospadi.masa.models import (
    ORDINARY,
    attention_parameters,
    keep_coefficients,
    low_rank_attention,
    materialise,
    share_attention,
    write_ordinary,
)
from cospadi.masa.sharing import COEFFICIENTS, QKV, QKVO

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
