// Hands out tiles of keys to thread blocks and walks the queries of a tile block by block, as key_stream.cuh does for
// tiles of queries.
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

// From which positions of queries key i of a tile, which has a position itself, is hidden: [start, end).
__device__ __forceinline__ void hidden_queries(const BackwardParams &p, const KeyTile &tile, u32 i, u32 position,
                                               u32 &start, u32 &end)
{
    start = end = 0;
    if (tile.flags & KEY_TILE_LIMITED) {
        end = p.first_row_seeing(position);
    } else if (tile.flags & KEY_TILE_HIDING) {
        start = p.hidden[2 * ((u64)tile.first_key + i)];
        end = p.hidden[2 * ((u64)tile.first_key + i) + 1];
    }
}

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
            hidden_queries(p, tile, i, position, start, end);
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

// Moves to the block after `block`, of QUERIES queries at most; one without queries when there is none. `lowest` and
// `highest` bound the positions that are hidden from some key.
template <u32 QUERIES>
__device__ __forceinline__ void advance(const BackwardParams &p, const KeyTile &tile, u32 lowest, u32 highest,
                                        QueryBlock &block)
{
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
            return;
        u32 member = tile.first_member + block.member;
        block.segment = p.query_segments[tile.first_segment + member * tile.member_stride + block.number];
        block.offset = 0;
    }
    u32 left = block.segment.count - block.offset;
    block.count = left < QUERIES ? left : QUERIES;
    u32 start = block.segment.first + block.offset;
    if (block.count < QUERIES)
        block.flags |= BLOCK_MASKED;
    if (start < highest && start + block.count > lowest) {
        block.flags |= BLOCK_MASKED;
        if (tile.flags & KEY_TILE_LIMITED)
            block.flags |= BLOCK_STRADDLES;
    }
}

// What the walk of a tile begins with.
__device__ __forceinline__ QueryBlock before_first()
{
    QueryBlock block = {};
    // Number 0 comes next, of member 0.
    block.number = NO_KEY;
    return block;
}

// Query head that a block is of.
__device__ __forceinline__ u32 query_head(const BackwardParams &p, const KeyTile &tile, const QueryBlock &block)
{
    return tile.kv_head * p.attend.group + tile.first_member + block.member;
}

// Number of the first row of the block's query head among all query rows.
__device__ __forceinline__ u64 first_row(const BackwardParams &p, const KeyTile &tile, const QueryBlock &block)
{
    return (u64)(tile.batch * p.attend.heads_q + query_head(p, tile, block)) * p.attend.n_q;
}

// Those of no row, whose shares are 0.
__device__ __forceinline__ RowTerms no_terms() { return {__uint_as_float(0x7f800000u), 0.0f}; }

// Place of the block's query j.
__device__ __forceinline__ QueryPlace place(const BackwardParams &p, const KeyTile &tile, const QueryBlock &block,
                                            u32 j)
{
    if (j >= block.count)
        return {NO_KEY, NO_KEY, no_terms()};
    u64 first = first_row(p, tile, block);
    u32 position = block.segment.first + block.offset + j;
    u32 row = block.segment.flags & SEGMENT_SORTED ? p.attend.query_order[first + position] : position;
    return {row, position, p.row_terms[first + row]};
}

// Finds the block after the one in the other slot, the tile's first one if `first`, and its query number threadIdx.x.
// For the first QUERIES threads, with the other slot's block visible to them; thread 0 writes the block to the slot,
// whose readers must be through. The caller stores the place by put_query when it likes.
template <u32 QUERIES>
__device__ __forceinline__ QueryPlace find_block(const BackwardParams &p, TileMemory<QUERIES> &memory, u32 slot,
                                                 bool first)
{
    QueryBlock block = first ? before_first() : memory.blocks[slot ^ 1];
    u32 lowest = NO_KEY, highest = 0;
    for (u32 i = 0; i < TILE_ROWS / 32; ++i) {
        lowest = memory.lowest_hidden[i] < lowest ? memory.lowest_hidden[i] : lowest;
        highest = memory.highest_hidden[i] > highest ? memory.highest_hidden[i] : highest;
    }
    advance<QUERIES>(p, memory.tile, lowest, highest, block);
    if (threadIdx.x == 0)
        memory.blocks[slot] = block;
    return place(p, memory.tile, block, threadIdx.x);
}

template <u32 QUERIES>
__device__ __forceinline__ void put_query(TileMemory<QUERIES> &memory, u32 slot, const QueryPlace &query)
{
    memory.query_rows[slot][threadIdx.x] = query.row;
    memory.query_positions[slot][threadIdx.x] = query.position;
    memory.terms[slot][threadIdx.x] = query.terms;
}

// Whether the query at a position of a masked block counts for key i of the tile.
template <u32 QUERIES>
__device__ __forceinline__ bool sees(const TileMemory<QUERIES> &memory, u32 i, u32 position)
{
    return position != NO_KEY && position - memory.hidden_start[i] >= memory.hidden_count[i];
}

} // namespace query_stream
} // namespace hyperattn
