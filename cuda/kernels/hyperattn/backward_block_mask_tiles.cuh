// The inverse lists of the caller's block mask: a block of keys meets the query blocks whose rows of the mask name it,
// in their order; neighbouring ones are one segment.
#pragma once

#include "backward_paper_tiles.cuh"
#include "exact_blocks.cuh"

// One warp per key block of a rectangle: grid ceil(kv_heads * rectangles * key_blocks / 4), block 128. A key block has
// key_tiles / key_blocks tiles and `lists` lists, one for each query head where these have blocks of their own, else
// one; a list has room for `room` segments, at least half of the query blocks that a rectangle meets.
extern "C" __global__ void __launch_bounds__(128)
    backward_block_mask_tiles(const __grid_constant__ hyperattn::BackwardPaperParams params,
                              const __grid_constant__ hyperattn::ExactBlocks blocks, hyperattn::u32 key_blocks,
                              hyperattn::u32 lists, hyperattn::u32 room)
{
    using namespace hyperattn;
    constexpr u32 ALL_LANES = 0xffffffffu;
    const PassTiles &common = params.common;
    u32 lane = threadIdx.x % 32, number = blockIdx.x * 4 + threadIdx.x / 32;
    if (number >= common.kv_heads * common.pass.count * key_blocks)
        return;
    u32 index = number / key_blocks % common.pass.count, set_kv_head = number / key_blocks / common.pass.count;
    u32 first_segment = number * lists * room, start = 0, end = 0, most = 0;
    Rectangle rectangle;
    if (common.rectangle(index, rectangle)) {
        u64 column = rectangle.key_start / blocks.key_block + number % key_blocks;
        u64 first = column * blocks.key_block, last = first + blocks.key_block;
        start = (u32)(first < rectangle.key_start ? rectangle.key_start
                      : first < rectangle.key_end ? first
                                                  : rectangle.key_end);
        end = last < rectangle.key_end ? (u32)last : rectangle.key_end;
        u32 rows = 0;
        if (start < end && rectangle.query_start < rectangle.query_end)
            rows = blocks.block_of(rectangle, rectangle.query_end - 1) + 1;
        for (u32 list = 0; list < lists; ++list) {
            u32 flat_head = (common.first_kv_head + set_kv_head) * common.group + list, runs = 0, before = 0;
            Segment *segments = params.segments + first_segment + list * room;
            auto named = [&](u32 block) {
                u64 row = (u64)rectangle.query_start / blocks.query_block + block;
                return block < rows && blocks.names(flat_head, row, (i64)column);
            };
            for (u32 at = 0; at < rows; at += 32) {
                u32 block = at + lane;
                bool meets = named(block);
                u32 meeting = __ballot_sync(ALL_LANES, meets);
                bool after = lane < 31 ? meeting >> (lane + 1) & 1 : named(block + 1);
                bool opens = meets && !((meeting << 1 | before) >> lane & 1);
                u32 opening = __ballot_sync(ALL_LANES, opens);
                u32 run = runs + __popc(opening & (ALL_LANES >> (31 - lane))) - 1;
                // The first one's lane writes the start, the last one's the end.
                if (opens) {
                    segments[run].first = (u32)blocks.first_query(rectangle, block);
                    segments[run].flags = 0;
                    segments[run].log_weight = 0.0f;
                }
                if (meets && !after) {
                    u64 stop = blocks.first_query(rectangle, block + 1);
                    segments[run].count = stop < rectangle.query_end ? (u32)stop : rectangle.query_end;
                }
                runs += __popc(opening);
                before = meeting >> 31;
            }
            __syncwarp();
            // All lists are as long as the longest.
            for (u32 i = lane; i < room; i += 32)
                segments[i].count = i < runs ? segments[i].count - segments[i].first : 0;
            most = runs > most ? runs : most;
        }
    }
    u32 tiles = params.key_tiles / key_blocks;
    for (u32 part = lane; part < tiles; part += 32) {
        KeyTile tile = params.empty_tile(set_kv_head);
        u64 first = start + (u64)part * TILE_ROWS;
        tile.flags = params.flags;
        tile.first_segment = first_segment;
        tile.member_stride = lists == 1 ? 0 : room;
        tile.first_key = first < end ? (u32)first : end;
        tile.rows = end - tile.first_key < TILE_ROWS ? end - tile.first_key : TILE_ROWS;
        tile.segments = most;
        params.tiles[number * tiles + part] = tile;
    }
}
