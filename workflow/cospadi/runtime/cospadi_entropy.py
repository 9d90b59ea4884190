"""Entropy-coded matrices: whole numbers under one step a row, in as many bits as they are surprising.

Numbers of a row and column whose scales are large against the step are spread wide, others are mostly zero: a table of
frequencies for every half octave of that. docs/format.md has every byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .cospadi_entropy_parts import (
    IN_TABLE,
    MOST,
    OCTAVE,
    DamagedStreamError,
    as_bytes,
    count_tables,
    fault_in,
    frequencies,
    levels_of,
    of_shape,
    parsed,
    rows_a_stream,
    steps_near,
)
from .cospadi_entropy_streams import CODES, Code, Matrix, batch_of, check_path, decoded, encoder, n_kinds, n_states
from .cospadi_values import Codec

__all__ = ["CODES", "MOST", "OCTAVE", "Code", "DamagedStreamError", "Decoding", "Entropy", "n_states", "steps_near"]


class Entropy(Codec):
    """One tensor of bytes: header, steps, scales, tables, streams. `code`: whose paths numbers follow, if any;
    `scaled`: whether columns have scales besides, a tensor of their own as those of integers.
    """

    dtype, bits, whole, variable = "U8", 8, True, True
    for_dictionaries = in_dictionaries = for_configs = False

    def __init__(self, name: str, code: Code | None = None, *, scaled: bool = False) -> None:
        self.name, self.code, self.scaled = name, code, scaled

    @property
    def with_scales(self) -> str:
        """Name of the codec that stores the same and scales of columns."""
        return self.name if self.scaled else f"{self.name}_scaled"

    @property
    def keys(self) -> tuple[str, ...]:
        return ("n_bytes", *super().keys)

    def shape_of_codes(self, numbers: Sequence[int], codes: Mapping[str, Any]) -> tuple[int, ...]:
        return (codes["n_bytes"],)

    def pack_codes(self, codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Store codes (k, d_out) that are whole numbers of the steps (k,), which `steps_near` gave.

        Raises
        ------
        ValueError
            If they are not, are too large, or do not follow the trellis.
        """
        codes = np.ascontiguousarray(codes)  # what is computed from it goes to code in C, which reads rows
        numbers = np.rint(codes / steps[:, None]).astype(np.int32)
        odd = np.zeros(numbers.shape, np.uint16)
        if self.code is not None:
            odd = (numbers & 1).astype(np.uint16)
            check_path(self.code, numbers)
            numbers = numbers >> 1
        largest = np.maximum(numbers.max(1), -numbers.min(1))
        if largest.max() > MOST:
            raise ValueError(f"numbers up to {largest.max()}; allowed: {MOST}")
        # numbers of a row that are spread wider than a table has their lower bits as they are
        wide = np.ceil(np.log2(np.maximum(largest, IN_TABLE) / IN_TABLE)).astype(np.uint8)
        rest = (numbers & (1 << wide.astype(np.int32))[:, None] - 1).astype(np.uint16) << 1 | odd
        numbers = (numbers >> wide[:, None]).astype(np.int8)
        contexts = levels_of(codes, np.ldexp(steps, wide.astype(np.int32)), wide)
        tables = count_tables(contexts, numbers, odd, n_kinds(self.code))
        frequency, start = frequencies(tables, n_kinds(self.code))
        encode, per_stream = encoder(), rows_a_stream(numbers.shape[1])
        streams = [
            encode(self.code, contexts, frequency, start, numbers, rest, begin, min(per_stream, len(numbers) - begin))
            for begin in range(0, len(numbers), per_stream)
        ]
        return as_bytes(contexts, steps, tables, streams)

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        """Numbers times steps, float32 (n,): column after column, as codes are stored."""
        return decoded(Matrix(self.code, parsed(np.ascontiguousarray(stored)), np.float32)).out.ravel()

    def unpack_codes(self, stored: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of `pack_codes`: codes (k, d_out), float32, and steps."""
        return np.ascontiguousarray(self.unpack(stored, 0).reshape(shape[::-1]).T), self.steps(stored)

    def steps(self, stored: np.ndarray) -> np.ndarray:
        """Step of every row, float32 (k,)."""
        return parsed(np.ascontiguousarray(stored)).steps

    def decode(self, stored: Any, shape: Sequence[int], *, halves: bool = False) -> Any:
        """`unpack` of a torch tensor: float32, or with `halves` bfloat16, numbers of that shape."""
        found = parsed(np.ascontiguousarray(stored.detach().cpu().numpy()))
        (numbers,) = decoded(Matrix(self.code, found, np.uint16 if halves else np.float32)).in_torch()
        return numbers.view(*shape).to(stored.device)

    def numbers(self, stored: Any) -> tuple[Any, Any, Any]:
        """Whole numbers of a torch tensor in 8 bits. A row with larger ones is there once more for their next 8 bits.

        Returns
        -------
        Tensor (d_out, k + n), int8
            The last 8 bits of each number, in two's complement, and behind them the next ones of n rows of S.
        Tensor (n,), int64
            These rows; those with three times as many bits are there twice.
        Tensor (k + n,), float32
            Steps, of the next bits 256 times as long each time.
        """
        found = parsed(np.ascontiguousarray(stored.detach().cpu().numpy()))
        return tuple(part.to(stored.device) for part in decoded(Matrix(self.code, found, np.int8)).in_torch())

    def faults_of(self, stored: np.ndarray, shape: tuple[int, int]) -> Iterator[str]:
        """What is wrong inside the stored tensor of codes (k, d_out); tables and streams are looked at in decoding."""
        fault = fault_in(np.ascontiguousarray(stored), shape)
        if fault is not None:
            yield fault


class Decoding:
    """Matrices that threads of their own decode while whoever began it does other things.

    Parameters
    ----------
    stored : mapping
        Of each tensor by its name the codec, the stored bytes, the shape (k, d_out) of the codes, and what is made of
        them: float32, uint16 for bfloat16, or int8 for `Entropy.numbers`.
    n_threads : int
        Of which one is the caller's: it joins the others in `wait`.

    Attributes
    ----------
    faults : list of str
        What is wrong with sizes; where there is any, nothing is decoded.
    """

    def __init__(self, stored: Mapping[str, tuple[Entropy, np.ndarray, tuple[int, int], type]], n_threads: int) -> None:
        self.faults: list[str] = []
        self._matrices: dict[str, Matrix] = {}
        for name, (codec, data, shape, dtype) in stored.items():
            try:
                self._matrices[name] = Matrix(codec.code, of_shape(data, shape), dtype, checked=True)
            except ValueError as error:
                self.faults.append(f"{name} {error}")
        self._batch = batch_of([] if self.faults else list(self._matrices.values()))
        self._pool = ThreadPoolExecutor(n_threads)
        self._running = [self._pool.submit(self._batch.run) for _ in range(n_threads - 1)]

    def wait(self) -> list[str]:
        """Until all are decoded: what is wrong with them, the checksums included."""
        self._batch.run()
        for running in self._running:
            running.result()
        self._batch.tell()
        return [f"{name} {matrix.fault}" for name, matrix in self._matrices.items() if matrix.fault]

    def stop(self) -> None:
        """Begin no more, and wait for those that are begun."""
        self._batch.stop()
        self._pool.shutdown()

    def take(self, name: str, dtype: type) -> tuple[Any, ...] | None:
        """What `decode` or `numbers` gives, once; None where something else was made of this one, or nothing."""
        matrix = self._matrices.pop(name, None)
        return matrix.in_torch() if matrix is not None and matrix.out.dtype == dtype else None
