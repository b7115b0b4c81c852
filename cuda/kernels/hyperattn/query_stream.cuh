// Hands out tiles of keys to thread blocks and walks the queries of a tile block by block, as key_stream.cuh does for tiles
// of queries.
#pragma once

#include "backward_work.cuh"
#include "key_stream.cuh"

namespace hyperattn {
namespace query_stream {

using key_stream::BLOCK_MASKED;
using key_stream::BLOCK_STRADDLES;
// Stands for no row too.
using key_stream::NO_KEY;

// Queries [offset, offset + count) of one segment of one query head; none: the tile has no further block.
struct QueryBlock {
    Segment segment;
    u32 member;
    // Number of the segment within the member's.
    u32 number;
    u32 offset;
    u32 count;
    u32 flags;
};

struct QueryPlace {
    u32 row;
    u32 position;
    RowTerms terms;
};

// What a thread block keeps about its tile in shared memory. Blocks alternate between two slots.
template <u32 QUERIES> struct alignas(16) TileMemory {
    RowTerms terms[2][QUERIES];
    u32 query_rows[2][QUERIES];
    u32 query_positions[2][QUERIES];
    u32 key_rows[TILE_ROWS];
    // A key is hidden from queries at positions [start, start + count).
    u32 hidden_start[TILE_ROWS];
    u32 hidden_count[TILE_ROWS];
    // Of each warp's 32 keys.
    u32 lowest_hidden[TILE_ROWS / 32];
    u32 highest_hidden[TILE_ROWS / 32];
    QueryBlock blocks[2];
    KeyTile tile;
    u32 number;
};

// Takes the next tile and fills in what is known of its keys; false when there is none. Called by all threads, at least
// TILE_ROWS of them. Barriers before and after: memory of the tile before may be reused.
template <u32 QUERIES> __device__ __forceinline__ bool claim_tile(const BackwardParams &p, TileMemory<QUERIES> &memory)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 number = atomicAdd(p.attend.next_tile, 1u);
        memory.number = number;
        if (number < p.key_tile_count)
            memory.tile = p.key_tiles[number];
    }
    __syncthreads();
    if (memory.number >= p.key_tile_count)
        return false;
    if (threadIdx.x < TILE_ROWS) {
        const KeyTile &tile = memory.tile;
        u32 i = threadIdx.x, row = NO_KEY, start = 0, end = 0;
        if (i < tile.rows) {
            u32 position = p.key_position(tile, i);
            row = p.key_row(tile, i, position);
            if (tile.flags & KEY_TILE_LIMITED) {
                end = p.first_row_seeing(position);
            } else if (tile.flags & KEY_TILE_HIDING) {
                start = p.hidden[2 * ((u64)tile.first_key + i)];
                end = p.hidden[2 * ((u64)tile.first_key + i) + 1];
            }
        }
        memory.key_rows[i] = row;
        memory.hidden_start[i] = start;
        memory.hidden_count[i] = end > start ? end - start : 0;
        u32 lowest = __reduce_min_sync(0xffffffffu, end > start ? start : NO_KEY);
        u32 highest = __reduce_max_sync(0xffffffffu, end > start ? end : 0);
        if (i % 32 == 0) {
            memory.lowest_hidden[i / 32] = lowest;
            memory.highest_hidden[i / 32] = highest;
        }
    }
    __syncthreads();
    return true;
}

// Finds the block after the one in the other slot, the tile's first one if `first`, and its query number threadIdx.x. For
// the first QUERIES threads, with the other slot's block visible to them; thread 0 writes the block to the slot, whose
// readers must be through. The caller stores the place by put_query when it likes.
template <u32 QUERIES>
__device__ __forceinline__ QueryPlace find_block(const BackwardParams &p, TileMemory<QUERIES> &memory, u32 slot,
                                                 bool first)
{
    const KeyTile &tile = memory.tile;
    QueryBlock block = {};
    block.number = NO_KEY;
    if (!first)
        block = memory.blocks[slot ^ 1];
    block.offset += block.count;
    block.count = 0;
    block.flags = 0;
    while (block.offset >= block.segment.count) {
        ++block.number;
        if (block.number >= tile.segments) {
            block.number = 0;
            ++block.member;
        }
        if (block.member >= tile.members || tile.segments == 0)
            break;
        u32 member = tile.first_member + block.member;
        block.segment = p.query_segments[tile.first_segment + member * tile.member_stride + block.number];
        block.offset = 0;
    }
    const Segment &segment = block.segment;
    if (block.member < tile.members && tile.segments != 0) {
        u32 left = segment.count - block.offset;
        block.count = left < QUERIES ? left : QUERIES;
        u32 lowest = NO_KEY, highest = 0;
        for (u32 i = 0; i < TILE_ROWS / 32; ++i) {
            lowest = memory.lowest_hidden[i] < lowest ? memory.lowest_hidden[i] : lowest;
            highest = memory.highest_hidden[i] > highest ? memory.highest_hidden[i] : highest;
        }
        u32 start = segment.first + block.offset;
        if (block.count < QUERIES)
            block.flags |= BLOCK_MASKED;
        if (start < highest && start + block.count > lowest) {
            block.flags |= BLOCK_MASKED;
            if (tile.flags & KEY_TILE_LIMITED)
                block.flags |= BLOCK_STRADDLES;
        }
    }
    if (threadIdx.x == 0)
        memory.blocks[slot] = block;
    if (threadIdx.x >= block.count)
        return {NO_KEY, NO_KEY, {__uint_as_float(0x7f800000u), 0.0f}};
    u32 head = tile.kv_head * p.attend.group + tile.first_member + block.member;
    u64 first_row = (u64)(tile.batch * p.attend.heads_q + head) * p.attend.n_q;
    u32 position = segment.first + block.offset + threadIdx.x;
    u32 row = segment.flags & SEGMENT_SORTED ? p.attend.query_order[first_row + position] : position;
    return {row, position, p.row_terms[first_row + row]};
}

template <u32 QUERIES>
__device__ __forceinline__ void put_query(TileMemory<QUERIES> &memory, u32 slot, const QueryPlace &query)
{
    memory.query_rows[slot][threadIdx.x] = query.row;
    memory.query_positions[slot][threadIdx.x] = query.position;
    memory.terms[slot][threadIdx.x] = query.terms;
}

// Query head of the block in a slot.
template <u32 QUERIES>
__device__ __forceinline__ u32 query_head(const BackwardParams &p, const TileMemory<QUERIES> &memory, u32 slot)
{
    return memory.tile.kv_head * p.attend.group + memory.tile.first_member + memory.blocks[slot].member;
}

// Whether the query at a position of a masked block counts for key i of the tile.
template <u32 QUERIES>
__device__ __forceinline__ bool sees(const TileMemory<QUERIES> &memory, u32 i, u32 position)
{
    return position != NO_KEY && position - memory.hidden_start[i] >= memory.hidden_count[i];
}

} // namespace query_stream
} // namespace hyperattn
