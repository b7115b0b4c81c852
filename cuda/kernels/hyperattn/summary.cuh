// Summaries of blocks of neighbouring keys: the means of their keys and values, the key farthest from the mean, which
// may be heavy where the mean is not, and how many keys that is about. Keys with an element that is not finite, or
// whose value has one, do not take part.
//
// Launch: summarise_keys, grid (batch * KV heads * blocks), SUMMARY_THREADS threads.
#pragma once

#include "elements.cuh"

namespace hyperattn::refined {

constexpr u32 SUMMARY_THREADS = 128;
constexpr u32 MOST_WIDTH = 256;

// Keys of no more bytes stay in shared memory while they are summarised.
constexpr u32 KEPT_BYTES = KEY_BLOCK * 256;

struct SummaryShared {
    alignas(16) char keys[KEPT_BYTES];
    alignas(16) float key_sums[SUMMARY_THREADS * 8];
    alignas(16) float value_sums[SUMMARY_THREADS * 8];
    alignas(16) float mean[MOST_WIDTH];
    float distance[KEY_BLOCK];
    u32 bad[KEY_BLOCK];
};

// Sums keep to the range of f32: terms are scaled by 1/64, and there are 64 at most.
constexpr float TERM = 1.0f / KEY_BLOCK;

// The neighbouring rows of a block, and a thread's part of them: 8 columns of every so-many-th row.
template <u32 TYPE> struct BlockRows {
    using Elements = EightElements<TYPE>;

    const char *rows;
    i64 stride;
    u32 count;
    u32 dim;
    bool aligned;
    // Threads of a row, of which each has a slice of the rows.
    u32 parts;
    u32 slices;
    u32 column;
    u32 slice;

    __device__ __forceinline__ BlockRows(const char *rows, i64 stride, u32 count, u32 dim, bool aligned)
        : rows(rows), stride(stride), count(count), dim(dim), aligned(aligned), parts((dim + 7) / 8),
          slices(SUMMARY_THREADS / parts), column(threadIdx.x % parts * 8), slice(threadIdx.x / parts)
    {
    }

    // Begins to copy the thread's part.
    __device__ __forceinline__ void begin_to_keep(char *kept) const
    {
        constexpr u32 BYTES = Elements::BYTES;
        if (slice >= slices)
            return;
#pragma unroll 4
        for (u32 row = slice; row < count; row += slices) {
#pragma unroll
            for (u32 i = 0; i < BYTES; i += 16)
                begin_copy(kept + (row * dim + column) * (BYTES / 8) + i,
                           rows + row * stride + column * (BYTES / 8) + i, true);
        }
    }

    // Eight elements of a row, from `kept` if there it is.
    template <bool KEPT>
    __device__ __forceinline__ Elements load(const char *kept, u32 row, u32 first_column) const
    {
        Elements x;
        if constexpr (KEPT)
            x.load_shared(kept + (row * dim + first_column) * (Elements::BYTES / 8));
        else
            x.load(rows + row * stride, first_column, dim, aligned);
        return x;
    }

    // Sums of the thread's part.
    template <bool KEPT> __device__ __forceinline__ void add(const char *kept, float sums[8]) const
    {
        constexpr u32 BATCH = 4;
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            sums[i] = 0.0f;
        if (slice >= slices)
            return;
        for (u32 first = slice; first < count; first += BATCH * slices) {
            Elements x[BATCH];
#pragma unroll
            for (u32 i = 0; i < BATCH; ++i) {
                if (first + i * slices < count)
                    x[i] = load<KEPT>(kept, first + i * slices, column);
                else
                    x[i].clear();
            }
#pragma unroll
            for (u32 i = 0; i < BATCH; ++i) {
#pragma unroll
                for (u32 j = 0; j < 8; ++j)
                    sums[j] = fmaf(x[i][j], TERM, sums[j]);
            }
        }
    }

    // Notes which rows are not finite.
    __device__ __forceinline__ void find_bad(u32 bad[KEY_BLOCK]) const
    {
        for (u32 row = slice; slice < slices && row < count; row += slices) {
            Elements x = load<false>(nullptr, row, column);
            float check = 0.0f;
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                check += x[i] * 0.0f;
            if (check != 0.0f)
                bad[row] = 1;
        }
    }

    // Sums of the thread's part without the rows that are noted.
    __device__ __forceinline__ void add_good(const u32 bad[KEY_BLOCK], float sums[8]) const
    {
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            sums[i] = 0.0f;
        for (u32 row = slice; slice < slices && row < count; row += slices) {
            if (bad[row])
                continue;
            Elements x = load<false>(nullptr, row, column);
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                sums[i] = fmaf(x[i], TERM, sums[i]);
        }
    }

    // The sum of a column, from the threads' parts.
    __device__ __forceinline__ float column_sum(const float *sums, u32 at) const
    {
        float sum = 0.0f;
#pragma unroll 8
        for (u32 i = 0; i < slices; ++i)
            sum += sums[i * parts * 8 + at];
        return sum;
    }
};

__device__ __forceinline__ void share_sums(float *shared, const float sums[8])
{
    float4 *to = (float4 *)shared + 2 * threadIdx.x;
    to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
}

__device__ __forceinline__ bool are_finite(const float x[8])
{
    float check = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        check += x[i] * 0.0f;
    return check == 0.0f;
}

// A mean lies among what it is of.
__device__ __forceinline__ float mean_of(float sum, float factor)
{
    const float most = __uint_as_float(0x7f7fffffu);
    return fminf(fmaxf(sum * factor, -most), most);
}

// Squared distances of the keys from the mean, -1 for those that do not take part. Eight lanes measure one key.
template <u32 TYPE, bool KEPT>
__device__ __forceinline__ void measure_keys(SummaryShared &shared, const BlockRows<TYPE> &keys)
{
    constexpr u32 AT_ONCE = SUMMARY_THREADS / 8, ROWS = KEY_BLOCK / AT_ONCE;
    u32 part = threadIdx.x % 8, first = threadIdx.x / 8;
    float distances[ROWS] = {};
    bool counts[ROWS];
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i)
        counts[i] = first + i * AT_ONCE < keys.count && !shared.bad[first + i * AT_ONCE];
    for (u32 column = part * 8; column < keys.dim; column += 64) {
        EightElements<F32> mean;
        mean.load_shared((const char *)(shared.mean + column));
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            if (!counts[i])
                continue;
            EightElements<TYPE> x = keys.template load<KEPT>(shared.keys, first + i * AT_ONCE, column);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) {
                float difference = x[j] - mean[j];
                distances[i] = fmaf(difference, difference, distances[i]);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) {
#pragma unroll
        for (u32 other = 1; other < 8; other *= 2)
            distances[i] += __shfl_xor_sync(ALL_LANES, distances[i], other);
        if (part == i)
            shared.distance[first + i * AT_ONCE] = counts[i] ? distances[i] : -1.0f;
    }
}

