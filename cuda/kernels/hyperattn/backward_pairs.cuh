// Rows of sums that four neighbouring lanes hold as pairs of columns, as the accumulators of matrix products do: a lane has
// columns 8 n + 2 (lane % 4) and the next.
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

} // namespace hyperattn
