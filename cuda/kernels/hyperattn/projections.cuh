// The normals of every KV head's hyperplanes: Box-Muller by the arithmetic of the CPU's math.rs, operation by
// operation. The rounding intrinsics keep the compiler from contracting them, so the bits are the CPU's.
#pragma once

#include "philox.cuh"

namespace hyperattn {

// Hyperplanes are stored and computed in groups of this many.
constexpr u32 HYPERPLANE_GROUP = 8;

// Rows of a stored projection matrix: head_dim rounded up to a whole number of 16-byte vectors of any element type.
__device__ __forceinline__ u32 projection_rows(u32 head_dim)
{
    return (head_dim + 7) / 8 * 8;
}

// ln of a number in [2^-53, 1].
__device__ inline double natural_log(double x)
{
    u64 bits = (u64)__double_as_longlong(x);
    i64 exponent = (i64)(bits >> 52) - 1023;
    double mantissa = __longlong_as_double((i64)((bits & ((1ull << 52) - 1)) | (1023ull << 52)));
    if (mantissa > 1.41421356237309504880) {
        mantissa = __dmul_rn(mantissa, 0.5);
        exponent += 1;
    }
    double t = __ddiv_rn(__dsub_rn(mantissa, 1.0), __dadd_rn(mantissa, 1.0));
    double square = __dmul_rn(t, t);
    double sum = 0.0;
    for (int k = 11; k >= 0; k--)
        sum = __dadd_rn(__dmul_rn(sum, square), __ddiv_rn(1.0, (double)(2 * k + 1)));
    double whole = __dmul_rn((double)exponent, 0.693147180559945309417);
    return __dadd_rn(whole, __dmul_rn(__dmul_rn(2.0, t), sum));
}

// The alternating Taylor series 1 - x^2 / ((n + 1)(n + 2)) (1 - ...) with n = first, first + 2, ...
__device__ inline double turn_series(double square, int first)
{
    double sum = 0.0;
    for (int k = 8; k >= 0; k--) {
        double n = (double)(2 * k + first);
        double divisor = __dmul_rn(__dadd_rn(n, 1.0), __dadd_rn(n, 2.0));
        sum = __dsub_rn(1.0, __dmul_rn(__ddiv_rn(square, divisor), sum));
    }
    return sum;
}

// sin and cos of 2 pi turns / 2^64.
__device__ inline void sin_cos_turns(u64 turns, double &sine, double &cosine)
{
    u64 quarter = (turns + (1ull << 61)) >> 62;
    i64 rest = (i64)(turns - (quarter << 62));
    double x = __dmul_rn(__ll2double_rn(rest), 6.28318530717958647692 / 18446744073709551616.0);
    double square = __dmul_rn(x, x);
    double c = turn_series(square, 0);
    double s = __dmul_rn(x, turn_series(square, 1));
    switch (quarter) {
    case 0: sine = s, cosine = c; break;
    case 1: sine = c, cosine = -s; break;
    case 2: sine = -s, cosine = -c; break;
    default: sine = -c, cosine = s; break;
    }
}

// Two standard normal numbers from two uniform 64-bit numbers.
__device__ inline void normal_pair(u64 radius, u64 angle, float &first, float &second)
{
    double u = __dmul_rn(__ull2double_rn((radius >> 11) + 1), 1.0 / 9007199254740992.0);
    double r = __dsqrt_rn(__dmul_rn(-2.0, natural_log(u)));
    double sine, cosine;
    sin_cos_turns(angle, sine, cosine);
    first = __double2float_rn(__dmul_rn(r, cosine));
    second = __double2float_rn(__dmul_rn(r, sine));
}

// [KV heads][projection_rows(head_dim)][width], zeros in the rows and columns that pad it.
struct ProjectionParams {
    u64 seed;
    u64 offset;
    float *projections;
    u32 heads_kv;
    u32 head_dim;
    u32 num_projs;
    // num_projs rounded up to whole groups.
    u32 width;
    // Number of the first KV head among those that random numbers are drawn for.
    u32 first_stream_head;
    u32 reserved;
};

static_assert(sizeof(ProjectionParams) == 48, "the host's mirror of this struct counts on it");

} // namespace hyperattn

// One thread per stored number: grid ceil(heads_kv * projection_rows * width / 128), block 128.
extern "C" __global__ void __launch_bounds__(128) paper_projections(hyperattn::ProjectionParams params)
{
    using namespace hyperattn;
    u32 rows = projection_rows(params.head_dim);
    u64 at = (u64)blockIdx.x * 128 + threadIdx.x;
    if (at >= (u64)params.heads_kv * rows * params.width)
        return;
    u32 column = (u32)(at % params.width);
    u32 row = (u32)(at / params.width % rows);
    u32 head = (u32)(at / params.width / rows);
    float normal = 0.0f;
    if (row < params.head_dim && column < params.num_projs) {
        u32 index = column * params.head_dim + row;
        u64 radius, angle;
        Stream stream(params.seed, params.offset, params.first_stream_head + head, PURPOSE_PROJECTION);
        stream.block(0, 0, index / 2, radius, angle);
        float even, odd;
        normal_pair(radius, angle, even, odd);
        normal = index % 2 ? odd : even;
    }
    params.projections[at] = normal;
}
