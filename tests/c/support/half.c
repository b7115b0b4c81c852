#include "half.h"

#include <math.h>
#include <string.h>

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

float float_from_f16(uint16_t bits)
{
    float sign = (bits & 0x8000u) != 0 ? -1.0f : 1.0f;
    int exponent = (bits >> 10) & 0x1f;
    int fraction = bits & 0x3ff;
    if (exponent == 0x1f) {
        return fraction != 0 ? NAN : sign * INFINITY;
    }
    if (exponent == 0) {
        return sign * ldexpf((float)fraction, -24);
    }
    return sign * ldexpf((float)(fraction + 0x400), exponent - 25);
}

uint16_t f16_from_float(float value)
{
    uint16_t sign = (uint16_t)((bits_of(value) >> 16) & 0x8000u);
    if (isnan(value)) {
        return (uint16_t)(sign | 0x7e00u);
    }
    float size = fabsf(value);
    if (size >= 65520.0f) {
        return (uint16_t)(sign | 0x7c00u);
    }
    int exponent;
    frexpf(size, &exponent); /* size = f * 2^exponent, 0.5 <= f < 1 */
    int unit = exponent - 11 > -24 ? exponent - 11 : -24;
    /* In units of the last place the value has at most 11 bits before the point; rintf rounds to even. */
    int steps = (int)rintf(ldexpf(size, -unit));
    if (steps >= 2048) {
        steps = 1024;
        unit += 1;
    }
    if (steps < 1024) {
        return (uint16_t)(sign | steps); /* subnormal: unit is 2^-24 */
    }
    return (uint16_t)(sign | ((unit + 25) << 10) | (steps - 1024));
}

float float_from_bf16(uint16_t bits)
{
    return float_of((uint32_t)bits << 16);
}

uint16_t bf16_from_float(float value)
{
    uint32_t bits = bits_of(value);
    if (isnan(value)) {
        return (uint16_t)((bits >> 16) | 0x0040u);
    }
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
