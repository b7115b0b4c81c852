// The loading warps of the Hopper backward kernels: they take tiles, look up their rows and those of the blocks of
// columns, and copy the vectors by 16 bytes.
//
// The four warps go through all tiles, each at its own pace, and load what is their own: one vector of half a tile's
// rows, and the blocks that go to one of the ring's stages. So look-ups of one go on beside copies of others.
//
// Nobody waits for ever. In the order in which the computing warps read, what a warp waits for before it loads
// something depends on earlier things only: a block on the one that was in its stage before, rows on the tile before.
// All of these are loaded, for no warp loads anything of a tile before its part of the tile before.
#pragma once

#include "backward_wgmma_layout.cuh"

namespace hyperattn {
namespace backward_hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

using hopper::barrier_arrive;
using hopper::barrier_wait;
using hopper::copies_arrive;
using hopper::copy_4_bytes;
using hopper::list_rows;
using hopper::shared_address;
using hopper::swizzled;
using hopper::warp_arrive;
using hopper::warp_wait;

// The LOADER_ARRIVALS of a warp, its copies' when they end: it does not wait for them. The consumers order them before
// what the tensor cores read.
__device__ __forceinline__ void warp_arrive_after_copies(u32 barrier, u32 lane)
{
    copies_arrive(barrier);
    __syncwarp();
    if (lane == 0)
        barrier_arrive(barrier);
}

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

// Rows number `number` + 32 i of `count`: `at` + 32 i or what `order` has there, if there is one; NO_KEY beyond the
// last. No branch tells them apart, so that all are asked for before the first has come.
template <u32 COUNT>
__device__ __forceinline__ void look_up_rows_in(const u32 *order, u32 at, u32 number, u32 count, u32 (&row)[COUNT])
{
    if (order != nullptr) {
        // Those beyond the last are the first one.
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i)
            row[i] = order[number + 32 * i < count ? at + 32 * i : at - number];
    } else {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i)
            row[i] = at + 32 * i;
    }
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
        row[i] = number + 32 * i < count ? row[i] : NO_KEY;
}

// Terms of queries, those of any for no row. Nobody waits for them here.
template <u32 COUNT>
__device__ __forceinline__ void look_up_terms(const BackwardParams &params, u64 first_row, const u32 (&row)[COUNT],
                                              RowTerms (&terms)[COUNT])
{
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
        terms[i] = params.row_terms[first_row + (row[i] == NO_KEY ? 0 : row[i])];
}

// What was looked up; the shares of no row are 0.
__device__ __forceinline__ RowTerms terms_of(u32 row, const RowTerms &terms)
{
    return row == NO_KEY ? query_stream::no_terms() : terms;
}

