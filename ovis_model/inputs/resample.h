/* Bicubic resampling of crops of an 8-bit RGB image, bit for bit as Pillow does it: width first, height second.
 *
 * Pillow (src/libImaging/Resample.c) multiplies pixels by fixed-point weights of 22 bits, sums in 32 bits and rounds after
 * each pass. The image arrives in bands of LANES rows, each of which is read and turned once for all crops. The first
 * pass computes LANES rows at once. What the second pass still needs of its results fits into a core's cache: it
 * finishes rows as soon as it can. Knows nothing of Python.
 */
#include "resample_kernels.h"

#define MAX_SIDE_PX 65536 /* no number below overflows with it, and a turned band takes at most 6 MB */

typedef struct {
    int first, count; /* the quads that an output pixel is made of */
} Span;

/* Weights for `in_size` pixels, of which the first is the pixel `phase` of a quad. */
typedef struct {
    int in_size, out_size, phase;
    int size;         /* factors reserved per output pixel */
    Span *spans;      /* one per output pixel */
    Factors *factors; /* `size` per output pixel */
} Weights;

typedef struct {
    int left, top, right, bottom; /* px of the image */
    int width, height;            /* of the resized crop */
    const Weights *across, *down;
    size_t stride;      /* quads from a row of `narrowed` to the next */
    uint32_t *narrowed; /* quads[3][capacity][stride]: some rows after the first pass */
    int capacity;       /* in rows of quads */
    int first, count;   /* the rows of quads in `narrowed`; the first of the image is 0 */
    int num_done;       /* finished rows of the resized crop */
} Crop;

typedef struct {
    int width, height; /* of the image */
    int tile_size;
    uint8_t *tiles; /* uint8[num_crops][3][tile_size][tile_size] */
    ptrdiff_t num_crops;
    Crop *crops;
    Weights *weights; /* at most two per crop: crops of a grid share theirs */
    ptrdiff_t num_weights;
    size_t plane;     /* bytes of a channel of `turned` */
    uint8_t *turned;  /* quads[3][width / QUAD][LANES]: a band of the image */
    uint8_t *resized; /* uint8[tile_size][LANES]: the same band of one crop and channel after the first pass */
    Kernels kernels;
} Job;

static double bicubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

/* Compute the weights of the pixels that an output pixel is made of; return their number. `exact` has room for them.
 * The order of operations decides the last bit: it is Pillow's. */
static int compute_row(double *exact, int *first, int i, int in_size, double scale) {
    const double stretch = scale < 1.0 ? 1.0 : scale, support = 2.0 * stretch, inverse = 1.0 / stretch;
    const double center = (i + 0.5) * scale;
    int start = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
    double sum = 0.0;

    if (start < 0) start = 0;
    if (end > in_size) end = in_size;
    for (int k = 0; k < end - start; k++) {
        exact[k] = bicubic((k + start - center + 0.5) * inverse);
        sum += exact[k];
    }
    for (int k = 0; k < end - start && sum != 0.0; k++) exact[k] /= sum;
    *first = start;
    return end - start;
}

/* Return 0 if memory is short. */
static int compute_weights(Weights *weights, const Kernels *kernels) {
    const double scale = (double)weights->in_size / weights->out_size;
    const int max_pixels = (int)ceil(2.0 * (scale < 1.0 ? 1.0 : scale)) * 2 + 1;
    double *exact = malloc(sizeof(double) * max_pixels);
    int32_t *fixed;

    weights->size = (max_pixels + 2 * QUAD - 2) / QUAD;
    weights->spans = malloc(sizeof(Span) * weights->out_size);
    weights->factors = malloc(sizeof(Factors) * weights->out_size * weights->size);
    fixed = malloc(sizeof(int32_t) * QUAD * weights->size);
    if (exact && fixed && weights->spans && weights->factors)
        for (int i = 0; i < weights->out_size; i++) {
            int first;
            const int count = compute_row(exact, &first, i, weights->in_size, scale);
            const int lead = (first + weights->phase) % QUAD, num_quads = (lead + count + QUAD - 1) / QUAD;
            memset(fixed, 0, sizeof(int32_t) * QUAD * weights->size);
            for (int k = 0; k < count; k++) {
                const double weight = exact[k] * (1 << PRECISION_BITS);
                fixed[lead + k] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
            }
            for (int k = 0; k < num_quads; k++)
                kernels->pack(&weights->factors[(size_t)i * weights->size + k], fixed + QUAD * k);
            weights->spans[i] = (Span){(first + weights->phase) / QUAD, num_quads};
        }
    const int done = exact && fixed && weights->spans && weights->factors;
    free(exact);
    free(fixed);
    return done;
}

/* Return the weights of this job for an axis of a crop, which it may share with others; NULL if memory is short. */
static const Weights *find_weights(Job *job, int start, int end, int out_size) {
    const Weights wanted = {end - start, out_size, start % QUAD, 0, NULL, NULL};
    for (ptrdiff_t i = 0; i < job->num_weights; i++) {
        const Weights *known = &job->weights[i];
        if (known->in_size == wanted.in_size && known->out_size == out_size && known->phase == wanted.phase) return known;
    }
    Weights *weights = &job->weights[job->num_weights++];
    *weights = wanted;
    return compute_weights(weights, &job->kernels) ? weights : NULL;
}

