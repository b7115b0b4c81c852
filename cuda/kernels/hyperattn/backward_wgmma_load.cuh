// The loading warps of the Hopper backward kernels: they take tiles, look up their rows and those of the blocks of
// columns, and copy the vectors by 16 bytes.
//
// The four warps go through all tiles, each at its own pace, and load what is their own: the rows of tiles that go to
// one of the slots, and the blocks that go to one of the ring's stages. So look-ups of one go on beside copies of
// others. A tile's rows are loaded while the columns of the tile before are.
//
// Nobody waits forever. In the order in which the computing warps read, what a warp waits for before it loads something
// depends on earlier things only, and it has loaded all earlier ones that are its own; but for the rows of the next
// tile, which come before later blocks of this one and wait for the tile before this one only.
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
    using Block = key_stream::KeyBlock;
    static constexpr u32 LANE_ROWS = TILE_ROWS / 32, LANE_COLUMNS = S::COLUMNS / 32;
    static constexpr bool WAITS_FOR_ROWS = false;

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
    // Of a tile: for one thread.
    __device__ __forceinline__ void take(u32 number, LoadedQueryTile &loaded) const
    {
        loaded.tile = p.tiles[number];
        loaded.kv_head = p.kv_head(loaded.tile);
        loaded.order = p.order_of_keys(loaded.tile.batch, loaded.kv_head);
    }

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

    // Asks for the sums that the tile goes on from.
    __device__ __forceinline__ void prefetch(const Tile &tile, const u32 (&row)[LANE_ROWS], u32 which, RowSlot &) const
    {
        if (!(tile.flags & TILE_RESUME) || which != 0)
            return;
        u64 first_row = (u64)(tile.batch * p.heads_q + tile.head) * p.n_q;
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            if (row[i] != NO_KEY)
                prefetch_row(p.state_accumulated + (first_row + row[i]) * p.head_dim, p.head_dim);
        }
    }

    __device__ __forceinline__ Vectors rows_of(const Tile &tile, u32 which) const
    {
        return which == 0 ? vectors(p.q, tile.batch, tile.head, p.head_dim)
                          : vectors(params.dout, tile.batch, tile.head, p.value_dim);
    }

    __device__ __forceinline__ void look_up(const LoadedQueryTile &loaded, const Block &block, const RowSlot &, Found &found) const
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
    using Block = query_stream::QueryBlock;
    static constexpr u32 LANE_ROWS = TILE_ROWS / 32, LANE_COLUMNS = S::COLUMNS / 32;
    static constexpr bool WAITS_FOR_ROWS = true;

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
    __device__ __forceinline__ void take(u32 number, LoadedKeyTile &loaded) const
    {
        loaded.tile = params.key_tiles[number];
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
    }

    __device__ __forceinline__ void prefetch(const KeyTile &tile, const u32 (&row)[LANE_ROWS], u32 which,
                                             RowSlot &slot) const
    {
        if (!(tile.flags & KEY_TILE_RESUME))
            return;
        const float *sums = which == 0 ? params.key_sums : params.value_sums;
        u32 dim = which == 0 ? p.head_dim : p.value_dim;
        bool resumes[LANE_ROWS];
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i)
            resumes[i] = row[i] != NO_KEY && params.key_stored[params.sums_row(tile, row[i])] != 0;
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            if (resumes[i])
                prefetch_row(sums + params.sums_row(tile, row[i]) * dim, dim);
            if (which == 0)
                slot.resumes[32 * i + lane] = resumes[i];
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
    const TILES tiles;
    typename S::Control &control;
    const u32 data;
    const u32 warp;
    const u32 lane;
    // The next tile's rows go here.
    Ring<ROW_SLOTS> next_slot;
    // The rows of the tile whose columns are loaded.
    Ring<ROW_SLOTS> slot;
    Ring<S::STAGES> ring;
    Ring<NUMBER_STAGES> put_place;
    Ring<NUMBER_STAGES> take_place;

    __device__ __forceinline__ Loader(const BackwardParams &params, typename S::Control &shared_control,
                                      u32 shared_data)
        : tiles(params), control(shared_control), data(shared_data),
          warp(__shfl_sync(ALL_LANES, threadIdx.x / 32, 0)), lane(threadIdx.x % 32)
    {
    }

    __device__ __forceinline__ u32 barrier(u32 number) const { return shared_address(&control.barriers[number]); }

    // The number of a tile, for the first warp's first lane. Nobody waits for it here.
    __device__ __forceinline__ u32 draw() const
    {
        return warp == 0 && lane == 0 ? atomicAdd(tiles.p.next_tile, 1u) : 0;
    }

    // Passes a drawn number on to all warps.
    __device__ __forceinline__ void put_number(u32 number)
    {
        if (warp == 0 && lane == 0) {
            barrier_wait(barrier(S::NUMBER_EMPTY + put_place.stage), put_place.phase ^ 1);
            control.number[put_place.stage] = number;
            barrier_arrive(barrier(S::NUMBER_FULL + put_place.stage));
        }
        put_place.advance();
    }

    __device__ __forceinline__ u32 take_number()
    {
        warp_wait(barrier(S::NUMBER_FULL + take_place.stage), take_place.phase);
        u32 number = control.number[take_place.stage];
        warp_arrive(barrier(S::NUMBER_EMPTY + take_place.stage), 1, lane);
        take_place.advance();
        return number;
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

    // Goes to a tile's first block, and loads the tile's rows if they go to this warp's slot.
    __device__ __forceinline__ void begin(u32 number, u32 which)
    {
        auto &loaded = TILES::loaded(control, warp, which);
        const bool loads = warp / ROW_WARPS == next_slot.stage;
        const u32 vector = warp % ROW_WARPS;
        RowSlot &rows = control.rows[next_slot.stage];
        const u32 empty = barrier(S::ROWS_EMPTY + next_slot.stage), full = barrier(S::ROWS_FULL + next_slot.stage);
        if (number >= tiles.count()) {
            // Tells the computing warps that there are no more tiles.
            if (loads) {
                warp_wait(empty, next_slot.phase ^ 1);
                if (vector == 0)
                    rows.rows = 0;
                warp_arrive(full, LOADER_ARRIVALS, lane);
            }
            return;
        }
        __syncwarp();
        if (lane == 0) {
            tiles.take(number, loaded);
            loaded.block.count = 0;
        }
        __syncwarp();
        const auto &tile = loaded.tile;
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
        loaded.block = block;
        if (loads) {
            bool whole = list(row);
            warp_wait(empty, next_slot.phase ^ 1);
            copy<TILE_ROWS>(data + (next_slot.stage * 2 + vector) * S::ROWS_BYTES, whole, tiles.rows_of(tile, vector));
            tiles.prefetch(tile, row, vector, rows);
            if (vector == 0) {
#pragma unroll
                for (u32 i = 0; i < TILES::LANE_ROWS; ++i)
                    rows.row[32 * i + lane] = row[i];
                tiles.describe(tile, row, rows);
                rows.batch = tile.batch;
                rows.rows = tile.rows;
                rows.flags = tile.flags;
                rows.has_columns = loaded.block.count;
            }
            warp_arrive_after_copies(full, lane);
        }
        next_slot.advance();
    }

    // Loads a block that was looked up.
    template <typename LOADED>
    __device__ __forceinline__ void load(const LOADED &loaded, const typename TILES::Found &found, bool last)
    {
        bool whole = list(found.row);
        warp_wait(barrier(S::COLUMNS_EMPTY + ring.stage), ring.phase ^ 1);
        ColumnStage<S::COLUMNS> &stage = control.columns[ring.stage];
        if (warp % S::STAGE_WARPS == 0) {
            tiles.describe(found, stage);
            stage.flags = found.flags | (last ? (u32)STAGE_LAST : 0);
        }
        u32 to = data + S::COLUMNS_AT + ring.stage * 2 * S::COLUMNS_BYTES;
#pragma unroll 1
        for (u32 vector = warp % S::STAGE_WARPS; vector < 2; vector += S::STAGE_WARPS)
            copy<S::COLUMNS>(to + vector * S::COLUMNS_BYTES, whole, tiles.columns_of(loaded, found, vector));
        warp_arrive_after_copies(barrier(S::COLUMNS_FULL + ring.stage), lane);
    }

    // Loads the columns of a tile, and as soon as its first block is under way the rows of the tile after.
    __device__ __forceinline__ void columns_and_next_rows(u32 which, u32 after)
    {
        auto &loaded = TILES::loaded(control, warp, which);
        if (TILES::WAITS_FOR_ROWS && loaded.tile.rows != 0)
            warp_wait(barrier(S::ROWS_FULL + slot.stage), slot.phase);
        bool begun = false;
#pragma unroll 1
        for (;;) {
            __syncwarp();
            Block block = loaded.block;
            const bool exists = block.count != 0, own = exists && warp / S::STAGE_WARPS == ring.stage;
            typename TILES::Found found;
            if (own)
                tiles.look_up(loaded, block, control.rows[slot.stage], found);
            if (exists) {
                tiles.advance(loaded.tile, block);
                __syncwarp();
                loaded.block = block;
            }
            if (own)
                load(loaded, found, block.count == 0);
            if (!begun && (own || !exists)) {
                begin(after, which ^ 1);
                begun = true;
            }
            if (!exists)
                break;
            ring.advance();
        }
        if (loaded.tile.rows != 0)
            slot.advance();
    }

    __device__ __forceinline__ void run()
    {
        put_number(draw());
        put_number(draw());
        u32 drawn = draw();
        // Before the first tile comes one without rows.
        if (lane == 0) {
            auto &loaded = TILES::loaded(control, warp, 0);
            loaded.tile.rows = 0;
            loaded.block.count = 0;
        }
        __syncwarp();
        u32 which = 0, after;
#pragma unroll 1
        do {
            after = take_number();
            columns_and_next_rows(which, after);
            which ^= 1;
            put_number(drawn);
            drawn = draw();
        } while (after < tiles.count());
    }
};

#endif

} // namespace backward_hopper
} // namespace hyperattn