// The farthest key, the first of those as far; every warp finds it for itself.
__device__ __forceinline__ u32 farthest_key(const SummaryShared &shared)
{
    u32 lane = threadIdx.x % 32;
    // The bits of -1 are less than those of all distances.
    i32 low = __float_as_int(shared.distance[lane]), high = __float_as_int(shared.distance[lane + 32]);
    i32 most = __reduce_max_sync(ALL_LANES, max(low, high));
    return __reduce_min_sync(ALL_LANES, low == most ? lane : high == most ? lane + 32 : KEY_BLOCK);
}

template <u32 TYPE, bool KEPT>
__device__ __forceinline__ void summarise_block(const RefinedParams &p, SummaryShared &shared, const char *key_rows,
                                                const char *value_rows, u32 count)
{
    u32 thread = threadIdx.x;
    BlockRows<TYPE> keys(key_rows, p.k.row_stride, count, p.head_dim, p.flags & REFINED_K_ALIGNED);
    BlockRows<TYPE> values(value_rows, p.v.row_stride, count, p.value_dim, p.flags & REFINED_V_ALIGNED);
    if (KEPT)
        keys.begin_to_keep(shared.keys);
    if (thread < KEY_BLOCK)
        shared.bad[thread] = 0;
    float sums[8];
    values.template add<false>(nullptr, sums);
    share_sums(shared.value_sums, sums);
    bool finite_sums = are_finite(sums);
    if (KEPT)
        await_copies();
    keys.template add<KEPT>(shared.keys, sums);
    share_sums(shared.key_sums, sums);
    finite_sums = finite_sums && are_finite(sums);
    u32 finite = count;
    // A sum of an element that is not finite is not finite either.
    if (__syncthreads_or(!finite_sums)) {
        keys.find_bad(shared.bad);
        values.find_bad(shared.bad);
        __syncthreads();
        values.add_good(shared.bad, sums);
        share_sums(shared.value_sums, sums);
        keys.add_good(shared.bad, sums);
        share_sums(shared.key_sums, sums);
        for (u32 row = 0; row < count; ++row)
            finite -= shared.bad[row];
        __syncthreads();
    }
    float factor = finite ? (float)KEY_BLOCK / finite : 0.0f;
    u64 number = blockIdx.x;
    float *summary = p.summaries + number * p.summary_width();
    u64 operands = number * p.width * p.operand_bytes();
    if (thread == 0)
        p.key_counts[number] = (float)finite;
    for (u32 column = thread; column < p.width; column += SUMMARY_THREADS) {
        float mean = 0.0f;
        if (column < p.head_dim) {
            mean = mean_of(keys.column_sum(shared.key_sums, column), factor);
            summary[column] = mean;
        }
        shared.mean[column] = mean;
        store_rounded(p.mean_keys + operands, column, p.operand_type, mean);
    }
    for (u32 column = thread; column < p.value_dim; column += SUMMARY_THREADS)
        summary[p.head_dim + column] = mean_of(values.column_sum(shared.value_sums, column), factor);
    __syncthreads();

    measure_keys<TYPE, KEPT>(shared, keys);
    __syncthreads();
    u32 farthest = farthest_key(shared);
    const char *outlier = KEPT ? shared.keys + farthest * p.head_dim * (EightElements<TYPE>::BYTES / 8)
                               : key_rows + farthest * p.k.row_stride;
    for (u32 column = thread; column < p.width; column += SUMMARY_THREADS) {
        float x = finite && column < p.head_dim ? f32_of(outlier, column, TYPE) : 0.0f;
        store_rounded(p.outliers + operands, column, p.operand_type, x);
    }
}

