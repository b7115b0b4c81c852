// All gradients of exact rectangles on Hopper by one kernel, for queries, keys, values and output gradients of one
// 16-bit type: five products for a pair.
//
// A thread block owns a tile of keys, whose dk and dv are sums in registers, and walks the blocks of queries that see
// it, the last one first. With keys as rows, the logits and the products of values and output gradients of a block
// give its shares and slopes, which are operands in registers for dv and dk. The slopes go through shared memory too,
// for the block's part of dq, which is added to sums in memory, in the order of the tiles: tile t + 1 is at a block
// when tile t has passed it, so that it rarely waits. Without `turns` it is added as soon as it is there.
//
// Lists: tiles of one segment, and of all members of the group. Those with the same queries follow each other in the
// list by their `turn`, and each meets no query that the one before does not meet.
//
// Launched with one block of THREADS threads per multiprocessor and Shape<DIM>::SHARED_BYTES of dynamic shared memory.
// DIM is at least head_dim and value_dim, which are multiples of 8; all `turns` are 0.
#pragma once

#include "attend_mma.cuh"
#include "backward_fused_serve.cuh"
#include "backward_pairs.cuh"
#include "backward_wgmma_load.cuh"

namespace hyperattn {
namespace backward_fused {

#if __CUDA_ARCH_FEAT_SM90_ALL

using hopper::async_proxy_fence;
using hopper::multiply_registers;
using hopper::multiply_shared;
using hopper::multiply_transposed;
using hopper::opaque;
using hopper::operand;
using hopper::pin;
using hopper::products_begin;
using hopper::products_commit;
using hopper::products_wait;
using hopper::swizzled;
using online_softmax::exp2_approximate;

// Columns [first, first + count).
struct Seen {
    u32 first;
    u32 count;

    __device__ __forceinline__ bool has(u32 column) const { return column - first < count; }
};

// A computing warpgroup: 64 keys of each tile, and half of the gradient of each block of queries.
template <u32 TYPE, u32 DIM> struct Consumer {
    using S = Shape<DIM>;
    static constexpr u32 QUERIES = S::QUERIES;
    // Of the blocks' gradients, that of 64 queries and 64 dimensions is this warpgroup's.
    static constexpr u32 PART = 64;
    const BackwardParams &params;
    const AttendParams &p;
    typename S::Control &control;
    const u32 data;
    const u32 group;
    const u32 lane;
    Ring<STAGES> ring;
    Ring<STAGING_BUFFERS> staging;
    u32 slopes_phase = 0;
    // This thread's first key of the tile; the second is 8 behind.
    u32 first_row;
    // The first query that sees each key.
    u32 least[2];
    u32 query_end;
    // scale_log2 for each key; NaN for one that is not finite.
    float factor[2];
    bool keys_are_finite;
    float key_sums[DIM / 2];
    float value_sums[DIM / 2];
    float s[QUERIES / 2];
    float dp[QUERIES / 2];
    u32 slopes[QUERIES / 4];
    u32 shares[QUERIES / 4];

    __device__ __forceinline__ Consumer(const BackwardParams &backward, typename S::Control &shared_control,
                                        u32 shared_data, u32 number)
        : params(backward), p(backward.attend), control(shared_control), data(shared_data), group(number),
          lane(threadIdx.x % 32), first_row(number * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4)
    {
    }

    __device__ __forceinline__ u32 barrier(u32 number) const { return shared_address(&control.barriers[number]); }

    // The warp is done with something.
    __device__ __forceinline__ void arrive(u32 number) const
    {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(barrier(number));
    }

    // A barrier of the computing threads.
    __device__ __forceinline__ static bool consumers_or(bool found)
    {
        return hopper::barrier_or<CONSUMER_BARRIER, CONSUMER_THREADS>(found);
    }

    // Queries or output gradients of a stage.
    __device__ __forceinline__ u32 queries_at(u32 stage, u32 which) const
    {
        return data + S::STAGES_AT + (stage * 2 + which) * S::QUERY_BYTES;
    }

    // Products of this warpgroup's keys and the queries of a stage, or of values and output gradients.
    __device__ __forceinline__ void multiply(float (&products)[QUERIES / 2], u32 stage, u32 which)
    {
        u32 keys = opaque(data + which * S::VALUES_AT + group * 64 * ROW_BYTES);
        u32 queries = opaque(queries_at(stage, which));
#pragma unroll
        for (u32 k = 0; k < DIM / 16; ++k) {
            u32 within = k % 4 * 32;
            multiply_shared<TYPE, QUERIES>(products, operand<16>(keys + k / 4 * S::KEY_CHUNK_BYTES + within),
                                           operand<16>(queries + k / 4 * S::QUERY_CHUNK_BYTES + within), k != 0);
        }
        products_commit();
    }

    __device__ __forceinline__ void accumulate(float (&to)[DIM / 2], const u32 (&weights)[QUERIES / 4], u32 which)
    {
        u32 queries = opaque(queries_at(ring.stage, which));
#pragma unroll
        for (u32 k = 0; k < QUERIES / 16; ++k)
            multiply_registers<TYPE, DIM>(to, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2],
                                          weights[4 * k + 3],
                                          operand<S::QUERY_CHUNK_BYTES>(queries + k * 16 * ROW_BYTES));
    }

