// How much weight representatives give to mean keys, outliers and keys, on tensor cores: the representatives of two
// tiles, eight of each, are the rows of mma.m16n8k16, and eight keys its columns. Registers of both operands take
// elements in the same order, so that a lane reads 16 bytes of a row at once: part j of a row is elements
// 32j..32j + 32, of which lane t of four has 8t..8t + 8, two for each of the four registers of two products.
//
// TYPE is F16 or BF16, PARTS the parts of a row: width / 32.
// Launches: total_weights_TYPE_PARTS, grid (groups of the chunk), and weigh_blocks_TYPE_PARTS, grid (groups of the chunk,
// slices of the blocks), WEIGH_BLOCKS_THREADS threads;
// weigh_keys_TYPE_PARTS, grid (blocks of keys or fewer, heads of the chunk), WEIGH_KEYS_THREADS threads.
#pragma once

#include "refined_params.cuh"

namespace hyperattn::refined {

// Base-2 logarithm of the largest weight: a sum of millions of them times a value is finite.
constexpr float MOST_WEIGHT = 60.0f;

// A weight relative to `start`; with infinity the representative gives none. NaN counts as the largest weight: such a
// key must not be overlooked.
__device__ __forceinline__ float weight_of(float product, float scale, float start)
{
    return exp2_approximately(fminf(fmaf(product, scale, -start), MOST_WEIGHT));
}

// Sums of 2^logit relative to a running maximum.
struct RunningSum {
    float max;
    float sum;

    __device__ __forceinline__ void empty()
    {
        max = negative_infinity();
        sum = 0.0f;
    }

    __device__ __forceinline__ void rescale(float to, float &origin)
    {
        // With nothing but -inf so far every weight must be 0, not exp(-inf + inf).
        origin = to == negative_infinity() ? 0.0f : to;
        sum *= exp2_approximately(max - origin);
        max = to;
    }

    __device__ __forceinline__ void add(float a, float b)
    {
        float origin;
        rescale(fmaxf(max, fmaxf(a, b)), origin);
        sum += exp2_approximately(a - origin) + exp2_approximately(b - origin);
    }

    __device__ __forceinline__ void add(const RunningSum &other)
    {
        float origin;
        rescale(fmaxf(max, other.max), origin);
        sum += other.sum * exp2_approximately(other.max - origin);
    }

