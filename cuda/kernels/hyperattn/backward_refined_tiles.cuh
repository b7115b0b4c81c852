// The inverse lists of METHOD_REFINED. Near keys are met by runs of queries, tiles one after the other. The listed keys
// of a tile of queries meet the tile alone: their sums are stored apart, and then added to those of the keys in the
// order of the tiles.
#pragma once

#include "backward_refined_params.cuh"

namespace hyperattn::refined {

constexpr u32 NEAR_THREADS = 128;
constexpr u32 LISTED_THREADS = 512;
constexpr u32 ADD_THREADS = 256;
constexpr u32 ADD_WARPS = ADD_THREADS / 32;
// Columns of a row that a lane adds up: rows have 256 at most.
constexpr u32 ADD_COLUMNS = 8;
// Rows that a warp loads before it adds the first, and places that it looks through at a time.
constexpr u32 ADD_ROWS = 4;
constexpr u32 ADD_PLACES = 256;

// Queries of a head, from the first on, whose tiles have the key of this position among their near keys or before:
// tiles see no less than those before them, and their near keys begin no earlier. Tiles without representatives are
// taken for tiles that have some.
__device__ __forceinline__ u32 near_end(const RefinedParams &p, u32 head_number, u32 position)
{
    u32 low = 0, high = p.query_tiles;
    while (low < high) {
        u32 middle = (low + high) / 2;
        QueryTile tile = query_tile(p, head_number, middle);
        Frame frame = frame_of(p, tile.first_query, tile.queries, p.budgets[head_number]);
        if (!frame.chooses || frame.near <= position)
            low = middle + 1;
        else
            high = middle;
    }
    return low == p.query_tiles ? p.n_q : query_tile(p, head_number, low).first_query;
}

// Two tiles for TILE_ROWS keys: one for all, or one for either half where near keys of some tile begin between them.
__device__ __forceinline__ void write_near_tiles(const RefinedParams &p, const BackwardParams &backward,
                                                 const RefinedGradientParams &g, u32 number)
{
    constexpr u32 HALF = TILE_ROWS / 2;
    static_assert(HALF == KEY_BLOCK, "near keys begin at a block");
    u32 pairs = (p.n_k + (TILE_ROWS - 1)) / TILE_ROWS;
    u32 set_kv_head = number / pairs, first_key = number % pairs * TILE_ROWS;
    u32 kv_head = g.first_kv_head + set_kv_head, heads_kv = p.heads_q / p.group;
    u32 keys = min(p.n_k - first_key, TILE_ROWS);
    u32 ends[2];
    bool apart = false;
    auto find_ends = [&](u32 member) {
        ends[0] = near_end(p, kv_head * p.group + member, first_key);
        ends[1] = near_end(p, kv_head * p.group + member, first_key + HALF);
    };
    for (u32 member = 0; member < p.group && keys > HALF; ++member) {
        find_ends(member);
        apart |= ends[0] != ends[1];
    }
    bool causal = p.flags & REFINED_CAUSAL;
    for (u32 half = 0; half < 2; ++half) {
        KeyTile tile = {};
        tile.batch = kv_head / heads_kv;
        tile.kv_head = kv_head % heads_kv;
        tile.first_key = first_key + half * HALF;
        tile.rows = !apart ? (half == 0 ? keys : 0) : half == 0 ? HALF : keys - HALF;
        tile.flags = KEY_TILE_STORE | KEY_TILE_COMPACT | (causal ? (u32)KEY_TILE_LIMITED : 0u);
        tile.members = p.group;
        tile.first_segment = (2 * number + half) * p.group;
        tile.segments = 1;
        tile.member_stride = 1;
        tile.first_output = set_kv_head * p.n_k + tile.first_key;
        g.near_tiles[2 * number + half] = tile;
        u32 first = causal ? backward.first_row_seeing(tile.first_key) : 0;
        for (u32 member = 0; member < p.group && tile.rows > 0; ++member) {
            find_ends(member);
            u32 end = ends[half];
            g.near_segments[tile.first_segment + member] = {first, end > first ? end - first : 0, 0, 0.0f, 0, 0};
        }
    }
}

// Tiles of the listed keys of a place, and where they lie among the keys.
__device__ __forceinline__ void write_listed_tiles(const RefinedParams &p, const RefinedGradientParams &g)
{
    u32 in_turn = blockIdx.x, place = g.first_place + in_turn;
    QueryTile tile = tile_of_group(p, p.pass_first + place / GROUP_TILES, place % GROUP_TILES);
    const Segment *listed = segment_with(p, place, SEGMENT_LISTED);
    u32 count = listed ? listed->count : 0, tiles = g.tiles_of_place(p);
    for (u32 i = threadIdx.x; i < tiles; i += LISTED_THREADS) {
        u32 first = i * TILE_ROWS;
        KeyTile written = {};
        written.batch = tile.batch;
        written.kv_head = tile.head / p.group;
        written.first_key = place * p.most_positions + first;
        written.rows = count > first ? min(count - first, TILE_ROWS) : 0;
        written.flags = KEY_TILE_LISTED | KEY_TILE_STORE | KEY_TILE_COMPACT;
        written.first_member = tile.head % p.group;
        written.members = 1;
        written.first_segment = in_turn;
        written.segments = 1;
        written.first_output = in_turn * p.most_positions + first;
        g.listed_tiles[(u64)in_turn * tiles + i] = written;
    }
    if (threadIdx.x == 0)
        g.listed_segments[in_turn] = {tile.first_query, tile.queries, 0, 0.0f, 0, 0};
    const u32 *positions = p.positions + (u64)place * p.most_positions;
    for (u32 range = threadIdx.x; range < g.ranges(p); range += LISTED_THREADS) {
        // They ascend.
        u32 low = 0, high = count;
        while (low < high) {
            u32 middle = (low + high) / 2;
            if (positions[middle] < range * RANGE_KEYS)
                low = middle + 1;
            else
                high = middle;
        }
        ListedRange found = {low, 0};
        for (; low < count && positions[low] / RANGE_KEYS == range; ++low)
            found.keys |= 1u << positions[low] % RANGE_KEYS;
        g.listed_ranges[(u64)range * g.places + in_turn] = found;
    }
}

// Rows of partial sums of each warp's key.
struct AddShared {
    u32 rows[ADD_WARPS][ADD_PLACES];
};

// A warp adds the partial sums of one key to those in `sums`, place by place. Both have rows of `dim`.
__device__ __forceinline__ void add_key(const RefinedParams &p, const RefinedGradientParams &g, u32 *rows,
                                        u32 set_kv_head, u32 position, u32 first_place, u32 end_place,
                                        const float *partials, float *sums, u32 dim)
{
    u32 lane = threadIdx.x % 32, bit = 1u << position % RANGE_KEYS;
    const ListedRange *ranges = g.listed_ranges + (u64)(position / RANGE_KEYS) * g.places;
    float added[ADD_COLUMNS] = {};
    bool met = false;
    for (u32 first = first_place; first < end_place; first += ADD_PLACES) {
        ListedRange range[ADD_PLACES / 32];
#pragma unroll
        for (u32 i = 0; i < ADD_PLACES / 32; ++i) {
            u32 place = first + 32 * i + lane;
            range[i] = place < end_place ? ranges[place] : ListedRange{0, 0};
        }
        u32 count = 0;
#pragma unroll
        for (u32 i = 0; i < ADD_PLACES / 32; ++i) {
            bool listed = range[i].keys & bit;
            u32 found = __ballot_sync(ALL_LANES, listed);
            if (listed)
                rows[count + __popc(found & ((1u << lane) - 1))] = (first + 32 * i + lane) * p.most_positions +
                                                                    range[i].first +
                                                                    __popc(range[i].keys & (bit - 1));
            count += __popc(found);
        }
        __syncwarp();
        met |= count > 0;
        for (u32 i = 0; i < count; i += ADD_ROWS) {
            float x[ADD_ROWS][ADD_COLUMNS];
#pragma unroll
            for (u32 j = 0; j < ADD_ROWS; ++j) {
                const float *from = partials + (u64)rows[min(i + j, count - 1)] * dim;
#pragma unroll
                for (u32 c = 0; c < ADD_COLUMNS; ++c)
                    x[j][c] = i + j < count && lane + 32 * c < dim ? from[lane + 32 * c] : 0.0f;
            }
#pragma unroll
            for (u32 j = 0; j < ADD_ROWS; ++j) {
#pragma unroll
                for (u32 c = 0; c < ADD_COLUMNS; ++c)
                    added[c] += x[j][c];
            }
        }
        // All lanes have read the rows.
        __syncwarp();
    }
    if (!met)
        return;
    float *to = sums + ((u64)set_kv_head * p.n_k + position) * dim;
#pragma unroll
    for (u32 c = 0; c < ADD_COLUMNS; ++c) {
        if (lane + 32 * c < dim)
            to[lane + 32 * c] += added[c];
    }
}

// Adds the partial sums of the turn's places to those of the keys of a KV head.
__device__ __forceinline__ void add_listed(const RefinedParams &p, const RefinedGradientParams &g, AddShared &shared)
{
    u32 warp = threadIdx.x / 32, position = blockIdx.x * ADD_WARPS + warp;
    if (position >= p.n_k)
        return;
    u64 places_of_kv_head = (u64)p.group * p.groups_of_head * GROUP_TILES;
    u64 turn_first = (u64)p.pass_first * GROUP_TILES + g.first_place, turn_end = turn_first + g.places;
    u32 kv_head = (u32)(turn_first / places_of_kv_head) + blockIdx.y;
    u64 first = kv_head * places_of_kv_head, end = first + places_of_kv_head;
    u32 first_place = first > turn_first ? (u32)(first - turn_first) : 0;
    u32 end_place = end < turn_end ? (u32)(end - turn_first) : g.places;
    bool of_key = blockIdx.z == 0;
    add_key(p, g, shared.rows[warp], kv_head - g.first_kv_head, position, first_place, end_place,
            of_key ? g.key_partials : g.value_partials, of_key ? g.key_sums : g.value_sums,
            of_key ? p.head_dim : p.value_dim);
}

} // namespace hyperattn::refined

