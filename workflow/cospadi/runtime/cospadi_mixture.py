"""Linear layers that are sums: a mixture of matrix atoms that several layers share, and factors that are added up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cospadi_codecs import decode_dictionary
from .cospadi_cpu import product_dtype
from .cospadi_format import in_one_line, spec_faults
from .cospadi_linear import Packed, PackedLinear
from .cospadi_registry import SUPPORTS

# Rows of x up to which the product with every atom is faster than mixing the weight first (docs/runtime.md)
MIXED_ROWS = 8


def packed_module(spec: dict[str, Any], bias: nn.Parameter | None = None, device: Any = None) -> PackedLinear:
    """The layer that a spec describes.

    Raises
    ------
    ValueError
        If the spec is not valid, or names a codec, support or key that this code does not know.
    """
    if "plus" in spec:
        faults = spec_faults(spec)  # of other specs the layer itself looks
        if faults:
            raise ValueError(in_one_line(faults))
        return SummedLinear(spec, bias, device)
    return (MixtureLinear if _is_mixture(spec) else PackedLinear)(spec, bias, device)


def _is_mixture(spec: dict[str, Any]) -> bool:
    support = SUPPORTS.get(spec["codes"]["support"])
    return support is not None and support.mixes


class SummedLinear(PackedLinear):
    """``y = (x D) S`` plus the outputs of further packed layers, plus bias.

    Parameters are those of `PackedLinear`; the spec has a key ``plus`` with the specs of the other parts.
    """

    def __init__(self, spec: dict[str, Any], bias: nn.Parameter | None = None, device: Any = None) -> None:
        super().__init__({key: value for key, value in spec.items() if key != "plus"}, bias, device)
        # no linear layers of their own: what replaces or adapts every `nn.Linear` of a model takes the sum as one
        self.plus = nn.ModuleList(
            (Mixture if _is_mixture(part) else Packed)(part, device=device) for part in spec["plus"]
        )

    def summands(self) -> list[Packed]:
        """Itself without what is added, and the parts that are."""
        return [self, *self.plus]


class Mixture(Packed):
    """``y = x W + bias``, ``W = sum_m c_m A_m``: matrix atoms side by side in the dictionary.

    The weight is mixed anew at every call and kept by nobody, so memory stays that of the file. A few rows are
    multiplied with every atom instead, which reads as much and writes nothing.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (..., d_in) to outputs (..., d_out), in the dtype of the input."""
        if self.unpacked_weight is not None:
            return F.linear(x, self.unpacked_weight, self.bias)
        rows = x.reshape(-1, self.in_features)
        few = len(rows) <= MIXED_ROWS
        if self.unpacked_codes is not None:
            atoms, coefficients = self.unpacked_dictionary, self.unpacked_codes
        else:
            dtype = product_dtype(x.dtype) if x.is_cpu and not few else x.dtype
            atoms, coefficients = self.factors(dtype)
            rows = rows.to(dtype)
        first, *others = (rows @ atoms if few else atoms).split(self.out_features, dim=1)
        mixed = first * coefficients[0]
        for block, coefficient in zip(others, coefficients[1:], strict=True):
            mixed = torch.addcmul(mixed, block, coefficient)
        y = mixed if few else rows @ mixed
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def dense(self) -> torch.Tensor:
        """The mixed weight in float32, (d_out, d_in)."""
        atoms, coefficients = self.factors(torch.float32)
        return torch.einsum("inj,n->ji", atoms.unflatten(1, (-1, self.out_features)), coefficients)

    def multiplications(self, sharers: int) -> float:
        """Of a row of x, not counting those that mix the weight anew at every call."""
        return self.in_features * self.out_features

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrix atoms side by side (d_in, n d_out), and their coefficients (n,), in `dtype`."""
        return decode_dictionary(self.spec, self.dictionary, self.dictionary_scales, dtype), self.values.to(dtype)


class MixtureLinear(Mixture, PackedLinear):
    """A linear layer of a model that is a mixture."""