    __device__ __forceinline__ float log2_sum() const
    {
        return sum == 0.0f ? negative_infinity() : max + log2_approximately(sum);
    }
};

// What the logits of a representative are relative to, from the logarithm of its sum over all keys; each weighs as
// much as the queries that it stands for.
__device__ __forceinline__ float start_of(float total, float queries, float represented)
{
    // One that may weigh no key has no share in anything.
    bool weighs = represented > 0.0f && total > negative_infinity();
    return weighs ? total + log2_approximately(queries / represented) : infinity();
}

template <u32 TYPE>
__device__ __forceinline__ void multiply_add(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
    if constexpr (TYPE == BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Lane g * 4 + t has row g of eight keys and row g of the representatives of either tile. Of the products it has those
// of these two with keys 2t and 2t + 1: [0] and [1] of the first tile's, [2] and [3] of the second's.
template <u32 PARTS> struct KeyRow {
    uint4 part[PARTS];
};

template <u32 PARTS> struct Representing {
    uint4 first[PARTS];
    uint4 second[PARTS];
};

// Products with COUNT times eight keys; those of different keys do not wait for each other.
template <u32 TYPE, u32 PARTS, u32 COUNT>
__device__ __forceinline__ void multiply(const Representing<PARTS> &queries, const KeyRow<PARTS> keys[COUNT],
                                         float c[COUNT][4])
{
#pragma unroll
    for (u32 n = 0; n < COUNT; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            c[n][i] = 0.0f;
    }
#pragma unroll
    for (u32 j = 0; j < PARTS; ++j) {
        const uint4 &a = queries.first[j], &b = queries.second[j];
#pragma unroll
        for (u32 n = 0; n < COUNT; ++n)
            multiply_add<TYPE>(c[n], a.x, b.x, a.y, b.y, keys[n].part[j].x, keys[n].part[j].y);
#pragma unroll
        for (u32 n = 0; n < COUNT; ++n)
            multiply_add<TYPE>(c[n], a.z, b.z, a.w, b.w, keys[n].part[j].z, keys[n].part[j].w);
    }
}

// Sixteen rows of operands; `from` is the lane's part of the first eight.
template <u32 PARTS> __device__ __forceinline__ void load_operands(const char *from, KeyRow<PARTS> rows[2])
{
#pragma unroll
    for (u32 n = 0; n < 2; ++n) {
#pragma unroll
        for (u32 j = 0; j < PARTS; ++j)
            rows[n].part[j] = load_16_bytes(from + n * (8 * PARTS * 64) + j * 64);
    }
}

// Eight elements of a row of 16-bit elements as they are, zeros beyond its end.
__device__ __forceinline__ uint4 load_elements(const char *row, u32 column, u32 dim, bool aligned)
{
    if (aligned && column < dim)
        return load_16_bytes(row + 2 * column);
    u64 halves[2] = {};
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        // Slow and short: few calls have such rows.
#pragma unroll 1
        for (u32 i = 0; i < 4 && column + 4 * half + i < dim; ++i)
            halves[half] |= (u64)((const u16 *)row)[column + 4 * half + i] << 16 * i;
    }
    uint4 x;
    x.x = (u32)halves[0];
    x.y = (u32)(halves[0] >> 32);
    x.z = (u32)halves[1];
    x.w = (u32)(halves[1] >> 32);
    return x;
}

// A row of the keys.
template <u32 PARTS>
__device__ __forceinline__ void load_key(const RefinedParams &p, const char *row, KeyRow<PARTS> &key)
{
    u32 t = threadIdx.x % 4;
    bool aligned = p.flags & REFINED_K_ALIGNED;
#pragma unroll
    for (u32 j = 0; j < PARTS; ++j)
        key.part[j] = load_elements(row, j * 32 + t * 8, p.head_dim, aligned);
}

template <u32 PARTS>
__device__ __forceinline__ void load_representatives(const RefinedParams &p, u32 first_tile, u32 second_tile,
                                                     Representing<PARTS> &queries)
{
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const char *first = p.representatives + ((u64)first_tile * REPRESENTATIVES + g) * (PARTS * 64) + t * 16;
    const char *second = p.representatives + ((u64)second_tile * REPRESENTATIVES + g) * (PARTS * 64) + t * 16;
#pragma unroll
    for (u32 j = 0; j < PARTS; ++j) {
        queries.first[j] = load_16_bytes(first + j * 64);
        queries.second[j] = load_16_bytes(second + j * 64);
    }
}

// One of two sums over a pair of lanes in each of them.
__device__ __forceinline__ float add_pair(float lower, float upper, u32 distance)
{
    bool is_upper = threadIdx.x & distance;
    float kept = is_upper ? upper : lower, given = is_upper ? lower : upper;
    return kept + __shfl_xor_sync(ALL_LANES, given, distance);
}

// Weights that the representatives of two tiles give to sixteen keys, those of a tile added up: the lane has that of
// tile weighing_tile() for key weighed_key().
__device__ __forceinline__ float add_weights(const float c[2][4], float scale, const float start[2])
{
    float of_half[2];
#pragma unroll
    for (u32 n = 0; n < 2; ++n) {
        float of_key[2];
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
            of_key[i] = add_pair(weight_of(c[n][i], scale, start[0]), weight_of(c[n][2 + i], scale, start[1]), 4);
        of_half[n] = add_pair(of_key[0], of_key[1], 8);
    }
    return add_pair(of_half[0], of_half[1], 16);
}

__device__ __forceinline__ u32 weighing_tile() { return threadIdx.x / 4 % 2; }

__device__ __forceinline__ u32 weighed_key()
{
    return threadIdx.x / 16 % 2 * 8 + threadIdx.x % 4 * 2 + threadIdx.x / 8 % 2;
}

constexpr u32 TILES_OF_WARP = 2;
constexpr u32 WEIGH_BLOCKS_THREADS = GROUP_TILES / TILES_OF_WARP * 32;

// Thread blocks that a multiprocessor is to hold, by the registers that they need.
template <u32 PARTS> constexpr u32 WEIGH_BLOCKS_BLOCKS = PARTS <= 4 ? 2 : 1;

// The same for total_weights, and the steps of sixteen mean keys that it reads ahead: it goes through all of them one after
// the other, and mostly with few thread blocks.
template <u32 PARTS> constexpr u32 TOTAL_WEIGHTS_BLOCKS = PARTS <= 3 ? 2 : 1;
template <u32 PARTS> constexpr u32 TOTAL_WEIGHTS_AHEAD = PARTS <= 6 ? 2 : 1;

// Adds keys, one by one, to the sums of tile u of two: the first ones, and those near.
template <u32 TYPE, u32 PARTS>
__device__ __forceinline__ void add_keys(const RefinedParams &p, const char *rows, const Frame &frame,
                                         const Representing<PARTS> &queries, u32 u, RunningSum sums[2])
{
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
    for (u32 part = 0; part < 2; ++part) {
        u32 from = part ? frame.near : 0, to = part ? frame.seen_by_all : frame.first;
#pragma unroll 1
        for (u32 first = from; first < to; first += 16) {
            KeyRow<PARTS> keys[2];
            load_key<PARTS>(p, rows + min(first + g, to - 1) * p.k.row_stride, keys[0]);
            load_key<PARTS>(p, rows + min(first + g + 8, to - 1) * p.k.row_stride, keys[1]);
            float c[2][4];
            multiply<TYPE, PARTS, 2>(queries, keys, c);
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                u32 low = first + t * 2 + i, high = low + 8;
                sums[i].add(low < to ? c[0][2 * u + i] * p.scale_log2 : negative_infinity(),
                            high < to ? c[1][2 * u + i] * p.scale_log2 : negative_infinity());
            }
        }
    }
}

// The two tiles of a group that a warp weighs blocks for, and the blocks that they choose from.
struct WeighedTiles {
    QueryTile tile[TILES_OF_WARP];
    Frame frame[TILES_OF_WARP];
    u64 place[TILES_OF_WARP];

