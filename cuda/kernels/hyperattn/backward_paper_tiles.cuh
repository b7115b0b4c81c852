// The inverse lists of a pass of PAPER: the keys of a block meet the queries of the block, all keys of an exact
// rectangle the queries that see them, and the sampled keys all queries of their rectangle that are not of their own
// block. The sampled keys meet their queries in chunks, whose sums are then added in order to those of the keys or to
// their gradients.
#pragma once

#include "backward_work.cuh"
#include "convert.cuh"
#include "paper_tiles.cuh"

namespace hyperattn {

struct BackwardPaperParams {
    PassTiles common;
    KeyTile *tiles;
    Segment *segments;
    // Of every sample, see KEY_TILE_HIDING.
    u32 *hidden;
    const u32 *positions;
    // Of the set's keys, [KV heads of the set][n_k].
    const u32 *key_order;
    // As in PaperTileParams.
    u32 exact;
    u32 limited;
    i32 visible;
    u32 block_size;
    u32 sorted;
    // Of tiles of all keys: KEY_TILE_STORE where more passes meet the keys, KEY_TILE_RESUME where some have.
    u32 flags;
    // Tiles of a rectangle: of all its keys, and of the samples of a chunk.
    u32 key_tiles;
    u32 sample_tiles;
    // Of the list every tile of this number is one of samples until there are no more: they keep the tensor cores busy,
    // the others the memory.
    u32 sample_period;
    // Chunks of the longest rectangle, and the queries of a chunk.
    u32 chunks;
    u32 chunk_queries;
    u32 n_k;
    // Rectangles of a KV head whose tiles of keys are handed out together: tile t of each before tile t + 1 of any.
    u32 section;
    // Whether samples are added to the gradients, which are written already, or to the sums.
    u32 adds_to_gradients;

    // Number of a rectangle among the launch's, a KV head's next to each other.
    __device__ __forceinline__ u32 rectangle_number(u32 set_kv_head, u32 index) const
    {
        return set_kv_head * common.pass.count + index;
    }

    // A tile of the KV head that meets all query heads of the group.
    __device__ __forceinline__ KeyTile empty_tile(u32 set_kv_head) const
    {
        u32 kv_head = common.first_kv_head + set_kv_head, heads_kv = common.heads_q / common.group;
        KeyTile tile = {};
        tile.batch = kv_head / heads_kv;
        tile.kv_head = kv_head % heads_kv;
        tile.members = common.group;
        return tile;
    }

    // Tile number `number` of all keys, and its segment.
    __device__ __forceinline__ KeyTile tile_of_keys(u32 number, Segment &segment) const
    {
        u32 of_head = common.pass.count * key_tiles, of_section = section * key_tiles;
        u32 set_kv_head = number / of_head, rest = number % of_head;
        u32 first = rest / of_section * section;
        u32 rectangles = common.pass.count - first < section ? common.pass.count - first : section;
        u32 rank = rest % of_section / rectangles, index = first + rest % of_section % rectangles;
        KeyTile tile = empty_tile(set_kv_head);
        Rectangle rectangle;
        if (!common.rectangle(index, rectangle))
            return tile;
        u32 queries = rectangle.query_end - rectangle.query_start, keys = rectangle.key_end - rectangle.key_start;
        u64 start = 0, end = keys;
        u32 first_query = 0, last_query = 0;
        tile.flags = flags;
        if (exact) {
            start = (u64)rank * TILE_ROWS;
            tile.turn = rank;
            last_query = queries;
            if (limited) {
                tile.flags |= KEY_TILE_LIMITED;
                i64 seeing = (i64)rectangle.key_start + (i64)start + 1 - visible - rectangle.query_start;
                first_query = seeing < 0 ? 0 : seeing > queries ? queries : (u32)seeing;
            }
        } else if (block_size) {
            u32 tiles_of_block = (block_size + (TILE_ROWS - 1)) / TILE_ROWS, block = rank / tiles_of_block;
            u64 block_start = (u64)block * block_size;
            start = block_start + rank % tiles_of_block * TILE_ROWS;
            end = block_start + block_size < keys ? block_start + block_size : keys;
            first_query = first_query_of(block, block_size, queries, keys);
            last_query = first_query_of(block + 1, block_size, queries, keys);
            if (sorted) {
                tile.flags |= KEY_TILE_SORTED;
                segment.flags = SEGMENT_SORTED;
            }
        } else {
            start = (u64)rank * TILE_ROWS;
        }
        if (start < end) {
            tile.first_key = rectangle.key_start + (u32)start;
            tile.rows = end - start < TILE_ROWS ? (u32)(end - start) : TILE_ROWS;
        }
        segment.first = rectangle.query_start + first_query;
        segment.count = last_query - first_query;
        tile.segments = first_query < last_query;
        return tile;
    }

