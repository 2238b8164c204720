/* The fold of a low-rank change into rows of a base, as a Python module with the limited API of 3.11.
 *
 * Compiled for targets that have fused multiply-adds; elsewhere TARGETS is empty, and NumPy does the work.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 4")
#endif

enum { BASE_NONE, BASE_BF16, BASE_F32 };
#define WIDEST 64 /* columns of the largest tile */
#define MOST_RANK (1 << 24) /* far above any; what is computed from it then fits */
#define MOST_PARTS 64 /* factors in one Gram matrix */
#define MOST_GRAM (1 << 14) /* their ranks together */
#define PACK_ROWS 128 /* of a long side at a time: a tile of them stays in the nearest cache */
#define SUM_ROWS 2048 /* of a long side, summed in float32 */

/* (b @ a) * scale: b (rows, rank), a (rank, columns); the sum over the rank goes in `parts` parts of `step` terms, and
 * the last takes what is left.
 */
struct change {
    const float *a, *b;
    float scale;
    long long rows, rank, columns, step, parts;
};

/* Factors of one length, side by side: each (length, rank of it) where they are tall, else (rank of it, length). */
struct stack {
    const float *values[MOST_PARTS];
    long long ranks[MOST_PARTS], rank, length;
    int parts, is_tall;
};

typedef void gram_function(const struct stack *, float *, double *);
typedef void add_function(const struct change *, const void *, int, float *, float *);
typedef void decode_function(const uint16_t *, long long, float *);
typedef void encode_function(const float *, long long, uint16_t *);

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define WIDTH 2
#define N(name) name##_avx2
#include "rows.h"
#undef LANES
#undef WIDTH
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
#define WIDTH 4
#define N(name) name##_avx512
#include "rows.h"
#undef LANES
#undef WIDTH
#undef N
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#elif defined(__aarch64__)
#define LANES 4
#define WIDTH 4
#define N(name) name##_neon
#include "rows.h"
#endif

static const struct target {
    const char *name;
    gram_function *gram;
    add_function *add;
    decode_function *decode;
    encode_function *encode;
} TARGETS[] = {
#ifdef __x86_64__
    {"avx2", gram_avx2, add_avx2, decode_avx2, encode_avx2},
    {"avx512", gram_avx512, add_avx512, decode_avx512, encode_avx512},
#elif defined(__aarch64__)
    {"neon", gram_neon, add_neon, decode_neon, encode_neon},
#endif
    {NULL, NULL, NULL, NULL, NULL},
};

static int count_targets(void)
{
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    int has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return has_512 ? 2 : 1;
#elif defined(__aarch64__)
    return 1;
#else
    return 0;
#endif
}

static PyObject *refuse(void)
{
    PyErr_SetString(PyExc_ValueError, "there is no such dtype or target, or the sizes disagree");
    return NULL;
}

