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

// Arrivals that complete a phase: of the loaders one of each warp and one of each thread, of the consumers one of each
// warp.
constexpr u32 LOADER_WARPS = 4;
constexpr u32 LOADER_ARRIVALS = LOADER_WARPS + WARPGROUP;
constexpr u32 CONSUMER_WARPS = 4 * CONSUMERS;

// Bytes of a row of a chunk, and its elements.
constexpr u32 ROW_BYTES = 128;
constexpr u32 ROW_ELEMENTS = 64;

// The named barrier of the loading warps; those of the consumers are 1 and 2.
constexpr u32 LOADERS_BARRIER = 3;

// Stands for a key that no row of the tile may see, and for no query. More than any position.
constexpr u32 NO_ROW = 0xffffffff;

// Tile numbers on their way from the thread that draws them to the loading warps.
constexpr u32 NUMBER_STAGES = 2;

// What a warp of the loaders says of its keys of a block.
enum BlockFlags : u32 {
    // Some logits of these keys are to be masked: a row sees a key if the key's position is below the row's limit.
    BLOCK_MASKED = 1,
    // The limits are the rows' causal ones; without it only NO_ROW is to be masked.
    BLOCK_LIMITED = 2,
    // The tile's last block.
    BLOCK_LAST = 4,
    // Copied by threads, not by the copy engine.
    BLOCK_GATHERED = 8,
};

struct alignas(16) QueryStage {
    u32 batch;
    u32 head;
    // 0: there are no more tiles.
    u32 rows;
    u32 flags;
    u32 has_keys;
    // Of TILE_COMPACT.
    u32 first_output;
    u32 row[TILE_ROWS];
};

template <u32 KEYS> struct alignas(16) KeyStage {
    u32 flags[LOADER_WARPS];
    float log_weight;
    u32 position[KEYS];
};

// Values that are not finite and that some rows of the tile must not see: 0 times them would not be 0. Their elements
// are 0 in shared memory, and rows that see the key add them afterwards. Written for blocks that are BLOCK_LIMITED and
// BLOCK_MASKED.
template <u32 KEYS> struct alignas(16) ValueStage {
    // A bit for each of a warp's keys.
    u32 not_finite[LOADER_WARPS];
    u32 row[KEYS];
    u32 position[KEYS];
};

template <u32 DIM> struct Shape {
    static constexpr u32 KEYS = DIM <= 128 ? 128 : DIM <= 192 ? 96 : 64;
    static constexpr u32 CHUNKS = (DIM + ROW_ELEMENTS - 1) / ROW_ELEMENTS;
    static constexpr u32 WARP_KEYS = KEYS / LOADER_WARPS;
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

    // Barriers are "full" for the consumers, "empty" for the loaders.
    struct Control {
        u64 query_full[QUERY_STAGES];
        u64 query_empty[QUERY_STAGES];
        u64 key_full[KEY_STAGES];
        u64 key_empty[KEY_STAGES];
        u64 value_full[KEY_STAGES];
        u64 value_empty[KEY_STAGES];
        // "Full" for all loading warps, "empty" for the one that draws.
        u64 number_full[NUMBER_STAGES];
        u64 number_empty[NUMBER_STAGES];
        u32 number[NUMBER_STAGES];
        QueryStage query[QUERY_STAGES];
        KeyStage<KEYS> key[KEY_STAGES];
        ValueStage<KEYS> value[KEY_STAGES];
    };

    // Swizzled rows repeat every 1024 bytes, to which the launch's shared memory is not aligned.
    static constexpr u32 SHARED_BYTES = 1024 + CONTROL_AT + sizeof(Control);
    static_assert(SHARED_BYTES <= 227 * 1024, "shared memory of a block");
    static_assert(WARP_KEYS % 8 == 0 && WARP_KEYS <= 32, "a lane looks up one key, copies take 8 rows in two steps");
};

// A warp's place in a ring.
template <u32 STAGES> struct Ring {
    u32 stage = 0;
    u32 phase = 0;

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
