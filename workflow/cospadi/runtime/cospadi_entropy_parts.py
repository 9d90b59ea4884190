"""What lies beside the numbers of an entropy-coded matrix, and where: header, steps, levels, tables; docs/format.md."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Numbers that are coded at a time, each with a state of its own; of a state: its lowest value between two numbers, and
# the bits of a frequency
LANES, LOWEST, BITS = 8, 1 << 16, 12
SLOTS = 1 << BITS
# Numbers to either side that a table has, halved for the trellis; bits that those of a wide row have besides, at most
IN_TABLE, _WIDEST = 127, 12
# The largest number that can be stored, halved for the trellis
MOST = IN_TABLE << _WIDEST
# Steps: so many to an octave, the tenth of a bit exact; a byte has 16 octaves of them
OCTAVE = 16
_MANTISSAS = np.array([round(2 ** (i / OCTAVE) * 512) / 512 for i in range(OCTAVE)], np.float64)
_STEPS = np.ldexp(np.tile(_MANTISSAS, 256 // OCTAVE), np.repeat(np.arange(256 // OCTAVE), OCTAVE))
# Numbers a stream has, about; streams are decoded by several threads
_STREAM = 1 << 16
# A table for fewer numbers costs more than it saves
_FEWEST = 1000
_HEADER = struct.Struct("<IIIHhBBHI")
_SIZE = struct.Struct("<I")
# Levels are written in multiples of this, of 8 that a bucket has: finer ones would take more bytes than they save
_FINEST = 4
# What deflated bytes can be at most, of each
_MOST_INFLATED = 1032
_WIDE = np.dtype([("row", "<u4"), ("bits", "u1")])

_FAULTS_OF_TABLES = (
    "has a table whose frequencies do not make a whole",
    "has tables that are cut short",
    "has bytes behind its tables",
)
_NO_HEADER = "is cut short, or its header is wrong"
NO_END = "has a stream that does not end where it should"
NO_CHECKSUM = "is damaged: its checksum is another"
# by the numbers that the source gives them
FAULTS = (None, *_FAULTS_OF_TABLES, NO_END, NO_CHECKSUM)


class DamagedStreamError(ValueError):
    """A stream is not what encoding gives."""


class Levels(NamedTuple):
    """What says which table a number has: first bucket, buckets, levels (k + d_out,); bits of wide rows (k,)."""

    first: int
    n_buckets: int
    levels: np.ndarray
    wide: np.ndarray

    def buckets(self) -> np.ndarray:
        """Bucket of every code, (k, d_out)."""
        rows, columns = np.split(self.levels.astype(np.int16), [len(self.wide)])
        return np.clip((rows[:, None] + columns >> 3) - self.first, 0, self.n_buckets - 1)


@dataclass(frozen=True)
class Parsed:
    """A stored matrix in its parts, which fit together."""

    rows: int
    columns: int
    per_stream: int
    steps: np.ndarray
    contexts: Levels
    tables: np.ndarray  # as bytes
    edges: np.ndarray  # of the streams: where each begins in `data`, and the last ends
    data: np.ndarray


def as_bytes(contexts: Levels, steps: np.ndarray, tables: Sequence[list[int]], streams: Sequence[bytes]) -> np.ndarray:
    """The parts of a matrix in one, as `parsed` reads them, bytes.

    Raises
    ------
    ValueError
        If `steps` are none that `steps_near` gives.
    """
    wide, rows = contexts.wide, len(steps)
    columns = len(contexts.levels) - rows
    exponent, of_steps = _step_bytes(steps)
    table_bytes = b"".join(map(_table_bytes, tables))
    exceptions = np.zeros(int(np.count_nonzero(wide)), _WIDE)
    exceptions["row"], exceptions["bits"] = np.nonzero(wide)[0], wide[wide > 0]
    sizes = (contexts.first, contexts.n_buckets, len(exceptions), len(table_bytes))
    beside = of_steps + contexts.levels.tobytes() + exceptions.tobytes() + table_bytes
    deflated = _deflated(beside)
    is_smaller = _SIZE.size + len(deflated) < len(beside)
    body = _HEADER.pack(0, rows, columns, rows_a_stream(columns) | is_smaller, exponent, *sizes)[4:]
    body += _SIZE.pack(len(deflated)) + deflated if is_smaller else beside
    body += np.array([len(stream) for stream in streams], "<u4").tobytes() + b"".join(streams)
    return np.frombuffer(struct.pack("<I", zlib.crc32(body)) + body, np.uint8)


def parsed(data: np.ndarray) -> Parsed:
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
    if not (rows and columns and per_stream and 0 < n_buckets <= n_table) or per_stream % LANES:
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
    if edges[-1] != len(data) or (sizes < 4 * LANES).any() or (sizes % 2).any():
        raise ValueError("has streams of other sizes than it says")
    if not -100 <= exponent <= 100:
        raise ValueError("has steps that no weight needs")
    contexts = Levels(first, n_buckets, levels, wide)
    return Parsed(rows, columns, per_stream, _steps(exponent, step_bytes), contexts, tables, edges, data)


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


def of_shape(data: np.ndarray, shape: tuple[int, int]) -> Parsed:
    """`parsed` of codes (k, d_out)."""
    found = parsed(data)
    if (found.rows, found.columns) != shape:
        raise ValueError(f"holds codes of shape ({found.rows}, {found.columns}), expected {shape}")
    return found


def fault_in(data: np.ndarray, shape: tuple[int, int]) -> str | None:
    """What is wrong with the parts of codes (k, d_out); tables and streams are looked at in decoding."""
    if len(data) >= _HEADER.size and not has_its_checksum(data):
        return NO_CHECKSUM
    try:
        of_shape(data, shape)
    except ValueError as error:
        return str(error)
    return None


def has_its_checksum(data: np.ndarray) -> bool:
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


def levels_of(codes: np.ndarray, steps: np.ndarray, wide: np.ndarray) -> Levels:
    """Levels: the logarithm of each row's scale over its step, and of each column's; and which buckets they need.

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
    return Levels(first, max(1, last - first + 1), stored, wide)


