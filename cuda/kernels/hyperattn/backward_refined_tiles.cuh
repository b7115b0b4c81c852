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
constexpr u32 ADD_COLUMNS_OF_LANE = 8;
constexpr u32 ADD_COLUMNS = 32 * ADD_COLUMNS_OF_LANE;
// Rows that a warp loads before it adds the first, and keys whose sums it has.
constexpr u32 ADD_ROWS = 4;
constexpr u32 KEYS_OF_WARP = ADDED_KEYS / ADD_WARPS;

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
    u32 ranges = g.added_ranges(p);
    u32 *starts = g.range_starts + (u64)in_turn * (ranges + 1);
    const u32 *positions = p.positions + (u64)place * p.most_positions;
    // They ascend; the one behind the last is in no range.
    for (u32 i = threadIdx.x; i <= count; i += LISTED_THREADS) {
        u32 from = i > 0 ? positions[i - 1] / ADDED_KEYS + 1 : 0;
        u32 to = i < count ? positions[i] / ADDED_KEYS : ranges;
        for (u32 range = from; range <= to; ++range)
            starts[range] = i;
    }
}

struct AddShared {
    // Of ADD_THREADS places, place by place: row of partial sums, and key within the range.
    u32 rows[ADD_THREADS * ADDED_KEYS];
    u8 keys[ADD_THREADS * ADDED_KEYS];
    u32 counts[ADD_WARPS];
};

// Lists the rows that up to ADD_THREADS places of the turn from `first_place` on have for a range of keys; how many.
__device__ __forceinline__ u32 list_rows(const RefinedParams &p, const RefinedGradientParams &g, AddShared &shared,
                                         u32 first_place, u32 end_place)
{
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, place = first_place + threadIdx.x, start = 0, count = 0;
    if (place < end_place) {
        const u32 *starts = g.range_starts + (u64)place * (g.added_ranges(p) + 1) + blockIdx.x;
        start = starts[0];
        count = starts[1] - start;
    }
    u32 before = count;
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        u32 other = __shfl_up_sync(ALL_LANES, before, distance);
        before += lane >= distance ? other : 0;
    }
    if (lane == 31)
        shared.counts[warp] = before;
    __syncthreads();
    before -= count;
    u32 all = 0;
#pragma unroll
    for (u32 i = 0; i < ADD_WARPS; ++i) {
        before += i < warp ? shared.counts[i] : 0;
        all += shared.counts[i];
    }
    const u32 *positions = p.positions + (u64)(g.first_place + place) * p.most_positions + start;
    for (u32 i = 0; i < count; ++i) {
        shared.rows[before + i] = place * p.most_positions + start + i;
        shared.keys[before + i] = (u8)(positions[i] - blockIdx.x * ADDED_KEYS);
    }
    __syncthreads();
    return all;
}

// Adds the partial sums of a range of keys of one KV head to those of the keys, place by place. A warp has some of the
// keys.
__device__ __forceinline__ void add_listed(const RefinedParams &p, const RefinedGradientParams &g, AddShared &shared)
{
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = p.summary_width();
    u64 places_of_kv_head = (u64)p.group * p.groups_of_head * GROUP_TILES;
    u64 turn_first = (u64)p.pass_first * GROUP_TILES + g.first_place, turn_end = turn_first + g.places;
    u32 kv_head = (u32)(turn_first / places_of_kv_head) + blockIdx.y;
    u64 first = kv_head * places_of_kv_head, end = first + places_of_kv_head;
    u32 first_in_turn = first > turn_first ? (u32)(first - turn_first) : 0;
    u32 end_in_turn = end < turn_end ? (u32)(end - turn_first) : g.places;

    // Lanes beyond the last column repeat it.
    const float *partials[ADD_COLUMNS_OF_LANE];
    u32 dims[ADD_COLUMNS_OF_LANE];
#pragma unroll
    for (u32 c = 0; c < ADD_COLUMNS_OF_LANE; ++c) {
        u32 column = min(blockIdx.z * ADD_COLUMNS + c * 32 + lane, width - 1);
        bool of_key = column < p.head_dim;
        partials[c] = of_key ? g.key_partials + column : g.value_partials + (column - p.head_dim);
        dims[c] = of_key ? p.head_dim : p.value_dim;
    }
    float sums[KEYS_OF_WARP][ADD_COLUMNS_OF_LANE] = {};
    u32 met = 0;
    for (u32 place = first_in_turn; place < end_in_turn; place += ADD_THREADS) {
        u32 count = list_rows(p, g, shared, place, end_in_turn);
#pragma unroll
        for (u32 k = 0; k < KEYS_OF_WARP; ++k) {
            for (u32 listed = 0; listed < count; listed += 32) {
                bool own = listed + lane < count && shared.keys[listed + lane] == k * ADD_WARPS + warp;
                u32 found = __ballot_sync(ALL_LANES, own);
                met |= found ? 1u << k : 0;
                while (found) {
                    float x[ADD_ROWS][ADD_COLUMNS_OF_LANE];
                    bool there[ADD_ROWS];
#pragma unroll
                    for (u32 i = 0; i < ADD_ROWS; ++i) {
                        there[i] = found != 0;
                        u64 row = shared.rows[listed + (there[i] ? __ffs(found) - 1 : 0)];
                        found &= found - 1;
#pragma unroll
                        for (u32 c = 0; c < ADD_COLUMNS_OF_LANE; ++c)
                            x[i][c] = there[i] ? partials[c][row * dims[c]] : 0.0f;
                    }
#pragma unroll
                    for (u32 i = 0; i < ADD_ROWS; ++i) {
#pragma unroll
                        for (u32 c = 0; c < ADD_COLUMNS_OF_LANE; ++c)
                            sums[k][c] += x[i][c];
                    }
                }
            }
        }
        // Everybody has read the list.
        __syncthreads();
    }
#pragma unroll
    for (u32 k = 0; k < KEYS_OF_WARP; ++k) {
        if (!(met >> k & 1))
            continue;
        u64 row = (u64)(kv_head - g.first_kv_head) * p.n_k + blockIdx.x * ADDED_KEYS + k * ADD_WARPS + warp;
#pragma unroll
        for (u32 c = 0; c < ADD_COLUMNS_OF_LANE; ++c) {
            u32 column = blockIdx.z * ADD_COLUMNS + c * 32 + lane;
            if (column < p.head_dim)
                g.key_sums[row * p.head_dim + column] += sums[k][c];
            else if (column < width)
                g.value_sums[row * p.value_dim + column - p.head_dim] += sums[k][c];
        }
    }
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

// Grid: (ranges of ADDED_KEYS keys, KV heads of the turn, slices of ADD_COLUMNS of a key's sums); block ADD_THREADS.
extern "C" __global__ void __launch_bounds__(hyperattn::refined::ADD_THREADS)
    backward_refined_add_listed(const __grid_constant__ hyperattn::refined::RefinedParams p,
                                const __grid_constant__ hyperattn::refined::RefinedGradientParams g)
{
    __shared__ hyperattn::refined::AddShared shared;
    hyperattn::refined::add_listed(p, g, shared);
}
