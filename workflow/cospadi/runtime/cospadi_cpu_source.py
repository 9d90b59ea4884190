"""The C source of the CPU kernel: compiled by `cospadi_cpu` on the machine that runs it.

It is a string because only Python files travel: transformers copies no other into its cache of remote code.
"""

SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* y = (x D) S for a few rows of x, straight from the packed form of docs/format.md. Everything is summed in float32.
 *
 * One parallel region a call. First every thread takes some rows of D and sums its share of z = x D, so D is read in
 * the order of memory; then the shares are added; then every thread takes some columns of S: decodes LANES stored
 * values, spreads them over LANES atoms by the bits of the support, multiplies by z. The split depends on the number of
 * threads alone, so equal calls give equal bits.
 *
 * Where the processor expands 16-bit words (with AVX2 by a table of byte shuffles), bfloat16 values under a bitmask go
 * 2 LANES at a time: a word in the upper half of 32 bits is a float as it is, one in the lower half after a shift, so
 * the even and the odd of 2 LANES atoms are two vectors. Each thread has a copy of z in that order.
 *
 * What is read from a Matrix was checked when it was bound (`cospadi_starts` and BoundMatrix): sizes, counts of bits,
 * pairs, groups. So nothing is checked here again. */

enum { BF16, BF14, INT8, INT4, IDENTITY };
enum { DENSE, BITMASK, TWO_OF_FOUR };
enum { FIRST = 1, LAST = 2, UNPACK = 4, MANY = 8 };
enum { BLOCK = 16 };  /* columns between two entries of `starts` */
enum { FORESEEN = 1 << 14 }; /* bytes of rows of D up to which the next ones are asked for ahead */
enum { MARGIN = 32 }; /* values before the end that are decoded from a padded copy */

typedef struct {
    int64_t d_in, d_out, k, n_nonzero;
    int64_t dictionary_codec, dictionary_group;
    int64_t codec, support, group;
    const uint8_t *dictionary, *values, *positions;
    const uint16_t *dictionary_scales, *scales;
    const int64_t *starts; /* (blocks + 1, 2): first value and first scale of every block of columns */
} Matrix;

typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    void (*barrier)(void);
    int (*thread)(void);
    int (*threads)(void);
} OpenMP;

typedef struct {
    const Matrix *m;
    const OpenMP *omp;
    const void *x;
    float *z; /* (batch, stride), zero from k on */
    void *y;
    float *shares; /* (threads, batch, stride) */
    const float *halves; /* (batch, stride): of every 2 LANES atoms the even ones of z, then the odd ones */
    int64_t batch, stride, is_bf16, stages;
} Task;

static inline float float_of(uint16_t word) {
    uint32_t bits = (uint32_t)word << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t word_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* ---- a vector of floats, for three kinds of machines ---- */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#define KIND "avx512"
#define LANES 16
#define ROWS 8
typedef __m512 V;
static inline V zero(void) { return _mm512_setzero_ps(); }
static inline V splat(float a) { return _mm512_set1_ps(a); }
static inline V load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, V a) { _mm512_storeu_ps(p, a); }
static inline V fma_(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline float sum(V a) { return _mm512_reduce_add_ps(a); }
static inline V expand(uint32_t mask, V a) { return _mm512_maskz_expand_ps((__mmask16)mask, a); }
static inline V first_or(int n, V a, V b) { return _mm512_mask_blend_ps((__mmask16)((1u << n) - 1), b, a); }
static inline V bf16(const uint8_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void store_bf16(uint16_t *p, V a) {
    __m512i bits = _mm512_castps_si512(a), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}
static inline V int8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline V int4(uint64_t nibbles) {
    const __m512i shift = _mm512_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    __m512i low = _mm512_set1_epi32((int)nibbles);
    __m512i both = _mm512_mask_set1_epi32(low, 0xff00, (int)(nibbles >> 32));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(both, shift), 28));
}
/* the 4 bytes that hold value i when the first starts at bit 0, 2, 4 or 6 of byte 0, and where in them it starts */
#define BYTES(s, i) (s + 14 * i) / 8, (s + 14 * i) / 8 + 1, (s + 14 * i) / 8 + 2, (s + 14 * i) / 8 + 3
#define ALL(f, s) f(s, 0), f(s, 1), f(s, 2), f(s, 3), f(s, 4), f(s, 5), f(s, 6), f(s, 7), \
    f(s, 8), f(s, 9), f(s, 10), f(s, 11), f(s, 12), f(s, 13), f(s, 14), f(s, 15)
#define OFFSET(s, i) (s + 14 * i) % 8
static const uint8_t bytes14[4][64] __attribute__((aligned(64))) = {
    {ALL(BYTES, 0)}, {ALL(BYTES, 2)}, {ALL(BYTES, 4)}, {ALL(BYTES, 6)}};
static const uint32_t offsets14[4][16] __attribute__((aligned(64))) = {
    {ALL(OFFSET, 0)}, {ALL(OFFSET, 2)}, {ALL(OFFSET, 4)}, {ALL(OFFSET, 6)}};
