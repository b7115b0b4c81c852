// The gradients of all keys and values of METHOD_REFINED from their sums, with their part in those of the means of
// their blocks.
#pragma once

#include "backward_refined_params.cuh"

namespace hyperattn::refined {

constexpr u32 FINISH_THREADS = 256;

// Up to where the KV heads' keys are met by a tile none of whose queries is finite, which the lists leave out: it meets
// all that it sees.
__device__ __forceinline__ void find_not_finite_limit(const RefinedParams &p, const RefinedGradientParams &g,
                                                      u32 &limit)
{
    if (threadIdx.x == 0)
        limit = 0;
    __syncthreads();
    u32 first_head = (g.first_kv_head + blockIdx.x) * p.group;
    for (u32 i = threadIdx.x; i < p.group * p.query_tiles; i += FINISH_THREADS) {
        u32 head_number = first_head + i / p.query_tiles;
        QueryTile tile = query_tile(p, head_number, i % p.query_tiles);
        Frame frame = frame_of(p, tile.first_query, tile.queries, p.budgets[head_number]);
        if (frame.chooses && p.represented[(u64)tile.number * REPRESENTATIVES] == 0.0f)
            atomicMax(&limit, p.limit(tile.first_query + tile.queries - 1));
    }
    __syncthreads();
    if (threadIdx.x == 0)
        g.not_finite_limits[blockIdx.x] = limit;
}

__device__ __forceinline__ bool is_finite_row(const char *row, u32 dim, u32 type)
{
    bool finite = true;
    for (u32 column = threadIdx.x % 32; column < dim; column += 32)
        finite &= is_finite(f32_of(row, column, type));
    return __all_sync(ALL_LANES, finite);
}

// A warp writes the gradients of one key and its value.
__device__ __forceinline__ void finish_key(const RefinedParams &p, const BackwardParams &backward,
                                           const RefinedGradientParams &g, u32 set_kv_head, u32 position)
{
    u32 lane = threadIdx.x % 32, kv_number = g.first_kv_head + set_kv_head, heads_kv = p.heads_q / p.group;
    u32 batch = kv_number / heads_kv, kv_head = kv_number % heads_kv, block = position / KEY_BLOCK;
    bool in_mean = p.flags & REFINED_REST;
    float count = 1.0f;
    if (in_mean) {
        count = p.key_counts[(u64)kv_number * p.blocks + block];
        if (count != (float)min(p.n_k - block * KEY_BLOCK, KEY_BLOCK))
            in_mean = is_finite_row(p.k.row(batch, kv_head, position), p.head_dim, p.kv_type) &&
                      is_finite_row(p.v.row(batch, kv_head, position), p.value_dim, p.kv_type);
    }
    const float *mean = g.block_sums + ((u64)set_kv_head * p.blocks + block) * p.summary_width();
    bool lost = position < g.not_finite_limits[set_kv_head];
    u64 row = (u64)set_kv_head * p.n_k + position;
    auto write = [&](const View &to, u32 type, u32 dim, const float *sums, const float *of_mean, float factor) {
        char *gradient = to.row(batch, kv_head, position);
        for (u32 column = lane; column < dim; column += 32) {
            float sum = sums[row * dim + column];
            if (in_mean)
                sum += of_mean[column] / count;
            store_rounded(gradient, column, type, lost ? __uint_as_float(0x7fc00000u) : sum * factor);
        }
    };
    write(backward.dk, backward.dk_type, p.head_dim, g.key_sums, mean, backward.scale);
    write(backward.dv, backward.dv_type, p.value_dim, g.value_sums, mean + p.head_dim, 1.0f);
}

} // namespace hyperattn::refined

// Grid: KV heads of the set; block FINISH_THREADS.
extern "C" __global__ void __launch_bounds__(hyperattn::refined::FINISH_THREADS)
    backward_refined_not_finite(const __grid_constant__ hyperattn::refined::RefinedParams p,
                                const __grid_constant__ hyperattn::refined::RefinedGradientParams g)
{
    __shared__ hyperattn::u32 limit;
    hyperattn::refined::find_not_finite_limit(p, g, limit);
}

// Grid: (ceil(n_k / (FINISH_THREADS / 32)), KV heads of the set); block FINISH_THREADS, a warp for each key.
extern "C" __global__ void __launch_bounds__(hyperattn::refined::FINISH_THREADS)
    backward_refined_finish(const __grid_constant__ hyperattn::refined::RefinedParams p,
                            const __grid_constant__ hyperattn::BackwardParams backward,
                            const __grid_constant__ hyperattn::refined::RefinedGradientParams g)
{
    using namespace hyperattn;
    u32 position = blockIdx.x * (refined::FINISH_THREADS / 32) + threadIdx.x / 32;
    if (position < p.n_k)
        refined::finish_key(p, backward, g, blockIdx.y, position);
}
