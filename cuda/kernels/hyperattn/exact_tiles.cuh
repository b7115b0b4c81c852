// The work of exact attention: every tile of queries meets the leading keys, as far as its last query sees them, at once
// or in parts.
#pragma once

#include "parts.cuh"

namespace hyperattn {

// Tile and segment number `number`, in the order in which tiles are handed out: KV heads in sections of `section`; in a
// section tile by tile, those with the most keys first; for each the section's KV heads, their query heads, and the
// parts of the keys.
__device__ __forceinline__ void exact_tile(Tile *tiles, Segment *segments, u32 number, u32 kv_heads, u32 heads_kv,
                                           u32 group, u32 n_q, u32 n_k, i32 visible, bool limited, u32 section,
                                           u32 parts)
{
    u32 index = number / parts;
    u32 tiles_of_head = (n_q + (TILE_ROWS - 1)) / TILE_ROWS;
    // A section may have more tiles than 32 bits count, but only where it is the only one.
    u64 tiles_of_section = (u64)section * group * tiles_of_head;
    u32 first_head = (u32)(index / tiles_of_section) * section;
    u32 rest = (u32)(index % tiles_of_section);
    u32 heads_here = (section < kv_heads - first_head ? section : kv_heads - first_head) * group;
    u32 rank = rest / heads_here;
    u32 head_here = rest % heads_here;
    u32 kv_head = first_head + head_here / group;

    u32 first_query = (tiles_of_head - 1 - rank) * TILE_ROWS;
    u32 rows = n_q - first_query < TILE_ROWS ? n_q - first_query : TILE_ROWS;
    u32 keys = n_k;
    if (limited) {
        i64 seen = (i64)first_query + rows - 1 + visible;
        keys = seen < 0 ? 0 : seen > n_k ? n_k : (u32)seen;
    }
    Tile tile;
    tile.batch = kv_head / heads_kv;
    tile.head = kv_head % heads_kv * group + head_here % group;
    tile.first_query = first_query;
    tile.rows = rows;
    tile.flags = 0;
    tile.first_segment = number;
    tile.segments = keys > 0 ? 1 : 0;
    tile.first_output = 0;

    Segment segment;
    segment.first = 0;
    segment.count = keys;
    segment.flags = limited ? SEGMENT_LIMITED : 0;
    segment.log_weight = 0.0f;
    segment.hidden_start = 0;
    segment.hidden_end = 0;
    take_part(tile, segment, number % parts, parts, kv_heads * group * n_q);
    tiles[number] = tile;
    segments[number] = segment;
}

} // namespace hyperattn

// A thread for each of `count` tiles. `kv_heads` are those of all batch items, `heads_kv` those of one.
extern "C" __global__ void exact_tiles(hyperattn::Tile *tiles, hyperattn::Segment *segments, hyperattn::u32 count,
                                       hyperattn::u32 kv_heads, hyperattn::u32 heads_kv, hyperattn::u32 group,
                                       hyperattn::u32 n_q, hyperattn::u32 n_k, hyperattn::i32 visible,
                                       hyperattn::u32 limited, hyperattn::u32 section, hyperattn::u32 parts)
{
    hyperattn::u32 number = blockIdx.x * blockDim.x + threadIdx.x;
    if (number < count)
        hyperattn::exact_tile(tiles, segments, number, kv_heads, heads_kv, group, n_q, n_k, visible, limited != 0,
                              section, parts);
}
