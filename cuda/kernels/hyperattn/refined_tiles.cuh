// What tiles of queries meet, for the attention kernel: near keys, the list of keys chosen, and one column for all
// that is left, the mean of the blocks that it belongs to, weighted by what the representatives give to it. With its
// log weight it is the tangent of the logarithm of the rest's sum at the representatives.
//
// Launch: refined_tiles, grid (groups of the chunk), REFINED_TILES_THREADS threads.
#pragma once

#include "refined_params.cuh"

namespace hyperattn::refined {

constexpr u32 REFINED_TILES_THREADS = 256;

// Floats from the weights of one block to those of the next: stores of neighbouring blocks meet other banks.
constexpr u32 WEIGHTS_STRIDE = GROUP_TILES + 4;

struct RefinedTilesShared {
    float4 weights[KEY_BLOCK * WEIGHTS_STRIDE / 4];
    Frame frame[GROUP_TILES];
    float weight[GROUP_TILES];
};

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
            written.first_query = first;
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

__device__ __forceinline__ void write_tiles(const RefinedParams &p, RefinedTilesShared &shared)
{
    u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    u32 group = p.chunk_first + blockIdx.x;
    u64 first_place = (u64)blockIdx.x * GROUP_TILES;
    u32 first_in_pass = (group - p.pass_first) * GROUP_TILES;
    if (thread < GROUP_TILES)
        shared.frame[thread] = frame_of(p, tile_of_group(p, group, thread));
    __syncthreads();
    u32 begin = 0xffffffffu, end = 0;
    for (u32 i = 0; i < GROUP_TILES; ++i) {
        if (shared.frame[i].chooses) {
            begin = min(begin, shared.frame[i].first_block());
            end = max(end, shared.frame[i].end_block());
        }
    }
    bool wants_rest = p.flags & REFINED_REST && end > 0;
    u32 kv = kv_number(p, tile_of_group(p, group, 0));
    u32 width = p.summary_width();
    u32 value_bytes = p.kv_type == F32 ? 4 : 2;
    for (u32 column = thread; wants_rest && column < (width + REFINED_TILES_THREADS - 1) / REFINED_TILES_THREADS *
                                                         REFINED_TILES_THREADS;
         column += REFINED_TILES_THREADS) {
        float sums[GROUP_TILES] = {};
        float weight = 0.0f;
        for (u32 first = begin / KEY_BLOCK * KEY_BLOCK; first < end; first += KEY_BLOCK) {
            u32 its = thread / 16;
            const Frame &frame = shared.frame[its];
#pragma unroll
            for (u32 i = 0; i < KEY_BLOCK / 16; ++i) {
                u32 j = i * 16 + thread % 16, block = first + j;
                bool counts = frame.chooses && block >= frame.first_block() && block < frame.end_block();
                ((float *)shared.weights)[j * WEIGHTS_STRIDE + its] =
                    counts ? p.block_weights[(first_place + its) * p.blocks + block] : 0.0f;
            }
            __syncthreads();
            u32 count = min(KEY_BLOCK, end - first);
            const float *summaries = p.summaries + ((u64)kv * p.blocks + first) * width;
            if (column < width) {
#pragma unroll 8
                for (u32 j = 0; j < count; ++j) {
                    float x = summaries[(u64)j * width + column];
#pragma unroll
                    for (u32 i = 0; i < GROUP_TILES / 4; ++i) {
                        float4 w = shared.weights[j * (WEIGHTS_STRIDE / 4) + i];
                        sums[4 * i] = fmaf(w.x, x, sums[4 * i]);
                        sums[4 * i + 1] = fmaf(w.y, x, sums[4 * i + 1]);
                        sums[4 * i + 2] = fmaf(w.z, x, sums[4 * i + 2]);
                        sums[4 * i + 3] = fmaf(w.w, x, sums[4 * i + 3]);
                    }
                }
            }
            if (column < GROUP_TILES) {
                for (u32 j = 0; j < count; ++j)
                    weight += ((const float *)shared.weights)[j * WEIGHTS_STRIDE + column];
            }
            __syncthreads();
        }
        if (column < GROUP_TILES)
            shared.weight[column] = weight;
        __syncthreads();
        if (column < width) {
            bool is_key = column < p.head_dim;
            u32 of_row = is_key ? column : column - p.head_dim, row = is_key ? p.head_dim : p.value_dim;
            char *to = is_key ? p.extra_keys : p.extra_values;
#pragma unroll
            for (u32 i = 0; i < GROUP_TILES; ++i) {
                if (shared.frame[i].chooses && shared.weight[i] != 0.0f)
                    store_rounded(to + (u64)(first_in_pass + i) * row * value_bytes, of_row, p.kv_type,
                                  sums[i] / shared.weight[i]);
            }
        }
    }
    // The columns are in memory for this block, and whatever else it wrote.
    __syncthreads();

    for (u32 i = warp; i < GROUP_TILES; i += REFINED_TILES_THREADS / 32) {
        const Frame &frame = shared.frame[i];
        QueryTile tile = tile_of_group(p, group, i);
        float log_weight = negative_infinity();
        if (wants_rest && frame.chooses && shared.weight[i] != 0.0f) {
            const char *key = p.extra_keys + (u64)(first_in_pass + i) * p.head_dim * value_bytes;
            const char *representatives =
                p.representatives + (u64)tile.number * REPRESENTATIVES * p.width * p.operand_bytes();
            const float *represented = p.represented + (u64)tile.number * REPRESENTATIVES;
            const float *totals = p.totals + (first_place + i) * REPRESENTATIVES;
            float queries = 0.0f, mean = 0.0f;
            for (u32 slot = 0; slot < REPRESENTATIVES && represented[slot] > 0.0f; ++slot) {
                float product = 0.0f;
                for (u32 column = lane; column < p.head_dim; column += 32)
                    product = fmaf(f32_of(representatives, slot * p.width + column, p.operand_type),
                                   f32_of(key, column, p.kv_type), product);
#pragma unroll
                for (u32 other = 1; other < 32; other *= 2)
                    product += __shfl_xor_sync(ALL_LANES, product, other);
                queries += represented[slot];
                mean += represented[slot] * (totals[slot] - product * p.scale_log2);
            }
            log_weight = log2_approximately(shared.weight[i]) + mean / queries;
        }
        // Nothing has weight, or a NaN that every row sees is among the keys: rows are as the exact part makes them.
        if (lane == 0)
            write_records(p, tile, frame, first_in_pass + i, is_finite(log_weight), log_weight);
    }
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::REFINED_TILES_THREADS)
    refined_tiles(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::RefinedTilesShared shared;
    hyperattn::refined::write_tiles(p, shared);
}
