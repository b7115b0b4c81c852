// The tiles of a pass whose exact part is a whole rectangle, sorted blocks, or nothing.
#pragma once

#include "exact_blocks.cuh"
#include "work.cuh"

namespace hyperattn {

// What the tiles of any pass have in common.
struct PassTiles {
    Pass pass;
    Tile *tiles;
    Segment *segments;
    // Query heads of a batch item.
    u32 heads_q;
    u32 group;
    // KV heads of the set, counted through the batch.
    u32 first_kv_head;
    u32 kv_heads;
    // Query blocks of the longest rectangle, and tiles of the longest block.
    u32 blocks;
    u32 tiles_per_block;
    // Of all tiles, and besides of those of all rectangles but the first: the queries of an interval behind the first are
    // in the second half of an interval of an earlier level too.
    u32 flags;
    u32 later_flags;
    // Samples of a rectangle, 0 for no residual.
    u32 sample_size;
    // Base-2 log weights of a sample: of a rectangle with this many keys, and of one with one key less.
    u32 most_keys;
    float log_weight;
    float log_weight_less;
    // Where the pass's lists begin among those of a launch of several passes; its tiles begin at `tiles`.
    u32 first_segment;
    u32 first_position;
    // Levels whose partials come first, and whether the leaves' queries have others from the rectangle besides.
    u32 levels;
    u32 merges_one;

    // Rectangle number `index` of the launch.
    __device__ __forceinline__ bool rectangle(u32 index, Rectangle &to) const
    {
        return pass.rectangle(pass.first + index, to);
    }

    __device__ __forceinline__ float weight(const Rectangle &rectangle) const
    {
        return rectangle.key_end - rectangle.key_start == most_keys ? log_weight : log_weight_less;
    }

    // Of the tiles of rectangle number `index` of the launch.
    __device__ __forceinline__ u32 flags_of(u32 index) const
    {
        return pass.first + index == 0 ? flags : flags | later_flags;
    }

    // Number of a block among the launch's, a KV head's next to each other. Its tiles have numbers next to each other.
    __device__ __forceinline__ u32 block_number(u32 set_kv_head, u32 index, u32 block) const
    {
        return (set_kv_head * pass.count + index) * blocks + block;
    }

    // Tile `part` of a block's queries [start, end), for query head `member` of the group. Heads that read the same
    // keys are neighbours. `partials` are behind its `count` segments.
    __device__ __forceinline__ void write(
        const Rectangle &rectangle, u32 set_kv_head, u32 index, u32 block, u32 member, u32 part, u32 start, u32 end,
        u32 first_segment, u32 count, u32 partials = 0) const
    {
        u32 head = (first_kv_head + set_kv_head) * group + member;
        Tile tile;
        tile.batch = head / heads_q;
        tile.head = head % heads_q;
        u64 first = start + (u64)part * TILE_ROWS;
        tile.first_query = first < end ? (u32)first : end;
        tile.rows = end - tile.first_query < TILE_ROWS ? end - tile.first_query : TILE_ROWS;
        tile.flags = flags_of(index);
        tile.first_segment = first_segment;
        tile.segments = count;
        tile.first_output = tile.flags & TILE_MERGE ? partials : pass.first_output(rectangle, levels);
        tiles[(block_number(set_kv_head, index, block) * group + member) * tiles_per_block + part] = tile;
    }
};

struct PaperTileParams {
    PassTiles common;
    // Whether queries meet all keys of the rectangle; SEGMENT_LIMITED where not all of them are visible.
    u32 exact;
    u32 limited;
    i32 visible;
    // Keys of a sorted block, 0 for none.
    u32 block_size;
    // SEGMENT_SORTED or 0.
    u32 sorted;
    // Room of a block's list.
    u32 segments_per_block;
};

static_assert(sizeof(PassTiles) == 128 && sizeof(PaperTileParams) == 152, "the host's mirrors count on it");
static_assert(sizeof(Passes<PaperTileParams>) == 1248, "the host's mirror of this struct counts on it");

} // namespace hyperattn

