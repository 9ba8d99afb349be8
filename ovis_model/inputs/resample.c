/* Bicubic resampling of 8-bit RGB crops, bit for bit as Pillow does it: width first, height second.
 *
 * Pillow (src/libImaging/Resample.c) multiplies pixels by fixed-point weights of 22 bits, sums in 32 bits and rounds after
 * each pass. Integer sums do not depend on their order, so a pass may run along any axis: here each computes LANES pixels
 * at once, in AVX2, in AVX-512 VNNI or in what the compiler makes of plain C. The image arrives in strips of rows, each of which is read once for all
 * crops. The first pass runs over LANES rows turned by 90 degrees, the second over LANES columns of its result.
 */
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && defined(__x86_64__)
#define HAS_X86
#include <immintrin.h>
#endif

#define PRECISION_BITS 22
#define LANES 32
#define MAX_SIDE_PX 65536 /* no number below overflows with it, and a turned strip takes at most 6 MB */

#define HALF_BITS 11

#if defined(_MSC_VER)
#define restrict __restrict
#endif

typedef struct {
    int first, count; /* the input pixels that an output pixel is made of */
} Span;

/* Two weights, each (high << HALF_BITS) + low, for processors that multiply and add pairs of 16-bit numbers. */
typedef struct {
    int16_t high[2], low[2];
} Pair;

typedef struct {
    int size;    /* pairs reserved per output pixel */
    Span *spans; /* one per output pixel */
    Pair *pairs; /* `size` per output pixel */
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
    free(weights->pairs);
}

/* Return 0 if memory is short. The order of operations decides the last bit: it is Pillow's. */
static int compute_weights(Weights *weights, int in_size, int out_size) {
    const double scale = (double)in_size / out_size;
    const double stretch = scale < 1.0 ? 1.0 : scale;
    const double support = 2.0 * stretch;
    const double inverse = 1.0 / stretch;
    double *row;

    weights->size = (int)ceil(support) + 1;
    weights->spans = malloc(sizeof(Span) * out_size);
    weights->pairs = calloc((size_t)out_size * weights->size, sizeof(Pair));
    row = malloc(sizeof(double) * 2 * weights->size);
    if (!weights->spans || !weights->pairs || !row) {
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
            const double exact = (sum != 0.0 ? row[k] / sum : row[k]) * (1 << PRECISION_BITS);
            const int32_t weight = (int32_t)(exact < 0 ? exact - 0.5 : exact + 0.5);
            Pair *pair = &weights->pairs[(size_t)i * weights->size + k / 2];
            pair->low[k % 2] = (int16_t)(weight & ((1 << HALF_BITS) - 1));
            pair->high[k % 2] = (int16_t)((weight - pair->low[k % 2]) / (1 << HALF_BITS));
        }
        weights->spans[i] = (Span){first, end - first};
    }
    free(row);
    return 1;
}

/* Sum `count` weighted vectors of LANES pixels, `stride` bytes apart. */
typedef void Weigh(uint8_t *out, const uint8_t *in, size_t stride, const Pair *pairs, int count);

