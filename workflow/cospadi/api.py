"""The Python interface: factorize one matrix, in a notebook or in another project."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.codecs import CODEC_OF_BITS, GROUP_SIZE, ROUNDINGS, storage_of
from cospadi.errors import ConfigError
from cospadi.factorization import Factorization
from cospadi.learning import check_weight, whitening_of
from cospadi.methods import METHODS


def factorize(
    weight: Any,
    gram: Any | None = None,
    *,
    method: str = "cospadi",
    ratio: float,
    value_bits: int = 16,
    dictionary_bits: int = 16,
    group_size: int | None = GROUP_SIZE,
    rounding: str = "nearest",
    device: str | None = None,
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> Factorization:
    """Factorize a matrix within a byte budget: ``W ~ D S``.

    Parameters
    ----------
    weight : array or tensor (d_in, d_out)
        NumPy or torch, any float dtype; ``nn.Linear.weight.T``, so that ``y = x @ weight``.
    gram : array or tensor (d_in, d_in), optional
        ``X^T X`` of calibration inputs X (n, d_in); None minimises the error of the weight itself.
    method : str
        Key of `cospadi.methods.METHODS`.
    ratio : float
        Fraction of the bfloat16 bytes to remove, in (0, 1).
    value_bits : {16, 14, 8, 4}
        Bits a stored code value takes.
    dictionary_bits : {16, 8, 4}
        Bits a number of the dictionary takes.
    group_size : int or None
        Integers that share a scale, where values or dictionary are integers; None, all of a column or an atom.
    rounding : {"nearest", "truncate"}
        How values are cut to their bits; the paper truncates.
    device : str, optional
        Where to compute: ``"cpu"``, ``"cuda"``; None: where `weight` is.
    log : callable, optional
        Receives a line per iteration.
    **options
        The method's own (``METHODS[method].options``): solver, rho, whiten, eta, max_iter, tol, random_state ...

    Returns
    -------
    Factorization
        Of torch tensors on `device` where `weight` is a tensor, else of NumPy arrays.

    Raises
    ------
    ConfigError
        Listing every unknown or impossible argument.
    NumericalError
        If weight or Gram hold NaN or infinity, or the Gram is zero.
    """
    _check(
        weight, gram, method, ratio, {"value_bits": value_bits, "dictionary_bits": dictionary_bits}, rounding, options
    )
    is_tensor = not isinstance(weight, np.ndarray)
    if device is None:
        device = str(weight.device) if is_tensor else "cpu"
    weight_array = check_weight(np.ascontiguousarray(to_numpy(weight), np.float32), "weight")
    gram_array = None if gram is None else np.ascontiguousarray(to_numpy(gram), np.float64)
    given = {**METHODS[method].defaults(), **options}
    factorization = METHODS[method].factorize(
        weight_array,
        whitening_of(gram_array, given, weight_array.shape[0]),
        ratio=ratio,
        storage=storage_of({"value_bits": value_bits, "dictionary_bits": dictionary_bits, "group_size": group_size}),
        device=device,
        log=log,
        **METHODS[method].own(given),
    )
    factorization = replace(factorization, rounding=rounding)
    if is_tensor:
        import torch

        factorization = replace(
            factorization,
            dictionary=torch.as_tensor(factorization.dictionary, device=weight.device),
            codes=torch.as_tensor(factorization.codes, device=weight.device),
        )
    return factorization


def _check(weight: Any, gram: Any, method: str, ratio: float, bits: dict, rounding: str, options: dict) -> None:
    faults = []
    if method not in METHODS:
        faults.append(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if not 0 < ratio < 1:
        faults.append(f"ratio is {ratio}; allowed: more than 0, less than 1")
    allowed_bits = {"value_bits": tuple(CODEC_OF_BITS), "dictionary_bits": (16, 8, 4)}
    for name, value in bits.items():
        if value not in allowed_bits[name]:
            faults.append(f"{name} is {value}; allowed: {', '.join(map(str, allowed_bits[name]))}")
    if rounding not in ROUNDINGS:
        faults.append(f"rounding is {rounding!r}; allowed: {', '.join(ROUNDINGS)}")
    if weight.ndim != 2:
        faults.append(f"weight has shape {tuple(weight.shape)}; expected (d_in, d_out)")
    elif gram is not None and tuple(gram.shape) != (weight.shape[0], weight.shape[0]):
        faults.append(f"gram has shape {tuple(gram.shape)}; expected {(weight.shape[0], weight.shape[0])}")
    if method in METHODS:
        allowed = METHODS[method].options
        for name in sorted(set(options) - set(allowed)):
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; allowed: {', '.join(allowed)}"
            faults.append(f"{name}: not an option of method {method}{hint}")
        faults += METHODS[method].faults({**METHODS[method].defaults(), **options})
    if faults:
        raise ConfigError(faults, "factorize")
