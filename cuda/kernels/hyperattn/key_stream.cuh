// Hands out tiles to thread blocks and walks the keys of a tile block by block: which row each key is, whether it
// counts, and whether the logits of the block need a mask at all.
#pragma once

#include "work.cuh"

namespace hyperattn {
namespace key_stream {

// No row, or a position that no row sees: a position counts for a row when it is less than the row's limit.
constexpr u32 NO_KEY = 0xffffffffu;

enum BlockFlags : u32 {
    // Some key does not count for some row.
    BLOCK_MASKED = 1,
    // Some key may count for one row and not for another: compare positions with the rows' limits. Implies
    // BLOCK_MASKED.
    BLOCK_STRADDLES = 2,
};

// Keys [offset, offset + count) of one segment; none: the tile has no further block. It also holds what finding the
// next block takes, so that nothing of the walk stays in registers.
struct KeyBlock {
    Segment segment;
    // Number of the segment within the tile.
    u32 number;
    u32 offset;
    u32 count;
    // Keys of the segment that some row of the tile may see.
    u32 end;
    u32 flags;
};

// A key's row of the KV head (NO_KEY: to be read as zeros) and its position for comparison with limits.
struct KeyPlace {
    u32 row;
    u32 position;
};

// What a thread block keeps about its tile in shared memory. Blocks alternate between two slots.
template <u32 KEYS> struct alignas(16) TileMemory {
    u32 key_rows[2][KEYS];
    u32 key_positions[2][KEYS];
    u32 query_rows[TILE_ROWS];
    u32 limits[TILE_ROWS];
    // Of each warp's 32 rows.
    u32 lowest_limit[TILE_ROWS / 32];
    u32 highest_limit[TILE_ROWS / 32];
    KeyBlock blocks[2];
    Tile tile;
    u32 kv_head;
    u32 number;
};

// Takes the next tile and fills in what is known of its rows; false when there is none. Called by all threads, at least
// TILE_ROWS of them. Barriers before and after: memory of the tile before may be reused.
template <u32 KEYS> __device__ __forceinline__ bool claim_tile(const AttendParams &p, TileMemory<KEYS> &memory)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 number = atomicAdd(p.next_tile, 1u);
        memory.number = number;
        if (number < p.tile_count) {
            Tile tile = p.tiles[number];
            memory.tile = tile;
            memory.kv_head = p.kv_head(tile);
        }
    }
    __syncthreads();
    if (memory.number >= p.tile_count)
        return false;
    if (threadIdx.x < TILE_ROWS) {
        u32 row = NO_KEY, limit = 0, lowest = NO_KEY;
        if (threadIdx.x < memory.tile.rows) {
            row = p.query_row(memory.tile, threadIdx.x);
            limit = p.limit(row);
            lowest = limit;
        }
        memory.query_rows[threadIdx.x] = row;
        memory.limits[threadIdx.x] = limit;
        lowest = __reduce_min_sync(0xffffffffu, lowest);
        u32 highest = __reduce_max_sync(0xffffffffu, limit);
        if (threadIdx.x % 32 == 0) {
            memory.lowest_limit[threadIdx.x / 32] = lowest;
            memory.highest_limit[threadIdx.x / 32] = highest;
        }
    }
    __syncthreads();
    return true;
}

