/* Q4_K, Q5_K and Q6_K: super-blocks of 256 weights, for one target (see lanes.h).
 *
 * The formats are ggml's (ggml-common.h), and so is the rounding, step by step, since every float operation decides
 * bits: the search for scale and offset of a sub-block (make_qkx2_quants, make_qx_quants in ggml-quants.c, MIT licence,
 * by the ggml authors). There a sub-block is a loop; here it is a lane, and a loop's order of summation is kept in each.
 */

#define GROUPS 2 /* vectors side by side, since each sum is a chain in which every addition waits for the one before */

typedef struct {
    FLOATS scale, offset;     /* the sub-block is about scale * level - offset */
    FLOATS inverse, lowest;   /* what found the levels: inverse * (x - lowest), rounded */
} N(fit);

/* Levels of one try, with the sums that its least squares need. */
INLINE void N(sum_levels)(const FLOATS (*x)[GROUPS], const FLOATS (*weight)[GROUPS], const FLOATS *inverse,
                          const FLOATS *lowest, float top, int is_tame, FLOATS (*levels)[GROUPS], FLOATS (*sums)[GROUPS])
{
    FLOATS l1[GROUPS], l2[GROUPS], xl[GROUPS];
    for (int g = 0; g < GROUPS; g++)
        l1[g] = l2[g] = xl[g] = N(fill)(0);
    for (int i = 0; i < 32; i++)
        for (int g = 0; g < GROUPS; g++) {
            FLOATS level = N(round_within)(inverse[g] * (x[i][g] - lowest[g]), 0, top, is_tame);
            FLOATS weighted = weight[i][g] * level;
            l1[g] += weighted;
            l2[g] += weighted * level;
            xl[g] += weighted * x[i][g];
            levels[i][g] = level;
        }
    for (int g = 0; g < GROUPS; g++) {
        sums[0][g] = l1[g];
        sums[1][g] = l2[g];
        sums[2][g] = xl[g];
    }
}

INLINE void N(sum_errors)(const FLOATS (*x)[GROUPS], const FLOATS (*weight)[GROUPS], const FLOATS (*levels)[GROUPS],
                          const FLOATS *scale, const FLOATS *low, FLOATS *errors)
{
    FLOATS sum[GROUPS];
    for (int g = 0; g < GROUPS; g++)
        sum[g] = N(fill)(0);
    for (int i = 0; i < 32; i++)
        for (int g = 0; g < GROUPS; g++) {
            FLOATS difference = scale[g] * levels[i][g] + low[g] - x[i][g];
            sum[g] += weight[i][g] * (difference * difference);
        }
    for (int g = 0; g < GROUPS; g++)
        errors[g] = sum[g];
}

/* Whether rounding can go the short way: inverse * (x - lowest) stays within 22 bits for every x. */
INLINE int N(is_tame)(const FLOATS *inverse, const FLOATS *largest, const FLOATS *lowest)
{
    INTS tame = (INTS){0} - 1;
    for (int g = 0; g < GROUPS; g++)
        tame &= N(absolute)(inverse[g]) * (largest[g] + N(absolute)(lowest[g])) < N(fill)(4000000);
    return N(all)(tame);
}

/* Scale and offset of 32 * LANES * GROUPS weights: a first guess from the extremes, then `steps` tries near it, each
 * with its least squares, of which the first with the least error stays. A try starts from the best offset so far.
 */