static inline V bf14(const uint8_t *p, int shift) {
    __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
    __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(bytes14[shift / 2]), bytes);
    words = _mm512_srlv_epi32(words, _mm512_load_si512(offsets14[shift / 2]));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 18));
}
#if defined(__AVX512VBMI2__)
#define HALVES
typedef __m512i Words;
static inline Words load_words(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline void store_words(uint16_t *p, Words a) { _mm512_storeu_si512(p, a); }
static inline Words expand_words(uint32_t mask, const uint8_t *values) {
    return _mm512_maskz_expand_epi16((__mmask32)mask, load_words(values));
}
static inline V even_of(Words a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
static inline V odd_of(Words a) {
    return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000)));
}
static inline void split_halves(const float *z, float *halves, int64_t stride) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int64_t i = 0; i + 2 * LANES <= stride; i += 2 * LANES) {
        V first = load(z + i), second = load(z + i + LANES);
        store(halves + i, _mm512_permutex2var_ps(first, even, second));
        store(halves + i + LANES, _mm512_permutex2var_ps(first, odd, second));
    }
}
#endif
#else
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define KIND "avx2"
#define LANES 8
#define ROWS 4
typedef __m256 V;
static uint64_t spread[256]; /* byte i: which of the next values goes to atom i */
static uint8_t spread_words[256][16] __attribute__((aligned(16))); /* the same for the bytes of 16-bit words */
static inline V zero(void) { return _mm256_setzero_ps(); }
static inline V splat(float a) { return _mm256_set1_ps(a); }
static inline V load(const float *p) { return _mm256_loadu_ps(p); }
static inline void store(float *p, V a) { _mm256_storeu_ps(p, a); }
static inline V fma_(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
static inline float sum(V a) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
static inline V lanes_of(uint32_t mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bit), bit));
}
static inline V expand(uint32_t mask, V a) {
    __m256i from = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&spread[mask]));
    return _mm256_and_ps(_mm256_permutevar8x32_ps(a, from), lanes_of(mask));
}
static inline V first_or(int n, V a, V b) { return _mm256_blendv_ps(b, a, lanes_of((1u << n) - 1)); }
static inline V bf16(const uint8_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline V int8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline V int4(uint64_t nibbles) {
    const __m256i shift = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sllv_epi32(_mm256_set1_epi32((int)nibbles), shift), 28));
}
#define HALVES
typedef __m256i Words;
static inline __m128i expand_8_words(uint32_t mask, const uint8_t *values) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values),
                            _mm_load_si128((const __m128i *)spread_words[mask & 255]));
}
static inline Words expand_words(uint32_t mask, const uint8_t *values) {
    const uint8_t *rest = values + 2 * (size_t)(unsigned)__builtin_popcount(mask & 255);
    __m128i low = expand_8_words(mask, values);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), expand_8_words(mask >> 8, rest), 1);
}
static inline void store_bf16(uint16_t *p, V a) {
    const __m256i bits = _mm256_castps_si256(a), upper = _mm256_srli_epi32(bits, 16);
    __m256i words = _mm256_add_epi32(bits, _mm256_and_si256(upper, _mm256_set1_epi32(1)));
    words = _mm256_srli_epi32(_mm256_add_epi32(words, _mm256_set1_epi32(0x7fff)), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    words = _mm256_blendv_epi8(words, _mm256_or_si256(upper, _mm256_set1_epi32(64)), nan);
    words = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(words));
}
static inline Words load_words(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void store_words(uint16_t *p, Words a) { _mm256_storeu_si256((__m256i *)p, a); }
static inline V even_of(Words a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
static inline V odd_of(Words a) { return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_setzero_si256(), a, 0xaa)); }
static inline void split_halves(const float *z, float *halves, int64_t stride) {
    for (int64_t i = 0; i + 2 * LANES <= stride; i += 2 * LANES) {
        V first = load(z + i), second = load(z + i + LANES);
        V low = _mm256_permute2f128_ps(first, second, 0x20), high = _mm256_permute2f128_ps(first, second, 0x31);
        V even = _mm256_shuffle_ps(low, high, 0x88), odd = _mm256_shuffle_ps(low, high, 0xdd);
        store(halves + i, even);
        store(halves + i + LANES, odd);
    }
}
static inline void join_halves(float *z, int64_t stride) { /* undoes it, in place */
    for (int64_t i = 0; i + 2 * LANES <= stride; i += 2 * LANES) {
        V even = load(z + i), odd = load(z + i + LANES);
        V low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
        store(z + i, _mm256_permute2f128_ps(low, high, 0x20));
        store(z + i + LANES, _mm256_permute2f128_ps(low, high, 0x31));
    }
}
#else
#define KIND "generic"
#define LANES 8
#define ROWS 4
typedef struct { float f[LANES]; } V;
#define EACH(expression) V r; for (int i = 0; i < LANES; i++) r.f[i] = expression; return r
static inline V splat(float a) { EACH(a); }
static inline V zero(void) { return splat(0); }
static inline V load(const float *p) { EACH(p[i]); }
static inline void store(float *p, V a) { for (int i = 0; i < LANES; i++) p[i] = a.f[i]; }
static inline V fma_(V a, V b, V c) { EACH(a.f[i] * b.f[i] + c.f[i]); }
static inline V mul(V a, V b) { EACH(a.f[i] * b.f[i]); }
static inline V add(V a, V b) { EACH(a.f[i] + b.f[i]); }
static inline float sum(V a) {
    return ((a.f[0] + a.f[4]) + (a.f[1] + a.f[5])) + ((a.f[2] + a.f[6]) + (a.f[3] + a.f[7]));
}
static inline V expand(uint32_t mask, V a) {
    int next = 0;
    EACH((mask >> i & 1) ? a.f[next++] : 0);
}
static inline V first_or(int n, V a, V b) { EACH(i < n ? a.f[i] : b.f[i]); }
static inline V bf16(const uint8_t *p) { EACH(float_of((uint16_t)(p[2 * i] | p[2 * i + 1] << 8))); }
static inline V int8(const uint8_t *p) { EACH((int8_t)p[i]); }
static inline V int4(uint64_t nibbles) { EACH((int32_t)((uint32_t)(nibbles >> (4 * i)) << 28) >> 28); }
#endif
static inline V bf14(const uint8_t *p, int shift) {
    float values[LANES];
    for (int i = 0; i < LANES; i += 4) { /* 4 values are 7 bytes */
        uint64_t bits;
        memcpy(&bits, p + 7 * (i / 4), 8);
        bits >>= shift;
        for (int j = 0; j < 4; j++) values[i + j] = float_of((uint16_t)((bits >> (14 * j)) << 2));
    }
    return load(values);
}
#endif

