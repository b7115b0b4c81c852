// How much weight representatives give to mean keys, outliers and keys, on tensor cores: keys are the rows, and the
// eight representatives of a tile the columns of mma.m16n8k16. Registers of both operands take elements in the same
// order, so that a lane reads 16 bytes of a row at once: part j of a row is elements 32j..32j + 32, of which lane t
// of four has 8t..8t + 8, two for each of the four registers of two products.
//
// TYPE is F16 or BF16, PARTS the parts of a row: width / 32.
// Launches: weigh_blocks_TYPE_PARTS, grid (groups of the chunk), WEIGH_BLOCKS_THREADS threads;
// weigh_keys_TYPE_PARTS, grid (heads of the chunk * blocks), WEIGH_KEYS_THREADS threads.
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

// Lane g * 4 + t has rows g and g + 8 of the keys, column g of the representatives, and of the products rows g and g
// + 8 in columns 2t and 2t + 1: [0] and [1] of row g, [2] and [3] of row g + 8.
template <u32 PARTS> struct KeyRows {
    uint4 low[PARTS];
    uint4 high[PARTS];
};

template <u32 PARTS> struct Representing {
    uint4 part[PARTS];
};

template <u32 TYPE, u32 PARTS>
__device__ __forceinline__ void multiply(const KeyRows<PARTS> &keys, const Representing<PARTS> &queries, float c[4])
{
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        c[i] = 0.0f;
#pragma unroll
    for (u32 j = 0; j < PARTS; ++j) {
        const uint4 &a = keys.low[j], &b = keys.high[j], &q = queries.part[j];
        multiply_add<TYPE>(c, a.x, b.x, a.y, b.y, q.x, q.y);
        multiply_add<TYPE>(c, a.z, b.z, a.w, b.w, q.z, q.w);
    }
}