    __device__ __forceinline__ WeighedTiles(const RefinedParams &p)
    {
        u32 in_chunk = group_by_length(p, blockIdx.x), first = threadIdx.x / 32 * TILES_OF_WARP;
#pragma unroll
        for (u32 u = 0; u < TILES_OF_WARP; ++u) {
            tile[u] = tile_of_group(p, p.chunk_first + in_chunk, first + u);
            frame[u] = frame_of(p, tile[u]);
            place[u] = (u64)in_chunk * GROUP_TILES + first + u;
        }
    }

    // One behind the last block that tile u chooses from, 0 if it does not choose.
    __device__ __forceinline__ u32 end(u32 u) const { return frame[u].chooses ? frame[u].end_block() : 0; }
    __device__ __forceinline__ u32 end() const { return max(end(0), end(1)); }
};

// Totals and starts of each tile of a group. Sixteen blocks at a time; those beyond the last are not any that count,
// but memory of the workspace.
template <u32 TYPE, u32 PARTS> __device__ __forceinline__ void total_weights(const RefinedParams &p)
{
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    WeighedTiles tiles(p);
    u32 its_end[TILES_OF_WARP] = {tiles.end(0), tiles.end(1)}, end = tiles.end();
    if (end == 0)
        return;
    Representing<PARTS> queries;
    load_representatives<PARTS>(p, tiles.tile[0].number, tiles.tile[1].number, queries);
    // Of the representatives g and blocks 2t, 2t + 1: sums over all keys, estimated from the mean keys.
    RunningSum sums[TILES_OF_WARP][2];
    const char *keys = p.k.row(tiles.tile[0].batch, tiles.tile[0].head / p.group, 0);
#pragma unroll
    for (u32 u = 0; u < TILES_OF_WARP; ++u) {
        sums[u][0].empty();
        sums[u][1].empty();
        if (tiles.frame[u].chooses)
            add_keys<TYPE, PARTS>(p, keys, tiles.frame[u], queries, u, sums[u]);
    }
    u64 first_of_head = (u64)kv_number(p, tiles.tile[0]) * p.blocks;
    const char *means = p.mean_keys + (first_of_head + g) * (PARTS * 64) + t * 16;
    const float *counts = p.key_counts + first_of_head;

    constexpr u32 AHEAD = TOTAL_WEIGHTS_AHEAD<PARTS>;
    KeyRow<PARTS> rows[AHEAD][2];
    float count[AHEAD][4];
    auto load = [&](u32 first, u32 slot) {
        load_operands<PARTS>(means + (u64)first * (PARTS * 64), rows[slot]);
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            count[slot][i] = counts[first + i / 2 * 8 + t * 2 + i % 2];
    };
    // `first` is before `end`.
    auto add = [&](u32 first, u32 slot) {
        float c[2][4], log_count[4];
        multiply<TYPE, PARTS, 2>(queries, rows[slot], c);
        // A block without keys has -inf.
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            log_count[i] = log2_approximately(count[slot][i]);
        if (first + AHEAD * 16 < end)
            load(first + AHEAD * 16, slot);
#pragma unroll
        for (u32 u = 0; u < TILES_OF_WARP; ++u) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                u32 low = first + t * 2 + i, high = low + 8;
                sums[u][i].add(
                    low < its_end[u] ? fmaf(c[0][2 * u + i], p.scale_log2, log_count[i]) : negative_infinity(),
                    high < its_end[u] ? fmaf(c[1][2 * u + i], p.scale_log2, log_count[2 + i]) : negative_infinity());
            }
        }
    };
    load(0, 0);
    if (AHEAD > 1 && 16 < end)
        load(16, AHEAD - 1);