    // Tile number `number` of samples, for a chunk of their rectangle's queries, and its segment.
    __device__ __forceinline__ KeyTile tile_of_samples(u32 number, Segment &segment) const
    {
        u32 part = number % sample_tiles, chunk = number / sample_tiles % chunks;
        u32 rectangle_index = number / (chunks * sample_tiles);
        u32 index = rectangle_index % common.pass.count, set_kv_head = rectangle_index / common.pass.count;
        u32 samples = rectangle_number(set_kv_head, index), first = part * TILE_ROWS;
        KeyTile tile = empty_tile(set_kv_head);
        Rectangle rectangle;
        if (!common.rectangle(index, rectangle))
            return tile;
        u32 queries = rectangle.query_end - rectangle.query_start;
        u64 start = (u64)chunk * chunk_queries;
        u32 rows = common.sample_size - first < TILE_ROWS ? common.sample_size - first : TILE_ROWS;
        tile.first_key = samples * common.sample_size + first;
        tile.flags = KEY_TILE_LISTED | KEY_TILE_STORE | KEY_TILE_COMPACT;
        if (sorted) {
            tile.flags |= KEY_TILE_SORTED;
            segment.flags = SEGMENT_SORTED;
        }
        if (start < queries) {
            tile.rows = rows;
            tile.first_output = (samples * chunks + chunk) * common.sample_size + first;
            tile.segments = 1;
            segment.first = rectangle.query_start + (u32)start;
            segment.count = queries - start < chunk_queries ? (u32)(queries - start) : chunk_queries;
            segment.log_weight = common.weight(rectangle);
        }
        if (block_size)
            tile.flags |= KEY_TILE_HIDING;
        return tile;
    }
};

static_assert(sizeof(BackwardPaperParams) == 224, "the host's mirror of this struct counts on it");

constexpr u32 BACKWARD_SAMPLES_THREADS = 128;

// WIDTH neighbouring elements of a row, from its number `column` on.
template <u32 WIDTH> struct NeighbouringElements {
    float values[WIDTH];

    __device__ __forceinline__ void load(const char *row, u32 column, u32 type)
    {
        if (type == F32) {
            const float *from = (const float *)row + column;
            if constexpr (WIDTH == 4) {
                float4 four = *(const float4 *)from;
                values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
            } else {
                values[0] = *from;
            }
            return;
        }
        const u16 *from = (const u16 *)row + column;
        u32 words[2];
        if constexpr (WIDTH == 4) {
            uint2 four = *(const uint2 *)from;
            words[0] = four.x, words[1] = four.y;
        } else {
            words[0] = *from;
        }
#pragma unroll
        for (u32 i = 0; i < WIDTH; ++i) {
            u16 bits = (u16)(words[i / 2] >> i % 2 * 16);
            values[i] = type == BF16 ? f32_from_bf16(bits) : f32_from_f16(bits);
        }
    }

    __device__ __forceinline__ void store(char *row, u32 column, u32 type) const
    {
        if (type == F32) {
            float *to = (float *)row + column;
            if constexpr (WIDTH == 4)
                *(float4 *)to = make_float4(values[0], values[1], values[2], values[3]);
            else
                *to = values[0];
            return;
        }
        u16 *to = (u16 *)row + column;
        if constexpr (WIDTH == 4) {
            auto pair = [&](float a, float b) { return type == BF16 ? bf16x2_from_f32(a, b) : f16x2_from_f32(a, b); };
            *(uint2 *)to = make_uint2(pair(values[0], values[1]), pair(values[2], values[3]));
        } else {
            *to = type == BF16 ? bf16_from_f32(values[0]) : f16_from_f32(values[0]);
        }
    }

    __device__ __forceinline__ void add(const NeighbouringElements &others, float factor)
    {
#pragma unroll
        for (u32 i = 0; i < WIDTH; ++i)
            values[i] = fmaf(others.values[i], factor, values[i]);
    }
};

// What a key's samples have in common.
struct SamplesOfKey {
    // Rectangle, and its chunks.
    u32 number;
    u32 chunks;
    // Samples [own, end) with this position.
    u32 own;
    u32 end;
    u32 position;
    u32 batch;
    u32 kv_head;
    u32 row;
};

// Adds the sums of a key's samples to those of the key, or to its gradients. A warp, whose lanes have WIDTH columns at
// a time.
template <u32 WIDTH>
__device__ __forceinline__ void add_samples_of_key(const BackwardPaperParams &params, const BackwardParams &backward,
                                                   const SamplesOfKey &key)
{
    const AttendParams &p = backward.attend;
    const u32 samples = params.common.sample_size;
    const u32 *positions = params.positions + (u64)key.number * samples;
    const bool to_gradients = params.adds_to_gradients;
    const u64 sums_row = (u64)(key.batch * p.heads_kv() + key.kv_head) * p.n_k + key.row;
    const bool stored = to_gradients || backward.key_stored[sums_row] != 0;
#pragma unroll 1
    for (u32 column = threadIdx.x % 32 * WIDTH; column < p.head_dim + p.value_dim; column += 32 * WIDTH) {
        const bool of_key = column < p.head_dim;
        const u32 dim = of_key ? p.head_dim : p.value_dim, within = of_key ? column : column - p.head_dim;
        const float *partials = (of_key ? backward.key_partials : backward.value_partials) + within;
        char *to;
        u32 type;
        if (to_gradients) {
            to = (of_key ? backward.dk : backward.dv).row(key.batch, key.kv_head, key.row);
            type = of_key ? backward.dk_type : backward.dv_type;
        } else {
            to = of_key ? backward.key_sums_of(0, sums_row) : backward.value_sums_of(0, sums_row);
            type = backward.key_sums_type;
        }
        NeighbouringElements<WIDTH> before = {}, sums = {};
        if (stored)
            before.load(to, within, type);
        for (u32 sample = key.own; sample < key.end; ++sample) {
            if (positions[sample] != key.position)
                continue;
            const float *from = partials + ((u64)key.number * params.chunks * samples + sample) * dim;
            // Several are read before they are added.
#pragma unroll 8
            for (u32 chunk = 0; chunk < key.chunks; ++chunk) {
                NeighbouringElements<WIDTH> partial;
                partial.load((const char *)(from + (u64)chunk * samples * dim), 0, F32);
                sums.add(partial, 1.0f);
            }
        }
        before.add(sums, to_gradients && of_key ? backward.scale : 1.0f);
        before.store(to, within, type);
    }
    __syncwarp();
    if (!to_gradients && threadIdx.x % 32 == 0)
        backward.key_stored[sums_row] = 1;
}

// Whether rows of a gradient are in fours.
__device__ __forceinline__ bool gradient_in_fours(const View &gradient, u32 type)
{
    u64 bits = (u64)gradient.data | (u64)gradient.batch_stride | (u64)gradient.head_stride | (u64)gradient.row_stride;
    return bits % (4 * element_bytes(type)) == 0;
}

} // namespace hyperattn