static void N(fit_offset)(const float *source, float top, float first, int steps, N(fit) *out)
{
    FLOATS turned[GROUPS][32], x[32][GROUPS], weight[32][GROUPS], levels[32][GROUPS], sums[3][GROUPS];
    FLOATS low[GROUPS], high[GROUPS], largest[GROUPS], sum_w[GROUPS], sum_x[GROUPS], error[GROUPS], best[GROUPS];
    FLOATS scale[GROUPS], inverse[GROUPS];
    INTS flat[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        N(turn)(source + g * 32 * LANES, 32, turned[g]);
        FLOATS squares = N(fill)(0);
        for (int i = 0; i < 32; i++)
            squares += turned[g][i] * turned[g][i];
        FLOATS average = N(root)(squares / 32);
        low[g] = high[g] = turned[g][0];
        for (int i = 0; i < 32; i++) {
            FLOATS value = x[i][g] = turned[g][i], w = weight[i][g] = average + N(absolute)(value);
            low[g] = N(choose)(value < low[g], value, low[g]);
            high[g] = N(choose)(value > high[g], value, high[g]);
            sum_w[g] = i ? sum_w[g] + w : w;
            sum_x[g] = i ? sum_x[g] + w * value : w * value;
        }
        largest[g] = N(choose)(N(absolute)(low[g]) > N(absolute)(high[g]), N(absolute)(low[g]), N(absolute)(high[g]));
        low[g] = N(choose)(low[g] > 0, N(fill)(0), low[g]);
        flat[g] = high[g] == low[g];
        /* A flat sub-block has scale 0; a range of 1 keeps its lane quiet. */
        high[g] = N(choose)(flat[g], low[g] + 1, high[g]);
        inverse[g] = top / (high[g] - low[g]);
        scale[g] = 1 / inverse[g];
        out[g].inverse = N(choose)(flat[g], N(fill)(0), inverse[g]);
        out[g].lowest = low[g];
    }
    N(sum_levels)(x, weight, inverse, low, top, N(is_tame)(inverse, largest, low), levels, sums);
    N(sum_errors)(x, weight, levels, scale, low, best);
    for (int step = 0; step <= steps; step++) {
        FLOATS tried[GROUPS], offset[GROUPS];
        INTS solvable[GROUPS];
        for (int g = 0; g < GROUPS; g++)
            inverse[g] = (first + 0.1f * step + top) / (high[g] - low[g]);
        if (N(is_tame)(inverse, largest, low))
            N(sum_levels)(x, weight, inverse, low, top, 1, levels, sums);
        else
            N(sum_levels)(x, weight, inverse, low, top, 0, levels, sums);
        for (int g = 0; g < GROUPS; g++) {
            FLOATS l1 = sums[0][g], l2 = sums[1][g], xl = sums[2][g];
            FLOATS determinant = sum_w[g] * l2 - l1 * l1;
            solvable[g] = determinant > 0;
            tried[g] = (sum_w[g] * xl - sum_x[g] * l1) / determinant;
            offset[g] = (l2 * sum_x[g] - l1 * xl) / determinant;
            INTS above = offset[g] > 0;
            tried[g] = N(choose)(above, xl / l2, tried[g]);
            offset[g] = N(choose)(above, N(fill)(0), offset[g]);
        }
        N(sum_errors)(x, weight, levels, tried, offset, error);
        for (int g = 0; g < GROUPS; g++) {
            INTS better = solvable[g] & (error[g] < best[g]) & ~flat[g];
            out[g].inverse = N(choose)(better, inverse[g], out[g].inverse);
            out[g].lowest = N(choose)(better, low[g], out[g].lowest);
            best[g] = N(choose)(better, error[g], best[g]);
            scale[g] = N(choose)(better, tried[g], scale[g]);
            low[g] = N(choose)(better, offset[g], low[g]);
        }
    }
    for (int g = 0; g < GROUPS; g++) {
        out[g].scale = N(choose)(flat[g], N(fill)(0), scale[g]);
        out[g].offset = -low[g];
    }
}

/* Levels of neighbouring weights, as bytes: round((x + offset) * inverse) or / scale, clamped, plus `shift`. */
INLINE void N(write_levels)(const float *x, int count, float offset, float scale, int low, int high, int32_t *out)
{
    for (int i = 0; i < count; i += LANES)
        N(store)(N(clamp)(N(round_bits)((N(load)(x + i) + offset) / scale), low, high), out + i);
}