// One thread per tile: for each pass ceil(kv_heads * rectangles * blocks * group * tiles_per_block / 128) blocks of 128
// threads. A block of queries has segments_per_block segments.
extern "C" __global__ void __launch_bounds__(128)
    paper_tiles(const __grid_constant__ hyperattn::Passes<hyperattn::PaperTileParams> passes)
{
    using namespace hyperattn;
    u32 thread_block;
    const PaperTileParams &params = passes.pass(thread_block);
    const PassTiles &common = params.common;
    u32 per_block = common.group * common.tiles_per_block;
    u64 at = (u64)thread_block * 128 + threadIdx.x;
    if (at >= (u64)common.kv_heads * common.pass.count * common.blocks * per_block)
        return;
    u32 number = (u32)(at / per_block), member = (u32)(at % per_block) / common.tiles_per_block;
    u32 part = (u32)(at % common.tiles_per_block);
    u32 block = number % common.blocks, index = number / common.blocks % common.pass.count;
    u32 set_kv_head = number / common.blocks / common.pass.count;

    u32 start = 0, end = 0, count = 0, partials = 0;
    u32 first_segment = common.first_segment + params.segments_per_block * number;
    Segment segments[2];
    Rectangle rectangle = {};
    if (common.rectangle(index, rectangle)) {
        u32 queries = rectangle.query_end - rectangle.query_start, keys = rectangle.key_end - rectangle.key_start;
        u32 hidden_start = 0, hidden_end = 0;
        start = rectangle.query_start, end = rectangle.query_end;
        if (params.exact) {
            if (common.pass.kind == PASS_LEAVES && common.pass.one.key_end > common.pass.one.key_start) {
                u32 first = common.pass.one.key_start;
                segments[count++] = {first, common.pass.one.key_end - first, 0, 0.0f, 0, 0};
            }
            // Later queries may see more keys: long tiles first.
            u32 tiles = (queries + TILE_ROWS - 1) / TILE_ROWS;
            start = block < tiles ? start + (tiles - 1 - block) * TILE_ROWS : end;
            end = end - start < TILE_ROWS ? end : start + TILE_ROWS;
            u32 key_end = rectangle.key_end;
            if (params.limited && start < end) {
                i64 seen = (i64)end - 1 + params.visible;
                seen = seen < rectangle.key_start ? rectangle.key_start : seen;
                key_end = seen < key_end ? (u32)seen : key_end;
            }
            if (key_end > rectangle.key_start)
                segments[count++] = {rectangle.key_start, key_end - rectangle.key_start, params.limited, 0.0f, 0, 0};
        } else if (params.block_size) {
            start = rectangle.query_start + first_query_of(block, params.block_size, queries, keys);
            end = rectangle.query_start + first_query_of(block + 1, params.block_size, queries, keys);
            u64 first = (u64)block * params.block_size, last = first + params.block_size;
            hidden_start = rectangle.key_start + (u32)(first < keys ? first : keys);
            hidden_end = rectangle.key_start + (u32)(last < keys ? last : keys);
            if (hidden_start < hidden_end)
                segments[count++] = {hidden_start, hidden_end - hidden_start, params.sorted, 0.0f, 0, 0};
        } else {
            u64 first = start + (u64)block * TILE_ROWS;
            start = first < end ? (u32)first : end;
            end = end - start < TILE_ROWS ? end : start + TILE_ROWS;
        }
        if (!params.exact && common.sample_size) {
            u32 list = set_kv_head * common.pass.count + index;
            u32 first = common.first_position + list * common.sample_size;
            u32 flags = (u32)SEGMENT_LISTED | params.sorted;
            segments[count++] = {
                first, common.sample_size, flags, common.weight(rectangle), hidden_start, hidden_end};
        }
        bool writes = member == 0 && part == 0;
        if (writes) {
            for (u32 i = 0; i < count; i++)
                common.segments[first_segment + i] = segments[i];
        }
        if (common.flags & TILE_MERGE) {
            auto merge = [&](u32 first_output) {
                if (writes)
                    common.segments[first_segment + count + partials] = {first_output, 0, 0, 0.0f, 0, 0};
                partials++;
            };
            common.pass.for_each_output(common.pass.first + index, merge);
            if (common.merges_one)
                merge(common.levels * (common.pass.square.len / 2) - common.pass.square.query_start);
        }
    }
    common.write(rectangle, set_kv_head, index, block, member, part, start, end, first_segment, count, partials);
}