#pragma unroll 1
    for (u32 first = 0; first < end; first += AHEAD * 16) {
        add(first, 0);
        if (AHEAD > 1 && first + 16 < end)
            add(first + 16, AHEAD - 1);
    }

#pragma unroll
    for (u32 u = 0; u < TILES_OF_WARP; ++u) {
        const float *represented = p.represented + (u64)tiles.tile[u].number * REPRESENTATIVES;
        float number = 0.0f;
#pragma unroll
        for (u32 slot = 0; slot < REPRESENTATIVES; ++slot)
            number += represented[slot];
        RunningSum sum = sums[u][0];
        sum.add(sums[u][1]);
#pragma unroll
        for (u32 other = 1; other < 4; other *= 2) {
            RunningSum its;
            its.max = __shfl_xor_sync(ALL_LANES, sum.max, other);
            its.sum = __shfl_xor_sync(ALL_LANES, sum.sum, other);
            sum.add(its);
        }
        // The last bits depend on the order of addition: one lane's are for all.
        if (t == 0 && its_end[u] > 0) {
            float total = sum.log2_sum();
            p.totals[tiles.place[u] * REPRESENTATIVES + g] = total;
            p.starts[tiles.place[u] * REPRESENTATIVES + g] = start_of(total, number, represented[g]);
        }
    }
}

