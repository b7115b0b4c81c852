// The inverse lists of a pass of PAPER: the keys of a block meet the queries of the block, all keys of an exact
// rectangle the queries that see them, and the sampled keys all queries of their rectangle that are not of their own
// block. The sampled keys meet their queries in chunks, whose sums are then added in order to those of the keys.
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
    // Sums of the samples' chunks: [KV heads of the set][rectangles][chunks][sample_size][head_dim or value_dim].
    const float *key_partials;
    const float *value_partials;
    // Of keys, see BackwardParams.
    char *key_sums;
    char *value_sums;
    u32 *key_stored;
    // As in PaperTileParams.
    u32 exact;
    u32 limited;
    i32 visible;
    u32 block_size;
    u32 sorted;
    // Of tiles of keys: KEY_TILE_STORE where more passes meet the keys.
    u32 flags;
    // Tiles of a rectangle: of all its keys, and of the samples of a chunk.
    u32 key_tiles;
    u32 sample_tiles;
    // Chunks of the longest rectangle, and the queries of a chunk.
    u32 chunks;
    u32 chunk_queries;
    u32 n_k;
    u32 head_dim;
    u32 value_dim;
    // Rectangles of a KV head whose tiles of keys are handed out together: tile t of each before tile t + 1 of any.
    u32 section;
    u32 key_sums_type;
    u32 reserved;

    // Number of a rectangle among the launch's, a KV head's next to each other.
    __device__ __forceinline__ u32 rectangle_number(u32 set_kv_head, u32 index) const
    {
        return set_kv_head * common.pass.count + index;
    }

    // A tile of the KV head that meets all query heads of the group.
    __device__ __forceinline__ KeyTile empty_tile(u32 set_kv_head, u32 number) const
    {
        u32 kv_head = common.first_kv_head + set_kv_head, heads_kv = common.heads_q / common.group;
        KeyTile tile = {};
        tile.batch = kv_head / heads_kv;
        tile.kv_head = kv_head % heads_kv;
        tile.members = common.group;
        tile.first_segment = number;
        return tile;
    }
};

static_assert(sizeof(BackwardPaperParams) == 256, "the host's mirror of this struct counts on it");

constexpr u32 BACKWARD_SAMPLES_THREADS = 128;

// WIDTH neighbouring columns of a row of sums.
template <u32 WIDTH> struct NeighbouringSums {
    float values[WIDTH];

    __device__ __forceinline__ void load(const float *from)
    {
        if constexpr (WIDTH == 4) {
            float4 four = *(const float4 *)from;
            values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
        } else {
            values[0] = *from;
        }
    }

    // Element number `at` of all and the next ones, f32 or bf16.
    __device__ __forceinline__ void load(const char *all, u64 at, u32 type)
    {
        if (type == F32) {
            load((const float *)all + at);
        } else if constexpr (WIDTH == 4) {
            uint2 four = *(const uint2 *)((const u16 *)all + at);
            values[0] = f32_from_bf16((u16)four.x), values[1] = f32_from_bf16((u16)(four.x >> 16));
            values[2] = f32_from_bf16((u16)four.y), values[3] = f32_from_bf16((u16)(four.y >> 16));
        } else {
            values[0] = f32_from_bf16(((const u16 *)all)[at]);
        }
    }

    __device__ __forceinline__ void store(char *all, u64 at, u32 type) const
    {
        if constexpr (WIDTH == 4) {
            if (type == F32)
                *(float4 *)((float *)all + at) = make_float4(values[0], values[1], values[2], values[3]);
            else
                *(uint2 *)((u16 *)all + at) =
                    make_uint2(bf16x2_from_f32(values[0], values[1]), bf16x2_from_f32(values[2], values[3]));
        } else if (type == F32) {
            ((float *)all)[at] = values[0];
        } else {
            ((u16 *)all)[at] = bf16_from_f32(values[0]);
        }
    }

    __device__ __forceinline__ void add(const NeighbouringSums &others)
    {
#pragma unroll
        for (u32 i = 0; i < WIDTH; ++i)
            values[i] += others.values[i];
    }
};

