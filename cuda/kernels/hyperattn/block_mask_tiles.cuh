// The tiles of a pass whose exact part is the caller's block mask: a row of the mask becomes segments of neighbouring
// key blocks, and one of the sampled keys that lie in none of them.
#pragma once

#include "paper_tiles.cuh"
#include "sample.cuh"

namespace hyperattn {

struct BlockMaskTileParams {
    PassTiles common;
    u64 seed;
    u64 offset;
    // The caller's compressed rows; a pattern's begin at pattern * head_stride.
    const i64 *row_offsets;
    const i32 *columns;
    u64 head_stride;
    // sample_size for every list of segments.
    u32 *positions;
    // Of a batch item.
    u32 heads_kv;
    // Whether every query head has a pattern of its own, and so its own lists; else they are a KV head's.
    u32 per_head;
    u32 query_block;
    u32 key_block;
    // Room of a list: at least (key blocks that a rectangle meets + 1) / 2 + 1.
    u32 segments_per_block;
    // Number of the first KV head among those that random numbers are drawn for.
    u32 first_stream_head;
};

static_assert(sizeof(BlockMaskTileParams) == 200, "the host's mirror of this struct counts on it");

} // namespace hyperattn

// One warp per list of segments: grid ceil(lists / 4), block 128, where lists = kv_heads * (per_head ? group : 1) *
// rectangles * blocks.
extern "C" __global__ void __launch_bounds__(128)
    paper_block_mask_tiles(const __grid_constant__ hyperattn::BlockMaskTileParams params)
{
    using namespace hyperattn;
    constexpr u32 ALL = 0xFFFFFFFFu;
    const PassTiles &common = params.common;
    u32 lane = threadIdx.x % 32, members = params.per_head ? 1 : common.group;
    u32 lists_per_kv_head = params.per_head ? common.group : 1;
    u32 list = blockIdx.x * 4 + threadIdx.x / 32;
    if (list >= common.kv_heads * lists_per_kv_head * common.pass.count * common.blocks)
        return;
    u32 block = list % common.blocks, index = list / common.blocks % common.pass.count;
    u32 list_head = list / common.blocks / common.pass.count;
    u32 set_kv_head = list_head / lists_per_kv_head, first_member = list_head % lists_per_kv_head;
    u32 kv_head = common.first_kv_head + set_kv_head;

    u32 start = 0, end = 0, count = 0, first_segment = common.first_segment + list * params.segments_per_block;
    Segment *segments = common.segments + first_segment;
    Rectangle rectangle = {};
    u64 row = block, key_block = params.key_block;
    bool exists = common.rectangle(index, rectangle);
    if (exists) {
        row += rectangle.query_start / params.query_block;
        u64 first = row * params.query_block, last = first + params.query_block;
        start = first > rectangle.query_start ? (first < rectangle.query_end ? (u32)first : rectangle.query_end)
                                              : rectangle.query_start;
        end = last < rectangle.query_end ? (u32)last : rectangle.query_end;
    }
    if (start < end) {
        u64 pattern = (u64)kv_head * common.group + first_member;
        const i64 *offsets = params.row_offsets + pattern * params.head_stride + row;
        i64 begin = first_column(params.columns, offsets[0], offsets[1], rectangle.key_start / key_block);
        i64 finish =
            first_column(params.columns, begin, offsets[1], (rectangle.key_end + key_block - 1) / key_block);

        // Neighbouring key blocks are one segment: the first one's lane writes its start, the last one's its end.
        u32 runs = 0, room = params.segments_per_block - 1;
        for (i64 at = begin; at < finish; at += 32) {
            i64 mine = at + lane;
            bool valid = mine < finish;
            i64 column = valid ? params.columns[mine] : -2;
            bool opens = valid && (mine == begin || params.columns[mine - 1] + 1 != column);
            bool closes = valid && (mine + 1 == finish || params.columns[mine + 1] != column + 1);
            u32 opening = __ballot_sync(ALL, opens);
            u32 run = runs + __popc(opening & (ALL >> (31 - lane))) - 1;
            if (opens && run < room) {
                u64 key = (u64)column * key_block;
                u32 clipped = key < rectangle.key_start ? rectangle.key_start : (u32)key;
                segments[run].first = clipped;
                segments[run].flags = 0;
                segments[run].log_weight = 0.0f;
                segments[run].hidden_start = 0;
                segments[run].hidden_end = 0;
            }
            if (closes && run < room) {
                u64 key = ((u64)column + 1) * key_block;
                segments[run].count = key < rectangle.key_end ? (u32)key : rectangle.key_end;
            }
            runs += __popc(opening);
        }
        runs = runs < room ? runs : room;
        __syncwarp();
        for (u32 i = lane; i < runs; i += 32)
            segments[i].count -= segments[i].first;

        u32 kept = 0, first_sample = common.first_position + list * common.sample_size;
        u32 stream_head = params.first_stream_head + kv_head % params.heads_kv;
        Stream stream(params.seed, params.offset, stream_head, PURPOSE_UNIFORM_KEY);
        for (u32 at = 0; at < common.sample_size; at += 32) {
            u32 draw = at + lane, position = 0;
            bool keep = false;
            if (draw < common.sample_size) {
                position = sampled_position(stream, rectangle, draw);
                i64 column = position / params.key_block;
                i64 found = first_column(params.columns, begin, finish, column);
                keep = found == finish || params.columns[found] != column;
            }
            u32 keeping = __ballot_sync(ALL, keep);
            if (keep)
                params.positions[first_sample + kept + __popc(keeping & ((1u << lane) - 1))] = position;
            kept += __popc(keeping);
        }
        count = runs;
        if (kept > 0) {
            if (lane == 0)
                segments[runs] = {first_sample, kept, SEGMENT_LISTED, common.weight(rectangle), 0, 0};
            count += 1;
        }
    }
    for (u32 i = lane; i < members * common.tiles_per_block; i += 32)
        common.write(
            rectangle, set_kv_head, index, block, first_member + i / common.tiles_per_block, i % common.tiles_per_block, start,
            end, first_segment, count);
}