// Moves to the block after `block`.
template <u32 KEYS>
__device__ __forceinline__ void advance(const AttendParams &p, const Tile &tile, u32 lowest, u32 highest,
                                        KeyBlock &block)
{
    block.offset += block.count;
    block.count = 0;
    block.flags = 0;
    for (;;) {
        while (block.offset >= block.end) {
            ++block.number;
            if (block.number >= tile.segments)
                return;
            block.segment = p.segments[tile.first_segment + block.number];
            block.offset = 0;
            block.end = block.segment.count;
            // Positions ascend with j here, so that keys beyond every row's limit are a tail.
            if ((block.segment.flags & (SEGMENT_LIMITED | SEGMENT_LISTED)) == SEGMENT_LIMITED) {
                u32 visible = highest > block.segment.first ? highest - block.segment.first : 0;
                block.end = visible < block.end ? visible : block.end;
            }
        }
        if (block.segment.flags & (SEGMENT_LISTED | SEGMENT_EXTRA))
            break;
        u32 position = block.segment.first + block.offset;
        if (position < block.segment.hidden_start || position >= block.segment.hidden_end)
            break;
        block.offset = block.segment.hidden_end - block.segment.first;
    }

    const Segment &segment = block.segment;
    u32 left = block.end - block.offset;
    block.count = left < KEYS ? left : KEYS;
    if (block.count < KEYS)
        block.flags |= BLOCK_MASKED;
    if (segment.flags & SEGMENT_EXTRA)
        return;
    bool listed = segment.flags & SEGMENT_LISTED;
    u32 start = segment.first + block.offset;
    u32 stop = start + block.count;
    bool hides = segment.hidden_start < segment.hidden_end;
    if (hides && (listed || (segment.hidden_start < stop && segment.hidden_end > start)))
        block.flags |= BLOCK_MASKED;
    if ((segment.flags & SEGMENT_LIMITED) && (listed || stop > lowest))
        block.flags |= BLOCK_MASKED | BLOCK_STRADDLES;
}

// Place of the block's key j, `order` being that of the KV head's keys. What is read does not wait for what else is.
__device__ __forceinline__ KeyPlace place(const AttendParams &p, const u32 *order, u32 highest, const KeyBlock &block,
                                          u32 j)
{
    const Segment &segment = block.segment;
    if (j >= block.count)
        return {NO_KEY, NO_KEY};
    if (segment.flags & SEGMENT_EXTRA)
        return {segment.first + block.offset + j, 0};
    u32 position = p.position(segment, block.offset + j);
    u32 row = p.key_row(order, segment, block.offset + j, position);
    bool hidden = position >= segment.hidden_start && position < segment.hidden_end;
    // Seen by no row of the tile: its key and value must not even be read as numbers.
    hidden |= (segment.flags & SEGMENT_LIMITED) && position >= highest;
    return hidden ? KeyPlace{NO_KEY, NO_KEY} : KeyPlace{row, position};
}

// Finds the block after the one in the other slot, the tile's first one if `first`, and its key number threadIdx.x. For
// the first KEYS threads, with the other slot's block visible to them; thread 0 writes the block to the slot, whose
// readers must be through. The caller stores the place by put_key when it likes.
template <u32 KEYS>
__device__ __forceinline__ KeyPlace find_block(const AttendParams &p, TileMemory<KEYS> &memory, u32 slot, bool first)
{
    KeyBlock block = {};
    block.number = NO_KEY;
    if (!first)
        block = memory.blocks[slot ^ 1];
    u32 lowest = memory.lowest_limit[0];
    u32 highest = memory.highest_limit[0];
    for (u32 i = 1; i < TILE_ROWS / 32; ++i) {
        lowest = memory.lowest_limit[i] < lowest ? memory.lowest_limit[i] : lowest;
        highest = memory.highest_limit[i] > highest ? memory.highest_limit[i] : highest;
    }
    advance<KEYS>(p, memory.tile, lowest, highest, block);
    if (threadIdx.x == 0)
        memory.blocks[slot] = block;
    return place(p, p.order_of_keys(memory.tile, memory.kv_head), highest, block, threadIdx.x);
}

template <u32 KEYS> __device__ __forceinline__ void put_key(TileMemory<KEYS> &memory, u32 slot, KeyPlace key)
{
    memory.key_rows[slot][threadIdx.x] = key.row;
    memory.key_positions[slot][threadIdx.x] = key.position;
}

// Memory of a block's keys or values: a KV head of a tensor, or the extra columns.
struct Source {
    const char *data;
    i64 row_stride;
};

template <u32 KEYS>
__device__ __forceinline__ Source source(const TileMemory<KEYS> &memory, u32 slot, const View &tensor,
                                         const char *extra, u32 extra_row_bytes)
{
    if (memory.blocks[slot].segment.flags & SEGMENT_EXTRA)
        return {extra, (i64)extra_row_bytes};
    return {tensor.row(memory.tile.batch, memory.kv_head, 0), tensor.row_stride};
}

} // namespace key_stream
} // namespace hyperattn
