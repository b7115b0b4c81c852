// Algorithm 1, first half: the Gray rank of every row's bucket. Memory-bound: each row is read once, through shared
// memory in slices of whole cache lines; a thread owns rows and all their hyperplanes, because a projection is one
// chain of fused multiply-adds in ascending order of the head dimension, here as on the CPU.
#pragma once

#include "convert.cuh"
#include "projections.cuh"

namespace hyperattn {

constexpr u32 HASH_THREADS = 128;
// Rows of one thread, so that a normal read from shared memory serves several.
constexpr u32 HASH_THREAD_ROWS = 2;
constexpr u32 HASH_TILE_ROWS = HASH_THREADS * HASH_THREAD_ROWS;
// Tiles that a thread block works through, prefetching the next.
constexpr u32 HASH_TILES = 8;
// Bytes of a row that are staged at once.
constexpr u32 HASH_SLICE = 128;
constexpr u32 HASH_STAGE = HASH_TILE_ROWS * HASH_SLICE;

// Queries or keys.
struct HashSide {
    View rows;
    // [heads of the set][count].
    u32 *ranks;
    u32 type;
    // Of a batch item.
    u32 heads;
    u32 heads_per_projection;
    // Heads of the set, counted through the batch.
    u32 first_head;
    u32 set_heads;
    // Rows of a head.
    u32 count;
    // Bytes that every row's address and length are a multiple of: 16, 8, 4 or 2.
    u32 unit;
    // Thread blocks of one head: ceil(count / (HASH_TILE_ROWS * HASH_TILES)).
    u32 blocks;
};

struct HashParams {
    HashSide query;
    HashSide key;
    const float *projections;
    u32 head_dim;
    u32 reserved;
};

static_assert(sizeof(HashSide) == 72 && sizeof(HashParams) == 160, "the host's mirror of these structs counts on it");

// Position of `code` in the binary-reflected Gray sequence.
__device__ __forceinline__ u32 gray_rank(u32 code)
{
    code ^= code >> 1;
    code ^= code >> 2;
    code ^= code >> 4;
    code ^= code >> 8;
    return code ^ code >> 16;
}

// Where byte `byte` of a row's slice is staged: 16 bytes at the same place of eight neighbouring rows are on different
// banks.
__device__ __forceinline__ u32 staged_at(u32 row, u32 byte)
{
    return row * HASH_SLICE + (byte ^ row % 8 * 16);
}

// Copies one unit to shared memory; those of 4 bytes and more arrive with the thread's next cp.async group.
template <u32 UNIT>
__device__ __forceinline__ void stage_unit(char *to, const char *from)
{
    if constexpr (UNIT >= 4) {
        u32 address = (u32)__cvta_generic_to_shared(to);
        if constexpr (UNIT == 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(UNIT) : "memory");
    } else {
        *(u16 *)to = *(const u16 *)from;
    }
}

// Slice `slice` of `rows` rows, zeros from the row's end to the end of its last 16 bytes.
template <u32 UNIT>
__device__ __forceinline__ void stage_units(
    const char *first_row, i64 row_stride, u32 rows, u32 row_bytes, u32 slice, char *to)
{
    constexpr u32 UNITS = HASH_SLICE / UNIT;
    u32 padded = (row_bytes + 15) / 16 * 16;
    u32 slice_start = slice * HASH_SLICE;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < rows * UNITS; i += HASH_THREADS) {
        u32 row = i / UNITS, byte = i % UNITS * UNIT;
        char *slot = to + staged_at(row, byte);
        byte += slice_start;
        if (byte < row_bytes) {
            stage_unit<UNIT>(slot, first_row + row * row_stride + byte);
        } else if (byte < padded) {
            for (u32 i = 0; i < UNIT; i += 2)
                *(u16 *)(slot + i) = 0;
        }
    }
}