#if LANES == 8 && !defined(HALVES)
static inline void store_bf16(uint16_t *p, V a) {
    float values[LANES];
    store(values, a);
    for (int i = 0; i < LANES; i++) p[i] = word_of(values[i]);
}
#endif

#define INLINE static inline __attribute__((always_inline))

static uint8_t pair_bits[256]; /* two 4-bit pairs of 2:4 metadata to the 8 bits they stand for */

__attribute__((constructor)) static void make_tables(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int half = 0; half < 2; half++) {
            int pair = byte >> (4 * half) & 15;
            if ((pair & 3) < pair >> 2) /* else it is damaged, and has no bits: `cospadi_starts` finds it */
                pair_bits[byte] |= (uint8_t)((1 << (pair & 3) | 1 << (pair >> 2)) << (4 * half));
        }
#if LANES == 8 && defined(__AVX2__) && defined(__FMA__)
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, next = 0; i < 8; i++)
            if (mask >> i & 1) spread[mask] |= (uint64_t)next++ << (8 * i);
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, next = 0; i < 8; i++) {
            int from = mask >> i & 1 ? 2 * next++ : 128; /* the upper bit of a byte of the control makes a zero */
            spread_words[mask][2 * i] = (uint8_t)from;
            spread_words[mask][2 * i + 1] = (uint8_t)(from | 1);
        }
#endif
}

/* Atoms of a column, by the bits of its support; -1 where it has bits behind the last atom, or a quadruple of 2:4 has
 * other than two. */
static int64_t count_column(const Matrix *m, const uint8_t *row) {
    const int64_t row_bytes = (m->k + 7) / 8, behind = 8 * row_bytes - m->k;
    int64_t count = 0;
    if (m->support == DENSE) return m->k;
    if (behind && (m->support == BITMASK ? row[row_bytes - 1] >> (8 - behind) : row[row_bytes - 1] >> 4)) return -1;
    if (m->support == BITMASK)
        for (int64_t i = 0; i < row_bytes; i += 8) {
            uint64_t bits = 0;
            memcpy(&bits, row + i, (size_t)(row_bytes - i < 8 ? row_bytes - i : 8));
            count += __builtin_popcountll(bits);
        }
    else
        for (int64_t i = 0; i < row_bytes; i++) {
            int bits = __builtin_popcount(pair_bits[row[i]]);
            if (bits != (behind && i == row_bytes - 1 ? 2 : 4)) return -1;
            count += bits;
        }
    return count;
}

INLINE V decode(int codec, const uint8_t *stream, int64_t n) {
    if (codec == BF16) return bf16(stream + 2 * n);
    if (codec == INT8) return int8(stream + n);
    if (codec == BF14) return bf14(stream + (14 * n >> 3), (int)(14 * n & 7));
    uint64_t nibbles;
    memcpy(&nibbles, stream + (n >> 1), 8);
    if (n & 1) nibbles = nibbles >> 4 | (uint64_t)stream[(n >> 1) + 8] << 60;
    return int4(nibbles);
}

static int64_t bytes_before(int codec, int64_t n) {
    return codec == BF16 ? 2 * n : codec == INT8 ? n : codec == BF14 ? (14 * n + 7) >> 3 : (n + 1) >> 1;
}

/* near the end of a stream: from a copy with room behind it */
static __attribute__((noinline)) V decode_end(int codec, const uint8_t *stream, int64_t n, int64_t total) {
    uint8_t end[160] = {0};
    int64_t first = n & ~(int64_t)3; /* 4 values are whole bytes in every codec */
    int64_t skip = bytes_before(codec, first);
    int64_t length = bytes_before(codec, total) - skip;
    memcpy(end, stream + skip, (size_t)(length < 96 ? length : 96));
    switch (codec) {
    case BF16: return decode(BF16, end, n - first);
    case BF14: return decode(BF14, end, n - first);
    case INT8: return decode(INT8, end, n - first);
    default: return decode(INT4, end, n - first);
    }
}

INLINE V decode_safely(int codec, const uint8_t *stream, int64_t n, int64_t total) {
    return __builtin_expect(n + MARGIN <= total, 1) ? decode(codec, stream, n) : decode_end(codec, stream, n, total);
}

INLINE uint32_t positions_at(int support, const uint8_t *row, int64_t i, int64_t row_bytes) {
    if (support == DENSE) return (1u << LANES) - 1;
    uint32_t mask = support == BITMASK ? row[i / 8] : pair_bits[row[i / 8]];
    if (LANES == 16 && i / 8 + 1 < row_bytes)
        mask |= (uint32_t)(support == BITMASK ? row[i / 8 + 1] : pair_bits[row[i / 8 + 1]]) << 8;
    return mask;
}

#ifdef HALVES
/* whether a matrix of this kind is taken 2 LANES atoms at a time */
INLINE int in_halves(int codec, int support) { return codec == BF16 && (LANES == 8 || support != DENSE); }

/* whether 2 LANES atoms from atom i on can be taken at once, the first value is number n; where so many values are
 * left, there are as many bits of the support, so nothing is read behind either */
INLINE int at_once(const Matrix *m, int codec, int support, int64_t i, int64_t n) {
    return in_halves(codec, support) && (support == DENSE ? i + 2 * LANES : i + 1) <= m->k &&
        n + 2 * LANES <= m->n_nonzero;
}

INLINE uint32_t positions_of_two(const Matrix *m, int support, const uint8_t *row, int64_t i) {
    uint32_t mask = 0;
    if (support == BITMASK) memcpy(&mask, row + i / 8, LANES / 4);
    else
        for (int byte = 0; byte < LANES / 4; byte++) mask |= (uint32_t)pair_bits[row[i / 8 + byte]] << (8 * byte);
    return i + 2 * LANES <= m->k ? mask : mask & ((1u << (m->k - i)) - 1);
}

