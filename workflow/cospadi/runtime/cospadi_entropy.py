"""Entropy-coded matrices: whole numbers under one step a row, in as many bits as they are surprising.

Numbers of a row and column whose scales are large against the step are spread wide, others are mostly zero: a table of
frequencies for every half octave of that. Streams are decoded by C where a compiler is found, else by NumPy, which is
the reference and some hundred times slower. docs/format.md has every byte.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .cospadi_entropy_source import SOURCE
from .cospadi_values import Codec

logger = logging.getLogger("cospadi.runtime")

# Of a state: its lowest value between two numbers, and the bits of a frequency
_LANES, _LOWEST, _BITS = 8, 1 << 16, 12
_SLOTS = 1 << _BITS
# Numbers to either side that a table has, halved for the trellis; bits that those of a wide row have besides, at most
_IN_TABLE, _WIDEST = 127, 12
# The largest number that can be stored, halved for the trellis
MOST = _IN_TABLE << _WIDEST
# Steps: so many to an octave, the tenth of a bit exact; a byte has 16 octaves of them
OCTAVE = 16
_MANTISSAS = np.array([round(2 ** (i / OCTAVE) * 512) / 512 for i in range(OCTAVE)], np.float64)
_STEPS = np.ldexp(np.tile(_MANTISSAS, 256 // OCTAVE), np.repeat(np.arange(256 // OCTAVE), OCTAVE))
# Numbers a stream has, about; streams are decoded by several threads
_STREAM = 1 << 16
# A table for fewer numbers costs more than it saves
_FEWEST = 1000
# Numbers of more than 8 bits that a matrix has room for, where it is decoded to so many; of more, it is decoded again
_FEW_LARGER = 1024
# Rows that it has room for besides, for the next 8 bits of those; with more, it is copied
_FEW_MORE = 16
_NONE = np.empty(0, np.int64)
_HEADER = struct.Struct("<IIIHhBBHI")
_SIZE = struct.Struct("<I")
# Levels are written in multiples of this, of 8 that a bucket has: finer ones would take more bytes than they save
_FINEST = 4
# What deflated bytes can be at most, of each
_MOST_INFLATED = 1032
_WIDE = np.dtype([("row", "<u4"), ("bits", "u1")])


class DamagedStreamError(ValueError):
    """A stream is not what encoding gives."""


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


class Entropy(Codec):
    """One tensor of bytes: header, steps, scales, tables, streams. `code`: whose paths numbers follow, if any;
    `scaled`: whether columns have scales besides, a tensor of their own as those of integers.
    """

    dtype, bits, whole, variable = "U8", 8, True, True
    for_dictionaries = in_dictionaries = for_configs = False

    def __init__(self, name: str, code: Code | None = None, *, scaled: bool = False) -> None:
        self.name, self.code, self.scaled = name, code, scaled

    @property
    def n_kinds(self) -> int:
        """Tables of a bucket: where numbers follow a code, one for even numbers and one for odd ones."""
        return 1 if self.code is None else 2

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
        rows, columns = codes.shape
        exponent, step_bytes = _step_bytes(steps)
        numbers = np.rint(codes / steps[:, None]).astype(np.int32)
        odd = np.zeros(numbers.shape, np.uint16)
        if self.code is not None:
            odd = (numbers & 1).astype(np.uint16)
            _check_path(self.code, numbers)
            numbers = numbers >> 1
        largest = np.maximum(numbers.max(1), -numbers.min(1))
        if largest.max() > MOST:
            raise ValueError(f"numbers up to {largest.max()}; allowed: {MOST}")
        # numbers of a row that are spread wider than a table has their lower bits as they are
        wide = np.ceil(np.log2(np.maximum(largest, _IN_TABLE) / _IN_TABLE)).astype(np.uint8)
        rest = (numbers & (1 << wide.astype(np.int32))[:, None] - 1).astype(np.uint16) << 1 | odd
        numbers = (numbers >> wide[:, None]).astype(np.int8)
        levels, first, n_buckets = _levels(codes, np.ldexp(steps, wide.astype(np.int32)))
        bucket = _buckets(levels, first, n_buckets, rows, columns)
        tables = _count_tables(bucket, numbers, odd, n_buckets, self.n_kinds)
        table_bytes = b"".join(_table_bytes(table) for table in tables)
        per_stream = _rows_a_stream(columns)
        frequency, start = _frequencies(tables, self.n_kinds)
        contexts = _Levels(first, n_buckets, levels, wide)
        coder = _coder()
        encode = _encode_with_numpy if coder is None else coder.encode
        streams = [
            encode(self, contexts, frequency, start, numbers, rest, begin, min(per_stream, rows - begin))
            for begin in range(0, rows, per_stream)
        ]
        exceptions = np.zeros(int(np.count_nonzero(wide)), _WIDE)
        exceptions["row"], exceptions["bits"] = np.nonzero(wide)[0], wide[wide > 0]
        sizes = (len(exceptions), len(table_bytes))
        beside = step_bytes + levels.tobytes() + exceptions.tobytes() + table_bytes
        deflated = _deflated(beside)
        is_smaller = _SIZE.size + len(deflated) < len(beside)
        body = _HEADER.pack(0, rows, columns, per_stream | is_smaller, exponent, first, n_buckets, *sizes)[4:]
        body += _SIZE.pack(len(deflated)) + deflated if is_smaller else beside
        body += np.array([len(stream) for stream in streams], "<u4").tobytes() + b"".join(streams)
        return np.frombuffer(struct.pack("<I", zlib.crc32(body)) + body, np.uint8)

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        """Numbers times steps, float32 (n,): column after column, as codes are stored."""
        return _decoded(_Matrix(self, _parsed(np.ascontiguousarray(stored)), np.float32)).out.ravel()

    def unpack_codes(self, stored: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of `pack_codes`: codes (k, d_out), float32, and steps."""
        return np.ascontiguousarray(self.unpack(stored, 0).reshape(shape[::-1]).T), self.steps(stored)

    def steps(self, stored: np.ndarray) -> np.ndarray:
        """Step of every row, float32 (k,)."""
        return _parsed(np.ascontiguousarray(stored)).steps

    def decode(self, stored: Any, shape: Sequence[int], *, halves: bool = False) -> Any:
        """`unpack` of a torch tensor: float32, or with `halves` bfloat16, numbers of that shape."""
        found = _parsed(np.ascontiguousarray(stored.detach().cpu().numpy()))
        (numbers,) = _decoded(_Matrix(self, found, np.uint16 if halves else np.float32)).in_torch()
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
        found = _parsed(np.ascontiguousarray(stored.detach().cpu().numpy()))
        return tuple(part.to(stored.device) for part in _decoded(_Matrix(self, found, np.int8)).in_torch())

    def faults_of(self, stored: np.ndarray, shape: tuple[int, int]) -> Iterator[str]:
        """What is wrong inside the stored tensor of codes (k, d_out); tables and streams are looked at in decoding."""
        stored = np.ascontiguousarray(stored)
        if len(stored) >= _HEADER.size and not _has_its_checksum(stored):
            yield _NO_CHECKSUM
            return
        try:
            _of_shape(stored, shape)
        except ValueError as error:
            yield str(error)


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
        self._matrices: dict[str, _Matrix] = {}
        for name, (codec, data, shape, dtype) in stored.items():
            try:
                self._matrices[name] = _Matrix(codec, _of_shape(data, shape), dtype, checked=True)
            except ValueError as error:
                self.faults.append(f"{name} {error}")
        self._batch = _batch([] if self.faults else list(self._matrices.values()))
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