// Number `index` of 16 bytes of elements as f32.
template <u32 TYPE>
__device__ __forceinline__ float hash_element(const u32 (&words)[4], u32 index)
{
    if constexpr (TYPE == F32) {
        return __uint_as_float(words[index]);
    } else if constexpr (TYPE == BF16) {
        u32 word = words[index / 2];
        return __uint_as_float(index % 2 ? word & 0xFFFF0000u : word << 16);
    } else {
        return f32_from_f16((u16)(index % 2 ? words[index / 2] >> 16 : words[index / 2]));
    }
}

// The ranks of the rows of one head from tile `first_tile` on. `normals` is [projection_rows][width] in shared memory.
template <u32 TYPE, u32 GROUPS>
__device__ __forceinline__ void hash_tiles(
    const HashSide &side, u32 set_head, u32 first_tile, u32 head_dim, const float *normals, char *stages)
{
    constexpr u32 WIDTH = GROUPS * HYPERPLANE_GROUP;
    constexpr u32 ELEMENT_BYTES = TYPE == F32 ? 4 : 2;
    constexpr u32 PER_VECTOR = 16 / ELEMENT_BYTES;

    u32 flat = side.first_head + set_head;
    u32 row_bytes = head_dim * ELEMENT_BYTES;
    u32 slices = (row_bytes + HASH_SLICE - 1) / HASH_SLICE;
    u32 tiles = (side.count + HASH_TILE_ROWS - 1) / HASH_TILE_ROWS - first_tile;
    tiles = tiles < HASH_TILES ? tiles : HASH_TILES;
    u32 *ranks = side.ranks + (u64)set_head * side.count;

    auto stage = [&](u32 step) {
        u32 first = (first_tile + step / slices) * HASH_TILE_ROWS;
        u32 rows = side.count - first < HASH_TILE_ROWS ? side.count - first : HASH_TILE_ROWS;
        const char *from = side.rows.row(flat / side.heads, flat % side.heads, first);
        char *to = stages + step % 2 * HASH_STAGE;
        i64 stride = side.rows.row_stride;
        switch (side.unit) {
        case 16: stage_units<16>(from, stride, rows, row_bytes, step % slices, to); break;
        case 8: stage_units<8>(from, stride, rows, row_bytes, step % slices, to); break;
        case 4: stage_units<4>(from, stride, rows, row_bytes, step % slices, to); break;
        default: stage_units<2>(from, stride, rows, row_bytes, step % slices, to); break;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    float sums[HASH_THREAD_ROWS][WIDTH];
    u32 steps = tiles * slices;
    stage(0);
    for (u32 step = 0; step < steps; step++) {
        if (step + 1 < steps) {
            stage(step + 1);
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncthreads();

        u32 slice = step % slices;
        if (slice == 0) {
#pragma unroll
            for (u32 r = 0; r < HASH_THREAD_ROWS; r++)
#pragma unroll
                for (u32 j = 0; j < WIDTH; j++)
                    sums[r][j] = 0.0f;
        }
        u32 left = (row_bytes - slice * HASH_SLICE + 15) / 16;
        u32 vectors = left < HASH_SLICE / 16 ? left : HASH_SLICE / 16;
        const char *staged = stages + step % 2 * HASH_STAGE;
        const float *row_normals = normals + slice * (HASH_SLICE / ELEMENT_BYTES) * WIDTH;
        for (u32 vector = 0; vector < vectors; vector++) {
            u32 words[HASH_THREAD_ROWS][4];
#pragma unroll
            for (u32 r = 0; r < HASH_THREAD_ROWS; r++) {
                uint4 loaded = *(const uint4 *)(staged + staged_at(r * HASH_THREADS + threadIdx.x, vector * 16));
                words[r][0] = loaded.x, words[r][1] = loaded.y, words[r][2] = loaded.z, words[r][3] = loaded.w;
            }
#pragma unroll
            for (u32 e = 0; e < PER_VECTOR; e++) {
                float element[HASH_THREAD_ROWS];
#pragma unroll
                for (u32 r = 0; r < HASH_THREAD_ROWS; r++)
                    element[r] = hash_element<TYPE>(words[r], e);
                const float4 *four = (const float4 *)(row_normals + (vector * PER_VECTOR + e) * WIDTH);
#pragma unroll
                for (u32 j = 0; j < WIDTH / 4; j++) {
                    float4 normal = four[j];
#pragma unroll
                    for (u32 r = 0; r < HASH_THREAD_ROWS; r++) {
                        sums[r][4 * j] = __fmaf_rn(element[r], normal.x, sums[r][4 * j]);
                        sums[r][4 * j + 1] = __fmaf_rn(element[r], normal.y, sums[r][4 * j + 1]);
                        sums[r][4 * j + 2] = __fmaf_rn(element[r], normal.z, sums[r][4 * j + 2]);
                        sums[r][4 * j + 3] = __fmaf_rn(element[r], normal.w, sums[r][4 * j + 3]);
                    }
                }
            }
        }
        if (slice == slices - 1) {
            u32 first = (first_tile + step / slices) * HASH_TILE_ROWS + threadIdx.x;
#pragma unroll
            for (u32 r = 0; r < HASH_THREAD_ROWS; r++) {
                u32 code = 0;
#pragma unroll
                for (u32 j = 0; j < WIDTH; j++)
                    code |= (sums[r][j] > 0.0f ? 1u : 0u) << j;
                u32 row = first + r * HASH_THREADS;
                if (row < side.count)
                    ranks[row] = gray_rank(code);
            }
        }
        // The next step but one is staged where this one was read.
        __syncthreads();
    }
}

template <u32 GROUPS>
__device__ __forceinline__ void hash_block(const HashParams &params)
{
    extern __shared__ __align__(16) char shared[];
    constexpr u32 WIDTH = GROUPS * HYPERPLANE_GROUP;
    u32 block = blockIdx.x, query_blocks = params.query.set_heads * params.query.blocks;
    bool is_query = block < query_blocks;
    const HashSide &side = is_query ? params.query : params.key;
    block -= is_query ? 0 : query_blocks;
    u32 set_head = block / side.blocks, first_tile = block % side.blocks * HASH_TILES;

    u32 normal_vectors = projection_rows(params.head_dim) * WIDTH / 4;
    u32 head = (side.first_head + set_head) % side.heads;
    const float4 *from = (const float4 *)params.projections + (u64)(head / side.heads_per_projection) * normal_vectors;
    float4 *normals = (float4 *)shared;
    for (u32 i = threadIdx.x; i < normal_vectors; i += HASH_THREADS)
        normals[i] = from[i];
    // The first barrier of hash_tiles makes them visible.
    char *stages = shared + normal_vectors * 16;
    switch (side.type) {
    case F32: hash_tiles<F32, GROUPS>(side, set_head, first_tile, params.head_dim, (float *)shared, stages); break;
    case F16: hash_tiles<F16, GROUPS>(side, set_head, first_tile, params.head_dim, (float *)shared, stages); break;
    default: hash_tiles<BF16, GROUPS>(side, set_head, first_tile, params.head_dim, (float *)shared, stages); break;
    }
}

} // namespace hyperattn

// Up to 8, 16 and 24 hyperplanes. Grid: the two sides' set_heads * blocks; block HASH_THREADS; dynamic shared bytes
// projection_rows(head_dim) * width * 4 + 2 * HASH_STAGE.
extern "C" __global__ void __launch_bounds__(128) paper_hash_8(const __grid_constant__ hyperattn::HashParams params)
{
    hyperattn::hash_block<1>(params);
}

extern "C" __global__ void __launch_bounds__(128) paper_hash_16(const __grid_constant__ hyperattn::HashParams params)
{
    hyperattn::hash_block<2>(params);
}

extern "C" __global__ void __launch_bounds__(128) paper_hash_24(const __grid_constant__ hyperattn::HashParams params)
{
    hyperattn::hash_block<3>(params);
}
