// Attention in f32 arithmetic for every element type, dimension and alignment.
//
// Both products are tiled like a matrix product on registers: queries, keys and values pass through shared memory a few
// dimensions or keys at a time, the weights of a block stay there. Each block of keys is summed up from zero and then
// added to the running sum, so that rounding errors grow with the number of blocks, not of keys.
//
// Values that a row must not see. Keys that no row of the tile sees are read as zeros. Where some rows see a key and
// others do not, weights of 0 would still turn a NaN or an infinity of a value into NaN: a piece of such a block that
// holds one is multiplied row by row, for just the rows that see the key.
#pragma once

#include "convert.cuh"
#include "key_stream.cuh"
#include "merge_partials.cuh"
#include "online_softmax.cuh"

namespace hyperattn {
namespace simt {

using namespace key_stream;
using namespace online_softmax;

constexpr u32 THREADS = 256;
// Threads form a square; each has every 16th group of 4 rows and of 4 keys or value columns.
constexpr u32 SIDE = 16;
// Keys of a block.
constexpr u32 KEYS = 128;
constexpr u32 THREAD_KEYS = KEYS / SIDE;
// Dimensions, or keys for the product with values, in shared memory at a time.
constexpr u32 DEPTH = 8;

template <u32 DIM> struct Shape {
    // Of the tile at a time.
    static constexpr u32 ROWS = DIM <= 128 ? TILE_ROWS : TILE_ROWS / 2;
    static constexpr u32 THREAD_ROWS = ROWS / SIDE;
    // Value columns at a time.
    static constexpr u32 COLUMNS = DIM <= 128 ? DIM : 128;
    static constexpr u32 THREAD_COLUMNS = COLUMNS / SIDE;
    static constexpr u32 COLUMN_GROUPS = DIM / COLUMNS;
    // Two stages of queries, two of keys or values, and the weights, each by its groups of 4 floats.
    static constexpr u32 QUERY_FLOATS = DEPTH * ROWS;
    static constexpr u32 KEY_FLOATS = DEPTH * KEYS;
    static constexpr u32 WEIGHT_FLOATS = KEYS * ROWS;
    static constexpr u32 SHARED_BYTES =
        (2 * QUERY_FLOATS + 2 * KEY_FLOATS + WEIGHT_FLOATS) * 4 + (u32)sizeof(TileMemory<KEYS>);
};

// Four consecutive elements as they are in memory; those of 16 bits fill half of it.
struct Raw {
    u32 bits[4];
};

// Whether every row of a tensor begins at a multiple of four elements.
__device__ __forceinline__ bool in_fours(const View &tensor, u32 type)
{
    u64 bits = (u64)tensor.data | (u64)tensor.batch_stride | (u64)tensor.head_stride | (u64)tensor.row_stride;
    return bits % (4 * element_bytes(type)) == 0;
}

__device__ __forceinline__ bool extra_in_fours(const char *extra, u32 dim, u32 type)
{
    return extra == nullptr || (dim % 4 == 0 && (u64)extra % (4 * element_bytes(type)) == 0);
}

// Elements [column, column + 4) of a row, zeros beyond dim and of no row.
__device__ __forceinline__ Raw load_four(const char *row, u32 column, u32 dim, u32 type, bool fours)
{
    Raw raw = {};
    if (row == nullptr || column >= dim)
        return raw;
    if (type == F32) {
        const u32 *from = (const u32 *)row + column;
        if (fours && column + 4 <= dim) {
            uint4 four = *(const uint4 *)from;
            raw.bits[0] = four.x, raw.bits[1] = four.y, raw.bits[2] = four.z, raw.bits[3] = four.w;
        } else {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                if (column + e < dim)
                    raw.bits[e] = from[e];
            }
        }
    } else {
        const u16 *from = (const u16 *)row + column;
        if (fours && column + 4 <= dim) {
            uint2 four = *(const uint2 *)from;
            raw.bits[0] = four.x, raw.bits[1] = four.y;
        } else {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                if (column + e < dim)
                    raw.bits[e / 2] |= (u32)from[e] << (e % 2 * 16);
            }
        }
    }
    return raw;
}