class _Levels(NamedTuple):
    """What says which table a number has: first bucket, buckets, levels (k + d_out,); bits of wide rows (k,)."""

    first: int
    n_buckets: int
    levels: np.ndarray
    wide: np.ndarray


@dataclass(frozen=True)
class _Parsed:
    """A stored matrix in its parts, which fit together."""

    rows: int
    columns: int
    per_stream: int
    steps: np.ndarray
    contexts: _Levels
    tables: np.ndarray  # as bytes
    edges: np.ndarray  # of the streams: where each begins in `data`, and the last ends
    data: np.ndarray


def _parsed(data: np.ndarray) -> _Parsed:
    """Parts of a stored matrix, whose checksum is not looked at.

    Raises
    ------
    ValueError
        If a size is not right.
    """
    if len(data) < _HEADER.size:
        raise ValueError(f"has {len(data)} bytes, fewer than its header")
    _, rows, columns, per_stream, exponent, first, n_buckets, n_wide, n_table = _HEADER.unpack_from(data)
    is_deflated, per_stream = per_stream & 1, per_stream & ~1
    # a table has a byte at least
    if not (rows and columns and per_stream and 0 < n_buckets <= n_table) or per_stream % _LANES:
        raise ValueError(_NO_HEADER)
    n_streams, n_beside = -(-rows // per_stream), 2 * rows + columns + _WIDE.itemsize * n_wide + n_table
    beside, after = (_inflated if is_deflated else _as_it_is)(data, n_beside)
    if after + 4 * n_streams > len(data):
        raise ValueError(_NO_HEADER)
    sizes = np.frombuffer(data, "<u4", n_streams, after).astype(np.int64)
    after += 4 * n_streams
    step_bytes, levels = beside[:rows], beside[rows : 2 * rows + columns]
    at = 2 * rows + columns
    wide = np.zeros(rows, np.uint8)
    if n_wide:
        exceptions = np.frombuffer(beside, _WIDE, n_wide, at)
        at += exceptions.nbytes
        wide_rows, bits = exceptions["row"].astype(np.int64), exceptions["bits"]
        if (np.diff(wide_rows, prepend=-1) < 1).any() or (wide_rows >= rows).any():
            raise ValueError("has wide rows out of order")
        if (bits < 1).any() or (bits > _WIDEST).any():
            raise ValueError("has wide rows of more bits than any")
        wide[wide_rows] = bits
    tables = beside[at:]
    edges = np.zeros(n_streams + 1, np.int64)
    np.cumsum(sizes, out=edges[1:])
    edges += after
    if edges[-1] != len(data) or (sizes < 4 * _LANES).any() or (sizes % 2).any():
        raise ValueError("has streams of other sizes than it says")
    if not -100 <= exponent <= 100:
        raise ValueError("has steps that no weight needs")
    contexts = _Levels(first, n_buckets, levels, wide)
    return _Parsed(rows, columns, per_stream, _steps(exponent, step_bytes), contexts, tables, edges, data)


def _as_it_is(data: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """So many bytes behind the header, and where what follows begins."""
    beside = data[_HEADER.size :][:size]
    if len(beside) < size:
        raise ValueError(_NO_HEADER)
    return beside, _HEADER.size + size


def _inflated(data: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """`_as_it_is` of bytes that are deflated there."""
    if len(data) < _HEADER.size + _SIZE.size:
        raise ValueError(_NO_HEADER)
    (n_deflated,) = _SIZE.unpack_from(data, _HEADER.size)
    after = _HEADER.size + _SIZE.size + n_deflated
    stored = data[_HEADER.size + _SIZE.size : after].tobytes()
    if len(stored) < n_deflated or size > _MOST_INFLATED * n_deflated:
        raise ValueError(_NO_HEADER)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        beside = stream.decompress(stored, size + 1)  # with room for one more the end is read as well
    except zlib.error:
        raise ValueError(_NO_HEADER) from None
    if len(beside) != size or not stream.eof or stream.unused_data:
        raise ValueError(_NO_HEADER)
    return np.frombuffer(beside, np.uint8), after


def _deflated(beside: bytes) -> bytes:
    """RFC 1951, without a header."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    return stream.compress(beside) + stream.flush()


def _of_shape(data: np.ndarray, shape: tuple[int, int]) -> _Parsed:
    """`_parsed` of codes (k, d_out)."""
    found = _parsed(data)
    if (found.rows, found.columns) != shape:
        raise ValueError(f"holds codes of shape ({found.rows}, {found.columns}), expected {shape}")
    return found


def _has_its_checksum(data: np.ndarray) -> bool:
    return zlib.crc32(data[4:]) == int.from_bytes(data[:4].tobytes(), "little")


# --- steps ------------------------------------------------------------------------------------------------------------


def steps_near(wanted: np.ndarray) -> np.ndarray:
    """The steps that can be stored nearest to those wanted (k,), within 16 octaves below the largest: float32."""
    exponent = int(np.floor(np.log2(wanted.max()))) - 15
    nearest = np.rint(OCTAVE * (np.log2(np.maximum(wanted, 2.0**-200)) - exponent)).clip(0, 255).astype(np.uint8)
    return _steps(exponent, nearest)


def _steps(exponent: int, stored: np.ndarray) -> np.ndarray:
    return np.ldexp(_STEPS, exponent).astype(np.float32)[stored]


def _step_bytes(steps: np.ndarray) -> tuple[int, bytes]:
    exponent = int(np.floor(np.log2(steps.max()))) - 15
    stored = np.rint(OCTAVE * (np.log2(steps.astype(np.float64)) - exponent)).clip(0, 255).astype(np.uint8)
    if not np.array_equal(_steps(exponent, stored), steps):
        raise ValueError("steps are not those that can be stored")
    return exponent, stored.tobytes()


# --- scales and tables ------------------------------------------------------------------------------------------------


def _levels(codes: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Logarithm of each row's scale over its step, and of each column's, bytes (k + d_out,); first bucket and number.

    Scales are those of ``w_ij ~ r_i c_j``, by turns the mean square of what the other leaves.
    """
    squares = codes.astype(np.float32) ** 2
    tiny = np.float32(1e-30)
    column = np.maximum(squares.mean(0), tiny)
    for _ in range(3):
        row = np.maximum((squares / column).mean(1), tiny)
        column = np.maximum((squares / row[:, None]).mean(0), tiny)
    logs = [8 * np.log2(row.astype(np.float64)) - 16 * np.log2(steps.astype(np.float64)), 8 * np.log2(column)]
    logs = [_FINEST * np.rint(part / _FINEST) for part in logs]
    # a row or column of zeros is the least of all
    levels = [np.maximum(part, part.max() - 255 // _FINEST * _FINEST) for part in logs]
    lows = [part.min() for part in levels]
    rows, columns = (np.bincount((part - low).astype(np.int64)) for part, low in zip(levels, lows, strict=True))
    # how many rows and columns have each sum of levels
    sums = np.rint(np.convolve(rows.astype(np.float64), columns.astype(np.float64))).astype(np.int64)
    counts = np.add.reduceat(sums, range(0, len(sums), 8))
    enough = min(_FEWEST, codes.size // 8)
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    first = int(np.argmax(below > enough))
    last = int(len(counts) - 1 - np.argmax(above[::-1] > enough))
    stored = np.concatenate([part - low for part, low in zip(levels, lows, strict=True)]).astype(np.uint8)
    return stored, first, max(1, last - first + 1)


def _buckets(levels: np.ndarray, first: int, n_buckets: int, rows: int, columns: int) -> np.ndarray:
    """Bucket of every code, (rows, columns)."""
    sums = levels[:rows].astype(np.int16)[:, None] + levels[rows : rows + columns].astype(np.int16)
    return np.clip((sums >> 3) - first, 0, n_buckets - 1)


def _count_tables(
    bucket: np.ndarray, numbers: np.ndarray, odd: np.ndarray, n_buckets: int, kinds: int
) -> list[list[int]]:
    """Frequencies of every table by size, symmetric: of 0, 1 ... numbers; where they are odd, of 1, 3 ..."""
    counts = np.zeros(256 * kinds * n_buckets, np.int64)
    for row, number, is_odd in zip(bucket, numbers, odd, strict=True):
        sizes = np.where(is_odd, np.where(number < 0, ~number, number), np.abs(number.astype(np.int16)))
        counts += np.bincount((kinds * row + is_odd).astype(np.int64) * 256 + sizes, minlength=len(counts))
    counts = counts.reshape(-1, 256)
    return [_normalised(count, table % kinds == 1) for table, count in enumerate(counts)]


def _normalised(counts: np.ndarray, odd: bool) -> list[int]:
    """Frequencies in the proportion of counts; those of 0 once and of the others twice make `_SLOTS`."""
    total = int(counts.sum())
    if total == 0:
        return []
    counts = counts[: int(np.nonzero(counts)[0][-1]) + 1]
    weights = np.full(len(counts), 2)
    if not odd:
        weights[0] = 1
    found = np.where(counts > 0, np.maximum(1, np.rint(counts * (_SLOTS / total) / weights)), 0).astype(np.int64)
    if not odd:
        found[0] += found[0] & 1  # the others come in pairs
    while (excess := int((weights * found).sum()) - _SLOTS) != 0:
        largest = int(np.argmax(found))
        change = max(1, min(abs(excess) // 2, int(found[largest]) // 64))
        found[largest] -= int(np.sign(excess)) * change * (3 - weights[largest])
    return found.tolist()


def _table_bytes(table: list[int]) -> bytes:
    """How many sizes a table has, and the frequency of each in bytes of seven bits, the lowest first."""
    out = bytearray([len(table)])
    for frequency in table:
        while frequency >= 128:
            out.append(frequency & 127 | 128)
            frequency >>= 7
        out.append(frequency)
    return bytes(out)


_FAULTS_OF_TABLES = (
    "has a table whose frequencies do not make a whole",
    "has tables that are cut short",
    "has bytes behind its tables",
)
_NO_HEADER = "is cut short, or its header is wrong"
_NO_END = "has a stream that does not end where it should"
_NO_CHECKSUM = "is damaged: its checksum is another"
# by the numbers that the source gives them
_FAULTS = (None, *_FAULTS_OF_TABLES, _NO_END, _NO_CHECKSUM)


def _read_tables(data: bytes, n_buckets: int, kinds: int) -> list[list[int]]:
    not_whole, too_short, too_long = _FAULTS_OF_TABLES
    tables, at = [], 0
    try:
        for table in range(n_buckets * kinds):
            n, at = data[at], at + 1
            found = []
            for _ in range(n):
                frequency = shift = 0
                while True:
                    byte, at = data[at], at + 1
                    frequency |= (byte & 127) << shift
                    shift += 7
                    if byte < 128 or shift > 14:
                        break
                found.append(frequency)
            total = 2 * sum(found) - (found[0] if found and table % kinds == 0 else 0)
            if n > _IN_TABLE + 1 or (n and total != _SLOTS):
                raise DamagedStreamError(not_whole)
            tables.append(found)
    except IndexError:
        raise DamagedStreamError(too_short) from None
    if at != len(data):
        raise DamagedStreamError(too_long)
    return tables


def _frequencies(tables: list[list[int]], kinds: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequency of every number from -128 on in every table, and their sum below it: uint16 (n_tables, 256)."""
    frequency = np.zeros((len(tables), 256), np.uint16)
    for index, table in enumerate(tables):
        sizes = np.array(table or [], np.uint16)
        if index % kinds:  # 0 stands for 1, -1 for -1
            frequency[index, 128 : 128 + len(sizes)] = sizes
            frequency[index, 128 - len(sizes) : 128] = sizes[::-1]
        else:
            frequency[index, 128 : 128 + len(sizes)] = sizes
            frequency[index, 129 - len(sizes) : 129] = sizes[::-1]
    ends = np.cumsum(frequency, axis=1, dtype=np.int64)
    return frequency, (ends - frequency).astype(np.uint16)


def _slots(data: bytes, n_buckets: int, kinds: int) -> np.ndarray:
    """What every slot of every table stands for, as the C source has it: uint32 (n_tables, `_SLOTS`)."""
    tables = _read_tables(data, n_buckets, kinds)
    slots = np.empty((len(tables), _SLOTS), np.uint32)
    # a table that no number needs: zeros for ever
    slots[:] = (_SLOTS - 1) << _BITS | np.arange(_SLOTS, dtype=np.uint32)
    for index, (counts, start) in enumerate(zip(*_frequencies(tables, kinds), strict=True)):
        if counts.any():
            number = np.repeat(np.arange(-128, 128), counts)
            within = np.arange(_SLOTS) - start[number + 128]
            word = (number & 255).astype(np.uint32) << 24 | (counts[number + 128].astype(np.uint32) - 1) << _BITS
            slots[index] = word | within.astype(np.uint32)
    return slots


def _rows_a_stream(columns: int) -> int:
    return min(max(1, -(-_STREAM // (_LANES * columns))) * _LANES, (1 << 16) - _LANES)


def _check_path(code: Code, numbers: np.ndarray) -> None:
    state = np.zeros(len(numbers), np.int32)
    for column in numbers.T:
        if ((column ^ state) & 1).any():
            raise ValueError("numbers do not follow the trellis")
        state = code.follow(state, column >> 1)


# --- streams ----------------------------------------------------------------------------------------------------------


class _Matrix:
    """A stored matrix that is to be decoded.

    `out` (d_out, k) are its numbers times steps, float32, or bfloat16 as uint16. Of int8 they are the last bits of the
    numbers alone, and `larger` (n, 3) are row, column and number of those that are more, as far as there is `room`;
    `n_larger` counts all. `fault` is what was found wrong in decoding, where `checked` says that the checksum counts,
    too.
    """

    def __init__(
        self, codec: Entropy, found: _Parsed, dtype: type, *, checked: bool = False, room: int = _FEW_LARGER
    ) -> None:
        self.codec, self.found, self.checked = codec, found, checked
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
            return _decoded(_Matrix(self.codec, self.found, np.int8, room=self.n_larger)).in_torch()
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


def _decoded(matrix: _Matrix) -> _Matrix:
    """The same, decoded.

    Raises
    ------
    DamagedStreamError
        If a stream is not what encoding gives.
    """
    batch = _batch([matrix])
    batch.run()
    batch.tell()
    if matrix.fault:
        raise DamagedStreamError(matrix.fault)
    return matrix


def _batch(matrices: list[_Matrix]) -> _Batch | _CompiledBatch:
    coder = _coder()
    return _Batch(matrices) if coder is None else _CompiledBatch(coder, matrices)


class _Batch:
    """Matrices to decode, with NumPy. Any number of threads may `run`, each taking the next, until none is left."""

    def __init__(self, matrices: list[_Matrix]) -> None:
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


def _decode_with_numpy(matrix: _Matrix) -> None:
    codec, found = matrix.codec, matrix.found
    if matrix.checked and not _has_its_checksum(found.data):
        raise DamagedStreamError(_NO_CHECKSUM)
    slots = _slots(found.tables.tobytes(), found.contexts.n_buckets, codec.n_kinds)
    for index, (start, end) in enumerate(itertools.pairwise(found.edges)):
        begin = index * found.per_stream
        rows = min(found.per_stream, found.rows - begin)
        _decode_stream(matrix, slots, found.data[start:end], begin, rows)


def _decode_stream(matrix: _Matrix, slots: np.ndarray, stream: np.ndarray, begin: int, rows: int) -> None:
    codec, found, out = matrix.codec, matrix.found, matrix.out
    stream = stream.copy()  # from an even address
    states = stream[: 4 * _LANES].view("<u4").astype(np.int64)
    words = stream[4 * _LANES :].view("<u2").astype(np.int64)
    code, kinds = codec.code, codec.n_kinds
    first, n_buckets, levels, extra = found.contexts
    bucket = _buckets(levels, first, n_buckets, found.rows, found.columns)[begin : begin + rows]
    left = iter(words.tolist())

    def refill(here: np.ndarray) -> None:
        for lane in np.nonzero(here < _LOWEST)[0]:
            word = next(left, None)
            if word is None:
                raise DamagedStreamError("has a stream that is too short")
            here[lane] = here[lane] << 16 | word

    for group in range(0, rows, _LANES):
        lanes = min(_LANES, rows - group)
        here, state = states[:lanes], np.zeros(lanes, np.int64)
        step = found.steps[begin + group : begin + group + lanes]
        wide = extra[begin + group : begin + group + lanes].astype(np.int64)
        for j in range(found.columns):
            odd = state & 1
            entry = slots[kinds * bucket[group : group + lanes, j] + odd, here & (_SLOTS - 1)].astype(np.int64)
            here[:] = ((entry >> _BITS & (_SLOTS - 1)) + 1) * (here >> _BITS) + (entry & (_SLOTS - 1))
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
    if next(left, None) is not None or (states != _LOWEST).any():
        raise DamagedStreamError(_NO_END)


def _upper(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _encode_with_numpy(
    codec: Entropy,
    contexts: _Levels,
    frequency: np.ndarray,
    start: np.ndarray,
    numbers: np.ndarray,
    rest: np.ndarray,
    begin: int,
    rows: int,
) -> bytes:
    bucket = _buckets(contexts.levels, contexts.first, contexts.n_buckets, *numbers.shape)
    states = np.full(_LANES, _LOWEST, np.int64)
    words: list[int] = []  # from the last to the first
    for group in reversed(range(0, rows, _LANES)):
        lanes = slice(begin + group, begin + min(group + _LANES, rows))
        here = states[: lanes.stop - lanes.start]
        table = codec.n_kinds * bucket[lanes] + (rest[lanes] & 1)
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
                here[lane] = (state // count << _BITS) + state % count + int(below[lane, j])
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


def _contexts(codec: Entropy, found: _Levels) -> _Contexts:
    address, rows = found.levels.ctypes.data, len(found.wide)
    sizes = (len(found.levels) - rows, found.first, found.n_buckets, codec.n_kinds)
    checks = (0, 0) if codec.code is None else (codec.code.lower, codec.code.upper)
    return _Contexts(*sizes, *checks, address, address + rows, found.wide.ctypes.data)


class _CompiledBatch:
    """As `_Batch`, with the compiled coder: all of a thread's matrices are one call."""

    def __init__(self, coder: _Coder, matrices: list[_Matrix]) -> None:
        self._coder, self._matrices = coder, matrices
        self._stored = (_Stored * len(matrices))(*map(self._as_stored, matrices))
        self._begun = ctypes.c_int64()
        self._n_tables = max((m.found.contexts.n_buckets * m.codec.n_kinds for m in matrices), default=0)

    @staticmethod
    def _as_stored(matrix: _Matrix) -> _Stored:
        found = matrix.found
        return _Stored(
            _contexts(matrix.codec, found.contexts),
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
            matrix.fault, matrix.n_larger = _FAULTS[stored.fault], stored.n_larger


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
        slots = self._room(n_tables * _SLOTS)
        self._decode(stored, len(stored), ctypes.byref(begun), slots.ctypes.data)

    def encode(
        self,
        codec: Entropy,
        contexts: _Levels,
        frequency: np.ndarray,
        start: np.ndarray,
        numbers: np.ndarray,
        rest: np.ndarray,
        begin: int,
        rows: int,
    ) -> bytes:
        # no number takes more than a frequency's bits and those of a wide row: two words
        room = np.empty(4 * _LANES + 4 + 4 * rows * numbers.shape[1], np.uint8)
        addressed = _contexts(codec, contexts)
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
    from .cospadi_cpu import chosen_kernels

    choice = chosen_kernels()
    return None if choice == "torch" else _compiled(choice)


@functools.cache
def _compiled(choice: str) -> _Coder | None:
    import subprocess
    import sys

    from .cospadi_cpu import library

    if sys.byteorder != "little":
        return None
    try:
        return _Coder(library(SOURCE, choice))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("entropy-coded matrices: NumPy, which is much slower, because no C compiler works (%s)", error)
        return None