static void weigh_plain(uint8_t *out, const uint8_t *in, size_t stride, const Pair *pairs, int count) {
    int32_t sums[LANES];
    for (int lane = 0; lane < LANES; lane++) sums[lane] = 1 << (PRECISION_BITS - 1);
    for (int k = 0; k < count; k++) {
        const uint8_t *pixels = in + k * stride;
        const int32_t weight = pairs[k / 2].high[k % 2] * (1 << HALF_BITS) + pairs[k / 2].low[k % 2];
        for (int lane = 0; lane < LANES; lane++) sums[lane] += weight * pixels[lane];
    }
    for (int lane = 0; lane < LANES; lane++) {
        const int32_t value = sums[lane] >> PRECISION_BITS;
        out[lane] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

#if defined(HAS_X86)
#define AVX2 __attribute__((target("avx2")))
#define VNNI __attribute__((target("avx2,avx512vnni,avx512vl")))

/* Add to each 32-bit sum the two products of 16-bit numbers in its place. */
typedef __m256i AddProducts(__m256i sums, __m256i a, __m256i b);

AVX2 static inline __m256i add_products_avx2(__m256i sums, __m256i a, __m256i b) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}

VNNI static inline __m256i add_products_vnni(__m256i sums, __m256i a, __m256i b) {
    return _mm256_dpwssd_epi32(sums, a, b);
}

/* A vector holds the pixels of even or odd lanes, since 8 bits become 16 without a shuffle that way. */
AVX2 static inline __attribute__((always_inline)) void weigh_x86(
    uint8_t *out, const uint8_t *in, size_t stride, const Pair *pairs, int count, AddProducts *add_products
) {
    const __m256i byte = _mm256_set1_epi16(0xFF), zero = _mm256_setzero_si256();
    __m256i high[4] = {zero, zero, zero, zero}, low[4] = {zero, zero, zero, zero}, values[4];

    for (int k = 0; k < count; k += 2, in += 2 * stride, pairs++) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)in);
        const __m256i b = k + 1 < count ? _mm256_loadu_si256((const __m256i *)(in + stride)) : zero;
        const __m256i even_a = _mm256_and_si256(a, byte), odd_a = _mm256_srli_epi16(a, 8);
        const __m256i even_b = _mm256_and_si256(b, byte), odd_b = _mm256_srli_epi16(b, 8);
        int32_t halves[2];
        memcpy(halves, pairs, sizeof(halves));
        values[0] = _mm256_unpacklo_epi16(even_a, even_b);
        values[1] = _mm256_unpackhi_epi16(even_a, even_b);
        values[2] = _mm256_unpacklo_epi16(odd_a, odd_b);
        values[3] = _mm256_unpackhi_epi16(odd_a, odd_b);
        for (int i = 0; i < 4; i++) {
            high[i] = add_products(high[i], values[i], _mm256_set1_epi32(halves[0]));
            low[i] = add_products(low[i], values[i], _mm256_set1_epi32(halves[1]));
        }
    }
    for (int i = 0; i < 4; i++) {
        const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[i], HALF_BITS), low[i]);
        const __m256i half = _mm256_set1_epi32(1 << (PRECISION_BITS - 1));
        values[i] = _mm256_srai_epi32(_mm256_add_epi32(sum, half), PRECISION_BITS);
    }
    for (int i = 0; i < 4; i += 2) {
        const __m256i words = _mm256_packs_epi32(values[i], values[i + 1]);
        values[i] = _mm256_min_epi16(_mm256_max_epi16(words, zero), byte);
    }
    _mm256_storeu_si256((__m256i *)out, _mm256_or_si256(values[0], _mm256_slli_epi16(values[2], 8)));
}

AVX2 static void weigh_avx2(uint8_t *out, const uint8_t *in, size_t stride, const Pair *pairs, int count) {
    weigh_x86(out, in, stride, pairs, count, add_products_avx2);
}

VNNI static void weigh_vnni(uint8_t *out, const uint8_t *in, size_t stride, const Pair *pairs, int count) {
    weigh_x86(out, in, stride, pairs, count, add_products_vnni);
}