    // Of the block's gradient the part that is this warpgroup's: with 64 queries half of the dimensions, with 128 half
    // of the queries.
    __device__ __forceinline__ void multiply_slopes(float (&to)[PART / 2])
    {
        constexpr bool HALF_OF_QUERIES = QUERIES > PART;
        u32 slopes_at = opaque(data + S::SLOPES_AT + (HALF_OF_QUERIES ? group * S::KEY_CHUNK_BYTES : 0));
        u32 keys = opaque(data + (HALF_OF_QUERIES ? 0 : group * S::KEY_CHUNK_BYTES));
#pragma unroll
        for (u32 k = 0; k < TILE_ROWS / 16; ++k)
            multiply_transposed<TYPE, PART>(to, operand<16>(slopes_at + k * 16 * ROW_BYTES),
                                            operand<16>(keys + k * 16 * ROW_BYTES), k != 0);
        products_commit();
    }

    // Column of elements 4 j and 4 j + 2 of the products; the next one is that of elements 4 j + 1 and 4 j + 3.
    __device__ __forceinline__ u32 column(u32 j) const { return 8 * j + 2 * (lane & 3); }

    // From which column on the block's queries see this thread's key, and how many there are.
    __device__ __forceinline__ Seen seen(u32 half) const
    {
        u32 first = max(least[half], control.stages[ring.stage].first_row);
        return {first - control.stages[ring.stage].first_row, query_end > first ? query_end - first : 0};
    }

    // Shares in place of the products of keys and queries.
    template <bool MASKED> __device__ __forceinline__ void weigh()
    {
        const FusedStage<QUERIES> &stage = control.stages[ring.stage];
        Seen columns[2];
        if constexpr (MASKED)
            columns[0] = seen(0), columns[1] = seen(1);
#pragma unroll
        for (u32 j = 0; j < QUERIES / 8; ++j) {
            float4 terms = *(const float4 *)&stage.terms[column(j)];
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                float share = exp2_approximate(fmaf(s[4 * j + e], factor[e / 2], e % 2 ? terms.z : terms.x));
                if (MASKED)
                    share = columns[e / 2].has(column(j) + e % 2) ? share : 0.0f;
                s[4 * j + e] = share;
            }
            shares[2 * j] = f32_to_16x2<TYPE>(s[4 * j], s[4 * j + 1]);
            shares[2 * j + 1] = f32_to_16x2<TYPE>(s[4 * j + 2], s[4 * j + 3]);
        }
    }