/* the values of 2 LANES atoms from atom i on, in 16-bit words */
INLINE Words step_words(const Matrix *m, int support, const uint8_t *row, int64_t i, int64_t *n) {
    const uint8_t *values = m->values + 2 * *n;
    if (support == DENSE) {
        *n += 2 * LANES;
        return load_words(values);
    }
    const uint32_t mask = positions_of_two(m, support, row, i);
    *n += __builtin_popcount(mask);
    return expand_words(mask, values);
}
#endif

/* ---- z = x D ---- */

INLINE void add_rows(const Task *t, int codec, int rows, int64_t i, float *z) {
    const Matrix *m = t->m;
    const int64_t total = m->d_in * m->k;
    const int64_t group = codec == INT8 || codec == INT4 ? i / m->dictionary_group : 0;
    const uint8_t *scales = codec == INT8 || codec == INT4 ? (const uint8_t *)m->dictionary_scales : NULL;
    const int64_t n_scales = scales ? ((m->d_in - 1) / m->dictionary_group + 1) * m->k : 0;
    const uint8_t *next = m->dictionary + bytes_before(codec, (i + rows) * m->k);
    const int64_t step = bytes_before(codec, rows * LANES);
    const int64_t ahead = bytes_before(codec, rows * m->k) <= FORESEEN ? step : 0;
    for (int64_t c = 0; c < m->k; c += LANES) {
        V d[ROWS], scale = zero();
        /* rows of a small matrix are too short for the processor to foresee what follows them */
        for (int64_t b = 0; b < ahead; b += 64) __builtin_prefetch(next + c / LANES * step + b);
        for (int r = 0; r < rows; r++) d[r] = decode_safely(codec, m->dictionary, (i + r) * m->k + c, total);
        if (scales) scale = decode_safely(BF16, scales, group * m->k + c, n_scales);
        for (int64_t b = 0; b < t->batch; b++) {
            V part = scales ? zero() : load(z + b * t->stride + c);
            for (int r = 0; r < rows; r++) {
                float x = t->is_bf16 ? float_of(((const uint16_t *)t->x)[b * m->d_in + i + r])
                                     : ((const float *)t->x)[b * m->d_in + i + r];
                part = fma_(splat(x), d[r], part);
            }
            if (scales) part = fma_(part, scale, load(z + b * t->stride + c));
            store(z + b * t->stride + c, part);
        }
    }
}

#if defined(HALVES) && LANES == 8
enum { WORD_ROWS = 8 }; /* rows of D side by side: with z and what is decoded they fill the 16 registers */

/* z += x D, in the order of halves, for WORD_ROWS rows of a bfloat16 D; vectors that end after the rows do */
static void add_rows_of_words(const Task *t, int64_t i, float *z) {
    const int64_t k = t->m->k, row = 2 * k, ahead = row * WORD_ROWS <= FORESEEN;
    for (int64_t b = 0; b < t->batch; b++, z += t->stride) {
        const uint8_t *d = t->m->dictionary + i * row, *next = d + WORD_ROWS * row;
        V x[WORD_ROWS];
        for (int r = 0; r < WORD_ROWS; r++)
            x[r] = splat(t->is_bf16 ? float_of(((const uint16_t *)t->x)[b * t->m->d_in + i + r])
                                    : ((const float *)t->x)[b * t->m->d_in + i + r]);
        for (int64_t c = 0; c < k; c += 2 * LANES, d += 4 * LANES) {
            V even[2] = {load(z + c), zero()}, odd[2] = {load(z + c + LANES), zero()}; /* one sum waits for itself */
            if (ahead && b == 0) /* rows of a small matrix are too short for the processor to foresee what follows */
                for (int line = 0; line < WORD_ROWS / 2; line++, next += 64) __builtin_prefetch(next);
#pragma GCC unroll 8
            for (int r = 0; r < WORD_ROWS; r++) {
                Words words = load_words(d + r * row);
                even[r / 4] = fma_(x[r], even_of(words), even[r / 4]);
                odd[r / 4] = fma_(x[r], odd_of(words), odd[r / 4]);
            }
            store(z + c, add(even[0], even[1]));
            store(z + c + LANES, add(odd[0], odd[1]));
        }
    }
}
#endif

INLINE void project_with(const Task *t, int codec, int64_t first, int64_t last, float *z) {
    const Matrix *m = t->m;
    int64_t i = first;
    while (i < last) {
        int64_t end = last;
        if ((codec == INT8 || codec == INT4) && (i / m->dictionary_group + 1) * m->dictionary_group < end)
            end = (i / m->dictionary_group + 1) * m->dictionary_group;
        for (; i + ROWS <= end; i += ROWS) add_rows(t, codec, ROWS, i, z);
        for (; i < end; i++) add_rows(t, codec, 1, i, z);
    }
}

static void project(const Task *t, int64_t first, int64_t last, float *z) {
    switch (t->m->dictionary_codec) {
    case BF16:
#if defined(HALVES) && LANES == 8
        for (; first + WORD_ROWS <= last && (first + WORD_ROWS) * t->m->k + 2 * LANES <= t->m->d_in * t->m->k;
             first += WORD_ROWS)
            add_rows_of_words(t, first, z);
        for (int64_t b = 0; b < t->batch; b++) join_halves(z + b * t->stride, t->stride);
#endif
        project_with(t, BF16, first, last, z);
        break;
    case BF14: project_with(t, BF14, first, last, z); break;
    case INT8: project_with(t, INT8, first, last, z); break;
    default: project_with(t, INT4, first, last, z);
    }
}

/* ---- y = z S ---- */

/* where the walk along the stored values of a column is */
typedef struct {
    int64_t n, left, group;
    const uint16_t *scales;
} Walk;

