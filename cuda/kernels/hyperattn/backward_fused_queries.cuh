// The gradients of queries from their complete sums in memory.
#pragma once

#include "backward_work.cuh"
#include "convert.cuh"

namespace hyperattn {

constexpr u32 FUSED_QUERIES_THREADS = 256;
// Columns of a thread at a time.
constexpr u32 FUSED_QUERIES_COLUMNS = 8;

} // namespace hyperattn

// A block for each of the tiles of queries; block FUSED_QUERIES_THREADS. head_dim is a multiple of 8, and rows of dq
// are aligned to 16 bytes. Queries that see no key have no sums.
extern "C" __global__ void __launch_bounds__(hyperattn::FUSED_QUERIES_THREADS)
    backward_fused_queries(const __grid_constant__ hyperattn::BackwardParams params)
{
    using namespace hyperattn;
    const AttendParams &p = params.attend;
    const Tile tile = p.tiles[blockIdx.x];
    const bool limited = tile.segments && p.segments[tile.first_segment].flags & SEGMENT_LIMITED;
    const u32 parts = p.head_dim / FUSED_QUERIES_COLUMNS;
    const u64 first_row = (u64)(tile.batch * p.heads_q + tile.head) * p.n_q;
    for (u32 i = threadIdx.x; i < tile.rows * parts; i += FUSED_QUERIES_THREADS) {
        u32 row = tile.first_query + i / parts, column = i % parts * FUSED_QUERIES_COLUMNS;
        float4 low = {}, high = {};
        if (tile.segments && (!limited || p.limit(row) != 0)) {
            const float4 *from = (const float4 *)(p.state_accumulated + (first_row + row) * p.head_dim + column);
            low = from[0], high = from[1];
        }
        const float scale = params.scale;
        float4 first = {low.x * scale, low.y * scale, low.z * scale, low.w * scale};
        float4 second = {high.x * scale, high.y * scale, high.z * scale, high.w * scale};
        char *to = p.out.row(tile.batch, tile.head, row);
        if (p.out_type == F32) {
            ((float4 *)((float *)to + column))[0] = first;
            ((float4 *)((float *)to + column))[1] = second;
            continue;
        }
        auto pair = [&](float a, float b) { return p.out_type == BF16 ? bf16x2_from_f32(a, b) : f16x2_from_f32(a, b); };
        *(uint4 *)((u16 *)to + column) = make_uint4(pair(first.x, first.y), pair(first.z, first.w),
                                                    pair(second.x, second.y), pair(second.z, second.w));
    }
}