    // Slopes from shares and the products of values and output gradients.
    template <bool MASKED> __device__ __forceinline__ void differentiate()
    {
        const FusedStage<QUERIES> &stage = control.stages[ring.stage];
        Seen columns[2];
        if constexpr (MASKED)
            columns[0] = seen(0), columns[1] = seen(1);
#pragma unroll
        for (u32 j = 0; j < QUERIES / 8; ++j) {
            float4 terms = *(const float4 *)&stage.terms[column(j)];
            float slope[4];
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                slope[e] = s[4 * j + e] * (dp[4 * j + e] - (e % 2 ? terms.w : terms.y));
                if (MASKED)
                    slope[e] = columns[e / 2].has(column(j) + e % 2) ? slope[e] : 0.0f;
            }
            slopes[2 * j] = f32_to_16x2<TYPE>(slope[0], slope[1]);
            slopes[2 * j + 1] = f32_to_16x2<TYPE>(slope[2], slope[3]);
        }
    }

    // Slopes to shared memory: keys are rows.
    __device__ __forceinline__ void put_slopes() const
    {
        // Of the four matrices of 8 x 8 that a warp writes at once, lane i has the address of row i % 8 of number i /
        // 8.
        u32 row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
        for (u32 j = 0; j < QUERIES / 8; j += 2) {
            u32 to = swizzled(data + S::SLOPES_AT + j / 8 * S::KEY_CHUNK_BYTES, row, j % 8 + lane / 16);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                         "r"(slopes[2 * j]), "r"(slopes[2 * j + 1]), "r"(slopes[2 * j + 2]), "r"(slopes[2 * j + 3])
                         : "memory");
        }
    }

    // This warpgroup's part of the block's gradient to the staging buffer. Rows that differ in their lowest bit take
    // turns with pairs of columns, so that the banks that eight lanes of a row and its neighbours write to differ.
    __device__ __forceinline__ void put_part(const float (&part)[PART / 2]) const
    {
        constexpr bool HALF_OF_QUERIES = QUERIES > PART;
        u32 row = (HALF_OF_QUERIES ? group * 64 : 0) + threadIdx.x / 32 % 4 * 16 + lane / 4;
        u32 to = data + S::STAGING_AT + staging.stage * S::STAGING_BYTES +
                 (HALF_OF_QUERIES ? 0 : group * 2 * S::QUERY_CHUNK_BYTES);
        bool odd = row & 1;
        auto put = [&](u32 n, u32 half, float first, float second) {
            u32 at = swizzled(to + n / 4 * S::QUERY_CHUNK_BYTES, row + 8 * half, n % 4 * 2 + (lane & 3) / 2) +
                     (lane & 1) * 8;
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(first), "f"(second) : "memory");
        };