// The weights of a slice of blocks for each tile of a group: by their mean keys, and with their outliers. Sixteen blocks
// at a time, as above.
template <u32 TYPE, u32 PARTS> __device__ __forceinline__ void weigh_blocks(const RefinedParams &p)
{
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    WeighedTiles tiles(p);
    u32 slice = (p.blocks + gridDim.y * 16 - 1) / (gridDim.y * 16) * 16;
    u32 end = min(tiles.end(), (blockIdx.y + 1) * slice), begin = end;
    float start[TILES_OF_WARP];
#pragma unroll
    for (u32 u = 0; u < TILES_OF_WARP; ++u) {
        start[u] = infinity();
        if (tiles.frame[u].chooses) {
            begin = min(begin, tiles.frame[u].first_block());
            start[u] = p.starts[tiles.place[u] * REPRESENTATIVES + g];
        }
    }
    u32 first = max(begin / 16 * 16, blockIdx.y * slice);
    if (first >= end)
        return;
    // What the lane's tile needs of its frame.
    u32 its = weighing_tile();
    const Frame &frame = its ? tiles.frame[1] : tiles.frame[0];
    u32 its_end = its ? tiles.end(1) : tiles.end(0);
    u32 cut_block = frame.first % KEY_BLOCK ? frame.first_block() : 0xffffffffu;
    u64 first_weight = (its ? tiles.place[1] : tiles.place[0]) * p.blocks;
    float *mean_weights = p.block_weights + first_weight, *outlier_weights = p.outlier_weights + first_weight;

    Representing<PARTS> queries;
    load_representatives<PARTS>(p, tiles.tile[0].number, tiles.tile[1].number, queries);
    u64 first_of_head = (u64)kv_number(p, tiles.tile[0]) * p.blocks;
    u64 of_lane = (first_of_head + g) * (PARTS * 64) + t * 16;
    const char *means = p.mean_keys + of_lane, *outliers = p.outliers + of_lane;
    const float *counts = p.key_counts + first_of_head;
    KeyRow<PARTS> rows[2];
    load_operands<PARTS>(means + (u64)first * (PARTS * 64), rows);
    float next_count = counts[first + weighed_key()];
    for (; first < end; first += 16) {
        u32 block = first + weighed_key();
        bool more = first + 16 < end;
        float count = next_count, c[2][4];
        multiply<TYPE, PARTS, 2>(queries, rows, c);
        load_operands<PARTS>(outliers + (u64)first * (PARTS * 64), rows);
        if (more)
            next_count = counts[block + 16];
        float mean = add_weights(c, p.scale_log2, start) * count;
        multiply<TYPE, PARTS, 2>(queries, rows, c);
        if (more)
            load_operands<PARTS>(means + (u64)(first + 16) * (PARTS * 64), rows);
        float outlier = fmaf(add_weights(c, p.scale_log2, start), fminf(count, 1.0f), mean);
        // The block that the first keys cut is looked into: their part of it is met already.
        if (block == cut_block)
            outlier = __uint_as_float(0x7f7fffffu);
        if (block < its_end) {
            mean_weights[block] = mean;
            outlier_weights[block] = outlier;
        }
    }
}

constexpr u32 WEIGH_KEYS_THREADS = 128;
constexpr u32 WEIGH_KEYS_WARPS = WEIGH_KEYS_THREADS / 32;

// As above.
template <u32 PARTS> constexpr u32 WEIGH_KEYS_BLOCKS = PARTS <= 4 ? 4 : 3;

// Tiles that are looked through at a time, and by a thread.
constexpr u32 LOOK_TILES = 1024;
constexpr u32 LOOKS = 4;

struct WeighKeysShared {
    // Numbers of the tiles of which the block is a candidate, and its places among the key weights.
    u32 tile[LOOK_TILES];
    u32 place[LOOK_TILES];
    u32 rank[LOOK_TILES];
    u32 found;
};