template <u32 TYPE> __device__ __forceinline__ void summarise(const RefinedParams &p, SummaryShared &shared)
{
    u32 block = blockIdx.x % p.blocks, kv = blockIdx.x / p.blocks;
    u32 heads_kv = p.heads_q / p.group;
    u32 batch = kv / heads_kv, head = kv % heads_kv;
    u32 first = block * KEY_BLOCK, count = min(KEY_BLOCK, p.n_k - first);
    const char *keys = p.k.row(batch, head, first), *values = p.v.row(batch, head, first);
    bool fits = KEY_BLOCK * p.head_dim * (EightElements<TYPE>::BYTES / 8) <= KEPT_BYTES;
    if (fits && p.flags & REFINED_K_ALIGNED)
        summarise_block<TYPE, true>(p, shared, keys, values, count);
    else
        summarise_block<TYPE, false>(p, shared, keys, values, count);
}

} // namespace hyperattn::refined

extern "C" __global__ void __launch_bounds__(hyperattn::refined::SUMMARY_THREADS, 8)
    summarise_keys(const __grid_constant__ hyperattn::refined::RefinedParams p)
{
    __shared__ hyperattn::refined::SummaryShared shared;
    if (p.kv_type == hyperattn::BF16)
        hyperattn::refined::summarise<hyperattn::BF16>(p, shared);
    else if (p.kv_type == hyperattn::F16)
        hyperattn::refined::summarise<hyperattn::F16>(p, shared);
    else
        hyperattn::refined::summarise<hyperattn::F32>(p, shared);
}
