// The loading warps of the Hopper backward kernels: they take tiles, look up their rows and those of the blocks of
// columns, and copy the vectors by 16 bytes.
//
// The four warps go through all tiles, each at its own pace, and load what is their own: the rows of tiles that go to
// one of the slots, and the blocks that go to one of the ring's stages. So look-ups of one go on beside copies of
// others. A tile's rows are loaded while the columns of the tile before are.
//
// Nobody waits for ever. What a warp waits for before it loads something comes earlier in the order in which the
// computing warps read than all that it has looked up but not loaded: rows wait for the tile before the last, of which
// everything is loaded then, and a block for one that is a ring's length before.
#pragma once

#include "backward_wgmma_layout.cuh"

namespace hyperattn {
namespace backward_hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

using hopper::barrier_arrive;
using hopper::barrier_wait;
using hopper::list_rows;
using hopper::shared_address;
using hopper::swizzled;
using hopper::warp_arrive;
using hopper::warp_arrive_after_copies;
using hopper::warp_wait;

// Vectors of a tensor, of one batch item and head.
struct Vectors {
    const char *data;
    i64 row_stride;
    u32 dim;
};

__device__ __forceinline__ Vectors vectors(const View &tensor, u32 batch, u32 head, u32 dim)
{
    return {tensor.row(batch, head, 0), tensor.row_stride, dim};
}

// Asks for a row of sums that will be read soon.
__device__ __forceinline__ void prefetch_row(const float *row, u32 dim)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row), "r"(dim * (u32)sizeof(float)) : "memory");
}

// The tiles of queries: their rows, and their blocks of keys.
template <u32 DIM> struct QueryTiles {
    using S = Shape<DIM>;
    using TILE = Tile;
    using Block = key_stream::KeyBlock;
    static constexpr u32 LANE_ROWS = TILE_ROWS / 32, LANE_COLUMNS = S::COLUMNS / 32;

    // Of a block that was looked up.
    struct Found {
        u32 row[LANE_COLUMNS];
        u32 flags;
        float log_weight;
        bool extra;
    };

    const BackwardParams &params;
    const AttendParams &p;
    const u32 lane;

    __device__ __forceinline__ QueryTiles(const BackwardParams &backward)
        : params(backward), p(backward.attend), lane(threadIdx.x % 32)
    {
    }

    __device__ __forceinline__ u32 count() const { return p.tile_count; }
    __device__ __forceinline__ static auto &loaded(typename S::Control &control, u32 warp, u32 which)
    {
        return control.queries[warp][which];
    }
    __device__ __forceinline__ const Tile *list() const { return p.tiles; }

    // What follows from the tile: for one thread.
    __device__ __forceinline__ void complete(LoadedQueryTile &loaded) const
    {
        loaded.kv_head = p.kv_head(loaded.tile);
        loaded.order = p.order_of_keys(loaded.tile.batch, loaded.kv_head);
    }

    // Whether blocks are looked up with what is known of the rows.
    __device__ __forceinline__ static bool needs_rows(const Tile &) { return false; }

    __device__ __forceinline__ static Block before_first()
    {
        Block block = {};
        block.number = NO_KEY;
        return block;
    }

    // The largest limit of a tile's rows. Those of sorted ones do not matter, see TILE_SORTED.
    __device__ __forceinline__ u32 highest(const Tile &tile) const
    {
        return p.limit(tile.first_query + tile.rows - 1);
    }

    __device__ __forceinline__ void advance(const Tile &tile, Block &block) const
    {
        key_stream::advance<S::COLUMNS>(p, tile, p.limit(tile.first_query), highest(tile), block);
    }

    __device__ __forceinline__ u32 row(const Tile &tile, u32 i) const
    {
        return i < tile.rows ? p.query_row(tile, i) : NO_KEY;
    }

    // What is known of the rows in a slot, for one warp.
    __device__ __forceinline__ void describe(const Tile &tile, const u32 (&row)[LANE_ROWS], RowSlot &slot) const
    {
        RowTerms terms[LANE_ROWS];
        u64 first_row = (u64)(tile.batch * p.heads_q + tile.head) * p.n_q;
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i)
            terms[i] = query_stream::terms_of(params, first_row, row[i]);
        float exponent = __uint_as_float(0xff800000u);
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            // |delta| is below 2^(this - 126).
            u32 biased = max(__float_as_uint(fabsf(terms[i].delta)) >> 23, 126u);
            exponent = fmaxf(exponent, (float)(biased - 126) - terms[i].lse);
        }
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2)
            exponent = fmaxf(exponent, __shfl_xor_sync(ALL_LANES, exponent, distance));
        slot.exponent = exponent;
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            slot.terms[32 * i + lane] = terms[i];
            slot.hidden_start[32 * i + lane] = row[i] == NO_KEY ? 0 : p.limit(row[i]);
        }
        slot.head = tile.head;
        slot.first_output = 0;
    }

    // Asks for the sums that the tile goes on from, for the warp that has described its rows.
    __device__ __forceinline__ void prefetch(const Tile &tile, const RowSlot &slot) const
    {
        if (!(tile.flags & TILE_RESUME))
            return;
        const float *sums = p.state_accumulated + (u64)(tile.batch * p.heads_q + tile.head) * p.n_q * p.head_dim;
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            u32 row = slot.row[32 * i + lane];
            if (row != NO_KEY)
                prefetch_row(sums + (u64)row * p.head_dim, p.head_dim);
        }
    }

    __device__ __forceinline__ Vectors rows_of(const Tile &tile, u32 which) const
    {
        return which == 0 ? vectors(p.q, tile.batch, tile.head, p.head_dim)
                          : vectors(params.dout, tile.batch, tile.head, p.value_dim);
    }

    __device__ __forceinline__ void look_up(const LoadedQueryTile &loaded, const Block &block, const RowSlot &,
                                            Found &found) const
    {
        u32 beyond = highest(loaded.tile);
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; ++i)
            found.row[i] = key_stream::place(p, loaded.order, beyond, block, 32 * i + lane).row;
        found.flags = block.flags;
        found.log_weight = block.segment.log_weight;
        found.extra = block.segment.flags & SEGMENT_EXTRA;
    }

    __device__ __forceinline__ void describe(const Found &found, ColumnStage<S::COLUMNS> &stage) const
    {
        if (found.flags & STAGE_MASKED) {
            // The rows of limited segments are positions.
#pragma unroll
            for (u32 i = 0; i < LANE_COLUMNS; ++i)
                stage.position[32 * i + lane] = found.row[i];
        }
        stage.log_weight = found.log_weight;
    }

    __device__ __forceinline__ Vectors columns_of(const LoadedQueryTile &loaded, const Found &found, u32 which) const
    {
        u32 dim = which == 0 ? p.head_dim : p.value_dim;
        if (found.extra)
            return {which == 0 ? p.extra_keys : p.extra_values, (i64)dim * 2, dim};
        return vectors(which == 0 ? p.k : p.v, loaded.tile.batch, loaded.kv_head, dim);
    }
};