// Adds the sums of a key's samples, those from `own` to `end` with this position, to those of row `to`. A warp, whose
// lanes have WIDTH columns at a time; head_dim and value_dim are multiples of it.
template <u32 WIDTH>
__device__ __forceinline__ void add_samples_of_key(const BackwardPaperParams &params, u32 number, u32 chunks, u32 own,
                                                   u32 end, u32 position, u64 to)
{
    const u32 samples = params.common.sample_size, columns = params.head_dim + params.value_dim;
    const u32 *positions = params.positions + (u64)number * samples;
    const bool stored = params.key_stored[to] != 0;
#pragma unroll 1
    for (u32 column = threadIdx.x % 32 * WIDTH; column < columns; column += 32 * WIDTH) {
        const bool of_key = column < params.head_dim;
        const u32 dim = of_key ? params.head_dim : params.value_dim, within = of_key ? column : column - params.head_dim;
        const float *partials = (of_key ? params.key_partials : params.value_partials) + within;
        char *all = of_key ? params.key_sums : params.value_sums;
        NeighbouringSums<WIDTH> sums = {};
        if (stored)
            sums.load(all, to * dim + within, params.key_sums_type);
        for (u32 sample = own; sample < end; ++sample) {
            if (positions[sample] != position)
                continue;
            const float *from = partials + ((u64)number * params.chunks * samples + sample) * dim;
            // Several are read before they are added.
#pragma unroll 8
            for (u32 chunk = 0; chunk < chunks; ++chunk) {
                NeighbouringSums<WIDTH> partial;
                partial.load(from + (u64)chunk * samples * dim);
                sums.add(partial);
            }
        }
        sums.store(all, to * dim + within, params.key_sums_type);
    }
}

} // namespace hyperattn

