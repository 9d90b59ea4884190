"""Numbers of an entropy-coded matrix and their streams: decoded by C where a compiler is found, else by NumPy, which is
the reference and some hundred times slower.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .cospadi_compiler import chosen, library
from .cospadi_entropy_parts import (
    BITS,
    FAULTS,
    LANES,
    LOWEST,
    NO_CHECKSUM,
    NO_END,
    SLOTS,
    DamagedStreamError,
    Levels,
    Parsed,
    has_its_checksum,
    slots_of,
)
from .cospadi_entropy_source import SOURCE

logger = logging.getLogger("cospadi.runtime")

# Numbers of more than 8 bits that a matrix has room for, where it is decoded to so many; of more, it is decoded again
_FEW_LARGER = 1024
# Rows that it has room for besides, for the next 8 bits of those; with more, it is copied
_FEW_MORE = 16
_NONE = np.empty(0, np.int64)


class Code(NamedTuple):
    """A convolutional code of rate 1/2: the paths that numbers of a row may follow through the states of a trellis.

    A number ``n`` is one of four kinds, ``n mod 4``. The state says the lower bit of the kind, so the numbers that are
    allowed lie two steps apart, and the paths choose between the two sets: a denser packing of space than rounding each
    number for itself (Ungerboeck 1982).

    Attributes
    ----------
    n_states : int
        A power of two.
    lower, upper : int
        Parity checks as polynomials, of the lower and the upper bit of the kinds: over a path from state 0 their
        products with the bits so far add up to an even number at every place.
    """

    n_states: int
    lower: int
    upper: int

    def follow(self, state: Any, half: Any) -> Any:
        """State after a number, of which ``half`` is the upper part, ``n // 2``. In ``state & 1`` is its lower bit."""
        return state >> 1 ^ (self.lower >> 1) * (state & 1) ^ (self.upper >> 1) * (half & 1)


# By the number of states. Of 256: Ungerboeck's of 1987, .25 decibels nearer to what is possible than that of 8
CODES = {code.n_states: code for code in (Code(8, 0o15, 0o2), Code(256, 0o515, 0o362))}


def n_states(code: Code | None) -> int:
    """Of the trellis; 1 where numbers follow no code."""
    return 1 if code is None else code.n_states


def n_kinds(code: Code | None) -> int:
    """Tables of a bucket: where numbers follow a code, one for even numbers and one for odd ones."""
    return 1 if code is None else 2


def check_path(code: Code, numbers: np.ndarray) -> None:
    state = np.zeros(len(numbers), np.int32)
    for column in numbers.T:
        if ((column ^ state) & 1).any():
            raise ValueError("numbers do not follow the trellis")
        state = code.follow(state, column >> 1)