INLINE Walk walk_from(const Matrix *m, int codec, int64_t n, int64_t n_scales) {
    return (Walk){n, m->group, 0, codec == INT8 || codec == INT4 ? m->scales + n_scales : NULL};
}

/* where a vector can hold values of more than two groups */
static __attribute__((noinline)) V scaled_singly(const Matrix *m, V value, int64_t count, Walk *w) {
    float values[LANES];
    store(values, value);
    for (int64_t c = 0; c < count; c++) {
        values[c] *= float_of(w->scales[w->group]);
        if (--w->left == 0) w->left = m->group, w->group++;
    }
    return load(values);
}

/* the values of LANES atoms from atom i on */
INLINE V step(const Matrix *m, int codec, int support, const uint8_t *row, int64_t i, Walk *w) {
    uint32_t mask = positions_at(support, row, i, (m->k + 7) / 8);
    int64_t count = support != DENSE ? __builtin_popcount(mask) : m->k - i < LANES ? m->k - i : LANES;
    V value = decode_safely(codec, m->values, w->n, m->n_nonzero);
    if ((codec == INT8 || codec == INT4) && m->group < LANES) value = scaled_singly(m, value, count, w);
    else if ((codec == INT8 || codec == INT4) && count) {
        V scale = splat(float_of(w->scales[w->group]));
        if (count > w->left) scale = first_or((int)w->left, scale, splat(float_of(w->scales[w->group + 1])));
        value = mul(value, scale);
        w->left -= count;
        if (w->left <= 0) w->left += m->group, w->group++;
    }
    w->n += count;
    if (support != DENSE) return expand(mask, value);
    return count == LANES ? value : first_or((int)count, value, zero());
}

INLINE int64_t scales_behind(const Matrix *m, const Walk *w) { return w->group + (w->left < m->group); }

INLINE void column(const Task *t, int codec, int support, int batch, int64_t b0, int64_t j, int64_t *n,
                   int64_t *n_scales) {
    const Matrix *m = t->m;
    const uint8_t *row = m->positions + j * ((m->k + 7) / 8);
    const float *z = t->z + b0 * t->stride;
    Walk w = walk_from(m, codec, *n, *n_scales);
    V even[4], odd[4];
    for (int b = 0; b < batch; b++) even[b] = odd[b] = zero();
    int64_t i = 0;
#ifdef HALVES
    const float *halves = t->halves + b0 * t->stride;
    for (; at_once(m, codec, support, i, w.n); i += 2 * LANES) {
        Words words = step_words(m, support, row, i, &w.n);
        for (int b = 0; b < batch; b++) {
            even[b] = fma_(even_of(words), load(halves + b * t->stride + i), even[b]);
            odd[b] = fma_(odd_of(words), load(halves + b * t->stride + i + LANES), odd[b]);
        }
    }
#endif
    for (; i < m->k; i += 2 * LANES) {
        V value = step(m, codec, support, row, i, &w);
        for (int b = 0; b < batch; b++) even[b] = fma_(value, load(z + b * t->stride + i), even[b]);
        if (i + LANES >= m->k) break;
        value = step(m, codec, support, row, i + LANES, &w);
        for (int b = 0; b < batch; b++) odd[b] = fma_(value, load(z + b * t->stride + i + LANES), odd[b]);
    }
    for (int b = 0; b < batch; b++) {
        float y = sum(add(even[b], odd[b]));
        if (t->is_bf16) ((uint16_t *)t->y)[(b0 + b) * m->d_out + j] = word_of(y);
        else ((float *)t->y)[(b0 + b) * m->d_out + j] = y;
    }
    *n = w.n;
    *n_scales += scales_behind(m, &w);
}

#if defined(HALVES) && LANES == 8
/* 4 LANES atoms of a column, of which `atoms` are still in it, times `batch` rows of z; with one row in four sums, as
 * two are too few to keep the multiplier busy */
INLINE const uint8_t *add_words(const uint8_t *values, const uint8_t *row, int support, int atoms, const float *z,
                                int64_t stride, int batch, V *sums) {
    Words words[2];
    if (support == DENSE) {
        uint16_t end[4 * LANES];
        const uint8_t *from = values;
        if (atoms < 4 * LANES) { /* what follows may be infinite, and z's zeros do not help then */
            for (int i = 0; i < 4 * LANES; i++) end[i] = i < atoms ? ((const uint16_t *)values)[i] : 0;
            from = (const uint8_t *)end;
        }
        words[0] = load_words(from);
        words[1] = load_words(from + 4 * LANES);
        values += 2 * atoms;
    } else {
        uint32_t mask;
        memcpy(&mask, row, 4);
        if (support == TWO_OF_FOUR)
            mask = pair_bits[mask & 255] | (uint32_t)pair_bits[mask >> 8 & 255] << 8 |
                (uint32_t)pair_bits[mask >> 16 & 255] << 16 | (uint32_t)pair_bits[mask >> 24] << 24;
        if (atoms < 4 * LANES) mask &= (1u << atoms) - 1;
        words[0] = expand_words(mask & 0xffff, values);
        words[1] = expand_words(mask >> 16, values + 2 * (size_t)(unsigned)__builtin_popcount(mask & 0xffff));
        values += 2 * (size_t)(unsigned)__builtin_popcount(mask);
    }
    for (int b = 0; b < batch; b++) {
        const int other = batch == 1 ? 2 : 0;
        V *sum = sums + 4 * b;
        sum[0] = fma_(even_of(words[0]), load(z + b * stride), sum[0]);
        sum[1] = fma_(odd_of(words[0]), load(z + b * stride + LANES), sum[1]);
        sum[other] = fma_(even_of(words[1]), load(z + b * stride + 2 * LANES), sum[other]);
        sum[other + 1] = fma_(odd_of(words[1]), load(z + b * stride + 3 * LANES), sum[other + 1]);
    }
    return values;
}