// Tiles of the keys of every rectangle. One thread per tile: grid ceil(kv_heads * rectangles * key_tiles / 128), block
// 128.
extern "C" __global__ void __launch_bounds__(128)
    backward_paper_key_tiles(const __grid_constant__ hyperattn::BackwardPaperParams params)
{
    using namespace hyperattn;
    const PassTiles &common = params.common;
    u64 number = (u64)blockIdx.x * 128 + threadIdx.x;
    if (number >= (u64)common.kv_heads * common.pass.count * params.key_tiles)
        return;
    u32 of_head = common.pass.count * params.key_tiles, of_section = params.section * params.key_tiles;
    u32 set_kv_head = (u32)(number / of_head), rest = (u32)(number % of_head);
    u32 first = rest / of_section * params.section;
    u32 rectangles = common.pass.count - first < params.section ? common.pass.count - first : params.section;
    u32 rank = rest % of_section / rectangles, index = first + rest % of_section % rectangles;
    KeyTile tile = params.empty_tile(set_kv_head, (u32)number);
    Segment segment = {};
    Rectangle rectangle;
    if (common.rectangle(index, rectangle)) {
        u32 queries = rectangle.query_end - rectangle.query_start, keys = rectangle.key_end - rectangle.key_start;
        u64 start = 0, end = keys;
        u32 first_query = 0, last_query = 0;
        tile.flags = KEY_TILE_RESUME | params.flags;
        if (params.exact) {
            start = (u64)rank * TILE_ROWS;
            tile.turn = rank;
            last_query = queries;
            if (params.limited) {
                tile.flags |= KEY_TILE_LIMITED;
                i64 seeing = (i64)rectangle.key_start + (i64)start + 1 - params.visible - rectangle.query_start;
                first_query = seeing < 0 ? 0 : seeing > queries ? queries : (u32)seeing;
            }
        } else if (params.block_size) {
            u32 tiles_of_block = (params.block_size + (TILE_ROWS - 1)) / TILE_ROWS, block = rank / tiles_of_block;
            u64 block_start = (u64)block * params.block_size;
            start = block_start + rank % tiles_of_block * TILE_ROWS;
            end = block_start + params.block_size < keys ? block_start + params.block_size : keys;
            first_query = first_query_of(block, params.block_size, queries, keys);
            last_query = first_query_of(block + 1, params.block_size, queries, keys);
            if (params.sorted) {
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
    }
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

// Tiles of the samples of every rectangle for every chunk of its queries. One thread per tile: grid
// ceil(kv_heads * rectangles * chunks * sample_tiles / 128), block 128.
extern "C" __global__ void __launch_bounds__(128)
    backward_paper_sample_tiles(const __grid_constant__ hyperattn::BackwardPaperParams params)
{
    using namespace hyperattn;
    const PassTiles &common = params.common;
    u64 number = (u64)blockIdx.x * 128 + threadIdx.x;
    u32 of_rectangle = params.chunks * params.sample_tiles;
    if (number >= (u64)common.kv_heads * common.pass.count * of_rectangle)
        return;
    u32 part = (u32)(number % params.sample_tiles), chunk = (u32)(number / params.sample_tiles) % params.chunks;
    u32 index = (u32)(number / of_rectangle) % common.pass.count;
    u32 set_kv_head = (u32)(number / of_rectangle) / common.pass.count;
    u32 samples = params.rectangle_number(set_kv_head, index), first = part * TILE_ROWS;
    KeyTile tile = params.empty_tile(set_kv_head, (u32)number);
    Segment segment = {};
    Rectangle rectangle;
    if (common.rectangle(index, rectangle)) {
        u32 queries = rectangle.query_end - rectangle.query_start;
        u64 start = (u64)chunk * params.chunk_queries;
        u32 rows = common.sample_size - first < TILE_ROWS ? common.sample_size - first : TILE_ROWS;
        tile.first_key = samples * common.sample_size + first;
        tile.flags = KEY_TILE_LISTED | KEY_TILE_STORE | KEY_TILE_COMPACT;
        if (params.sorted) {
            tile.flags |= KEY_TILE_SORTED;
            segment.flags = SEGMENT_SORTED;
        }
        if (start < queries) {
            tile.rows = rows;
            tile.first_output = (samples * params.chunks + chunk) * common.sample_size + first;
            tile.segments = 1;
            segment.first = rectangle.query_start + (u32)start;
            segment.count = queries - start < params.chunk_queries ? (u32)(queries - start) : params.chunk_queries;
            segment.log_weight = common.weight(rectangle);
        }
        if (params.block_size)
            tile.flags |= KEY_TILE_HIDING;
    }
    params.tiles[number] = tile;
    params.segments[number] = segment;
}

// Adds the samples' sums to those of the keys. A warp for each sample: grid ceil(kv_heads * rectangles * sample_size / 4),
// block BACKWARD_SAMPLES_THREADS. A key that was drawn several times gets all of them from the warp of the first.
extern "C" __global__ void __launch_bounds__(hyperattn::BACKWARD_SAMPLES_THREADS)
    backward_paper_add_samples(const __grid_constant__ hyperattn::BackwardPaperParams params)
{
    using namespace hyperattn;
    constexpr u32 ALL_LANES = 0xffffffffu;
    const PassTiles &common = params.common;
    const u32 samples = common.sample_size, lane = threadIdx.x % 32;
    u64 at = (u64)blockIdx.x * (BACKWARD_SAMPLES_THREADS / 32) + threadIdx.x / 32;
    u32 number = (u32)(at / samples), own = (u32)(at % samples);
    Rectangle rectangle;
    if (number >= common.kv_heads * common.pass.count || !common.rectangle(number % common.pass.count, rectangle))
        return;
    const u32 *positions = params.positions + (u64)number * samples;
    const u32 position = positions[own];
    const u64 first_key = (u64)(number / common.pass.count) * params.n_k;
    const u64 to = first_key + (params.sorted ? params.key_order[first_key + position] : position);
    bool earlier = false, later = false;
#pragma unroll 8
    for (u32 other = lane; other < samples; other += 32) {
        bool same = positions[other] == position;
        earlier |= same && other < own;
        later |= same && other > own;
    }
    if (__any_sync(ALL_LANES, earlier))
        return;
    const u32 end = __any_sync(ALL_LANES, later) ? samples : own + 1;
    const u32 chunks = (rectangle.query_end - rectangle.query_start + params.chunk_queries - 1) / params.chunk_queries;
    if (params.head_dim % 4 == 0 && params.value_dim % 4 == 0)
        add_samples_of_key<4>(params, number, chunks, own, end, position, to);
    else
        add_samples_of_key<1>(params, number, chunks, own, end, position, to);
    __syncwarp();
    if (lane == 0)
        params.key_stored[to] = 1;
}
