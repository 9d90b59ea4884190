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
        for (int64_t j = 0; j < at->columns; j++) {
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
