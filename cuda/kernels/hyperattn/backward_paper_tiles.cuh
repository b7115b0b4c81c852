// The inverse lists of a pass of PAPER: the keys of a block meet the queries of the block, all keys of an exact
// rectangle the queries that see them, and the sampled keys all queries of their rectangle that are not of their own
// block. The sampled keys meet their queries in chunks, whose sums are then added in order to those of the keys.
#pragma once

#include "backward_work.cuh"
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
    float *key_sums;
    float *value_sums;
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

static_assert(sizeof(BackwardPaperParams) == 264, "the host's mirror of this struct counts on it");

constexpr u32 BACKWARD_SAMPLES_THREADS = 128;
// Columns of a key and a value together that a thread adds up.
constexpr u32 BACKWARD_SAMPLES_COLUMNS = 4;

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

// Adds the samples' sums to those of the keys. A key that was drawn several times gets all of them from the thread
// block of the first. Grid: kv_heads * rectangles * sample_size; block BACKWARD_SAMPLES_THREADS.
extern "C" __global__ void __launch_bounds__(hyperattn::BACKWARD_SAMPLES_THREADS)
    backward_paper_add_samples(const __grid_constant__ hyperattn::BackwardPaperParams params)
{
    using namespace hyperattn;
    constexpr u32 ALL_LANES = 0xffffffffu;
    const PassTiles &common = params.common;
    u32 samples = common.sample_size;
    u32 own = blockIdx.x % samples, number = blockIdx.x / samples;
    Rectangle rectangle;
    if (!common.rectangle(number % common.pass.count, rectangle))
        return;
    const u32 *positions = params.positions + (u64)number * samples;
    u32 position = positions[own];
    u32 chunks = (rectangle.query_end - rectangle.query_start + params.chunk_queries - 1) / params.chunk_queries;
    u32 columns = params.head_dim + params.value_dim;

    __shared__ u32 same_as[BACKWARD_SAMPLES_THREADS / 32];
    float sums[BACKWARD_SAMPLES_COLUMNS] = {};
    for (u32 first = 0; first < samples; first += BACKWARD_SAMPLES_THREADS) {
        u32 other = first + threadIdx.x;
        bool same = other < samples && positions[other] == position;
        u32 of_warp = __ballot_sync(ALL_LANES, same);
        if (threadIdx.x % 32 == 0)
            same_as[threadIdx.x / 32] = of_warp;
        // An earlier sample's block adds this one.
        if (__syncthreads_or(same && other < own))
            return;
        for (u32 word = 0; word < BACKWARD_SAMPLES_THREADS / 32; ++word) {
            for (u32 found = same_as[word]; found != 0; found &= found - 1) {
                u64 row = (u64)number * params.chunks * samples + first + 32 * word + __ffs(found) - 1;
#pragma unroll
                for (u32 i = 0; i < BACKWARD_SAMPLES_COLUMNS; ++i) {
                    u32 column = threadIdx.x + BACKWARD_SAMPLES_THREADS * i;
                    if (column >= columns)
                        continue;
                    bool of_key = column < params.head_dim;
                    u32 dim = of_key ? params.head_dim : params.value_dim;
                    const float *partial = of_key ? params.key_partials + row * dim + column
                                                  : params.value_partials + row * dim + column - params.head_dim;
                    // Several are read before they are added.
#pragma unroll 8
                    for (u32 chunk = 0; chunk < chunks; ++chunk)
                        sums[i] += partial[(u64)chunk * samples * dim];
                }
            }
        }
        __syncthreads();
    }

    u64 first_key = (u64)(number / common.pass.count) * params.n_k;
    u64 to = first_key + (params.sorted ? params.key_order[first_key + position] : position);
    bool stored = params.key_stored[to] != 0;
#pragma unroll
    for (u32 i = 0; i < BACKWARD_SAMPLES_COLUMNS; ++i) {
        u32 column = threadIdx.x + BACKWARD_SAMPLES_THREADS * i;
        if (column >= columns)
            continue;
        float *sum = column < params.head_dim ? params.key_sums + to * params.head_dim + column
                                              : params.value_sums + to * params.value_dim + column - params.head_dim;
        *sum = stored ? *sum + sums[i] : sums[i];
    }
    __syncthreads();
    if (threadIdx.x == 0)
        params.key_stored[to] = 1;
}
