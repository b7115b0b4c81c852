// The uniform residual's keys: sample_size positions of every rectangle of a pass, for every KV head, independent and
// with the CPU's draws.
#pragma once

#include "levels.cuh"
#include "philox.cuh"

namespace hyperattn {

struct SampleParams {
    Pass pass;
    u64 seed;
    u64 offset;
    // [KV heads of the set][rectangles][sample_size].
    u32 *positions;
    // Of a batch item.
    u32 heads_kv;
    // Of the set, counted through the batch.
    u32 first_head;
    u32 set_heads;
    u32 sample_size;
    // The positions' rows, by the order of the set's keys [KV heads of the set][n_k]; null where nothing is sorted.
    const u32 *key_order;
    u32 *listed_rows;
    u32 n_k;
    // Number of the first KV head among those that random numbers are drawn for.
    u32 first_stream_head;
};

static_assert(sizeof(SampleParams) == 112 && sizeof(Passes<SampleParams>) == 928, "the host's mirrors count on it");

// Position of draw `index` in the keys of a rectangle.
__device__ __forceinline__ u32 sampled_position(const Stream &stream, const Rectangle &rectangle, u32 index)
{
    u32 len = rectangle.key_end - rectangle.key_start;
    return rectangle.key_start + below(stream.uniform(rectangle.key_start, len, index), len);
}

} // namespace hyperattn

// One thread per sample: for each pass ceil(set_heads * rectangles * sample_size / 128) blocks of 128 threads.
extern "C" __global__ void __launch_bounds__(128)
    paper_samples(const __grid_constant__ hyperattn::Passes<hyperattn::SampleParams> passes)
{
    using namespace hyperattn;
    u32 block;
    const SampleParams &params = passes.pass(block);
    u64 at = (u64)block * 128 + threadIdx.x;
    if (at >= (u64)params.set_heads * params.pass.count * params.sample_size)
        return;
    u32 index = (u32)(at % params.sample_size);
    u32 item = (u32)(at / params.sample_size);
    u32 head = (params.first_head + item / params.pass.count) % params.heads_kv;
    Rectangle rectangle;
    if (!params.pass.rectangle(params.pass.first + item % params.pass.count, rectangle))
        return;
    Stream stream(params.seed, params.offset, params.first_stream_head + head, PURPOSE_UNIFORM_KEY);
    u32 position = sampled_position(stream, rectangle, index);
    params.positions[at] = position;
    if (params.listed_rows)
        params.listed_rows[at] = params.key_order[(u64)(item / params.pass.count) * params.n_k + position];
}
