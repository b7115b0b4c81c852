// Rows of sums that four neighbouring lanes hold as pairs of columns, as the accumulators of matrix products do: a lane
// has columns 8 n + 2 (lane % 4) and the next.
#pragma once

#include "convert.cuh"
#include "exchange_fours.cuh"

namespace hyperattn {

// Calls set(n, first, second) with stored sums.
template <u32 DIM, typename Set> __device__ __forceinline__ void load_pairs(const float *from, u32 dim, Set set)
{
#pragma unroll
    for (u32 n = 0; n < DIM / 8; ++n) {
        u32 column = n * 8 + threadIdx.x % 4 * 2;
        if (column < dim) {
            float2 pair = *(const float2 *)(from + column);
            set(n, pair.x, pair.y);
        }
    }
}

// Writes get(n), a pair, times `factor`: f32 or TYPE, which has 16 bits.
template <u32 TYPE, u32 DIM, typename Get>
__device__ __forceinline__ void write_pairs(char *to, u32 type, u32 dim, float factor, Get get)
{
#pragma unroll
    for (u32 n = 0; n < DIM / 8; ++n) {
        u32 column = n * 8 + threadIdx.x % 4 * 2;
        if (column >= dim)
            continue;
        float2 pair = get(n);
        pair.x *= factor, pair.y *= factor;
        if (type == F32)
            *(float2 *)((float *)to + column) = pair;
        else
            *(u32 *)((u16 *)to + column) = f32_to_16x2<TYPE>(pair.x, pair.y);
    }
}

// The same by 16 bytes, for which neighbouring lanes exchange pairs: all lanes of a warp call them, and those of a row
// with the same arguments. Rows are aligned to 16 bytes, and `dim` is a multiple of 8.

// Calls set(n, first, second) with stored sums, if `stored`: f32 or bf16.
template <u32 DIM, typename Set>
__device__ __forceinline__ void load_row(bool stored, const char *from, u32 type, u32 dim, Set set)
{
    const u32 lane = threadIdx.x % 32;
    if (type != F32) {
#pragma unroll
        for (u32 n = 0; n < DIM / 8; n += 4) {
            u32 column = 8 * (n + lane % 4);
            u32 words[4] = {};
            if (stored && column < dim) {
                uint4 eight = *(const uint4 *)((const u16 *)from + column);
                words[0] = eight.x, words[1] = eight.y, words[2] = eight.z, words[3] = eight.w;
            }
            exchange_fours(words);
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                if (stored && 8 * (n + i) < dim)
                    set(n + i, f32_from_bf16((u16)words[i]), f32_from_bf16((u16)(words[i] >> 16)));
            }
        }
        return;
    }
    const bool odd = lane & 1;
#pragma unroll
    for (u32 n = 0; n < DIM / 8; n += 2) {
        u32 column = 8 * (n + odd) + 2 * (lane & 2);
        float4 four = {};
        if (stored && column < dim)
            four = *(const float4 *)((const float *)from + column);
        float first = __shfl_xor_sync(0xffffffffu, odd ? four.x : four.z, 1);
        float second = __shfl_xor_sync(0xffffffffu, odd ? four.y : four.w, 1);
        if (stored && 8 * n < dim)
            set(n, odd ? first : four.x, odd ? second : four.y);
        if (stored && 8 * (n + 1) < dim)
            set(n + 1, odd ? four.z : first, odd ? four.w : second);
    }
}

// Adds stored sums, if `stored`, to those of the first or second of the rows whose pairs alternate in `to`.
template <u32 DIM, u32 HALF>
__device__ __forceinline__ void add_row(float (&to)[DIM / 2], bool stored, const char *from, u32 type, u32 dim)
{
    load_row<DIM>(stored, from, type, dim, [&](u32 n, float first, float second) {
        to[4 * n + 2 * HALF] += first;
        to[4 * n + 2 * HALF + 1] += second;
    });
}

// Calls put(column, four) with get(n), pairs, of four columns each.
template <u32 DIM, typename Get, typename Put> __device__ __forceinline__ void for_each_four(Get get, Put put)
{
    const u32 lane = threadIdx.x % 32;
    const bool odd = lane & 1;
#pragma unroll
    for (u32 n = 0; n < DIM / 8; n += 2) {
        float2 even_pair = get(n), odd_pair = get(n + 1);
        float2 own = odd ? odd_pair : even_pair, other = odd ? even_pair : odd_pair;
        float first = __shfl_xor_sync(0xffffffffu, other.x, 1), second = __shfl_xor_sync(0xffffffffu, other.y, 1);
        put(8 * (n + odd) + 2 * (lane & 2),
            odd ? make_float4(first, second, own.x, own.y) : make_float4(own.x, own.y, first, second));
    }
}

// Calls put(column, eight) with get(n), pairs, times `factor`, of eight columns each in TYPE, which has 16 bits.
template <u32 TYPE, u32 DIM, typename Get, typename Put>
__device__ __forceinline__ void for_each_eight(float factor, Get get, Put put)
{
#pragma unroll
    for (u32 n = 0; n < DIM / 8; n += 4) {
        u32 words[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            float2 pair = get(n + i);
            words[i] = f32_to_16x2<TYPE>(pair.x * factor, pair.y * factor);
        }
        exchange_fours(words);
        put(8 * (n + threadIdx.x % 4), make_uint4(words[0], words[1], words[2], words[3]));
    }
}

// Writes get(n), a pair, times `factor`, if `written`: f32 or TYPE, which has 16 bits.
template <u32 TYPE, u32 DIM, typename Get>
__device__ __forceinline__ void write_row(bool written, char *to, u32 type, u32 dim, float factor, Get get)
{
    if (type == F32) {
        for_each_four<DIM>(get, [&](u32 column, float4 four) {
            four.x *= factor, four.y *= factor, four.z *= factor, four.w *= factor;
            if (written && column < dim)
                *(float4 *)((float *)to + column) = four;
        });
    } else {
        for_each_eight<TYPE, DIM>(factor, get, [&](u32 column, uint4 eight) {
            if (written && column < dim)
                *(uint4 *)((u16 *)to + column) = eight;
        });
    }
}

} // namespace hyperattn
