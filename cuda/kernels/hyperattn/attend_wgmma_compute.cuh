// A computing warpgroup of the Hopper attention kernel: 64 rows of each tile.
//
// The logits of a block are computed while the values of the block before are multiplied and summed; up to 64 columns
// by halves of blocks, whose products are issued among the exponentials of the half before.
#pragma once

#include "attend_wgmma_copy.cuh"
#include "attend_wgmma_softmax.cuh"
#include "barrier.cuh"
#include "convert.cuh"
#include "exchange_fours.cuh"
#include "load_matrices.cuh"
#include "merge_partials.cuh"
#include "online_softmax.cuh"
#include "wgmma.cuh"

namespace hyperattn {
namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

// The body of a computing warpgroup, whose number is `group`.
template <u32 TYPE, u32 DIM> struct Consumer {
    using S = Shape<DIM>;
    static constexpr u32 KEYS = S::KEYS;
    // See attend_by_halves().
    static constexpr u32 PARTS = S::PARTS;
    static constexpr u32 PART_KEYS = KEYS / PARTS;
    // Whether the two warpgroups take turns: in issuing the products of blocks, so that one's weights are computed
    // beside the other's products; in weighing halves, so that one has the exponential units while the other waits and
    // checks. Named barrier 1 + group is passed when it is the group's turn.
    static constexpr bool TURNS = DIM <= 128;

    const AttendParams &p;
    typename S::Control &control;
    u32 data;
    u32 group;
    u32 lane;

    // Of the tile.
    u32 batch;
    u32 head;

    // Of PARTS == 2, as the products take them.
    u32 queries[PARTS == 2 ? DIM / 16 : 1][4];
    float scores[PARTS][PART_KEYS / 2];
    u32 weights[PARTS][PART_KEYS / 4];
    float accumulated[DIM / 2];
    Rows rows;
    Ring<S::QUERY_STAGES> query_ring;
    Ring<S::KEY_STAGES> ring;

    __device__ __forceinline__ Consumer(const AttendParams &params, typename S::Control &shared_control,
                                        u32 shared_data, u32 number)
        : p(params), control(shared_control), data(shared_data), group(number), lane(threadIdx.x % 32)
    {
    }

    __device__ __forceinline__ void wait_for_turn() const
    {
        if (TURNS)
            named_barrier_sync(1 + group, CONSUMERS * WARPGROUP);
    }

    __device__ __forceinline__ void pass_turn() const
    {
        if (TURNS)
            named_barrier_arrive(2 - group, CONSUMERS * WARPGROUP);
    }

    // The warp is done with a stage.
    __device__ __forceinline__ void release(const u64 &barrier)
    {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(shared_address(&barrier));
    }

    // The warp's 16 rows of the tile's queries.
    __device__ __forceinline__ u32 warp_rows() const
    {
        return data + query_ring.stage * S::QUERY_BYTES + (group * 64 + threadIdx.x / 32 % 4 * 16) * ROW_BYTES;
    }

    // Of the four matrices that are columns 16 k to 16 k + 15 of these rows: what this lane gives their address of.
    __device__ __forceinline__ u32 fragment_address(u32 first_row, u32 k) const
    {
        return swizzled(first_row + k / 4 * S::QUERY_CHUNK_BYTES, lane % 16, k % 4 * 2 + lane / 16);
    }

    __device__ __forceinline__ void load_queries()
    {
#pragma unroll
        for (u32 k = 0; k < DIM / 16; ++k)
            load_matrices(queries[k], fragment_address(warp_rows(), k));
    }

    __device__ __forceinline__ u32 values_at(u32 stage) const
    {
        return opaque(data + S::VALUES_AT + stage * S::KEY_BYTES);
    }

    __device__ __forceinline__ u32 keys_at(u32 stage) const { return opaque(data + S::KEYS_AT + stage * S::KEY_BYTES); }

    // Products of the queries and the keys of the block.
    __device__ __forceinline__ void multiply_keys(u32 stage)
    {
        products_begin();
        u32 queries = opaque(data + query_ring.stage * S::QUERY_BYTES + group * 64 * ROW_BYTES);
        u32 keys = keys_at(stage);
#pragma unroll
        for (u32 k = 0; k < DIM / 16; ++k) {
            u32 within = k % 4 * 32;
            multiply_shared<TYPE, KEYS>(scores[0], operand<16>(queries + k / 4 * S::QUERY_CHUNK_BYTES + within),
                                        operand<16>(keys + k / 4 * S::KEY_CHUNK_BYTES + within), k != 0);
        }
        products_commit();
    }

    // Whether keys of a part of the block are masked.
    template <u32 PART> __device__ __forceinline__ bool masked(u32 flags) const
    {
        return flags & BLOCK_PART_MASKED << PART;
    }

    // Hides the keys of a BLOCK_TAIL that are to be masked, in products or in logits.
    __device__ __forceinline__ void hide_tail(u32 flags)
    {
        u32 visible = flags >> BLOCK_VISIBLE_SHIFT;
#pragma unroll
        for (u32 i = (KEYS - TAIL_KEYS) / 2; i < KEYS / 2; ++i) {
            u32 key = i / 4 * 8 + 2 * (lane & 3) + (i & 1);
            scores[0][i] = key < visible ? scores[0][i] : minus_infinity();
        }
    }

    // What the products with the keys of a part of the block are added to, if it is masked: -inf where a row must not
    // see a key. The sum is NaN if the key is not finite, which fine() tells of.
    template <u32 PART> __device__ __forceinline__ void begin_part(const KeyStage<KEYS> &stage, u32 flags)
    {
        if (!masked<PART>(flags)) {
            // They are not read, and what they were need not be kept until here.
#pragma unroll
            for (u32 i = 0; i < PART_KEYS / 2; ++i)
                scores[PART][i] = anything();
            return;
        }
        u32 limits[2];
        limits_of_block(flags, rows, limits);
#pragma unroll
        for (u32 j = 0; j < PART_KEYS / 8; ++j) {
            const u32 *position = stage.position + PART * PART_KEYS + 8 * j + 2 * (lane & 3);
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                scores[PART][4 * j + i] = position[i & 1] < limits[i / 2] ? 0.0f : minus_infinity();
        }
    }

    // Step K of the products with the keys of a part of the block, which are at `keys`, added to what begin_part()
    // made.
    template <u32 PART, u32 K> __device__ __forceinline__ void multiply_part_keys(u32 keys, u32 flags)
    {
        const u32 (&q)[4] = queries[K];
        multiply_registers_by_rows<TYPE, PART_KEYS>(scores[PART], q[0], q[1], q[2], q[3],
                                                    operand<16>(keys + PART * PART_KEYS * ROW_BYTES + K * 32),
                                                    K != 0 || masked<PART>(flags));
    }

    // Step K of summing up the values of a part of the block, which are at `values`, with its weights.
    template <u32 PART, u32 K> __device__ __forceinline__ void multiply_part_values(u32 values)
    {
        const u32 *w = weights[PART] + 4 * K;
        multiply_registers<TYPE, DIM>(accumulated, w[0], w[1], w[2], w[3],
                                      operand<S::KEY_CHUNK_BYTES>(values + (PART * PART_KEYS + K * 16) * ROW_BYTES));
    }

    __device__ __forceinline__ void multiply_values(u32 stage)
    {
        products_begin();
        u32 values = values_at(stage);
        const u32 (&w)[PART_KEYS / 4] = weights[0];
#pragma unroll
        for (u32 k = 0; k < KEYS / 16; ++k)
            multiply_registers<TYPE, DIM>(accumulated, w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3],
                                          operand<S::KEY_CHUNK_BYTES>(values + k * 16 * ROW_BYTES));
        products_commit();
    }

