/* Q8_0: blocks of 32 weights, a half for the scale and 32 bytes, for one target (see lanes.h).
 *
 * The format and the rounding, half away from zero, are ggml's (quantize_row_q8_0_ref in ggml-quants.c, MIT licence).
 */

typedef int8_t N(bytes) __attribute__((vector_size(LANES)));

static void N(quantize_eight)(const float *x, long long blocks, uint8_t *out)
{
    for (; blocks; blocks--, x += 32, out += EIGHT_BYTES) {
        FLOATS size = N(fill)(0), values[32 / LANES];
        UNROLLED for (int v = 0; v < 32 / LANES; v++) {
            values[v] = N(load)(x + v * LANES);
            size = N(larger)(size, N(absolute)(values[v]));
        }
        float scale = N(largest)(size) / 127, inverse = scale != 0 ? 1 / scale : 0;
        uint16_t half = to_half(scale);
        memcpy(out, &half, sizeof half);
        UNROLLED for (int v = 0; v < 32 / LANES; v++) {
            FLOATS scaled = values[v] * inverse, distance = N(absolute)(scaled);
            /* What is no number, or beyond all levels, since the scale is too small to divide by, becomes 0. */
            distance = (FLOATS)((INTS)distance & (distance < 1000));
            INTS level = __builtin_convertvector(distance, INTS), sign = (INTS)scaled >> 31;
            level -= distance - __builtin_convertvector(level, FLOATS) >= 0.5f; /* a mask is -1 */
            N(bytes) bytes = __builtin_convertvector((level ^ sign) - sign, N(bytes));
            memcpy(out + 2 + v * LANES, &bytes, sizeof bytes);
        }
    }
}

/* Whether every weight is a number and finite. */
static int N(is_finite)(const float *x, long long count)
{
    INTS found = (INTS){0};
    for (; count >= LANES; count -= LANES, x += LANES) {
        found |= ~(N(absolute)(N(load)(x)) <= N(fill)(3.402823466e38f));
    }
    int bad = 0;
    for (int k = 0; k < LANES; k++)
        bad |= found[k];
    for (; count > 0; count--, x++)
        bad |= !(__builtin_fabsf(*x) <= 3.402823466e38f);
    return !bad;
}

#undef FLOATS
#undef INTS
