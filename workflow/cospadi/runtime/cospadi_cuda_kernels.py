"""The Triton kernels of `cospadi_cuda`: ``y = (x D) S`` for a few rows of x, and S unpacked for many.

Everything is summed in float32, in an order that the sizes alone decide: equal calls give equal bits. Atoms come in
*chunks* of 256: a lane of a warp takes one byte of the support, eight atoms. Between the two launches of a product z is
in the *lanes' order*: by chunk, then bit of the byte, then byte, so that neighbouring lanes read neighbouring numbers.
A trellis has no support: its kernels take eight columns, which are whole bytes of every row, and z as it is.
"""

# ruff: noqa: RUF005 (Triton's language has no unpacking)
from __future__ import annotations

try:  # a loader that looks for imports skips those in `try`: this module is imported where Triton is there
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    raise ImportError(f"Triton is not installed, or too old ({error})") from error

from .cospadi_trellis import MIDDLE, MULTIPLIER, SLOPE

_BYTES = tl.constexpr(32)  # of the support, in a chunk
_BF16 = tl.constexpr("bf16")
_BF14 = tl.constexpr("bf14")
_INT4 = tl.constexpr("int4")

_MULTIPLIER = tl.constexpr(MULTIPLIER << 16)
_MIDDLE = tl.constexpr(MIDDLE)
_SLOPE = tl.constexpr(SLOPE)


@triton.jit
def _numbers(stored, index, mask, CODEC: tl.constexpr):
    """float32 numbers at `index` of a stored tensor, before scaling; 0 outside of `mask`."""
    if CODEC == _BF14:
        byte = (index >> 2) * 7 + (((index & 3) * 14) >> 3)
        shift = ((index & 3) * 14) & 7
        word = tl.load(stored + byte, mask=mask, other=0).to(tl.int32)
        word |= tl.load(stored + byte + 1, mask=mask, other=0).to(tl.int32) << 8
        word |= tl.load(stored + byte + 2, mask=mask & (shift > 2), other=0).to(tl.int32) << 16
        return (((word >> shift) & 0x3FFF) << 18).to(tl.float32, bitcast=True)
    elif CODEC == _INT4:
        byte = tl.load(stored + (index >> 1), mask=mask, other=0).to(tl.int32)
        return ((((byte >> ((index & 1) * 4)) & 15) ^ 8) - 8).to(tl.float32)
    else:
        return tl.load(stored + index, mask=mask, other=0).to(tl.float32)