    // Whether the logits of the block in `stage` have to be made before the largest is sought: some are masked, or the
    // largest product is not the largest logit.
    __device__ __forceinline__ bool special(u32 flags) const { return (flags & BLOCK_MASKED) || p.scale_log2 < 0.0f; }

    // The same where a block's tail is hidden afterwards.
    __device__ __forceinline__ bool special_but_tail(u32 flags) const
    {
        return (flags & (BLOCK_MASKED | BLOCK_TAIL)) == BLOCK_MASKED || p.scale_log2 < 0.0f;
    }

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
            make_logits<KEYS>(scores[0], key_stage.position, flags, rows, lane, slope, shift);
            slope = 1.0f;
            shift = 0.0f;
        }
        release(control.barriers[S::KEY_EMPTY + ring.loader()]);
        if (S::QUERY_STAGES == 1 && flags & BLOCK_LAST)
            release(control.barriers[S::QUERY_EMPTY + query_ring.stage]);
    }

    // The exponents relative to the rows' maxima as they are.
    __device__ __forceinline__ Exponents exponents_as_is(float slope, float shift) const
    {
        Exponents exponents;
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            exponents.slope[r] = slope;
            exponents.offset[r] = shift - rows.max[r];
        }
        return exponents;
    }

    // Whether weights by exponents_as_is(), which have these sums, will do.
    __device__ __forceinline__ bool fine(const float (&sum)[2]) const
    {
        return sum[0] < LARGEST_SUM && sum[1] < LARGEST_SUM && fabsf(rows.max[0]) < LARGE_LOGIT &&
               fabsf(rows.max[1]) < LARGE_LOGIT;
    }

    // Weights of a part of the block relative to its own maxima, where those are above the rows'.
    template <u32 PART> __device__ __forceinline__ void weigh_raised(float slope, float shift, float (&sum)[2])
    {
        Exponents exponents = raise<PART_KEYS, DIM>(scores[PART], slope, shift, rows, accumulated);
        weigh<TYPE, PART_KEYS>(scores[PART], exponents, weights[PART], sum);
    }

    __device__ __forceinline__ void add_sums(const float (&sum)[2])
    {
        rows.sum[0] += sum[0];
        rows.sum[1] += sum[1];
    }

    // Weights of the block, relative to the rows' maxima as they are if that will do.
    __device__ __forceinline__ void weigh_block(float slope, float shift)
    {
        float sum[2];
        weigh<TYPE, KEYS>(scores[0], exponents_as_is(slope, shift), weights[0], sum);
        if (!__all_sync(ALL_LANES, fine(sum)))
            weigh_raised<0>(slope, shift, sum);
        add_sums(sum);
    }

    // The same for a tile's first block.
    __device__ __forceinline__ void weigh_first_block(float slope, float shift)
    {
        float sum[2];
        weigh_raised<0>(slope, shift, sum);
        add_sums(sum);
    }

    // Of the block in `ring`; returns its flags.
    __device__ __forceinline__ u32 wait_for_keys()
    {
        barrier_wait(shared_address(&control.barriers[S::KEY_FULL + ring.stage]), ring.phase);
        return block_flags(ring.stage);
    }

    __device__ __forceinline__ void wait_for_values(const Ring<S::KEY_STAGES> &place)
    {
        barrier_wait(shared_address(&control.barriers[S::VALUE_FULL + place.stage]), place.phase);
    }

    // Products of the block's keys beside those of the values before, then its weights.
    template <bool SPECIAL>
    __device__ __forceinline__ void step(u32 flags, Ring<S::KEY_STAGES> before, u32 flags_before)
    {
        pin(weights[0]);
        pin(accumulated);
        multiply_keys(ring.stage);
        // Not one wait before the branch: the compiler would serialize the products around it.
        if (flags_before & BLOCK_MASKED) {
            wait_for_values(before);
        } else {
            wait_for_values(before);
            asm volatile("");
        }
        multiply_values(before.stage);
        pass_turn();
        products_wait<1>();
        pin(scores[0]);
        float slope, shift;
        finish_keys<SPECIAL>(flags, slope, shift);
        products_wait<0>();
        pin(scores[0]);
        pin(accumulated);
        pin(weights[0]);
        finish_values(before, flags_before);
        if (!SPECIAL && flags & BLOCK_TAIL)
            hide_tail(flags);
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

    __device__ __forceinline__ void attend_by_blocks()
    {
        u32 flags = wait_for_keys();
        multiply_keys(ring.stage);
        products_wait<0>();
        pin(scores[0]);
        float slope, shift;
        if (special_but_tail(flags))
            finish_keys<true>(flags, slope, shift);
        else
            finish_keys<false>(flags, slope, shift);
        if (flags & BLOCK_TAIL)
            hide_tail(flags);
        weigh_first_block(slope, shift);

        while (!(flags & BLOCK_LAST)) {
            Ring<S::KEY_STAGES> before = ring;
            u32 flags_before = flags;
            ring.advance();
            flags = wait_for_keys();
            wait_for_turn();
            if (special_but_tail(flags))
                step<true>(flags, before, flags_before);
            else
                step<false>(flags, before, flags_before);
        }

        wait_for_values(ring);
        pin(weights[0]);
        pin(accumulated);
        multiply_values(ring.stage);
        products_wait<0>();
        pin(accumulated);
        pin(weights[0]);
        finish_values(ring, flags);
        ring.advance();
    }

    // Weights of a half of the block in `place`, whose products are there. Meanwhile, step by step, the products with
    // the keys of the next half, of the block in stage `next`, are computed if NEXT, and the values of the half before,
    // of the block in stage `before`, are summed up if BEFORE. Not all at once: a product is issued when most of those
    // before it are done, and a warp that waits does not weigh.
    template <u32 PART, bool BEFORE, bool NEXT>
    __device__ __forceinline__ void weigh_half(const Ring<S::KEY_STAGES> &place, u32 flags, u32 before, u32 next,
                                               u32 next_flags)
    {
        const KeyStage<KEYS> &key_stage = control.key[place.stage];
        float slope = p.scale_log2, shift = key_stage.log_weight;
        Exponents exponents = BEFORE ? exponents_as_is(slope, shift)
                                     : raise<PART_KEYS, DIM>(scores[PART], slope, shift, rows, accumulated);
        float sum[2] = {};
        if (NEXT)
            begin_part<1 - PART>(control.key[next], next_flags);
        u32 keys = keys_at(next), values = values_at(before);
        wait_for_turn();
        pin(exponents.offset);
        weigh_beside<PART, 0, BEFORE, NEXT>(exponents, sum, keys, next_flags, values);
        weigh_beside<PART, 1, BEFORE, NEXT>(exponents, sum, keys, next_flags, values);
        weigh_beside<PART, 2, BEFORE, NEXT>(exponents, sum, keys, next_flags, values);
        pass_turn();
        weigh_beside<PART, 3, BEFORE, NEXT>(exponents, sum, keys, next_flags, values);
        products_wait<0>();
        pin(accumulated);
        pin(scores[1 - PART]);
        pin(weights[1 - PART]);
        bool again = !fine(sum) || p.scale_log2 < 0.0f;
        if (__any_sync(ALL_LANES, again)) {
            if (special(flags)) {
                make_logits<PART_KEYS>(scores[PART], key_stage.position + PART * PART_KEYS, flags, rows, lane, slope,
                                       shift);
                slope = 1.0f;
                shift = 0.0f;
            }
            weigh_raised<PART>(slope, shift, sum);
        }
        add_sums(sum);
        if (PART == 1)
            release(control.barriers[S::KEY_EMPTY + place.loader()]);
    }

    // A quarter of a half's weights, and a step of the products beside it.
    template <u32 PART, u32 K, bool BEFORE, bool NEXT>
    __device__ __forceinline__ void weigh_beside(const Exponents &exponents, float (&sum)[2], u32 keys, u32 next_flags,
                                                 u32 values)
    {
        static_assert(DIM == 64 && PART_KEYS == 64, "as many steps as quarters");
        products_begin();
        if (NEXT)
            multiply_part_keys<1 - PART, K>(keys, next_flags);
        if (BEFORE)
            multiply_part_values<1 - PART, K>(values);
        products_commit();
        weigh_pairs<TYPE, 4 * K, 4>(scores[PART], exponents, weights[PART], sum);
        pin_some<4 * K, 4>(weights[PART]);
    }

    // The same by halves of blocks: while one half is weighed, the products of the next half's keys are computed, and
    // those of the values of the half before.
    __device__ __forceinline__ void attend_by_halves()
    {
        load_queries();
        u32 flags = wait_for_keys();
        begin_part<0>(control.key[ring.stage], flags);
        u32 keys = keys_at(ring.stage);
        products_begin();
        multiply_part_keys<0, 0>(keys, flags);
        multiply_part_keys<0, 1>(keys, flags);
        multiply_part_keys<0, 2>(keys, flags);
        multiply_part_keys<0, 3>(keys, flags);
        products_commit();
        products_wait<0>();
        pin(scores[0]);
        weigh_half<0, false, true>(ring, flags, 0, ring.stage, flags);

        while (!(flags & BLOCK_LAST)) {
            Ring<S::KEY_STAGES> before = ring;
            u32 flags_before = flags;
            ring.advance();
            wait_for_values(before);
            flags = wait_for_keys();
            weigh_half<1, true, true>(before, flags_before, before.stage, ring.stage, flags);
            weigh_half<0, true, true>(ring, flags, before.stage, ring.stage, flags);
            finish_values(before, flags_before);
        }

        wait_for_values(ring);
        weigh_half<1, true, false>(ring, flags, ring.stage, 0, 0);
        u32 values = values_at(ring.stage);
        products_begin();
        multiply_part_values<1, 0>(values);
        multiply_part_values<1, 1>(values);
        multiply_part_values<1, 2>(values);
        multiply_part_values<1, 3>(values);
        products_commit();
        products_wait<0>();
        pin(accumulated);
        pin(weights[1]);
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

    // What a thread reads of a partial of one of its rows: what it has written of other rows, see write_16.
    struct PartialRow {
        float lse;
        uint4 eight[DIM / 32];
    };

    // Place of a row in a partial.
    __device__ __forceinline__ u64 partial_number(u32 r, u32 first_output) const
    {
        return rows.row[r] == NO_ROW ? 0 : p.partial_row(batch, head, first_output, rows.row[r]);
    }

    __device__ __forceinline__ PartialRow read(u32 r, u32 first_output) const
    {
        bool present = rows.row[r] != NO_ROW;
        u64 number = partial_number(r, first_output);
        const char *from = p.partial_values + number * p.partial_bytes() + 16 * (lane & 3);
        PartialRow of;
        of.lse = present ? p.partial_lse[number] : minus_infinity();
#pragma unroll
        for (u32 j = 0; j < DIM / 32; ++j) {
            bool inside = present && 32 * j < p.value_dim;
            of.eight[j] = inside ? *(const uint4 *)(from + 64 * j) : make_uint4(0, 0, 0, 0);
        }
        return of;
    }

    // Weight of a partial; the row's maximum and sum follow.
    __device__ __forceinline__ PartialWeight weigh_row(u32 r, float lse)
    {
        PartialWeight of = weigh_partial(lse, rows.max[r]);
        // This thread's part.
        rows.sum[r] = fmaf(rows.sum[r], of.scale, (lane & 3) == 0 ? of.weight : 0.0f);
        return of;
    }

    template <u32 R> __device__ __forceinline__ void add(const PartialRow &partial)
    {
        PartialWeight of = weigh_row(R, partial.lse);
#pragma unroll
        for (u32 j = 0; j < DIM / 32; ++j) {
            uint4 eight = partial.eight[j];
            u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                u16 low = (u16)pairs[i], high = (u16)(pairs[i] >> 16);
                accumulate<R>(4 * j + i, of, f32_from_16<TYPE>(low), f32_from_16<TYPE>(high));
            }
        }
    }

    // Goes on from `count` partials, each of which is read while the one before is added, where registers hold both.
    __device__ __forceinline__ void merge(const u32 *first_outputs, u32 count)
    {
        if constexpr (DIM > 192) {
#pragma unroll 1
            for (u32 i = 0; i < count; ++i) {
                add<0>(read(0, first_outputs[i]));
                add<1>(read(1, first_outputs[i]));
            }
        } else {
            PartialRow next[2] = {read(0, first_outputs[0]), read(1, first_outputs[0])};
#pragma unroll 1
            for (u32 i = 0; i < count; ++i) {
                PartialRow partial[2] = {next[0], next[1]};
                if (i + 1 < count) {
                    next[0] = read(0, first_outputs[i + 1]);
                    next[1] = read(1, first_outputs[i + 1]);
                }
                add<0>(partial[0]);
                add<1>(partial[1]);
            }
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
                exchange_fours(pairs);
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

    // The same for the warp's 16 rows if all of them are there and have weights, and their outputs have the type of the
    // queries and DIM columns, as usual: without branches, through the shared memory of the warp's queries unless they
    // are partials.
    __device__ __forceinline__ void end_whole_rows(const float (&sum)[2], u32 flags)
    {
        float factor[2] = {reciprocal_approximate(sum[0]), reciprocal_approximate(sum[1])};
        OutputRows to = p.outputs(batch, head, flags);
        if (flags & TILE_PARTIAL)
            write_whole_partials(to, factor);
        else
            write_whole_outputs(to, factor);
        // Two lanes of a row's four, one for each of their rows.
        u32 r = lane & 1;
        if (to.lse && (lane & 2) == 0)
            *(float *)(to.lse + (i64)(r ? rows.row[1] : rows.row[0]) * to.lse_stride) =
                online_softmax::log_sum(r ? rows.max[1] : rows.max[0], r ? sum[1] : sum[0]);
    }

    // Two columns of row r.
    __device__ __forceinline__ u32 whole_pair(u32 j, u32 r, const float (&factor)[2]) const
    {
        return f32_to_16x2<TYPE>(accumulated[4 * j + 2 * r] * factor[r], accumulated[4 * j + 2 * r + 1] * factor[r]);
    }

    // In the order of columns that write_16 gives them.
    __device__ __forceinline__ void write_whole_partials(const OutputRows &to, const float (&factor)[2]) const
    {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            char *at = to.values + (i64)rows.row[r] * to.value_stride + 16 * (lane & 3);
#pragma unroll
            for (u32 j = 0; j < DIM / 8; j += 4)
                *(uint4 *)(at + 16 * j) = make_uint4(whole_pair(j, r, factor), whole_pair(j + 1, r, factor),
                                                     whole_pair(j + 2, r, factor), whole_pair(j + 3, r, factor));
        }
    }

    __device__ __forceinline__ void write_whole_outputs(const OutputRows &to, const float (&factor)[2])
    {
        u32 first_row = warp_rows();
#pragma unroll
        for (u32 j = 0; j < DIM / 16; ++j) {
            u32 pairs[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                pairs[i] = whole_pair(2 * j + i / 2, i & 1, factor);
            store_matrices(fragment_address(first_row, j), pairs);
        }
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            u32 row = 4 * i + lane / 8;
            u32 output = __shfl_sync(ALL_LANES, rows.row[i / 2], row % 8 * 4);
            char *at = to.values + (i64)output * to.value_stride + lane % 8 * 16;
#pragma unroll
            for (u32 chunk = 0; chunk < S::CHUNKS; ++chunk)
                *(uint4 *)(at + chunk * ROW_BYTES) =
                    load_row_part(swizzled(first_row + chunk * S::QUERY_CHUNK_BYTES, row, lane % 8));
        }
    }

    __device__ __forceinline__ void end_rows(u32 flags)
    {
        if constexpr (S::QUERY_STAGES > 1 && DIM % ROW_ELEMENTS == 0) {
            float sum[2] = {row_sum(rows.sum[0]), row_sum(rows.sum[1])};
            bool whole = !(flags & TILE_STORE) && p.out_type == TYPE && p.value_dim == DIM;
            // Partials are aligned.
            i64 places = (u64)p.out.data | p.out.batch_stride | p.out.head_stride | p.out.row_stride;
            whole &= flags & TILE_PARTIAL || (places & 15) == 0;
#pragma unroll
            for (u32 r = 0; r < 2; ++r)
                whole &= rows.row[r] != NO_ROW && sum[r] != 0.0f;
            if (__all_sync(ALL_LANES, whole)) {
                end_whole_rows(sum, flags);
                return;
            }
        }
        end_row<0>(flags);
        end_row<1>(flags);
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
            if (has_keys) {
                if constexpr (PARTS == 2)
                    attend_by_halves();
                else
                    attend_by_blocks();
            }
            end_rows(flags);
            if (S::QUERY_STAGES > 1 || !has_keys)
                release(control.barriers[S::QUERY_EMPTY + query_ring.stage]);
            query_ring.advance();
        }
        if (TURNS && group == 0)
            named_barrier_sync(1, CONSUMERS * WARPGROUP);
    }
};

#endif

} // namespace hopper
} // namespace hyperattn
