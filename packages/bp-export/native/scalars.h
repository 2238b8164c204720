/* What is done once for a sub-block or for a block, the same on every target. */

#define ROUNDER 12582912.f /* 1.5 * 2^23 */
#define LEAST 1e-15f       /* a block below this is empty (GROUP_MAX_EPS in ggml-quants.c) */
#define EIGHT_BYTES 34     /* of a Q8_0 block */
#define SIX_BYTES 210      /* of a Q6_K block: low bits 128, high bits 64, scales 16, the scale's scale 2 */

/* The first 16 bytes of a Q4_K or Q5_K block. */
struct offset_head {
    uint16_t scale, offset; /* IEEE halves */
    uint8_t scales[12];     /* eight scales and eight offsets of 6 bits */
};

static inline int round_one(float value)
{
    value += ROUNDER;
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7fffff) - 0x400000;
}

static inline int clamp_one(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

/* To an IEEE half, ties to even; what is no number becomes the quiet NaN. */
static inline uint16_t to_half(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00);
    if (size >= 0x38800000) { /* normal: the exponent's bias falls by 112 */
        uint32_t rounded = size + 0xfff + (size >> 13 & 1);
        return (uint16_t)(sign | ((rounded - (112u << 23)) >> 13));
    }
    if (size < 0x33000000) /* below half of the least subnormal */
        return (uint16_t)sign;
    uint32_t shift = 126 - (size >> 23), digits = (size & 0x7fffff) | 0x800000;
    uint32_t half = 1u << (shift - 1), kept = digits >> shift, rest = digits & ((1u << shift) - 1);
    kept += rest > half || (rest == half && (kept & 1));
    return (uint16_t)(sign | kept);
}

static inline float from_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, digits = half & 0x3ff, bits;
    float value;
    if (exponent == 0) {
        value = (float)digits * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0xffu : exponent + 112) << 23 | digits << 13;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Eight scales and offsets of 6 bits in 12 bytes: the first four of each whole, beside the upper bits of the others. */
static inline void pack_scales(const uint8_t *scales, const uint8_t *offsets, uint8_t *out)
{
    for (int j = 0; j < 4; j++) {
        out[j] = (uint8_t)(scales[j] | scales[j + 4] >> 4 << 6);
        out[j + 4] = (uint8_t)(offsets[j] | offsets[j + 4] >> 4 << 6);
        out[j + 8] = (uint8_t)((scales[j + 4] & 15) | (offsets[j + 4] & 15) << 4);
    }
}

/* Levels of 4 bits, 32 weights beside the next 32; returns the bytes written. */
static inline int pack_fours(const int32_t *levels, uint8_t *out)
{
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++)
            out[32 * j + i] = (uint8_t)(levels[64 * j + i] | levels[64 * j + 32 + i] << 4);
    return 128;
}

/* Levels of 5 bits: the fifth bits first, one for each sub-block in a byte, then the others as `pack_fours`. */
static inline int pack_fives(const int32_t *levels, uint8_t *out)
{
    for (int i = 0; i < 32; i++) {
        int high = 0;
        for (int j = 0; j < 8; j++)
            high |= (levels[32 * j + i] >> 4) << j;
        out[i] = (uint8_t)high;
    }
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++)
            out[32 + 32 * j + i] = (uint8_t)((levels[64 * j + i] & 15) | (levels[64 * j + 32 + i] & 15) << 4);
    return 160;
}

/* Levels of 6 bits: four low bits and two high bits in planes, for each half of the block. */
static inline void pack_sixes(const int32_t *levels, uint8_t *out)
{
    for (int h = 0; h < 2; h++) {
        const int32_t *a = levels + 128 * h, *b = a + 32, *c = a + 64, *d = a + 96;
        for (int i = 0; i < 32; i++) {
            out[64 * h + i] = (uint8_t)((a[i] & 15) | (c[i] & 15) << 4);
            out[64 * h + 32 + i] = (uint8_t)((b[i] & 15) | (d[i] & 15) << 4);
            out[128 + 32 * h + i] = (uint8_t)(a[i] >> 4 | b[i] >> 4 << 2 | c[i] >> 4 << 4 | d[i] >> 4 << 6);
        }
    }
}