__device__ __forceinline__ void widen(const Raw &raw, u32 type, float (&four)[4])
{
    if (type == F32) {
#pragma unroll
        for (u32 e = 0; e < 4; ++e)
            four[e] = __uint_as_float(raw.bits[e]);
    } else {
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            u16 bits = (u16)(raw.bits[e / 2] >> (e % 2 * 16));
            four[e] = type == BF16 ? f32_from_bf16(bits) : f32_from_f16(bits);
        }
    }
}

__device__ __forceinline__ void store_four(char *row, u32 column, u32 dim, u32 type, bool fours, const float (&four)[4])
{
    if (type == F32) {
        float *to = (float *)row + column;
        if (fours && column + 4 <= dim) {
            *(float4 *)to = make_float4(four[0], four[1], four[2], four[3]);
        } else {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                if (column + e < dim)
                    to[e] = four[e];
            }
        }
    } else {
        u16 *to = (u16 *)row + column;
        u32 low = type == BF16 ? bf16x2_from_f32(four[0], four[1]) : f16x2_from_f32(four[0], four[1]);
        u32 high = type == BF16 ? bf16x2_from_f32(four[2], four[3]) : f16x2_from_f32(four[2], four[3]);
        if (fours && column + 4 <= dim) {
            *(uint2 *)to = make_uint2(low, high);
        } else {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                if (column + e < dim)
                    to[e] = (u16)((e < 2 ? low : high) >> (e % 2 * 16));
            }
        }
    }
}

// Stages [dimension][row]: rows go in groups of 4, and those of the upper dimensions trade places by fours, so that the
// threads that store 16 rows x 2 groups of dimensions meet different banks.
__device__ __forceinline__ u32 staged_group(u32 dimension, u32 group) { return group ^ (dimension / 4 * 4); }

// Weights [key][row]: groups of 4 rows trade places by the group of 4 keys, for the same end.
__device__ __forceinline__ u32 weight_group(u32 key, u32 group) { return group ^ (key / 4 % 8); }

// Stores dimensions [half * 4, half * 4 + 4) of one row.
__device__ __forceinline__ void stage_transposed(float *stage, u32 rows, u32 row, u32 half, const float (&four)[4])
{
#pragma unroll
    for (u32 e = 0; e < 4; ++e)
        stage[(half * 4 + e) * rows + staged_group(half * 4, row / 4) * 4 + row % 4] = four[e];
}

__device__ __forceinline__ bool not_finite(const float (&four)[4])
{
    bool found = false;
#pragma unroll
    for (u32 e = 0; e < 4; ++e)
        found |= (__float_as_uint(four[e]) & 0x7f800000u) == 0x7f800000u;
    return found;
}

// A barrier that tells whether any thread found something, where that matters.
__device__ __forceinline__ bool vote(bool matters, bool found)
{
    if (matters)
        return __syncthreads_or(found);
    __syncthreads();
    return false;
}

template <u32 COUNT> __device__ __forceinline__ void load_group(float (&to)[COUNT], const float *from, u32 group)
{
#pragma unroll
    for (u32 g = 0; g < COUNT / 4; ++g) {
        float4 four = ((const float4 *)from)[group + g * SIDE];
        to[4 * g] = four.x, to[4 * g + 1] = four.y, to[4 * g + 2] = four.z, to[4 * g + 3] = four.w;
    }
}

template <u32 M, u32 N>
__device__ __forceinline__ void outer_product(float (&c)[M][N], const float (&a)[M], const float (&b)[N])
{
#pragma unroll
    for (u32 i = 0; i < M; ++i) {
#pragma unroll
        for (u32 j = 0; j < N; ++j)
            c[i][j] = fmaf(a[i], b[j], c[i][j]);
    }
}

extern __shared__ __align__(16) float simt_shared[];

