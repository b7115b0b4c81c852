// A computing warpgroup of the Hopper attention kernel: 64 rows of each tile.
//
// The logits of a block are computed while the values of the block before are multiplied and summed. Logits are
//     slope * product + shift
// in base 2; weights are 2^(logit - max), where max is not much below the largest logit so far.
#pragma once

#include "attend_wgmma_layout.cuh"
#include "barrier.cuh"
#include "convert.cuh"
#include "merge_partials.cuh"
#include "wgmma.cuh"

namespace hyperattn {
namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000); }

// A logit is large if its absolute value is above this, see weigh().
constexpr float LARGE_LOGIT = 4194304.0f;

__device__ __forceinline__ float exp2_approximate(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Over the four lanes that hold a row.
__device__ __forceinline__ float row_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

__device__ __forceinline__ float row_sum(float x)
{
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// The two rows of a thread.
struct Rows {
    // What weights are relative to: not much below the largest logit.
    float max[2];
    // This thread's part.
    float sum[2];
    u32 row[2];
    u32 limit[2];
};

// The exponents of a block's weights are slope * product + offset.
struct Exponents {
    float slope[2];
    float offset[2];
};

// Logits in place of products, -inf where a key is masked. Without branches: values are
// multiplied meanwhile, and branches would have the compiler move the scores to other registers.
template <u32 KEYS>
__device__ __forceinline__ void make_logits(float (&scores)[KEYS / 2], const KeyStage<KEYS> &stage, u32 flags,
                                            const Rows &rows, u32 lane, float slope, float shift)
{
    bool all = !(flags & BLOCK_MASKED);
    u32 limit_0 = flags & BLOCK_LIMITED ? rows.limit[0] : NO_ROW;
    u32 limit_1 = flags & BLOCK_LIMITED ? rows.limit[1] : NO_ROW;
#pragma unroll
    for (u32 j = 0; j < KEYS / 8; ++j) {
        u32 first = stage.position[8 * j + 2 * (lane & 3)];
        u32 second = stage.position[8 * j + 2 * (lane & 3) + 1];
        float *s = &scores[4 * j];
        s[0] = all || first < limit_0 ? fmaf(s[0], slope, shift) : minus_infinity();
        s[1] = all || second < limit_0 ? fmaf(s[1], slope, shift) : minus_infinity();
        s[2] = all || first < limit_1 ? fmaf(s[2], slope, shift) : minus_infinity();
        s[3] = all || second < limit_1 ? fmaf(s[3], slope, shift) : minus_infinity();
    }
}

// A row's maximum is only raised when a thread's weights of a block sum up to more than this: most blocks then need no
// maximum at all, and leave what was accumulated alone.
constexpr float LARGEST_SUM = 16384.0f;

// Raises the maxima of a warp's rows to a block's. What was accumulated follows.
template <u32 KEYS, u32 COLUMNS>
__device__ __forceinline__ Exponents raise(const float (&scores)[KEYS / 2], float slope, float shift, Rows &rows,
                                           float (&accumulated)[COLUMNS / 2])
{
    float largest[2] = {fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3])};
#pragma unroll
    for (u32 j = 1; j < KEYS / 8; ++j) {
        largest[0] = fmaxf(largest[0], fmaxf(scores[4 * j], scores[4 * j + 1]));
        largest[1] = fmaxf(largest[1], fmaxf(scores[4 * j + 2], scores[4 * j + 3]));
    }
    Exponents exponents;
    float factor[2];
    float power = __uint_as_float(__float_as_uint(slope) & 0x7f800000);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        float product = row_max(largest[r]);
        float logit = fmaf(product, slope, shift);
        float max = fmaxf(rows.max[r], logit);
        float center = max == minus_infinity() ? 0.0f : max;
        factor[r] = exp2_approximate(rows.max[r] - center);
        rows.max[r] = max;
        rows.sum[r] *= factor[r];
        // The rounding of a large maximum must not become a large exponent. Its last place is above 1/4 then, so the
        // products' differences may as well be scaled by a power of two, which takes them without any rounding.
        bool large = fabsf(center) > LARGE_LOGIT && logit != minus_infinity();
        exponents.slope[r] = large ? power : slope;
        exponents.offset[r] = large ? fmaf(-product, power, logit - center) : shift - center;
    }
#pragma unroll
    for (u32 i = 0; i < COLUMNS / 2; ++i)
        accumulated[i] *= factor[i / 2 & 1];
    return exponents;
}

