// The kernels of weigh.cuh in f32 arithmetic, for queries in f32: a thread has one key.
//
// Launches: weigh_blocks_f32 and weigh_keys_f32, grid (places of the chunk), WEIGH_F32_THREADS threads.
#pragma once

#include "weigh.cuh"

namespace hyperattn::refined {

constexpr u32 WEIGH_F32_THREADS = 128;

struct WeighF32Shared {
    float queries[REPRESENTATIVES][MOST_HEAD_DIM];
    RunningSum sums[WEIGH_F32_THREADS / 32][REPRESENTATIVES];
    float start[REPRESENTATIVES];
};

__device__ __forceinline__ void share_representatives(const RefinedParams &p, WeighF32Shared &shared, u32 tile)
{
    const float *from = (const float *)p.representatives + (u64)tile * REPRESENTATIVES * p.width;
    for (u32 i = threadIdx.x; i < REPRESENTATIVES * p.width; i += WEIGH_F32_THREADS)
        shared.queries[i / p.width][i % p.width] = from[i];
    __syncthreads();
}

// Products of a row with all representatives.
__device__ __forceinline__ void multiply_row(const WeighF32Shared &shared, const char *row, u32 dim, u32 type,
                                             bool aligned, float c[REPRESENTATIVES])
{
#pragma unroll
    for (u32 slot = 0; slot < REPRESENTATIVES; ++slot)
        c[slot] = 0.0f;
    for (u32 column = 0; column < dim; column += 8) {
        float x[8];
        load_8(row, column, dim, type, aligned, x);
#pragma unroll
        for (u32 slot = 0; slot < REPRESENTATIVES; ++slot) {
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                c[slot] = fmaf(x[i], shared.queries[slot][column + i], c[slot]);
        }
    }
}

__device__ __forceinline__ float add_weights(const float c[REPRESENTATIVES], float scale, const float *start)
{
    float weight = 0.0f;
#pragma unroll
    for (u32 slot = 0; slot < REPRESENTATIVES; ++slot)
        weight += weight_of(c[slot], scale, start[slot]);
    return weight;
}

__device__ __forceinline__ void weigh_blocks_f32(const RefinedParams &p, WeighF32Shared &shared)
{
    u32 thread = threadIdx.x;
    u64 place = blockIdx.x;
    QueryTile tile = tile_of_group(p, p.chunk_first + blockIdx.x / GROUP_TILES, blockIdx.x % GROUP_TILES);
    Frame frame = frame_of(p, tile);
    if (!frame.chooses)
        return;
    share_representatives(p, shared, tile.number);
    RunningSum sums[REPRESENTATIVES];
#pragma unroll
    for (u32 slot = 0; slot < REPRESENTATIVES; ++slot)
        sums[slot].empty();
    bool aligned = p.flags & REFINED_K_ALIGNED;
    const char *keys = p.k.row(tile.batch, tile.head / p.group, 0);
    u32 met_keys = frame.first + (frame.seen_by_all - frame.near);
    for (u32 i = thread; i < met_keys; i += WEIGH_F32_THREADS) {
        u32 key = i < frame.first ? i : frame.near + (i - frame.first);
        float c[REPRESENTATIVES];
        multiply_row(shared, keys + key * p.k.row_stride, p.head_dim, p.kv_type, aligned, c);
#pragma unroll
        for (u32 slot = 0; slot < REPRESENTATIVES; ++slot)
            sums[slot].add(c[slot] * p.scale_log2, negative_infinity());
    }
    u64 first_of_head = (u64)kv_number(p, tile) * p.blocks;
    const char *means = p.mean_keys + first_of_head * p.width * 4, *outliers = p.outliers + first_of_head * p.width * 4;
    const float *counts = p.key_counts + first_of_head;
    for (u32 block = thread; block < frame.end_block(); block += WEIGH_F32_THREADS) {
        float c[REPRESENTATIVES], count = log2_approximately(counts[block]);
        multiply_row(shared, means + (u64)block * p.width * 4, p.width, F32, true, c);
#pragma unroll
        for (u32 slot = 0; slot < REPRESENTATIVES; ++slot)
            sums[slot].add(fmaf(c[slot], p.scale_log2, count), negative_infinity());
    }
#pragma unroll
    for (u32 slot = 0; slot < REPRESENTATIVES; ++slot) {
#pragma unroll
        for (u32 other = 1; other < 32; other *= 2) {
            RunningSum its;
            its.max = __shfl_xor_sync(ALL_LANES, sums[slot].max, other);
            its.sum = __shfl_xor_sync(ALL_LANES, sums[slot].sum, other);
            sums[slot].add(its);
        }
        if (thread % 32 == 0)
            shared.sums[thread / 32][slot] = sums[slot];
    }
    __syncthreads();
    if (thread < REPRESENTATIVES) {
        RunningSum sum = shared.sums[0][thread];
        for (u32 warp = 1; warp < WEIGH_F32_THREADS / 32; ++warp)
            sum.add(shared.sums[warp][thread]);
        const float *represented = p.represented + (u64)tile.number * REPRESENTATIVES;
        float queries = 0.0f;
        for (u32 slot = 0; slot < REPRESENTATIVES; ++slot)
            queries += represented[slot];
        float total = sum.log2_sum(), start = start_of(total, queries, represented[thread]);
        p.totals[place * REPRESENTATIVES + thread] = total;
        p.starts[place * REPRESENTATIVES + thread] = start;
        shared.start[thread] = start;
    }
    __syncthreads();
    for (u32 block = frame.first_block() + thread; block < frame.end_block(); block += WEIGH_F32_THREADS) {
        float c[REPRESENTATIVES], count = counts[block];
        multiply_row(shared, means + (u64)block * p.width * 4, p.width, F32, true, c);
        float mean = add_weights(c, p.scale_log2, shared.start) * count;
        multiply_row(shared, outliers + (u64)block * p.width * 4, p.width, F32, true, c);
        float outlier = fmaf(add_weights(c, p.scale_log2, shared.start), fminf(count, 1.0f), mean);
        // The block that the first keys cut is looked into: their part of it is met already.
        if (block == frame.first_block() && frame.first % KEY_BLOCK)
            outlier = __uint_as_float(0x7f7fffffu);
        p.block_weights[place * p.blocks + block] = mean;
        p.outlier_weights[place * p.blocks + block] = outlier;
    }
}

__device__ __forceinline__ void weigh_keys_f32(const RefinedParams &p, WeighF32Shared &shared)
{
    u64 place = blockIdx.x;
    u32 count = p.candidate_count[place] * KEY_BLOCK;
    if (count == 0)
        return;
    QueryTile tile = tile_of_group(p, p.chunk_first + blockIdx.x / GROUP_TILES, blockIdx.x % GROUP_TILES);
    if (threadIdx.x < REPRESENTATIVES)
        shared.start[threadIdx.x] = p.starts[place * REPRESENTATIVES + threadIdx.x];
    share_representatives(p, shared, tile.number);
    bool aligned = p.flags & REFINED_K_ALIGNED;
    const char *keys = p.k.row(tile.batch, tile.head / p.group, 0);
    const u32 *candidates = p.candidates + place * p.most_candidates;
    float *weights = p.key_weights + place * p.most_candidates * KEY_BLOCK;
    for (u32 i = threadIdx.x; i < count; i += WEIGH_F32_THREADS) {
        u32 key = candidates[i / KEY_BLOCK] * KEY_BLOCK + i % KEY_BLOCK;
        float c[REPRESENTATIVES];
        multiply_row(shared, keys + key * p.k.row_stride, p.head_dim, p.kv_type, aligned, c);
        weights[i] = add_weights(c, p.scale_log2, shared.start);
    }
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::WEIGH_F32_THREADS)
    weigh_blocks_f32(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::WeighF32Shared shared;
    hyperattn::refined::weigh_blocks_f32(p, shared);
}

extern "C" __global__ void __launch_bounds__(hyperattn::refined::WEIGH_F32_THREADS)
    weigh_keys_f32(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::WeighF32Shared shared;
    hyperattn::refined::weigh_keys_f32(p, shared);
}
