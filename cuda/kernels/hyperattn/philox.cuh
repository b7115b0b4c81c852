// Counter-based random numbers, Philox4x32-10, with the streams of the CPU's rng.rs: a draw depends on the seed, the
// offset, the head, the purpose and its own index, and on nothing else.
#pragma once

#include "types.cuh"

namespace hyperattn {

struct PhiloxBlock {
    u32 word[4];
};

__device__ __forceinline__ PhiloxBlock philox(u32 key0, u32 key1, PhiloxBlock counter)
{
    u32 c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
#pragma unroll
    for (u32 round = 0; round < 10; round++) {
        u32 low0 = 0xD2511F53u * c0, high0 = __umulhi(0xD2511F53u, c0);
        u32 low1 = 0xCD9E8D57u * c2, high1 = __umulhi(0xCD9E8D57u, c2);
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// What a stream of draws is for.
enum Purpose : u32 {
    PURPOSE_PROJECTION = 1,
    PURPOSE_UNIFORM_KEY = 2,
    PURPOSE_TAU_ROW = 3,
    PURPOSE_ROW_NORM_KEY = 4,
    PURPOSE_PROBE_ROW = 5,
};

// The draws of one purpose for one head.
struct Stream {
    u32 key0;
    u32 key1;

    __device__ __forceinline__ Stream(u64 seed, u64 offset, u32 head, u32 purpose)
    {
        PhiloxBlock block = philox((u32)seed, (u32)(seed >> 32), {{(u32)offset, (u32)(offset >> 32), head, purpose}});
        key0 = block.word[0];
        key1 = block.word[1];
    }

    // Two 64-bit numbers: block `index` of a sub-stream.
    __device__ __forceinline__ void block(u32 sub0, u32 sub1, u64 index, u64 &first, u64 &second) const
    {
        PhiloxBlock block = philox(key0, key1, {{(u32)index, (u32)(index >> 32), sub0, sub1}});
        first = block.word[0] | (u64)block.word[1] << 32;
        second = block.word[2] | (u64)block.word[3] << 32;
    }

    // Draw `index` of the sub-problem whose keys start at `start` and count `len`.
    __device__ __forceinline__ u64 uniform(u32 start, u32 len, u32 index) const
    {
        u64 first, second;
        block(start, len, index / 2, first, second);
        return index % 2 ? second : first;
    }
};

// `draw` scaled to 0..bound.
__device__ __forceinline__ u32 below(u64 draw, u32 bound)
{
    return (u32)__umul64hi(draw, bound);
}

} // namespace hyperattn
