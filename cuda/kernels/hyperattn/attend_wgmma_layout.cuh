// Block sizes and shared memory of the Hopper attention kernel.
//
// Keys and values stream through rings of stages, blocks of KEYS keys each. A stage holds CHUNKS times KEYS rows of 64
// elements (128 bytes), swizzled by 128 bytes; elements past the tensors' dimensions are 0.
#pragma once

#include "work.cuh"

namespace hyperattn {
namespace hopper {

// Threads: a warpgroup that loads, and two that compute 64 rows of the tile each.
constexpr u32 WARPGROUP = 128;
constexpr u32 CONSUMERS = 2;
constexpr u32 THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr u32 ALL_LANES = 0xffffffff;

// The loading warps take turns: block i of the stream of blocks, and all that has to do with it, is warp i % 4's.
constexpr u32 LOADER_WARPS = 4;

constexpr u32 CONSUMER_WARPS = 4 * CONSUMERS;

// Bytes of a row of a chunk, and its elements.
constexpr u32 ROW_BYTES = 128;
constexpr u32 ROW_ELEMENTS = 64;

// Stands for a key that no row of the tile may see, and for no query. More than any position.
constexpr u32 NO_ROW = 0xffffffff;

// Tile numbers on their way from the thread that draws them to the loading warps.
constexpr u32 NUMBER_STAGES = 2;

// A tile goes on from at most as many partials: of 31 levels and of the keys before them.
constexpr u32 MOST_PARTIALS = 32;

// What the loaders say of a block.
enum BlockFlags : u32 {
    // Some logits of these keys are to be masked: a row sees a key if the key's position is below the row's limit.
    BLOCK_MASKED = 1,
    // The limits are the rows' causal ones; without it only NO_ROW is to be masked.
    BLOCK_LIMITED = 2,
    // The tile's last block.
    BLOCK_LAST = 4,
    // Of masked blocks: no more than the last TAIL_KEYS keys are to be masked, from the number on that is in the flags
    // from bit BLOCK_VISIBLE_SHIFT on.
    BLOCK_TAIL = 8,
    // Shifted by the number of one of a block's parts: it is masked.
    BLOCK_PART_MASKED = 256,
};
constexpr u32 TAIL_KEYS = 32;
constexpr u32 BLOCK_VISIBLE_SHIFT = 16;

struct alignas(16) QueryStage {
    u32 batch;
    u32 head;
    // 0: there are no more tiles.
    u32 rows;
    u32 flags;
    u32 has_keys;
    u32 first_output;
    u32 row[TILE_ROWS];
    // Of TILE_MERGE: what the partials' first_output is.
    u32 partial[MOST_PARTIALS];
};

template <u32 KEYS> struct alignas(16) KeyStage {
    u32 flags;
    float log_weight;
    // Of blocks that are BLOCK_MASKED; any but NO_ROW will do without BLOCK_LIMITED.
    u32 position[KEYS];
};

// Values that are not finite and that some rows of the tile must not see: 0 times them would not be 0. Their elements
// are 0 in shared memory, and rows that see the key add them afterwards. Written for blocks that are BLOCK_LIMITED and
// BLOCK_MASKED, whose keys' rows are their positions.
template <u32 KEYS> struct alignas(16) ValueStage {
    // A bit for each key.
    u32 not_finite[KEYS / 32];
    u32 row[KEYS];
};

template <u32 DIM> struct Shape {
    static constexpr u32 KEYS = DIM <= 128 ? 128 : DIM <= 192 ? 96 : 64;
    // Where registers allow it, the consumers weigh blocks by halves.
    static constexpr u32 PARTS = DIM <= 64 ? 2 : 1;
    static constexpr u32 CHUNKS = (DIM + ROW_ELEMENTS - 1) / ROW_ELEMENTS;
    // Of a thread; together no more than the block starts with.
    static constexpr u32 LOADER_REGISTERS = DIM <= 64 ? 72 : 56;
    static constexpr u32 CONSUMER_REGISTERS = DIM <= 64 ? 216 : 224;
    static constexpr u32 QUERY_STAGES = DIM <= 128 ? 2 : 1;
    static constexpr u32 KEY_STAGES = DIM <= 64 ? 4 : 2;
    static constexpr u32 QUERY_CHUNK_BYTES = TILE_ROWS * ROW_BYTES;
    static constexpr u32 QUERY_BYTES = CHUNKS * QUERY_CHUNK_BYTES;
    static constexpr u32 KEY_CHUNK_BYTES = KEYS * ROW_BYTES;
    static constexpr u32 KEY_BYTES = CHUNKS * KEY_CHUNK_BYTES;
    static constexpr u32 KEYS_AT = QUERY_STAGES * QUERY_BYTES;
    static constexpr u32 VALUES_AT = KEYS_AT + KEY_STAGES * KEY_BYTES;
    static constexpr u32 CONTROL_AT = VALUES_AT + KEY_STAGES * KEY_BYTES;

    // Numbers of the first barriers of each kind: "full" for the consumers, "empty" for the loaders. Block i is released
    // on barrier i % LOADER_WARPS even if there are fewer stages: a warp waits for the same one of each four blocks, and
    // so sees every phase of a barrier, of which two can be told apart and no more.
    static constexpr u32 QUERY_FULL = 0;
    static constexpr u32 QUERY_EMPTY = QUERY_FULL + QUERY_STAGES;
    static constexpr u32 KEY_FULL = QUERY_EMPTY + QUERY_STAGES;
    static constexpr u32 KEY_EMPTY = KEY_FULL + KEY_STAGES;
    static constexpr u32 VALUE_FULL = KEY_EMPTY + LOADER_WARPS;
    static constexpr u32 VALUE_EMPTY = VALUE_FULL + KEY_STAGES;
    // "Full" for all loading warps, "empty" for the one that draws.
    static constexpr u32 NUMBER_FULL = VALUE_EMPTY + LOADER_WARPS;
    static constexpr u32 NUMBER_EMPTY = NUMBER_FULL + NUMBER_STAGES;
    static constexpr u32 BARRIERS = NUMBER_EMPTY + NUMBER_STAGES;

    struct Control {
        u64 barriers[BARRIERS];
        u32 number[NUMBER_STAGES];
        QueryStage query[QUERY_STAGES];
        KeyStage<KEYS> key[KEY_STAGES];
        ValueStage<KEYS> value[KEY_STAGES];
        // What each warp is copying, see list_rows().
        alignas(16) u32 list[LOADER_WARPS][TILE_ROWS];
    };

    // Swizzled rows repeat every 1024 bytes, to which the launch's shared memory is not aligned.
    static constexpr u32 SHARED_BYTES = 1024 + CONTROL_AT + sizeof(Control);
    static_assert(SHARED_BYTES <= 227 * 1024, "shared memory of a block");
    static_assert(KEYS % 32 == 0 && KEYS <= TILE_ROWS, "lanes look up as many keys each, and list them");
    static_assert(LOADER_WARPS % KEY_STAGES == 0, "a warp's blocks are in one stage");
};

// A consumer's place in a ring.
template <u32 STAGES> struct Ring {
    u32 stage = 0;
    u32 phase = 0;

    // Which of the loaders' warps has loaded the block.
    __device__ __forceinline__ u32 loader() const
    {
        static_assert(STAGES == LOADER_WARPS || 2 * STAGES == LOADER_WARPS, "a phase is a turn or half of one");
        return STAGES == LOADER_WARPS ? stage : phase * STAGES + stage;
    }

    __device__ __forceinline__ void advance()
    {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

} // namespace hopper
} // namespace hyperattn
