// The m heaviest of some weights, by one thread block: a threshold by radix, then all above it in their order.
#pragma once

#include "refined_params.cuh"

namespace hyperattn::refined {

constexpr u32 SELECT_THREADS = 256;
constexpr u32 SELECT_WARPS = SELECT_THREADS / 32;
constexpr u32 SELECT_BINS = 2048;

// The bits of numbers that are not negative are ordered as these. Bits that stand for no weight:
constexpr u32 NOT_ELIGIBLE = 0xffffffffu;

struct SelectShared {
    u32 histogram[SELECT_BINS];
    u32 above_of_warp[SELECT_WARPS];
    u32 ties_of_warp[SELECT_WARPS];
    u32 digit;
    u32 remaining;
};

struct Heaviest {
    // Bits of the smallest of them.
    u32 threshold;
    // How many as small as that belong to them, the first ones.
    u32 ties;
};

// One digit of the threshold: the bin in which the `remaining`-th largest weight lies, and its number within it.
__device__ __forceinline__ void find_digit(SelectShared &shared, u32 remaining)
{
    constexpr u32 OF_THREAD = SELECT_BINS / SELECT_THREADS;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Thread 0 has the highest bins.
    u32 top = SELECT_BINS - threadIdx.x * OF_THREAD;
    u32 own = 0;
#pragma unroll
    for (u32 i = 1; i <= OF_THREAD; ++i)
        own += shared.histogram[top - i];
    u32 through = own;
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        u32 other = __shfl_up_sync(ALL_LANES, through, distance);
        if (lane >= distance)
            through += other;
    }
    if (lane == 31)
        shared.above_of_warp[warp] = through;
    __syncthreads();
    for (u32 i = 0; i < warp; ++i)
        through += shared.above_of_warp[i];
    u32 before = through - own;
    if (before < remaining && remaining <= through) {
        for (u32 i = 1; i <= OF_THREAD; ++i) {
            u32 in_bin = shared.histogram[top - i];
            if (remaining <= before + in_bin) {
                shared.digit = top - i;
                shared.remaining = remaining - before;
                break;
            }
            before += in_bin;
        }
    }
    __syncthreads();
}

// The `wanted` heaviest of `count` weights; bits(i) gives those of weight i.
template <class Bits> __device__ Heaviest find_heaviest(SelectShared &shared, u32 count, u32 wanted, Bits bits)
{
    if (wanted == 0)
        return {NOT_ELIGIBLE, 0};
    if (wanted >= count)
        return {0, count};
    u32 prefix = 0, remaining = wanted;
    // 11, 11 and 10 bits.
    const u32 shifts[4] = {32, 21, 10, 0};
#pragma unroll
    for (u32 digit = 0; digit < 3; ++digit) {
        u32 shift = shifts[digit + 1], width = shifts[digit] - shift;
        for (u32 i = threadIdx.x; i < SELECT_BINS; i += SELECT_THREADS)
            shared.histogram[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < count; i += SELECT_THREADS) {
            u32 x = bits(i);
            if (digit == 0 || x >> shifts[digit] == prefix)
                atomicAdd(&shared.histogram[x >> shift & ((1u << width) - 1)], 1);
        }
        __syncthreads();
        find_digit(shared, remaining);
        prefix = prefix << width | shared.digit;
        remaining = shared.remaining;
        __syncthreads();
    }
    return {prefix, remaining};
}

// Visits the weights in their order, 32 by a warp in a step: take(step, bits, takes, rank), where takes says whether
// the lane's weight is among the heaviest, and rank how many such come before it. Weights that are not eligible are
// never taken. Steps come in whole units of `unit`, one warp has all of a unit. Returns how many are taken.
template <class Bits, class Take>
__device__ u32 take_heaviest(SelectShared &shared, Heaviest heaviest, u32 steps, u32 unit, Bits bits, Take take)
{
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 units = (steps + unit - 1) / unit;
    u32 first = min((u32)((u64)units * warp / SELECT_WARPS) * unit, steps);
    u32 end = min((u32)((u64)units * (warp + 1) / SELECT_WARPS) * unit, steps);
    u32 above = 0, ties = 0;
    for (u32 step = first; step < end; ++step) {
        u32 x = bits(step * 32 + lane);
        above += __popc(__ballot_sync(ALL_LANES, x > heaviest.threshold && x != NOT_ELIGIBLE));
        ties += __popc(__ballot_sync(ALL_LANES, x == heaviest.threshold && x != NOT_ELIGIBLE));
    }
    if (lane == 0) {
        shared.above_of_warp[warp] = above;
        shared.ties_of_warp[warp] = ties;
    }
    __syncthreads();
    u32 rank = 0, ties_left = heaviest.ties, all = 0, all_ties = heaviest.ties;
    for (u32 i = 0; i < SELECT_WARPS; ++i) {
        if (i == warp) {
            rank = all;
            ties_left = all_ties;
        }
        u32 taken_ties = min(all_ties, shared.ties_of_warp[i]);
        all += shared.above_of_warp[i] + taken_ties;
        all_ties -= taken_ties;
    }
    u32 earlier = (1u << lane) - 1;
    for (u32 step = first; step < end; ++step) {
        u32 x = bits(step * 32 + lane);
        bool tie = x == heaviest.threshold && x != NOT_ELIGIBLE;
        u32 tied = __ballot_sync(ALL_LANES, tie);
        tie = tie && __popc(tied & earlier) < ties_left;
        bool takes = (x > heaviest.threshold && x != NOT_ELIGIBLE) || tie;
        u32 taken = __ballot_sync(ALL_LANES, takes);
        take(step, x, takes, rank + __popc(taken & earlier));
        rank += __popc(taken);
        ties_left -= min(ties_left, (u32)__popc(tied));
    }
    __syncthreads();
    return all;
}

} // namespace hyperattn::refined