// Rows of operands, `low` and `high` are this lane's.
template <u32 PARTS>
__device__ __forceinline__ void load_operands(const char *rows, u32 low, u32 high, KeyRows<PARTS> &keys)
{
    u32 t = threadIdx.x % 4;
    const char *from_low = rows + (u64)low * (PARTS * 64) + t * 16;
    const char *from_high = rows + (u64)high * (PARTS * 64) + t * 16;
#pragma unroll
    for (u32 j = 0; j < PARTS; ++j) {
        keys.low[j] = load_16_bytes(from_low + j * 64);
        keys.high[j] = load_16_bytes(from_high + j * 64);
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

// Rows of the keys, `low` and `high` are this lane's.
template <u32 PARTS>
__device__ __forceinline__ void load_keys(const RefinedParams &p, const char *rows, u32 low, u32 high,
                                          KeyRows<PARTS> &keys)
{
    u32 t = threadIdx.x % 4;
    bool aligned = p.flags & REFINED_K_ALIGNED;
    const char *from_low = rows + low * p.k.row_stride, *from_high = rows + high * p.k.row_stride;
#pragma unroll
    for (u32 j = 0; j < PARTS; ++j) {
        keys.low[j] = load_elements(from_low, j * 32 + t * 8, p.head_dim, aligned);
        keys.high[j] = load_elements(from_high, j * 32 + t * 8, p.head_dim, aligned);
    }
}

template <u32 PARTS>
__device__ __forceinline__ void load_representatives(const RefinedParams &p, u32 tile, Representing<PARTS> &queries)
{
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const char *from = p.representatives + ((u64)tile * REPRESENTATIVES + g) * (PARTS * 64) + t * 16;
#pragma unroll
    for (u32 j = 0; j < PARTS; ++j)
        queries.part[j] = load_16_bytes(from + j * 64);
}

constexpr u32 TILES_OF_WARP = 2;
constexpr u32 WEIGH_BLOCKS_THREADS = GROUP_TILES / TILES_OF_WARP * 32;

// The tiles of a warp.
template <u32 PARTS> struct WarpTiles {
    Frame frame[TILES_OF_WARP];
    Representing<PARTS> queries[TILES_OF_WARP];
    // Of columns 2t and 2t + 1: the sum over all keys, estimated from the mean keys, then what logits are relative to.
    RunningSum sums[TILES_OF_WARP][2];
    float start[TILES_OF_WARP][2];
};

// Adds keys from..to, one by one, to the sums of tile u.
template <u32 TYPE, u32 PARTS>
__device__ __forceinline__ void add_keys(const RefinedParams &p, const char *rows, u32 from, u32 to,
                                         const Representing<PARTS> &queries, RunningSum sums[2])
{
    u32 g = threadIdx.x % 32 / 4;
    for (u32 first = from; first < to; first += 16) {
        u32 low = first + g, high = low + 8;
        KeyRows<PARTS> keys;
        load_keys<PARTS>(p, rows, min(low, to - 1), min(high, to - 1), keys);
        float c[4];
        multiply<TYPE, PARTS>(keys, queries, c);
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
            sums[i].add(low < to ? c[i] * p.scale_log2 : negative_infinity(),
                        high < to ? c[2 + i] * p.scale_log2 : negative_infinity());
    }
}

// Weights that the representatives give to two rows, in every lane of the four that share them.
__device__ __forceinline__ void add_weights(const float c[4], float scale, const float start[2], float &low,
                                            float &high)
{
    low = weight_of(c[0], scale, start[0]) + weight_of(c[1], scale, start[1]);
    high = weight_of(c[2], scale, start[0]) + weight_of(c[3], scale, start[1]);
#pragma unroll
    for (u32 other = 1; other < 4; other *= 2) {
        low += __shfl_xor_sync(ALL_LANES, low, other);
        high += __shfl_xor_sync(ALL_LANES, high, other);
    }
}

// Totals and starts of each tile of a group, and the weights of its blocks: by their mean keys, and with their
// outliers.
template <u32 TYPE, u32 PARTS> __device__ __forceinline__ void weigh_blocks(const RefinedParams &p)
{
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    // Later rows see more keys under a causal mask: their tiles come first.
    u32 in_chunk = p.chunk_groups - 1 - blockIdx.x;
    WarpTiles<PARTS> tiles;
    u32 end = 0, begin = 0xffffffffu;
    u32 kv = 0;
    const char *keys_of_head = nullptr;
#pragma unroll
    for (u32 u = 0; u < TILES_OF_WARP; ++u) {
        QueryTile tile = tile_of_group(p, p.chunk_first + in_chunk, warp * TILES_OF_WARP + u);
        tiles.frame[u] = frame_of(p, tile);
        tiles.sums[u][0].empty();
        tiles.sums[u][1].empty();
        kv = kv_number(p, tile);
        keys_of_head = p.k.row(tile.batch, tile.head / p.group, 0);
        load_representatives<PARTS>(p, tile.number, tiles.queries[u]);
        const Frame &frame = tiles.frame[u];
        if (frame.chooses) {
            end = max(end, frame.end_block());
            begin = min(begin, frame.first_block());
            add_keys<TYPE, PARTS>(p, keys_of_head, 0, frame.first, tiles.queries[u], tiles.sums[u]);
            add_keys<TYPE, PARTS>(p, keys_of_head, frame.near, frame.seen_by_all, tiles.queries[u], tiles.sums[u]);
        }
    }
    if (end == 0)
        return;
    u64 first_of_head = (u64)kv * p.blocks;
    const char *means = p.mean_keys + first_of_head * (PARTS * 64);
    const char *outliers = p.outliers + first_of_head * (PARTS * 64);
    const float *counts = p.key_counts + first_of_head;

    for (u32 first = 0; first < end; first += 16) {
        u32 low = first + g, high = low + 8;
        u32 last = end - 1;
        KeyRows<PARTS> rows;
        load_operands<PARTS>(means, min(low, last), min(high, last), rows);
        // A block without keys has -inf.
        float low_count = log2_approximately(counts[min(low, last)]);
        float high_count = log2_approximately(counts[min(high, last)]);
#pragma unroll
        for (u32 u = 0; u < TILES_OF_WARP; ++u) {
            u32 its_end = tiles.frame[u].chooses ? tiles.frame[u].end_block() : 0;
            if (first >= its_end)
                continue;
            float c[4];
            multiply<TYPE, PARTS>(rows, tiles.queries[u], c);
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
                tiles.sums[u][i].add(
                    low < its_end ? fmaf(c[i], p.scale_log2, low_count) : negative_infinity(),
                    high < its_end ? fmaf(c[2 + i], p.scale_log2, high_count) : negative_infinity());
        }
    }
#pragma unroll
    for (u32 u = 0; u < TILES_OF_WARP; ++u) {
        u32 i = warp * TILES_OF_WARP + u;
        QueryTile tile = tile_of_group(p, p.chunk_first + in_chunk, i);
        const float *represented = p.represented + (u64)tile.number * REPRESENTATIVES;
        float queries = 0.0f;
#pragma unroll
        for (u32 slot = 0; slot < REPRESENTATIVES; ++slot)
            queries += represented[slot];
        u64 place = (u64)in_chunk * GROUP_TILES + i;
#pragma unroll
        for (u32 column = 0; column < 2; ++column) {
            RunningSum &sum = tiles.sums[u][column];
#pragma unroll
            for (u32 other = 4; other < 32; other *= 2) {
                RunningSum its;
                its.max = __shfl_xor_sync(ALL_LANES, sum.max, other);
                its.sum = __shfl_xor_sync(ALL_LANES, sum.sum, other);
                sum.add(its);
            }
            u32 slot = t * 2 + column;
            float total = sum.log2_sum();
            tiles.start[u][column] = start_of(total, queries, represented[slot]);
            if (g == 0 && tiles.frame[u].chooses) {
                p.totals[place * REPRESENTATIVES + slot] = total;
                p.starts[place * REPRESENTATIVES + slot] = tiles.start[u][column];
            }
        }
    }

    for (u32 first = begin / 16 * 16; first < end; first += 16) {
        u32 low = first + g, high = low + 8;
        u32 last = end - 1;
        float low_count = counts[min(low, last)], high_count = counts[min(high, last)];
        float by_mean[TILES_OF_WARP][2];
        KeyRows<PARTS> rows;
        load_operands<PARTS>(means, min(low, last), min(high, last), rows);
#pragma unroll
        for (u32 u = 0; u < TILES_OF_WARP; ++u) {
            float c[4];
            multiply<TYPE, PARTS>(rows, tiles.queries[u], c);
            add_weights(c, p.scale_log2, tiles.start[u], by_mean[u][0], by_mean[u][1]);
            by_mean[u][0] *= low_count;
            by_mean[u][1] *= high_count;
        }
        load_operands<PARTS>(outliers, min(low, last), min(high, last), rows);
#pragma unroll
        for (u32 u = 0; u < TILES_OF_WARP; ++u) {
            const Frame &frame = tiles.frame[u];
            if (!frame.chooses || first >= frame.end_block())
                continue;
            float c[4], weight[2];
            multiply<TYPE, PARTS>(rows, tiles.queries[u], c);
            add_weights(c, p.scale_log2, tiles.start[u], weight[0], weight[1]);
            u64 place = (u64)in_chunk * GROUP_TILES + warp * TILES_OF_WARP + u;
            // Lane t = 0 writes row g, lane t = 1 row g + 8.
            u32 block = t ? high : low;
            float mean = t ? by_mean[u][1] : by_mean[u][0];
            float outlier = fmaf(t ? weight[1] : weight[0], fminf(t ? high_count : low_count, 1.0f), mean);
            // The block that the first keys cut is looked into: their part of it is met already.
            if (block == frame.first_block() && frame.first % KEY_BLOCK)
                outlier = __uint_as_float(0x7f7fffffu);
            if (t < 2 && block < frame.end_block()) {
                p.block_weights[place * p.blocks + block] = mean;
                p.outlier_weights[place * p.blocks + block] = outlier;
            }
        }
    }
}

constexpr u32 WEIGH_KEYS_THREADS = 128;
constexpr u32 WEIGH_KEYS_WARPS = WEIGH_KEYS_THREADS / 32;

// Thread blocks that a multiprocessor is to hold, by the registers that they need.
template <u32 PARTS> constexpr u32 WEIGH_KEYS_BLOCKS = PARTS <= 4 ? 4 : 3;

// Tiles that are looked through at a time.
constexpr u32 LOOK_TILES = 512;

struct WeighKeysShared {
    // Numbers of the tiles of which the block is a candidate, and its places among the key weights.
    u32 tile[LOOK_TILES];
    u32 place[LOOK_TILES];
    u32 rank[LOOK_TILES];
    u32 found;
};

// The weights of a block's keys for all tiles of one head in the chunk of which it is a candidate. The keys stay in
// registers, and the tiles' representatives, which are fewer, pass by.
template <u32 TYPE, u32 PARTS>
__device__ __forceinline__ void weigh_keys(const RefinedParams &p, WeighKeysShared &shared)
{
    // So many groups of 16 keys does a warp hold; the warps that hold the others of the block are its peers.
    constexpr u32 HELD = PARTS <= 2 ? 4 : PARTS <= 4 ? 2 : 1;
    constexpr u32 PEERS = 4 / HELD;
    constexpr u32 STREAMS = WEIGH_KEYS_WARPS / PEERS;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 block = blockIdx.x % p.blocks;
    u32 head = p.chunk_first / p.groups_of_head + blockIdx.x / p.blocks;
    u32 first_group = max(p.chunk_first, head * p.groups_of_head);
    u32 end_group = min(p.chunk_first + p.chunk_groups, (head + 1) * p.groups_of_head);
    if (first_group >= end_group)
        return;
    u32 places = (end_group - first_group) * GROUP_TILES, first_place = (first_group - p.chunk_first) * GROUP_TILES;
    u32 word = block / 32, bit = 1u << block % 32;
    KeyRows<PARTS> keys[HELD];
    bool loaded = false;

    for (u32 looked = 0; looked < places; looked += LOOK_TILES) {
        if (threadIdx.x == 0)
            shared.found = 0;
        __syncthreads();
        for (u32 i = looked + threadIdx.x; i < min(places, looked + LOOK_TILES); i += WEIGH_KEYS_THREADS) {
            u32 place = first_place + i;
            u64 at = ((u64)(place / GROUP_TILES) * p.words() + word) * GROUP_TILES + place % GROUP_TILES;
            u32 bits = p.candidate_bits[at];
            if (bits & bit) {
                // In which order the tiles come does not matter.
                u32 to = atomicAdd(&shared.found, 1);
                shared.tile[to] = tile_of_group(p, p.chunk_first + place / GROUP_TILES, place % GROUP_TILES).number;
                shared.place[to] = place;
                shared.rank[to] = p.candidate_ranks[at] + __popc(bits & (bit - 1));
            }
        }
        __syncthreads();
        u32 found = shared.found;
        if (found > 0 && !loaded) {
            const char *rows = p.k.row(head / p.heads_q, head % p.heads_q / p.group, block * KEY_BLOCK);
            // Candidates are whole blocks.
#pragma unroll
            for (u32 h = 0; h < HELD; ++h) {
                u32 low = (warp % PEERS * HELD + h) * 16 + g;
                load_keys<PARTS>(p, rows, low, low + 8, keys[h]);
            }
            loaded = true;
        }
        u32 i = warp / PEERS;
        Representing<PARTS> queries, next_queries;
        float2 start, next_start;
        if (i < found) {
            load_representatives<PARTS>(p, shared.tile[i], next_queries);
            next_start = ((const float2 *)(p.starts + (u64)shared.place[i] * REPRESENTATIVES))[t];
        }
        for (; i < found; i += STREAMS) {
            queries = next_queries;
            start = next_start;
            u32 next = min(i + STREAMS, found - 1);
            load_representatives<PARTS>(p, shared.tile[next], next_queries);
            next_start = ((const float2 *)(p.starts + (u64)shared.place[next] * REPRESENTATIVES))[t];
            u64 column = (u64)shared.place[i] * p.most_candidates + shared.rank[i];
            float *weights = p.key_weights + column * KEY_BLOCK + warp % PEERS * (HELD * 16);
            const float of_column[2] = {start.x, start.y};
#pragma unroll
            for (u32 h = 0; h < HELD; ++h) {
                float c[4], low, high;
                multiply<TYPE, PARTS>(keys[h], queries, c);
                add_weights(c, p.scale_log2, of_column, low, high);
                if (t < 2)
                    weights[h * 16 + t * 8 + g] = t ? high : low;
            }
        }
        __syncthreads();
    }
}

} // namespace hyperattn::refined

#define HYPERATTN_WEIGH(NAME, TYPE, PARTS)                                                                             \
    extern "C" __global__ void __launch_bounds__(hyperattn::refined::WEIGH_BLOCKS_THREADS)                             \
        weigh_blocks_##NAME##_##PARTS(const __grid_constant__ hyperattn::refined::RefinedParams p)           \
    {                                                                                                                  \
        hyperattn::refined::weigh_blocks<hyperattn::TYPE, PARTS>(p);                                                   \
    }                                                                                                                  \
    extern "C" __global__ void                                                                                         \
        __launch_bounds__(hyperattn::refined::WEIGH_KEYS_THREADS, hyperattn::refined::WEIGH_KEYS_BLOCKS<PARTS>)        \
            weigh_keys_##NAME##_##PARTS(const __grid_constant__ hyperattn::refined::RefinedParams p)         \
    {                                                                                                                  \
        __shared__ hyperattn::refined::WeighKeysShared shared;                                                         \
        hyperattn::refined::weigh_keys<hyperattn::TYPE, PARTS>(p, shared);                                             \
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