#pragma unroll
        for (u32 chunk = 0; chunk < 2; ++chunk) {
#pragma unroll
            for (u32 low = 0; low < 2; ++low) {
                u32 n = chunk * 4 + low, other = n + 2;
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const float *a = &part[4 * n + 2 * half], *b = &part[4 * other + 2 * half];
                    put(odd ? other : n, half, odd ? b[0] : a[0], odd ? b[1] : a[1]);
                    put(odd ? n : other, half, odd ? a[0] : b[0], odd ? a[1] : b[1]);
                }
            }
        }
    }

    __device__ __forceinline__ static u32 load_shared(u32 address)
    {
        u32 word;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
        return word;
    }

    // Whether any of `BYTES` has an element that is not finite; all computing threads call it.
    template <u32 BYTES> __device__ __forceinline__ static bool any_not_finite(u32 from)
    {
        static_assert(BYTES % (CONSUMER_THREADS * 16) == 0, "whole turns");
        u32 sums[4] = {};
#pragma unroll 2
        for (u32 at = (threadIdx.x - WARPGROUP) * 16; at < BYTES; at += CONSUMER_THREADS * 16) {
            u32 words[4];
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                         : "r"(from + at)
                         : "memory");
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                sums[i] = hopper::add_times_zero<TYPE>(words[i], sums[i]);
        }
        return consumers_or(((sums[0] | sums[1] | sums[2] | sums[3]) & 0x7fff7fff) != 0);
    }

    // Sets what is not finite to 0 in `BYTES`, and calls found(at) for its words.
    template <u32 BYTES, typename Found> __device__ __forceinline__ static void make_finite(u32 from, Found found)
    {
        for (u32 at = (threadIdx.x - WARPGROUP) * 4; at < BYTES; at += CONSUMER_THREADS * 4) {
            u32 pair = load_shared(from + at), finite = mma::finite_part<TYPE>(pair);
            if (pair != finite) {
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(from + at), "r"(finite) : "memory");
                found(at);
            }
        }
        async_proxy_fence();
        consumers_or(false);
    }

    // Adds what is not finite in the queries or output gradients of a block to the keys that they see.
    __device__ __forceinline__ void add_not_finite(float (&to)[DIM / 2], u32 which) const
    {
        u32 queries = queries_at(ring.stage, which);
#pragma unroll 1
        for (u32 j = 0; j < QUERIES; ++j) {
            const bool counts[2] = {seen(0).has(j), seen(1).has(j)};
#pragma unroll
            for (u32 n = 0; n < DIM / 8; ++n) {
                u32 pair =
                    load_shared(swizzled(queries + n / 8 * S::QUERY_CHUNK_BYTES, j, n % 8) + (lane & 3) * 4);
                pair ^= mma::finite_part<TYPE>(pair);
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    if (pair != 0 && counts[half]) {
                        to[4 * n + 2 * half] += f32_from_16<TYPE>((u16)pair);
                        to[4 * n + 2 * half + 1] += f32_from_16<TYPE>((u16)(pair >> 16));
                    }
                }
            }
        }
    }

    // Takes what is not finite out of the vectors of a block, some of whose queries do not see some keys, and adds it
    // to the keys that they see; all computing threads call it.
    __device__ __forceinline__ void take_out_of_queries()
    {
        u32 queries = queries_at(ring.stage, 0);
        if (!any_not_finite<2 * S::QUERY_BYTES>(queries))
            return;
        add_not_finite(key_sums, 0);
        add_not_finite(value_sums, 1);
        consumers_or(false);
        make_finite<2 * S::QUERY_BYTES>(queries, [](u32) {});
    }

    // Takes what is not finite out of the tile's keys, for queries that do not see them; from then on their logits are
    // NaN. All computing threads call it.
    __device__ __forceinline__ void take_out_of_keys()
    {
        keys_are_finite = true;
        if (!any_not_finite<S::KEY_BYTES>(data))
            return;
        if (threadIdx.x - WARPGROUP < TILE_ROWS)
            control.tainted[threadIdx.x - WARPGROUP] = 0;
        consumers_or(false);
        make_finite<S::KEY_BYTES>(data, [&](u32 at) { control.tainted[at / ROW_BYTES % TILE_ROWS] = 1; });
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            if (control.tainted[first_row + 8 * half])
                factor[half] = __uint_as_float(0x7fffffff);
        }
    }

    // One block, whose products of keys and queries are there. Those of the next block are at the end.
    template <bool MASKED> __device__ __forceinline__ void step(u32 flags)
    {
        products_begin();
        multiply(dp, ring.stage, 1);
        weigh<MASKED>();
        // Beside what follows, where there are registers for both; what a masked block must not meet is still to come
        // out.
        constexpr bool VALUES_FIRST = DIM > 64 && !MASKED;
        if constexpr (VALUES_FIRST) {
            pin(shares);
            pin(value_sums);
            products_begin();
            accumulate(value_sums, shares, 1);
            products_commit();
            products_wait<1>();
        } else {
            products_wait<0>();
        }
        pin(dp);
        differentiate<MASKED>();
        if constexpr (MASKED) {
            if (flags & STAGE_HIDES)
                take_out_of_queries();
            if (!keys_are_finite)
                take_out_of_keys();
        }
        // The other warpgroup has used the slopes of the block before.
        barrier_wait(barrier(S::SLOPES_EMPTY), slopes_phase ^ 1);
        put_slopes();
        async_proxy_fence();
        arrive(S::SLOPES_FULL);

        pin(slopes);
        pin(key_sums);
        if constexpr (!VALUES_FIRST) {
            pin(shares);
            pin(value_sums);
        }
        products_begin();
        if constexpr (!VALUES_FIRST)
            accumulate(value_sums, shares, 1);
        accumulate(key_sums, slopes, 0);
        products_commit();
        barrier_wait(barrier(S::SLOPES_FULL), slopes_phase);
        slopes_phase ^= 1;
        float part[PART / 2];
        multiply_slopes(part);
        products_wait<1>();
        pin(value_sums);
        pin(key_sums);
        pin(slopes);
        pin(shares);
        // After the last block there is none, and its own products are computed again instead, for nothing.
        Ring<STAGES> next = ring;
        if (!(flags & STAGE_LAST))
            next.advance();
        barrier_wait(barrier(S::STAGE_FULL + next.stage), next.phase);
        products_begin();
        multiply(s, next.stage, 0);
        arrive(S::STAGE_EMPTY + ring.stage);
        products_wait<1>();
        pin(part);
        arrive(S::SLOPES_EMPTY);

        barrier_wait(barrier(S::STAGING_EMPTY + staging.stage), staging.phase ^ 1);
        put_part(part);
        async_proxy_fence();
        arrive(S::STAGING_FULL + staging.stage);
        staging.advance();
        ring.advance();
        products_wait<0>();
        pin(s);
    }

    __device__ __forceinline__ void run()
    {
        for (u32 phase = 0;; phase ^= 1) {
            barrier_wait(barrier(S::TILE_FULL), phase);
            const FusedTile &tile = control.tile;
            const u32 rows = tile.rows, batch = tile.batch, head = tile.kv_head, flags = tile.flags;
            if (rows == 0)
                return;
            const u32 first_key = tile.first_key;
            bool more = tile.first_query < tile.query_end;
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                u32 row = first_row + 8 * half, first = tile.first_query;
                if (flags & KEY_TILE_LIMITED)
                    first = max(first, params.first_row_seeing(first_key + row));
                least[half] = row < rows ? first : 0xffffffff;
                factor[half] = p.scale_log2;
            }
            query_end = tile.query_end;
            // Not known yet.
            keys_are_finite = false;
            if (more) {
                barrier_wait(barrier(S::STAGE_FULL + ring.stage), ring.phase);
                products_begin();
                multiply(s, ring.stage, 0);
            }
#pragma unroll
            for (u32 i = 0; i < DIM / 2; ++i)
                key_sums[i] = value_sums[i] = 0.0f;
            products_wait<0>();
            pin(s);
            while (more) {
                u32 block_flags = __shfl_sync(ALL_LANES, control.stages[ring.stage].flags, 0);
                more = !(block_flags & STAGE_LAST);
                if (block_flags & STAGE_MASKED)
                    step<true>(block_flags);
                else
                    step<false>(block_flags);
            }
            arrive(S::TILE_EMPTY);
            end<0>(batch, head, flags, first_key, rows);
            end<1>(batch, head, flags, first_key, rows);
        }
    }

    // Number of a key among all.
    __device__ __forceinline__ u64 number(u32 batch, u32 head, u32 key) const
    {
        return (u64)(batch * p.heads_kv() + head) * p.n_k + key;
    }

    template <u32 HALF>
    __device__ __forceinline__ void end(u32 batch, u32 head, u32 flags, u32 first_key, u32 rows)
    {
        u32 row = first_row + 8 * HALF, key = first_key + row;
        bool exists = row < rows;
        const u64 at = number(batch, head, key);
        if (flags & KEY_TILE_RESUME) {
            bool stored = exists && params.key_stored[at] != 0;
            add_row<DIM, HALF>(key_sums, stored, params.key_sums_of(flags, at), params.key_sums_type, p.head_dim);
            add_row<DIM, HALF>(value_sums, stored, params.value_sums_of(flags, at), params.key_sums_type, p.value_dim);
        }
        auto write = [&](const float (&from)[DIM / 2], char *to, u32 type, u32 dim, float scale) {
            write_row<TYPE, DIM>(exists, to, type, dim, scale, [&](u32 n) {
                return make_float2(from[4 * n + 2 * HALF], from[4 * n + 2 * HALF + 1]);
            });
        };
        if (flags & KEY_TILE_STORE) {
            write(key_sums, params.key_sums_of(flags, at), params.key_sums_type, p.head_dim, 1.0f);
            write(value_sums, params.value_sums_of(flags, at), params.key_sums_type, p.value_dim, 1.0f);
            if (exists && lane % 4 == 0)
                params.key_stored[at] = 1;
            return;
        }
        write(key_sums, params.dk.row(batch, head, key), params.dk_type, p.head_dim, params.scale);
        write(value_sums, params.dv.row(batch, head, key), params.dv_type, p.value_dim, 1.0f);
    }
};

