// The sub-problems of a pass: one rectangle of queries and keys, or those of a level of the causal recursion, which
// follow from the square's length alone.
#pragma once

#include "types.cuh"

namespace hyperattn {

// Every query of one interval against every key of another. Positions.
struct Rectangle {
    u32 query_start;
    u32 query_end;
    u32 key_start;
    u32 key_end;
};

// Query query_start + i sees keys key_start to key_start + i. Intervals of at most `leaf` keys are not divided.
struct Square {
    u32 query_start;
    u32 key_start;
    u32 len;
    u32 leaf;

    // Interval `index` of `level`: its start and length within the square, and the level at which it stopped dividing.
    __device__ __forceinline__ void interval(u32 level, u32 index, u32 &start, u32 &length, u32 &stopped) const
    {
        start = 0;
        length = len;
        stopped = level;
        for (u32 depth = 0; depth < level; depth++) {
            if (length <= leaf) {
                stopped = depth;
                return;
            }
            u32 half = length - length / 2;
            if (index >> (level - 1 - depth) & 1) {
                start += half;
                length -= half;
            } else {
                length = half;
            }
        }
    }
};

enum PassKind : u32 {
    // The rectangle `one`.
    PASS_ONE = 0,
    // Second half of the queries against first half of the keys, of every interval of a level.
    PASS_LEVEL = 1,
    // The undivided intervals on the diagonal. Their queries meet the keys of `one` too.
    PASS_LEAVES = 2,
};

// Rectangles `first` to `first + count` of a pass.
struct Pass {
    u32 kind;
    // Times that the square has been divided to get the pass's intervals.
    u32 level;
    u32 first;
    u32 count;
    Rectangle one;
    Square square;

    // Rectangle number `index` of the pass, if there is one.
    __device__ __forceinline__ bool rectangle(u32 index, Rectangle &to) const
    {
        if (kind == PASS_ONE) {
            to = one;
            return index == 0;
        }
        u32 start, len, stopped;
        square.interval(level, index, start, len, stopped);
        u32 query = square.query_start + start, key = square.key_start + start;
        if (kind == PASS_LEVEL) {
            if (stopped < level || len <= square.leaf)
                return false;
            u32 half = len - len / 2;
            to = {query + half, query + len, key, key + half};
            return true;
        }
        // An interval that stopped early is counted once, at its first descendant.
        if (index & ((1u << (level - stopped)) - 1))
            return false;
        to = {query, query + len, key, key + len};
        return true;
    }

    // first_output of a rectangle whose tiles are TILE_PARTIAL. A head's partials are those of all levels, then those of
    // a rectangle besides. Of a level's interval, which is the square's from s to e, only the second half has some, from
    // s / 2 to e / 2.
    __device__ __forceinline__ u32 first_output(const Rectangle &rectangle, u32 levels) const
    {
        if (kind == PASS_LEVEL)
            return level_output(level, rectangle.key_start - square.key_start, rectangle.query_start);
        return levels * (square.len / 2) - rectangle.query_start;
    }

    // That of the interval which begins at `start` of the square, the queries of whose second half begin at `query`.
    __device__ __forceinline__ u32 level_output(u32 of_level, u32 start, u32 query) const
    {
        return of_level * (square.len / 2) + start / 2 - query;
    }

    // Of leaf number `index`: calls `visit` with the first_output of every level's partials.
    template <class Visit> __device__ __forceinline__ void for_each_output(u32 index, Visit visit) const
    {
        u32 start = 0, len = square.len;
        for (u32 depth = 0; depth < level && len > square.leaf; depth++) {
            u32 half = len - len / 2;
            if (index >> (level - 1 - depth) & 1) {
                visit(level_output(depth, start, square.query_start + start + half));
                start += half;
                len -= half;
            } else {
                len = half;
            }
        }
    }
};

// What one launch does for several passes, each by thread blocks of its own.
constexpr u32 PASSES_AT_ONCE = 8;

template <class Params> struct Passes {
    Params passes[PASSES_AT_ONCE];
    // Thread blocks of a pass and of those before.
    u32 end_block[PASSES_AT_ONCE];

    // The thread block's pass, and its number among the pass's blocks.
    __device__ __forceinline__ const Params &pass(u32 &block) const
    {
        u32 number = 0;
        block = blockIdx.x;
        while (blockIdx.x >= end_block[number])
            block = blockIdx.x - end_block[number++];
        return passes[number];
    }
};

static_assert(sizeof(Pass) == 48, "the host's mirror of this struct counts on it");

} // namespace hyperattn
