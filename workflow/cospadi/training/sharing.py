"""Attention weights that layers share: ``W_l = sum_s c_ls A_s`` (MASA, arXiv 2508.04581), and low-rank attention.

All layers of a model draw the weight of one kind of projection, say every ``q_proj``, from one pool of S matrix atoms.
Sharing whole matrices between layers is the same with coefficients that are fixed: one 1 in every row, the rest 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cospadi.structure import PARTS

QKV = PARTS[0].readers
QKVO = (*QKV, PARTS[0].writer)
COEFFICIENTS = ("mlp", "free", "sequential", "cyclic")


class MlpCoefficients(nn.Module):
    """Coefficients from a trained embedding of each layer, through an MLP that all layers share.

    Three linear layers with GELU between them, as in the paper; neither is needed once the model is trained
    (`sharing.keep_coefficients`).

    Parameters
    ----------
    n_layers, n_atoms : int
    width : int
        Size of the embeddings and of the MLP's hidden layers.
    """

    trained_only = True

    def __init__(self, n_layers: int, n_atoms: int, width: int = 32) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(n_layers, width))
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_atoms)
        )
        with torch.no_grad():
            for linear in self.mlp[::2]:
                nn.init.normal_(linear.weight, std=(2 / width) ** 0.5)
                nn.init.zeros_(linear.bias)
            # W_l starts with the variance of its atoms if the squares of its coefficients add up to one
            self.mlp[-1].weight /= self().square().sum(1).mean().sqrt()

    def forward(self, layer: int | None = None) -> torch.Tensor:
        """Coefficients of one layer (n_atoms,), or of all (n_layers, n_atoms)."""
        return self.mlp(self.embeddings if layer is None else self.embeddings[layer])


class FreeCoefficients(nn.Module):
    """Coefficients that are parameters themselves (n_layers, n_atoms), rows of norm 1 to begin with."""

    trained_only = False

    def __init__(self, n_layers: int, n_atoms: int) -> None:
        super().__init__()
        self.values = nn.Parameter(F.normalize(torch.randn(n_layers, n_atoms), dim=1))

    def forward(self, layer: int | None = None) -> torch.Tensor:
        """Coefficients of one layer (n_atoms,), or of all (n_layers, n_atoms)."""
        return self.values if layer is None else self.values[layer]


class FixedCoefficients(nn.Module):
    """One atom a layer: ``sequential``, consecutive layers share one; ``cyclic``, layer l has atom l mod S."""

    trained_only = False

    def __init__(self, n_layers: int, n_atoms: int, order: str) -> None:
        super().__init__()
        layers = torch.arange(n_layers)
        chosen = layers * n_atoms // n_layers if order == "sequential" else layers % n_atoms
        self.register_buffer("values", F.one_hot(chosen, n_atoms).to(torch.get_default_dtype()))

    def forward(self, layer: int | None = None) -> torch.Tensor:
        """Coefficients of one layer (n_atoms,), or of all (n_layers, n_atoms)."""
        return self.values if layer is None else self.values[layer]


class AtomPool(nn.Module):
    """The atoms of one kind of projection, and every layer's coefficients.

    Parameters
    ----------
    weights : Tensor (n_layers, d_out, d_in)
        What the layers have now, as ``nn.Linear.weight``. In a new model they are random, so the weights of S layers
        are S random atoms of the right scale.
    n_atoms : int
        S.
    coefficients : {"mlp", "free", "sequential", "cyclic"}
    """

    def __init__(self, weights: torch.Tensor, n_atoms: int, coefficients: str) -> None:
        super().__init__()
        n_layers = len(weights)
        every = torch.arange(n_atoms) * n_layers // n_atoms
        self.atoms = nn.Parameter(weights.detach()[every].clone())
        if coefficients == "mlp":
            self.coefficients = MlpCoefficients(n_layers, n_atoms)
        elif coefficients == "free":
            self.coefficients = FreeCoefficients(n_layers, n_atoms)
        else:
            self.coefficients = FixedCoefficients(n_layers, n_atoms, coefficients)
        self.coefficients.to(weights.device, weights.dtype)

    def weight(self, layer: int) -> torch.Tensor:
        """``W_l = sum_s c_ls A_s`` (d_out, d_in)."""
        return torch.tensordot(self.coefficients(layer), self.atoms, dims=1)

    @torch.no_grad()
    def fit(self, weights: torch.Tensor) -> None:
        """Set the atoms to those that come closest to `weights` (n_layers, d_out, d_in); coefficients stay as they are.

        ``A = C^+ W``, computed in float64: exact where S is the number of layers and C has full rank; the mean of the
        layers that share an atom where coefficients are fixed.
        """
        inverse = torch.linalg.pinv(self.coefficients().double())  # (n_atoms, n_layers)
        self.atoms.copy_(torch.tensordot(inverse, weights.double(), dims=1))

    def n_kept(self) -> int:
        """Numbers that inference needs: atoms, and coefficients where they are more than a choice of atom."""
        chosen = isinstance(self.coefficients, FixedCoefficients)
        return self.atoms.numel() + (0 if chosen else self.coefficients().numel())


class SharedLinear(nn.Module):
    """A linear layer whose weight comes from a pool; only the bias, if there is one, is its own."""

    def __init__(self, pool: AtomPool, layer: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        # in a tuple, so that the pool is no submodule here: the model owns it once
        self._pool = (pool,)
        self.layer = layer
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """(d_out, d_in), as of ``nn.Linear``."""
        return self._pool[0].weight(self.layer)

    def n_kept(self) -> int:
        """Nothing but the bias: the pool counts itself."""
        return 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class LowRankLinear(nn.Module):
    """A linear layer of rank r, ``W = B A``, from the truncated singular value decomposition of a weight.

    Parameters
    ----------
    weight : Tensor (d_out, d_in)
    rank : int
    bias : Parameter, optional
    """

    def __init__(self, weight: torch.Tensor, rank: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        d_out, d_in = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, d_in))
        self.up = nn.Parameter(weight.new_empty(d_out, rank))
        self.bias = bias
        if weight.device.type != "meta":
            u, s, vt = torch.linalg.svd(weight.detach().float(), full_matrices=False)
            root = s[:rank].sqrt()
            with torch.no_grad():
                self.down.copy_(root[:, None] * vt[:rank])
                self.up.copy_(u[:, :rank] * root)

    @property
    def weight(self) -> torch.Tensor:
        """(d_out, d_in), as of ``nn.Linear``."""
        return self.up @ self.down

    def n_kept(self) -> int:
        """Numbers of both factors."""
        return self.down.numel() + self.up.numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.down), self.up, self.bias)


def rebuild(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Put pools or low-rank layers into `model` in place of the projections that `spec` names.

    `spec` is ``{"atoms": {projection: S}, "coefficients": kind}`` or ``{"rank": {projection: r}}``. The pools become
    ``model.pools``.
    """
    if "rank" in spec:
        for projection, rank in spec["rank"].items():
            for name, linear in find_projections(model, projection).items():
                model.set_submodule(name, LowRankLinear(linear.weight, rank, linear.bias))
        return
    model.pools = nn.ModuleDict()
    for projection, n_atoms in spec["atoms"].items():
        linears = find_projections(model, projection)
        pool = AtomPool(stacked(linears), n_atoms, spec["coefficients"])
        model.pools[projection.replace(".", "_")] = pool
        for layer, (name, linear) in enumerate(linears.items()):
            model.set_submodule(name, SharedLinear(pool, layer, linear.bias))


def find_projections(model: nn.Module, projection: str) -> dict[str, nn.Linear]:
    """Linear layers called `projection` by their full name, first layer first."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(f".{projection}")
    }


def stacked(linears: Mapping[str, nn.Linear]) -> torch.Tensor:
    """Their weights (n_layers, d_out, d_in)."""
    return torch.stack([linear.weight.detach() for linear in linears.values()])
