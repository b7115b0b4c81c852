// Attention on mma.sync for 16-bit queries, keys and values; sm_80 and everything after it.
//
// A warp owns 16 or 32 rows of the tile and all keys of a block. Keys and values have one buffer each: while a block's
// logits are computed its values are copied, and while the values are summed up the next block's keys are.
//
// Values that a row must not see. Keys that no row of the tile sees are copied as zeros. In a block whose keys some
// rows see and others do not, weights of 0 would still turn a NaN or an infinity of a value into NaN: the block's
// values are looked through, and if one is not finite, it is added to just the rows that see its key and set to zero
// for the product.
#pragma once

#include "convert.cuh"
#include "key_stream.cuh"
#include "load_matrices.cuh"
#include "merge_partials.cuh"
#include "online_softmax.cuh"

namespace hyperattn {
namespace mma {

using namespace key_stream;
using namespace online_softmax;

template <u32 DIM> struct Shape {
    static constexpr u32 WARP_ROWS = DIM <= 128 ? 32 : 16;
    static constexpr u32 WARPS = TILE_ROWS / WARP_ROWS;
    static constexpr u32 THREADS = WARPS * 32;
    // Of a block.
    static constexpr u32 KEYS = DIM <= 192 ? 64 : 32;
    static constexpr u32 BLOCKS_PER_MULTIPROCESSOR = DIM <= 128 ? 2 : 1;
    static constexpr bool QUERIES_IN_REGISTERS = DIM == 64;
    static constexpr u32 ROW_BYTES = DIM * 2;
    // Pieces of 16 bytes of a row, and how many of them trade places.
    static constexpr u32 CHUNKS = DIM / 8;
    static constexpr u32 SWIZZLED = DIM % 64 == 0 ? 8 : 4;
    static constexpr u32 QUERY_BYTES = TILE_ROWS * ROW_BYTES;
    static constexpr u32 BLOCK_BYTES = KEYS * ROW_BYTES;
    static constexpr u32 SHARED_BYTES = QUERY_BYTES + 2 * BLOCK_BYTES + (u32)sizeof(TileMemory<KEYS>);

    // Eight rows' chunks of one number lie in different banks.
    static __device__ __forceinline__ u32 pattern(u32 row) { return SWIZZLED == 8 ? row & 7 : (row >> 1) & 3; }

    static __device__ __forceinline__ u32 chunk_offset(u32 row, u32 chunk)
    {
        return row * ROW_BYTES + ((chunk ^ pattern(row)) << 4);
    }

    // Moves a swizzled address by `pairs` pairs of chunks along its row.
    static __device__ __forceinline__ u32 along(u32 address, u32 pairs)
    {
        constexpr u32 group = SWIZZLED / 2;
        return (address ^ ((pairs % group) << 5)) + (pairs / group) * (SWIZZLED * 16);
    }
};

__device__ __forceinline__ void copy_chunk(u32 shared, const char *global, bool valid)
{
    u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <u32 TYPE>
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b_low, u32 b_high)
{
    if constexpr (TYPE == BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Copies rows into swizzled shared memory; zeros for NO_KEY and beyond the dimension. The threads of a row take its
// chunks that keep their order under the swizzle, so that all of a thread's addresses differ by constants.
template <typename S, u32 ROWS>
__device__ __forceinline__ void copy_rows(u32 shared, const char *data, i64 row_stride, const u32 *rows, u32 dim)
{
    constexpr u32 round_rows = S::THREADS / S::SWIZZLED;
    static_assert(ROWS % round_rows == 0 && round_rows % 8 == 0, "whole rounds, one pattern per thread");
    const u32 first_row = threadIdx.x / S::SWIZZLED, first_chunk = threadIdx.x % S::SWIZZLED;
    const u32 to = shared + S::chunk_offset(first_row, first_chunk);
#pragma unroll
    for (u32 round = 0; round < ROWS / round_rows; ++round) {
        u32 row = rows[round * round_rows + first_row];
        const char *from = data + (row == NO_KEY ? 0 : row * row_stride) + first_chunk * 16;
#pragma unroll
        for (u32 c = 0; c < S::CHUNKS / S::SWIZZLED; ++c) {
            bool valid = row != NO_KEY && (c * S::SWIZZLED + first_chunk) * 8 < dim;
            u32 along_row = c * S::SWIZZLED * 16;
            copy_chunk(to + round * round_rows * S::ROW_BYTES + along_row, from + along_row, valid);
        }
    }
}

template <u32 TYPE> __device__ __forceinline__ bool not_finite(u32 bits)
{
    constexpr u32 exponent = TYPE == BF16 ? 0x7f80 : 0x7c00;
    return (bits & exponent) == exponent;
}

// The two elements of a word, 0 for those that are not finite.
template <u32 TYPE> __device__ __forceinline__ u32 finite_part(u32 pair)
{
    u32 low = not_finite<TYPE>(pair) ? 0 : pair & 0xffff;
    u32 high = not_finite<TYPE>(pair >> 16) ? 0 : pair & 0xffff0000u;
    return low | high;
}

template <u32 TYPE, typename S> __device__ __forceinline__ bool holds_not_finite(const char *values)
{
    bool found = false;
    for (u32 word = threadIdx.x; word < S::BLOCK_BYTES / 4; word += S::THREADS) {
        u32 pair = *(const u32 *)(values + word * 4);
        found |= not_finite<TYPE>(pair) || not_finite<TYPE>(pair >> 16);
    }
    return found;
}

template <u32 TYPE, typename S> __device__ __forceinline__ void clear_not_finite(char *values)
{
    for (u32 word = threadIdx.x; word < S::BLOCK_BYTES / 4; word += S::THREADS) {
        u32 *pair = (u32 *)(values + word * 4);
        *pair = finite_part<TYPE>(*pair);
    }
}

// Number within the tile of the row that registers [..][2 * half] and [..][2 * half + 1] of matrix i belong to.
template <typename S> __device__ __forceinline__ u32 own_row(u32 i, u32 half)
{
    return threadIdx.x / 32 * S::WARP_ROWS + i * 16 + half * 8 + threadIdx.x % 32 / 4;
}

extern __shared__ __align__(128) char mma_shared[];

template <u32 TYPE, u32 DIM> __device__ __forceinline__ void attend(const AttendParams &p)
{
    using S = Shape<DIM>;
    constexpr u32 KEYS = S::KEYS;
    constexpr u32 MATRICES = S::WARP_ROWS / 16;
    constexpr u32 KEY_COLUMNS = KEYS / 8;
    constexpr u32 VALUE_COLUMNS = DIM / 8;

    char *const queries = mma_shared;
    char *const values = mma_shared + S::QUERY_BYTES + S::BLOCK_BYTES;
    TileMemory<KEYS> &memory = *(TileMemory<KEYS> *)(mma_shared + S::QUERY_BYTES + 2 * S::BLOCK_BYTES);
    const u32 shared_queries = (u32)__cvta_generic_to_shared(mma_shared);
    const u32 shared_keys = shared_queries + S::QUERY_BYTES;
    const u32 shared_values = shared_keys + S::BLOCK_BYTES;

    const u32 lane = threadIdx.x % 32;
    const u32 quad_lane = lane % 4;
    const u32 warp_row = threadIdx.x / 32 * S::WARP_ROWS;
    // Where this lane's row of the 8 x 8 matrices begins: queries and values by 16 rows x 2 chunks, keys by 2 chunks x
    // 16.
    const u32 query_address = shared_queries + S::chunk_offset(warp_row + lane % 16, lane / 16);
    const u32 key_address = shared_keys + S::chunk_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const u32 value_address = shared_values + S::chunk_offset(lane % 16, lane / 16);

    while (claim_tile<KEYS>(p, memory)) {
        if (memory.tile.rows == 0)
            continue;
        copy_rows<S, TILE_ROWS>(shared_queries, p.q.row(memory.tile.batch, memory.tile.head, 0), p.q.row_stride,
                                memory.query_rows, p.head_dim);
        if (threadIdx.x < KEYS)
            put_key<KEYS>(memory, 0, find_block<KEYS>(p, memory, 0, true));
        __syncthreads();
        if (memory.blocks[0].count) {
            Source keys = source<KEYS>(memory, 0, p.k, p.extra_keys, p.head_dim * 2);
            copy_rows<S, KEYS>(shared_keys, keys.data, keys.row_stride, memory.key_rows[0], p.head_dim);
        }

        float accumulated[MATRICES][VALUE_COLUMNS][4];
        float reference[MATRICES][2];
        // Of the columns that this lane has.
        float sum[MATRICES][2];
#pragma unroll
        for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                reference[i][half] = negative_infinity();
                sum[i][half] = 0.0f;
#pragma unroll
                for (u32 n = 0; n < VALUE_COLUMNS; ++n)
                    accumulated[i][n][2 * half] = accumulated[i][n][2 * half + 1] = 0.0f;
            }
        }

        const u32 partials = memory.tile.flags & TILE_MERGE ? memory.tile.first_output : 0;
        for (u32 number = 0; number < partials; ++number) {
            u32 first_output = p.segments[memory.tile.first_segment + memory.tile.segments + number].first;
#pragma unroll
            for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    u32 row = own_row<S>(i, half);
                    if (row >= memory.tile.rows)
                        continue;
                    u64 at = p.partial_row(memory.tile.batch, memory.tile.head, first_output, memory.query_rows[row]);
                    PartialWeight of = weigh_partial(p.partial_lse[at], reference[i][half]);
                    sum[i][half] = fmaf(sum[i][half], of.scale, quad_lane == 0 ? of.weight : 0.0f);
                    const char *from = p.partial_values + at * p.partial_bytes();
#pragma unroll
                    for (u32 n = 0; n < VALUE_COLUMNS; ++n) {
#pragma unroll
                        for (u32 c = 0; c < 2; ++c) {
                            u32 column = n * 8 + quad_lane * 2 + c;
                            float value = column < p.value_dim ? read_element(from, column, p.out_type) : 0.0f;
                            float &to = accumulated[i][n][2 * half + c];
                            to = fmaf(of.weight, value, of.scale * to);
                        }
                    }
                }
            }
        }

