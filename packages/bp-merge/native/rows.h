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

/* Columns of the stacked factors, 4 of them from `column` on, at the rows of the long side from `first` on: a panel,
 * (count, 4), with zeros behind the rank.
 */
INLINE void N(fill_panel)(const struct stack *stack, long long column, long long first, long long count, float *panel)
{
    const float *from[4] = {NULL};
    long long start = 0, step[4] = {0};
    for (int part = 0; part < stack->parts; start += stack->ranks[part++])
        for (int i = 0; i < 4; i++) {
            long long r = column + i - start, own = stack->ranks[part];
            if (r >= 0 && r < own) {
                from[i] = stack->values[part] + (stack->is_tall ? first * own + r : r * stack->length + first);
                step[i] = stack->is_tall ? own : 1;
            }
        }
    if (stack->is_tall && from[3] && from[3] == from[0] + 3 && step[3] == step[0]) /* side by side in one factor */
        for (long long k = 0; k < count; k++)
            memcpy(panel + 4 * k, from[0] + k * step[0], 4 * sizeof *panel);
    else
        for (long long k = 0; k < count; k++)
            for (int i = 0; i < 4; i++)
                panel[4 * k + i] = from[i] ? from[i][k * step[i]] : 0;
}

/* All panels of some rows of the long side, (wide / 4, count, 4), and the same as tiles, (wide / TILE, count, TILE). */
static void N(pack)(const struct stack *stack, long long wide, long long first, long long count, float *panels,
                    float *tiles)
{
    for (long long column = 0; column < wide; column += 4, panels += 4 * count) {
        float *tile = tiles + column / TILE * TILE * count + column % TILE;
        N(fill_panel)(stack, column, first, count, panels);
        for (long long k = 0; k < count; k++)
            memcpy(tile + k * TILE, panels + 4 * k, 4 * sizeof *panels);
    }
}

/* sums (4 rows, TILE columns of `wide`) += the products of a panel and a tile, summed over `count`. */
INLINE void N(add_products)(const float *panel, const float *tile, long long count, float *sums, long long wide)
{
    FLOATS sum[4][WIDTH];
    UNROLLED for (int i = 0; i < 4; i++)
        UNROLLED for (int v = 0; v < WIDTH; v++)
            sum[i][v] = (FLOATS){0};
    for (long long k = 0; k < count; k++)
        UNROLLED for (int i = 0; i < 4; i++) {
            FLOATS factor = (FLOATS){0} + panel[k * 4 + i];
            UNROLLED for (int v = 0; v < WIDTH; v++)
                sum[i][v] = N(fuse)(factor, N(load)(tile + k * TILE + v * LANES), sum[i][v]);
        }
    UNROLLED for (int i = 0; i < 4; i++)
        UNROLLED for (int v = 0; v < WIDTH; v++) {
            float *place = sums + i * wide + v * LANES;
            N(store)(N(load)(place) + sum[i][v], place);
        }
}

/* The upper triangle of the stacked factors' Gram matrix, (rank, rank): float32 within SUM_ROWS, float64 across. */
static void N(gram)(const struct stack *stack, float *scratch, double *out)
{
    const long long rank = stack->rank, wide = (rank + TILE - 1) / TILE * TILE;
    float *sums = scratch, *panels = sums + wide * wide, *tiles = panels + wide * PACK_ROWS;
    for (long long start = 0; start < stack->length; start += SUM_ROWS) {
        long long stop = stack->length - start < SUM_ROWS ? stack->length : start + SUM_ROWS;
        memset(sums, 0, wide * wide * sizeof *sums);
        for (long long first = start; first < stop; first += PACK_ROWS) {
            long long count = stop - first < PACK_ROWS ? stop - first : PACK_ROWS;
            N(pack)(stack, wide, first, count, panels, tiles);
            for (long long q = 0; q < wide; q += TILE)
                for (long long p = 0; p < q + TILE; p += 4)
                    N(add_products)(panels + p * count, tiles + q * count, count, sums + p * wide + q, wide);
        }
        for (long long p = 0; p < rank; p++)
            for (long long q = p; q < rank; q++)
                out[p * rank + q] += sums[p * wide + q];
    }
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
