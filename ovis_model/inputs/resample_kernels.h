/* The arithmetic of resample.h for the processor that it runs on: plain C, AVX2, AVX-512 VNNI, or NEON with its dot
 * products.
 *
 * Pixels travel in quads: four neighbours along the axis that is resized, in four bytes. LANES quads next to each other
 * become LANES pixels at once. All kernels return the same bits, since integer sums do not depend on their order.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && defined(__x86_64__)
#define HAS_X86
#include <immintrin.h>
#elif defined(__GNUC__) && defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#define HAS_NEON
#include <arm_neon.h>
#endif

#if defined(_MSC_VER)
#define restrict __restrict
#endif

#define PRECISION_BITS 22
#define HALF_BITS 11
#define LANES 32
#define QUAD 4
#define PREFETCH_BYTES 512 /* how far ahead of the pixels that are turned the next of each row are requested */

/* The weights of a quad's pixels, as `weigh` wants them. */
typedef struct {
    int32_t words[QUAD];
} Factors;

typedef struct {
    /* Convert the weights, of at most 24 bits and a sign, of a quad's pixels. */
    void (*pack)(Factors *factors, const int32_t *weights);
    /* Sum `count` weighted vectors of LANES quads, `stride` bytes apart, and round: out[LANES]. */
    void (*weigh)(uint8_t *out, const uint8_t *in, size_t stride, const Factors *factors, int count);
    /* Turn pixels of 4 bytes, rows `stride` bytes apart: out[channel][x / QUAD][y][x % QUAD] = in[y][x][channel]. There
     * are three channels, `plane` bytes apart, and at most LANES rows. */
    void (*turn)(uint8_t *out, size_t plane, const uint8_t *in, size_t stride, int width, int height);
    /* Turn the rows of columns into quads: out[y / QUAD][x][y % QUAD] = in[x][y], for LANES rows; out has `stride`
     * quads from a row to the next, and room for a multiple of LANES columns, as has `in`. */
    void (*spread)(uint32_t *out, size_t stride, const uint8_t *in, int width);
} Kernels;

static void pack_plain(Factors *factors, const int32_t *weights) { memcpy(factors->words, weights, sizeof(Factors)); }

static void weigh_plain(uint8_t *out, const uint8_t *in, size_t stride, const Factors *factors, int count) {
    int32_t sums[LANES];
    for (int lane = 0; lane < LANES; lane++) sums[lane] = 1 << (PRECISION_BITS - 1);
    for (int i = 0; i < count; i++, in += stride)
        for (int lane = 0; lane < LANES; lane++)
            for (int k = 0; k < QUAD; k++) sums[lane] += factors[i].words[k] * in[QUAD * lane + k];
    for (int lane = 0; lane < LANES; lane++) {
        const int32_t value = sums[lane] >> PRECISION_BITS;
        out[lane] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

/* Turn the pixels from (left, top) on. */
static void turn_rest(
    uint8_t *restrict out, size_t plane, const uint8_t *restrict in, size_t stride, int left, int top, int width,
    int height
) {
    for (int x = left; x < width; x++)
        for (int y = top; y < height; y++)
            for (int channel = 0; channel < 3; channel++)
                out[channel * plane + (x / QUAD * LANES + y) * QUAD + x % QUAD] = in[y * stride + 4 * x + channel];
}

static void turn_plain(uint8_t *out, size_t plane, const uint8_t *in, size_t stride, int width, int height) {
    turn_rest(out, plane, in, stride, 0, 0, width, height);
}

static void spread_plain(uint32_t *out, size_t stride, const uint8_t *in, int width) {
    for (int x = 0; x < width; x++)
        for (int i = 0; i < LANES / QUAD; i++) memcpy(&out[i * stride + x], in + x * LANES + i * QUAD, QUAD);
}

#if defined(HAS_X86)
#define AVX2 __attribute__((target("avx2")))
#define VNNI __attribute__((target("avx2,avx512f,avx512vnni")))
#define SIMD AVX2

typedef __m128i Vector;
SIMD static inline Vector load(const void *in) { return _mm_loadu_si128((const __m128i *)in); }
SIMD static inline void store(void *out, Vector a) { _mm_storeu_si128((__m128i *)out, a); }
SIMD static inline Vector zip_low(Vector a, Vector b) { return _mm_unpacklo_epi32(a, b); }
SIMD static inline Vector zip_high(Vector a, Vector b) { return _mm_unpackhi_epi32(a, b); }
SIMD static inline Vector permute(Vector a, Vector places) { return _mm_shuffle_epi8(a, places); }
#elif defined(HAS_NEON)
#define SIMD

typedef uint32x4_t Vector;
static inline Vector load(const void *in) { return vreinterpretq_u32_u8(vld1q_u8(in)); }
static inline void store(void *out, Vector a) { vst1q_u8(out, vreinterpretq_u8_u32(a)); }
static inline Vector zip_low(Vector a, Vector b) { return vzip1q_u32(a, b); }
static inline Vector zip_high(Vector a, Vector b) { return vzip2q_u32(a, b); }
static inline Vector permute(Vector a, Vector places) {
    return vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(a), vreinterpretq_u8_u32(places)));
}
#endif

