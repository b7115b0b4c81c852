// One number for all heads of a call, f32 [batch, heads, 1, 1].
#pragma once

#include "types.cuh"

// A thread for each head, which goes through the batch items.
extern "C" __global__ void fill_heads(hyperattn::View to, hyperattn::u32 batch, hyperattn::u32 heads, float value)
{
    hyperattn::u32 head = blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= heads)
        return;
    for (hyperattn::u32 item = 0; item < batch; item += 1)
        *(float *)to.row(item, head, 0) = value;
}
