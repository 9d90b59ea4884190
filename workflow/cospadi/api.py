"""The Python interface: factorize one matrix, in a notebook or in another project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.budget import nbytes_left, ratio_of
from cospadi.errors import ConfigError, NumericalError
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import BLOCK_SIZE, CODEC_OF_BITS, DICTIONARY_BITS, ROUNDINGS, bits_faults, storage_of
from cospadi.methods import METHODS
from cospadi.methods.base import Fit
from cospadi.problem import Matrix, Metric, Problem, Target, check_finite
from cospadi.quantization import round_factors


def factorize(
    weight: Any,
    gram: Any | None = None,
    *,
    method: str = "cospadi",
    ratio: float | None = None,
    bits: float | None = None,
    value_bits: int = 16,
    dictionary_bits: int = 16,
    block_size: int | None = BLOCK_SIZE,
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
    bits : float
        In its place: bits a weight, all that is stored counted; between 0 and 16.
    value_bits : {16, 14, 8, 6, 4, 3, 2}
        Bits a stored code value takes; at most, of the methods that choose them.
    dictionary_bits : {16, 8, 6, 4, 3, 2}
        Bits a number of the dictionary takes.
    block_size : int or None
        Integers that share a scale, where values or dictionary are integers; None, all of a column or an atom.
    rounding : {"nearest", "truncate", "optimal"}
        How values are cut to their bits; the paper truncates. Optimal: factors are rounded together for the least
        error, which 3 and 2 bits need.
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
        If weight or Gram hold NaN or infinity, or are zero throughout.
    """
    if (ratio is None) == (bits is None):
        raise ConfigError([f"ratio is {ratio} and bits are {bits}; expected one of them"], "factorize")
    ratio = ratio_of(bits) if ratio is None else ratio
    codes = {"value_bits": value_bits, "dictionary_bits": dictionary_bits, "block_size": block_size}
    _check(weight, gram, method, ratio, codes, rounding, options)
    is_tensor = not isinstance(weight, np.ndarray)
    if device is None:
        device = str(weight.device) if is_tensor else "cpu"
    weight_array = check_finite(np.ascontiguousarray(to_numpy(weight), np.float32), "weight")
    if not weight_array.any():
        raise NumericalError("weight is zero throughout; there is nothing to factorize")
    shape = weight_array.shape
    metric = Metric.identity(shape[0]) if gram is None else Metric.of(np.ascontiguousarray(to_numpy(gram), np.float64))
    matrix = Matrix("weight", 0, "gram", shape, metric, lambda: weight_array)
    complete = METHODS[method].complete(options)
    (factorization,) = METHODS[method].fit(
        Problem([matrix]),
        nbytes_left([shape], ratio),
        Fit(storage=storage_of(codes), device=device, log=log),
        **METHODS[method].own(complete),
    )
    if rounding == "optimal":
        (factorization,) = round_factors([matrix], [factorization], {**codes, "rounding": rounding})
    elif not factorization.settled:
        factorization = replace(factorization, rounding=rounding)
    if is_tensor:
        import torch

        def on_device(part: Factorization) -> Factorization:
            dictionary = None if part.dictionary is None else torch.as_tensor(part.dictionary, device=weight.device)
            plus = [on_device(other) for other in part.plus]
            return replace(
                part, dictionary=dictionary, codes=torch.as_tensor(part.codes, device=weight.device), plus=plus
            )

        factorization = on_device(factorization)
    return factorization


def _check(
    weight: Any, gram: Any, method: str, ratio: float, codes: dict[str, Any], rounding: str, options: dict[str, Any]
) -> None:
    """Everything that is wrong with the arguments; options by the schema that a config is checked with."""
    from cospadi.checking import option_faults

    faults = []
    if not 0 < ratio < 1:
        faults.append(f"ratio is {ratio}; allowed: more than 0, less than 1")
    for name, allowed in (("value_bits", tuple(CODEC_OF_BITS)), ("dictionary_bits", DICTIONARY_BITS)):
        if codes[name] not in allowed:
            faults.append(f"{name} is {codes[name]}; allowed: {', '.join(map(str, allowed))}")
    if codes["block_size"] is not None and codes["block_size"] < 1:
        faults.append(f"block_size is {codes['block_size']}; allowed: at least 1, or None")
    roundings = (*ROUNDINGS, "optimal")
    if rounding not in roundings:
        faults.append(f"rounding is {rounding!r}; allowed: {', '.join(roundings)}")
    if weight.ndim != 2 or 0 in weight.shape:
        faults.append(f"weight has shape {tuple(weight.shape)}; expected (d_in, d_out)")
    elif gram is not None and tuple(gram.shape) != (weight.shape[0], weight.shape[0]):
        faults.append(f"gram has shape {tuple(gram.shape)}; expected {(weight.shape[0], weight.shape[0])}")
    if method not in METHODS:
        faults.append(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    else:
        faults += option_faults(METHODS[method].own(METHODS[method].options), options)
    if not faults:
        faults += bits_faults({**codes, "rounding": rounding}, own_codec=METHODS[method].own_codec)
        settings = {**METHODS[method].complete(options), "ratio": ratio, "codes": codes}
        faults += METHODS[method].faults(settings, [[Target(0, "weight", tuple(weight.shape))]])
    if faults:
        raise ConfigError(faults, "factorize")