class Matrix:
    """A stored matrix that is to be decoded.

    `out` (d_out, k) are its numbers times steps, float32, or bfloat16 as uint16. Of int8 they are the last bits of the
    numbers alone, and `larger` (n, 3) are row, column and number of those that are more, as far as there is `room`;
    `n_larger` counts all. `fault` is what was found wrong in decoding, where `checked` says that the checksum counts,
    too.
    """

    def __init__(
        self, code: Code | None, found: Parsed, dtype: type, *, checked: bool = False, room: int = _FEW_LARGER
    ) -> None:
        self.code, self.found, self.checked = code, found, checked
        more = _FEW_MORE if dtype == np.int8 else 0
        self._memory = np.empty(found.columns * (found.rows + more), dtype)
        self.out = self._memory[: found.columns * found.rows].reshape(found.columns, found.rows)
        self.larger = np.empty((room if dtype == np.int8 else 0, 3), np.int32)
        self.n_larger = 0
        self.fault: str | None = None

    def keep(self, rows: np.ndarray, column: int, numbers: np.ndarray) -> None:
        """Of numbers in one column, those that are more than 8 bits."""
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            if not -128 <= number < 128:
                if self.n_larger < len(self.larger):
                    self.larger[self.n_larger] = row, column, number
                self.n_larger += 1

    def in_torch(self) -> tuple[Any, ...]:
        """Once it is decoded: its numbers, or of int8 what `Entropy.numbers` gives."""
        import torch

        if self.out.dtype != np.int8:
            halves = self.out.dtype == np.uint16
            out = torch.from_numpy(self.out.view(np.int16) if halves else self.out)
            return (out.view(torch.bfloat16) if halves else out,)
        if self.n_larger > len(self.larger):
            return decoded(Matrix(self.code, self.found, np.int8, room=self.n_larger)).in_torch()
        return tuple(map(torch.from_numpy, self._digits() if self.n_larger else (self.out, _NONE, self.found.steps)))

    def _digits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `Entropy.numbers` gives where some are larger, in the memory of `out` if there is enough."""
        row, column, number = self.larger[: self.n_larger].T
        rows, place = np.unique(row.astype(np.int64), return_inverse=True)
        left = np.zeros((len(self.out), len(rows)), np.int32)
        left[column, place] = number + 128 >> 8
        step, found = self.found.steps[rows], []
        while len(rows):
            step = 256 * step
            found.append((left.astype(np.int8), rows, step))
            left = left + 128 >> 8
            kept = left.any(0)
            rows, left, step = rows[kept], left[:, kept], step[kept]
        more, rows, steps = (np.concatenate(part, -1) for part in zip(*found, strict=True))
        columns, k = self.out.shape
        size = columns * (k + len(rows))
        memory = self._memory if size <= len(self._memory) else np.empty(size, np.int8)
        digits = memory[:size].reshape(columns, -1)
        digits[:, :k] = self.out
        digits[:, k:] = more
        return digits, rows, np.concatenate([self.found.steps, steps])


def decoded(matrix: Matrix) -> Matrix:
    """The same, decoded.

    Raises
    ------
    DamagedStreamError
        If a stream is not what encoding gives.
    """
    batch = batch_of([matrix])
    batch.run()
    batch.tell()
    if matrix.fault:
        raise DamagedStreamError(matrix.fault)
    return matrix


def batch_of(matrices: list[Matrix]) -> _Batch | _CompiledBatch:
    coder = _coder()
    return _Batch(matrices) if coder is None else _CompiledBatch(coder, matrices)


class _Batch:
    """Matrices to decode, with NumPy. Any number of threads may `run`, each taking the next, until none is left."""

    def __init__(self, matrices: list[Matrix]) -> None:
        self._left = deque(matrices)

    def run(self) -> None:
        while self._left:
            try:
                matrix = self._left.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                _decode_with_numpy(matrix)
            except DamagedStreamError as error:
                matrix.fault = str(error)

    def stop(self) -> None:
        self._left.clear()

    def tell(self) -> None:
        """Write into the matrices what is wrong with them."""


def _decode_with_numpy(matrix: Matrix) -> None:
    found = matrix.found
    if matrix.checked and not has_its_checksum(found.data):
        raise DamagedStreamError(NO_CHECKSUM)
    slots = slots_of(found.tables.tobytes(), found.contexts.n_buckets, n_kinds(matrix.code))
    for index, (start, end) in enumerate(itertools.pairwise(found.edges)):
        begin = index * found.per_stream
        rows = min(found.per_stream, found.rows - begin)
        _decode_stream(matrix, slots, found.data[start:end], begin, rows)


def _decode_stream(matrix: Matrix, slots: np.ndarray, stream: np.ndarray, begin: int, rows: int) -> None:
    code, found, out = matrix.code, matrix.found, matrix.out
    stream = stream.copy()  # from an even address
    states = stream[: 4 * LANES].view("<u4").astype(np.int64)
    words = stream[4 * LANES :].view("<u2").astype(np.int64)
    kinds = n_kinds(code)
    bucket, extra = found.contexts.buckets()[begin : begin + rows], found.contexts.wide
    left = iter(words.tolist())

    def refill(here: np.ndarray) -> None:
        for lane in np.nonzero(here < LOWEST)[0]:
            word = next(left, None)
            if word is None:
                raise DamagedStreamError("has a stream that is too short")
            here[lane] = here[lane] << 16 | word

    for group in range(0, rows, LANES):
        lanes = min(LANES, rows - group)
        here, state = states[:lanes], np.zeros(lanes, np.int64)
        step = found.steps[begin + group : begin + group + lanes]
        wide = extra[begin + group : begin + group + lanes].astype(np.int64)
        for j in range(found.columns):
            odd = state & 1
            entry = slots[kinds * bucket[group : group + lanes, j] + odd, here & (SLOTS - 1)].astype(np.int64)
            here[:] = ((entry >> BITS & (SLOTS - 1)) + 1) * (here >> BITS) + (entry & (SLOTS - 1))
            number = entry >> 24
            number -= (number & 128) << 1
            if wide.any():
                for lane in range(lanes):  # whose words lie between
                    one = here[lane : lane + 1]
                    refill(one)
                    number[lane] = (number[lane] << wide[lane]) + (one[0] & (1 << wide[lane]) - 1)
                    one >>= wide[lane]
                    refill(one)
            else:
                refill(here)
            here_at = slice(begin + group, begin + group + lanes)
            whole = number if code is None else 2 * number + odd
            if out.dtype == np.int8:
                out[j, here_at] = whole.astype(np.int8)
                matrix.keep(np.arange(begin + group, begin + group + lanes), j, whole)
            else:
                value = whole.astype(np.float32) * step
                out[j, here_at] = _upper(value) if out.dtype == np.uint16 else value
            state = state if code is None else code.follow(state, number)
    if next(left, None) is not None or (states != LOWEST).any():
        raise DamagedStreamError(NO_END)


def _upper(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def encoder() -> Callable[..., bytes]:
    """What writes a stream of some rows: `_encode_with_numpy`, or the same compiled."""
    coder = _coder()
    return _encode_with_numpy if coder is None else coder.encode


def _encode_with_numpy(
    code: Code | None,
    contexts: Levels,
    frequency: np.ndarray,
    start: np.ndarray,
    numbers: np.ndarray,
    rest: np.ndarray,
    begin: int,
    rows: int,
) -> bytes:
    bucket = contexts.buckets()
    states = np.full(LANES, LOWEST, np.int64)
    words: list[int] = []  # from the last to the first
    for group in reversed(range(0, rows, LANES)):
        lanes = slice(begin + group, begin + min(group + LANES, rows))
        here = states[: lanes.stop - lanes.start]
        table = n_kinds(code) * bucket[lanes] + (rest[lanes] & 1)
        wide, lower = contexts.wide[lanes].astype(np.int64), rest[lanes].astype(np.int64) >> 1
        entry = numbers[lanes].astype(np.int64) + 128
        counts, below = frequency[table, entry].astype(np.int64), start[table, entry].astype(np.int64)
        for j in reversed(range(numbers.shape[1])):
            for lane in reversed(range(len(here))):
                state, bits, count = int(here[lane]), int(wide[lane]), int(counts[lane, j])
                if bits:
                    if state >= 1 << 32 - bits:
                        words.append(state & 0xFFFF)
                        state >>= 16
                    state = state << bits | int(lower[lane, j])
                if state >= count << 20:
                    words.append(state & 0xFFFF)
                    state >>= 16
                here[lane] = (state // count << BITS) + state % count + int(below[lane, j])
    return states.astype("<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()


class _Contexts(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("columns", "first", "buckets", "kinds", "lower", "upper")),
        *((name, ctypes.c_void_p) for name in ("row", "column", "wide")),
    ]


_KINDS = [np.dtype(name) for name in ("float32", "uint16", "int8")]  # of what is decoded, as the source has them


class _Stored(ctypes.Structure):
    _fields_ = [
        ("at", _Contexts),
        *((name, ctypes.c_void_p) for name in ("data", "tables", "steps", "edges")),
        *((name, ctypes.c_int64) for name in ("size", "tables_size", "n_streams", "per_stream", "rows", "kind")),
        ("is_checked", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("out", "larger")),
        *((name, ctypes.c_int64) for name in ("room", "n_larger", "fault")),
    ]


def _contexts(code: Code | None, found: Levels) -> _Contexts:
    address, rows = found.levels.ctypes.data, len(found.wide)
    sizes = (len(found.levels) - rows, found.first, found.n_buckets, n_kinds(code))
    checks = (0, 0) if code is None else (code.lower, code.upper)
    return _Contexts(*sizes, *checks, address, address + rows, found.wide.ctypes.data)


class _CompiledBatch:
    """As `_Batch`, with the compiled coder: all of a thread's matrices are one call."""

    def __init__(self, coder: _Coder, matrices: list[Matrix]) -> None:
        self._coder, self._matrices = coder, matrices
        self._stored = (_Stored * len(matrices))(*map(self._as_stored, matrices))
        self._begun = ctypes.c_int64()
        self._n_tables = max((m.found.contexts.n_buckets * n_kinds(m.code) for m in matrices), default=0)

    @staticmethod
    def _as_stored(matrix: Matrix) -> _Stored:
        found = matrix.found
        return _Stored(
            _contexts(matrix.code, found.contexts),
            *(array.ctypes.data for array in (found.data, found.tables, found.steps, found.edges)),
            *(len(found.data), len(found.tables), len(found.edges) - 1, found.per_stream, found.rows),
            *(_KINDS.index(matrix.out.dtype), matrix.checked),
            *(matrix.out.ctypes.data, matrix.larger.ctypes.data, len(matrix.larger)),
        )

    def run(self) -> None:
        self._coder.decode(self._stored, self._begun, self._n_tables)

    def stop(self) -> None:
        self._begun.value = len(self._stored)

    def tell(self) -> None:
        for matrix, stored in zip(self._matrices, self._stored, strict=True):
            matrix.fault, matrix.n_larger = FAULTS[stored.fault], stored.n_larger


