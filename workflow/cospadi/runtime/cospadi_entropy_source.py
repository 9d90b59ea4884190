"""The C source of the entropy coder: compiled by `cospadi_compiler` on the machine that runs it, as the kernel is."""

SOURCE = r"""
#include <stdint.h>
#include <string.h>

/* Streams of docs/format.md ("Entropy-coded matrices"): rows of S in groups of LANES, each with a state of its own,
 * and one sequence of 16-bit words for all. A table has an entry for each of SLOTS slots: number in the upper 8 bits
 * (halved for the trellis), frequency less 1 in the next 12, and the place of the slot among those of its number. */

enum { LANES = 8, BITS = 12, SLOTS = 1 << BITS };
enum { AT_ONCE = 4 }; /* streams that are decoded side by side */
/* what is made of numbers: floats, times their steps; the upper halves of those, rounded; or their last 8 bits */
enum { FLOATS, HALVES, DIGITS };
static const int64_t WIDTH[] = {4, 2, 1};

typedef struct {
    int64_t columns, first, buckets;
    int64_t kinds;                /* tables of a bucket: 2 where numbers follow the code of these parity checks */
    int64_t lower, upper;
    const uint8_t *row, *column;  /* logarithms of the scales, a byte each */
    const uint8_t *wide;          /* bits that numbers of each row have below those of the tables */
} Contexts;

static inline int64_t bucket(const Contexts *at, int64_t row, int64_t column) {
    int64_t found = ((at->row[row] + at->column[column]) >> 3) - at->first;
    return found < 0 ? 0 : found >= at->buckets ? at->buckets - 1 : found;
}

/* The state after a number, of which this is the upper part; the lower bit of the next is state & 1. */
static inline unsigned follow(const Contexts *at, unsigned state, int half) {
    return state >> 1 ^ (-(state & 1) & (unsigned)at->lower >> 1) ^ (-((unsigned)half & 1) & (unsigned)at->upper >> 1);
}

/* Of digits: the numbers of a matrix that are more than 8 bits. `n` counts those without room, too. */
typedef struct {
    struct { int32_t row, column, number; } *kept;
    int64_t room, n;
} Larger;

static void keep(Larger *to, int64_t row, int64_t column, int32_t number) {
    if ((uint32_t)number + 128 < 256) return;
    if (to->n < to->room) {
        to->kept[to->n].row = (int32_t)row;
        to->kept[to->n].column = (int32_t)column;
        to->kept[to->n].number = number;
    }
    to->n++;
}

/* A stream that is being decoded, and the LANES rows of it that are next. */
typedef struct {
    const uint8_t *data;
    Larger *larger;
    int64_t size, next;  /* bytes, of which so many have been read */
    int64_t row, rows;   /* the first row that is next, and how many are left, that one included */
    int lanes;           /* rows that are next */
    unsigned any_wide;
    uint32_t x[LANES];
    unsigned state[LANES], wide[LANES];
    int32_t level[LANES];
    float step[LANES];
} Stream;

static void begin_rows(Stream *s, const Contexts *at, const float *steps) {
    s->lanes = s->rows < LANES ? (int)s->rows : LANES;
    s->any_wide = 0;
    memset(s->state, 0, sizeof s->state);
    for (int l = 0; l < s->lanes; l++) {
        s->level[l] = at->row[s->row + l];
        s->step[l] = steps[s->row + l];
        s->any_wide |= s->wide[l] = at->wide[s->row + l];
    }
}

#if defined(__AVX2__)
#include <immintrin.h>

static uint64_t places[256]; /* byte i: how many of the lanes below i take a word */

__attribute__((constructor)) static void make_places(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, next = 0; i < 8; next += mask >> i++ & 1) places[mask] |= (uint64_t)next << (8 * i);
}

/* One by one: an eighth more numbers a second than a gather gives. */
static inline __m256i looked_up(const uint32_t *tables, __m256i slots) {
    uint32_t s[8];
    _mm256_storeu_si256((__m256i *)s, slots);
    return _mm256_setr_epi32((int)tables[s[0]], (int)tables[s[1]], (int)tables[s[2]], (int)tables[s[3]],
                             (int)tables[s[4]], (int)tables[s[5]], (int)tables[s[6]], (int)tables[s[7]]);
}

/* Columns from column j on of LANES rows of each of n streams, none of them wide, as long as there are LANES words to
 * read in each: the column that comes then. What a number needs of the one before it takes a processor's time several
 * times over; numbers of other streams fill it. */
static inline __attribute__((always_inline)) int64_t decode_columns(
    const Contexts *at, const int trellis, const uint32_t *tables, Stream *const *streams, const int n, int64_t j,
    char *out, int64_t stride, const int kind) {
    const __m256i low = _mm256_set1_epi32(SLOTS - 1), one = _mm256_set1_epi32(1), zero = _mm256_setzero_si256();
    const __m256i lower = _mm256_set1_epi32((int)at->lower >> 1), upper = _mm256_set1_epi32((int)at->upper >> 1);
    const __m256i first = _mm256_set1_epi32((int)at->first), top = _mm256_set1_epi32((int)at->buckets - 1);
    const int64_t apart = stride * WIDTH[kind];
    __m256i x[AT_ONCE], s[AT_ONCE], levels[AT_ONCE];
    __m256 steps[AT_ONCE];
    const uint8_t *from[AT_ONCE];
    char *to[AT_ONCE];
    for (int i = 0; i < n; i++) {
        x[i] = _mm256_loadu_si256((const __m256i *)streams[i]->x);
        s[i] = _mm256_loadu_si256((const __m256i *)streams[i]->state);
        levels[i] = _mm256_loadu_si256((const __m256i *)streams[i]->level);
        steps[i] = _mm256_loadu_ps(streams[i]->step);
        from[i] = streams[i]->data + streams[i]->next;
        to[i] = out + streams[i]->row * WIDTH[kind] + j * apart;
    }
    for (;;) {
        int64_t columns = at->columns - j;
        for (int i = 0; i < n; i++) {
            const int64_t enough = (streams[i]->data + streams[i]->size - from[i]) / (2 * LANES);
            columns = enough < columns ? enough : columns;
        }
        if (columns <= 0) break;
        for (const int64_t end = j + columns; j < end; j++) {
            const __m256i column = _mm256_set1_epi32(at->column[j]);
            __m256i slot[AT_ONCE], e[AT_ONCE], is_short[AT_ONCE], words[AT_ONCE];
            int mask[AT_ONCE];
            for (int i = 0; i < n; i++) {
                __m256i b = _mm256_sub_epi32(_mm256_srai_epi32(_mm256_add_epi32(levels[i], column), 3), first);
                b = _mm256_min_epi32(_mm256_max_epi32(b, zero), top);
                if (trellis) b = _mm256_add_epi32(_mm256_add_epi32(b, b), _mm256_and_si256(s[i], one));
                slot[i] = _mm256_or_si256(_mm256_slli_epi32(b, BITS), _mm256_and_si256(x[i], low));
            }
            for (int i = 0; i < n; i++) e[i] = looked_up(tables, slot[i]);
            for (int i = 0; i < n; i++) {
                const __m256i frequency = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(e[i], BITS), low), one);
                x[i] = _mm256_mullo_epi32(frequency, _mm256_srli_epi32(x[i], BITS));
                x[i] = _mm256_add_epi32(x[i], _mm256_and_si256(e[i], low));
                is_short[i] = _mm256_cmpeq_epi32(_mm256_srli_epi32(x[i], 16), zero);
                mask[i] = _mm256_movemask_ps(_mm256_castsi256_ps(is_short[i]));
            }
            for (int i = 0; i < n; i++) {
                words[i] = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from[i]));
                const __m128i places_of = _mm_loadl_epi64((const __m128i *)(places + mask[i]));
                words[i] = _mm256_permutevar8x32_epi32(words[i], _mm256_cvtepu8_epi32(places_of));
                words[i] = _mm256_or_si256(_mm256_slli_epi32(x[i], 16), words[i]);
                x[i] = _mm256_blendv_epi8(x[i], words[i], is_short[i]);
                from[i] += 2 * __builtin_popcount((unsigned)mask[i]);
            }
            for (int i = 0; i < n; i++) {
                __m256i number = _mm256_srai_epi32(e[i], 24);
                if (trellis) {
                    const __m256i odd = _mm256_and_si256(s[i], one), is_odd = _mm256_sub_epi32(zero, odd);
                    const __m256i is_upper = _mm256_sub_epi32(zero, _mm256_and_si256(number, one));
                    s[i] = _mm256_xor_si256(_mm256_srli_epi32(s[i], 1), _mm256_and_si256(is_odd, lower));
                    s[i] = _mm256_xor_si256(s[i], _mm256_and_si256(is_upper, upper));
                    number = _mm256_add_epi32(_mm256_add_epi32(number, number), odd);
                }
                const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(number), steps[i]);
                if (kind == DIGITS) {
                    const __m256i moved = _mm256_add_epi32(number, _mm256_set1_epi32(128));
                    if (!_mm256_testz_si256(moved, _mm256_set1_epi32(~255))) {
                        int32_t found[LANES];
                        _mm256_storeu_si256((__m256i *)found, number);
                        for (int l = 0; l < LANES; l++) keep(streams[i]->larger, streams[i]->row + l, j, found[l]);
                    }
                    __m256i bytes = _mm256_and_si256(number, _mm256_set1_epi32(255));
                    bytes = _mm256_packus_epi32(bytes, bytes);
                    bytes = _mm256_packus_epi16(bytes, bytes);
                    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
                    _mm_storel_epi64((__m128i *)to[i], _mm256_castsi256_si128(bytes));
                } else if (kind == HALVES) {
                    __m256i bits = _mm256_castps_si256(value);
                    bits = _mm256_add_epi32(bits, _mm256_and_si256(_mm256_srli_epi32(bits, 16), one));
                    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), 16);
                    bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
                    _mm_storeu_si128((__m128i *)to[i], _mm256_castsi256_si128(bits));
                } else _mm256_storeu_ps((float *)to[i], value);
                to[i] += apart;
            }
        }
    }
    for (int i = 0; i < n; i++) {
        _mm256_storeu_si256((__m256i *)streams[i]->x, x[i]);
        _mm256_storeu_si256((__m256i *)streams[i]->state, s[i]);
        streams[i]->next = from[i] - streams[i]->data;
    }
    return j;
}

static int64_t columns_of(const Contexts *at, const uint32_t *tables, Stream *const *streams, int n, int64_t j,
                          void *out, int64_t stride, int kind) {
#define COLUMNS(trellis, n, kind) decode_columns(at, trellis, tables, streams, n, j, out, stride, kind)
#define OF_KIND(trellis, n) \
    kind == DIGITS ? COLUMNS(trellis, n, DIGITS) \
    : kind == HALVES ? COLUMNS(trellis, n, HALVES) : COLUMNS(trellis, n, FLOATS)
#define EITHER(n) at->kinds == 2 ? OF_KIND(1, n) : OF_KIND(0, n)
    switch (n) {
    case 1: return EITHER(1);
    case 2: return EITHER(2);
    case 3: return EITHER(3);
    case 4: return EITHER(4);
    default: return j;
    }
#undef EITHER
#undef OF_KIND
#undef COLUMNS
}
#else
static int64_t columns_of(const Contexts *at, const uint32_t *tables, Stream *const *streams, int n, int64_t j,
                          void *out, int64_t stride, int kind) {
    return j;
}
#endif

/* The columns from column j on of the rows of a stream that are next, one number after the other. */
static void finish_rows(const Contexts *at, const uint32_t *tables, Stream *s, int64_t j, void *out, int64_t stride,
                        int kind) {
    const int64_t top = at->buckets - 1, last = s->size - 2; /* is read again where all words have been read */
    const int trellis = at->kinds == 2, lanes = s->lanes;
    for (; j < at->columns; j++) {
        const int64_t column = at->column[j];
        int number[LANES];
        float value[LANES];
#define REFILL(l) do { \
        uint16_t word; \
        memcpy(&word, s->data + (s->next < last ? s->next : last), 2); \
        const int short_of = s->x[l] < 1u << 16; \
        s->x[l] = short_of ? s->x[l] << 16 | word : s->x[l]; \
        s->next += 2 * short_of; \
    } while (0)
        for (int l = 0; l < lanes; l++) {
            int64_t b = ((s->level[l] + column) >> 3) - at->first;
            b = b < 0 ? 0 : b > top ? top : b;
            const unsigned odd = s->state[l] & 1;
            const uint32_t e = tables[((b << trellis) + odd) * SLOTS + (s->x[l] & (SLOTS - 1))];
            s->x[l] = ((e >> BITS & (SLOTS - 1)) + 1) * (s->x[l] >> BITS) + (e & (SLOTS - 1));
            int m = (int32_t)e >> 24;
            REFILL(l);
            if (s->any_wide) {
                m = m * (1 << s->wide[l]) + (int)(s->x[l] & ((1u << s->wide[l]) - 1));
                s->x[l] >>= s->wide[l];
                REFILL(l);
            }
            number[l] = trellis ? 2 * m + (int)odd : m;
            value[l] = (float)number[l] * s->step[l];
            s->state[l] = follow(at, s->state[l], m);
        }
#undef REFILL
        const int64_t place = j * stride + s->row;
        if (kind == DIGITS) {
            for (int l = 0; l < lanes; l++) {
                ((int8_t *)out)[place + l] = (int8_t)number[l];
                keep(s->larger, s->row + l, j, number[l]);
            }
        } else if (kind == HALVES) {
            uint16_t upper[LANES];
            for (int l = 0; l < lanes; l++) {
                uint32_t bits;
                memcpy(&bits, value + l, 4);
                upper[l] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
            }
            memcpy((uint16_t *)out + place, upper, 2 * (size_t)lanes);
        } else {
            memcpy((float *)out + place, value, 4 * (size_t)lanes);
        }
    }
}

/* A stored matrix, and where its numbers go. */
typedef struct {
    Contexts at;
    const uint8_t *data;   /* all that is stored, `size` bytes, the checksum of the others in the first four */
    const uint8_t *tables;
    const float *steps;
    const int64_t *edges;  /* of the streams, which lie one after the other: bytes edges[i] to edges[i + 1] of `data` */
    int64_t size, tables_size, n_streams, per_stream, rows, kind, is_checked;
    void *out;             /* numbers of a kind, at out[column * rows + row] */
    Larger larger;
    int64_t fault;
} Matrix;

/* What is wrong with a matrix */
enum { NONE, NO_WHOLE, TABLES_TOO_SHORT, TABLES_TOO_LONG, NO_END, NO_CHECKSUM };

/* Decode all streams. Whatever a stream holds, nothing is read outside of it and nothing written outside its rows.
 * Returns a fault where one is too short or too long, or states do not end as they began. */
static int64_t decode_streams(Matrix *m, const uint32_t *tables) {
    const Contexts *at = &m->at;
    const int64_t rows = m->rows, per_stream = m->per_stream, kind = m->kind;
    void *out = m->out;
    int64_t wrong = 0;
    for (int64_t done = 0, n; done < m->n_streams; done += n) {
        Stream streams[AT_ONCE];
        const int64_t left = m->n_streams - done, turns = (left + AT_ONCE - 1) / AT_ONCE;
        n = (left + turns - 1) / turns; /* as many in every turn as can be */
        for (int i = 0; i < n; i++) {
            Stream *s = streams + i;
            s->row = (done + i) * per_stream;
            s->rows = rows - s->row < per_stream ? rows - s->row : per_stream;
            s->data = m->data + m->edges[done + i];
            s->size = m->edges[done + i + 1] - m->edges[done + i];
            s->next = sizeof s->x;
            s->larger = &m->larger;
            if (s->size < s->next || s->size & 1) return NO_END;
            memcpy(s->x, s->data, sizeof s->x);
        }
        for (int64_t group = 0; group < per_stream; group += LANES) {
            Stream *even[AT_ONCE];
            int n_even = 0;
            for (int i = 0; i < n; i++) {
                if (streams[i].rows <= 0) continue;
                begin_rows(streams + i, at, m->steps);
                if (streams[i].lanes == LANES && !streams[i].any_wide) even[n_even++] = streams + i;
            }
            const int64_t together = columns_of(at, tables, even, n_even, 0, out, rows, (int)kind);
            for (int i = 0; i < n; i++) {
                Stream *s = streams + i;
                if (s->rows <= 0) continue;
                const int is_even = s->lanes == LANES && !s->any_wide;
                const int64_t j = is_even ? columns_of(at, tables, &s, 1, together, out, rows, (int)kind) : 0;
                finish_rows(at, tables, s, j, out, rows, (int)kind);
                s->row += LANES;
                s->rows -= LANES;
            }
        }
        for (int i = 0; i < n; i++) {
            wrong |= streams[i].next != streams[i].size;
            for (int l = 0; l < LANES; l++) wrong |= streams[i].x[l] != 1u << 16;
        }
    }
    return wrong ? NO_END : NONE;
}

/* What every slot of tables stands for, from their bytes in a file; a table without frequencies has zeros for ever.
 * Returns a fault where frequencies do not make SLOTS, or there are too few bytes, or more. */
static int64_t read_tables(const Matrix *m, uint32_t *slots) {
    const uint8_t *data = m->tables;
    const int64_t size = m->tables_size, n_tables = m->at.buckets * m->at.kinds;
    int64_t at = 0;
    for (int64_t table = 0; table < n_tables; table++) {
        uint32_t frequency[256], i = 0;
        const int odd = table % m->at.kinds != 0; /* 0 stands for 1, -1 for -1 */
        if (at == size) return TABLES_TOO_SHORT;
        const int n = data[at++];
        int64_t sum = 0;
        for (int number = 0; number < n; number++) {
            frequency[number] = 0;
            for (int shift = 0, more = 1; more && shift <= 14; shift += 7) {
                if (at == size) return TABLES_TOO_SHORT;
                frequency[number] |= (uint32_t)(data[at] & 127) << shift;
                more = data[at++] >> 7;
            }
            sum += 2 * (int64_t)frequency[number];
        }
        if (n && !odd) sum -= frequency[0];
        if (n > 128 || (n && sum != SLOTS)) return NO_WHOLE;
        for (int number = odd ? -n : 1 - n; number < n; number++) {
            const uint32_t count = frequency[number >= 0 ? number : odd ? -1 - number : -number];
            const uint32_t word = (uint32_t)number << 24 | (count - 1u) << BITS;
            for (uint32_t within = 0; within < count; within++) *slots++ = word | within;
        }
        if (!n)
            for (; i < SLOTS; i++) *slots++ = (SLOTS - 1) << BITS | i;
    }
    return at == size ? NONE : TABLES_TOO_LONG;
}

static uint32_t of_byte[8][256]; /* what a byte, and so many zeros behind it, do to a checksum */

__attribute__((constructor)) static void make_of_byte(void) {
    for (int behind = 0; behind < 8; behind++)
        for (uint32_t byte = 0; byte < 256; byte++) {
            uint32_t crc = behind ? of_byte[behind - 1][byte] : byte;
            for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
            of_byte[behind][byte] = crc;
        }
}

static uint32_t add_to_checksum(uint32_t crc, const uint8_t *data, int64_t size) {
    for (; size >= 8; data += 8, size -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        word ^= crc;
        crc = 0;
        for (int i = 0; i < 8; i++) crc ^= of_byte[7 - i][word >> 8 * i & 255];
    }
    for (; size > 0; size--) crc = of_byte[0][(crc ^ *data++) & 255] ^ crc >> 8;
    return crc;
}

/* zlib's checksum (CRC-32). */
static uint32_t checksum(const uint8_t *data, int64_t size) {
    uint32_t crc = ~0u;
#if defined(__PCLMUL__) && defined(__AVX2__)
    if (size >= 16) {
        /* 16 bytes stand for all before them: moved over the next 16 by two remainders of powers of x */
        const __m128i over = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
        __m128i sum = _mm_xor_si128(_mm_loadu_si128((const __m128i *)data), _mm_cvtsi32_si128((int)crc));
        for (data += 16, size -= 16; size >= 16; data += 16, size -= 16) {
            sum = _mm_xor_si128(_mm_clmulepi64_si128(sum, over, 0x00), _mm_clmulepi64_si128(sum, over, 0x11));
            sum = _mm_xor_si128(sum, _mm_loadu_si128((const __m128i *)data));
        }
        uint8_t last[16];
        _mm_storeu_si128((__m128i *)last, sum);
        crc = add_to_checksum(0, last, 16);
    }
#endif
    return ~add_to_checksum(crc, data, size);
}

/* Decode matrices that no thread has begun, until there are none left: `begun` says how many have been. `slots` is room
 * for the tables of any of them. */
void entropy_decode(Matrix *matrices, int64_t n, int64_t *begun, uint32_t *slots) {
    for (int64_t i; (i = __atomic_fetch_add(begun, 1, __ATOMIC_RELAXED)) < n;) {
        Matrix *m = matrices + i;
        uint32_t expected;
        memcpy(&expected, m->data, 4);
        m->fault = m->is_checked && checksum(m->data + 4, m->size - 4) != expected ? NO_CHECKSUM : NONE;
        if (!m->fault) m->fault = read_tables(m, slots);
        if (!m->fault) m->fault = decode_streams(m, slots);
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
                const int64_t table = at->kinds * bucket(at, row, j) + (rest[index] & 1);
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