template <u32 DIM> __device__ __forceinline__ void attend(const AttendParams &p)
{
    using S = Shape<DIM>;
    constexpr u32 ROWS = S::ROWS, THREAD_ROWS = S::THREAD_ROWS;
    constexpr u32 COLUMNS = S::COLUMNS, THREAD_COLUMNS = S::THREAD_COLUMNS;
    constexpr u32 VALUE_GROUPS = COLUMNS / 4;

    float *const query_stages = simt_shared;
    // Of the values, too.
    float *const key_stages = query_stages + 2 * S::QUERY_FLOATS;
    float *const weights = key_stages + 2 * S::KEY_FLOATS;
    TileMemory<KEYS> &memory = *(TileMemory<KEYS> *)(weights + S::WEIGHT_FLOATS);

    const u32 key_thread = threadIdx.x % SIDE;
    const u32 row_thread = threadIdx.x / SIDE;
    // What this thread stages: half of the dimensions of one row, or four columns of one value.
    const u32 staged_row = threadIdx.x / 2, staged_half = threadIdx.x % 2;
    const u32 staged_value = threadIdx.x / VALUE_GROUPS, staged_column = threadIdx.x % VALUE_GROUPS * 4;

    const u32 kv_bytes = element_bytes(p.kv_type);
    const bool query_fours = in_fours(p.q, p.q_type);
    const bool key_fours = in_fours(p.k, p.kv_type) && extra_in_fours(p.extra_keys, p.head_dim, p.kv_type);
    const bool value_fours = in_fours(p.v, p.kv_type) && extra_in_fours(p.extra_values, p.value_dim, p.kv_type);
    const bool out_fours = in_fours(p.out, p.out_type);
    const u32 dim_steps = (p.head_dim + DEPTH - 1) / DEPTH;

    while (claim_tile<KEYS>(p, memory)) {
        for (u32 first_row = 0; first_row < memory.tile.rows; first_row += ROWS) {
            const char *query = nullptr;
            if (staged_row < ROWS && memory.query_rows[first_row + staged_row] != NO_KEY)
                query = p.q.row(memory.tile.batch, memory.tile.head, memory.query_rows[first_row + staged_row]);

            float accumulated[S::COLUMN_GROUPS][THREAD_ROWS][THREAD_COLUMNS];
            float reference[THREAD_ROWS];
            // Of the keys that this thread has.
            float sum[THREAD_ROWS];
            const u64 head_row = (u64)(memory.tile.batch * p.heads_q + memory.tile.head) * p.n_q;
#pragma unroll
            for (u32 i = 0; i < THREAD_ROWS; ++i) {
                reference[i] = negative_infinity();
                sum[i] = 0.0f;
#pragma unroll
                for (u32 group = 0; group < S::COLUMN_GROUPS; ++group) {
#pragma unroll
                    for (u32 c = 0; c < THREAD_COLUMNS; ++c)
                        accumulated[group][i][c] = 0.0f;
                }
            }

            const u32 partials = memory.tile.flags & TILE_MERGE ? memory.tile.first_output : 0;
            for (u32 number = 0; number < partials; ++number) {
                u32 first_output = p.segments[memory.tile.first_segment + memory.tile.segments + number].first;
#pragma unroll
                for (u32 i = 0; i < THREAD_ROWS; ++i) {
                    u32 row = first_row + (row_thread + i / 4 * SIDE) * 4 + i % 4;
                    if (row >= memory.tile.rows)
                        continue;
                    u64 at = p.partial_row(memory.tile.batch, memory.tile.head, first_output, memory.query_rows[row]);
                    PartialWeight of = weigh_partial(p.partial_lse[at], reference[i]);
                    sum[i] = fmaf(sum[i], of.scale, key_thread == 0 ? of.weight : 0.0f);
                    const char *from = p.partial_values + at * p.partial_bytes();
#pragma unroll
                    for (u32 group = 0; group < S::COLUMN_GROUPS; ++group) {
#pragma unroll
                        for (u32 c = 0; c < THREAD_COLUMNS; ++c) {
                            u32 column = group * COLUMNS + (key_thread + c / 4 * SIDE) * 4 + c % 4;
                            float value = column < p.value_dim ? read_element(from, column, p.out_type) : 0.0f;
                            accumulated[group][i][c] = fmaf(of.weight, value, of.scale * accumulated[group][i][c]);
                        }
                    }
                }
            }

            if (threadIdx.x < KEYS)
                put_key<KEYS>(memory, 0, find_block<KEYS>(p, memory, 0, true));
            __syncthreads();
            for (u32 slot = 0; memory.blocks[slot].count; slot ^= 1) {
                if (threadIdx.x < KEYS)
                    put_key<KEYS>(memory, slot ^ 1, find_block<KEYS>(p, memory, slot ^ 1, false));
                const u32 flags = memory.blocks[slot].flags;
                const bool straddles = flags & BLOCK_STRADDLES;

                const char *key = nullptr;
                if (memory.key_rows[slot][staged_row] != NO_KEY) {
                    Source keys = source<KEYS>(memory, slot, p.k, p.extra_keys, p.head_dim * kv_bytes);
                    key = keys.data + memory.key_rows[slot][staged_row] * keys.row_stride;
                }
                float s[THREAD_ROWS][THREAD_KEYS];
#pragma unroll
                for (u32 i = 0; i < THREAD_ROWS; ++i) {
#pragma unroll
                    for (u32 j = 0; j < THREAD_KEYS; ++j)
                        s[i][j] = 0.0f;
                }
                {
                    auto stage = [&](u32 step, const Raw &raw_query, const Raw &raw_key) {
                        float four[4];
                        if (staged_row < ROWS) {
                            widen(raw_query, p.q_type, four);
                            stage_transposed(query_stages + step % 2 * S::QUERY_FLOATS, ROWS, staged_row, staged_half,
                                             four);
                        }
                        widen(raw_key, p.kv_type, four);
                        stage_transposed(key_stages + step % 2 * S::KEY_FLOATS, KEYS, staged_row, staged_half, four);
                    };
                    Raw raw_query = load_four(query, staged_half * 4, p.head_dim, p.q_type, query_fours);
                    Raw raw_key = load_four(key, staged_half * 4, p.head_dim, p.kv_type, key_fours);
                    stage(0, raw_query, raw_key);
                    __syncthreads();
#pragma unroll 1
                    for (u32 step = 0; step < dim_steps; ++step) {
                        const bool more = step + 1 < dim_steps;
                        if (more) {
                            u32 column = (step + 1) * DEPTH + staged_half * 4;
                            raw_query = load_four(query, column, p.head_dim, p.q_type, query_fours);
                            raw_key = load_four(key, column, p.head_dim, p.kv_type, key_fours);
                        }
                        const float *queries = query_stages + step % 2 * S::QUERY_FLOATS;
                        const float *keys = key_stages + step % 2 * S::KEY_FLOATS;
#pragma unroll
                        for (u32 d = 0; d < DEPTH; ++d) {
                            float a[THREAD_ROWS], b[THREAD_KEYS];
                            load_group(a, queries + d * ROWS, staged_group(d, row_thread));
                            load_group(b, keys + d * KEYS, staged_group(d, key_thread));
                            outer_product(s, a, b);
                        }
                        if (more)
                            stage(step + 1, raw_query, raw_key);
                        __syncthreads();
                    }
                }

                const Source from = source<KEYS>(memory, slot, p.v, p.extra_values, p.value_dim * kv_bytes);
                const u32 value_steps = (memory.blocks[slot].count + DEPTH - 1) / DEPTH;
                auto load_value = [&](u32 group, u32 step) {
                    u32 row = staged_value < DEPTH ? memory.key_rows[slot][step * DEPTH + staged_value] : NO_KEY;
                    return load_four(row == NO_KEY ? nullptr : from.data + row * from.row_stride,
                                     group * COLUMNS + staged_column, p.value_dim, p.kv_type, value_fours);
                };
                // Tells whether one of them is not finite.
                auto stage_value = [&](u32 step, const Raw &raw) {
                    float four[4];
                    widen(raw, p.kv_type, four);
                    if (staged_value < DEPTH) {
                        float *to = key_stages + step % 2 * S::KEY_FLOATS + staged_value * COLUMNS + staged_column;
                        *(float4 *)to = make_float4(four[0], four[1], four[2], four[3]);
                    }
                    return not_finite(four);
                };
                // On its way while the weights are computed.
                Raw raw_value = load_value(0, 0);

                // Logits are s * factor + offset.
                float factor = p.scale_log2;
                float offset = memory.blocks[slot].segment.log_weight;
                // The largest product has the largest logit only where the factor is not negative.
                if ((flags & BLOCK_MASKED) || !(factor >= 0.0f)) {
                    u32 position[THREAD_KEYS];
#pragma unroll
                    for (u32 j = 0; j < THREAD_KEYS; ++j)
                        position[j] = memory.key_positions[slot][(key_thread + j / 4 * SIDE) * 4 + j % 4];
#pragma unroll
                    for (u32 i = 0; i < THREAD_ROWS; ++i) {
                        u32 row = first_row + (row_thread + i / 4 * SIDE) * 4 + i % 4;
                        u32 limit = straddles ? memory.limits[row] : NO_KEY;
#pragma unroll
                        for (u32 j = 0; j < THREAD_KEYS; ++j) {
                            float logit = fmaf(s[i][j], factor, offset);
                            s[i][j] = position[j] < limit ? logit : negative_infinity();
                        }
                    }
                    factor = 1.0f;
                    offset = 0.0f;
                }
                float largest[THREAD_ROWS];
                bool large = false;
#pragma unroll
                for (u32 i = 0; i < THREAD_ROWS; ++i) {
                    float most = negative_infinity();
#pragma unroll
                    for (u32 j = 0; j < THREAD_KEYS; ++j)
                        most = fmaxf(most, s[i][j]);
#pragma unroll
                    for (u32 distance = 1; distance < SIDE; distance *= 2)
                        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
                    largest[i] = fmaf(most, factor, offset);
                    large |= fabsf(largest[i]) > LARGE_LOGIT;
                }
                if (__any_sync(0xffffffffu, large)) {
#pragma unroll
                    for (u32 i = 0; i < THREAD_ROWS; ++i) {
#pragma unroll
                        for (u32 j = 0; j < THREAD_KEYS; ++j)
                            s[i][j] = fmaf(s[i][j], factor, offset);
                    }
                    factor = 1.0f;
                    offset = 0.0f;
                }
#pragma unroll
                for (u32 i = 0; i < THREAD_ROWS; ++i) {
                    if (largest[i] - reference[i] > RAISE) {
                        float shrink = exp2_approximate(reference[i] - largest[i]);
                        reference[i] = largest[i];
                        sum[i] *= shrink;
#pragma unroll
                        for (u32 group = 0; group < S::COLUMN_GROUPS; ++group) {
#pragma unroll
                            for (u32 c = 0; c < THREAD_COLUMNS; ++c)
                                accumulated[group][i][c] *= shrink;
                        }
                    }
                    float shift = offset - subtrahend(reference[i]);
                    float block_sum = 0.0f;
#pragma unroll
                    for (u32 j = 0; j < THREAD_KEYS; ++j) {
                        s[i][j] = exp2_approximate(fmaf(s[i][j], factor, shift));
                        block_sum += s[i][j];
                    }
                    sum[i] += block_sum;
                }
#pragma unroll
                for (u32 j = 0; j < THREAD_KEYS; ++j) {
                    u32 number = (key_thread + j / 4 * SIDE) * 4 + j % 4;
#pragma unroll
                    for (u32 g = 0; g < THREAD_ROWS / 4; ++g)
                        ((float4 *)(weights + number * ROWS))[weight_group(number, row_thread) + g * SIDE] =
                            make_float4(s[4 * g][j], s[4 * g + 1][j], s[4 * g + 2][j], s[4 * g + 3][j]);
                }

#pragma unroll
                for (u32 group = 0; group < S::COLUMN_GROUPS; ++group) {
                    float block[THREAD_ROWS][THREAD_COLUMNS];
#pragma unroll
                    for (u32 i = 0; i < THREAD_ROWS; ++i) {
#pragma unroll
                        for (u32 c = 0; c < THREAD_COLUMNS; ++c)
                            block[i][c] = 0.0f;
                    }
                    if (group > 0)
                        raw_value = load_value(group, 0);
                    bool poisoned = vote(straddles, stage_value(0, raw_value));
#pragma unroll 1
                    for (u32 step = 0; step < value_steps; ++step) {
                        const bool more = step + 1 < value_steps;
                        if (more)
                            raw_value = load_value(group, step + 1);
                        const float *values = key_stages + step % 2 * S::KEY_FLOATS;
                        const float *step_weights = weights + step * DEPTH * ROWS;
                        if (!poisoned) {
#pragma unroll
                            for (u32 j = 0; j < DEPTH; ++j) {
                                float a[THREAD_ROWS], b[THREAD_COLUMNS];
                                load_group(a, step_weights + j * ROWS, weight_group(step * DEPTH + j, row_thread));
                                load_group(b, values + j * COLUMNS, key_thread);
                                outer_product(block, a, b);
                            }
                        } else {
#pragma unroll 1
                            for (u32 j = 0; j < DEPTH; ++j) {
                                float a[THREAD_ROWS], b[THREAD_COLUMNS];
                                load_group(a, step_weights + j * ROWS, weight_group(step * DEPTH + j, row_thread));
                                load_group(b, values + j * COLUMNS, key_thread);
                                u32 position = memory.key_positions[slot][step * DEPTH + j];
#pragma unroll
                                for (u32 i = 0; i < THREAD_ROWS; ++i) {
                                    u32 row = first_row + (row_thread + i / 4 * SIDE) * 4 + i % 4;
                                    if (position < memory.limits[row]) {
#pragma unroll
                                        for (u32 c = 0; c < THREAD_COLUMNS; ++c)
                                            block[i][c] = fmaf(a[i], b[c], block[i][c]);
                                    }
                                }
                            }
                        }
                        bool found = false;
                        if (more)
                            found = stage_value(step + 1, raw_value);
                        poisoned = vote(straddles, found);
                    }
#pragma unroll
                    for (u32 i = 0; i < THREAD_ROWS; ++i) {
#pragma unroll
                        for (u32 c = 0; c < THREAD_COLUMNS; ++c)
                            accumulated[group][i][c] += block[i][c];
                    }
                }
            }

            const OutputRows out = p.outputs(memory.tile.batch, memory.tile.head, memory.tile.flags);
#pragma unroll
            for (u32 i = 0; i < THREAD_ROWS; ++i) {
                u32 row = first_row + (row_thread + i / 4 * SIDE) * 4 + i % 4;
                float total = sum[i];
#pragma unroll
                for (u32 distance = 1; distance < SIDE; distance *= 2)
                    total += __shfl_xor_sync(0xffffffffu, total, distance);
                if (row >= memory.tile.rows)
                    continue;
                const u32 query_row = memory.query_rows[row];
                const u32 output_row = p.output_row(memory.tile, row, query_row);
                char *to = out.values + output_row * out.value_stride;
                u32 type = p.out_type;
                bool fours = memory.tile.flags & TILE_PARTIAL ? p.value_dim % 4 == 0 : out_fours;
                const bool store = memory.tile.flags & TILE_STORE;
                float inverse = total == 0.0f ? 0.0f : 1.0f / total;
                if (store) {
                    const u64 state = head_row + output_row;
                    to = (char *)(p.state_accumulated + state * p.value_dim);
                    type = F32;
                    fours = p.value_dim % 4 == 0 && (u64)p.state_accumulated % 16 == 0;
                    inverse = 1.0f;
                    if (key_thread == 0) {
                        p.state_max[state] = reference[i];
                        p.state_sum[state] = total;
                    }
                } else if (out.lse && key_thread == 0) {
                    *(float *)(out.lse + output_row * out.lse_stride) = log_sum(reference[i], total);
                }
#pragma unroll
                for (u32 group = 0; group < S::COLUMN_GROUPS; ++group) {
#pragma unroll
                    for (u32 c = 0; c < THREAD_COLUMNS; c += 4) {
                        u32 column = group * COLUMNS + (key_thread + c / 4 * SIDE) * 4;
                        float four[4];
#pragma unroll
                        for (u32 e = 0; e < 4; ++e)
                            // A row without weight has no value, whatever it met.
                            four[e] = inverse == 0.0f ? 0.0f : accumulated[group][i][c + e] * inverse;
                        store_four(to, column, p.value_dim, type, fours, four);
                    }
                }
            }
            // The next rows walk the keys again.
            __syncthreads();
        }
    }
}

} // namespace simt
} // namespace hyperattn

#define HYPERATTN_ATTEND_ANY(NAME, DIM)                                                                                \
    extern "C" __global__ void __launch_bounds__(hyperattn::simt::THREADS, 1)                                          \
        NAME(const __grid_constant__ hyperattn::AttendParams p)                                                        \
    {                                                                                                                  \
        hyperattn::simt::attend<DIM>(p);                                                                               \
    }

HYPERATTN_ATTEND_ANY(attend_any_64, 64)
HYPERATTN_ATTEND_ANY(attend_any_128, 128)
HYPERATTN_ATTEND_ANY(attend_any_256, 256)

#undef HYPERATTN_ATTEND_ANY