// Tiles of the keys of every rectangle, and among them those of the samples for every chunk of its queries. One thread
// per tile: grid ceil(kv_heads * rectangles * (key_tiles + chunks * sample_tiles) / 128), block 128.
extern "C" __global__ void __launch_bounds__(128)
    backward_paper_key_tiles(const __grid_constant__ hyperattn::BackwardPaperParams params)
{
    using namespace hyperattn;
    u64 number = (u64)blockIdx.x * 128 + threadIdx.x;
    u32 rectangles = params.common.kv_heads * params.common.pass.count, period = params.sample_period;
    u64 samples = (u64)rectangles * params.chunks * params.sample_tiles;
    if (number >= (u64)rectangles * params.key_tiles + samples)
        return;
    bool among = number < samples * period;
    Segment segment = {};
    KeyTile tile;
    if (among && number % period == 0)
        tile = params.tile_of_samples((u32)(number / period), segment);
    else
        tile = params.tile_of_keys((u32)(number - (among ? number / period + 1 : samples)), segment);
    tile.first_segment = (u32)number;
    params.tiles[number] = tile;
    params.segments[number] = segment;
}

// From which queries, those of its block, every sample is hidden. One thread per sample: grid
// ceil(kv_heads * rectangles * sample_size / 128), block 128.
extern "C" __global__ void __launch_bounds__(128)
    backward_paper_hidden(const __grid_constant__ hyperattn::BackwardPaperParams params)
{
    using namespace hyperattn;
    const PassTiles &common = params.common;
    u64 at = (u64)blockIdx.x * 128 + threadIdx.x;
    if (at >= (u64)common.kv_heads * common.pass.count * common.sample_size)
        return;
    Rectangle rectangle;
    if (!common.rectangle((u32)(at / common.sample_size) % common.pass.count, rectangle))
        return;
    u32 queries = rectangle.query_end - rectangle.query_start, keys = rectangle.key_end - rectangle.key_start;
    u32 block = (params.positions[at] - rectangle.key_start) / params.block_size;
    params.hidden[2 * at] = rectangle.query_start + first_query_of(block, params.block_size, queries, keys);
    params.hidden[2 * at + 1] = rectangle.query_start + first_query_of(block + 1, params.block_size, queries, keys);
}

