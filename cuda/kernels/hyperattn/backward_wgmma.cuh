// Gradients on Hopper for queries, keys, values and output gradients of one 16-bit type.
//
// As in backward_mma.cuh the rows of a tile meet blocks of columns. Products of rows and columns read both from shared
// memory; shares and slopes are operands in registers of the products that sum up. The products of the two computing
// warpgroups overlap with each other's exponentials.
//
// Launched with one block of THREADS threads per multiprocessor and Shape<DIM>::SHARED_BYTES of dynamic shared memory.
// DIM is at least head_dim and value_dim, which are multiples of 8; all rows are aligned to 16 bytes.
#pragma once

#include "attend_mma.cuh"
#include "backward_pairs.cuh"
#include "backward_wgmma_load.cuh"

namespace hyperattn {
namespace backward_hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

using hopper::async_proxy_fence;
using hopper::multiply_registers;
using hopper::multiply_shared;
using hopper::opaque;
using hopper::operand;
using hopper::pin;
using hopper::products_begin;
using hopper::products_commit;
using hopper::products_wait;
using online_softmax::exp2_approximate;

// Which pairs of a block are masked: none, all of some keys, or any.
enum Mask : u32 { MASK_NONE, MASK_ROWS, MASK_PAIRS };

// A query sees positions below `start`; a key is hidden from positions [start, start + count). Of two rows.
struct Bounds {
    u32 start[2];
    u32 count[2];
};

// Stores get(n), pairs of a row, if `written`, as f32 or bf16; `adds` them to what is stored, without waiting for it.
template <u32 DIM, typename Get>
__device__ __forceinline__ void store_row(bool written, bool adds, char *to, u32 type, u32 dim, Get get)
{
    if (type == F32) {
        for_each_four<DIM>(get, [&](u32 column, float4 four) {
            if (!written || column >= dim)
                return;
            float *at = (float *)to + column;
            if (adds)
                asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(four.x), "f"(four.y),
                             "f"(four.z), "f"(four.w)
                             : "memory");
            else
                *(float4 *)at = four;
        });
    } else {
        for_each_eight<BF16, DIM>(1.0f, get, [&](u32 column, uint4 eight) {
            if (!written || column >= dim)
                return;
            u16 *at = (u16 *)to + column;
            if (adds)
                asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(eight.x),
                             "r"(eight.y), "r"(eight.z), "r"(eight.w)
                             : "memory");
            else
                *(uint4 *)at = eight;
        });
    }
}

