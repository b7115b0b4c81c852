// The loading warps of the Hopper backward kernels: 128 threads that take tiles, look up their rows and those of the blocks
// of columns, and copy the vectors by 16 bytes. They run ahead of the computing warps by the slots and the ring's stages, and
// look a block's rows up before they wait for its stage.
#pragma once

#include "backward_wgmma_layout.cuh"

namespace hyperattn {
namespace backward_hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

using hopper::barrier_arrive;
using hopper::barrier_wait;
using hopper::copies_arrive;
using hopper::copy_16_bytes;
using hopper::named_barrier_sync;
using hopper::shared_address;
using hopper::swizzled;

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

// Copies listed rows, zeros for NO_KEY and beyond the dimension. Eight lanes copy a chunk of a row.
template <u32 ROWS, u32 CHUNKS>
__device__ __forceinline__ void copy_rows(u32 to, const Vectors &from, const u32 *rows)
{
    constexpr u32 PARTS = ROW_BYTES / 16, STEP = WARPGROUP / PARTS;
    const u32 part = threadIdx.x % PARTS, first = threadIdx.x / PARTS;
    // Every STEP rows the swizzle is the same.
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "whole steps");
    u32 shared = swizzled(to, first, part);
    const char *data = from.data + part * 16;
#pragma unroll 4
    for (u32 i = 0; i < ROWS / STEP; ++i) {
        u32 row = rows[i * STEP + first];
        const char *elements = data + (row == NO_KEY ? 0 : row * from.row_stride);
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            bool copied = row != NO_KEY && chunk * ROW_ELEMENTS + part * 8 < from.dim;
            copy_16_bytes(shared + i * STEP * ROW_BYTES + chunk * ROWS * ROW_BYTES, elements + chunk * ROW_BYTES,
                          copied ? 16 : 0);
        }
    }
}

// A barrier of some threads that tells whether any of them found something.
template <u32 NAME, u32 COUNT> __device__ __forceinline__ bool barrier_or(bool found)
{
    u32 any;
    asm volatile("{\n.reg .pred mine, all;\nsetp.ne.u32 mine, %1, 0;\n"
                 "barrier.cta.red.or.pred all, %2, %3, mine;\nselp.u32 %0, 1, 0, all;\n}\n"
                 : "=r"(any)
                 : "r"((u32)found), "n"(NAME), "n"(COUNT)
                 : "memory");
    return any;
}