/* One super-block of Q4_K or Q5_K from the fits of its eight sub-blocks. */
static void N(write_offset_block)(const float *x, const float *scales, const float *offsets, const float *inverses,
                                  const float *lowests, int top, struct offset_head *head, int32_t *levels)
{
    float scale = 0, offset = 0;
    for (int j = 0; j < 8; j++) {
        scale = scales[j] > scale ? scales[j] : scale;
        offset = offsets[j] > offset ? offsets[j] : offset;
    }
    float to_scale = scale > 0 ? 63.f / scale : 0.f, to_offset = offset > 0 ? 63.f / offset : 0.f;
    uint8_t s[8], m[8];
    for (int j = 0; j < 8; j++) {
        s[j] = (uint8_t)round_one(to_scale * scales[j]);
        m[j] = (uint8_t)round_one(to_offset * offsets[j]);
        s[j] = s[j] > 63 ? 63 : s[j];
        m[j] = m[j] > 63 ? 63 : m[j];
    }
    head->scale = to_half(scale / 63.f);
    head->offset = to_half(offset / 63.f);
    pack_scales(s, m, head->scales);
    float unit = from_half(head->scale), shift = from_half(head->offset);
    for (int j = 0; j < 8; j++) {
        float d = unit * s[j];
        if (d == 0) /* the levels of the search stay */
            for (int i = 0; i < 32; i++)
                levels[32 * j + i] = clamp_one(round_one(inverses[j] * (x[32 * j + i] - lowests[j])), 0, top);
        else
            N(write_levels)(x + 32 * j, 32, shift * m[j], d, 0, top, levels + 32 * j);
    }
}

static void N(quantize_offset)(const float *x, long long blocks, int is_five, uint8_t *out)
{
    enum { BATCH = GROUPS * LANES / 8 };
    float padded[BATCH * 256], fits[4][GROUPS][LANES];
    int32_t levels[256];
    for (long long block = 0; block < blocks; block += BATCH) {
        long long left = blocks - block;
        const float *source = x + block * 256;
        if (left < BATCH) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, source, left * 256 * sizeof *padded);
            source = padded;
        }
        N(fit) fit[GROUPS];
        if (is_five)
            N(fit_offset)(source, 31, -0.5f, 15, fit);
        else
            N(fit_offset)(source, 15, -1.f, 20, fit);
        for (int g = 0; g < GROUPS; g++) {
            memcpy(fits[0][g], &fit[g].scale, sizeof(FLOATS));
            memcpy(fits[1][g], &fit[g].offset, sizeof(FLOATS));
            memcpy(fits[2][g], &fit[g].inverse, sizeof(FLOATS));
            memcpy(fits[3][g], &fit[g].lowest, sizeof(FLOATS));
        }
        for (int k = 0; k < BATCH && k < left; k++) {
            const float *scales = (const float *)fits[0] + 8 * k, *offsets = (const float *)fits[1] + 8 * k;
            const float *inverses = (const float *)fits[2] + 8 * k, *lowests = (const float *)fits[3] + 8 * k;
            struct offset_head head;
            N(write_offset_block)(source + 256 * k, scales, offsets, inverses, lowests, is_five ? 31 : 15, &head, levels);
            memcpy(out, &head, sizeof head);
            out += sizeof head;
            out += is_five ? pack_fives(levels, out) : pack_fours(levels, out);
        }
    }
}

/* Scales of 16 * LANES * GROUPS weights by Q6_K's search: 19 tries around -32 / (the weight of largest size), each
 * weighing errors by the square of the weight; no offset.
 */
