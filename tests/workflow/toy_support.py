"""One of every four atoms: two bits say which."""

import numpy as np

from .cospadi_supports import Support


class OneOfFour(Support):
    """The place of the stored atom in the q-th four of a column is in bits 2 q and 2 q + 1 of the column's bytes."""

    name, pattern = "1:4", (1, 4)

    def shape(self, k, d_out):
        return (d_out, -(-k // 16))

    def content_faults(self, name, spec, stored, codec):
        used = spec["dictionary"]["n_atoms"] // 2 % 8
        return [f"{name}.support has bits set behind its last atom"] if used and (stored[:, -1] >> used).any() else []

    def pack(self, mask):  # (k, d_out), NumPy
        place = mask.T.reshape(mask.shape[1], -1, 4).argmax(2).astype(np.uint8)
        return np.packbits(np.stack([place & 1, place >> 1], axis=2).reshape(len(place), -1), 1, bitorder="little")

    def unpack(self, stored, k):
        bits = np.unpackbits(stored, 1, k // 2, bitorder="little").reshape(len(stored), k // 4, 2)
        return (bits[:, :, :1] + 2 * bits[:, :, 1:] == np.arange(4)).reshape(len(stored), k).T

    def mask(self, stored, k):  # (d_out, k), torch
        import torch

        steps = torch.arange(4, dtype=torch.uint8, device=stored.device)
        place = (stored.unsqueeze(2) >> 2 * steps & 3).flatten(1)[:, : k // 4]
        return (place.unsqueeze(2) == steps).flatten(1)