/* add(base, dtype, b, a, scale, rank, step, parts, out, target): rows of the base with the change, into out. */
static PyObject *add(PyObject *module, PyObject *arguments)
{
    Py_buffer base, b, a, out;
    int dtype, index;
    struct change change;
    if (!PyArg_ParseTuple(arguments, "y*iy*y*fLLLw*i", &base, &dtype, &b, &a, &change.scale, &change.rank, &change.step,
                          &change.parts, &out, &index))
        return NULL;
    long long rank = change.rank, size = dtype == BASE_BF16 ? 2 : 4;
    int is_right = index >= 0 && index < count_targets() && dtype >= BASE_NONE && dtype <= BASE_F32 && rank > 0 &&
                   rank <= MOST_RANK && b.len % (4 * rank) == 0 && a.len % (4 * rank) == 0 && change.parts > 0 &&
                   change.parts <= rank && change.step > 0 && change.step <= rank &&
                   change.step * (change.parts - 1) < rank;
    if (is_right) {
        change.rows = b.len / (4 * rank);
        change.columns = a.len / (4 * rank);
        is_right = out.len == 4 * change.rows * change.columns && (dtype == BASE_NONE || base.len * 4 == out.len * size);
    }
    float *scratch = is_right ? malloc(rank * WIDEST * sizeof *scratch) : NULL;
    if (scratch) {
        change.a = a.buf;
        change.b = b.buf;
        Py_BEGIN_ALLOW_THREADS
        TARGETS[index].add(&change, base.buf, dtype, scratch, out.buf);
        Py_END_ALLOW_THREADS
        free(scratch);
    }
    PyBuffer_Release(&base);
    PyBuffer_Release(&b);
    PyBuffer_Release(&a);
    PyBuffer_Release(&out);
    if (!is_right)
        return refuse();
    return scratch ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

/* The stacked factors' Gram matrix into out, which is zero; 0 where the sizes disagree, -1 where memory is short. */
static int fill_gram(struct stack *stack, const Py_buffer *parts, const Py_buffer *out, int index)
{
    if (index < 0 || index >= count_targets() || stack->length <= 0 || stack->length > MOST_RANK)
        return 0;
    for (int i = 0; i < stack->parts; i++) {
        if (parts[i].len == 0 || parts[i].len % (4 * stack->length) != 0)
            return 0;
        stack->values[i] = parts[i].buf;
        stack->rank += stack->ranks[i] = parts[i].len / (4 * stack->length);
    }
    const long long rank = stack->rank, wide = (rank + WIDEST - 1) / WIDEST * WIDEST;
    if (rank > MOST_GRAM || out->len != 8 * rank * rank)
        return 0;
    float *scratch = malloc((wide + 2 * PACK_ROWS) * wide * sizeof *scratch);
    if (scratch == NULL)
        return -1;
    double *sums = out->buf;
    Py_BEGIN_ALLOW_THREADS
    TARGETS[index].gram(stack, scratch, sums);
    for (long long p = 0; p < rank; p++)
        for (long long q = 0; q < p; q++)
            sums[p * rank + q] = sums[q * rank + p];
    Py_END_ALLOW_THREADS
    free(scratch);
    return 1;
}

/* gram(parts, length, is_tall, out, target): parts is a tuple of float32 factors, out float64 zeros. */
static PyObject *gram(PyObject *module, PyObject *arguments)
{
    Py_buffer out, parts[MOST_PARTS];
    PyObject *factors;
    struct stack stack = {0};
    int index, taken = 0;
    if (!PyArg_ParseTuple(arguments, "O!Lpw*i", &PyTuple_Type, &factors, &stack.length, &stack.is_tall, &out, &index))
        return NULL;
    Py_ssize_t count = PyTuple_Size(factors);
    int is_right = count > 0 && count <= MOST_PARTS;
    for (; is_right && taken < count; taken++)
        if (PyObject_GetBuffer(PyTuple_GetItem(factors, taken), &parts[taken], PyBUF_C_CONTIGUOUS) < 0)
            break;
    int done = -2;
    if (!is_right)
        done = 0;
    else if (taken == count) {
        stack.parts = taken;
        done = fill_gram(&stack, parts, &out, index);
    }
    while (taken > 0)
        PyBuffer_Release(&parts[--taken]);
    PyBuffer_Release(&out);
    if (done == 0)
        return refuse();
    return done > 0 ? Py_NewRef(Py_None) : done == -1 ? PyErr_NoMemory() : NULL;
}

/* Both ways between bfloat16 and float32; `is_wide` tells which of the two is the source. */
static PyObject *convert(PyObject *arguments, int is_wide)
{
    Py_buffer source, out;
    int index;
    if (!PyArg_ParseTuple(arguments, "y*w*i", &source, &out, &index))
        return NULL;
    long long count = is_wide ? out.len / 2 : source.len / 2;
    int is_right = index >= 0 && index < count_targets() && source.len == count * (is_wide ? 4 : 2) &&
                   out.len == count * (is_wide ? 2 : 4);
    if (is_right) {
        Py_BEGIN_ALLOW_THREADS
        if (is_wide)
            TARGETS[index].encode(source.buf, count, out.buf);
        else
            TARGETS[index].decode(source.buf, count, out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&out);
    return is_right ? Py_NewRef(Py_None) : refuse();
}

static PyObject *decode(PyObject *module, PyObject *arguments) { return convert(arguments, 0); }

static PyObject *encode(PyObject *module, PyObject *arguments) { return convert(arguments, 1); }

static PyMethodDef METHODS[] = {
    {"add", add, METH_VARARGS, "Rows of a base with a low-rank change added."},
    {"gram", gram, METH_VARARGS, "The Gram matrix of factors side by side."},
    {"decode", decode, METH_VARARGS, "bfloat16 as float32."},
    {"encode", encode, METH_VARARGS, "float32 rounded to bfloat16, ties to even."},
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

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_rows", NULL, 0, METHODS, SLOTS, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rows(void) { return PyModuleDef_Init(&MODULE); }