def count_tables(contexts: Levels, numbers: np.ndarray, odd: np.ndarray, kinds: int) -> list[list[int]]:
    """Frequencies of every table by size, symmetric: of 0, 1 ... numbers; where they are odd, of 1, 3 ..."""
    counts = np.zeros(256 * kinds * contexts.n_buckets, np.int64)
    for row, number, is_odd in zip(contexts.buckets(), numbers, odd, strict=True):
        sizes = np.where(is_odd, np.where(number < 0, ~number, number), np.abs(number.astype(np.int16)))
        counts += np.bincount((kinds * row + is_odd).astype(np.int64) * 256 + sizes, minlength=len(counts))
    counts = counts.reshape(-1, 256)
    return [_normalised(count, table % kinds == 1) for table, count in enumerate(counts)]


def _normalised(counts: np.ndarray, odd: bool) -> list[int]:
    """Frequencies in the proportion of counts; those of 0 once and of the others twice make `SLOTS`."""
    total = int(counts.sum())
    if total == 0:
        return []
    counts = counts[: int(np.nonzero(counts)[0][-1]) + 1]
    weights = np.full(len(counts), 2)
    if not odd:
        weights[0] = 1
    found = np.where(counts > 0, np.maximum(1, np.rint(counts * (SLOTS / total) / weights)), 0).astype(np.int64)
    if not odd:
        found[0] += found[0] & 1  # the others come in pairs
    while (excess := int((weights * found).sum()) - SLOTS) != 0:
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
            if n > IN_TABLE + 1 or (n and total != SLOTS):
                raise DamagedStreamError(not_whole)
            tables.append(found)
    except IndexError:
        raise DamagedStreamError(too_short) from None
    if at != len(data):
        raise DamagedStreamError(too_long)
    return tables


def frequencies(tables: list[list[int]], kinds: int) -> tuple[np.ndarray, np.ndarray]:
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


def slots_of(data: bytes, n_buckets: int, kinds: int) -> np.ndarray:
    """What every slot of every table stands for, as the C source has it: uint32 (n_tables, `SLOTS`)."""
    tables = _read_tables(data, n_buckets, kinds)
    slots = np.empty((len(tables), SLOTS), np.uint32)
    # a table that no number needs: zeros for ever
    slots[:] = (SLOTS - 1) << BITS | np.arange(SLOTS, dtype=np.uint32)
    for index, (counts, start) in enumerate(zip(*frequencies(tables, kinds), strict=True)):
        if counts.any():
            number = np.repeat(np.arange(-128, 128), counts)
            within = np.arange(SLOTS) - start[number + 128]
            word = (number & 255).astype(np.uint32) << 24 | (counts[number + 128].astype(np.uint32) - 1) << BITS
            slots[index] = word | within.astype(np.uint32)
    return slots


def rows_a_stream(columns: int) -> int:
    return min(max(1, -(-_STREAM // (LANES * columns))) * LANES, (1 << 16) - LANES)