// Grid: ceil(KV heads of the set * ceil(n_k / TILE_ROWS) / NEAR_THREADS); block NEAR_THREADS.
extern "C" __global__ void __launch_bounds__(hyperattn::refined::NEAR_THREADS)
    backward_refined_near_tiles(const __grid_constant__ hyperattn::refined::RefinedParams p,
                                const __grid_constant__ hyperattn::BackwardParams backward,
                                const __grid_constant__ hyperattn::refined::RefinedGradientParams g)
{
    using namespace hyperattn;
    u32 number = blockIdx.x * refined::NEAR_THREADS + threadIdx.x;
    if (number < g.kv_heads * ((p.n_k + (TILE_ROWS - 1)) / TILE_ROWS))
        refined::write_near_tiles(p, backward, g, number);
}

// Grid: places of the turn; block LISTED_THREADS.
extern "C" __global__ void __launch_bounds__(hyperattn::refined::LISTED_THREADS)
    backward_refined_listed_tiles(const __grid_constant__ hyperattn::refined::RefinedParams p,
                                  const __grid_constant__ hyperattn::refined::RefinedGradientParams g)
{
    hyperattn::refined::write_listed_tiles(p, g);
}

// Grid: (ceil(n_k / (ADD_THREADS / 32)), KV heads of the turn, 2: keys and values); block ADD_THREADS, a warp for each
// key.
extern "C" __global__ void __launch_bounds__(hyperattn::refined::ADD_THREADS)
    backward_refined_add_listed(const __grid_constant__ hyperattn::refined::RefinedParams p,
                                const __grid_constant__ hyperattn::refined::RefinedGradientParams g)
{
    __shared__ hyperattn::refined::AddShared shared;
    hyperattn::refined::add_listed(p, g, shared);
}
