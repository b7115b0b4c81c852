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
};

enum PassKind : u32 {
    // The rectangle `one`.
    PASS_ONE = 0,
    // Second half of the queries against first half of the keys, of every interval of a level.
    PASS_LEVEL = 1,
    // The undivided intervals on the diagonal.
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

    // Interval `index` of `level`: its start and length within the square, and the level at which it stopped dividing.
    __device__ __forceinline__ void interval(u32 index, u32 &start, u32 &len, u32 &stopped) const
    {
        start = 0;
        len = square.len;
        stopped = level;
        for (u32 depth = 0; depth < level; depth++) {
            if (len <= square.leaf) {
                stopped = depth;
                return;
            }
            u32 half = len - len / 2;
            if (index >> (level - 1 - depth) & 1) {
                start += half;
                len -= half;
            } else {
                len = half;
            }
        }
    }

    // Rectangle number `index` of the pass, if there is one.
    __device__ __forceinline__ bool rectangle(u32 index, Rectangle &to) const
    {
        if (kind == PASS_ONE) {
            to = one;
            return index == 0;
        }
        u32 start, len, stopped;
        interval(index, start, len, stopped);
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
};

static_assert(sizeof(Pass) == 48, "the host's mirror of this struct counts on it");

} // namespace hyperattn
