/* Bicubic resampling of 8-bit RGB, bit for bit as Pillow does it, width first and height second.
 *
 * Pillow (src/libImaging/Resample.c) weighs pixels by fixed-point numbers of 22 bits, sums them in 32 bits and rounds
 * after each pass. Integer sums do not depend on their order, so the passes may run along any axis: here each runs over
 * LANES pixels at once, which compilers turn into vector code. The first pass works on strips of LANES rows, turned by
 * 90 degrees; the second on LANES columns of what it left.
 */
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define PRECISION_BITS 22
#define LANES 32

#if defined(__GNUC__) && defined(__x86_64__) && defined(__ELF__)
#define FAST __attribute__((target_clones("avx2", "sse4.1", "default")))
#else
#define FAST
#endif

typedef struct {
    int first, count; /* the input pixels that an output pixel is made of */
} Span;

typedef struct {
    int size;        /* weights reserved per output pixel */
    Span *spans;     /* one per output pixel */
    int32_t *values; /* fixed-point weights, `size` per output pixel */
} Weights;

static double bicubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static void free_weights(Weights *weights) {
    free(weights->spans);
    free(weights->values);
}

/* Return 0 if memory is short. The order of operations decides the last bit: it is Pillow's. */
static int compute_weights(Weights *weights, int in_size, int out_size) {
    const double scale = (double)in_size / out_size;
    const double stretch = scale < 1.0 ? 1.0 : scale;
    const double support = 2.0 * stretch;
    const double inverse = 1.0 / stretch;
    double *row;

    weights->size = (int)ceil(support) * 2 + 1;
    weights->spans = malloc(sizeof(Span) * out_size);
    weights->values = calloc((size_t)out_size * weights->size, sizeof(int32_t));
    row = malloc(sizeof(double) * weights->size);
    if (!weights->spans || !weights->values || !row) {
        free(row);
        return 0;
    }
    for (int i = 0; i < out_size; i++) {
        const double center = (i + 0.5) * scale;
        double sum = 0.0;
        int first = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
        if (first < 0) first = 0;
        if (end > in_size) end = in_size;
        for (int k = 0; k < end - first; k++) {
            row[k] = bicubic((k + first - center + 0.5) * inverse);
            sum += row[k];
        }
        for (int k = 0; k < end - first; k++) {
            const double weight = (sum != 0.0 ? row[k] / sum : row[k]) * (1 << PRECISION_BITS);
            weights->values[(size_t)i * weights->size + k] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        weights->spans[i] = (Span){first, end - first};
    }
    free(row);
    return 1;
}

/* Sum `count` weighted vectors of LANES pixels, `stride` bytes apart. */
static inline __attribute__((always_inline)) void weigh(
    uint8_t *restrict out, const uint8_t *restrict in, size_t stride, const int32_t *restrict weights, int count
) {
    int32_t sums[LANES];
    for (int lane = 0; lane < LANES; lane++) sums[lane] = 1 << (PRECISION_BITS - 1);
    for (int k = 0; k < count; k++) {
        const uint8_t *restrict pixels = in + k * stride;
        const int32_t weight = weights[k];
        for (int lane = 0; lane < LANES; lane++) sums[lane] += weight * pixels[lane];
    }
    for (int lane = 0; lane < LANES; lane++) {
        int32_t value = sums[lane] >> PRECISION_BITS;
        value = value < 0 ? 0 : value;
        out[lane] = (uint8_t)(value > 255 ? 255 : value);
    }
}

#if defined(__SSE2__)
#define BLOCK 16
/* Turn a block of BLOCK x BLOCK bytes: each round interleaves rows that are half a block apart. */
static inline void turn_block(uint8_t *restrict out, size_t out_stride, const uint8_t *restrict in, size_t in_stride) {
    __m128i rows[BLOCK], next[BLOCK];
    for (int y = 0; y < BLOCK; y++) rows[y] = _mm_loadu_si128((const __m128i *)(in + y * in_stride));
    for (int round = 0; round < 4; round++) {
        for (int y = 0; y < BLOCK / 2; y++) {
            next[2 * y] = _mm_unpacklo_epi8(rows[y], rows[y + BLOCK / 2]);
            next[2 * y + 1] = _mm_unpackhi_epi8(rows[y], rows[y + BLOCK / 2]);
        }
        memcpy(rows, next, sizeof(rows));
    }
    for (int y = 0; y < BLOCK; y++) _mm_storeu_si128((__m128i *)(out + y * out_stride), rows[y]);
}
#else
#define BLOCK 8
/* Turn a block of BLOCK x BLOCK bytes: swap its quarters, then theirs, then theirs. */
static inline void turn_block(uint8_t *restrict out, size_t out_stride, const uint8_t *restrict in, size_t in_stride) {
    uint64_t rows[BLOCK], swapped;
    for (int y = 0; y < BLOCK; y++) memcpy(&rows[y], in + y * in_stride, BLOCK);
    for (int half = 4, shift = 32; half; half /= 2, shift /= 2) {
        const uint64_t mask = half == 4 ? 0x00000000FFFFFFFF : half == 2 ? 0x0000FFFF0000FFFF : 0x00FF00FF00FF00FF;
        for (int y = 0; y < BLOCK; y++) {
            if (y & half) continue;
            swapped = ((rows[y] >> shift) ^ rows[y + half]) & mask;
            rows[y] ^= swapped << shift;
            rows[y + half] ^= swapped;
        }
    }
    for (int y = 0; y < BLOCK; y++) memcpy(out + y * out_stride, &rows[y], BLOCK);
}
#endif

/* Turn `height` x `width` bytes: out[x][y] = in[y][x]. */
static void turn(
    uint8_t *restrict out, size_t out_stride, const uint8_t *restrict in, size_t in_stride, int width, int height
) {
    const int whole_height = height / BLOCK * BLOCK, whole_width = width / BLOCK * BLOCK;
    for (int x = 0; x < whole_width; x += BLOCK)
        for (int y = 0; y < whole_height; y += BLOCK)
            turn_block(out + x * out_stride + y, out_stride, in + y * in_stride + x, in_stride);
    for (int x = 0; x < width; x++)
        for (int y = x < whole_width ? whole_height : 0; y < height; y++)
            out[x * out_stride + y] = in[y * in_stride + x];
}

/* Weigh columns: in[in_width][LANES] -> out[out_width][LANES]. */
FAST static void resize_columns(
    uint8_t *restrict out, const uint8_t *restrict in, int out_width, const Weights *weights
) {
    for (int x = 0; x < out_width; x++) {
        const Span span = weights->spans[x];
        weigh(out + (size_t)x * LANES, in + (size_t)span.first * LANES, LANES,
              weights->values + (size_t)x * weights->size, span.count);
    }
}

/* Weigh rows of `stride` bytes, a multiple of LANES: in[in_height][stride] -> out rows `out_stride` bytes apart. */
FAST static void resize_rows(
    uint8_t *restrict out, size_t out_stride, const uint8_t *restrict in, size_t stride, int width, int out_height,
    const Weights *weights
) {
    uint8_t last[LANES];
    for (int y = 0; y < out_height; y++) {
        const Span span = weights->spans[y];
        const int32_t *values = weights->values + (size_t)y * weights->size;
        const uint8_t *first = in + span.first * stride;
        int x = 0;
        for (; x + LANES <= width; x += LANES) weigh(out + y * out_stride + x, first + x, stride, values, span.count);
        if (x < width) {
            weigh(last, first + x, stride, values, span.count);
            memcpy(out + y * out_stride + x, last, width - x);
        }
    }
}

/* Resize one plane. Return 0 if memory is short. */
static int resize(
    uint8_t *out, size_t out_stride, int out_width, int out_height, const uint8_t *in, size_t in_stride, int width,
    int height, const Weights *across, const Weights *down
) {
    const size_t stride = (size_t)(out_width + LANES - 1) / LANES * LANES;
    uint8_t *turned = calloc((size_t)width, LANES), *resized = calloc((size_t)out_width, LANES);
    uint8_t *narrow = calloc(stride, height);
    const int done = turned && resized && narrow;

    for (int y = 0; done && y < height; y += LANES) {
        const int rows = height - y < LANES ? height - y : LANES;
        turn(turned, LANES, in + y * in_stride, in_stride, width, rows);
        if (width != out_width) resize_columns(resized, turned, out_width, across);
        turn(narrow + y * stride, stride, width != out_width ? resized : turned, LANES, rows, out_width);
    }
    if (done && height != out_height)
        resize_rows(out, out_stride, narrow, stride, out_width, out_height, down);
    else if (done)
        for (int y = 0; y < height; y++) memcpy(out + y * out_stride, narrow + y * stride, out_width);
    free(turned);
    free(resized);
    free(narrow);
    return done;
}

static int resize_planes(
    uint8_t *tile, int tile_size, int x, int y, int out_width, int out_height, const Py_buffer *planes, int image_width,
    int left, int top, int width, int height
) {
    Weights across = {0}, down = {0};
    const size_t at = (size_t)top * image_width + left;
    int done = compute_weights(&across, width, out_width) && compute_weights(&down, height, out_height);

    for (int channel = 0; done && channel < 3; channel++) {
        uint8_t *out = tile + ((size_t)channel * tile_size + y) * tile_size + x;
        done = resize(out, tile_size, out_width, out_height, (const uint8_t *)planes[channel].buf + at, image_width,
                      width, height, &across, &down);
    }
    free_weights(&across);
    free_weights(&down);
    return done;
}

PyDoc_STRVAR(resize_doc,
             "resize(red, green, blue, image_width, (left, top, right, bottom), tile, tile_size, (left, top), "
             "(width, height))\n\n"
             "Resize a crop of three planes to (width, height) and write it into `tile`, uint8[3, S, S].\n"
             "Raises ValueError if a box is outside its image.");

static PyObject *resize_method(PyObject *module, PyObject *args) {
    Py_buffer planes[3], tile;
    int image_width, left, top, right, bottom, tile_size, x, y, width, height, done = -1;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*i(iiii)w*i(ii)(ii)", &planes[0], &planes[1], &planes[2], &image_width, &left,
                          &top, &right, &bottom, &tile, &tile_size, &x, &y, &width, &height))
        return NULL;
    int fits = left >= 0 && top >= 0 && left < right && top < bottom && right <= image_width && x >= 0 && y >= 0 &&
               width > 0 && height > 0 && x <= tile_size - width && y <= tile_size - height &&
               tile.len >= (Py_ssize_t)3 * tile_size * tile_size;
    for (int channel = 0; channel < 3; channel++) fits &= planes[channel].len >= (Py_ssize_t)image_width * bottom;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        done = resize_planes(tile.buf, tile_size, x, y, width, height, planes, image_width, left, top, right - left,
                             bottom - top);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "a box is outside its image");
    }
    for (int channel = 0; channel < 3; channel++) PyBuffer_Release(&planes[channel]);
    PyBuffer_Release(&tile);
    if (done < 0) return NULL;
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"resize", resize_method, METH_VARARGS, resize_doc}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_resample", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__resample(void) { return PyModuleDef_Init(&module); }
