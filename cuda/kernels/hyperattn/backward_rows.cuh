// What the backward kernels need to know of every query: its lse, and delta.
#pragma once

#include "attend_any.cuh"
#include "backward_work.cuh"

namespace hyperattn {

constexpr u32 BACKWARD_ROWS_THREADS = 256;
// Lanes of a row, with four columns each at a time.
constexpr u32 BACKWARD_ROWS_LANES = 16;
// Rows of these lanes, whose loads go on at the same time.
constexpr u32 BACKWARD_ROWS_AT_ONCE = 4;

} // namespace hyperattn

// Grid: ceil(batch * heads_q * n_q / 64); block BACKWARD_ROWS_THREADS. `out` is what forward wrote; dlse may have no
// data.
extern "C" __global__ void __launch_bounds__(hyperattn::BACKWARD_ROWS_THREADS)
    backward_rows(const __grid_constant__ hyperattn::BackwardParams p, const __grid_constant__ hyperattn::View out,
                  hyperattn::u32 out_type, const __grid_constant__ hyperattn::View dlse, hyperattn::RowTerms *row_terms,
                  hyperattn::u64 rows)
{
    using namespace hyperattn;
    constexpr u32 LANES = BACKWARD_ROWS_LANES, GROUPS = BACKWARD_ROWS_THREADS / LANES, COUNT = BACKWARD_ROWS_AT_ONCE;
    u64 first = (u64)blockIdx.x * (GROUPS * COUNT) + threadIdx.x / LANES;
    u32 lane = threadIdx.x % LANES;
    bool out_fours = simt::in_fours(out, out_type), dout_fours = simt::in_fours(p.dout, p.dout_type);
    const char *out_row[COUNT], *dout_row[COUNT];
    float lse[COUNT], of_lse[COUNT], delta[COUNT];
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        u64 number = first + i * GROUPS;
        bool exists = number < rows;
        // Divided in 32 bits where that does, for it takes longer than all else in 64.
        u64 flat_head = !exists ? 0 : rows >> 32 == 0 ? (u32)number / p.attend.n_q : number / p.attend.n_q;
        u32 row = exists ? (u32)(number - flat_head * p.attend.n_q) : 0;
        u32 batch = (u32)flat_head / p.attend.heads_q, head = (u32)flat_head % p.attend.heads_q;
        out_row[i] = exists ? out.row(batch, head, row) : nullptr;
        dout_row[i] = exists ? p.dout.row(batch, head, row) : nullptr;
        lse[i] = exists ? *(const float *)p.attend.lse.row(batch, head, row) : 0.0f;
        of_lse[i] = exists && dlse.data ? *(const float *)dlse.row(batch, head, row) : 0.0f;
        delta[i] = 0.0f;
    }
    for (u32 column = lane * 4; column < p.attend.value_dim; column += LANES * 4) {
        simt::Raw a[COUNT], b[COUNT];
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            a[i] = simt::load_four(out_row[i], column, p.attend.value_dim, out_type, out_fours);
            b[i] = simt::load_four(dout_row[i], column, p.attend.value_dim, p.dout_type, dout_fours);
        }
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            float of_out[4], of_dout[4];
            simt::widen(a[i], out_type, of_out);
            simt::widen(b[i], p.dout_type, of_dout);
#pragma unroll
            for (u32 e = 0; e < 4; ++e)
                delta[i] = fmaf(of_out[e], of_dout[e], delta[i]);
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