// The tiles of queries: their rows, and their blocks of keys.
template <u32 DIM> struct QueryTiles {
    using S = Shape<DIM>;
    using TILE = Tile;
    using Loaded = LoadedQueryTile;
    using Block = key_stream::KeyBlock;
    static constexpr u32 LANE_ROWS = HALF_ROWS / 32, LANE_COLUMNS = S::COLUMNS / 32;

    // What was looked up of half a tile's rows, and of a block.
    struct FoundRows {
        u32 row[LANE_ROWS];
        RowTerms terms[LANE_ROWS];
    };
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
    __device__ __forceinline__ const Tile *list() const { return p.tiles; }
    __device__ __forceinline__ static Loaded &loaded(typename S::Control &control, u32 warp)
    {
        return control.queries[warp];
    }

    // What follows from the tile: for one thread.
    __device__ __forceinline__ void complete(Loaded &loaded) const
    {
        loaded.kv_head = p.kv_head(loaded.tile);
        loaded.order = p.order_of_keys(loaded.tile, loaded.kv_head);
    }

    __device__ __forceinline__ static Block before_first()
    {
        Block block = {};
        block.number = NO_KEY;
        return block;
    }

    // The largest limit of a tile's rows. Those of sorted ones do not matter: their keys are not limited.
    __device__ __forceinline__ u32 highest(const Tile &tile) const
    {
        return p.limit(tile.first_query + tile.rows - 1);
    }

    __device__ __forceinline__ void advance(const Tile &tile, Block &block) const
    {
        key_stream::advance<S::COLUMNS>(p, tile, p.limit(tile.first_query), highest(tile), block);
    }

    // Rows `first` + 32 i + lane.
    __device__ __forceinline__ void look_up_rows(const Tile &tile, u32 first, FoundRows &found) const
    {
        u64 first_row = (u64)(tile.batch * p.heads_q + tile.head) * p.n_q;
        u32 number = first + lane, at = tile.first_query + number;
        bool sorted = tile.flags & TILE_SORTED;
        look_up_rows_in(sorted ? p.query_order + first_row : nullptr, at, number, tile.rows, found.row);
        look_up_terms(params, first_row, found.row, found.terms);
    }

    __device__ __forceinline__ void describe(const Tile &tile, u32, const FoundRows &found, HalfRows &rows) const
    {
        float exponent = __uint_as_float(0xff800000u);
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            const RowTerms terms = terms_of(found.row[i], found.terms[i]);
            // |delta| is below 2^(this - 126).
            u32 biased = max(__float_as_uint(fabsf(terms.delta)) >> 23, 126u);
            exponent = fmaxf(exponent, (float)(biased - 126) - terms.lse);
            rows.terms[32 * i + lane] = terms;
            rows.hidden_start[32 * i + lane] = found.row[i] == NO_KEY ? 0 : p.limit(found.row[i]);
        }
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2)
            exponent = fmaxf(exponent, __shfl_xor_sync(ALL_LANES, exponent, distance));
        rows.exponent = exponent;
        rows.head = tile.head;
    }

    __device__ __forceinline__ Vectors rows_of(const Tile &tile, u32 which) const
    {
        return which == 0 ? vectors(p.q, tile.batch, tile.head, p.head_dim)
                          : vectors(params.dout, tile.batch, tile.head, p.value_dim);
    }

    __device__ __forceinline__ void look_up(const Loaded &loaded, const Block &block, Found &found) const
    {
        const Segment &segment = block.segment;
        bool listed = segment.flags & SEGMENT_LISTED, sorted = segment.flags & SEGMENT_SORTED;
        u32 at = segment.first + block.offset + lane;
        look_up_rows_in(sorted ? listed ? p.listed_rows : loaded.order : listed ? p.positions : nullptr, at, lane,
                        block.count, found.row);
        if (segment.hidden_start < segment.hidden_end) {
            u32 position[LANE_COLUMNS];
            look_up_rows_in(listed ? p.positions : nullptr, at, lane, block.count, position);
#pragma unroll
            for (u32 i = 0; i < LANE_COLUMNS; ++i) {
                bool hidden = position[i] >= segment.hidden_start && position[i] < segment.hidden_end;
                found.row[i] = hidden ? NO_KEY : found.row[i];
            }
        }
        // Seen by no row of the tile: what they are must not even be read as numbers. Rows of limited segments are
        // positions.
        u32 beyond = segment.flags & SEGMENT_LIMITED ? highest(loaded.tile) : NO_KEY;
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; ++i)
            found.row[i] = found.row[i] < beyond ? found.row[i] : NO_KEY;
        found.flags = block.flags;
        found.log_weight = segment.log_weight;
        found.extra = segment.flags & SEGMENT_EXTRA;
    }

    __device__ __forceinline__ void describe(const Found &found, ColumnStage<S::COLUMNS> &stage) const
    {
        if (found.flags & STAGE_MASKED) {
#pragma unroll
            for (u32 i = 0; i < LANE_COLUMNS; ++i)
                stage.position[32 * i + lane] = found.row[i];
        }
        stage.log_weight = found.log_weight;
    }

    __device__ __forceinline__ Vectors columns_of(const Loaded &loaded, const Found &found, u32 which) const
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
    using Loaded = LoadedKeyTile;
    using Block = query_stream::QueryBlock;
    static constexpr u32 LANE_ROWS = HALF_ROWS / 32, LANE_COLUMNS = S::COLUMNS / 32;

    struct FoundRows {
        u32 row[LANE_ROWS];
    };
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
    __device__ __forceinline__ const KeyTile *list() const { return params.key_tiles; }
    __device__ __forceinline__ static Loaded &loaded(typename S::Control &control, u32 warp)
    {
        return control.keys[warp];
    }

    __device__ __forceinline__ static void complete(Loaded &) {}

    __device__ __forceinline__ static Block before_first() { return query_stream::before_first(); }

    // Which queries are hidden is found out for each block.
    __device__ __forceinline__ void advance(const KeyTile &tile, Block &block) const
    {
        query_stream::advance<S::COLUMNS>(params, tile, NO_KEY, 0, block);
    }

    __device__ __forceinline__ void look_up_rows(const KeyTile &tile, u32 first, FoundRows &found) const
    {
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            u32 key = first + 32 * i + lane;
            found.row[i] = key < tile.rows ? params.key_row(tile, key, params.key_position(tile, key)) : NO_KEY;
        }
    }

    // Queries that a tile's keys `first` + 32 i are hidden from: at positions [start, end).
    template <u32 COUNT>
    __device__ __forceinline__ void hidden(const KeyTile &tile, u32 first, u32 (&start)[COUNT], u32 (&end)[COUNT]) const
    {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            // Of any key where there is none: what is read does not wait then.
            u32 key = min(first + 32 * i, tile.rows - 1);
            query_stream::hidden_queries(params, tile, key,
                                         tile.flags & KEY_TILE_LIMITED ? params.key_position(tile, key) : 0, start[i],
                                         end[i]);
        }
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i)
            end[i] = first + 32 * i < tile.rows ? end[i] : start[i];
    }

    __device__ __forceinline__ void describe(const KeyTile &tile, u32 first, const FoundRows &found,
                                             HalfRows &rows) const
    {
        // Copied, so that nobody waits for what is read.
        const u32 *stored = params.key_stored + params.sums_row(tile, 0);
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            bool asked = (tile.flags & KEY_TILE_RESUME) && found.row[i] != NO_KEY;
            copy_4_bytes(shared_address(&rows.resumes[32 * i + lane]), stored + (asked ? found.row[i] : 0),
                         asked ? 4 : 0);
        }
        u32 start[LANE_ROWS], end[LANE_ROWS];
        hidden(tile, first + lane, start, end);