// Adds the samples' sums to those of the keys, or to their gradients. A warp for each sample, and that of the first for
// a key that was drawn several times: grid ceil(kv_heads * rectangles * sample_size / 4), block
// BACKWARD_SAMPLES_THREADS.
extern "C" __global__ void __launch_bounds__(hyperattn::BACKWARD_SAMPLES_THREADS)
    backward_paper_add_samples(const __grid_constant__ hyperattn::BackwardPaperParams params,
                               const __grid_constant__ hyperattn::BackwardParams backward)
{
    using namespace hyperattn;
    constexpr u32 ALL_LANES = 0xffffffffu;
    const PassTiles &common = params.common;
    const u32 samples = common.sample_size, lane = threadIdx.x % 32;
    u64 at = (u64)blockIdx.x * (BACKWARD_SAMPLES_THREADS / 32) + threadIdx.x / 32;
    SamplesOfKey key;
    key.number = (u32)(at / samples), key.own = (u32)(at % samples);
    u32 set_kv_head = key.number / common.pass.count;
    Rectangle rectangle;
    if (set_kv_head >= common.kv_heads || !common.rectangle(key.number % common.pass.count, rectangle))
        return;
    const u32 *positions = params.positions + (u64)key.number * samples;
    key.position = positions[key.own];
    key.row = params.sorted ? params.key_order[(u64)set_kv_head * params.n_k + key.position] : key.position;
    bool earlier = false, later = false;
#pragma unroll 8
    for (u32 other = lane; other < samples; other += 32) {
        bool same = positions[other] == key.position;
        earlier |= same && other < key.own;
        later |= same && other > key.own;
    }
    if (__any_sync(ALL_LANES, earlier))
        return;
    key.end = __any_sync(ALL_LANES, later) ? samples : key.own + 1;
    key.chunks = (rectangle.query_end - rectangle.query_start + params.chunk_queries - 1) / params.chunk_queries;
    KeyTile of_head = params.empty_tile(set_kv_head);
    key.batch = of_head.batch, key.kv_head = of_head.kv_head;
    bool fours = backward.attend.head_dim % 4 == 0 && backward.attend.value_dim % 4 == 0;
    if (params.adds_to_gradients)
        fours = fours && gradient_in_fours(backward.dk, backward.dk_type) &&
                gradient_in_fours(backward.dv, backward.dv_type);
    if (fours)
        add_samples_of_key<4>(params, backward, key);
    else
        add_samples_of_key<1>(params, backward, key);
}
