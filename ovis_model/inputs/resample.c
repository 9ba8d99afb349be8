/* The module _ovis_resample: hands images of Pillow and their crops to resample.h. */
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "resample.h"

/* Arrow's C data interface, a stable ABI: https://arrow.apache.org/docs/format/CDataInterface.html */
typedef struct ArrowArray {
    int64_t length, null_count, offset, num_buffers, num_children;
    const void **buffers;
    struct ArrowArray **children, *dictionary;
    void (*release)(struct ArrowArray *);
    void *private_data;
} ArrowArray;

/* Pixels of 4 bytes: R, G, B and one that is not read. */
typedef struct {
    Py_buffer buffer; /* held if `buffer.obj` is set */
    const uint8_t *pixels;
    Py_ssize_t num_pixels;
} Strip;

/* Return 0 after setting an exception. */
static int open_arrow(Strip *strip, PyObject *capsule) {
    const ArrowArray *array = PyCapsule_GetPointer(capsule, "arrow_array");
    if (!array) return 0;
    if (!array->release || array->offset || array->num_children != 1 || array->children[0]->offset ||
        array->children[0]->num_buffers != 2 || array->children[0]->length != 4 * array->length) {
        PyErr_SetString(PyExc_ValueError, "an Arrow array is not of pixels of 4 bytes");
        return 0;
    }
    strip->pixels = array->children[0]->buffers[1];
    strip->num_pixels = array->length;
    return 1;
}

/* Return 0 after setting an exception. */
static int open_strip(Strip *strip, PyObject *object) {
    if (PyCapsule_CheckExact(object)) return open_arrow(strip, object);
    if (PyObject_GetBuffer(object, &strip->buffer, PyBUF_SIMPLE)) return 0;
    strip->pixels = strip->buffer.buf;
    strip->num_pixels = strip->buffer.len % 4 ? 0 : strip->buffer.len / 4;
    return 1;
}

/* Pass on the rows of one strip. Return their number, or -1 after setting an exception. */
static int read_strip(Job *job, PyObject *object, int top) {
    Strip strip = {0};
    int done = 0;

    if (!open_strip(&strip, object)) return -1;
    const Py_ssize_t height = strip.num_pixels / job->width;
    if (height && strip.num_pixels % job->width == 0 && height <= job->height - top && top % LANES == 0) {
        Py_BEGIN_ALLOW_THREADS;
        done = add_rows(job, strip.pixels, top, (int)height);
        Py_END_ALLOW_THREADS;
        if (!done) PyErr_NoMemory();
    } else {
        PyErr_Format(PyExc_ValueError, "a strip from row %d on is not whole rows, in multiples of %d, of an image of "
                     "%d x %d px", top, LANES, job->width, job->height);
    }
    if (strip.buffer.obj) PyBuffer_Release(&strip.buffer);
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
    if (!start_job(job)) {
        PyErr_NoMemory();
        return 0;
    }
    return parse_crops(job, boxes) && read_strips(job, strips);
}

PyDoc_STRVAR(
    resize_crops_doc,
    "resize_crops(strips, width, height, boxes, tiles, tile_size)\n\n"
    "Resize crops of an RGB image of width x height px into the centres of their tiles.\n\n"
    "strips: an iterable of the image's rows from top to bottom, a multiple of 32 per item but the last: a buffer or a\n"
    "capsule of Arrow's, of pixels of 4 bytes, the last of which is ignored.\n"
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
