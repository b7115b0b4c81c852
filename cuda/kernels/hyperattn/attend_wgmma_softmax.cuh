// The softmax of the Hopper attention kernel, in registers: logits, weights, maxima and sums of a warp's 16 rows.
//
// Logits are
//     slope * product + shift
// in base 2; weights are 2^(logit - max), where max is not much below the largest logit so far.
#pragma once

#include "attend_wgmma_layout.cuh"
#include "convert.cuh"

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

__device__ __forceinline__ float reciprocal_approximate(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// The limits of positions in a block that its flags tell of.
__device__ __forceinline__ void limits_of_block(u32 flags, const Rows &rows, u32 (&limits)[2])
{
    limits[0] = flags & BLOCK_LIMITED ? rows.limit[0] : NO_ROW;
    limits[1] = flags & BLOCK_LIMITED ? rows.limit[1] : NO_ROW;
}

// Logits in place of products, -inf where a key is masked. Without branches: values are
// multiplied meanwhile, and branches would have the compiler move the scores to other registers.
template <u32 KEYS>
__device__ __forceinline__ void make_logits(float (&scores)[KEYS / 2], const u32 *positions, u32 flags,
                                            const Rows &rows, u32 lane, float slope, float shift)
{
    bool all = !(flags & BLOCK_MASKED);
    u32 limits[2];
    limits_of_block(flags, rows, limits);
#pragma unroll
    for (u32 j = 0; j < KEYS / 8; ++j) {
        u32 first = positions[8 * j + 2 * (lane & 3)];
        u32 second = positions[8 * j + 2 * (lane & 3) + 1];
        float *s = &scores[4 * j];
        s[0] = all || first < limits[0] ? fmaf(s[0], slope, shift) : minus_infinity();
        s[1] = all || second < limits[0] ? fmaf(s[1], slope, shift) : minus_infinity();
        s[2] = all || first < limits[1] ? fmaf(s[2], slope, shift) : minus_infinity();
        s[3] = all || second < limits[1] ? fmaf(s[3], slope, shift) : minus_infinity();
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

// Weights of COUNT pairs of products from pair FIRST on, which are added to each thread's sums.
template <u32 TYPE, u32 FIRST, u32 COUNT, u32 SCORES>
__device__ __forceinline__ void weigh_pairs(const float (&scores)[SCORES], const Exponents &exponents,
                                            u32 (&weights)[SCORES / 2], float (&sum)[2])
{
#pragma unroll
    for (u32 i = FIRST; i < FIRST + COUNT; ++i) {
        u32 r = i & 1;
        float first = exp2_approximate(fmaf(scores[2 * i], exponents.slope[r], exponents.offset[r]));
        float second = exp2_approximate(fmaf(scores[2 * i + 1], exponents.slope[r], exponents.offset[r]));
        sum[r] += first;
        sum[r] += second;
        weights[i] = f32_to_16x2<TYPE>(first, second);
    }
}

// Weights of products, and each thread's sums of them.
template <u32 TYPE, u32 KEYS>
__device__ __forceinline__ void weigh(const float (&scores)[KEYS / 2], const Exponents &exponents,
                                      u32 (&weights)[KEYS / 4], float (&sum)[2])
{
    sum[0] = sum[1] = 0.0f;
    weigh_pairs<TYPE, 0, KEYS / 4>(scores, exponents, weights, sum);
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

#endif

} // namespace hopper
} // namespace hyperattn