        u32 query[S::QUERIES_IN_REGISTERS ? MATRICES : 1][S::QUERIES_IN_REGISTERS ? DIM / 16 : 1][4];
        if constexpr (S::QUERIES_IN_REGISTERS) {
            wait_for_copies();
            __syncthreads();
#pragma unroll
            for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                for (u32 step = 0; step < DIM / 16; ++step)
                    load_matrices(query[i][step], S::along(query_address + i * 16 * S::ROW_BYTES, step));
            }
        }

        for (u32 slot = 0; memory.blocks[slot].count; slot ^= 1) {
            wait_for_copies();
            // The block's keys are here, and nobody reads the values of the block before any more.
            __syncthreads();
            {
                Source from = source<KEYS>(memory, slot, p.v, p.extra_values, p.value_dim * 2);
                copy_rows<S, KEYS>(shared_values, from.data, from.row_stride, memory.key_rows[slot], p.value_dim);
            }
            KeyPlace next_key = {};
            if (threadIdx.x < KEYS)
                next_key = find_block<KEYS>(p, memory, slot ^ 1, false);

            float s[MATRICES][KEY_COLUMNS][4];
#pragma unroll
            for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                for (u32 n = 0; n < KEY_COLUMNS; ++n)
                    s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.0f;
            }
#pragma unroll
            for (u32 step = 0; step < DIM / 16; ++step) {
                u32 a[MATRICES][4];
#pragma unroll
                for (u32 i = 0; i < MATRICES; ++i) {
                    if constexpr (S::QUERIES_IN_REGISTERS) {
#pragma unroll
                        for (u32 e = 0; e < 4; ++e)
                            a[i][e] = query[i][step][e];
                    } else {
                        load_matrices(a[i], S::along(query_address + i * 16 * S::ROW_BYTES, step));
                    }
                }
#pragma unroll
                for (u32 n = 0; n < KEY_COLUMNS / 2; ++n) {
                    u32 b[4];
                    load_matrices(b, S::along(key_address + n * 16 * S::ROW_BYTES, step));
#pragma unroll
                    for (u32 i = 0; i < MATRICES; ++i) {
                        multiply_add<TYPE>(s[i][2 * n], a[i], b[0], b[1]);
                        multiply_add<TYPE>(s[i][2 * n + 1], a[i], b[2], b[3]);
                    }
                }
            }