static void free_job(Job *job) {
    for (ptrdiff_t i = 0; job->crops && i < job->num_crops; i++) free(job->crops[i].narrowed);
    for (ptrdiff_t i = 0; i < job->num_weights; i++) {
        free(job->weights[i].spans);
        free(job->weights[i].factors);
    }
    free(job->crops);
    free(job->weights);
    free(job->turned);
    free(job->resized);
}

/* Prepare a job whose sizes are set. Return 0 if memory is short. */
static int start_job(Job *job) {
    job->kernels = choose_kernels();
    job->crops = calloc(job->num_crops + 1, sizeof(Crop));
    job->weights = calloc(2 * job->num_crops + 1, sizeof(Weights));
    job->plane = ((size_t)job->width + QUAD - 1) / QUAD * QUAD * LANES;
    job->turned = calloc(3, job->plane);
    job->resized = calloc((size_t)job->tile_size + LANES, LANES);
    return job->crops && job->weights && job->turned && job->resized;
}

/* Return 0 if memory is short. */
static int start_crop(Crop *crop, Job *job) {
    crop->across = find_weights(job, crop->left, crop->right, crop->width);
    crop->down = find_weights(job, crop->top, crop->bottom, crop->height);
    if (!crop->across || !crop->down) return 0;
    crop->stride = ((size_t)crop->width + LANES - 1) / LANES * LANES;
    crop->capacity = crop->down->size + LANES / QUAD;
    crop->narrowed = calloc(3 * crop->stride * crop->capacity, QUAD);
    return crop->narrowed != NULL;
}

/* Forget the rows that no further output row needs. */
static void drop_rows(Crop *crop, int first) {
    const int dropped = first - crop->first < crop->count ? first - crop->first : crop->count;
    if (dropped <= 0) return;
    crop->first += dropped;
    crop->count -= dropped;
    for (int channel = 0; channel < 3; channel++) {
        uint32_t *rows = crop->narrowed + channel * crop->capacity * crop->stride;
        memmove(rows, rows + dropped * crop->stride, crop->count * crop->stride * QUAD);
    }
}

/* Run the first pass for the band in `turned`, whose first row of quads is `first`. */
static void add_band(Crop *crop, const Job *job, int first) {
    if (!crop->count) crop->first = first;
    for (int channel = 0; channel < 3; channel++) {
        const uint8_t *quads = job->turned + channel * job->plane + (size_t)(crop->left / QUAD) * QUAD * LANES;
        for (int x = 0; x < crop->width; x++) {
            const Span span = crop->across->spans[x];
            job->kernels.weigh(job->resized + x * LANES, quads + (size_t)span.first * QUAD * LANES, QUAD * LANES,
                               crop->across->factors + (size_t)x * crop->across->size, span.count);
        }
        job->kernels.spread(crop->narrowed + (channel * crop->capacity + crop->count) * crop->stride, crop->stride,
                            job->resized, crop->width);
    }
    crop->count += LANES / QUAD;
}

/* Run the second pass for one row of the resized crop. */
static void finish_row(const Crop *crop, const Job *job, uint8_t *out, int y) {
    const Span span = crop->down->spans[y];
    const Factors *factors = crop->down->factors + (size_t)y * crop->down->size;
    const int first = crop->top / QUAD + span.first - crop->first;
    uint8_t last[LANES];
    for (int channel = 0; channel < 3; channel++, out += (size_t)job->tile_size * job->tile_size) {
        const uint32_t *rows = crop->narrowed + ((size_t)channel * crop->capacity + first) * crop->stride;
        for (int x = 0; x < crop->width; x += LANES) {
            const int is_whole = x + LANES <= crop->width;
            job->kernels.weigh(is_whole ? out + x : last, (const uint8_t *)(rows + x), crop->stride * QUAD, factors,
                               span.count);
            if (!is_whole) memcpy(out + x, last, crop->width - x);
        }
    }
}

/* Add a band to a crop that it touches, and finish the rows that need no more. Return 0 if memory is short. */
static int advance(Crop *crop, Job *job, uint8_t *tile, int first) {
    const int size = job->tile_size, origin = crop->top / QUAD;
    uint8_t *out = tile + (size_t)((size - crop->height) / 2) * size + (size - crop->width) / 2;

    if (!crop->narrowed && !start_crop(crop, job)) return 0;
    if (crop->num_done < crop->height) {
        drop_rows(crop, origin + crop->down->spans[crop->num_done].first);
        add_band(crop, job, first);
    }
    for (; crop->num_done < crop->height; crop->num_done++) {
        const Span span = crop->down->spans[crop->num_done];
        if (origin + span.first + span.count > crop->first + crop->count) break;
        finish_row(crop, job, out + (size_t)crop->num_done * size, crop->num_done);
    }
    return 1;
}

/* Resize the crops as far as the next rows reach: pixels of 4 bytes; `top` is a multiple of LANES. Return 0 if memory is
 * short. */
static int add_rows(Job *job, const uint8_t *pixels, int top, int height) {
    const size_t stride = 4 * (size_t)job->width;
    for (int y = 0; y < height; y += LANES) {
        const int num_rows = height - y < LANES ? height - y : LANES;
        job->kernels.turn(job->turned, job->plane, pixels + y * stride, stride, job->width, num_rows);
        for (ptrdiff_t i = 0; i < job->num_crops; i++) {
            Crop *crop = &job->crops[i];
            if (crop->bottom <= top + y || crop->top >= top + y + num_rows) continue;
            if (!advance(crop, job, job->tiles + (size_t)i * 3 * job->tile_size * job->tile_size, (top + y) / QUAD))
                return 0;
        }
    }
    return 1;
}
