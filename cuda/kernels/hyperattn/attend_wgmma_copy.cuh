// How the loading warps of the Hopper attention kernel gather rows that the copy engine cannot fetch, and tell of them.
#pragma once

#include "attend_wgmma_layout.cuh"
#include "barrier.cuh"
#include "tma.cuh"

namespace hyperattn {
namespace hopper {

#if __CUDA_ARCH_FEAT_SM90_ALL

// Waits with the whole warp: lanes that had come apart would stay so, and one that waits holds up one that has work.
__device__ __forceinline__ void warp_wait(u32 barrier, u32 parity)
{
    __syncwarp();
    barrier_wait(barrier, parity);
    __syncwarp();
}

// This warp's arrivals on a barrier, for its copies too.
__device__ __forceinline__ void warp_arrive(u32 barrier, u32 lane)
{
    __syncwarp();
    if (lane == 0)
        barrier_arrive(barrier, LOADER_ARRIVALS / LOADER_WARPS);
}

// The warp's arrivals, its copies' when they end: it does not wait for them. The consumers order them before what the
// tensor cores read.
__device__ __forceinline__ void warp_arrive_after_copies(u32 barrier, u32 lane)
{
    copies_arrive(barrier);
    __syncwarp();
    if (lane == 0)
        barrier_arrive(barrier);
}

// Address of 16 bytes of a row in a chunk.
__device__ __forceinline__ u32 swizzled(u32 chunk, u32 row, u32 part)
{
    return chunk + row * ROW_BYTES + ((part ^ (row & 7)) << 4);
}

// Issues copies of a warp's rows to a stage. Lane i names row i of the warp, or NO_ROW for zeros; `WHOLE` if all are
// rows and of all the chunks' elements. Copies of no bytes do not touch their address.
template <u32 WARP_ROWS, u32 CHUNKS, bool WHOLE>
__device__ __forceinline__ void copy_rows_as(u32 stage, u32 warp, u32 lane, u32 row, const char *from, i64 row_stride,
                                             u32 dim)
{
    constexpr u32 CHUNK_BYTES = WARP_ROWS * LOADER_WARPS * ROW_BYTES;
    // What follows from the lane is made anew each time, there are no registers to keep it.
    lane = opaque(lane);
    u32 part = lane & 7;
    u32 first = lane >> 3;
    u32 given = WHOLE ? 0 : __ballot_sync(ALL_LANES, row != NO_ROW) >> first;
    from += part * 16;
    // Rows of odd steps lie in the swizzle's other half.
    u32 to = swizzled(stage, warp * WARP_ROWS + first, part);
    u32 to_odd = to ^ 64;
#pragma unroll
    for (u32 step = 0; step < WARP_ROWS / 4; ++step) {
        u32 source = __shfl_sync(ALL_LANES, row, 4 * step + first);
        const char *elements = from + source * row_stride;
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            bool copied = WHOLE || ((given >> (4 * step) & 1) && chunk * ROW_ELEMENTS + part * 8 < dim);
            copy_16_bytes((step % 2 ? to_odd : to) + step * 4 * ROW_BYTES + chunk * CHUNK_BYTES,
                          elements + chunk * ROW_BYTES, copied ? 16 : 0);
        }
    }
}

template <u32 WARP_ROWS, u32 CHUNKS>
__device__ __forceinline__ void copy_rows(u32 stage, u32 warp, u32 lane, u32 row, const char *from, i64 row_stride,
                                          u32 dim)
{
    if (__all_sync(ALL_LANES, row != NO_ROW || lane >= WARP_ROWS) && dim == CHUNKS * ROW_ELEMENTS)
        copy_rows_as<WARP_ROWS, CHUNKS, true>(stage, warp, lane, row, from, row_stride, dim);
    else
        copy_rows_as<WARP_ROWS, CHUNKS, false>(stage, warp, lane, row, from, row_stride, dim);
}

// Sets elements that are not finite to 0 in the rows that this warp has copied, each lane in what it copied itself.
// Returns a bit for each row that had one.
template <u32 TYPE, u32 WARP_ROWS, u32 CHUNKS>
__device__ __forceinline__ u32 take_out_not_finite(u32 stage, u32 warp, u32 lane)
{
    constexpr u32 CHUNK_BYTES = WARP_ROWS * LOADER_WARPS * ROW_BYTES;
    constexpr u32 EXPONENT = TYPE == BF16 ? 0x7f80 : 0x7c00;
    u32 found = 0;
#pragma unroll 1
    for (u32 step = 0; step < WARP_ROWS; step += 4) {
        u32 address = swizzled(stage, warp * WARP_ROWS + step + (lane >> 3), lane & 7);
        bool any = false;
#pragma unroll 1
        for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
            u32 words[4];
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                         : "r"(address + chunk * CHUNK_BYTES)
                         : "memory");
            bool here = false;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                if ((words[i] & EXPONENT) == EXPONENT) {
                    words[i] &= 0xffff0000;
                    here = true;
                }
                if ((words[i] >> 16 & EXPONENT) == EXPONENT) {
                    words[i] &= 0x0000ffff;
                    here = true;
                }
            }
            if (here)
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address + chunk * CHUNK_BYTES),
                             "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                             : "memory");
            any |= here;
        }
        u32 lanes = __ballot_sync(ALL_LANES, any);
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            found |= (lanes >> (8 * i) & 0xff ? 1u : 0u) << (step + i);
    }
    return found;
}

#endif

} // namespace hopper
} // namespace hyperattn