class _Coder:
    """The compiled coder."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._decode, self._encode = library.entropy_decode, library.entropy_encode
        self._decode.argtypes = [pointer, integer, pointer, pointer]
        self._encode.argtypes = [pointer] * 5 + [integer] * 2 + [pointer, integer]
        self._decode.restype, self._encode.restype = None, integer
        self._scratch = threading.local()

    def _room(self, n: int) -> np.ndarray:
        """So many numbers of 32 bits, or more, kept from call to call; each thread of Python has its own."""
        room = getattr(self._scratch, "room", None)
        if room is None or len(room) < n:
            room = self._scratch.room = np.empty(n, np.uint32)
        return room

    def decode(self, stored: ctypes.Array[_Stored], begun: ctypes.c_int64, n_tables: int) -> None:
        """Those that no thread has begun; the largest has so many tables."""
        slots = self._room(n_tables * SLOTS)
        self._decode(stored, len(stored), ctypes.byref(begun), slots.ctypes.data)

    def encode(
        self,
        code: Code | None,
        contexts: Levels,
        frequency: np.ndarray,
        start: np.ndarray,
        numbers: np.ndarray,
        rest: np.ndarray,
        begin: int,
        rows: int,
    ) -> bytes:
        # no number takes more than a frequency's bits and those of a wide row: two words
        room = np.empty(4 * LANES + 4 + 4 * rows * numbers.shape[1], np.uint8)
        addressed = _contexts(code, contexts)
        place = self._encode(
            ctypes.byref(addressed),
            *(array.ctypes.data for array in (frequency, start, numbers, rest)),
            begin,
            rows,
            room.ctypes.data,
            len(room),
        )
        if place < 0:
            raise ValueError("a number has no place in its table")
        return room[place:].tobytes()


def _coder() -> _Coder | None:
    """The compiled coder; None where NumPy has to do."""
    choice = chosen()
    return None if choice == "torch" else _compiled(choice)


@functools.cache
def _compiled(choice: str) -> _Coder | None:
    if sys.byteorder != "little":
        return None
    try:
        return _Coder(library(SOURCE, choice))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("entropy-coded matrices: NumPy, which is much slower, because no C compiler works (%s)", error)
        return None