template <u32 DIM> struct Loader {
    using S = Shape<DIM>;
    static constexpr u32 COLUMNS = S::COLUMNS;
    const BackwardParams &params;
    const AttendParams &p;
    typename S::Control &control;
    const u32 data;
    Ring<ROW_SLOTS> slots;
    Ring<S::STAGES> ring;
    // The number of the tile after, of thread 0.
    u32 next = 0;

    __device__ __forceinline__ Loader(const BackwardParams &backward, typename S::Control &shared_control, u32 shared_data)
        : params(backward), p(backward.attend), control(shared_control), data(shared_data)
    {
    }

    __device__ __forceinline__ void sync() const { named_barrier_sync(LOADER_BARRIER, WARPGROUP); }

    // The same, and whether any of the threads found something.
    __device__ __forceinline__ bool sync_or(bool found) const
    {
        return barrier_or<LOADER_BARRIER, WARPGROUP>(found);
    }

    // All arrivals of this thread: for what its warp has written, and for its copies when they end.
    __device__ __forceinline__ void arrive(const u64 &full) const
    {
        u32 barrier = shared_address(&full);
        copies_arrive(barrier);
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            barrier_arrive(barrier);
    }

    __device__ __forceinline__ void draw()
    {
        if (threadIdx.x == 0)
            next = atomicAdd(p.next_tile, 1u);
    }

    // The next tile's number.
    __device__ __forceinline__ u32 take()
    {
        // Everybody has read the number and the tile before.
        sync();
        if (threadIdx.x == 0)
            control.number = next;
        sync();
        draw();
        return control.number;
    }

    // Waits until the slot is free.
    __device__ __forceinline__ RowSlot &slot()
    {
        barrier_wait(shared_address(&control.barriers[S::ROWS_EMPTY + slots.stage]), slots.phase ^ 1);
        return control.rows[slots.stage];
    }

    // Tells the computing warps that there are no more tiles.
    __device__ __forceinline__ void end()
    {
        RowSlot &rows = slot();
        if (threadIdx.x == 0)
            rows.rows = 0;
        arrive(control.barriers[S::ROWS_FULL + slots.stage]);
    }

    // Copies the slot's rows, which have been written.
    __device__ __forceinline__ void copy_slot(const Vectors &first, const Vectors &second)
    {
        const RowSlot &rows = control.rows[slots.stage];
        u32 to = data + slots.stage * 2 * S::ROWS_BYTES;
        copy_rows<TILE_ROWS, S::CHUNKS>(to, first, rows.row);
        copy_rows<TILE_ROWS, S::CHUNKS>(to + S::ROWS_BYTES, second, rows.row);
        arrive(control.barriers[S::ROWS_FULL + slots.stage]);
        slots.advance();
    }

    // Waits until the stage is free.
    __device__ __forceinline__ ColumnStage<COLUMNS> &stage()
    {
        barrier_wait(shared_address(&control.barriers[S::COLUMNS_EMPTY + ring.stage]), ring.phase ^ 1);
        return control.columns[ring.stage];
    }

    // Copies the stage's columns, which have been written.
    __device__ __forceinline__ void copy_stage(const Vectors &first, const Vectors &second)
    {
        const ColumnStage<COLUMNS> &columns = control.columns[ring.stage];
        u32 to = data + S::COLUMNS_AT + ring.stage * 2 * S::COLUMNS_BYTES;
        copy_rows<COLUMNS, S::CHUNKS>(to, first, columns.row);
        copy_rows<COLUMNS, S::CHUNKS>(to + S::COLUMNS_BYTES, second, columns.row);
        arrive(control.barriers[S::COLUMNS_FULL + ring.stage]);
        ring.advance();
    }

    // Of all 128 rows.
    __device__ __forceinline__ void bounds(u32 low, u32 high, u32 &lowest, u32 &highest)
    {
        u32 warp = threadIdx.x / 32;
        low = __reduce_min_sync(ALL_LANES, low);
        high = __reduce_max_sync(ALL_LANES, high);
        if (threadIdx.x % 32 == 0) {
            control.lowest[warp] = low;
            control.highest[warp] = high;
        }
        sync();
        lowest = NO_KEY, highest = 0;
#pragma unroll
        for (u32 i = 0; i < WARPGROUP / 32; ++i) {
            lowest = min(lowest, control.lowest[i]);
            highest = max(highest, control.highest[i]);
        }
    }

    // Tiles of queries, and blocks of keys.
    __device__ __forceinline__ void of_queries()
    {
        key_stream::TileMemory<COLUMNS> &memory = control.queries;
        u32 i = threadIdx.x;
        draw();
        for (u32 number = take(); number < p.tile_count; number = take()) {
            if (i == 0) {
                memory.tile = p.tiles[number];
                memory.kv_head = p.kv_head(memory.tile);
            }
            sync();
            const Tile &tile = memory.tile;
            if (tile.rows == 0)
                continue;
            u32 row = NO_KEY, limit = 0;
            RowTerms terms = {__uint_as_float(0x7f800000), 0.0f};
            if (i < tile.rows) {
                row = p.query_row(tile, i);
                limit = p.limit(row);
                terms = params.row_terms[(u64)(tile.batch * p.heads_q + tile.head) * p.n_q + row];
            }
            u32 lowest, highest;
            bounds(row == NO_KEY ? NO_KEY : limit, limit, lowest, highest);
            key_stream::KeyBlock block = {};
            block.number = NO_KEY;
            key_stream::advance<COLUMNS>(p, memory, lowest, highest, block);
            key_stream::KeyPlace key = {NO_KEY, NO_KEY};
            if (i < COLUMNS)
                key = key_stream::place<COLUMNS>(p, memory, highest, block, i);

            RowSlot &rows = slot();
            rows.row[i] = row;
            rows.terms[i] = terms;
            rows.hidden_start[i] = limit;
            if (i == 0) {
                rows.batch = tile.batch;
                rows.head = tile.head;
                rows.rows = tile.rows;
                rows.flags = tile.flags;
                rows.has_columns = block.count;
            }
            sync();
            copy_slot(vectors(p.q, tile.batch, tile.head, p.head_dim),
                      vectors(params.dout, tile.batch, tile.head, p.value_dim));

            while (block.count) {
                bool extra = block.segment.flags & SEGMENT_EXTRA;
                ColumnStage<COLUMNS> &columns = stage();
                if (i < COLUMNS) {
                    columns.row[i] = key.row;
                    columns.position[i] = key.position;
                }
                u32 flags = block.flags;
                float log_weight = block.segment.log_weight;
                key_stream::advance<COLUMNS>(p, memory, lowest, highest, block);
                if (i < COLUMNS)
                    key = key_stream::place<COLUMNS>(p, memory, highest, block, i);
                if (i == 0) {
                    columns.flags = flags | (block.count ? 0 : (u32)STAGE_LAST);
                    columns.log_weight = log_weight;
                }
                sync();
                if (extra)
                    copy_stage({p.extra_keys, (i64)p.head_dim * 2, p.head_dim},
                               {p.extra_values, (i64)p.value_dim * 2, p.value_dim});
                else
                    copy_stage(vectors(p.k, tile.batch, memory.kv_head, p.head_dim),
                               vectors(p.v, tile.batch, memory.kv_head, p.value_dim));
            }
        }
        end();
    }

    // Tiles of keys, and blocks of queries.
    __device__ __forceinline__ void of_keys()
    {
        u32 i = threadIdx.x;
        const KeyTile &tile = control.keys;
        draw();
        for (u32 number = take(); number < params.key_tile_count; number = take()) {
            if (i == 0)
                control.keys = params.key_tiles[number];
            sync();
            if (tile.rows == 0)
                continue;
            u32 row = NO_KEY, start = 0, end = 0;
            if (i < tile.rows) {
                u32 position = params.key_position(tile, i);
                row = params.key_row(tile, i, position);
                query_stream::hidden_queries(params, tile, i, position, start, end);
            }
            // Which blocks have hidden queries is found out for each, by the thread of each key.
            query_stream::QueryBlock block = query_stream::before_first();
            query_stream::advance<COLUMNS>(params, tile, NO_KEY, 0, block);
            query_stream::QueryPlace query = {};
            if (i < COLUMNS)
                query = query_stream::place(params, tile, block, i);

            RowSlot &rows = slot();
            rows.row[i] = row;
            rows.hidden_start[i] = start;
            rows.hidden_count[i] = end > start ? end - start : 0;
            if (i == 0) {
                rows.batch = tile.batch;
                rows.head = tile.kv_head;
                rows.rows = tile.rows;
                rows.flags = tile.flags;
                rows.has_columns = block.count;
                rows.first_output = tile.first_output;
            }
            sync();
            copy_slot(vectors(p.k, tile.batch, tile.kv_head, p.head_dim),
                      vectors(p.v, tile.batch, tile.kv_head, p.value_dim));

            while (block.count) {
                u32 head = query_stream::query_head(params, tile, block);
                ColumnStage<COLUMNS> &columns = stage();
                if (i < COLUMNS) {
                    columns.row[i] = query.row;
                    columns.position[i] = query.position;
                    columns.terms[i] = make_float2(block.segment.log_weight - query.terms.lse, query.terms.delta);
                }
                u32 flags = block.flags, first = block.segment.first + block.offset, last = first + block.count;
                query_stream::advance<COLUMNS>(params, tile, NO_KEY, 0, block);
                if (i < COLUMNS)
                    query = query_stream::place(params, tile, block, i);
                if (sync_or(start < end && start < last && end > first))
                    flags |= tile.flags & KEY_TILE_LIMITED ? STAGE_MASKED | STAGE_STRADDLES : (u32)STAGE_MASKED;
                if (i == 0)
                    columns.flags = flags | (block.count ? 0 : (u32)STAGE_LAST);
                copy_stage(vectors(p.q, tile.batch, head, p.head_dim),
                           vectors(params.dout, tile.batch, head, p.value_dim));
            }
        }
        end();
    }
};

#endif

} // namespace backward_hopper
} // namespace hyperattn