/* A column of bfloat16 values with at least 4 LANES others behind it: its steps of 4 LANES atoms need not look where it
 * ends. */
INLINE void column_of_words(const Task *t, int support, int batch, int64_t b0, int64_t j, int64_t *n) {
    const Matrix *m = t->m;
    const uint8_t *row = m->positions + j * ((m->k + 7) / 8), *values = m->values + 2 * *n;
    const float *z = t->halves + b0 * t->stride, *end = z + m->k / (4 * LANES) * (4 * LANES);
    V sums[4 * 4];
    for (int s = 0; s < 4 * batch; s++) sums[s] = zero();
    for (; z < end; z += 4 * LANES, row += LANES / 2)
        values = add_words(values, row, support, 4 * LANES, z, t->stride, batch, sums);
    const int rest = (int)(m->k % (4 * LANES));
    if (rest) values = add_words(values, row, support, rest, z, t->stride, batch, sums);
    for (int b = 0; b < batch; b++) {
        V *part = sums + 4 * b;
        float y = sum(add(add(part[0], part[1]), add(part[2], part[3])));
        if (t->is_bf16) ((uint16_t *)t->y)[(b0 + b) * m->d_out + j] = word_of(y);
        else ((float *)t->y)[(b0 + b) * m->d_out + j] = y;
    }
    *n = (values - m->values) / 2;
}
#endif

INLINE void columns_with(const Task *t, int codec, int support, int64_t first, int64_t last) {
    const Matrix *m = t->m;
    for (int64_t block = first; block < last; block++) {
        int64_t end = (block + 1) * BLOCK < m->d_out ? (block + 1) * BLOCK : m->d_out;
        int64_t b = 0;
#if defined(HALVES) && LANES == 8
#define WORDS_FIRST(count) \
        for (; codec == BF16 && j < end && n + m->k + 4 * LANES <= m->n_nonzero; j++) \
            column_of_words(t, support, count, b, j, &n);
#else
#define WORDS_FIRST(count)
#endif
#define ROWS_OF_X(count) { \
        int64_t n = m->starts[2 * block], n_scales = m->starts[2 * block + 1]; \
        int64_t j = block * BLOCK; \
        WORDS_FIRST(count) \
        for (; j < end; j++) column(t, codec, support, count, b, j, &n, &n_scales); \
        b += count; }
        while (b + 4 <= t->batch) ROWS_OF_X(4)
        while (b + 2 <= t->batch) ROWS_OF_X(2)
        while (b < t->batch) ROWS_OF_X(1)
    }
}

#define EVERY_CASE \
    CASE(BF16, DENSE) CASE(BF16, BITMASK) CASE(BF16, TWO_OF_FOUR) \
    CASE(BF14, DENSE) CASE(BF14, BITMASK) CASE(BF14, TWO_OF_FOUR) \
    CASE(INT8, DENSE) CASE(INT8, BITMASK) CASE(INT8, TWO_OF_FOUR) \
    CASE(INT4, DENSE) CASE(INT4, BITMASK) CASE(INT4, TWO_OF_FOUR)

static void columns(const Task *t, int64_t first, int64_t last) {
#define CASE(codec, support) case 4 * codec + support: columns_with(t, codec, support, first, last); break;
    switch (4 * t->m->codec + t->m->support) { EVERY_CASE }
#undef CASE
}

/* ---- y = z S for many rows, without the zeros of S ----
 *
 * z comes transposed: the rows of one atom lie side by side, and a stored value is multiplied with SPAN of them at a
 * time. PANEL atoms of SPAN rows are copied together and stay in the first cache while COLUMNS columns pass, whose sums
 * are in the second. A matrix product, which cannot leave the zeros out, has 2 to 3 times the multiplications. */

enum { PANEL = 64, COLUMNS = 256, VECTORS = 12, SPAN = VECTORS * LANES };

typedef struct {
    float panel[PANEL * SPAN], sums[COLUMNS * SPAN], values[PANEL + LANES];
    Walk walks[COLUMNS];
} Bench; /* of one thread */

/* the next `count` stored values of a column, without their positions */
INLINE void stored_with(const Matrix *m, int codec, Walk *w, int64_t count, float *values) {
    for (int64_t c = 0; c < count; c += LANES)
        store(values + c, decode_safely(codec, m->values, w->n + c, m->n_nonzero));
    w->n += count;
    if (codec != INT8 && codec != INT4) return;
    for (int64_t c = 0; c < count;) {
        const float scale = float_of(w->scales[w->group]);
        const int64_t end = count - c < w->left ? count : c + w->left;
        w->left -= end - c;
        for (; c < end; c++) values[c] *= scale;
        if (w->left == 0) w->left = m->group, w->group++;
    }
}

static void stored(const Matrix *m, Walk *w, int64_t count, float *values) {
    switch (m->codec) {
    case BF16: stored_with(m, BF16, w, count, values); break;
    case BF14: stored_with(m, BF14, w, count, values); break;
    case INT8: stored_with(m, INT8, w, count, values); break;
    default: stored_with(m, INT4, w, count, values);
    }
}

/* which of the PANEL atoms from atom i on a column has */
static uint64_t positions_of_panel(const Matrix *m, int64_t j, int64_t i) {
    const int64_t row_bytes = (m->k + 7) / 8, left = row_bytes - i / 8;
    uint64_t mask = 0, pairs;
    memcpy(&mask, m->positions + j * row_bytes + i / 8, (size_t)(left < 8 ? left : 8));
    if (m->support == BITMASK) return mask;
    pairs = mask, mask = 0;
    for (int byte = 0; byte < 8; byte++) mask |= (uint64_t)pair_bits[pairs >> (8 * byte) & 255] << (8 * byte);
    return mask;
}

