"""Compiled CPU kernels (numba). Every column is worked on by one thread alone, so results do not depend on threads.

Arrays are C-contiguous and hold signals and codes as rows. ``reassoc`` and ``contract`` let sums run in vector
registers; NaN and infinity keep their meaning.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_FAST = {"reassoc", "contract"}

# Atoms whose rows are prepared together, and how many such panels are kept.
_PANEL = 4
_PANELS_KEPT = 4
# Vectors a block of the panel product is wide: its 12 sums, 3 strips of the factor and a weight fill 16 registers.
_VECTORS = 3
_CACHE_LINE = 64


def vector_bytes(features: str) -> int:
    """Bytes of a vector register, by LLVM's list of a processor's features.

    Sums wider than a register are split, do not fit into the registers, and go through memory at every step.
    """
    has = set(features.split(","))
    return next((size for feature, size in (("+avx512f", 64), ("+avx", 32)) if feature in has), 16)


# The features numba compiles for: they are in the keys of its cache too.
_VECTOR_BYTES = vector_bytes(cpu_target.target_context.codegen().magic_tuple()[2])


@intrinsic(prefer_literal=True)
def _subtract_product(typingctx, out, factor, position, stride, weights, n_rows, width):
    """``out.flat[at + r * stride] -= sum_j weights[j, r] * factor.flat[at + j * stride]`` for every row r of a panel.

    `at` runs over one block of columns from `position`, `_VECTORS` vectors of `width` bytes (a constant). Written in
    LLVM's own vectors because LLVM cannot prove that `out` and `factor` do not overlap, and would store and load the
    12 sums at every j; here they stay in registers for the whole loop, which is 2.7 times as fast as the best plain
    loop (AMD EPYC Milan, AVX2).
    """
    element = out.dtype
    signature = types.void(out, factor, types.intp, types.intp, weights, types.intp, width)

    def codegen(context, builder, signature, arguments):
        pointers = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args, arguments, strict=True)
            if isinstance(kind, types.Array)
        ]
        out_data, factor_data, weight_data = pointers
        _, _, position, stride, _, n_rows, _ = arguments
        scalar = context.get_value_type(element)
        bytes_aligned = element.bitwidth // 8
        lanes = width.literal_value // bytes_aligned
        vector = ir.VectorType(scalar, lanes)

        def vector_at(data, index):
            return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

        sums = [
            cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * lanes)) for _ in range(_PANEL * _VECTORS)
        ]
        for pointer in sums:
            builder.store(ir.Constant(vector, [0.0] * lanes), pointer)
        with cgutils.for_range(builder, n_rows) as loop:
            start = builder.add(position, builder.mul(loop.index, stride))
            strips = [
                builder.load(vector_at(factor_data, builder.add(start, stride.type(v * lanes))), align=bytes_aligned)
                for v in range(_VECTORS)
            ]
            first = builder.mul(loop.index, stride.type(_PANEL))
            for r in range(_PANEL):
                weight = builder.load(builder.gep(weight_data, [builder.add(first, stride.type(r))]))
                lane = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, ir.IntType(32)(0))
                broadcast = builder.shuffle_vector(
                    lane, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
                )
                for v in range(_VECTORS):
                    pointer = sums[r * _VECTORS + v]
                    product = builder.fmul(broadcast, strips[v], flags=("contract",))
                    builder.store(builder.fadd(builder.load(pointer), product, flags=("contract",)), pointer)
        for r in range(_PANEL):
            row = builder.add(position, builder.mul(stride, stride.type(r)))
            for v in range(_VECTORS):
                place = vector_at(out_data, builder.add(row, stride.type(v * lanes)))
                before = builder.load(place, align=bytes_aligned)
                builder.store(builder.fsub(before, builder.load(sums[r * _VECTORS + v])), place, align=bytes_aligned)
        return context.get_dummy_value()

    return signature, codegen


@numba.njit(cache=True, nogil=True)
def _argmax_abs(bits):
    """Position of the number of largest magnitude, the first of several, from the bits of finite IEEE numbers.

    Without their sign the bits are ordered as the magnitudes are, and LLVM vectorises maxima of integers only.
    """
    kind = bits.dtype.type
    unsigned = kind(np.iinfo(bits.dtype).max)
    largest = kind(0)
    for c in range(bits.shape[0]):
        largest = max(largest, bits[c] & unsigned)
    place = unsigned
    for c in range(bits.shape[0]):
        here = kind(c) if bits[c] & unsigned == largest else unsigned
        place = min(place, here)
    return place


# Loops run over slices from 0 to their length: only then LLVM knows that no index is negative, and vectorises.
@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _subtract_rows(out, factor, weights, n_rows, start, stop):
    """``out -= weights[:n_rows] @ factor[:n_rows, start:stop]``, eight rows at a time."""
    j = 0
    while j + 8 <= n_rows:
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        w4, w5, w6, w7 = weights[j + 4], weights[j + 5], weights[j + 6], weights[j + 7]
        f0, f1 = factor[j, start:stop], factor[j + 1, start:stop]
        f2, f3 = factor[j + 2, start:stop], factor[j + 3, start:stop]
        f4, f5 = factor[j + 4, start:stop], factor[j + 5, start:stop]
        f6, f7 = factor[j + 6, start:stop], factor[j + 7, start:stop]
        for c in range(out.shape[0]):
            out[c] -= (w0 * f0[c] + w1 * f1[c] + w2 * f2[c] + w3 * f3[c]) + (
                w4 * f4[c] + w5 * f5[c] + w6 * f6[c] + w7 * f7[c]
            )
        j += 8
    while j < n_rows:
        w0 = weights[j]
        f0 = factor[j, start:stop]
        for c in range(out.shape[0]):
            out[c] -= w0 * f0[c]
        j += 1


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _prepare(panel, n_panel, rows, factor, gram, order, chosen, usable, weights):
    """Rows of the Gram for the atoms at the positions in `panel`, less what the atoms chosen so far explain of them.

    One pass over `factor` serves all atoms of the panel: that makes it bound by arithmetic and not by the cache.
    """
    width = factor.shape[1]
    block_width = _VECTORS * _VECTOR_BYTES // gram.itemsize
    left = order[chosen:usable]
    for r in range(n_panel):
        source, out = gram[order[panel[r]]], rows[r, chosen:usable]
        for c in range(out.shape[0]):
            out[c] = source[left[c]]
    p0, p1, p2, p3 = panel[0], panel[1], panel[2], panel[3]
    for j in range(chosen):
        source, line = factor[j], weights[j]
        line[0], line[1], line[2], line[3] = source[p0], source[p1], source[p2], source[p3]
    for begin in range(chosen - chosen % block_width, usable, block_width):
        _subtract_product(rows, factor, begin, width, weights, chosen, _VECTOR_BYTES)


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def omp(gram, correlations, integers, n_nonzero_coefs, first, n_first, codes, short, begin, end):
    """Orthogonal matching pursuit of columns ``begin:end``, by a pivoted Cholesky factorisation of the Gram.

    Chosen atoms are moved to the front. Row ``t`` of `factor` is the part of atom ``t`` that is orthogonal to the
    atoms chosen before, as seen by all atoms not chosen yet: it extends the Cholesky factor and updates the
    correlations of what is left. Rows are prepared four atoms at a time, the pick and the three next in line, because
    most of those are picked soon; a prepared row is brought up to date when its turn comes. That is
    about k^3 / 12 multiply-adds at s = k / 2.

    Parameters
    ----------
    gram : array (k, k)
    correlations : array (n, k)
        ``D^T y`` of every column.
    integers : array
        Any array of the signed integers as wide as the numbers of `gram`.
    n_nonzero_coefs : int
    first, n_first : int array (n, m), int array (n,)
        Atoms to choose before any other, by column, and how many of them (warm start).
    codes : array (n, k)
        Result, zero on entry.
    short : bool array (n,)
        Result: whether fewer atoms than asked for could be chosen in this precision.
    """
    n_atoms = gram.shape[0]
    eps = np.finfo(gram.dtype).eps
    block_width = _VECTORS * _VECTOR_BYTES // gram.itemsize
    # Whole blocks, in an odd number of cache lines: rows an even number apart, worst a power of two, share few sets.
    line = _CACHE_LINE // gram.itemsize
    width = (((n_atoms + block_width - 1) // block_width * block_width + line - 1) // line | 1) * line
    factor = np.zeros((n_nonzero_coefs, width), gram.dtype)
    prepared = np.zeros((_PANELS_KEPT * _PANEL, width), gram.dtype)
    panel_weights = np.zeros((n_nonzero_coefs, _PANEL), gram.dtype)
    panel = np.zeros(_PANEL, np.uint32)
    slot_of = np.full(n_atoms, -1, np.int64)
    atom_in = np.full(_PANELS_KEPT * _PANEL, -1, np.int64)
    n_applied = np.zeros(_PANELS_KEPT * _PANEL, np.int64)
    first_slot = 0
    saved = np.empty((_PANELS_KEPT + 1) * _PANEL, gram.dtype)
    position_of = np.empty(n_atoms, np.int64)
    alpha = np.empty(n_atoms, gram.dtype)
    alpha_bits = alpha.view(integers.dtype)
    weights = np.empty(n_nonzero_coefs, gram.dtype)
    projections = np.empty(n_nonzero_coefs, gram.dtype)
    values = np.empty(n_nonzero_coefs, gram.dtype)
    order = np.empty(n_atoms, np.uint32)  # unsigned: never a negative index, so LLVM can gather
    for column in range(begin, end):
        for c in range(n_atoms):
            alpha[c] = correlations[column, c]
            order[c] = c
            position_of[c] = c
        slot_of[:] = -1
        atom_in[:] = -1
        scale = abs(alpha[_argmax_abs(alpha_bits)])
        usable = n_atoms
        chosen = np.int64(0)  # a literal 0 would have every callee compiled for it too
        tried = 0
        while chosen < n_nonzero_coefs and chosen < usable:
            if tried < n_first[column]:
                pick = chosen
                while pick < usable and order[pick] != first[column, tried]:
                    pick += 1
                tried += 1
                if pick == usable:
                    continue
            else:
                pick = chosen + _argmax_abs(alpha_bits[chosen:usable])
                if not abs(alpha[pick]) > 32 * eps * scale:
                    break
            atom = order[pick]
            if slot_of[atom] < 0:
                n_panel = _next_in_line(alpha, alpha_bits, saved, position_of, atom_in, pick, chosen, usable, panel)
                first_slot = (first_slot + _PANEL) % (_PANELS_KEPT * _PANEL)
                rows = prepared[first_slot : first_slot + _PANEL]
                _prepare(panel, n_panel, rows, factor, gram, order, chosen, usable, panel_weights)
                for r in range(_PANEL):
                    slot = first_slot + r
                    if atom_in[slot] >= 0:
                        slot_of[atom_in[slot]] = -1
                    atom_in[slot] = -1
                    if r < n_panel:
                        atom_in[slot] = order[panel[r]]
                        slot_of[order[panel[r]]] = slot
                        n_applied[slot] = chosen
            slot = slot_of[atom]
            applied = n_applied[slot]
            row = prepared[slot, chosen:usable]
            for j in range(applied, chosen):
                weights[j - applied] = factor[j, pick]
            _subtract_rows(row, factor[applied:chosen], weights, chosen - applied, chosen, usable)
            slot_of[atom] = -1
            atom_in[slot] = -1
            remaining = row[pick - chosen]
            if not remaining > 64 * eps * gram[atom, atom]:
                # depends on the atoms chosen before: out of the race, at the end of the list
                usable -= 1
                _swap(factor, prepared, alpha, order, position_of, chosen, pick, usable)
                continue
            _swap(factor, prepared, alpha, order, position_of, chosen, pick, chosen)
            root = np.sqrt(remaining)
            step = alpha[chosen] / root
            projections[chosen] = step
            inverse = 1 / root
            source = prepared[slot, chosen + 1 : usable]
            out = factor[chosen, chosen + 1 : usable]
            alpha_left = alpha[chosen + 1 : usable]
            for c in range(out.shape[0]):
                value = source[c] * inverse
                out[c] = value
                alpha_left[c] -= step * value
            factor[chosen, chosen] = root
            chosen += 1
        _solve_upper(factor, projections, values, chosen)
        for i in range(chosen):
            codes[column, order[i]] = values[i]
        short[column] = chosen < n_nonzero_coefs


@numba.njit(cache=True, nogil=True)
def _next_in_line(alpha, alpha_bits, saved, position_of, atom_in, pick, chosen, usable, panel):
    """Fill `panel` with the pick and the unprepared atoms of next largest correlation; return how many there are.

    The correlations of prepared atoms are zero while this searches; they are `saved` and put back.
    """
    panel[0] = pick
    count = 1
    for slot in range(atom_in.shape[0]):
        if atom_in[slot] >= 0:
            place = position_of[atom_in[slot]]
            saved[slot] = alpha[place]
            alpha[place] = 0
    saved[atom_in.shape[0]] = alpha[pick]
    alpha[pick] = 0
    left = alpha_bits[chosen:usable]
    while count < _PANEL:
        place = chosen + _argmax_abs(left)
        if alpha[place] == 0:
            break
        panel[count] = place
        saved[atom_in.shape[0] + count] = alpha[place]
        alpha[place] = 0
        count += 1
    for r in range(count):
        alpha[panel[r]] = saved[atom_in.shape[0] + r]
    for slot in range(atom_in.shape[0]):
        if atom_in[slot] >= 0:
            alpha[position_of[atom_in[slot]]] = saved[slot]
    return count


@numba.njit(cache=True, nogil=True)
def _swap(factor, prepared, alpha, order, position_of, n_rows, a, b):
    for j in range(n_rows):
        factor[j, a], factor[j, b] = factor[j, b], factor[j, a]
    for j in range(prepared.shape[0]):
        prepared[j, a], prepared[j, b] = prepared[j, b], prepared[j, a]
    alpha[a], alpha[b] = alpha[b], alpha[a]
    order[a], order[b] = order[b], order[a]
    position_of[order[a]] = a
    position_of[order[b]] = b


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _solve_upper(factor, rhs, solution, size):
    for i in range(size - 1, -1, -1):
        total = rhs[i]
        row = factor[i, i + 1 : size]
        known = solution[i + 1 : size]
        for j in range(row.shape[0]):
            total -= row[j] * known[j]
        solution[i] = total / factor[i, i]


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _dot(a, b):
    total = a[0] * b[0]
    for c in range(1, a.shape[0]):
        total += a[c] * b[c]
    return total


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def ksvd_sweep(residual, atoms, codes, n_power_iterations):
    """One K-SVD sweep: every used atom in turn becomes the leading direction of its own residual.

    With ``R = E + c d^T`` (rows that use the atom), a power iteration ``u <- R^T R u`` is one pass over the rows of
    E: each is read once, for its product with u and, from cache, for its share of the sum. R is never formed.

    Parameters
    ----------
    residual : array (n, d)
        ``Y - C D``; kept up to date.
    atoms : array (k, d), unit rows
    codes : array (n, k)
    n_power_iterations : int
        8 in the paper.
    """
    n, d = residual.shape
    users = np.empty(n, np.int64)
    code = np.empty(n, residual.dtype)
    direction = np.empty(d, residual.dtype)
    image = np.empty(d, residual.dtype)
    zero = np.zeros(1, residual.dtype)[0]
    for atom in range(atoms.shape[0]):
        n_users = 0
        for column in range(n):
            if codes[column, atom] != zero:
                users[n_users] = column
                code[n_users] = codes[column, atom]
                n_users += 1
        if n_users == 0:
            continue
        old = atoms[atom]
        direction[:] = old
        for _ in range(n_power_iterations):
            overlap = _dot(old, direction)
            image[:] = zero
            along_old = zero
            for i in range(n_users):
                row = residual[users[i]]
                value = _dot(row, direction) + code[i] * overlap
                along_old += value * code[i]
                for c in range(d):
                    image[c] += value * row[c]
            for c in range(d):
                image[c] += along_old * old[c]
            square = _dot(image, image)
            if not square > zero:
                break
            inverse = 1 / np.sqrt(square)
            for c in range(d):
                direction[c] = image[c] * inverse
        else:
            overlap = _dot(old, direction)
            for i in range(n_users):
                row = residual[users[i]]
                before = code[i]
                value = _dot(row, direction) + before * overlap
                for c in range(d):
                    row[c] += before * old[c] - value * direction[c]
                codes[users[i], atom] = value
            atoms[atom] = direction


# Magnitudes are counted by the upper bits of their floats: sign off, exponent and the first mantissa bits.
_BIN_SHIFT = 16
N_BINS = 1 << (31 - _BIN_SHIFT)


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def admm_pull(moved, targets, threshold, rho, shrink, out):
    """``B + rho (Z - U)`` of ADMM, from ``V = Z + U``: what is kept of V is Z, the rest is U, times `shrink`.

    All arrays are flat float32 of one length; kept is what is not below `threshold` in magnitude.
    """
    drop = -rho * shrink
    for i in range(moved.shape[0]):
        v = moved[i]
        out[i] = targets[i] + (rho if abs(v) >= threshold else drop) * v


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def admm_move(moved, solved, threshold, shrink, relax):
    """``V <- relax X + (1 - relax) Z + U`` in place, with X the least squares of this step."""
    keep = np.float32(1) - relax
    for i in range(moved.shape[0]):
        v = moved[i]
        moved[i] = relax * solved[i] + (keep if abs(v) >= threshold else shrink) * v


@numba.njit(cache=True, nogil=True)
def count_magnitudes(bits, counts):
    """Add the magnitudes of flat float32, given as uint32, to `counts` (N_BINS,) of their upper bits."""
    for i in range(bits.shape[0]):
        counts[(bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(_BIN_SHIFT)] += 1


@numba.njit(cache=True, nogil=True)
def magnitudes_in_bin(bits, which, out):
    """Magnitudes whose upper bits are `which`, as uint32 in `out`; returns how many."""
    found = 0
    for i in range(bits.shape[0]):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude >> np.uint32(_BIN_SHIFT) == which:
            out[found] = magnitude
            found += 1
    return found


@numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def conjugate_step(codes, residual, direction, image, energy, least, tiny):
    """One conjugate gradient step of every row, in place, where `image` is ``direction @ gram``.

    Off the support codes are zero, and stay so.

    Parameters
    ----------
    codes, residual, direction, image : float32 array (n, k)
    energy : float32 array (n,)
        Squared length of the residual, kept up to date.
    least : float32
        Curvature, as a share of the direction's squared length, from which a step is taken (`conjugate_gradients`).
    tiny : float32
    """
    zero = np.float32(0)
    for row in range(codes.shape[0]):
        c, r, p, q = codes[row], residual[row], direction[row], image[row]
        curvature, square = zero, zero
        for i in range(c.shape[0]):
            curvature += p[i] * q[i]
            square += p[i] * p[i]
        if not curvature > least * square:
            continue
        length = energy[row] / max(curvature, tiny)
        left = zero
        for i in range(c.shape[0]):
            here = r[i] - length * q[i] if c[i] != zero else zero
            c[i] += length * p[i]
            r[i] = here
            left += here * here
        ratio = left / max(energy[row], tiny)
        for i in range(c.shape[0]):
            p[i] = r[i] + ratio * p[i]
        energy[row] = left
