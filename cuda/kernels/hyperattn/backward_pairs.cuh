// Rows of sums that four neighbouring lanes hold as pairs of columns, as the accumulators of matrix products do: a lane
// has columns 8 n + 2 (lane % 4) and the next.
#pragma once

#include "convert.cuh"

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

// Calls set(n, first, second) with stored sums, if `stored`.
template <u32 DIM, typename Set>
__device__ __forceinline__ void load_row(bool stored, const float *from, u32 dim, Set set)
{
    const u32 lane = threadIdx.x % 32;
    const bool odd = lane & 1;
#pragma unroll
    for (u32 n = 0; n < DIM / 8; n += 2) {
        u32 column = 8 * (n + odd) + 2 * (lane & 2);
        float4 four = {};
        if (stored && column < dim)
            four = *(const float4 *)(from + column);
        float first = __shfl_xor_sync(0xffffffffu, odd ? four.x : four.z, 1);
        float second = __shfl_xor_sync(0xffffffffu, odd ? four.y : four.w, 1);
        if (stored && 8 * n < dim)
            set(n, odd ? first : four.x, odd ? second : four.y);
        if (stored && 8 * (n + 1) < dim)
            set(n + 1, odd ? four.z : first, odd ? four.w : second);
    }
}

// Writes get(n), a pair, times `factor`, if `written`: f32 or TYPE, which has 16 bits.
template <u32 TYPE, u32 DIM, typename Get>
__device__ __forceinline__ void write_row(bool written, char *to, u32 type, u32 dim, float factor, Get get)
{
    const u32 lane = threadIdx.x % 32;
    const bool odd = lane & 1, high = lane & 2;
    if (type == F32) {
#pragma unroll
        for (u32 n = 0; n < DIM / 8; n += 2) {
            float2 even_pair = get(n), odd_pair = get(n + 1);
            float2 own = odd ? odd_pair : even_pair, other = odd ? even_pair : odd_pair;
            float first = __shfl_xor_sync(0xffffffffu, other.x, 1) * factor;
            float second = __shfl_xor_sync(0xffffffffu, other.y, 1) * factor;
            own.x *= factor, own.y *= factor;
            u32 column = 8 * (n + odd) + 2 * (lane & 2);
            if (written && column < dim)
                *(float4 *)((float *)to + column) =
                    odd ? make_float4(first, second, own.x, own.y) : make_float4(own.x, own.y, first, second);
        }
        return;
    }
#pragma unroll
    for (u32 n = 0; n < DIM / 8; n += 4) {
        u32 pairs[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            float2 pair = get(n + i);
            pairs[i] = f32_to_16x2<TYPE>(pair.x * factor, pair.y * factor);
        }
        // Of the number that is this lane's, the pairs of both lanes of its half of the row, then those of the other
        // half.
        u32 far_0 = __shfl_xor_sync(0xffffffffu, high ? pairs[0] : pairs[2], 2);
        u32 far_1 = __shfl_xor_sync(0xffffffffu, high ? pairs[1] : pairs[3], 2);
        u32 low_0 = high ? far_0 : pairs[0], low_1 = high ? far_1 : pairs[1];
        u32 high_0 = high ? pairs[2] : far_0, high_1 = high ? pairs[3] : far_1;
        u32 near_low = __shfl_xor_sync(0xffffffffu, odd ? low_0 : low_1, 1);
        u32 near_high = __shfl_xor_sync(0xffffffffu, odd ? high_0 : high_1, 1);
        u32 column = 8 * (n + (lane & 3));
        if (written && column < dim)
            *(uint4 *)((u16 *)to + column) = odd ? make_uint4(near_low, low_1, near_high, high_1)
                                                 : make_uint4(low_0, near_low, high_0, near_high);
    }
}

} // namespace hyperattn
