/* Conversions between float and the two 16-bit formats, round to nearest even. */
#ifndef HALF_H
#define HALF_H

#include <stdint.h>

float float_from_f16(uint16_t bits);
uint16_t f16_from_float(float value);
float float_from_bf16(uint16_t bits);
uint16_t bf16_from_float(float value);

#endif
