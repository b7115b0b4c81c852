// Budgets: how many keys the queries of each head meet, raised until the error of its probe rows is within the target.
//
// Launches: settle_budgets, grid (heads), NORM_THREADS threads; refined_keys_per_query, grid (heads),
// NORM_THREADS threads.
#pragma once

#include "probe.cuh"

namespace hyperattn::refined {

// After a round, whose outputs of the probe rows are in probe.estimate.
__device__ __forceinline__ void settle_budget(const RefinedParams &p, const ProbeParams &probe, NormShared &shared)
{
    u32 head = blockIdx.x;
    if (probe.settled[head])
        return;
    u64 first = (u64)head * probe.rows_of_head();
    Norms norms = norms_of(p, probe, shared, head, [&](u32 row, u32 column) {
        return probe.estimate[(first + row) * p.value_dim + column];
    });
    if (threadIdx.x != 0)
        return;
    u32 budget = probe.budgets[head];
    // A budget below the caller's must be beyond doubt.
    float target = probe.target_error * (budget < probe.callers_budget ? 0.5f : 1.0f);
    // No error seen falls faster than the budget grows.
    bool within_reach = norms.relative_error() * (float)budget <= probe.target_error * (float)probe.most_budget;
    if (norms.upper_relative_error() <= target) {
        probe.settled[head] = 1;
    } else if (within_reach && (u64)budget * 2 <= probe.most_budget) {
        probe.budgets[head] = budget * 2;
    } else {
        probe.budgets[head] = EXACT_BUDGET;
        probe.settled[head] = 1;
    }
}

// Keys and columns that a query of a head meets on average.
__device__ __forceinline__ void write_keys_per_query(const RefinedParams &p, const View &to, u64 *pairs_of_warp)
{
    u32 head = blockIdx.x;
    u64 pairs = 0;
    for (u32 index = threadIdx.x; index < p.query_tiles; index += NORM_THREADS) {
        QueryTile tile = query_tile(p, head, index);
        Frame frame = frame_of(p, tile.first_query, tile.queries, p.budgets[head]);
        pairs += visible_pairs(p, tile.first_query, tile.first_query + tile.queries);
        if (frame.chooses)
            pairs = pairs + (u64)tile.queries * (frame.first + frame.wanted + 1) - (u64)tile.queries * frame.near;
    }
#pragma unroll
    for (u32 other = 1; other < 32; other *= 2)
        pairs += __shfl_xor_sync(ALL_LANES, pairs, other);
    if (threadIdx.x % 32 == 0)
        pairs_of_warp[threadIdx.x / 32] = pairs;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 warp = 1; warp < NORM_THREADS / 32; ++warp)
            pairs += pairs_of_warp[warp];
        *(float *)to.row(head / p.heads_q, head % p.heads_q, 0) = (float)((double)pairs / p.n_q);
    }
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::NORM_THREADS)
    settle_budgets(const __grid_constant__ hyperattn::refined::RefinedParams p,
                             const __grid_constant__ hyperattn::refined::ProbeParams probe)
{
    __shared__ hyperattn::refined::NormShared shared;
    hyperattn::refined::settle_budget(p, probe, shared);
}

extern "C" __global__ void __launch_bounds__(hyperattn::refined::NORM_THREADS)
    refined_keys_per_query(const __grid_constant__ hyperattn::refined::RefinedParams p,
                                   const __grid_constant__ hyperattn::View to)
{
    __shared__ hyperattn::u64 pairs_of_warp[hyperattn::refined::NORM_THREADS / 32];
    hyperattn::refined::write_keys_per_query(p, to, pairs_of_warp);
}