static void N(fit_symmetric)(const float *source, N(fit) *out)
{
    for (int g = 0; g < GROUPS; g++) {
        FLOATS x[16], square[16], cube[16];
        N(turn)(source + g * 16 * LANES, 16, x);
        FLOATS largest = N(fill)(0), size = N(fill)(0);
        for (int i = 0; i < 16; i++) {
            INTS larger = N(absolute)(x[i]) > size;
            size = N(choose)(larger, N(absolute)(x[i]), size);
            largest = N(choose)(larger, x[i], largest);
            square[i] = x[i] * x[i];
            cube[i] = square[i] * x[i];
        }
        INTS empty = size < N(fill)(LEAST);
        largest = N(choose)(empty, N(fill)(1), largest);
        int is_tame = N(all)(size < N(fill)(3e38f));
        FLOATS scale = N(fill)(0), best = N(fill)(0), found = N(fill)(0);
        for (int step = 0; step < 19; step++) {
            /* The plain guess comes first, then the others in order. */
            int shift = step == 0 ? 0 : step <= 9 ? step - 10 : step - 9;
            FLOATS inverse = -(32 + 0.1f * shift) / largest;
            FLOATS xl = N(fill)(0), l2 = N(fill)(0);
            if (is_tame)
                for (int i = 0; i < 16; i++) {
                    FLOATS level = N(round_within)(inverse * x[i], -32, 31, 1);
                    xl += cube[i] * level;
                    l2 += square[i] * level * level;
                }
            else
                for (int i = 0; i < 16; i++) {
                    FLOATS level = N(round_within)(inverse * x[i], -32, 31, 0);
                    xl += cube[i] * level;
                    l2 += square[i] * level * level;
                }
            FLOATS fitted = xl / l2;
            if (step == 0) {
                /* A sum that is not a number counts as one that is not zero. */
                scale = N(choose)(l2 == 0, N(fill)(0), fitted);
                best = scale * xl;
                found = inverse;
                continue;
            }
            INTS better = (l2 > 0) & (xl * xl > best * l2);
            scale = N(choose)(better, fitted, scale);
            best = N(choose)(better, fitted * xl, best);
            found = N(choose)(better, inverse, found);
        }
        out[g].scale = N(choose)(empty, N(fill)(0), scale);
        /* Without a scale the levels are 0, which is 32 below the middle. */
        out[g].offset = N(choose)(empty, N(fill)(1), N(fill)(0));
        out[g].inverse = found;
    }
}

static void N(write_symmetric_block)(const float *x, const float *scales, const float *inverses, const float *empty,
                                     uint8_t *out)
{
    float largest = 0, size = 0;
    int32_t levels[256];
    for (int j = 0; j < 16; j++)
        if (__builtin_fabsf(scales[j]) > size) {
            size = __builtin_fabsf(scales[j]);
            largest = scales[j];
        }
    if (size < LEAST) {
        memset(out, 0, SIX_BYTES);
        return;
    }
    float to_scale = -128.f / largest;
    uint16_t half = to_half(1 / to_scale);
    float unit = from_half(half);
    int8_t *bytes = (int8_t *)out + 192;
    for (int j = 0; j < 16; j++) {
        int rounded = round_one(to_scale * scales[j]);
        bytes[j] = (int8_t)(rounded > 127 ? 127 : rounded);
    }
    memcpy(out + 208, &half, sizeof half);
    for (int j = 0; j < 16; j++) {
        float d = unit * bytes[j];
        if (d != 0)
            N(write_levels)(x + 16 * j, 16, 0, d, -32, 31, levels + 16 * j);
        else /* the levels of the search stay */
            for (int i = 0; i < 16; i++)
                levels[16 * j + i] = empty[j] != 0 ? -32 : clamp_one(round_one(inverses[j] * x[16 * j + i]), -32, 31);
    }
    for (int i = 0; i < 256; i++)
        levels[i] += 32;
    pack_sixes(levels, out);
}

static void N(quantize_symmetric)(const float *x, long long blocks, uint8_t *out)
{
    enum { BATCH = GROUPS * LANES >= 16 ? GROUPS * LANES / 16 : 1, CALLS = GROUPS * LANES >= 16 ? 1 : 16 / (GROUPS * LANES) };
    float padded[BATCH * 256], fits[3][CALLS][GROUPS][LANES];
    for (long long block = 0; block < blocks; block += BATCH) {
        long long left = blocks - block;
        const float *source = x + block * 256;
        if (left < BATCH) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, source, left * 256 * sizeof *padded);
            source = padded;
        }
        for (int c = 0; c < CALLS; c++) {
            N(fit) fit[GROUPS];
            N(fit_symmetric)(source + c * GROUPS * LANES * 16, fit);
            for (int g = 0; g < GROUPS; g++) {
                memcpy(fits[0][c][g], &fit[g].scale, sizeof(FLOATS));
                memcpy(fits[1][c][g], &fit[g].inverse, sizeof(FLOATS));
                memcpy(fits[2][c][g], &fit[g].offset, sizeof(FLOATS));
            }
        }
        for (int k = 0; k < BATCH && k < left; k++, out += SIX_BYTES)
            N(write_symmetric_block)(source + 256 * k, (const float *)fits[0] + 16 * k, (const float *)fits[1] + 16 * k,
                                     (const float *)fits[2] + 16 * k, out);
    }
}

#undef GROUPS
