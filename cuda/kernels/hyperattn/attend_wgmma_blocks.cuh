// The tiles and segments of the Hopper attention kernel as its loading warps see them: blocks of keys, one after another.
#pragma once

#include "attend_wgmma_layout.cuh"

namespace hyperattn {
namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

// Registers are scarce. A warp holds words of structs with a lane one of them: those of a tile, and those of up to five
// of its segments.
constexpr u32 TILE_WORDS = sizeof(Tile) / 4;
constexpr u32 SEGMENT_WORDS = sizeof(Segment) / 4;
constexpr u32 HELD_SEGMENTS = 32 / SEGMENT_WORDS;
constexpr u32 HELD_WORDS = HELD_SEGMENTS * SEGMENT_WORDS;
// The lanes that hold segments' flags.
constexpr u32 SEGMENT_FLAGS_LANES = 0x04104104;
// Words that are added to a tile's: what warps want to know besides.
enum TileWord : u32 {
    TILE_BATCH = 0,
    TILE_HEAD = 1,
    TILE_QUERIES = 3,
    TILE_FIRST_SEGMENT = 5,
    TILE_SEGMENTS = 6,
    TILE_KV_HEAD = 8,
    // Counted through the batch.
    TILE_FLAT_KV_HEAD = 9,
    // The smallest and largest causal limit of the tile's rows.
    TILE_LOWEST_LIMIT = 10,
    TILE_HIGHEST_LIMIT = 11,
};

static_assert(TILE_WORDS == 8 && SEGMENT_WORDS == 6 && HELD_SEGMENTS == 5, "see the mask and the words' numbers");

__device__ __forceinline__ u32 word_of(u32 words, u32 lane) { return __shfl_sync(ALL_LANES, words, lane); }

__device__ __forceinline__ Tile tile_of(u32 words)
{
    return {word_of(words, 0), word_of(words, 1), word_of(words, 2), word_of(words, 3),
            word_of(words, 4), word_of(words, 5), word_of(words, 6), word_of(words, 7)};
}

// The lane's word of segments number `first` to `end`, as many as are held.
__device__ __forceinline__ u32 segment_word(const AttendParams &p, u32 first, u32 end, u32 lane)
{
    if (lane >= HELD_WORDS || lane / SEGMENT_WORDS >= end - first)
        return 0;
    return ((const u32 *)(p.segments + first))[lane];
}

// One block after another of a tile's segments.
template <u32 KEYS> struct Blocks {
    // Of the segment.
    u32 first;
    u32 flags;
    // Keys of the segment without those that lie beyond all limits.
    u32 count;
    // The next block's first key in the segment.
    u32 next_start;
    u32 next_segment;
    // Words of several segments, and the number of this one's first word.
    u32 words;
    u32 word;
    u32 tile;

    __device__ __forceinline__ float log_weight() const { return __uint_as_float(word_of(words, word + 3)); }
    __device__ __forceinline__ u32 hidden_start() const { return word_of(words, word + 4); }
    __device__ __forceinline__ u32 hidden_end() const { return word_of(words, word + 5); }
    __device__ __forceinline__ u32 lowest_limit() const { return word_of(tile, TILE_LOWEST_LIMIT); }
    __device__ __forceinline__ u32 highest_limit() const { return word_of(tile, TILE_HIGHEST_LIMIT); }
    // The block's first key in the segment.
    __device__ __forceinline__ u32 start() const { return next_start - KEYS; }

    __device__ __forceinline__ void begin(u32 tile_words, u32 segment_words)
    {
        tile = tile_words;
        next_segment = word_of(tile, TILE_FIRST_SEGMENT);
        words = segment_words;
        // One segment before.
        word = 0u - SEGMENT_WORDS;
        count = next_start = 0;
    }

    __device__ __forceinline__ bool advance(const AttendParams &p, u32 lane)
    {
        while (next_start >= count) {
            u32 end_segment = word_of(tile, TILE_FIRST_SEGMENT) + word_of(tile, TILE_SEGMENTS);
            if (next_segment == end_segment)
                return false;
            word += SEGMENT_WORDS;
            if (word == HELD_WORDS) {
                words = segment_word(p, next_segment, end_segment, lane);
                word = 0;
            }
            ++next_segment;
            next_start = 0;
            first = word_of(words, word);
            count = word_of(words, word + 1);
            flags = word_of(words, word + 2);
            if ((flags & (SEGMENT_LIMITED | SEGMENT_LISTED)) == SEGMENT_LIMITED) {
                u32 highest = highest_limit();
                u32 visible = highest > first ? highest - first : 0;
                count = visible < count ? visible : count;
            }
        }
        next_start += KEYS;
        return true;
    }

    // How many blocks from this one on have KEYS consecutive rows that all queries see.
    __device__ __forceinline__ u32 plain() const
    {
        if (flags & (SEGMENT_LISTED | SEGMENT_SORTED | SEGMENT_EXTRA))
            return 0;
        u32 at = first + start(), end = first + count;
        if (flags & SEGMENT_LIMITED)
            end = min(end, lowest_limit());
        u32 hidden_from = hidden_start();
        if (hidden_end() > at)
            end = min(end, hidden_from);
        return end > at ? (end - at) / KEYS : 0;
    }
};

// Smallest and largest causal limit of a tile's rows.
__device__ __forceinline__ void tile_limits(const AttendParams &p, const Tile &tile, u32 lane, u32 &lowest,
                                            u32 &highest)
{
    if (!(tile.flags & TILE_SORTED)) {
        lowest = p.limit(tile.first_query);
        highest = p.limit(tile.first_query + tile.rows - 1);
        return;
    }
    lowest = NO_ROW;
    highest = 0;
#pragma unroll
    for (u32 i = lane; i < TILE_ROWS; i += 32) {
        if (i < tile.rows) {
            u32 limit = p.limit(p.query_row(tile, i));
            lowest = min(lowest, limit);
            highest = max(highest, limit);
        }
    }
    lowest = __reduce_min_sync(ALL_LANES, lowest);
    highest = __reduce_max_sync(ALL_LANES, highest);
}

#endif

} // namespace hopper
} // namespace hyperattn
