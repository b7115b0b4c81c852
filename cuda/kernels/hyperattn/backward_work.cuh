// What backward kernels execute. Tiles of queries with segments of keys (work.cuh), which give the gradient of the
// queries, and the inverse lists: tiles of keys with segments of queries, which give those of the keys and values. Each
// gradient is a sum in registers of one thread block, in the order of its lists. No TILE_SORTED tile has a segment that
// is SEGMENT_LIMITED.
//
// With the share p = 2^(logit - lse) of a pair, and dp the product of its output gradient and value:
//     dv += p dout        ds = p (dp - delta)        dq += scale ds k        dk += scale ds q
#pragma once

#include "work.cuh"

namespace hyperattn {

// What every pair of a query's row needs of it.
struct alignas(8) RowTerms {
    // lse in base 2; +infinity for a row without weight, whose shares are 0.
    float lse;
    // Product of the row's output and its gradient, less the gradient of lse.
    float delta;
};

// Keys that meet the same queries, of one KV head.
struct KeyTile {
    u32 batch;
    u32 kv_head;
    // Key number i of it has the position
    //     KEY_TILE_LISTED ? positions[first_key + i] : first_key + i
    // and is row
    //     KEY_TILE_SORTED ? key_order[position] : position
    // of its KV head. With both flags listed_rows[first_key + i] is that row too.
    u32 first_key;
    // 0 to TILE_ROWS; a tile of 0 is passed over.
    u32 rows;
    u32 flags;
    // Query heads of the group that are met, one after the other.
    u32 first_member;
    u32 members;
    // The segments of member m begin at first_segment + m * member_stride.
    u32 first_segment;
    u32 segments;
    u32 member_stride;
    // Of KEY_TILE_COMPACT.
    u32 first_output;
    // How many earlier tiles meet the same queries: the order in which the fused kernel adds to their sums.
    u32 turn;
};

enum KeyTileFlags : u32 {
    KEY_TILE_SORTED = 1,
    // The sums go on from those that are stored, of keys that have any.
    KEY_TILE_RESUME = 2,
    // The sums are stored; without it the gradients are written.
    KEY_TILE_STORE = 4,
    // Sums are stored in row first_output + i of the partial ones instead of the key's own row. Never with
    // KEY_TILE_RESUME.
    KEY_TILE_COMPACT = 8,
    KEY_TILE_LISTED = 16,
    // A key is seen by queries only whose limit is above its position, see AttendParams::visible. Never with
    // KEY_TILE_SORTED or segments of sorted queries.
    KEY_TILE_LIMITED = 32,
    // Key number i is not seen by queries at positions [hidden[2 * (first_key + i)], hidden[2 * (first_key + i) + 1]).
    KEY_TILE_HIDING = 64,
};

// Of the segments of a key tile, `first`, `count`, `log_weight` and SEGMENT_SORTED are used: runs of positions of
// queries, which are rows query_order[position] with SEGMENT_SORTED.
struct BackwardParams {
    // `out` is dq here, and state_accumulated has the stored sums of dq, [batch][heads_q][n_q][head_dim]. Like all sums
    // they are without the factor `scale`.
    AttendParams attend;
    View dout;
    View dk;
    View dv;
    // [batch][heads_q][n_q].
    const RowTerms *row_terms;
    const KeyTile *key_tiles;
    const Segment *query_segments;
    const u32 *hidden;
    // [batch][heads_kv][n_k][head_dim] and [batch][heads_kv][n_k][value_dim], of key_sums_type.
    char *key_sums;
    char *value_sums;
    // Of KEY_TILE_COMPACT.
    float *key_partials;
    float *value_partials;
    // [batch][heads_kv][n_k]: not 0 for a key whose sums are stored.
    u32 *key_stored;
    u32 dout_type;
    u32 dk_type;
    u32 dv_type;
    u32 key_tile_count;
    float scale;
    // F32, or BF16 for kernels of backward_wgmma.cuh and backward_fused.cuh.
    u32 key_sums_type;

    // Row of key i of a tile, and its position.
    __device__ __forceinline__ u32 key_position(const KeyTile &tile, u32 i) const
    {
        return tile.flags & KEY_TILE_LISTED ? attend.positions[tile.first_key + i] : tile.first_key + i;
    }

    __device__ __forceinline__ u32 key_row(const KeyTile &tile, u32 i, u32 position) const
    {
        if (!(tile.flags & KEY_TILE_SORTED))
            return position;
        if (tile.flags & KEY_TILE_LISTED)
            return attend.listed_rows[tile.first_key + i];
        return attend.key_order[(u64)(tile.batch * attend.heads_kv() + tile.kv_head) * attend.n_k + position];
    }

    // Number of a key's row among all that have sums.
    __device__ __forceinline__ u64 sums_row(const KeyTile &tile, u32 row) const
    {
        return (u64)(tile.batch * attend.heads_kv() + tile.kv_head) * attend.n_k + row;
    }

    // Where a tile with these flags stores row number `row`, and the type of its elements.
    __device__ __forceinline__ char *key_sums_of(u32 flags, u64 row) const
    {
        return flags & KEY_TILE_COMPACT ? (char *)(key_partials + row * attend.head_dim)
                                        : key_sums + row * attend.head_dim * element_bytes(key_sums_type);
    }

    __device__ __forceinline__ char *value_sums_of(u32 flags, u64 row) const
    {
        return flags & KEY_TILE_COMPACT ? (char *)(value_partials + row * attend.value_dim)
                                        : value_sums + row * attend.value_dim * element_bytes(key_sums_type);
    }

    __device__ __forceinline__ u32 sums_type_of(u32 flags) const
    {
        return flags & KEY_TILE_COMPACT ? (u32)F32 : key_sums_type;
    }

    // The first row whose limit is above a position.
    __device__ __forceinline__ u32 first_row_seeing(u32 position) const
    {
        i64 row = (i64)position + 1 - attend.visible;
        return row < 0 ? 0 : row > attend.n_q ? attend.n_q : (u32)row;
    }
};

} // namespace hyperattn