// A computing warpgroup: 64 rows of each tile, of keys or of queries.
template <u32 TYPE, u32 DIM, bool OF_KEYS> struct Consumer {
    using S = Shape<DIM>;
    static constexpr u32 COLUMNS = S::COLUMNS;
    const BackwardParams &params;
    const AttendParams &p;
    typename S::Control &control;
    const u32 data;
    const u32 group;
    const u32 lane;
    // Of the rows.
    u32 rows_phase = 0;
    Ring<S::STAGES> ring;
    // This thread's first row of the half; the second is 8 behind.
    u32 first_row;
    // Of queries.
    RowTerms terms[2];
    // Of dq or dk, and of dv.
    float sums[DIM / 2];
    float value_sums[OF_KEYS ? DIM / 2 : 1];
    float s[COLUMNS / 2];
    float dp[COLUMNS / 2];
    u32 slopes[COLUMNS / 4];
    u32 shares[OF_KEYS ? COLUMNS / 4 : 1];

    __device__ __forceinline__ Consumer(const BackwardParams &backward, typename S::Control &shared_control,
                                        u32 shared_data, u32 number)
        : params(backward), p(backward.attend), control(shared_control), data(shared_data), group(number),
          lane(threadIdx.x % 32), first_row(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4)
    {
    }

    // The warp is done with a slot or stage.
    __device__ __forceinline__ void release(const u64 &barrier) const
    {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(shared_address(&barrier));
    }

    // A barrier of the computing threads that tells whether any of them found something.
    __device__ __forceinline__ static bool consumers_or(bool found)
    {
        return hopper::barrier_or<CONSUMER_BARRIER, CONSUMERS * WARPGROUP>(found);
    }

    __device__ __forceinline__ void wait(const u64 &barrier, u32 phase) const
    {
        barrier_wait(shared_address(&barrier), phase);
        // Threads have copied what the products read.
        async_proxy_fence();
    }

    // The first or second vectors of the block.
    __device__ __forceinline__ u32 columns_at(u32 which) const
    {
        return data + S::COLUMNS_AT + (ring.stage * 2 + which) * S::COLUMNS_BYTES;
    }

    __device__ __forceinline__ void multiply(float (&products)[COLUMNS / 2], u32 which)
    {
        u32 rows = opaque(data + (group * 2 + which) * S::ROWS_BYTES);
        u32 columns = opaque(columns_at(which));
#pragma unroll
        for (u32 k = 0; k < DIM / 16; ++k) {
            u32 within = k % 4 * 32;
            multiply_shared<TYPE, COLUMNS>(products, operand<16>(rows + k / 4 * S::ROW_CHUNK_BYTES + within),
                                           operand<16>(columns + k / 4 * S::COLUMN_CHUNK_BYTES + within), k != 0);
        }
        products_commit();
    }

    __device__ __forceinline__ void accumulate(float (&to)[DIM / 2], const u32 (&weights)[COLUMNS / 4], u32 which)
    {
        u32 columns = opaque(columns_at(which));
#pragma unroll
        for (u32 k = 0; k < COLUMNS / 16; ++k)
            multiply_registers<TYPE, DIM>(to, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2],
                                          weights[4 * k + 3],
                                          operand<S::COLUMN_CHUNK_BYTES>(columns + k * 16 * ROW_BYTES));
        products_commit();
    }

    // Whether column j counts for one of this thread's rows, in a masked block.
    __device__ __forceinline__ bool seen(const Bounds &bounds, u32 half, u32 j) const
    {
        u32 position = control.columns[ring.stage].position[j];
        if constexpr (OF_KEYS)
            return position != NO_KEY && position - bounds.start[half] >= bounds.count[half];
        else
            return position < bounds.start[half];
    }

    __device__ __forceinline__ Bounds bounds(u32 flags) const
    {
        const HalfRows &rows = control.rows[group];
        Bounds bounds;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            bounds.start[half] = rows.hidden_start[first_row + 8 * half];
            bounds.count[half] = OF_KEYS ? rows.hidden_count[first_row + 8 * half] : 0;
            if (!OF_KEYS && !(flags & STAGE_STRADDLES))
                bounds.start[half] = NO_KEY;
        }
        return bounds;
    }

    // Column of elements 4 j and 4 j + 2 of the products; the next one is that of elements 4 j + 1 and 4 j + 3.
    __device__ __forceinline__ u32 column(u32 j) const { return 8 * j + 2 * (lane & 3); }

    // Shares in place of the products of first vectors.
    template <Mask MASK> __device__ __forceinline__ void weigh(u32 flags)
    {
        const ColumnStage<COLUMNS> &columns = control.columns[ring.stage];
        float slope = p.scale_log2;
        float shift[2] = {};
        if constexpr (!OF_KEYS) {
            shift[0] = columns.log_weight - terms[0].lse;
            shift[1] = columns.log_weight - terms[1].lse;
        }
        Bounds bounds = {};
        if constexpr (MASK == MASK_PAIRS)
            bounds = this->bounds(flags);
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; ++j) {
            float4 of_columns = {};
            if constexpr (OF_KEYS)
                of_columns = *(const float4 *)&columns.terms[column(j)];
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                float offset = !OF_KEYS ? shift[e / 2] : e % 2 ? of_columns.z : of_columns.x;
                float share = exp2_approximate(fmaf(s[4 * j + e], slope, offset));
                if (MASK == MASK_PAIRS)
                    share = seen(bounds, e / 2, column(j) + e % 2) ? share : 0.0f;
                s[4 * j + e] = share;
            }
        }
    }

    // Slopes from shares and the products of second vectors. Both take the place of what they are made of, for there
    // are no registers for more.
    template <Mask MASK> __device__ __forceinline__ void differentiate()
    {
        const ColumnStage<COLUMNS> &columns = control.columns[ring.stage];
        // What is left of a row's bits.
        u32 left[2] = {};
        if constexpr (MASK == MASK_ROWS) {
            u32 hidden = columns.hidden[group * 2 + first_row / 32] >> first_row % 32;
            left[0] = (hidden & 1) - 1;
            left[1] = (hidden >> 8 & 1) - 1;
        }
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; ++j) {
            float4 of_columns = {};
            if constexpr (OF_KEYS)
                of_columns = *(const float4 *)&columns.terms[column(j)];
            float slope[4];
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                float delta = !OF_KEYS ? terms[e / 2].delta : e % 2 ? of_columns.w : of_columns.y;
                slope[e] = s[4 * j + e] * (dp[4 * j + e] - delta);
                // Of what is not seen the other factor may be anything.
                if (MASK == MASK_PAIRS)
                    slope[e] = s[4 * j + e] == 0.0f ? 0.0f : slope[e];
            }
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                u32 pair = 2 * j + half;
                slopes[pair] = f32_to_16x2<TYPE>(slope[2 * half], slope[2 * half + 1]);
                if constexpr (OF_KEYS)
                    shares[pair] = f32_to_16x2<TYPE>(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]);
                if constexpr (MASK == MASK_ROWS) {
                    slopes[pair] &= left[half];
                    shares[pair] &= left[half];
                }
            }
        }
    }

    // Takes what is not finite out of a block's vectors and adds it to the rows that see its column; all computing
    // threads call it.
    __device__ __forceinline__ void take_out_not_finite(float (&to)[DIM / 2], u32 flags, u32 which)
    {
        u32 columns = columns_at(which), thread = threadIdx.x - WARPGROUP;
        bool found = false;
        for (u32 word = thread; word < S::COLUMNS_BYTES / 4; word += CONSUMERS * WARPGROUP) {
            u32 pair = load_shared(columns + word * 4);
            found |= mma::finite_part<TYPE>(pair) != pair;
        }
        if (!consumers_or(found))
            return;
        const Bounds bounds = this->bounds(flags);
#pragma unroll 1
        for (u32 j = 0; j < COLUMNS; ++j) {
            const bool counts[2] = {seen(bounds, 0, j), seen(bounds, 1, j)};
#pragma unroll
            for (u32 n = 0; n < DIM / 8; ++n) {
                u32 pair =
                    load_shared(swizzled(columns + n / 8 * S::COLUMN_CHUNK_BYTES, j, n % 8) + (lane & 3) * 4);
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
        consumers_or(false);
        for (u32 word = thread; word < S::COLUMNS_BYTES / 4; word += CONSUMERS * WARPGROUP) {
            u32 pair = load_shared(columns + word * 4);
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(columns + word * 4), "r"(mma::finite_part<TYPE>(pair))
                         : "memory");
        }
        async_proxy_fence();
        consumers_or(false);
    }

    __device__ __forceinline__ static u32 load_shared(u32 address)
    {
        u32 word;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
        return word;
    }

    // One block. The products of second vectors go on while shares are computed.
    template <Mask MASK> __device__ __forceinline__ void step(u32 flags)
    {
        products_begin();
        multiply(s, 0);
        multiply(dp, 1);
        products_wait<1>();
        pin(s);
        weigh<MASK>(flags);
        products_wait<0>();
        pin(dp);
        differentiate<MASK>();
        if constexpr (MASK == MASK_PAIRS) {
            if (flags & STAGE_STRADDLES) {
                take_out_not_finite(sums, flags, 0);
                if constexpr (OF_KEYS)
                    take_out_not_finite(value_sums, flags, 1);
            }
        }
        // The next tile's rows may be loaded while sums are finished and written.
        if (flags & STAGE_LAST)
            release(control.barriers[S::ROWS_EMPTY + group]);
        pin_sums();
        products_begin();
        if constexpr (OF_KEYS)
            accumulate(value_sums, shares, 1);
        accumulate(sums, slopes, 0);
        products_wait<0>();
        pin_sums();
        release(control.barriers[S::COLUMNS_EMPTY + ring.stage]);
        ring.advance();
    }

    __device__ __forceinline__ void pin_sums()
    {
        pin(sums);
        pin(slopes);
        if constexpr (OF_KEYS) {
            pin(value_sums);
            pin(shares);
        }
    }

    __device__ __forceinline__ void run()
    {
        for (;;) {
            wait(control.barriers[S::ROWS_FULL + group], rows_phase);
            rows_phase ^= 1;
            const HalfRows &rows = control.rows[group];
            if (rows.rows == 0)
                return;
            const u32 batch = rows.batch, head = rows.head, flags = rows.flags, first_output = rows.first_output;
            const float exponent = OF_KEYS ? 0.0f : rows.exponent;
            const u32 row[2] = {rows.row[first_row], rows.row[first_row + 8]};
            if constexpr (!OF_KEYS) {
                terms[0] = rows.terms[first_row];
                terms[1] = rows.terms[first_row + 8];
            }
            bool resumes[2];
#pragma unroll
            for (u32 half = 0; half < 2; ++half)
                resumes[half] = OF_KEYS ? rows.resumes[first_row + 8 * half] != 0 : (flags & TILE_RESUME) != 0;
            bool more = rows.has_columns != 0;
            if (!more)
                release(control.barriers[S::ROWS_EMPTY + group]);
            begin(batch, head, flags, row);
            while (more) {
                wait(control.barriers[S::COLUMNS_FULL + ring.stage], ring.phase);
                u32 block_flags = __shfl_sync(ALL_LANES, control.columns[ring.stage].flags, 0);
                more = !(block_flags & STAGE_LAST);
                if (masked(block_flags, exponent))
                    step<MASK_PAIRS>(block_flags);
                else if (OF_KEYS && (block_flags & STAGE_HIDES))
                    step<OF_KEYS ? MASK_ROWS : MASK_NONE>(block_flags);
                else
                    step<MASK_NONE>(block_flags);
            }
            end<0>(batch, head, flags, row[0], first_output, resumes[0]);
            end<1>(batch, head, flags, row[1], first_output, resumes[1]);
        }
    }

    // Whether shares of a block are to be masked, the same for all threads. Columns that no row sees are zeros, which
    // need no mask where their shares and slopes are finite: they add nothing.
    __device__ __forceinline__ bool masked(u32 flags, float exponent) const
    {
        if (OF_KEYS || (flags & STAGE_STRADDLES) || !(flags & STAGE_MASKED))
            return flags & STAGE_MASKED;
        return !(control.columns[ring.stage].log_weight + exponent <= MOST_EXPONENT);
    }

    // Number of a row among all of its kind.
    __device__ __forceinline__ u64 number(u32 batch, u32 head, u32 row) const
    {
        if constexpr (OF_KEYS)
            return (u64)(batch * p.heads_kv() + head) * p.n_k + row;
        else
            return (u64)(batch * p.heads_q + head) * p.n_q + row;
    }

    // Sums of queries that are not stored again go on from those that are. To all others end() adds.
    __device__ __forceinline__ void begin(u32 batch, u32 head, u32 flags, const u32 (&row)[2])
    {
#pragma unroll
        for (u32 i = 0; i < DIM / 2; ++i)
            sums[i] = 0.0f;
        if constexpr (OF_KEYS) {
#pragma unroll
            for (u32 i = 0; i < DIM / 2; ++i)
                value_sums[i] = 0.0f;
        } else {
            if ((flags & TILE_STORE) || !(flags & TILE_RESUME))
                return;
            add_row<DIM, 0>(sums, row[0] != NO_KEY, sums_of(batch, head, row[0]), F32, p.head_dim);
            add_row<DIM, 1>(sums, row[1] != NO_KEY, sums_of(batch, head, row[1]), F32, p.head_dim);
        }
    }

    // Stored sums of a query.
    __device__ __forceinline__ char *sums_of(u32 batch, u32 head, u32 row) const
    {
        return (char *)(p.state_accumulated + number(batch, head, row) * p.head_dim);
    }

    template <u32 HALF>
    __device__ __forceinline__ void end(u32 batch, u32 head, u32 flags, u32 row, u32 first_output, bool resumes)
    {
        const bool exists = row != NO_KEY;
        // Nobody else adds to the row in this launch, so that the order of sums is known.
        auto write = [&](const float (&from)[DIM / 2], char *to, u32 type, u32 dim, float factor) {
            write_row<TYPE, DIM>(exists, to, type, dim, factor, [&](u32 n) { return pair<HALF>(from, n); });
        };
        auto store = [&](const float (&from)[DIM / 2], char *to, u32 type, u32 dim) {
            store_row<DIM>(exists, resumes, to, type, dim, [&](u32 n) { return pair<HALF>(from, n); });
        };
        if constexpr (OF_KEYS) {
            const u32 type = params.sums_type_of(flags);
            if (flags & KEY_TILE_STORE) {
                bool compact = flags & KEY_TILE_COMPACT;
                u64 at = compact ? (u64)first_output + first_row + 8 * HALF : number(batch, head, row);
                store(sums, params.key_sums_of(flags, at), type, p.head_dim);
                store(value_sums, params.value_sums_of(flags, at), type, p.value_dim);
                if (exists && !compact && lane % 4 == 0)
                    params.key_stored[at] = 1;
                return;
            }
            // Few or none where there are no passes before.
            if (__any_sync(ALL_LANES, resumes)) {
                u64 at = number(batch, head, row);
                add_row<DIM, HALF>(sums, resumes, params.key_sums_of(flags, at), type, p.head_dim);
                add_row<DIM, HALF>(value_sums, resumes, params.value_sums_of(flags, at), type, p.value_dim);
            }
            write(sums, params.dk.row(batch, head, row), params.dk_type, p.head_dim, params.scale);
            write(value_sums, params.dv.row(batch, head, row), params.dv_type, p.value_dim, 1.0f);
        } else if (flags & TILE_STORE) {
            store(sums, sums_of(batch, head, row), F32, p.head_dim);
        } else {
            write(sums, p.out.row(batch, head, row), p.out_type, p.head_dim, params.scale);
        }
    }

    // Of the first or second row.
    template <u32 HALF> __device__ __forceinline__ static float2 pair(const float (&from)[DIM / 2], u32 n)
    {
        return make_float2(from[4 * n + 2 * HALF], from[4 * n + 2 * HALF + 1]);
    }
};

