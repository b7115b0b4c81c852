// What tiles of queries meet, for the attention kernel: near keys, the list of keys chosen, and one column for all
// that is left, the mean of the blocks that it belongs to, weighted by what the representatives give to it. With its
// log weight it is the tangent of the logarithm of the rest's sum at the representatives.
//
// Launches: sum_summaries, grid (groups of the chunk, ranges of blocks, slices of SUM_COLUMNS of a row of summaries),
// SUM_THREADS threads; refined_tiles, grid (groups of the chunk), REFINED_TILES_THREADS threads.
#pragma once

#include "refined_params.cuh"

namespace hyperattn::refined {

constexpr u32 SUM_THREADS = 128;
constexpr u32 COLUMNS_OF_THREAD = 2;
constexpr u32 SUM_COLUMNS = SUM_THREADS * COLUMNS_OF_THREAD;

// A warp has one tile.
constexpr u32 REFINED_TILES_THREADS = GROUP_TILES * 32;

// Floats from the weights of one block to those of the next: stores of neighbouring blocks meet other banks.
constexpr u32 WEIGHTS_STRIDE = GROUP_TILES + 4;

// Weights of KEY_BLOCK blocks that a thread loads: of two tiles, and for either of every sixteenth block.
constexpr u32 LOADING_THREADS = 16;
constexpr u32 TILES_OF_LOADER = GROUP_TILES / (SUM_THREADS / LOADING_THREADS);
constexpr u32 BLOCKS_OF_LOADER = KEY_BLOCK / LOADING_THREADS;

struct SumShared {
    // While the threads multiply some, they store the next.
    float4 weights[2][KEY_BLOCK * WEIGHTS_STRIDE / 4];
    u32 begin[GROUP_TILES];
    u32 end[GROUP_TILES];
};

// Sums of the summaries of a range of blocks, weighted as each tile of a group weighs them, and of the weights.
__device__ __forceinline__ void sum_summaries(const RefinedParams &p, SumShared &shared)
{
    u32 thread = threadIdx.x, in_chunk = group_by_length(p, blockIdx.x);
    u32 group = p.chunk_first + in_chunk;
    if (thread < GROUP_TILES) {
        Frame frame = frame_of(p, tile_of_group(p, group, thread));
        shared.begin[thread] = frame.chooses ? frame.first_block() : 0;
        shared.end[thread] = frame.chooses ? frame.end_block() : 0;
    }
    __syncthreads();
    u32 begin = 0xffffffffu, end = 0;
#pragma unroll
    for (u32 i = 0; i < GROUP_TILES; ++i) {
        if (shared.end[i] > 0) {
            begin = min(begin, shared.begin[i]);
            end = max(end, shared.end[i]);
        }
    }
    begin = max(begin / KEY_BLOCK * KEY_BLOCK, blockIdx.y * p.range_blocks());
    end = min(end, (blockIdx.y + 1) * p.range_blocks());
    if (begin >= end)
        return;

    u32 width = p.summary_width();
    u32 column = blockIdx.z * SUM_COLUMNS + thread, other_column = column + SUM_THREADS;
    // Threads beyond the last column repeat it.
    const float *summaries = p.summaries + (u64)kv_number(p, tile_of_group(p, group, 0)) * p.blocks * width;
    const float *of_column = summaries + min(column, width - 1), *of_other = summaries + min(other_column, width - 1);
    u32 loader = thread / LOADING_THREADS * TILES_OF_LOADER, in_loader = thread % LOADING_THREADS;
    const float *weights = p.block_weights + ((u64)in_chunk * GROUP_TILES + loader) * p.blocks;
    float loaded[TILES_OF_LOADER][BLOCKS_OF_LOADER], weight[TILES_OF_LOADER] = {};
    auto load = [&](u32 first) {
#pragma unroll
        for (u32 i = 0; i < TILES_OF_LOADER; ++i) {
#pragma unroll
            for (u32 j = 0; j < BLOCKS_OF_LOADER; ++j) {
                u32 block = first + j * LOADING_THREADS + in_loader;
                bool counts = block >= shared.begin[loader + i] && block < min(end, shared.end[loader + i]);
                loaded[i][j] = counts ? weights[(u64)i * p.blocks + block] : 0.0f;
            }
        }
    };

    float sums[GROUP_TILES] = {}, other_sums[GROUP_TILES] = {};
    load(begin);
    u32 turn = 0;
    for (u32 first = begin; first < end; first += KEY_BLOCK, turn ^= 1) {
#pragma unroll
        for (u32 i = 0; i < TILES_OF_LOADER; ++i) {
#pragma unroll
            for (u32 j = 0; j < BLOCKS_OF_LOADER; ++j) {
                u32 at = (j * LOADING_THREADS + in_loader) * WEIGHTS_STRIDE + loader + i;
                ((float *)shared.weights[turn])[at] = loaded[i][j];
                weight[i] += loaded[i][j];
            }
        }
        // Those who are here have multiplied all that the other half holds.
        __syncthreads();
        if (first + KEY_BLOCK < end)
            load(first + KEY_BLOCK);
        u32 count = min(KEY_BLOCK, end - first);
        const float *from = of_column + (u64)first * width, *from_other = of_other + (u64)first * width;
#pragma unroll 8
        for (u32 j = 0; j < count; ++j) {
            float x = from[(u64)j * width], other_x = from_other[(u64)j * width];
#pragma unroll
            for (u32 i = 0; i < GROUP_TILES / 4; ++i) {
                float4 w = shared.weights[turn][j * (WEIGHTS_STRIDE / 4) + i];
                sums[4 * i] = fmaf(w.x, x, sums[4 * i]);
                sums[4 * i + 1] = fmaf(w.y, x, sums[4 * i + 1]);
                sums[4 * i + 2] = fmaf(w.z, x, sums[4 * i + 2]);
                sums[4 * i + 3] = fmaf(w.w, x, sums[4 * i + 3]);
                other_sums[4 * i] = fmaf(w.x, other_x, other_sums[4 * i]);
                other_sums[4 * i + 1] = fmaf(w.y, other_x, other_sums[4 * i + 1]);
                other_sums[4 * i + 2] = fmaf(w.z, other_x, other_sums[4 * i + 2]);
                other_sums[4 * i + 3] = fmaf(w.w, other_x, other_sums[4 * i + 3]);
            }
        }
    }
    u64 first_sum = ((u64)in_chunk * p.ranges() + blockIdx.y) * GROUP_TILES;
#pragma unroll
    for (u32 i = 0; i < GROUP_TILES; ++i) {
        float *to = p.column_sums + (first_sum + i) * width;
        if (column < width)
            to[column] = sums[i];
        if (other_column < width)
            to[other_column] = other_sums[i];
    }
    if (blockIdx.z > 0)
        return;
#pragma unroll
    for (u32 i = 0; i < TILES_OF_LOADER; ++i) {
#pragma unroll
        for (u32 other = 1; other < LOADING_THREADS; other *= 2)
            weight[i] += __shfl_xor_sync(ALL_LANES, weight[i], other);
        if (in_loader == 0)
            p.weight_sums[first_sum + loader + i] = weight[i];
    }
}

// Writes what the tile of place `i` of the group meets.
__device__ __forceinline__ void write_records(const RefinedParams &p, const QueryTile &tile, const Frame &frame,
                                              u32 place, bool has_rest, float log_weight)
{
    u32 limited = p.flags & REFINED_CAUSAL ? (u32)SEGMENT_LIMITED : 0u;
    u32 first_segment = place * SEGMENTS_OF_TILE;
    Segment *segments = p.segments + first_segment;
    // Attention takes tiles in their order: later ones, which see more, come first.
    u32 records = p.probe_rows ? 1 : RECORDS_OF_TILE;
    Tile *to = p.tiles + (u64)(p.pass_groups * GROUP_TILES - 1 - place) * records;
    bool left_out = !tile.present || is_settled(p, tile);
    u32 next = 0, shared_segments = 0;
    for (u32 record = 0; record < records; ++record) {
        Tile written = {};
        u32 last_row = 0;
        written.batch = tile.batch;
        written.head = tile.head;
        if (!left_out && p.probe_rows) {
            u32 first = tile.index_in_pass * PROBE_ROWS;
            written.first_query = written.first_output = first;
            written.rows = PROBE_ROWS;
            written.flags = TILE_SORTED | TILE_COMPACT;
            last_row = p.probe_rows[(u64)tile.head_number * p.tiles_of_head * PROBE_ROWS + first + PROBE_ROWS - 1];
        } else if (!left_out && record * TILE_ROWS < tile.queries) {
            written.first_query = tile.first_query + record * TILE_ROWS;
            written.rows = min(tile.queries - record * TILE_ROWS, TILE_ROWS);
            last_row = written.first_query + written.rows - 1;
        }
        if (written.rows) {
            Segment near = {};
            near.first = frame.chooses ? frame.near : 0;
            near.count = p.limit(last_row) - near.first;
            near.flags = limited;
            u32 own = near.count > 0;
            if (!frame.chooses) {
                written.first_segment = first_segment + next;
                written.segments = own;
                if (own)
                    segments[next++] = near;
            } else if (record == 0) {
                // The first record has its near keys before the segments that all share, the second behind them.
                if (own)
                    segments[next++] = near;
                Segment listed = {};
                listed.first = place * p.most_positions;
                listed.count = frame.first + p.chosen[place];
                listed.flags = SEGMENT_LISTED;
                segments[next++] = listed;
                if (has_rest) {
                    Segment rest = {};
                    rest.first = place;
                    rest.count = 1;
                    rest.flags = SEGMENT_EXTRA;
                    rest.log_weight = log_weight;
                    segments[next++] = rest;
                }
                shared_segments = own;
                written.first_segment = first_segment;
                written.segments = next;
            } else {
                written.first_segment = first_segment + shared_segments;
                if (own)
                    segments[next++] = near;
                written.segments = next - shared_segments;
            }
        }
        to[record] = written;
    }
}

// Writes the extra column of a tile, which has a rest of this weight, and returns its log weight.
__device__ __forceinline__ float write_rest(const RefinedParams &p, const QueryTile &tile, u64 place, u32 place_in_pass,
                                            const float *sums, u32 ranges, float weight)
{
    u32 lane = threadIdx.x % 32, width = p.summary_width(), value_bytes = p.kv_type == F32 ? 4 : 2;
    char *key = p.extra_keys + (u64)place_in_pass * p.head_dim * value_bytes;
    char *value = p.extra_values + (u64)place_in_pass * p.value_dim * value_bytes;
    const char *representatives =
        p.representatives + (u64)tile.number * REPRESENTATIVES * p.width * p.operand_bytes();
    float products[REPRESENTATIVES] = {};
    for (u32 column = lane; column < width; column += 32) {
        float sum = 0.0f;
#pragma unroll
        for (u32 range = 0; range < MOST_RANGES; ++range)
            sum += range < ranges ? sums[(u64)range * GROUP_TILES * width + column] : 0.0f;
        float x = sum / weight;
        if (column >= p.head_dim) {
            store_rounded(value, column - p.head_dim, p.kv_type, x);
            continue;
        }
        store_rounded(key, column, p.kv_type, x);
        // As attention will read it.
        float rounded = f32_of(key, column, p.kv_type);
#pragma unroll
        for (u32 slot = 0; slot < REPRESENTATIVES; ++slot)
            products[slot] = fmaf(f32_of(representatives, slot * p.width + column, p.operand_type), rounded,
                                  products[slot]);
    }
    const float *represented = p.represented + (u64)tile.number * REPRESENTATIVES;
    const float *totals = p.totals + place * REPRESENTATIVES;
    float queries = 0.0f, mean = 0.0f;
#pragma unroll
    for (u32 slot = 0; slot < REPRESENTATIVES; ++slot) {
#pragma unroll
        for (u32 other = 1; other < 32; other *= 2)
            products[slot] += __shfl_xor_sync(ALL_LANES, products[slot], other);
        if (represented[slot] > 0.0f) {
            queries += represented[slot];
            mean += represented[slot] * (totals[slot] - products[slot] * p.scale_log2);
        }
    }
    return log2_approximately(weight) + mean / queries;
}

// Sums of the blocks that a tile chooses from, which are among those with sums.
struct Rest {
    u64 first_sum;
    u32 ranges;
    // Of all blocks.
    float weight;
};

// The rest of tile `i` of a group of the chunk, which chooses.
__device__ __forceinline__ Rest rest_of(const RefinedParams &p, const Frame &frame, u32 in_chunk, u32 i)
{
    u32 first = frame.first_block() / p.range_blocks(), end = (frame.end_block() - 1) / p.range_blocks() + 1;
    Rest rest = {((u64)in_chunk * p.ranges() + first) * GROUP_TILES + i, end - first, 0.0f};
    for (u32 range = 0; range < rest.ranges; ++range)
        rest.weight += p.weight_sums[rest.first_sum + range * GROUP_TILES];
    return rest;
}

__device__ __forceinline__ void write_tile(const RefinedParams &p)
{
    u32 i = threadIdx.x / 32, group = p.chunk_first + blockIdx.x;
    u64 place = (u64)blockIdx.x * GROUP_TILES + i;
    u32 place_in_pass = (group - p.pass_first) * GROUP_TILES + i;
    QueryTile tile = tile_of_group(p, group, i);
    Frame frame = frame_of(p, tile);
    float log_weight = negative_infinity();
    if (p.flags & REFINED_REST && frame.chooses) {
        Rest rest = rest_of(p, frame, blockIdx.x, i);
        if (rest.weight != 0.0f)
            log_weight = write_rest(p, tile, place, place_in_pass,
                                    p.column_sums + rest.first_sum * p.summary_width(), rest.ranges, rest.weight);
    }
    // Nothing has weight, or a NaN that every row sees is among the keys: rows are as the exact part makes them.
    if (threadIdx.x % 32 == 0)
        write_records(p, tile, frame, place_in_pass, is_finite(log_weight), log_weight);
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::SUM_THREADS, 5)
    sum_summaries(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::SumShared shared;
    hyperattn::refined::sum_summaries(p, shared);
}

extern "C" __global__ void __launch_bounds__(hyperattn::refined::REFINED_TILES_THREADS)
    refined_tiles(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    hyperattn::refined::write_tile(p);
}