template <u32 TYPE, u32 DIM>
__device__ __forceinline__ void run(const BackwardParams &params, const FusedParams &fused)
{
    using S = Shape<DIM>;
    extern __shared__ __align__(1024) char shared[];
    u32 start = shared_address(shared);
    u32 data = (start + 1023) & ~1023u;
    typename S::Control &control = *(typename S::Control *)(shared + (data - start) + S::CONTROL_AT);

    if (threadIdx.x == 0) {
        auto initialize = [&](u32 first, u32 count, u32 arrivals) {
            for (u32 i = first; i < first + count; ++i)
                hopper::barrier_init(shared_address(&control.barriers[i]), arrivals);
        };
        initialize(S::TILE_FULL, 1, 1);
        initialize(S::TILE_EMPTY, 1, CONSUMER_WARPS + WRITERS);
        initialize(S::STAGE_FULL, STAGES, 1);
        initialize(S::STAGE_EMPTY, STAGES, CONSUMER_WARPS);
        initialize(S::SLOPES_FULL, 1, CONSUMER_WARPS);
        initialize(S::SLOPES_EMPTY, 1, CONSUMER_WARPS);
        initialize(S::STAGING_FULL, STAGING_BUFFERS, CONSUMER_WARPS);
        initialize(S::STAGING_EMPTY, STAGING_BUFFERS, 1);
        hopper::barrier_init_fence();
    }
    __syncthreads();

    u32 warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0);
    if (warp < WARPGROUP / 32) {
        hopper::registers_decrease<SERVER_REGISTERS>();
        if (warp == 0)
            Loader<DIM>(params, fused, control, data).run();
        else if (warp <= WRITERS && threadIdx.x % 32 == 0)
            Writer<DIM>(params, fused, control, data, warp - 1).run();
    } else {
        hopper::registers_increase<CONSUMER_REGISTERS>();
        Consumer<TYPE, DIM>(params, control, data, warp / 4 - 1).run();
    }
}

#endif

} // namespace backward_fused
} // namespace hyperattn

// Other targets have the names only.
#if __CUDA_ARCH_FEAT_SM90_ALL
#define HYPERATTN_FUSED(TYPE, DIM) hyperattn::backward_fused::run<hyperattn::TYPE, DIM>(p, fused)
#else
#define HYPERATTN_FUSED(TYPE, DIM) __trap()
#endif

#define HYPERATTN_BACKWARD_FUSED(NAME, TYPE, DIM) \
    extern "C" __global__ void __launch_bounds__(hyperattn::backward_fused::THREADS, 1) \
        backward_fused_##NAME##_##DIM(const __grid_constant__ hyperattn::BackwardParams p, \
                                      const __grid_constant__ hyperattn::backward_fused::FusedParams fused) \
    { \
        HYPERATTN_FUSED(TYPE, DIM); \
    }

HYPERATTN_BACKWARD_FUSED(bf16, BF16, 64)
HYPERATTN_BACKWARD_FUSED(bf16, BF16, 128)
HYPERATTN_BACKWARD_FUSED(f16, F16, 64)
HYPERATTN_BACKWARD_FUSED(f16, F16, 128)

#undef HYPERATTN_FUSED
#undef HYPERATTN_BACKWARD_FUSED
