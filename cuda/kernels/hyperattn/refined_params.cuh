// What the kernels of METHOD_REFINED share: the call, its scratch memory, tiles of queries and where their keys lie.
#pragma once

#include "convert.cuh"
#include "work.cuh"

namespace hyperattn::refined {

// Neighbouring keys that are summarised together.
constexpr u32 KEY_BLOCK = 64;

// Representatives of a query tile.
constexpr u32 REPRESENTATIVES = 8;

// Query tiles of one head that kernels take together: a group. The last group of a head may have less.
constexpr u32 GROUP_TILES = 16;

// Queries of a query tile, at most: those of so many tiles of the attention kernel.
constexpr u32 QUERY_TILE_ROWS = 256;
constexpr u32 RECORDS_OF_TILE = QUERY_TILE_ROWS / TILE_ROWS;
constexpr u32 SEGMENTS_OF_TILE = RECORDS_OF_TILE + 2;

// Rows of one tile that are computed exactly besides.
constexpr u32 PROBE_ROWS = 4;

// Rows of `width` elements are read in parts of 32 elements.
constexpr u32 WIDTH_UNIT = 32;

// Ranges of blocks that the rest's sums are made of, at most.
constexpr u32 MOST_RANGES = 8;

enum RefinedFlags : u32 {
    REFINED_CAUSAL = 1,
    // What is left out becomes a column.
    REFINED_REST = 2,
    // Rows of the tensor begin at multiples of 16 bytes and have a multiple of 8 elements.
    REFINED_Q_ALIGNED = 4,
    REFINED_K_ALIGNED = 8,
    REFINED_V_ALIGNED = 16,
};

// Query tiles are numbered (batch * heads_q + head) * query_tiles + index. Groups are numbered
// (batch * heads_q + head) * groups_of_head + number. A pass covers consecutive groups and ends with an attention
// launch; what it leaves for that is indexed by the tile's place in the pass. It runs in chunks, whose places index
// the scratch memory.
struct RefinedParams {
    View q;
    View k;
    View v;
    u32 q_type;
    u32 kv_type;
    // Of what tensor cores multiply, which is q's and kv's if they agree; else F32.
    u32 operand_type;
    // Elements of a row of operands: head_dim rounded up to a multiple of WIDTH_UNIT, zeros at the end.
    u32 width;
    u32 batch;
    u32 heads_q;
    u32 group;
    u32 n_q;
    u32 n_k;
    u32 head_dim;
    u32 value_dim;
    // Row i sees the first clamp(i + visible, 0, n_k) keys; n_k without a mask.
    i32 visible;
    float scale_log2;
    u32 flags;
    u32 num_first_keys;
    u32 band;
    // Keys are chosen among this many times as many.
    u32 candidates_per_key;
    // No head has a smaller budget.
    u32 least_budget;
    // Queries of all but the last tiles of a head; queries before the tile of the latest; tiles of a head.
    u32 tile_rows;
    u32 earlier_queries;
    u32 query_tiles;
    // Blocks of keys of a KV head.
    u32 blocks;
    // Bounds, for the largest budget: candidate blocks, and listed positions, of a tile.
    u32 most_candidates;
    u32 most_positions;
    // Of this pass: tiles of each head, and groups.
    u32 tiles_of_head;
    u32 groups_of_head;
    u32 pass_first;
    u32 pass_groups;
    u32 chunk_first;
    u32 chunk_groups;
    // [head][tiles_of_head]: the tiles of the pass; null for all tiles.
    const u32 *tile_list;
    // [head]. A pass over probe tiles leaves out settled heads; null otherwise.
    const u32 *budgets;
    const u32 *settled;
    // [head][tiles_of_head][PROBE_ROWS]: a pass over probe tiles is for these rows; null for all rows.
    const u32 *probe_rows;
    // Summaries [KV head][block]: mean key and mean value (f32), keys that count (f32); operands: mean key, outlier.
    float *summaries;
    float *key_counts;
    char *mean_keys;
    char *outliers;
    // [query tile][REPRESENTATIVES]: operands, and the queries that each stands for (0 beyond the last).
    char *representatives;
    float *represented;
    // Scratch of a chunk, [place].
    float *totals;
    float *starts;
    float *block_weights;
    float *outlier_weights;
    u32 *candidates;
    u32 *candidate_count;
    // The sums of summaries take the memory of the key weights, when these have been chosen from; and before those are
    // written outlier_weights may.
    float *key_weights;
    // [group][range][GROUP_TILES][summary_width()] and the same without the last.
    float *column_sums;
    float *weight_sums;
    // [group][word of 32 blocks][GROUP_TILES]: which blocks are candidates, and how many are before them.
    u32 *candidate_bits;
    u32 *candidate_ranks;
    // Of a pass, [place].
    u32 *positions;
    u32 *chosen;
    char *extra_keys;
    char *extra_values;
    Segment *segments;
    Tile *tiles;