#if defined(SIMD)
/* Split a weight into three signed numbers of 8 bits: weight = (high * 256 + middle) * 256 + low. */
static void split_weight(int8_t *digits, int32_t weight) {
    digits[0] = (int8_t)((weight & 255) - (weight & 128) * 2);
    weight = (weight - digits[0]) / 256;
    digits[1] = (int8_t)((weight & 255) - (weight & 128) * 2);
    digits[2] = (int8_t)((weight - digits[1]) / 256);
}

/* Convert to the digits of the four weights, low ones first; the last word is 128 times the sum of the weights. */
static void pack_digits(Factors *factors, const int32_t *weights) {
    int8_t digits[3], words[3][QUAD];
    factors->words[3] = 0;
    for (int k = 0; k < QUAD; k++) {
        split_weight(digits, weights[k]);
        for (int i = 0; i < 3; i++) words[i][k] = digits[i];
        factors->words[3] += 128 * weights[k];
    }
    memcpy(factors->words, words, sizeof(words));
}

/* Transpose 4 x 4 numbers of 32 bits. */
SIMD static inline void transpose(Vector *rows) {
    const Vector a = zip_low(rows[0], rows[2]), b = zip_low(rows[1], rows[3]);
    const Vector c = zip_high(rows[0], rows[2]), d = zip_high(rows[1], rows[3]);
    rows[0] = zip_low(a, b);
    rows[1] = zip_high(a, b);
    rows[2] = zip_low(c, d);
    rows[3] = zip_high(c, d);
}

SIMD static void turn_simd(
    uint8_t *restrict out, size_t plane, const uint8_t *restrict in, size_t stride, int width, int height
) {
    static const uint8_t places[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const Vector by_channel = load(places);
    const int whole_width = width / QUAD * QUAD, whole_height = height / QUAD * QUAD;
    for (int x = 0; x < whole_width; x += QUAD)
        for (int y = 0; y < whole_height; y += QUAD) {
            Vector rows[QUAD];
            if (x % 16 == 0) /* once per line of the cache */
                for (int i = 0; i < QUAD; i++) __builtin_prefetch(in + (y + i) * stride + 4 * x + PREFETCH_BYTES);
            for (int i = 0; i < QUAD; i++) rows[i] = permute(load(in + (y + i) * stride + 4 * x), by_channel);
            transpose(rows);
            for (int channel = 0; channel < 3; channel++)
                store(out + channel * plane + x * LANES + y * QUAD, rows[channel]);
        }
    turn_rest(out, plane, in, stride, whole_width, 0, width, height);
    turn_rest(out, plane, in, stride, 0, whole_height, whole_width, height);
}

SIMD static void spread_simd(uint32_t *restrict out, size_t stride, const uint8_t *restrict in, int width) {
    for (int x = 0; x < width; x += 4)
        for (int i = 0; i < LANES / QUAD; i += 4) {
            Vector rows[4];
            for (int j = 0; j < 4; j++) rows[j] = load(in + (x + j) * LANES + i * QUAD);
            transpose(rows);
            for (int j = 0; j < 4; j++) store(out + (i + j) * stride + x, rows[j]);
        }
}
#endif

#if defined(HAS_X86)
/* Split weights into two numbers of 16 bits each: even pixels' high halves, odd ones', then their low halves. */
static void pack_avx2(Factors *factors, const int32_t *weights) {
    int16_t halves[4][2];
    for (int k = 0; k < QUAD; k++) {
        const int32_t low = weights[k] & ((1 << HALF_BITS) - 1);
        halves[k % 2][k / 2] = (int16_t)((weights[k] - low) / (1 << HALF_BITS));
        halves[2 + k % 2][k / 2] = (int16_t)low;
    }
    memcpy(factors->words, halves, sizeof(halves));
}

/* Join the halves' sums of 8 pixels, and round. */
AVX2 static inline __m256i round_halves(__m256i high, __m256i low) {
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, HALF_BITS), low), PRECISION_BITS);
}

