"""The embedding of a packed checkpoint, and a head that is tied to it: integers under the scales of blocks, or a stream
that is decoded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .cospadi_codecs import decode_numbers, of_blocks
from .cospadi_format import EMBEDDING, block_of
from .cospadi_linear import Packed, PackedLinear

# What embedding and tied head have both: tensors of the file, and what a stream is decoded to
TIED = ("values", "scales")
DECODED = ("unpacked_codes", "in_steps")


class PackedEmbedding(Packed, nn.Embedding):
    """Rows of a packed matrix by their numbers: the matrix (hidden_size, vocabulary) has a column for each token.

    Parameters
    ----------
    spec : dict
        One entry of ``quantization_config.matrices`` that `cospadi_format.embedding_faults` finds nothing against.
    embedding : Embedding
        That it takes the place of; of a family that multiplies its rows by a number, that number is kept.
    """

    def __init__(self, spec: dict[str, Any], embedding: nn.Embedding) -> None:
        super().__init__(spec, device=embedding.weight.device)
        self.embedding_dim, self.num_embeddings = spec["shape"]
        self.padding_idx = embedding.padding_idx
        self._times = getattr(embedding, "scalar_embed_scale", None)
        # casting the model leaves what is packed as it is: this says what it computes in. No number is read
        self.register_buffer("computed", torch.empty(0, device=embedding.weight.device), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (...) to rows (..., hidden_size), in the dtype that the model computes in."""
        found = self._rows(ids.flatten()).to(self.computed.dtype).view(*ids.shape, self.embedding_dim)
        return found if self._times is None else found * torch.tensor(self._times).to(found.dtype)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows (n, hidden_size) of tokens (n,); not by `[ids]`, which takes -1 for the last token."""
        if self.in_steps is not None:
            return self.in_steps.columns(ids)
        if self.is_stream:  # on the disk it is decoded anew each time
            table = self.factors(torch.float32)[1] if self.unpacked_codes is None else self.unpacked_codes
            return table.index_select(0, ids)
        d = self.embedding_dim
        stored, scales = (part.view(self.num_embeddings, -1).index_select(0, ids) for part in self._packed())
        numbers = decode_numbers(self.spec["codes"]["codec"], stored.flatten(), (len(ids), d))
        return numbers.float() * of_blocks(scales, len(ids), block_of(self.spec["codes"], d), d)


def tied_head(embedding: PackedEmbedding) -> PackedLinear:
    """A head that reads the embedding's own tensors, and says so to who saves."""
    head = PackedLinear(embedding.spec, device=embedding.values.device)
    head._is_hf_initialized = True  # nothing to draw at random, which transformers 5.0 would try
    head._tied_weights_keys = {}
    for part in TIED:
        if getattr(embedding, part) is not None:
            setattr(head, part, getattr(embedding, part))
            head._tied_weights_keys[part] = f"{EMBEDDING}.{part}"
    return head
