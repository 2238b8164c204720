/* The quantizers as a Python module with the limited API of 3.11; `quantize` lets other threads run meanwhile.
 *
 * One source is compiled for several targets, and the caller chooses among those that the machine has.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif

#include "scalars.h"

#define LANES 4
#define N(name) name##_baseline
#include "lanes.h"
#include "kquants.h"
#include "eights.h"
#undef LANES
#undef N

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define LANES 8
#define N(name) name##_avx2
#include "lanes.h"
#include "kquants.h"
#include "eights.h"
#undef LANES
#undef N
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define LANES 16
#define N(name) name##_avx512
#include "lanes.h"
#include "kquants.h"
#include "eights.h"
#undef LANES
#undef N
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

typedef struct {
    const char *name;
    void (*offset)(const float *, long long, int, uint8_t *);
    void (*symmetric)(const float *, long long, uint8_t *);
    void (*eight)(const float *, long long, uint8_t *);
    int (*is_finite)(const float *, long long);
} target;

static const target TARGETS[] = {
    {"baseline", quantize_offset_baseline, quantize_symmetric_baseline, quantize_eight_baseline, is_finite_baseline},
#ifdef __x86_64__
    {"avx2", quantize_offset_avx2, quantize_symmetric_avx2, quantize_eight_avx2, is_finite_avx2},
    {"avx512", quantize_offset_avx512, quantize_symmetric_avx512, quantize_eight_avx512, is_finite_avx512},
#endif
};

static int count_targets(void)
{
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2"))
        return 1;
    int has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return has_512 ? 3 : 2;
#else
    return 1;
#endif
}

/* quantize(bits, rows, out, target): rows of float32 as blocks of Q4_K, Q5_K, Q6_K or Q8_0. */
static PyObject *quantize(PyObject *module, PyObject *arguments)
{
    int bits, index;
    Py_buffer rows, out;
    if (!PyArg_ParseTuple(arguments, "iy*w*i", &bits, &rows, &out, &index))
        return NULL;
    Py_ssize_t block = bits == 8 ? 32 * 4 : 256 * 4, blocks = rows.len / block;
    Py_ssize_t size = bits == 4 ? 144 : bits == 5 ? 176 : bits == 6 ? SIX_BYTES : EIGHT_BYTES;
    int is_right = ((bits >= 4 && bits <= 6) || bits == 8) && rows.len == blocks * block && out.len == blocks * size &&
                   index >= 0 && index < count_targets();
    if (is_right) {
        Py_BEGIN_ALLOW_THREADS
        const target *chosen = &TARGETS[index];
        if (bits == 8)
            chosen->eight(rows.buf, blocks, out.buf);
        else if (bits == 6)
            chosen->symmetric(rows.buf, blocks, out.buf);
        else
            chosen->offset(rows.buf, blocks, bits == 5, out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&rows);
    PyBuffer_Release(&out);
    if (!is_right) {
        PyErr_SetString(PyExc_ValueError, "there is no such type or target, or the sizes disagree");
        return NULL;
    }
    Py_RETURN_NONE;
}

/* is_finite(rows): whether no float32 of rows is an infinity or a NaN. */
static PyObject *is_finite(PyObject *module, PyObject *rows_object)
{
    Py_buffer rows;
    int found;
    if (PyObject_GetBuffer(rows_object, &rows, PyBUF_SIMPLE) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    found = TARGETS[count_targets() - 1].is_finite(rows.buf, rows.len / 4);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&rows);
    return PyBool_FromLong(found);
}

static PyMethodDef METHODS[] = {
    {"quantize", quantize, METH_VARARGS, "Rows of float32 as blocks of 4, 5, 6 or 8 bits."},
    {"is_finite", is_finite, METH_O, "Whether no float32 is an infinity or a NaN."},
    {NULL, NULL, 0, NULL},
};

/* TARGETS: the names of those that this machine can run, the best one last. */
static int fill_module(PyObject *module)
{
    int count = count_targets();
    PyObject *names = PyTuple_New(count);
    if (names == NULL)
        return -1;
    for (int i = 0; i < count; i++) {
        PyObject *name = PyUnicode_FromString(TARGETS[i].name);
        if (name == NULL || PyTuple_SetItem(names, i, name) < 0) {
            Py_DECREF(names);
            return -1;
        }
    }
    int failed = PyModule_AddObjectRef(module, "TARGETS", names);
    Py_DECREF(names);
    return failed;
}

/* Nothing here is shared but constants, so that calls need no lock between threads. The limited API of 3.11 has no word
 * for it; a free-threaded Python has no limited API, and setup.py builds without.
 */
static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, fill_module},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_kernels", NULL, 0, METHODS, SLOTS, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&MODULE); }
