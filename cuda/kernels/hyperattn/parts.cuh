// The keys of a tile in parts, for calls of few queries and many keys: every part is a tile of its own, whose rows' states
// are stored, and afterwards those of all parts are merged.
//
// Launch: merge_parts, grid (ceil(rows * ceil(value_dim / MERGE_COLUMNS) / MERGE_WARPS)), MERGE_THREADS threads.
#pragma once

#include "convert.cuh"
#include "online_softmax.cuh"
#include "work.cuh"

namespace hyperattn {

// Parts begin at multiples of so many keys, which are whole blocks of the attention kernels.
constexpr u32 PART_UNIT = 128;

constexpr u32 MOST_PARTS = 132;

constexpr u32 MERGE_THREADS = 128;
constexpr u32 MERGE_WARPS = MERGE_THREADS / 32;

// Columns of a row that a warp merges.
constexpr u32 MERGE_COLUMNS = 128;

// Turns a tile of one segment of leading keys into part `part` of `parts` of it. The states of a part come after those
// of all `rows` rows of the part before.
__device__ __forceinline__ void take_part(Tile &tile, Segment &segment, u32 part, u32 parts, u32 rows)
{
    if (parts == 1)
        return;
    u32 units = (segment.count + (parts * PART_UNIT - 1)) / (parts * PART_UNIT);
    u32 first = min(part * units * PART_UNIT, segment.count);
    segment.first = first;
    segment.count = min(units * PART_UNIT, segment.count - first);
    tile.segments = segment.count > 0;
    tile.flags |= TILE_COMPACT | TILE_STORE;
    tile.first_output = part * rows + tile.first_query;
}

struct MergeShared {
    // Of the parts' states of a warp's row; less than 0 for one that has met nothing.
    float factors[MERGE_WARPS][MOST_PARTS];
};

// Outputs and lse of `rows` rows, head by head, from the states of their parts.
__device__ __forceinline__ void merge_parts(const AttendParams &p, u32 parts, u32 rows, MergeShared &shared)
{
    using namespace online_softmax;
    constexpr u32 ALL_LANES = 0xffffffffu, COLUMNS = MERGE_COLUMNS / 32;
    u32 lane = threadIdx.x % 32, slices = (p.value_dim + (MERGE_COLUMNS - 1)) / MERGE_COLUMNS;
    u64 item = (u64)blockIdx.x * MERGE_WARPS + threadIdx.x / 32;
    if (item >= (u64)rows * slices)
        return;
    u32 row = (u32)(item / slices), first_column = (u32)(item % slices) * MERGE_COLUMNS + lane;
    float *factors = shared.factors[threadIdx.x / 32];

    float most = negative_infinity();
    for (u32 part = lane; part < parts; part += 32)
        most = fmaxf(most, p.state_max[(u64)part * rows + row]);
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, distance));
    float sum = 0.0f;
    for (u32 part = lane; part < parts; part += 32) {
        u64 state = (u64)part * rows + row;
        float its = p.state_sum[state];
        bool empty = its == 0.0f;
        // A sum that is NaN stays one.
        float factor = empty ? 0.0f : exp2f(p.state_max[state] - most);
        sum += factor * its;
        factors[part] = empty ? -1.0f : factor;
    }
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    __syncwarp();

    float accumulated[COLUMNS] = {};
    const float *from = p.state_accumulated + (u64)row * p.value_dim + first_column;
#pragma unroll 4
    for (u32 part = 0; part < parts; ++part) {
        float factor = factors[part];
        // What nothing has been added to is undefined.
        bool defined = !(factor < 0.0f);
#pragma unroll
        for (u32 i = 0; i < COLUMNS; ++i) {
            bool present = defined && first_column + i * 32 < p.value_dim;
            accumulated[i] = fmaf(defined ? factor : 0.0f, present ? from[i * 32] : 0.0f, accumulated[i]);
        }
        from += (u64)rows * p.value_dim;
    }

    u32 flat_head = row / p.n_q, batch = flat_head / p.heads_q, head = flat_head % p.heads_q;
    float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    char *to = p.out.row(batch, head, row % p.n_q);
#pragma unroll
    for (u32 i = 0; i < COLUMNS; ++i) {
        u32 column = first_column + i * 32;
        if (column >= p.value_dim)
            continue;
        // A row without weight has no value, whatever it met.
        float value = sum == 0.0f ? 0.0f : accumulated[i] * inverse;
        if (p.out_type == F32)
            ((float *)to)[column] = value;
        else
            ((u16 *)to)[column] = p.out_type == BF16 ? bf16_from_f32(value) : f16_from_f32(value);
    }
    if (p.lse.data && first_column == 0)
        *(float *)p.lse.row(batch, head, row % p.n_q) = log_sum(most, sum);
}

} // namespace hyperattn

extern "C" __global__ void __launch_bounds__(hyperattn::MERGE_THREADS)
    merge_parts(const __grid_constant__ hyperattn::AttendParams p, hyperattn::u32 parts, hyperattn::u32 rows)
{
    __shared__ hyperattn::MergeShared shared;
    hyperattn::merge_parts(p, parts, rows, shared);
}