#pragma unroll
        for (u32 i = 0; i < LANE_ROWS; ++i) {
            rows.hidden_start[32 * i + lane] = start[i];
            rows.hidden_count[32 * i + lane] = end[i] > start[i] ? end[i] - start[i] : 0;
        }
        rows.head = tile.kv_head;
        rows.first_output = tile.first_output + first;
    }

    __device__ __forceinline__ Vectors rows_of(const KeyTile &tile, u32 which) const
    {
        return vectors(which == 0 ? p.k : p.v, tile.batch, tile.kv_head, which == 0 ? p.head_dim : p.value_dim);
    }

    __device__ __forceinline__ void look_up(const Loaded &loaded, const Block &block, Found &found) const
    {
        const KeyTile &tile = loaded.tile;
        u64 first_row = query_stream::first_row(params, tile, block);
        bool sorted = block.segment.flags & SEGMENT_SORTED;
        look_up_rows_in(sorted ? p.query_order + first_row : nullptr, block.segment.first + block.offset + lane, lane,
                        block.count, found.row);
        found.head = query_stream::query_head(params, tile, block);
        found.first = block.segment.first + block.offset;
        found.log_weight = block.segment.log_weight;
        found.flags = found.hidden = 0;
        if (tile.flags & (KEY_TILE_LIMITED | KEY_TILE_HIDING)) {
            u32 last = found.first + block.count;
            bool any = false, some = false;
            u32 start[TILE_ROWS / 32], end[TILE_ROWS / 32];
            hidden(tile, lane, start, end);
#pragma unroll
            for (u32 i = 0; i < TILE_ROWS / 32; ++i) {
                bool meets = start[i] < last && end[i] > found.first && start[i] < end[i];
                bool whole = meets && start[i] <= found.first && end[i] >= last;
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
        look_up_terms(params, first_row, found.row, found.terms);
    }

    __device__ __forceinline__ void describe(const Found &found, ColumnStage<S::COLUMNS> &stage) const
    {
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; ++i) {
            u32 query = 32 * i + lane;
            const RowTerms terms = terms_of(found.row[i], found.terms[i]);
            stage.terms[query] = make_float2(found.log_weight - terms.lse, terms.delta);
            if (found.flags & STAGE_MASKED)
                stage.position[query] = found.row[i] == NO_KEY ? NO_KEY : found.first + query;
        }
        if ((found.flags & STAGE_HIDES) && lane < TILE_ROWS / 32)
            stage.hidden[lane] = found.hidden;
    }

    __device__ __forceinline__ Vectors columns_of(const Loaded &loaded, const Found &found, u32 which) const
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
    using FoundRows = typename TILES::FoundRows;
    const TILES tiles;
    typename S::Control &control;
    const u32 data;
    const u32 warp;
    const u32 lane;
    // The tile that the warp is at.
    typename TILES::Loaded &loaded;

    // Of the first warp: the lane's word of the tile that is passed on next, and the first lane's number of the one
    // after that.
    u32 word;
    u32 number;
    Ring<DRAWN_STAGES> put_place;
    Ring<DRAWN_STAGES> take_place;
    // Of the next block.
    u32 stage = 0;
    // Of the warp's stage, and of the rows.
    u32 stage_phase = 1;
    u32 rows_phase = 1;

    __device__ __forceinline__ Loader(const BackwardParams &params, typename S::Control &shared_control,
                                      u32 shared_data)
        : tiles(params), control(shared_control), data(shared_data),
          warp(__shfl_sync(ALL_LANES, threadIdx.x / 32, 0)), lane(threadIdx.x % 32),
          loaded(TILES::loaded(shared_control, threadIdx.x / 32))
    {
    }

    __device__ __forceinline__ u32 barrier(u32 number) const { return shared_address(&control.barriers[number]); }

    // Nobody waits for the number here.
    __device__ __forceinline__ void draw()
    {
        if (lane == 0)
            number = atomicAdd(tiles.p.next_tile, 1u);
    }

    // Nobody waits for the words here.
    __device__ __forceinline__ void read_drawn()
    {
        u32 drawn = __shfl_sync(ALL_LANES, number, 0);
        bool exists = drawn < tiles.count();
        word = lane == DRAWN_EXISTS ? exists : 0;
        if (exists && lane < sizeof(typename TILES::TILE) / 4)
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
    __device__ __forceinline__ bool take()
    {
        warp_wait(barrier(S::DRAWN_FULL + take_place.stage), take_place.phase);
        const DrawnTile &drawn = control.drawn[take_place.stage];
        if (lane < sizeof(loaded.tile) / 4)
            ((u32 *)&loaded.tile)[lane] = drawn.words[lane];
        bool exists = drawn.words[DRAWN_EXISTS];
        warp_arrive(barrier(S::DRAWN_EMPTY + take_place.stage), 1, lane);
        take_place.advance();
        if (lane == 0)
            tiles.complete(loaded);
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

    // The warps in the order of their blocks of the tile whose first block goes to `stage`.
    __device__ __forceinline__ u32 rank(u32 stage) const { return (warp - stage) % LOADER_WARPS; }

    // Of the half that is this warp's: always the same, or it would not see every phase of the half's barrier.
    __device__ __forceinline__ u32 first_row() const { return warp % CONSUMERS * HALF_ROWS; }

    // Loads this warp's part of the tile's rows: one vector of one half. With no tile it tells the computing warps so.
    __device__ __forceinline__ void load_rows(u32 rank, bool exists, const FoundRows &found, bool has_columns)
    {
        const u32 half = warp % CONSUMERS, vector = rank / CONSUMERS;
        const u32 full = barrier(S::ROWS_FULL + half);
        HalfRows &rows = control.rows[half];
        bool whole = list(found.row);
        warp_wait(barrier(S::ROWS_EMPTY + half), rows_phase);
        rows_phase ^= 1;
        if (!exists) {
            if (vector == 0)
                rows.rows = 0;
            warp_arrive(full, LOADER_ARRIVALS, lane);
            return;
        }
        copy<HALF_ROWS>(data + (half * 2 + vector) * S::ROWS_BYTES, whole, tiles.rows_of(loaded.tile, vector));
        if (vector == 0) {
#pragma unroll
            for (u32 i = 0; i < TILES::LANE_ROWS; ++i)
                rows.row[32 * i + lane] = found.row[i];
            tiles.describe(loaded.tile, first_row(), found, rows);
            rows.batch = loaded.tile.batch;
            rows.rows = loaded.tile.rows;
            rows.flags = loaded.tile.flags;
            rows.has_columns = has_columns;
        }
        warp_arrive_after_copies(full, lane);
    }

    // Loads a block that was looked up to the warp's stage.
    __device__ __forceinline__ void load(const Found &found)
    {
        bool whole = list(found.row);
        warp_wait(barrier(S::COLUMNS_EMPTY + warp), stage_phase);
        stage_phase ^= 1;
        ColumnStage<S::COLUMNS> &columns = control.columns[warp];
        tiles.describe(found, columns);
        columns.flags = found.flags;
        u32 to = data + S::COLUMNS_AT + warp * 2 * S::COLUMNS_BYTES;
#pragma unroll 1
        for (u32 vector = 0; vector < 2; ++vector)
            copy<S::COLUMNS>(to + vector * S::COLUMNS_BYTES, whole, tiles.columns_of(loaded, found, vector));
        warp_arrive_after_copies(barrier(S::COLUMNS_FULL + warp), lane);
    }

    // Loads the warp's part of a tile. The rows wait for the tile before to end, so that the warps whose blocks come
    // first load one of them earlier.
    __device__ __forceinline__ void load_tile(bool exists)
    {
        const u32 own_rank = rank(stage);
        bool rows_come = own_rank >= LOADER_WARPS / 2, rows_loaded = false;
        FoundRows found_rows = {};
        Block block = TILES::before_first();
        if (exists) {
            tiles.look_up_rows(loaded.tile, first_row(), found_rows);
            tiles.advance(loaded.tile, block);
        }
        const bool has_columns = block.count != 0;
        keep(block);
#pragma unroll 1
        for (;;) {
            if (rows_come && !rows_loaded) {
                load_rows(own_rank, exists, found_rows, has_columns);
                rows_loaded = true;
            }
            __syncwarp();
            block = loaded.block;
            // Those of other warps.
#pragma unroll 1
            while (block.count != 0 && stage != warp)
                pass(block);
            if (block.count == 0) {
                if (rows_loaded)
                    break;
                keep(block);
                rows_come = true;
                continue;
            }
            Found found;
            tiles.look_up(loaded, block, found);
            pass(block);
            keep(block);
            found.flags |= block.count == 0 ? (u32)STAGE_LAST : 0;
            load(found);
            rows_come = true;
        }
    }

    // All lanes write the same.
    __device__ __forceinline__ void keep(const Block &block)
    {
        __syncwarp();
        loaded.block = block;
    }

    // To the next block, and its stage.
    __device__ __forceinline__ void pass(Block &block)
    {
        tiles.advance(loaded.tile, block);
        stage = (stage + 1) % S::STAGES;
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
        bool exists;
#pragma unroll 1
        do {
            exists = take();
            if (!exists || loaded.tile.rows != 0)
                load_tile(exists);
        } while (exists);
    }
};

#endif

} // namespace backward_hopper
} // namespace hyperattn