INLINE void add_panel_with(const Matrix *m, Bench *o, int vectors, int64_t first, int64_t last, int64_t i) {
    for (int64_t j = first; j < last; j++) {
        uint64_t mask = positions_of_panel(m, j, i);
        const int64_t count = __builtin_popcountll(mask);
        float *sums = o->sums + (j - first) * SPAN;
        const float *value = o->values;
        V sum[VECTORS], other[VECTORS];
        stored(m, &o->walks[j - first], count, o->values);
#pragma GCC unroll 12
        for (int v = 0; v < vectors; v++) sum[v] = load(sums + v * LANES), other[v] = zero();
        if (vectors <= 4) /* a few sums wait for themselves */
            for (; mask & (mask - 1); value += 2) {
                const float *z = o->panel + (unsigned)__builtin_ctzll(mask) * (unsigned)(vectors * LANES);
                mask &= mask - 1;
                const float *next = o->panel + (unsigned)__builtin_ctzll(mask) * (unsigned)(vectors * LANES);
                mask &= mask - 1;
#pragma GCC unroll 12
                for (int v = 0; v < vectors; v++) {
                    sum[v] = fma_(splat(value[0]), load(z + v * LANES), sum[v]);
                    other[v] = fma_(splat(value[1]), load(next + v * LANES), other[v]);
                }
            }
        for (; mask; mask &= mask - 1, value++) {
            const float *z = o->panel + (unsigned)__builtin_ctzll(mask) * (unsigned)(vectors * LANES);
            const V s = splat(*value);
#pragma GCC unroll 12
            for (int v = 0; v < vectors; v++) sum[v] = fma_(s, load(z + v * LANES), sum[v]);
        }
#pragma GCC unroll 12
        for (int v = 0; v < vectors; v++) store(sums + v * LANES, vectors <= 4 ? add(sum[v], other[v]) : sum[v]);
    }
}

static void add_panel(const Matrix *m, Bench *o, int vectors, int64_t first, int64_t last, int64_t i) {
#define CASE(count) case count: add_panel_with(m, o, count, first, last, i); break;
    switch (vectors) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

/* y of up to LANES rows and columns from the sums of the columns */
static void turn(const Task *t, const float *sums, int64_t b, int64_t j, int64_t rows, int64_t columns) {
    const int64_t d_out = t->m->d_out;
    float y[LANES][LANES];
    const int whole = rows >= LANES && columns >= LANES;
    rows = rows < LANES ? rows : LANES, columns = columns < LANES ? columns : LANES;
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++) y[r][c] = sums[c * SPAN + r];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t to = (b + r) * d_out + j;
        if (whole && t->is_bf16) store_bf16((uint16_t *)t->y + to, load(y[r]));
        else if (t->is_bf16)
            for (int64_t c = 0; c < columns; c++) ((uint16_t *)t->y)[to + c] = word_of(y[r][c]);
        else memcpy((float *)t->y + to, y[r], (size_t)columns * sizeof(float));
    }
}

static void many_rows(const Task *t, Bench *o, int64_t first_block, int64_t last_block) {
    const Matrix *m = t->m;
    const int64_t row_bytes = (m->k + 7) / 8, in_all = (t->batch + LANES - 1) / LANES;
    const int64_t spans = (in_all + VECTORS - 1) / VECTORS;
    for (int64_t block = first_block; block < last_block; block += COLUMNS / BLOCK) {
        const int64_t end_block = block + COLUMNS / BLOCK < last_block ? block + COLUMNS / BLOCK : last_block;
        const int64_t first = block * BLOCK, last = end_block * BLOCK < m->d_out ? end_block * BLOCK : m->d_out;
        for (int64_t span = 0; span < spans; span++) {
            const int64_t b0 = in_all * span / spans * LANES, end = in_all * (span + 1) / spans * LANES;
            const int64_t width = end - b0, rows = (end < t->batch ? end : t->batch) - b0;
            int64_t n = m->starts[2 * block], n_scales = m->starts[2 * block + 1];
            for (int64_t j = first; j < last; j++) {
                const int64_t count = count_column(m, m->positions + j * row_bytes);
                o->walks[j - first] = walk_from(m, (int)m->codec, n, n_scales);
                n += count;
                n_scales += (count + m->group - 1) / m->group;
            }
            memset(o->sums, 0, (size_t)(last - first) * SPAN * sizeof(float));
            for (int64_t i = 0; i < m->k; i += PANEL) {
                for (int64_t a = 0; a < PANEL && i + a < m->k; a++) {
                    float *z = o->panel + a * width;
                    memcpy(z, t->z + (i + a) * t->batch + b0, (size_t)rows * sizeof(float));
                    for (int64_t b = rows; b < width; b++) z[b] = 0;
                }
                add_panel(m, o, (int)(width / LANES), first, last, i);
            }
            for (int64_t b = 0; b < rows; b += LANES)
                for (int64_t j = first; j < last; j += LANES)
                    turn(t, o->sums + (j - first) * SPAN + b, b0 + b, j, rows - b, last - j);
        }
    }
}

/* ---- S itself ---- */

INLINE void unpack_with(const Task *t, int codec, int support, int64_t first, int64_t last) {
    const Matrix *m = t->m;
    int64_t n = m->starts[2 * first], n_scales = m->starts[2 * first + 1];
    int64_t end = last * BLOCK < m->d_out ? last * BLOCK : m->d_out;
    for (int64_t j = first * BLOCK; j < end; j++) {
        Walk w = walk_from(m, codec, n, n_scales);
        const uint8_t *row = m->positions + j * ((m->k + 7) / 8);
        int64_t i = 0;
#ifdef HALVES
        for (; t->is_bf16 && at_once(m, codec, support, i, w.n); i += 2 * LANES)
            store_words((uint16_t *)t->y + j * t->stride + i, step_words(m, support, row, i, &w.n));
#endif
        for (; i < m->k; i += LANES) {
            V value = step(m, codec, support, row, i, &w);
            if (t->is_bf16) store_bf16((uint16_t *)t->y + j * t->stride + i, value);
            else store((float *)t->y + j * t->stride + i, value);
        }
        n = w.n;
        n_scales += scales_behind(m, &w);
    }
}