@triton.jit
def _bits_set(byte):
    """How many bits of an int32 below 256 are set; written as the compiler knows a popcount."""
    n = byte.to(tl.uint32)
    n = n - ((n >> 1) & 0x55555555)
    n = (n & 0x33333333) + ((n >> 2) & 0x33333333)
    return ((((n + (n >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _prefetch(start, nbytes):
    """Ask for bytes to be brought into the L2 cache; the first thread does. Up to 15 bytes at the ends are left out."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; setp.ne.and.u32 p, $2, 0, p; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [(start + 15) & -16, nbytes & -16],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def _spread_source() -> str:
    """PTX that spreads bfloat16 values over the eight atoms of a byte by its bits.

    $8 is the address of the values, $9 the number of the first, $10 the byte.
    """
    lines = [".reg .pred p<8>; .reg .b64 a<8>; .reg .b32 r, t<8>; .reg .b16 h<8>, z; mov.b16 z, 0; shl.b32 r, $9, 1;"]
    for i in range(8):
        lines += [
            f"and.b32 t{i}, $10, {1 << i}; setp.ne.u32 p{i}, t{i}, 0; cvt.u64.u32 a{i}, r; add.s64 a{i}, a{i}, $8;",
            f"mov.b16 h{i}, 0; @p{i} ld.global.nc.b16 h{i}, [a{i}]; @p{i} add.u32 r, r, 2;",
        ]
    return "{ " + " ".join([*lines, *(f"mov.b32 ${i}, {{z, h{i}}};" for i in range(8))]) + " }"


_SPREAD = tl.constexpr(_spread_source())
_EIGHT = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,l,r,r")


@triton.jit
def _spread(values, rank, byte):
    """Codes of the eight atoms of every byte, bfloat16 ones without scales: half the instructions of `_stored`."""
    words = tl.inline_asm_elementwise(
        _SPREAD,
        _EIGHT,
        [values.to(tl.int64), rank, byte],
        # one by one: Triton 3.9 takes the elements of a product for numbers
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    codes = ()
    for atom in tl.static_range(8):
        codes = codes + (words[atom].to(tl.float32, bitcast=True),)
    return codes


@triton.jit(do_not_specialize=["n_out", "group", "part_size", "scale_row_stride", "scale_group_stride"])
def row_products(
    x,  # (n_rows, n_in)
    matrix,
    scales,
    out,  # (parts, n_rows, out_stride)
    n_in,
    n_out,
    x_stride,
    out_stride,
    row_stride,  # of `matrix`, from one output to the next
    in_stride,
    group,
    scale_row_stride,
    scale_group_stride,
    part_size,  # inputs a part sums
    ROWS: tl.constexpr,
    CODEC: tl.constexpr,
    SCALED: tl.constexpr,
    LANES: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """``out[j] = sum_i x[i] matrix[i, j]``; LANES: `out` is in the lanes' order, and its padding zero."""
    out_at = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(1) * part_size
    last = tl.minimum(first + part_size, n_in)
    if EARLY:  # the launch that follows may begin to read what does not depend on this one
        gdc_launch_dependents()
        gdc_wait()
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32),)
    for start in range(first, last, BLOCK_IN):
        at = start + tl.arange(0, BLOCK_IN)
        inside = (out_at < n_out)[:, None] & (at < last)[None, :]
        numbers = _numbers(matrix, out_at[:, None] * row_stride + at[None, :] * in_stride, inside, CODEC)
        if SCALED:
            scale_at = out_at[:, None] * scale_row_stride + (at // group)[None, :] * scale_group_stride
            numbers *= tl.load(scales + scale_at, mask=inside, other=0).to(tl.float32)
        sums = ()
        for row in tl.static_range(ROWS):
            some = tl.load(x + row * x_stride + at, mask=at < last, other=0).to(tl.float32)
            sums = sums + (totals[row] + some[None, :] * numbers,)
        totals = sums
    if LANES:
        to = (out_at // 256) * 256 + (out_at % 8) * _BYTES + (out_at % 256) // 8
        kept = to < out_stride
    else:
        to = out_at
        kept = out_at < n_out
    for row in tl.static_range(ROWS):
        here = out + (tl.program_id(1) * ROWS + row) * out_stride
        tl.store(here + to, tl.sum(totals[row], 1), mask=kept)


# Tiles of the support are (bytes, columns), so that the lanes of a warp lie along a column


@triton.jit
def _stored(values, scales, scale_start, start, rank, mask, CODEC: tl.constexpr, SCALED: tl.constexpr, group):
    """Stored codes by their number `rank` among all; 0 outside of `mask`."""
    number = _numbers(values, rank, mask, CODEC)
    if SCALED:
        scale_at = scale_start[None, :] + (rank - start[None, :]) // group
        number *= tl.load(scales + scale_at, mask=mask, other=0).to(tl.float32)
    return number


@triton.jit
def _expanded(
    values, scales, scale_start, start, rank, byte, CODEC: tl.constexpr, SCALED: tl.constexpr, group, ASM: tl.constexpr
):
    """Codes of the eight atoms of every byte; `rank` is the number among all stored codes of its first."""
    if ASM and CODEC == _BF16:
        return _spread(values, rank, byte)
    else:
        codes = ()
        for atom in tl.static_range(8):
            bit = (byte >> atom) & 1
            codes = codes + (_stored(values, scales, scale_start, start, rank, bit != 0, CODEC, SCALED, group),)
            rank += bit
        return codes


@triton.jit
def _first_rank(byte, offsets, column, real, chunk, n_chunks):
    """Number among all stored codes of the first one of every byte."""
    before = tl.load(offsets + column * n_chunks + chunk, mask=real, other=0)
    count = _bits_set(byte)
    return before[None, :] + tl.cumsum(count, 0) - count


@triton.jit
def _add(totals, z, chunk, z_stride, k, number, ATOM: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Totals of all rows, with the codes of atom ATOM of every byte of a chunk added."""
    lane = tl.arange(0, _BYTES)
    sums = ()
    for row in tl.static_range(ROWS):
        if LANES:
            some = tl.load(z + row * z_stride + chunk * 256 + ATOM * _BYTES + lane)
        else:
            at = chunk * 256 + lane * 8 + ATOM
            some = tl.load(z + row * z_stride + at, mask=at < k, other=0).to(tl.float32)
        sums = sums + (totals[row] + some[:, None] * number,)
    return sums


@triton.jit
def _starts(offsets, scale_starts, column, real, k, n_chunks, SCALED: tl.constexpr, PAIRS: tl.constexpr):
    """Numbers among all stored codes, and among all scales, of the first of every column."""
    start = column * (k // 2) if PAIRS else tl.load(offsets + column * n_chunks, mask=real, other=0)
    scale_start = start
    if SCALED:
        scale_start = tl.load(scale_starts + column, mask=real, other=0)
    return start, scale_start


@triton.jit
def _joined(eight):
    """Eight tensors as one with three more axes of two: the bits of each one's number, the lowest last."""
    even = tl.join(tl.join(eight[0], eight[4]), tl.join(eight[2], eight[6]))
    odd = tl.join(tl.join(eight[1], eight[5]), tl.join(eight[3], eight[7]))
    return tl.join(even, odd)


@triton.jit
def _placed(first, second, a, b, PLACE: tl.constexpr):
    """Code at a place among four, of which two are stored."""
    return tl.where((first & 3) == PLACE, a, tl.where((second & 3) == PLACE, b, 0.0))


@triton.jit
def _expanded_pairs(
    values, scales, scale_start, start, at, inside, k, byte, CODEC: tl.constexpr, SCALED: tl.constexpr, group
):
    """Codes of the eight atoms of every byte `at` of a 2:4 support; the last byte of a column may have four."""
    rank = start[None, :] + at[:, None] * 4
    other = inside & (at * 8 + 4 < k)[:, None]
    a = _stored(values, scales, scale_start, start, rank, inside, CODEC, SCALED, group)
    b = _stored(values, scales, scale_start, start, rank + 1, inside, CODEC, SCALED, group)
    c = _stored(values, scales, scale_start, start, rank + 2, other, CODEC, SCALED, group)
    d = _stored(values, scales, scale_start, start, rank + 3, other, CODEC, SCALED, group)
    codes = ()
    for atom in tl.static_range(4):
        codes = codes + (_placed(byte, byte >> 2, a, b, atom),)
    for atom in tl.static_range(4):
        codes = codes + (_placed(byte >> 4, byte >> 6, c, d, atom),)
    return codes


@triton.jit(do_not_specialize=["d_out", "k", "row_bytes", "n_chunks", "n_values", "group"])
def code_products(
    z,  # (n_rows, z_stride)
    values,
    scales,
    support,
    offsets,  # (d_out, n_chunks): first value of every chunk
    scale_starts,
    out,  # (n_rows, d_out)
    d_out,
    k,
    row_bytes,
    n_chunks,
    n_values,
    z_stride,
    group,
    ROWS: tl.constexpr,
    CODEC: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRS: tl.constexpr,
    ASM: tl.constexpr,
    LANES: tl.constexpr,
    EARLY: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``y = z S`` from the packed form; PAIRS: the support is 2:4, otherwise a bitmask."""
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    real = column < d_out
    lane = tl.arange(0, _BYTES)
    if EARLY:
        gdc_launch_dependents()
        here = tl.program_id(0) * BLOCK_OUT
        beyond = tl.minimum(here + BLOCK_OUT, d_out)
        if PAIRS:
            begin = here * (k // 2)
            end = beyond * (k // 2)
        else:
            begin = tl.load(offsets + here * n_chunks)
            end = tl.load(offsets + beyond * n_chunks, mask=beyond < d_out, other=n_values)
        begin = (begin // 16) * (2 * VALUE_BITS)
        end = (end // 16) * (2 * VALUE_BITS)
        _prefetch(values.to(tl.int64) + begin, tl.maximum(end - begin - 16, 0))
        _prefetch(support.to(tl.int64) + here * row_bytes, tl.maximum((beyond - here) * row_bytes - 16, 0))
    start, scale_start = _starts(offsets, scale_starts, column, real, k, n_chunks, SCALED, PAIRS)
    if EARLY:
        gdc_wait()
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros([_BYTES, BLOCK_OUT], tl.float32),)
    for chunk in tl.range(0, n_chunks, loop_unroll_factor=UNROLL):
        at = chunk * _BYTES + lane
        inside = (at < row_bytes)[:, None] & real[None, :]
        byte = tl.load(support + column[None, :] * row_bytes + at[:, None], mask=inside, other=0).to(tl.int32)
        if PAIRS:
            codes = _expanded_pairs(values, scales, scale_start, start, at, inside, k, byte, CODEC, SCALED, group)
        else:
            rank = _first_rank(byte, offsets, column, real, chunk, n_chunks)
            codes = _expanded(values, scales, scale_start, start, rank, byte, CODEC, SCALED, group, ASM)
        for atom in tl.static_range(8):
            totals = _add(totals, z, chunk, z_stride, k, codes[atom], atom, ROWS, LANES)
    for row in tl.static_range(ROWS):
        tl.store(out + row * d_out + column, tl.sum(totals[row], 0), mask=real)


@triton.jit(do_not_specialize=["d_out", "k", "row_bytes", "n_chunks", "group"])
def unpack_codes(
    values,
    scales,
    support,
    offsets,
    scale_starts,
    out,  # (d_out, out_stride), zero from k on
    d_out,
    k,
    row_bytes,
    n_chunks,
    out_stride,
    group,
    CODEC: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """S transposed with its zeros."""
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    chunk = tl.program_id(1)
    real = column < d_out
    at = chunk * _BYTES + tl.arange(0, _BYTES)
    inside = (at < row_bytes)[:, None] & real[None, :]
    byte = tl.load(support + column[None, :] * row_bytes + at[:, None], mask=inside, other=0).to(tl.int32)
    start, scale_start = _starts(offsets, scale_starts, column, real, k, n_chunks, SCALED, PAIRS)
    if PAIRS:
        codes = _expanded_pairs(values, scales, scale_start, start, at, inside, k, byte, CODEC, SCALED, group)
    else:
        rank = _first_rank(byte, offsets, column, real, chunk, n_chunks)
        codes = _expanded(values, scales, scale_start, start, rank, byte, CODEC, SCALED, group, ASM)
    eight = tl.reshape(tl.permute(_joined(codes), (1, 0, 2, 3, 4)), [BLOCK_OUT, 256])
    to = chunk * 256 + tl.arange(0, 256)
    given = real[:, None] & (to < out_stride)[None, :]
    tl.store(out + column[:, None] * out_stride + to[None, :], eight.to(out.dtype.element_ty), mask=given)


@triton.jit
def _word(low, high, ASM: tl.constexpr):
    """Words of two bytes, int32; with ASM the upper half is the same once more."""
    if ASM:  # of four rows at once, by an instruction each
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $4, $5, 0x4040; prmt.b32 $1, $4, $5, 0x5151; "
            "prmt.b32 $2, $4, $5, 0x6262; prmt.b32 $3, $4, $5, 0x7373;",
            "=r,=r,=r,=r,r,r",
            [low, high],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    else:
        return low.to(tl.int32) | (high.to(tl.int32) << 8)


@triton.jit
def _words(stored, row, inside, byte, k, row_bytes, BITS: tl.constexpr, RAGGED: tl.constexpr, ASM: tl.constexpr):
    """Words that begin at each byte of rows of a trellis: at those of eight columns, which begin at `byte`, and the two
    before them, but the last.

    32 rows lie side by side; RAGGED: the last ones may be fewer. What is not there is 0.
    """
    group = row // 32
    step = 32
    if RAGGED:
        step = tl.minimum(k - group * 32, 32)
    here = stored + group * 32 * row_bytes + row % 32 + byte * step
    place = tl.zeros_like(row) + byte  # Triton's interpreter takes no scalars for masks
    planes = ()
    for at in tl.static_range(-2, BITS):
        known = inside & (place + at >= 0) & (place + at < row_bytes)
        planes = planes + (tl.load(here + at * step, mask=known, other=0),)
    words = ()
    for at in tl.static_range(BITS + 1):
        words = words + (_word(planes[at], planes[at + 1], ASM),)
    return words


@triton.jit
def _values(words, BITS: tl.constexpr, COLUMN: tl.constexpr):
    """Values of one of eight columns, float32 whole numbers: `value_of` of `cospadi_trellis`.

    `words` are those of two bytes that begin at each plane. What is added before a shift there is added together with
    what is added after it.
    """
    first: tl.constexpr = 16 + BITS * (COLUMN + 1) - 12  # bit of the planes at which the state begins
    bit: tl.constexpr = first % 8
    word = words[first // 8]
    if bit > 4:
        word = (word & 0xFF) | (words[first // 8 + 1] << 8)
    if bit > 0:
        word = word & (0xFFF << bit)
    # what is above the state leaves by the multiplication, which has it in the upper 12 bits
    flat = (word * (_MULTIPLIER >> bit)) >> 16
    bend = (flat * flat - (_MIDDLE << 16)) >> 16
    bend = (bend * bend + (0x4000 + (_SLOPE << 15))) >> 15
    value = flat * bend + (0x4000 + (16384 << 15))  # above 0, and its bits from 15 on are the last ones of a float32
    return ((value.to(tl.uint32) >> 15) + 0x4B000000).to(tl.float32, bitcast=True) - (8388608 + 16384)


@triton.jit(do_not_specialize=["d_out", "row_bytes"])
def trellis_products(
    z,  # (n_rows, z_stride)
    stored,
    scales,  # of the k rows, and then of the columns
    out,  # (n_rows, d_out)
    d_out,
    k,
    row_bytes,
    z_stride,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    RAGGED: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """``y = z S`` for S in a trellis: eight columns a program."""
    byte = tl.program_id(0) * BITS
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    totals = ()
    for _ in tl.static_range(8 * ROWS):
        totals = totals + (tl.zeros([BLOCK_IN], tl.float32),)
    for start in range(0, k, BLOCK_IN):
        row = start + tl.arange(0, BLOCK_IN)
        inside = row < k
        words = _words(stored, row, inside, byte, k, row_bytes, BITS, RAGGED, ASM)
        unit = tl.load(scales + row, mask=inside, other=0).to(tl.float32)
        inputs = ()
        for index in tl.static_range(ROWS):
            some = tl.load(z + index * z_stride + row, mask=inside, other=0).to(tl.float32)
            inputs = inputs + (some * unit,)
        sums = ()
        for column in tl.static_range(8):
            values = _values(words, BITS, column)
            for index in tl.static_range(ROWS):
                sums = sums + (totals[column * ROWS + index] + inputs[index] * values,)
        totals = sums
    to = tl.program_id(0) * 8 + tl.arange(0, 8)
    real = to < d_out
    unit = tl.load(scales + k + to, mask=real, other=0).to(tl.float32)
    for index in tl.static_range(ROWS):
        eight = ()
        for column in tl.static_range(8):
            eight = eight + (totals[column * ROWS + index],)
        total = tl.sum(tl.reshape(_joined(eight), [BLOCK_IN, 8]), 0)
        tl.store(out + index * d_out + to, total * unit, mask=real)


@triton.jit(do_not_specialize=["d_out", "row_bytes"])
def unpack_trellis(
    stored,
    scales,
    out,  # (d_out, out_stride), zero from k on
    d_out,
    k,
    row_bytes,
    out_stride,
    BITS: tl.constexpr,
    RAGGED: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """S transposed."""
    byte = tl.program_id(0) * BITS
    row = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    inside = row < k
    words = _words(stored, row, inside, byte, k, row_bytes, BITS, RAGGED, ASM)
    unit = tl.load(scales + row, mask=inside, other=0).to(tl.float32)
    for column in tl.static_range(8):
        to = tl.program_id(0) * 8 + column
        number = _values(words, BITS, column) * unit
        number *= tl.load(scales + k + to, mask=to < d_out, other=0).to(tl.float32)
        given = (row < out_stride) & (tl.zeros_like(row) + to < d_out)
        tl.store(out + to * out_stride + row, number.to(out.dtype.element_ty), mask=given)
