// What the backward kernels need to know of every query: its lse, and delta.
#pragma once

#include "attend_any.cuh"
#include "backward_work.cuh"

namespace hyperattn {

constexpr u32 BACKWARD_ROWS_THREADS = 256;
// Lanes of a row, with four columns each at a time.
constexpr u32 BACKWARD_ROWS_LANES = 16;

} // namespace hyperattn

// Grid: ceil(batch * heads_q * n_q / 16); block BACKWARD_ROWS_THREADS. `out` is what forward wrote; dlse may have no
// data.
extern "C" __global__ void __launch_bounds__(hyperattn::BACKWARD_ROWS_THREADS)
    backward_rows(const __grid_constant__ hyperattn::BackwardParams p, const __grid_constant__ hyperattn::View out,
                  hyperattn::u32 out_type, const __grid_constant__ hyperattn::View dlse, hyperattn::RowTerms *row_terms,
                  hyperattn::u64 rows)
{
    using namespace hyperattn;
    constexpr u32 LANES = BACKWARD_ROWS_LANES;
    u64 number = (u64)blockIdx.x * (BACKWARD_ROWS_THREADS / LANES) + threadIdx.x / LANES;
    u32 lane = threadIdx.x % LANES;
    bool exists = number < rows;
    // Divided in 32 bits where that does, for it takes longer than all else in 64.
    u64 flat_head = !exists ? 0 : rows >> 32 == 0 ? (u32)number / p.attend.n_q : number / p.attend.n_q;
    u32 row = exists ? (u32)(number - flat_head * p.attend.n_q) : 0;
    u32 batch = (u32)(flat_head / p.attend.heads_q), head = (u32)(flat_head % p.attend.heads_q);
    bool out_fours = simt::in_fours(out, out_type), dout_fours = simt::in_fours(p.dout, p.dout_type);
    const char *out_row = exists ? out.row(batch, head, row) : nullptr;
    const char *dout_row = exists ? p.dout.row(batch, head, row) : nullptr;
    float delta = 0.0f;
    for (u32 column = lane * 4; column < p.attend.value_dim; column += LANES * 4) {
        float a[4], b[4];
        simt::widen(simt::load_four(out_row, column, p.attend.value_dim, out_type, out_fours), out_type, a);
        simt::widen(simt::load_four(dout_row, column, p.attend.value_dim, p.dout_type, dout_fours), p.dout_type, b);
#pragma unroll
        for (u32 e = 0; e < 4; ++e)
            delta = fmaf(a[e], b[e], delta);
    }
#pragma unroll
    for (u32 distance = 1; distance < LANES; distance *= 2)
        delta += __shfl_xor_sync(0xffffffffu, delta, distance);
    if (!exists || lane != 0)
        return;
    constexpr float LOG2_E = 1.44269504088896340736f;
    float lse = *(const float *)p.attend.lse.row(batch, head, row);
    if (dlse.data)
        delta -= *(const float *)dlse.row(batch, head, row);
    bool empty = lse == online_softmax::negative_infinity();
    row_terms[number].lse = empty ? -lse : lse * LOG2_E;
    row_terms[number].delta = empty ? 0.0f : delta;
}