    __device__ __forceinline__ u32 limit(u32 row) const
    {
        i64 keys = (i64)row + visible;
        return keys < 0 ? 0 : keys > n_k ? n_k : (u32)keys;
    }

    __device__ __forceinline__ u32 words() const { return (blocks + 31) / 32; }
    __device__ __forceinline__ u32 operand_bytes() const { return operand_type == F32 ? 4 : 2; }
    __device__ __forceinline__ u32 summary_width() const { return head_dim + value_dim; }

    // Blocks of a range, and ranges of a KV head's blocks.
    __device__ __forceinline__ u32 range_blocks() const
    {
        return (blocks + MOST_RANGES * KEY_BLOCK - 1) / (MOST_RANGES * KEY_BLOCK) * KEY_BLOCK;
    }
    __device__ __forceinline__ u32 ranges() const { return (blocks + range_blocks() - 1) / range_blocks(); }
};

static_assert(sizeof(RefinedParams) == 432, "the host's mirror counts on it");

// Some queries of one head.
struct QueryTile {
    u32 batch;
    u32 head;
    // batch * heads_q + head.
    u32 head_number;
    // Of all query tiles.
    u32 number;
    // Among those of its head that the pass has.
    u32 index_in_pass;
    u32 first_query;
    u32 queries;
    bool present;
};

__device__ __forceinline__ QueryTile query_tile(const RefinedParams &p, u32 head_number, u32 index)
{
    QueryTile tile;
    tile.batch = head_number / p.heads_q;
    tile.head = head_number % p.heads_q;
    tile.head_number = head_number;
    tile.number = head_number * p.query_tiles + index;
    u32 start = index * p.tile_rows;
    if (start >= p.earlier_queries) {
        tile.first_query = p.earlier_queries;
        tile.queries = p.n_q - p.earlier_queries;
    } else {
        tile.first_query = start;
        tile.queries = min(p.earlier_queries - start, p.tile_rows);
    }
    tile.index_in_pass = index;
    tile.present = true;
    return tile;
}

// Tile `i` of a group.
__device__ __forceinline__ QueryTile tile_of_group(const RefinedParams &p, u32 group, u32 i)
{
    u32 head_number = group / p.groups_of_head;
    u32 index_in_pass = group % p.groups_of_head * GROUP_TILES + i, index = index_in_pass;
    bool present = index_in_pass < p.tiles_of_head;
    if (!present)
        index = 0;
    if (p.tile_list)
        index = p.tile_list[(u64)head_number * p.tiles_of_head + index];
    QueryTile tile = query_tile(p, head_number, index);
    tile.index_in_pass = index_in_pass;
    tile.present = present;
    return tile;
}

// Group number i of the chunk where those come first whose queries see more keys under a causal mask: the later ones
// of each head, if the chunk has whole heads.
__device__ __forceinline__ u32 group_by_length(const RefinedParams &p, u32 i)
{
    if (p.chunk_groups % p.groups_of_head)
        return p.chunk_groups - 1 - i;
    u32 heads = p.chunk_groups / p.groups_of_head;
    return (i % heads + 1) * p.groups_of_head - 1 - i / heads;
}

// Where the keys that are met without being chosen lie for some queries, and how many are chosen.
struct Frame {
    // Whether keys are chosen at all; else the queries meet every key that they see, or are left out.
    bool chooses;
    // Leading keys, met by all.
    u32 first;
    // Start of the keys that each query meets as far as it sees, at a block.
    u32 near;
    u32 seen_by_all;
    u32 wanted;

