// Shared memory of the Hopper backward kernels, and what their loading warps tell the computing ones.
//
// The rows of a tile, with two vectors each, lie in two halves, one for each computing warpgroup; the columns that they
// meet, with two vectors each, stream through a ring of stages. Vectors lie in chunks of 64 elements (128 bytes) of all
// rows, swizzled by 128 bytes; elements past the tensors' dimensions are 0.
#pragma once

#include "attend_wgmma_copy.cuh"
#include "query_stream.cuh"

namespace hyperattn {
namespace backward_hopper {

using hopper::ALL_LANES;
using hopper::LOADER_WARPS;
using hopper::Ring;
using hopper::ROW_BYTES;
using hopper::ROW_ELEMENTS;
using hopper::WARPGROUP;
constexpr u32 NO_KEY = key_stream::NO_KEY;

// A warpgroup that loads, and two that compute 64 rows of the tile each.
constexpr u32 CONSUMERS = 2;
constexpr u32 THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr u32 CONSUMER_WARPS = 4 * CONSUMERS;
// Arrivals of a loading warp that complete a phase: one of its own and one of each of its threads.
constexpr u32 LOADER_ARRIVALS = 1 + 32;
// Of a thread, for tiles of queries and of keys; together no more than the block starts with, 168 for each.
constexpr u32 LOADER_REGISTERS[2] = {72, 56};
constexpr u32 CONSUMER_REGISTERS[2] = {216, 224};
static_assert(LOADER_REGISTERS[0] + CONSUMERS * CONSUMER_REGISTERS[0] <= (1 + CONSUMERS) * 168 &&
                  LOADER_REGISTERS[1] + CONSUMERS * CONSUMER_REGISTERS[1] <= (1 + CONSUMERS) * 168,
              "or a warpgroup waits for ever");

// The named barrier of the computing threads.
constexpr u32 CONSUMER_BARRIER = 1;

constexpr u32 HALF_ROWS = TILE_ROWS / CONSUMERS;
constexpr u32 DRAWN_STAGES = 2;
// Loading warps of a half's rows: one of the first vectors, one of the second.
constexpr u32 ROW_WARPS = LOADER_WARPS / CONSUMERS;
static_assert(ROW_WARPS == 2, "there are two vectors");

// Half of a tile's rows. `rows`, the tile's, is 0 when there are no more tiles.
struct alignas(16) HalfRows {
    u32 batch;
    u32 head;
    u32 rows;
    u32 flags;
    u32 has_columns;
    u32 first_output;
    // Of queries: no share of a column of zeros is above 2^(its log weight + this), nor is its product with a delta.
    float exponent;
    u32 row[HALF_ROWS];
    // Of queries.
    RowTerms terms[HALF_ROWS];
    // A query sees positions below `hidden_start`; a key is hidden from positions [hidden_start, hidden_start + count).
    u32 hidden_start[HALF_ROWS];
    u32 hidden_count[HALF_ROWS];
    // Of keys: not 0 if there are sums to go on from.
    u32 resumes[HALF_ROWS];
};

enum StageFlags : u32 {
    // Of keys as in key_stream.cuh; of queries that a key is hidden from some of them.
    STAGE_MASKED = key_stream::BLOCK_MASKED,
    STAGE_STRADDLES = key_stream::BLOCK_STRADDLES,
    // The tile's last block.
    STAGE_LAST = 4,
    // Of queries: keys are hidden from all of them. Never with STAGE_MASKED.
    STAGE_HIDES = 8,
};

// Of 16-bit floats, less the sign's part.
constexpr float MOST_EXPONENT = 14.0f;

template <u32 COLUMNS> struct alignas(16) ColumnStage {
    // Of queries: log weight less lse, and delta.
    float2 terms[COLUMNS];
    // Of STAGE_MASKED.
    u32 position[COLUMNS];
    // Of STAGE_HIDES: a bit for each key.
    u32 hidden[TILE_ROWS / 32];
    u32 flags;
    float log_weight;
};

// A tile on its way to the loading warps, a word for each lane of half a warp; the last tells whether there is one.
struct DrawnTile {
    u32 words[16];
};
constexpr u32 DRAWN_EXISTS = 15;
static_assert(sizeof(Tile) <= DRAWN_EXISTS * 4 && sizeof(KeyTile) <= DRAWN_EXISTS * 4, "words of a tile");

// What a loading warp keeps of a tile, with the block of columns that it is at: registers are scarce.
struct LoadedQueryTile {
    Tile tile;
    key_stream::KeyBlock block;
    u32 kv_head;
    // Of its keys.
    const u32 *order;
};

struct LoadedKeyTile {
    KeyTile tile;
    query_stream::QueryBlock block;
};

template <u32 DIM> struct Shape {
    static constexpr u32 COLUMNS = DIM <= 64 ? 128 : 64;
    // Each is loaded by a warp of its own.
    static constexpr u32 STAGES = LOADER_WARPS;
    static constexpr u32 CHUNKS = DIM / ROW_ELEMENTS;
    static constexpr u32 ROW_CHUNK_BYTES = HALF_ROWS * ROW_BYTES;
    static constexpr u32 ROWS_BYTES = CHUNKS * ROW_CHUNK_BYTES;
    static constexpr u32 COLUMN_CHUNK_BYTES = COLUMNS * ROW_BYTES;
    static constexpr u32 COLUMNS_BYTES = CHUNKS * COLUMN_CHUNK_BYTES;
    // Both vectors of a half or stage lie behind each other.
    static constexpr u32 COLUMNS_AT = CONSUMERS * 2 * ROWS_BYTES;
    static constexpr u32 CONTROL_AT = COLUMNS_AT + STAGES * 2 * COLUMNS_BYTES;

    // Numbers of the first barriers of each kind: "full" for the computing warps, "empty" for the loading ones.
    static constexpr u32 ROWS_FULL = 0;
    static constexpr u32 ROWS_EMPTY = ROWS_FULL + CONSUMERS;
    static constexpr u32 COLUMNS_FULL = ROWS_EMPTY + CONSUMERS;
    static constexpr u32 COLUMNS_EMPTY = COLUMNS_FULL + STAGES;
    // "Full" for all loading warps, "empty" for the one that draws.
    static constexpr u32 DRAWN_FULL = COLUMNS_EMPTY + STAGES;
    static constexpr u32 DRAWN_EMPTY = DRAWN_FULL + DRAWN_STAGES;
    static constexpr u32 BARRIERS = DRAWN_EMPTY + DRAWN_STAGES;

    struct Control {
        u64 barriers[BARRIERS];
        DrawnTile drawn[DRAWN_STAGES];
        HalfRows rows[CONSUMERS];
        ColumnStage<COLUMNS> columns[STAGES];
        // What each loading warp is copying, see hopper::list_rows().
        alignas(16) u32 list[LOADER_WARPS][TILE_ROWS];
        union {
            LoadedQueryTile queries[LOADER_WARPS];
            LoadedKeyTile keys[LOADER_WARPS];
        };
    };

    // Swizzled rows repeat every 1024 bytes, to which the launch's shared memory is not aligned.
    static constexpr u32 SHARED_BYTES = 1024 + CONTROL_AT + sizeof(Control);
    static_assert(SHARED_BYTES <= 227 * 1024, "shared memory of a block");
};

} // namespace backward_hopper
} // namespace hyperattn