            if (threadIdx.x < KEYS)
                put_key<KEYS>(memory, slot ^ 1, next_key);
            wait_for_copies();
            // The block's values are here, the next block is known, and nobody reads this one's keys any more.
            __syncthreads();
            if (memory.blocks[slot ^ 1].count) {
                Source keys = source<KEYS>(memory, slot ^ 1, p.k, p.extra_keys, p.head_dim * 2);
                copy_rows<S, KEYS>(shared_keys, keys.data, keys.row_stride, memory.key_rows[slot ^ 1], p.head_dim);
            }

            // Logits are s * factor + offset.
            float factor = p.scale_log2;
            float offset = memory.blocks[slot].segment.log_weight;
            const u32 flags = memory.blocks[slot].flags;
            // The largest product has the largest logit only where the factor is not negative.
            if ((flags & BLOCK_MASKED) || !(factor >= 0.0f)) {
                u32 limit[MATRICES][2];
#pragma unroll
                for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                    for (u32 half = 0; half < 2; ++half)
                        limit[i][half] = flags & BLOCK_STRADDLES ? memory.limits[own_row<S>(i, half)] : NO_KEY;
                }
#pragma unroll
                for (u32 n = 0; n < KEY_COLUMNS; ++n) {
                    u32 position[2];
                    position[0] = memory.key_positions[slot][n * 8 + quad_lane * 2];
                    position[1] = memory.key_positions[slot][n * 8 + quad_lane * 2 + 1];
#pragma unroll
                    for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                        for (u32 e = 0; e < 4; ++e) {
                            float logit = fmaf(s[i][n][e], factor, offset);
                            s[i][n][e] = position[e % 2] < limit[i][e / 2] ? logit : negative_infinity();
                        }
                    }
                }
                factor = 1.0f;
                offset = 0.0f;
            }

            float largest[MATRICES][2];
            bool large = false;
