// The tiles and segments of the Hopper attention kernel as a loading warp sees them: its blocks of keys, one after
// another.
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
// The words of a tile that are asked for later, and words that are added to them.
enum TileWord : u32 {
    TILE_BATCH = 0,
    TILE_KV_HEAD = 8,
    // Number of the order of its keys.
    TILE_KEY_ORDER = 9,
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

// One after another of a warp's blocks, those of every LOADER_WARPS-th number in the stream of all tiles' blocks.
template <u32 KEYS> struct Blocks {
    // Of the segment.
    u32 first;
    u32 flags;
    // Keys of the segment without those that lie beyond all limits.
    u32 count;
    // Of the segment, the first key of the warp's next block. At `count` or beyond if that block is in a later segment,
    // or in a later tile: then it is as many blocks from the segment's end.
    u32 start;
    u32 next_segment;
    // Behind the tile's last segment that has keys.
    u32 end_segment;
    // Words of several segments, and the number of this one's first word.
    u32 words;
    u32 word;
    u32 tile;

    __device__ __forceinline__ float log_weight() const { return __uint_as_float(word_of(words, word + 3)); }
    __device__ __forceinline__ u32 hidden_start() const { return word_of(words, word + 4); }
    __device__ __forceinline__ u32 hidden_end() const { return word_of(words, word + 5); }
    __device__ __forceinline__ u32 lowest_limit() const { return word_of(tile, TILE_LOWEST_LIMIT); }
    __device__ __forceinline__ u32 highest_limit() const { return word_of(tile, TILE_HIGHEST_LIMIT); }
    __device__ __forceinline__ bool empty() const { return next_segment == end_segment; }
    // Whether the warp's block is the last of the tile.
    __device__ __forceinline__ bool last() const { return next_segment == end_segment && count - start <= KEYS; }

    // Keys of a segment that are not beyond all limits.
    __device__ __forceinline__ u32 keys(u32 first_key, u32 all, u32 segment_flags) const
    {
        if ((segment_flags & (SEGMENT_LIMITED | SEGMENT_LISTED)) != SEGMENT_LIMITED)
            return all;
        u32 highest = highest_limit();
        return min(all, highest > first_key ? highest - first_key : 0);
    }

    // Goes to the start of a tile of segments number `first_segment` to `end`, the words of the first ones and of the
    // last one given.
    __device__ __forceinline__ void begin(const AttendParams &p, u32 lane, u32 tile_words, u32 first_segment,
                                          u32 end, u32 segment_words, u32 last_words)
    {
        tile = tile_words;
        next_segment = first_segment;
        end_segment = end;
        words = segment_words;
        // One segment before.
        word = 0u - SEGMENT_WORDS;
        count = 0;
#pragma unroll 1
        while (!empty() && keys(word_of(last_words, 0), word_of(last_words, 1), word_of(last_words, 2)) == 0) {
            --end_segment;
            last_words = segment_word(p, empty() ? end_segment : end_segment - 1, end_segment, lane);
        }
    }

    // Goes to the warp's next block. If the tile ends before, `start` counts from the tile's end.
    __device__ __forceinline__ bool advance(const AttendParams &p, u32 lane)
    {
#pragma unroll 1
        while (start >= count) {
            start -= (count + KEYS - 1) / KEYS * KEYS;
            count = 0;
            if (empty())
                return false;
            word += SEGMENT_WORDS;
            if (word == HELD_WORDS) {
                words = segment_word(p, next_segment, end_segment, lane);
                word = 0;
            }
            ++next_segment;
            first = word_of(words, word);
            flags = word_of(words, word + 2);
            count = keys(first, word_of(words, word + 1), flags);
        }
        return true;
    }

    // Whether the block is KEYS consecutive rows that all queries see.
    __device__ __forceinline__ bool plain() const
    {
        if ((flags & (SEGMENT_LISTED | SEGMENT_SORTED | SEGMENT_EXTRA)) || count - start < KEYS)
            return false;
        u32 from = first + start, end = from + KEYS;
        if ((flags & SEGMENT_LIMITED) && end > lowest_limit())
            return false;
        u32 hidden_from = hidden_start();
        return end <= hidden_from || hidden_end() <= from;
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
