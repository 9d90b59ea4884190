"""The C source of the entropy coder: compiled by `cospadi_cpu` on the machine that runs it, as the kernel is."""

SOURCE = r"""
#include <stdint.h>
#include <string.h>

/* Streams of docs/format.md ("Entropy-coded matrices"): rows of S in groups of LANES, each with a state of its own,
 * and one sequence of 16-bit words for all. A table has an entry for each of SLOTS slots: number in the upper 8 bits
 * (halved for the trellis), frequency less 1 in the next 12, and the place of the slot among those of its number. */

enum { LANES = 8, BITS = 12, SLOTS = 1 << BITS };

typedef struct {
    int64_t columns, first, buckets, trellis;
    const uint8_t *row, *column;  /* logarithms of the scales, a byte each */
    const uint8_t *wide;          /* bits that numbers of each row have below those of the tables */
} Contexts;

static inline int64_t bucket(const Contexts *at, int64_t row, int64_t column) {
    int64_t found = ((at->row[row] + at->column[column]) >> 3) - at->first;
    return found < 0 ? 0 : found >= at->buckets ? at->buckets - 1 : found;
}

static inline unsigned follow(unsigned state, int number) {
    return ((number ^ state ^ state >> 1) & 1) << 2 | state >> 1;
}

#if defined(__AVX2__)
#include <immintrin.h>

static uint64_t places[256]; /* byte i: how many of the lanes below i take a word */

__attribute__((constructor)) static void make_places(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, next = 0; i < 8; next += mask >> i++ & 1) places[mask] |= (uint64_t)next << (8 * i);
}

/* Columns of LANES rows, none of them wide, all lanes at once, as long as there are LANES words to read: how many. */
static inline __attribute__((always_inline)) int64_t decode_columns(
    const Contexts *at, const int trellis, const uint32_t *tables, const uint8_t *stream, int64_t size, int64_t *next,
    uint32_t *lanes, unsigned *states, const int64_t *level, const float *step, char *out, int64_t stride,
    const int halves) {
    const __m256i low = _mm256_set1_epi32(SLOTS - 1), one = _mm256_set1_epi32(1), zero = _mm256_setzero_si256();
    const __m256i first = _mm256_set1_epi32((int)at->first), top = _mm256_set1_epi32((int)at->buckets - 1);
    const __m256 steps = _mm256_loadu_ps(step);
    __m256i x = _mm256_loadu_si256((const __m256i *)lanes), s = _mm256_loadu_si256((const __m256i *)states);
    __m256i levels = zero;
    int32_t narrow[LANES];
    int64_t j = 0, place = *next;
    for (int l = 0; l < LANES; l++) narrow[l] = (int32_t)level[l];
    levels = _mm256_loadu_si256((const __m256i *)narrow);
    for (; j < at->columns && place + 2 * LANES <= size; j++, out += stride) {
        __m256i b = _mm256_add_epi32(levels, _mm256_set1_epi32(at->column[j]));
        b = _mm256_sub_epi32(_mm256_srai_epi32(b, 3), first);
        b = _mm256_min_epi32(_mm256_max_epi32(b, zero), top);
        const __m256i odd = _mm256_srli_epi32(s, 2);
        if (trellis) b = _mm256_add_epi32(_mm256_add_epi32(b, b), odd);
        const __m256i slot = _mm256_or_si256(_mm256_slli_epi32(b, BITS), _mm256_and_si256(x, low));
        const __m256i e = _mm256_i32gather_epi32((const int *)tables, slot, 4);
        const __m256i frequency = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(e, BITS), low), one);
        x = _mm256_mullo_epi32(frequency, _mm256_srli_epi32(x, BITS));
        x = _mm256_add_epi32(x, _mm256_and_si256(e, low));
        __m256i number = _mm256_srai_epi32(e, 24);
        const __m256i is_short = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), zero);
        const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(is_short));
        __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(stream + place)));
        const __m128i from = _mm_loadl_epi64((const __m128i *)(places + mask));
        words = _mm256_permutevar8x32_epi32(words, _mm256_cvtepu8_epi32(from));
        x = _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), words), is_short);
        place += 2 * __builtin_popcount((unsigned)mask);
        if (trellis) {
            const __m256i half = _mm256_srli_epi32(s, 1);
            const __m256i parity = _mm256_and_si256(_mm256_xor_si256(_mm256_xor_si256(number, s), half), one);
            s = _mm256_or_si256(_mm256_slli_epi32(parity, 2), half);
            number = _mm256_add_epi32(_mm256_add_epi32(number, number), odd);
        }
        const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(number), steps);
        if (halves) {
            __m256i bits = _mm256_castps_si256(value);
            bits = _mm256_add_epi32(bits, _mm256_and_si256(_mm256_srli_epi32(bits, 16), one));
            bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), 16);
            bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
            _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(bits));
        } else _mm256_storeu_ps((float *)out, value);
    }
    _mm256_storeu_si256((__m256i *)lanes, x);
    _mm256_storeu_si256((__m256i *)states, s);
    *next = place;
    return j;
}
#endif

/* Decode `rows` rows from row `begin` on into numbers times steps: float32, or its upper half, at
 * out[column * stride + row]. Whatever the stream holds, nothing is read outside `size` bytes and nothing written
 * outside the rows. Returns 0, or 1 where the stream is too short or too long, or states do not end as they began. */
int64_t entropy_decode(const Contexts *at, const uint32_t *tables, const float *steps, const uint8_t *stream,
                       int64_t size, int64_t begin, int64_t rows, void *out, int64_t stride, int64_t halves) {
    uint32_t x[LANES];
    if (size < (int64_t)sizeof x || size & 1) return 1;
    memcpy(x, stream, sizeof x);
    /* one word before the first that may be read where all have been */
    int64_t next = sizeof x, last = size - 2;
    const int64_t top = at->buckets - 1;
    const int trellis = at->trellis != 0;
    for (int64_t group = 0; group < rows; group += LANES) {
        const int lanes = rows - group < LANES ? (int)(rows - group) : LANES;
        unsigned state[LANES] = {0};
        int64_t level[LANES] = {0};
        float step[LANES] = {0};
        unsigned wide[LANES] = {0}, any_wide = 0;
        for (int l = 0; l < lanes; l++) {
            level[l] = at->row[begin + group + l];
            step[l] = steps[begin + group + l];
            any_wide |= wide[l] = at->wide[begin + group + l];
        }
        int64_t j = 0;
#if defined(__AVX2__)
        if (lanes == LANES && !any_wide) {
            char *to = (char *)out + (begin + group) * (halves ? 2 : 4);
            const int64_t apart = stride * (halves ? 2 : 4);
#define COLUMNS(trellis, halves) \
            decode_columns(at, trellis, tables, stream, size, &next, x, state, level, step, to, apart, halves)
            j = trellis ? halves ? COLUMNS(1, 1) : COLUMNS(1, 0) : halves ? COLUMNS(0, 1) : COLUMNS(0, 0);
#undef COLUMNS
        }
#endif
        for (; j < at->columns; j++) {
            const int64_t column = at->column[j];
            float value[LANES];
#define REFILL(l) do { \
            uint16_t word; \
            memcpy(&word, stream + (next < last ? next : last), 2); \
            const int short_of = x[l] < 1u << 16; \
            x[l] = short_of ? x[l] << 16 | word : x[l]; \
            next += 2 * short_of; \
        } while (0)
#define LANE(l) do { \
            int64_t b = ((level[l] + column) >> 3) - at->first; \
            b = b < 0 ? 0 : b > top ? top : b; \
            const unsigned odd = trellis ? state[l] >> 2 : 0; \
            const uint32_t slot = x[l] & (SLOTS - 1); \
            const uint32_t e = tables[((b << trellis) + odd) * SLOTS + slot]; \
            x[l] = ((e >> BITS & (SLOTS - 1)) + 1) * (x[l] >> BITS) + (e & (SLOTS - 1)); \
            int m = (int32_t)e >> 24; \
            REFILL(l); \
            if (any_wide) { \
                m = m * (1 << wide[l]) + (int)(x[l] & ((1u << wide[l]) - 1)); \
                x[l] >>= wide[l]; \
                REFILL(l); \
            } \
            value[l] = (float)(trellis ? 2 * m + (int)odd : m) * step[l]; \
            state[l] = follow(state[l], m); \
        } while (0)
            if (lanes == LANES) {
                LANE(0); LANE(1); LANE(2); LANE(3); LANE(4); LANE(5); LANE(6); LANE(7);
            } else {
                for (int l = 0; l < lanes; l++) LANE(l);
            }
            const int64_t place = j * stride + begin + group;
            if (halves) {
                uint16_t upper[LANES];
                for (int l = 0; l < LANES; l++) {
                    uint32_t bits;
                    memcpy(&bits, value + (l < lanes ? l : 0), 4);
                    upper[l] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
                }
                memcpy((uint16_t *)out + place, upper, 2 * lanes);
            } else {
                memcpy((float *)out + place, value, 4 * lanes);
            }
        }
    }
    int64_t wrong = next != size;
    for (int l = 0; l < LANES; l++) wrong |= x[l] != 1u << 16;
    return wrong;
}

/* What every slot of a table stands for, from frequencies and starts of the numbers from -128 on; a table without
 * frequencies has zeros for ever. Those of a table make SLOTS. */
void entropy_slots(const uint16_t *frequency, const uint16_t *start, int64_t tables, uint32_t *slots) {
    for (int64_t table = 0; table < tables; table++, frequency += 256, start += 256, slots += SLOTS) {
        for (uint32_t i = 0; i < SLOTS; i++) slots[i] = (SLOTS - 1) << BITS | i;
        for (int n = 0; n < 256; n++)
            for (uint32_t i = 0; i < frequency[n] && start[n] + i < SLOTS; i++)
                slots[start[n] + i] = (uint32_t)(n - 128) << 24 | (frequency[n] - 1u) << BITS | i;
    }
}

/* Encode `rows` rows of numbers (halved for the trellis, without the bits of wide rows) from row `begin` on. `rest` has
 * those bits, above the parity of the number, by which the trellis has two tables. `frequency` and
 * `start` have 256 entries a table, of numbers from -128 on. Words go to the end of `out`, backwards; returns where
 * they begin, in bytes, or -1 where a number has no frequency or `room` bytes are not enough. */
int64_t entropy_encode(const Contexts *at, const uint16_t *frequency, const uint16_t *start, const int8_t *numbers,
                       const uint16_t *rest, int64_t begin, int64_t rows, uint8_t *out, int64_t room) {
    uint32_t x[LANES];
    int64_t place = room;
    for (int l = 0; l < LANES; l++) x[l] = 1u << 16;
    for (int64_t group = (rows - 1) / LANES * LANES; group >= 0; group -= LANES) {
        const int64_t lanes = rows - group < LANES ? rows - group : LANES;
        for (int64_t j = at->columns - 1; j >= 0; j--)
            for (int64_t l = lanes - 1; l >= 0; l--) {
                const int64_t row = begin + group + l, index = row * at->columns + j;
                const int64_t table = at->trellis ? 2 * bucket(at, row, j) + (rest[index] & 1) : bucket(at, row, j);
                const unsigned wide = at->wide[row];
                const int64_t entry = 256 * table + 128 + numbers[index];
                const uint64_t f = frequency[entry];
                if (!f || place < (int64_t)sizeof x + 4) return -1;
                if (wide) {
                    if (x[l] >= 1u << (32 - wide)) {
                        const uint16_t word = (uint16_t)x[l];
                        place -= 2;
                        memcpy(out + place, &word, 2);
                        x[l] >>= 16;
                    }
                    x[l] = x[l] << wide | rest[index] >> 1;
                }
                if (x[l] >= f << 20) {
                    const uint16_t word = (uint16_t)x[l];
                    place -= 2;
                    memcpy(out + place, &word, 2);
                    x[l] >>= 16;
                }
                x[l] = (uint32_t)((x[l] / f << BITS) + x[l] % f + start[entry]);
            }
    }
    place -= sizeof x;
    if (place < 0) return -1;
    memcpy(out + place, x, sizeof x);
    return place;
}
"""
