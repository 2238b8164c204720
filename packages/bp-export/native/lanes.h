/* Vectors of one target: LANES floats and as many integers, and the few operations that C has no operator for.
 *
 * Included once for each target, with LANES set and N(name) giving the target's own name to a function. Plain operators
 * on these vectors (GCC's and Clang's vector extension) round each lane as a scalar would; nothing here may be
 * compiled with contracted multiply-adds or reordered sums.
 */

typedef float N(floats) __attribute__((vector_size(4 * LANES)));
typedef int32_t N(ints) __attribute__((vector_size(4 * LANES)));
/* The same at any address. */
typedef float N(loose_floats) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t N(loose_ints) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define FLOATS N(floats)
#define INTS N(ints)

INLINE FLOATS N(load)(const float *x) { return *(const N(loose_floats) *)x; }

INLINE void N(store)(INTS a, int32_t *out) { *(N(loose_ints) *)out = a; }

INLINE FLOATS N(fill)(float value) { return (FLOATS){0} + value; }

INLINE INTS N(bits)(FLOATS a) { return (INTS)a; }

INLINE FLOATS N(absolute)(FLOATS a) { return (FLOATS)((INTS)a & 0x7fffffff); }

/* Lanes of `a` where the mask is all ones, of `b` where it is zero. */
INLINE FLOATS N(choose)(INTS mask, FLOATS a, FLOATS b) { return (FLOATS)(((INTS)a & mask) | ((INTS)b & ~mask)); }

INLINE INTS N(choose_ints)(INTS mask, INTS a, INTS b) { return (a & mask) | (b & ~mask); }

/* The smaller and the larger; neither may be a NaN. */
#if LANES == 16 && defined(__x86_64__)
INLINE FLOATS N(smaller)(FLOATS a, FLOATS b) { return (FLOATS)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE FLOATS N(larger)(FLOATS a, FLOATS b) { return (FLOATS)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE FLOATS N(root)(FLOATS a) { return (FLOATS)_mm512_sqrt_ps((__m512)a); }
#elif LANES == 8 && defined(__x86_64__)
INLINE FLOATS N(smaller)(FLOATS a, FLOATS b) { return (FLOATS)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE FLOATS N(larger)(FLOATS a, FLOATS b) { return (FLOATS)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE FLOATS N(root)(FLOATS a) { return (FLOATS)_mm256_sqrt_ps((__m256)a); }
#elif defined(__x86_64__)
INLINE FLOATS N(smaller)(FLOATS a, FLOATS b) { return (FLOATS)_mm_min_ps((__m128)a, (__m128)b); }
INLINE FLOATS N(larger)(FLOATS a, FLOATS b) { return (FLOATS)_mm_max_ps((__m128)a, (__m128)b); }
INLINE FLOATS N(root)(FLOATS a) { return (FLOATS)_mm_sqrt_ps((__m128)a); }
#else
INLINE FLOATS N(smaller)(FLOATS a, FLOATS b) { return N(choose)(a < b, a, b); }
INLINE FLOATS N(larger)(FLOATS a, FLOATS b) { return N(choose)(a > b, a, b); }
INLINE FLOATS N(root)(FLOATS a)
{
    for (int k = 0; k < LANES; k++)
        a[k] = __builtin_sqrtf(a[k]);
    return a;
}
#endif

INLINE int N(all)(INTS mask)
{
    int found = -1;
    for (int k = 0; k < LANES; k++)
        found &= mask[k];
    return found;
}

#if LANES == 16
#define FROM_FOUR 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif LANES == 8
#define FROM_FOUR 4, 5, 6, 7
#else
#define FROM_FOUR
#endif

/* The largest of all lanes, none of which may be a NaN. */
INLINE float N(largest)(FLOATS a)
{
    UNROLLED for (int by = LANES / 2; by; by /= 2) {
        FLOATS other;
#ifdef __clang__
        for (int k = 0; k < LANES; k++)
            other[k] = a[(k + by) % LANES];
#else
        other = __builtin_shuffle(a, ((INTS){0, 1, 2, 3, FROM_FOUR} + by) & (LANES - 1));
#endif
        a = N(larger)(a, other);
    }
    return a[0];
}
#undef FROM_FOUR

/* Rounded to nearest, ties to even, as an integer: the low bits of a sum that has no room for a fraction. What lies
 * beyond 22 bits, and what is no number, comes out as those bits happen to be, as it does in ggml.
 */
INLINE INTS N(round_bits)(FLOATS a) { return ((INTS)(a + ROUNDER) & 0x7fffff) - 0x400000; }

INLINE INTS N(clamp)(INTS a, int low, int high)
{
    a = N(choose_ints)(a > low, a, (INTS){0} + low);
    return N(choose_ints)(a < high, a, (INTS){0} + high);
}

/* The same rounding and clamping, as floats: the short way where every lane lies within 22 bits. */
INLINE FLOATS N(round_within)(FLOATS a, float low, float high, int is_tame)
{
    if (is_tame)
        return N(smaller)(N(larger)((a + ROUNDER) - ROUNDER, N(fill)(low)), N(fill)(high));
    return __builtin_convertvector(N(clamp)(N(round_bits)(a), (int)low, (int)high), FLOATS);
}

/* `count` weights of each of LANES neighbouring sub-blocks, turned so that a vector holds one weight of each. */
INLINE void N(turn)(const float *x, int count, FLOATS *out)
{
    for (int k = 0; k < LANES; k++)
        for (int i = 0; i < count; i++)
            ((float *)&out[i])[k] = x[k * count + i];
}