    // The blocks that keys are chosen from.
    __device__ __forceinline__ u32 first_block() const { return first / KEY_BLOCK; }
    __device__ __forceinline__ u32 end_block() const { return near / KEY_BLOCK; }
};

// Keys that the queries first..end see, added up.
__device__ __forceinline__ u64 visible_pairs(const RefinedParams &p, u32 first, u32 end)
{
    i64 visible = p.visible, a = first, b = end;
    i64 low = -visible < a ? a : -visible > b ? b : -visible;
    i64 high = (i64)p.n_k - visible;
    high = high < low ? low : high > b ? b : high;
    u64 some = high > low ? (u64)(low + high - 1 + 2 * visible) * (u64)(high - low) / 2 : 0;
    return some + (u64)(b - high) * p.n_k;
}

__device__ __forceinline__ Frame frame_of(const RefinedParams &p, u32 first_query, u32 queries, u32 budget)
{
    Frame frame = {};
    u32 least = p.limit(first_query), most = p.limit(first_query + queries - 1);
    if (most <= budget)
        return frame;
    u32 far_end = p.flags & REFINED_CAUSAL ? (least > p.band ? least - p.band : 0) : least;
    frame.near = far_end / KEY_BLOCK * KEY_BLOCK;
    frame.first = min(p.num_first_keys, frame.near);
    frame.seen_by_all = least;
    u64 met = frame.first + visible_pairs(p, first_query, first_query + queries) / queries - frame.near;
    u32 left = budget > met + 1 ? budget - (u32)(met + 1) : 0;
    // One key in so many of the budget is chosen even where the first keys and the band fill it.
    frame.wanted = max(left, budget / 8);
    frame.chooses = frame.near - frame.first > frame.wanted;
    return frame;
}

// Whether a pass over probe tiles leaves the tile out.
__device__ __forceinline__ bool is_settled(const RefinedParams &p, const QueryTile &tile)
{
    return p.settled && p.settled[tile.head_number];
}

// Of a tile of a pass. Without representatives nothing can be chosen.
__device__ __forceinline__ Frame frame_of(const RefinedParams &p, const QueryTile &tile)
{
    Frame frame = {};
    if (!tile.present || is_settled(p, tile))
        return frame;
    frame = frame_of(p, tile.first_query, tile.queries, p.budgets[tile.head_number]);
    if (frame.chooses && p.represented[(u64)tile.number * REPRESENTATIVES] == 0.0f)
        frame.chooses = false;
    return frame;
}

// Blocks whose keys are looked at one by one.
__device__ __forceinline__ u32 candidate_blocks(const RefinedParams &p, const Frame &frame)
{
    u64 wanted = ((u64)p.candidates_per_key * frame.wanted + KEY_BLOCK - 1) / KEY_BLOCK;
    // One more: the block that the first keys cut is always among them.
    u32 blocks = (u32)(wanted < 8 ? 8 : wanted) + 1;
    return min(blocks, frame.end_block() - frame.first_block());
}

// KV head of a query head, over all batch items.
__device__ __forceinline__ u32 kv_number(const RefinedParams &p, const QueryTile &tile)
{
    return tile.batch * (p.heads_q / p.group) + tile.head / p.group;
}

__device__ __forceinline__ uint4 load_16_bytes(const char *from)
{
    uint4 x;
    // Volatile: conditions on which the address is valid must stay before it.
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

__device__ __forceinline__ float f32_of(const char *row, u32 column, u32 type)
{
    if (type == F32)
        return ((const float *)row)[column];
    u16 bits = ((const u16 *)row)[column];
    return type == BF16 ? f32_from_bf16(bits) : f32_from_f16(bits);
}

__device__ __forceinline__ void store_rounded(char *row, u32 column, u32 type, float x)
{
    if (type == F32)
        ((float *)row)[column] = x;
    else
        ((u16 *)row)[column] = type == BF16 ? bf16_from_f32(x) : f16_from_f32(x);
}

// Elements column..column + 8 of a row of `dim`, zeros beyond its end.
__device__ __forceinline__ void load_8(const char *row, u32 column, u32 dim, u32 type, bool aligned, float x[8])
{
    if (!aligned || column >= dim) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            x[i] = column + i < dim ? f32_of(row, column + i, type) : 0.0f;
        return;
    }
    if (type == F32) {
        uint4 a = load_16_bytes(row + 4 * column), b = load_16_bytes(row + 4 * column + 16);
        u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            x[i] = __uint_as_float(words[i]);
        return;
    }
    uint4 a = load_16_bytes(row + 2 * column);
    u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        u16 low = (u16)words[i], high = (u16)(words[i] >> 16);
        x[2 * i] = type == BF16 ? f32_from_bf16(low) : f32_from_f16(low);
        x[2 * i + 1] = type == BF16 ? f32_from_bf16(high) : f32_from_f16(high);
    }
}

__device__ __forceinline__ float exp2_approximately(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approximately(float x)
{
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ bool is_finite(float x) { return x * 0.0f == 0.0f; }

} // namespace hyperattn::refined
