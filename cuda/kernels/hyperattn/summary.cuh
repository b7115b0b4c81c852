// Summaries of blocks of neighbouring keys: the means of their keys and values, the key farthest from the mean, which
// may be heavy where the mean is not, and how many keys that is about. Keys with an element that is not finite, or
// whose value has one, do not take part.
//
// Launch: summarise_keys, grid (batch * KV heads * blocks), SUMMARY_THREADS threads.
#pragma once

#include "refined_params.cuh"

namespace hyperattn::refined {

constexpr u32 SUMMARY_THREADS = 128;
constexpr u32 MOST_WIDTH = 256;

struct SummaryShared {
    float partial[SUMMARY_THREADS * 8];
    float mean[MOST_WIDTH];
    u32 bad[KEY_BLOCK];
    u32 any_bad;
    float distance[KEY_BLOCK];
};

// Sums keep to the range of f32: terms are scaled by 1/64, and there are 64 at most.
constexpr float TERM = 1.0f / KEY_BLOCK;

// Sums of the rows' columns, a thread's part of them: 8 columns of every so-many-th row. Notes rows that are not
// finite, or passes over those that are noted.
__device__ __forceinline__ void add_rows(SummaryShared &shared, const char *rows, i64 stride, u32 count, u32 dim,
                                         u32 type, bool aligned, bool look, float sums[8])
{
    u32 parts = (dim + 7) / 8, slices = SUMMARY_THREADS / parts;
    u32 part = threadIdx.x % parts, slice = threadIdx.x / parts;
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        sums[i] = 0.0f;
    if (slice >= slices)
        return;
#pragma unroll 4
    for (u32 row = slice; row < count; row += slices) {
        float x[8], check = 0.0f;
        load_8(rows + row * stride, part * 8, dim, type, aligned, x);
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            check += x[i] * 0.0f;
        if (look && check != 0.0f) {
            shared.bad[row] = 1;
            shared.any_bad = 1;
        }
        if (look || !shared.bad[row]) {
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                sums[i] += x[i] * TERM;
        }
    }
}

// The sum of a column, from the threads' parts.
__device__ __forceinline__ float column_sum(const SummaryShared &shared, u32 column, u32 dim)
{
    u32 parts = (dim + 7) / 8, slices = SUMMARY_THREADS / parts;
    float sum = 0.0f;
    for (u32 slice = 0; slice < slices; ++slice)
        sum += shared.partial[(slice * parts + column / 8) * 8 + column % 8];
    return sum;
}

__device__ __forceinline__ void share_sums(SummaryShared &shared, const float sums[8])
{
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        shared.partial[threadIdx.x * 8 + i] = sums[i];
}

// A mean lies among what it is of.
__device__ __forceinline__ float mean_of(float sum, float factor)
{
    const float most = __uint_as_float(0x7f7fffffu);
    return fminf(fmaxf(sum * factor, -most), most);
}

__device__ __forceinline__ void summarise_block(const RefinedParams &p, SummaryShared &shared)
{
    u32 thread = threadIdx.x;
    u32 block = blockIdx.x % p.blocks, kv = blockIdx.x / p.blocks;
    u32 heads_kv = p.heads_q / p.group;
    u32 batch = kv / heads_kv, head = kv % heads_kv;
    u32 first = block * KEY_BLOCK, count = min(KEY_BLOCK, p.n_k - first);
    const char *keys = p.k.row(batch, head, first), *values = p.v.row(batch, head, first);
    bool keys_aligned = p.flags & REFINED_K_ALIGNED, values_aligned = p.flags & REFINED_V_ALIGNED;
    if (thread < KEY_BLOCK)
        shared.bad[thread] = 0;
    if (thread == 0)
        shared.any_bad = 0;
    __syncthreads();

    float key_sums[8], value_sums[8];
    add_rows(shared, keys, p.k.row_stride, count, p.head_dim, p.kv_type, keys_aligned, true, key_sums);
    add_rows(shared, values, p.v.row_stride, count, p.value_dim, p.kv_type, values_aligned, true, value_sums);
    __syncthreads();
    u32 finite = count;
    if (shared.any_bad) {
        add_rows(shared, keys, p.k.row_stride, count, p.head_dim, p.kv_type, keys_aligned, false, key_sums);
        add_rows(shared, values, p.v.row_stride, count, p.value_dim, p.kv_type, values_aligned, false, value_sums);
        for (u32 row = 0; row < count; ++row)
            finite -= shared.bad[row];
    }
    float factor = finite ? (float)KEY_BLOCK / finite : 0.0f;
    u64 number = (u64)kv * p.blocks + block;
    float *summary = p.summaries + number * p.summary_width();
    u64 operands = number * p.width * p.operand_bytes();
    if (thread == 0)
        p.key_counts[number] = (float)finite;

    share_sums(shared, key_sums);
    __syncthreads();
    for (u32 column = thread; column < p.width; column += SUMMARY_THREADS) {
        float mean = 0.0f;
        if (column < p.head_dim) {
            mean = mean_of(column_sum(shared, column, p.head_dim), factor);
            summary[column] = mean;
        }
        shared.mean[column] = mean;
        store_rounded(p.mean_keys + operands, column, p.operand_type, mean);
    }
    __syncthreads();
    share_sums(shared, value_sums);

    // Eight lanes measure one key.
    u32 part = thread % 8;
#pragma unroll
    for (u32 i = 0; i < KEY_BLOCK / (SUMMARY_THREADS / 8); ++i) {
        u32 row = i * (SUMMARY_THREADS / 8) + thread / 8;
        float distance = 0.0f;
        bool counts = row < count && !shared.bad[row];
        if (counts) {
            for (u32 column = part * 8; column < p.head_dim; column += 64) {
                float x[8];
                load_8(keys + row * p.k.row_stride, column, p.head_dim, p.kv_type, keys_aligned, x);
#pragma unroll
                for (u32 j = 0; j < 8; ++j) {
                    float difference = x[j] - shared.mean[column + j];
                    distance = fmaf(difference, difference, distance);
                }
            }
        }
#pragma unroll
        for (u32 other = 1; other < 8; other *= 2)
            distance += __shfl_xor_sync(ALL_LANES, distance, other);
        if (part == 0)
            shared.distance[row] = counts ? distance : -1.0f;
    }
    __syncthreads();
    for (u32 column = thread; column < p.value_dim; column += SUMMARY_THREADS)
        summary[p.head_dim + column] = mean_of(column_sum(shared, column, p.value_dim), factor);

    // Every warp finds the farthest key for itself, the first of those as far.
    u32 lane = thread % 32, farthest = lane;
    float distance = shared.distance[lane];
    if (shared.distance[lane + 32] > distance) {
        distance = shared.distance[lane + 32];
        farthest = lane + 32;
    }
#pragma unroll
    for (u32 other = 1; other < 32; other *= 2) {
        float its_distance = __shfl_xor_sync(ALL_LANES, distance, other);
        u32 its_farthest = __shfl_xor_sync(ALL_LANES, farthest, other);
        if (its_distance > distance || (its_distance == distance && its_farthest < farthest)) {
            distance = its_distance;
            farthest = its_farthest;
        }
    }
    const char *outlier = keys + farthest * p.k.row_stride;
    for (u32 column = thread; column < p.width; column += SUMMARY_THREADS) {
        float x = finite && column < p.head_dim ? f32_of(outlier, column, p.kv_type) : 0.0f;
        store_rounded(p.outliers + operands, column, p.operand_type, x);
    }
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::SUMMARY_THREADS)
    summarise_keys(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::SummaryShared shared;
    hyperattn::refined::summarise_block(p, shared);
}
