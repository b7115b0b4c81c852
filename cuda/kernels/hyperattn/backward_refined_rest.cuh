// The gradient of what METHOD_REFINED leaves out: of the key and the value of every tile's extra column, and from
// there of the means of the blocks that the column is made of, each by its share in it.
#pragma once

#include "backward_refined_params.cuh"

namespace hyperattn::refined {

constexpr u32 COLUMN_THREADS = 256;
constexpr u32 SPREAD_THREADS = 128;
constexpr u32 SPREAD_COLUMNS_OF_THREAD = 2;
constexpr u32 SPREAD_COLUMNS = SPREAD_THREADS * SPREAD_COLUMNS_OF_THREAD;
// Blocks whose gradients a thread block adds up, and places that it has the shares of at a time.
constexpr u32 SPREAD_BLOCKS = 16;
constexpr u32 SPREAD_PLACES = 32;

struct ColumnShared {
    float shares[QUERY_TILE_ROWS];
    float slopes[QUERY_TILE_ROWS];
};

// The gradient of the extra column of a place of the chunk. The blocks' weights become their shares in the column,
// zeros where there is none.
__device__ __forceinline__ void column_gradient(const RefinedParams &p, const BackwardParams &backward,
                                                const RefinedGradientParams &g, ColumnShared &shared)
{
    u32 lane = threadIdx.x % 32, in_chunk = blockIdx.x / GROUP_TILES, i = blockIdx.x % GROUP_TILES;
    u32 group = p.chunk_first + in_chunk, place = (group - p.pass_first) * GROUP_TILES + i;
    QueryTile tile = tile_of_group(p, group, i);
    Frame frame = frame_of(p, tile);
    const Segment *segment = frame.chooses ? segment_with(p, place, SEGMENT_EXTRA) : nullptr;
    float *weights = p.block_weights + (u64)blockIdx.x * p.blocks;
    if (!segment) {
        for (u32 block = threadIdx.x; block < p.blocks; block += COLUMN_THREADS)
            weights[block] = 0.0f;
        return;
    }
    float whole = rest_of(p, frame, in_chunk, i).weight;
    for (u32 block = threadIdx.x; block < p.blocks; block += COLUMN_THREADS) {
        bool counts = block >= frame.first_block() && block < frame.end_block();
        weights[block] = counts ? weights[block] / whole : 0.0f;
    }

    u32 value_bytes = p.kv_type == F32 ? 4 : 2, width = p.summary_width();
    const char *key = p.extra_keys + (u64)place * p.head_dim * value_bytes;
    const char *value = p.extra_values + (u64)place * p.value_dim * value_bytes;
    const char *queries = p.q.row(tile.batch, tile.head, tile.first_query);
    const char *gradients = backward.dout.row(tile.batch, tile.head, tile.first_query);
    const RowTerms *row_terms = backward.row_terms + (u64)tile.head_number * p.n_q + tile.first_query;
#pragma unroll 2
    for (u32 row = threadIdx.x / 32; row < tile.queries; row += COLUMN_THREADS / 32) {
        const char *query = queries + row * p.q.row_stride;
        const char *gradient = gradients + row * backward.dout.row_stride;
        float product = 0.0f, value_product = 0.0f;
        for (u32 column = lane; column < p.head_dim; column += 32)
            product = fmaf(f32_of(query, column, p.q_type), f32_of(key, column, p.kv_type), product);
        for (u32 column = lane; column < p.value_dim; column += 32)
            value_product = fmaf(f32_of(gradient, column, backward.dout_type), f32_of(value, column, p.kv_type),
                                 value_product);
#pragma unroll
        for (u32 other = 1; other < 32; other *= 2) {
            product += __shfl_xor_sync(ALL_LANES, product, other);
            value_product += __shfl_xor_sync(ALL_LANES, value_product, other);
        }
        RowTerms terms = row_terms[row];
        float share = exp2_approximately(fmaf(product, p.scale_log2, segment->log_weight - terms.lse));
        if (lane == 0) {
            shared.shares[row] = share;
            shared.slopes[row] = share * (value_product - terms.delta);
        }
    }
    __syncthreads();
    for (u32 column = threadIdx.x; column < width; column += COLUMN_THREADS) {
        bool of_key = column < p.head_dim;
        u32 within = of_key ? column : column - p.head_dim, type = of_key ? p.q_type : backward.dout_type;
        const char *from = of_key ? queries : gradients;
        const float *factors = of_key ? shared.slopes : shared.shares;
        i64 stride = of_key ? p.q.row_stride : backward.dout.row_stride;
        float sum = 0.0f;
#pragma unroll 8
        for (u32 row = 0; row < tile.queries; ++row)
            sum = fmaf(factors[row], f32_of(from + row * stride, within, type), sum);
        g.column_gradients[(u64)blockIdx.x * width + column] = sum;
    }
}

struct SpreadShared {
    float4 shares[SPREAD_PLACES][SPREAD_BLOCKS / 4];
};

// Adds to the gradients of some blocks' means their shares in those of the columns of one KV head, place by place.
__device__ __forceinline__ void spread(const RefinedParams &p, const RefinedGradientParams &g, SpreadShared &shared)
{
    u32 width = p.summary_width(), first_block = blockIdx.x * SPREAD_BLOCKS;
    u32 groups_of_kv_head = p.group * p.groups_of_head, kv_head = p.chunk_first / groups_of_kv_head + blockIdx.y;
    u32 first_group = max(p.chunk_first, kv_head * groups_of_kv_head);
    u32 end_group = min(p.chunk_first + p.chunk_groups, (kv_head + 1) * groups_of_kv_head);
    u32 begin = (first_group - p.chunk_first) * GROUP_TILES, end = (end_group - p.chunk_first) * GROUP_TILES;
    u32 column = blockIdx.z * SPREAD_COLUMNS + threadIdx.x, other_column = column + SPREAD_THREADS;
    // Threads beyond the last column repeat it.
    const float *of_column = g.column_gradients + min(column, width - 1);
    const float *of_other = g.column_gradients + min(other_column, width - 1);
    float sums[SPREAD_BLOCKS] = {}, other_sums[SPREAD_BLOCKS] = {};
    for (u32 first = begin; first < end; first += SPREAD_PLACES) {
        u32 count = min(SPREAD_PLACES, end - first);
        __syncthreads();
#pragma unroll
        for (u32 i = threadIdx.x; i < SPREAD_PLACES * SPREAD_BLOCKS; i += SPREAD_THREADS) {
            u32 place = i / SPREAD_BLOCKS, block = first_block + i % SPREAD_BLOCKS;
            bool there = place < count && block < p.blocks;
            ((float *)shared.shares)[i] = there ? p.block_weights[(u64)(first + place) * p.blocks + block] : 0.0f;
        }
        __syncthreads();
#pragma unroll 4
        for (u32 j = 0; j < count; ++j) {
            float x = of_column[(u64)(first + j) * width], other_x = of_other[(u64)(first + j) * width];
#pragma unroll
            for (u32 i = 0; i < SPREAD_BLOCKS / 4; ++i) {
                float4 four = shared.shares[j][i];
                const float share[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (u32 e = 0; e < 4; ++e) {
                    // What is not finite does not reach blocks without a share.
                    bool counts = share[e] != 0.0f;
                    float &sum = sums[4 * i + e], &other_sum = other_sums[4 * i + e];
                    sum = counts ? fmaf(share[e], x, sum) : sum;
                    other_sum = counts ? fmaf(share[e], other_x, other_sum) : other_sum;
                }
            }
        }
    }
    float *to = g.block_sums + ((u64)(kv_head - g.first_kv_head) * p.blocks + first_block) * width;
#pragma unroll
    for (u32 i = 0; i < SPREAD_BLOCKS; ++i) {
        if (first_block + i >= p.blocks)
            break;
        if (column < width)
            to[(u64)i * width + column] += sums[i];
        if (other_column < width)
            to[(u64)i * width + other_column] += other_sums[i];
    }
}

} // namespace hyperattn::refined

// Grid: places of the chunk; block COLUMN_THREADS.
extern "C" __global__ void __launch_bounds__(hyperattn::refined::COLUMN_THREADS)
    backward_refined_columns(const __grid_constant__ hyperattn::refined::RefinedParams p,
                             const __grid_constant__ hyperattn::BackwardParams backward,
                             const __grid_constant__ hyperattn::refined::RefinedGradientParams g)
{
    __shared__ hyperattn::refined::ColumnShared shared;
    hyperattn::refined::column_gradient(p, backward, g, shared);
}

// Grid: (ceil(blocks / SPREAD_BLOCKS), KV heads of the chunk, slices of SPREAD_COLUMNS); block SPREAD_THREADS.
extern "C" __global__ void __launch_bounds__(hyperattn::refined::SPREAD_THREADS)
    backward_refined_spread(const __grid_constant__ hyperattn::refined::RefinedParams p,
                            const __grid_constant__ hyperattn::refined::RefinedGradientParams g)
{
    __shared__ hyperattn::refined::SpreadShared shared;
    hyperattn::refined::spread(p, g, shared);
}