// Weights of products, and each thread's sums of them.
template <u32 TYPE, u32 KEYS>
__device__ __forceinline__ void weigh(const float (&scores)[KEYS / 2], const Exponents &exponents,
                                      u32 (&weights)[KEYS / 4], float (&sum)[2])
{
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (u32 i = 0; i < KEYS / 4; ++i) {
        u32 r = i & 1;
        float first = exp2_approximate(fmaf(scores[2 * i], exponents.slope[r], exponents.offset[r]));
        float second = exp2_approximate(fmaf(scores[2 * i + 1], exponents.slope[r], exponents.offset[r]));
        sum[r] += first;
        sum[r] += second;
        weights[i] = f32_to_16x2<TYPE>(first, second);
    }
}

// Adds the elements that the loaders took out of the block's values to rows that see them: what is not finite swamps
// any weight.
template <u32 TYPE, u32 KEYS, u32 COLUMNS>
__device__ __forceinline__ void add_not_finite(const AttendParams &p, u32 batch, u32 head,
                                               const ValueStage<KEYS> &stage, const Rows &rows, u32 lane,
                                               float (&accumulated)[COLUMNS / 2])
{
    constexpr u32 EXPONENT = TYPE == BF16 ? 0x7f80 : 0x7c00;
#pragma unroll 1
    for (u32 key = 0; key < KEYS; ++key) {
        if (!(stage.not_finite[key / 32] >> (key % 32) & 1))
            continue;
        u32 row = stage.row[key];
        const char *value = p.v.row(batch, head / p.group, row) + 4 * (lane & 3);
        bool seen[2] = {row < rows.limit[0], row < rows.limit[1]};
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; ++j) {
            if (8 * j >= p.value_dim)
                continue;
            u32 pair = *(const u32 *)(value + 16 * j);
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                u32 element = i & 1 ? pair >> 16 : pair & 0xffff;
                if (seen[i / 2] && (element & EXPONENT) == EXPONENT)
                    accumulated[4 * j + i] += f32_from_16<TYPE>((u16)element);
            }
        }
    }
}

