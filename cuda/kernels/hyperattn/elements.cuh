// Eight neighbouring elements of a row, as they are in memory, and copies of such to shared memory.
#pragma once

#include "refined_params.cuh"

namespace hyperattn::refined {

template <u32 TYPE> struct EightElements {
    static constexpr u32 WORDS = TYPE == F32 ? 8 : 4;
    static constexpr u32 BYTES = 4 * WORDS;

    u32 words[WORDS];

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i)
            words[i] = 0;
    }

    // Elements column..column + 8 of a row of `dim`, zeros beyond its end.
    __device__ __forceinline__ void load(const char *row, u32 column, u32 dim, bool aligned)
    {
        if (aligned && column < dim) {
#pragma unroll
            for (u32 i = 0; i < WORDS; i += 4)
                set(i, load_16_bytes(row + column * (BYTES / 8) + 4 * i));
            return;
        }
        clear();
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            if (column + i < dim) {
                if constexpr (TYPE == F32)
                    words[i] = ((const u32 *)row)[column + i];
                else
                    words[i / 2] |= (u32)((const u16 *)row)[column + i] << i % 2 * 16;
            }
        }
    }

    __device__ __forceinline__ void load_shared(const char *from)
    {
#pragma unroll
        for (u32 i = 0; i < WORDS; i += 4)
            set(i, *(const uint4 *)(from + 4 * i));
    }

    __device__ __forceinline__ void store_shared(char *to) const
    {
#pragma unroll
        for (u32 i = 0; i < WORDS; i += 4)
            *(uint4 *)(to + 4 * i) = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }

    __device__ __forceinline__ float operator[](u32 i) const
    {
        if constexpr (TYPE == F32)
            return __uint_as_float(words[i]);
        else if constexpr (TYPE == BF16)
            return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        else
            return f32_from_f16((u16)(words[i / 2] >> i % 2 * 16));
    }

private:
    __device__ __forceinline__ void set(u32 i, uint4 x)
    {
        words[i] = x.x;
        words[i + 1] = x.y;
        words[i + 2] = x.z;
        words[i + 3] = x.w;
    }
};

// Copies 16 bytes to shared memory, or zeros where `present` is false; after await_copies they are there for the thread
// that began the copy.
__device__ __forceinline__ void begin_copy(char *to, const char *from, bool present)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from),
                 "r"(present ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Sums over eight neighbouring lanes: of the i-th number for the i-th of them. Neighbours are added first, then pairs,
// then fours.
__device__ __forceinline__ float sum_of_eight_lanes(const float x[8])
{
    bool odd = threadIdx.x & 1, second = threadIdx.x & 2, late = threadIdx.x & 4;
    float pairs[4], fours[2];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        float kept = odd ? x[2 * i + 1] : x[2 * i], sent = odd ? x[2 * i] : x[2 * i + 1];
        pairs[i] = kept + __shfl_xor_sync(ALL_LANES, sent, 1);
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        float kept = second ? pairs[2 * i + 1] : pairs[2 * i], sent = second ? pairs[2 * i] : pairs[2 * i + 1];
        fours[i] = kept + __shfl_xor_sync(ALL_LANES, sent, 2);
    }
    float kept = late ? fours[1] : fours[0], sent = late ? fours[0] : fours[1];
    return kept + __shfl_xor_sync(ALL_LANES, sent, 4);
}

} // namespace hyperattn::refined
