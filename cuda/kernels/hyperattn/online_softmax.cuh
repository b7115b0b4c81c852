// Terms that the online softmaxes of the kernels share.
#pragma once

#include "types.cuh"

namespace hyperattn {
namespace online_softmax {

// The reference that a row's exponents are relative to is raised when a logit exceeds it by more: few blocks rescale.
constexpr float RAISE = 8.0f;

// Beyond it a fused logit and the rounded reference may differ by more than an exponent can be off: logits are rounded
// first.
constexpr float LARGE_LOGIT = 1048576.0f;

constexpr float LN_2 = 0.693147180559945309f;
constexpr float LOG2_E = 1.44269504088896341f;

__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xff800000u); }

// Relative error below 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approximate(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What is subtracted from the logits of a row: nothing where the row has met no key.
__device__ __forceinline__ float subtrahend(float reference)
{
    return reference == negative_infinity() ? 0.0f : reference;
}

// Natural logarithm of a row's sum of exponentials.
__device__ __forceinline__ float log_sum(float reference, float sum)
{
    return sum == 0.0f ? negative_infinity() : (reference + log2f(sum)) * LN_2;
}

} // namespace online_softmax
} // namespace hyperattn