// The representatives of tiles i and i + 1 of those found, and what the weights that they give are relative to; the
// last tile again where there is no other.
template <u32 PARTS>
__device__ __forceinline__ void load_pair(const RefinedParams &p, const WeighKeysShared &shared, u32 i, u32 found,
                                          Representing<PARTS> &queries, float start[2])
{
    u32 other = min(i + 1, found - 1), g = threadIdx.x % 32 / 4;
    load_representatives<PARTS>(p, shared.tile[i], shared.tile[other], queries);
    start[0] = p.starts[(u64)shared.place[i] * REPRESENTATIVES + g];
    start[1] = p.starts[(u64)shared.place[other] * REPRESENTATIVES + g];
}

// The weights of a block's keys for all tiles of one head in the chunk of which it is a candidate. The keys stay in
// registers, and the tiles' representatives, which are fewer, pass by.
template <u32 TYPE, u32 PARTS>
__device__ __forceinline__ void weigh_keys(const RefinedParams &p, WeighKeysShared &shared, u32 head, u32 block)
{
    // So many groups of 16 keys does a warp hold; the warps that hold the others of the block are its peers.
    constexpr u32 HELD = PARTS <= 2 ? 4 : PARTS <= 4 ? 2 : 1;
    constexpr u32 PEERS = 4 / HELD;
    constexpr u32 STREAMS = WEIGH_KEYS_WARPS / PEERS;
    u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    u32 first_group = max(p.chunk_first, head * p.groups_of_head);
    u32 end_group = min(p.chunk_first + p.chunk_groups, (head + 1) * p.groups_of_head);
    if (first_group >= end_group)
        return;
    u32 places = (end_group - first_group) * GROUP_TILES, first_place = (first_group - p.chunk_first) * GROUP_TILES;
    u32 word = block / 32, bit = 1u << block % 32;
    u32 first_key = warp % PEERS * (HELD * 16);
    KeyRow<PARTS> keys[HELD * 2];
    bool loaded = false;

    for (u32 looked = 0; looked < places; looked += LOOK_TILES) {
        if (threadIdx.x == 0)
            shared.found = 0;
        __syncthreads();
        u32 look_end = min(places, looked + LOOK_TILES);
        for (u32 first = looked + threadIdx.x; first < look_end; first += LOOKS * WEIGH_KEYS_THREADS) {
            u32 bits[LOOKS];
            auto at = [&](u32 place) {
                return ((u64)(place / GROUP_TILES) * p.words() + word) * GROUP_TILES + place % GROUP_TILES;
            };
#pragma unroll
            for (u32 i = 0; i < LOOKS; ++i) {
                u32 place = first_place + first + i * WEIGH_KEYS_THREADS;
                bits[i] = first + i * WEIGH_KEYS_THREADS < look_end ? p.candidate_bits[at(place)] : 0;
            }
#pragma unroll
            for (u32 i = 0; i < LOOKS; ++i) {
                if (bits[i] & bit) {
                    u32 place = first_place + first + i * WEIGH_KEYS_THREADS;
                    // In which order the tiles come does not matter.
                    u32 to = atomicAdd(&shared.found, 1);
                    shared.tile[to] =
                        tile_of_group(p, p.chunk_first + place / GROUP_TILES, place % GROUP_TILES).number;
                    shared.place[to] = place;
                    shared.rank[to] = p.candidate_ranks[at(place)] + __popc(bits[i] & (bit - 1));
                }
            }
        }
        __syncthreads();
        u32 found = shared.found;
        if (found > 0 && !loaded) {
            const char *rows = p.k.row(head / p.heads_q, head % p.heads_q / p.group, block * KEY_BLOCK + first_key);
            // Candidates are whole blocks.
#pragma unroll
            for (u32 n = 0; n < HELD * 2; ++n)
                load_key<PARTS>(p, rows + (n * 8 + g) * p.k.row_stride, keys[n]);
            loaded = true;
        }
        u32 i = warp / PEERS * 2;
        Representing<PARTS> queries;
        float start[2];
        if (i < found)
            load_pair<PARTS>(p, shared, i, found, queries, start);
        for (; i < found; i += STREAMS * 2) {
            float c[HELD * 2][4];
            multiply<TYPE, PARTS, HELD * 2>(queries, keys, c);
            const float its_start[2] = {start[0], start[1]};
            if (i + STREAMS * 2 < found)
                load_pair<PARTS>(p, shared, i + STREAMS * 2, found, queries, start);
            u32 its = min(i + weighing_tile(), found - 1);
            u64 column = (u64)shared.place[its] * p.most_candidates + shared.rank[its];
            float *weights = p.key_weights + column * KEY_BLOCK + first_key + weighed_key();
#pragma unroll
            for (u32 h = 0; h < HELD; ++h) {
                float weight = add_weights(c + 2 * h, p.scale_log2, its_start);
                if (i + weighing_tile() < found)
                    weights[h * 16] = weight;
            }
        }
        __syncthreads();
    }
}

