// Which keys a query of an estimated rectangle meets exactly: those of its sorted block, or of the blocks that the
// caller's mask names.
#pragma once

#include "levels.cuh"

namespace hyperattn {

// The first of the ascending columns [begin, end) that is at least `least`, or `end`.
__device__ __forceinline__ i64 first_column(const i32 *columns, i64 begin, i64 end, i64 least)
{
    while (begin < end) {
        i64 middle = begin + (end - begin) / 2;
        if (columns[middle] < least)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

// First query, counted from the rectangle's, that meets key block `block` or a later one: the query at position p meets
// the block that position p * keys / queries falls in.
__device__ __forceinline__ u32 first_query_of(u32 block, u32 block_size, u32 queries, u32 keys)
{
    u64 scaled = (u64)block * block_size * queries;
    u64 first = (scaled + keys - 1) / keys;
    return first < queries ? (u32)first : queries;
}

struct ExactBlocks {
    // The caller's compressed rows, null for none; a pattern's begin at pattern * head_stride.
    const i64 *row_offsets;
    const i32 *columns;
    u64 head_stride;
    u32 query_block;
    u32 key_block;
    // Keys of a sorted block where there is no mask, 0 for none.
    u32 block_size;
    // SEGMENT_SORTED where queries and keys of the rectangle are sorted, else 0.
    u32 sorted;

    // Whether the mask's query block `row` of a query head meets key block `column`. Heads are counted through the
    // batch.
    __device__ __forceinline__ bool names(u32 flat_head, u64 row, i64 column) const
    {
        const i64 *offsets = row_offsets + flat_head * head_stride + row;
        i64 found = first_column(columns, offsets[0], offsets[1], column);
        return found < offsets[1] && columns[found] == column;
    }

    // Number of the block of the query at a position, counted from the rectangle's first. Only where there are blocks.
    __device__ __forceinline__ u32 block_of(const Rectangle &rectangle, u32 position) const
    {
        if (row_offsets)
            return position / query_block - rectangle.query_start / query_block;
        u64 queries = rectangle.query_end - rectangle.query_start, keys = rectangle.key_end - rectangle.key_start;
        return (u32)((position - rectangle.query_start) * keys / queries / block_size);
    }

    // Position of the first query of block `block`, or of one behind it where that has none; at least query_end where
    // there is no such.
    __device__ __forceinline__ u64 first_query(const Rectangle &rectangle, u32 block) const
    {
        if (row_offsets) {
            u64 first = ((u64)rectangle.query_start / query_block + block) * query_block;
            return first < rectangle.query_start ? rectangle.query_start : first;
        }
        u32 queries = rectangle.query_end - rectangle.query_start, keys = rectangle.key_end - rectangle.key_start;
        return rectangle.query_start + first_query_of(block, block_size, queries, keys);
    }

    // Whether the query at a position meets the key at another exactly.
    __device__ __forceinline__ bool meets(
        const Rectangle &rectangle, u32 flat_head, u32 query_position, u32 key_position) const
    {
        if (row_offsets)
            return names(flat_head, query_position / query_block, key_position / key_block);
        if (block_size == 0)
            return false;
        return (key_position - rectangle.key_start) / block_size == block_of(rectangle, query_position);
    }
};

static_assert(sizeof(ExactBlocks) == 40, "the host's mirror of this struct counts on it");

} // namespace hyperattn
