// Gradients of keys or values of a KV head whose query heads are in several parts of a call, each of which leaves its
// own in f32: sums in the order of the parts.
#pragma once

#include "convert.cuh"

// One thread per element of [rows][dim]: grid ceil(rows * dim / 256), block 256. Adds `part` to `sums`; where `to` has
// data the result goes there instead.
extern "C" __global__ void __launch_bounds__(256)
    backward_add_parts(float *sums, const float *part, const __grid_constant__ hyperattn::View to,
                       hyperattn::u32 to_type, hyperattn::u32 dim, hyperattn::u64 count)
{
    using namespace hyperattn;
    u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= count)
        return;
    float sum = sums[at] + part[at];
    if (to.data == nullptr) {
        sums[at] = sum;
        return;
    }
    char *row = to.row(0, 0, (u32)(at / dim));
    if (to_type == F32)
        ((float *)row)[at % dim] = sum;
    else
        ((u16 *)row)[at % dim] = to_type == BF16 ? bf16_from_f32(sum) : f16_from_f32(sum);
}