static int has_vnni(void) { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"); }

static Weigh *choose_weigh(void) {
    if (!__builtin_cpu_supports("avx2")) return weigh_plain;
    return has_vnni() ? weigh_vnni : weigh_avx2;
}
#else
static Weigh *choose_weigh(void) { return weigh_plain; }
#endif

#if defined(HAS_X86)
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
static void resize_columns(uint8_t *out, const uint8_t *in, int out_width, const Weights *weights) {
    Weigh *weigh = choose_weigh();
    for (int x = 0; x < out_width; x++) {
        const Span span = weights->spans[x];
        weigh(out + (size_t)x * LANES, in + (size_t)span.first * LANES, LANES,
              weights->pairs + (size_t)x * weights->size, span.count);
    }
}

/* Weigh rows of `stride` bytes, a multiple of LANES: in[in_height][stride] -> out rows `out_stride` bytes apart. */
static void resize_rows(
    uint8_t *out, size_t out_stride, const uint8_t *in, size_t stride, int width, int out_height, const Weights *weights
) {
    Weigh *weigh = choose_weigh();
    uint8_t last[LANES];
    for (int y = 0; y < out_height; y++) {
        const Span span = weights->spans[y];
        const Pair *pairs = weights->pairs + (size_t)y * weights->size;
        const uint8_t *first = in + span.first * stride;
        int x = 0;
        for (; x + LANES <= width; x += LANES) weigh(out + y * out_stride + x, first + x, stride, pairs, span.count);
        if (x < width) {
            weigh(last, first + x, stride, pairs, span.count);
            memcpy(out + y * out_stride + x, last, width - x);
        }
    }
}

typedef struct {
    int left, top, right, bottom; /* px of the image */
    int width, height;            /* of the resized crop */
    Weights across, down;
    size_t stride;   /* bytes from a row of `narrowed` to the next */
    uint8_t *narrowed; /* uint8[3][bottom - top][stride]: after the first pass */
} Crop;

typedef struct {
    int width, height; /* of the image */
    int tile_size;
    uint8_t *tiles; /* uint8[num_crops][3][tile_size][tile_size] */
    Py_ssize_t num_crops;
    Crop *crops;
    uint8_t *turned;  /* uint8[3][width][LANES]: some rows of the image */
    uint8_t *resized; /* uint8[tile_size][LANES]: the same rows of one crop and channel after the first pass */
} Job;

static void free_crop(Crop *crop) {
    free_weights(&crop->across);
    free_weights(&crop->down);
    free(crop->narrowed);
    memset(crop, 0, sizeof(Crop));
}

static void free_job(Job *job) {
    for (Py_ssize_t i = 0; job->crops && i < job->num_crops; i++) free_crop(&job->crops[i]);
    free(job->crops);
    free(job->turned);
    free(job->resized);
}

/* Run the first pass for the rows of the crop that are among `turned`. Return 0 if memory is short. */
static int narrow(Crop *crop, const Job *job, int first_row, int num_rows) {
    const int width = crop->right - crop->left, height = crop->bottom - crop->top;
    const int start = first_row < crop->top ? crop->top : first_row;
    const int stop = first_row + num_rows < crop->bottom ? first_row + num_rows : crop->bottom;

    if (start >= stop) return 1;
    if (!crop->narrowed) {
        crop->stride = (size_t)(crop->width + LANES - 1) / LANES * LANES;
        crop->narrowed = calloc(3 * crop->stride, height);
        if (!crop->narrowed || !compute_weights(&crop->across, width, crop->width)) return 0;
    }
    for (int channel = 0; channel < 3; channel++) {
        const uint8_t *columns = job->turned + ((size_t)channel * job->width + crop->left) * LANES;
        uint8_t *rows = crop->narrowed + ((size_t)channel * height + start - crop->top) * crop->stride;
        if (width != crop->width) {
            resize_columns(job->resized, columns, crop->width, &crop->across);
            columns = job->resized;
        }
        turn(rows, crop->stride, columns + start - first_row, LANES, stop - start, crop->width);
    }
    return 1;
}

/* Run the second pass into the centre of the tile. Return 0 if memory is short. */
static int finish(Crop *crop, uint8_t *tile, int tile_size) {
    const int height = crop->bottom - crop->top;
    uint8_t *out = tile + (size_t)((tile_size - crop->height) / 2) * tile_size + (tile_size - crop->width) / 2;

    if (!compute_weights(&crop->down, height, crop->height)) return 0;
    for (int channel = 0; channel < 3; channel++, out += (size_t)tile_size * tile_size) {
        const uint8_t *rows = crop->narrowed + (size_t)channel * height * crop->stride;
        if (height != crop->height)
            resize_rows(out, tile_size, rows, crop->stride, crop->width, crop->height, &crop->down);
        else
            for (int y = 0; y < height; y++)
                memcpy(out + (size_t)y * tile_size, rows + y * crop->stride, crop->width);
    }
    free_crop(crop);
    return 1;
}

/* Resize the crops as far as this strip reaches. Return 0 if memory is short. */
static int add_strip(Job *job, const Py_buffer *planes, int top, int height) {
    const size_t width = job->width;
    for (int y = 0; y < height; y += LANES) {
        const int num_rows = height - y < LANES ? height - y : LANES;
        for (int channel = 0; channel < 3; channel++)
            turn(job->turned + channel * width * LANES, LANES, (const uint8_t *)planes[channel].buf + y * width, width,
                 job->width, num_rows);
        for (Py_ssize_t i = 0; i < job->num_crops; i++)
            if (!narrow(&job->crops[i], job, top + y, num_rows)) return 0;
    }
    for (Py_ssize_t i = 0; i < job->num_crops; i++) {
        uint8_t *tile = job->tiles + (size_t)i * 3 * job->tile_size * job->tile_size;
        if (job->crops[i].narrowed && job->crops[i].bottom <= top + height)
            if (!finish(&job->crops[i], tile, job->tile_size)) return 0;
    }
    return 1;
}

/* Pass on the rows of one strip. Return their number, or -1 after setting an exception. */
static int read_strip(Job *job, PyObject *strip, int top) {
    Py_buffer planes[3];
    int done = 0;

    if (!PyTuple_Check(strip)) {
        PyErr_SetString(PyExc_TypeError, "a strip must be a tuple of three planes");
        return -1;
    }
    if (!PyArg_ParseTuple(strip, "y*y*y*", &planes[0], &planes[1], &planes[2])) return -1;
    const Py_ssize_t size = planes[0].len, height = size / job->width;
    const int fits = size && size % job->width == 0 && height <= job->height - top && planes[1].len == size &&
                     planes[2].len == size;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        done = add_strip(job, planes, top, (int)height);
        Py_END_ALLOW_THREADS;
        if (!done) PyErr_NoMemory();
    } else {
        PyErr_Format(PyExc_ValueError, "a strip from row %d on is not whole rows of an image of %d x %d px", top,
                     job->width, job->height);
    }
    for (int channel = 0; channel < 3; channel++) PyBuffer_Release(&planes[channel]);
    return done ? (int)height : -1;
}

