"""The C source of the CPU kernel: compiled by `cospadi_compiler` on the machine that runs it.

It is a string because only Python files travel: transformers copies no other into its cache of remote code.
"""

SOURCE = r"""
#ifdef WITH_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif
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

enum { BF16, BF14, INT8, INT4, IDENTITY, TRELLIS, FEW }; /* integers of other numbers of bits: FEW + bits */
enum { DENSE, BITMASK, TWO_OF_FOUR };
enum { FIRST = 1, LAST = 2, UNPACK = 4, MANY = 8 };
enum { BLOCK = 16 };  /* columns between two entries of `starts` */
enum { FORESEEN = 1 << 14 }; /* bytes of rows of D up to which the next ones are asked for ahead */
enum { MARGIN = 48 }; /* values before the end that are decoded from a padded copy */

typedef struct {
    int64_t d_in, d_out, k, n_nonzero;
    int64_t dictionary_codec, dictionary_group;
    int64_t codec, bits, support, group;
    const uint8_t *dictionary, *values, *positions;
    const uint16_t *dictionary_scales, *scales; /* of a trellis those of rows, then of columns, at any address */
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
    float *halves; /* (batch, stride): of every 2 LANES atoms the even ones of z, then the odd ones; see `lay_out_z` */
    int64_t batch, stride, is_bf16, stages;
    const float *before; /* (batch, d_out): what other matrices gave, or NULL */
    float *after;        /* the same for those that follow; NULL: y is written */
} Task;

/* Matrices whose products with the same x are added up */
typedef struct {
    const Task *tasks; /* one for each */
    int64_t n_tasks;
} Work;

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

#define INLINE static inline __attribute__((always_inline))

/* 8 values of up to 7 bits from a bit of p on; of 8 bytes that are read */
INLINE uint64_t few_of(const uint8_t *p, int shift) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word >> shift;
}

/* ---- a vector of floats, for three kinds of machines ---- */

#if defined(__AVX2__)
#include <immintrin.h>
INLINE __m256i few_integers(int bits, uint64_t word) { /* each half of the lanes moves a word of 32 bits */
    const __m256i both = _mm256_set_m128i(_mm_set1_epi32((int)(word >> 4 * bits)), _mm_set1_epi32((int)word));
    const __m256i left = _mm256_setr_epi32(32 - bits, 32 - 2 * bits, 32 - 3 * bits, 32 - 4 * bits,
                                           32 - bits, 32 - 2 * bits, 32 - 3 * bits, 32 - 4 * bits);
    return _mm256_srai_epi32(_mm256_sllv_epi32(both, left), 32 - bits);
}
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
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
INLINE V few(int bits, const uint8_t *p, int shift) {
    const __m256i first = few_integers(bits, few_of(p, shift)), second = few_integers(bits, few_of(p + bits, shift));
    return _mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
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
INLINE V few(int bits, const uint8_t *p, int shift) {
    return _mm256_cvtepi32_ps(few_integers(bits, few_of(p, shift)));
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
INLINE V few(int bits, const uint8_t *p, int shift) {
    const uint64_t word = few_of(p, shift);
    EACH((int32_t)((uint32_t)(word >> bits * i) << (32 - bits)) >> (32 - bits));
}
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

INLINE int bits_of(int codec) {
    return codec == BF16 ? 16 : codec == BF14 ? 14 : codec == INT8 ? 8 : codec == INT4 ? 4 : codec - FEW;
}

INLINE int64_t family(int64_t codec) { return codec < FEW ? codec : FEW; }

/* A codec of a family. Code is compiled for each but those of FEW, which share theirs: of them the compiler knows that
 * they are no others. */
INLINE int codec_of(int family, int64_t codec) {
    if (family == FEW && (codec < FEW + 2 || codec > FEW + 7)) __builtin_unreachable();
    return family == FEW ? (int)codec : family;
}

INLINE int is_scaled(int codec) { return codec != BF16 && codec != BF14; }

INLINE V decode(int codec, const uint8_t *stream, int64_t n) {
    const int64_t bit = bits_of(codec) * n;
    if (codec == BF16) return bf16(stream + 2 * n);
    if (codec == INT8) return int8(stream + n);
    if (codec == BF14) return bf14(stream + (bit >> 3), (int)(bit & 7));
    if (codec != INT4) return few(bits_of(codec), stream + (bit >> 3), (int)(bit & 7));
    uint64_t nibbles;
    memcpy(&nibbles, stream + (n >> 1), 8);
    if (n & 1) nibbles = nibbles >> 4 | (uint64_t)stream[(n >> 1) + 8] << 60;
    return int4(nibbles);
}

static int64_t bytes_before(int codec, int64_t n) { return (bits_of(codec) * n + 7) >> 3; }

#define EVERY_FAMILY_BUT_BF16(DO) DO(BF14) DO(INT8) DO(INT4) DO(FEW)
#define EVERY_FAMILY(DO) DO(BF16) EVERY_FAMILY_BUT_BF16(DO)

/* near the end of a stream: from a copy with room behind it */
static __attribute__((noinline)) V decode_end(int codec, const uint8_t *stream, int64_t n, int64_t total) {
    uint8_t end[160] = {0};
    int64_t first = n & ~(int64_t)7; /* 8 values are whole bytes in every codec */
    int64_t skip = bytes_before(codec, first);
    int64_t length = bytes_before(codec, total) - skip;
    memcpy(end, stream + skip, (size_t)(length < 96 ? length : 96));
    switch (family(codec)) {
#define OF(family) case family: return decode(codec_of(family, codec), end, n - first);
        EVERY_FAMILY(OF)
#undef OF
    }
    return zero();
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
    const int64_t group = is_scaled(codec) ? i / m->dictionary_group : 0;
    const uint8_t *scales = is_scaled(codec) ? (const uint8_t *)m->dictionary_scales : NULL;
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
        if (is_scaled(codec) && (i / m->dictionary_group + 1) * m->dictionary_group < end)
            end = (i / m->dictionary_group + 1) * m->dictionary_group;
        for (; i + ROWS <= end; i += ROWS) add_rows(t, codec, ROWS, i, z);
        for (; i < end; i++) add_rows(t, codec, 1, i, z);
    }
}

static void project(const Task *t, int64_t first, int64_t last, float *z) {
    switch (family(t->m->dictionary_codec)) {
    case BF16:
#if defined(HALVES) && LANES == 8
        for (; first + WORD_ROWS <= last && (first + WORD_ROWS) * t->m->k + 2 * LANES <= t->m->d_in * t->m->k;
             first += WORD_ROWS)
            add_rows_of_words(t, first, z);
        for (int64_t b = 0; b < t->batch; b++) join_halves(z + b * t->stride, t->stride);
#endif
        project_with(t, BF16, first, last, z);
        break;
#define OF(family) case family: project_with(t, codec_of(family, t->m->dictionary_codec), first, last, z); break;
        EVERY_FAMILY_BUT_BF16(OF)
#undef OF
    }
}

/* ---- y = z S ---- */

/* where the walk along the stored values of a column is */
typedef struct {
    int64_t n, left, group;
    const uint16_t *scales;
} Walk;

INLINE Walk walk_from(const Matrix *m, int codec, int64_t n, int64_t n_scales) {
    return (Walk){n, m->group, 0, is_scaled(codec) ? m->scales + n_scales : NULL};
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
    if (is_scaled(codec) && m->group < LANES) value = scaled_singly(m, value, count, w);
    else if (is_scaled(codec) && count) {
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

INLINE void put(const Task *t, int64_t at, float y) {
    if (t->before) y += t->before[at];
    if (t->after) t->after[at] = y;
    else if (t->is_bf16) ((uint16_t *)t->y)[at] = word_of(y);
    else ((float *)t->y)[at] = y;
}

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
    for (int b = 0; b < batch; b++) put(t, (b0 + b) * m->d_out + j, sum(add(even[b], odd[b])));
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
        put(t, (b0 + b) * m->d_out + j, sum(add(add(part[0], part[1]), add(part[2], part[3]))));
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

#define EVERY_SUPPORT(family) CASE(family, DENSE) CASE(family, BITMASK) CASE(family, TWO_OF_FOUR)
#define EVERY_CASE EVERY_FAMILY(EVERY_SUPPORT)

/* ---- a trellis: codes of a few bits that are read with those before them in their row ----
 *
 * The bytes of 32 rows lie side by side: a *plane* is one byte of each. Two planes are 32 words of 16 bits; a state is
 * 12 bits of such a word, or of two, and becomes a value by a few integer operations, 16 at a time (`value_of` of
 * `cospadi_trellis`). Of every column sums of 8 rows are kept until all rows have been there. */

enum { ROWS_ASIDE = 32, TILE = 256 }; /* TILE: columns whose sums stay in the first cache, times rows of x */
enum { MULTIPLIER = 16 * 1077, MIDDLE = 4012, SLOPE = 5082, STATE = 4095 };

INLINE float scale_at(const Matrix *m, int64_t i) {
    uint16_t word;
    memcpy(&word, (const uint8_t *)m->scales + 2 * i, 2);
    return float_of(word);
}

/* an entry of z; where the dictionary is the identity, of x, which needs no copy then */
INLINE float z_at(const Task *t, int64_t b, int64_t i) {
    if (t->m->dictionary_codec != IDENTITY) return t->z[b * t->stride + i];
    return t->is_bf16 ? float_of(((const uint16_t *)t->x)[b * t->m->k + i]) : ((const float *)t->x)[b * t->m->k + i];
}

INLINE int64_t bytes_of_row(const Matrix *m) { return (m->bits * m->d_out + 7) / 8; }

/* The planes of 16 columns from column j on, and the two before, as 32 rows have them: where they lie, or, if there are
 * fewer rows or not so many planes, a copy. Planes that are not there are zero. */
enum { PLANES = 2 + 2 * 4 };
INLINE const uint8_t *planes_of(const Matrix *m, int bits, int64_t group, int64_t j, uint8_t *copy) {
    const int64_t from = bits * j / 8 - 2, to = from + 2 + 2 * bits;
    const int64_t in_row = bytes_of_row(m), left = m->k - group * ROWS_ASIDE;
    const int64_t rows = left < ROWS_ASIDE ? left : ROWS_ASIDE;
    const uint8_t *first = m->values + group * ROWS_ASIDE * in_row;
    if (__builtin_expect(from >= 0 && to <= in_row && rows == ROWS_ASIDE, 1)) return first + from * ROWS_ASIDE;
    memset(copy, 0, (size_t)((to - from) * ROWS_ASIDE));
    for (int64_t p = from < 0 ? 0 : from; p < to && p < in_row; p++)
        memcpy(copy + (p - from) * ROWS_ASIDE, first + p * rows, (size_t)rows);
    return copy;
}

#if defined(__AVX2__) && defined(__FMA__)
typedef __m256i Planes;
typedef struct { __m256i low, high; } Words32; /* of rows 0 to 7 and 16 to 23, and of rows 8 to 15 and 24 to 31 */

INLINE Planes plane(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* words of which the byte is the lower half, `next` the upper one */
INLINE Words32 joined(Planes byte, Planes next) {
    return (Words32){_mm256_unpacklo_epi8(byte, next), _mm256_unpackhi_epi8(byte, next)};
}

/* what begins at bit `at`, 5 to 7, of the words; `next` are those a byte on */
INLINE Words32 shifted(Words32 words, Words32 next, const int at) {
    words.low = _mm256_or_si256(_mm256_srli_epi16(words.low, at), _mm256_slli_epi16(next.low, 8 - at));
    words.high = _mm256_or_si256(_mm256_srli_epi16(words.high, at), _mm256_slli_epi16(next.high, 8 - at));
    return words;
}

/* values of two columns: states that begin at bit `at` of the words, and at bit `then` of `more`, 0 to 4.
 * Four at a time, step by step: one after the other they would fill the processor's window with what waits */
typedef struct { __m256i of[4]; } Pair;
INLINE Pair values_of(Words32 words, const int at, Words32 more, const int then) {
    const int from[4] = {at, at, then, then};
    __m256i flat[4] = {words.low, words.high, more.low, more.high}, bend[4];
    Pair value;
    for (int i = 0; i < 4; i++) /* what is above a state leaves by the multiplication */
        if (from[i]) flat[i] = _mm256_and_si256(flat[i], _mm256_set1_epi16((int16_t)(0xffff << from[i])));
    for (int i = 0; i < 4; i++)
        flat[i] = _mm256_mullo_epi16(flat[i], _mm256_set1_epi16((int16_t)(MULTIPLIER >> from[i])));
    for (int i = 0; i < 4; i++) bend[i] = _mm256_mulhi_epi16(flat[i], flat[i]);
    for (int i = 0; i < 4; i++) bend[i] = _mm256_sub_epi16(bend[i], _mm256_set1_epi16(MIDDLE));
    for (int i = 0; i < 4; i++) bend[i] = _mm256_mulhrs_epi16(bend[i], bend[i]);
    for (int i = 0; i < 4; i++) bend[i] = _mm256_add_epi16(bend[i], _mm256_set1_epi16(SLOPE));
    for (int i = 0; i < 4; i++) value.of[i] = _mm256_mulhrs_epi16(flat[i], bend[i]);
    return value;
}

/* values of n columns, 16 or a multiple, from planes that begin 2 bytes before, and what is done with each two */
#define EACH_TWO(bits, p, n, USE) do { \
    Planes b0 = plane(p), b1 = plane(p + 32); \
    for (int c = 0; bits == 4 && c < n; c += 2) { \
        const Planes b2 = plane(p + 64 + 16 * c); \
        const Words32 w1 = joined(b1, b2); \
        USE(c, values_of(w1, 0, w1, 4)); \
        b1 = b2; \
    } \
    for (int c = 0; bits == 3 && c < n; c += 8) { \
        const Planes b2 = plane(p + 64 + 12 * c), b3 = plane(p + 96 + 12 * c), b4 = plane(p + 128 + 12 * c); \
        const Words32 w0 = joined(b0, b1), w1 = joined(b1, b2), w2 = joined(b2, b3), w3 = joined(b3, b4); \
        USE(c, values_of(shifted(w0, w1, 7), 0, w1, 2)); \
        USE(c + 2, values_of(shifted(w1, w2, 5), 0, w2, 0)); \
        USE(c + 4, values_of(w2, 3, shifted(w2, w3, 6), 0)); \
        USE(c + 6, values_of(w3, 1, w3, 4)); \
        b0 = b3, b1 = b4; \
    } \
    for (int c = 0; bits == 2 && c < n; c += 4) { \
        const Planes b2 = plane(p + 64 + 8 * c); \
        const Words32 w0 = joined(b0, b1), w1 = joined(b1, b2); \
        USE(c, values_of(shifted(w0, w1, 6), 0, w1, 0)); \
        USE(c + 2, values_of(w1, 2, w1, 4)); \
        b0 = b1, b1 = b2; \
    } \
} while (0)

/* z times the scales of the rows, in the order in which `sums_of_pair` has values: of 16-bit words those in the lower
 * halves of 32 bits, then those in the upper halves */
static void lay_out_z(const Task *t) {
    const Matrix *m = t->m;
    for (int64_t b = 0; b < t->batch; b++)
        for (int64_t group = 0; group < m->k; group += ROWS_ASIDE) {
            const int64_t rows = m->k - group < ROWS_ASIDE ? m->k - group : ROWS_ASIDE;
            float z[ROWS_ASIDE] = {0}, *out = t->halves + b * t->stride + group;
            for (int64_t i = 0; i < rows; i++) z[i] = z_at(t, b, group + i) * scale_at(m, group + i);
            for (int i = 0; i < ROWS_ASIDE; i++) {
                const int word = 2 * (i % 8) + (i / 8 & 1);
                out[i] = z[word / 8 * 16 + word % 8 + i / 16 * 8];
            }
        }
}

/* adds the products of two columns' values, times 65536, to 8 sums of each */
INLINE void sums_of_pair(Pair value, const float *z, float *sums, int step) {
    __m256 lower[4], upper[4];
    for (int i = 0; i < 4; i++) lower[i] = _mm256_cvtepi32_ps(_mm256_slli_epi32(value.of[i], 16));
    for (int i = 0; i < 4; i++)
        upper[i] = _mm256_cvtepi32_ps(_mm256_and_si256(value.of[i], _mm256_set1_epi32((int)0xffff0000)));
    for (int c = 0; c < 2; c++, sums += step) {
        __m256 sum = _mm256_fmadd_ps(lower[2 * c], _mm256_loadu_ps(z), _mm256_load_ps(sums));
        sum = _mm256_fmadd_ps(upper[2 * c], _mm256_loadu_ps(z + 8), sum);
        sum = _mm256_fmadd_ps(lower[2 * c + 1], _mm256_loadu_ps(z + 16), sum);
        _mm256_store_ps(sums, _mm256_fmadd_ps(upper[2 * c + 1], _mm256_loadu_ps(z + 24), sum));
    }
}

INLINE float sum_of_8(const float *p) {
    __m128 h = _mm_add_ps(_mm_load_ps(p), _mm_load_ps(p + 4));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

INLINE void trellis_with(const Task *t, int bits, int batch, int64_t b0, int64_t first, int64_t last) {
    const Matrix *m = t->m;
    const int64_t ahead = ROWS_ASIDE * bytes_of_row(m);
    float sums[TILE * 8] __attribute__((aligned(32)));
    uint8_t copy[PLANES * ROWS_ASIDE];
    for (int64_t tile = first; tile < last; tile += TILE / batch) {
        const int64_t end = tile + TILE / batch < last ? tile + TILE / batch : last;
        memset(sums, 0, sizeof sums);
        for (int64_t group = 0; group * ROWS_ASIDE < m->k; group++) {
            const float *z = t->halves + b0 * t->stride + group * ROWS_ASIDE;
            for (int64_t j = tile, next; j < end; j = next) {
                const uint8_t *p = planes_of(m, bits, group, j, copy);
                const int64_t in_place = p == copy ? j : bytes_of_row(m) * 8 / bits / 16 * 16;
                float *at = sums + (j - tile) * batch * 8;
                next = in_place < j + 16 ? j + 16 : in_place < end ? in_place : (end + 15) / 16 * 16;
#define ADD(c, values) do { \
                const Pair pair = values; \
                __builtin_prefetch(p + ahead + 4 * bits * (c)); /* the next rows' */ \
                for (int b = 0; b < batch; b++) \
                    sums_of_pair(pair, z + b * t->stride, at + ((c) * batch + b) * 8, 8 * batch); \
                } while (0)
                EACH_TWO(bits, p, next - j, ADD);
#undef ADD
            }
        }
        for (int64_t j = tile; j < end; j++)
            for (int b = 0; b < batch; b++) {
                const float y = sum_of_8(sums + ((j - tile) * batch + b) * 8) * (1.0f / 65536);
                put(t, (b0 + b) * m->d_out + j, y * scale_at(m, m->k + j));
            }
    }
}

INLINE void unpack_trellis_with(const Task *t, int bits, int64_t first, int64_t last) {
    const Matrix *m = t->m;
    uint8_t copy[PLANES * ROWS_ASIDE];
    for (int64_t group = 0; group < m->k; group += ROWS_ASIDE) {
        float scales[ROWS_ASIDE] = {0};
        for (int64_t i = 0; i < ROWS_ASIDE && group + i < m->k; i++) scales[i] = scale_at(m, group + i);
        for (int64_t tile = first; tile < last; tile += 16) {
            const uint8_t *p = planes_of(m, bits, group / ROWS_ASIDE, tile, copy);
            int16_t values[16][ROWS_ASIDE] __attribute__((aligned(32)));
#define KEEP(c, values_of_two) do { \
            const Pair pair = values_of_two; \
            for (int i = 0; i < 4; i++) { \
                int16_t *to = values[(c) + i / 2] + 8 * (i % 2); \
                _mm_store_si128((__m128i *)to, _mm256_castsi256_si128(pair.of[i])); \
                _mm_store_si128((__m128i *)(to + 16), _mm256_extracti128_si256(pair.of[i], 1)); \
            } } while (0)
            EACH_TWO(bits, p, 16, KEEP);
#undef KEEP
            for (int64_t j = tile; j < last && j < tile + 16; j++) {
                const float column = scale_at(m, m->k + j);
                float out[ROWS_ASIDE];
                for (int i = 0; i < ROWS_ASIDE; i++) out[i] = (float)values[j - tile][i] * scales[i] * column;
                for (int i = 0; i < ROWS_ASIDE; i += LANES) {
                    if (t->is_bf16) store_bf16((uint16_t *)t->y + j * t->stride + group + i, load(out + i));
                    else store((float *)t->y + j * t->stride + group + i, load(out + i));
                }
            }
        }
    }
}
#else
INLINE int value_of(unsigned state) {
    const int flat = (int16_t)(uint16_t)(state * MULTIPLIER), bend = (flat * flat >> 16) - MIDDLE;
    return (flat * (((bend * bend + 0x4000) >> 15) + SLOPE) + 0x4000) >> 15;
}

/* value of column j of a row whose bytes lie `step` apart */
INLINE int value_at(const uint8_t *row, int64_t step, int64_t in_row, int bits, int64_t j) {
    const int64_t begin = bits * (j + 1) - 12, byte = (begin + 16) / 8 - 2;
    unsigned word = 0;
    for (int i = 0; i < 3; i++)
        if (byte + i >= 0 && byte + i < in_row) word |= (unsigned)row[(byte + i) * step] << (8 * i);
    return value_of(word >> (begin - 8 * byte) & STATE);
}

static void lay_out_z(const Task *t) {
    for (int64_t b = 0; b < t->batch; b++)
        for (int64_t i = 0; i < t->stride; i++)
            t->halves[b * t->stride + i] = i < t->m->k ? z_at(t, b, i) * scale_at(t->m, i) : 0;
}

INLINE const uint8_t *row_of(const Matrix *m, int64_t i, int64_t *step) {
    const int64_t group = i / ROWS_ASIDE * ROWS_ASIDE;
    *step = m->k - group < ROWS_ASIDE ? m->k - group : ROWS_ASIDE;
    return m->values + group * bytes_of_row(m) + (i - group);
}

INLINE void trellis_with(const Task *t, int bits, int batch, int64_t b0, int64_t first, int64_t last) {
    const Matrix *m = t->m;
    for (int64_t j = first; j < last; j++) {
        float sums[4] = {0};
        for (int64_t i = 0, step; i < m->k; i++) {
            const uint8_t *row = row_of(m, i, &step);
            const float value = (float)value_at(row, step, bytes_of_row(m), bits, j);
            for (int b = 0; b < batch; b++) sums[b] += value * t->halves[(b0 + b) * t->stride + i];
        }
        for (int b = 0; b < batch; b++) put(t, (b0 + b) * m->d_out + j, sums[b] * scale_at(m, m->k + j));
    }
}

INLINE void unpack_trellis_with(const Task *t, int bits, int64_t first, int64_t last) {
    const Matrix *m = t->m;
    for (int64_t j = first; j < last; j++)
        for (int64_t i = 0, step; i < m->k; i++) {
            const uint8_t *row = row_of(m, i, &step);
            const int number = value_at(row, step, bytes_of_row(m), bits, j);
            const float value = (float)number * scale_at(m, i) * scale_at(m, m->k + j);
            if (t->is_bf16) ((uint16_t *)t->y)[j * t->stride + i] = word_of(value);
            else ((float *)t->y)[j * t->stride + i] = value;
        }
}
#endif

static void trellis_columns(const Task *t, int64_t first, int64_t last) {
#define SOME_ROWS(bits, count) trellis_with(t, bits, count, b, first, last); b += count;
#define BITS(bits) \
    case bits: \
        while (b + 4 <= t->batch) { SOME_ROWS(bits, 4) } \
        while (b + 2 <= t->batch) { SOME_ROWS(bits, 2) } \
        while (b < t->batch) { SOME_ROWS(bits, 1) } \
        break;
    int64_t b = 0;
    switch (t->m->bits) { BITS(2) BITS(3) BITS(4) }
#undef BITS
#undef SOME_ROWS
}

static void unpack_trellis(const Task *t, int64_t first, int64_t last) {
    switch (t->m->bits) {
    case 2: unpack_trellis_with(t, 2, first, last); break;
    case 3: unpack_trellis_with(t, 3, first, last); break;
    default: unpack_trellis_with(t, 4, first, last);
    }
}

static void columns(const Task *t, int64_t first, int64_t last) {
    if (t->m->codec == TRELLIS) {
        const int64_t d_out = t->m->d_out;
        trellis_columns(t, first * BLOCK, last * BLOCK < d_out ? last * BLOCK : d_out);
        return;
    }
#define CASE(family, support) \
    case 4 * family + support: columns_with(t, codec_of(family, t->m->codec), support, first, last); break;
    switch (4 * family(t->m->codec) + t->m->support) { EVERY_CASE }
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
    if (!is_scaled(codec)) return;
    for (int64_t c = 0; c < count;) {
        const float scale = float_of(w->scales[w->group]);
        const int64_t end = count - c < w->left ? count : c + w->left;
        w->left -= end - c;
        for (; c < end; c++) values[c] *= scale;
        if (w->left == 0) w->left = m->group, w->group++;
    }
}

static void stored(const Matrix *m, Walk *w, int64_t count, float *values) {
    switch (family(m->codec)) {
#define OF(family) case family: stored_with(m, codec_of(family, m->codec), w, count, values); break;
        EVERY_FAMILY(OF)
#undef OF
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

/* the sums of the columns `first` to `last`, of `rows` rows from b0 on */
static void add_columns(const Task *t, Bench *o, int64_t first, int64_t last, int64_t b0, int64_t rows, int64_t width) {
    const Matrix *m = t->m;
    const int64_t row_bytes = (m->k + 7) / 8;
    int64_t n = m->starts[2 * (first / BLOCK)], n_scales = m->starts[2 * (first / BLOCK) + 1];
    for (int64_t j = first; j < last; j++) {
        const int64_t count = count_column(m, m->positions + j * row_bytes);
        o->walks[j - first] = walk_from(m, (int)m->codec, n, n_scales);
        n += count;
        n_scales += (count + m->group - 1) / m->group;
    }
    for (int64_t i = 0; i < m->k; i += PANEL) {
        for (int64_t a = 0; a < PANEL && i + a < m->k; a++) {
            float *z = o->panel + a * width;
            memcpy(z, t->z + (i + a) * t->batch + b0, (size_t)rows * sizeof(float));
            for (int64_t b = rows; b < width; b++) z[b] = 0;
        }
        add_panel(m, o, (int)(width / LANES), first, last, i);
    }
}

static void many_rows(const Work *w, Bench *o, int64_t first_block, int64_t last_block) {
    const Task *t = w->tasks;
    const int64_t d_out = t->m->d_out, in_all = (t->batch + LANES - 1) / LANES;
    const int64_t spans = (in_all + VECTORS - 1) / VECTORS;
    for (int64_t block = first_block; block < last_block; block += COLUMNS / BLOCK) {
        const int64_t end_block = block + COLUMNS / BLOCK < last_block ? block + COLUMNS / BLOCK : last_block;
        const int64_t first = block * BLOCK, last = end_block * BLOCK < d_out ? end_block * BLOCK : d_out;
        for (int64_t span = 0; span < spans; span++) {
            const int64_t b0 = in_all * span / spans * LANES, end = in_all * (span + 1) / spans * LANES;
            const int64_t rows = (end < t->batch ? end : t->batch) - b0;
            memset(o->sums, 0, (size_t)(last - first) * SPAN * sizeof(float));
            for (int64_t i = 0; i < w->n_tasks; i++)
                add_columns(w->tasks + i, o, first, last, b0, rows, end - b0);
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
    if (t->m->codec == TRELLIS) {
        unpack_trellis(t, first * BLOCK, last * BLOCK < t->m->d_out ? last * BLOCK : t->m->d_out);
        return;
    }
#define CASE(family, support) \
    case 4 * family + support: unpack_with(t, codec_of(family, t->m->codec), support, first, last); break;
    switch (4 * family(t->m->codec) + t->m->support) { EVERY_CASE }
#undef CASE
}

/* first block of thread `index`: equal shares of the stored values, and of the support's bits */
static int64_t share(const Work *w, int64_t index, int64_t count) {
    const int64_t blocks = (w->tasks->m->d_out + BLOCK - 1) / BLOCK;
    int64_t low = 0, high = blocks, in_all = 0;
    if (index == count) return blocks;
    for (int64_t i = 0; i < w->n_tasks; i++) in_all += w->tasks[i].m->n_nonzero + blocks * w->tasks[i].m->k;
    double goal = (double)in_all * (double)index / (double)count;
    while (low < high) {
        int64_t middle = (low + high) / 2, before = 0;
        for (int64_t i = 0; i < w->n_tasks; i++)
            before += w->tasks[i].m->starts[2 * middle] + middle * w->tasks[i].m->k;
        if ((double)before < goal) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* z = x D: the share of thread `me` */
static void project_rows(const Task *t, int64_t me, int64_t team) {
    const Matrix *m = t->m;
    const int64_t size = t->batch * t->stride, steps = (m->d_in + ROWS - 1) / ROWS;
    const int64_t first = steps * me / team * ROWS, last = steps * (me + 1) / team * ROWS;
    float *mine = team == 1 ? t->z : t->shares + me * size;
    memset(mine, 0, (size_t)size * sizeof(float));
    project(t, first, last < m->d_in ? last : m->d_in, mine);
    for (int64_t b = 0; b < t->batch; b++) /* what was read behind the last atom is not part of z */
        memset(mine + b * t->stride + m->k, 0, (size_t)(t->stride - m->k) * sizeof(float));
}

/* a part of z from the shares of all threads */
static void add_shares(const Task *t, int64_t me, int64_t team) {
    const int64_t size = t->batch * t->stride, parts = size / LANES;
    for (int64_t i = parts * me / team; i < parts * (me + 1) / team; i++) {
        V total = load(t->shares + i * LANES);
        for (int64_t other = 1; other < team; other++)
            total = add(total, load(t->shares + other * size + i * LANES));
        store(t->z + i * LANES, total);
    }
}

/* z = x where the dictionary is the identity: some of its rows */
static void copy_rows(const Task *t, int64_t me, int64_t team) {
    const int64_t k = t->m->k;
    for (int64_t b = t->batch * me / team; b < t->batch * (me + 1) / team; b++) {
        float *z = t->z + b * t->stride;
        for (int64_t i = 0; i < k; i++)
            z[i] = t->is_bf16 ? float_of(((const uint16_t *)t->x)[b * k + i]) : ((const float *)t->x)[b * k + i];
        memset(z + k, 0, (size_t)(t->stride - k) * sizeof(float));
    }
}

static void work(void *argument) {
    const Work *w = argument;
    const OpenMP *omp = w->tasks->omp;
    const int64_t stages = w->tasks->stages, me = omp ? omp->thread() : 0, team = omp ? omp->threads() : 1;
    int waits = 0;
    for (int64_t i = 0; i < w->n_tasks; i++) {
        const Task *t = w->tasks + i;
        if (!(t->stages & FIRST) || (t->m->codec == TRELLIS && t->m->dictionary_codec == IDENTITY)) continue;
        if (t->m->dictionary_codec == IDENTITY) copy_rows(t, me, team);
        else project_rows(t, me, team);
        waits |= team > 1;
    }
    if (waits) {
        omp->barrier();
        for (int64_t i = 0; i < w->n_tasks; i++)
            if (w->tasks[i].stages & FIRST && w->tasks[i].m->dictionary_codec != IDENTITY)
                add_shares(w->tasks + i, me, team);
        omp->barrier();
    }
    const int64_t first = share(w, me, team), last = share(w, me + 1, team);
    for (int64_t i = 0; stages & LAST && i < w->n_tasks; i++) {
        Task mine = w->tasks[i];
        mine.halves = mine.shares + me * mine.batch * mine.stride;
        if (mine.m->codec == TRELLIS) lay_out_z(&mine);
#ifdef HALVES
        if (in_halves((int)mine.m->codec, (int)mine.m->support))
            for (int64_t b = 0; b < mine.batch; b++)
                split_halves(mine.z + b * mine.stride, mine.halves + b * mine.stride, mine.stride);
#endif
        columns(&mine, first, last);
    }
    if (stages & MANY) many_rows(w, (Bench *)(void *)w->tasks->shares + me, first, last);
    if (stages & UNPACK) unpack(w->tasks, first, last);
}

static void run(Task *tasks, int64_t n_tasks, const OpenMP *omp, int64_t threads) {
    Work w = {tasks, n_tasks};
    for (int64_t i = 0; i < n_tasks; i++) tasks[i].omp = threads > 1 ? omp : NULL;
    if (tasks->omp) omp->parallel(work, &w, (unsigned)threads, 0);
    else work(&w);
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

/* z of the last input of matrices that have one dictionary */
typedef struct {
    int64_t taken;      /* by a thread that computes with it */
    uint64_t askers;    /* the matrices that this z was given to */
    const void *dictionary;
    int64_t nbytes, is_bf16, room; /* of x, which is the first part of the memory; bytes in all */
    char *x;
} Kept;

typedef struct {
    const Matrix *m;
    Kept *kept;     /* NULL where nothing is shared */
    uint64_t asker; /* its bit in `askers` */
} Term;

/* what a layer multiplies its input with */
typedef struct {
    int64_t d_in, d_out, most_threads, n_terms;
    const Term *terms;
} Sum;

/* Memory of the products, kept from call to call. A second thread of Python at the same time takes its own. */
static struct { int64_t taken; size_t nbytes; void *memory; } scratch;

static int64_t take(int64_t *taken) { return !__atomic_exchange_n(taken, 1, __ATOMIC_ACQUIRE); }
static void leave(int64_t *taken) { __atomic_store_n(taken, 0, __ATOMIC_RELEASE); }

static void *grown(void *memory, size_t *had, size_t nbytes) {
    if (memory && *had >= nbytes) return memory;
    free(memory);
    memory = aligned_alloc(64, (nbytes + 63) / 64 * 64);
    *had = memory ? nbytes : 0;
    return memory;
}

enum { MOST_TERMS = 16 };

/* Whether z of this very input is there. Says so once to each matrix: the numbers of a dictionary may change from token
 * to token, but not between q, k and v. */
static int64_t is_known(const Term *term, const void *x, int64_t nbytes, int64_t is_bf16) {
    Kept *kept = term->kept;
    if (kept->x && !(kept->askers & term->asker) && kept->dictionary == term->m->dictionary &&
        kept->nbytes == nbytes && kept->is_bf16 == is_bf16 && !memcmp(kept->x, x, (size_t)nbytes)) {
        kept->askers |= term->asker;
        return 1;
    }
    return 0;
}

/* room for x and z; NULL where there is none */
static float *keep(const Term *term, const void *x, int64_t nbytes, int64_t is_bf16, int64_t size) {
    Kept *kept = term->kept;
    const size_t of_x = (size_t)(nbytes + 63) / 64 * 64, room = of_x + (size_t)size * sizeof(float);
    size_t had = (size_t)kept->room;
    kept->x = grown(kept->x, &had, room);
    kept->room = (int64_t)had;
    if (!kept->x) return NULL;
    memcpy(kept->x, x, (size_t)nbytes);
    kept->nbytes = nbytes, kept->is_bf16 = is_bf16;
    kept->dictionary = term->m->dictionary, kept->askers = term->asker;
    return (float *)(void *)(kept->x + of_x);
}

/* y = (x D) S, added up over the terms, for a few rows. Returns whether there was memory. */
int64_t cospadi_product(const Sum *s, const OpenMP *omp, int64_t threads, const void *x, void *y, int64_t batch,
                        int64_t is_bf16) {
    Task tasks[MOST_TERMS];
    Kept *taken[MOST_TERMS];
    const int64_t nbytes = batch * s->d_in * (is_bf16 ? 2 : 4), mine = take(&scratch.taken);
    size_t floats = s->n_terms > 1 ? (size_t)(batch * s->d_out + 15) / 16 * 16 : 0, had = 0;
    for (int64_t i = 0; i < s->n_terms; i++)
        floats += (size_t)((threads + 1) * batch * cospadi_stride(s->terms[i].m->k));
    void *memory = mine ? scratch.memory = grown(scratch.memory, &scratch.nbytes, floats * sizeof(float))
                        : grown(NULL, &had, floats * sizeof(float));
    float *room = memory, *sums = room;
    if (memory && s->n_terms > 1) room += (size_t)(batch * s->d_out + 15) / 16 * 16;
    for (int64_t i = 0; memory && i < s->n_terms; i++) {
        const Term *term = s->terms + i;
        const int64_t stride = cospadi_stride(term->m->k), size = batch * stride;
        float *z = NULL;
        int64_t stages = FIRST | LAST;
        taken[i] = term->kept && take(&term->kept->taken) ? term->kept : NULL;
        if (taken[i] && is_known(term, x, nbytes, is_bf16)) {
            z = (float *)(void *)(taken[i]->x + (nbytes + 63) / 64 * 64);
            stages = LAST;
        } else if (taken[i]) z = keep(term, x, nbytes, is_bf16, size);
        tasks[i] = (Task){term->m, NULL, x, z ? z : room, y, room + size, NULL, batch, stride, is_bf16, stages,
                          i ? sums : NULL, i + 1 < s->n_terms ? sums : NULL};
        room += (threads + 1) * size;
    }
    if (memory) {
        run(tasks, s->n_terms, omp, threads);
        for (int64_t i = 0; i < s->n_terms; i++)
            if (taken[i]) leave(&taken[i]->taken);
    }
    if (mine) leave(&scratch.taken);
    else free(memory);
    return memory != NULL;
}

void cospadi_forget(Kept *kept) { free(kept->x); }

/* S transposed, (d_out, stride) in bfloat16 or float32, for blocks of columns `first` to `last` */
void cospadi_unpack(const Matrix *m, const OpenMP *omp, int64_t threads, void *codes, int64_t is_bf16) {
    Task t = {m, NULL, NULL, NULL, codes, NULL, NULL, 0, cospadi_stride(m->k), is_bf16, UNPACK, NULL, NULL};
    run(&t, 1, omp, threads);
}

/* bytes of scratch that a thread takes for `cospadi_many` */
int64_t cospadi_bench(void) { return (int64_t)sizeof(Bench); }

/* y = z S, added up over the terms, each with a z (k, batch) and a support with positions */
void cospadi_many(const Sum *s, const OpenMP *omp, int64_t threads, const float *const *z, void *y, float *memory,
                  int64_t batch, int64_t is_bf16) {
    Task tasks[MOST_TERMS];
    for (int64_t i = 0; i < s->n_terms; i++)
        tasks[i] = (Task){s->terms[i].m, NULL, NULL, (float *)(uintptr_t)z[i], y, memory, NULL, batch, 0, is_bf16, MANY,
                          NULL, NULL};
    run(tasks, s->n_terms, omp, threads);
}

#ifdef WITH_PYTHON
/* ---- a layer, called without a step of Python in between ----
 *
 * Hundreds of layers a token are called with caches that their weights have emptied: what a call costs is the memory
 * that it touches. So a layer is a function of its input that looks at tensors through the C interface of DLPack. It
 * answers None where anything is not as it was when the layer was bound, or torch has to be shown what is computed:
 * Python then takes its longer way. */

typedef struct { /* of DLPack 1 */
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} View;

typedef struct {
    uint32_t major, minor;
    void *older, *allocate, *export, *import;
    int (*look)(void *tensor, View *view); /* borrows all that the view points to */
    void *stream;
} Exchange;

enum { DLPACK_CPU = 1, DLPACK_FLOAT = 2, DLPACK_BFLOAT = 4 };

/* An entry of a dictionary of parameters, which may be None, and what it was */
typedef struct {
    PyObject *owner, *name, *tensor;
    const void *data;
    int64_t version; /* -1 where torch counts none */
    uint8_t code, bits;
} Frozen;

typedef struct {
    PyObject_HEAD
    const Sum *sum;
    const OpenMP *omp;
    const Exchange *exchange;
    int64_t few_rows, n_frozen, releases; /* whether others may run meanwhile */
    PyObject *kept_alive, *parameters, *owners;
    PyObject *hooks, *empty; /* dictionaries of hooks of the layer, and of others that may have none at all */
    PyObject *tensor_type, *is_grad_enabled, *must_be_false, *levels, *get_num_threads, *empty_like;
    PyObject *chosen_in, *choice; /* the dictionary that names the choice of kernels, and this one's name */
    PyObject *like[2]; /* a row of float32 and of bfloat16 that outputs are made like */
    Frozen *frozen;
} Layer;

static PyObject *word_version, *word_requires_grad, *word_new_empty, *word_level, *word_choice;
static PyObject *word_parameters, *word_forward, *word_compiled;

static int64_t version_of(PyObject *tensor) {
    PyObject *number = PyObject_GetAttr(tensor, word_version);
    int64_t version = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    PyErr_Clear(); /* tensors of inference mode have none */
    return version;
}

static int is_frozen(const Layer *l, const Frozen *f) {
    View v;
    if (PyDict_GetItem(f->owner, f->name) != f->tensor) return 0;
    if (!f->data) return 1;
    return !l->exchange->look(f->tensor, &v) && (const char *)v.data + v.byte_offset == f->data && v.code == f->code &&
        v.bits == f->bits && (f->version < 0 || version_of(f->tensor) == f->version);
}

/* 1 or 0, -1 with an error */
static int says(PyObject *function) {
    PyObject *answer = PyObject_CallNoArgs(function);
    int is_true = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return is_true;
}

/* whether torch records or transforms what is done with x, beyond what `look` refuses */
static int is_watched(const Layer *l, PyObject *x) {
    if (says(l->is_grad_enabled)) {
        PyObject *wanted = PyObject_GetAttr(x, word_requires_grad);
        if (wanted != Py_False) return Py_XDECREF(wanted), 1;
        Py_DECREF(wanted);
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(l->must_be_false); i++)
        if (says(PyTuple_GET_ITEM(l->must_be_false, i))) return 1;
    PyObject *level = PyDict_GetItem(l->levels, word_level); /* of forward-mode derivatives, -1 outside */
    return !level || PyLong_AsLong(level) >= 0;
}

static int is_contiguous(const View *v) {
    int64_t step = 1;
    for (int32_t i = v->ndim - 1; i >= 0; i--) {
        if (v->strides && v->shape[i] != 1 && v->strides[i] != step) return 0;
        step *= v->shape[i];
    }
    return 1;
}

/* a new tensor for the output; NULL with an error */
static PyObject *output_of(Layer *l, PyObject *x, const View *v, int64_t rows) {
    PyObject **like = &l->like[v->code == DLPACK_BFLOAT];
    View had;
    if (rows == 1 && *like && !l->exchange->look(*like, &had) && had.ndim == v->ndim)
        return PyObject_CallOneArg(l->empty_like, *like);
    PyObject *shape = PyTuple_New(v->ndim), *y = NULL;
    for (int32_t i = 0; shape && i < v->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(i + 1 < v->ndim ? v->shape[i] : l->sum->d_out);
        if (!size) Py_CLEAR(shape);
        else PyTuple_SET_ITEM(shape, i, size);
    }
    if (shape) y = PyObject_CallMethodOneArg(x, word_new_empty, shape);
    Py_XDECREF(shape);
    if (y && rows == 1) Py_XSETREF(*like, PyObject_CallOneArg(l->empty_like, y));
    if (y && rows == 1 && !*like) Py_CLEAR(y);
    return y;
}

static int are_empty(PyObject *dictionaries) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dictionaries); i++)
        if (PyDict_GET_SIZE(PyTuple_GET_ITEM(dictionaries, i))) return 0;
    return 1;
}

/* whether torch's `Module.__call__` would do anything but call the layer's `forward` */
static int is_called_by_others(const Layer *l, PyObject *attributes) {
    PyObject *compiled = PyDict_GetItem(attributes, word_compiled);
    return !are_empty(l->hooks) || PyDict_GetItem(attributes, word_forward) || (compiled && compiled != Py_None);
}

static PyObject *call_layer(PyObject *self, PyObject *const *arguments, Py_ssize_t n_arguments) {
    Layer *l = (Layer *)self;
    View v, out;
    int64_t rows = 1, threads, done;
    if (n_arguments != 3 || !PyDict_Check(arguments[1]))
        return PyErr_SetString(PyExc_TypeError, "an input, the layer's attributes, and whether hooks have run"), NULL;
    PyObject *x = arguments[0], *attributes = arguments[1];
    if ((PyObject *)Py_TYPE(x) != l->tensor_type || PyDict_GetItem(attributes, word_parameters) != l->parameters ||
        PyDict_GetItem(l->chosen_in, word_choice) != l->choice) Py_RETURN_NONE;
    if (arguments[2] != Py_True && is_called_by_others(l, attributes)) Py_RETURN_NONE;
    if (is_watched(l, x) || l->exchange->look(x, &v)) return PyErr_Clear(), Py_NewRef(Py_None);
    const int is_bf16 = v.code == DLPACK_BFLOAT && v.bits == 16, is_float = v.code == DLPACK_FLOAT && v.bits == 32;
    if (v.device_type != DLPACK_CPU || v.lanes != 1 || !(is_bf16 || is_float) || v.ndim < 1 ||
        v.shape[v.ndim - 1] != l->sum->d_in || !is_contiguous(&v)) Py_RETURN_NONE;
    for (int32_t i = 0; i + 1 < v.ndim; i++) rows *= v.shape[i];
    if (rows < 1 || rows > l->few_rows) Py_RETURN_NONE;
    if (!are_empty(l->empty)) Py_RETURN_NONE;
    int64_t others = l->n_frozen; /* that have come to the dictionaries since */
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(l->owners); i++)
        others -= PyDict_GET_SIZE(PyTuple_GET_ITEM(l->owners, i));
    if (others) Py_RETURN_NONE;
    for (int64_t i = 0; i < l->n_frozen; i++)
        if (!is_frozen(l, &l->frozen[i])) return PyErr_Clear(), Py_NewRef(Py_None);
    PyObject *number = PyObject_CallNoArgs(l->get_num_threads);
    threads = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    if (threads == -1 && PyErr_Occurred()) return NULL;
    if (!l->omp || threads < 1) threads = 1;
    else if (threads > l->sum->most_threads) threads = l->sum->most_threads;
    PyObject *y = output_of(l, x, &v, rows);
    if (!y) return NULL;
    if (l->exchange->look(y, &out)) return Py_DECREF(y), NULL;
    const char *from = (const char *)v.data + v.byte_offset;
    char *to = (char *)out.data + out.byte_offset;
    if (l->releases) {
        Py_INCREF(x), Py_INCREF(self);
        Py_BEGIN_ALLOW_THREADS
        done = cospadi_product(l->sum, l->omp, threads, from, to, rows, is_bf16);
        Py_END_ALLOW_THREADS
        Py_DECREF(x), Py_DECREF(self);
    } else done = cospadi_product(l->sum, l->omp, threads, from, to, rows, is_bf16);
    if (!done) return Py_DECREF(y), PyErr_NoMemory();
    return y;
}

static int visit_layer(PyObject *self, visitproc visit, void *arg) {
    const Layer *l = (Layer *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(l->kept_alive);
    for (int64_t i = 0; i < l->n_frozen; i++) Py_VISIT(l->frozen[i].tensor);
    return 0;
}

static void free_layer(PyObject *self) {
    Layer *l = (Layer *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    for (int64_t i = 0; i < l->n_frozen; i++) {
        Py_DECREF(l->frozen[i].name);
        Py_DECREF(l->frozen[i].tensor);
    }
    Py_XDECREF(l->like[0]);
    Py_XDECREF(l->like[1]);
    Py_XDECREF(l->kept_alive);
    PyMem_Free(l->frozen);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyType_Slot layer_slots[] = {
    {Py_tp_traverse, (void *)visit_layer}, {Py_tp_dealloc, (void *)free_layer}, {0, NULL}};
static PyType_Spec layer_spec = {
    "cospadi.Layer", sizeof(Layer), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, layer_slots};
static PyObject *layer_type;

static PyMethodDef layer_method = {"packed_layer", (PyCFunction)(void (*)(void))call_layer, METH_FASTCALL, NULL};

/* A function of an input, the dictionary of the layer's attributes, and whether its hooks have run already or must not
 * be there: the output, or None. `parameters` are the layer's own, as the attributes have to name them.
 *
 * `owners` are all dictionaries whose entries must stay as they are, `tensors` of these entries those that are read;
 * `torch` is what `cospadi_cpu` names there, in this order. Errors are raised, as of every function of Python. */
PyObject *cospadi_layer(const Sum *sum, const OpenMP *omp, int64_t few_rows, int64_t releases, PyObject *parameters,
                        PyObject *owners, PyObject *tensors, PyObject *hooks, PyObject *empty, PyObject *torch,
                        PyObject *kept_alive) {
    Py_ssize_t count = 0;
    const Exchange *exchange = PyCapsule_GetPointer(PyTuple_GET_ITEM(torch, 0), "dlpack_exchange_api");
    if (!exchange) return NULL;
    if (exchange->major != 1 || !exchange->look) Py_RETURN_NONE;
    if (!layer_type) {
        word_version = PyUnicode_InternFromString("_version");
        word_requires_grad = PyUnicode_InternFromString("requires_grad");
        word_new_empty = PyUnicode_InternFromString("new_empty");
        word_level = PyUnicode_InternFromString("_current_level");
        word_choice = PyUnicode_InternFromString("_choice");
        word_parameters = PyUnicode_InternFromString("_parameters");
        word_forward = PyUnicode_InternFromString("forward");
        word_compiled = PyUnicode_InternFromString("_compiled_call_impl");
        if (!word_version || !word_requires_grad || !word_new_empty || !word_level || !word_choice ||
            !word_parameters || !word_forward || !word_compiled) return NULL;
        if (!(layer_type = PyType_FromSpec(&layer_spec))) return NULL;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(owners); i++) count += PyDict_GET_SIZE(PyTuple_GET_ITEM(owners, i));
    Layer *l = PyObject_GC_New(Layer, (PyTypeObject *)layer_type);
    if (!l) return NULL;
    memset((char *)l + sizeof(PyObject), 0, sizeof(Layer) - sizeof(PyObject));
    l->sum = sum, l->omp = omp, l->few_rows = few_rows, l->releases = releases, l->exchange = exchange;
    l->parameters = parameters, l->owners = owners, l->hooks = hooks, l->empty = empty;
    l->tensor_type = PyTuple_GET_ITEM(torch, 1), l->is_grad_enabled = PyTuple_GET_ITEM(torch, 2);
    l->must_be_false = PyTuple_GET_ITEM(torch, 3), l->levels = PyTuple_GET_ITEM(torch, 4);
    l->get_num_threads = PyTuple_GET_ITEM(torch, 5), l->empty_like = PyTuple_GET_ITEM(torch, 6);
    l->chosen_in = PyTuple_GET_ITEM(torch, 7), l->choice = PyTuple_GET_ITEM(torch, 8);
    PyObject_GC_Track(l);
    l->kept_alive = PyTuple_Pack(6, kept_alive, parameters, owners, hooks, empty, torch);
    l->frozen = PyMem_Calloc((size_t)count, sizeof(Frozen));
    if (!l->kept_alive || !l->frozen) return Py_DECREF(l), PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(owners); i++) {
        PyObject *owner = PyTuple_GET_ITEM(owners, i), *name, *tensor;
        for (Py_ssize_t at = 0; PyDict_Next(owner, &at, &name, &tensor);) {
            Frozen *f = &l->frozen[l->n_frozen++];
            View v;
            f->owner = owner, f->name = Py_NewRef(name), f->tensor = Py_NewRef(tensor);
            if (tensor == Py_None || PySequence_Contains(tensors, name) != 1) continue;
            if (exchange->look(tensor, &v)) return Py_DECREF(l), NULL;
            f->data = (const char *)v.data + v.byte_offset, f->code = v.code, f->bits = v.bits;
            f->version = version_of(tensor);
        }
    }
    PyObject *made = PyCFunction_New(&layer_method, (PyObject *)l);
    Py_DECREF(l);
    return made;
}
#endif
"""
