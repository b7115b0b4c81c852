// What the kernels of the gradients of METHOD_REFINED share besides RefinedParams and BackwardParams.
#pragma once

#include "backward_work.cuh"
#include "refined_tiles.cuh"

namespace hyperattn::refined {

// Neighbouring keys of which a word says whether a place lists them.
constexpr u32 RANGE_KEYS = 32;

// What a place lists of a range of keys: a bit for each key, and the number of the first of them in its list.
struct alignas(8) ListedRange {
    u32 first;
    u32 keys;
};

// A set of KV heads, numbered over all batch items, has sums of its own for all keys. Places of a pass are taken in
// turns, for each of which partial sums of the listed keys are stored.
struct RefinedGradientParams {
    // [KV head of the set][n_k][head_dim] and [KV head of the set][n_k][value_dim].
    float *key_sums;
    float *value_sums;
    // [KV head of the set][block][summary_width()]: gradients of the blocks' means, key and value.
    float *block_sums;
    // [KV head of the set]: keys before it are met by queries none of which is finite.
    u32 *not_finite_limits;
    // Two for each TILE_ROWS keys of a KV head of the set, with a segment for every query head of the group.
    KeyTile *near_tiles;
    Segment *near_segments;
    // [place of the chunk][summary_width()]: gradients of the extra columns.
    float *column_gradients;
    // [place of the turn][listed_tiles].
    KeyTile *listed_tiles;
    // [place of the turn].
    Segment *listed_segments;
    // [range][place of the turn].
    ListedRange *listed_ranges;
    // [place of the turn][most_positions][head_dim] and [place of the turn][most_positions][value_dim].
    const float *key_partials;
    const float *value_partials;
    u32 first_kv_head;
    u32 kv_heads;
    // Places of the turn, of the pass.
    u32 first_place;
    u32 places;

    __device__ __forceinline__ static u32 tiles_of_place(const RefinedParams &p)
    {
        return (p.most_positions + (TILE_ROWS - 1)) / TILE_ROWS;
    }

    __device__ __forceinline__ static u32 ranges(const RefinedParams &p)
    {
        return (p.n_k + (RANGE_KEYS - 1)) / RANGE_KEYS;
    }
};

static_assert(sizeof(RefinedGradientParams) == 112, "the host's mirror counts on it");

// The segment of a place of the pass that has one of these flags, of its first tile of attention; null if none has.
__device__ __forceinline__ const Segment *segment_with(const RefinedParams &p, u32 place, u32 flag)
{
    const Tile &tile = p.tiles[(u64)(p.pass_groups * GROUP_TILES - 1 - place) * RECORDS_OF_TILE];
    if (tile.rows == 0)
        return nullptr;
    for (u32 i = 0; i < tile.segments; ++i) {
        if (p.segments[tile.first_segment + i].flags & flag)
            return &p.segments[tile.first_segment + i];
    }
    return nullptr;
}

} // namespace hyperattn::refined