// The tiles of keys: their rows, and their blocks of queries.
template <u32 DIM> struct KeyTiles {
    using S = Shape<DIM>;
    using TILE = KeyTile;
    using Block = query_stream::QueryBlock;
    static constexpr u32 LANE_ROWS = TILE_ROWS / 32, LANE_COLUMNS = S::COLUMNS / 32;

    struct Found {
        u32 row[LANE_COLUMNS];
        RowTerms terms[LANE_COLUMNS];
        // The lane's word of ColumnStage::hidden.
        u32 hidden;
        u32 flags;
        u32 head;
        u32 first;
        float log_weight;
    };

    const BackwardParams &params;
    const AttendParams &p;
    const u32 lane;

    __device__ __forceinline__ KeyTiles(const BackwardParams &backward)
        : params(backward), p(backward.attend), lane(threadIdx.x % 32)
    {
    }

    __device__ __forceinline__ u32 count() const { return params.key_tile_count; }
    __device__ __forceinline__ static auto &loaded(typename S::Control &control, u32 warp, u32 which)
    {
        return control.keys[warp][which];
    }
    __device__ __forceinline__ const KeyTile *list() const { return params.key_tiles; }

    __device__ __forceinline__ static void complete(LoadedKeyTile &) {}

    __device__ __forceinline__ static bool needs_rows(const KeyTile &tile)
    {
        return tile.flags & (KEY_TILE_LIMITED | KEY_TILE_HIDING);
    }

    __device__ __forceinline__ static Block before_first() { return query_stream::before_first(); }

    // Which queries are hidden is found out for each block.
    __device__ __forceinline__ void advance(const KeyTile &tile, Block &block) const
    {
        query_stream::advance<S::COLUMNS>(params, tile, NO_KEY, 0, block);
    }

    __device__ __forceinline__ u32 row(const KeyTile &tile, u32 i) const
    {
        return i < tile.rows ? params.key_row(tile, i, params.key_position(tile, i)) : NO_KEY;
    }

    __device__ __forceinline__ void describe(const KeyTile &tile, const u32 (&row)[LANE_ROWS], RowSlot &slot) const
    {
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            u32 key = 32 * i + lane, start = 0, end = 0;
            // Limits are of keys that are not sorted: their rows are their positions.
            if (row[i] != NO_KEY)
                query_stream::hidden_queries(params, tile, key, row[i], start, end);
            slot.hidden_start[key] = start;
            slot.hidden_count[key] = end > start ? end - start : 0;
        }
        slot.head = tile.kv_head;
        slot.first_output = tile.first_output;
        if (!(tile.flags & KEY_TILE_RESUME))
            return;
        u64 first_row = params.sums_row(tile, 0);
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i)
            slot.resumes[32 * i + lane] = row[i] == NO_KEY ? 0 : params.key_stored[first_row + row[i]];
    }

    __device__ __forceinline__ void prefetch(const KeyTile &tile, const RowSlot &slot) const
    {
        if (!(tile.flags & KEY_TILE_RESUME))
            return;
        u64 first_row = params.sums_row(tile, 0);
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            u64 row = first_row + slot.row[32 * i + lane];
            if (!slot.resumes[32 * i + lane])
                continue;
            prefetch_row(params.key_sums + row * p.head_dim, p.head_dim);
            prefetch_row(params.value_sums + row * p.value_dim, p.value_dim);
        }
    }

    __device__ __forceinline__ Vectors rows_of(const KeyTile &tile, u32 which) const
    {
        return vectors(which == 0 ? p.k : p.v, tile.batch, tile.kv_head, which == 0 ? p.head_dim : p.value_dim);
    }

    __device__ __forceinline__ void look_up(const LoadedKeyTile &loaded, const Block &block, const RowSlot &slot,
                                            Found &found) const
    {
        const KeyTile &tile = loaded.tile;
        u64 first_row = query_stream::first_row(params, tile, block);
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; ++i)
            found.row[i] = query_stream::row_of(params, first_row, block, 32 * i + lane);
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; ++i)
            found.terms[i] = query_stream::terms_of(params, first_row, found.row[i]);
        found.head = query_stream::query_head(params, tile, block);
        found.first = block.segment.first + block.offset;
        found.log_weight = block.segment.log_weight;
        found.flags = found.hidden = 0;
        if (!(tile.flags & (KEY_TILE_LIMITED | KEY_TILE_HIDING)))
            return;
        u32 last = found.first + block.count;
        bool any = false, some = false;
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            u32 start = slot.hidden_start[32 * i + lane], end = start + slot.hidden_count[32 * i + lane];
            bool meets = start < last && end > found.first && start < end;
            bool whole = meets && start <= found.first && end >= last;
            any |= meets;
            some |= meets && !whole;
            u32 word = __ballot_sync(ALL_LANES, whole);
            found.hidden = lane == i ? word : found.hidden;
        }
        any = __any_sync(ALL_LANES, any);
        // What is not finite must not reach keys that are limited.
        if (tile.flags & KEY_TILE_LIMITED)
            found.flags = any ? STAGE_MASKED | STAGE_STRADDLES : 0;
        else if (__any_sync(ALL_LANES, some))
            found.flags = STAGE_MASKED;
        else
            found.flags = any ? STAGE_HIDES : 0;
    }

    __device__ __forceinline__ void describe(const Found &found, ColumnStage<S::COLUMNS> &stage) const
    {
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; ++i) {
            u32 query = 32 * i + lane;
            stage.terms[query] = make_float2(found.log_weight - found.terms[i].lse, found.terms[i].delta);
            if (found.flags & STAGE_MASKED)
                stage.position[query] = found.row[i] == NO_KEY ? NO_KEY : found.first + query;
        }
        if ((found.flags & STAGE_HIDES) && lane < TILE_ROWS / 32)
            stage.hidden[lane] = found.hidden;
    }

    __device__ __forceinline__ Vectors columns_of(const LoadedKeyTile &loaded, const Found &found, u32 which) const
    {
        const KeyTile &tile = loaded.tile;
        return which == 0 ? vectors(p.q, tile.batch, found.head, p.head_dim)
                          : vectors(params.dout, tile.batch, found.head, p.value_dim);
    }
};

