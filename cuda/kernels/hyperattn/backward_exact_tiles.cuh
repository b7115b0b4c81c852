// The inverse lists of exact attention: every tile of keys meets the queries from the first one on that sees a key of
// it.
#pragma once

#include "backward_work.cuh"

// A thread for each of `count` tiles, whose segment is that of the same number; tile by tile of a section of KV heads,
// those with the most queries first. `kv_heads` are those of all batch items, `heads_kv` those of one.
extern "C" __global__ void backward_exact_tiles(hyperattn::KeyTile *tiles, hyperattn::Segment *segments,
                                                hyperattn::u32 count, hyperattn::u32 kv_heads, hyperattn::u32 heads_kv,
                                                hyperattn::u32 group, hyperattn::u32 n_q, hyperattn::u32 n_k,
                                                hyperattn::i32 visible, hyperattn::u32 limited, hyperattn::u32 section)
{
    using namespace hyperattn;
    u32 number = blockIdx.x * blockDim.x + threadIdx.x;
    if (number >= count)
        return;
    u32 tiles_of_head = (n_k + (TILE_ROWS - 1)) / TILE_ROWS;
    u64 tiles_of_section = (u64)section * tiles_of_head;
    u32 first_head = (u32)(number / tiles_of_section) * section, rest = (u32)(number % tiles_of_section);
    u32 heads_here = section < kv_heads - first_head ? section : kv_heads - first_head;
    u32 kv_head = first_head + rest % heads_here, first_key = rest / heads_here * TILE_ROWS;
    i64 first_row = limited ? (i64)first_key + 1 - visible : 0;
    first_row = first_row < 0 ? 0 : first_row > n_q ? n_q : first_row;

    KeyTile tile = {};
    tile.batch = kv_head / heads_kv;
    tile.kv_head = kv_head % heads_kv;
    tile.first_key = first_key;
    tile.rows = n_k - first_key < TILE_ROWS ? n_k - first_key : TILE_ROWS;
    tile.flags = limited ? KEY_TILE_LIMITED : 0;
    tile.members = group;
    tile.first_segment = number;
    tile.segments = first_row < n_q;
    tile.turn = rest / heads_here;
    tiles[number] = tile;
    segments[number] = {(u32)first_row, n_q - (u32)first_row, 0, 0.0f, 0, 0};
}