/* Return 0 after setting an exception. */
static int read_strips(Job *job, PyObject *strips) {
    PyObject *strip, *iterator = PyObject_GetIter(strips);
    int top = 0;

    if (!iterator) return 0;
    while (top >= 0 && (strip = PyIter_Next(iterator))) {
        const int height = read_strip(job, strip, top);
        top = height < 0 ? -1 : top + height;
        Py_DECREF(strip);
    }
    Py_DECREF(iterator);
    if (PyErr_Occurred()) return 0;
    if (top == job->height) return 1;
    PyErr_Format(PyExc_ValueError, "the strips end after %d of %d rows", top, job->height);
    return 0;
}

/* Return 0 after setting an exception. */
static int parse_crops(Job *job, PyObject *boxes) {
    for (Py_ssize_t i = 0; i < job->num_crops; i++) {
        Crop *crop = &job->crops[i];
        PyObject *item = PyList_GetItem(boxes, i); /* borrowed */
        if (!item || !PyTuple_Check(item)) {
            PyErr_SetString(PyExc_TypeError, "boxes must be a list of tuples of six numbers");
            return 0;
        }
        if (!PyArg_ParseTuple(item, "iiiiii", &crop->left, &crop->top, &crop->right, &crop->bottom, &crop->width,
                              &crop->height))
            return 0;
        if (crop->left < 0 || crop->top < 0 || crop->left >= crop->right || crop->top >= crop->bottom ||
            crop->right > job->width || crop->bottom > job->height || crop->width < 1 || crop->height < 1 ||
            crop->width > job->tile_size || crop->height > job->tile_size) {
            PyErr_Format(PyExc_ValueError, "crop %zd is empty, or outside an image of %d x %d px or a tile of %d px", i,
                         job->width, job->height, job->tile_size);
            return 0;
        }
    }
    return 1;
}

static int is_side(int side_px) { return side_px >= 1 && side_px <= MAX_SIDE_PX; }

/* Return 0 after setting an exception. */
static int run(Job *job, PyObject *strips, PyObject *boxes, Py_ssize_t tiles_bytes) {
    if (!is_side(job->width) || !is_side(job->height) || !is_side(job->tile_size)) {
        PyErr_Format(PyExc_ValueError, "sides must be from 1 to %d px; the image is %d x %d, a tile %d", MAX_SIDE_PX,
                     job->width, job->height, job->tile_size);
        return 0;
    }
    if (tiles_bytes / 3 / job->tile_size / job->tile_size != job->num_crops) {
        PyErr_Format(PyExc_ValueError, "%zd crops do not fill %zd bytes of tiles", job->num_crops, tiles_bytes);
        return 0;
    }
    job->crops = calloc(job->num_crops + 1, sizeof(Crop));
    job->turned = calloc(3 * (size_t)job->width, LANES);
    job->resized = calloc(job->tile_size, LANES);
    if (!job->crops || !job->turned || !job->resized) {
        PyErr_NoMemory();
        return 0;
    }
    return parse_crops(job, boxes) && read_strips(job, strips);
}

PyDoc_STRVAR(
    resize_crops_doc,
    "resize_crops(strips, width, height, boxes, tiles, tile_size)\n\n"
    "Resize crops of an RGB image of width x height px into the centres of their tiles.\n\n"
    "strips: an iterable of the image's rows from top to bottom, some per item: a tuple of the planes R, G and B.\n"
    "boxes: a list of (left, top, right, bottom, width, height), the place of a crop and its size in its tile.\n"
    "tiles: a writable buffer uint8[len(boxes), 3, tile_size, tile_size].\n\n"
    "Raise ValueError if a box is outside the image or its tile, if the strips are not the image's rows, or if a side is\n"
    "longer than MAX_SIDE_PX.");

static PyObject *resize_crops(PyObject *module, PyObject *args) {
    PyObject *strips, *boxes;
    Py_buffer tiles;
    Job job = {0};

    (void)module;
    if (!PyArg_ParseTuple(args, "OiiO!w*i", &strips, &job.width, &job.height, &PyList_Type, &boxes, &tiles,
                          &job.tile_size))
        return NULL;
    job.tiles = tiles.buf;
    job.num_crops = PyList_Size(boxes);
    const int done = run(&job, strips, boxes, tiles.len);
    free_job(&job);
    PyBuffer_Release(&tiles);
    if (!done) return NULL;
    Py_RETURN_NONE;
}

static int add_constants(PyObject *module) { return PyModule_AddIntConstant(module, "MAX_SIDE_PX", MAX_SIDE_PX); }

static PyMethodDef methods[] = {{"resize_crops", resize_crops, METH_VARARGS, resize_crops_doc}, {NULL, NULL, 0, NULL}};
static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_constants}, {0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ovis_resample", NULL, 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__ovis_resample(void) { return PyModuleDef_Init(&module); }
