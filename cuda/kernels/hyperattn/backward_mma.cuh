// Gradients on mma.sync for 16-bit queries, keys, values and output gradients; sm_80 and everything after it.
//
// A thread block keeps the rows of a tile, each with two vectors, and meets blocks of columns that have two vectors
// too:
//     rows of queries (q, dout) and columns of keys (k, v), for dq;
//     rows of keys (k, v) and columns of queries (q, dout), for dk and dv.
// A warp owns 16 rows and all columns of a block: shares and slopes go from the accumulators of two products into the
// operands of the next ones in registers. Where there is room the next block is copied meanwhile.
//
// What a row must not see. Shares of masked pairs are 0. In a block with pairs of both kinds slopes of 0 would still
// turn a NaN or an infinity of a column's vector into NaN: the vectors are looked through, and what is not finite is
// added to just the rows that the column is for and set to zero for the product.
#pragma once

#include "attend_mma.cuh"
#include "backward_pairs.cuh"
#include "query_stream.cuh"

namespace hyperattn {
namespace backward_mma {

using namespace online_softmax;
using mma::copy_rows;
using mma::mma_shared;
using mma::multiply_add;
constexpr u32 NO_KEY = key_stream::NO_KEY;

// The accumulators of keys' tiles are those of both gradients, or of one where registers do not hold both.
enum Sums : u32 { SUM_QUERIES, SUM_KEYS_AND_VALUES, SUM_KEYS, SUM_VALUES };

template <u32 DIM> struct Shape : mma::Shape<DIM> {
    using Base = mma::Shape<DIM>;
    static constexpr u32 WARP_ROWS = 16;
    static constexpr u32 WARPS = TILE_ROWS / WARP_ROWS;
    static constexpr u32 THREADS = WARPS * 32;
    // Of a block.
    static constexpr u32 COLUMNS = DIM <= 128 ? 64 : 32;
    static constexpr u32 STAGES = DIM <= 128 ? 2 : 1;
    static constexpr u32 TILE_BYTES = TILE_ROWS * Base::ROW_BYTES;
    static constexpr u32 BLOCK_BYTES = COLUMNS * Base::ROW_BYTES;
    static constexpr u32 COLUMNS_AT = 2 * TILE_BYTES;
    static constexpr u32 MEMORY_AT = COLUMNS_AT + STAGES * 2 * BLOCK_BYTES;
    static constexpr u32 OF_QUERIES_BYTES = sizeof(key_stream::TileMemory<COLUMNS>);
    static constexpr u32 OF_KEYS_BYTES = sizeof(query_stream::TileMemory<COLUMNS>);
    static constexpr u32 MEMORY_BYTES = OF_QUERIES_BYTES > OF_KEYS_BYTES ? OF_QUERIES_BYTES : OF_KEYS_BYTES;
    static constexpr u32 SHARED_BYTES = MEMORY_AT + MEMORY_BYTES;
};

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies but the newest `PENDING`.
template <u32 PENDING> __device__ __forceinline__ void wait_for_groups()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Products of a warp's rows with a block's columns. The addresses are this lane's.
template <u32 TYPE, u32 DIM>
__device__ __forceinline__ void multiply(float (&products)[Shape<DIM>::COLUMNS / 8][4], u32 rows, u32 columns)
{
    using S = Shape<DIM>;
#pragma unroll
    for (u32 n = 0; n < S::COLUMNS / 8; ++n)
        products[n][0] = products[n][1] = products[n][2] = products[n][3] = 0.0f;
#pragma unroll
    for (u32 step = 0; step < DIM / 16; ++step) {
        u32 a[4];
        load_matrices(a, S::along(rows, step));
#pragma unroll
        for (u32 n = 0; n < S::COLUMNS / 16; ++n) {
            u32 b[4];
            load_matrices(b, S::along(columns + n * 16 * S::ROW_BYTES, step));
            multiply_add<TYPE>(products[2 * n], a, b[0], b[1]);
            multiply_add<TYPE>(products[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Adds a block's columns with their weights to a warp's rows. The address is this lane's.
template <u32 TYPE, u32 DIM>
__device__ __forceinline__ void accumulate(float (&sums)[DIM / 8][4],
                                           const float (&weights)[Shape<DIM>::COLUMNS / 8][4], u32 columns)
{
    using S = Shape<DIM>;
#pragma unroll
    for (u32 step = 0; step < S::COLUMNS / 16; ++step) {
        const u32 a[4] = {f32_to_16x2<TYPE>(weights[2 * step][0], weights[2 * step][1]),
                          f32_to_16x2<TYPE>(weights[2 * step][2], weights[2 * step][3]),
                          f32_to_16x2<TYPE>(weights[2 * step + 1][0], weights[2 * step + 1][1]),
                          f32_to_16x2<TYPE>(weights[2 * step + 1][2], weights[2 * step + 1][3])};
#pragma unroll
        for (u32 n = 0; n < DIM / 16; ++n) {
            u32 b[4];
            load_matrices_transposed(b, S::along(columns + step * 16 * S::ROW_BYTES, n));
            multiply_add<TYPE>(sums[2 * n], a, b[0], b[1]);
            multiply_add<TYPE>(sums[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Takes what is not finite out of a block's vectors and adds it to the rows that see its column; all threads call it.
template <u32 TYPE, u32 DIM, typename Seen>
__device__ __forceinline__ void take_out_not_finite(float (&sums)[DIM / 8][4], char *columns, Seen seen)
{
    using S = Shape<DIM>;
    if (!__syncthreads_or(mma::holds_not_finite<TYPE, S>(columns)))
        return;
    const u32 quad_lane = threadIdx.x % 4;
#pragma unroll 1
    for (u32 j = 0; j < S::COLUMNS; ++j) {
        const bool counts[2] = {seen(0, j), seen(1, j)};
#pragma unroll
        for (u32 n = 0; n < DIM / 8; ++n) {
            u32 pair = *(const u32 *)(columns + S::chunk_offset(j, n) + quad_lane * 4);
            pair ^= mma::finite_part<TYPE>(pair);
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                if (pair != 0 && counts[half]) {
                    sums[n][2 * half] += f32_from_16<TYPE>((u16)pair);
                    sums[n][2 * half + 1] += f32_from_16<TYPE>((u16)(pair >> 16));
                }
            }
        }
    }
    __syncthreads();
    mma::clear_not_finite<TYPE, S>(columns);
    __syncthreads();
}

// The elements of one of a lane's two rows.
template <u32 DIM>
__device__ __forceinline__ void load_sums(float (&sums)[DIM / 8][4], u32 half, const float *from, u32 dim)
{
    load_pairs<DIM>(from, dim, [&](u32 n, float first, float second) {
        sums[n][2 * half] = first;
        sums[n][2 * half + 1] = second;
    });
}

template <u32 TYPE, u32 DIM>
__device__ __forceinline__ void write_row(const float (&sums)[DIM / 8][4], u32 half, char *to, u32 type, u32 dim,
                                          float factor)
{
    write_pairs<TYPE, DIM>(to, type, dim, factor,
                           [&](u32 n) { return make_float2(sums[n][2 * half], sums[n][2 * half + 1]); });
}

template <u32 COUNT> __device__ __forceinline__ void clear(float (&sums)[COUNT][4])
{
#pragma unroll
    for (u32 n = 0; n < COUNT; ++n)
        sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
}

// Where this lane's rows of the 8 x 8 matrices begin, in shared memory, and its rows of the tile.
template <u32 DIM> struct Places {
    using S = Shape<DIM>;
    u32 start = (u32)__cvta_generic_to_shared(mma_shared);
    u32 lane = threadIdx.x % 32;
    u32 warp_row = threadIdx.x / 32 * S::WARP_ROWS;
    u32 rows = start + S::chunk_offset(warp_row + lane % 16, lane / 16);
    u32 columns = start + S::COLUMNS_AT + S::chunk_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    u32 transposed = start + S::COLUMNS_AT + S::chunk_offset(lane % 16, lane / 16);

    // The lane's row of one half.
    __device__ __forceinline__ u32 row(u32 half) const { return warp_row + half * 8 + lane / 4; }

    // Distance of a slot's first vectors from those of slot 0; the second vectors are BLOCK_BYTES behind.
    __device__ __forceinline__ static u32 stage(u32 slot) { return S::STAGES == 1 ? 0 : slot * 2 * S::BLOCK_BYTES; }
};

// dq of the tiles of queries.
template <u32 TYPE, u32 DIM> __device__ __forceinline__ void of_queries(const BackwardParams &params)
{
    using S = Shape<DIM>;
    using namespace key_stream;
    constexpr u32 COLUMNS = S::COLUMNS;
    const AttendParams &p = params.attend;
    const Places<DIM> at;
    key_stream::TileMemory<COLUMNS> &memory = *(key_stream::TileMemory<COLUMNS> *)(mma_shared + S::MEMORY_AT);

    auto copy_block = [&](u32 slot) {
        Source keys = source<COLUMNS>(memory, slot, p.k, p.extra_keys, p.head_dim * 2);
        Source values = source<COLUMNS>(memory, slot, p.v, p.extra_values, p.value_dim * 2);
        u32 to = at.start + S::COLUMNS_AT + at.stage(slot);
        copy_rows<S, COLUMNS>(to, keys.data, keys.row_stride, memory.key_rows[slot], p.head_dim);
        copy_rows<S, COLUMNS>(to + S::BLOCK_BYTES, values.data, values.row_stride, memory.key_rows[slot], p.value_dim);
    };

    while (key_stream::claim_tile<COLUMNS>(p, memory)) {
        const Tile &tile = memory.tile;
        if (tile.rows == 0)
            continue;
        copy_rows<S, TILE_ROWS>(at.start, p.q.row(tile.batch, tile.head, 0), p.q.row_stride, memory.query_rows,
                                p.head_dim);
        copy_rows<S, TILE_ROWS>(at.start + S::TILE_BYTES, params.dout.row(tile.batch, tile.head, 0),
                                params.dout.row_stride, memory.query_rows, p.value_dim);
        if (threadIdx.x < COLUMNS)
            put_key<COLUMNS>(memory, 0, find_block<COLUMNS>(p, memory, 0, true));
        const u64 head_row = (u64)(tile.batch * p.heads_q + tile.head) * p.n_q;
        float sums[DIM / 8][4];
        clear(sums);
        RowTerms terms[2];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            u32 row = memory.query_rows[at.row(half)];
            terms[half] = {-negative_infinity(), 0.0f};
            if (row == NO_KEY)
                continue;
            terms[half] = params.row_terms[head_row + row];
            if (tile.flags & TILE_RESUME)
                load_sums<DIM>(sums, half, p.state_accumulated + (head_row + row) * p.head_dim, p.head_dim);
        }
        __syncthreads();
        if (memory.blocks[0].count)
            copy_block(0);
        commit_copies();

        for (u32 slot = 0; memory.blocks[slot].count; slot ^= 1) {
            if (threadIdx.x < COLUMNS)
                put_key<COLUMNS>(memory, slot ^ 1, find_block<COLUMNS>(p, memory, slot ^ 1, false));
            if constexpr (S::STAGES == 2) {
                __syncthreads();
                if (memory.blocks[slot ^ 1].count)
                    copy_block(slot ^ 1);
                commit_copies();
            }
            wait_for_groups<S::STAGES - 1>();
            __syncthreads();

            const u32 stage = at.stage(slot);
            float s[COLUMNS / 8][4], dp[COLUMNS / 8][4];
            multiply<TYPE, DIM>(s, at.rows, at.columns + stage);
            multiply<TYPE, DIM>(dp, at.rows + S::TILE_BYTES, at.columns + stage + S::BLOCK_BYTES);

            const float log_weight = memory.blocks[slot].segment.log_weight;
            const u32 flags = memory.blocks[slot].flags;
            const float shift[2] = {log_weight - terms[0].lse, log_weight - terms[1].lse};
#pragma unroll
            for (u32 n = 0; n < COLUMNS / 8; ++n) {
#pragma unroll
                for (u32 e = 0; e < 4; ++e) {
                    float share = exp2_approximate(fmaf(s[n][e], p.scale_log2, shift[e / 2]));
                    s[n][e] = share * (dp[n][e] - terms[e / 2].delta);
                }
            }
            if (flags & BLOCK_MASKED) {
                u32 limit[2];
#pragma unroll
                for (u32 half = 0; half < 2; ++half)
                    limit[half] = flags & BLOCK_STRADDLES ? memory.limits[at.row(half)] : NO_KEY;
#pragma unroll
                for (u32 n = 0; n < COLUMNS / 8; ++n) {
#pragma unroll
                    for (u32 e = 0; e < 4; ++e) {
                        u32 position = memory.key_positions[slot][n * 8 + at.lane % 4 * 2 + e % 2];
                        s[n][e] = position < limit[e / 2] ? s[n][e] : 0.0f;
                    }
                }
                if (flags & BLOCK_STRADDLES) {
                    take_out_not_finite<TYPE, DIM>(sums, mma_shared + S::COLUMNS_AT + stage, [&](u32 half, u32 j) {
                        return memory.key_positions[slot][j] < limit[half];
                    });
                }
            }
            accumulate<TYPE, DIM>(sums, s, at.transposed + stage);
            // Nobody reads the block any more.
            __syncthreads();
            if constexpr (S::STAGES == 1) {
                if (memory.blocks[slot ^ 1].count)
                    copy_block(slot ^ 1);
                commit_copies();
            }
        }
        // Also where there was no key: late copies of queries must not land in the next tile's.
        wait_for_groups<0>();

#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            u32 row = memory.query_rows[at.row(half)];
            if (row == NO_KEY)
                continue;
            if (tile.flags & TILE_STORE)
                write_row<TYPE, DIM>(sums, half, (char *)(p.state_accumulated + (head_row + row) * p.head_dim), F32,
                                     p.head_dim, 1.0f);
            else
                write_row<TYPE, DIM>(sums, half, p.out.row(tile.batch, tile.head, row), p.out_type, p.head_dim,
                                     params.scale);
        }
    }
}

// dk and dv of the tiles of keys, or one of them.
template <u32 TYPE, u32 DIM, u32 SUMS> __device__ __forceinline__ void of_keys(const BackwardParams &params)
{
    using S = Shape<DIM>;
    using namespace query_stream;
    constexpr u32 COLUMNS = S::COLUMNS;
    constexpr bool KEYS = SUMS != SUM_VALUES, VALUES = SUMS != SUM_KEYS;
    const AttendParams &p = params.attend;
    const Places<DIM> at;
    query_stream::TileMemory<COLUMNS> &memory = *(query_stream::TileMemory<COLUMNS> *)(mma_shared + S::MEMORY_AT);

    auto copy_block = [&](u32 slot) {
        u32 head = query_head(params, memory.tile, memory.blocks[slot]), batch = memory.tile.batch;
        u32 to = at.start + S::COLUMNS_AT + at.stage(slot);
        copy_rows<S, COLUMNS>(to, p.q.row(batch, head, 0), p.q.row_stride, memory.query_rows[slot], p.head_dim);
        copy_rows<S, COLUMNS>(to + S::BLOCK_BYTES, params.dout.row(batch, head, 0), params.dout.row_stride,
                              memory.query_rows[slot], p.value_dim);
    };

    while (query_stream::claim_tile<COLUMNS>(params, memory)) {
        const KeyTile &tile = memory.tile;
        if (tile.rows == 0)
            continue;
        copy_rows<S, TILE_ROWS>(at.start, p.k.row(tile.batch, tile.kv_head, 0), p.k.row_stride, memory.key_rows,
                                p.head_dim);
        copy_rows<S, TILE_ROWS>(at.start + S::TILE_BYTES, p.v.row(tile.batch, tile.kv_head, 0), p.v.row_stride,
                                memory.key_rows, p.value_dim);
        if (threadIdx.x < COLUMNS)
            put_query<COLUMNS>(memory, 0, find_block<COLUMNS>(params, memory, 0, true));
        // Where the sums of key i of the tile are stored.
        auto sums_row = [&](u32 i) {
            return tile.flags & KEY_TILE_COMPACT ? (u64)tile.first_output + i
                                                 : params.sums_row(tile, memory.key_rows[i]);
        };
        float key_sums[KEYS ? DIM / 8 : 1][4], value_sums[VALUES ? DIM / 8 : 1][4];
        clear(key_sums);
        clear(value_sums);
        if (tile.flags & KEY_TILE_RESUME) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                if (at.row(half) >= tile.rows)
                    continue;
                u64 row = sums_row(at.row(half));
                if (params.key_stored[row] == 0)
                    continue;
                if constexpr (KEYS)
                    load_sums<DIM>(key_sums, half, (float *)params.key_sums_of(tile.flags, row), p.head_dim);
                if constexpr (VALUES)
                    load_sums<DIM>(value_sums, half, (float *)params.value_sums_of(tile.flags, row), p.value_dim);
            }
        }
        __syncthreads();
        if (memory.blocks[0].count)
            copy_block(0);
        commit_copies();

        for (u32 slot = 0; memory.blocks[slot].count; slot ^= 1) {
            if (threadIdx.x < COLUMNS)
                put_query<COLUMNS>(memory, slot ^ 1, find_block<COLUMNS>(params, memory, slot ^ 1, false));
            if constexpr (S::STAGES == 2) {
                __syncthreads();
                if (memory.blocks[slot ^ 1].count)
                    copy_block(slot ^ 1);
                commit_copies();
            }
            wait_for_groups<S::STAGES - 1>();
            __syncthreads();

            const u32 stage = at.stage(slot);
            char *const columns = mma_shared + S::COLUMNS_AT + stage;
            const float log_weight = memory.blocks[slot].segment.log_weight;
            const u32 flags = memory.blocks[slot].flags;
            auto seen = [&](u32 half, u32 j) {
                return sees<COLUMNS>(memory, at.row(half), memory.query_positions[slot][j]);
            };
            auto mask = [&](float (&weights)[COLUMNS / 8][4]) {
#pragma unroll
                for (u32 n = 0; n < COLUMNS / 8; ++n) {
#pragma unroll
                    for (u32 e = 0; e < 4; ++e)
                        weights[n][e] = seen(e / 2, n * 8 + at.lane % 4 * 2 + e % 2) ? weights[n][e] : 0.0f;
                }
            };
            float s[COLUMNS / 8][4], dp[COLUMNS / 8][4];
            multiply<TYPE, DIM>(s, at.rows, at.columns + stage);
            if constexpr (KEYS)
                multiply<TYPE, DIM>(dp, at.rows + S::TILE_BYTES, at.columns + stage + S::BLOCK_BYTES);
#pragma unroll
            for (u32 n = 0; n < COLUMNS / 8; ++n) {
                const float4 terms = *(const float4 *)&memory.terms[slot][n * 8 + at.lane % 4 * 2];
                const float shift[2] = {log_weight - terms.x, log_weight - terms.z};
#pragma unroll
                for (u32 e = 0; e < 4; ++e) {
                    s[n][e] = exp2_approximate(fmaf(s[n][e], p.scale_log2, shift[e % 2]));
                    if constexpr (KEYS)
                        dp[n][e] = s[n][e] * (dp[n][e] - (e % 2 ? terms.w : terms.y));
                }
            }
            if (flags & BLOCK_MASKED) {
                if constexpr (KEYS)
                    mask(dp);
                if constexpr (VALUES)
                    mask(s);
            }
            if (flags & BLOCK_STRADDLES) {
                if constexpr (KEYS)
                    take_out_not_finite<TYPE, DIM>(key_sums, columns, seen);
                if constexpr (VALUES)
                    take_out_not_finite<TYPE, DIM>(value_sums, columns + S::BLOCK_BYTES, seen);
            }
            if constexpr (VALUES)
                accumulate<TYPE, DIM>(value_sums, s, at.transposed + stage + S::BLOCK_BYTES);
            if constexpr (KEYS)
                accumulate<TYPE, DIM>(key_sums, dp, at.transposed + stage);
            // Nobody reads the block any more.
            __syncthreads();
            if constexpr (S::STAGES == 1) {
                if (memory.blocks[slot ^ 1].count)
                    copy_block(slot ^ 1);
                commit_copies();
            }
        }
        // Also where there was no query: late copies of keys must not land in the next tile's.
        wait_for_groups<0>();

#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            if (at.row(half) >= tile.rows)
                continue;
            if (tile.flags & KEY_TILE_STORE) {
                u64 row = sums_row(at.row(half));
                if constexpr (KEYS)
                    write_row<TYPE, DIM>(key_sums, half, params.key_sums_of(tile.flags, row), F32, p.head_dim,
                                         1.0f);
                if constexpr (VALUES)
                    write_row<TYPE, DIM>(value_sums, half, params.value_sums_of(tile.flags, row), F32,
                                         p.value_dim, 1.0f);
                // The last of the kernels that store them tells of it.
                if (VALUES && at.lane % 4 == 0 && !(tile.flags & KEY_TILE_COMPACT))
                    params.key_stored[row] = 1;
                continue;
            }
            u32 row = memory.key_rows[at.row(half)];
            if constexpr (KEYS)
                write_row<TYPE, DIM>(key_sums, half, params.dk.row(tile.batch, tile.kv_head, row), params.dk_type,
                                     p.head_dim, params.scale);
            if constexpr (VALUES)
                write_row<TYPE, DIM>(value_sums, half, params.dv.row(tile.batch, tile.kv_head, row), params.dv_type,
                                     p.value_dim, 1.0f);
        }
    }
}

} // namespace backward_mma
} // namespace hyperattn

#define HYPERATTN_BACKWARD_MMA(NAME, DIM, BLOCKS, BODY)                                                                \
    extern "C" __global__ void __launch_bounds__(hyperattn::backward_mma::Shape<DIM>::THREADS, BLOCKS)                 \
        backward_mma_##NAME##_##DIM(const __grid_constant__ hyperattn::BackwardParams p)                               \
    {                                                                                                                  \
        using namespace hyperattn;                                                                                     \
        using namespace hyperattn::backward_mma;                                                                       \
        BODY(p);                                                                                                       \
    }
#define HYPERATTN_BACKWARD_MMA_QUERIES(NAME, TYPE, DIM, BLOCKS)                                                        \
    HYPERATTN_BACKWARD_MMA(queries_##NAME, DIM, BLOCKS, (of_queries<TYPE, DIM>))
#define HYPERATTN_BACKWARD_MMA_KEYS(NAME, TYPE, DIM)                                                                   \
    HYPERATTN_BACKWARD_MMA(keys_##NAME, DIM, 1, (of_keys<TYPE, DIM, SUM_KEYS_AND_VALUES>))
#define HYPERATTN_BACKWARD_MMA_APART(NAME, TYPE, DIM)                                                                  \
    HYPERATTN_BACKWARD_MMA(keys_##NAME, DIM, 1, (of_keys<TYPE, DIM, SUM_KEYS>))                                        \
    HYPERATTN_BACKWARD_MMA(values_##NAME, DIM, 1, (of_keys<TYPE, DIM, SUM_VALUES>))

HYPERATTN_BACKWARD_MMA_QUERIES(bf16, BF16, 64, 2)
HYPERATTN_BACKWARD_MMA_QUERIES(bf16, BF16, 128, 1)
HYPERATTN_BACKWARD_MMA_QUERIES(bf16, BF16, 256, 1)
HYPERATTN_BACKWARD_MMA_QUERIES(f16, F16, 64, 2)
HYPERATTN_BACKWARD_MMA_QUERIES(f16, F16, 128, 1)
HYPERATTN_BACKWARD_MMA_QUERIES(f16, F16, 256, 1)
HYPERATTN_BACKWARD_MMA_KEYS(bf16, BF16, 64)
HYPERATTN_BACKWARD_MMA_KEYS(bf16, BF16, 128)
HYPERATTN_BACKWARD_MMA_APART(bf16, BF16, 256)
HYPERATTN_BACKWARD_MMA_KEYS(f16, F16, 64)
HYPERATTN_BACKWARD_MMA_KEYS(f16, F16, 128)
HYPERATTN_BACKWARD_MMA_APART(f16, F16, 256)

#undef HYPERATTN_BACKWARD_MMA
#undef HYPERATTN_BACKWARD_MMA_QUERIES
#undef HYPERATTN_BACKWARD_MMA_KEYS
#undef HYPERATTN_BACKWARD_MMA_APART
