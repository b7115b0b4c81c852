// What the backward kernels need to know of every query: its lse, and delta.
#pragma once

#include "attend_any.cuh"
#include "backward_work.cuh"

namespace hyperattn {

constexpr u32 BACKWARD_ROWS_THREADS = 256;
// Of a block.
constexpr u32 BACKWARD_ROWS = 64;

// Eight 16-bit elements [column, column + 8) of a row that is aligned to 16 bytes; zeros of no row.
__device__ __forceinline__ simt::Raw load_eight(const char *row, u32 column)
{
    uint4 words = row == nullptr ? make_uint4(0, 0, 0, 0) : *(const uint4 *)((const u16 *)row + column);
    return {{words.x, words.y, words.z, words.w}};
}

// Whether that takes all rows of a tensor.
__device__ __forceinline__ bool in_eights(const View &tensor, u32 type, u32 dim)
{
    u64 bits = (u64)tensor.data | (u64)tensor.batch_stride | (u64)tensor.head_stride | (u64)tensor.row_stride;
    return type != F32 && bits % 16 == 0 && dim % 8 == 0;
}

// Of BACKWARD_ROWS rows, each by LANES lanes with WIDTH columns at a time: eight, or four of any type.
template <u32 LANES, u32 WIDTH>
__device__ __forceinline__ void write_row_terms(const BackwardParams &p, const View &out, u32 out_type,
                                                const View &dlse, RowTerms *row_terms, u64 rows)
{
    // Of the rows of a lane, the loads go on at the same time.
    constexpr u32 GROUPS = BACKWARD_ROWS_THREADS / LANES, COUNT = BACKWARD_ROWS / GROUPS;
    const u64 first = (u64)blockIdx.x * BACKWARD_ROWS + threadIdx.x / LANES;
    const u32 lane = threadIdx.x % LANES, n_q = p.attend.n_q, heads = p.attend.heads_q, dim = p.attend.value_dim;
    const bool out_fours = simt::in_fours(out, out_type), dout_fours = simt::in_fours(p.dout, p.dout_type);
    // Divided once, and in 32 bits where that does, for it takes longer than all else in 64.
    const u64 flat_head = rows >> 32 == 0 ? (u32)first / n_q : first / n_q;
    u32 row = (u32)(first - flat_head * n_q), batch = (u32)flat_head / heads, head = (u32)flat_head % heads;
    const char *out_row[COUNT], *dout_row[COUNT];
    float lse[COUNT], of_lse[COUNT], delta[COUNT];
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        bool exists = first + i * GROUPS < rows;
        out_row[i] = exists ? out.row(batch, head, row) : nullptr;
        dout_row[i] = exists ? p.dout.row(batch, head, row) : nullptr;
        lse[i] = exists ? *(const float *)p.attend.lse.row(batch, head, row) : 0.0f;
        of_lse[i] = exists && dlse.data ? *(const float *)dlse.row(batch, head, row) : 0.0f;
        delta[i] = 0.0f;
        row += GROUPS;
        while (row >= n_q) {
            row -= n_q;
            if (++head == heads)
                head = 0, ++batch;
        }
    }
    for (u32 column = lane * WIDTH; column < dim; column += LANES * WIDTH) {
        simt::Raw a[COUNT], b[COUNT];
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            if constexpr (WIDTH == 8) {
                a[i] = load_eight(out_row[i], column);
                b[i] = load_eight(dout_row[i], column);
            } else {
                a[i] = simt::load_four(out_row[i], column, dim, out_type, out_fours);
                b[i] = simt::load_four(dout_row[i], column, dim, p.dout_type, dout_fours);
            }
        }
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
            for (u32 half = 0; half < WIDTH / 4; ++half) {
                const simt::Raw of_out = half ? simt::Raw{{a[i].bits[2], a[i].bits[3]}} : a[i];
                const simt::Raw of_dout = half ? simt::Raw{{b[i].bits[2], b[i].bits[3]}} : b[i];
                float four_of_out[4], four_of_dout[4];
                simt::widen(of_out, out_type, four_of_out);
                simt::widen(of_dout, p.dout_type, four_of_dout);
#pragma unroll
                for (u32 e = 0; e < 4; ++e)
                    delta[i] = fmaf(four_of_out[e], four_of_dout[e], delta[i]);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
        for (u32 distance = 1; distance < LANES; distance *= 2)
            delta[i] += __shfl_xor_sync(0xffffffffu, delta[i], distance);
        if (out_row[i] == nullptr || lane != 0)
            continue;
        constexpr float LOG2_E = 1.44269504088896340736f;
        bool empty = lse[i] == online_softmax::negative_infinity();
        row_terms[first + i * GROUPS] = {empty ? -lse[i] : lse[i] * LOG2_E, empty ? 0.0f : delta[i] - of_lse[i]};
    }
}

} // namespace hyperattn

// Grid: ceil(batch * heads_q * n_q / BACKWARD_ROWS); block BACKWARD_ROWS_THREADS. `out` is what forward wrote; dlse may
// have no data.
extern "C" __global__ void __launch_bounds__(hyperattn::BACKWARD_ROWS_THREADS)
    backward_rows(const __grid_constant__ hyperattn::BackwardParams p, const __grid_constant__ hyperattn::View out,
                  hyperattn::u32 out_type, const __grid_constant__ hyperattn::View dlse, hyperattn::RowTerms *row_terms,
                  hyperattn::u64 rows)
{
    using namespace hyperattn;
    const u32 dim = p.attend.value_dim;
    if (!in_eights(out, out_type, dim) || !in_eights(p.dout, p.dout_type, dim))
        write_row_terms<16, 4>(p, out, out_type, dlse, row_terms, rows);
    else if (dim <= 64)
        write_row_terms<8, 8>(p, out, out_type, dlse, row_terms, rows);
    else
        write_row_terms<16, 8>(p, out, out_type, dlse, row_terms, rows);
}
