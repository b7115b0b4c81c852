// Rows of sums that four neighbouring lanes hold as pairs of columns, as backward_pairs.cuh says, to memory by 16 bytes.
// The lanes exchange pairs first, so all lanes of a warp take part; rows that do not exist are not written.
#pragma once

#include "convert.cuh"

namespace hyperattn {

// Of pairs `first` and `second` of all four lanes, this lane and its neighbour's of one of them: of `first` if its
// number is even. Those of the lower lane come first.
template <typename T>
__device__ __forceinline__ void exchange(T first, T second, u32 distance, T &lower, T &upper)
{
    bool odd = threadIdx.x & distance;
    T received = __shfl_xor_sync(0xffffffffu, odd ? first : second, distance), kept = odd ? second : first;
    lower = odd ? received : kept;
    upper = odd ? kept : received;
}

// Writes get(n), columns 8 n + 2 (lane % 4) and the next, or adds them to what is there without waiting for it.
template <u32 DIM, typename Get>
__device__ __forceinline__ void write_sums(float *to, u32 dim, bool exists, bool adds, Get get)
{
#pragma unroll
    for (u32 n = 0; n < DIM / 8; n += 2) {
        float2 first = get(n), second = get(n + 1);
        float4 four;
        exchange(first.x, second.x, 1, four.x, four.z);
        exchange(first.y, second.y, 1, four.y, four.w);
        u32 column = 8 * (n + threadIdx.x % 2) + threadIdx.x % 4 / 2 * 4;
        if (!exists || column >= dim)
            continue;
        if (adds)
            asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + column), "f"(four.x), "f"(four.y),
                         "f"(four.z), "f"(four.w)
                         : "memory");
        else
            *(float4 *)(to + column) = four;
    }
}

// Writes get(n) times `factor` as elements of TYPE, which has 16 bits.
template <u32 TYPE, u32 DIM, typename Get>
__device__ __forceinline__ void write_rounded(u16 *to, u32 dim, bool exists, float factor, Get get)
{
#pragma unroll
    for (u32 n = 0; n < DIM / 8; n += 4) {
        u32 word[4], half[4];
        uint4 eight;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            float2 pair = get(n + i);
            word[i] = f32_to_16x2<TYPE>(pair.x * factor, pair.y * factor);
        }
        exchange(word[0], word[1], 1, half[0], half[1]);
        exchange(word[2], word[3], 1, half[2], half[3]);
        exchange(half[0], half[2], 2, eight.x, eight.z);
        exchange(half[1], half[3], 2, eight.y, eight.w);
        u32 column = 8 * (n + threadIdx.x % 4);
        if (exists && column < dim)
            *(uint4 *)(to + column) = eight;
    }
}

} // namespace hyperattn