#pragma unroll
            for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    float most = negative_infinity();
#pragma unroll
                    for (u32 n = 0; n < KEY_COLUMNS; ++n)
                        most = fmaxf(most, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
                    largest[i][half] = fmaf(most, factor, offset);
                    large |= fabsf(largest[i][half]) > LARGE_LOGIT;
                }
            }
            if (__any_sync(0xffffffffu, large)) {
#pragma unroll
                for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                    for (u32 n = 0; n < KEY_COLUMNS; ++n) {
#pragma unroll
                        for (u32 e = 0; e < 4; ++e)
                            s[i][n][e] = fmaf(s[i][n][e], factor, offset);
                    }
                }
                factor = 1.0f;
                offset = 0.0f;
            }

            float shrink[MATRICES][2];
            bool raised = false;
#pragma unroll
            for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    shrink[i][half] = 1.0f;
                    if (largest[i][half] - reference[i][half] > RAISE) {
                        shrink[i][half] = exp2_approximate(reference[i][half] - largest[i][half]);
                        reference[i][half] = largest[i][half];
                        raised = true;
                    }
                }
            }
            if (__any_sync(0xffffffffu, raised)) {
#pragma unroll
                for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                    for (u32 half = 0; half < 2; ++half) {
                        sum[i][half] *= shrink[i][half];
#pragma unroll
                        for (u32 n = 0; n < VALUE_COLUMNS; ++n) {
                            accumulated[i][n][2 * half] *= shrink[i][half];
                            accumulated[i][n][2 * half + 1] *= shrink[i][half];
                        }
                    }
                }
            }
