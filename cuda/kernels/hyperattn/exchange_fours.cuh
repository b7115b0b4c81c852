// The lanes that have parts of one row exchange them, so that each can load or store 16 bytes in a row.
#pragma once

#include "types.cuh"

namespace hyperattn {

// Of four words of each of a row's four lanes: word i of lane k changes places with word k of lane i.
__device__ __forceinline__ void exchange_fours(u32 (&words)[4])
{
    const u32 lane = threadIdx.x % 32;
    const bool odd = lane & 1, high = lane & 2;
    u32 far_0 = __shfl_xor_sync(0xffffffffu, high ? words[0] : words[2], 2);
    u32 far_1 = __shfl_xor_sync(0xffffffffu, high ? words[1] : words[3], 2);
    u32 low_0 = high ? far_0 : words[0], low_1 = high ? far_1 : words[1];
    u32 high_0 = high ? words[2] : far_0, high_1 = high ? words[3] : far_1;
    u32 near_low = __shfl_xor_sync(0xffffffffu, odd ? low_0 : low_1, 1);
    u32 near_high = __shfl_xor_sync(0xffffffffu, odd ? high_0 : high_1, 1);
    words[0] = odd ? near_low : low_0;
    words[1] = odd ? low_1 : near_low;
    words[2] = odd ? near_high : high_0;
    words[3] = odd ? high_1 : near_high;
}

} // namespace hyperattn
