// Gradients in f32 arithmetic for every element type, dimension and alignment.
//
// A thread block keeps some rows of a tile, each with two vectors, and meets blocks of columns that have two vectors
// too:
//     rows of queries (q, dout) and columns of keys (k, v), for dq;
//     rows of keys (k, v) and columns of queries (q, dout), for dk and dv.
// Sums over a block are made from zero and then added, so that rounding errors grow with the number of blocks.
//
// What a row must not see. Shares of masked pairs are 0, and in a block with pairs of both kinds the vectors of a
// column are only added to the rows that the column is for: 0 times a NaN would not be 0.
#pragma once

#include "attend_any.cuh"
#include "query_stream.cuh"

namespace hyperattn {
namespace backward_simt {

using namespace online_softmax;
using simt::Raw;
constexpr u32 THREADS = 256;
constexpr u32 SIDE = 16;
constexpr u32 NO_KEY = key_stream::NO_KEY;

template <u32 DIM> struct Shape {
    // Of the tile at a time.
    static constexpr u32 ROWS = 4096 / DIM;
    // Of a block.
    static constexpr u32 COLUMNS = DIM <= 128 ? 32 : 16;
    static constexpr u32 THREAD_ROWS = ROWS / SIDE;
    static constexpr u32 THREAD_COLUMNS = COLUMNS / SIDE;
    // Floats from one vector to the next: eight of them are in different banks.
    static constexpr u32 PITCH = DIM + 4;
    static constexpr u32 WEIGHT_PITCH = ROWS + 4;
    static constexpr u32 ROW_FLOATS = ROWS * PITCH;
    static constexpr u32 COLUMN_FLOATS = COLUMNS * PITCH;
    static constexpr u32 WEIGHT_FLOATS = COLUMNS * WEIGHT_PITCH;
    static constexpr u32 FLOATS = 2 * (ROW_FLOATS + COLUMN_FLOATS + WEIGHT_FLOATS);
    static constexpr u32 OF_QUERIES_BYTES = sizeof(key_stream::TileMemory<COLUMNS>);
    static constexpr u32 OF_KEYS_BYTES = sizeof(query_stream::TileMemory<COLUMNS>);
    static constexpr u32 MEMORY_BYTES = OF_QUERIES_BYTES > OF_KEYS_BYTES ? OF_QUERIES_BYTES : OF_KEYS_BYTES;
    static constexpr u32 SHARED_BYTES = FLOATS * 4 + MEMORY_BYTES;
    static_assert(FLOATS % 4 == 0, "aligned memory");
};

// Vectors of a tensor, of one batch item and head.
struct Vectors {
    const char *data;
    i64 row_stride;
    u32 dim;
    u32 type;
    bool fours;
};

__device__ __forceinline__ Vectors vectors(const View &tensor, u32 batch, u32 head, u32 dim, u32 type)
{
    return {tensor.row(batch, head, 0), tensor.row_stride, dim, type, simt::in_fours(tensor, type)};
}

// Copies listed rows, zeros for NO_KEY and beyond the dimension.
template <u32 DIM, u32 COUNT>
__device__ __forceinline__ void copy_rows(float *to, const Vectors &from, const u32 *rows)
{
    constexpr u32 FOURS = DIM / 4;
    for (u32 item = threadIdx.x; item < COUNT * FOURS; item += THREADS) {
        u32 row = rows[item / FOURS], column = item % FOURS * 4;
        const char *data = row == NO_KEY ? nullptr : from.data + row * from.row_stride;
        float four[4];
        simt::widen(simt::load_four(data, column, from.dim, from.type, from.fours), from.type, four);
        *(float4 *)(to + item / FOURS * Shape<DIM>::PITCH + column) = make_float4(four[0], four[1], four[2], four[3]);
    }
}

// Products of rows and columns: those of this thread are rows thread_row + 16 i and columns thread_column + 16 j.
template <u32 DIM>
__device__ __forceinline__ void multiply(float (&products)[Shape<DIM>::THREAD_ROWS][Shape<DIM>::THREAD_COLUMNS],
                                         const float *rows, const float *columns)
{
    using S = Shape<DIM>;
#pragma unroll
    for (u32 i = 0; i < S::THREAD_ROWS; ++i) {
#pragma unroll
        for (u32 j = 0; j < S::THREAD_COLUMNS; ++j)
            products[i][j] = 0.0f;
    }
#pragma unroll 4
    for (u32 d = 0; d < DIM; d += 4) {
        float4 a[S::THREAD_ROWS], b[S::THREAD_COLUMNS];
#pragma unroll
        for (u32 i = 0; i < S::THREAD_ROWS; ++i)
            a[i] = *(const float4 *)(rows + i * SIDE * S::PITCH + d);
#pragma unroll
        for (u32 j = 0; j < S::THREAD_COLUMNS; ++j)
            b[j] = *(const float4 *)(columns + j * SIDE * S::PITCH + d);
#pragma unroll
        for (u32 i = 0; i < S::THREAD_ROWS; ++i) {
#pragma unroll
            for (u32 j = 0; j < S::THREAD_COLUMNS; ++j) {
                float sum = fmaf(a[i].x, b[j].x, products[i][j]);
                sum = fmaf(a[i].y, b[j].y, sum);
                sum = fmaf(a[i].z, b[j].z, sum);
                products[i][j] = fmaf(a[i].w, b[j].w, sum);
            }
        }
    }
}

// Adds the block's columns with their weights to four rows' four elements. `seen` says of a straddling block's pairs
// whether they count.
template <u32 DIM, typename Seen>
__device__ __forceinline__ void accumulate(float (&sums)[4][4], const float *weights, const float *columns, u32 count,
                                           bool straddles, Seen seen)
{
    using S = Shape<DIM>;
    const u32 first_row = threadIdx.x / (DIM / 4) * 4, first_column = threadIdx.x % (DIM / 4) * 4;
    float block[4][4] = {};
    for (u32 j = 0; j < count; ++j) {
        float4 w = *(const float4 *)(weights + j * S::WEIGHT_PITCH + first_row);
        float4 x = *(const float4 *)(columns + j * S::PITCH + first_column);
        const float a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if (straddles && !seen(first_row + i, j))
                continue;
            block[i][0] = fmaf(a[i], x.x, block[i][0]);
            block[i][1] = fmaf(a[i], x.y, block[i][1]);
            block[i][2] = fmaf(a[i], x.z, block[i][2]);
            block[i][3] = fmaf(a[i], x.w, block[i][3]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
#pragma unroll
        for (u32 e = 0; e < 4; ++e)
            sums[i][e] += block[i][e];
    }
}

// The four elements of a row that a thread has, from its stored sums or to them, or to the gradient.
__device__ __forceinline__ void load_sums(float (&four)[4], const float *sums, u32 column, u32 dim)
{
    Raw raw = simt::load_four((const char *)sums, column, dim, F32, dim % 4 == 0);
    simt::widen(raw, F32, four);
}

__device__ __forceinline__ void write_gradient(char *row, const View &tensor, u32 type, u32 column, u32 dim,
                                               const float (&four)[4], float factor)
{
    float scaled[4];
#pragma unroll
    for (u32 e = 0; e < 4; ++e)
        scaled[e] = four[e] * factor;
    if (column < dim)
        simt::store_four(row, column, dim, type, simt::in_fours(tensor, type), scaled);
}

__device__ __forceinline__ void write_sums(float *sums, u32 column, u32 dim, const float (&four)[4])
{
    if (column < dim)
        simt::store_four((char *)sums, column, dim, F32, dim % 4 == 0, four);
}

extern __shared__ __align__(16) float backward_simt_shared[];

template <u32 DIM> struct Memory {
    using S = Shape<DIM>;
    float *first_rows = backward_simt_shared;
    float *second_rows = first_rows + S::ROW_FLOATS;
    float *first_columns = second_rows + S::ROW_FLOATS;
    float *second_columns = first_columns + S::COLUMN_FLOATS;
    // ds, and p.
    float *slopes = second_columns + S::COLUMN_FLOATS;
    float *shares = slopes + S::WEIGHT_FLOATS;
    char *tile = (char *)(shares + S::WEIGHT_FLOATS);
    u32 thread_row = threadIdx.x / SIDE;
    u32 thread_column = threadIdx.x % SIDE;

    __device__ __forceinline__ void put(u32 row, u32 column, float slope, float share) const
    {
        slopes[column * S::WEIGHT_PITCH + row] = slope;
        shares[column * S::WEIGHT_PITCH + row] = share;
    }
};

// dq of the tiles of queries.
template <u32 DIM> __device__ __forceinline__ void of_queries(const BackwardParams &params)
{
    using S = Shape<DIM>;
    using namespace key_stream;
    constexpr u32 COLUMNS = S::COLUMNS;
    const AttendParams &p = params.attend;
    Memory<DIM> shared;
    key_stream::TileMemory<COLUMNS> &memory = *(key_stream::TileMemory<COLUMNS> *)shared.tile;
    const u32 own_row = threadIdx.x / (DIM / 4) * 4, own_column = threadIdx.x % (DIM / 4) * 4;
    const u32 kv_bytes = element_bytes(p.kv_type);
    const bool key_fours = simt::in_fours(p.k, p.kv_type) && simt::extra_in_fours(p.extra_keys, p.head_dim, p.kv_type);
    const bool value_fours =
        simt::in_fours(p.v, p.kv_type) && simt::extra_in_fours(p.extra_values, p.value_dim, p.kv_type);

    while (key_stream::claim_tile<COLUMNS>(p, memory)) {
        const Tile &tile = memory.tile;
        const u64 head_row = (u64)(tile.batch * p.heads_q + tile.head) * p.n_q;
        for (u32 first_row = 0; first_row < tile.rows; first_row += S::ROWS) {
            copy_rows<DIM, S::ROWS>(shared.first_rows, vectors(p.q, tile.batch, tile.head, p.head_dim, p.q_type),
                                    memory.query_rows + first_row);
            copy_rows<DIM, S::ROWS>(shared.second_rows,
                                    vectors(params.dout, tile.batch, tile.head, p.value_dim, params.dout_type),
                                    memory.query_rows + first_row);
            RowTerms terms[S::THREAD_ROWS];
#pragma unroll
            for (u32 i = 0; i < S::THREAD_ROWS; ++i) {
                u32 row = memory.query_rows[first_row + shared.thread_row + i * SIDE];
                terms[i] = {-negative_infinity(), 0.0f};
                if (row != NO_KEY)
                    terms[i] = params.row_terms[head_row + row];
            }
            float sums[4][4] = {};
            if (tile.flags & TILE_RESUME) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    u32 row = memory.query_rows[first_row + own_row + i];
                    if (row != NO_KEY)
                        load_sums(sums[i], p.state_accumulated + (head_row + row) * p.head_dim, own_column, p.head_dim);
                }
            }
            if (threadIdx.x < COLUMNS)
                put_key<COLUMNS>(memory, 0, find_block<COLUMNS>(p, memory, 0, true));
            __syncthreads();
            for (u32 slot = 0; memory.blocks[slot].count; slot ^= 1) {
                Source keys = source<COLUMNS>(memory, slot, p.k, p.extra_keys, p.head_dim * kv_bytes);
                Source values = source<COLUMNS>(memory, slot, p.v, p.extra_values, p.value_dim * kv_bytes);
                copy_rows<DIM, COLUMNS>(shared.first_columns,
                                        {keys.data, keys.row_stride, p.head_dim, p.kv_type, key_fours},
                                        memory.key_rows[slot]);
                copy_rows<DIM, COLUMNS>(shared.second_columns,
                                        {values.data, values.row_stride, p.value_dim, p.kv_type, value_fours},
                                        memory.key_rows[slot]);
                if (threadIdx.x < COLUMNS)
                    put_key<COLUMNS>(memory, slot ^ 1, find_block<COLUMNS>(p, memory, slot ^ 1, false));
                __syncthreads();

                const bool straddles = memory.blocks[slot].flags & BLOCK_STRADDLES;
                auto seen = [&](u32 row, u32 column) {
                    u32 limit = straddles ? memory.limits[first_row + row] : NO_KEY;
                    return memory.key_positions[slot][column] < limit;
                };
                const float offset = memory.blocks[slot].segment.log_weight;
                float s[S::THREAD_ROWS][S::THREAD_COLUMNS], dp[S::THREAD_ROWS][S::THREAD_COLUMNS];
                multiply<DIM>(s, shared.first_rows + shared.thread_row * S::PITCH,
                              shared.first_columns + shared.thread_column * S::PITCH);
                multiply<DIM>(dp, shared.second_rows + shared.thread_row * S::PITCH,
                              shared.second_columns + shared.thread_column * S::PITCH);
#pragma unroll
                for (u32 i = 0; i < S::THREAD_ROWS; ++i) {
#pragma unroll
                    for (u32 j = 0; j < S::THREAD_COLUMNS; ++j) {
                        u32 row = shared.thread_row + i * SIDE, column = shared.thread_column + j * SIDE;
                        bool counts = seen(row, column);
                        float share = exp2_approximate(fmaf(s[i][j], p.scale_log2, offset - terms[i].lse));
                        float slope = share * (dp[i][j] - terms[i].delta);
                        shared.put(row, column, counts ? slope : 0.0f, counts ? share : 0.0f);
                    }
                }
                __syncthreads();
                accumulate<DIM>(sums, shared.slopes, shared.first_columns, memory.blocks[slot].count, straddles, seen);
                __syncthreads();
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                u32 row = memory.query_rows[first_row + own_row + i];
                if (row == NO_KEY)
                    continue;
                if (tile.flags & TILE_STORE)
                    write_sums(p.state_accumulated + (head_row + row) * p.head_dim, own_column, p.head_dim, sums[i]);
                else
                    write_gradient(p.out.row(tile.batch, tile.head, row), p.out, p.out_type, own_column, p.head_dim,
                                   sums[i], params.scale);
            }
            // The next rows walk the keys again.
            __syncthreads();
        }
    }
}

// dk and dv of the tiles of keys.
template <u32 DIM> __device__ __forceinline__ void of_keys(const BackwardParams &params)
{
    using S = Shape<DIM>;
    using namespace query_stream;
    constexpr u32 COLUMNS = S::COLUMNS;
    const AttendParams &p = params.attend;
    Memory<DIM> shared;
    query_stream::TileMemory<COLUMNS> &memory = *(query_stream::TileMemory<COLUMNS> *)shared.tile;
    const u32 own_row = threadIdx.x / (DIM / 4) * 4, own_column = threadIdx.x % (DIM / 4) * 4;

    while (query_stream::claim_tile<COLUMNS>(params, memory)) {
        const KeyTile &tile = memory.tile;
        // Where the sums of key i of the tile are stored.
        auto sums_row = [&](u32 i) {
            return tile.flags & KEY_TILE_COMPACT ? (u64)tile.first_output + i
                                                 : params.sums_row(tile, memory.key_rows[i]);
        };
        for (u32 first_row = 0; first_row < tile.rows; first_row += S::ROWS) {
            copy_rows<DIM, S::ROWS>(shared.first_rows, vectors(p.k, tile.batch, tile.kv_head, p.head_dim, p.kv_type),
                                    memory.key_rows + first_row);
            copy_rows<DIM, S::ROWS>(shared.second_rows, vectors(p.v, tile.batch, tile.kv_head, p.value_dim, p.kv_type),
                                    memory.key_rows + first_row);
            float key_sums[4][4] = {}, value_sums[4][4] = {};
            if (tile.flags & KEY_TILE_RESUME) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    if (first_row + own_row + i >= tile.rows)
                        continue;
                    u64 row = sums_row(first_row + own_row + i);
                    if (params.key_stored[row] == 0)
                        continue;
                    load_sums(key_sums[i], (float *)params.key_sums_of(tile.flags, row), own_column, p.head_dim);
                    load_sums(value_sums[i], (float *)params.value_sums_of(tile.flags, row), own_column, p.value_dim);
                }
            }
            if (threadIdx.x < COLUMNS)
                put_query<COLUMNS>(memory, 0, find_block<COLUMNS>(params, memory, 0, true));
            __syncthreads();
            for (u32 slot = 0; memory.blocks[slot].count; slot ^= 1) {
                u32 head = query_head(params, memory.tile, memory.blocks[slot]);
                copy_rows<DIM, COLUMNS>(shared.first_columns, vectors(p.q, tile.batch, head, p.head_dim, p.q_type),
                                        memory.query_rows[slot]);
                copy_rows<DIM, COLUMNS>(shared.second_columns,
                                        vectors(params.dout, tile.batch, head, p.value_dim, params.dout_type),
                                        memory.query_rows[slot]);
                if (threadIdx.x < COLUMNS)
                    put_query<COLUMNS>(memory, slot ^ 1, find_block<COLUMNS>(params, memory, slot ^ 1, false));
                __syncthreads();

                const bool straddles = memory.blocks[slot].flags & BLOCK_STRADDLES;
                auto seen = [&](u32 row, u32 column) {
                    return sees<COLUMNS>(memory, first_row + row, memory.query_positions[slot][column]);
                };
                const float offset = memory.blocks[slot].segment.log_weight;
                float s[S::THREAD_ROWS][S::THREAD_COLUMNS], dp[S::THREAD_ROWS][S::THREAD_COLUMNS];
                multiply<DIM>(s, shared.first_rows + shared.thread_row * S::PITCH,
                              shared.first_columns + shared.thread_column * S::PITCH);
                multiply<DIM>(dp, shared.second_rows + shared.thread_row * S::PITCH,
                              shared.second_columns + shared.thread_column * S::PITCH);
#pragma unroll
                for (u32 j = 0; j < S::THREAD_COLUMNS; ++j) {
                    u32 column = shared.thread_column + j * SIDE;
                    RowTerms terms = memory.terms[slot][column];
#pragma unroll
                    for (u32 i = 0; i < S::THREAD_ROWS; ++i) {
                        u32 row = shared.thread_row + i * SIDE;
                        bool counts = seen(row, column);
                        float share = exp2_approximate(fmaf(s[i][j], p.scale_log2, offset - terms.lse));
                        float slope = share * (dp[i][j] - terms.delta);
                        shared.put(row, column, counts ? slope : 0.0f, counts ? share : 0.0f);
                    }
                }
                __syncthreads();
                u32 count = memory.blocks[slot].count;
                accumulate<DIM>(key_sums, shared.slopes, shared.first_columns, count, straddles, seen);
                accumulate<DIM>(value_sums, shared.shares, shared.second_columns, count, straddles, seen);
                __syncthreads();
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                if (first_row + own_row + i >= tile.rows)
                    continue;
                if (tile.flags & KEY_TILE_STORE) {
                    u64 row = sums_row(first_row + own_row + i);
                    write_sums((float *)params.key_sums_of(tile.flags, row), own_column, p.head_dim, key_sums[i]);
                    write_sums((float *)params.value_sums_of(tile.flags, row), own_column, p.value_dim, value_sums[i]);
                    if (own_column == 0 && !(tile.flags & KEY_TILE_COMPACT))
                        params.key_stored[row] = 1;
                    continue;
                }
                u32 row = memory.key_rows[first_row + own_row + i];
                write_gradient(params.dk.row(tile.batch, tile.kv_head, row), params.dk, params.dk_type, own_column,
                               p.head_dim, key_sums[i], params.scale);
                write_gradient(params.dv.row(tile.batch, tile.kv_head, row), params.dv, params.dv_type, own_column,
                               p.value_dim, value_sums[i], 1.0f);
            }
            // The next rows walk the queries again.
            __syncthreads();
        }
    }
}

} // namespace backward_simt
} // namespace hyperattn

#define HYPERATTN_BACKWARD_ANY(DIM)                                                                                    \
    extern "C" __global__ void __launch_bounds__(hyperattn::backward_simt::THREADS)                                    \
        backward_any_queries_##DIM(const __grid_constant__ hyperattn::BackwardParams p)                                \
    {                                                                                                                  \
        hyperattn::backward_simt::of_queries<DIM>(p);                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(hyperattn::backward_simt::THREADS)                                    \
        backward_any_keys_##DIM(const __grid_constant__ hyperattn::BackwardParams p)                                   \
    {                                                                                                                  \
        hyperattn::backward_simt::of_keys<DIM>(p);                                                                     \
    }

HYPERATTN_BACKWARD_ANY(64)
HYPERATTN_BACKWARD_ANY(128)
HYPERATTN_BACKWARD_ANY(256)

#undef HYPERATTN_BACKWARD_ANY