#pragma unroll
            for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    float shift = offset - subtrahend(reference[i][half]);
                    float block_sum = 0.0f;
#pragma unroll
                    for (u32 n = 0; n < KEY_COLUMNS; ++n) {
#pragma unroll
                        for (u32 e = 2 * half; e < 2 * half + 2; ++e) {
                            s[i][n][e] = exp2_approximate(fmaf(s[i][n][e], factor, shift));
                            block_sum += s[i][n][e];
                        }
                    }
                    sum[i][half] += block_sum;
                }
            }

            if (flags & BLOCK_STRADDLES) {
                if (__syncthreads_or(holds_not_finite<TYPE, S>(values))) {
#pragma unroll 1
                    for (u32 j = 0; j < KEYS; ++j) {
                        u32 position = memory.key_positions[slot][j];
#pragma unroll
                        for (u32 n = 0; n < VALUE_COLUMNS; ++n) {
                            u32 pair = *(const u32 *)(values + S::chunk_offset(j, n) + quad_lane * 4);
                            pair ^= finite_part<TYPE>(pair);
#pragma unroll
                            for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
                                for (u32 half = 0; half < 2; ++half) {
                                    if (pair != 0 && position < memory.limits[own_row<S>(i, half)]) {
                                        accumulated[i][n][2 * half] += f32_from_16<TYPE>((u16)pair);
                                        accumulated[i][n][2 * half + 1] += f32_from_16<TYPE>((u16)(pair >> 16));
                                    }
                                }
                            }
                        }
                    }
                    __syncthreads();
                    clear_not_finite<TYPE, S>(values);
                    __syncthreads();
                }
            }

#pragma unroll
            for (u32 step = 0; step < KEYS / 16; ++step) {
                u32 a[MATRICES][4];
#pragma unroll
                for (u32 i = 0; i < MATRICES; ++i) {
                    a[i][0] = f32_to_16x2<TYPE>(s[i][2 * step][0], s[i][2 * step][1]);
                    a[i][1] = f32_to_16x2<TYPE>(s[i][2 * step][2], s[i][2 * step][3]);
                    a[i][2] = f32_to_16x2<TYPE>(s[i][2 * step + 1][0], s[i][2 * step + 1][1]);
                    a[i][3] = f32_to_16x2<TYPE>(s[i][2 * step + 1][2], s[i][2 * step + 1][3]);
                }
#pragma unroll
                for (u32 n = 0; n < VALUE_COLUMNS / 2; ++n) {
                    u32 b[4];
                    load_matrices_transposed(b, S::along(value_address + step * 16 * S::ROW_BYTES, n));
#pragma unroll
                    for (u32 i = 0; i < MATRICES; ++i) {
                        multiply_add<TYPE>(accumulated[i][2 * n], a[i], b[0], b[1]);
                        multiply_add<TYPE>(accumulated[i][2 * n + 1], a[i], b[2], b[3]);
                    }
                }
            }
        }
        // Also where there was no key: late copies of queries must not land on the outputs.
        wait_for_copies();
        __syncthreads();

        const u32 rows = memory.tile.rows;
        const u32 tile_flags = memory.tile.flags;
        const u64 head_row = (u64)(memory.tile.batch * p.heads_q + memory.tile.head) * p.n_q;
        const OutputRows out = p.outputs(memory.tile.batch, memory.tile.head, tile_flags);
#pragma unroll
        for (u32 i = 0; i < MATRICES; ++i) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                u32 row = own_row<S>(i, half);
                float total = sum[i][half];
                total += __shfl_xor_sync(0xffffffffu, total, 1);
                total += __shfl_xor_sync(0xffffffffu, total, 2);
                float inverse = 1.0f / total;
                u32 output_row = row < rows ? p.output_row(memory.tile, row, memory.query_rows[row]) : 0;
                if (tile_flags & TILE_STORE) {
                    if (row >= rows)
                        continue;
                    u64 state = head_row + output_row;
                    if (quad_lane == 0) {
                        p.state_max[state] = reference[i][half];
                        p.state_sum[state] = total;
                    }
                    float *to = p.state_accumulated + state * p.value_dim;
#pragma unroll
                    for (u32 n = 0; n < VALUE_COLUMNS; ++n) {
                        u32 column = n * 8 + quad_lane * 2;
                        if (column < p.value_dim) {
                            to[column] = accumulated[i][n][2 * half];
                            to[column + 1] = accumulated[i][n][2 * half + 1];
                        }
                    }
                    continue;
                }
                if (out.lse && row < rows && quad_lane == 0)
                    *(float *)(out.lse + output_row * out.lse_stride) = log_sum(reference[i][half], total);
