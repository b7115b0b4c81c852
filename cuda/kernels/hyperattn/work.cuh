// What selection writes and attention kernels execute: tiles of queries, and for each a list of segments of keys. Every
// estimator is such a list; all of it is one online softmax.
#pragma once

#include "types.cuh"

namespace hyperattn {

// Queries of a tile, at most.
constexpr u32 TILE_ROWS = 128;

// A run of keys that all queries of a tile meet.
//
// Key number j of it has the position
//     SEGMENT_LISTED ? positions[first + j] : first + j
// and is row
//     SEGMENT_SORTED ? key_order[position] : position
// of its KV head. With both flags listed_rows[first + j] is that row too, so that nobody has to wait for the position;
// such a segment belongs to one KV head. With SEGMENT_EXTRA key j is extra column number first + j instead, which is in
// no tensor; nothing else may then be set but a weight.
struct Segment {
    u32 first;
    u32 count;
    u32 flags;
    // Added to the logits (base 2).
    float log_weight;
    // Keys whose position is in [hidden_start, hidden_end) do not count.
    u32 hidden_start;
    u32 hidden_end;
};

enum SegmentFlags : u32 {
    SEGMENT_LISTED = 1,
    SEGMENT_SORTED = 2,
    // A query sees positions below its causal limit only, see AttendParams::visible. Never with SEGMENT_SORTED.
    SEGMENT_LIMITED = 4,
    SEGMENT_EXTRA = 8,
};

// Queries that meet the same keys, of one head.
struct Tile {
    u32 batch;
    u32 head;
    // Query number i of it is row (flags & TILE_SORTED) ? query_order[first_query + i] : first_query + i of its head.
    u32 first_query;
    // 0 to TILE_ROWS; a tile of 0 is passed over.
    u32 rows;
    u32 flags;
    u32 first_segment;
    u32 segments;
    // Of TILE_COMPACT and TILE_PARTIAL; of TILE_MERGE, which is none of these, how many partials.
    u32 first_output;
};

enum TileFlags : u32 {
    TILE_SORTED = 1,
    // Of the gradients' kernels: the rows' sums go on from what is stored.
    TILE_RESUME = 2,
    // The rows' states, or sums, are stored; without it the outputs are written.
    TILE_STORE = 4,
    // Outputs are written, or states stored, in row first_output + i instead of the query's own row. Rows beyond n_q
    // are those of the heads behind, and behind the last head's those of another set of states.
    TILE_COMPACT = 8,
    // What the rows meet is not all: outputs and lse of row r go to row first_output + r (modulo 2^32) of the head's
    // partials, in a launch before that of the rows' TILE_MERGE tiles.
    TILE_PARTIAL = 16,
    // The rows' outputs are of what they have met in partials too, whose first_output is `first` of one of the segments
    // behind the tile's. A partial is rounded to the type of the outputs, so that a merged output is further from what
    // one tile would give by up to 2^-8 (bf16) or 2^-11 (f16) of the mean of the partials' absolute values, weighted by
    // exp(lse). Never with TILE_COMPACT, TILE_PARTIAL or TILE_STORE.
    TILE_MERGE = 32,
};

// The number of the orders that TILE_SORTED and SEGMENT_SORTED of a tile mean is its flags shifted right by this.
constexpr u32 TILE_ORDER_SHIFT = 8;

// Rows of partials have multiples of so many columns.
constexpr u32 PARTIAL_COLUMNS = 32;

// Rows that outputs are written to: a head's, or the partials.
struct OutputRows {
    char *values;
    i64 value_stride;
    // Null where it is not wanted.
    char *lse;
    i64 lse_stride;
};

// The state of one row in memory is (max, sum, accumulated): weights are 2^(logit - max), `sum` is theirs,
// `accumulated` that of the weighted values. A row that has met nothing has max -inf and sum 0, and its accumulated
// values are undefined.
struct AttendParams {
    View q;
    View k;
    View v;
    View out;
    // f32, natural logarithm; data is null where it is not wanted.
    View lse;
    u32 q_type;
    // Of k and v.
    u32 kv_type;
    u32 out_type;
    u32 heads_q;
    // Query heads of a KV head: query head h reads KV head h / group.
    u32 group;
    u32 n_q;
    u32 n_k;
    u32 head_dim;
    u32 value_dim;
    // Row i sees the first clamp(i + visible, 0, n_k) keys in SEGMENT_LIMITED segments.
    i32 visible;
    // Factor on products of a query and a key that gives logits in base 2.
    float scale_log2;
    u32 tile_count;
    const Tile *tiles;
    const Segment *segments;
    const u32 *positions;
    // [order][order_heads * group][n_q] and [order][order_heads][n_k], heads counted through the batch.
    const u32 *query_order;
    const u32 *key_order;
    // Rows of the keys at `positions`, only of those that SEGMENT_SORTED segments list.
    const u32 *listed_rows;
    // [extra column][head_dim] and [extra column][value_dim], elements of kv_type.
    const char *extra_keys;
    const char *extra_values;
    // [batch][heads_q][n_q], the last one times value_dim.
    float *state_max;
    float *state_sum;
    float *state_accumulated;
    // [batch][heads_q][partial_rows][columns] of out_type, and f32 without the last. In which order the columns are is
    // the attention kernel's own matter: they are as many as value_dim, rounded up to a multiple of PARTIAL_COLUMNS.
    char *partial_values;
    float *partial_lse;
    // 0 before the launch: tiles are handed out in their order.
    u32 *next_tile;
    u32 order_heads;
    u32 partial_rows;

