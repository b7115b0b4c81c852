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

// Elements of a row that a thread reads at a time, and threads that read a row together.
constexpr u32 UNIT = 8;
constexpr u32 LANES_OF_ROW = 8;

struct ColumnShared {
    float shares[QUERY_TILE_ROWS];
    float slopes[QUERY_TILE_ROWS];
    // Of every slice of the rows.
    float sums[COLUMN_THREADS * UNIT];
};

// Rows of one tensor.
struct TileRows {
    const char *data;
    i64 stride;
    u32 dim;
    u32 type;
    bool aligned;

    __device__ __forceinline__ TileRows(const View &tensor, const QueryTile &tile, u32 dim, u32 type)
        : data(tensor.row(tile.batch, tile.head, tile.first_query)), stride(tensor.row_stride), dim(dim), type(type),
          aligned(dim % UNIT == 0 && ((u64)data | (u64)stride) % 16 == 0)
    {
    }

    __device__ __forceinline__ void load(u32 row, u32 column, float x[UNIT]) const
    {
        load_8(data + row * stride, column, dim, type, aligned, x);
    }

    // This lane's part of the product of a row and another, whose elements have the type `other_type`.
    __device__ __forceinline__ float product(u32 row, const char *other, u32 other_type) const
    {
        float sum = 0.0f;
        for (u32 column = threadIdx.x % LANES_OF_ROW * UNIT; column < dim; column += LANES_OF_ROW * UNIT) {
            float x[UNIT], y[UNIT];
            load(row, column, x);
            // The workspace's rows are aligned if their lengths are.
            load_8(other, column, dim, other_type, dim % UNIT == 0, y);
#pragma unroll
            for (u32 i = 0; i < UNIT; ++i)
                sum = fmaf(x[i], y[i], sum);
        }
#pragma unroll
        for (u32 lanes = 1; lanes < LANES_OF_ROW; lanes *= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
        return sum;
    }
};

// The gradient of the extra column of a place of the chunk. The blocks' weights become their shares in the column,
// zeros where there is none.
__device__ __forceinline__ void column_gradient(const RefinedParams &p, const BackwardParams &backward,
                                                const RefinedGradientParams &g, ColumnShared &shared)
{
    u32 in_chunk = blockIdx.x / GROUP_TILES, i = blockIdx.x % GROUP_TILES;
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

    u32 value_bytes = p.kv_type == F32 ? 4 : 2;
    const char *key = p.extra_keys + (u64)place * p.head_dim * value_bytes;
    const char *value = p.extra_values + (u64)place * p.value_dim * value_bytes;
    TileRows queries(p.q, tile, p.head_dim, p.q_type);
    TileRows gradients(backward.dout, tile, p.value_dim, backward.dout_type);
    const RowTerms *row_terms = backward.row_terms + (u64)tile.head_number * p.n_q + tile.first_query;
    for (u32 first = 0; first < tile.queries; first += COLUMN_THREADS / LANES_OF_ROW) {
        // Threads beyond the last row repeat it.
        u32 row = min(first + threadIdx.x / LANES_OF_ROW, tile.queries - 1);
        float product = queries.product(row, key, p.kv_type);
        float slope = gradients.product(row, value, p.kv_type);
        RowTerms terms = row_terms[row];
        float share = exp2_approximately(fmaf(product, p.scale_log2, segment->log_weight - terms.lse));
        if (threadIdx.x % LANES_OF_ROW == 0) {
            shared.shares[row] = share;
            shared.slopes[row] = share * (slope - terms.delta);
        }
    }
    __syncthreads();
    u32 units_of_key = (p.head_dim + (UNIT - 1)) / UNIT, units = units_of_key + (p.value_dim + (UNIT - 1)) / UNIT;
    u32 slices = COLUMN_THREADS / units, slice = threadIdx.x / units, unit = threadIdx.x % units;
    if (slice < slices) {
        bool of_key = unit < units_of_key;
        TileRows rows = of_key ? queries : gradients;
        const float *factors = of_key ? shared.slopes : shared.shares;
        u32 column = (of_key ? unit : unit - units_of_key) * UNIT;
        float sums[UNIT] = {};
#pragma unroll 4
        for (u32 row = slice; row < tile.queries; row += slices) {
            float x[UNIT];
            rows.load(row, column, x);
#pragma unroll
            for (u32 e = 0; e < UNIT; ++e)
                sums[e] = fmaf(factors[row], x[e], sums[e]);
        }
#pragma unroll
        for (u32 e = 0; e < UNIT; ++e)
            shared.sums[threadIdx.x * UNIT + e] = sums[e];
    }
    __syncthreads();
    float *to = g.column_gradients + (u64)blockIdx.x * p.summary_width();
    for (u32 column = threadIdx.x; column < p.summary_width(); column += COLUMN_THREADS) {
        u32 at = column < p.head_dim ? column : units_of_key * UNIT + column - p.head_dim;
        float sum = 0.0f;
        for (u32 i = 0; i < slices; ++i)
            sum += shared.sums[i * units * UNIT + at];
        to[column] = sum;
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