#pragma unroll
                for (u32 n = 0; n < VALUE_COLUMNS; ++n) {
                    float first = total == 0.0f ? 0.0f : accumulated[i][n][2 * half] * inverse;
                    float second = total == 0.0f ? 0.0f : accumulated[i][n][2 * half + 1] * inverse;
                    u32 column = n * 8 + quad_lane * 2;
                    if (p.out_type == F32) {
                        if (row < rows && column < p.value_dim) {
                            float *to = (float *)(out.values + output_row * out.value_stride) + column;
                            to[0] = first;
                            to[1] = second;
                        }
                    } else {
                        // Through the place of the warp's own queries, so that rows are written in whole chunks.
                        *(u32 *)(queries + S::chunk_offset(row, n) + quad_lane * 4) = f32_to_16x2<TYPE>(first, second);
                    }
                }
            }
        }
        if (!(tile_flags & TILE_STORE) && p.out_type != F32) {
            __syncwarp();
            const bool aligned = (((u64)out.values | (u64)out.value_stride) & 15) == 0;
#pragma unroll 1
            for (u32 index = lane; index < S::WARP_ROWS * S::CHUNKS; index += 32) {
                u32 row = warp_row + index / S::CHUNKS, chunk = index % S::CHUNKS;
                if (row >= rows || chunk * 8 >= p.value_dim)
                    continue;
                const char *from = queries + S::chunk_offset(row, chunk);
                u32 output_row = p.output_row(memory.tile, row, memory.query_rows[row]);
                char *to = out.values + output_row * out.value_stride + chunk * 16;
                if (aligned) {
                    *(uint4 *)to = *(const uint4 *)from;
                } else {
#pragma unroll
                    for (u32 e = 0; e < 8; ++e)
                        ((u16 *)to)[e] = ((const u16 *)from)[e];
                }
            }
        }
    }
}

} // namespace mma
} // namespace hyperattn

#define HYPERATTN_ATTEND_MMA(NAME, TYPE, DIM)                                                                          \
    extern "C" __global__ void __launch_bounds__(hyperattn::mma::Shape<DIM>::THREADS,                                  \
                                                 hyperattn::mma::Shape<DIM>::BLOCKS_PER_MULTIPROCESSOR)                \
        NAME(const __grid_constant__ hyperattn::AttendParams p)                                                        \
    {                                                                                                                  \
        hyperattn::mma::attend<hyperattn::TYPE, DIM>(p);                                                               \
    }

HYPERATTN_ATTEND_MMA(attend_mma_bf16_64, BF16, 64)
HYPERATTN_ATTEND_MMA(attend_mma_bf16_96, BF16, 96)
HYPERATTN_ATTEND_MMA(attend_mma_bf16_128, BF16, 128)
HYPERATTN_ATTEND_MMA(attend_mma_bf16_192, BF16, 192)
HYPERATTN_ATTEND_MMA(attend_mma_bf16_256, BF16, 256)
HYPERATTN_ATTEND_MMA(attend_mma_f16_64, F16, 64)
HYPERATTN_ATTEND_MMA(attend_mma_f16_96, F16, 96)
HYPERATTN_ATTEND_MMA(attend_mma_f16_128, F16, 128)
HYPERATTN_ATTEND_MMA(attend_mma_f16_192, F16, 192)
HYPERATTN_ATTEND_MMA(attend_mma_f16_256, F16, 256)

#undef HYPERATTN_ATTEND_MMA