AVX2 static inline __m256i add_products(__m256i sums, __m256i pixels, int32_t weights) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pixels, _mm256_set1_epi32(weights)));
}

/* Weigh 16 pixels. Named sums, since gcc 12 keeps an array of them in memory. */
AVX2 static inline void weigh_half(uint8_t *out, const uint8_t *in, size_t stride, const Factors *factors, int count) {
    const __m256i byte = _mm256_set1_epi16(0xFF), half = _mm256_set1_epi32(1 << (PRECISION_BITS - 1));
    __m256i high_a = _mm256_setzero_si256(), high_b = high_a, low_a = half, low_b = half;
    for (int k = 0; k < count; k++, in += stride) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)in), b = _mm256_loadu_si256((const __m256i *)(in + 32));
        const __m256i even_a = _mm256_and_si256(a, byte), odd_a = _mm256_srli_epi16(a, 8);
        const __m256i even_b = _mm256_and_si256(b, byte), odd_b = _mm256_srli_epi16(b, 8);
        const int32_t *words = factors[k].words;
        high_a = add_products(add_products(high_a, even_a, words[0]), odd_a, words[1]);
        high_b = add_products(add_products(high_b, even_b, words[0]), odd_b, words[1]);
        low_a = add_products(add_products(low_a, even_a, words[2]), odd_a, words[3]);
        low_b = add_products(add_products(low_b, even_b, words[2]), odd_b, words[3]);
    }
    /* Packing mixes the halves of vectors. */
    const __m256i words = _mm256_packs_epi32(round_halves(high_a, low_a), round_halves(high_b, low_b));
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(ordered));
}

AVX2 static void weigh_avx2(uint8_t *out, const uint8_t *in, size_t stride, const Factors *factors, int count) {
    weigh_half(out, in, stride, factors, count);
    weigh_half(out + LANES / 2, in + QUAD * LANES / 2, stride, factors, count);
}

/* Join the digits' sums of 16 pixels and round: out[16]. */
VNNI static inline void round_digits(uint8_t *out, __m512i low, __m512i middle, __m512i high) {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(high, 8), middle);
    const __m512i sums = _mm512_srai_epi32(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), low), PRECISION_BITS);
    const __m512i positive = _mm512_max_epi32(sums, _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)out, _mm512_cvtusepi32_epi8(positive));
}

/* Named sums, since gcc 12 keeps an array of them in memory. */
VNNI static void weigh_vnni(uint8_t *out, const uint8_t *in, size_t stride, const Factors *factors, int count) {
    const __m512i zero = _mm512_setzero_si512(), half = _mm512_set1_epi32(1 << (PRECISION_BITS - 1));
    __m512i low_a = half, middle_a = zero, high_a = zero, low_b = half, middle_b = zero, high_b = zero;
    for (int k = 0; k < count; k++, in += stride) {
        const __m512i a = _mm512_loadu_si512(in), b = _mm512_loadu_si512(in + 64);
        const int32_t *words = factors[k].words;
        low_a = _mm512_dpbusd_epi32(low_a, a, _mm512_set1_epi32(words[0]));
        low_b = _mm512_dpbusd_epi32(low_b, b, _mm512_set1_epi32(words[0]));
        middle_a = _mm512_dpbusd_epi32(middle_a, a, _mm512_set1_epi32(words[1]));
        middle_b = _mm512_dpbusd_epi32(middle_b, b, _mm512_set1_epi32(words[1]));
        high_a = _mm512_dpbusd_epi32(high_a, a, _mm512_set1_epi32(words[2]));
        high_b = _mm512_dpbusd_epi32(high_b, b, _mm512_set1_epi32(words[2]));
    }
    round_digits(out, low_a, middle_a, high_a);
    round_digits(out + 16, low_b, middle_b, high_b);
}