template <u32 TYPE, u32 DIM, bool OF_KEYS> __device__ __forceinline__ void run(const BackwardParams &params)
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
        initialize(S::ROWS_FULL, CONSUMERS, ROW_WARPS * LOADER_ARRIVALS);
        initialize(S::ROWS_EMPTY, CONSUMERS, CONSUMER_WARPS / CONSUMERS);
        initialize(S::COLUMNS_FULL, S::STAGES, LOADER_ARRIVALS);
        initialize(S::COLUMNS_EMPTY, S::STAGES, CONSUMER_WARPS);
        initialize(S::DRAWN_FULL, DRAWN_STAGES, 1);
        initialize(S::DRAWN_EMPTY, DRAWN_STAGES, LOADER_WARPS);
        hopper::barrier_init_fence();
    }
    __syncthreads();

    u32 warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        hopper::registers_decrease<LOADER_REGISTERS[OF_KEYS]>();
        if constexpr (OF_KEYS)
            Loader<DIM, KeyTiles<DIM>>(params, control, data).run();
        else
            Loader<DIM, QueryTiles<DIM>>(params, control, data).run();
    } else {
        hopper::registers_increase<CONSUMER_REGISTERS[OF_KEYS]>();
        Consumer<TYPE, DIM, OF_KEYS>(params, control, data, warpgroup - 1).run();
    }
}

