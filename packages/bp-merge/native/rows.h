/* Rows of a base with a low-rank change added, for one target: LANES floats a vector, WIDTH vectors a tile.
 *
 * Included once for each target. Every value of the product is a chain of fused multiply-adds in the order of the rank,
 * as torch's library has it; nothing else may be fused.
 */

typedef float N(floats) __attribute__((vector_size(4 * LANES)));
typedef uint32_t N(bits) __attribute__((vector_size(4 * LANES)));
typedef uint16_t N(halves) __attribute__((vector_size(2 * LANES)));
/* The same at any address. */
typedef float N(loose_floats) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t N(loose_halves) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define FLOATS N(floats)
#define BITS N(bits)
#define TILE (LANES * WIDTH)

INLINE FLOATS N(load)(const float *x) { return *(const N(loose_floats) *)x; }

INLINE void N(store)(FLOATS a, float *out) { *(N(loose_floats) *)out = a; }

INLINE FLOATS N(widen)(const uint16_t *x)
{
    return (FLOATS)(__builtin_convertvector(*(const N(loose_halves) *)x, BITS) << 16);
}

INLINE FLOATS N(fuse)(FLOATS a, FLOATS b, FLOATS c)
{
#if LANES == 16 && defined(__x86_64__)
    return (FLOATS)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__x86_64__)
    return (FLOATS)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int k = 0; k < LANES; k++)
        c[k] = __builtin_fmaf(a[k], b[k], c[k]);
    return c;
#endif
}

/* To the nearest bfloat16, ties to even, as a float; a NaN stays one. */
INLINE FLOATS N(round_bf16)(FLOATS value)
{
    BITS bits = (BITS)value, rounded = bits + 0x7fff + (bits >> 16 & 1), is_nan = (BITS)(value != value);
    return (FLOATS)(((rounded & ~is_nan) | ((bits | 0x400000) & is_nan)) & 0xffff0000);
}

INLINE FLOATS N(read_base)(const void *base, int dtype, long long place)
{
    return dtype == BASE_F32 ? N(load)((const float *)base + place) : N(widen)((const uint16_t *)base + place);
}

/* `rows` rows, 1 or 4, of one tile of columns: `tile` holds the tile's columns of A, (r, TILE). */
INLINE void N(add_tile)(const float *b, const float *tile, const struct change *change, const void *base, int dtype,
                        long long columns, float *out, int rows)
{
    FLOATS total[4][WIDTH];
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int v = 0; v < WIDTH; v++)
            total[i][v] = (FLOATS){0};
    for (long long part = 0; part < change->parts; part++) {
        long long start = part * change->step, stop = part + 1 == change->parts ? change->rank : start + change->step;
        FLOATS sum[4][WIDTH];
        UNROLLED for (int i = 0; i < rows; i++)
            UNROLLED for (int v = 0; v < WIDTH; v++)
                sum[i][v] = (FLOATS){0};
        for (long long k = start; k < stop; k++) {
            FLOATS a[WIDTH];
            UNROLLED for (int v = 0; v < WIDTH; v++)
                a[v] = N(load)(tile + k * TILE + v * LANES);
            UNROLLED for (int i = 0; i < rows; i++) {
                FLOATS factor = (FLOATS){0} + b[i * change->rank + k];
                UNROLLED for (int v = 0; v < WIDTH; v++)
                    sum[i][v] = N(fuse)(factor, a[v], sum[i][v]);
            }
        }
        UNROLLED for (int i = 0; i < rows; i++)
            UNROLLED for (int v = 0; v < WIDTH; v++)
                total[i][v] += sum[i][v];
    }
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int v = 0; v < WIDTH; v++) {
            FLOATS value = total[i][v] * change->scale;
            if (dtype != BASE_NONE)
                value += N(read_base)(base, dtype, i * columns + v * LANES);
            if (dtype == BASE_BF16)
                value = N(round_bf16)(value);
            N(store)(value, out + i * columns + v * LANES);
        }
}

INLINE void N(add_rows)(const struct change *change, const void *base, int dtype, float *scratch, float *out)
{
    const long long columns = change->columns, size = dtype == BASE_F32 ? 4 : 2;
    for (long long left = 0; left < columns; left += TILE) {
        long long width = columns - left < TILE ? columns - left : TILE;
        for (long long k = 0; k < change->rank; k++) {
            memset(scratch + k * TILE, 0, TILE * sizeof *scratch);
            memcpy(scratch + k * TILE, change->a + k * columns + left, width * sizeof *scratch);
        }
        for (long long i = 0; i < change->rows;) {
            int rows = change->rows - i >= 4 && width == TILE ? 4 : 1;
            const float *b = change->b + i * change->rank;
            const char *source = dtype == BASE_NONE ? NULL : (const char *)base + (i * columns + left) * size;
            float *target = out + i * columns + left;
            if (rows == 4)
                N(add_tile)(b, scratch, change, source, dtype, columns, target, 4);
            else if (width == TILE)
                N(add_tile)(b, scratch, change, source, dtype, columns, target, 1);
            else {
                float padded[TILE], from[TILE] = {0};
                if (dtype != BASE_NONE)
                    memcpy(from, source, width * size);
                N(add_tile)(b, scratch, change, from, dtype, TILE, padded, 1);
                memcpy(target, padded, width * sizeof *padded);
            }
            i += rows;
        }
    }
}

/* One copy for each kind of base, so that the choice is made once. */
static void N(add)(const struct change *change, const void *base, int dtype, float *scratch, float *out)
{
    if (dtype == BASE_BF16)
        N(add_rows)(change, base, BASE_BF16, scratch, out);
    else if (dtype == BASE_F32)
        N(add_rows)(change, base, BASE_F32, scratch, out);
    else
        N(add_rows)(change, base, BASE_NONE, scratch, out);
}

static void N(decode)(const uint16_t *source, long long count, float *out)
{
    for (; count >= LANES; count -= LANES, source += LANES, out += LANES)
        N(store)(N(widen)(source), out);
    for (; count > 0; count--, source++, out++) {
        uint32_t bits = (uint32_t)*source << 16;
        memcpy(out, &bits, sizeof bits);
    }
}

static void N(encode)(const float *source, long long count, uint16_t *out)
{
    for (; count >= LANES; count -= LANES, source += LANES, out += LANES) {
        BITS bits = (BITS)N(round_bf16)(N(load)(source)) >> 16;
        *(N(loose_halves) *)out = __builtin_convertvector(bits, N(halves));
    }
    for (; count > 0; count--, source++, out++)
        *out = (uint16_t)(((BITS)N(round_bf16)((FLOATS){0} + *source))[0] >> 16);
}

#undef FLOATS
#undef BITS
#undef TILE
