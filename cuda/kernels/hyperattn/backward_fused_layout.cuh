// Shared memory of the fused Hopper backward kernel, and what its warps tell each other.
//
// The keys and values of a tile stay; blocks of queries with their output gradients stream through a ring of stages.
// The blocks' gradients leave through a ring of staging buffers. Vectors lie in chunks of 128 bytes of all rows,
// swizzled by 128 bytes: 64 elements, or 32 sums.
#pragma once

#include "attend_wgmma_copy.cuh"
#include "backward_work.cuh"

namespace hyperattn {
namespace backward_fused {

using hopper::ALL_LANES;
using hopper::ROW_BYTES;
using hopper::ROW_ELEMENTS;
using hopper::WARPGROUP;

// A warpgroup that loads and stores, and two that compute 64 keys of the tile each.
constexpr u32 CONSUMERS = 2;
constexpr u32 THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr u32 CONSUMER_THREADS = CONSUMERS * WARPGROUP;
constexpr u32 CONSUMER_WARPS = 4 * CONSUMERS;
// Of a thread; together no more than the block starts with, 168 for each.
constexpr u32 SERVER_REGISTERS = 24;
constexpr u32 CONSUMER_REGISTERS = 240;
static_assert(SERVER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * 168,
              "or a warpgroup waits for ever");

// Named barrier of the computing threads.
constexpr u32 CONSUMER_BARRIER = 1;

constexpr u32 STAGES = 2;
// A warp stores from each; blocks take turns.
constexpr u32 STAGING_BUFFERS = 2;
constexpr u32 WRITERS = STAGING_BUFFERS;
// Sums of a chunk's row.
constexpr u32 ROW_SUMS = ROW_BYTES / 4;

enum StageFlags : u32 {
    // Some keys or queries are not there, or some queries do not see all keys.
    STAGE_MASKED = 1,
    // Of these, some queries are not there or do not see all keys.
    STAGE_HIDES = 2,
    // The tile's last block.
    STAGE_LAST = 4,
};

// The tile that is computed. `rows` is 0 when there are no more.
struct FusedTile {
    u32 batch;
    u32 kv_head;
    u32 first_key;
    u32 rows;
    u32 flags;
    u32 members;
    // The queries that see some key.
    u32 first_query;
    u32 query_end;
    u32 turn;
};

template <u32 QUERIES> struct alignas(16) FusedStage {
    // Less lse, and delta.
    float2 terms[QUERIES];
    u32 first_row;
    u32 flags;
};

template <u32 DIM> struct Shape {
    // Of a block.
    static constexpr u32 QUERIES = DIM <= 64 ? 128 : 64;
    static constexpr u32 CHUNKS = DIM / ROW_ELEMENTS;
    static constexpr u32 KEY_CHUNK_BYTES = TILE_ROWS * ROW_BYTES;
    static constexpr u32 KEY_BYTES = CHUNKS * KEY_CHUNK_BYTES;
    static constexpr u32 QUERY_CHUNK_BYTES = QUERIES * ROW_BYTES;
    static constexpr u32 QUERY_BYTES = CHUNKS * QUERY_CHUNK_BYTES;
    // Slopes of all keys, in chunks of 64 queries.
    static constexpr u32 SLOPES_BYTES = QUERIES / ROW_ELEMENTS * KEY_CHUNK_BYTES;
    static constexpr u32 SUM_CHUNKS = DIM / ROW_SUMS;
    static constexpr u32 STAGING_BYTES = SUM_CHUNKS * QUERY_CHUNK_BYTES;

    static constexpr u32 VALUES_AT = KEY_BYTES;
    static constexpr u32 STAGES_AT = VALUES_AT + KEY_BYTES;
    static constexpr u32 SLOPES_AT = STAGES_AT + STAGES * 2 * QUERY_BYTES;
    static constexpr u32 STAGING_AT = SLOPES_AT + SLOPES_BYTES;
    static constexpr u32 CONTROL_AT = STAGING_AT + STAGING_BUFFERS * STAGING_BYTES;

    // Numbers of the first barriers of each kind.
    static constexpr u32 TILE_FULL = 0;
    static constexpr u32 TILE_EMPTY = TILE_FULL + 1;
    static constexpr u32 STAGE_FULL = TILE_EMPTY + 1;
    static constexpr u32 STAGE_EMPTY = STAGE_FULL + STAGES;
    static constexpr u32 SLOPES_FULL = STAGE_EMPTY + STAGES;
    static constexpr u32 SLOPES_EMPTY = SLOPES_FULL + 1;
    static constexpr u32 STAGING_FULL = SLOPES_EMPTY + 1;
    static constexpr u32 STAGING_EMPTY = STAGING_FULL + STAGING_BUFFERS;
    static constexpr u32 BARRIERS = STAGING_EMPTY + STAGING_BUFFERS;

    struct Control {
        u64 barriers[BARRIERS];
        FusedTile tile;
        FusedStage<QUERIES> stages[STAGES];
        // Keys with elements that are not finite.
        u8 tainted[TILE_ROWS];
    };

    // Swizzled rows repeat every 1024 bytes, to which the launch's shared memory is not aligned.
    static constexpr u32 SHARED_BYTES = 1024 + CONTROL_AT + sizeof(Control);
    static_assert(SHARED_BYTES <= 227 * 1024, "shared memory of a block");
    static_assert(DIM % ROW_ELEMENTS == 0 && QUERIES % ROW_ELEMENTS == 0, "whole chunks");
};

// What the kernel needs besides BackwardParams.
struct alignas(128) FusedParams {
    // Gradients of queries so far, f32.
    TensorMap sums;
    TensorMap q;
    TensorMap dout;
    TensorMap k;
    TensorMap v;
    // [query head of the sums][n_q]: how many tiles have added to the block whose last query that is. NULL where tiles
    // add in any order.
    u32 *turns;
    // The first query head that has sums, counted through the batch.
    u32 first_head;
    // Whether the tiles whose turn is 0 store instead of adding; never without turns.
    u32 stores;
};

} // namespace backward_fused
} // namespace hyperattn