static void unpack(const Task *t, int64_t first, int64_t last) {
#define CASE(codec, support) case 4 * codec + support: unpack_with(t, codec, support, first, last); break;
    switch (4 * t->m->codec + t->m->support) { EVERY_CASE }
#undef CASE
}

/* first block of thread `index`: equal shares of the stored values, and of the support's bits */
static int64_t share(const Matrix *m, int64_t index, int64_t count) {
    int64_t blocks = (m->d_out + BLOCK - 1) / BLOCK, low = 0, high = blocks;
    if (index == count) return blocks;
    double goal = (double)(m->n_nonzero + blocks * m->k) * (double)index / (double)count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if ((double)(m->starts[2 * middle] + middle * m->k) < goal) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void work(void *argument) {
    const Task *t = argument;
    const Matrix *m = t->m;
    const int64_t me = t->omp ? t->omp->thread() : 0, team = t->omp ? t->omp->threads() : 1;
    const int64_t size = t->batch * t->stride;
    if (t->stages & FIRST) {
        float *mine = team == 1 ? t->z : t->shares + me * size;
        int64_t steps = (m->d_in + ROWS - 1) / ROWS;
        int64_t first = steps * me / team * ROWS, last = steps * (me + 1) / team * ROWS;
        memset(mine, 0, (size_t)size * sizeof(float));
        project(t, first, last < m->d_in ? last : m->d_in, mine);
        for (int64_t b = 0; b < t->batch; b++) /* what was read behind the last atom is not part of z */
            memset(mine + b * t->stride + m->k, 0, (size_t)(t->stride - m->k) * sizeof(float));
        if (team > 1) {
            t->omp->barrier();
            int64_t parts = size / LANES;
            for (int64_t i = parts * me / team; i < parts * (me + 1) / team; i++) {
                V total = load(t->shares + i * LANES);
                for (int64_t other = 1; other < team; other++)
                    total = add(total, load(t->shares + other * size + i * LANES));
                store(t->z + i * LANES, total);
            }
            t->omp->barrier();
        }
    }
    if (t->stages & LAST) {
        Task mine = *t;
#ifdef HALVES
        float *halves = t->shares + me * size;
        if (in_halves((int)m->codec, (int)m->support))
            for (int64_t b = 0; b < t->batch; b++)
                split_halves(t->z + b * t->stride, halves + b * t->stride, t->stride);
        mine.halves = halves;
#endif
        columns(&mine, share(m, me, team), share(m, me + 1, team));
    }
    if (t->stages & MANY)
        many_rows(t, (Bench *)(void *)t->shares + me, share(m, me, team), share(m, me + 1, team));
    if (t->stages & UNPACK) unpack(t, share(m, me, team), share(m, me + 1, team));
}

static void run(Task *t, unsigned threads) {
    if (t->omp && threads > 1) t->omp->parallel(work, t, threads, 0);
    else {
        t->omp = NULL;
        work(t);
    }
}

/* ---- what Python calls ---- */

const char *cospadi_kind(void) { return KIND; }

/* floats a row of z takes */
int64_t cospadi_stride(int64_t k) { return (k + 31) / 32 * 32; }

/* First value and first scale of every block of columns; the numbers of values and scales in the last line. Returns the
 * first column whose support is damaged, -1 if there is none. Reads nothing but the support. */
int64_t cospadi_starts(const Matrix *m, int64_t *starts) {
    const int64_t row_bytes = (m->k + 7) / 8;
    int64_t n = 0, n_scales = 0;
    for (int64_t j = 0; j < m->d_out; j++) {
        if (j % BLOCK == 0) {
            starts[2 * (j / BLOCK)] = n;
            starts[2 * (j / BLOCK) + 1] = n_scales;
        }
        int64_t count = count_column(m, m->positions + j * row_bytes);
        if (count < 0) return j;
        n += count;
        n_scales += (count + m->group - 1) / m->group;
    }
    starts[2 * ((m->d_out + BLOCK - 1) / BLOCK)] = n;
    starts[2 * ((m->d_out + BLOCK - 1) / BLOCK) + 1] = n_scales;
    return -1;
}

/* z = x D where `x` is given, then y = z S where `y` is; z is (batch, stride), scratch `threads` times as large */
void cospadi_product(const Matrix *m, const OpenMP *omp, int64_t threads, const void *x, float *z, void *y,
                     float *scratch, int64_t batch, int64_t is_bf16) {
    Task t = {m, omp, x, z, y, scratch, NULL, batch, cospadi_stride(m->k), is_bf16, (x ? FIRST : 0) | (y ? LAST : 0)};
    run(&t, (unsigned)threads);
}

/* S transposed, (d_out, stride) in bfloat16 or float32, for blocks of columns `first` to `last` */
void cospadi_unpack(const Matrix *m, const OpenMP *omp, int64_t threads, void *codes, int64_t is_bf16) {
    Task t = {m, omp, NULL, NULL, codes, NULL, NULL, 0, cospadi_stride(m->k), is_bf16, UNPACK};
    run(&t, (unsigned)threads);
}

/* bytes of scratch that a thread takes for `cospadi_many` */
int64_t cospadi_bench(void) { return (int64_t)sizeof(Bench); }

/* y = z S for z (k, batch) and a support with positions */
void cospadi_many(const Matrix *m, const OpenMP *omp, int64_t threads, const float *z, void *y, float *scratch,
                  int64_t batch, int64_t is_bf16) {
    Task t = {m, omp, NULL, (float *)(uintptr_t)z, y, scratch, NULL, batch, cospadi_stride(m->k), is_bf16, MANY};
    run(&t, (unsigned)threads);
}
"""