#endif

} // namespace backward_hopper
} // namespace hyperattn

// Other targets have the names only.
#if __CUDA_ARCH_FEAT_SM90_ALL
#define HYPERATTN_BACKWARD(TYPE, DIM, OF_KEYS) hyperattn::backward_hopper::run<hyperattn::TYPE, DIM, OF_KEYS>(p)
#else
#define HYPERATTN_BACKWARD(TYPE, DIM, OF_KEYS) __trap()
#endif

#define HYPERATTN_BACKWARD_WGMMA(NAME, TYPE, DIM) \
    extern "C" __global__ void __launch_bounds__(hyperattn::backward_hopper::THREADS, 1) \
        backward_wgmma_queries_##NAME##_##DIM(const __grid_constant__ hyperattn::BackwardParams p) \
    { \
        HYPERATTN_BACKWARD(TYPE, DIM, false); \
    } \
    extern "C" __global__ void __launch_bounds__(hyperattn::backward_hopper::THREADS, 1) \
        backward_wgmma_keys_##NAME##_##DIM(const __grid_constant__ hyperattn::BackwardParams p) \
    { \
        HYPERATTN_BACKWARD(TYPE, DIM, true); \
    }

HYPERATTN_BACKWARD_WGMMA(bf16, BF16, 64)
HYPERATTN_BACKWARD_WGMMA(bf16, BF16, 128)
HYPERATTN_BACKWARD_WGMMA(f16, F16, 64)
HYPERATTN_BACKWARD_WGMMA(f16, F16, 128)

#undef HYPERATTN_BACKWARD
#undef HYPERATTN_BACKWARD_WGMMA
