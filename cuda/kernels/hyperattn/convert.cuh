// Conversions between f32 and the bits of the 16-bit types, rounded to nearest even.
#pragma once

#include "types.cuh"

namespace hyperattn {

__device__ __forceinline__ float f32_from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ float f32_from_f16(u16 bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 bf16_from_f32(float value)
{
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u16 f16_from_f32(float value)
{
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Element of a row of a type.
__device__ __forceinline__ float read_element(const char *row, u32 index, u32 type)
{
    if (type == F32)
        return ((const float *)row)[index];
    u16 bits = ((const u16 *)row)[index];
    return type == BF16 ? f32_from_bf16(bits) : f32_from_f16(bits);
}

// Two elements in one word, the first in the low half.
__device__ __forceinline__ u32 bf16x2_from_f32(float first, float second)
{
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}

__device__ __forceinline__ u32 f16x2_from_f32(float first, float second)
{
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}

// By element type: TYPE is BF16 or F16.
template <u32 TYPE> __device__ __forceinline__ float f32_from_16(u16 bits)
{
    return TYPE == BF16 ? f32_from_bf16(bits) : f32_from_f16(bits);
}

template <u32 TYPE> __device__ __forceinline__ u16 f32_to_16(float value)
{
    return TYPE == BF16 ? bf16_from_f32(value) : f16_from_f32(value);
}

template <u32 TYPE> __device__ __forceinline__ u32 f32_to_16x2(float first, float second)
{
    return TYPE == BF16 ? bf16x2_from_f32(first, second) : f16x2_from_f32(first, second);
}

} // namespace hyperattn