// The body of a computing warpgroup, whose number is `group`.
template <u32 TYPE, u32 DIM> struct Consumer {
    using S = Shape<DIM>;
    static constexpr u32 KEYS = S::KEYS;
    // Whether the two warpgroups take turns in issuing products, so that one's weights are computed beside the other's
    // products. Named barrier 1 + group is passed when it is the group's turn.
    static constexpr bool TURNS = DIM <= 128;

    const AttendParams &p;
    typename S::Control &control;
    u32 data;
    u32 group;
    u32 lane;

    // Of the tile.
    u32 batch;
    u32 head;

    float scores[KEYS / 2];
    u32 weights[KEYS / 4];
    float accumulated[DIM / 2];
    Rows rows;
    Ring<S::QUERY_STAGES> query_ring;
    Ring<S::KEY_STAGES> ring;

    __device__ __forceinline__ Consumer(const AttendParams &params, typename S::Control &shared_control,
                                        u32 shared_data, u32 number)
        : p(params), control(shared_control), data(shared_data), group(number), lane(threadIdx.x % 32)
    {
    }

    // The warp is done with a stage.
    __device__ __forceinline__ void release(const u64 &barrier)
    {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(shared_address(&barrier));
    }

    __device__ __forceinline__ void multiply_keys(u32 stage)
    {
        products_begin();
        u32 queries = opaque(data + query_ring.stage * S::QUERY_BYTES + group * 64 * ROW_BYTES);
        u32 keys = opaque(data + S::KEYS_AT + stage * S::KEY_BYTES);
#pragma unroll
        for (u32 k = 0; k < DIM / 16; ++k) {
            u32 within = k % 4 * 32;
            multiply_shared<TYPE, KEYS>(scores, operand<16>(queries + k / 4 * S::QUERY_CHUNK_BYTES + within),
                                        operand<16>(keys + k / 4 * S::KEY_CHUNK_BYTES + within), k != 0);
        }
        products_commit();
    }

    __device__ __forceinline__ void multiply_values(u32 stage)
    {
        products_begin();
        u32 values = opaque(data + S::VALUES_AT + stage * S::KEY_BYTES);
#pragma unroll
        for (u32 k = 0; k < KEYS / 16; ++k)
            multiply_registers<TYPE, DIM>(accumulated, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2],
                                          weights[4 * k + 3], operand<S::KEY_CHUNK_BYTES>(values + k * 16 * ROW_BYTES));
        products_commit();
    }

    // Whether the logits of the block in `stage` have to be made before the largest is sought: some are masked, or the
    // largest product is not the largest logit.
    __device__ __forceinline__ bool special(u32 flags) const { return (flags & BLOCK_MASKED) || p.scale_log2 < 0.0f; }

    __device__ __forceinline__ u32 block_flags(u32 stage) const
    {
        return __shfl_sync(ALL_LANES, control.key[stage].flags, 0);
    }

    // Ends the use of the keys in `ring`. Logits are slope * score + shift then.
    template <bool SPECIAL> __device__ __forceinline__ void finish_keys(u32 flags, float &slope, float &shift)
    {
        const KeyStage<KEYS> &key_stage = control.key[ring.stage];
        slope = p.scale_log2;
        shift = key_stage.log_weight;
        if (SPECIAL) {
            make_logits<KEYS>(scores, key_stage, flags, rows, lane, slope, shift);
            slope = 1.0f;
            shift = 0.0f;
        }
        release(control.barriers[S::KEY_EMPTY + ring.loader()]);
        if (flags & BLOCK_LAST)
            release(control.barriers[S::QUERY_EMPTY + query_ring.stage]);
    }

    // Weights of the block, relative to the rows' maxima as they are if that will do.
    __device__ __forceinline__ void weigh_block(float slope, float shift)
    {
        Exponents exponents;
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            exponents.slope[r] = slope;
            exponents.offset[r] = shift - rows.max[r];
        }
        float sum[2];
        weigh<TYPE, KEYS>(scores, exponents, weights, sum);
        bool fine = sum[0] < LARGEST_SUM && sum[1] < LARGEST_SUM && fabsf(rows.max[0]) < LARGE_LOGIT &&
                    fabsf(rows.max[1]) < LARGE_LOGIT;
        if (!__all_sync(ALL_LANES, fine)) {
            exponents = raise<KEYS, DIM>(scores, slope, shift, rows, accumulated);
            weigh<TYPE, KEYS>(scores, exponents, weights, sum);
        }
        rows.sum[0] += sum[0];
        rows.sum[1] += sum[1];
    }

    // The same for a tile's first block.
    __device__ __forceinline__ void weigh_first_block(float slope, float shift)
    {
        Exponents exponents = raise<KEYS, DIM>(scores, slope, shift, rows, accumulated);
        float sum[2];
        weigh<TYPE, KEYS>(scores, exponents, weights, sum);
        rows.sum[0] += sum[0];
        rows.sum[1] += sum[1];
    }

    // Of the block in `ring`; returns its flags. Threads' copies are ordered before the products.
    __device__ __forceinline__ u32 wait_for_keys()
    {
        barrier_wait(shared_address(&control.barriers[S::KEY_FULL + ring.stage]), ring.phase);
        u32 flags = block_flags(ring.stage);
        if (flags & BLOCK_GATHERED)
            async_proxy_fence();
        return flags;
    }

    __device__ __forceinline__ void wait_for_values(const Ring<S::KEY_STAGES> &place, u32 flags)
    {
        // Not one wait before the branch: the compiler would serialize the products around it.
        if (flags & BLOCK_GATHERED) {
            barrier_wait(shared_address(&control.barriers[S::VALUE_FULL + place.stage]), place.phase);
            async_proxy_fence();
        } else {
            barrier_wait(shared_address(&control.barriers[S::VALUE_FULL + place.stage]), place.phase);
        }
    }

    // Products of the block's keys beside those of the values before, then its weights.
    template <bool SPECIAL>
    __device__ __forceinline__ void step(u32 flags, Ring<S::KEY_STAGES> before, u32 flags_before)
    {
        pin(weights);
        pin(accumulated);
        multiply_keys(ring.stage);
        wait_for_values(before, flags_before);
        multiply_values(before.stage);
        if (TURNS)
            named_barrier_arrive(2 - group, CONSUMERS * WARPGROUP);
        products_wait<1>();
        pin(scores);
        float slope, shift;
        finish_keys<SPECIAL>(flags, slope, shift);
        products_wait<0>();
        pin(scores);
        pin(accumulated);
        pin(weights);
        finish_values(before, flags_before);
        weigh_block(slope, shift);
    }

    // After the products with a block's values.
    __device__ __forceinline__ void finish_values(const Ring<S::KEY_STAGES> &place, u32 flags)
    {
        const ValueStage<KEYS> &value_stage = control.value[place.stage];
        if ((flags & (BLOCK_LIMITED | BLOCK_MASKED)) == (BLOCK_LIMITED | BLOCK_MASKED)) {
            u32 found = 0;
#pragma unroll
            for (u32 i = 0; i < KEYS / 32; ++i)
                found |= value_stage.not_finite[i];
            if (found)
                add_not_finite<TYPE, KEYS, DIM>(p, batch, head, value_stage, rows, lane, accumulated);
        }
        release(control.barriers[S::VALUE_EMPTY + place.loader()]);
    }

    __device__ __forceinline__ void attend()
    {
        u32 flags = wait_for_keys();
        multiply_keys(ring.stage);
        products_wait<0>();
        pin(scores);
        float slope, shift;
        if (special(flags))
            finish_keys<true>(flags, slope, shift);
        else
            finish_keys<false>(flags, slope, shift);
        weigh_first_block(slope, shift);

        while (!(flags & BLOCK_LAST)) {
            Ring<S::KEY_STAGES> before = ring;
            u32 flags_before = flags;
            ring.advance();
            flags = wait_for_keys();
            if (TURNS)
                named_barrier_sync(1 + group, CONSUMERS * WARPGROUP);
            if (special(flags))
                step<true>(flags, before, flags_before);
            else
                step<false>(flags, before, flags_before);
        }

        wait_for_values(ring, flags);
        pin(weights);
        pin(accumulated);
        multiply_values(ring.stage);
        products_wait<0>();
        pin(accumulated);
        pin(weights);
        finish_values(ring, flags);
        ring.advance();
    }

    __device__ __forceinline__ u64 state_index(u32 row) const
    {
        return (u64)(batch * p.heads_q + head) * p.n_q + row;
    }

    __device__ __forceinline__ void begin()
    {
#pragma unroll
        for (u32 i = 0; i < DIM / 2; ++i)
            accumulated[i] = 0.0f;
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            rows.max[r] = minus_infinity();
            rows.sum[r] = 0.0f;
        }
    }

    // What a thread reads of a partial of its rows: what it has written of other rows, see write_16.
    struct PartialRows {
        float lse[2];
        uint4 eight[2][DIM / 32];
    };

    // Place of a row in a partial.
    __device__ __forceinline__ u64 partial_number(u32 r, u32 first_output) const
    {
        return rows.row[r] == NO_ROW ? 0 : p.partial_row(batch, head, first_output, rows.row[r]);
    }

    __device__ __forceinline__ void read(PartialRows &of, u32 first_output) const
    {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            bool present = rows.row[r] != NO_ROW;
            u64 number = partial_number(r, first_output);
            const char *from = p.partial_values + number * p.partial_bytes() + 16 * (lane & 3);
            of.lse[r] = present ? p.partial_lse[number] : minus_infinity();
#pragma unroll
            for (u32 j = 0; j < DIM / 32; ++j) {
                bool inside = present && 32 * j < p.value_dim;
                of.eight[r][j] = inside ? *(const uint4 *)(from + 64 * j) : make_uint4(0, 0, 0, 0);
            }
        }
    }

    // Weight of a partial; the row's maximum and sum follow.
    __device__ __forceinline__ PartialWeight weigh_row(u32 r, float lse)
    {
        PartialWeight of = weigh_partial(lse, rows.max[r]);
        // This thread's part.
        rows.sum[r] = fmaf(rows.sum[r], of.scale, (lane & 3) == 0 ? of.weight : 0.0f);
        return of;
    }

    template <u32 R> __device__ __forceinline__ void add(const PartialRows &partial)
    {
        PartialWeight of = weigh_row(R, partial.lse[R]);
#pragma unroll
        for (u32 j = 0; j < DIM / 32; ++j) {
            uint4 eight = partial.eight[R][j];
            u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                u16 low = (u16)pairs[i], high = (u16)(pairs[i] >> 16);
                accumulate<R>(4 * j + i, of, f32_from_16<TYPE>(low), f32_from_16<TYPE>(high));
            }
        }
    }

    // Goes on from `count` partials, each of which is read while the one before is added.
    __device__ __forceinline__ void merge(const u32 *first_outputs, u32 count)
    {
        PartialRows next;
        read(next, first_outputs[0]);
#pragma unroll 1
        for (u32 i = 0; i < count; ++i) {
            PartialRows partial = next;
            if (i + 1 < count)
                read(next, first_outputs[i + 1]);
            add<0>(partial);
            add<1>(partial);
        }
    }

    // The same in f32.
    __device__ __forceinline__ void merge_f32(const u32 *first_outputs, u32 count)
    {
#pragma unroll 1
        for (u32 i = 0; i < count; ++i) {
            merge_row_f32<0>(first_outputs[i]);
            merge_row_f32<1>(first_outputs[i]);
        }
    }

    template <u32 R> __device__ __forceinline__ void merge_row_f32(u32 first_output)
    {
        bool present = rows.row[R] != NO_ROW;
        u64 number = partial_number(R, first_output);
        const float *from = (const float *)(p.partial_values + number * p.partial_bytes()) + 2 * (lane & 3);
        PartialWeight of = weigh_row(R, present ? p.partial_lse[number] : minus_infinity());
#pragma unroll
        for (u32 j = 0; j < DIM / 8; ++j) {
            bool inside = present && 8 * j < p.value_dim;
            float2 pair = inside ? *(const float2 *)(from + 8 * j) : make_float2(0.0f, 0.0f);
            accumulate<R>(j, of, pair.x, pair.y);
        }
    }

    template <u32 R>
    __device__ __forceinline__ void accumulate(u32 j, PartialWeight of, float first, float second)
    {
        accumulated[4 * j + 2 * R] = fmaf(of.weight, first, of.scale * accumulated[4 * j + 2 * R]);
        accumulated[4 * j + 2 * R + 1] = fmaf(of.weight, second, of.scale * accumulated[4 * j + 2 * R + 1]);
    }

    // Writes columns of a row as f32: lanes exchange halves, so that each writes 16 bytes.
    template <u32 R> __device__ __forceinline__ void write_f32(char *to, bool write, bool aligned)
    {
        bool odd = lane & 1;
#pragma unroll
        for (u32 j = 0; j < DIM / 8; j += 2) {
            float even_0 = accumulated[4 * j + 2 * R], even_1 = accumulated[4 * j + 2 * R + 1];
            float odd_0 = accumulated[4 * j + 4 + 2 * R], odd_1 = accumulated[4 * j + 5 + 2 * R];
            float other_0 = __shfl_xor_sync(ALL_LANES, odd ? even_0 : odd_0, 1);
            float other_1 = __shfl_xor_sync(ALL_LANES, odd ? even_1 : odd_1, 1);
            u32 column = 8 * (j + odd) + 2 * (lane & 2);
            if (!write || column >= p.value_dim)
                continue;
            float4 four = odd ? make_float4(other_0, other_1, odd_0, odd_1)
                              : make_float4(even_0, even_1, other_0, other_1);
            float *at = (float *)to + column;
            if (aligned) {
                *(float4 *)at = four;
            } else {
                at[0] = four.x;
                at[1] = four.y;
                at[2] = four.z;
                at[3] = four.w;
            }
        }
    }

    // Of four words of each of a row's four lanes: word i of lane k changes places with word k of lane i.
    __device__ __forceinline__ void transpose(u32 (&words)[4]) const
    {
        bool high = lane & 2, odd = lane & 1;
        // Of words 0 and 1 (lanes 0 and 1) or 2 and 3, this lane's and those of the lane two further.
        u32 own_0 = high ? words[2] : words[0], own_1 = high ? words[3] : words[1];
        u32 far_0 = __shfl_xor_sync(ALL_LANES, high ? words[0] : words[2], 2);
        u32 far_1 = __shfl_xor_sync(ALL_LANES, high ? words[1] : words[3], 2);
        // By number of the lane they come from, modulo 2: low lane, then high lane.
        u32 low_0 = high ? far_0 : own_0, low_1 = high ? far_1 : own_1;
        u32 high_0 = high ? own_0 : far_0, high_1 = high ? own_1 : far_1;
        u32 near_low = __shfl_xor_sync(ALL_LANES, odd ? low_0 : low_1, 1);
        u32 near_high = __shfl_xor_sync(ALL_LANES, odd ? high_0 : high_1, 1);
        words[0] = odd ? near_low : low_0;
        words[1] = odd ? low_1 : near_low;
        words[2] = odd ? near_high : high_0;
        words[3] = odd ? high_1 : near_high;
    }

    // Writes columns of a row as 16-bit elements: the lanes of a row transpose 4 x 4 pairs, each writes 16 bytes. Rows
    // of partials stay as they are, whole groups of columns whose order nobody but the next launch knows.
    template <u32 R, u32 OUT>
    __device__ __forceinline__ void write_16(char *to, bool write, bool aligned, bool partial)
    {
#pragma unroll
        for (u32 j = 0; j < DIM / 8; j += 4) {
            u32 pairs[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                float first = accumulated[4 * (j + i) + 2 * R], second = accumulated[4 * (j + i) + 2 * R + 1];
                pairs[i] = f32_to_16x2<OUT>(first, second);
            }
            if (!partial)
                transpose(pairs);
            u32 column = 8 * (j + (lane & 3));
            if (!write || (partial ? 8 * j : column) >= p.value_dim)
                continue;
            u16 *at = (u16 *)to + column;
            if (aligned) {
                *(uint4 *)at = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            } else {
#pragma unroll
                for (u32 i = 0; i < 8; ++i)
                    at[i] = (u16)(pairs[i / 2] >> (i & 1) * 16);
            }
        }
    }

    template <u32 R> __device__ __forceinline__ void end_row(u32 flags)
    {
        float sum = row_sum(rows.sum[R]);
        bool write = rows.row[R] != NO_ROW;
        u32 row = write ? rows.row[R] : 0;
        bool writes_numbers = write && (lane & 3) == 0;
        if (flags & TILE_STORE) {
            u64 index = state_index(row);
            if (writes_numbers) {
                p.state_max[index] = rows.max[R];
                p.state_sum[index] = sum;
            }
            write_f32<R>((char *)(p.state_accumulated + index * p.value_dim), write, true);
            return;
        }
        bool empty = sum == 0.0f;
        OutputRows to_rows = p.outputs(batch, head, flags);
        if (writes_numbers && to_rows.lse)
            *(float *)(to_rows.lse + row * to_rows.lse_stride) =
                empty ? minus_infinity() : (rows.max[R] + log2f(sum)) * 0.693147180559945309f;
        float factor = empty ? 0.0f : 1.0f / sum;
#pragma unroll
        for (u32 j = 0; j < DIM / 8; ++j) {
            accumulated[4 * j + 2 * R] *= factor;
            accumulated[4 * j + 2 * R + 1] *= factor;
        }
        // Weights of 0 have made NaN of values that are not finite.
        if (__any_sync(ALL_LANES, empty)) {
#pragma unroll
            for (u32 j = 0; j < DIM / 8; ++j) {
                accumulated[4 * j + 2 * R] = empty ? 0.0f : accumulated[4 * j + 2 * R];
                accumulated[4 * j + 2 * R + 1] = empty ? 0.0f : accumulated[4 * j + 2 * R + 1];
            }
        }
        char *to = to_rows.values + row * to_rows.value_stride;
        bool aligned = ((u64)to & 15) == 0;
        if (p.out_type == F32)
            write_f32<R>(to, write, aligned);
        else if (p.out_type == BF16)
            write_16<R, BF16>(to, write, aligned, flags & TILE_PARTIAL);
        else
            write_16<R, F16>(to, write, aligned, flags & TILE_PARTIAL);
    }

    __device__ __forceinline__ void run()
    {
        // The first turn is group 0's.
        if (TURNS && group == 1)
            named_barrier_arrive(1, CONSUMERS * WARPGROUP);
        u32 first_row = group * 64 + (threadIdx.x / 32 % 4) * 16 + lane / 4;
        for (;;) {
            barrier_wait(shared_address(&control.barriers[S::QUERY_FULL + query_ring.stage]), query_ring.phase);
            const QueryStage &query = control.query[query_ring.stage];
            if (query.rows == 0)
                break;
            batch = query.batch;
            head = query.head;
            u32 flags = query.flags;
            bool has_keys = query.has_keys;
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                rows.row[r] = query.row[first_row + 8 * r];
                rows.limit[r] = p.limit(rows.row[r]);
                // From here on it is the row of the outputs.
                if (flags & (TILE_COMPACT | TILE_PARTIAL) && rows.row[r] != NO_ROW)
                    rows.row[r] = query.first_output + (flags & TILE_PARTIAL ? rows.row[r] : first_row + 8 * r);
            }
            begin();
            u32 partials = flags & TILE_MERGE ? query.first_output : 0;
            if (partials > 0 && p.out_type == F32)
                merge_f32(query.partial, partials);
            else if (partials > 0)
                merge(query.partial, partials);
            if (has_keys)
                attend();
            else
                release(control.barriers[S::QUERY_EMPTY + query_ring.stage]);
            query_ring.advance();
            end_row<0>(flags);
            end_row<1>(flags);
        }
        if (TURNS && group == 0)
            named_barrier_sync(1, CONSUMERS * WARPGROUP);
    }
};

#endif

} // namespace hopper
} // namespace hyperattn