// A loading warp's way through the tiles of TILES.
template <u32 DIM, typename TILES> struct Loader {
    using S = Shape<DIM>;
    using Block = typename TILES::Block;
    using Found = typename TILES::Found;
    const TILES tiles;
    typename S::Control &control;
    const u32 data;
    const u32 warp;
    const u32 lane;

    // Of the first warp: the lane's word of the tile that is passed on next, and the first lane's number of the one
    // after that.
    u32 word;
    u32 number;
    Ring<DRAWN_STAGES> put_place;
    Ring<DRAWN_STAGES> take_place;
    // The next tile's rows go here.
    Ring<ROW_SLOTS> next_slot;
    // Which of the two loaded tiles has the block that is looked up next, its rows, and the block's stage.
    u32 which = 0;
    Ring<ROW_SLOTS> slot;
    u32 stage = 0;
    // Whether the tile after it is loaded too, and whether there is none.
    bool begun = false;
    bool ended = false;
    // Of the stage that is the warp's.
    u32 phase = 1;

    __device__ __forceinline__ Loader(const BackwardParams &params, typename S::Control &shared_control,
                                      u32 shared_data)
        : tiles(params), control(shared_control), data(shared_data),
          warp(__shfl_sync(ALL_LANES, threadIdx.x / 32, 0)), lane(threadIdx.x % 32)
    {
    }

    __device__ __forceinline__ u32 barrier(u32 number) const { return shared_address(&control.barriers[number]); }
    __device__ __forceinline__ auto &loaded(u32 which) const { return TILES::loaded(control, warp, which); }

    // Nobody waits for the number here.
    __device__ __forceinline__ void draw()
    {
        if (lane == 0)
            number = atomicAdd(tiles.p.next_tile, 1u);
    }

    // Nobody waits for the words here.
    __device__ __forceinline__ void read_drawn()
    {
        using TILE = typename TILES::TILE;
        u32 drawn = __shfl_sync(ALL_LANES, number, 0);
        bool exists = drawn < tiles.count();
        word = lane == DRAWN_EXISTS ? exists : 0;
        if (exists && lane < sizeof(TILE) / 4)
            word = ((const u32 *)(tiles.list() + drawn))[lane];
    }

    __device__ __forceinline__ void put_drawn()
    {
        warp_wait(barrier(S::DRAWN_EMPTY + put_place.stage), put_place.phase ^ 1);
        if (lane <= DRAWN_EXISTS)
            control.drawn[put_place.stage].words[lane] = word;
        warp_arrive(barrier(S::DRAWN_FULL + put_place.stage), 1, lane);
        put_place.advance();
    }

    // Takes the next tile; false when there is none. The first warp passes on the one after.
    __device__ __forceinline__ bool take(u32 which)
    {
        warp_wait(barrier(S::DRAWN_FULL + take_place.stage), take_place.phase);
        const DrawnTile &drawn = control.drawn[take_place.stage];
        auto &to = loaded(which);
        if (lane < sizeof(to.tile) / 4)
            ((u32 *)&to.tile)[lane] = drawn.words[lane];
        bool exists = drawn.words[DRAWN_EXISTS];
        warp_arrive(barrier(S::DRAWN_EMPTY + take_place.stage), 1, lane);
        take_place.advance();
        if (lane == 0) {
            tiles.complete(to);
            to.block.count = 0;
        }
        __syncwarp();
        if (warp == 0) {
            put_drawn();
            read_drawn();
            draw();
        }
        return exists;
    }

    // Lists rows 32 i + lane, for the copies that follow when the warp has been synchronized. Whether all are rows.
    template <u32 COUNT> __device__ __forceinline__ bool list(const u32 (&row)[COUNT])
    {
        list_rows(control.list[warp], lane, row);
        u32 last = row[0];
#pragma unroll
        for (u32 i = 1; i < COUNT; ++i)
            last = max(last, row[i]);
        return __all_sync(ALL_LANES, last != NO_KEY);
    }

    template <u32 ROWS> __device__ __forceinline__ void copy(u32 to, bool whole, const Vectors &from) const
    {
        hopper::copy_rows<ROWS, S::CHUNKS>(to, control.list[warp], whole, lane, from.data, from.row_stride, from.dim);
    }

    // Goes to the first block of the tile after, and loads that tile's rows if they go to this warp's slot.
    __device__ __forceinline__ void begin_next()
    {
        const bool loads = warp / ROW_WARPS == next_slot.stage;
        const u32 vector = warp % ROW_WARPS;
        RowSlot &rows = control.rows[next_slot.stage];
        const u32 empty = barrier(S::ROWS_EMPTY + next_slot.stage), full = barrier(S::ROWS_FULL + next_slot.stage);
        begun = true;
        auto &next = loaded(which ^ 1);
        const auto &tile = next.tile;
        ended = !take(which ^ 1);
        if (ended) {
            // Tells the computing warps that there are no more tiles.
            if (loads) {
                warp_wait(empty, next_slot.phase ^ 1);
                if (vector == 0)
                    rows.rows = 0;
                warp_arrive(full, LOADER_ARRIVALS, lane);
            }
            return;
        }
        if (tile.rows == 0)
            return;
        u32 row[TILES::LANE_ROWS];
        if (loads) {
#pragma unroll
            for (u32 i = 0; i < TILES::LANE_ROWS; ++i)
                row[i] = tiles.row(tile, 32 * i + lane);
        }
        Block block = TILES::before_first();
        tiles.advance(tile, block);
        // All lanes write the same.
        next.block = block;
        if (loads) {
            bool whole = list(row);
            warp_wait(empty, next_slot.phase ^ 1);
            copy<TILE_ROWS>(data + (next_slot.stage * 2 + vector) * S::ROWS_BYTES, whole, tiles.rows_of(tile, vector));
            if (vector == 0) {
#pragma unroll
                for (u32 i = 0; i < TILES::LANE_ROWS; ++i)
                    rows.row[32 * i + lane] = row[i];
                tiles.describe(tile, row, rows);
                rows.batch = tile.batch;
                rows.rows = tile.rows;
                rows.flags = tile.flags;
                rows.has_columns = next.block.count;
            }
            warp_arrive_after_copies(full, lane);
        }
        next_slot.advance();
    }

    // Goes to the tile that was loaded last.
    __device__ __forceinline__ void go_to_next()
    {
        if (loaded(which).tile.rows != 0)
            slot.advance();
        which ^= 1;
        begun = false;
        const auto &tile = loaded(which).tile;
        if (tile.rows == 0)
            return;
        if (TILES::needs_rows(tile))
            warp_wait(barrier(S::ROWS_FULL + slot.stage), slot.phase);
        // Not earlier: a long tile's columns would displace them from the cache.
        if (warp == slot.stage * ROW_WARPS)
            tiles.prefetch(tile, control.rows[slot.stage]);
    }

    // Looks up the warp's next block, as far as tiles are loaded.
    __device__ __forceinline__ bool look_up(Found &found)
    {
#pragma unroll 1
        for (;;) {
            __syncwarp();
            Block block = loaded(which).block;
            if (block.count == 0) {
                if (!begun || ended)
                    return false;
                go_to_next();
                continue;
            }
            const bool own = warp / S::STAGE_WARPS == stage;
            if (own)
                tiles.look_up(loaded(which), block, control.rows[slot.stage], found);
            tiles.advance(loaded(which).tile, block);
            __syncwarp();
            loaded(which).block = block;
            stage = (stage + 1) % S::STAGES;
            if (own) {
                found.flags |= block.count == 0 ? (u32)STAGE_LAST : 0;
                return true;
            }
        }
    }

    // Loads a block of a tile that was looked up.
    __device__ __forceinline__ void load(u32 which, const Found &found)
    {
        const u32 own = warp / S::STAGE_WARPS;
        bool whole = list(found.row);
        warp_wait(barrier(S::COLUMNS_EMPTY + own), phase);
        phase ^= 1;
        ColumnStage<S::COLUMNS> &columns = control.columns[own];
        if (warp % S::STAGE_WARPS == 0) {
            tiles.describe(found, columns);
            columns.flags = found.flags;
        }
        u32 to = data + S::COLUMNS_AT + own * 2 * S::COLUMNS_BYTES;
#pragma unroll 1
        for (u32 vector = warp % S::STAGE_WARPS; vector < 2; vector += S::STAGE_WARPS)
            copy<S::COLUMNS>(to + vector * S::COLUMNS_BYTES, whole, tiles.columns_of(loaded(which), found, vector));
        warp_arrive_after_copies(barrier(S::COLUMNS_FULL + own), lane);
    }

    __device__ __forceinline__ void run()
    {
        if (warp == 0) {
            draw();
            read_drawn();
            draw();
            put_drawn();
            read_drawn();
            draw();
        }
        // Before the first tile comes one without rows.
        if (lane == 0) {
            loaded(0).tile.rows = 0;
            loaded(0).block.count = 0;
        }
        Found found;
        u32 found_in = 0;
        bool pending = false;
#pragma unroll 1
        do {
            Found next;
            bool more = S::AHEAD && look_up(next);
            if (pending)
                load(found_in, found);
            // As soon as the first block of a tile is under way, the rows of the tile after.
            if (!begun && (pending ? found_in == which : !more))
                begin_next();
            if (!S::AHEAD)
                more = look_up(next);
            found = next;
            found_in = which;
            pending = more;
        } while (pending || !ended);
    }
};

#endif

} // namespace backward_hopper
} // namespace hyperattn
