// The warps of the fused Hopper backward kernel that do not compute: one loads, the others add the blocks' gradients to
// the sums of queries.
#pragma once

#include "backward_fused_layout.cuh"

namespace hyperattn {
namespace backward_fused {

#if __CUDA_ARCH_FEAT_SM90_ALL

using hopper::barrier_arrive;
using hopper::barrier_expect;
using hopper::barrier_wait;
using hopper::Ring;
using hopper::shared_address;
using hopper::tensor_copy;
using hopper::warp_wait;

// Calls body(first row, member, whether it is the last one) for all blocks of queries that a tile meets, those that see
// most keys first. Blocks begin at multiples of QUERIES.
template <u32 QUERIES, typename Body>
__device__ __forceinline__ void for_each_block(const FusedTile &tile, const Body &body)
{
    if (tile.first_query >= tile.query_end)
        return;
    const u32 last = tile.first_query / QUERIES * QUERIES;
    for (u32 row = (tile.query_end - 1) / QUERIES * QUERIES;; row -= QUERIES) {
        for (u32 member = 0; member < tile.members; ++member)
            body(row, member, row == last && member + 1 == tile.members);
        if (row == last)
            return;
    }
}

// Takes tiles, and loads their keys and values and the blocks of queries. A warp.
template <u32 DIM> struct Loader {
    using S = Shape<DIM>;
    static constexpr u32 QUERIES = S::QUERIES;
    const BackwardParams &params;
    const AttendParams &p;
    const FusedParams &fused;
    typename S::Control &control;
    const u32 data;
    const u32 lane;
    Ring<STAGES> ring;
    u32 tile_phase = 0;

    __device__ __forceinline__ Loader(const BackwardParams &backward, const FusedParams &fused_params,
                                      typename S::Control &shared_control, u32 shared_data)
        : params(backward), p(backward.attend), fused(fused_params), control(shared_control), data(shared_data),
          lane(threadIdx.x % 32)
    {
    }

    __device__ __forceinline__ u32 barrier(u32 number) const { return shared_address(&control.barriers[number]); }

    // Waits until the tile before is done with.
    __device__ __forceinline__ void wait_for_tile()
    {
        warp_wait(barrier(S::TILE_EMPTY), tile_phase ^ 1);
        tile_phase ^= 1;
    }

    __device__ __forceinline__ void run()
    {
        for (;;) {
            // Not before the blocks of the tile before are loaded: tiles that wait for this one may be under way.
            u32 number = 0;
            if (lane == 0)
                number = atomicAdd(p.next_tile, 1u);
            number = __shfl_sync(ALL_LANES, number, 0);
            if (number >= params.key_tile_count)
                break;
            const KeyTile &from = params.key_tiles[number];
            if (from.rows == 0)
                continue;
            FusedTile tile = {};
            tile.batch = from.batch;
            tile.kv_head = from.kv_head;
            tile.first_key = from.first_key;
            tile.rows = from.rows;
            tile.flags = from.flags;
            tile.members = from.members;
            tile.turn = from.turn;
            if (from.segments) {
                const Segment &segment = params.query_segments[from.first_segment];
                tile.first_query = segment.first;
                tile.query_end = segment.first + segment.count;
            }
            wait_for_tile();
            if (lane == 0) {
                control.tile = tile;
                load_keys(tile);
            }
            __syncwarp();
            load_queries(tile);
        }
        wait_for_tile();
        if (lane == 0) {
            control.tile.rows = 0;
            barrier_arrive(barrier(S::TILE_FULL));
        }
    }

    // Lane 0.
    __device__ __forceinline__ void load_keys(const FusedTile &tile)
    {
        u32 full = barrier(S::TILE_FULL);
        barrier_expect(full, 2 * S::KEY_BYTES);
#pragma unroll
        for (u32 chunk = 0; chunk < S::CHUNKS; ++chunk) {
            tensor_copy(data + chunk * S::KEY_CHUNK_BYTES, fused.k, full, chunk * ROW_ELEMENTS, tile.first_key,
                        tile.kv_head, tile.batch);
            tensor_copy(data + S::VALUES_AT + chunk * S::KEY_CHUNK_BYTES, fused.v, full, chunk * ROW_ELEMENTS,
                        tile.first_key, tile.kv_head, tile.batch);
        }
        barrier_arrive(full);
    }

    __device__ __forceinline__ void load_queries(const FusedTile &tile)
    {
        // The first query that sees all keys of the tile.
        u32 seeing = tile.first_query;
        if (tile.flags & KEY_TILE_LIMITED)
            seeing = max(seeing, params.first_row_seeing(tile.first_key + tile.rows - 1));
        for_each_block<QUERIES>(tile, [&](u32 row, u32 member, bool last) {
            u32 flags = last ? STAGE_LAST : 0u;
            if (row < seeing || row + QUERIES > tile.query_end)
                flags |= STAGE_MASKED | STAGE_HIDES;
            else if (tile.rows < TILE_ROWS)
                flags |= STAGE_MASKED;
            load_block(tile, tile.kv_head * p.group + member, row, flags);
        });
    }

    __device__ __forceinline__ void load_block(const FusedTile &tile, u32 head, u32 first_row, u32 flags)
    {
        const RowTerms *from = params.row_terms + (u64)(tile.batch * p.heads_q + head) * p.n_q;
        RowTerms terms[QUERIES / 32];
#pragma unroll
        for (u32 i = 0; i < QUERIES / 32; ++i) {
            u32 row = first_row + i * 32 + lane;
            terms[i] = {__uint_as_float(0x7f800000), 0.0f};
            if (row >= tile.first_query && row < tile.query_end)
                terms[i] = from[row];
        }
        warp_wait(barrier(S::STAGE_EMPTY + ring.stage), ring.phase ^ 1);
        FusedStage<QUERIES> &stage = control.stages[ring.stage];
#pragma unroll
        for (u32 i = 0; i < QUERIES / 32; ++i)
            stage.terms[i * 32 + lane] = make_float2(-terms[i].lse, terms[i].delta);
        __syncwarp();
        if (lane == 0) {
            stage.first_row = first_row;
            stage.flags = flags;
            u32 full = barrier(S::STAGE_FULL + ring.stage);
            u32 to = data + S::STAGES_AT + ring.stage * 2 * S::QUERY_BYTES;
            barrier_expect(full, 2 * S::QUERY_BYTES);
#pragma unroll
            for (u32 chunk = 0; chunk < S::CHUNKS; ++chunk) {
                u32 at = to + chunk * S::QUERY_CHUNK_BYTES, dim = chunk * ROW_ELEMENTS;
                tensor_copy(at, fused.q, full, dim, first_row, head, tile.batch);
                tensor_copy(at + S::QUERY_BYTES, fused.dout, full, dim, first_row, head, tile.batch);
            }
            barrier_arrive(full);
        }
        ring.advance();
    }
};

// Adds to the sums of queries what the computing warps have put in one staging buffer. Where there are turns a sum is
// added to tile by tile of keys: a tile whose turn it is not yet waits. The tiles before it were handed out before, so
// that they get through.
template <u32 DIM> struct Writer {
    using S = Shape<DIM>;
    static constexpr u32 QUERIES = S::QUERIES;
    const AttendParams &p;
    const FusedParams &fused;
    typename S::Control &control;
    const u32 data;
    const u32 buffer;

    __device__ __forceinline__ Writer(const BackwardParams &backward, const FusedParams &fused_params,
                                      typename S::Control &shared_control, u32 shared_data, u32 number)
        : p(backward.attend), fused(fused_params), control(shared_control), data(shared_data), buffer(number)
    {
    }

    // Lane 0 of a warp.
    __device__ __forceinline__ void run() const
    {
        // Number of the block that is this warp's next among those of all tiles, less those before.
        u32 until = buffer, phase = 0, tile_phase = 0;
        for (;;) {
            barrier_wait(shared_address(&control.barriers[S::TILE_FULL]), tile_phase);
            tile_phase ^= 1;
            const FusedTile tile = control.tile;
            if (tile.rows == 0)
                return;
            barrier_arrive(shared_address(&control.barriers[S::TILE_EMPTY]));
            bool stores = tile.turn == 0 && fused.stores;
            for_each_block<QUERIES>(tile, [&](u32 row, u32 member, bool) {
                if (until != 0) {
                    --until;
                    return;
                }
                until = WRITERS - 1;
                u32 head = tile.batch * p.heads_q + tile.kv_head * p.group + member - fused.first_head;
                u32 last_row = min(row + QUERIES, tile.query_end) - 1;
                barrier_wait(shared_address(&control.barriers[S::STAGING_FULL + buffer]), phase);
                phase ^= 1;
                u32 *done = fused.turns ? fused.turns + ((u64)head * p.n_q + last_row) : nullptr;
                write(head, row, done, tile.turn, stores);
            });
        }
    }

    // `done` counts the tiles that have added to the block, or is NULL.
    __device__ __forceinline__ void write(u32 head, u32 row, u32 *done, u32 turn, bool stores) const
    {
        if (done) {
            u32 seen = 0;
            while (turn != 0 && seen != turn)
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(done) : "memory");
            asm volatile("fence.proxy.async;" ::: "memory");
        }
        u32 from = data + S::STAGING_AT + buffer * S::STAGING_BYTES;
#pragma unroll
        for (u32 chunk = 0; chunk < S::SUM_CHUNKS; ++chunk) {
            u32 at = from + chunk * S::QUERY_CHUNK_BYTES;
            if (stores)
                hopper::tensor_store(fused.sums, at, chunk * ROW_SUMS, row, head, 0);
            else
                hopper::tensor_add(fused.sums, at, chunk * ROW_SUMS, row, head, 0);
        }
        hopper::stores_commit();
        hopper::stores_wait_read();
        barrier_arrive(shared_address(&control.barriers[S::STAGING_EMPTY + buffer]));
        if (!done)
            return;
        hopper::stores_wait();
        asm volatile("fence.proxy.async;" ::: "memory");
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(done), "r"(turn + 1) : "memory");
    }
};

#endif

} // namespace backward_fused
} // namespace hyperattn