template <u32 TYPE, u32 PARTS>
__device__ __forceinline__ void weigh_keys_of_head(const RefinedParams &p, WeighKeysShared &shared)
{
    u32 head = p.chunk_first / p.groups_of_head + blockIdx.y;
    if (p.settled && p.settled[head])
        return;
#pragma unroll 1
    for (u32 block = blockIdx.x; block < p.blocks; block += gridDim.x)
        weigh_keys<TYPE, PARTS>(p, shared, head, block);
}

} // namespace hyperattn::refined

#define HYPERATTN_WEIGH(NAME, TYPE, PARTS)                                                                             \
    extern "C" __global__ void                                                                                         \
        __launch_bounds__(hyperattn::refined::WEIGH_BLOCKS_THREADS, hyperattn::refined::TOTAL_WEIGHTS_BLOCKS<PARTS>)   \
            total_weights_##NAME##_##PARTS(const __grid_constant__ hyperattn::refined::RefinedParams p)                \
    {                                                                                                                  \
        hyperattn::refined::total_weights<hyperattn::TYPE, PARTS>(p);                                                  \
    }                                                                                                                  \
    extern "C" __global__ void                                                                                         \
        __launch_bounds__(hyperattn::refined::WEIGH_BLOCKS_THREADS, hyperattn::refined::WEIGH_BLOCKS_BLOCKS<PARTS>)    \
            weigh_blocks_##NAME##_##PARTS(const __grid_constant__ hyperattn::refined::RefinedParams p)                 \
    {                                                                                                                  \
        hyperattn::refined::weigh_blocks<hyperattn::TYPE, PARTS>(p);                                                   \
    }                                                                                                                  \
    extern "C" __global__ void                                                                                         \
        __launch_bounds__(hyperattn::refined::WEIGH_KEYS_THREADS, hyperattn::refined::WEIGH_KEYS_BLOCKS<PARTS>)        \
            weigh_keys_##NAME##_##PARTS(const __grid_constant__ hyperattn::refined::RefinedParams p)         \
    {                                                                                                                  \
        __shared__ hyperattn::refined::WeighKeysShared shared;                                                         \
        hyperattn::refined::weigh_keys_of_head<hyperattn::TYPE, PARTS>(p, shared);                                     \
    }

#define HYPERATTN_WEIGH_TYPES(PARTS)                                                                                   \
    HYPERATTN_WEIGH(f16, F16, PARTS)                                                                                   \
    HYPERATTN_WEIGH(bf16, BF16, PARTS)

HYPERATTN_WEIGH_TYPES(2)
HYPERATTN_WEIGH_TYPES(3)
HYPERATTN_WEIGH_TYPES(4)
HYPERATTN_WEIGH_TYPES(6)
HYPERATTN_WEIGH_TYPES(8)

#undef HYPERATTN_WEIGH_TYPES
#undef HYPERATTN_WEIGH