    __device__ __forceinline__ u32 kv_head(const Tile &tile) const { return tile.head / group; }
    __device__ __forceinline__ u32 heads_kv() const { return heads_q / group; }

    __device__ __forceinline__ u32 query_row(const Tile &tile, u32 i) const
    {
        u32 position = tile.first_query + i;
        if (tile.flags & TILE_SORTED) {
            u64 earlier = (u64)(tile.flags >> TILE_ORDER_SHIFT) * (order_heads * group);
            return query_order[(earlier + tile.batch * heads_q + tile.head) * n_q + position];
        }
        return position;
    }

    // Where the outputs or the stored state of query number i go, which is row `row` of its head.
    __device__ __forceinline__ u32 output_row(const Tile &tile, u32 i, u32 row) const
    {
        return tile.flags & TILE_COMPACT    ? tile.first_output + i
               : tile.flags & TILE_PARTIAL ? tile.first_output + row
                                           : row;
    }

    // Bytes of a row of partial_values.
    __device__ __forceinline__ u32 partial_bytes() const
    {
        return (value_dim + PARTIAL_COLUMNS - 1) / PARTIAL_COLUMNS * PARTIAL_COLUMNS * (out_type == F32 ? 4 : 2);
    }

    // Number of row `row` of a head in partials with this first_output.
    __device__ __forceinline__ u64 partial_row(u32 batch, u32 head, u32 first_output, u32 row) const
    {
        return (u64)(batch * heads_q + head) * partial_rows + (u32)(first_output + row);
    }

    // What a tile's outputs are written to.
    __device__ __forceinline__ OutputRows outputs(u32 batch, u32 head, u32 flags) const
    {
        if (flags & TILE_PARTIAL) {
            u64 first = partial_row(batch, head, 0, 0);
            i64 stride = partial_bytes();
            return {partial_values + first * stride, stride, (char *)(partial_lse + first), (i64)sizeof(float)};
        }
        return {out.row(batch, head, 0), out.row_stride, lse.data ? lse.row(batch, head, 0) : nullptr, lse.row_stride};
    }

    __device__ __forceinline__ u32 limit(u32 row) const
    {
        i64 keys = (i64)row + visible;
        return keys < 0 ? 0 : keys > n_k ? n_k : (u32)keys;
    }

    // Position of key j of a segment that has no extra columns.
    __device__ __forceinline__ u32 position(const Segment &segment, u32 j) const
    {
        return segment.flags & SEGMENT_LISTED ? positions[segment.first + j] : segment.first + j;
    }

    // The order of a tile's keys, which are of this KV head.
    __device__ __forceinline__ const u32 *order_of_keys(const Tile &tile, u32 kv_head) const
    {
        u64 earlier = (u64)(tile.flags >> TILE_ORDER_SHIFT) * order_heads;
        return key_order + (earlier + tile.batch * heads_kv() + kv_head) * n_k;
    }

    // Row of key j of a segment, whose position that is, in that order.
    __device__ __forceinline__ u32 key_row(const u32 *order, const Segment &segment, u32 j, u32 position) const
    {
        if ((segment.flags & SEGMENT_SORTED) && (segment.flags & SEGMENT_LISTED))
            return listed_rows[segment.first + j];
        if (segment.flags & SEGMENT_SORTED)
            return order[position];
        return position;
    }
};

} // namespace hyperattn