static int has_vnni(void) { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); }
#elif defined(HAS_NEON)
/* Every Apple processor has dot products; on Linux the kernel tells, if the compiler can make use of it. */
#if defined(__ARM_FEATURE_DOTPROD)
#define DOTPROD
static int has_dotprod(void) { return 1; }
#elif defined(__linux__) && !defined(__clang__) && __GNUC__ >= 10
#include <sys/auxv.h>
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
static int has_dotprod(void) { return (getauxval(AT_HWCAP) & (1 << 20)) != 0; } /* HWCAP_ASIMDDP */
#endif

#if defined(DOTPROD)
/* Weigh 16 pixels, whose sums fit into the registers. The products are of signed numbers, so pixels lose 128, for which
 * `words[3]` makes up. */
DOTPROD static inline void weigh_half(uint8_t *out, const uint8_t *in, size_t stride, const Factors *factors, int count) {
    const uint8x16_t offset = vdupq_n_u8(128);
    int32x4_t sums[3][4];
    int32_t start = 1 << (PRECISION_BITS - 1);
    for (int k = 0; k < count; k++) start += factors[k].words[3];
    for (int i = 0; i < 4; i++) sums[0][i] = vdupq_n_s32(start), sums[1][i] = sums[2][i] = vdupq_n_s32(0);
    for (int k = 0; k < count; k++, in += stride) {
        const int8x16_t digits = vreinterpretq_s8_s32(vld1q_s32(factors[k].words));
        for (int i = 0; i < 4; i++) {
            const int8x16_t quads = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(in + 16 * i), offset));
            sums[0][i] = vdotq_laneq_s32(sums[0][i], quads, digits, 0);
            sums[1][i] = vdotq_laneq_s32(sums[1][i], quads, digits, 1);
            sums[2][i] = vdotq_laneq_s32(sums[2][i], quads, digits, 2);
        }
    }
    for (int i = 0; i < 4; i++) {
        const int32x4_t upper = vaddq_s32(vshlq_n_s32(sums[2][i], 8), sums[1][i]);
        sums[0][i] = vshrq_n_s32(vaddq_s32(vshlq_n_s32(upper, 8), sums[0][i]), PRECISION_BITS);
    }
    for (int i = 0; i < 4; i += 2) {
        const int16x8_t words = vcombine_s16(vqmovn_s32(sums[0][i]), vqmovn_s32(sums[0][i + 1]));
        vst1_u8(out + 4 * i, vqmovun_s16(words));
    }
}

DOTPROD static void weigh_neon(uint8_t *out, const uint8_t *in, size_t stride, const Factors *factors, int count) {
    weigh_half(out, in, stride, factors, count);
    weigh_half(out + LANES / 2, in + QUAD * LANES / 2, stride, factors, count);
}
#endif
#endif

static Kernels choose_kernels(void) {
    Kernels kernels = {pack_plain, weigh_plain, turn_plain, spread_plain};
#if defined(HAS_X86)
    if (__builtin_cpu_supports("avx2")) kernels = (Kernels){pack_avx2, weigh_avx2, turn_simd, spread_simd};
    if (has_vnni()) kernels = (Kernels){pack_digits, weigh_vnni, turn_simd, spread_simd};
#elif defined(HAS_NEON)
    kernels = (Kernels){pack_plain, weigh_plain, turn_simd, spread_simd};
#if defined(DOTPROD)
    if (has_dotprod()) kernels = (Kernels){pack_digits, weigh_neon, turn_simd, spread_simd};
#endif
#endif
    return kernels;
}
